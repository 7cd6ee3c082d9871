"""Hidden states that wait on the host while a GPU computes with others: copied there and back beside its work."""

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class HostStates:
    """Carries states between the device that computes with them and the one where they wait.

    From a GPU to the CPU each way has a stream of its own, and states wait in pinned memory, which the GPU reads and
    writes by itself: so the next is there when the last is done, and nobody waits for one that is being put away.
    """

    def __init__(self, device: torch.device, waiting_on: torch.device):
        self.device, self.waiting_on = device, waiting_on
        self._streams = ()
        if device.type == "cuda" and waiting_on.type == "cpu":
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def fetch(self, states: Iterable[Tensor]) -> Iterator[Tensor]:
        """The states on the device, one after the other; the next is on its way meanwhile."""
        if not self._streams:
            yield from (state.to(self.device) for state in states)
            return
        coming = deque()
        for state in states:
            coming.append(self._send(state))
            if len(coming) > 1:
                yield self._arrived(*coming.popleft())
        while coming:
            yield self._arrived(*coming.popleft())

    def put(self, state: Tensor) -> Tensor:
        """A state where it waits; nobody but `fetch` may look at it before `finish`."""
        if not self._streams:
            return state.to(self.waiting_on)
        _, down = self._streams
        down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(down):
            waiting = torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
            waiting.copy_(state, non_blocking=True)
        state.record_stream(down)
        return waiting

    def finish(self) -> None:
        """Wait until all that was put away is there."""
        if self._streams:
            self._streams[1].synchronize()

    def _send(self, state: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        up, _ = self._streams
        with torch.cuda.stream(up):
            sent = state.to(self.device, non_blocking=True)
        return sent, up.record_event()

    def _arrived(self, state: Tensor, event: torch.cuda.Event) -> Tensor:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)
        state.record_stream(stream)
        return state
