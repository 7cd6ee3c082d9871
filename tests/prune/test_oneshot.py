"""Whole models in one shot: the reference's own checkpoints, every family, what goes wrong, a method of one's own."""

import json
import logging
import re
import sys
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCABULARY, as_it_computes, make_model
from safetensors.torch import load_file, save_file

import prune_oneshot
from stepdown.errors import UserError
from stepdown.measure.perplexity import window_losses
from stepdown.models import pruning_reports
from stepdown.models.checkpoint import Checkpoint
from stepdown.models.decoder import open_decoder
from stepdown.plan.runs import parse_run
from stepdown.prune import methods, oneshot, statistics
from stepdown.prune.calibration import squared_input_norms
from stepdown.prune.layer_sparsity import LayerOptions
from stepdown.prune.methods import load_method, method_names
from stepdown.prune.oneshot import layer_sparsities, prune_checkpoint, prune_layers
from stepdown.tensors.patterns import TierOptions, n_of_m, unstructured
from stepdown.tensors.saliency import wanda

DOCS = Path(__file__).parents[2] / "docs"
TOKENS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))
NO_TIERS = TierOptions(block_size=16, k=10)


@pytest.fixture
def model(tmp_path):
    return make_model("llama", tmp_path / "model")


def prune(folder, name, target, windows=TOKENS, batch_size=2, tiers=NO_TIERS, layers=None):
    run = parse_run(name, method_names())
    return prune_checkpoint(
        open_decoder(folder, "cpu"), run, windows, batch_size, target, tiers, layers or LayerOptions()
    )


def weights(folder):
    checkpoint = Checkpoint(folder)
    return checkpoint.tensors(checkpoint.names)


def change(folder, name, edit):
    """Rewrite one tensor of a checkpoint with a single file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "reference"),
    [
        ("wanda-unstructured-0.5", "wanda_u50"),
        ("wanda-2of4", "wanda_2_4"),
        ("wanda-4of8", "wanda_4_8"),
        ("magnitude-unstructured-0.5", "magnitude_u50"),
        ("magnitude-2of4", "magnitude_2_4"),
        ("wanda-block16-0.5", "block50_guide"),
        ("sparsegpt-unstructured-0.5", "sparsegpt_u50"),
        ("sparsegpt-2of4", "sparsegpt_2_4"),
    ],
)
def test_the_whole_chain_is_the_references(golden, tmp_path, run, reference):
    tokens = load_file(golden / "models/tokens.safetensors")
    prune(golden / "models/llama", run, tmp_path / "pruned", tokens["calib"], batch_size=4)
    pruned, expected = weights(tmp_path / "pruned"), load_file(golden / f"models/llama_{reference}.safetensors")
    assert pruned.keys() == expected.keys()
    for name, weight in pruned.items():
        assert not torch.signbit(weight[weight == 0]).any(), "a zero is written as 0.0, never as -0.0"
        if run.startswith("sparsegpt"):
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5, msg=name)
        else:
            assert torch.equal(weight, expected[name]), name
    losses = window_losses(open_decoder(tmp_path / "pruned", "cpu"), tokens["stream"].view(-1, 64), batch_size=16)
    published = load_file(golden / "models/llama_window_nll.safetensors")
    if reference in published:
        torch.testing.assert_close(losses.mean().exp(), published[reference].mean().exp(), rtol=1e-5, atol=0)


# --- every family ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_model(family, tmp_path / "model")
    report = prune(folder, "sparsegpt-2of4", tmp_path / "pruned")
    linears = open_decoder(folder, "cpu").linears()
    assert report["matrices"].keys() == linears.keys()
    before, after = weights(folder), weights(tmp_path / "pruned")
    for name, tensor in before.items():
        linear = name.removesuffix(".weight")
        if linear in linears:
            assert n_of_m(2, 4).fault(after[name]) == "" and after[name].count_nonzero() == tensor.numel() / 2, name
            matrix = report["matrices"][linear]
            assert matrix["target"] == matrix["achieved"] == 0.5 and matrix["shape"] == list(after[name].shape)
        else:
            assert torch.equal(after[name], tensor), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    matrices = list(as_it_computes(model))
    assert sum(weight.numel() for weight in matrices) == sum(before[f"{name}.weight"].numel() for name in linears)
    assert all(n_of_m(2, 4).fault(weight) == "" for weight in matrices)
    with torch.no_grad():
        losses = window_losses(open_decoder(tmp_path / "pruned", "cpu"), TOKENS, 2)
        torch.testing.assert_close(losses[0].float(), model(TOKENS[:1], labels=TOKENS[:1]).loss)


# --- how it goes about it --------------------------------------------------------------------------------------------


def test_later_layers_see_what_the_pruned_layers_before_them_give(model, tmp_path):
    prune(model, "wanda-unstructured-0.5", tmp_path / "pruned")
    # The inputs of this matrix come from pruned layers only, so the finished checkpoint has what it was pruned by.
    name = "model.layers.2.self_attn.q_proj"
    weight, pruned = Checkpoint(model).matrix(name), Checkpoint(tmp_path / "pruned").matrix(name)

    def mask(folder):
        norms = squared_input_norms(open_decoder(folder, "cpu"), TOKENS, 2)
        return unstructured(Fraction(1, 2)).keep(wanda(weight, norms[name]))

    assert torch.equal(pruned, weight * mask(tmp_path / "pruned"))
    assert not torch.equal(pruned, weight * mask(model))


def test_one_layer_in_memory_and_in_order(model):
    decoder = open_decoder(model, "cpu")
    seen = []

    for layer in prune_layers(decoder, TOKENS, 2, "sparsegpt", lambda name, weight: n_of_m(2, 4)):
        real = {name for name, parameter in decoder.model.named_parameters() if not parameter.is_meta}
        assert real and all(name.startswith(f"model.layers.{len(seen)}.") for name in real)
        seen.append(min(layer.weights()))
    assert seen == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(5)]


def test_magnitude_needs_no_forward_pass(model, tmp_path, monkeypatch):
    from stepdown.models.layer_walk import LayerWalk

    monkeypatch.setattr(LayerWalk, "_replay", lambda *_: pytest.fail("a forward pass"))
    assert prune(model, "magnitude-2of4", tmp_path / "pruned")["sparsity"]["achieved"] == 0.5


def test_the_same_bytes_every_time_and_nothing_beside_them(model, tmp_path):
    for name in ("one", "two"):
        prune(model, "sparsegpt-unstructured-0.5", tmp_path / name)
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "two"]


def test_more_than_ten_layers_and_half_precision(tmp_path):
    """Layer 10 stands before layer 2 in a sorted folder, and after it in the model."""
    folder = make_model("llama", tmp_path / "model", num_hidden_layers=11, dtype="bfloat16")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    prune(folder, "wanda-2of4", tmp_path / "pruned")
    for name, weight in weights(tmp_path / "pruned").items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, tensors[name] * (weight != 0)), name
        assert (weight == 0).any() == name.endswith("proj.weight")


@pytest.mark.parametrize("name", ["wanda-three-tier", "wanda-hybrid", "magnitude-hybrid", "sparsegpt-block8-0.25"])
def test_patterns_of_blocks(model, tmp_path, name):
    report = prune(model, name, tmp_path / "pruned")
    assert 0.1 < report["sparsity"]["achieved"] < 0.9
    assert pruning_reports.read_report(write(report, tmp_path / "report.json")) == report


def write(report, path):
    path.write_text(json.dumps(report))
    return path


def test_layers_of_owl_and_of_a_table(model, tmp_path):
    owl = prune(model, "wanda-unstructured-0.5-owl", tmp_path / "owl")
    targets = {name: matrix["target"] for name, matrix in owl["matrices"].items()}
    assert max(targets.values()) - min(targets.values()) == pytest.approx(0.16, abs=2 / 48)
    assert owl["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.002)
    table = LayerOptions(table={"layers.0": 0.25})
    report = prune(model, "wanda-unstructured-0.5-table", tmp_path / "table", layers=table)
    for name, matrix in report["matrices"].items():
        assert matrix["target"] == matrix["achieved"], "whole weights of every row"
        assert matrix["target"] == pytest.approx(0.25 if ".layers.0." in name else 0.5625, abs=1.01 / 48)
    assert report["sparsity"]["target"] == 0.5
    assert report["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.002)


def test_ragged_groups_keep_their_share_and_it_is_said(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("stepdown"), "propagate", True)
    report = prune(model, "wanda-1of5", tmp_path / "pruned")
    assert caplog.messages == [
        "wanda-1of5: 35 matrices, model.layers.0.self_attn.q_proj first, have inputs that are no multiple of 5;"
        " of a tail of r, ceil(r * 1 / 5) stay"
    ]
    assert report["matrices"]["model.layers.0.mlp.down_proj"]["achieved"] == 1 - 15 / 72


def test_owl_looks_at_the_dense_model(model, tmp_path):
    decoder = open_decoder(model, "cpu")
    run = parse_run("wanda-unstructured-0.5-owl", method_names())
    before = layer_sparsities(run, decoder, TOKENS, 2, LayerOptions())
    assert before == layer_sparsities(run, open_decoder(model, "cpu"), TOKENS, 3, LayerOptions())
    assert before != layer_sparsities(run, open_decoder(model, "cpu"), TOKENS, 2, LayerOptions(owl_m=2.0))


# --- what goes wrong -------------------------------------------------------------------------------------------------

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_weight_that_is_nan_is_named(model, tmp_path, method):
    change(model, "model.layers.2.mlp.down_proj.weight", lambda weight: weight[3, 3].fill_(torch.nan))
    with pytest.raises(UserError, match=r"model: model\.layers\.2\.mlp\.down_proj: a weight is NaN or infinite"):
        prune(model, f"{method}-2of4", tmp_path / "pruned")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"], "nothing half-written is left"


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_activation_that_is_nan_is_named(model, tmp_path, method):
    change(model, "model.layers.1.input_layernorm.weight", lambda weight: weight[3].fill_(torch.nan))
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.q_proj: its inputs are not finite"):
        prune(model, f"{method}-2of4", tmp_path / "pruned")


def test_a_linear_that_sees_no_token_is_pruned_by_magnitude_and_named(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("stepdown"), "propagate", True)

    @contextmanager
    def without_one(linears, samples):
        with statistics.accumulating_squares(linears, samples) as found:
            yield found
        found.pop("model.layers.1.mlp.up_proj", None)

    monkeypatch.setitem(oneshot.GATHERERS, "squared_norms", without_one)
    prune(model, "wanda-2of4", tmp_path / "pruned")
    assert caplog.messages == ["model.layers.1.mlp.up_proj saw no token of the calibration text: pruned by magnitude"]
    dense, pruned = weights(model)[WEIGHT], weights(tmp_path / "pruned")[WEIGHT]
    assert torch.equal(pruned, dense * n_of_m(2, 4).keep(dense.abs()))


def test_a_report_and_a_checkpoint_that_do_not_belong_together(model, tmp_path):
    report = prune(model, "wanda-2of4", tmp_path / "pruned")
    checkpoint = Checkpoint(tmp_path / "pruned")
    pruning_reports.check_same_model(report, "report.json", checkpoint)
    with pytest.raises(UserError, match=r"report\.json: report of another model"):
        pruning_reports.check_same_model(report, "report.json", Checkpoint(model))
    name = "model.layers.0.mlp.up_proj"
    weight = checkpoint.matrix(name)
    pruning_reports.check_zeros(report, name, weight, "pruned")
    weight[weight == 0] = 1
    with pytest.raises(UserError, match=r"pruned: model\.layers\.0\.mlp\.up_proj: 0 zeros where 1728 are due"):
        pruning_reports.check_zeros(report, name, weight, "pruned")
    moved = checkpoint.matrix(name)
    moved[:, :4], moved[:, 4:8] = 1, 0
    with pytest.raises(UserError, match=r"up_proj: 72 groups keep more than 2 of 4; pruned weights were revived"):
        pruning_reports.check_zeros(report, name, moved, "pruned")
    with pytest.raises(UserError, match="not the report of a one-shot run"):
        pruning_reports.read_report(write({"format": 1}, tmp_path / "other.json"))


# --- a method of one's own -------------------------------------------------------------------------------------------


@pytest.fixture
def add_method(tmp_path, monkeypatch):
    """Save a method's file as a user would, but beside the package."""
    folder = tmp_path / "methods"
    folder.mkdir()
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])

    def add(name, text):
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, f"stepdown.prune.methods.{name}", raising=False)

    yield add
    for file in folder.glob("*.py"):
        sys.modules.pop(f"stepdown.prune.methods.{file.stem}", None)


def test_the_method_of_the_documentation_works(add_method, model, tmp_path):
    document = (DOCS / "own-method.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    add_method("ria", example)
    assert "ria" in method_names()
    for pattern in ("2of4", "unstructured-0.5", "block16-0.5", "hybrid"):
        report = prune(model, f"ria-{pattern}", tmp_path / pattern)
        assert report["method"] == "ria" and 0.3 < report["sparsity"]["achieved"] < 0.7
    ria, wanda = (
        weights(tmp_path / "2of4"),
        prune(model, "wanda-2of4", tmp_path / "wanda") and weights(tmp_path / "wanda"),
    )
    assert not torch.equal(ria[WEIGHT] == 0, wanda[WEIGHT] == 0)


def test_a_method_gets_the_statistics_that_are_documented(add_method, model, tmp_path):
    add_method(
        "spy",
        "seen = {}\ndef prune(weight, squared_norms, hessian, pattern, name):\n"
        "    seen[name] = weight.clone(), squared_norms, hessian.clone()\n"
        "    return weight * pattern.keep(weight.abs())\n",
    )
    prune(model, "spy-2of4", tmp_path / "pruned")
    seen = load_method("spy").__globals__["seen"]
    assert seen.keys() == open_decoder(model, "cpu").linears().keys()
    name = "model.layers.0.mlp.down_proj"
    weight, squared_norms, hessian = seen[name]
    assert torch.equal(weight, Checkpoint(model).matrix(name))
    # Nothing is pruned before the first layer, so the dense model's inputs are those it is pruned by.
    torch.testing.assert_close(squared_norms, squared_input_norms(open_decoder(model, "cpu"), TOKENS, 2)[name])
    torch.testing.assert_close(hessian.diagonal(), 2 * squared_norms)
    torch.testing.assert_close(hessian, hessian.T)


def test_the_documentation_names_every_argument():
    document = (DOCS / "own-method.md").read_text()
    for argument in methods.ARGUMENTS:
        assert f"| `{argument}` |" in document


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "own.py: no function prune(weight, ..., pattern); docs/own-method.md shows one"),
        (
            "def prune(weight, gradient): ...",
            "own.py: prune asks for 'gradient'; it may ask for weight, pattern, name,",
        ),
        (
            "def prune(weight): return None",
            "model.layers.0.self_attn.q_proj: returned NoneType; return the weight [48, 48]",
        ),
        (
            "def prune(weight): return weight[1:]",
            "model.layers.0.self_attn.q_proj: returned [47, 48]; return the weight",
        ),
        ("def prune(weight): return weight / 0", "model.layers.0.self_attn.q_proj: returned NaN or infinity"),
        (
            "def prune(weight): return weight",
            "model.layers.0.self_attn.q_proj: the pattern does not hold: 576 groups keep more than 2 of 4",
        ),
    ],
)
def test_a_method_that_does_not_do_its_part(add_method, model, tmp_path, text, words):
    add_method("own", text)
    with pytest.raises(UserError) as caught:
        prune(model, "own-2of4", tmp_path / "pruned")
    assert words in str(caught.value)


def test_an_unknown_method_is_told_the_known_ones():
    with pytest.raises(UserError, match="unknown method 'wnada'; did you mean wanda") as caught:
        load_method("wnada")
    assert "magnitude, sparsegpt, wanda" in str(caught.value)


# --- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(model, tmp_path):
    """A model with a tokenizer, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(map(str, row)) for row in TOKENS.repeat(20, 1).tolist()))
    return ["--model", str(model), "--text", str(text), "--samples", "4", "--sequence-length", "16", "--device", "cpu"]


def run_script(tmp_path, *words):
    arguments = [*words, "--output-model", str(tmp_path / "pruned"), "--output-report", str(tmp_path / "report.json")]
    prune_oneshot.main(prune_oneshot._parser().parse_args(arguments))
    return pruning_reports.read_report(tmp_path / "report.json")


def test_the_script_writes_a_checkpoint_and_what_came_of_it(prepared, tmp_path):
    report = run_script(
        tmp_path, "--run", "wanda-unstructured-0.5-table", "--layer-sparsity", '{"mlp": 0.25}', *prepared
    )
    assert report["run"] == "wanda-unstructured-0.5-table" and report["layers"] == "table"
    assert report["calibration"] == {
        "text": "file text.txt, train part of 80/10/10 % of its characters",
        "samples": 4,
        "sequence_length": 16,
        "seed": 0,
    }
    assert report["matrices"]["model.layers.0.mlp.up_proj"]["achieved"] == 0.25
    pruning_reports.check_same_model(report, "report.json", Checkpoint(tmp_path / "pruned"))
    assert str(tmp_path) not in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "wnda-2of4"], "unknown method 'wnda'; did you mean wanda"),
        (["--run", "wanda-4of2"], "write N of M with 0 < N < M"),
        (["--run", "wanda-unstructured-0.5-table", "--layer-sparsity", "{mlp: 0.25}"], "--layer-sparsity: not JSON"),
        (["--run", "wanda-2of4", "--sequence-length", "65"], "--sequence-length: found 65"),
        (["--run", "wanda-2of4", "--sequence-length", "64", "--text", "short.txt"], "windows of 64 need more"),
    ],
)
def test_the_script_tells_what_is_wrong(prepared, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("1 2 3\n" * 10)
    with pytest.raises(UserError) as caught:
        run_script(tmp_path, *prepared, *words)
    assert message in str(caught.value)


def test_shares_reach_the_pattern(prepared, tmp_path):
    dense = run_script(tmp_path, "--run", "wanda-three-tier", "--shares", "1", "0", "0", *prepared)
    half = run_script(tmp_path, "--run", "wanda-three-tier", "--shares", "0", "1", "0", *prepared)
    assert dense["sparsity"]["achieved"] == 0 and half["sparsity"]["achieved"] == 0.5
    tight = run_script(
        tmp_path, "--run", "wanda-hybrid", "--top-blocks", "0.5", "--threshold", "2", "--k", "1", *prepared
    )
    assert Fraction(tight["matrices"]["model.layers.0.self_attn.o_proj"]["zeros"]) == 5 * 255
