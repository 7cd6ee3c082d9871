"""Where the files of a step are, by its name."""

import pytest

from stepdown.plan.steps import compression_report, is_run, masks, model_of, model_ready, source

MODELS = {
    "iter0": ("results/iter0/tier_map.safetensors", "results/iter0/model"),
    "iter12": ("results/iter12/finetuned_model/model.safetensors.index.json", "results/iter12/finetuned_model"),
    "oneshot/wanda-2of4": (
        "results/oneshot/wanda-2of4/finetuned_model/model.safetensors.index.json",
        "results/oneshot/wanda-2of4/finetuned_model",
    ),
    "structured/shortgpt-2": (
        "results/structured/shortgpt-2/model/model.safetensors.index.json",
        "results/structured/shortgpt-2/model",
    ),
    "quantised/gptq4-g8/iter1": (
        "results/quantised/gptq4-g8/iter1/model/model.safetensors.index.json",
        "results/quantised/gptq4-g8/iter1/model",
    ),
    "dynamic/greedy-0.5/iter0": ("results/iter0/tier_map.safetensors", "results/iter0/model"),
    "dynamic/greedy-0.5/gradual/wanda-2of4": (
        "results/gradual/wanda-2of4/finetuned_model/model.safetensors.index.json",
        "results/gradual/wanda-2of4/finetuned_model",
    ),
}


@pytest.mark.parametrize("step", MODELS)
def test_a_model_is_where_its_last_file_says(step):
    ready, folder = MODELS[step]
    assert model_ready(step) == ready
    assert model_of(ready) == folder


def test_a_model_is_found_below_a_prefix():
    assert model_of("pre/results/iter0/tier_map.safetensors") == "pre/results/iter0/model"
    assert model_of("pre/results/iter1/refitted_model/model.safetensors.index.json") == (
        "pre/results/iter1/refitted_model"
    )


@pytest.mark.parametrize(
    ("step", "run", "file"),
    [
        ("iter3", False, "results/iter3/tier_map.safetensors"),
        ("oneshot/three-tier", False, "results/oneshot/three-tier/tier_map.safetensors"),
        ("oneshot/wanda-2of4", True, "results/oneshot/wanda-2of4/pruning.json"),
        ("gradual/wanda-2of4", True, "results/gradual/wanda-2of4/pruning.json"),
    ],
)
def test_masks_are_a_tier_map_or_a_report(step, run, file):
    assert (is_run(step), masks(step)) == (run, file)


def test_compressed_steps_name_their_source_and_their_report():
    assert source("quantised/gptq4-g8/oneshot/wanda-2of4") == "oneshot/wanda-2of4"
    assert compression_report("structured/shortgpt-2") == "results/structured/shortgpt-2/pruning.json"
    assert compression_report("quantised/int8/iter1") == "results/quantised/int8/iter1/quantisation.json"
    assert compression_report("dynamic/uniform-0.5/iter0") == "results/dynamic/uniform-0.5/iter0/thresholds.json"
