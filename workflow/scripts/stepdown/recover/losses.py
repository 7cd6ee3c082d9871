"""Losses over a vocabulary, computed a chunk of tokens at a time."""

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..tensors.token_chunks import sum_over_tokens


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of next-token distributions at temperature T, mean over tokens.

    student, teacher: logits [..., vocabulary]. T^2 keeps the gradient's size whatever the temperature.
    """

    def summed(student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = ((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))
        return F.kl_div(ours, theirs, log_target=True, reduction="sum")

    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    return temperature**2 * (sum_over_tokens(summed, student, teacher) / len(student))


def use_chunked_cross_entropy_(model: PreTrainedModel) -> None:
    """Have a model compute the usual loss of a causal language model, if that is its own, in chunks."""
    if model.loss_function is ForCausalLMLoss:
        model.loss_function = cross_entropy


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_,
) -> Tensor:
    """What transformers' `ForCausalLMLoss` computes: the mean over predicted tokens, or their sum by a number of items.

    logits: [windows, length, vocabulary]; labels: int64 [windows, length], which token n of `shift_labels` is one ahead
    of.
    """

    def summed(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")

    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.reshape(-1).to(logits.device)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return sum_over_tokens(summed, logits.view(-1, vocab_size), shift_labels) / num_items_in_batch
