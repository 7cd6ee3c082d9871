"""Training in little memory: bfloat16 weights that lose nothing on average, masks in bits, losses in chunks."""

import copy
import json

import pytest
import torch
from live_bytes import LiveBytes
from test_recovery import SETTINGS, WINDOWS, command, prune, pruned, tiny_llama, weight_of  # noqa: F401
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

import finetune
from stepdown.models.checkpoint import Checkpoint
from stepdown.plan import training_memory
from stepdown.plan.training_memory import TOLERANCE, ModelSize, training_bytes
from stepdown.recover import bf16_adamw, losses
from stepdown.recover.bf16_adamw import BFloat16AdamW, round_stochastically
from stepdown.recover.recovery import check_pruned_are_zero, recover
from stepdown.recover.settings import RecoverySettings
from stepdown.tensors import token_chunks


def low_memory_run(state, keep_moments=False, **changed):
    model = tiny_llama().bfloat16()
    masks = prune(model)
    before = copy.deepcopy(model)
    state.mkdir(exist_ok=True)
    wanted = RecoverySettings(**(SETTINGS | {"bf16": True, "memory": "low"} | changed))
    return recover(model, masks, WINDOWS, WINDOWS[:4], wanted, state, keep_moments=keep_moments), masks, before


# ---------------------------------------------------------------- bfloat16


def test_rounding_is_to_a_neighbour_and_loses_nothing_on_average():
    values = torch.tensor([1.0, 1.001, -3.1e-5, 0.0, -0.75]).repeat(20_000, 1)
    rounded = round_stochastically(values, torch.Generator().manual_seed(0)).float()
    assert ((rounded - values).abs() < values.abs() / 128 + (values == 0)).all()
    torch.testing.assert_close(rounded.mean(0), values[0], rtol=1e-4, atol=0)
    for exact in (0, 3, 4):
        assert (rounded[:, exact] == values[0, exact]).all()


def test_what_is_not_a_number_stays_so():
    # All bits set, as a GPU writes it, and as a CPU does.
    values = torch.tensor([2**31 - 1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(values, torch.Generator().manual_seed(0)).isnan().all()


def test_steps_are_those_of_adamw_but_for_the_rounding(monkeypatch):
    """On average over many weights that start alike; the second moment falls by 0.1 % a step, which is no bfloat16."""
    monkeypatch.setattr(bf16_adamw, "CHUNK", 3000)
    ours = nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))
    theirs = nn.Parameter(torch.ones(1))
    options = {"lr": 1e-4, "weight_decay": 0.1}
    mine, reference = BFloat16AdamW([ours], **options), torch.optim.AdamW([theirs], **options)
    for step in range(60):
        for weight in (ours, theirs):
            weight.grad = torch.full_like(weight, 1.0 if step < 10 else 1e-3)
        mine.step()
        reference.step()
    assert ours.dtype == mine.state[ours]["exp_avg_sq"].dtype == torch.bfloat16
    torch.testing.assert_close(ours.float().mean() - 1, theirs.mean() - 1, rtol=0.02, atol=0)
    for moment in ("exp_avg", "exp_avg_sq"):
        expected = reference.state[theirs][moment].mean()
        torch.testing.assert_close(mine.state[ours][moment].float().mean(), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_pruned_weights_stay_zero_and_the_others_learn(tmp_path, method):
    result, masks, before = low_memory_run(tmp_path, method=method, epochs=4)
    check_pruned_are_zero(result.model, masks)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    assert result.model.loss_function is losses.cross_entropy
    assert result.evaluations[result.best_step] < result.evaluations[0]
    for name in masks:
        assert not torch.equal(weight_of(before, name), weight_of(result.model, name)), name


def test_moments_are_handed_out_only_when_asked_for(tmp_path):
    assert low_memory_run(tmp_path / "unasked", epochs=1)[0].moments == {}
    moments = low_memory_run(tmp_path / "asked", epochs=1, keep_moments=True)[0].moments
    assert {value.dtype for name, value in moments.items() if "exp" in name} == {torch.bfloat16}


@pytest.mark.parametrize("how", [[], ["--sharded"]], ids=["whole", "sharded"])
def test_two_processes_train_as_one_but_for_the_rounding(pruned, how):  # noqa: F811
    curves = []
    for changed, words in (({"gradient_accumulation": 2}, []), ({"gradient_accumulation": 1, "processes": 2}, how)):
        options = command(pruned, batch_size=2, tokens_per_epoch=256, memory="low", **changed)
        finetune.main(finetune._parser().parse_args([*options, *words]))
        log = json.loads((pruned / "training.json").read_text())["log"]
        curves.append([row.get("loss", row.get("eval_loss")) for row in log])
    assert curves[0] == pytest.approx(curves[1], abs=1e-2)
    assert curves[0][-1] < curves[0][0] - 0.1
    before, after = (Checkpoint(pruned / name) for name in ("pruned_model", "finetuned_model"))
    for name in (name for name in before.names if "_proj" in name):
        old, new = before.tensors([name])[name], after.tensors([name])[name]
        columns = old.shape[1] // 2
        assert not new[:, columns:][old[:, columns:] == 0].any()


# ---------------------------------------------------------------- losses in chunks


@pytest.mark.parametrize("items", [None, 5])
def test_the_cross_entropy_is_that_of_transformers(monkeypatch, items):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 9, 7), torch.randint(0, 7, (2, 9))
    labels[1, 4] = -100
    gradients = []
    for chunk, of in ((2**24, ForCausalLMLoss), (2**24, losses.cross_entropy), (30, losses.cross_entropy)):
        monkeypatch.setattr(token_chunks, "CHUNK", chunk)
        given = logits.clone().requires_grad_()
        loss = of(given, labels, 7, items)
        loss.backward()
        gradients.append((loss.detach(), given.grad))
    for one, other, chunked in zip(*gradients, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(chunked, one)


def test_the_divergence_in_chunks_is_that_of_all_tokens(monkeypatch):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 9, 7)
    gradients = []
    for chunk in (2**24, 30):
        monkeypatch.setattr(token_chunks, "CHUNK", chunk)
        given = student.clone().requires_grad_()
        loss = losses.divergence(given, teacher, 2.0)
        loss.backward()
        gradients.append((loss.detach(), given.grad))
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole)


def test_no_float32_copy_of_all_logits_is_held(monkeypatch):
    monkeypatch.setattr(token_chunks, "CHUNK", 2**12)
    logits, teacher = torch.randn(2, 4, 128, 256).bfloat16()
    labels = torch.randint(0, 256, (4, 128))
    logits.requires_grad_()
    with LiveBytes([logits, teacher]) as live:
        loss = losses.cross_entropy(logits, labels, 256) + losses.divergence(logits, teacher, 1.0)
        forward = live.peak
        loss.backward()
    size = logits.nbytes
    assert forward < 2.5 * size  # both logits, and a chunk
    assert live.peak < 6 * size


# ---------------------------------------------------------------- what is held


def peak_and_size(monkeypatch, state, wanted: RecoverySettings) -> tuple[int, ModelSize]:
    """The most bytes of tensors alive in a training of two steps, and the size of its model."""
    chunk = 2**16
    monkeypatch.setattr(token_chunks, "CHUNK", chunk)
    monkeypatch.setattr(bf16_adamw, "CHUNK", chunk)
    monkeypatch.setattr(training_memory, "CHUNKS", 8 * chunk)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=688, num_hidden_layers=3, num_attention_heads=4
    )
    model, teacher = LlamaForCausalLM(config).to(wanted.weights_dtype), LlamaForCausalLM(config).bfloat16()
    masks = prune(model)
    windows = torch.randint(0, config.vocab_size, (8, 128))
    with LiveBytes([*model.parameters(), *teacher.parameters()]) as live:
        recover(model, masks, windows, windows[:2], wanted, state, teacher=teacher.eval().requires_grad_(False))
    matrices = sum(keep.numel() for keep in masks.values())
    # Masks as they are given lie beside the bits, where there is no GPU.
    beside = matrices if wanted.memory == "low" else 0
    weights = 2 * 2048 * 256 + matrices + 7 * 256
    return live.peak - beside, ModelSize(weights, matrices, 3, 256, 688, 2048)


@pytest.mark.parametrize("checkpointed", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("memory", ["full", "low"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_holds_what_is_computed(monkeypatch, tmp_path, method, memory, checkpointed):
    options = {"method": method, "memory": memory, "gradient_checkpointing": checkpointed, "distill_weight": 0.9}
    wanted = RecoverySettings(epochs=1, batch_size=2, gradient_accumulation=2, **options)
    peak, size = peak_and_size(monkeypatch, tmp_path, wanted)
    assert sum(training_bytes(size, wanted.plan(128)).values()) == pytest.approx(peak, rel=TOLERANCE)
