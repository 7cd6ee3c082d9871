"""Patterns: which weights of a matrix may stay, given how much each of them matters.

A metric is float32 [out, in], larger where a weight matters more. Whatever of blocks is said holds at ragged edges too:
an edge block has fewer entries, its score is the mean over those it has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import UserError
from ..plan.runs import Run
from .blocks import entries_per_block, expand_blocks, pad_to_blocks
from .masks import count_zeros, keep_above_rank, keep_all_but_smallest, keep_n_of_m, keep_top_k
from .tiers import Tier, exact_shares, kept_entries, step_down, tier_counts, violations

# Columns that SparseGPT chooses among at once, as published.
COLUMNS = 128


@dataclass(frozen=True)
class Pattern:
    """A rule for the zeros of a matrix.

    keep: (metric [out, in], whole=False) -> bool [out, in]; `whole` compares over the whole matrix and not row by row,
    where the rule leaves that choice; it may be asked of a part of a matrix, some whole columns of it;
    fault: weight [out, in] -> what breaks the rule, in words, or "";
    columns: how many columns such a part should have: so many are chosen among at once; n_of_m: what the rule is, where
    it is no other than that n of m consecutive inputs stay.
    """

    keep: Callable[..., Tensor]
    fault: Callable[[Tensor], str]
    columns: int = COLUMNS
    n_of_m: tuple[int, int] | None = None


# --- the patterns ----------------------------------------------------------------------------------------------------


def unstructured(sparsity: Fraction) -> Pattern:
    """A share of the weights goes, anywhere.

    Of each row int(in * sparsity) (Sun et al. 2023); with `whole`, of all entries in ascending order what is not above
    number int(entries * sparsity), counted from 0 (Han et al. 2015).
    """

    def keep(metric: Tensor, whole: bool = False) -> Tensor:
        if not whole:
            return keep_all_but_smallest(metric, int(metric.shape[1] * sparsity))
        if sparsity == 0:
            return torch.ones_like(metric, dtype=torch.bool)
        return keep_above_rank(metric, int(metric.numel() * sparsity))

    def fault(weight: Tensor) -> str:
        due = len(weight) * int(weight.shape[1] * sparsity)
        return _too_few(count_zeros(weight), due, "zeros")

    return Pattern(keep, fault)


def n_of_m(n: int, m: int) -> Pattern:
    """Of each m consecutive inputs n stay; of a ragged tail of r inputs, ceil(r * n / m)."""

    def keep(metric: Tensor, whole: bool = False) -> Tensor:
        return keep_n_of_m(metric, n, m)

    def fault(weight: Tensor) -> str:
        length = weight.shape[1]
        groups = pad(weight != 0, (0, -length % m)).unflatten(1, (-1, m)).sum(-1, dtype=torch.int16)
        allowed = torch.full_like(groups[0], n)
        allowed[length // m :] = -(-(length % m) * n // m)
        crowded = int((groups > allowed).sum())
        return f"{crowded} groups keep more than {n} of {m}" if crowded else ""

    return Pattern(keep, fault, columns=m, n_of_m=(n, m))


def block(block_size: int, sparsity: Fraction) -> Pattern:
    """Whole blocks go: those whose score is not above the int(blocks * sparsity)-th smallest."""

    def keep(metric: Tensor, whole: bool = False) -> Tensor:
        scores = mean_of_blocks(metric, block_size)
        count = int(scores.numel() * sparsity)
        kept = keep_above_rank(scores, count - 1) if count else torch.ones_like(scores, dtype=torch.bool)
        return expand_blocks(kept, tuple(metric.shape), block_size).to(metric.device)

    def fault(weight: Tensor) -> str:
        empty = count_zeros(mean_of_blocks((weight != 0).float(), block_size))
        parts = weight.split(columns, dim=1)
        due = sum(int(entries_per_block(tuple(part.shape), block_size).numel() * sparsity) for part in parts)
        return _too_few(empty, due, "zero blocks")

    columns = _whole_blocks(block_size)
    return Pattern(keep, fault, columns)


def three_tier(shares: Sequence[str], block_size: int, k: int, selection: Tensor | None = None) -> Pattern:
    """By fixed shares of the blocks: those of the highest score stay dense, the middle keeps 2:4, the lowest its top k.

    selection: what decides inside a block, float32 [out, in]; the metric itself by default.
    """

    def keep(metric: Tensor, whole: bool = False) -> Tensor:
        scores = mean_of_blocks(metric, block_size)
        tiers = tiers_by_rank(scores, tier_counts(shares, scores.numel()))
        return keep_tiers(_selection(selection, metric), tiers, block_size, k)

    return Pattern(keep, _fault_of_tiers(shares, block_size, k), _whole_blocks(block_size))


def hybrid(block_size: int, k: int, top: Fraction, threshold: float, selection: Tensor | None = None) -> Pattern:
    """Blocks below the `top` share by score keep their top k; of those in it, each keeps 2:4 where that leaves at least
    `threshold` of its metric, and stays dense where not (Jiajun-Ji/wanda `apply_hybrid_block_pruning_with_2_4`).

    selection: as of `three_tier`.
    """

    def keep(metric: Tensor, whole: bool = False) -> Tensor:
        chooser = _selection(selection, metric)
        scores = mean_of_blocks(metric, block_size)
        left = mean_of_blocks(metric * keep_n_of_m(chooser, 2, 4), block_size)
        tiers = torch.where(left >= threshold * scores, int(Tier.TWO_FOUR), int(Tier.DENSE)).to(torch.uint8)
        lowest = scores.numel() - int(scores.numel() * top)
        tiers[~keep_all_but_smallest(scores.view(1, -1), lowest).view_as(scores)] = Tier.TOP_K
        return keep_tiers(chooser, tiers, block_size, k)

    return Pattern(keep, _fault_of_tiers((top, 0, 1 - top), block_size, k), _whole_blocks(block_size))


@dataclass(frozen=True)
class TierOptions:
    """What the configuration says of tiers.

    shares: of the blocks that are Dense, 2:4 and TopK in `three_tier`; top, threshold: of `hybrid`; selection: `wanda`,
    the metric decides inside a block, or `magnitude`.
    """

    block_size: int = 16
    k: int = 10
    shares: tuple[str, str, str] = ("0.35", "0.45", "0.2")
    top: Fraction = Fraction("0.6")
    threshold: float = 0.8
    selection: str = "wanda"


def pattern_of(run: Run, sparsity: Fraction | None, tiers: TierOptions, weight: Tensor) -> Pattern:
    """The pattern of a run for one of its matrices: weight [out, in], sparsity as it is spread over the layers."""
    selection = weight.float().abs() if tiers.selection == "magnitude" else None
    match run.pattern:
        case "unstructured":
            return unstructured(sparsity)
        case "n-of-m":
            return n_of_m(run.n, run.m)
        case "block":
            return block(run.block_size, sparsity)
        case "three-tier":
            return three_tier(tiers.shares, tiers.block_size, tiers.k, selection)
        case "hybrid":
            return hybrid(tiers.block_size, tiers.k, tiers.top, tiers.threshold, selection)


# --- blocks and tiers ------------------------------------------------------------------------------------------------


def mean_of_blocks(metric: Tensor, block_size: int) -> Tensor:
    """Mean metric of each block over its real entries, float32 [block rows, block cols], on the CPU."""
    sums = _as_grid(pad_to_blocks(metric, block_size), block_size).sum((2, 3)).cpu()
    return sums / entries_per_block(tuple(metric.shape), block_size)


def tiers_by_rank(scores: Tensor, counts: tuple[int, int, int]) -> Tensor:
    """The tier map of a matrix pruned in one shot: by score the highest blocks are Dense, then come 2:4 and TopK.

    scores: [block rows, block cols]; counts: blocks of each tier. Returns uint8, shape of the scores.
    """
    _, two_four, top_k = counts
    tiers = torch.full_like(scores, Tier.DENSE, dtype=torch.uint8)
    tiers = step_down(tiers, scores.flatten(), Tier.DENSE, two_four + top_k)
    return step_down(tiers, scores[tiers == Tier.TWO_FOUR], Tier.TWO_FOUR, top_k)


def keep_tiers(metric: Tensor, tiers: Tensor, block_size: int, k: int) -> Tensor:
    """What blocks keep on their tier: all, 2 of each 4 consecutive inputs, or the k largest entries.

    metric: [out, in]; tiers: uint8 [block rows, block cols]; returns bool [out, in]. Of edge blocks, k in proportion.
    """
    shape = tuple(metric.shape)
    dense = expand_blocks(tiers == Tier.DENSE, shape, block_size).to(metric.device)
    keep = pad_to_blocks(keep_n_of_m(metric, 2, 4) | dense, block_size)
    lowest = (tiers == Tier.TOP_K).to(metric.device)
    entries = entries_per_block(shape, block_size).to(metric.device)[lowest]
    candidates = _as_grid(pad_to_blocks(metric, block_size, -torch.inf), block_size)[lowest]
    top = keep_top_k(candidates.flatten(1), kept_entries(entries, block_size, k))
    _as_grid(keep, block_size)[lowest] = top.view_as(candidates)
    return keep[: shape[0], : shape[1]]


def _as_grid(matrix: Tensor, block_size: int) -> Tensor:
    """A matrix of whole blocks as [block rows, block cols, b, b], not a copy."""
    return matrix.unflatten(0, (-1, block_size)).unflatten(2, (-1, block_size)).transpose(1, 2)


def _whole_blocks(block_size: int) -> int:
    """As many columns as hold whole blocks, about `COLUMNS`."""
    return max(block_size, COLUMNS - COLUMNS % block_size)


def _selection(selection: Tensor | None, metric: Tensor) -> Tensor:
    if selection is None:
        return metric
    if selection.shape != metric.shape:
        raise UserError("selection: this method chooses part by part, not by magnitude; set pruning.selection to wanda")
    return selection


# --- what breaks a pattern -------------------------------------------------------------------------------------------


def _too_few(found: int, due: int, what: str) -> str:
    return f"{found} {what} where {due} are due" if found < due else ""


def _fault_of_tiers(shares: Sequence, block_size: int, k: int) -> Callable[[Tensor], str]:
    """Fewer blocks on the tiers 2:4 and TopK than the shares say, rounded down in each part of so many columns."""

    def fault(weight: Tensor) -> str:
        parts = weight.split(_whole_blocks(block_size), dim=1)
        blocks = [entries_per_block(tuple(part.shape), block_size).numel() for part in parts]
        for tier, share in zip(Tier, exact_shares(shares), strict=True):
            everywhere = torch.full_like(entries_per_block(tuple(weight.shape), block_size, weight.device), tier)
            found = sum(blocks) - violations(weight, everywhere, block_size, k)
            if words := _too_few(found, sum(int(share * count) for count in blocks), f"blocks on the tier {tier.name}"):
                return words
        return ""

    return fault
