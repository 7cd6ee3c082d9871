"""Refitting: models that come nearer to the dense one, as sparse as they were."""

from pathlib import Path

import pytest
import torch
from families import make_model
from hypothesis import given
from hypothesis import strategies as st
from three_tiers import prune_by_magnitude

from stepdown.errors import UserError
from stepdown.models.checkpoint import Checkpoint, rewrite_checkpoint
from stepdown.models.decoder import open_decoder
from stepdown.models.layer_walk import LayerWalk
from stepdown.models.step_masks import StepMasks, read_step_masks
from stepdown.models.tier_maps import check_zeros
from stepdown.prune import refit
from stepdown.prune.layerwise import visit
from stepdown.prune.refit import fit_within, refit_layers
from stepdown.tensors.masks import keep_n_of_m

WINDOWS = torch.randint(0, 128, (12, 32), generator=torch.Generator().manual_seed(1))


def halve(tensors):
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and any(part.isdigit() for part in name.split(".")):
            tensor.mul_(keep_n_of_m(tensor.abs(), 2, 4))


MASKS = StepMasks((), 1, "", keep=lambda _, weight: weight != 0)


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


def refitted(dense: Path, pruned: Path, masks=MASKS, swap: bool = False) -> dict[str, torch.Tensor]:
    found = {}
    decoders = open_decoder(dense, "cpu"), open_decoder(pruned, "cpu")
    for layer in refit_layers(*decoders, fit_within(masks, 0.01, swap), WINDOWS, 5):
        found |= layer.weights()
    return found


def written(weights: dict[str, torch.Tensor], pruned: Path, folder: Path) -> Path:
    checkpoint = Checkpoint(pruned)

    def replace(tensors):
        tensors.update({name: weights[name] for name in tensors.keys() & weights.keys()})

    rewrite_checkpoint(checkpoint, folder, replace, checkpoint.identity())
    return folder


def test_a_refitted_model_is_nearer_to_the_dense_one_and_as_sparse(folders):
    dense, pruned = folders
    found = refitted(dense, pruned)
    folder = written(found, pruned, pruned.parent / "refitted")
    assert found.keys() == {f"{name}.weight" for name in open_decoder(pruned, "cpu").linears()}
    for name, weight in found.items():
        assert not weight[Checkpoint(pruned).tensors([name])[name] == 0].any()
    wanted = last_states(dense)
    before, after = ((last_states(model) - wanted).norm() for model in (pruned, folder))
    assert after < 0.75 * before


def test_swaps_come_nearer_still_and_leave_every_block_in_its_tier(tmp_path):
    dense = make_model("llama", tmp_path / "dense")
    pruned, tier_map = prune_by_magnitude(dense, tmp_path)
    masks = read_step_masks(tmp_path / "tier_map.safetensors", pruned)
    weights = {swap: refitted(dense, pruned.folder, masks, swap) for swap in (False, True)}
    for name in tier_map.tiers:
        check_zeros(tier_map, name, weights[True][f"{name}.weight"], "swapped")
    wanted = last_states(dense)
    fitted, swapped = (
        (last_states(written(found, pruned.folder, tmp_path / f"swap_{swap}")) - wanted).norm()
        for swap, found in weights.items()
    )
    assert swapped < 0.98 * fitted


def test_a_model_that_lost_nothing_stays_as_it_is(folders):
    dense, _ = folders
    checkpoint = open_decoder(dense, "cpu").checkpoint
    for name, weight in refitted(dense, dense).items():
        torch.testing.assert_close(weight, checkpoint.tensors([name])[name], rtol=1e-4, atol=1e-4)


def test_a_fit_is_to_something_between_what_its_inputs_are_and_what_they_were(folders):
    walks = [LayerWalk(open_decoder(folder, "cpu"), list(WINDOWS.split(5))) for folder in folders[::-1]]
    for layer, dense_layer in zip(*(visit(walk, None) for walk in walks), strict=True):
        name = layer.called_together()[-1][0]
        hessian, cross = refit._moments(layer, dense_layer, name)
        x, z = (torch.cat([each.inputs(name, batch) for batch in range(3)]) for each in (layer, dense_layer))
        share = refit.drift_share(WINDOWS.numel(), x.shape[1])
        torch.testing.assert_close(hessian, x.T @ x)
        torch.testing.assert_close(cross, torch.lerp(x, z, share).T @ x, rtol=1e-4, atol=1e-3)
        layer.replay()
        dense_layer.replay()
    assert (z - x).norm() / z.norm() > 0.01


@given(st.integers(1, 10**9), st.integers(1, 10**5))
def test_the_more_text_the_more_of_the_drift_is_made_up_for(tokens, inputs):
    shares = [refit.drift_share(tokens * more, inputs) for more in (1, 2, 10**9)]
    assert 0 < shares[0] < shares[1] <= shares[2] <= 1
    assert shares[2] > 0.9
    assert refit.drift_share(refit.TOKENS_PER_INPUT * inputs, inputs) == 0.5


def test_inputs_that_are_not_finite_are_told(tmp_path):
    dense = make_model("llama", tmp_path / "dense")

    def spoil(tensors):
        if "model.layers.1.input_layernorm.weight" in tensors:
            tensors["model.layers.1.input_layernorm.weight"][3] = torch.nan

    rewrite_checkpoint(dense, tmp_path / "broken", spoil, {"base_model": "x", "iteration": "1"})
    with pytest.raises(UserError, match=r"broken: the inputs of model\.layers\.1\.self_attn\.\w+ are not finite"):
        refitted(dense, tmp_path / "broken")
