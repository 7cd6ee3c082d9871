"""Looking ahead: what the next iteration drops is known, and fades."""

import math

import pytest
import torch
from test_recovery import EVALUATION_WINDOWS, SETTINGS, WINDOWS, prune, tiny_llama

from stepdown.models.checkpoint import Checkpoint
from stepdown.models.tier_maps import dense_tier_map
from stepdown.prune.calibration import Calibration
from stepdown.recover.look_ahead import left_after, weights_to_go
from stepdown.recover.recovery import recover
from stepdown.recover.settings import RecoverySettings
from stepdown.tensors.tiers import Tier, flatten_maps, tier_counts


def test_what_is_left_is_what_was_asked_for():
    assert math.prod(left_after(step, 7, 1.5) for step in range(1, 8)) == pytest.approx(math.exp(-1.5))
    rates = [left_after(step, 7, 1.5) for step in range(1, 8)]
    assert rates == sorted(rates, reverse=True)


def test_what_goes_is_what_the_next_shares_drop(tmp_path):
    """Half of the blocks of a dense model at 2:4: half of their weights go, none of the others."""
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    names = [name.removesuffix(".weight") for name in checkpoint.names if "_proj" in name]
    shapes = {name: checkpoint.shape(f"{name}.weight") for name in names}
    tier_map = dense_tier_map(shapes, 8, 3, checkpoint.identity()["base_model"])
    calibration = Calibration({name: torch.rand(columns) for name, (_, columns) in shapes.items()}, {})
    how = (calibration, "wanda", torch.device("cpu"))
    going = dict(weights_to_go(checkpoint, tier_map, ("0.5", "0.5", "0"), *how))
    blocks = tier_counts(("0.5", "0.5", "0"), len(flatten_maps(tier_map.tiers)))[Tier.TWO_FOUR]
    assert sum(int(mask.sum()) for mask in going.values()) == blocks * 32
    mixed = dict(weights_to_go(checkpoint, tier_map, ("0.5", "0.25", "0.25"), *how))
    assert all((mixed[name] | ~going[name]).all() for name in names)
    assert sum(int(mask.sum()) for mask in mixed.values()) > blocks * 32


def test_what_goes_fades_while_the_others_train(tmp_path):
    settings = RecoverySettings(**(SETTINGS | {"look_ahead": 4.0, "learning_rate": 1e-5, "weight_decay": 0.0}))
    model = tiny_llama()
    masks = prune(model)
    name = "model.layers.0.mlp.up_proj"
    before = model.get_submodule(name).weight.detach().clone()
    fading = {name: masks[name] & (torch.arange(before.shape[1]) % 2 == 0)}
    found = recover(model, masks, WINDOWS, EVALUATION_WINDOWS, settings, tmp_path, fading=fading)
    after = found.model.get_submodule(name).weight.detach()
    faded = fading[name]
    share = after[faded].abs().sum() / before[faded].abs().sum()
    assert found.best_step == found.steps
    assert share.item() == pytest.approx(math.exp(-4.0), rel=0.05)
    torch.testing.assert_close(after[~faded], before[~faded], atol=1e-3, rtol=0)
