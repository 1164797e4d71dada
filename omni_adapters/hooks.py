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


class Past:
    def __init__(self, idx, splice, life):
        self.idx, self.splice, self.life = idx, splice, life
        self.soft = None  # life: weakref, None while ids decide
        self.derived, self.hidden = {}, None

    def alive(self):
        return self.idx() is not None and (self.life is None or self.life() is not None)


class Marker:
    pass


class Keep(torch.autograd.Function):
    """The identity; its node keeps `marker` alive as long as the graph lives."""

    @staticmethod
    def forward(ctx, out, marker):
        ctx.marker = marker
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


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
        self.replay = (-1, None)
        self.past: list[Past] = []
        self.entry: Past | None = None
        self.tails: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
        self.handles = self.add(unwrap(gpt))
        self.attached = True
        if any(m._compiled_call_impl is not None or isinstance(m, torch._dynamo.eval_frame.OptimizedModule)
               for m in gpt.modules()):
            torch.compiler.reset()

    def add(self, gpt: nn.Module) -> list[RemovableHandle]:
        module, anatomy = gpt.get_submodule, self.anatomy
        handles = [module(anatomy.wte).register_forward_hook(self.on_wte)]
        for name in anatomy.side_tables:
            if self.value_embeds == "placeholder":
                handles.append(module(name).register_forward_pre_hook(self.on_side_ids))
            else:
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
        self.replay, self.entry = (-1, None), None
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
            self.busy, self.splice, self.entry = False, None, None
        cache = kwargs.get("kv_cache")
        if cache is not None:  # only now: a forward that failed has not moved the cache
            self.remember_tail(cache, splice)
            if splice is not None and splice.rows is not None and getattr(cache, "prev_embedding", None) is not None:
                cache.prev_embedding = cache.prev_embedding.masked_fill(splice.soft[:, -1:, None], 0.0)
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

    def remember(self, idx: Tensor, splice: Splice, marker=None) -> None:
        """Keep the splice while autograd keeps `idx`, for recomputation in backward."""
        self.entry = None
        if not torch.is_grad_enabled():
            return
        past = self.past

        def forget(_: Any) -> None:
            past[:] = [entry for entry in past if entry.alive()]

        self.entry = Past(weakref.ref(idx, forget), splice, None if marker is None else weakref.ref(marker, forget))
        past.append(self.entry)

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
        if self.recomputing():
            if idx is not None:
                found = self.recall(idx)
                self.replay = (torch._C._current_graph_task_id(), found)
            else:
                task, found = self.replay
                found = found if task == torch._C._current_graph_task_id() else None
            if found is not None or self.bound is None:
                return found
        return None if self.bound is None else self.bound.splice

    def recomputing(self):
        return not torch.compiler.is_compiling() and bool(self.past) and torch._C._current_graph_task_id() != -1

    def unique(self, found, softs=None):
        if any(other.soft.shape != found[0].soft.shape or not torch.equal(other.soft, found[0].soft) or (
                softs is not None and any(one is not softs[0] for one in softs)) for other in found[1:]):
            raise BadInput("SoftTokenPrepender", "one tensor of ids checkpointed with two soft tokens", "one", "clone the ids")
        return found[0] if found else None

    def recall(self, idx: Tensor) -> Splice | None:
        """Checkpointing hands the same storage to the recomputation, if not always the same tensor object."""
        found, softs = [], []
        for entry in self.past:
            ids = entry.idx()
            if entry.alive() and ids.data_ptr() == idx.data_ptr() and ids.shape == idx.shape:
                found.append(entry.splice)
                softs.append(entry.soft)
        return self.unique(found, softs)

    def begin_foreign(self, bound: Bound, idx: Tensor) -> None:
        """A foreign forward begins: tell an expanded prompt from a decode step, and lay out its splice."""
        bound.splice = None
        if bound.num_soft == 0:
            return
        if idx.size(1) == 1 and bound.heard:
            if bound.tail is not None:  # a batch may grow after a prefill of one row
                bound.splice = text_after(bound.tail.expand(idx.size(0)), idx)
                bound.tail = None
            return
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            bound.splice = recognise("SoftTokenPrepender.bind", idx, bound.soft_tokens, bound.insert_at, self.anatomy.n_embd)
        bound.tail = bound.splice.soft[:, -1]
        bound.heard = True
        self.marker = Marker()
        self.remember(idx, bound.splice, self.marker)
        if self.entry is not None:
            self.entry.soft = bound.soft_tokens

    # ---- hooks ------------------------------------------------------------------------------------------------------

    def on_wte(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        self.marker = None
        if self.bound is not None and not self.busy and not (self.recomputing() and self.recall(args[0]) is not None):
            self.begin_foreign(self.bound, args[0])
        splice = self.current(args[0])
        if splice is None or splice.rows is None:
            return None
        out = torch.where(splice.soft.unsqueeze(-1), splice.rows.to(out.dtype), out)
        marker, self.marker = self.marker, None
        return out if marker is None or not torch.is_grad_enabled() else Keep.apply(out, marker)

    def on_side_table(self, name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        splice = self.current(args[0])
        if splice is None or splice.rows is None:
            return None
        return torch.where(splice.soft.unsqueeze(-1), self.side_row(name, module, out), out)

    def on_side_ids(self, module, args):
        splice = self.current(args[0])
        if splice is None or splice.rows is None:
            return None
        return (torch.where(splice.soft, FILLER, args[0]), *args[1:])

    def on_derived_table(self, name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """A bigram is a text-only thing: the token after a soft one has none."""
        if not self.busy and self.recomputing():
            splice = self.unique([e.splice for e in self.past if e.alive() and name in e.derived
                                  and e.derived[name].shape == args[0].shape and torch.equal(e.derived[name], args[0])])
            if splice is None and self.bound is not None:
                splice = self.bound.splice
        else:
            splice = self.current()
            if self.entry is not None and splice is self.entry.splice and not torch.compiler.is_compiling():
                self.entry.derived[name] = args[0]
        if splice is None:
            return None
        out = torch.where(splice.edge.unsqueeze(-1), out.new_zeros(()), out)
        return torch.where(splice.soft.unsqueeze(-1), self.side_row(name, module, out), out)

    def side_row(self, name: str, module: nn.Module, out: Tensor) -> Tensor:
        """What a side table gives at soft slots: (width,), or a zero that broadcasts."""
        if self.value_embeds == "learned":
            return self.side_rows[row_key(name)].to(out.dtype)
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
        if not self.busy and self.recomputing():
            splice = next((e.splice for e in self.past if e.alive() and e.hidden is not None and e.hidden() is not None
                           and e.hidden().data_ptr() == hidden.data_ptr()), None)
            splice = splice or self.current()
        else:
            splice = self.current()
            if self.entry is not None and splice is self.entry.splice and not torch.compiler.is_compiling():
                self.entry.hidden = weakref.ref(hidden)
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
