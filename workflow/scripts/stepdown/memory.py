"""That the memory of a layer goes back to the system when the layer is done with. Where the C library is another than
glibc nothing happens."""

import contextlib
import ctypes

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
LARGE_BYTES = 1 << 23


def map_large_tensors() -> None:
    """Have glibc map large tensors one by one: by itself it soon takes them from a heap, where what is left in between
    keeps the memory of layers long gone."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def give_back_freed() -> None:
    """Give back what is free inside the heap, between what is still used: small tensors, and scratch of the kernels."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
