"""Masked least squares: it solves what it claims to, no row gets worse on the way, zeros are kept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepdown.tensors import least_squares
from stepdown.tensors.least_squares import masked_least_squares


def problem(seed: int, rows: int = 6, inputs: int = 12, tokens: int = 40):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=draw) @ torch.randn(inputs, inputs, generator=draw)
    weight = torch.randn(rows, inputs, generator=draw)
    outputs = torch.randn(tokens, rows, generator=draw)
    keep = torch.rand(rows, inputs, generator=draw) < 0.6
    return x, weight, outputs, keep


def error(weight, x, outputs, start, keep, damping):
    """What is minimised, by row."""
    ridge = damping * (x.T @ x).diagonal().mean()
    return (x @ weight.T - outputs).square().sum(0) + ridge * (weight - start * keep).square().sum(1)


@given(st.integers(0, 10_000), st.sampled_from([0.001, 0.01, 1.0]), st.sampled_from([4, least_squares.ROWS]))
def test_it_ends_at_the_exact_solution_of_every_row(seed, damping, rows):
    x, weight, outputs, keep = problem(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(least_squares, "ROWS", rows)
        found = masked_least_squares(weight, keep, x.T @ x, outputs.T @ x, damping, steps=200)
    hessian = (x.T @ x).double()
    ridge = damping * hessian.diagonal().mean()
    for row, kept in enumerate(keep):
        damped = hessian[kept][:, kept] + ridge * torch.eye(int(kept.sum()), dtype=torch.float64)
        right = (outputs.T @ x).double()[row, kept] + ridge * weight.double()[row, kept]
        expected = torch.linalg.solve(damped, right)
        torch.testing.assert_close(found[row, kept].double(), expected, rtol=1e-3, atol=1e-3)


@given(st.integers(0, 10_000), st.integers(0, 20))
def test_no_row_gets_worse_however_early_it_stops_and_zeros_stay(seed, steps):
    x, weight, outputs, keep = problem(seed)
    found = masked_least_squares(weight, keep, x.T @ x, outputs.T @ x, 0.01, steps)
    assert not found[~keep].any()
    before = error(weight * keep, x, outputs, weight, keep, 0.01)
    assert (error(found, x, outputs, weight, keep, 0.01) <= before * (1 + 1e-5)).all()


def test_dead_inputs_and_rows_without_weights_do_no_harm():
    x, weight, outputs, keep = problem(0)
    x[:, 3] = 0
    keep[2] = False
    found = masked_least_squares(weight, keep, x.T @ x, outputs.T @ x)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 3], (weight * keep)[:, 3])
    assert masked_least_squares(weight, keep, torch.zeros(12, 12), torch.zeros(6, 12)).isfinite().all()
