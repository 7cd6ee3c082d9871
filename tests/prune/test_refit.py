"""Refitting: the masked least squares it claims to solve, zeros kept, and models that come nearer to the dense one."""

from pathlib import Path

import pytest
import torch
from families import make_model
from hypothesis import given
from hypothesis import strategies as st

from stepdown.errors import UserError
from stepdown.models.checkpoint import Checkpoint, rewrite_checkpoint
from stepdown.models.decoder import LayerWalk, open_decoder
from stepdown.prune.refit import refit, refit_layers
from stepdown.tensors.masks import keep_n_of_m

WINDOWS = torch.randint(0, 128, (12, 32), generator=torch.Generator().manual_seed(1))


def problem(seed: int, rows: int = 6, inputs: int = 12, tokens: int = 40):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=draw) @ torch.randn(inputs, inputs, generator=draw)
    weight = torch.randn(rows, inputs, generator=draw)
    outputs = torch.randn(tokens, rows, generator=draw)
    keep = torch.rand(rows, inputs, generator=draw) < 0.6
    return x, weight, outputs, keep


def error(weight, x, outputs, start, keep, damping):
    """What refit minimises, by row."""
    ridge = damping * (x.T @ x).diagonal().mean()
    return (x @ weight.T - outputs).square().sum(0) + ridge * (weight - start * keep).square().sum(1)


@given(st.integers(0, 10_000), st.sampled_from([0.001, 0.01, 1.0]))
def test_it_ends_at_the_exact_solution_of_every_row(seed, damping):
    x, weight, outputs, keep = problem(seed)
    found = refit(weight, keep, x.T @ x, outputs.T @ x, damping, steps=200)
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
    found = refit(weight, keep, x.T @ x, outputs.T @ x, 0.01, steps)
    assert not found[~keep].any()
    before = error(weight * keep, x, outputs, weight, keep, 0.01)
    assert (error(found, x, outputs, weight, keep, 0.01) <= before * (1 + 1e-5)).all()


def test_dead_inputs_and_rows_without_weights_do_no_harm():
    x, weight, outputs, keep = problem(0)
    x[:, 3] = 0
    keep[2] = False
    found = refit(weight, keep, x.T @ x, outputs.T @ x)
    assert found.isfinite().all()
    assert torch.equal(found[:, 3], (weight * keep)[:, 3])
    assert refit(weight, keep, torch.zeros(12, 12), torch.zeros(6, 12)).isfinite().all()


# ---------------------------------------------------------------- whole models


def halve(tensors):
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and any(part.isdigit() for part in name.split(".")):
            tensor.mul_(keep_n_of_m(tensor.abs(), 2, 4))


def free(_, weight):
    return weight != 0


@pytest.fixture(params=["llama", "opt", "gpt2", "bloom"])
def folders(request, tmp_path) -> tuple[Path, Path]:
    dense = make_model(request.param, tmp_path / "dense")
    checkpoint = open_decoder(dense, "cpu").checkpoint
    identity = {"base_model": checkpoint.identity()["base_model"], "iteration": "1"}
    rewrite_checkpoint(checkpoint, tmp_path / "pruned", halve, identity)
    return dense, tmp_path / "pruned"


def last_states(folder):
    walk = LayerWalk(open_decoder(folder, "cpu"), list(WINDOWS.split(4)))
    for _, _, replay in walk.layers("states"):
        replay()
    return torch.cat(walk.states)


def refitted(dense: Path, pruned: Path, keep=free, damping: float = 0.01) -> dict[str, torch.Tensor]:
    found = {}
    decoders = open_decoder(dense, "cpu"), open_decoder(pruned, "cpu")
    refit_layers(*decoders, keep, WINDOWS, 5, damping, found.update)
    return found


def test_a_refitted_model_is_nearer_to_the_dense_one_and_as_sparse(folders):
    dense, pruned = folders
    found = refitted(dense, pruned)
    checkpoint = Checkpoint(pruned)

    def replace(tensors):
        tensors.update({f"{name}.weight": weight for name, weight in found.items() if f"{name}.weight" in tensors})

    rewrite_checkpoint(checkpoint, pruned.parent / "refitted", replace, checkpoint.identity())
    assert found.keys() == open_decoder(pruned, "cpu").linears().keys()
    for name, weight in found.items():
        assert not weight[checkpoint.matrix(name) == 0].any()
    wanted = last_states(dense)
    before, after = ((last_states(folder) - wanted).norm() for folder in (pruned, pruned.parent / "refitted"))
    assert after < 0.75 * before


def test_a_model_that_lost_nothing_stays_as_it_is(folders):
    dense, _ = folders
    checkpoint = open_decoder(dense, "cpu").checkpoint
    for name, weight in refitted(dense, dense).items():
        torch.testing.assert_close(weight, checkpoint.matrix(name), rtol=1e-4, atol=1e-4)


def test_inputs_that_are_not_finite_are_told(tmp_path):
    dense = make_model("llama", tmp_path / "dense")

    def spoil(tensors):
        if "model.layers.1.input_layernorm.weight" in tensors:
            tensors["model.layers.1.input_layernorm.weight"][3] = torch.nan

    rewrite_checkpoint(dense, tmp_path / "broken", spoil, {"base_model": "x", "iteration": "1"})
    with pytest.raises(UserError, match=r"broken: the inputs of model\.layers\.1\.self_attn\.\w+ are not finite"):
        refitted(dense, tmp_path / "broken")
