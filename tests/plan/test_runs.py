"""The names of one-shot runs: what they ask for, and what is said of those that ask for nothing there is."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdown.errors import UserError
from stepdown.plan.runs import Run, check_selection, parse_gradual, parse_run

METHODS = ["magnitude", "sparsegpt", "wanda"]


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("wanda-2of4", Run("wanda-2of4", "wanda", "n-of-m", Fraction(1, 2), n=2, m=4)),
        ("wanda-1of4-0.75", Run("wanda-1of4-0.75", "wanda", "n-of-m", Fraction(3, 4), n=1, m=4)),
        ("wanda-2of3", Run("wanda-2of3", "wanda", "n-of-m", Fraction(1, 3), n=2, m=3)),
        (
            "sparsegpt-unstructured-0.5",
            Run("sparsegpt-unstructured-0.5", "sparsegpt", "unstructured", Fraction(1, 2)),
        ),
        ("magnitude-unstructured-0", Run("magnitude-unstructured-0", "magnitude", "unstructured", Fraction(0))),
        ("wanda-block16-0.3", Run("wanda-block16-0.3", "wanda", "block", Fraction(3, 10), block_size=16)),
        ("wanda-three-tier", Run("wanda-three-tier", "wanda", "three-tier", None)),
        ("wanda-hybrid", Run("wanda-hybrid", "wanda", "hybrid", None)),
        (
            "wanda-unstructured-0.7-owl",
            Run("wanda-unstructured-0.7-owl", "wanda", "unstructured", Fraction(7, 10), layers="owl"),
        ),
        (
            "wanda-block8-0.7-table",
            Run("wanda-block8-0.7-table", "wanda", "block", Fraction(7, 10), block_size=8, layers="table"),
        ),
    ],
)
def test_names(name, run):
    assert parse_run(name, METHODS) == run


@given(st.integers(0, 999))
def test_a_sparsity_is_what_is_written(thousandths):
    name = f"wanda-unstructured-{thousandths / 1000}"
    assert parse_run(name, METHODS).sparsity == Fraction(thousandths, 1000)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wnda-2of4", "unknown method 'wnda'; did you mean wanda?"),
        ("obd-2of4", "unknown method 'obd'; the methods are magnitude, sparsegpt, wanda"),
        ("2of4", "unknown method '2of4'"),
        ("wanda", "unknown pattern ''"),
        ("wanda-2of", "the patterns are unstructured, 2of4 (any N of M), block16 (any size), three-tier, hybrid"),
        ("wanda-2:4", "write METHOD-PATTERN[-SPARSITY][-owl|-table], such as wanda-2of4"),
        ("wanda-4of4", "keeps 4 of each 4; write N of M with 0 < N < M"),
        ("wanda-5of4", "keeps 5 of each 4"),
        ("wanda-0of4", "keeps 0 of each 4"),
        ("wanda-2of4-0.6", "2 of 4 is a sparsity of 0.5; leave 0.6 out"),
        ("wanda-unstructured", "no sparsity; write it at the end, such as wanda-unstructured-0.5"),
        ("wanda-unstructured-1", "sparsity 1; write a share from 0 to below 1"),
        ("wanda-unstructured-1.5", "sparsity 1.5"),
        ("wanda-unstructured--0.5", "sparsity -0.5"),
        ("wanda-unstructured-0.5.5", "sparsity 0.5.5"),
        ("wanda-block16", "no sparsity; write it at the end, such as wanda-block16-0.5"),
        ("wanda-block0-0.5", "a block of size 0"),
        ("wanda-hybrid-0.5", "the sparsity of hybrid follows from its tiers; leave it out"),
        ("wanda-unstructured-0.5-evolved", "unknown ending 'evolved'; write one of uniform, owl, table"),
        ("wanda-2of4-owl", "owl spreads a sparsity that is free, as of unstructured and block"),
    ],
)
def test_a_wrong_name_is_one_line_that_says_what_could_stand_there(name, words):
    with pytest.raises(UserError) as caught:
        parse_run(name, METHODS)
    message = str(caught.value)
    assert message.startswith(f"one-shot run {name!r}: ") and words in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("foo", "unknown method 'foo'; the methods are magnitude, wanda"),
        ("sparsegpt-2of4", "sparsegpt has no saliency to go by; write magnitude or wanda"),
        ("wanda-unstructured-1.5", "sparsity 1.5; write a share"),
        ("wanda-4of2", "keeps 4 of each 2"),
        ("wanda-hybrid", "only unstructured and N of M rise"),
    ],
)
def test_a_wrong_name_of_a_gradual_run_is_told_as_such(name, words):
    with pytest.raises(UserError) as caught:
        parse_gradual(name, METHODS)
    assert str(caught.value).startswith(f"gradual run {name!r}: ") and words in str(caught.value)


@pytest.mark.parametrize("pattern", ["three-tier", "hybrid"])
def test_sparsegpt_in_tiers_and_selection_by_magnitude_are_refused_together(pattern):
    run = parse_run(f"sparsegpt-{pattern}", METHODS)
    check_selection(run, "wanda")
    check_selection(parse_run(f"wanda-{pattern}", METHODS), "magnitude")
    with pytest.raises(UserError, match=f"one-shot run 'sparsegpt-{pattern}': .* set pruning.selection to wanda$"):
        check_selection(run, "magnitude")


def test_names_are_read_with_the_standard_library_only():
    """Snakemake's own environment has no torch, and the names are checked there."""
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import sys\n"
        "from stepdown.prune.methods import method_names\n"
        "from stepdown.plan.runs import parse_run\n"
        "assert method_names() == ['magnitude', 'sparsegpt', 'wanda'], method_names()\n"
        "parse_run('wanda-2of4', method_names())\n"
        "assert not {'torch', 'numpy', 'safetensors', 'tqdm'} & sys.modules.keys()"
    )
    scripts = Path(__file__).parents[2] / "workflow/scripts"
    subprocess.run([sys.executable, "-c", code], cwd=scripts, check=True)
