"""Seconds to calibrate, score and step down random layers of Llama-2-7B's shape, and what 32 would take."""

import tempfile
from pathlib import Path

import torch
from random_llama import write_shards
from timing import seconds_of

from stepdown.models.decoder import open_decoder
from stepdown.plan.runs import parse_run
from stepdown.prune.calibration import squared_input_norms
from stepdown.prune.methods import method_names
from stepdown.prune.oneshot import prune_layers
from stepdown.tensors.blocks import grid_shape
from stepdown.tensors.patterns import TierOptions, pattern_of
from stepdown.tensors.saliency import block_scores
from stepdown.tensors.tiers import (
    Tier,
    degrade_dense_to_two_four,
    degrade_two_four_to_top_k,
    prune_top_k_,
    prune_two_four_,
)

LAYERS, WHOLE = 2, 32
SHARES, BLOCK_SIZE, K = ("0.35", "0.45", "0.20"), 16, 10


def llama_config(layers: int, tiny: bool):
    from transformers import LlamaConfig

    sizes = (64, 176, 4, 512) if tiny else (4096, 11008, 32, 32000)
    hidden, inner, heads, vocabulary = sizes
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=heads,
        num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=4096, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def run(device: torch.device, tiny: bool) -> dict:
    samples, length, batch = (2, 16, 1) if tiny else (128, 2048, 8)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_model(Path(temporary) / "model", tiny)
        windows = torch.randint(0, 500, (samples, length), generator=torch.Generator().manual_seed(0))
        decoder = open_decoder(folder, device.type)
        norms: dict = {}
        found = {
            "calibrate": seconds_of(lambda: norms.update(squared_input_norms(decoder, windows, batch)), device),
            "score and step down": seconds_of(lambda: step_down_all(decoder, norms, device), device),
        }
        for run_name in ("wanda-2of4", "sparsegpt-2of4"):
            found[run_name] = seconds_of(lambda name=run_name: prune(decoder, name, windows, batch), device)
    return found


def write_model(folder: Path, tiny: bool) -> Path:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = llama_config(LAYERS, tiny)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir()
    config.save_pretrained(folder)
    write_shards(folder, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    return folder


def step_down_all(decoder, norms: dict, device: torch.device) -> None:
    """From all Dense to the last shares, matrix by matrix, read from disk and left on the device."""
    for name in decoder.linears():
        weight, squared = decoder.checkpoint.matrix(name).to(device), norms[name].to(device)
        tiers = torch.zeros(grid_shape(tuple(weight.shape), BLOCK_SIZE), dtype=torch.uint8, device=device)
        dense = block_scores(weight, squared, BLOCK_SIZE).flatten()
        stage_1 = degrade_dense_to_two_four({"": tiers}, {"": dense}, SHARES)[""]
        prune_two_four_(weight, squared, stage_1 != tiers, BLOCK_SIZE)
        left = block_scores(weight, squared, BLOCK_SIZE)[stage_1 == Tier.TWO_FOUR]
        stage_2 = degrade_two_four_to_top_k({"": stage_1}, {"": left}, SHARES)[""]
        prune_top_k_(weight, squared, stage_2 != stage_1, BLOCK_SIZE, K)


def prune(decoder, run_name: str, windows: torch.Tensor, batch: int) -> None:
    parsed = parse_run(run_name, method_names())
    for layer in prune_layers(
        decoder, windows, batch, parsed.method,
        lambda _, weight: pattern_of(parsed, parsed.sparsity, TierOptions(), weight),
    ):  # fmt: skip
        layer.weights()


def table(found: dict) -> list[str]:
    return [
        f"{name}: {seconds:.1f} s for {LAYERS} layers, {seconds * WHOLE / LAYERS:.0f} s for {WHOLE}"
        for name, seconds in found.items()
        if name != "seconds"
    ]
