"""SparseGPT: what is pruned is made up for by the weights to its right (Frantar & Alistarh 2023).

Columns are pruned from left to right; each time, the columns still free move to where the layer's outputs change least,
that is where tr (W - W') H (W - W')' is smallest, H = 2/n * sum x x'. The published code carries errors to the right
through the Cholesky factor of H^-1. The same numbers follow from a factor of H itself (QuIP, Chee et al. 2023):

    H = A D A',  A unit upper triangular:   w_i <- w_i + sum over j < i of (W - W')_j A_ji

which needs no inverse, half the arithmetic, and cannot fail where the first factorisation does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..cli import log
from ..errors import UserError
from .patterns import Pattern

# Shares of the mean of diag(H) that are added to it, the next where one does not make it positive definite.
DAMPINGS = (0.01, 0.1, 1.0)
# Entries of a matrix that are copied at a time where it changes in place.
PIECE = 2**22


def optimal_brain_surgeon(weight: Tensor, hessian: Tensor, pattern: Pattern, name: str = "matrix") -> Tensor:
    """The pruned and updated weight, float32 [out, in].

    weight: [out, in]; hessian: float32 [in, in], as accumulated; neither is changed. The choice is made for
    `pattern.columns` at a time, by w^2 / [H^-1]_ii of what they have been updated to by then. An input that was always
    zero loses its weights. Raises `UserError`, calling the weight by `name`, when no damping makes H positive definite.
    """

    def settle(part: slice, columns: Columns) -> None:
        saliency = columns.updated(part).mul_(columns.scale[part]).square_()
        columns.settle(part, pattern.keep(saliency, whole=True).T)

    def settle_groups(part: slice, columns: Columns) -> None:
        given = (columns.weight, columns.change, columns.factor, columns.scale)
        kernels.settle_n_of_m(part, *given, *pattern.n_of_m)

    kernels = _kernels() if weight.is_cuda and pattern.n_of_m else None
    if kernels and pattern.columns <= kernels.GROUP:
        groups = kernels.PANEL // pattern.columns
        return settle_columns(weight, hessian, groups * pattern.columns, settle_groups, name)
    return settle_columns(weight, hessian, pattern.columns, settle, name)


@dataclass(frozen=True)
class Rounding:
    """Whole numbers from low to high, times step: float32 [out] each."""

    step: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Columns:
    """A weight on its way from left to right, transposed, so that a column is contiguous.

    weight: [in, out], as it came; change: [in, out], of columns that are done W - W'; of those to come, the sum over j
    of (W - W')_j A_ji so far; factor: A, scale: the root of D, see `factorise`.
    """

    weight: Tensor
    change: Tensor
    factor: Tensor
    scale: Tensor

    def updated(self, part: slice) -> Tensor:
        """Where columns would go if none of them or after them lost more, [out, columns of the part]: they make up for
        what was lost before them, and for one another."""
        above = self.factor[part, part]
        moved = self.change[part].T
        return self.weight[part].T + torch.linalg.solve_triangular(
            above, moved, upper=True, left=False, unitriangular=True
        )

    def settle(self, part: slice, keep: Tensor, rounding: Rounding | None = None) -> Tensor | None:
        """Settle the columns of a part, each at what of it is kept, [columns, out], or at the nearest of the numbers of
        a rounding; returns these, int16 [columns, out], if there is one."""
        given = (self.weight, self.change, self.factor)
        if self.weight.is_cuda and (kernels := _kernels()) and len(keep) <= kernels.PANEL:
            limits = (rounding.step, rounding.low, rounding.high) if rounding else ()
            return kernels.settle(part, *given, keep, limits)
        codes = torch.empty(keep.shape, dtype=torch.int16, device=keep.device) if rounding else None
        keep = keep.to(self.weight.dtype, memory_format=torch.contiguous_format)

        def finish(i: int, _: int) -> None:
            value, kept = self.weight[i] + self.change[i], keep[i - part.start]
            if rounding is None:
                value *= kept
            else:
                whole = (
                    torch.maximum(torch.minimum((value / rounding.step).round(), rounding.high), rounding.low) * kept
                )
                codes[i - part.start] = whole
                value = whole * rounding.step
            torch.sub(self.weight[i], value, out=self.change[i])

        from_left_to_right(part.start, part.stop, 1, finish, self.carry)
        return codes

    def carry(self, first: int, middle: int, last: int) -> None:
        """Carry what the columns first:middle lost to middle:last."""
        factor = self.factor[first:middle, middle:last]
        self.change[middle:last].addmm_(factor.T, self.change[first:middle])


@cache
def _kernels() -> ModuleType | None:
    """The kernels of a GPU, where there is Triton."""
    try:
        from . import column_kernels
    except ImportError:
        return None
    return column_kernels


def settle_columns(
    weight: Tensor,
    hessian: Tensor,
    unit: int,
    settle: Callable[[slice, Columns], None],
    name: str = "matrix",
    dead_to_zero: bool = True,
) -> Tensor:
    """Settle the columns of a weight [out, in] from left to right, those to come making up for what each has lost.

    settle: settles `unit` columns at a time; dead_to_zero: columns of inputs that are always zero count as zero, as in
    the code published with SparseGPT and GPTQ. Returns [out, in] in the type of the Hessian; raises as `factorise`.
    """
    factor, scale = factorise(hessian, name)
    transposed = weight.T.to(hessian.dtype, memory_format=torch.contiguous_format, copy=True)
    if dead_to_zero:
        transposed.masked_fill_((hessian.diagonal() == 0)[:, None], 0.0)
    columns = Columns(transposed, torch.zeros_like(transposed), factor, scale)

    def finish(first: int, last: int) -> None:
        settle(slice(first, last), columns)

    from_left_to_right(0, len(transposed), unit, finish, columns.carry)
    return columns.weight.sub_(columns.change).T


def from_left_to_right(
    first: int, last: int, unit: int, finish: Callable[[int, int], None], carry: Callable[[int, int, int], None]
) -> None:
    """Finish each `unit` columns of first:last in turn, after what lies left of them has been carried to them.

    Halves are carried to halves, so that nearly all the work is in large matrix products.
    """
    if last - first <= unit:
        finish(first, last)
        return
    middle = first + unit * -(-(last - first) // (2 * unit))
    from_left_to_right(first, middle, unit, finish, carry)
    carry(first, middle, last)
    from_left_to_right(middle, last, unit, finish, carry)


def factorise(hessian: Tensor, name: str = "matrix") -> tuple[Tensor, Tensor]:
    """A and the root of D with damped H = A D A', A unit upper triangular: float32 [in, in] and [in].

    Dead inputs count as 1. H is damped by a share of the mean of its diagonal, raised step by step, with a word in the
    log, until H is positive definite; `UserError` when it is not in the end, or not finite.
    """
    diagonal = hessian.diagonal()
    if not diagonal.isfinite().all():
        raise UserError(f"{name}: its Hessian is not finite: an input is NaN or infinite")
    diagonal = torch.where(diagonal == 0, 1.0, diagonal)
    for damping in DAMPINGS:
        # Upper triangular: the Cholesky factor counted from the last row and column; in place, for it is large.
        flat = hessian.flatten().flip(0)
        factor, failed = flat.view(hessian.shape).T, torch.empty((), dtype=torch.int32, device=hessian.device)
        factor.diagonal().copy_(diagonal.flip(0) + damping * diagonal.mean())
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            _reverse_(flat)
            scale = factor.diagonal().clone()
            return factor.div_(scale), scale
        log.warning("%s: its Hessian with damping %g is not positive definite", name, damping)
    raise UserError(f"{name}: its Hessian is not positive definite; calibrate on more text")


def _reverse_(flat: Tensor) -> None:
    """Turn a vector around where it lies, a piece of each half at a time."""
    count, half = len(flat), len(flat) // 2
    for start in range(0, half, PIECE):
        stop = min(start + PIECE, half)
        left, right = flat[start:stop], flat[count - stop : count - start]
        turned = left.flip(0)
        left.copy_(right.flip(0))
        right.copy_(turned)
