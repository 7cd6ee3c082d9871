"""Sparsity that rises while a model trains, steeply at first (Zhu & Gupta 2017): share(t) = 1 - (1 - t)^3 of what goes.

Whatever a pattern would drop in the end, the least salient part of it goes first; so N:M groups fill one by one, and
the last mask is the pattern's own, to the weight. Masks are chosen anew on the way: what is zero has no saliency and
stays zero.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from ..cli import progress
from ..errors import UserError
from ..models.checkpoint import rewrite_checkpoint
from ..models.decoder import Decoder
from ..models.pruning_reports import describe_pruning
from ..plan.runs import Run
from ..prune.calibration import squared_input_norms
from ..tensors.masks import count_zeros, keep_above_rank, keep_all_but_smallest
from ..tensors.patterns import Pattern, TierOptions, pattern_of
from ..tensors.saliency import wanda
from .losses import use_chunked_cross_entropy_

# Windows of the training text on which Wanda's norms are measured.
CALIBRATION_WINDOWS = 128


@dataclass(frozen=True)
class GradualSettings:
    """rise: share of the steps in which sparsity rises, 0 < rise <= 1; after them the masks stay. updates: how often
    masks are chosen while it rises. batch_size: windows of a step."""

    batch_size: int
    learning_rate: float
    updates: int = 20
    rise: float = 0.8
    bf16: bool = False
    seed: int = 0


def cubic(time: float) -> float:
    """The share reached at `time`, both from 0 to 1."""
    return 1 - (1 - min(max(time, 0.0), 1.0)) ** 3


def keep_rising(saliency: Tensor, keep: Tensor, share: float) -> Tensor:
    """Of what `keep` drops, drop only a `share`, the least salient first: bool [out, in].

    saliency: [out, in]; keep: bool [out, in], the mask in the end, which is what a share of 1 gives.
    """
    count = int(count_zeros(keep) * share)
    if share >= 1 or count == 0:
        return keep if share >= 1 else torch.ones_like(keep)
    return keep | keep_above_rank(torch.where(keep, torch.inf, saliency.float()), count - 1)


def saliency_and_last_mask(
    run: Run, weight: Tensor, pattern: Pattern, squared_norms: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The saliency of a weight [out, in], and what a pattern keeps by it in the end.

    squared_norms: [in], of its inputs, for Wanda, which compares the weights of a row; magnitude asks for none and
    compares those of the whole matrix, unless the pattern is one of groups.
    """
    if run.method == "wanda":
        saliency = wanda(weight, squared_norms.to(weight.device))
        return saliency, last_mask(saliency, pattern, run.sparsity, by_group=True)
    saliency = weight.abs()
    return saliency, last_mask(saliency, pattern, run.sparsity, by_group=run.pattern == "n-of-m")


def last_mask(saliency: Tensor, pattern: Pattern, sparsity: Fraction, by_group: bool) -> Tensor:
    """What a pattern keeps in the end: row by row or group by group; or else of the whole matrix, to the weight."""
    if by_group:
        return pattern.keep(saliency)
    count = int(saliency.numel() * sparsity)
    return keep_all_but_smallest(saliency.float().reshape(1, -1), count).view(saliency.shape)


def prune_checkpoint(
    decoder: Decoder, model: nn.Module, run: Run, windows: Tensor, settings: GradualSettings, target: Path
) -> tuple[dict, list[float]]:
    """Write the checkpoint of a run to `target`; returns its report, see `pruning_reports.describe_pruning`, and the
    losses on the way.

    model: that of the decoder, whole and in float32; it is trained. windows: int64 [n, length]; Wanda's norms are
    measured on the first of them. Raises `UserError` when the pattern does not hold in the end.
    """
    own = {stored: name.removesuffix(".weight") for name, stored in decoder.stored.items()}
    names = {own[f"{name}.weight"]: name for name in decoder.linears()}
    weights = {name: model.get_submodule(name).weight.detach() for name in names}
    patterns = {name: pattern_of(run, run.sparsity, TierOptions(), weight) for name, weight in weights.items()}
    norms: dict[str, Tensor] = {}
    if run.method == "wanda":
        norms = squared_input_norms(decoder, windows[:CALIBRATION_WINDOWS], settings.batch_size)

    def keep_of(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        return saliency_and_last_mask(run, weight.detach(), patterns[name], norms.get(names[name]))

    losses = prune_while_training(model, windows, names, keep_of, settings)
    for name, pattern in patterns.items():
        if fault := pattern.fault(weights[name]):
            raise UserError(f"{names[name]}: the pattern does not hold: {fault}; train for more steps than --updates")
    identity = decoder.checkpoint.identity() | {"iteration": "1"}
    trained = {decoder.stored[name]: tensor for name, tensor in model.state_dict().items() if name in decoder.stored}

    def replace(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: trained[name].cpu() for name in tensors if name in trained})

    rewrite_checkpoint(decoder.checkpoint, target, replace, identity)
    shapes = {names[name]: tuple(weight.shape) for name, weight in weights.items()}
    zeros = {names[name]: count_zeros(weight) for name, weight in weights.items()}
    return describe_pruning(run, identity["base_model"], shapes, dict.fromkeys(shapes, run.sparsity), zeros), losses


def prune_while_training(
    model: nn.Module,
    windows: Tensor,
    names: Iterable[str],
    keep_of: Callable[[str, Tensor], tuple[Tensor, Tensor]],
    settings: GradualSettings,
) -> list[float]:
    """Train a float32 model on windows, int64 [n, length], once each, until the last masks hold; returns the losses.

    names: of the linears that are pruned; keep_of: (name, weight [out, in]) -> its saliency and the mask of the end.
    Raises `UserError` when the loss is not finite.
    """
    torch.manual_seed(settings.seed)  # Of dropout.
    use_chunked_cross_entropy_(model)
    weights = {name: model.get_submodule(name).weight for name in names}
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(settings.seed))
    batches = windows[order].split(settings.batch_size)
    rising = max(1, int(len(batches) * settings.rise))
    chosen_at = {-(-rising * update // settings.updates) for update in range(1, settings.updates + 1)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    masks: dict[str, Tensor] = {}
    losses = []
    model.train()
    for step, batch in enumerate(progress(batches, "train while sparsity rises"), start=1):
        losses.append(_train_step(model, batch, optimizer, settings))
        if not math.isfinite(losses[-1]):
            raise UserError(f"gradual: the loss is {losses[-1]} at step {step}; lower learning_rate")
        _mask_(weights, masks)
        if step in chosen_at:
            masks = {name: keep_rising(*keep_of(name, weights[name]), cubic(step / rising)) for name in weights}
            _mask_(weights, masks)
    model.eval()
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(0.0)  # turns -0.0 into 0.0
    return losses


def _train_step(model: nn.Module, batch: Tensor, optimizer: torch.optim.Optimizer, settings: GradualSettings) -> float:
    device = next(model.parameters()).device
    tokens = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def _mask_(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    for name, keep in masks.items():
        weights[name].mul_(keep)
