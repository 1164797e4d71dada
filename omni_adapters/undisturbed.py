"""To ask a model something in the middle of anything, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from omni_adapters.lora import lora_disabled
from omni_adapters.model import OmniGPT


@contextmanager
def undisturbed(omni: OmniGPT) -> Iterator[None]:
    """No gradients and evaluation mode inside; every module's training flag and torch's random state are put back."""
    flags = [(module, module.training) for module in omni.modules()]
    device = omni.prepender.device()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        omni.eval()
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag


@contextmanager
def lora_off(omni: OmniGPT) -> Iterator[None]:
    """Inside, the GPT as it came."""
    if not omni.lora():
        yield
        return
    with lora_disabled(omni.gpt):
        yield
