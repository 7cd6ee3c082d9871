"""Sums over the tokens of a text of what is computed from logits, a chunk of tokens at a time.

In float32 the logits of a batch take more memory than a decoder layer, and every step of a softmax takes as much again.
So only a chunk of them is ever held in float32, and computed once more when gradients go back through it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

# Logits of a chunk: 64 MB in float32.
CHUNK = 2**24


def summed_cross_entropy(logits: Tensor, following: Tensor) -> Tensor:
    """Of logits [tokens, vocabulary] for the tokens that follow, int64 [tokens], in float32."""
    return cross_entropy(logits.float(), following, reduction="sum")


def sum_over_tokens(
    summed: Callable[..., Tensor], logits: Tensor, *others: Tensor, entries: int | None = None
) -> Tensor:
    """The sum of `summed(logits, *others)` over chunks of tokens.

    logits: [tokens, vocabulary]; others: [tokens, ...]; entries: logits of a chunk, by default `CHUNK`. With one chunk
    it is as if called directly.
    """
    tokens = max(1, (entries or CHUNK) // logits.shape[-1])
    if len(logits) <= tokens:
        return summed(logits, *others)
    chunks = zip(*(each.split(tokens) for each in (logits, *others)), strict=True)
    sums = [checkpoint(summed, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(sums).sum()
