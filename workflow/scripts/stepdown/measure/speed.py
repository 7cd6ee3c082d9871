"""Tokens per second of a loaded model: prefill, the prompt in one pass; decode, token by token with a cache."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from ..models.decoder import choose_device, load_whole
from ..models.quantised_checkpoint import QuantisedCheckpoint, open_checkpoint
from ..models.sliced import read_width
from ..packed.folder import is_packed


def load_model(folder: Path | str, device: str, trust_remote_code: bool = False) -> nn.Module:
    """A model ready for use, in the type of its checkpoint: a packed folder on its own kernels; quantised weights as
    what they stand for, as no kernel here takes them."""
    # Imported here: what only asks for help should not wait seconds for transformers.
    from ..models import loading
    from ..packed.model import load_packed

    if is_packed(folder):
        return load_packed(folder, device=device, trust_remote_code=trust_remote_code)
    if read_width(folder) or isinstance(open_checkpoint(folder), QuantisedCheckpoint):
        return load_whole(folder, device, trust_remote_code)
    return loading.load_model(folder, "auto", trust_remote_code).to(choose_device(device)).eval()


@torch.no_grad()
def measure_speed(
    models: Sequence[nn.Module], prompt_tokens: int, new_tokens: int, repeats: int
) -> list[dict[str, float]]:
    """`prefill` and `decode` of each model, tokens/s of one sequence, the median of `repeats` runs.

    They take turns, so that what else the machine does meets all alike; a first turn does not count. A model that
    remembers nothing from token to token has no `decode`.
    """
    vocabulary = min(model.get_input_embeddings().weight.shape[0] for model in models)
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(next(models[0].parameters()).device)
    seconds = [{"prefill": [], "decode": []} for _ in models]
    for _ in range(repeats + 1):
        for model, times in zip(models, seconds, strict=True):
            prefill, output = _timed(lambda model=model: model(input_ids=prompt, use_cache=True), prompt.device)
            times["prefill"].append(prefill)
            if memory_of(output):
                decode, _ = _timed(lambda model=model, output=output: _decode(model, output, new_tokens), prompt.device)
                times["decode"].append(decode)
    tokens = {"prefill": prompt_tokens, "decode": new_tokens}
    return [{name: tokens[name] / median(times[1:]) for name, times in found.items() if times} for found in seconds]


def _decode(model: nn.Module, output, new_tokens: int) -> Tensor:
    """Greedy; `output` is what the model made of the prompt."""
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, use_cache=True, **memory_of(output))
    return token


def memory_of(output) -> dict[str, object]:
    """What a model wants to be given again with the next token: keys and values, or the state of a recurrence."""
    from transformers.generation.utils import ALL_CACHE_NAMES

    return {name: output[name] for name in ALL_CACHE_NAMES if output.get(name) is not None}


def _timed(work: Callable, device: torch.device) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result
