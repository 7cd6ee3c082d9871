"""What every step of a run came to, side by side: the chain iter0, iter1, ... and the one-shot runs beside it.

A step here is a dict: `step`, `path` (of its eval.json), `model`, `pruning` {method, pattern, layers}, `shares` {tier:
share}, `sparsity`, `perplexity` {text: {base, pruned, refitted (where that was done), finetuned}}, `epochs`, `tokens`,
`total_tokens`, and the curves `train_loss` and `eval_loss`, lists of (tokens into the step, loss). Standard library
only.
"""

import csv
import io
import json
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError

BASE = "iter0"
TIERS = ("dense", "mid_2_4", "topk")
TERMINAL_WIDTH = 100
NUMBER = (int, float)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_steps(evals: Iterable[Path], trainings: Iterable[Path], tiers: bool = True) -> list[dict]:
    """The steps of one run in the order they are told in: base, iterations, one-shot runs by name.

    tiers: whether every step has shares of tiers, as the iterations have; without, nobody's are read.
    Raises `UserError` for a file that is not what it should be, and for files that cannot be of one run.
    """
    steps: dict[str, dict] = {}
    for path in evals:
        step = _read_eval(path, tiers)
        if step["step"] in steps:
            raise UserError(f"{path}: a second evaluation of {step['step']}; give each step once")
        steps[step["step"]] = step
    ordered = sorted(steps.values(), key=lambda step: _place(step["step"]))
    _check_one_run(ordered)
    for path in trainings:
        _add_training(path, steps)
    _accumulate_tokens(ordered)
    return ordered


def iteration_of(step: str) -> int | None:
    """The place of a step in the chain, or None for a run beside it."""
    match = re.fullmatch(r"iter(\d+)", step)
    return int(match[1]) if match else None


def iterations(steps: Sequence[dict]) -> list[dict]:
    """The pruned steps of the chain, in order."""
    return [step for step in steps if iteration_of(step["step"])]


def one_shots(steps: Sequence[dict]) -> list[dict]:
    """The runs beside the chain, each straight from the base model."""
    return [step for step in steps if iteration_of(step["step"]) is None]


def _place(step: str) -> tuple:
    iteration = iteration_of(step)
    return (1, 0, step) if iteration is None else (0, iteration, step)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's own and Unicode's errors are both of this kind
        raise UserError(f"{path}: not JSON ({error}); delete it and run again") from None


def _need(record: Any, path: Path, *keys: str, kind: Any = NUMBER) -> Any:
    """The value at `keys` inside a JSON record, of the kind it has to be."""
    for depth, key in enumerate(keys, start=1):
        if not isinstance(record, dict) or key not in record:
            raise UserError(f"{path}: has no {'.'.join(keys[:depth])}; delete it and run again")
        record = record[key]
    if not isinstance(record, kind) or isinstance(record, bool):
        raise UserError(f"{path}: {'.'.join(keys)} cannot be {json.dumps(record)}; delete it and run again")
    return record


def _read_eval(path: Path, tiers: bool) -> dict:
    record = _read_json(path)
    name = _need(record, path, "step", kind=str)
    finetuning = record.get("finetuning") or {}
    step = {
        "step": name,
        "path": path,
        "model": _need(record, path, "model", kind=str),
        "pruning": _read_pruning(record, path, name),
        "shares": {tier: _need(record, path, "tier_shares", tier) for tier in TIERS if tiers},
        "sparsity": _need(record, path, "sparsity", "overall"),
        "epochs": 0 if name == BASE else _need(finetuning, path, "epochs"),
        "tokens": 0 if name == BASE else _need(finetuning, path, "tokens"),
        "train_loss": [],
        "eval_loss": [],
    }
    texts = _need(record, path, "perplexity", kind=dict)
    return step | {"perplexity": {text: _read_perplexity(record, path, text, step) for text in texts}}


def _read_pruning(record: dict, path: Path, step: str) -> dict[str, str]:
    if step == BASE:
        return {"method": "dense", "pattern": "", "layers": ""}
    return {key: _need(record, path, "pruning", key, kind=str) for key in ("method", "pattern", "layers")}


def _read_perplexity(record: dict, path: Path, text: str, step: dict) -> dict:
    base = _need(record, path, "perplexity", text, "base")
    if not 0 < base < math.inf:
        raise UserError(f"{path}: a perplexity of {base} on {text} cannot be; delete it and run again")
    if step["step"] == BASE:
        return dict.fromkeys(("base", "pruned", "finetuned"), base)
    pruned = _need(record, path, "perplexity", text, "pruned")
    # A model that was not finetuned may go without: it is the one before.
    untouched = step["epochs"] == 0 and "finetuned" not in record["perplexity"][text]
    found = {"base": base, "pruned": pruned}
    if "refitted" in record["perplexity"][text]:
        found["refitted"] = _need(record, path, "perplexity", text, "refitted")
    before = found.get("refitted", pruned)
    return found | {"finetuned": before if untouched else _need(record, path, "perplexity", text, "finetuned")}


def _check_one_run(steps: Sequence[dict]) -> None:
    """Side by side only what belongs together: one model, one set of texts, no gap in the chain."""
    if not steps:
        raise UserError("no eval.json given; name at least one after --evals")
    first = steps[0]
    for step in steps[1:]:
        pair = f"{step['path']} and {first['path']}"
        if step["model"] != first["model"]:
            raise UserError(f"{pair} are of different models, {step['model']} and {first['model']}; evaluate again")
        if set(step["perplexity"]) != set(first["perplexity"]):
            raise UserError(f"{pair} were evaluated on different texts; evaluate both again")
        for text, perplexity in step["perplexity"].items():
            if not math.isclose(perplexity["base"], first["perplexity"][text]["base"], rel_tol=1e-6):
                raise UserError(f"{pair} disagree on the base model's perplexity of {text}; evaluate both again")
    for expected, step in enumerate(iterations(steps), start=1):
        if iteration_of(step["step"]) != expected:
            raise UserError(f"the evaluation of iter{expected} is missing, but {step['path']} is there; give both")


def _add_training(path: Path, steps: dict[str, dict]) -> None:
    """The loss curves of one training log, on the step it belongs to."""
    record = _read_json(path)
    name = _need(record, path, "step", kind=str)
    if name not in steps:
        raise UserError(f"{path}: a training log of {name}, which has no eval.json here; give that too")
    step = steps[name]
    for key in ("epochs", "tokens"):
        if _need(record, path, key) != step[key]:
            raise UserError(f"{path} and {step['path']} differ in {key}, {record[key]} and {step[key]}; evaluate again")
    log = _need(record, path, "log", kind=list)
    if not log:
        return
    # The log counts optimizer steps, and each of them sees as many tokens as the others.
    tokens_per_step = step["tokens"] / max(_need(record, path, "steps"), 1)
    for entry in log:
        position = _need(entry, path, "step") * tokens_per_step
        for key, curve in (("loss", "train_loss"), ("eval_loss", "eval_loss")):
            if key in entry:
                step[curve].append((position, _need(entry, path, key)))


def _accumulate_tokens(steps: Sequence[dict]) -> None:
    """`total_tokens`: all that a step's model has been finetuned on since the base model."""
    total = 0
    for step in steps:
        if iteration_of(step["step"]) is None:
            step["total_tokens"] = step["tokens"]
        else:
            total += step["tokens"]
            step["total_tokens"] = total


# --- the table -------------------------------------------------------------------------------------------------------


def difference_percent(perplexity: float, base: float) -> float:
    """How far a perplexity lies above (or, negative, below) the base model's, in percent of it."""
    return 100 * (perplexity / base - 1)


def rows(steps: Sequence[dict]) -> list[dict]:
    """One flat row per step; the base model, neither pruned nor finetuned, has its one perplexity in both columns."""
    table = []
    moments = _moments(steps)
    for step in steps:
        row = {"step": step["step"], **step["shares"], "sparsity": step["sparsity"]}
        for text, perplexity in step["perplexity"].items():
            for when in moments:
                row[f"perplexity_{text}_{when}"] = perplexity.get(when)
            for when in moments:
                difference = difference_percent(perplexity[when], perplexity["base"]) if when in perplexity else None
                row[f"difference_percent_{text}_{when}"] = difference
        table.append(row | {key: step[key] for key in ("epochs", "tokens", "total_tokens")})
    return table


def _moments(steps: Sequence[dict]) -> list[str]:
    """When perplexity was measured, in order; "refitted" only if a step has it."""
    found = {when for step in steps for perplexity in step["perplexity"].values() for when in perplexity}
    return [when for when in ("pruned", "refitted", "finetuned") if when in found]


def as_csv(table: Sequence[dict]) -> str:
    """The rows as CSV, every number in full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def as_text(steps: Sequence[dict]) -> str:
    """The table for people, one per text, numbers rounded."""
    return "\n\n".join(_text_table(steps, text) for text in steps[0]["perplexity"])


def verdict(steps: Sequence[dict]) -> str:
    """Which ended lower, the last iteration or the one-shot run, by how much and on how many tokens.

    A sentence per text and one-shot run; without one-shot runs the base model is what there is to compare with.
    """
    if not iterations(steps):
        return ""
    last = iterations(steps)[-1]
    sentences = [_compare(last, other, text) for text in last["perplexity"] for other in one_shots(steps)]
    sentences = sentences or [_compare_to_base(last, text) for text in last["perplexity"]]
    return "\n".join(textwrap.fill(sentence, TERMINAL_WIDTH, break_on_hyphens=False) for sentence in sentences)


def _compare(last: dict, other: dict, text: str) -> str:
    lower, higher = sorted((last, other), key=lambda step: step["perplexity"][text]["finetuned"])
    low, high = lower["perplexity"][text]["finetuned"], higher["perplexity"][text]["finetuned"]
    if low == high:
        result = f"{last['step']} and {other['step']} ended level at {low:.2f}"
    else:
        result = f"{lower['step']} ended {1 - low / high:.1%} lower than {higher['step']}: {low:.2f} vs {high:.2f}"
    # Equal budgets are the point of the comparison, so an unequal one is said aloud.
    tokens = [f"{step['total_tokens']:,}" for step in (lower, higher)]
    budget = f"both at {tokens[0]}" if tokens[0] == tokens[1] else f"at {tokens[0]} vs {tokens[1]}"
    sparsity = [f"{step['sparsity']:.1%}" for step in (lower, higher)]
    unequal = "" if sparsity[0] == sparsity[1] else f", with {sparsity[0]} vs {sparsity[1]} zeros"
    return f"On {text} {result}, {budget} tokens{unequal}."


def _compare_to_base(last: dict, text: str) -> str:
    base, finetuned = last["perplexity"][text]["base"], last["perplexity"][text]["finetuned"]
    difference = difference_percent(finetuned, base)
    side = "above" if difference >= 0 else "below"
    return (
        f"On {text} {last['step']} ended {abs(difference):.1f}% {side} the base model: "
        f"{finetuned:.2f} vs {base:.2f}, at {last['total_tokens']:,} tokens; no one-shot run to compare with."
    )


def _text_table(steps: Sequence[dict], text: str) -> str:
    """Columns in groups, each group under its own heading."""
    refitted = "refitted" in _moments(steps)
    groups = [
        (f"on {text}", ["step"]),
        ("blocks in %", ["dense", "2:4", "topk"]),
        ("zeros", ["in %"]),
        ("pruned", ["ppl", "to base"]),
        *([("refitted", ["ppl", "to base"])] if refitted else []),
        ("finetuned", ["ppl", "to base"]),
        ("finetuning", ["epochs", "tokens", "total"]),
    ]
    cells = [_text_row(step, text, refitted) for step in steps]
    columns = []
    for index, (heading, names) in enumerate(groups):
        lines = [names] + [row[index] for row in cells]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        align = str.ljust if index == 0 else str.rjust
        block = [" ".join(align(*cell) for cell in zip(line, widths, strict=True)) for line in lines]
        width = max(len(heading), len(block[0]))
        head = heading.ljust(width) if index == 0 else heading.center(width)
        columns.append([head] + [align(line, width) for line in block])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _text_row(step: dict, text: str, refitted: bool) -> list[list[str]]:
    perplexity, unpruned = step["perplexity"][text], step["step"] == BASE

    def both(when: str) -> list[str]:
        if when not in perplexity or unpruned:
            return ["", ""]
        difference = difference_percent(perplexity[when], perplexity["base"])
        return [_round(perplexity[when]), f"{difference:+.1f}%" if difference < 1000 else f"{difference:+,.0f}%"]

    return [
        [step["step"]],
        [f"{100 * step['shares'][tier]:.1f}" for tier in TIERS],
        [f"{100 * step['sparsity']:.1f}"],
        [_round(perplexity["base"]), ""] if unpruned else both("pruned"),
        *([both("refitted")] if refitted else []),
        both("finetuned"),
        [f"{step['epochs']:g}", _short(step["tokens"]), _short(step["total_tokens"])],
    ]


def _round(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 10_000 else f"{perplexity:.3g}"


def _short(count: int) -> str:
    """A count in at most six characters: 512, 65.5k, 1.2M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.1f}{unit}"
    return str(count)
