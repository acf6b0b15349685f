"""How is torch kept from fighting JAX for the cores?"""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A context in which torch computes in one thread; afterwards it is as before.

    For arrays as small as these its threads mostly wait for each other, the longer the
    busier the machine is: twenty times was seen.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
