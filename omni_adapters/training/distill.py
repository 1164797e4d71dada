"""Distillation from the same GPT reading: what it would say to the transcript, asked of it for the sound.

Method: Ultravox (its KL loss between the LM on speech and on text). Here the teacher runs with LoRA disabled, so it stays
the GPT that came.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor

from omni_adapters.lora import lora_disabled
from omni_adapters.model import OmniGPT
from omni_adapters.shapes import BadInput, shape
from omni_adapters.undisturbed import undisturbed


def graded(logits: Tensor, targets: Tensor) -> Tensor:
    """The rows of logits (B, T, vocab_size) whose target is not −1, in reading order: (num_graded, vocab_size)."""
    if logits.shape[:2] != targets.shape:
        raise BadInput("graded", f"logits {shape(logits.shape)} for targets {shape(targets.shape)}", "logits at every token",
                       "a host that answers for the last token only cannot be distilled: leave --distill out")
    return logits[targets != -1]


@contextmanager
def teacher(omni: OmniGPT) -> Iterator[None]:
    """Inside, the GPT is the one that came: LoRA off, its own dropout too, no gradients."""
    with undisturbed(omni), lora_disabled(omni.gpt):
        yield


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """Σ over rows of T²·KL(softmax(teacher/T) ‖ softmax(student/T)), in nats; both (num_graded, vocab_size) logits.

    T² keeps the gradient's size as T varies (Hinton et al. 2015, arXiv:1503.02531). Nothing flows into the teacher.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise BadInput("distillation_loss", f"student {shape(student.shape)} and teacher {shape(teacher.shape)}",
                       "the same (num_graded, vocab_size)", "grade the same answer in both")
    if not temperature > 0:
        raise BadInput("distillation_loss", f"temperature {temperature}", "a number > 0")
    ours = F.log_softmax(student.float() / temperature, dim=-1)
    theirs = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="sum", log_target=True)


def sum_of_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ of −log p(target) over targets that are not −1, in nats and in fp32."""
    return F.cross_entropy(graded(logits, targets).float(), targets[targets != -1], reduction="sum")
