"""What scripts are told by hand: a wrong number is one line that says what to write, and exit code 1."""

import os
import resource
import shutil
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
    "degrade_dense_to_2_4": ("--scores", "x", "--tier-map", "x", "--iteration", "1", "--output"),
    "prune_gradually": ("--run", "wanda-2of4", "--output-report", "x", "--output-model"),
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
        ("prune_oneshot", '--layer-sparsity {"layers.0":true}', "--layer-sparsity: found"),
        ("prune_oneshot", "--owl-lambda inf", "argument --owl-lambda: found 'inf'"),
        ("degrade_dense_to_2_4", "--dense half --mid-2-4 0.3 --topk 0.2", "argument --dense: found 'half'"),
        ("degrade_dense_to_2_4", "--dense 1/0 --mid-2-4 0.3 --topk 0.2", "argument --dense: found '1/0'"),
        ("degrade_dense_to_2_4", "--dense 0.5 --mid-2-4 0.5 --topk 0.5", "found a sum of 1.5"),
        ("prune_gradually", "--learning-rate -1", "argument --learning-rate: found '-1'"),
        ("prune_gradually", "--rise 2", "--rise: found 2; write a share"),
        ("measure", "--repeats 0", "argument --repeats: found '0'"),
        ("measure", "--step iter1", "--step iter1: give a name, a folder"),
        ("measure", f"--step iter0 {MODEL}", "--step iter0: named twice"),
    ],
)
def test_a_wrong_number_is_one_line(script, words, told, tmp_path):
    model = () if script in ("measure", "degrade_dense_to_2_4") else ("--model", MODEL)
    outputs = (*model, *OUTPUTS[script], str(tmp_path / "output"))
    command = [sys.executable, SCRIPTS / f"{script}.py", *outputs, *words.split()]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 1 and told in found.stderr
    assert found.stderr.count("\n") == 1 and found.stderr.startswith("error: ") and not list(tmp_path.iterdir())


def test_a_prompt_that_is_measured_shorter_is_told(tmp_path):
    """Not refused: the default is meant for models of few positions as well."""
    words = ["--step", "iter0", MODEL, "--prompt-tokens", "2000", "--new-tokens", "2", "--repeats", "1"]
    command = [sys.executable, SCRIPTS / "measure.py", *words, "--output", tmp_path / "measurements.json"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0 and "no place for 2000 and 2 tokens: measured with 1022 and 2" in found.stderr


BEGINNING = "import argparse, shutil; from stepdown import cli, files; cli.run(lambda _: "
END = ", argparse.ArgumentParser())"


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("files.atomic_write('table', 'rows')", "table: could not be written (File too large); is the disk full?"),
        ("files.atomic_write('folder', 'rows')", "folder: is a folder; name a file"),
        ("shutil.copyfile('source', 'copy')", "copy: File too large"),
        ("cli.tell('rows')", "standard output: could not be written (No space left on device)"),
    ],
)
def test_what_could_not_be_written_is_named(written, told, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "source").write_text("rows")
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-c", BEGINNING + written + END],
            **{"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(SCRIPTS)}, "text": True},
            **{"stdout": full, "stderr": subprocess.PIPE},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1)),
        )
    assert (found.returncode, found.stderr) == (1, f"error: {told}\n")
    assert not (tmp_path / "table").exists() and not list(tmp_path.glob("*.partial"))


def import_bundled(source, target):
    words = ["--model", source, "--output-model", target, "--output-tier-map", target.parent / "tier_map.safetensors"]
    return subprocess.run([sys.executable, SCRIPTS / "base_model.py", *words], capture_output=True, text=True)


@pytest.mark.parametrize("target", ["own", "."], ids=["itself", "around it"])
def test_the_folder_of_a_model_is_not_written_over(target, tmp_path):
    own = shutil.copytree(MODEL, tmp_path / "models/own")
    before = {file.name for file in own.iterdir()}
    found = import_bundled(own, own.parent / target)
    assert found.returncode == 1 and "would be lost; name another folder" in found.stderr
    assert {file.name for file in own.iterdir()} == before


def test_other_files_give_no_way_to_a_model(tmp_path):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/thesis.txt").write_text("all of it")
    found = import_bundled(MODEL, tmp_path / "papers")
    assert found.returncode == 1 and "holds thesis.txt and no model, which would be lost" in found.stderr
    assert (tmp_path / "papers/thesis.txt").exists() and found.stderr.count("\n") == 1
