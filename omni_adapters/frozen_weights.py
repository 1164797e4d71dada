"""Frozen weights cast once, instead of in every forward; what is saved, digested and given back is still the fp32 they came as.

nanochat's linear layers hold fp32 masters and cast them to the dtype of x each time. A weight that never changes can be cast
beforehand: y is the same bit for bit, and 6 bytes a weight (fp32 read, bf16 written) less are moved per forward.

Notable:
- only layers whose class casts the weight itself (`host_linear`), that are frozen, have no LoRA, and share their weight with
  nothing else: a table of the same weight would hand on rounded rows
- the Parameter stays the same object with other data, so whoever holds it (an optimizer, a prepender, LoRA) goes on holding it
- the originals stay in host memory: a GPT on CUDA gives half of these weights' memory back there and takes twice that on the
  host; a GPT on the CPU takes half as much again
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from omni_adapters.anatomy import plain_name, unwrap
from omni_adapters.host_linear import linear_form
from omni_adapters.lora import LoRALinear
from omni_adapters.shapes import BadInput

WHERE = "cast_frozen"


class CastWeights:
    """The weights that `cast_frozen` cast, and their originals. `restore()` puts those back; paths says which are cast."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.paths: dict[nn.Parameter, str] = {}
        self.originals: dict[nn.Parameter, Tensor] = {}
        self.layers: list[tuple[nn.Module, nn.Parameter]] = []
        self.handles: list[RemovableHandle] = []

    @torch.no_grad()
    def add(self, layer: nn.Linear, path: str) -> None:
        weight = weight_of(layer)
        if weight not in self.originals:
            self.paths[weight] = path
            self.originals[weight] = weight.data.cpu()
            weight.data = weight.data.to(self.dtype)
        self.layers.append((layer, weight))
        self.handles += [layer.register_forward_pre_hook(self.watch, with_kwargs=True),
                         layer.register_state_dict_post_hook(partial(self.save, weight)),
                         layer.register_load_state_dict_pre_hook(self.load)]

    def watch(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An x of another dtype would meet rounded weights, and a weight that trains is to be fp32: such a layer gets its own
        back first."""
        x, weight = (*args, *kwargs.values())[0], weight_of(layer)
        if weight.dtype != self.dtype or (x.dtype == self.dtype and not weight.requires_grad):
            return
        if torch.compiler.is_compiling():
            raise BadInput(WHERE, f"activations of {x.dtype} at a {'trained' if weight.requires_grad else 'frozen'} "
                           f"{type(layer).__name__} under torch.compile", f"{self.dtype} at frozen ones",
                           "run a forward before compiling: it leaves out the layers that do not fit")
        self.release(weight)

    def save(self, weight: nn.Parameter, layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if weight in self.originals:
            check_own(layer, weight)
            state[f"{prefix}weight"] = self.originals[weight]

    def load(self, layer: nn.Module, *_: Any) -> None:
        """What is loaded goes into the weight that came, not into its rounded stand-in; it is not cast again."""
        self.release(weight_of(layer))

    @torch.no_grad()
    def release(self, weight: nn.Parameter) -> None:
        original = self.originals.pop(weight, None)
        if original is not None:
            weight.data = original.to(weight.device)
            del self.paths[weight]

    def restore(self) -> None:
        """Every weight as it came, bit for bit, and no hook of ours. A second call does nothing. Raises BadInput where a layer
        has another Parameter since, as after fully_shard; nothing is restored then."""
        for layer, weight in self.layers:
            if weight in self.originals:
                check_own(layer, weight)
        for weight in list(self.originals):
            self.release(weight)
        self.layers.clear()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def cast_frozen(gpt: nn.Module, dtype: torch.dtype) -> CastWeights:
    """Cast to `dtype`, once, the frozen weights that the GPT's own linear layers would cast in every forward.

    dtype: of the activations, bfloat16 or float16. A layer that reads another dtype, or trains, gets its weight back at its
           next forward.

    What layers compute is the same bit for bit, so is what state_dict() gives (originals on the CPU), and load_state_dict loads
    into the weights as they came. Call it after LoRA is in and before torch.compile; call restore() before the GPT is cast to
    another dtype, sharded, or given back by `remove`, and not between a forward and its backward. Read a weight through its
    layer or state_dict(): the Parameter itself is rounded, and so is what a fused loss on the CPU, summing in fp32, reads of it.

    Raises BadInput where no weight qualifies; the GPT is then as it came.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise BadInput(WHERE, f"dtype = {dtype}", "torch.bfloat16 or torch.float16, narrower than the masters")
    chosen = casting_layers(unwrap(gpt), dtype)
    if not chosen and any(isinstance(getattr(hook, "__self__", None), CastWeights) for module in unwrap(gpt).modules()
                          for hook in module._forward_pre_hooks.values()):
        raise BadInput(WHERE, f"a {type(unwrap(gpt)).__name__} that was cast already", "weights as they came",
                       "call restore() of what the first call returned")
    if not chosen:
        raise BadInput(WHERE, f"a {type(unwrap(gpt)).__name__} without a frozen fp32 weight that its layer casts itself",
                       "linear layers that cast as nanochat's do, frozen and without LoRA", "freeze the GPT first")
    cast = CastWeights(dtype)
    for path, layer in chosen:
        cast.add(layer, path)
    return cast


@contextmanager
def frozen_cast(gpt: nn.Module, dtype: torch.dtype) -> Iterator[CastWeights]:
    """`cast_frozen`, restored at the end whatever happens."""
    cast = cast_frozen(gpt, dtype)
    try:
        yield cast
    finally:
        cast.restore()


def casting_layers(gpt: nn.Module, dtype: torch.dtype) -> list[tuple[str, nn.Linear]]:
    """(path, layer) of each layer that qualifies, every module once."""
    found = {name: m for name, m in gpt.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, LoRALinear)
             and qualifies(m, dtype)}
    mine = {id(m) for m in found.values()}
    shared = {id(p) for m in gpt.modules() if id(m) not in mine for p in m._parameters.values() if p is not None}
    return [(plain_name(name), m) for name, m in found.items() if id(m.weight) not in shared]


def check_own(layer: nn.Module, weight: nn.Parameter) -> None:
    """What was put in a cast weight's place, as by fully_shard, is rounded: it is neither saved nor left behind unsaid."""
    if weight_of(layer) is not weight:
        raise BadInput(WHERE, f"a {type(layer).__name__} whose cast weight was replaced", "the Parameter that was cast",
                       "call restore() before the GPT is sharded or converted")


def weight_of(layer: nn.Module) -> nn.Parameter:
    return layer.get_parameter("weight")


def qualifies(layer: nn.Linear, dtype: torch.dtype) -> bool:
    weight = layer._parameters.get("weight")
    if weight is None or weight.requires_grad or not weight.is_floating_point() or weight.element_size() <= dtype.itemsize:
        return False
    return linear_form(layer) == "casting"
