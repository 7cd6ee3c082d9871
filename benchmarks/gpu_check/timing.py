"""How long a piece of work takes a device."""

import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]


def milliseconds(works: list[Work], device: torch.device, replays: int = 20) -> float:
    """Median time of one of `works`, which do the same to copies of the same data, so that none of it is in a cache.

    On a GPU all are captured as one graph: what is timed is the GPU's work, not Python's.
    """
    if device.type == "cpu":
        return statistics.median(_seconds(work) for work in works) * 1000
    for work in works:  # Compiles, and plans.
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    graph.replay()
    return statistics.median(_events(graph.replay) for _ in range(replays)) / len(works)


def gigabytes_per_second(device: torch.device, tiny: bool) -> float:
    """Of a large copy, reads and writes counted."""
    source = torch.ones(1 << (18 if tiny else 29), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds([lambda: torch.neg(source, out=target)], device) / 1e6


def seconds_of(work: Work, device: torch.device) -> float:
    """Wall time of something long."""

    def waited_for() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return _seconds(waited_for)


def _seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _events(work: Work) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
