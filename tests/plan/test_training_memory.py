"""What training takes of a GPU: as the documentation says, as the shipped configuration has it, and told when it is too
much."""

import json
import re
import shutil

import pytest
import yaml
from conftest import REPOSITORY

from stepdown.errors import UserError
from stepdown.plan import preflight
from stepdown.plan.training_memory import ModelSize, TrainingPlan, check_memory, read_model_size, training_bytes

LLAMA_2 = {
    "7 B": ModelSize(6_738_415_616, 6_476_005_376, 32, 4096, 11008, 32000),
    "13 B": ModelSize(13_015_864_320, 12_687_769_600, 40, 5120, 13824, 32000),
    "70 B": ModelSize(68_976_648_192, 68_451_041_280, 80, 8192, 28672, 32000),
}
CHECKPOINTED = {"batch_size": 4, "sequence_length": 2048, "gradient_checkpointing": True}


def gigabytes(model: str, **plan) -> float:
    return sum(training_bytes(LLAMA_2[model], TrainingPlan(**(CHECKPOINTED | plan))).values()) / 1e9


def test_the_table_of_the_documentation_is_what_is_computed():
    row = re.compile(r"^\| (\d+ B) \| `(full|lora)`, `(full|low)` \| (\d+) \| (\d+) \| (\d+) \|$", re.MULTILINE)
    rows = row.findall((REPOSITORY / "config/README.md").read_text())
    assert len(rows) == 12
    for model, method, memory, *written in rows:
        for processes, value in zip((1, 2, 8), written, strict=True):
            plan = {"method": method, "memory": memory, "processes": processes, "sharded": processes > 1}
            assert round(gigabytes(model, **plan)) == int(value), (model, plan)


def test_the_shipped_configuration_of_a_7b_model_fits_a_gpu_of_80_gb():
    recovery = yaml.safe_load((REPOSITORY / "config/llama2-7b.yaml").read_text())["recovery"]
    asked = ("method", "memory", "batch_size", "sequence_length", "processes", "sharded", "gradient_checkpointing")
    assert recovery["distill"]["weight"] > 0 and recovery["method"] == "full"
    assert gigabytes("7 B", **{key: recovery[key] for key in asked}) < 75


@pytest.mark.parametrize(
    ("model", "changed", "told"),
    [
        ("7 B", {}, "takes 147.0 GB of a GPU, there are 80.0: set memory: low"),
        ("7 B", {"gradient_checkpointing": False}, "set gradient_checkpointing: true, memory: low"),
        ("13 B", {"memory": "low"}, "set batch_size: 1, method: lora"),
        ("70 B", {}, "set memory: low, batch_size: 1, method: lora, processes: 8, sharded: true"),
        ("70 B", {"processes": 8, "sharded": True, "memory": "low"}, "set batch_size: 1, method: lora"),
    ],
)
def test_what_cannot_fit_is_told_with_what_to_change(model, changed, told):
    plan = TrainingPlan(**(CHECKPOINTED | {"method": "full", "memory": "full"} | changed))
    with pytest.raises(UserError, match=re.escape(told)):
        check_memory(LLAMA_2[model], plan, 80_000_000_000)


def test_the_files_of_a_model_tell_its_size():
    size = read_model_size(REPOSITORY / "resources/pydoc-llama")
    config = json.loads((REPOSITORY / "resources/pydoc-llama/config.json").read_text())
    assert (size.layers, size.hidden) == (config["num_hidden_layers"], config["hidden_size"])
    norms = (2 * size.layers + 1) * size.hidden
    assert size.parameters == size.matrices + size.vocabulary * size.hidden + norms  # its head is tied


@pytest.mark.parametrize(
    "experts, intermediate",
    [
        ({"num_experts_per_tok": 2}, 2 * 688),
        ({"num_experts_per_tok": 4, "moe_intermediate_size": 96, "n_shared_experts": 2}, 6 * 96),
        ({"num_experts_per_tok": 4, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 200}, 584),
        ({"num_experts_per_tok": [2, 2]}, 688),
    ],
)
def test_a_token_goes_through_several_experts(tmp_path, experts, intermediate):
    folder = REPOSITORY / "resources/pydoc-llama"
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 688} | experts
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert read_model_size(tmp_path / "model").intermediate == intermediate


def test_it_is_told_before_the_first_job(monkeypatch):
    recovery = preflight.complete_config(
        {}, yaml.safe_load((REPOSITORY / "workflow/schemas/config.schema.yaml").read_text())
    )["recovery"]
    monkeypatch.setattr(preflight, "visible_gpus", lambda: ["GPU-0"])
    for found, fits in ([], True), ([8 << 30], True), ([1 << 20, 2 << 20], False):
        monkeypatch.setattr(preflight, "memory_of_gpus", lambda found=found: found)
        if fits:
            preflight.check_training_memory(recovery, REPOSITORY / "resources/pydoc-llama")
        else:
            with pytest.raises(UserError, match="recovery: training takes"):
                preflight.check_training_memory(recovery, REPOSITORY / "resources/pydoc-llama")
