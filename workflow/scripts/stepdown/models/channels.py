"""Which channels of a model can change places without a change in what it computes: its layers are asked, not its name.

A layer runs with its linears saying what they are told instead of what they compute. What hears other things when the
layer is given other states, all linears being silent, reads the residual; what moves the layer's output when it alone
speaks writes to it. Between the two, the channels that a linear is given are those of others where they change places
when those do: all of an MLP's, and the dimensions of the values inside each head. What does not is left as it is.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..cli import log
from .decoder import Decoder, in_float32
from .layer_walk import LayerWalk
from .linears import watching_outputs

# What layers are asked with. At the first token of a sequence attention can do nothing but pass its values on.
SEQUENCES, TOKENS = 8, 16
# What is one number and what are two, of words that are about 1, in float32: heads may differ by little.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Channels:
    """Channels that can change places with those of the same head.

    heads: int64 [channels], a number each; sides: (stored tensor, its dimension in the form [out, in]) -> int64
    [length], which channel is at each place, -1 for none of these. A channel may be at several, as values are that
    several query heads share.
    """

    name: str
    heads: Tensor
    sides: dict[tuple[str, int], Tensor]


def sort_in_heads(heads: Tensor, importance: Tensor) -> Tensor:
    """The order in which the channels of each head, in the places that it has, come by falling importance; of equal
    ones the first is first: int64 [channels], of each place the channel that goes there."""
    ranked = importance.argsort(descending=True, stable=True)
    order = torch.empty_like(heads)
    order[heads.argsort(stable=True)] = ranked[heads[ranked].argsort(stable=True)]
    return order


def order_of_side(numbers: Tensor, order: Tensor) -> Tensor:
    """The order of the places along a side when its channels come in `order`; what is at several moves in each."""
    held = (numbers >= 0).nonzero()[:, 0]
    places = held[numbers[held].argsort(stable=True)].view(len(order), -1)
    moved = torch.arange(len(numbers))
    moved[places] = places[order]
    return moved


@torch.no_grad()
def find_channels(decoder: Decoder, tokens: Tensor) -> list[Channels]:
    """All channels of a model that can change places: those of the residual first, if they can, then those inside its
    layers. tokens: int64, any text; one layer is in memory at a time.
    """
    text = tokens.flatten()[:TOKENS].repeat(TOKENS)[:TOKENS]
    walk = LayerWalk(in_float32(decoder), [text.expand(SEQUENCES, -1)])
    width = walk.states[0].shape[-1]
    residual, inside, reason = set(), [], None
    try:
        residual |= _around_layers(decoder, width)
    except _Unclear as unclear:
        reason = unclear
    for name, module, replay in walk.layers("find channels"):
        layer = _Layer(walk, name, module)
        try:
            residual |= layer.residual_sides()
        except _Unclear as unclear:
            reason = reason or unclear
        known = {side for channels in inside for side in channels.sides}
        inside += [channels for channels in layer.channels_inside() if known.isdisjoint(channels.sides)]
        replay()
    if reason:
        family = decoder.model.config.model_type
        log.warning("family %r: the channels of the residual stay where they are: %s", family, reason)
        return inside
    numbers = torch.arange(width)
    return [Channels("residual", torch.zeros_like(numbers), dict.fromkeys(sorted(residual), numbers)), *inside]


class _Unclear(Exception):
    """Says of which tensor it cannot be told where the residual is in it."""


def _around_layers(decoder: Decoder, width: int) -> set[tuple[str, int]]:
    """The sides of embeddings, norms and head that are channels of the residual."""
    sides = set()
    for path, module in decoder.model.named_modules():
        if "text" not in getattr(module, "input_modalities", "text"):
            raise _Unclear("the model takes more than text")
        if not f"{path}.".startswith(f"{decoder.layers_name}."):
            sides |= _sides_of(decoder, path, module, width)
    return sides


def _sides_of(decoder: Decoder, path: str, module: nn.Module, width: int) -> set[tuple[str, int]]:
    """The sides of a module's own parameters that are as long as the residual is wide, one of each at most."""
    sides = set()
    for own, parameter in module.named_parameters(prefix=path, recurse=False):
        dims = [dim for dim, length in enumerate(parameter.shape) if length == width]
        if isinstance(module, nn.Embedding):
            dims = [dim for dim in dims if dim == 1]
        if len(dims) > 1:
            raise _Unclear(f"{own} is {list(parameter.shape)}")
        sides |= {(decoder.stored[own], dim) for dim in dims if own in decoder.stored}
    return sides


@dataclass(frozen=True)
class _Answer:
    """What became of a layer that was asked: what each kind of linear, and each other module, was given and said,
    [calls * tokens, channels], and the layer's output."""

    given: dict[str, Tensor]
    said: dict[str, Tensor]
    output: Tensor


# What linears are between the residual and one that writes to it: kind of each that speaks -> which channel each of its
# outputs is; the heads of these channels; and which each input of the one that writes is.
_Found = tuple[dict[str, Tensor], Tensor, Tensor]


class _Layer:
    """A loaded layer, whose linears say what they are told.

    linears: by kind, which all experts are one of, and by number, see `_kind`; others: what else has parameters, by
    name.
    """

    def __init__(self, walk: LayerWalk, name: str, module: nn.Module):
        self.walk, self.name, self.place, self.module = walk, name, int(name.rpartition(".")[2]), module
        self.linears: dict[str, dict[tuple[str, ...], nn.Linear]] = defaultdict(dict)
        self.others: dict[str, nn.Module] = {}
        # A router may be a linear that returns more than its outputs.
        routers = self._returning_more()
        for path, part in module.named_modules():
            if isinstance(part, nn.Linear) and part not in routers:
                kind, numbers = _kind(module, path)
                self.linears[kind][numbers] = part
            elif next(part.parameters(recurse=False), None) is not None:
                self.others[path] = part
        generator = torch.Generator().manual_seed(0)
        states = (torch.randn(walk.states[0].shape, generator=generator) for _ in range(2))
        self.state, other = (state.to(walk.states[0]) for state in states)
        silent, moved = self.ask(), self.ask(state=other)
        self.readers = [kind for kind in self.linears if _differ(silent, moved, kind)]
        self.writers = [kind for kind in self.linears if not torch.equal(self.ask([kind]).output, silent.output)]
        self.sources = [kind for kind in self.linears if kind not in self.writers]
        spoken = self.ask(self.writers)
        # Also what is given only what was written, such as a norm between attention and the residual.
        self.on_residual = [
            path for path in self.others if _differ(silent, moved, path) or _differ(silent, spoken, path)
        ]

    def _returning_more(self) -> set[nn.Module]:
        """The linears that do not return a tensor, as the layer runs by itself."""
        linears = {path: part for path, part in self.module.named_modules() if isinstance(part, nn.Linear)}
        found = set()

        def look(path: str, outputs: object) -> None:
            if not isinstance(outputs, Tensor):
                found.add(linears[path])

        with watching_outputs(linears, look):
            self.walk.call(self.place, 0, self.walk.states[0])
        return found

    def ask(
        self,
        speaking: Collection[str] = (),
        change: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        state: Tensor | None = None,
    ) -> _Answer:
        """Run the layer while linears of the kinds that speak say random words, the same each time but for what
        `change` makes of them, and all others say nothing, which is zeros."""
        given, said = defaultdict(list), defaultdict(list)
        generators = {kind: torch.Generator().manual_seed(number) for number, kind in enumerate(self.linears)}

        def answer(kind: str, linear: nn.Linear, inputs: Tensor) -> Tensor:
            words = torch.zeros(*inputs.shape[:-1], linear.out_features)
            if kind in speaking:
                words = torch.randn(words.shape, generator=generators[kind])
            if change and kind in change:
                words = change[kind](words)
            words = words.to(inputs)
            given[kind].append(inputs.flatten(0, -2))
            said[kind].append(words.flatten(0, -2))
            return words

        def hear(path: str, _: nn.Module, inputs: tuple) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                given[path].append(inputs[0].flatten(0, -2))

        with ExitStack() as opened:
            for kind, linears in self.linears.items():
                for linear in linears.values():
                    linear.forward = partial(answer, kind, linear)
                    opened.callback(delattr, linear, "forward")
            for path, module in self.others.items():
                opened.callback(module.register_forward_pre_hook(partial(hear, path)).remove)
            output = self.walk.call(self.place, 0, (self.state if state is None else state).clone())
        given, said = ({name: torch.cat(calls).cpu().float() for name, calls in of.items()} for of in (given, said))
        return _Answer(given, said, output)

    # --- the residual ------------------------------------------------------------------------------------------------

    def residual_sides(self) -> set[tuple[str, int]]:
        """The sides of the layer's parameters that are channels of the residual; raises `_Unclear`."""
        width = self.state.shape[-1]
        sides = {side for kind in self.readers for side in self._inputs(kind, width)}
        sides |= {side for kind in self.writers for side in self._outputs(kind, width)}
        for path in self.on_residual:
            full = f"{self.name}.{path}" if path else self.name
            sides |= _sides_of(self.walk.decoder, full, self.others[path], width)
        return sides

    def _inputs(self, kind: str, width: int) -> Iterator[tuple[str, int]]:
        for numbers, linear in self.linears[kind].items():
            if linear.in_features != width:
                raise _Unclear(f"{kind} reads {linear.in_features} channels of it")
            yield self._stored(kind, numbers, "weight"), 1

    def _outputs(self, kind: str, width: int) -> Iterator[tuple[str, int]]:
        for numbers, linear in self.linears[kind].items():
            if linear.out_features != width:
                raise _Unclear(f"{kind} writes {linear.out_features} channels to it")
            yield from ((name, 0) for name in self._rows(kind, numbers))

    def _rows(self, kind: str, numbers: tuple[str, ...]) -> list[str]:
        """The stored tensors that have a row or an entry for each output of a linear."""
        return [self._stored(kind, numbers, part) for part, _ in self.linears[kind][numbers].named_parameters()]

    def _stored(self, kind: str, numbers: tuple[str, ...], part: str) -> str:
        path = f"{self.name}.{kind.replace('*', '{}').format(*numbers)}.{part}"
        return self.walk.decoder.stored[path]

    # --- inside the layer --------------------------------------------------------------------------------------------

    def channels_inside(self) -> Iterator[Channels]:
        """Those that each linear that writes to the residual is given, where they can change places."""
        loud = self.ask(self.sources)
        for writer in self.writers:
            if writer in self.readers or writer not in loud.given:
                continue
            for look in (self._elementwise, self._values):
                found = look(writer, loud)
                if found and self._holds(writer, loud, found):
                    yield from self._everywhere(writer, found)
                    break

    def _elementwise(self, writer: str, loud: _Answer) -> _Found | None:
        """All channels of an MLP: each input of the one that writes depends on the outputs of its number alone, of a
        linear that is gate and up in one on both."""
        inputs, outputs = loud.given[writer], {}
        width = inputs.shape[1]
        half = torch.rand(width, generator=torch.Generator().manual_seed(0)) < 0.5
        for kind in self.sources:
            times, rest = divmod(loud.said[kind].shape[1], width) if kind in loud.said else (0, 0)
            if rest or not times:
                continue
            numbers = torch.arange(width).repeat(times)
            now = self.ask(self.sources, {kind: partial(torch.add, half[numbers])}).given[writer]
            if now.shape == inputs.shape and torch.equal((now != inputs).any(0), half):
                outputs[kind] = numbers
        numbers = torch.arange(width)
        return (outputs, torch.zeros_like(numbers), numbers) if outputs else None

    def _values(self, writer: str, loud: _Answer) -> _Found | None:
        """The dimensions of the values of attention, which passes those of a sequence's first token on as they are."""
        inputs = loud.given[writer]
        first = inputs[::TOKENS].T.contiguous()
        for kind, said in loud.said.items():
            if kind not in self.sources or not len(said) == len(inputs) == SEQUENCES * TOKENS:
                continue
            distances = torch.cdist(first, said[::TOKENS].T, compute_mode="donot_use_mm_for_euclid_dist")
            nearest, places = distances.min(1)
            if nearest.max() > TOLERANCE:
                continue
            channels, numbers = places.unique(return_inverse=True)
            if (numbers.bincount() != len(numbers) // len(channels)).any():
                return None
            outputs = torch.full((said.shape[1],), -1)
            outputs[channels] = torch.arange(len(channels))
            return {kind: outputs}, self._heads(writer, kind, channels, numbers), numbers
        return None

    def _heads(self, writer: str, kind: str, channels: Tensor, numbers: Tensor) -> Tensor:
        """The head of each channel of values: where all values of a token are one and the same, so are the sums over
        tokens inside a head, which differ from those beside it. Heads that share values count as their first."""

        def same(words: Tensor) -> Tensor:
            words[..., channels] = words[..., channels[:1]]
            return words

        sums = self.ask(self.sources, {kind: same}).given[writer]
        first_of_head = sums.diff(dim=1).abs().amax(0) > TOLERANCE
        heads = torch.cat([torch.zeros(1, dtype=torch.int64), first_of_head.cumsum(0)])
        return torch.full_like(channels, len(numbers)).scatter_reduce(0, numbers, heads, "amin")

    def _holds(self, writer: str, loud: _Answer, found: _Found) -> bool:
        """Whether channels that change places where they are said do so where they are given, and nothing else does."""
        outputs, heads, inputs = found
        order = sort_in_heads(heads, torch.rand(len(heads), generator=torch.Generator().manual_seed(1)))
        sides = {kind: order_of_side(numbers, order) for kind, numbers in outputs.items()}
        change = {kind: partial(torch.index_select, dim=-1, index=side) for kind, side in sides.items()}
        now = self.ask(self.sources, change)
        expected = loud.given | {writer: loud.given[writer][:, order_of_side(inputs, order)]}
        return all(_close(now.given.get(name), tensor) for name, tensor in expected.items())

    def _everywhere(self, writer: str, found: _Found) -> Iterator[Channels]:
        """The same for all linears of a kind, also for experts that were not asked."""
        outputs, heads, inputs = found
        for numbers in self.linears[writer]:
            if any(numbers not in self.linears[kind] for kind in outputs):
                continue
            sides = {(self._stored(writer, numbers, "weight"), 1): inputs}
            for kind, channels in outputs.items():
                sides |= {(name, 0): channels for name in self._rows(kind, numbers)}
            yield Channels(f"{self.name}.{writer}".replace("*", "{}").format(*numbers), heads, sides)


def _kind(layer: nn.Module, path: str) -> tuple[str, tuple[str, ...]]:
    """The name of a linear with `*` for its numbers in lists of modules, and these; in a sequence they are its name."""
    kind, numbers, parent = [], [], layer
    for part in path.split("."):
        listed = isinstance(parent, nn.ModuleList)
        kind.append("*" if listed else part)
        numbers += [part] if listed else []
        parent = parent.get_submodule(part)
    return ".".join(kind), tuple(numbers)


def _differ(one: _Answer, other: _Answer, name: str) -> bool:
    """Whether a module is given something else; one that is given nothing is not."""
    now, then = one.given.get(name), other.given.get(name)
    return now is not None and then is not None and not torch.equal(now, then)


def _close(now: Tensor | None, expected: Tensor) -> bool:
    return (
        now is not None
        and now.shape == expected.shape
        and bool((now - expected).abs().max() <= TOLERANCE * expected.abs().max())
    )
