"""Any causal language model as a row of decoder layers, of which one is in memory at a time.

The model is built on the meta device; its layers, and what surrounds them (embeddings, final norm, head), are loaded
when needed. Nothing here knows a model family.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..cli import log
from ..errors import UserError
from ..memory import give_back_freed
from ..plan.gpus import claim_gpus
from .checkpoint import Checkpoint, shard_of
from .linears import as_linears_
from .quantised_checkpoint import open_checkpoint
from .sliced import as_sliced_, read_width
from .stored_names import find_names

DEVICES = ("auto", "cpu", "cuda")


@dataclass
class Decoder:
    """A causal language model whose weights are still on disk.

    model: the Hugging Face model, its parameters on the meta device, its buffers real; layers_name: where its decoder
    layers are ("model.layers"); dtype: what it computes in; states_device: where hidden states wait between two layers;
    checkpoint: where its weights are; stored: name of each tensor of the model -> its name in the checkpoint, which is
    the name everything outside this module goes by; types: name of each tensor of the model -> what it is loaded as;
    returned: the form of what each layer returns (`layer_walk.Returned`), once a walk has seen it.
    """

    model: nn.Module
    layers_name: str
    dtype: torch.dtype
    device: torch.device
    states_device: torch.device
    checkpoint: Checkpoint
    stored: dict[str, str]
    types: dict[str, torch.dtype]
    returned: list | None = None

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self.layers_name)

    def linears(self) -> dict[str, nn.Linear]:
        """The prunable matrices by stored name: every linear inside a decoder layer; embeddings and head are none."""
        return {name: linear for place in range(len(self.layers)) for name, linear in self.linears_of(place).items()}

    def linears_of(self, place: int) -> dict[str, nn.Linear]:
        """Those that a layer uses. Several layers may use the same one, stored once: see `last_uses`."""
        found = self.layers[place].named_modules(prefix=f"{self.layers_name}.{place}")
        return {
            self.stored[f"{name}.weight"].removesuffix(".weight"): module
            for name, module in found
            if isinstance(module, nn.Linear) and f"{name}.weight" in self.stored
        }

    def last_uses(self) -> dict[str, int]:
        """Stored name of each prunable matrix -> the last layer that uses it."""
        return {name: place for place in range(len(self.layers)) for name in self.linears_of(place)}

    def shared(self) -> list[str]:
        """Stored names of the prunable matrices that several layers use."""
        uses = Counter(name for place in range(len(self.layers)) for name in self.linears_of(place))
        return [name for name, count in uses.items() if count > 1]

    def left_dense(self) -> dict[str, tuple[str, int]]:
        """What cannot be pruned of the decoder layers, beside vectors: name, with `*` for numbers -> the kind of module
        that holds it, and how many weights those are."""
        prunable = {f"{name}.weight" for name in self.linears()}
        found: dict[str, tuple[str, int]] = {}
        seen = set()
        for name, parameter in self.layers.named_parameters(prefix=self.layers_name):
            stored = self.stored.get(name, name)
            if parameter.dim() < 2 or stored in prunable | seen:
                continue
            seen.add(stored)
            kind = type(self.model.get_submodule(name.rpartition(".")[0])).__name__
            pattern = re.sub(r"\.\d+\.", ".*.", re.sub(r"\.\d+\.", ".*.", stored))
            found[pattern] = kind, found.get(pattern, (kind, 0))[1] + parameter.numel()
        return found

    def weights(self) -> int:
        """How many weights the decoder layers have, vectors included; what several layers use counts once."""
        named = self.layers.named_parameters(prefix=self.layers_name)
        return sum({self.stored.get(name, name): parameter.numel() for name, parameter in named}.values())


def open_decoder(
    folder: Path | str,
    device: str = "auto",
    trust_remote_code: bool = False,
    hidden_states: str = "device",
    dtype: torch.dtype | None = None,
) -> Decoder:
    """Build the model of a checkpoint folder without reading its weights.

    hidden_states: `device`, or `cpu` where a device has room for one layer but not for the states of all sequences;
    dtype: what it computes in, by default what its config says.
    Raises `UserError` when the folder is no causal language model, or its decoder layers hold no linears.
    """
    checkpoint = open_checkpoint(folder)
    model = build_empty(folder, trust_remote_code, dtype).eval()
    transposed = as_linears_(model)
    layers_name = find_layers(model)
    if width := read_width(folder):
        # What form a sliced model has depends on its ties.
        _untie_what_differs(model, checkpoint, find_names(model, checkpoint.names).stored)
        as_sliced_(model, model.get_submodule(layers_name), width)
    target = choose_device(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(target)
    dtype = getattr(model.config, "dtype", None) or model.dtype
    stored = _find_stored(model, checkpoint)
    checkpoint.transposed = frozenset(stored[f"{name}.weight"] for name in transposed if f"{name}.weight" in stored)
    check_sizes(model, checkpoint, stored)
    waiting = torch.device("cpu") if hidden_states == "cpu" else target
    decoder = Decoder(model, layers_name, dtype, target, waiting, checkpoint, stored, types_of(model, dtype))
    if not decoder.linears():
        raise _nothing_to_prune(decoder)
    return decoder


def _nothing_to_prune(decoder: Decoder) -> UserError:
    """What to say of a model without linears; or of weights that are another's, or have names of their own."""
    checkpoint, layers = decoder.checkpoint, decoder.layers.named_modules(prefix=decoder.layers_name)
    asked = next((f"{name}.weight" for name, module in layers if isinstance(module, nn.Linear)), None)
    if asked is None:
        return UserError(f"{checkpoint.folder}: the decoder layers hold no nn.Linear, so there is nothing to prune")
    held = f"the weights hold {checkpoint.names[0]} and the like" if checkpoint.names else "the weights hold nothing"
    return UserError(
        f"{checkpoint.folder}: config.json asks for {asked}, {held}; take both from the same model, or save it anew"
    )


def _find_stored(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Name of each tensor of the model -> the name it is stored under; the checkpoint is told what it holds fused.

    Raises `UserError` for what transformers would have to compute from stored tensors: base_model.py writes it.
    """
    naming = find_names(model, checkpoint.names)
    if naming.fused:
        checkpoint.fused = naming.fused
        naming = find_names(model, checkpoint.names)
    if naming.computed:
        name, (converter, sources) = next(iter(naming.computed.items()))
        steps = ", ".join(type(step).__name__ for step in converter.operations)
        raise UserError(
            f"{checkpoint.folder}: the family {model.config.model_type!r} stores {sources[0][1]} in another form than"
            f" it is used in ({name}: {steps}); import it with base_model.py first"
        )
    _untie_what_differs(model, checkpoint, naming.stored)
    return naming.stored


def _untie_what_differs(model: nn.Module, checkpoint: Checkpoint, stored: dict[str, str]) -> None:
    """Where a file holds two tensors that its config calls one, and they differ, they are two, as in transformers."""
    for name, source in list(model.all_tied_weights_keys.items()):
        if stored.get(name, "") == stored.get(source, "") or not {name, source} <= stored.keys():
            continue
        held = checkpoint.tensors([stored[name], stored[source]])
        if not torch.equal(held[stored[name]], held[stored[source]]):
            del model.all_tied_weights_keys[name]
            head = model.get_output_embeddings()
            if head is not None and name.rpartition(".")[0] in _names_of(model, head):
                model.config.tie_word_embeddings = False
            log.warning("%s: %s and %s are tied by config.json and differ: not tied", checkpoint.folder, name, source)


def _names_of(model: nn.Module, wanted: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module is wanted]


def head_name(model: nn.Module) -> str | None:
    """The name of a model's output embeddings, if it has any."""
    return next(iter(_names_of(model, model.get_output_embeddings())), None)


def in_float32(decoder: Decoder) -> Decoder:
    """Another of the same model, which computes in float32 whatever its weights are stored in."""
    types = dict.fromkeys(decoder.types, torch.float32)
    return replace(decoder, model=deepcopy(decoder.model), dtype=torch.float32, types=types, returned=None)


def load_whole(folder: Path | str, device: str = "auto", trust_remote_code: bool = False) -> nn.Module:
    """The model of a checkpoint folder with all its weights: what `LayerWalk` walks, ready for use."""
    decoder = open_decoder(folder, device, trust_remote_code)
    _load(decoder, decoder.model, "", list(decoder.model.state_dict()))
    decoder.model.tie_weights(recompute_mapping=False)
    return decoder.model


def build_empty(folder: Path | str, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """The causal language model of a folder's config.json with parameters on the meta device and real buffers.

    dtype: see `open_decoder`.
    """
    # Imported here: what only reads checkpoints should not wait seconds for it.
    from transformers import AutoModelForCausalLM, PretrainedConfig

    from .loading import build_model

    def build(config: PretrainedConfig) -> nn.Module:
        options = {"trust_remote_code": trust_remote_code} | ({"dtype": dtype} if dtype else {})
        with without_weights():
            return AutoModelForCausalLM.from_config(config, **options)

    return build_model(folder, build, trust_remote_code)


@contextmanager
def without_weights() -> Iterator[None]:
    """Models built here have their parameters on the meta device, and real buffers."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield


def types_of(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What transformers loads each tensor of a model as that computes in `dtype`: a router's bias stays float32."""
    from transformers.core_model_loading import build_glob_alternation

    built = getattr(model.config, "dtype", None) or model.dtype
    own = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    types = {name: dtype if kind == built else kind for name, kind in own.items()}
    plan = model._get_dtype_plan(dtype)
    if plan:
        kept, pattern_of, _ = build_glob_alternation(list(plan))
        matches = {name: kept.search(name) for name in types}
        types |= {name: plan[pattern_of[found.lastgroup]] for name, found in matches.items() if found}
    return types


def check_sizes(model: nn.Module, checkpoint: Checkpoint, stored: dict[str, str]) -> None:
    """Raises `UserError` for a tensor that config.json makes of another shape than the weights have."""
    for name, tensor in model.state_dict().items():
        if name in stored and (found := checkpoint.shape(stored[name])) != tuple(tensor.shape):
            raise UserError(
                f"{checkpoint.folder}: config.json makes {name} {list(tensor.shape)}, the weights hold {list(found)}; "
                "take both from the same model"
            )


def find_layers(model: nn.Module) -> str:
    """The name of the decoder layers: the module list that holds the most parameters, outside of what sees or hears."""
    # Of a vision-language model the vision tower may be the larger part.
    others = [
        f"{name}."
        for name, module in model.named_modules()
        if "text" not in getattr(module, "input_modalities", "text") and name
    ]
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(others))
    }
    if not sizes:
        raise UserError(f"{model.config.name_or_path}: {type(model).__name__} has no list of decoder layers")
    return max(sizes, key=sizes.__getitem__)


def choose_device(device: str, count: int = 1) -> torch.device:
    """`auto` is a GPU where there is one; of several it is one that no other job has, or `count` of them."""
    if device not in DEVICES:
        raise UserError(f"device {device!r}: give one of {', '.join(DEVICES)}; CUDA_VISIBLE_DEVICES says which GPUs")
    if device != "cpu":
        claim_gpus(count)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: torch sees no GPU here; use 'auto' or 'cpu'")
    return torch.device(device)


def load_module(decoder: Decoder, module: nn.Module, name: str) -> None:
    """Load the weights of one submodule from the checkpoint, in the type the model computes in."""
    _load(decoder, module, f"{name}.", list(module.state_dict()))


def _load(decoder: Decoder, module: nn.Module, prefix: str, names: list[str], rows: Tensor | None = None) -> None:
    """Fill the named tensors of `module`, whose names in the model begin with `prefix`; no more of each than `rows`, if
    they are given."""
    wanted = {name: decoder.stored[prefix + name] for name in names if prefix + name in decoder.stored}
    names_of = defaultdict(list)
    for name, stored in wanted.items():
        names_of[stored].append(name)
    found, tensors = decoder.checkpoint.tensors(names_of), {}
    for stored, tied in names_of.items():
        # Taken out, so that no tensor stays in two types; what is tied is one tensor in whatever type.
        tensor, ready = found.pop(stored), {}
        for name in tied:
            dtype = decoder.types[prefix + name]
            if dtype not in ready:
                ready[dtype] = _ready(tensor, decoder.device, dtype, rows)
            tensors[name] = ready[dtype]
    module.load_state_dict(tensors, strict=False, assign=True)
    missing = [name for name in names if name not in wanted and module.state_dict()[name].is_meta]
    if missing:
        raise _incomplete(decoder, prefix + missing[0])


def _incomplete(decoder: Decoder, missing: str) -> UserError:
    """What to say of a tensor that is not there; or is, in a form that no rule of transformers explains."""
    checkpoint, used = decoder.checkpoint, set(decoder.stored.values())
    spare = next((name for name in checkpoint.names if name not in used and shard_of(name) == shard_of(missing)), None)
    if spare is None:
        return UserError(f"{checkpoint.folder}: no tensor {missing!r}; the checkpoint is not complete")
    family = decoder.model.config.model_type
    return UserError(
        f"{checkpoint.folder}: no tensor {missing!r}, but {spare!r}, a form of the family {family!r} that transformers"
        " does not convert; save the model with transformers, and give that folder"
    )


def _ready(tensor: Tensor, device: torch.device, dtype: torch.dtype, rows: Tensor | None) -> Tensor:
    """A tensor on a device and, unless it holds whole numbers, in a type. Other rows than those asked for are never
    written to, and what is not takes no memory."""
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    if rows is None:
        return tensor.to(device, dtype)
    kept = torch.empty(tensor.shape, dtype=dtype, device=device)
    kept[rows] = tensor[rows].to(device, dtype)
    return kept


def unload(module: nn.Module, keep: str | None = None) -> None:
    """Let go of what `load_module` loaded; buffers that no checkpoint holds, such as frequencies, stay.

    keep: the beginning of names that were never loaded.
    """
    parameters = module.state_dict()
    names = [name for name in parameters if keep is None or not name.startswith(keep)]
    meta = {name: torch.empty_like(parameters[name], device="meta") for name in names}
    module.load_state_dict(meta, strict=False, assign=True)
    parameters.clear()
    give_back_freed()


@contextmanager
def loaded_around_layers(
    decoder: Decoder, without: str | None = None, batches: Sequence[Tensor] = (), head_of_tokens: bool = False
) -> Iterator[None]:
    """While open, what is outside the decoder layers is loaded: embeddings, norms, head.

    without: the beginning of names that are left out; batches: the tokens that the model will be given, int64, where
    those are known: of an embedding that is not the head too, other rows take no memory; head_of_tokens: nor do others
    of the head, and logits of other tokens mean nothing.
    """
    model, inside = decoder.model, decoder.layers_name + "."
    names = [name for name in model.state_dict() if not name.startswith(inside)]
    names = [name for name in names if without is None or not name.startswith(without)]
    if batches and decoder.device.type == "cpu":
        tables = _tables(decoder, names, head_of_tokens)
        tokens = torch.cat([batch.flatten() for batch in batches]).unique()
        for table in tables:
            # What a family has beyond its vocabulary it may put before any text.
            length = len(model.get_parameter(table))
            further = torch.arange(min(model.config.get_text_config().vocab_size, length), length)
            _load(decoder, model, "", [table], torch.cat([tokens, further]))
        names = [name for name in names if name not in tables]
    _load(decoder, model, "", names)
    try:
        yield
    finally:
        unload(model, keep=inside)


def _tables(decoder: Decoder, names: Sequence[str], with_head: bool) -> set[str]:
    """Which of the named tensors have a row for every token, and are asked for those of tokens at hand alone: the
    embedding, unless another name is the same tensor; `with_head`, that and the head."""
    try:
        modules = [decoder.model.get_input_embeddings()]
    except NotImplementedError:
        return set()
    if with_head:
        modules.append(decoder.model.get_output_embeddings())
    found = {f"{name}.weight" for module in modules for name in _names_of(decoder.model, module)} & set(names)
    stored = {decoder.stored.get(name) for name in found}
    tied = {name for name in names if decoder.stored.get(name) in stored}
    return found if tied == found and (with_head or len(tied) == 1) else set()


@contextmanager
def loaded_before_layers(decoder: Decoder, batches: Sequence[Tensor]) -> Iterator[None]:
    """While open, all that a forward pass on these tokens asks for before it comes to the decoder layers is loaded: not
    the head."""
    name = head_name(decoder.model)
    with loaded_around_layers(decoder, without=name and f"{name}.", batches=batches):
        yield


def load_zeros(module: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Fill the named tensors of a module with zeros, which take no memory: each is one zero all over."""
    tensors = module.state_dict()
    zeros = {name: tensors[name].new_zeros((), device=device).expand(tensors[name].shape) for name in names}
    module.load_state_dict(zeros, strict=False, assign=True)
