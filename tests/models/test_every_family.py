"""Every family that `AutoModelForCausalLM` knows, tiny: walked, calibrated, pruned, refitted and reconstructed as
transformers has it.

A family either does all of that, or is refused in one line, by whatever looks at it first.
"""

import runpy
import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_configurations import VOCABULARY, tiny_configuration
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from stepdown.errors import UserError
from stepdown.models.channels import find_channels
from stepdown.models.checkpoint import Checkpoint, rewriting_layers, shard_of
from stepdown.models.decoder import load_whole, open_decoder
from stepdown.models.layer_walk import LayerWalk
from stepdown.models.step_masks import StepMasks
from stepdown.plan.runs import parse_run
from stepdown.prune.calibration import calibrate_backwards, squared_input_norms
from stepdown.prune.channel_sorting import check_same_function, sorted_orders, write_permuted
from stepdown.prune.layer_sparsity import LayerOptions
from stepdown.prune.oneshot import prune_checkpoint
from stepdown.prune.reconstruction import Settings, reconstruct_layers
from stepdown.prune.refit import fit_within, refit_layers
from stepdown.tensors.patterns import TierOptions

ROOT = Path(__file__).parents[2]
# What transformers itself does not build small, or without packages that are not among ours.
NOT_BUILT = {
    "blt": "several models in one, of sizes that depend on each other",
    "dots3_note": "a configuration per layer, of a number of layers",
    "gemma3n": "its vision tower is one of timm",
    "gemma4_assistant": "drafts for another model, whose states it is given",
    "gemma4_unified_assistant": "drafts for another model, whose states it is given",
    "musicgen": "text to sound: the auto class does not build it",
    "musicgen_melody": "text to sound: the auto class does not build it",
    "xlstm": "sizes that depend on each other",
}
REFUSED = {
    "cpmant": "sees those after it",
    "emu3": "not a causal language model that transformers can load",
    "hrm_text": "calls its 5 layers 30 times, not one after another",
    "mllama": "not a causal language model that transformers can load",
    "xlm": "changes hidden states between its layers 0 and 1",
    "xlnet": "sees those after it",
}
# Their layers are run backwards from their outputs, without a graph.
WITHOUT_GRADIENTS = {"reformer"}
# One of each kind: layers that return bare states, tuples, lists, more than states; experts one by one, in one tensor,
# transposed, without a gate; a shared block; more than states handed from layer to layer; what is computed while
# loading; a state instead of keys; a vision tower.
SAMPLE = (
    *("mistral", "falcon", "openai-gpt", "glm_moe_dsa", "gpt_oss", "nemotron_h", "granitemoe", "zamba2"),
    *("kimi_linear", "dbrx", "mamba", "gemma3", "llama4", "zaya", "hrm_text"),
)
# With all that can be told of their channels sorted they compute something else, and are refused.
NOT_SORTED = (
    *("axk2", "bailing_hybrid", "ctrl", "deepseek_v4"),
    *("hy_v4", "inkling2_text", "inkling_text", "kimi_linear", "reformer"),
    *("rwkv", "xglm"),
)
FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - NOT_BUILT.keys())
TOKENS = torch.randint(2, VOCABULARY - 8, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_of_each_kind_is_what_transformers_has(family, tmp_path):
    check(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SAMPLE])
def test_every_family_is_what_transformers_has(family, tmp_path):
    check(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(NOT_BUILT))
def test_what_is_not_built_still_is_not(family, tmp_path):
    with pytest.raises(Exception):  # noqa: B017 (anything that transformers raises)
        build(family, tmp_path)


def check(family, folder):
    source = build(family, folder / "source")
    if family in REFUSED:
        with pytest.raises(UserError, match=REFUSED[family]):
            squared_input_norms(open_decoder(imported(source, folder), "cpu"), TOKENS, 2)
        return
    model = load(source)
    source = imported(source, folder)
    decoder = open_decoder(source, "cpu")
    assert_logits(source, model)
    assert_norms(decoder, model)
    assert_gradients(decoder)
    report = prune_checkpoint(
        *(decoder, parse_run("wanda-unstructured-0.5", ["wanda"]), TOKENS, 2, folder / "pruned"),
        *(TierOptions(), LayerOptions()),
    )
    pruned = load(folder / "pruned")
    assert_only_zeros_are_new(model, pruned, sum(matrix["zeros"] for matrix in report["matrices"].values()))
    assert_logits(folder / "pruned", pruned)
    assert_sorted(family, source, folder, model)
    refit(source, folder)
    assert_logits(folder / "refitted", load(folder / "refitted"))
    reconstruct(source, folder)
    steps = [folder / "pruned", folder / "refitted"]
    if decoder.model.config.model_type not in WITHOUT_GRADIENTS:
        steps.append(folder / "reconstructed")
        assert_logits(steps[-1], load(steps[-1]))
    for name in report["matrices"]:
        before, *mended = (Checkpoint(step).matrix(name) for step in steps)
        for after in mended:
            assert not after[before == 0].any() and after.isfinite().all(), name


def build(family, folder):
    """A random model of the family, saved as transformers saves it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(tiny_configuration(family)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.1)
        model(input_ids=TOKENS[:1], use_cache=False)
    model.save_pretrained(folder)
    return folder


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=None).eval()


def imported(source, folder):
    """The folder as base_model.py leaves it."""
    script = runpy.run_path(str(ROOT / "workflow/scripts/base_model.py"))
    outputs = {"output_model": folder / "model", "output_tier_map": folder / "map.safetensors"}
    options = {"revision": None, "trust_remote_code": False, "block_size": 16, "k": 10}
    script["main"](Namespace(model=str(source), **options, **outputs))
    return folder / "model"


@torch.no_grad()
def assert_logits(folder, model):
    walk = LayerWalk(open_decoder(folder, "cpu"), TOKENS.split(2))
    for _, _, replay in walk.layers(None):
        replay()
    for batch, logits in zip(TOKENS.split(2), walk.logits(), strict=True):
        torch.testing.assert_close(logits, model(input_ids=batch, use_cache=False).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def assert_norms(decoder, model):
    sums, handles = {}, []

    def add(name, inputs):
        if stored := decoder.stored.get(f"{name}.weight"):
            stored = stored.removesuffix(".weight")
            sums[stored] = sums.get(stored, 0) + inputs.double().square().flatten(0, -2).sum(0)

    def hook(name):
        return lambda _, inputs: add(name, inputs[0])

    def hook_experts(name):
        def see(experts, arguments, keywords):
            for part, inputs in routed(experts, *arguments, **keywords):
                add(f"{name}.{part}", inputs)

        return see

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            handles.append(module.register_forward_pre_hook(hook(name)))
        elif hasattr(module, "is_concatenated"):
            handles.append(module.register_forward_pre_hook(hook_experts(name), with_kwargs=True))
    for batch in TOKENS.split(2):
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    norms = squared_input_norms(decoder, TOKENS, batch_size=2)
    assert norms.keys() == decoder.linears().keys() and sums.keys() & norms.keys()
    for name, norm in norms.items():
        expected = sums[name] / len(TOKENS) if name in sums else torch.ones(len(norm))
        torch.testing.assert_close(norm.double(), expected.double(), rtol=1e-4, atol=1e-7, msg=name)


def assert_gradients(decoder):
    """Squared gradients of the outputs of every linear, as the whole model has them in one piece, times all tokens over
    those it is given; of one that has none, so much that it costs what the cheapest linear of its layer does."""
    if (family := decoder.model.config.model_type) in WITHOUT_GRADIENTS:
        with pytest.raises(UserError, match=f"the family '{family}' hands no gradients back"):
            calibrate_backwards(decoder, TOKENS, 2)
        return
    sums, tokens = {}, {}

    def add(stored, rows, gradient):
        sums[stored] = sums.get(stored, 0) + gradient.double().square().reshape(-1, rows).sum(0)

    def watch(stored, module, inputs, outputs):
        tokens[stored] = tokens.get(stored, 0) + inputs[0].shape[:-1].numel()
        if isinstance(outputs, torch.Tensor) and outputs.requires_grad:
            outputs.register_hook(partial(add, stored, len(module.weight)))

    # What depends on no token is left out, as in the walk: gradients flow to the embeddings alone.
    model = load_whole(decoder.checkpoint.folder, "cpu").requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in decoder.stored:
            module.register_forward_hook(partial(watch, decoder.stored[f"{name}.weight"].removesuffix(".weight")))
    for batch in TOKENS.split(2):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        (cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) * batch.numel()).backward()
    sums = {name: sums[name] / len(TOKENS) * TOKENS.numel() / tokens[name] for name in sums if tokens[name]}
    calibration = calibrate_backwards(decoder, TOKENS, 2)
    means = {name: norms.mean().item() for name, norms in calibration.squared_norms.items()}
    for name, gradient in calibration.squared_gradients.items():
        beside = [means[other] * sums[other].mean().item() for other in sums if shard_of(other) == shard_of(name)]
        without = torch.full((len(gradient),), min(beside, default=1.0) / (means[name] or 1.0)).double()
        expected = sums.get(name, without)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-6 * expected.max().item())


def routed(experts, hidden_states, top_k_index, top_k_weights):
    """What each linear of fused experts is given: its name within the experts -> inputs [tokens, in]."""
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    for number in range(len(up)):
        seen = hidden_states[torch.where(top_k_index == number)[0]]
        if not len(seen):
            continue
        product = seen @ (up[number] if experts.is_transposed else up[number].T)
        if experts.has_bias:
            product = product + experts.gate_up_proj_bias[number]
        yield from ((f"{number}.{part}", seen) for part in ("gate_proj", "up_proj"))
        yield f"{number}.down_proj", (experts._apply_gate if experts.has_gate else experts.act_fn)(product)


def assert_only_zeros_are_new(before, after, expected):
    """Wherever weights differ, pruned ones are zero; as many of them as expected, shared ones counted once."""
    gone = 0
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        changed = new != old
        assert not new[changed].any(), name
        gone += int((changed | ((old == 0) & (old.dim() > 1))).sum())
    assert gone == expected


def assert_sorted(family, source, folder, model):
    decoder = open_decoder(source, "cpu")
    channels, generator = find_channels(decoder, TOKENS), torch.Generator().manual_seed(2)
    importance = [torch.rand(len(group.heads), generator=generator) for group in channels]
    write_permuted(decoder, sorted_orders(channels, importance), folder / "sorted")
    if family in NOT_SORTED:
        with pytest.raises(UserError, match=f"a model of the family '{family}' computes something else"):
            check_same_function(decoder, open_decoder(folder / "sorted", "cpu"), TOKENS)
    else:
        check_same_function(decoder, open_decoder(folder / "sorted", "cpu"), TOKENS)
        assert_logits(folder / "sorted", load(folder / "sorted"))


def refit(source, folder):
    pruned, dense = (open_decoder(path, "cpu") for path in (folder / "pruned", source))
    fit = fit_within(StepMasks((), 1, "", lambda _, weight: weight != 0), 0.01)
    with rewriting_layers(pruned.checkpoint, folder / "refitted", pruned.checkpoint.identity()) as write:
        for layer in refit_layers(dense, pruned, fit, TOKENS, 2):
            write(layer.weights())


def reconstruct(source, folder):
    pruned, dense = (open_decoder(path, "cpu") for path in (folder / "refitted", source))
    if pruned.model.config.model_type in WITHOUT_GRADIENTS:
        with pytest.raises(UserError, match="hands no gradients back"):
            list(reconstruct_layers(dense, pruned, lambda _, weight: weight != 0, TOKENS, 2, Settings(2, 0.01)))
        return
    settings = (lambda _, weight: weight != 0), TOKENS, 2, Settings(steps=2, learning_rate=0.01)
    with rewriting_layers(pruned.checkpoint, folder / "reconstructed", pruned.checkpoint.identity()) as write:
        for tensors in reconstruct_layers(dense, pruned, *settings):
            write(tensors)
