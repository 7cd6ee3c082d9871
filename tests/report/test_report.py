"""The summary table and the figures, from made-up results of runs of every shape."""

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from stepdown.errors import UserError
from stepdown.report import curves, figures, summary, tier_pictures
from stepdown.report.drawing import as_svg, style
from stepdown.report.steps import TIERS, read_results

SCRIPTS = Path(__file__).parents[2] / "workflow/scripts"
CAPTIONS = Path(__file__).parents[2] / "workflow/report"
FIGURES = ("perplexity", "tier_shares", "tier_maps", "training")
TOKENS = 4096  # of one epoch
BASE = 20.0


# --- made-up results -------------------------------------------------------------------------------------------------


def make_run(folder, iterations=3, one_shots=("oneshot/three-tier",), epochs=2, texts=("pydoc",), grid=(4, 6)):
    """Results of a run below `folder`; returned are the lists of its files, in an order that is not the steps'."""
    make_step(folder, "iter0", (1, 0, 0), 0, texts, grid)
    for number in range(1, iterations + 1):
        share = number / (2 * iterations)
        make_step(folder, f"iter{number}", (1 - share, share / 2, share / 2), epochs, texts, grid)
    for step in one_shots:
        make_step(folder, step, (0.5, 0.25, 0.25), epochs * iterations, texts, grid)
    return {
        "evals": sorted(folder.rglob("eval.json"), reverse=True),
        "training": sorted(folder.rglob("training.json"), reverse=True),
        "tier_maps": sorted(folder.rglob("tier_map.safetensors"), reverse=True),
    }


def make_step(folder, step, shares, epochs, texts, grid):
    place = folder / step
    place.mkdir(parents=True)
    sparsity = 0.5 * shares[1] + 0.96 * shares[2]
    perplexity = {"base": BASE, "pruned": BASE * (1 + 8 * sparsity), "finetuned": BASE * (1 + sparsity)}
    if step == "iter0":
        perplexity = {"base": BASE}
    elif epochs == 0:
        del perplexity["finetuned"]
    record = {
        "step": step,
        "model": "resources/pydoc-llama",
        "perplexity": dict.fromkeys(texts, perplexity),
        "pruning": {"method": "wanda", "pattern": "three-tier", "layers": "uniform"},
        "sparsity": {"overall": sparsity},
        "tier_shares": dict(zip(TIERS, shares, strict=True)),
    }
    write(place / "eval.json", record | {"finetuning": {"method": "full", "epochs": epochs, "tokens": epochs * TOKENS}})
    if step != "iter0":
        log = [{"step": 0, "eval_loss": 4.0}] if epochs else []
        log += [{"step": number, "loss": 4 - 0.1 * number} for number in range(1, 4 * epochs + 1)]
        log += [{"step": 4 * epochs, "eval_loss": 3.0}] if epochs else []
        training = {"step": step, "epochs": epochs, "tokens": epochs * TOKENS, "steps": 4 * epochs, "log": log}
        write(place / "training.json", training)
    tiers = np.random.default_rng(0).choice(3, p=shares, size=grid).astype(np.uint8)
    linears = [f"model.layers.{layer}.{name}" for layer in range(3) for name in ("mlp.down_proj", "mlp.up_proj")]
    save_file(dict.fromkeys(linears, tiers), place / "tier_map.safetensors", {"format": "stepdown tier map 1"})


def write(path, content):
    path.write_text(json.dumps(content))


def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    write(path, record)


def run_script(script, files, *options):
    command = [sys.executable, SCRIPTS / script, "--evals", *files["evals"], *options]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def read(files):
    """The results, once the training logs are known to belong to them."""
    results = read_results(files["evals"])
    curves.read_curves(files["training"], *results.values())
    return results


def drawn(files):
    """Every figure of a run as SVG."""
    results = read_results(files["evals"])
    steps = next(iter(results.values()))
    maps = tier_pictures.read_tier_maps(files["tier_maps"], steps.index)
    with style():
        return {
            "perplexity": as_svg(figures.perplexity(results)),
            "tier_shares": as_svg(figures.tier_shares(steps)),
            "tier_maps": as_svg(tier_pictures.tier_maps(*maps)),
            "training": as_svg(curves.training(steps, curves.read_curves(files["training"], steps))),
        }


# --- the table -------------------------------------------------------------------------------------------------------


def test_rows_come_in_order_with_achieved_numbers(tmp_path):
    files = make_run(tmp_path, iterations=12)
    table = summary.table(read(files))
    assert list(table.index) == ["iter0", *(f"iter{n}" for n in range(1, 13)), "oneshot/three-tier"]
    last, one_shot = table.iloc[-2], table.iloc[-1]
    assert (last["dense"], last["mid_2_4"], last["topk"]) == (0.5, 0.25, 0.25)
    assert last["sparsity"] == pytest.approx(0.365)
    assert last["perplexity_pydoc_pruned"] == pytest.approx(20 * 3.92)
    assert last["difference_percent_pydoc_pruned"] == pytest.approx(292)
    assert last["difference_percent_pydoc_finetuned"] == pytest.approx(36.5)
    assert (last["epochs"], last["tokens"], last["total_tokens"]) == (2, 2 * TOKENS, 24 * TOKENS)
    assert (one_shot["epochs"], one_shot["tokens"], one_shot["total_tokens"]) == (24, 24 * TOKENS, 24 * TOKENS)


def test_base_row_has_its_one_perplexity_in_both_columns(tmp_path):
    base = summary.table(read(make_run(tmp_path))).iloc[0]
    assert base["perplexity_pydoc_pruned"] == base["perplexity_pydoc_finetuned"] == BASE
    assert base["difference_percent_pydoc_finetuned"] == base["total_tokens"] == 0


def test_script_writes_csv_in_full_precision_and_prints_a_table_that_fits(tmp_path):
    files = make_run(tmp_path, texts=("pydoc", "wikitext2"))
    edit(tmp_path / "iter2/eval.json", lambda record: record["sparsity"].update(overall=1 / 3))
    done = run_script("summarize.py", files, "--output", tmp_path / "summary.csv")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "summary.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert float(table[2]["sparsity"]) == 1 / 3
    assert list(table[0])[:5] == ["step", "dense", "mid_2_4", "topk", "sparsity"]
    assert list(table[0])[-3:] == ["epochs", "tokens", "total_tokens"]
    assert "perplexity_wikitext2_finetuned" in table[0]
    assert max(map(len, done.stdout.splitlines())) <= summary.TERMINAL_WIDTH
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("finetuned", "expected"),
    [
        (27.3, "On pydoc iter3 and oneshot/three-tier ended level at 27.30, both at 24,576 tokens."),
        (24.57, "On pydoc oneshot/three-tier ended 10.0% lower than iter3: 24.57 vs 27.30, both at 24,576 tokens."),
        (30.0, "On pydoc iter3 ended 9.0% lower than oneshot/three-tier: 27.30 vs 30.00, both at 24,576 tokens."),
    ],
)
def test_verdict_names_the_lower_the_margin_and_the_budget(tmp_path, finetuned, expected):
    results = read(make_run(tmp_path))
    results["pydoc"].loc[["iter3", "oneshot/three-tier"], "finetuned"] = 27.3, finetuned
    assert summary.verdict(results) == expected


def test_verdict_says_when_budgets_or_sparsity_differ(tmp_path):
    results = read(make_run(tmp_path))
    results["pydoc"].loc["oneshot/three-tier", ["total_tokens", "sparsity", "finetuned"]] = 5, 0.5, 100.0
    assert "at 24,576 vs 5 tokens, with 36.5% vs 50.0% zeros." in " ".join(summary.verdict(results).split())


def test_without_one_shot_the_last_iteration_stands_beside_the_base(tmp_path):
    results = read(make_run(tmp_path, one_shots=()))
    assert "iter3 ended 36.5% above the base model: 27.30 vs 20.00" in summary.verdict(results)


def test_without_finetuning_finetuned_is_pruned(tmp_path):
    table = summary.table(read(make_run(tmp_path, epochs=0)))
    assert table.perplexity_pydoc_finetuned.equals(table.perplexity_pydoc_pruned)
    assert table.total_tokens.iloc[-1] == 0


# --- the figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"iterations": 1, "grid": (1, 1)},
        {"iterations": 1, "one_shots": ()},
        {"iterations": 0, "one_shots": ()},
        {"iterations": 0, "epochs": 1},
        {"epochs": 0},
        {"iterations": 100, "one_shots": ("oneshot/a", "oneshot/b"), "grid": (64, 16)},
        {"texts": ("pydoc", "wikitext2", "a $text$ of one's own"), "grid": (70, 65)},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error")
def test_runs_of_every_shape_are_drawn(tmp_path, shape):
    for name, svg in drawn(make_run(tmp_path, **shape)).items():
        assert svg.rstrip().endswith("</svg>"), name


@pytest.mark.filterwarnings("error")
def test_a_model_that_broke_is_drawn(tmp_path):
    files = make_run(tmp_path)
    edit(tmp_path / "iter2/eval.json", lambda record: record["perplexity"]["pydoc"].update(pruned=math.inf))
    edit(tmp_path / "iter3/eval.json", lambda record: record["perplexity"]["pydoc"].update(finetuned=math.nan))
    drawn(files)
    table = summary.as_text(read(files)).splitlines()
    assert "inf" in table[4] and "inf" in table[5]
    assert summary.verdict(read(files)).startswith("On pydoc oneshot/three-tier ended 100.0% lower than iter3")


def test_points_stand_where_their_values_are(tmp_path):
    results = read(make_run(tmp_path, one_shots=("oneshot/a", "oneshot/b")))
    (axes,) = figures.perplexity(results).axes
    lines = [line for line in axes.lines if line.get_transform() == axes.transData]
    drawn_at = {tuple(point) for line in lines for point in line.get_xydata() if line.get_linestyle() == "None"}
    pruned = results["pydoc"].iloc[1:]
    values = [*zip(pruned.sparsity, pruned.pruned, strict=True), *zip(pruned.sparsity, pruned.finetuned, strict=True)]
    assert drawn_at == {(100 * sparsity, perplexity) for sparsity, perplexity in values}


def test_what_mends_before_finetuning_is_in_table_and_figure(tmp_path):
    files = make_run(tmp_path, epochs=0, one_shots=())
    mended = {"refitted": 80.0, "reconstructed": 70.0}
    for step in ("iter1", "iter2", "iter3"):
        edit(tmp_path / step / "eval.json", lambda record: record["perplexity"]["pydoc"].update(mended))
    results = read(files)
    assert list(summary.table(results).perplexity_pydoc_reconstructed[1:]) == [70.0] * 3
    # Without finetuning the last model is the one that was mended last.
    assert list(results["pydoc"].finetuned[1:]) == [70.0] * 3
    (axes,) = figures.perplexity(results).axes
    key = [text.get_text() for text in axes.get_legend().get_texts()]
    assert key == ["after pruning", "after refitting", "after reconstruction"]
    assert {("D", 80.0), ("s", 70.0)} <= {(line.get_marker(), line.get_ydata()[0]) for line in axes.lines}


def test_a_block_is_a_pixel_however_large_the_map(tmp_path):
    svg = drawn(make_run(tmp_path, iterations=2, grid=(256, 688)))["tier_maps"]
    assert len(re.findall(r'<image [^>]*width="688" height="256"', svg)) == 3


def test_the_matrix_shown_is_the_largest_of_the_middle_layer():
    shapes = {"lm.0.fc1": (4, 9), "lm.1.q": (4, 4), "lm.1.fc2": (4, 9), "lm.1.fc1": (9, 4), "lm.2.fc1": (9, 9)}
    assert tier_pictures.middle_matrix(shapes) == "lm.1.fc1"
    assert tier_pictures.middle_matrix({f"h.{layer}.w": (1, 1) for layer in range(12)}) == "h.6.w"


def test_tier_maps_follow_the_steps_not_the_command_line(tmp_path):
    files = make_run(tmp_path)
    matrix, maps = tier_pictures.read_tier_maps(files["tier_maps"], read(files)["pydoc"].index)
    assert matrix == "model.layers.1.mlp.down_proj"
    assert list(maps) == ["iter0", "iter1", "iter2", "iter3", "oneshot/three-tier"]


# --- the same again --------------------------------------------------------------------------------------------------


def test_scripts_write_the_same_bytes_again_whatever_the_order_and_the_users_settings(tmp_path, monkeypatch):
    files = make_run(tmp_path / "results")
    written = []
    for turn in ("first", "second"):
        folder = tmp_path / turn
        table = run_script("summarize.py", files, "--output", folder / "summary.csv")
        more = ["--training", *files["training"], "--tier-maps", *files["tier_maps"]]
        plots = run_script("plot.py", files, *more, "--output-folder", folder / "figures", "--log", folder / "log")
        assert (table.returncode, plots.returncode) == (0, 0), table.stderr + plots.stderr
        assert {path.name for path in (folder / "figures").iterdir()} == {f"{name}.svg" for name in FIGURES}
        written.append([table.stdout, *(path.read_bytes() for path in sorted(folder.rglob("*.*")))])
        files = {kind: paths[::-1] for kind, paths in files.items()}
        (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 20\n")
        monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path / "matplotlibrc"))
    assert written[0] == written[1]


def test_the_report_needs_no_torch():
    """Its environment has none."""
    rooms = "comparison, curves, figures, summary, tier_pictures"
    code = (
        f"import sys; from stepdown import cli; from stepdown.report import {rooms}; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS).returncode == 0


# --- what cannot be told ---------------------------------------------------------------------------------------------


def only_the_base(record):
    """An evaluation of a model that was not finetuned, of which no moment is left to stand for that."""
    record["finetuning"]["epochs"] = 0
    record["perplexity"] = {"pydoc": {"base": BASE}}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.write_text("{"), "iter2/eval.json: not an evaluation: no JSON (Expecting"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "iter2/eval.json: not an evaluation: no JSON ('utf-8'"),
        (lambda path: write(path, []), "iter2/eval.json: not an evaluation: all of it is []"),
        (
            lambda path: edit(path, lambda record: record.pop("tier_shares")),
            "iter2/eval.json: not an evaluation: key tier_shares is missing",
        ),
        (lambda path: edit(path, lambda record: record["sparsity"].clear()), "key sparsity.overall is missing"),
        (
            lambda path: edit(path, lambda record: record["perplexity"]["pydoc"].pop("finetuned")),
            "key perplexity.pydoc.finetuned is missing",
        ),
        (
            lambda path: edit(path, lambda record: record["perplexity"]["pydoc"].update(pruned=None)),
            "key perplexity.pydoc.pruned is null",
        ),
        (
            lambda path: edit(path, lambda record: record["perplexity"]["pydoc"].update(base=0)),
            "a perplexity of 0 on pydoc cannot be",
        ),
        (lambda path: edit(path, lambda record: record["perplexity"]["pydoc"].update(base=21.0)), "disagree"),
        (lambda path: edit(path, lambda record: record["perplexity"].clear()), "key perplexity is {}"),
        (
            lambda path: edit(
                path, lambda record: record["perplexity"].update(c4={"base": 9, "pruned": 9, "finetuned": 9})
            ),
            "different texts",
        ),
        (
            lambda path: edit(path.parents[1] / "iter0/eval.json", lambda record: record["perplexity"].clear()),
            "iter0/eval.json: not an evaluation: key perplexity is {}",
        ),
        (lambda path: edit(path, only_the_base), "key perplexity.pydoc.pruned is missing"),
        (lambda path: edit(path, lambda record: record.update(step=3)), "key step is 3;"),
        (
            lambda path: edit(path, lambda record: record["finetuning"].update(tokens="many")),
            'key finetuning.tokens is "many";',
        ),
        (
            lambda path: edit(path, lambda record: record["finetuning"].update(tokens=None)),
            "key finetuning.tokens is null;",
        ),
        (lambda path: edit(path, lambda record: record.update(model="another")), "different models"),
        (lambda path: edit(path, lambda record: record.update(step="iter1")), "a second evaluation of iter1"),
        (lambda path: edit(path, lambda record: record.update(step="iter7")), "evaluation of iter2 is missing"),
        (lambda path: edit(path, lambda record: record["finetuning"].update(tokens=1)), "differ in tokens"),
        (
            lambda path: path.with_name("training.json").write_text(""),
            "iter2/training.json: not a training log",
        ),
        (
            lambda path: edit(path.with_name("training.json"), lambda record: record.update(log=3)),
            "not a training log",
        ),
        (
            lambda path: edit(path.with_name("training.json"), lambda record: record.pop("steps")),
            "key steps is missing",
        ),
    ],
)
def test_bad_results_are_named_in_one_line(tmp_path, damage, expected):
    files = make_run(tmp_path)
    damage(tmp_path / "iter2/eval.json")
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        read(files)
    assert "\n" not in str(error.value)


def test_a_training_log_of_no_step_is_named(tmp_path):
    files = make_run(tmp_path)
    files["evals"] = [path for path in files["evals"] if "oneshot" not in str(path)]
    with pytest.raises(UserError, match="oneshot/three-tier, which has no eval"):
        read(files)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (None, "no tier map to draw"),
        ({}, "no tier map to draw"),
        ({"model.layers.9.other": np.zeros((2, 2), np.uint8)}, "no tier map to draw"),
        ({"model.layers.1.mlp.down_proj": np.full((2, 2), 3, np.uint8)}, "not a tier map"),
        ({"model.layers.1.mlp.down_proj": np.zeros((2, 2), np.float32)}, "not a tier map"),
    ],
    ids=["garbage", "empty", "another model's", "a fourth tier", "not uint8"],
)
def test_a_bad_tier_map_is_named_in_one_line(tmp_path, tensors, expected):
    files = make_run(tmp_path)
    bad = tmp_path / "iter2/tier_map.safetensors"
    bad.write_bytes(b"no tensors") if tensors is None else save_file(tensors, bad)
    with pytest.raises(UserError, match=expected) as error:
        tier_pictures.read_tier_maps([tmp_path / "iter1/tier_map.safetensors", bad], read(files)["pydoc"].index)
    assert str(bad) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tier_map_elsewhere_is_named(tmp_path):
    files = make_run(tmp_path)
    (tmp_path / "iter9").mkdir()
    stray = files["tier_maps"][0].rename(tmp_path / "iter9/tier_map.safetensors")
    with pytest.raises(UserError, match="folder of no step"):
        tier_pictures.read_tier_maps([stray], read(files)["pydoc"].index)


def test_scripts_fail_in_one_line_and_keep_what_was_there(tmp_path):
    files = make_run(tmp_path)
    (tmp_path / "iter2/eval.json").write_text("garbled")
    (tmp_path / "summary.csv").write_text("before")
    for done in (
        run_script("summarize.py", files, "--output", tmp_path / "summary.csv"),
        run_script("plot.py", files, "--output-folder", tmp_path / "figures"),
    ):
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"error: .*iter2/eval\.json: not an evaluation: .*\n", done.stderr)
    assert (tmp_path / "summary.csv").read_text() == "before"


# --- captions --------------------------------------------------------------------------------------------------------


def first_page(overlay, **changes):
    """What the report says with an overlay over the default, and sections of it changed."""
    jinja2, yaml = pytest.importorskip("jinja2"), pytest.importorskip("yaml")
    config, over = (
        yaml.safe_load((SCRIPTS.parents[1] / f"config/{name}.yaml").read_text()) for name in ("config", overlay)
    )
    for layer in (over, changes):
        config |= {key: config[key] | layer[key] if isinstance(layer[key], dict) else layer[key] for key in layer}
    return (
        jinja2.Environment().from_string((CAPTIONS / "workflow.rst").read_text()).render(snakemake={"config": config})
    )


@pytest.mark.parametrize("overlay", ["config", "published", "llama2-7b", "smollm2-135m"])
def test_the_first_page_says_which_method_it_is(overlay):
    page = first_page(overlay)
    assert ("This is the original method." in page) == (overlay == "published")
    assert ("This is the method as improved here, not the original." in page) == (overlay != "published")
    assert ("a block may take back a weight for another" in page) == (overlay != "published")


@pytest.mark.parametrize(
    "change",
    [
        {"sort_channels": True},
        {"refit": True},
        {"pruning": {"cost": "fisher"}},
        {"pruning": {"shared_over": "model"}},
        {"pruning": {"target": {"sparsity": 0.5}}},
        {"pruning": {"selection": "wanda"}},
        {"recovery": {"one_schedule": True}},
    ],
)
def test_the_original_method_with_anything_added_is_not_the_original(change):
    assert "not the original" in first_page("published", **change)


@pytest.mark.parametrize("schedule", ["config/progressive_schedule.csv", None])
@pytest.mark.parametrize("name", [*FIGURES, "comparison", "compare", "summary", "workflow"])
def test_captions_render_as_the_report_renders_them(name, schedule):
    jinja2 = pytest.importorskip("jinja2")
    core = pytest.importorskip("docutils.core")
    text = {"train": "/home/someone/a.txt", "test": "/home/someone/b.txt"}
    config = {
        "model": "/home/someone/model/",
        "schedule": schedule,
        "oneshot": ["three-tier"],
        "pruning": {
            "block_size": 16,
            "k": 10,
            "selection": "wanda",
            "cost": "fisher",
            "shared_over": "model",
            "target": None,
        },
        "sort_channels": True,
        "calibration": {"text": text, "samples": 128, "sequence_length": 256},
        "refit": True,
        "swaps": True,
        "reconstruction": {"enabled": True},
        "recovery": {"text": "pydoc", "method": "full", "distill": {"weight": 0.9}, "one_schedule": True},
        "evaluation": {"texts": ["pydoc", text], "sequence_length": 256},
    }
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    caption = (CAPTIONS / f"{name}.rst").read_text()
    rendered = environment.from_string(caption).render(snakemake={"config": config})
    # Anything docutils complains of is an error here.
    html = core.publish_parts(rendered, writer="html", settings_overrides={"halt_level": 1})["html_body"]
    assert "{" not in html
    assert "someone" not in html


# --- the comparison of all runs --------------------------------------------------------------------------------------


def add_run(folder, name, method, pattern, sparsity, perplexity, layers="uniform"):
    """A one-shot run without tiers and without finetuning."""
    record = {
        "step": name,
        "model": "resources/pydoc-llama",
        "pruning": {"method": method, "pattern": pattern, "layers": layers},
        "perplexity": {"pydoc": {"base": BASE, "pruned": perplexity}},
        "sparsity": {"overall": sparsity},
        "finetuning": {"method": "full", "epochs": 0, "tokens": 0},
    }
    (folder / name).mkdir(parents=True)
    write(folder / name / "eval.json", record)
    return folder / name / "eval.json"


def add_benchmark(folder, step, rule, seconds, memory):
    (folder / step).mkdir(parents=True, exist_ok=True)
    (folder / step / f"{rule}.jsonl").write_text(json.dumps({"s": seconds, "max_rss": memory}) + "\n")


@pytest.fixture
def compared(tmp_path):
    """The files of two iterations, the three-tier run and three runs beside them, with what the jobs cost."""
    files = make_run(tmp_path, iterations=2)
    runs = [("wanda-2of4", "wanda", "2of4", 0.5, 30.0), ("wanda-1of4", "wanda", "1of4", 0.75, 90.0)]
    runs += [("sparsegpt-2of4", "sparsegpt", "2of4", 0.5, 25.0)]
    for name, *values in runs:
        files["evals"].append(add_run(tmp_path, f"oneshot/{name}", *values))
    for step in ("iter1", "iter2"):
        for rule, *cost in (("calibrate", 10, 300), ("score", 1, None), ("finetune", 50, 900), ("evaluate", 9, 9999)):
            add_benchmark(tmp_path / "benchmarks", step, rule, *cost)
        # What is made of a finished model is no cost of it.
        for rule in ("pack", "pack_integers_int4", "gguf", "gguf_q8_0"):
            add_benchmark(tmp_path / "benchmarks", step, rule, 1000, 9999)
    add_benchmark(tmp_path / "benchmarks", "oneshot/three-tier", "degrade_2_4_to_topk", 2, 100)
    add_benchmark(tmp_path / "benchmarks", "oneshot/wanda-2of4", "prune_oneshot", 7, 250)
    return files


def compare(folder, files, *arguments):
    outputs = ["--output", folder / "compare.csv", "--output-figure", folder / "comparison.svg"]
    command = [
        sys.executable,
        SCRIPTS / "compare.py",
        "--evals",
        *files["evals"],
        "--benchmarks",
        folder / "benchmarks",
    ]
    return subprocess.run([str(word) for word in [*command, *outputs, *arguments]], capture_output=True, text=True)


def test_a_model_without_memory_is_measured_without_decoding(compared, tmp_path):
    sizes = {"parameters": 1000, "nonzeros": 500, "bytes": 2000, "packed_bytes": None}
    speed = {"tokens_per_second": {"prefill": 90}, "dense_tokens_per_second": {"prefill": 90}}
    write(tmp_path / "measurements.json", {"steps": {"iter0": sizes | speed}})
    finished = compare(tmp_path, compared, "--measurements", tmp_path / "measurements.json")
    assert finished.returncode == 0, finished.stderr
    assert "prefill /s" in finished.stdout and "decode" not in finished.stdout


def test_all_runs_are_compared(compared, tmp_path):
    tasks = {"step": "oneshot/wanda-2of4", "tasks": {"arc": {"acc": 0.25}}}
    write(tmp_path / "zero_shot.json", tasks)
    sizes = {"parameters": 1000, "nonzeros": 500, "bytes": 2000, "packed_bytes": None}
    speeds = {"iter0": {"prefill": 90, "decode": 40}, "oneshot/wanda-2of4": {"prefill": 45, "decode": 50}}
    dense = {"dense_tokens_per_second": speeds["iter0"]}
    speeds["iter2/packed/int8"] = {"prefill": 30, "decode": 80}
    measured = {step: sizes | dense | {"tokens_per_second": speed} for step, speed in speeds.items()}
    measured["iter2/packed/int8"]["bytes"] = 700
    write(tmp_path / "measurements.json", {"steps": measured})
    files = {flag: tmp_path / f"{flag.replace('-', '_')}.json" for flag in ("zero-shot", "measurements")}
    finished = compare(tmp_path, compared, *(word for flag, file in files.items() for word in (f"--{flag}", file)))
    assert finished.returncode == 0, finished.stderr
    with (tmp_path / "compare.csv").open() as file:
        table = {row["run"]: row for row in csv.DictReader(file)}
    assert next(iter(table)) == "iter0" and len(table) == 8
    packed = table["iter2/packed/int8"]
    assert [packed[key] for key in ("method", "perplexity_pydoc_finetuned", "finetuning_tokens")] == ["", "", ""]
    assert [float(packed[key]) for key in ("bytes_per_weight", "decode_to_dense")] == [0.7, 2]
    row = table["oneshot/wanda-2of4"]
    assert (row["method"], row["pattern"], float(row["sparsity"])) == ("wanda", "2of4", 0.5)
    assert float(row["perplexity_pydoc_pruned"]) == float(row["perplexity_pydoc_finetuned"]) == 30
    assert (float(row["difference_pydoc"]), float(row["difference_percent_pydoc"])) == (10, pytest.approx(50))
    assert (float(row["pruning_seconds"]), row["finetuning_seconds"], float(row["peak_memory_mb"])) == (7, "", 250)
    assert [row[key] for key in sizes] == ["1000", "500", "2000", ""]
    assert [float(row[f"{kind}_to_dense"]) for kind in ("prefill", "decode")] == [0.5, 1.25]
    assert table["iter1"]["bytes"] == "" and "1,000" in finished.stdout and "1.25x" in finished.stdout
    assert float(row["arc_acc"]) == 0.25 and table["iter0"]["arc_acc"] == ""
    # The iterations' costs add up; the three-tier run has the first iteration's statistics. Evaluating costs nobody.
    chain, beside = table["iter2"], table["oneshot/three-tier"]
    assert [float(chain[key]) for key in ("pruning_seconds", "finetuning_seconds", "peak_memory_mb")] == [22, 100, 900]
    assert float(beside["pruning_seconds"]) == 13 and float(beside["peak_memory_mb"]) == 300
    told = finished.stdout
    told, _, speed = told.partition("size and speed")
    assert "packed/int8" not in told and "packed/int8" in speed
    assert told.index("sparsegpt-2of4") < told.index("wanda-2of4"), "best first at equal sparsity"
    assert max(map(len, told.splitlines())) <= 120
    assert (tmp_path / "comparison.svg").read_text().startswith("<?xml")


def test_a_line_joins_what_differs_in_sparsity_only(compared, tmp_path):
    runs = ["gradual/wanda-2of4", "gradual/wanda-1of4", "quantised/int8/iter1", "quantised/int8/iter2"]
    runs += ["quantised/int8/oneshot/wanda-2of4"]
    for place, run in enumerate(runs):
        method, pattern = ("wanda", run[-4:]) if run.startswith("gradual") else ("nearest", "")
        layers = "uniform" if run.startswith("gradual") else "quantised"
        compared["evals"].append(add_run(tmp_path, run, method, pattern, 0.1 * place, 30.0 + place, layers))
    results = read_results(compared["evals"], tiers=False)
    (axes,) = figures.comparison(results).axes
    joined = [list(line.get_xdata()) for line in axes.lines if line.get_alpha() == 0.5 and len(line.get_xdata()) > 1]
    assert [pytest.approx([20, 30])] == [each for each in joined if each[0] == pytest.approx(20)]
    steps = next(iter(results.values()))[1:]
    assert dict(figures._methods(steps))["gradual/wanda-2of4"] == "gradual wanda"
    assert dict(figures._patterns(steps))["quantised/int8/iter2"] == "quantised"
    assert dict(figures._patterns(steps))[runs[-1]] == "quantised of oneshot/wanda-2of4"


def test_a_broken_file_of_the_comparison_is_named(compared, tmp_path):
    bad = tmp_path / "benchmarks/iter1/calibrate.jsonl"
    bad.write_text("no json")
    finished = compare(tmp_path, compared)
    assert finished.returncode == 1 and f"{bad}: not a benchmark file" in finished.stderr
    add_benchmark(tmp_path / "benchmarks", "iter1", "calibrate", 1, 1)
    write(tmp_path / "zero_shot.json", {"tasks": []})
    finished = compare(tmp_path, compared, "--zero-shot", tmp_path / "zero_shot.json")
    assert finished.returncode == 1 and "zero_shot.json: not the result of zero_shot.py" in finished.stderr
    write(tmp_path / "measurements.json", {"steps": {"iter0": {}}})
    finished = compare(tmp_path, compared, "--measurements", tmp_path / "measurements.json")
    assert finished.returncode == 1 and "measurements.json: not the result of measure.py" in finished.stderr
