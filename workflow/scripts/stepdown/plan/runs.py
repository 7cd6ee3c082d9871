"""What the name of a one-shot run asks for: `wanda-2of4`, `sparsegpt-unstructured-0.5`, `magnitude-block16-0.3`,
`wanda-hybrid`, `wanda-unstructured-0.7-owl`. Standard library only: names are checked before the first job."""

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from ..errors import UserError

# Places in a group are told in 16 bits.
LARGEST_GROUP = 2**15 - 1
FORM = "METHOD-PATTERN[-SPARSITY][-owl|-table], such as wanda-2of4 or sparsegpt-unstructured-0.5"
PATTERNS = ("unstructured", "2of4 (any N of M)", "block16 (any size)", "three-tier", "hybrid")
LAYERS = ("uniform", "owl", "table")
# Methods that have a saliency to go by while a model trains.
GRADUAL_METHODS = ("magnitude", "wanda")
# Patterns whose sparsity is free: it stands in the name, and may differ from layer to layer.
FREE = ("unstructured", "block")


@dataclass(frozen=True)
class Run:
    """A one-shot run.

    pattern: one of unstructured, n-of-m, block, three-tier, hybrid; sparsity: share of zeros over all pruned matrices
    (of blocks, for block), None where the pattern has none of its own; n, m, block_size: 0 where the pattern has none;
    layers: how the sparsity is spread over the layers, one of `LAYERS`.
    """

    name: str
    method: str
    pattern: str
    sparsity: Fraction | None
    n: int = 0
    m: int = 0
    block_size: int = 0
    layers: str = "uniform"

    @property
    def has_blocks(self) -> bool:
        """Whether the pattern treats blocks as one."""
        return self.pattern in ("block", "three-tier", "hybrid")

    @property
    def pattern_name(self) -> str:
        """The pattern as it stands in the name: 2of4, block16."""
        return {"n-of-m": f"{self.n}of{self.m}", "block": f"block{self.block_size}"}.get(self.pattern, self.pattern)


def parse_run(name: str, methods: Collection[str], kind: str = "one-shot") -> Run:
    """The run a name asks for; `UserError` names the part of it that is wrong and what could stand there."""
    where = f"{kind} run {name!r}"
    method, _, rest = name.partition("-")
    if method not in methods:
        near = difflib.get_close_matches(method, methods, 1)
        hint = f"did you mean {near[0]}?" if near else f"the methods are {', '.join(sorted(methods))}"
        raise UserError(f"{where}: unknown method {method!r}; {hint}")
    found = re.fullmatch(
        r"(?P<pattern>unstructured|(?P<n>\d+)of(?P<m>\d+)|block(?P<block_size>\d+)|three-tier|hybrid)"
        r"(-(?P<sparsity>-?[\d.]+))?(-(?P<layers>[a-z]+))?",
        rest,
    )
    if not found:
        patterns = ", ".join(PATTERNS)
        raise UserError(f"{where}: unknown pattern {rest!r}; write {FORM}; the patterns are {patterns}")
    n, m, block_size = (int(found[part] or 0) for part in ("n", "m", "block_size"))
    pattern = "n-of-m" if found["n"] else "block" if found["block_size"] else found["pattern"]
    sparsity = _sparsity(where, found["sparsity"])
    if pattern == "n-of-m":
        sparsity = _sparsity_of_n_of_m(where, n, m, sparsity)
    elif pattern == "block" and block_size == 0:
        raise UserError(f"{where}: a block of size 0; write a size such as block16")
    elif pattern in FREE and sparsity is None:
        raise UserError(f"{where}: no sparsity; write it at the end, such as {name}-0.5")
    elif pattern not in FREE and sparsity is not None:
        raise UserError(f"{where}: the sparsity of {pattern} follows from its tiers; leave it out")
    layers = _layers(where, pattern, found["layers"] or "uniform")
    return Run(name, method, pattern, sparsity, n, m, block_size, layers)


def parse_gradual(name: str, methods: Collection[str]) -> Run:
    """The run of a name whose masks are chosen while the model trains; raises `UserError` as `parse_run` does."""
    method = name.partition("-")[0]
    if method in methods and method not in GRADUAL_METHODS:
        raise UserError(f"gradual run {name!r}: {method} has no saliency to go by; write magnitude or wanda")
    run = parse_run(name, GRADUAL_METHODS, "gradual")
    if run.pattern not in ("unstructured", "n-of-m") or run.layers != "uniform":
        raise UserError(f"gradual run {name!r}: only unstructured and N of M rise; write such as wanda-2of4")
    return run


def check_selection(run: Run, selection: str) -> None:
    """Raise `UserError` where SparseGPT, which makes up for one part of a matrix before it chooses in the next, is to
    choose weights inside tiers by magnitude."""
    if selection == "magnitude" and run.method == "sparsegpt" and run.pattern in ("three-tier", "hybrid"):
        raise UserError(
            f"one-shot run {run.name!r}: chooses its weights part by part and not by magnitude; leave it out, or set "
            "pruning.selection to wanda"
        )


def _sparsity(where: str, text: str | None) -> Fraction | None:
    """Exactly what is written: 0.3 is 3/10, not the float beside it."""
    if text is None:
        return None
    if not re.fullmatch(r"\d+(\.\d+)?|\.\d+", text) or Fraction(text) >= 1:
        raise UserError(f"{where}: sparsity {text}; write a share from 0 to below 1, such as 0.5")
    return Fraction(text)


def _sparsity_of_n_of_m(where: str, n: int, m: int, written: Fraction | None) -> Fraction:
    if m > LARGEST_GROUP:
        raise UserError(f"{where}: groups of {m}; write N of at most {LARGEST_GROUP}, such as 2of4")
    if not 0 < n < m:
        raise UserError(f"{where}: keeps {n} of each {m}; write N of M with 0 < N < M, such as 2of4")
    sparsity = Fraction(m - n, m)
    if written not in (None, sparsity):
        found = f"a sparsity of {float(sparsity):g}; leave {float(written):g} out"
        raise UserError(f"{where}: {n} of {m} is {found}")
    return sparsity


def _layers(where: str, pattern: str, layers: str) -> str:
    if layers not in LAYERS:
        raise UserError(f"{where}: unknown ending {layers!r}; write one of {', '.join(LAYERS)}")
    if layers != "uniform" and pattern not in FREE:
        raise UserError(f"{where}: {layers} spreads a sparsity that is free, as of {' and '.join(FREE)}")
    return layers
