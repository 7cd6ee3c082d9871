"""Columns settled by the GPU's kernel, in Triton's interpreter: as one after the other, in a tenth of the launches."""

from fractions import Fraction

import pytest
import torch
from conftest import REPOSITORY
from matrices import random_case
from pretend_gpu import pretend_gpu

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

from stepdown.tensors import column_kernels, sparsegpt
from stepdown.tensors.patterns import n_of_m, unstructured
from stepdown.tensors.sparsegpt import Columns, Rounding, optimal_brain_surgeon, settle_columns

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settled(weight, hessian, unit, settle):
    return settle_columns(weight.to(DEVICE), hessian.to(DEVICE), unit, settle).cpu()


@pytest.mark.parametrize(("n", "m", "inputs"), [(2, 4, 46), (1, 3, 40), (4, 8, 24)])
def test_groups_choose_and_make_up_as_one_after_the_other(n, m, inputs):
    weight, hessian = random_case(19, inputs, seed=m)
    # Of equals the earlier stays.
    weight[:4] = weight[:4].sign()
    expected = optimal_brain_surgeon(weight, hessian, n_of_m(n, m))

    def settle(part, columns):
        given = (columns.weight, columns.change, columns.factor, columns.scale)
        column_kernels.settle_n_of_m(part, *given, n, m)

    found = settled(weight, hessian, 5 * m, settle)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rounded", [False, True], ids=["masked", "rounded"])
def test_columns_settle_as_one_after_the_other(rounded):
    weight, hessian = random_case(21, 50, seed=0)
    keep = torch.rand(50, 21, generator=torch.Generator().manual_seed(0)) < 0.6
    limits = (weight.abs().amax(1) / 7, torch.full((21,), -8.0), torch.linspace(5, 127, 21).round())
    codes = {"kernel": [], "reference": []}

    def by_kernel(part, columns):
        moved = [limit.to(DEVICE) for limit in limits] if rounded else ()
        given = (columns.weight, columns.change, columns.factor, keep[part].to(DEVICE))
        codes["kernel"].append(column_kernels.settle(part, *given, moved))

    def reference(part, columns):
        codes["reference"].append(Columns.settle(columns, part, keep[part], Rounding(*limits) if rounded else None))

    found = settled(weight, hessian, 16, by_kernel)
    expected = settle_columns(weight, hessian, 16, reference)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if rounded:
        assert torch.equal(*(torch.cat(of).cpu() for of in codes.values()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what a pretended GPU is given to do")
@pytest.mark.parametrize("pattern", [n_of_m(2, 4), unstructured(Fraction("0.5"))], ids=["2:4", "unstructured"])
def test_a_gpu_is_given_a_tenth_to_do(monkeypatch, pattern):
    weight, hessian = random_case(16, 256, seed=0)
    found, counted = {}, {}
    for name in ("kernel", "one by one"):
        with pretend_gpu(str(REPOSITORY)) as counts:
            moved = weight.cuda(), hessian.cuda()
            found[name] = optimal_brain_surgeon(*moved, pattern).cpu()
        counted[name] = counts.totals()
        monkeypatch.setattr(sparsegpt, "_kernels", lambda: None)
    assert torch.equal(found["kernel"] == 0, found["one by one"] == 0)
    torch.testing.assert_close(found["kernel"], found["one by one"], rtol=0, atol=1e-5)
    assert 10 * counted["kernel"]["launches"] < counted["one by one"]["launches"], counted
    # For the Hessian: whether it is finite, and positive definite.
    assert counted["kernel"]["waits"] == 2
