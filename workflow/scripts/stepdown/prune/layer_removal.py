"""ShortGPT: whole decoder layers go, those the model misses least (Men et al. 2024); and how others choose them.

What is left is an ordinary checkpoint of the same family with fewer layers.
"""

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..cli import progress
from ..errors import UserError
from ..measure.perplexity import perplexity
from ..models.checkpoint import shard_of, write_checkpoint
from ..models.decoder import Decoder
from ..models.layer_walk import LayerWalk
from ..models.linears import as_linears_
from ..models.stored_names import stored_names
from ..plan.compressions import check_layers
from .layerwise import visit, visit_backwards

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Lists in a config that hold numbers of layers; other lists of as many entries as layers have one for each.
NUMBERS_OF_LAYERS = ("mlp_only_layers", "hybrid_layer_ids", "attn_layer_indices")


# --- which layers go -------------------------------------------------------------------------------------------------


def choose_layers(
    decoder: Decoder, windows: Tensor, batch_size: int, count: int, removal: str
) -> tuple[list[int], list[float]]:
    """The `count` layers that go, ascending, and the scores they were chosen by.

    windows: int64 [samples, tokens]; removal: one of `compressions.REMOVALS`. Scores are one per layer, lowest first
    to go, but of `angular` one per run of `count` layers, by its first. Raises `UserError` when none would stay.
    """
    check_layers(count, len(decoder.layers), decoder.checkpoint.folder)
    measure: dict[str, Callable[..., Tensor]] = {
        "angular": partial(angular_distance, count=count),
        "block_influence": block_influence,
        "gradient": taylor_importance,
        "perplexity": perplexity_without,
    }
    scores = measure[removal](decoder, windows, batch_size)
    if not scores.isfinite().all():
        layer = int(scores.isfinite().int().argmin())
        raise UserError(f"{decoder.checkpoint.folder}: {removal} of layer {layer} is no number; is a weight NaN?")
    if removal == "angular":
        first = int(scores.argmin())
        return list(range(first, first + count)), scores.tolist()
    return sorted(scores.argsort(stable=True)[:count].tolist()), scores.tolist()


@torch.no_grad()
def block_influence(decoder: Decoder, windows: Tensor, batch_size: int) -> Tensor:
    """1 - mean over tokens of the cosine between a layer's input and output: float64 [layers]."""
    walk = LayerWalk(decoder, windows.split(batch_size))
    influence = []
    for layer in visit(walk, "block influence"):
        before = list(walk.states)
        layer.replay()
        pairs = zip(before, walk.states, strict=True)
        cosines = [cosine_similarity(x.double(), y.double(), dim=-1).flatten() for x, y in pairs]
        influence.append(1 - torch.cat(cosines).mean().item())
    return torch.tensor(influence, dtype=torch.float64)


@torch.no_grad()
def angular_distance(decoder: Decoder, windows: Tensor, batch_size: int, count: int) -> Tensor:
    """Angle / pi between the input of a run of `count` layers and its output, at the last token of a window, mean over
    windows: float64 [layers - count + 1] (Gromov et al. 2024, equation 2)."""
    walk = LayerWalk(decoder, windows.split(batch_size))
    last = [torch.cat([state[:, -1] for state in walk.states]).double()]
    for layer in visit(walk, "angular distance"):
        layer.replay()
        last.append(torch.cat([state[:, -1] for state in walk.states]).double())
    cosines = [cosine_similarity(last[place], last[place + count], dim=-1) for place in range(len(last) - count)]
    return torch.stack([cosine.clamp(-1, 1).arccos().mean() / torch.pi for cosine in cosines]).cpu()


def perplexity_without(decoder: Decoder, windows: Tensor, batch_size: int) -> Tensor:
    """Perplexity on the windows of the model without each of its layers: float64 [layers] (Kim et al. 2024)."""
    layers = progress(range(len(decoder.layers)), "perplexity without a layer")
    found = [perplexity(decoder, windows, batch_size, without={place}) for place in layers]
    return torch.tensor(found, dtype=torch.float64)


def taylor_importance(decoder: Decoder, windows: Tensor, batch_size: int) -> Tensor:
    """Sum of |w * dL/dw| over the weights of a layer's linears, L the loss on the windows: float64 [layers] (Kim et al.
    2024)."""
    # Batches of one size, whose mean losses are parts of the same mean.
    walk = LayerWalk(decoder, windows.split(math.gcd(batch_size, len(windows))))
    importance = []
    for layer in visit_backwards(walk):
        gradients = layer.gather(summing_weight_gradients, advance=True)
        weights = {name: layer.linears[name].weight.detach() for name in layer.linears if name in gradients}
        products = ((weight * gradients[name]).abs().sum() for name, weight in weights.items())
        importance.append(float(sum(products)) / len(walk.batches))
    return torch.tensor(importance[::-1], dtype=torch.float64)


@contextmanager
def summing_weight_gradients(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """While open, sums dL/dw over the batches that go back through each linear: name -> float32 [out, in]."""
    sums: dict[str, Tensor] = {}

    def add(name: str, weight: Tensor) -> None:
        if name in sums:
            sums[name] += weight.grad
        else:
            sums[name] = weight.grad.float()
        weight.grad = None

    with ExitStack() as hooks:
        for name, linear in linears.items():
            weight = linear.weight.requires_grad_()
            hooks.enter_context(weight.register_post_accumulate_grad_hook(partial(add, name)))
        yield sums


# --- the shorter model -----------------------------------------------------------------------------------------------


def write_without_layers(decoder: Decoder, removed: Sequence[int], target: Path, identity: dict[str, str]) -> None:
    """Write the checkpoint without the layers numbered `removed`; the others close up, in the weights as in the config.

    Raises `UserError` where layers cannot be renumbered, as what a layer is follows from its number.
    """
    checkpoint, count = decoder.checkpoint, len(decoder.layers)
    kept = [number for number in range(count) if number not in set(removed)]
    config = shorter_config(decoder.model.config, kept, count)
    first = next(name for name in decoder.stored if name.startswith(f"{decoder.layers_name}."))
    stored_layers = shard_of(decoder.stored[first]).rpartition(".")[0]

    def renumbered(name: str) -> str | None:
        found = re.fullmatch(rf"({re.escape(stored_layers)})\.(\d+)(.*)", name)
        if not found:
            return name
        return f"{found[1]}.{kept.index(int(found[2]))}{found[3]}" if int(found[2]) in kept else None

    _check_renumbered(decoder, config, kept, renumbered)

    def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for shard, names in progress(checkpoint.shards().items(), "write"):
            if renumbered(shard):
                yield (
                    renumbered(shard),
                    {renumbered(name): tensor for name, tensor in checkpoint.tensors(names).items()},
                )

    transposed = filter(None, map(renumbered, checkpoint.transposed))
    fused = {
        renumbered(name): replace(layout, name=renumbered(layout.name))
        for name, layout in checkpoint.fused.items()
        if renumbered(name)
    }
    texts = {"config.json": config.to_json_string()}
    write_checkpoint(checkpoint.folder, target, shards(), identity, transposed, texts, fused)


def shorter_config(config: "PretrainedConfig", kept: Sequence[int], count: int) -> "PretrainedConfig":
    """The config of a model of which the layers `kept` of `count` stay; lists with an entry per layer included."""
    shorter = copy.deepcopy(config)
    # Of a model that also sees or hears, the part that reads and writes.
    decoder = shorter.get_text_config(decoder=True)
    for name, value in decoder.to_dict().items():
        if name in NUMBERS_OF_LAYERS and value:
            setattr(decoder, name, [kept.index(number) for number in value if number in kept])
        elif isinstance(value, list) and "layer" in name and len(value) == count:
            setattr(decoder, name, [value[number] for number in kept])
    decoder.num_hidden_layers = len(kept)
    return shorter


def _check_renumbered(
    decoder: Decoder, config: "PretrainedConfig", kept: Sequence[int], renumbered: Callable[[str], str | None]
) -> None:
    """A layer must be built the same under its new number, and find its weights there; renumbered: new name of a stored
    tensor, None of one that goes."""
    try:
        with torch.device("meta"):
            model = type(decoder.model)(type(config).from_dict(config.to_dict()))
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{decoder.checkpoint.folder}: without these layers it is no {config.model_type} that transformers builds"
            f" ({reason}); remove others"
        ) from None
    as_linears_(model)
    stored = stored_names(model, [name for name in map(renumbered, decoder.checkpoint.names) if name])
    layers = model.get_submodule(decoder.layers_name)
    for place, (number, layer) in enumerate(zip(kept, layers, strict=True)):
        if _shapes(layer) != _shapes(decoder.layers[number]):
            raise UserError(
                f"{decoder.checkpoint.folder}: layer {number} would be another kind of layer under its new number; "
                f"remove layers so that the kinds of {config.model_type} stay in step, or choose another method"
            )
        before, after = (f"{decoder.layers_name}.{position}." for position in (number, place))
        for name in layer.state_dict():
            source = decoder.stored.get(before + name)
            if source and stored.get(after + name, "") != renumbered(source):
                raise UserError(
                    f"{decoder.checkpoint.folder}: layer {number} uses {source}, which it would not find any more; "
                    f"remove none of the {config.model_type} layers that share a block, or choose another method"
                )


def _shapes(layer: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in layer.state_dict().items()}
