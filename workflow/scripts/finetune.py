"""Finetune a pruned checkpoint with its mask fixed, full or LoRA; with 0 epochs pass it on as it is."""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdown import cli
from stepdown.errors import UserError
from stepdown.files import check_length, weight_files, write_json
from stepdown.models.checkpoint import (
    Checkpoint,
    check_identity,
    load_tensors,
    pass_on_checkpoint,
    rewrite_checkpoint,
    save_tensors,
)
from stepdown.models.decoder import choose_device, open_decoder
from stepdown.models.linears import as_linears_
from stepdown.models.step_masks import StepMasks, StoredMasks, read_step_masks
from stepdown.models.stored_names import stored_names
from stepdown.plan.training_memory import check_memory, read_model_size
from stepdown.recover.processes import check_processes, is_first, run_in_processes
from stepdown.recover.settings import LEARNING_RATE_SCHEDULES, MEMORY, METHODS, MOMENTS, RecoverySettings
from stepdown.text import parse_text, training_windows

# Imported where a model is trained: zero epochs do not wait for them.
if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from stepdown.recover.recovery import Recovery

# Enough to tell checkpoints apart, few enough that an evaluation is short beside the steps between two.
EVALUATION_WINDOWS = 32


def main(arguments: argparse.Namespace) -> None:
    checkpoint = Checkpoint(arguments.model)
    step = read_step_masks(arguments.masks, checkpoint)
    if arguments.epochs == 0:
        if arguments.output_optimizer:
            save_tensors(_read_moments(arguments.optimizer, step), arguments.output_optimizer, step.identity)
        pass_on_checkpoint(arguments.model, arguments.output_model)
        _write_log(arguments, epochs=0, tokens=0, steps=0, best_step=0, log=[])
        return
    from stepdown.recover.training_state import fingerprint, last_checkpoint, training_state

    _quiet_libraries()
    settings = RecoverySettings(**{field.name: getattr(arguments, field.name) for field in fields(RecoverySettings)})
    if settings.distill_weight > 0 and arguments.teacher is None:
        raise UserError("--distill-weight: there is no teacher to learn from; name its folder with --teacher")
    device = choose_device(arguments.device, settings.processes).type
    check_processes(settings.processes, device)
    windows, evaluation_windows = _read_text(arguments, step.iteration)
    if arguments.tokens_per_epoch is not None:
        settings = replace(settings, epochs=1)  # The windows are those of all epochs.
    inputs = [arguments.masks, arguments.model / "config.json", *weight_files(arguments.model)]
    if settings.distill_weight > 0:
        inputs += weight_files(arguments.teacher)
    inputs += [arguments.optimizer] if arguments.optimizer else []
    started_from = fingerprint(settings, (windows, evaluation_windows), cli.progress(inputs, "hash"))
    with training_state(arguments.state, started_from) as state:
        last_checkpoint(state)  # Removes what is unfinished, before several processes look there.
        run_in_processes(_finetune, settings.processes, arguments, settings, windows, evaluation_windows, state, device)


def _finetune(
    arguments: argparse.Namespace,
    settings: RecoverySettings,
    windows: Tensor,
    evaluation_windows: Tensor,
    state: Path,
    device: str,
) -> None:
    """Train the model of the command line, in this process and those beside it, and write what came of it."""
    from stepdown.recover.recovery import recover
    from stepdown.recover.sharding import own_rows, save_whole

    _quiet_libraries()
    if device == "cuda" and (size := read_model_size(arguments.model)):
        found = torch.cuda.get_device_properties(0).total_memory
        check_memory(size, settings.plan(arguments.sequence_length), found)
    checkpoint = Checkpoint(arguments.model)
    step = read_step_masks(arguments.masks, checkpoint)
    model, teacher, read = (_load_sharded if settings.sharded else _load)(arguments, settings)
    stored = _stored_names(model, checkpoint)
    rows = own_rows if settings.sharded else _all_rows
    recovery = recover(
        model,
        StoredMasks(step, checkpoint, _own_names(stored), _all_rows if settings.method == "lora" else rows),
        windows,
        evaluation_windows,
        settings,
        state,
        device,
        teacher,
        _read_moments(arguments.optimizer, step, rows),
        tensorboard=arguments.tensorboard,
        adapter=arguments.output_adapter,
        keep_moments=arguments.output_optimizer is not None,
        read=read,
    )
    if arguments.output_optimizer:
        save_whole(recovery.moments, arguments.output_optimizer, step.identity)
    _save(recovery, step.identity, stored, checkpoint, arguments.output_model)
    if is_first():
        _write_log(
            arguments,
            epochs=arguments.epochs,
            tokens=recovery.tokens,
            steps=recovery.steps,
            best_step=recovery.best_step,
            log=recovery.log,
        )


def _load(
    arguments: argparse.Namespace, settings: RecoverySettings
) -> "tuple[PreTrainedModel, nn.Module | None, None]":
    """The model, and its teacher if it has one."""
    from stepdown.models.loading import load_model
    from stepdown.recover.distillation import load_teacher

    model = load_model(arguments.model, settings.weights_dtype, arguments.trust_remote_code)
    as_linears_(model)
    distilled = settings.distill_weight > 0
    return model, load_teacher(arguments.teacher, arguments.trust_remote_code) if distilled else None, None


def _load_sharded(
    arguments: argparse.Namespace, settings: RecoverySettings
) -> "tuple[PreTrainedModel, nn.Module | None, Callable[[nn.Module], None]]":
    """The same without weights, and what reads of these what this process is to have."""
    from stepdown.recover.distillation import TEACHER_TYPE
    from stepdown.recover.sharding import reader

    decoders = [open_decoder(arguments.model, "cpu", arguments.trust_remote_code, dtype=settings.weights_dtype)]
    if settings.distill_weight > 0:
        decoders.append(open_decoder(arguments.teacher, "cpu", arguments.trust_remote_code, dtype=TEACHER_TYPE))
        decoders[1].model.requires_grad_(False)
    model, *teachers = (decoder.model for decoder in decoders)
    return model, next(iter(teachers), None), reader(*decoders)


def _all_rows(count: int) -> slice:
    return slice(0, count)


def _read_text(arguments: argparse.Namespace, iteration: int) -> tuple[Tensor, Tensor]:
    """Windows to train on and to evaluate on, int64 [n, length].

    With `tokens_per_epoch` they are the windows of all epochs together: every epoch, and every iteration, has others,
    as long as the text lasts.
    """
    from stepdown.models.loading import load_tokenizer

    text, length = parse_text(arguments.text), arguments.sequence_length
    check_length("--sequence-length", length, arguments.model)
    tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code)
    evaluation = training_windows(text, tokenizer, "valid", length, EVALUATION_WINDOWS, arguments.seed)
    if arguments.tokens_per_epoch is None:
        return training_windows(text, tokenizer, "train", length, None, arguments.seed), evaluation
    count = arguments.epochs * max(1, arguments.tokens_per_epoch // length)
    windows = training_windows(text, tokenizer, "train", length, count, arguments.seed + iteration)
    return windows.repeat(-(-count // len(windows)), 1)[:count], evaluation


def _read_moments(path: Path | None, step: StepMasks, rows: Callable[[int], slice] = _all_rows) -> dict[str, Tensor]:
    """What the optimizer of the iteration before a step remembers, those rows of it; nothing before the first."""
    if path is None:
        return {}
    moments, metadata = load_tensors(path, rows)
    if any(name.rpartition(" ")[2] not in MOMENTS for name in moments):
        raise UserError(f"{path}: holds no moments of an optimizer; give what --output-optimizer wrote the step before")
    due = step.identity | {"iteration": str(step.iteration - 1)}
    check_identity(path, "the moments of the step before", metadata, due)
    return moments


def _own_names(stored: dict[str, str]) -> dict[str, str]:
    """Name of a matrix in the checkpoint -> the model's own of its linear."""
    return {name.removesuffix(".weight"): own.removesuffix(".weight") for own, name in stored.items()}


def _save(
    recovery: "Recovery", identity: dict[str, str], stored: dict[str, str], pruned: Checkpoint, target: Path
) -> None:
    """Write the finetuned checkpoint with the names and types of the pruned one, or pass that on if it was better.

    The first process writes; all gather what it writes, a layer at a time.
    """
    from stepdown.recover.sharding import gather

    losses = recovery.evaluations
    if recovery.best_step == 0:
        if is_first():
            cli.log.warning(
                "no evaluation after the first step was below the %.4f before it: nothing is changed", losses[0]
            )
            pass_on_checkpoint(pruned.folder, target)
        return
    # What the model does not hold, such as a buffer of an older release, stays as it was.
    weights = {stored[name]: tensor for name, tensor in recovery.model.state_dict().items() if name in stored}
    if is_first():
        cli.log.info("eval loss %.4f -> %.4f at step %d", losses[0], losses[recovery.best_step], recovery.best_step)
        rewrite_checkpoint(pruned, target, lambda tensors: tensors.update(gather(weights, tensors)), identity)
    else:
        for names in pruned.shards().values():
            gather(weights, names)


def _stored_names(model: "PreTrainedModel", checkpoint: Checkpoint) -> dict[str, str]:
    """Name of each tensor of the model -> its name in the checkpoint."""
    stored = stored_names(model, checkpoint.names)
    homeless = dict(model.named_parameters()).keys() - stored
    if homeless:
        raise UserError(f"{checkpoint.folder}: has no tensor for {min(homeless)}, which would be finetuned and lost")
    return stored


def _write_log(arguments: argparse.Namespace, **outcome) -> None:
    write_json(arguments.output_log, {"step": arguments.step, "method": arguments.method, **outcome})


def _quiet_libraries() -> None:
    """One progress bar is ours; what libraries say to their own developers is nobody's."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    cli.add_model_arguments(parser)
    parser.add_argument("--masks", type=Path, required=True, help="tier map, or the report of a one-shot run")
    parser.add_argument("--step", required=True, help="name of the step in the log, such as iter3")
    parser.add_argument("--text", required=True, help="corpus by name or path")
    parser.add_argument("--sequence-length", type=cli.whole_number(2), required=True, help="tokens of a window")
    parser.add_argument("--tokens-per-epoch", type=cli.whole_number(), help="default: the whole text")
    _add_settings(parser)
    parser.add_argument("--state", type=Path, required=True, help="folder of a training in progress; gone at the end")
    parser.add_argument("--teacher", type=Path, help="folder of the dense model, to distill from")
    parser.add_argument("--optimizer", type=Path, help="moments of the step before, to go on with")
    parser.add_argument("--output-optimizer", type=Path, help="file for the optimizer's moments after the last step")
    parser.add_argument("--tensorboard", type=Path, help="folder for learning curves as TensorBoard reads them")
    parser.add_argument("--output-adapter", type=Path, help="folder for LoRA's adapter, which is merged either way")
    parser.add_argument("--output-model", type=Path, required=True)
    parser.add_argument("--output-log", type=Path, required=True)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """One option per field of RecoverySettings, with its default."""
    choices = {"method": METHODS, "memory": MEMORY, "learning_rate_schedule": list(LEARNING_RATE_SCHEDULES)}
    for field in fields(RecoverySettings):
        option = f"--{field.name.replace('_', '-')}"
        if field.name == "epochs":
            parser.add_argument(option, type=int, required=True, help="0: the pruned model is passed on")
        elif field.type is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default)
        elif field.name == "lora_targets":
            parser.add_argument(option, nargs="+", default=field.default, help="endings of names, or all-linear")
        else:
            parser.add_argument(option, type=field.type, default=field.default, choices=choices.get(field.name))


if __name__ == "__main__":
    cli.run(main, _parser())
