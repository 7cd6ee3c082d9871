"""The first jobs of the real workflow, in folders, under names and in ways that people have."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from projects import CONFIG, ROOT, make_project

FIRST = "results/iter0/tier_map.safetensors"
MODULE = """
configfile: "outer.yaml"

rule mine:
    input:
        "results/iter0/tier_map.safetensors",
        "mine.txt",
    output:
        "all.txt",
    shell:
        "cat {{input[1]}} > {{output}}"

rule own:
    output:
        "mine.txt",
    shell:
        "echo $((1 + 1)) > {{output}}"

module stepdown:
    snakefile: {snakefile!r}
    config: config

use rule * from stepdown as stepdown_*

module again:
    snakefile: {snakefile!r}
    config: config
    prefix: "pre fix"

use rule * from again as again_*
"""


def snakemake(folder, *arguments):
    command = [sys.executable, "-m", "snakemake", "-j1", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def run(folder, *arguments):
    finished = snakemake(folder, *arguments)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project in a folder whose name a shell may stumble over."""
    return make_project(tmp_path_factory.mktemp("it's a dir") / "step down")


@pytest.fixture(scope="module")
def elsewhere(project, tmp_path_factory):
    """Another folder, without anything in it, where the first two jobs of that project have run."""
    folder = tmp_path_factory.mktemp("out put")
    run(folder.parent, *at(project / "Snakefile", folder), "results/iter0/eval.json", configured(project))
    return folder


def at(snakefile, folder):
    return "-s", snakefile, "--directory", folder


def configured(project):
    return f"--configfile={project / 'mine.yaml'}"


def test_the_model_of_the_project_is_taken_from_there_under_its_name(elsewhere):
    assert json.loads((elsewhere / "results/iter0/eval.json").read_text())["model"] == CONFIG["model"]


def test_both_snakefiles_are_one_workflow_under_one_profile(project, elsewhere):
    told = run(project.parent, *at(project / "workflow/Snakefile", elsewhere), FIRST, configured(project), "-n")
    assert "profiles/default" in told
    assert "Nothing to be done" in told


def test_a_folder_without_a_configuration_has_the_projects(project, tmp_path):
    short = [f"{section}={{sequence_length: 32}}" for section in ("calibration", "recovery", "evaluation")]
    arguments = (FIRST, "-n", "--config", "model=model", *short)
    assert "iter0: the base model" in run(project.parent, *at(project / "workflow/Snakefile", tmp_path), *arguments)


def test_braces_in_names_are_no_wildcards(project, tmp_path):
    shutil.copytree(project / "model", tmp_path / "a {step} model")
    (tmp_path / "it's {mine}.txt").write_text("Words and words. " * 1000)
    text = dict.fromkeys(("train", "valid", "test"), "it's {mine}.txt")
    named = {"model": "a {step} model"}
    for section, key, value in (("calibration", "text", text), ("evaluation", "texts", [text])):
        named[section] = CONFIG[section] | {key: value}
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text(yaml.safe_dump(CONFIG | named))
    shutil.copy(project / "schedule.csv", tmp_path)
    targets = ["results/iter0/eval.json", "results/iter1/calibration.safetensors"]
    run(tmp_path, *at(project / "Snakefile", tmp_path), *targets)
    assert all((tmp_path / target).exists() for target in targets)


def test_braces_in_the_path_of_the_project_are_one_line(project, tmp_path):
    """Snakemake formats the paths of its environments."""
    moved = shutil.copytree(project, tmp_path / "{step}")
    finished = snakemake(tmp_path, *at(moved / "Snakefile", tmp_path), "-n", f"--configfile={moved / 'mine.yaml'}")
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].endswith(
        "Snakemake takes the braces in this path for wildcards; rename the folder"
    )


def test_a_module_of_another_workflow(project, tmp_path):
    """With a prefix and without: rules, scripts and results are found, and the jobs around it are left alone."""
    (tmp_path / "Snakefile").write_text(MODULE.format(snakefile=str(project / "workflow/Snakefile")))
    (tmp_path / "outer.yaml").write_text(yaml.safe_dump(CONFIG))
    shutil.copy(project / "schedule.csv", tmp_path)
    run(tmp_path, "all.txt", f"pre fix/{FIRST}")
    assert (tmp_path / FIRST).read_bytes() == (tmp_path / "pre fix" / FIRST).read_bytes()
    assert (tmp_path / "all.txt").read_text() == "2\n"
    # Without a target, what the workflow around it begins with.
    assert "Nothing to be done" in run(tmp_path, "-n")
    # Links are looked for where each of them has its results.
    link = next(path for path in (tmp_path / "pre fix/results/iter0/unsorted/model").iterdir() if path.is_symlink())
    target = os.readlink(link)
    link.unlink()
    link.symlink_to("/gone")
    line = snakemake(tmp_path, "all.txt", "-n").stderr.splitlines()[-1]
    assert line.startswith(f"error: pre fix/results/iter0/unsorted/model/{link.name}: links to /gone"), line
    link.unlink()
    link.symlink_to(target)
    everything = run(tmp_path, "again_all", "stepdown_all", "-n")
    assert "html_report" not in everything
    assert "evaluate_base" in everything


def test_links_that_lead_nowhere_are_one_line(project, elsewhere, tmp_path):
    """Results on another disk, and the project moved."""
    copy = shutil.copytree(elsewhere, tmp_path / "copy", symlinks=True)
    link = next(path for path in (copy / "results/iter0/unsorted/model").iterdir() if path.is_symlink())
    link.unlink()
    link.symlink_to("/gone/model.safetensors")
    finished = snakemake(copy, *at(project / "Snakefile", copy), FIRST, configured(project))
    assert finished.returncode == 1
    line = finished.stderr.splitlines()[-1]
    assert line.startswith(
        f"error: results/iter0/unsorted/model/{link.name}: links to /gone/model.safetensors, which is not there"
    )
    # What it says to do helps.
    os.remove(copy / "results/iter0/unsorted/tier_map.safetensors")
    run(copy, *at(project / "Snakefile", copy), FIRST, configured(project))
    assert link.exists()


@pytest.fixture
def tiny(tmp_path):
    """A copy of .test, the smallest run, for a run of one's own."""
    return shutil.copytree(ROOT / ".test", tmp_path / "test", ignore=shutil.ignore_patterns("results", ".snakemake"))


def test_the_tiny_configuration_goes_through_every_rule_of_the_default_one(tiny):
    def rules(*arguments):
        printed = run(ROOT, "-n", "--forceall", "--printshellcmds", *arguments)
        return set(re.findall(r" --log results/logs/\S*?(\w+)\.log", printed))

    planned = rules("-s", ROOT / "workflow/Snakefile", "--directory", tiny)
    default = ("--directory", tiny, f"--configfile={ROOT / 'config/config.yaml'}")
    assert planned == rules("-s", ROOT / "workflow/Snakefile", *default)
    assert {"base_model", "prune_oneshot", "finetune", "measure", "html_report"} <= planned


@pytest.mark.slow
def test_the_tiny_configuration_runs(tiny):
    run(ROOT, *at(ROOT / "workflow/Snakefile", tiny))
    assert (tiny / "results/report.html").exists()
    assert "oneshot/wanda-2of4" in (tiny / "results/compare.txt").read_text()
