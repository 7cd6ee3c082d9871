"""Tensors in pages of 2 MB: a processor that reads weights once finds them in fewer steps than in pages of 4 KB."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

PAGE, LINE = 2**21, 64
# Matrices follow one another in runs of pages, so that small ones fill them too. What is not used takes no memory.
RUN = 32 * PAGE
_free = memoryview(b"")


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of a tensor on the CPU, from the start of a cache line on; in pages as large as the system allows."""
    global _free
    if tensor.numel() == 0:
        return tensor
    size = -(-tensor.nbytes // LINE) * LINE
    if size > len(_free):
        run = mmap.mmap(-1, max(RUN, -(-size // PAGE) * PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):
            run.madvise(mmap.MADV_HUGEPAGE)
        _free = memoryview(run)
    place, _free = _free[:size], _free[size:]
    return torch.frombuffer(place, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape).copy_(tensor)
