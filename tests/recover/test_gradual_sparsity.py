"""Sparsity that rises while a model trains: step by step, never back, and exact in the end."""

import json
from fractions import Fraction

import pytest
import torch
from families import VOCABULARY, make_model
from hypothesis import given
from hypothesis import strategies as st

import prune_gradually
from stepdown.errors import UserError
from stepdown.models.checkpoint import Checkpoint
from stepdown.models.decoder import open_decoder
from stepdown.models.step_masks import read_step_masks
from stepdown.plan.runs import parse_gradual
from stepdown.recover.gradual_sparsity import GradualSettings, cubic, keep_rising, last_mask, prune_while_training
from stepdown.tensors.patterns import n_of_m, unstructured

TOKENS = torch.randint(0, VOCABULARY, (48, 16), generator=torch.Generator().manual_seed(1))


def test_the_schedule_is_cubic():
    assert [cubic(time) for time in (0, 0.5, 1, 2)] == [0, 0.875, 1, 1]


@given(st.integers(0, 99), st.sampled_from([n_of_m(2, 4), n_of_m(1, 4), unstructured(Fraction(3, 5))]))
def test_masks_only_grow_and_end_as_the_pattern_says(seed, pattern):
    saliency = torch.rand(12, 32, generator=torch.Generator().manual_seed(seed))
    final = pattern.keep(saliency)
    before = torch.ones_like(final)
    for share in (0, 0.2, 0.5, 0.9, 1):
        keep = keep_rising(saliency, final, share)
        assert (keep <= before).all() and (keep >= final).all()
        assert (~keep).sum() == int((~final).sum() * share)
        dropped, left = saliency[~keep], saliency[keep & ~final]
        assert not len(dropped) or not len(left) or dropped.max() < left.min()
        before = keep
    assert torch.equal(keep, final)


def test_the_seed_is_that_of_dropout_too(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_model("gpt2", tmp_path / "model", resid_pdrop=0.5)
    settings, losses = GradualSettings(batch_size=16, learning_rate=1e-3), []
    for state in (1, 2):
        torch.manual_seed(state)
        model = AutoModelForCausalLM.from_pretrained(folder)
        losses.append(prune_while_training(model, TOKENS, [], lambda name, weight: (weight, weight), settings))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("pattern", [n_of_m(2, 4), unstructured(Fraction(1, 2))])
def test_training_ends_with_the_exact_sparsity(pattern, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model("llama", tmp_path / "model"))
    names = list(open_decoder(tmp_path / "model", "cpu").linears())
    zeros = []

    def keep_of(name, weight):
        if name == names[0]:
            zeros.append(int((weight == 0).sum()))
        saliency = weight.detach().abs()
        return saliency, last_mask(saliency, pattern, Fraction(1, 2), by_group=pattern.columns == 4)

    settings = GradualSettings(batch_size=4, learning_rate=3e-3, updates=5)
    losses = prune_while_training(model, TOKENS, names, keep_of, settings)
    assert len(losses) == 12
    assert zeros == sorted(zeros) and len(zeros) == 5 and 0 < zeros[1] < zeros[-1]
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        assert pattern.fault(weight) == ""
        assert int((weight == 0).sum()) == weight.numel() // 2 and not torch.signbit(weight[weight == 0]).any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sparsegpt-2of4", "sparsegpt has no saliency to go by"),
        ("wanda-block16-0.5", "only unstructured and N of M rise"),
        ("wanda-unstructured-0.5-owl", "only unstructured and N of M rise"),
        ("wanda-4of2", "keeps 4 of each 2"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(UserError, match=message):
        parse_gradual(name, ["magnitude", "sparsegpt", "wanda"])


@pytest.mark.parametrize("run", ["wanda-2of4", "magnitude-unstructured-0.5"])
def test_the_script_leaves_a_checkpoint_and_a_report_as_of_a_one_shot_run(run, tmp_path):
    import shutil
    from pathlib import Path

    folder = make_model("llama", tmp_path / "model", vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(__file__).parents[2] / "resources/pydoc-llama" / name, folder / name)
    (tmp_path / "text.txt").write_text("\n".join(f"def function_{n}(value): return value + {n}" for n in range(900)))
    words = [
        "--text",
        str(tmp_path / "text.txt"),
        "--run",
        run,
        "--model",
        str(folder),
        "--sequence-length",
        "16",
        "--tokens",
        "512",
        "--batch-size",
        "4",
    ]
    words += ["--device", "cpu", "--updates", "3", "--learning-rate", "1e-3"]
    words += ["--output-model", str(tmp_path / "pruned"), "--output-report", str(tmp_path / "report.json")]
    prune_gradually.main(prune_gradually._parser().parse_args(words))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sparsity"]["achieved"] == 0.5 and report["training"]["steps"] == 8
    checkpoint = Checkpoint(tmp_path / "pruned")
    masks = read_step_masks(tmp_path / "report.json", checkpoint)
    for name in masks.matrices:
        assert (checkpoint.matrix(name) == 0).float().mean().item() == 0.5
