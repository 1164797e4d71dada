"""The trained bridge: frames of an encoder in, soft tokens of the GPT's width out.

Notable: nanochat's house style (no bias, fp32 masters cast to the activation dtype), frames stacked before the first
matmul as in SLAM-ASR (arXiv:2402.08846), and a last layer that may start at zero.
"""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapters.features import Features, check_form, full, valid_steps
from omni_adapters.shapes import BadInput


class Projector(nn.Module):
    """fc2(GELU(fc1(stacked frames))), no bias.

        (B, T, in_dim) → stack → (B, ⌈T/stack⌉, stack·in_dim) → fc1 → GELU → fc2 → (B, ⌈T/stack⌉, out_dim)

    Frames at and beyond `lens` count as zeros, so the last soft token of a row does not depend on how long its
    batch-mates are. Weights stay in their own dtype (fp32 by default) and are cast to that of the features.

    in_dim:    width of one frame (encoder.d_model).
    out_dim:   width of the GPT (n_embd).
    hidden_dim: default out_dim · 4.
    stack:     frames joined into one soft token; 8 turns Whisper's 50 Hz into 6.25 soft tokens a second.
    zero_init: fc2 starts at zero, so the first step sees norm(0) = 0 as soft tokens. The GPT's norm amplifies the first
               gradient by orders of magnitude: warm the rate up. False draws fc2 like fc1.

    Raises BadInput for features of another width or rank.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int | None = None, *, stack: int = 1,
                 zero_init: bool = True) -> None:
        super().__init__()
        hidden_dim = 4 * out_dim if hidden_dim is None else hidden_dim
        for name, size in (("in_dim", in_dim), ("out_dim", out_dim), ("hidden_dim", hidden_dim), ("stack", stack)):
            if size < 1:
                raise BadInput("Projector", f"{name} = {size}", f"{name} ≥ 1")
        self.in_dim, self.out_dim, self.hidden_dim, self.stack = in_dim, out_dim, hidden_dim, stack
        self.zero_init = zero_init
        self.fc1 = nn.Linear(stack * in_dim, hidden_dim, bias=False)
        self.fc2 = nn.Linear(hidden_dim, out_dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform ±√(3/fan_in), variance 1/fan_in; fc2 zero where zero_init."""
        for layer in (self.fc1, self.fc2):
            bound = (3 / layer.in_features) ** 0.5
            nn.init.uniform_(layer.weight, -bound, bound)
        if self.zero_init:
            nn.init.zeros_(self.fc2.weight)

    @overload
    def forward(self, features: Tensor) -> Tensor: ...
    @overload
    def forward(self, features: Features) -> Features: ...

    def forward(self, features: Tensor | Features) -> Tensor | Features:
        given = full(features) if isinstance(features, Tensor) else features
        check_form("Projector", given, self.in_dim, "build it with in_dim = encoder.d_model")
        stacked = stack_frames(given, self.stack)
        x = stacked.values
        hidden = F.gelu(F.linear(x, self.fc1.weight.to(x.dtype)))
        soft = F.linear(hidden, self.fc2.weight.to(x.dtype))
        return soft if isinstance(features, Tensor) else Features(soft, stacked.lens)

    def extra_repr(self) -> str:
        return f"stack={self.stack}, zero_init={self.zero_init}"


def stack_frames(features: Features, stack: int) -> Features:
    """Join `stack` consecutive frames: (B, T, d) → (B, ⌈T/stack⌉, stack·d), lens → ⌈lens/stack⌉.

    Frames beyond lens are zeroed first: what an encoder leaves in its padding never leaks into a partial window.
    """
    values, lens = features
    values = torch.where(valid_steps(features).unsqueeze(-1), values, values.new_zeros(()))
    B, T, d = values.shape
    values = F.pad(values, (0, 0, 0, -T % stack))
    return Features(values.reshape(B, values.size(1) // stack, stack * d), (lens + stack - 1) // stack)
