"""The hooks that let soft tokens into a GPT, and the state of the forward in flight.

Between forwards every hook is inert. A forward is one of three: our own (`run`), a foreign one inside `bind`, or the
recomputation of either during backward, which activation checkpointing starts: it is known by the ids it brings.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from omni_adapters.anatomy import Anatomy, unwrap
from omni_adapters.shapes import BadInput
from omni_adapters.splice import FILLER, SoftTokens, Splice, recognise, text_after

ValueEmbeds = Literal["zero", "placeholder", "learned"]


@dataclass
class Bound:
    """Soft tokens for a foreign caller, and the splice of its forward in flight."""

    soft_tokens: SoftTokens
    insert_at: int
    num_soft: int                 # soft tokens of one row
    heard: bool = False           # its prefill has come
    splice: Splice | None = None
    tail: Tensor | None = None    # (B,) bool, rows whose last slot so far is soft


class HostHooks:
    """Hooks on the sub-modules of one GPT. Refuses a GPT that already has some."""

    def __init__(self, gpt: nn.Module, anatomy: Anatomy, value_embeds: ValueEmbeds,
                 side_rows: nn.ParameterDict) -> None:
        self.anatomy, self.value_embeds, self.side_rows = anatomy, value_embeds, side_rows
        self.busy = False                      # our own forward runs, with or without a splice
        self.splice: Splice | None = None
        self.want_hidden = False
        self.hidden: Tensor | None = None
        self.bound: Bound | None = None
        self.replay: Splice | None = None      # splice of the forward that backward recomputes
        self.past: list[tuple[weakref.ref[Tensor], Splice]] = []  # an entry lives as long as autograd keeps its ids
        self.tails: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
        self.handles = self.add(unwrap(gpt))
        self.attached = True

    def add(self, gpt: nn.Module) -> list[RemovableHandle]:
        module, anatomy = gpt.get_submodule, self.anatomy
        handles = [module(anatomy.wte).register_forward_hook(self.on_wte)]
        for name in anatomy.side_tables:
            handles.append(module(name).register_forward_hook(partial(self.on_side_table, name)))
        for name in anatomy.derived_tables:
            handles.append(module(name).register_forward_hook(partial(self.on_derived_table, name)))
        if anatomy.smear_gate is not None:
            handles.append(module(anatomy.smear_gate).register_forward_hook(self.on_smear_gate))
        if anatomy.head_source is None:
            handles.append(module(anatomy.lm_head).register_forward_pre_hook(self.on_head))
        else:
            handles.append(module(anatomy.head_source).register_forward_hook(self.on_head_source))
        return handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.past.clear()
        self.attached = False

    # ---- which forward is this ------------------------------------------------------------------------------------

    def run(self, gpt: nn.Module, splice: Splice | None, idx: Tensor, *args: Any, **kwargs: Any) -> Any:
        """gpt(idx, …) with the hooks awake; inert again whatever happens."""
        if splice is not None and not torch.compiler.is_compiling():
            self.remember(idx, splice)
        self.busy, self.splice = True, splice
        try:
            result = gpt(idx, *args, **kwargs)
        finally:
            self.busy, self.splice = False, None
        if kwargs.get("kv_cache") is not None:  # only now: a forward that failed has not moved the cache
            self.remember_tail(kwargs["kv_cache"], splice)
        return result

    def run_for_hidden(self, gpt: nn.Module, splice: Splice | None, idx: Tensor) -> Tensor:
        """What the head would have read, (B, T, n_embd); the head itself gets one position."""
        self.want_hidden = True
        try:
            self.run(gpt, splice, idx)
            hidden = self.hidden
        finally:
            self.want_hidden, self.hidden = False, None
        assert hidden is not None
        return hidden

    @contextmanager
    def bind(self, soft_tokens: SoftTokens, insert_at: int, num_soft: int) -> Iterator[None]:
        self.bound = Bound(soft_tokens, insert_at, num_soft)
        try:
            yield
        finally:
            self.bound = None

    def remember(self, idx: Tensor, splice: Splice) -> None:
        """Keep the splice while autograd keeps `idx`, for recomputation in backward."""
        if torch.is_inference_mode_enabled():
            return
        past = self.past

        def forget(reference: weakref.ref[Tensor]) -> None:
            past[:] = [entry for entry in past if entry[0] is not reference]

        past.append((weakref.ref(idx, forget), splice))

    def remember_tail(self, kv_cache: Any, splice: Splice | None) -> None:
        """Which rows of a cache end on a soft token: the text that comes next must not be smeared with it."""
        if splice is not None and splice.rows is not None:
            self.tails[kv_cache] = splice.soft[:, -1]
        else:
            self.tails.pop(kv_cache, None)

    def current(self, idx: Tensor | None = None) -> Splice | None:
        """The splice of the forward this hook fires in; None where there is nothing to do."""
        if self.busy:
            return self.splice
        if self.bound is not None:
            return self.bound.splice
        if torch.compiler.is_compiling() or not self.past or torch._C._current_graph_task_id() == -1:
            return None  # neither ours nor bound, and no backward is running that could recompute one of ours
        if idx is not None:
            self.replay = self.recall(idx)
        return self.replay

    def recall(self, idx: Tensor) -> Splice | None:
        """Checkpointing hands the same storage to the recomputation, if not always the same tensor object."""
        for reference, splice in reversed(self.past):
            ids = reference()
            if ids is not None and ids.data_ptr() == idx.data_ptr() and ids.shape == idx.shape:
                return splice
        return None

    def begin_foreign(self, bound: Bound, idx: Tensor) -> None:
        """A foreign forward begins: tell an expanded prompt from a decode step, and lay out its splice."""
        bound.splice = None
        if bound.num_soft == 0:
            return
        if idx.size(1) == 1 and (bound.heard or bound.num_soft > 1):
            if bound.tail is not None:  # a batch may grow after a prefill of one row
                bound.splice = text_after(bound.tail.expand(idx.size(0)), idx)
                bound.tail = None
            return
        bound.splice = recognise("SoftTokenPrepender.bind", idx, bound.soft_tokens, bound.insert_at, self.anatomy.n_embd)
        bound.tail, bound.heard = bound.splice.soft[:, -1], True
        self.remember(idx, bound.splice)

    # ---- hooks ------------------------------------------------------------------------------------------------------

    def on_wte(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        if self.bound is not None and not self.busy:
            self.begin_foreign(self.bound, args[0])
        splice = self.current(args[0])
        if splice is None or splice.rows is None:
            return None
        return torch.where(splice.soft.unsqueeze(-1), splice.rows.to(out.dtype), out)

    def on_side_table(self, name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        splice = self.current(args[0])
        if splice is None or splice.rows is None:
            return None
        return torch.where(splice.soft.unsqueeze(-1), self.side_row(name, module, out), out)

    def on_derived_table(self, name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """A bigram is a text-only thing: the token after a soft one has none."""
        splice = self.current()
        if splice is None or self.value_embeds == "placeholder":
            return None
        out = torch.where(splice.edge.unsqueeze(-1), out.new_zeros(()), out)
        return torch.where(splice.soft.unsqueeze(-1), self.side_row(name, module, out), out)

    def side_row(self, name: str, module: nn.Module, out: Tensor) -> Tensor:
        """What a side table gives at soft slots: (width,), or a zero that broadcasts."""
        if self.value_embeds == "learned":
            return self.side_rows[row_key(name)].to(out.dtype)
        if self.value_embeds == "placeholder":
            assert isinstance(module.weight, Tensor)
            return module.weight[FILLER].to(out.dtype)
        return out.new_zeros(())

    def on_smear_gate(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """The gate sees slots 1 … T_fused − 1, or the one slot of a decode step; sigmoid(−inf) is exactly 0."""
        splice = self.current()
        if splice is None:
            return None
        return out.masked_fill(splice.edge[:, -out.size(1) :].unsqueeze(-1), -torch.inf)

    def on_head(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        hidden = self.answers(args[0])
        return None if hidden is None else (hidden,)

    def on_head_source(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        return self.answers(out)

    def answers(self, hidden: Tensor) -> Tensor | None:
        """(B, T_fused, n_embd) → (B, T, n_embd) for the head, or None to leave its input alone."""
        splice = self.current()
        if splice is not None and splice.answer is not None:
            if hidden.size(1) != splice.soft.size(1):
                raise BadInput("SoftTokenPrepender", f"{hidden.size(1)} positions at the head", f"all {splice.soft.size(1)}",
                               "leave out arguments that crop positions, such as logits_to_keep")
            index = splice.answer.unsqueeze(-1).expand(-1, -1, hidden.size(-1))
            hidden = hidden.gather(1, index)
        elif not (self.busy and self.want_hidden):
            return None
        if self.busy and self.want_hidden:
            self.hidden = hidden
            return hidden[:, :1]
        return hidden


def row_key(name: str) -> str:
    """Parameter names may not contain dots."""
    return name.replace(".", "-")


def refuse_second(gpt: nn.Module) -> None:
    """Two sets of hooks on one GPT would fight over its rows."""
    for name, module in gpt.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            function = hook.func if isinstance(hook, partial) else hook
            if isinstance(getattr(function, "__self__", None), HostHooks):
                raise BadInput("SoftTokenPrepender", f"a GPT whose {name} another prepender has hooked",
                               "one prepender per GPT", "use that one, or call .remove() on it first")
