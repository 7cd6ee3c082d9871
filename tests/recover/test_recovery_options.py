"""Distillation, adapters, early stopping, gradient checkpointing, TensorBoard, several processes: zeros stay in all."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_recovery import SETTINGS, WINDOWS, command, finetuned, prune, pruned, run, same, tiny_llama  # noqa: F401
from tiny_configurations import VOCABULARY, tiny_configuration
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import finetune
from stepdown.errors import UserError
from stepdown.models.checkpoint import Checkpoint, save_tensors
from stepdown.recover import recovery
from stepdown.recover.distillation import Distillation, divergence, load_teacher
from stepdown.recover.processes import run_in_processes
from stepdown.recover.recovery import check_pruned_are_zero, recover
from stepdown.recover.settings import RecoverySettings
from stepdown.recover.trainer import MaskedTrainer


def distilled(state, steps_of: dict, hidden: float = 0.0):
    model = tiny_llama()
    masks = prune(model)
    state.mkdir(exist_ok=True)
    wanted = RecoverySettings(**(SETTINGS | {"distill_weight": 0.9, "distill_hidden_states": hidden} | steps_of))
    return recover(model, masks, WINDOWS, WINDOWS[:4], wanted, state, teacher=tiny_llama().eval()), masks


# ---------------------------------------------------------------- distillation


def test_the_divergence_is_kl_of_softened_distributions():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    ours, theirs = ((logits / 2).softmax(-1) for logits in (student, teacher))
    expected = 4 * (theirs * (theirs / ours).log()).sum(-1).mean()
    torch.testing.assert_close(divergence(student, teacher, 2.0), expected)
    assert divergence(teacher, teacher, 2.0).abs() < 1e-6


def test_a_student_comes_nearer_to_its_teacher_than_by_the_text_alone(tmp_path):
    teacher = tiny_llama().eval()
    long = {"epochs": 8, "learning_rate": 0.01, "evaluation_steps": 24}
    with_teacher, masks = distilled(tmp_path / "with", long)
    without, *_ = run(tmp_path / "without", **long)
    check_pruned_are_zero(with_teacher.model, masks)
    with torch.no_grad():
        wanted = teacher(WINDOWS).logits
        with_it, alone = (divergence(result.model(WINDOWS).logits, wanted, 1.0) for result in (with_teacher, without))
    assert with_it < 0.5 * alone


def test_the_loss_is_what_its_parts_say():
    student, teacher = tiny_llama(), tiny_llama().eval()
    prune(student)
    outputs = student(WINDOWS, labels=WINDOWS, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(WINDOWS, output_hidden_states=True)
    apart = divergence(outputs.logits, theirs.logits, 1.0)
    loss = Distillation(teacher, 0.9).loss(outputs.loss, outputs, WINDOWS)
    torch.testing.assert_close(loss, 0.1 * outputs.loss + 0.9 * apart)
    shares = [
        (ours - his).square().sum() / his.square().sum()
        for ours, his in zip(outputs.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    ]
    with_states = Distillation(teacher, 0.9, hidden_states=0.5).loss(outputs.loss, outputs, WINDOWS)
    torch.testing.assert_close(with_states, loss + 0.5 * torch.stack(shares).mean())


def test_evaluation_is_by_the_text_alone(tmp_path):
    with_teacher, _ = distilled(tmp_path / "with", {})
    without, *_ = run(tmp_path / "without")
    assert with_teacher.evaluations[0] == without.evaluations[0]
    assert with_teacher.log[1]["loss"] != without.log[1]["loss"]


def test_accumulating_distills_as_one_batch_does(tmp_path):
    even = WINDOWS[:8]
    results = []
    for number, (batch_size, accumulation) in enumerate([(4, 1), (2, 2)]):
        model = tiny_llama()
        masks = prune(model)
        changed = {"batch_size": batch_size, "gradient_accumulation": accumulation, "distill_weight": 0.5}
        wanted = RecoverySettings(**(SETTINGS | changed))
        (tmp_path / str(number)).mkdir()
        results.append(recover(model, masks, even, even, wanted, tmp_path / str(number), teacher=tiny_llama().eval()))
    losses = [[row["loss"] for row in result.log if "loss" in row] for result in results]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_teacher_is_held_in_half_the_memory(pruned):  # noqa: F811
    teacher = load_teacher(pruned / "pruned_model")
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_that_is_not_whole_is_named(pruned):  # noqa: F811
    shutil.copytree(pruned / "pruned_model", pruned / "teacher")
    os.truncate(pruned / "teacher/model.safetensors", 5000)
    with pytest.raises(UserError, match=r"teacher/model\.safetensors: truncated or damaged \(5000 bytes"):
        load_teacher(pruned / "teacher")


# ---------------------------------------------------------------- adapters


def test_the_adapter_kept_is_the_one_that_was_merged(tmp_path):
    model = tiny_llama()
    masks = prune(model)
    wanted = RecoverySettings(**(SETTINGS | {"method": "lora"}))
    (tmp_path / "state").mkdir()
    result = recover(model, masks, WINDOWS, WINDOWS[:4], wanted, tmp_path / "state", adapter=tmp_path / "adapter")
    base = tiny_llama()
    prune(base)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    for name, keep in masks.items():
        merged, plain = (a.get_submodule(name).weight for a in (result.model, adapted))
        torch.testing.assert_close(merged, plain * keep, rtol=0, atol=1e-6)
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()


# ---------------------------------------------------------------- early stopping, gradient checkpointing, curves


def test_it_stops_when_evaluations_no_longer_improve(tmp_path, monkeypatch):
    # Training on other tokens than are evaluated: learnt by heart, they make those less likely.
    other = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(1))
    long = {"learning_rate": 0.03, "epochs": 8, "evaluation_windows": other}
    result, *_ = run(tmp_path / "stopped", early_stopping=2, **long)
    assert result.steps < 24
    assert result.best_step <= result.steps - 4
    assert result.tokens < 8 * WINDOWS.numel()
    # One that was interrupted after it had stopped does not go on.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recovery, "check_pruned_are_zero", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(tmp_path / "again", early_stopping=2, **long)
    monkeypatch.setattr(MaskedTrainer, "training_step", lambda *_: pytest.fail("it trains again"))
    assert same(run(tmp_path / "again", early_stopping=2, **long)[0], result)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, method):
    plain, *_ = run(tmp_path / "plain", method=method)
    spared, masks, _ = run(tmp_path / "spared", method=method, gradient_checkpointing=True)
    check_pruned_are_zero(spared.model, masks)
    losses = [[row.get("loss", row.get("eval_loss")) for row in result.log] for result in (plain, spared)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_family_without_checkpointing_is_told(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_configuration("openai-gpt"))
    settings = RecoverySettings(epochs=1, gradient_checkpointing=True)
    with pytest.raises(UserError, match="gradient_checkpointing: transformers has none for a OpenAIGPTLMHeadModel"):
        recover(model, {}, WINDOWS, WINDOWS, settings, tmp_path)


def test_a_model_that_finds_no_memory_is_told(tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(recovery, "_place", fail)
    with pytest.raises(UserError, match="recovery: out of memory at batch_size"):
        run(tmp_path)


def test_tensorboard_reads_the_curves_of_the_log(pruned):  # noqa: F811
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (pruned / "curves").mkdir()
    (pruned / "curves/mine.txt").write_text("kept")
    (pruned / "curves/events.out.tfevents.1.old").write_text("of a run before")
    finetuned(pruned, tensorboard=pruned / "curves")
    assert (pruned / "curves/mine.txt").exists() and not (pruned / "curves/events.out.tfevents.1.old").exists()
    events = accumulator.EventAccumulator(str(pruned / "curves")).Reload()
    log = json.loads((pruned / "training.json").read_text())["log"]
    for name in ("loss", "eval_loss"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({row["step"]: row[name] for row in log if name in row})


# ---------------------------------------------------------------- one schedule over several steps


def test_going_on_with_the_moments_is_going_on(tmp_path):
    constant = {
        "learning_rate_schedule": "constant",
        "batch_size": 4,
        "gradient_accumulation": 1,
        "evaluation_steps": 1,
    }
    four = WINDOWS[:4]

    def train(model, masks, name, epochs, warmup_steps, moments=None):
        wanted = RecoverySettings(**(SETTINGS | constant | {"epochs": epochs, "warmup_steps": warmup_steps}))
        (tmp_path / name).mkdir()
        return recover(model, masks, four, four, wanted, tmp_path / name, moments=moments, keep_moments=True)

    model = tiny_llama()
    masks = prune(model)
    at_once = train(model, masks, "at once", 4, 1)
    model = tiny_llama()
    prune(model)
    first = train(model, masks, "first", 3, 1)
    second = train(first.model, masks, "second", 1, 0, first.moments)
    assert {key.split(" ")[1] for key in first.moments} == {"step", "exp_avg", "exp_avg_sq"}
    for name, weight in at_once.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], weight, rtol=0, atol=1e-7)
    for key, value in at_once.moments.items():
        torch.testing.assert_close(second.moments[key], value)


@pytest.mark.parametrize(
    ("iteration", "change", "told"),
    [
        ("5", {}, "not the moments of the step before (iteration 5 of"),
        ("-1", {"lm_head.weight": torch.ones(2)}, "holds no moments of an optimizer"),
        ("-1", {"lm_head.weight exp_avg": torch.ones(2)}, "lm_head.weight exp_avg [2] is of no parameter"),
        ("-1", {"another exp_avg": torch.ones(2)}, "another exp_avg [2] is of no parameter"),
    ],
)
def test_moments_of_anything_else_are_refused(pruned, iteration, change, told):  # noqa: F811
    base_model = Checkpoint(pruned / "pruned_model").identity()["base_model"]
    save_tensors(change, pruned / "moments.safetensors", {"base_model": base_model, "iteration": iteration})
    with pytest.raises(UserError, match=re.escape(told)):
        finetuned(pruned, optimizer=pruned / "moments.safetensors")


# ---------------------------------------------------------------- several processes


def tiny_mixtral() -> MixtralForCausalLM:
    """More experts than the tokens of a small batch reach."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=48,
        max_position_embeddings=32,
    )
    return MixtralForCausalLM(config)


def other_model(pruned):  # noqa: F811
    """A folder with a model like the pruned one, none of whose weights are its."""
    model = AutoModelForCausalLM.from_pretrained(pruned / "pruned_model")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(pruned / "teacher")
    return pruned / "teacher"


@pytest.mark.parametrize("how", [[], ["--sharded"]], ids=["whole", "sharded"])
@pytest.mark.parametrize("distilled", [False, True], ids=["text", "distilled"])
@pytest.mark.parametrize("pruned", [tiny_llama, tiny_mixtral], indirect=True, ids=["dense", "experts"])
def test_two_processes_train_as_one_that_accumulates_twice_as_much(pruned, distilled, how):  # noqa: F811
    curves = []
    teacher = {"distill_weight": 0.9, "teacher": other_model(pruned)} if distilled else {}
    for changed, words in (({"gradient_accumulation": 2}, []), ({"gradient_accumulation": 1, "processes": 2}, how)):
        changed |= teacher
        # 16 windows in batches of 2: no half-filled batch, which one process would weigh otherwise than two.
        words = [*command(pruned, batch_size=2, tokens_per_epoch=256, **changed), "--no-bf16", *words]
        finetune.main(finetune._parser().parse_args(words))
        log = json.loads((pruned / "training.json").read_text())
        curves.append([(row["step"], row.get("loss", row.get("eval_loss"))) for row in log["log"]])
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
    assert [loss for _, loss in curves[0]] == pytest.approx([loss for _, loss in curves[1]], abs=1e-4)
    before, after = (Checkpoint(pruned / name) for name in ("pruned_model", "finetuned_model"))
    for name in before.names:
        if "_proj" in name:
            old, new = before.tensors([name])[name], after.tensors([name])[name]
            columns = old.shape[1] // 2
            assert not new[:, columns:][old[:, columns:] == 0].any()
            assert not torch.equal(old, new)


def train_by_text(family: str, state: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_configuration(family))
    windows = torch.randint(2, VOCABULARY - 8, (4, 12), generator=torch.Generator().manual_seed(0))
    options = {"batch_size": 1, "gradient_accumulation": 1, "evaluation_steps": 2, "bf16": False}
    found = recover(model, {}, windows, windows[:2], RecoverySettings(epochs=1, processes=2, **options), state)
    assert found.steps == 2 and len(found.evaluations) == 2


def test_what_no_text_reaches_is_not_waited_for(tmp_path):
    """gemma3 has a part for images: its parameters get no gradients, in no process."""
    run_in_processes(train_by_text, 2, "gemma3", tmp_path)


def end_one(rank_of_it: int) -> None:
    if int(os.environ["RANK"]) == rank_of_it:
        os.kill(os.getpid(), 9)
    time.sleep(60)


def test_a_process_that_is_ended_from_outside_is_told():
    with pytest.raises(UserError, match=r"recovery: process 1 of 2 was ended from outside \(SIGKILL\)"):
        run_in_processes(end_one, 2, 1)


def test_all_options_together_over_shards(pruned):  # noqa: F811
    """Adapters, a teacher and moments of AdamW, each in shards: what is merged is what was trained, zeros stay."""
    shutil.copytree(pruned / "pruned_model", pruned / "teacher")
    options = {"method": "lora", "distill_weight": 0.5, "teacher": pruned / "teacher", "processes": 2}
    options |= {"output_optimizer": pruned / "moments.safetensors", "output_adapter": pruned / "adapter"}
    finetune.main(finetune._parser().parse_args([*command(pruned, **options), "--sharded"]))
    before, after = (Checkpoint(pruned / name) for name in ("pruned_model", "finetuned_model"))
    trained = [name for name in before.names if "_proj" in name]
    for name in trained:
        old, new = before.tensors([name])[name], after.tensors([name])[name]
        columns = old.shape[1] // 2
        assert not new[:, columns:][old[:, columns:] == 0].any()
        assert not torch.equal(old, new)
    shapes = {
        name: tuple(tensor.shape) for name, tensor in load_file(pruned / "adapter/adapter_model.safetensors").items()
    }
    assert len(shapes) == 2 * len(trained) and all(SETTINGS["lora_rank"] in shape for shape in shapes.values())
    assert {tuple(tensor.shape) for tensor in load_file(pruned / "moments.safetensors").values()} == {
        (),
        *shapes.values(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["full", "low"])
def test_a_sharded_training_that_is_killed_goes_on(pruned, memory):  # noqa: F811
    words = [*command(pruned, processes=2, epochs=12, evaluation_steps=4, memory=memory), "--sharded"]
    script = [sys.executable, finetune.__file__, *words]
    finished = {}
    for name, kill in (("undisturbed", False), ("killed", True)):
        if kill:
            process = psutil.Popen(script, stderr=subprocess.DEVNULL)
            while process.poll() is None and not any(pruned.glob("state/checkpoints/checkpoint-*/rng_state_1.pth")):
                time.sleep(0.01)
            assert process.poll() is None
            for each in (*process.children(recursive=True), process):
                each.kill()
            process.wait()
        subprocess.run(script, check=True)
        after = Checkpoint(pruned / "finetuned_model")
        finished[name] = after.tensors(after.names)
        shutil.rmtree(pruned / "finetuned_model")
    for name, tensor in finished["undisturbed"].items():
        assert torch.equal(tensor, finished["killed"][name]), name


def test_one_process_has_nothing_to_share(pruned):  # noqa: F811
    with pytest.raises(UserError, match="sharded is True: give several processes, or no"):
        finetune.main(finetune._parser().parse_args([*command(pruned), "--sharded"]))


def test_an_error_of_a_process_is_told_in_one_line(pruned):  # noqa: F811
    with pytest.raises(UserError, match=r"^recovery: (eval_)?loss is (nan|inf) at step"):
        finetuned(pruned, learning_rate=1e30, warmup_steps=0, processes=2)


def test_more_processes_than_cores_are_refused(pruned):  # noqa: F811
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(UserError, match=f"processes is {cores + 1}: there are {cores} cores here"):
        finetuned(pruned, processes=cores + 1)
