"""The hooks that let soft tokens into a GPT, and the state of the forward in flight.

Between forwards every hook is inert. A forward is one of three: our own (`run`), a foreign one inside `bind`, or the
repetition of either during backward, which activation checkpointing starts (`recompute`).
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
from omni_adapters.recompute import Entry, KeepAlive, Life, Recomputation
from omni_adapters.shapes import BadInput
from omni_adapters.splice import FILLER, SoftTokens, Splice, recognise, text_after

ValueEmbeds = Literal["zero", "placeholder", "learned"]
STAYS = ("anatomy", "value_embeds", "side_rows", "handles", "attached")


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
    """Hooks on the sub-modules of one GPT."""

    def __init__(self, gpt: nn.Module, anatomy: Anatomy, value_embeds: ValueEmbeds,
                 side_rows: nn.ParameterDict) -> None:
        self.anatomy, self.value_embeds, self.side_rows = anatomy, value_embeds, side_rows
        self.sleep()
        self.handles = self.add(unwrap(gpt))
        self.attached = True
        forget_compiled(gpt)

    def sleep(self) -> None:
        """No forward is in flight, none is remembered, and no cache is known."""
        self.busy = False                      # our own forward runs, with or without a splice
        self.splice: Splice | None = None
        self.entry: Entry | None = None        # what that forward is remembered by
        self.want_hidden = False
        self.hidden: Tensor | None = None
        self.bound: Bound | None = None
        self.recomputation = Recomputation()
        self.tails: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: what forwards leave behind stays behind, graphs and caches being elsewhere."""
        return {name: vars(self)[name] for name in STAYS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.sleep()

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

    def remove(self, gpt: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.recomputation.clear()
        self.attached = False
        forget_compiled(gpt)

    # ---- which forward is this ------------------------------------------------------------------------------------

    def run(self, gpt: nn.Module, splice: Splice | None, idx: Tensor, *args: Any, **kwargs: Any) -> Any:
        """gpt(idx, …) with the hooks awake; inert again whatever happens."""
        if splice is not None:
            self.entry = self.recomputation.keep(idx, splice)
        self.busy, self.splice = True, splice
        try:
            result = gpt(idx, *args, **kwargs)
        finally:
            self.busy, self.splice, self.entry = False, None, None
        if kwargs.get("kv_cache") is not None:  # only now: a forward that failed has not moved the cache
            self.remember_tail(kwargs["kv_cache"], splice)
        return result

    def remember_tail(self, cache: Any, splice: Splice | None) -> None:
        """Which rows of a cache end on a soft token: the text that comes next has no bigram and no smear with it."""
        if splice is None or splice.rows is None:
            self.tails.pop(cache, None)
            return
        self.tails[cache] = splice.soft[:, -1]
        if getattr(cache, "prev_embedding", None) is not None:  # so that a bare decode step smears with nothing, too
            cache.prev_embedding = cache.prev_embedding.masked_fill(splice.soft[:, -1:, None], 0.0)

    def run_for_hidden(self, gpt: nn.Module, splice: Splice | None, idx: Tensor) -> tuple[Tensor, Any]:
        """What the head would have read, (B, T, n_embd), and what the host returned: the head itself gets one position."""
        self.want_hidden = True
        try:
            returned = self.run(gpt, splice, idx)
            hidden = self.hidden
        finally:
            self.want_hidden, self.hidden = False, None
        if hidden is None:
            raise BadInput("SoftTokenPrepender", f"a forward that did not call the {self.anatomy.lm_head} it had",
                           "the head that was there when the prepender was built", "build a new prepender")
        return hidden, returned

    @contextmanager
    def bind(self, soft_tokens: SoftTokens, insert_at: int, num_soft: int) -> Iterator[None]:
        self.bound = Bound(soft_tokens, insert_at, num_soft)
        try:
            yield
        finally:
            self.bound = None

    def begin_foreign(self, bound: Bound, idx: Tensor) -> Life | None:
        """A foreign forward begins: tell an expanded prompt from a decode step, and lay out its splice.

        Returns what its graph must keep alive: the caller's ids may outlive the graph and serve another forward.
        """
        bound.splice = None
        if bound.num_soft == 0:
            return None
        if idx.size(1) == 1 and bound.heard:
            if bound.tail is not None:  # a batch may grow after a prefill of one row
                bound.splice = text_after(bound.tail.expand(idx.size(0)), idx)
                bound.tail = None
            return None
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # outside the caller's checkpoint
            bound.splice = recognise("SoftTokenPrepender.bind", idx, bound.soft_tokens, bound.insert_at, self.anatomy.n_embd)
        bound.tail = bound.splice.soft[:, -1]
        bound.heard = True
        life = Life()
        self.recomputation.keep(idx, bound.splice, life, bound.soft_tokens)
        return life

    def current(self, found: Splice | None = None) -> Splice | None:
        """The splice of the forward this hook fires in, where it is not a repetition that was `found` by its input."""
        if self.busy:
            return self.splice
        if self.recomputation.running():
            found = found or self.recomputation.begun()
        return found or (None if self.bound is None else self.bound.splice)

    def repeating(self) -> bool:
        return not self.busy and self.recomputation.running()

    # ---- hooks ------------------------------------------------------------------------------------------------------

    def on_wte(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        life = None
        found = self.recomputation.begin(args[0]) if self.repeating() else None
        if found is None and self.bound is not None and not self.busy:
            life = self.begin_foreign(self.bound, args[0])
        splice = self.current(found)
        if splice is None or splice.rows is None:
            return None
        out = torch.where(splice.soft.unsqueeze(-1), splice.rows.to(out.dtype), out)
        return out if life is None or not torch.is_grad_enabled() else KeepAlive.apply(out, life)

    def on_side_table(self, name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        splice = self.splice_of(args[0])
        if splice is None or splice.rows is None:
            return None
        return torch.where(splice.soft.unsqueeze(-1), self.side_row(name, out), out)

    def on_side_ids(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Ids, not rows, so that a table sharded over processes looks up its own row of the filler id."""
        splice = self.splice_of(args[0])
        if splice is None or splice.rows is None:
            return None
        return torch.where(splice.soft, FILLER, args[0]), *args[1:]

    def splice_of(self, ids: Tensor) -> Splice | None:
        return self.current(self.recomputation.begin(ids) if self.repeating() else None)

    def on_derived_table(self, name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """A bigram is a text-only thing: the token after a soft one has none."""
        if self.entry is not None:
            self.entry.derived[name] = args[0]
        splice = self.current(self.recomputation.by_derived(name, args[0]) if self.repeating() else None)
        if splice is None:
            return None
        out = torch.where(splice.edge.unsqueeze(-1), out.new_zeros(()), out)
        return torch.where(splice.soft.unsqueeze(-1), self.side_row(name, out), out)

    def side_row(self, name: str, out: Tensor) -> Tensor:
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
        if self.entry is not None:
            self.entry.hidden = weakref.ref(hidden)
        splice = self.current(self.recomputation.by_hidden(hidden) if self.repeating() else None)
        if splice is not None and splice.answer is not None:
            if hidden.size(1) != splice.soft.size(1):
                raise BadInput("SoftTokenPrepender", f"{hidden.size(1)} positions at the head", f"all {splice.soft.size(1)}",
                               "leave out arguments that crop positions, such as logits_to_keep")
            hidden = hidden.gather(1, splice.answer.unsqueeze(-1).expand(-1, -1, hidden.size(-1)))
        elif not (self.busy and self.want_hidden):
            return None
        if self.busy and self.want_hidden:
            self.hidden = hidden
            return hidden[:, :1]
        return hidden


def forget_compiled(gpt: nn.Module) -> None:
    """Code compiled before hooks came or went does not know them: torch guards no hooks (skip_nnmodule_hook_guards)."""
    if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in gpt.modules()):
        torch.compiler.reset()


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
