"""Visiting the decoder layers of a model one by one: what is gathered of their linears, and what their weights become.

A method brings two functions. `gather(linears)` is a context manager that yields a dict by name of a linear: while it
is open the calibration text goes through the layer, and hooks sum what the method asks of the inputs (forwards) or the
gradients (backwards) of the linears. `make(name, weight, statistics)` returns what becomes of a weight.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..models.checkpoint import load_tensors, save_tensors
from ..models.layer_walk import STATES, LayerWalk, carrying_back
from ..models.linears import watching_inputs

Gather = Callable[[dict[str, nn.Linear]], AbstractContextManager[dict[str, Any]]]


@dataclass(frozen=True)
class LoadedLayer:
    """A decoder layer, the only one in memory, with the text about to go through it.

    walk: its `states` are what the layer is given; place: the layer's number; linears: its prunable ones by stored
    name, in the order the model has them; used_later: those of them that a later layer uses too; replay: sends every
    batch through, see `LayerWalk.layers`.
    """

    walk: LayerWalk
    place: int
    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    used_later: frozenset[str]
    replay: Callable[..., None]

    def gather(self, gather: Gather, advance: bool = False) -> dict[str, Any]:
        """What `gather` makes of a replay; with `advance` it is also the one that the next layer goes on from."""
        with gather(self.linears) as found:
            self.replay(advance=advance)
        return found

    def weights(self) -> dict[str, Tensor]:
        """The weights of the linears whose last use this is, by their names in the checkpoint, on the CPU."""
        done = {name: linear for name, linear in self.linears.items() if name not in self.used_later}
        return {f"{name}.weight": linear.weight.detach().cpu() for name, linear in done.items()}

    def output(self, batch: int) -> Tensor:
        """What the layer makes of the states of a batch: [sequences, tokens, hidden]."""
        return self.walk.call(self.place, batch, self.walk.states[batch])

    def called_together(self) -> list[list[str]]:
        """The linears in the order they are called, those that are given the same tensor (q, k and v) together.

        Those that are not given every token once, such as experts, are left out.
        """
        groups: list[tuple[Tensor, list[str]]] = []
        calls: Counter[str] = Counter()

        def record(name: str, inputs: Tensor) -> None:
            calls[name] += 1
            if not groups or inputs is not groups[-1][0]:
                groups.append((inputs, []))
            groups[-1][1].append(name)

        with watching_inputs(self.linears, record):
            self.replay(advance=False, batch=0)
        given = [inputs.shape[:-1].numel() for inputs, _ in groups]
        # A layer may be given more than the text's tokens, and one of its linears a token in several parts.
        tokens = self.walk.batches[0].numel()
        tokens = tokens if tokens in given else max(given, default=0)
        whole = [names for count, (_, names) in zip(given, groups, strict=True) if count == tokens]
        return [once for names in whole if (once := [name for name in names if calls[name] == 1])]

    def inputs(self, name: str, batch: int) -> Tensor:
        """What a linear is given of a batch, float32 [tokens, in]; what comes after it in the layer is not computed. An
        expert that no token is routed to is given none."""

        def leave(_: str, inputs: Tensor) -> None:
            raise _Reached(inputs)

        try:
            with watching_inputs({name: self.linears[name]}, leave):
                self.replay(advance=False, batch=batch)
        except _Reached as reached:
            return reached.args[0].flatten(0, -2).float()
        return self.linears[name].weight.new_empty(0, self.linears[name].in_features, dtype=torch.float32)


class _Reached(Exception):
    """Carries a linear's inputs out of its layer."""


def visit(walk: LayerWalk, description: str | None, backwards: bool = False) -> Iterator[LoadedLayer]:
    """The layers of a walk, one in memory at a time; each must be replayed with `advance=True` once."""
    last_uses = walk.decoder.last_uses()
    for name, module, replay in walk.layers(description, backwards):
        place = int(name.rpartition(".")[2])
        linears = walk.decoder.linears_of(place)
        later = frozenset(linear for linear in linears if last_uses[linear] > place)
        yield LoadedLayer(walk, place, name, module, linears, later, replay)


def added(before: Any, now: Any) -> Any:
    """Statistics of two uses of a linear, or of the one that saw tokens."""
    return before if now is None else now if before is None else before + now


@torch.no_grad()
def change_layers(
    walk: LayerWalk,
    description: str,
    gather: Mapping[str, Gather],
    make: Callable[[str, Tensor, dict[str, Any]], Tensor],
) -> Iterator[LoadedLayer]:
    """Change the layers in order, each by what it sees of those changed before it, and yield each once it is changed.

    gather: by name of a statistic; with none, no text goes through the layers. make: (name of a linear, its weight
    [out, in], its statistics by name, None where no token reached it) -> its new weight. A linear that several layers
    use is changed in the last of them, by the statistics of all uses.
    """
    earlier: dict[tuple[str, str], Any] = {}
    for layer in visit(walk, description):
        with ExitStack() as opened:
            found = {statistic: opened.enter_context(by(layer.linears)) for statistic, by in gather.items()}
            if gather:
                layer.replay(advance=False)
        for name, linear in layer.linears.items():
            # No longer held than until the weight is made: a Hessian may be larger than the layer.
            statistics = {
                statistic: added(earlier.pop((statistic, name), None), values.pop(name, None))
                for statistic, values in found.items()
            }
            if name in layer.used_later:
                earlier |= {(statistic, name): values for statistic, values in statistics.items()}
                continue
            linear.weight.copy_(make(name, linear.weight, statistics))
        if gather:
            layer.replay()
        yield layer


def visit_backwards(walk: LayerWalk, summed: bool = False) -> Iterator[LoadedLayer]:
    """The layers from the last to the first; to replay one carries the gradients of the loss back through it.

    The loss is the mean one of a batch, or `summed` over its tokens. Of a layer's parameters, only those that `gather`
    sets to require gradients get any. The states before each layer wait on disk, in TMPDIR, for the way back, so that
    one layer is in memory there too.
    """
    with TemporaryDirectory(prefix="stepdown-states-") as waiting:
        for layer in visit(walk, "forward"):
            states = {str(number): state.cpu() for number, state in enumerate(walk.states)}
            save_tensors(states, Path(waiting) / f"{layer.place}.safetensors", {})
            layer.replay()
        gradients = [{STATES: gradient.to(walk.decoder.states_device)} for gradient in walk.loss_gradients(summed)]
        for layer in visit(walk, "backward", backwards=True):
            states, _ = load_tensors(Path(waiting) / f"{layer.place}.safetensors")
            walk.states = [states[str(number)] for number in range(len(states))]
            layer.module.requires_grad_(False)
            yield replace(layer, replay=partial(_replay_backwards, layer, gradients))


def _replay_backwards(layer: LoadedLayer, gradients: list[dict[Any, Tensor]], advance: bool = True) -> None:
    """With `advance`, the gradients by what the layer returns, per batch, become those by what it is called with."""
    decoder = layer.walk.decoder
    for number, state in enumerate(layer.walk.states):
        with carrying_back(decoder):
            found = layer.walk.carry_back(layer.place, number, state.to(decoder.device), gradients[number])
        if advance:
            gradients[number] = {key: gradient.to(decoder.states_device) for key, gradient in found.items()}
