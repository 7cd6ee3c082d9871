"""Distillation: in training the pruned model also learns what the dense one, its teacher, says (Hinton et al. 2015)."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..models.loading import load_model
from .losses import divergence


@dataclass(frozen=True)
class Distillation:
    """A teacher and how much it counts.

    weight: share of the distance to its logits in the loss, the rest is the text's cross-entropy; temperature: of both
    distributions; hidden_states: what the distance of the decoder layers' outputs is added with.
    """

    teacher: nn.Module
    weight: float
    temperature: float = 1.0
    hidden_states: float = 0.0

    def loss(self, cross_entropy: Tensor, student: CausalLMOutputWithPast, tokens: Tensor) -> Tensor:
        """The loss of a batch: `cross_entropy` of the student with the text and its distance to the teacher, together.

        student: its outputs on tokens, int64 [windows, length], with hidden states where they count.
        """
        with torch.no_grad():
            teacher = self.teacher(input_ids=tokens, use_cache=False, output_hidden_states=self.hidden_states > 0)
        distance = divergence(student.logits, teacher.logits, self.temperature)
        loss = (1 - self.weight) * cross_entropy + self.weight * distance
        if self.hidden_states > 0:
            # The first are embeddings, which no layer has touched.
            pairs = zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)
            distances = [relative_distance(ours, theirs) for ours, theirs in pairs]
            loss = loss + self.hidden_states * torch.stack(distances).mean()
        return loss


# Half a float32 model's memory.
TEACHER_TYPE = torch.bfloat16


def load_teacher(folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """The model of a folder to learn from, without gradients.

    It is on the CPU: only the process that trains knows which GPU is its own.
    """
    teacher = load_model(folder, TEACHER_TYPE, trust_remote_code)
    return teacher.eval().requires_grad_(False)


def relative_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of hidden states [..., hidden], as a share of the teacher's own square."""
    theirs = teacher.float()
    return F.mse_loss(student.float(), theirs) / theirs.square().mean()
