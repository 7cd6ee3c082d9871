"""What the workflow would run and when, with every script replaced by one that only leaves its outputs behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stepdown.plan.fingerprints import code_files, imported_names

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "workflow/scripts"
# Runs instead of the script that imports it. What it leaves depends on all that it was given, as real results do.
STUB = """
import hashlib, os, sys
from pathlib import Path
words = dict(zip(sys.argv, sys.argv[1:]))
content = hashlib.sha256(" ".join(sys.argv).encode())
for word in sys.argv[1:]:
    for path in (Path(word), Path(word, "model.safetensors.index.json")):
        content.update(path.read_bytes() if path.is_file() else b"")
for flag, output in words.items():
    if flag == "--output-model":
        Path(output).mkdir(parents=True, exist_ok=True)
        Path(output, "model.safetensors.index.json").write_text(content.hexdigest())
    elif flag == "--output-folder":
        for figure in ("perplexity", "tier_shares", "tier_maps", "training"):
            Path(output, figure + ".svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    elif flag == "--output-figure":
        Path(output).write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    elif flag.startswith("--output"):
        file = Path(output, "packed.json") if Path(output).is_dir() else Path(output)
        file.write_text(content.hexdigest())
print("as text")
Path(words["--log"]).write_text(f"{sys.executable} {os.environ.get('OMP_NUM_THREADS')}")
sys.exit()
"""
# With `=`, as what follows a plain --configfile is taken for one more file.
MINE = "--configfile=mine.yaml"
# What Snakemake says on the way to an error of ours.
PREAMBLE = ("Using workflow specific profile", "Config file ", "Assuming ", "Building DAG")
ITERATION = {
    "calibrate",
    "score",
    "degrade_dense_to_2_4",
    "degrade_2_4_to_topk",
    "refit",
    "reconstruct",
    "finetune",
    "evaluate",
}
MENDING = {"refit", "reconstruct"}
ONE_SHOT = ITERATION - {"calibrate", "score"}
RUNS = ["oneshot/magnitude-2of4", "oneshot/wanda-2of4", "oneshot/sparsegpt-2of4"]
RUN = {"prune_oneshot", "finetune", "evaluate"}
SIDE_BY_SIDE = {("", "summarize"), ("", "plot"), ("", "compare"), ("", "html_report")}
# All models are measured in one job, so that a new one has the others measured again.
MEASURED = SIDE_BY_SIDE | {("", "measure")}
BASE = {"base_model", "sort_channels", "evaluate_base"}


class Project:
    """A copy of the project in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder

    def snakemake(self, *arguments):
        """Run Snakemake in the folder; what a call on the command line prints and returns."""
        command = [sys.executable, "-m", "snakemake", "-j1", *arguments]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True)

    def run(self, *arguments):
        finished = self.snakemake(*arguments)
        assert finished.returncode == 0, finished.stderr[-2000:]
        return finished.stdout + finished.stderr

    def plan(self, *arguments):
        """(step, rule) of each job that would run; the target that gathers all is left out."""
        printed = self.run("--dry-run", "--printshellcmds", *arguments)
        return {(step.strip("/"), rule) for step, rule in re.findall(r" --log results/logs(\S*)/(\w+)\.log", printed)}

    def edit(self, path, old, new):
        file = self.folder / path
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))


def copy_project(folder):
    for name in ("Snakefile", "workflow", "config", "profiles"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    (folder / "workflow/scripts/stub.py").write_text(STUB)
    for script in set(SCRIPTS.glob("*.py")) - {SCRIPTS / "html_report.py"}:
        # The imports stay, as they decide what reruns.
        (folder / "workflow/scripts" / script.name).write_text(f"import stub\n{script.read_text()}")
    write_model(folder / "resources/pydoc-llama")
    (folder / "notes.txt").write_text("Some words of my own. " * 100)
    (folder / "mine.yaml").write_text("calibration: {text: notes.txt}\n")
    return Project(folder)


def write_model(folder):
    """The least that looks like a model from outside."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"max_position_embeddings": 512}')
    (folder / "tokenizer.json").write_text('{"model": {}}')
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Nothing has run yet; only for looking."""
    return copy_project(tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    project = copy_project(tmp_path_factory.mktemp("finished"))
    project.run(MINE)
    return project


@pytest.fixture
def finished(finished_once, tmp_path):
    """Everything has run; a copy of one's own to change."""
    shutil.copytree(finished_once.folder, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")


def jobs(steps, rules):
    return {(step, rule) for step in steps for rule in rules}


# --- targets ---------------------------------------------------------------------------------------------------------


def test_all(fresh):
    everything = jobs(["iter1", "iter2", "iter3", "iter4", "iter5"], ITERATION) | jobs(["oneshot/three-tier"], ONE_SHOT)
    base = jobs(["iter0"], BASE)
    assert fresh.plan() == everything | jobs(RUNS, RUN) | base | MEASURED


def test_without_a_schedule_there_are_one_shot_runs_only(fresh):
    base = jobs(["iter0"], BASE)
    sweep = "--configfile=config/sweeps/block-sizes.yaml"
    runs = [f"oneshot/wanda-block{size}-{share}" for size in (8, 16, 32) for share in (0.3, 0.5, 0.7)]
    assert fresh.plan(sweep) == base | jobs(runs, RUN) | MEASURED


def test_a_run_that_no_config_names_is_asked_for_by_its_file(fresh):
    planned = fresh.plan("results/oneshot/sparsegpt-unstructured-0.7-owl/eval.json")
    base = jobs(["iter0"], BASE)
    assert planned == base | jobs(["oneshot/sparsegpt-unstructured-0.7-owl"], RUN)


def test_compressions_start_from_the_model_of_their_step(fresh):
    """Listed in the configuration, or asked for by a file."""
    quantised, shorter = "quantised/gptq4-g8/iter1", "structured/shortgpt-2"
    planned = fresh.plan(f"results/{quantised}/eval.json", f"results/{shorter}/eval.json")
    base = jobs(["iter0"], BASE)
    own = {(quantised, "quantise"), (shorter, "prune_structured")} | jobs([quantised, shorter], {"evaluate_compressed"})
    assert planned == base | jobs(["iter1"], ITERATION - {"evaluate"}) | own
    only = {"schedule": None, "oneshot": [], "compressions": ["dynamic/uniform-0.5/iter0"]}
    (fresh.folder / "only.yaml").write_text(yaml.safe_dump(only))
    listed = fresh.plan("--configfile=only.yaml")
    steps = {("dynamic/uniform-0.5/iter0", rule) for rule in ("calibrate_thresholds", "evaluate_compressed")}
    assert listed == base | steps | MEASURED


def test_channels_are_sorted_before_everything_else(fresh):
    assert fresh.plan("--config", "sort_channels=false") == fresh.plan() - {("iter0", "sort_channels")}
    printed = fresh.run("--dry-run", "--printshellcmds")
    (imported,) = re.findall(r"base_model.py .* --output-model (\S+)", printed)
    (used, made) = re.search(r"sort_channels.py --model (\S+) .* --output-model (\S+)", printed).groups()
    assert imported == used == "results/iter0/unsorted/model" and made == "results/iter0/model"
    uses = {}
    for script, words in re.findall(r"/(\w+)\.py (.*)", printed):
        uses.setdefault(script, set()).update(re.findall(r"--(?:dense-)?model (results/iter0/\S+)", words))
    assert uses.pop("base_model") == set() and uses.pop("sort_channels") == {imported}
    # Sorting is for blocks: runs whose pattern has none start from the model as it came.
    assert uses.pop("prune_oneshot") == {imported}
    assert set().union(*uses.values()) == {made}
    blocks = fresh.run("--dry-run", "--printshellcmds", "results/oneshot/wanda-block16-0.5/eval.json")
    assert f"--run wanda-block16-0.5 --model {made}" in blocks


def test_a_target_takes_the_place_of_the_last_row(fresh):
    options = ("--config", "pruning={target: {bytes: 0.5}}")
    everything = fresh.plan() | {("", "choose_shares")}
    assert fresh.plan(*options) == everything
    printed = fresh.run("--dry-run", "--printshellcmds", *options)
    assert " --bytes 0.5 --selection wanda" in printed
    told = re.findall(r"--dense (\S+) .*--target results/target_shares.json --last 0.35 0.45 0.2 ", printed)
    assert sorted(told) == ["0.35", "0.35", "0.5", "0.65", "0.8", "0.9"]


def test_a_gradual_run_is_finetuned_on_a_schedule_of_its_own(fresh):
    step = "gradual/wanda-2of4"
    told = finetuning(fresh, f"results/{step}/eval.json", "--config", "oneshot_epochs=1")[step]
    assert "--learning-rate-schedule cosine" in told
    assert "optimizer.safetensors" not in told


def test_a_gradual_run_has_trained_for_its_mask_and_is_not_refitted(fresh):
    step = "gradual/wanda-2of4"
    planned = fresh.plan(f"results/{step}/eval.json", "--config", "oneshot_refit=true")
    assert {rule for job_step, rule in planned if job_step == step} == {"prune_gradually", "finetune", "evaluate"}


def test_tasks_are_measured_on_every_finished_model(fresh):
    planned = fresh.plan("--config", "zero_shot={tasks: [piqa]}")
    steps = ["iter0", "iter1", "iter2", "iter3", "iter4", "iter5", "oneshot/three-tier", *RUNS]
    assert jobs(steps, {"zero_shot"}) == {job for job in planned if job[1] == "zero_shot"}


def test_the_last_iteration_is_measured_packed_when_asked_for(fresh):
    asked = ("--config", "speed={packed: [bf16, int4]}")
    packing = {job for job in fresh.plan(*asked) if job[1].startswith("pack")}
    assert packing == {("iter5", "pack"), ("iter5", "pack_integers_int4")}
    printed = fresh.run("--dry-run", "--printshellcmds", "results/measurements.json", *asked)
    assert all(f"--step iter5/packed/{name} results/iter5/packed/{name}" in printed for name in ("bf16", "int4"))
    assert not any(rule.startswith("pack") for _, rule in fresh.plan())


def test_one_iteration_asks_for_those_before_it_and_no_more(fresh):
    expected = jobs(["iter0"], BASE) | jobs(["iter1", "iter2"], ITERATION)
    assert fresh.plan("results/iter2/eval.json") == expected - {("iter1", "evaluate")}


@pytest.mark.parametrize("profile", ["slurm", "cluster-generic"])
def test_a_cluster_has_the_same_plan(fresh, profile):
    """Which needs no cluster."""
    target = "results/iter1/eval.json"
    assert fresh.plan(target, "--profile", f"profiles/{profile}") == fresh.plan(target)


def finetuning(project, *arguments):
    """Step -> the options its finetuning is given, as one text."""
    printed = project.run("--dry-run", "--printshellcmds", "--forceall", *arguments)
    commands = [line for line in printed.splitlines() if "workflow/scripts/finetune.py" in line]
    return {re.search(r" --step (\S+)", command)[1]: command for command in commands}


def test_the_iterations_have_one_learning_rate_schedule(fresh):
    rows = [f"{i},{1 - i / 10},{i / 10},0,1" for i in range(1, 6)]
    (fresh.folder / "trained.csv").write_text("\n".join(["iteration,dense,mid_2_4,topk,epochs", *rows]))
    told = finetuning(fresh, "--config", "schedule=trained.csv")
    for step, (warm_up, schedule, before, after) in {
        "iter1": (4, "constant", None, "iter1"),
        "iter3": (0, "constant", "iter2", "iter3"),
        "iter5": (0, "cosine", "iter4", None),
        "oneshot/three-tier": (4, "cosine", None, None),
    }.items():
        assert f"--warmup-steps {warm_up} --learning-rate-schedule {schedule} " in told[step]
        for option, other in (("--optimizer", before), ("--output-optimizer", after)):
            assert (f" {option} results/{other}/optimizer.safetensors" in told[step]) == (other is not None)
    restarted = finetuning(fresh, "--config", "schedule=trained.csv", "recovery={one_schedule: false}")
    trained = [command for command in restarted.values() if " --epochs 0 " not in command]
    assert len(trained) == 6 and all("--learning-rate-schedule cosine" in command for command in trained)
    assert not any("optimizer.safetensors" in command for command in restarted.values())


@pytest.mark.parametrize("model", ["config", "llama2-7b", "opt-125m", "smollm2-135m"])
def test_the_published_overlay_is_the_original_method(fresh, model):
    overlays = ("--configfile", f"config/{model}.yaml", "config/published.yaml")
    steps = ["iter1", "iter2", "iter3", "iter4", "iter5"]
    base = jobs(["iter0"], BASE - {"sort_channels"}) | MEASURED
    expected = jobs(steps, ITERATION - MENDING) | jobs(["oneshot/three-tier"], ONE_SHOT - MENDING) | base
    assert fresh.plan(*overlays) == expected
    told = finetuning(fresh, *overlays)
    epochs = {step: int(re.search(r"--epochs (\d+)", command)[1]) for step, command in told.items()}
    assert epochs == dict(zip(steps, (2, 2, 2, 2, 3), strict=True)) | {"oneshot/three-tier": 11}
    for command in told.values():
        assert "--learning-rate 2e-05 --weight-decay 0.0 --warmup-steps 0 --learning-rate-schedule linear" in command
        assert not re.search("--(teacher|distill|optimizer|output-optimizer)", command)
    printed = fresh.run("--dry-run", "--printshellcmds", *overlays)
    assert set(re.findall(r"--selection (\w+)", printed)) == {"magnitude"}


def test_distillation_is_off_or_on_by_row(fresh, tmp_path):
    rows = ["iteration,dense,mid_2_4,topk,epochs,distill", "1,0.9,0.1,0,1,no", "2,0.8,0.2,0,1,yes", "3,0.7,0.3,0,1,"]
    (fresh.folder / "by_row.csv").write_text("\n".join(rows))
    told = finetuning(fresh, "--config", "schedule=by_row.csv")
    taught = {step for step, command in told.items() if "--teacher results/iter0/" in command}
    assert taught == {"iter2", "iter3", "oneshot/three-tier"}
    told = finetuning(fresh, "--config", "schedule=by_row.csv", "recovery={distill: {weight: 0}}")
    assert not any("--teacher" in command or "--distill" in command for command in told.values())


def test_a_long_schedule(fresh):
    """Python's own limit on recursion ends at 96 iterations."""
    rows = [f"{i},{1 - i / 1000},{i / 1000},0,1" for i in range(1, 121)]
    (fresh.folder / "long.csv").write_text("\n".join(["iteration,dense,mid_2_4,topk,epochs", *rows]))
    assert ("iter120", "evaluate") in fresh.plan("results/iter120/eval.json", "--config", "schedule=long.csv")


def test_a_job_has_the_machine_and_this_python(finished_once):
    log = (finished_once.folder / "results/logs/iter3/calibrate.log").read_text()
    assert log == f"{os.path.realpath(sys.executable)} None" or log == f"{sys.executable} None"


def test_the_report_holds_the_figures(finished_once):
    page = (finished_once.folder / "results/report.html").read_text()
    for name in ("perplexity.svg", "tier_shares.svg", "tier_maps.svg", "training.svg", "comparison.svg", "summary.csv"):
        assert f"results/{'' if name.endswith('csv') else 'figures/'}{name}" in page


# --- what reruns -----------------------------------------------------------------------------------------------------


def test_nothing_reruns_after_a_new_checkout_or_a_copy_without_dates(finished):
    for path in finished.folder.rglob("*"):
        if path.is_file() and ".snakemake" not in path.relative_to(finished.folder).parts:
            path.touch()
    finished.edit("workflow/scripts/stepdown/tensors/tiers.py", "import torch\n", "import torch  # a comment\n")
    assert "Nothing to be done" in finished.run("--dry-run", MINE)


def test_an_edited_row_reruns_its_iteration_and_later(finished):
    finished.edit("config/progressive_schedule.csv", "0.65,0.20,0.15,0.15,0.05", "0.70,0.15,0.15,-,-")
    finished.edit("config/progressive_schedule.csv", "0.50,0.30,0.20,0.15", "0.50,0.30,0.20,0.20")
    later = jobs(["iter4", "iter5"], ITERATION)
    assert finished.plan(MINE) == jobs(["iter3"], ONE_SHOT) | later | MEASURED
    # Stopping to look at iteration 3 must not hide from iteration 4 that its weights are other ones now.
    finished.run("results/iter3/eval.json", MINE)
    assert finished.plan(MINE) == later | MEASURED


def test_more_epochs_retrain_the_one_shot_run_too(finished):
    finished.edit("config/progressive_schedule.csv", "0.00,3", "0.00,4")
    retrained = jobs(["iter5", "oneshot/three-tier"], {"finetune", "evaluate"})
    assert finished.plan(MINE) == retrained | MEASURED


def test_only_the_keys_a_rule_uses_rerun_it(finished_once):
    """Neither LoRA's options without LoRA nor another name of the same schedule matter."""
    shutil.copy(finished_once.folder / "config/progressive_schedule.csv", finished_once.folder / "other.csv")
    options = ("recovery={lora: {rank: 4}}", "schedule=other.csv", "evaluation={tokens: 512}")
    evaluated = jobs(["iter1", "iter2", "iter3", "iter4", "iter5", "oneshot/three-tier", *RUNS], {"evaluate"})
    assert finished_once.plan(MINE, "--config", *options) == evaluated | {("iter0", "evaluate_base")} | SIDE_BY_SIDE


def test_another_learning_rate_trains_anew_what_was_trained(finished_once):
    """Runs without epochs are passed on as they are."""
    finetuned = jobs(["iter1", "oneshot/three-tier"], {"finetune", "evaluate"})
    later = jobs(["iter2", "iter3", "iter4", "iter5"], ITERATION)
    planned = finished_once.plan(MINE, "--config", "recovery={learning_rate: 1.0e-3}")
    assert planned == finetuned | later | MEASURED


# A section, and a number in it that some rule is told in the default run, and that can be another by itself.
NUMBERS = [
    (section, key)
    for section, values in yaml.safe_load((ROOT / "config/config.yaml").read_text()).items()
    if isinstance(values, dict) and section not in ("structured", "layer_sparsity", "gradual", "zero_shot")
    for key, value in values.items()
    if isinstance(value, int | float) and key not in ("top_blocks", "block_size", "sharded")
]


@pytest.mark.slow
@pytest.mark.parametrize(("section", "key"), NUMBERS)
def test_every_number_that_changes_reruns_something(finished_once, section, key):
    value = yaml.safe_load((ROOT / "config/config.yaml").read_text())[section][key]
    changed = not value if isinstance(value, bool) else value / 2 or 1.0 if isinstance(value, float) else value + 1
    assert finished_once.plan(MINE, "--config", f"{section}={json.dumps({key: changed})}")


def test_sorting_channels_or_no_longer_makes_every_model_anew(finished):
    models = jobs(["iter1", "iter2", "iter3", "iter4", "iter5"], ITERATION) | jobs(["oneshot/three-tier"], ONE_SHOT)
    models |= jobs(RUNS, RUN) | {("iter0", "evaluate_base")} | MEASURED
    as_it_came = ("--config", "sort_channels=false")
    assert finished.plan(MINE, *as_it_came) == models | {("iter0", "base_model")}
    finished.run(MINE, *as_it_came)
    assert finished.plan(MINE) == models | {("iter0", "sort_channels")}


def test_a_text_that_changes_reruns_what_reads_it(finished):
    finished.edit("notes.txt", "Some words", "Some other words")
    planned = finished.plan("results/iter1/eval.json", MINE)
    assert planned == jobs(["iter1"], ITERATION) | jobs(["iter0"], BASE - {"base_model"})


def test_a_model_that_changes_reruns_everything(finished):
    finished.edit("resources/pydoc-llama/config.json", "512", "1024")
    assert ("iter0", "base_model") in finished.plan("results/iter0/eval.json", MINE)


def test_what_is_passed_on_as_it_is_reruns_for_nothing_of_a_training(finished):
    """Neither for a teacher that would not teach, nor for what another text would hold."""
    (finished.folder / "words.txt").write_text("Some words\n" * 400)
    passed = ("results/oneshot/wanda-2of4/training.json", "--config", "oneshot=[wanda-2of4]", "schedule=null")
    finished.run(*passed, "recovery={text: words.txt}")
    (finished.folder / "words.txt").write_text("Other words\n" * 400)
    assert not finished.plan(*passed, "recovery={text: words.txt, distill: {weight: 0}}")
    trained = finished.plan(*passed, "recovery={text: words.txt}", "oneshot_epochs=1")
    assert trained == {("oneshot/wanda-2of4", "finetune")}


def test_swaps_are_of_tiers_only(fresh):
    steps = ["oneshot/three-tier", "oneshot/wanda-2of4"]
    targets = [f"results/{step}/refitted_model/model.safetensors.index.json" for step in steps]
    printed = fresh.run("--dry-run", "--printshellcmds", *targets, "--config", "oneshot_refit=true")
    told = dict(re.findall(r"refit\.py .* --model results/(\S+)/pruned_model (.*)", printed))
    assert {step: "--swaps" in words for step, words in told.items()} == dict(zip(steps, (True, False), strict=True))


def test_a_changed_kernel_has_packed_models_measured_anew(finished):
    target, packed = "results/measurements.json", (MINE, "--config", "speed={packed: [bf16]}")
    finished.run(target, *packed)
    finished.edit("workflow/scripts/stepdown/packed/kernels/matrix.h", "#include", "// A comment.\n#include")
    assert finished.plan(target, *packed) == {("", "measure")}


def test_changed_code_reruns_what_imports_it(finished):
    """Itself, as finetune.py does recovery, or through another module, as score.py does blocks through tiers."""
    for module, rule in (("recover/recovery", "finetune"), ("tensors/blocks", "score")):
        finished.edit(f"workflow/scripts/stepdown/{module}.py", "import torch\n", "import torch\n\nCHANGED = 1\n")
        planned = finished.plan("results/iter1/training.json", MINE)
        assert ("iter1", rule) in planned
        assert ("iter1", "calibrate") not in planned or rule != "finetune"


@pytest.mark.parametrize("module", ["plan/preflight", "plan/locks", "plan/schedule"])
def test_what_only_the_snakefile_uses_reruns_nothing(finished, module):
    finished.edit(
        f"workflow/scripts/stepdown/{module}.py", "from pathlib import Path\n", "from pathlib import Path\n\nNEW = 1\n"
    )
    assert "Nothing to be done" in finished.run("--dry-run", MINE)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config", "recovery={learning_rate: 2e-5}"], "recovery.learning_rate: found '2e-5'; write 2.0e-5"),
        (["--config", "schedule=nowhere.csv"], "schedule nowhere.csv: No such file"),
        (["--config", "model=resources/pydoc-lama"], "model: no folder resources/pydoc-lama"),
        (
            ["--config", "model=2024_10"],
            "model: found 202410; write text (a name that YAML reads otherwise, such as a number, is text as ./2024_10",
        ),
        (
            ["--config", "model=7e5"],
            "model: found 700000.0; write text (a name that YAML reads otherwise, such as a number, is text",
        ),
        (["--config", "oneshot=[wanda-2of4, wandaa-4of8]"], "one-shot run 'wandaa-4of8': unknown method 'wandaa'"),
        (["results/oneshot/wanda-4of2/eval.json"], "one-shot run 'wanda-4of2': keeps 4 of each 2"),
        (["results/oneshot/wanda-2of4-0.7/eval.json"], "2 of 4 is a sparsity of 0.5; leave 0.7 out"),
        (["--config", "zero_shot={task_folder: nowhere}"], "zero_shot.task_folder: no folder nowhere"),
        (["--config", "compressions=[structured/slicegpt-1.5]"], "structured/slicegpt-1.5: found '1.5'"),
        (["results/quantised/gptq2/iter0/eval.json"], "2 bits are not offered; write 3 or 4 or 8"),
        (["results/iter1/model.gguf"], "a GGUF file is written of llama, mistral, qwen2, qwen3, found the family None"),
        (["results/structured/slicegpt-0.2/model.gguf"], "slicegpt-0.2: a GGUF file has no names for a sliced model"),
        *(
            ([f"results/iter5/packed/{values}/packed.json", "--config", "pruning={block_size: 32}"], told)
            for values in ("bf16", "int4")
            for told in ("config key pruning.block_size: found 32; models are packed in blocks of 16",)
        ),
        (["results/iter5/zero_shot.json"], "config key zero_shot.tasks: found []; name tasks such as [arc_easy]"),
        (
            ["--config", "gradual={runs: [foo]}"],
            "gradual run 'foo': unknown method 'foo'; the methods are magnitude, w",
        ),
        *(
            (
                ["--config", "schedule=null", f"oneshot=[{run}]"],
                f"results/oneshot/{run}: config key schedule is null; name a schedule, whose rows make its tiers,"
                f" or leave {run} out of oneshot",
            )
            for run in ("three-tier", "wanda-three-tier")
        ),
        (
            ["results/oneshot/wanda-unstructured-0.5-table/eval.json"],
            "layer_sparsity.table: found {}; name matrices, or ask for wanda-unstructured-0.5 without -table",
        ),
        (["results/iter6/eval.json"], "results/iter6: config/progressive_schedule.csv has 5 rows"),
    ],
)
def test_a_mistake_is_one_line_before_the_first_job(fresh, arguments, told):
    finished = fresh.snakemake(*arguments)
    lines = [line for line in finished.stderr.splitlines() if not line.startswith(PREAMBLE)]
    assert finished.returncode == 1
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith("error: ")
    assert told in lines[0]
    assert not (fresh.folder / "results").exists()


def test_a_folder_without_write_permission_is_one_line_too(fresh):
    results = fresh.folder / "results"
    results.mkdir(mode=0o555)
    # What a user who is root may do is not to be had otherwise.
    powerless = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if powerless and not shutil.which("setpriv"):
        pytest.skip("root may write everywhere")
    command = [*powerless, sys.executable, "-m", "snakemake", "-j1"]
    finished = subprocess.run(command, cwd=fresh.folder, capture_output=True, text=True)
    results.rmdir()
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith(f"error: {results}: no permission to write here")


# --- the rules themselves --------------------------------------------------------------------------------------------


def test_lint(fresh):
    finished = fresh.snakemake("--lint")
    assert finished.returncode == 0, finished.stdout + finished.stderr


def pins(lines):
    return dict(re.findall(r"^(?:\s*- )?([\w-]+)==(\S+)", "\n".join(lines), re.MULTILINE))


ENVIRONMENTS = sorted((ROOT / "workflow/envs").glob("*.yaml"))


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_environments_pin_what_make_setup_installs(path):
    environment = yaml.safe_load(path.read_text())
    # conda 26.7 and later takes the word `nodefaults` for a channel.
    assert environment["channels"] == ["conda-forge"]
    python, pip, packages = environment["dependencies"]
    assert (python, pip) == ("python =3.11", "pip")
    assert pins(packages["pip"]).items() <= pins((ROOT / "requirements.txt").read_text().splitlines()).items()
    assert len(pins(packages["pip"])) == len(packages["pip"])


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_environments_hold_what_their_scripts_import(path):
    rules = "".join(file.read_text() for file in (ROOT / "workflow/rules").glob("*.smk"))
    blocks = [block for block in re.split(r"\nrule ", rules) if f"../envs/{path.name}" in block]
    scripts = {re.search(r'SCRIPTS / "(\w+\.py)"', block)[1] for block in blocks}
    assert scripts
    files = set().union(*(code_files(SCRIPTS, script) for script in scripts))
    imported = {name[0] for file in files for name in imported_names(SCRIPTS, file) if name}
    imported -= {*sys.stdlib_module_names, "stepdown"}
    # Snakemake's environment alone checks the configuration; triton comes with the torch that has a use for it.
    elsewhere = {"yaml", "jsonschema", "triton"}
    assert imported - elsewhere <= {name.replace("-", "_") for name in pins(path.read_text().splitlines())}
