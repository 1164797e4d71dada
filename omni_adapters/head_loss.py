"""The host's head and loss in one, where `loss.linear_cross_entropy` computes the same without the logits.

Whether it does is asked, not assumed: the head must be a linear layer without bias that multiplies by its weight
(`host_linear`), what follows it a crop and a softcap, and the loss the cross-entropy of that (`anatomy`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from omni_adapters.anatomy import Anatomy, loss_is_plain, unwrap
from omni_adapters.collective import is_sharded
from omni_adapters.frozen_weights import CastWeights
from omni_adapters.hooks import HostHooks
from omni_adapters.host_linear import linear_form
from omni_adapters.lora import LoRALinear
from omni_adapters.lora_matmul import matmul_dtype
from omni_adapters.loss import REDUCTIONS, linear_cross_entropy, saves_logits

LossForm = Literal["host", "fused", "auto"]
FORMS = ("host", "fused", "auto")
OURS = (HostHooks, CastWeights)  # a tuple, and below a list: torch.compile of torch 2.9 reads no unions and no generators


def head_of(gpt: nn.Module, anatomy: Anatomy) -> nn.Module:
    return unwrap(gpt).get_submodule(anatomy.lm_head)


def head_obstacle(gpt: nn.Module, anatomy: Anatomy) -> str:
    """Why the host's loss can never be fused with its head; empty where it can. Runs the host on two tokens, and a head of the
    host's own class."""
    head = head_of(gpt, anatomy)
    if not anatomy.head_is_plain:
        return "logits that are more than the head's output, cropped and capped"
    if not loss_is_plain(gpt, anatomy):
        return "a loss that is not the mean cross-entropy of the logits"
    if not isinstance(head, nn.Linear) or head.bias is not None or linear_form(head) == "own":
        return f"a head {type(head).__name__} that is more than one matrix"
    return ""


def call_obstacle(gpt: nn.Module, anatomy: Anatomy, gpt_kwargs: Mapping[str, Any]) -> str:
    """Why it cannot in this call, in a GPT without a `head_obstacle`."""
    head = head_of(gpt, anatomy)
    if isinstance(head, LoRALinear):
        return "LoRA on the head"
    if "forward" in vars(head) or not all([is_ours(hook) for hook in hooks_of(head)]):
        return "a head whose output or gradient somebody's hook may change"
    if is_sharded(weight_of(head)):
        return "a head whose weight is sharded"
    if other := sorted(set(gpt_kwargs) - {"loss_reduction"}):
        return f"arguments of the host's own, {', '.join(other)}"
    if gpt_kwargs.get("loss_reduction", "mean") not in REDUCTIONS:
        return f"loss_reduction = {gpt_kwargs['loss_reduction']!r}"
    return ""


def hooks_of(head: nn.Module) -> list[Any]:
    return [hook for hooks in (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
            for hook in hooks.values()]


def is_ours(hook: Any) -> bool:
    """The prepender's own hook, and the one that watches a cast weight: neither changes what the head computes."""
    return isinstance(getattr(hook, "__self__", None), OURS)


def weight_of(head: nn.Module) -> Tensor:
    assert isinstance(head.weight, Tensor)
    return head.weight


def word_rows(gpt: nn.Module, anatomy: Anatomy) -> Tensor:
    """The head's weight without rows of padding, (vocab_size, n_embd). As it is where there are none: the gradient of a slice is
    written twice."""
    weight = weight_of(head_of(gpt, anatomy))
    return weight if weight.size(0) == anatomy.vocab_size else weight[: anatomy.vocab_size]


def head_loss(hidden: Tensor, targets: Tensor, gpt: nn.Module, anatomy: Anatomy, reduction: Any = "mean") -> Tensor:
    """The loss that the host makes of hidden states (B, T, n_embd) and targets (B, T): a scalar, or (B · T,) for "none"."""
    weight = word_rows(gpt, anatomy)
    if hidden.is_cuda:
        dtype = matmul_dtype(hidden)  # in which the host's head would multiply, under autocast too
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    loss = linear_cross_entropy(hidden, weight, targets, softcap=anatomy.softcap, reduction=reduction)
    return loss.flatten() if reduction == "none" else loss


def worth_fusing(targets: Tensor, gpt: nn.Module, anatomy: Anatomy) -> bool:
    """Whether "auto" fuses: where the host returns the loss alone, and `saves_logits` says so."""
    return anatomy.output == "tensor" and saves_logits(targets, word_rows(gpt, anatomy))


def as_returned(loss: Tensor, anatomy: Anatomy, output: Any) -> Any:
    """`loss` in the form in which the host returns it; None stands where logits would. output: of the host's own forward."""
    if anatomy.output == "tensor":
        return loss
    if anatomy.output == "tuple":
        return (None, loss, *output[2:])
    output.logits, output.loss = None, loss
    return output
