// Typeset what pymdownx.arithmatex marked: \( ... \) in a line, \[ ... \] on its own.
document$.subscribe(() => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const text = element.textContent.trim();
    katex.render(text.slice(2, -2), element, {
      displayMode: text.startsWith("\\["),
      throwOnError: true,
    });
  }
});
