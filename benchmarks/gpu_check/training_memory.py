"""What a step of finetuning with distillation holds on the device, by part, for models of Llama-2-7B's shape.

As `recovery` does it, with `memory: full` and `memory: low`; a bfloat16 teacher, activations of the layers recomputed.
Measured with few layers; what 32 take follows, since each layer adds the same. Beside it what the package computes.
"""

from contextlib import nullcontext

import torch
from pruning_time import WHOLE, llama_config
from torch import Tensor

from stepdown.plan.training_memory import ModelSize, TrainingPlan, training_bytes
from stepdown.recover.bf16_adamw import BFloat16AdamW
from stepdown.recover.distillation import Distillation
from stepdown.recover.losses import use_chunked_cross_entropy_
from stepdown.recover.settings import MEMORY
from stepdown.recover.trainer import mask_
from stepdown.tensors.masks import as_bits

LAYERS = (2, 6)


def run(device: torch.device, tiny: bool) -> dict:
    return {"gigabytes": {memory: by_layers(memory, device, tiny) for memory in MEMORY}}


def by_layers(memory: str, device: torch.device, tiny: bool) -> dict[str, dict[str, float]]:
    few, more = (step_memory(layers, memory, device, tiny) for layers in LAYERS)
    each = {part: (more[part] - few[part]) / (LAYERS[1] - LAYERS[0]) for part in few}
    whole = {part: few[part] + (WHOLE - LAYERS[0]) * each[part] for part in few}
    return {**{str(n): found for n, found in zip(LAYERS, (few, more), strict=True)}, str(WHOLE): whole}


def step_memory(layers: int, memory: str, device: torch.device, tiny: bool) -> dict[str, float]:
    """Gigabytes held after each part was made, and the peak of the second step, by the name of the part."""
    from transformers import AutoModelForCausalLM

    found: dict[str, float] = {}
    reset(device)
    config, length, low = llama_config(layers, tiny), 16 if tiny else 2048, memory == "low"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if low else torch.float32)
        note(found, "weights", device)
        teacher = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    note(found, "teacher", device)
    matrices = [parameter for name, parameter in model.named_parameters() if "proj" in name]
    ones = (torch.ones_like(parameter, dtype=torch.uint8) for parameter in matrices)
    masks = [(parameter, as_bits(mask) if low else mask) for parameter, mask in zip(matrices, ones, strict=True)]
    note(found, "masks", device)
    use_chunked_cross_entropy_(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = BFloat16AdamW(model.parameters(), lr=1e-5) if low else torch.optim.AdamW(model.parameters(), lr=1e-5)
    tokens = torch.randint(0, 500, (1, length), device=device)
    autocast = nullcontext() if low else torch.autocast(device.type, torch.bfloat16)
    for _ in range(2):
        reset(device)
        step(model.train(), Distillation(teacher, 0.9), masks, optimizer, tokens, autocast)
        note(found, "gradients and moments", device)
    found["peak"] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return found | {"peak computed": computed(model, matrices, memory, length)}


def step(model, distillation: Distillation, masks: list, optimizer: torch.optim.Optimizer, tokens, autocast) -> None:
    with autocast:
        outputs = model(input_ids=tokens, labels=tokens, use_cache=False)
        loss = distillation.loss(outputs.loss, outputs, tokens)
    loss.backward()
    del outputs
    for weight, keep in masks:
        mask_(weight.grad, keep)
    optimizer.step()
    # The gradients stay, as they do where several batches are accumulated.
    optimizer.zero_grad(set_to_none=False)


def computed(model, matrices: list[Tensor], memory: str, length: int) -> float:
    """Gigabytes at the peak, as the package computes them."""
    config = model.config
    sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size)
    counts = (sum(p.numel() for p in some) for some in (model.parameters(), matrices))
    plan = TrainingPlan("full", memory, 1, length, gradient_checkpointing=True)
    return sum(training_bytes(ModelSize(*counts, *sizes), plan).values()) / 1e9


def reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def note(found: dict[str, float], part: str, device: torch.device) -> None:
    found[part] = torch.cuda.memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def table(found: dict) -> list[str]:
    return [
        f"memory {memory}, {layers} layers, GB held after: "
        + ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
        for memory, by_layer in found["gigabytes"].items()
        for layers, parts in by_layer.items()
    ]
