"""What scripts are told by hand: a wrong number is one line that says what to write, and exit code 1."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY

SCRIPTS = REPOSITORY / "workflow/scripts"
MODEL = str(REPOSITORY / "resources/pydoc-llama")
OUTPUTS = {
    "calibrate": ("--output",),
    "reconstruct": ("--dense-model", MODEL, "--masks", "x", "--output-model"),
    "base_model": ("--output-tier-map", "x", "--output-model"),
    "prune_oneshot": ("--run", "wanda-three-tier", "--output-report", "x", "--output-model"),
    "measure": ("--step", "iter0", MODEL, "--output"),
}


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        ("calibrate", "--samples 0", "argument --samples: found '0'; write a whole number, at least 1"),
        ("calibrate", "--samples many", "argument --samples: found 'many'"),
        ("calibrate", "--sequence-length 1", "argument --sequence-length: found '1'; write a whole number, at least 2"),
        ("calibrate", "--no-such-thing", "unrecognized arguments: --no-such-thing (--help tells what there is)"),
        ("reconstruct", "--learning-rate nan", "argument --learning-rate: found 'nan'; write a number above 0"),
        ("reconstruct", "--steps -1", "argument --steps: found '-1'"),
        ("base_model", "--block-size 3", "--block-size: found 3; write a multiple of 4 such as 16"),
        ("base_model", "--k 100000", "--k: found 100000; a block of 16x16 has 256 entries, write at most that"),
        ("prune_oneshot", "--shares a b c", "argument --shares: found 'a'; write a share from 0 to 1"),
        ("prune_oneshot", "--shares 0.5 0.5 0.5", "--shares: found a sum of 1.5; write three that sum to 1"),
        ("prune_oneshot", "--top-blocks 1e-5 --layer-sparsity [2]", "--layer-sparsity: found [2]"),
        ("prune_oneshot", "--top-blocks 7", "argument --top-blocks: found '7'"),
        ("prune_oneshot", "--layer-sparsity [1]", "--layer-sparsity: found [1]; write such as"),
        ("measure", "--repeats 0", "argument --repeats: found '0'"),
        ("measure", "--step iter1", "--step iter1: give a name, a folder"),
    ],
)
def test_a_wrong_number_is_one_line(script, words, told, tmp_path):
    model = () if script == "measure" else ("--model", MODEL)
    outputs = (*model, *OUTPUTS[script], str(tmp_path / "output"))
    command = [sys.executable, SCRIPTS / f"{script}.py", *outputs, *words.split()]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 1 and told in found.stderr
    assert found.stderr.count("\n") == 1 and found.stderr.startswith("error: ") and not list(tmp_path.iterdir())
