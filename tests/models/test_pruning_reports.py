"""The report of a one-shot run as a file: what is missing in it, or cannot be, is one line that names the key."""

import json
from fractions import Fraction

import pytest

from stepdown.errors import UserError
from stepdown.models.pruning_reports import describe_checkpoint, describe_pruning, read_report
from stepdown.plan.runs import parse_run

NAME = "model.layers.0.mlp.up_proj"


def written(path, change=lambda report: None):
    run = parse_run("wanda-2of4", ["wanda"])
    report = describe_pruning(run, "abc", {NAME: (4, 8)}, {NAME: Fraction(1, 2)}, {NAME: 16})
    change(report)
    path.write_text(json.dumps(report))
    return path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda report: report.pop("run"), "key run is missing"),
        (lambda report: report.pop("base_model"), "key base_model is missing"),
        (lambda report: report.pop("matrices"), "key matrices is missing"),
        (lambda report: report.update(matrices={}), "key matrices is {}"),
        (lambda report: report.update(iteration="1"), 'key iteration is "1"'),
        (lambda report: report["sparsity"].pop("target"), "key sparsity.target is missing"),
        (lambda report: report["matrices"][NAME].pop("zeros"), f"key matrices.{NAME}.zeros is missing"),
        (lambda report: report["matrices"][NAME].update(shape=[4, None]), f"key matrices.{NAME}.shape[1] is null"),
        (lambda report: report.update(format="1"), 'key format is "1", not "stepdown one-shot 1"'),
    ],
)
def test_a_key_that_is_missing_or_wrong_is_named(change, told, tmp_path):
    path = written(tmp_path / "pruning.json", change)
    with pytest.raises(UserError) as error:
        read_report(path)
    assert str(error.value).startswith(f"{path}: not the report of a one-shot run: {told};")


@pytest.mark.parametrize("step", ["iter2", "oneshot/wanda-4of8"])
def test_a_report_is_of_its_step_alone(step, tmp_path):
    path = written(tmp_path / "pruning.json")
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"{path}: .* give the one of {step}"):
        describe_checkpoint(step, "model", path, tmp_path)
