"""What a host's linear layer computes, found by asking it.

A host may bring a linear class of its own: nanochat's casts an fp32 master to the dtype of x, others scale, quantise or mask.
A stand-in that shares everything with the layer but its tensors, which hold waves, is run beside F.linear: who agrees
bit for bit, in training mode and in evaluation, with autocast and without, may be replaced by F.linear.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LinearForm = Literal["plain", "casting", "own"]
ROWS = 16  # of the input that a stand-in is asked about


def linear_form(layer: nn.Linear) -> LinearForm:
    """plain:   y = x Wᵀ + bias, where all have one dtype (nn.Linear).
    casting: y = x W.to(x.dtype)ᵀ + bias.to(x.dtype), for x of any floating dtype.
    own:     anything else, and whatever cannot be asked: a weight on the meta device, sharded, quantised.

    The layer itself is not run; the random state of the CPU and of its device stays.
    """
    if "weight" not in layer._parameters or type(layer.weight) is not nn.Parameter or not layer.weight.is_floating_point():
        return "own"
    if "forward" in vars(layer):
        return "own"
    if type(layer).forward is nn.Linear.forward:
        return "plain"
    if layer.weight.is_meta:
        return "own"
    dtype = layer.weight.dtype
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    if not agrees(layer, dtype):
        return "own"
    return "casting" if agrees(layer, other) else "plain"


@torch.no_grad()
def agrees(layer: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether the class's forward is F.linear with everything cast to x's `dtype`, under autocast too; not, where it raises."""
    twin, device = stand_in(layer), layer.weight.device
    x = wave(ROWS, layer.weight.size(1), device).to(dtype)
    weight, bias = twin.weight.to(dtype), None if twin.bias is None else twin.bias.to(dtype)
    own_generator = [device] if device.type == "cuda" else []
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16  # autocast to x's own dtype would show nothing
    for autocast in (False, True):
        with torch.random.fork_rng(devices=own_generator), torch.autocast(device.type, other, enabled=autocast):
            expected = F.linear(x, weight, bias)
            if not all(same(outcome(twin, x, training), expected) for training in (True, False)):
                return False
    return True


def stand_in(layer: nn.Linear) -> nn.Linear:
    """An instance of the layer's class with copies of its tables of parameters and buffers, and other values in them."""
    twin: nn.Linear = nn.Module.__new__(type(layer))
    vars(twin).update(vars(layer))
    twin._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in layer._buffers.items()}
    n_out, n_in = layer.weight.shape
    weight = wave(n_out, n_in, layer.weight.device).to(layer.weight.dtype)
    bias = None if layer.bias is None else wave(1, n_out, layer.bias.device)[0].to(layer.bias.dtype)
    twin._parameters = layer._parameters | {"weight": frozen(weight), "bias": None if bias is None else frozen(bias)}
    return twin


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def wave(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) of fp32 in ±1, no two rows alike and hardly a value that bf16 has."""
    down = torch.arange(1, rows + 1, device=device, dtype=torch.float32)
    across = torch.arange(1, columns + 1, device=device, dtype=torch.float32)
    return torch.outer(down.sin(), across.cos())


def outcome(twin: nn.Linear, x: Tensor, training: bool) -> Tensor | None:
    twin.training = training
    try:
        y: Tensor = type(twin).forward(twin, x)
    except Exception:  # of any kind: a class that cannot be asked is not known
        return None
    return y


def same(y: Tensor | None, expected: Tensor) -> bool:
    return isinstance(y, Tensor) and y.dtype == expected.dtype and y.shape == expected.shape and torch.equal(y, expected)
