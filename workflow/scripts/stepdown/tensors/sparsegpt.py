"""SparseGPT: what is pruned is made up for by the weights to its right (Frantar & Alistarh 2023).

Columns are pruned from left to right; each time, the columns still free move to where the layer's outputs change least,
that is where tr (W - W') H (W - W')' is smallest, H = 2/n * sum x x'. The published code carries errors to the right
through the Cholesky factor of H^-1. The same numbers follow from a factor of H itself (QuIP, Chee et al. 2023):

    H = A D A',  A unit upper triangular:   w_i <- w_i + sum over j < i of (W - W')_j A_ji

which needs no inverse, half the arithmetic, and cannot fail where the first factorisation does not.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..cli import log
from ..errors import UserError
from .patterns import Pattern

# Shares of the mean of diag(H) that are added to it, the next where one does not make it positive definite.
DAMPINGS = (0.01, 0.1, 1.0)


def optimal_brain_surgeon(weight: Tensor, hessian: Tensor, pattern: Pattern, name: str = "matrix") -> Tensor:
    """The pruned and updated weight, float32 [out, in].

    weight: [out, in]; hessian: float32 [in, in], as accumulated; neither is changed. The choice is made for
    `pattern.columns` at a time, by w^2 / [H^-1]_ii of what they have been updated to by then. An input that was always
    zero loses its weights. Raises `UserError`, calling the weight by `name`, when no damping makes H positive definite.
    """
    keep = torch.empty(weight.shape[::-1], device=weight.device)

    def choose(part: slice, columns: Tensor, change: Tensor, factor: Tensor, scale: Tensor) -> None:
        saliency = updated(part, columns, change, factor).mul_(scale[part]).square_()
        keep[part] = pattern.keep(saliency, whole=True).T

    return settle_columns(weight, hessian, pattern.columns, choose, lambda i, column: column * keep[i], name)


def updated(part: slice, columns: Tensor, change: Tensor, factor: Tensor) -> Tensor:
    """Where columns would go if none of them or after them lost more, [out, columns of the part]: they make up for what
    was lost before them, and for one another. columns, change, factor: as `settle_columns` has them."""
    above = factor[part, part]
    free = torch.linalg.solve_triangular(above, change[part].T, upper=True, left=False, unitriangular=True)
    return columns[part].T + free


def settle_columns(
    weight: Tensor,
    hessian: Tensor,
    unit: int,
    begin: Callable[[slice, Tensor, Tensor, Tensor, Tensor], None],
    settle: Callable[[int, Tensor], Tensor],
    name: str = "matrix",
) -> Tensor:
    """Settle the columns of a weight [out, in] from left to right, those to come making up for what each has lost.

    settle: (number of a column, what it has been updated to [out]) -> what it stays at. begin: called before `unit`
    columns with (their slice; the weight transposed; for columns to come, what they have been moved by; A; the root
    of D). Returns [out, in] in the type of the Hessian; raises as `factorise` does.
    """
    factor, scale = factorise(hessian, name)
    # Transposed, so that a column of the weight is contiguous.
    columns = weight.T.to(hessian.dtype, memory_format=torch.contiguous_format, copy=True)
    columns[hessian.diagonal() == 0] = 0.0
    # Of columns that are done, W - W'; of those to come, the sum over j of (W - W')_j A_ji so far.
    change = torch.zeros_like(columns)

    def finish_unit(first: int, last: int) -> None:
        begin(slice(first, last), columns, change, factor, scale)
        from_left_to_right(first, last, 1, finish, carry)

    def finish(i: int, _: int) -> None:
        torch.sub(columns[i], settle(i, columns[i] + change[i]), out=change[i])

    def carry(first: int, middle: int, last: int) -> None:
        change[middle:last].addmm_(factor[first:middle, middle:last].T, change[first:middle])

    from_left_to_right(0, len(columns), unit, finish_unit, carry)
    return (columns - change).T


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
        # Upper triangular: the Cholesky factor counted from the last row and column.
        reverse = hessian.flip(0, 1)
        reverse.diagonal().copy_(diagonal.flip(0) + damping * diagonal.mean())
        reverse, failed = torch.linalg.cholesky_ex(reverse)
        if not failed:
            factor = reverse.flip(0, 1)
            scale = factor.diagonal().clone()
            return factor.div_(scale), scale
        log.warning("%s: its Hessian with damping %g is not positive definite", name, damping)
    raise UserError(f"{name}: its Hessian is not positive definite; calibrate on more text")
