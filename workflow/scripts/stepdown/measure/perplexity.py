"""Perplexity by the published protocol."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ..errors import UserError
from ..models.decoder import Decoder
from ..models.layer_walk import LayerWalk
from ..tensors.token_chunks import sum_over_tokens, summed_cross_entropy

PROTOCOL = (
    "non-overlapping windows of {length} tokens, remainder dropped; mean cross-entropy over the {predictions}"
    " predictions of a window; perplexity = exp of the mean over windows"
)


def window_losses(decoder: Decoder, windows: Tensor, batch_size: int, without: Collection[int] = ()) -> Tensor:
    """Mean cross-entropy in nats of each window's predictions, float64 [windows]. windows: int64 [windows, tokens];
    without: numbers of layers that are passed over."""
    walk = LayerWalk(decoder, list(windows.split(batch_size)))
    for place, (_, _, replay) in enumerate(walk.layers("evaluate")):
        if place not in without:
            replay()
    losses = [
        loss for batch, logits in zip(walk.batches, walk.logits(), strict=True) for loss in batch_losses(batch, logits)
    ]
    return torch.stack(losses)


def perplexity(decoder: Decoder, windows: Tensor, batch_size: int, without: Collection[int] = ()) -> float:
    """exp of the mean window loss, see `window_losses`; raises `UserError` when it is not a number."""
    value = window_losses(decoder, windows, batch_size, without).mean().exp().item()
    if value != value:
        raise UserError(f"{decoder.checkpoint.folder}: the perplexity is not a number; a weight or activation is NaN")
    return value


def describe_protocol(length: int) -> str:
    """The protocol in words, for windows of `length` tokens."""
    return PROTOCOL.format(length=length, predictions=length - 1)


def batch_losses(batch: Tensor, logits: Tensor) -> Iterator[Tensor]:
    """Mean cross-entropy of each window, int64 [windows, tokens], by its logits [windows, tokens, vocabulary].

    Some tokens at a time: the float32 logits of all would not fit where their hidden states do.
    """
    for tokens, scores in zip(batch, logits, strict=True):
        following = tokens[1:].to(scores.device)
        summed = sum_over_tokens(summed_cross_entropy, scores[:-1], following)
        yield (summed / len(following)).double().cpu()
