"""The table of a run, a row per step, and what it comes to in a sentence."""

import textwrap

import pandas as pd

from .steps import BASE, MOMENTS, TIERS, Results, difference_percent, iterations, one_shots
from .text import cells, flush_left, under_headings

TERMINAL_WIDTH = 100


def table(results: Results) -> pd.DataFrame:
    """A row per step; the base model, neither pruned nor finetuned, has its one perplexity in all of them."""
    steps = next(iter(results.values()))
    columns = [steps[[*TIERS, "sparsity"]]]
    for text, on_text in results.items():
        perplexity, difference = _perplexities(on_text)
        columns.append(perplexity.add_prefix(f"perplexity_{text}_"))
        columns.append(difference.add_prefix(f"difference_percent_{text}_"))
    return pd.concat([*columns, steps[["epochs", "tokens", "total_tokens"]]], axis="columns")


def _perplexities(steps: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Perplexity whenever it was measured, and its difference to the base model's in percent."""
    perplexity = steps[MOMENTS].dropna(axis="columns", how="all")
    return perplexity, perplexity.apply(difference_percent, base=steps.base)


def as_text(results: Results) -> str:
    """The table for people, one per text, numbers rounded."""
    return "\n\n".join(_text_table(text, steps) for text, steps in results.items())


def _text_table(text: str, steps: pd.DataFrame) -> str:
    """Columns in groups; that the base model was neither pruned nor finetuned is shown by blanks."""
    perplexity, difference = _perplexities(steps)
    base = steps.index == BASE
    tiers = zip(("dense", "2:4", "topk"), TIERS, strict=True)
    blocks = {
        f"on {text}": [flush_left(steps.index.to_series())],
        "blocks in %": [cells(name, 100 * steps[tier], "{:.1f}") for name, tier in tiers],
        "zeros": [cells("in %", 100 * steps.sparsity, "{:.1f}")],
    }
    for when in perplexity:
        shown = perplexity[when].mask(base & (when != "pruned"))
        blocks[when] = [cells("ppl", shown), cells("to base", difference[when].mask(base), "{:+.1f}%")]
    tokens = [steps[key].map(_short).rename(name) for key, name in (("tokens", "tokens"), ("total_tokens", "total"))]
    blocks["finetuning"] = [cells("epochs", steps.epochs, "{:g}"), *tokens]
    return "\n".join(under_headings(blocks).str.rstrip())


def _short(count: int) -> str:
    """A count in at most six characters: 512, 65.5k, 1.2M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.1f}{unit}"
    return str(count)


def verdict(results: Results) -> str:
    """Which ended lower, the last iteration or the one-shot run, by how much and on how many tokens.

    A sentence per text and one-shot run; without one-shot runs the base model is what there is to compare with.
    """
    sentences = []
    for text, steps in results.items():
        for _, last in iterations(steps)[-1:].iterrows():
            others = [_compare(text, last, other) for _, other in one_shots(steps).iterrows()]
            sentences += others or [_compare_to_base(text, last)]
    return "\n".join(textwrap.fill(sentence, TERMINAL_WIDTH, break_on_hyphens=False) for sentence in sentences)


def _compare(text: str, last: pd.Series, other: pd.Series) -> str:
    lower, higher = sorted((last, other), key=lambda step: step.finetuned)
    low, high = lower.finetuned, higher.finetuned
    if low == high:
        result = f"{last.name} and {other.name} ended level at {low:.2f}"
    else:
        result = f"{lower.name} ended {1 - low / high:.1%} lower than {higher.name}: {low:.2f} vs {high:.2f}"
    # Equal budgets are the point of the comparison, so an unequal one is said aloud.
    tokens = [f"{step.total_tokens:,}" for step in (lower, higher)]
    budget = f"both at {tokens[0]}" if tokens[0] == tokens[1] else f"at {tokens[0]} vs {tokens[1]}"
    sparsity = [f"{step.sparsity:.1%}" for step in (lower, higher)]
    unequal = "" if sparsity[0] == sparsity[1] else f", with {sparsity[0]} vs {sparsity[1]} zeros"
    return f"On {text} {result}, {budget} tokens{unequal}."


def _compare_to_base(text: str, last: pd.Series) -> str:
    difference = difference_percent(last.finetuned, last.base)
    return (
        f"On {text} {last.name} ended {abs(difference):.1f}% {'above' if difference >= 0 else 'below'} the base model: "
        f"{last.finetuned:.2f} vs {last.base:.2f}, at {last.total_tokens:,} tokens; no one-shot run to compare with."
    )
