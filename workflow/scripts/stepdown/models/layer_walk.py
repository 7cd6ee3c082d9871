"""Walking a decoder layer by layer: one forward pass in which every layer only passes its input on records what each is
called with (masks, positions, ...); the layers are then replayed one by one, each as the model itself calls it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ..cli import progress
from ..errors import UserError
from ..tensors.token_chunks import sum_over_tokens, summed_cross_entropy
from .decoder import Decoder, load_module, load_zeros, loaded_around_layers, loaded_before_layers, unload
from .host_states import HostStates

# Logits that are float32 at a time: 16 MB, less than a layer.
CHUNK = 2**22


class LayerWalk:
    """Token batches on their way through a decoder, one layer in memory at a time.

    batches: int64 [sequences, tokens] each. `states` holds, per batch, the hidden states [sequences, tokens, hidden]
    that the next layer will see.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, batches: Sequence[Tensor]):
        self.decoder = decoder
        self.batches = batches
        self.states: list[Tensor] = []
        self._calls: list[list[tuple[tuple, dict]]] = []
        self._carried: list[dict[_Carried, Any]] = [{} for _ in batches]
        self._host_states = HostStates(decoder.device, decoder.states_device)
        if decoder.returned is None:
            decoder.returned = _returned_by_layers(decoder, batches[0][:1])
        with loaded_before_layers(decoder, batches):
            for batch in batches:
                state, calls = _record_calls(decoder, batch)
                self.states.append(self._host_states.put(state))
                self._calls.append(_share(calls, self._calls[0]) if self._calls else calls)
        self._host_states.finish()
        # What later layers are called with, and what the model may go on from.
        self._wanted = {leaf for leaf in tree_leaves(self._calls) if isinstance(leaf, _Carried)}
        last = len(decoder.layers) - 1
        self._wanted |= {_Carried(last, position) for position in range(1, len(decoder.returned[last].leaves))}

    def layers(
        self, description: str | None, backwards: bool = False
    ) -> Iterator[tuple[str, nn.Module, Callable[..., None]]]:
        """Yield each layer's name, the loaded layer and `replay(advance=True)`, which runs every batch through it.

        Hook or change the layer before replaying it; with `advance=False` the outputs are dropped and the states stay,
        and `batch=3` replays that batch alone.
        A layer must be replayed with `advance=True` once: its outputs are what the next layer sees.
        """
        numbered = list(enumerate(self.decoder.layers))
        numbered = numbered[::-1] if backwards else numbered
        for place, layer in progress(numbered, description) if description else numbered:
            name = f"{self.decoder.layers_name}.{place}"
            load_module(self.decoder, layer, name)
            yield name, layer, partial(self._replay, place)
            unload(layer)

    @torch.no_grad()
    def logits(self, head_of_tokens: bool = False) -> Iterator[Tensor]:
        """After the last layer: per batch, the logits [sequences, tokens, vocabulary] of the model's own head;
        `head_of_tokens`: those of tokens that are in none of the batches mean nothing."""
        model = self.decoder.model
        with loaded_around_layers(self.decoder, batches=self.batches, head_of_tokens=head_of_tokens):
            for number, (batch, state) in enumerate(zip(self.batches, self.states, strict=True)):
                with _layers_replaced(self.decoder, self._answering(number, state.to(self.decoder.device))):
                    yield model(input_ids=batch.to(self.decoder.device), use_cache=False).logits

    def loss_gradients(self, summed: bool = False) -> Iterator[Tensor]:
        """After the last layer: per batch, the gradient of its mean loss by its hidden states, in their shape.

        `summed`: of the loss summed over its tokens, which no batch size changes and no 16-bit type rounds to zero.
        """
        model = self.decoder.model
        with loaded_around_layers(self.decoder, batches=self.batches):
            for number, (batch, state) in enumerate(zip(self.batches, self.states, strict=True)):
                state = state.detach().to(self.decoder.device).requires_grad_()
                tokens = batch.to(self.decoder.device)
                with _layers_replaced(self.decoder, self._answering(number, state)):
                    logits = model(input_ids=tokens, use_cache=False).logits
                # Families differ in what they add to a loss of their own.
                logits, following = logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
                loss = sum_over_tokens(summed_cross_entropy, logits, following, entries=CHUNK) / len(following)
                loss = loss * (tokens.numel() if summed else 1)
                with carrying_back(self.decoder):
                    gradient = torch.autograd.grad(loss, state)[0]
                yield gradient

    def call(self, place: int, number: int, state: Tensor) -> Tensor:
        """What layer `place`, loaded, makes of `state` [sequences, tokens, hidden] as that of batch `number`."""
        return self._call(place, number, state)[0]

    def _call(self, place: int, number: int, state: Tensor) -> list[Any]:
        """The leaves of what layer `place` returns: the hidden states first, then whatever its family adds."""
        known = self._carried[number] | {STATES: state.to(self.decoder.device)}
        arguments, keywords = _with_leaves(self._calls[number][place], _Carried, known.__getitem__)
        return tree_leaves(self.decoder.layers[place](*arguments, **keywords))

    def carry_back(
        self, place: int, number: int, state: Tensor, gradients: Mapping["_Carried", Tensor]
    ) -> dict["_Carried", Tensor]:
        """The gradients of the loss by what layer `place`, loaded, is called with of batch `number`, of those by what
        it returns; what several layers are called with has the sum. state: what it is given, [sequences, tokens,
        hidden].
        """
        given = {key: value for key, value in self._carried[number].items() if key.place < place} | {STATES: state}
        given = {key: value for key, value in given.items() if isinstance(value, Tensor) and value.is_floating_point()}
        given = {key: value.detach().to(self.decoder.device).requires_grad_() for key, value in given.items()}
        known = self._carried[number] | given
        arguments, keywords = _with_leaves(self._calls[number][place], _Carried, known.__getitem__)
        leaves = tree_leaves(self.decoder.layers[place](*arguments, **keywords))
        returned = {_Carried(place, position) if position else STATES: leaf for position, leaf in enumerate(leaves)}
        reached = {key: leaf for key, leaf in returned.items() if key in gradients and leaf.requires_grad}
        torch.autograd.backward(list(reached.values()), [gradients[key].to(state.device) for key in reached])
        found = {key: gradient for key, gradient in gradients.items() if key not in returned}
        for key, value in given.items():
            if value.grad is not None:
                found[key] = found[key] + value.grad if key in found else value.grad
        return found

    def _answering(self, number: int, state: Tensor) -> Callable[..., Any]:
        """A forward of layers that batch `number` has passed: whatever they are called with, they answer with `state`,
        and with what else the last of them returned."""
        carried = self._carried[number]

        def answer(place: int, *_: Any, **__: Any) -> Any:
            form = self.decoder.returned[place]
            leaves = [carried.get(_Carried(place, position), leaf) for position, leaf in enumerate(form.leaves)]
            return Returned(leaves, form.tree).with_states(state)

        return answer

    @torch.no_grad()
    def _replay(self, place: int, advance: bool = True, batch: int | None = None) -> None:
        numbers = range(len(self.batches)) if batch is None else [batch]
        states = self._host_states.fetch(self.states[number] for number in numbers)
        for number, state in zip(numbers, states, strict=True):
            output, *more = self._call(place, number, state)
            if advance:
                self.states[number] = self._host_states.put(output)
                carried = {_Carried(place, position): leaf for position, leaf in enumerate(more, 1)}
                self._carried[number] |= {key: carried[key] for key in carried.keys() & self._wanted}
        self._host_states.finish()


@contextmanager
def _layers_replaced(decoder: Decoder, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, every decoder layer answers with `forward(place, ...)`, place being its number; attributes the model
    asks a layer for stay its own."""
    for place, layer in enumerate(decoder.layers):
        layer.forward = partial(forward, place)
    try:
        yield
    finally:
        for layer in decoder.layers:
            del layer.forward


@dataclass(frozen=True)
class Returned:
    """The form of what a layer returns: leaves of a tree, the first of them the hidden states."""

    leaves: list
    tree: TreeSpec

    def holds_states_like(self, states: Tensor) -> bool:
        """Whether what comes first is of the kind of hidden states, [sequences, tokens, hidden]."""
        return isinstance(self.leaves[0], Tensor) and self.leaves[0].shape[-1:] == states.shape[-1:]

    def with_states(self, states: Tensor) -> Any:
        """The form around other hidden states."""
        return tree_unflatten([states, *self.leaves[1:]], self.tree)


@dataclass(frozen=True)
class _Carried:
    """Stands in a recorded call for something beside hidden states that an earlier layer returned."""

    place: int
    position: int


# The place of hidden states themselves.
STATES = _Carried(-1, 0)


class _LastLayerDone(Exception):
    """Ends a forward pass: what comes after the decoder layers need not be computed."""


@contextmanager
def carrying_back(decoder: Decoder) -> Iterator[None]:
    """Where a family computes something that torch has no gradient of, one line says so."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(
            f"{decoder.checkpoint.folder}: the family {decoder.model.config.model_type!r} hands no gradients back from"
            f" layer to layer ({str(error).partition(chr(10))[0]}); choose what needs none: pruning.cost: wanda,"
            " reconstruction.enabled: false"
        ) from error


def _returned_by_layers(decoder: Decoder, batch: Tensor) -> list[Returned]:
    """What each layer returns when it really runs, with zeros for weights: forms do not depend on them.

    Raises `UserError` unless the model runs on tokens alone, and calls each layer once, in order.
    """
    returned: dict[int, Returned] = {}
    called = []

    def run(place: int, *arguments: Any, **keywords: Any) -> Any:
        called.append(place)
        layer = decoder.layers[place]
        load_zeros(layer, layer.state_dict(), decoder.device)
        output = type(layer).forward(layer, *arguments, **keywords)
        unload(layer)
        returned[place] = Returned(*tree_flatten(output))
        return output

    model, inside = decoder.model, f"{decoder.layers_name}."
    load_zeros(model, [name for name in model.state_dict() if not name.startswith(inside)], decoder.device)
    try:
        with torch.no_grad(), _layers_replaced(decoder, run):
            model(input_ids=batch.to(decoder.device), use_cache=False)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise _unwalkable(decoder, f"does not run on tokens alone ({str(error).partition(chr(10))[0]})") from error
    finally:
        unload(model, keep=inside)
    if called != list(range(len(decoder.layers))):
        raise _unwalkable(decoder, f"calls its {len(decoder.layers)} layers {len(called)} times, not one after another")
    return [returned[place] for place in called]


def _unwalkable(decoder: Decoder, reason: str) -> UserError:
    family = decoder.model.config.model_type
    return UserError(
        f"{decoder.checkpoint.folder}: the family {family!r} {reason}; its layers cannot be pruned one by one"
    )


@torch.no_grad()
def _record_calls(decoder: Decoder, batch: Tensor) -> tuple[Tensor, list[tuple[tuple, dict]]]:
    """What the first layer sees of a batch, and what each layer is called with beside the hidden states."""
    states: list[Tensor] = []
    calls: list[tuple[tuple, dict]] = []
    # By identity: what a layer is called with is what an earlier one returned, or the model's own.
    origin: dict[int, _Carried] = {}

    def pass_on(place: int, *arguments: Any, **keywords: Any) -> Any:
        state, call = _split_call(arguments, keywords)
        if states and not (state is states[0] or torch.equal(state, states[0])):
            raise _unwalkable(decoder, f"changes hidden states between its layers {place - 1} and {place}")
        states.append(state)
        calls.append(_with_leaves(call, Tensor, lambda tensor: origin.get(id(tensor), tensor)))
        form = decoder.returned[place]
        if not form.holds_states_like(state):
            raise _unwalkable(decoder, f"returns no hidden states from its layer {place}")
        if place == len(decoder.layers) - 1:
            raise _LastLayerDone
        origin.update({id(leaf): _Carried(place, position) for position, leaf in enumerate(form.leaves) if position})
        return form.with_states(state)

    with _layers_replaced(decoder, pass_on), suppress(_LastLayerDone):
        decoder.model(input_ids=batch.to(decoder.device), use_cache=False)
    return states[0], calls


def _split_call(arguments: tuple, keywords: dict) -> tuple[Tensor, tuple[tuple, dict]]:
    """The hidden states a layer is called with, and the call with `STATES` in their place."""
    if "hidden_states" in keywords:
        return keywords["hidden_states"], (arguments, keywords | {"hidden_states": STATES})
    return arguments[0], ((STATES, *arguments[1:]), keywords)


def _share(calls: list[tuple[tuple, dict]], reference: list[tuple[tuple, dict]]) -> list[tuple[tuple, dict]]:
    """The calls, each tensor that equals one of the reference replaced by it: positions and masks are held once."""
    known = list({id(leaf): leaf for leaf in tree_leaves(reference) if isinstance(leaf, Tensor)}.values())
    memo: dict[int, Tensor] = {}

    def shared(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            same = (other for other in known if other.shape == tensor.shape and torch.equal(other, tensor))
            memo[id(tensor)] = next(same, tensor)
        return memo[id(tensor)]

    return [_with_leaves(call, Tensor, shared) for call in calls]


def _with_leaves(call: tuple[tuple, dict], kind: type, change: Callable[[Any], Any]) -> tuple[tuple, dict]:
    """A call with its leaves of a kind changed. An argument without any stays the same object, as layers may hand each
    other things in it."""

    def changed(argument: Any) -> Any:
        concerned = any(isinstance(leaf, kind) for leaf in tree_leaves(argument))
        return tree_map_only(kind, change, argument) if concerned else argument

    arguments, keywords = call
    return tuple(map(changed, arguments)), {name: changed(argument) for name, argument in keywords.items()}
