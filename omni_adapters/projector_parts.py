"""The small parts that a Projector is composed of: fewer steps in time, norms, activations, a fixed number of soft tokens.

Notable:
- all are without bias, and parameters are masters (fp32 by default) cast to the dtype of what comes in
- what is zero stays zero in every part: a projector whose last weight is zero gives zeros, whatever is behind it
- what comes in is zero beyond `lens` (`zero_padding`), so no part can tell a clip alone from the same clip in a ragged batch
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapters.features import Features, valid_steps

EPS = 1e-6        # of RMSNorm, as in Llama and Ultravox
HEAD_WIDTH = 64   # of an attention head


def draw(weight: Tensor) -> None:
    """Uniform ±√(3/fan_in), variance 1/fan_in: a matmul with it keeps the variance of its input."""
    bound = (3 / weight[0].numel()) ** 0.5
    nn.init.uniform_(weight, -bound, bound)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype))


# ---- fewer steps ------------------------------------------------------------------------------------------------------


def zero_padding(features: Features) -> Features:
    """The same with zeros beyond lens: what an encoder leaves there reaches neither outputs nor gradients."""
    values = features.values
    return Features(torch.where(valid_steps(features).unsqueeze(-1), values, values.new_zeros(())), features.lens)


def stack_frames(features: Features, stack: int) -> Features:
    """Join `stack` consecutive frames: (B, T, d) → (B, ⌈T/stack⌉, stack·d), lens → ⌈lens/stack⌉.

    Frames beyond lens are zeroed first: what an encoder leaves in its padding never leaks into a partial window.
    """
    return Stack(stack)(zero_padding(features))


class Stack(nn.Module):
    """`stack` consecutive frames side by side: (B, T, d), zero beyond lens → (B, ⌈T/stack⌉, stack·d), lens → ⌈lens/stack⌉."""

    def __init__(self, stack: int) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, features: Features) -> Features:
        values, lens = features
        B, T, d = values.shape
        values = F.pad(values, (0, 0, 0, -T % self.stack))
        return Features(values.reshape(B, values.size(1) // self.stack, self.stack * d), (lens + self.stack - 1) // self.stack)

    def extra_repr(self) -> str:
        return f"{self.stack}"


class StridedConv(nn.Module):
    """GELU(conv(x)): a 1-D convolution over time of stride `stack`, width to width, without bias.

        (B, T, width), zero beyond lens → (B, ⌈T/stack⌉, width), lens → ⌈lens/stack⌉

    Its kernel is stack + 2·⌊stack/2⌋ frames: the window that stacking takes and half a window on either side, so neighbours
    overlap by half; before the first frame and after the last are zeros. stack = 1 is a matmul for each frame. (SLAM-LLM's
    convolutional projector has kernel = stride: no overlap, and its last partial window is dropped.)
    """

    def __init__(self, width: int, stack: int) -> None:
        super().__init__()
        self.stack, self.overlap = stack, stack // 2
        self.weight = nn.Parameter(torch.empty(width, width, stack + 2 * self.overlap))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        draw(self.weight)

    def forward(self, features: Features) -> Features:
        values, lens = features
        T, stack = values.size(1), self.stack
        steps = -(-T // stack)
        after = max(steps, 1) * stack - T + self.overlap  # without a frame the kernel still needs one window to run
        padded = F.pad(values.transpose(1, 2), (self.overlap, after))  # (B, width, …)
        made = F.conv1d(padded, self.weight.to(values.dtype), stride=stack)
        return Features(F.gelu(made).transpose(1, 2)[:, :steps], (lens + stack - 1) // stack)

    def extra_repr(self) -> str:
        return f"{self.weight.size(0)}, kernel={self.weight.size(2)}, stride={self.stack}"


# ---- norms and activations --------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / √(mean(x²) + 1e-6) · weight over the last axis (arXiv:1910.07467); `weight` (width,) begins at 1.

    Ultravox's projector has such norms too and starts their gain at 0.4; here a GPT that norms its embeddings undoes any scale.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), EPS)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}"


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) · value, where the first half of x is the value and the second the gate: (…, 2h) → (…, h).

    GLU Variants Improve Transformer, arXiv:2002.05202; halves in the order of Ultravox's projector.
    """
    value, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * value


ACTIVATIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {  # how many times hidden_dim it reads, and the function
    "gelu": (1, F.gelu),
    "swiglu": (2, swiglu),
}


# ---- a fixed number of soft tokens ------------------------------------------------------------------------------------


class AttentionPool(nn.Module):
    """`num_queries` learned queries attend to the valid steps of a clip: as many soft tokens, however long the clip.

        (B, T, width) → (B, num_queries, width), lens → num_queries, or 0 where a row has no step

        out(softmax(queries · key(x)ᵀ / √head) value(x)), heads of 64 channels where width is a multiple of 64, else one head

    One layer of cross-attention, as Qwen-VL's resampler (arXiv:2308.12966), without bias and without positions of its own: what
    came first is known only as far as the encoder's features tell it. A zero step beyond the last is there for rows that have
    none, and looked at by those alone.
    """

    def __init__(self, width: int, num_queries: int) -> None:
        super().__init__()
        self.num_heads = width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.uniform_(self.queries, -(3 ** 0.5), 3 ** 0.5)  # variance 1, as what the keys hold
        for layer in (self.key, self.value, self.out):
            draw(layer.weight)

    def forward(self, features: Features) -> Features:
        steps = Features(F.pad(features.values, (0, 0, 0, 1)), features.lens.clamp(min=1))
        x, B = steps.values, steps.values.size(0)
        queries = self.heads(self.queries.to(x.dtype)).expand(B, -1, -1, -1)
        heard = F.scaled_dot_product_attention(queries, self.heads(linear(x, self.key)), self.heads(linear(x, self.value)),
                                               attn_mask=valid_steps(steps)[:, None, None])
        pooled = linear(heard.transpose(1, 2).flatten(2), self.out)
        return Features(pooled, features.lens.clamp(max=1) * self.queries.size(0))

    def heads(self, x: Tensor) -> Tensor:
        """(…, T, width) → (…, num_heads, T, width / num_heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)

    def extra_repr(self) -> str:
        return f"num_queries={self.queries.size(0)}, num_heads={self.num_heads}"
