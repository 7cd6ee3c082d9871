"""Masks that move while a model trains: inside their tiers, by the formula, the same after an interruption."""

import copy
import math

import pytest
import torch
from test_recovery import EVALUATION_WINDOWS, SETTINGS, WINDOWS, Interrupt, finetuned, same, tiny_llama
from test_recovery import pruned as pruned_folder
from torch import nn

from stepdown.errors import UserError
from stepdown.models.checkpoint import Checkpoint, save_tensors
from stepdown.models.tier_maps import check_zeros, read_tier_map
from stepdown.recover import recovery, trainer
from stepdown.recover.regrowth import Blocks, RegrowingTrainer, check_tiers
from stepdown.recover.settings import RecoverySettings, training_arguments
from stepdown.recover.trainer import Windows
from stepdown.tensors.blocks import grid_shape
from stepdown.tensors.tiers import keep_mask

BLOCK, K = 8, 3
REGROWING = SETTINGS | {"regrow_every": 1, "regrow_share": 0.7, "regrow_decay": 1.0, "epochs": 3}


def prune(model: nn.Module, start: str) -> tuple[dict, dict]:
    """Tiers by turns over the blocks of every linear, each pruned to its own: masks and blocks by name."""
    masks, blocks = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            weight = module.weight.data
            rows, columns = grid_shape(tuple(weight.shape), BLOCK)
            tiers = (torch.arange(rows * columns) % 3).to(torch.uint8).view(rows, columns)
            before = weight.clone() if start == "before" else None
            blocks[name] = Blocks(tiers, BLOCK, K, torch.linspace(1, 2, weight.shape[1]), before)
            weight.mul_(blocks[name].keep(weight))
            masks[name] = keep_mask(weight, tiers, BLOCK)
    return masks, blocks


def run(state, start="zero", **changed):
    """(what came of it, masks before, blocks) of finetuning a tiny model whose masks move."""
    model = tiny_llama()
    masks, blocks = prune(model, start)
    wanted = RecoverySettings(**(REGROWING | changed))
    state.mkdir(exist_ok=True)
    given = copy.deepcopy(masks)
    return recovery.recover(model, given, WINDOWS, EVALUATION_WINDOWS, wanted, state, blocks=blocks), masks, blocks


@pytest.mark.parametrize("start", ["zero", "before"])
def test_masks_move_inside_their_tiers(tmp_path, start):
    result, masks, blocks = run(tmp_path, start)
    check_tiers(result.model, blocks)
    moved = 0
    for name, keep in masks.items():
        weight = result.model.get_submodule(name).weight.detach()
        moved += int((weight[~keep] != 0).sum())
    assert moved > 0
    assert result.evaluations[result.best_step] < result.evaluations[0]


def test_more_weights_than_a_tier_allows_are_told():
    model = tiny_llama()
    _, blocks = prune(model, "zero")
    model.model.layers[0].mlp.up_proj.weight.data += 1e-9
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.mlp\.up_proj: training left \d+ blocks"):
        check_tiers(model, blocks)


def regrowing_trainer(state, model, start, **changed):
    masks, blocks = prune(model, start)
    wanted = RecoverySettings(**(REGROWING | changed))
    how = (wanted.regrow_every, wanted.regrow_share, wanted.regrow_decay)
    windows = Windows(WINDOWS)
    arguments = training_arguments(wanted, state, "cpu")
    given = {"model": model, "args": arguments, "train_dataset": windows, "eval_dataset": windows}
    return RegrowingTrainer(blocks, *how, keep_masks=masks, **given)


def test_the_optimizer_sees_weights_whole_and_gradients_of_all(tmp_path):
    """The first step by hand: AdamW on the unpruned weights, by gradients at the pruned ones."""
    changed = {"epochs": 1, "batch_size": 11, "gradient_accumulation": 1, "warmup_steps": 0, "max_grad_norm": 1e9}
    model = tiny_llama()
    whole = copy.deepcopy(model)
    stepping = regrowing_trainer(tmp_path, model, "before", regrow_every=9, regrow_share=1.0, **changed)
    stepping.state.max_steps = 2
    pruned = copy.deepcopy(model)
    pruned(input_ids=WINDOWS, labels=WINDOWS).loss.backward()
    for parameter, gradient in zip(whole.parameters(), pruned.parameters(), strict=True):
        parameter.grad = gradient.grad.clone()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=3e-3, weight_decay=0.1)
    stepping.create_optimizer()
    for group in stepping.optimizer.param_groups:
        group["lr"] = 3e-3
    model(input_ids=WINDOWS, labels=WINDOWS).loss.backward()
    stepping.optimizer.step()
    optimizer.step()
    for name, (weight, keep) in stepping._masked.items():
        expected = whole.get_submodule(name).weight.detach()
        torch.testing.assert_close(weight.detach(), expected * keep)
        left = math.exp(-2 * 1.0 * 1 / (2 * 3))
        torch.testing.assert_close(stepping._held_back[name], left * expected * (1 - keep))


def test_gradients_of_what_is_pruned_count_until_masks_stay(tmp_path):
    norms = {}
    for share in (0.01, 1.0):
        moving = regrowing_trainer(tmp_path / str(share), tiny_llama(), "zero", regrow_share=share)
        moving.train()
        norms[share] = moving.state.log_history[0]["grad_norm"]
    assert norms[1.0] > norms[0.01] * 1.01


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"), "before")[0]


@pytest.mark.parametrize("step", [3, 5, 8, 9])
def test_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch, undisturbed, step):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "FiniteLoss", lambda: Interrupt(step))
        run(tmp_path, "before")
    assert same(run(tmp_path, "before")[0], undisturbed)


@pytest.mark.parametrize("changed", [{"regrow_every": 5}, {"look_ahead": 2.0}], ids=lambda changed: min(changed))
def test_little_memory_keeps_masks_as_they_are(changed):
    with pytest.raises(UserError, match=rf"^recovery: {min(changed)} is .*: give 0 with LoRA, .* or memory low$"):
        RecoverySettings(**(SETTINGS | {"bf16": True, "memory": "low"} | changed))


folder = pruned_folder


def test_the_script_moves_masks_inside_the_tier_map(folder):
    tier_map = read_tier_map(folder / "tier_map.safetensors")
    norms = {name: torch.linspace(1, 2, columns) for name, (_, columns) in tier_map.shapes.items()}
    save_tensors(norms, folder / "calibration.safetensors", {"base_model": tier_map.base_model})
    tiny_llama().bfloat16().save_pretrained(folder / "before")
    options = {"regrow_every": 1, "calibration": folder / "calibration.safetensors", "model_before": folder / "before"}
    finetuned(folder, **options)
    before, after = (Checkpoint(folder / name) for name in ("pruned_model", "finetuned_model"))
    for name in tier_map.tiers:
        check_zeros(tier_map, name, after.matrix(name), after.folder)
    assert any(((before.matrix(name) == 0) & (after.matrix(name) != 0)).any() for name in tier_map.tiers)


def test_the_script_asks_for_the_calibration(folder):
    with pytest.raises(UserError, match=r"--regrow-every: name a tier map .* with --calibration"):
        finetuned(folder, regrow_every=1)
