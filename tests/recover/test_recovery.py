"""Finetuning under a mask: zeros stay, merging is exact, an interrupted run ends as an undisturbed one does."""

import copy
import json
import math
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import finetune
from stepdown.errors import UserError
from stepdown.models.checkpoint import Checkpoint
from stepdown.models.tier_maps import TierMap, dense_tier_map, write_tier_map
from stepdown.recover import recovery, trainer
from stepdown.recover.lora import MaskedLoraLinear, add_masked_adapter, match_targets
from stepdown.recover.recovery import recover
from stepdown.recover.settings import RecoverySettings, training_arguments
from stepdown.recover.trainer import MaskedTrainer, Windows
from stepdown.recover.training_state import fingerprint, last_checkpoint, training_state
from stepdown.tensors.tiers import keep_mask

WINDOWS = torch.randint(0, 256, (11, 12), generator=torch.Generator().manual_seed(0))
EVALUATION_WINDOWS = WINDOWS[:4]
OTHER_WINDOWS = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(1))
# 11 windows in batches of 2, two batches a step: 3 steps an epoch, the last with half a batch.
SETTINGS = {
    "epochs": 2,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "warmup_steps": 1,
    "bf16": False,
    "evaluation_steps": 2,
    "lora_rank": 4,
    "lora_alpha": 16,
}
FREE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On matrices this small a second thread only waits, and waits for long where another process has the core. And
    what several threads train can end a last bit apart."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def tiny_neox() -> GPTNeoXForCausalLM:
    """A model whose head has another name on disk than in memory."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    return GPTNeoXForCausalLM(config)


def prune(model: nn.Module) -> dict[str, Tensor]:
    """Keep 4 of 10 weights in the right half of every linear but one, and all in its left; returns the masks."""
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            keep = torch.rand(module.weight.shape, generator=generator) < 0.4
            keep[:, : keep.shape[1] // 2] = True
            masks[name] = keep | (name == FREE)
            module.weight.data.mul_(masks[name])
    return masks


def run(
    state: Path, build=tiny_llama, evaluation_windows: Tensor = EVALUATION_WINDOWS, **changed
) -> tuple[recovery.Recovery, dict[str, Tensor], nn.Module]:
    """(what came of it, masks, model before) of finetuning a pruned tiny model."""
    model = build()
    masks = prune(model)
    before = copy.deepcopy(model)
    state.mkdir(exist_ok=True)
    wanted = RecoverySettings(**(SETTINGS | changed))
    return recover(model, masks, WINDOWS, evaluation_windows, wanted, state), masks, before


def weight_of(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight.detach()


# ---------------------------------------------------------------- zeros


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_pruned_weights_stay_zero_and_the_others_move(tmp_path, method, bf16):
    result, masks, before = run(tmp_path, method=method, bf16=bf16, max_grad_norm=0.1)
    for name, keep in masks.items():
        old, new = weight_of(before, name), weight_of(result.model, name)
        assert new[~keep].count_nonzero() == 0, name
        assert (new[keep] != old[keep]).float().mean() > 0.9, name
    assert result.evaluations[result.best_step] < result.evaluations[0]
    assert type(result.model) is LlamaForCausalLM
    embeddings_moved = not torch.equal(result.model.lm_head.weight, before.lm_head.weight)
    assert embeddings_moved == (method == "full")


def one_step_trainer(tmp_path: Path, model: nn.Module, masks: dict[str, Tensor]) -> MaskedTrainer:
    wanted = RecoverySettings(**(SETTINGS | {"epochs": 1, "batch_size": 11, "warmup_steps": 0}))
    windows = Windows(WINDOWS)
    arguments = training_arguments(wanted, tmp_path, "cpu")
    return MaskedTrainer(masks, model=model, args=arguments, train_dataset=windows, eval_dataset=windows)


def test_gradients_are_clipped_by_the_norm_of_what_is_kept(tmp_path):
    model = tiny_llama()
    masks = prune(model)
    reference = copy.deepcopy(model)
    reference(input_ids=WINDOWS, labels=WINDOWS).loss.backward()
    for name, keep in masks.items():
        reference.get_submodule(name).weight.grad.mul_(keep)
    expected = torch.stack([parameter.grad.norm() for parameter in reference.parameters()]).norm()
    trainer = one_step_trainer(tmp_path, model, masks)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(float(expected), rel=1e-5)


def test_weights_are_masked_after_a_step_whatever_the_optimizer_does(tmp_path):
    model = tiny_llama()
    masks = prune(model)
    for name in masks:
        weight_of(model, name).add_(0.1)
    one_step_trainer(tmp_path, model, masks).train()
    recovery.check_pruned_are_zero(model, masks)


def test_a_revived_weight_is_told():
    model = tiny_llama()
    masks = prune(model)
    weight_of(model, "model.layers.0.mlp.up_proj")[~masks["model.layers.0.mlp.up_proj"]] = 1e-9
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.mlp\.up_proj: finetuning revived"):
        recovery.check_pruned_are_zero(model, masks)


# ---------------------------------------------------------------- LoRA


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_a_masked_adapter_is_merged_to_the_bit(rows, columns, rank, bias, seed):
    torch.manual_seed(seed)
    base = nn.Linear(columns, rows, bias=bias)
    keep = torch.rand(rows, columns) < 0.5
    base.weight.data.mul_(keep)
    config = LoraConfig(r=rank, lora_alpha=7)
    layer = MaskedLoraLinear(base, "default", config=config, r=rank, lora_alpha=7)
    layer.keep = keep
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, columns)
    trained = layer(x)
    layer.merge()
    assert torch.equal(layer(x), trained)
    assert torch.equal(linear(x, base.weight, base.bias), trained)
    assert base.weight[~keep].count_nonzero() == 0


@pytest.mark.parametrize("bf16", [False, True])
def test_a_merged_model_computes_what_was_trained(bf16):
    model = tiny_llama()
    masks = prune(model)
    adapted = add_masked_adapter(model, masks, ["all-linear"], rank=4, alpha=16, dropout=0.0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    base = tiny_llama()
    prune(base)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        unadapted, trained = base(WINDOWS).logits, adapted(WINDOWS).logits
    merged = adapted.merge_and_unload()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        torch.testing.assert_close(merged(WINDOWS).logits, trained, rtol=0, atol=1e-5)
    assert (trained - unadapted).abs().max() > 1e-2
    recovery.check_pruned_are_zero(merged, masks)


def test_dropout_acts_on_the_adapter_alone():
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_dropout=0.999999)
    layer = MaskedLoraLinear(nn.Linear(8, 8), "default", config=config, r=2)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(4, 8)
    torch.testing.assert_close(layer.train()(x), layer.base_layer(x))
    assert not torch.allclose(layer.eval()(x), layer.base_layer(x))


def test_targets_are_endings_of_names(tmp_path):
    names = ["l.0.attn.q_proj", "l.0.attn.k_proj", "l.0.mlp.down_proj"]
    assert match_targets(names, ["all-linear"]) == names
    assert match_targets(names, ["mlp.down_proj", "q_proj"]) == [names[0], names[2]]
    for missing in (["proj"], ["q_proj", "v_proj"]):
        with pytest.raises(UserError, match=r"matches no pruned linear; there are down_proj, k_proj, q_proj"):
            match_targets(names, missing)
    result, masks, before = run(tmp_path, method="lora", epochs=1, lora_targets=("q_proj",))
    moved = {name for name in masks if not torch.equal(weight_of(result.model, name), weight_of(before, name))}
    assert moved == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}


# ---------------------------------------------------------------- choosing, refusing


def test_the_best_evaluation_is_what_is_returned(tmp_path):
    # Random tokens are learned by heart, which makes others less likely: the first evaluation is the best.
    result, *_ = run(tmp_path, evaluation_windows=OTHER_WINDOWS, learning_rate=0.03, epochs=4)
    trained = {step: loss for step, loss in result.evaluations.items() if step > 0}
    assert min(trained.values()) < trained[result.steps] - 0.01
    with torch.no_grad():
        loss = result.model(input_ids=OTHER_WINDOWS, labels=OTHER_WINDOWS).loss.item()
    assert loss == pytest.approx(min(trained.values()), rel=1e-5)


def test_a_run_shorter_than_an_evaluation_period_is_evaluated_at_its_ends(tmp_path):
    result, *_ = run(tmp_path, evaluation_steps=100)
    assert list(result.evaluations) == [0, 6]
    assert [row["step"] for row in result.log if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert (result.steps, result.tokens) == (6, 2 * 11 * 12)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(UserError, match=r"recovery: loss is (nan|inf) at step [2-5] of 6: lower learning_rate"):
        run(tmp_path, learning_rate=1e30, warmup_steps=0, evaluation_steps=100)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("weight_decay", -0.1),
        ("method", "prefix"),
        ("memory", "none"),
        ("memory", "low"),  # in float32
        ("learning_rate_schedule", "exponential"),
        ("lora_dropout", 1.0),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(name, value):
    with pytest.raises(UserError, match=f"recovery: {name} is .*: give "):
        RecoverySettings(**(SETTINGS | {name: value}))


def test_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="evaluation text is shorter than one window"):
        recover(tiny_llama(), {}, WINDOWS, WINDOWS[:0], RecoverySettings(**SETTINGS), tmp_path)


@pytest.mark.parametrize("size", [20_000, 70_000], ids=["weights", "optimizer"])
def test_a_full_disk_is_told(tmp_path, size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(UserError, match=r"written \(.*\); is the disk full\?"):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert last_checkpoint(tmp_path) is None


# ---------------------------------------------------------------- interruptions


class Interrupt(TrainerCallback):
    """Raises at the end of one step, before what is due at it is logged, evaluated or saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(monkeypatch, state: Path, step: int, **changed) -> None:
    """A run that is interrupted at a step, or after the last one if there is none such."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "FiniteLoss", lambda: Interrupt(step))
        run(state, **changed)
        raise KeyboardInterrupt


def same(one: recovery.Recovery, other: recovery.Recovery) -> bool:
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    if torch.get_num_threads() > 1:  # which may share a sum out otherwise the second time
        return all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in pairs)
    return one.log == other.log and all(torch.equal(a, b) for a, b in pairs)


RUNS = {
    "full": {},
    "lora": {"method": "lora", "lora_dropout": 0.2},
    "renamed on disk": {"build": tiny_neox},
    "low memory": {"build": lambda: tiny_llama().bfloat16(), "memory": "low", "bf16": True},
}


@pytest.fixture(scope="module", params=RUNS)
def undisturbed(request, tmp_path_factory) -> tuple[str, recovery.Recovery]:
    return request.param, run(tmp_path_factory.mktemp("undisturbed"), **RUNS[request.param])[0]


@pytest.mark.parametrize(
    ("step", "resumed_at"), [(1, None), (3, "checkpoint-2"), (6, "checkpoint-4"), (7, "checkpoint-6")]
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch, undisturbed, step, resumed_at):
    method, expected = undisturbed
    interrupted(monkeypatch, tmp_path, step, **RUNS[method])
    checkpoint = last_checkpoint(tmp_path)
    assert (checkpoint and checkpoint.name) == resumed_at
    assert same(run(tmp_path, **RUNS[method])[0], expected)


def test_an_unfinished_checkpoint_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    interrupted(monkeypatch, tmp_path / "whole", 5)
    for file in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        for kept in (0.6, 0):
            state = shutil.copytree(tmp_path / "whole", tmp_path / f"{file} {kept}")
            damaged = state / "checkpoint-4" / file
            content = damaged.read_bytes()
            damaged.unlink()
            if kept:
                damaged.write_bytes(content[: int(len(content) * kept)])
            assert last_checkpoint(state) == state / "checkpoint-2", damaged
            assert not (state / "checkpoint-4").exists()


def test_state_is_kept_until_success_and_wiped_when_stale(tmp_path):
    folder = tmp_path / "state"
    with pytest.raises(ZeroDivisionError), training_state(folder, "one") as state:
        (state / "checkpoint-1").mkdir()
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), training_state(folder, "one") as state:
        assert (state / "checkpoint-1").exists()
        raise ZeroDivisionError
    with training_state(folder, "two") as state:
        assert not (state / "checkpoint-1").exists()
    assert not folder.exists()


def test_state_that_was_moved_is_stale(tmp_path):
    with pytest.raises(ZeroDivisionError), training_state(tmp_path / "old", "one") as state:
        (state / "checkpoint-1").mkdir()
        raise ZeroDivisionError
    shutil.move(tmp_path / "old", tmp_path / "new")
    with training_state(tmp_path / "new", "one") as state:
        assert not any(state.iterdir())


def test_state_is_refused_to_a_second_process(tmp_path):
    with training_state(tmp_path / "state", "one") as state:
        (state / "checkpoint-1").mkdir()
        with (
            pytest.raises(UserError, match=f"process {os.getpid()} on .* is training here"),
            training_state(tmp_path / "state", "two"),
        ):
            pass
        assert (state / "checkpoint-1").exists()


@pytest.mark.parametrize("changed", ["settings", "windows", "file"])
def test_the_fingerprint_tells_what_changed(tmp_path, changed):
    file = tmp_path / "tier_map"
    file.write_text("one")

    def of(windows: Tensor = WINDOWS, **settings) -> str:
        return fingerprint(RecoverySettings(**(SETTINGS | settings)), [windows], [file])

    original = of()
    assert of() == original
    if changed == "file":
        file.write_text("two")
    assert of(WINDOWS + (changed == "windows"), seed=int(changed == "settings")) != original


# ---------------------------------------------------------------- the script


@pytest.fixture(params=[tiny_llama])
def pruned(request, tmp_path) -> Path:
    """A folder with a pruned bf16 checkpoint, its tokenizer, its tier map and a text."""
    model = request.param().bfloat16()
    prune(model)
    model.save_pretrained(tmp_path / "pruned_model")
    tokenizer = Tokenizer(models.BPE(vocab={chr(33 + i): i for i in range(94)} | {" ": 94}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "pruned_model")
    write_tier_map(tiers_of(tmp_path / "pruned_model"), tmp_path / "tier_map.safetensors")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    return tmp_path


IS_LINEAR = re.compile(r"(_proj|dense|query_key_value|dense_\w+)\.weight$")


def tiers_of(folder: Path) -> TierMap:
    """The tier map of `prune` in blocks of 4: Dense in the left half and 2:4, or what passes for it, in the right."""
    checkpoint = Checkpoint(folder)
    shapes = {
        name.removesuffix(".weight"): checkpoint.shape(name) for name in checkpoint.names if IS_LINEAR.search(name)
    }
    tier_map = dense_tier_map(shapes, block_size=4, k=2, base_model=checkpoint.identity()["base_model"])
    for name, tiers in tier_map.tiers.items():
        tiers[:, tiers.shape[1] // 2 :] = name != FREE
    return tier_map


def command(folder: Path, **changed) -> list[str]:
    options = {
        "model": folder / "pruned_model",
        "masks": folder / "tier_map.safetensors",
        "step": "iter1",
        "text": folder / "text.txt",
        "sequence-length": 16,
        "tokens-per-epoch": 176,
        "state": folder / "state",
        "output-model": folder / "finetuned_model",
        "output-log": folder / "training.json",
        "device": "cpu",
    }
    options |= {name.replace("_", "-"): value for name, value in SETTINGS.items() if name != "bf16"}
    options |= {name.replace("_", "-"): value for name, value in changed.items()}
    return ["--bf16", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def finetuned(folder: Path, **changed) -> None:
    finetune.main(finetune._parser().parse_args(command(folder, **changed)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("pruned", "method"), [(tiny_llama, "full"), (tiny_llama, "lora"), (tiny_neox, "full")], indirect=["pruned"]
)
def test_the_script_keeps_names_types_and_zeros_and_repeats_itself(pruned, method):
    finetuned(pruned, method=method)
    before = load_file(pruned / "pruned_model" / "model.safetensors")
    after = {}
    for file in (pruned / "finetuned_model").glob("*.safetensors"):
        after |= load_file(file)
    assert {name: tensor.dtype for name, tensor in after.items()} == dict.fromkeys(before, torch.bfloat16)
    tier_map = tiers_of(pruned / "pruned_model")
    for name, tiers in tier_map.tiers.items():
        keep = keep_mask(before[f"{name}.weight"], tiers, tier_map.block_size)
        assert after[f"{name}.weight"][~keep].count_nonzero() == 0
        assert not torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    (head,) = {"lm_head.weight", "embed_out.weight"} & set(before)
    assert torch.equal(after[head], before[head]) == (method == "lora")
    assert Checkpoint(pruned / "finetuned_model").identity() == tier_map.identity
    log = json.loads((pruned / "training.json").read_text())
    assert (log["step"], log["method"], log["epochs"], log["steps"], log["tokens"]) == ("iter1", method, 2, 6, 352)
    assert not (pruned / "state").exists()
    first = contents(pruned / "finetuned_model") | {"log": (pruned / "training.json").read_bytes()}
    finetuned(pruned, method=method)
    assert contents(pruned / "finetuned_model") | {"log": (pruned / "training.json").read_bytes()} == first


@pytest.mark.parametrize(
    ("stored", "changed"),
    [
        (("lm_head.weight", "model.embed_tokens.weight"), {"method": "full"}),
        (("lm_head.weight", "model.embed_tokens.weight"), {"method": "lora"}),
        (("lm_head.weight",), {"method": "full"}),
    ],
)
def test_tied_weights_are_saved_under_the_names_they_were_stored_by(pruned, stored, changed):
    """And of a generation config that transformers reads and would not save again, nothing is asked."""
    folder = pruned / "pruned_model"
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    matrix = weights.pop("model.embed_tokens.weight")
    save_file(weights | {name: matrix.clone() for name in stored}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.5, "num_beams": 0}))
    write_tier_map(tiers_of(folder), pruned / "tier_map.safetensors")
    finetuned(pruned, **changed)
    after = {}
    for file in (pruned / "finetuned_model").glob("*.safetensors"):
        after |= load_file(file)
    assert after.keys() == weights.keys() | set(stored)
    assert all(torch.equal(after[name], after["lm_head.weight"]) for name in stored)
    assert torch.equal(after["lm_head.weight"], matrix) == (changed["method"] == "lora")


@pytest.mark.parametrize("changed", [{"epochs": 0}, {"learning_rate": 30.0}], ids=["0 epochs", "made worse"])
def test_the_script_passes_on_what_training_does_not_better(pruned, changed):
    finetuned(pruned, **changed)
    assert contents(pruned / "finetuned_model") == contents(pruned / "pruned_model")
    assert json.loads((pruned / "training.json").read_text())["best_step"] == 0


def test_the_script_resumes_after_its_training_is_done(pruned, monkeypatch):
    finetuned(pruned)
    undisturbed = contents(pruned / "finetuned_model")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "_save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        finetuned(pruned)
    assert (pruned / "state" / "checkpoints" / "checkpoint-6").exists()
    monkeypatch.setattr(MaskedTrainer, "training_step", lambda *_: pytest.fail("it trains again"))
    finetuned(pruned)
    assert contents(pruned / "finetuned_model") == undisturbed


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"sequence_length": 33}, "allows at most 32"),
        ({"text": "nowhere.txt"}, "nowhere.txt"),
        ({"lora_targets": "v_project", "method": "lora"}, "matches no pruned linear"),
        ({"learning_rate": -1}, "learning_rate is -1.0"),
    ],
)
def test_the_script_refuses_what_cannot_be_meant(pruned, changed, told):
    with pytest.raises(UserError, match=told):
        finetuned(pruned, **changed)
    assert not (pruned / "finetuned_model").exists()


def test_the_script_refuses_the_tier_map_of_another_model(pruned):
    tier_map = tiers_of(pruned / "pruned_model")
    write_tier_map(TierMap(**(vars(tier_map) | {"base_model": "0" * 64})), pruned / "tier_map.safetensors")
    with pytest.raises(UserError, match="another model"):
        finetuned(pruned)
