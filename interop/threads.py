"""Keep torch from competing with JAX for the cores."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A context in which torch computes in one thread.

    With arrays this small, torch's threads mostly wait for each other. On a busy
    machine they were up to twenty times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
