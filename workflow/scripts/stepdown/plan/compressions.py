"""What the names of steps beside the tiers ask for: `structured/slicegpt-0.25`, `structured/shortgpt-6`,
`quantised/gptq4-g64/oneshot/wanda-2of4`, `dynamic/greedy-0.5/iter0`. Standard library only: names are checked before
the first job."""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from ..errors import UserError
from ..files import read_json_object, text_config

# How ShortGPT chooses the layers that go.
REMOVALS = ("block_influence", "angular", "gradient", "perplexity")
# Widths of a quantised weight.
BITS = (3, 4, 8)
ALLOCATIONS = ("uniform", "greedy")
# Families whose decoder layers SliceGPT can rotate, by `model_type`; and why not, of those often asked for.
SLICEABLE = ("llama", "mistral", "qwen2", "qwen3", "opt")
NOT_SLICEABLE = {
    "bloom": "its embeddings are normalised before the first layer",
    "cohere": "attention and MLP run side by side from one norm",
    "falcon": "attention and MLP run side by side from one norm",
    "gemma": "its embeddings are scaled by the width of the model",
    "gemma2": "attention and MLP are normalised once more before they join the residual",
    "gemma3_text": "attention and MLP are normalised once more before they join the residual",
    "gpt2": "its matrices are no linears",
    "gpt_neox": "attention and MLP run side by side from one residual",
    "mixtral": "its MLPs are mixtures of experts",
    "olmo2": "attention and MLP are normalised only after they ran",
    "phi": "attention and MLP run side by side from one norm",
    "qwen2_moe": "its MLPs are mixtures of experts",
    "qwen3_moe": "its MLPs are mixtures of experts",
}


@dataclass(frozen=True)
class Structured:
    """method: slicegpt or shortgpt; ratio: share of the hidden size that goes; layers: how many go."""

    method: str
    ratio: Fraction = Fraction(0)
    layers: int = 0


@dataclass(frozen=True)
class Quantisation:
    """method: int (round to nearest) or gptq; group_size: weights of a row that share a scale, 0 for the whole row."""

    method: str
    bits: int
    group_size: int = 0
    symmetric: bool = True


@dataclass(frozen=True)
class Dynamic:
    """share: of the input activations that become zero; allocation: how it is spread over the matrices of a layer."""

    allocation: str
    share: Fraction


def parse_step(step: str) -> Structured | Quantisation | Dynamic:
    """What the name of a step asks for, `structured/NAME`, `quantised/NAME/STEP` or `dynamic/NAME/STEP`."""
    kind, _, rest = step.partition("/")
    name, _, source = rest.partition("/")
    parsers = {"structured": parse_structured, "quantised": parse_quantised, "dynamic": parse_dynamic}
    if kind not in parsers:
        raise UserError(f"compression {step!r}: write structured/NAME, quantised/NAME/STEP or dynamic/NAME/STEP")
    if kind == "structured" and step != f"structured/{name}":
        raise UserError(f"compression {step!r}: starts from the base model; write structured/{name}")
    if kind != "structured" and not re.fullmatch(r"iter(0|[1-9][0-9]*)|(oneshot|gradual|structured)/[^/]+", source):
        raise UserError(
            f"compression {step!r}: of which step? write iter0 or another step after it, {kind}/{name}/iter0"
        )
    return parsers[kind](name)


def check_step(step: str, folder: Path | str | None, round_to: int = 1) -> None:
    """`UserError` for a step whose name asks for nothing there is, or for what a model's config.json rules out.

    folder: of the base model, None where it is not there yet; round_to: of what a sliced width is a multiple.
    """
    asked = parse_step(step)
    if folder is None:
        return
    if isinstance(asked, Structured):
        check_structured(asked, folder, round_to)
    elif isinstance(asked, Quantisation):
        config = text_config(read_json_object(Path(folder) / "config.json"))
        keys = ("hidden_size", "intermediate_size", "ffn_dim")
        columns = {key: config[key] for key in keys if isinstance(config.get(key), int)}
        if (sliced := re.search(r"/structured/(slicegpt-.*)", step)) and "hidden_size" in columns:
            # Beside the full width, which the inputs of the attention's last matrix keep.
            ratio = parse_structured(sliced[1]).ratio
            columns["the sliced model"] = sliced_width(columns["hidden_size"], ratio, round_to)
        check_groups(asked, columns)


def parse_structured(name: str) -> Structured:
    """`slicegpt-0.25` or `shortgpt-6`; `UserError` says what could stand there."""
    where = f"structured/{name}"
    method, _, amount = name.partition("-")
    if method == "shortgpt":
        if not re.fullmatch(r"[1-9]\d*", amount):
            raise UserError(f"{where}: removes {amount or 'no number of'} layers; write how many, such as shortgpt-6")
        return Structured("shortgpt", layers=int(amount))
    if method == "slicegpt":
        return Structured("slicegpt", ratio=_share(where, amount, "slicegpt-0.25, or slicegpt-0 to only rotate"))
    raise UserError(f"{where}: unknown method {method!r}; write slicegpt-RATIO or shortgpt-LAYERS")


def parse_quantised(name: str) -> Quantisation:
    """`int8`, `gptq4-g128`, `gptq4-g64-asym`; `UserError` says what could stand there."""
    where = f"quantised/{name}"
    found = re.fullmatch(r"(int|gptq)(\d+)(?:-g(\d+))?(-asym)?", name)
    if not found:
        raise UserError(f"{where}: write int or gptq with its bits, and if wanted -gGROUP and -asym: gptq4-g128-asym")
    bits, group_size = int(found[2]), int(found[3] or 0)
    if bits not in BITS:
        raise UserError(f"{where}: {bits} bits are not offered; write {' or '.join(map(str, BITS))}")
    if found[3] and not group_size:
        raise UserError(f"{where}: a group of 0 weights; leave -g0 out for a scale per row")
    return Quantisation(found[1], bits, group_size, symmetric=not found[4])


def parse_dynamic(name: str) -> Dynamic:
    """`uniform-0.5` or `greedy-0.5`; `UserError` says what could stand there."""
    where = f"dynamic/{name}"
    allocation, _, share = name.partition("-")
    if allocation not in ALLOCATIONS:
        examples = [f"{known}-0.5" for known in ALLOCATIONS]
        raise UserError(f"{where}: unknown allocation {allocation!r}; write one of {', '.join(examples)}")
    return Dynamic(allocation, _share(where, share, f"{allocation}-0.5"))


def check_structured(asked: Structured, folder: Path | str, round_to: int) -> None:
    """`UserError` for a model whose config.json shows that it cannot be made smaller so."""
    config = read_json_object(Path(folder) / "config.json")
    family = config.get("model_type", "")
    config = text_config(config)
    layers = next((config[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in config), None)
    if asked.layers and isinstance(layers, int):
        check_layers(asked.layers, layers, folder)
    if asked.method == "slicegpt":
        check_sliceable(family, config, folder)
        if isinstance(config.get("hidden_size"), int):
            sliced_width(config["hidden_size"], asked.ratio, round_to)


def sliced_width(full_width: int, ratio: Fraction, round_to: int) -> int:
    """The width that is left when `ratio` of it goes, rounded down to a multiple of `round_to`; 0 leaves all of it."""
    if round_to < 1:
        raise UserError(f"round_to: found {round_to}; write a whole number such as 8")
    width = int(full_width * (1 - ratio))
    width = width - width % round_to if ratio else full_width
    if width < 1:
        raise UserError(
            f"slicegpt-{float(ratio):g}: leaves nothing of {full_width} in multiples of {round_to}; slice less"
        )
    return width


def check_layers(removed: int, layers: int, folder: Path | str) -> None:
    """At least one layer stays."""
    if removed >= layers:
        raise UserError(f"shortgpt-{removed}: {folder} has {layers} layers; remove at most {layers - 1}")


def check_sliceable(family: str, config: dict, folder: Path | str) -> None:
    """`UserError` naming the family and why it cannot be rotated."""
    reason = NOT_SLICEABLE.get(family, "no rotation of its layers is known here") if family not in SLICEABLE else ""
    if family == "opt" and not config.get("do_layer_norm_before", True):
        reason = "its norms come after attention and MLP (do_layer_norm_before is false)"
    elif family == "opt" and config.get("_remove_final_layer_norm"):
        reason = "it has no norm before its head (_remove_final_layer_norm is true)"
    if reason:
        raise UserError(
            f"slicegpt: {folder} is of the family {family!r}: {reason}; it can rotate {', '.join(SLICEABLE)}"
        )


def check_groups(asked: Quantisation, columns: dict[str, int]) -> None:
    """A group divides the inputs of every matrix: columns is name -> inputs."""
    for name, inputs in columns.items():
        if asked.group_size and inputs % asked.group_size:
            raise UserError(
                f"group size {asked.group_size}: does not divide the {inputs} inputs of {name}; choose a divisor"
            )


def _share(where: str, text: str, example: str) -> Fraction:
    if not re.fullmatch(r"\d+(\.\d+)?|\.\d+", text) or Fraction(text) >= 1:
        raise UserError(f"{where}: found {text or 'no share'!r}; write a share from 0 to below 1, such as {example}")
    return Fraction(text)
