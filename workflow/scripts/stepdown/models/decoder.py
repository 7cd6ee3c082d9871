"""Any causal language model as a row of decoder layers, walked with one of them in memory at a time.

The model is built on the meta device; what surrounds its layers (embeddings, final norm, head) is loaded when needed.
One forward pass in which every layer only passes its input on records what each layer is called with (masks, positions,
...); the layers are then replayed one by one. Nothing here knows a model family.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..cli import progress
from ..errors import UserError
from ..plan.gpus import claim_gpus
from .checkpoint import Checkpoint
from .linears import FUSED, as_linears_, fused_names
from .quantised_checkpoint import open_checkpoint
from .sliced import as_sliced_, read_width


@dataclass
class Decoder:
    """A causal language model whose weights are still on disk.

    model: the Hugging Face model, its parameters on the meta device, its buffers real; layers_name: where its decoder
    layers are ("model.layers"); dtype: what it computes in; states_device: where hidden states wait between two layers;
    checkpoint: where its weights are; stored: name of each tensor of the model -> its name in the checkpoint, which is
    the name everything outside this module goes by.
    """

    model: nn.Module
    layers_name: str
    dtype: torch.dtype
    device: torch.device
    states_device: torch.device
    checkpoint: Checkpoint
    stored: dict[str, str]

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self.layers_name)

    def linears(self) -> dict[str, nn.Linear]:
        """The prunable matrices by stored name: every linear inside a decoder layer; embeddings and head are none."""
        found = self.layers.named_modules(prefix=self.layers_name)
        return {
            self.stored[f"{name}.weight"].removesuffix(".weight"): module
            for name, module in found
            if isinstance(module, nn.Linear) and f"{name}.weight" in self.stored
        }


def open_decoder(
    folder: Path | str, device: str = "auto", trust_remote_code: bool = False, hidden_states: str = "device"
) -> Decoder:
    """Build the model of a checkpoint folder without reading its weights.

    hidden_states: `device`, or `cpu` where a device has room for one layer but not for the states of all sequences.
    Raises `UserError` when the folder is no causal language model, or its decoder layers hold no linears.
    """
    checkpoint = open_checkpoint(folder)
    model = build_empty(folder, trust_remote_code).eval()
    transposed = as_linears_(model)
    layers_name = find_layers(model)
    if width := read_width(folder):
        as_sliced_(model, model.get_submodule(layers_name), width)
    target = choose_device(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(target)
    dtype = getattr(model.config, "dtype", None) or model.dtype
    stored = stored_names(model, checkpoint)
    checkpoint.transposed = frozenset(stored[f"{name}.weight"] for name in transposed if f"{name}.weight" in stored)
    check_sizes(model, checkpoint, stored)
    waiting = torch.device("cpu") if hidden_states == "cpu" else target
    decoder = Decoder(model, layers_name, dtype, target, waiting, checkpoint, stored)
    if not decoder.linears():
        raise UserError(f"{folder}: the decoder layers hold no nn.Linear, so there is nothing to prune")
    return decoder


def load_whole(folder: Path | str, device: str = "auto", trust_remote_code: bool = False) -> nn.Module:
    """The model of a checkpoint folder with all its weights: what `LayerWalk` walks, ready for use."""
    decoder = open_decoder(folder, device, trust_remote_code)
    _load(decoder, decoder.model, "", list(decoder.model.state_dict()))
    decoder.model.tie_weights()
    return decoder.model


def build_empty(folder: Path | str, trust_remote_code: bool = False) -> nn.Module:
    """The causal language model of a folder's config.json with parameters on the meta device and real buffers."""
    # Imported here: what only reads checkpoints should not wait seconds for it.
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, PretrainedConfig
    from transformers.initialization import no_init_weights

    from .loading import build_model

    def build(config: PretrainedConfig) -> nn.Module:
        with no_init_weights(), init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)

    return build_model(folder, build, trust_remote_code)


def stored_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Name of each tensor of the model -> the name it is stored under; tied weights share one.

    transformers renames tensors while loading: GPT-NeoX stores its head as `embed_out`, old OPT leaves out `model.`.
    Experts are stored one by one and fused while loading; `model` has them one by one too, see `as_linears_`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    own, fused = model.state_dict(), fused_names(model)
    stored = {}
    for name in checkpoint.names:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own | fused)
        if pattern and renamed in fused:
            converter = next(converter for converter in converters if pattern in converter.source_patterns)
            number = re.search(r"\.experts\.(\d+)\.", name)[1]
            part = FUSED[renamed.rpartition(".")[2]][converter.source_patterns.index(pattern)]
            stored[f"{fused[renamed]}.{number}.{part}.weight"] = name
        elif renamed in own and not pattern:
            stored[renamed] = name
    for name, source in model.all_tied_weights_keys.items():
        # Either of two that are one may be the one that is stored.
        for own, other in ((name, source), (source, name)):
            if own not in stored and other in stored:
                stored[own] = stored[other]
    return stored


def check_sizes(model: nn.Module, checkpoint: Checkpoint, stored: dict[str, str]) -> None:
    """Raises `UserError` for a tensor that config.json makes of another shape than the weights have."""
    for name, tensor in model.state_dict().items():
        if name in stored and (found := checkpoint.shape(stored[name])) != tuple(tensor.shape):
            raise UserError(
                f"{checkpoint.folder}: config.json makes {name} {list(tensor.shape)}, the weights hold {list(found)}; "
                "take both from the same model"
            )


def find_layers(model: nn.Module) -> str:
    """The name of the decoder layers: the module list that holds the most parameters."""
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not sizes:
        raise UserError(f"{model.config.name_or_path}: {type(model).__name__} has no list of decoder layers")
    return max(sizes, key=sizes.__getitem__)


def choose_device(device: str, count: int = 1) -> torch.device:
    """`auto` is a GPU where there is one; of several it is one that no other job has, or `count` of them."""
    if device != "cpu":
        claim_gpus(count)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: torch sees no GPU here; use 'auto' or 'cpu'")
    return torch.device(device)


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
        with _loaded_around_layers(decoder, decoder.model.base_model_prefix):
            self._returned = _returned_by_layers(decoder, batches[0][:1])
            for batch in batches:
                state, calls = _record_calls(decoder, batch, self._returned)
                self.states.append(state.to(decoder.states_device))
                self._calls.append(_share(calls, self._calls[0]) if self._calls else calls)

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
            layer.to("meta")

    @torch.no_grad()
    def logits(self) -> Iterator[Tensor]:
        """After the last layer: per batch, the logits [sequences, tokens, vocabulary] of the model's own head."""
        model = self.decoder.model
        with _loaded_around_layers(self.decoder):
            for batch, state in zip(self.batches, self.states, strict=True):
                returned = self._returned(state.to(self.decoder.device))
                with _layers_replaced(self.decoder, lambda *_, returned=returned, **__: returned):
                    yield model(input_ids=batch.to(self.decoder.device), use_cache=False).logits

    def loss_gradients(self) -> Iterator[Tensor]:
        """After the last layer: per batch, the gradient of its mean loss by its hidden states, in their shape."""
        model = self.decoder.model
        with _loaded_around_layers(self.decoder):
            for batch, state in zip(self.batches, self.states, strict=True):
                state = state.detach().to(self.decoder.device).requires_grad_()
                tokens, returned = batch.to(self.decoder.device), self._returned(state)
                with _layers_replaced(self.decoder, lambda *_, returned=returned, **__: returned):
                    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                yield torch.autograd.grad(loss, state)[0]

    def call(self, place: int, number: int, state: Tensor) -> Tensor:
        """What layer `place`, loaded, makes of `state` [sequences, tokens, hidden] as that of batch `number`."""
        arguments, keywords = self._calls[number][place]
        output = self.decoder.layers[place](state.to(self.decoder.device), *arguments, **keywords)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def _replay(self, place: int, advance: bool = True, batch: int | None = None) -> None:
        for number in range(len(self.batches)) if batch is None else [batch]:
            output = self.call(place, number, self.states[number])
            if advance:
                self.states[number] = output.to(self.decoder.states_device)


def load_module(decoder: Decoder, module: nn.Module, name: str) -> None:
    """Load the weights of one submodule from the checkpoint, in the type the model computes in."""
    _load(decoder, module, f"{name}.", list(module.state_dict()))


def _load(decoder: Decoder, module: nn.Module, prefix: str, names: list[str]) -> None:
    """Fill the named tensors of `module`, whose names in the model begin with `prefix`."""
    wanted = {name: decoder.stored[prefix + name] for name in names if prefix + name in decoder.stored}
    found = decoder.checkpoint.tensors(set(wanted.values()))
    tensors = {name: _ready(found[stored], decoder) for name, stored in wanted.items()}
    module.load_state_dict(tensors, strict=False, assign=True)
    missing = [name for name in names if name not in wanted and module.state_dict()[name].is_meta]
    if missing:
        raise UserError(
            f"{decoder.checkpoint.folder}: no tensor {prefix + missing[0]!r}; the checkpoint is not complete"
        )


def _ready(tensor: Tensor, decoder: Decoder) -> Tensor:
    return tensor.to(decoder.device, decoder.dtype if tensor.is_floating_point() else tensor.dtype)


@contextmanager
def _loaded_around_layers(decoder: Decoder, prefix: str = "") -> Iterator[None]:
    """While open, what is outside the decoder layers and begins with `prefix` is loaded: embeddings, norms, head."""
    model, inside = decoder.model, decoder.layers_name + "."
    names = [name for name in model.state_dict() if name.startswith(prefix) and not name.startswith(inside)]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}.intersection(names)
    _load(decoder, model, "", names)
    try:
        yield
    finally:
        meta = {name: torch.empty_like(model.get_parameter(name), device="meta") for name in parameters}
        model.load_state_dict(meta, strict=False, assign=True)


@contextmanager
def _layers_replaced(decoder: Decoder, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, every decoder layer answers with `forward`; attributes the model asks a layer for stay its own."""
    for layer in decoder.layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in decoder.layers:
            del layer.forward


def _returned_by_layers(decoder: Decoder, batch: Tensor) -> Callable[[Tensor], Any]:
    """How the model expects its layers to return hidden states: bare, or first in a tuple (some families still do)."""

    def bare(state: Tensor) -> Tensor:
        return state

    def in_tuple(state: Tensor) -> tuple[Tensor]:
        return (state,)

    try:
        # A model that expects tuples takes the first sequence for the whole batch, and another shape comes out.
        with _layers_replaced(decoder, lambda *arguments, **keywords: _split_call(arguments, keywords)[0]):
            output = decoder.model.base_model(input_ids=batch.to(decoder.device), use_cache=False)
        return bare if output.last_hidden_state.shape[:2] == batch.shape else in_tuple
    except RuntimeError:
        return in_tuple


def _record_calls(
    decoder: Decoder, batch: Tensor, returned: Callable[[Tensor], Any]
) -> tuple[Tensor, list[tuple[tuple, dict]]]:
    """What the first layer sees of a batch, and what each layer is called with beside the hidden states."""
    states: list[Tensor] = []
    calls: list[tuple[tuple, dict]] = []

    def pass_on(*arguments: Any, **keywords: Any) -> Any:
        state, *call = _split_call(arguments, keywords)
        states.append(state)
        calls.append(tuple(call))
        return returned(state)

    with _layers_replaced(decoder, pass_on):
        decoder.model.base_model(input_ids=batch.to(decoder.device), use_cache=False)
    return states[0], calls


def _split_call(arguments: tuple, keywords: dict) -> tuple[Tensor, tuple, dict]:
    """The hidden states a layer is called with, and the rest of the call."""
    if arguments:
        return arguments[0], arguments[1:], keywords
    return keywords["hidden_states"], (), {key: value for key, value in keywords.items() if key != "hidden_states"}


def _share(calls: list[tuple[tuple, dict]], reference: list[tuple[tuple, dict]]) -> list[tuple[tuple, dict]]:
    """The calls, each tensor that equals one of the reference replaced by it: positions and masks are held once."""
    known = list({id(leaf): leaf for leaf in tree_leaves(reference) if isinstance(leaf, Tensor)}.values())
    memo: dict[int, Tensor] = {}

    def shared(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            same = (other for other in known if other.shape == tensor.shape and torch.equal(other, tensor))
            memo[id(tensor)] = next(same, tensor)
        return memo[id(tensor)]

    return tree_map_only(Tensor, shared, calls)
