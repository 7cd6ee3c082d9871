"""What an eval.json says of a model: perplexity on several texts, sparsity, tiers, and the protocol in words."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import cli
from ..errors import UserError
from ..files import NUMBER, check_length, read_result
from ..models.checkpoint import Checkpoint
from ..models.decoder import Decoder, open_decoder
from ..models.pruning_reports import describe_checkpoint
from ..models.tier_maps import TierMap, block_counts, check_same_model, check_zeros, read_tier_map, tier_shares
from ..plan.steps import BASE, check_iteration
from ..tensors.blocks import expand_blocks
from ..tensors.tiers import TIER_NAMES
from ..text import consecutive_windows, describe, labels, load_documents, parse_text, token_stream
from .perplexity import describe_protocol, perplexity


@dataclass(frozen=True)
class Settings:
    """How perplexity is measured; `tokens` limits each text, None takes all of it."""

    texts: tuple
    sequence_length: int
    batch_size: int
    tokens: int | None
    device: str
    trust_remote_code: bool
    hidden_states: str


def windows_of(settings: Settings) -> int:
    """How many windows `tokens` allow, one at least."""
    return max(1, settings.tokens // settings.sequence_length)


def perplexities(
    folder: Path | str, settings: Settings, prepare: Callable[[Decoder], None] | None = None
) -> dict[str, float]:
    """Perplexity of a checkpoint on the test split of each text, by the text's name.

    prepare: what is done to the model before it is walked, such as making its activations sparse.
    """
    from ..models.loading import load_tokenizer

    check_length("--sequence-length", settings.sequence_length, folder)
    tokenizer = load_tokenizer(folder, settings.trust_remote_code)
    limit = None if settings.tokens is None else windows_of(settings)
    found = {}
    for name, text in zip(labels(settings.texts, "test"), settings.texts, strict=True):
        stream = token_stream(load_documents(text, "test"), tokenizer)
        windows = consecutive_windows(stream, settings.sequence_length, limit, name)
        decoder = open_decoder(folder, settings.device, settings.trust_remote_code, settings.hidden_states)
        if prepare:
            prepare(decoder)
        found[name] = perplexity(decoder, windows, settings.batch_size)
    return found


def describe_model(step: str, model_name: str, map_path: Path, folder: Path) -> dict:
    """What the weights show: sparsity, tiers. Raises `UserError` when a matrix is denser than its tiers allow, and for
    the masks of another step."""
    if map_path.suffix == ".json":
        return describe_checkpoint(step, model_name, map_path, folder)
    tier_map, checkpoint = read_tier_map(map_path), Checkpoint(folder)
    check_iteration(map_path, step, tier_map.iteration)
    check_same_model(tier_map, map_path, checkpoint)
    counts = block_counts(tier_map)
    return {
        "step": step,
        "iteration": tier_map.iteration,
        "model": model_name,
        "perplexity": {},
        "pruning": _describe_choice(tier_map) if tier_map.iteration else None,
        "sparsity": sparsity(tier_map, checkpoint),
        "tier_shares": tier_shares(counts.values()),
        "blocks": counts,
    }


def _describe_choice(tier_map: TierMap) -> dict[str, str]:
    """What blocks were chosen by, and whether every matrix has the same shares or the model shares them out."""
    layers = "uniform" if tier_map.shared_over == "matrix" else "shared"
    return {"method": tier_map.cost, "pattern": "three-tier", "layers": layers}


def sparsity(tier_map: TierMap, checkpoint: Checkpoint) -> dict:
    """Share of zeros: overall in the pruned matrices, per tier, and per matrix, which are read one at a time."""
    zeros, entries, per_matrix = [torch.zeros(len(TIER_NAMES), dtype=torch.int64) for _ in range(2)] + [{}]
    for name, tiers in tier_map.tiers.items():
        weight = checkpoint.matrix(name)
        check_zeros(tier_map, name, weight, checkpoint.folder)
        tier_of = expand_blocks(tiers, tuple(weight.shape), tier_map.block_size)
        entries += torch.bincount(tier_of.flatten(), minlength=len(TIER_NAMES))
        zeros += torch.bincount(tier_of[weight == 0], minlength=len(TIER_NAMES))
        per_matrix[name] = (weight == 0).sum().item() / weight.numel()
    per_tier = {
        name: (zeros[tier] / entries[tier]).item() if entries[tier] else None for tier, name in TIER_NAMES.items()
    }
    overall = (zeros.sum() / entries.sum()).item()
    return {"overall": overall, "weights": entries.sum().item(), "per_tier": per_tier, "per_matrix": per_matrix}


def protocol(settings: Settings) -> str:
    """How the figures came about, in words."""
    names = labels(settings.texts, "test")
    texts = "; ".join(f"{name}: {describe(text, 'test')}" for name, text in zip(names, settings.texts, strict=True))
    length = settings.sequence_length
    limited = "" if settings.tokens is None else f", the first {windows_of(settings)} of them"
    return (
        f"Perplexity per token: documents joined by blank lines and tokenised once; {describe_protocol(length)}"
        f"{limited}. Texts: {texts}. Sparsity: share of zeros in the linears of the decoder layers; embeddings and head"
        " are neither pruned nor counted."
    )


def read_base(path: Path, settings: Settings, model_name: str) -> dict[str, float]:
    """Perplexity of the base model by the name of a text, from its eval.json; raises `UserError` where that is of
    another model or was not measured by the same protocol, so that nothing is held against it."""
    form = {"step": BASE, "model": model_name, "perplexity": {str: {"base": NUMBER}}, "protocol": str}
    evaluation = read_result(path, f"the eval.json of the base model {model_name}", form)
    measured = (evaluation["protocol"], evaluation["perplexity"].keys())
    if measured != (protocol(settings), set(labels(settings.texts, "test"))):
        raise UserError(
            f"{path}: measured on other texts, in other windows or on another number of tokens than asked for here; "
            "evaluate the base model in the same way"
        )
    return {text: values["base"] for text, values in evaluation["perplexity"].items()}


def beside_base(base: Mapping[str, float], found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """What an eval.json says: text -> when it was measured -> perplexity. found: the same the other way round."""
    texts = next(iter(found.values()))
    return {text: {"base": base[text]} | {when: values[text] for when, values in found.items()} for text in texts}


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """What is evaluated beside the base model."""
    parser.add_argument("--base-eval", type=Path, required=True, help="eval.json of the base model, same settings")
    parser.add_argument("--step", required=True, help="name of the step, such as iter3 or structured/slicegpt-0.25")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every evaluation script asks for."""
    parser.add_argument("--masks", type=Path, required=True, help="tier map, or a one-shot report")
    parser.add_argument("--model-name", required=True, help="what the result calls the base model")
    parser.add_argument("--text", nargs="+", default=["pydoc"], help="corpus names, paths, or JSON of paths per split")
    parser.add_argument(
        "--sequence-length", type=cli.whole_number(2), default=2048, help="tokens per window (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=cli.whole_number(), default=1, help="windows at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=cli.whole_number(), help="use no more of each text than this (default: all of it)"
    )
    cli.add_hidden_states_argument(parser)
    parser.add_argument("--output", type=Path, required=True, help="eval.json")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings a command line gives."""
    return Settings(
        texts=tuple(parse_text(text) for text in arguments.text),
        sequence_length=arguments.sequence_length,
        batch_size=arguments.batch_size,
        tokens=arguments.tokens,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
        hidden_states=arguments.hidden_states,
    )
