"""x (W + s · B A)ᵀ as one matmul, with the gradients of A and B through their rank.

    forward     W' = W + s · B A        y  = x W'ᵀ + bias
    backward    dx = dy W'              dA = s · (dy B)ᵀ x        dB = s · dyᵀ (x Aᵀ)

Notable:
- x is all that is kept for backward besides parameters: W' is made again there, for r / (2 · rows) of the step's flops
- W' is summed in fp32 (fp64 where x or a factor is) and rounded once, to the dtype of the matmul. An update far below a bf16
  step of an fp32 W is then kept in the mean, since it moves its share of the weights over a boundary; added to y in bf16 most of
  it is lost. Over a W that is bf16 itself, all of whose weights lie between boundaries, most is lost in either form
- no gradient of W is made, (out, in) wide; those of A and B are summed in fp32 whatever the dtype of x
- differentiable twice, as backward is made of differentiable operations on saved inputs
(Other orders of these products: Cherniuk et al., Run LoRA Run, arXiv:2312.03415.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
WIDENS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)  # torch.mm(…, out_dtype=…), traced too: torch 2.9 cannot


def merged_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """F.linear(x, weight + scaling · b @ a, bias), gradients to x, a and b only.

    x (…, in), weight (out, in), bias (out) or None, a (rank, in), b (out, rank) → (…, out) in the dtype of x, or autocast's.
    With b = 0 it is F.linear(x, weight.to(x.dtype), bias) bit for bit.
    """
    y: Tensor = MergedLinear.apply(x, weight, bias, a, b, scaling, matmul_dtype(x))
    return y


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What F.linear would compute in: autocast leaves fp64 alone."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype, scale_b: bool) -> Tensor:
    """weight + scaling · b @ a in `dtype`, summed in fp32 or wider. Forward and backward scale different factors, so that a
    compiler sees two tensors: one that both passes used would be kept from the first to the second, for every layer."""
    wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.promote_types(dtype, torch.float32))
    weight, a, b = weight.to(wide), a.to(wide), b.to(wide)
    return (torch.addmm(weight, scaling * b, a) if scale_b else torch.addmm(weight, b, scaling * a)).to(dtype)


class MergedLinear(torch.autograd.Function):

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float,
                dtype: torch.dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            w = merged_weight(weight, a, b, scaling, dtype, scale_b=False)
            return F.linear(x.to(dtype), w, None if bias is None else bias.to(dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, a, b, ctx.scaling, ctx.dtype = inputs
        ctx.save_for_backward(x, weight, a, b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        wants_x, _, _, wants_a, wants_b, _, _ = ctx.needs_input_grad
        dx = da = db = None
        with torch.autocast(x.device.type, enabled=False):
            if wants_x:
                dx = (dy @ merged_weight(weight, a, b, ctx.scaling, ctx.dtype, scale_b=True)).to(x.dtype)
            if wants_a or wants_b:
                da, db = factor_gradients(x.reshape(-1, x.size(-1)), dy.reshape(-1, dy.size(-1)), a, b, ctx.scaling, ctx.dtype)
        return dx, None, None, da if wants_a else None, db if wants_b else None, None, None


def factor_gradients(x: Tensor, dy: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(dA, dB) of N rows x (N, in) and dy (N, out), each in its factor's dtype.

    Halves are multiplied as halves where a matmul of them can return fp32, on CUDA, and as fp32 elsewhere.
    """
    mixed = WIDENS and dtype in HALVES and x.is_cuda and not torch.is_grad_enabled()  # that matmul has no derivative of its own
    operand = dtype if mixed else torch.promote_types(dtype, torch.float32)

    def matmul(p: Tensor, q: Tensor) -> Tensor:
        p, q = p.to(operand), q.to(operand)
        return torch.mm(p, q, out_dtype=torch.float32) if mixed else p @ q

    x, dy = x.to(operand), dy.to(operand)
    da, db = matmul(matmul(dy, b).T, x), matmul(dy.T, matmul(x, a.T))
    return (scaling * da).to(a.dtype), (scaling * db).to(b.dtype)
