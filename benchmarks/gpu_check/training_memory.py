"""What a step of finetuning with distillation holds on the device, by part, for models of Llama-2-7B's shape.

As `recovery` does it: float32 weights, bfloat16 autocast, a bfloat16 teacher, masks of bytes, AdamW, activations of the
layers recomputed. Measured with few layers; what 32 take follows, since each layer adds the same.
"""

import torch
from pruning_time import WHOLE, llama_config
from torch import Tensor

from stepdown.recover.distillation import Distillation

LAYERS = (2, 6)


def run(device: torch.device, tiny: bool) -> dict:
    few, more = (step_memory(layers, device, tiny) for layers in LAYERS)
    each = {part: (more[part] - few[part]) / (LAYERS[1] - LAYERS[0]) for part in few}
    whole = {part: few[part] + (WHOLE - LAYERS[0]) * each[part] for part in few}
    return {"gigabytes": {**{str(n): found for n, found in zip(LAYERS, (few, more), strict=True)}, str(WHOLE): whole}}


def step_memory(layers: int, device: torch.device, tiny: bool) -> dict[str, float]:
    """Gigabytes held after each part was made, and the peak of the second step, by the name of the part."""
    from transformers import AutoModelForCausalLM

    found: dict[str, float] = {}
    reset(device)
    config = llama_config(layers, tiny)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        note(found, "weights", device)
        teacher = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    note(found, "teacher", device)
    masks = [(p, torch.ones_like(p, dtype=torch.uint8)) for n, p in model.named_parameters() if "proj" in n]
    note(found, "masks", device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    tokens = torch.randint(0, 500, (1, 16 if tiny else 2048), device=device)
    for _ in range(2):
        reset(device)
        step(model.train(), Distillation(teacher, 0.9), masks, optimizer, tokens)
        note(found, "gradients and moments", device)
    found["peak"] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return found


def step(model, distillation: Distillation, masks: list, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    with torch.autocast(tokens.device.type, torch.bfloat16):
        outputs = model(input_ids=tokens, labels=tokens, use_cache=False)
        loss = distillation.loss(outputs.loss, outputs, tokens)
    loss.backward()
    del outputs
    for weight, keep in masks:
        weight.grad.mul_(keep)
    optimizer.step()
    # The gradients stay, as they do where several batches are accumulated.
    optimizer.zero_grad(set_to_none=False)


def reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def note(found: dict[str, float], part: str, device: torch.device) -> None:
    found[part] = torch.cuda.memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def table(found: dict) -> list[str]:
    return [
        f"{layers} layers, GB held after: " + ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
        for layers, parts in found["gigabytes"].items()
    ]
