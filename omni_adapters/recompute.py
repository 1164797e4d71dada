"""Activation checkpointing runs parts of a forward again during backward, when the prepender is awake no more.

`Recomputation` remembers the splice of each forward whose graph may still run backward, and finds it again by what a
checkpoint hands to the part it repeats: the ids, the ids derived from them, or the hidden states. Nothing here keeps a
graph or an activation alive.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omni_adapters.shapes import BadInput
from omni_adapters.splice import SoftTokens, Splice


@dataclass
class Entry:
    """One forward: its splice, and what it can be recognised by."""

    ids: weakref.ref[Tensor]
    splice: Splice
    life: weakref.ref[Any]                                     # dies with the forward's graph
    source: SoftTokens | None                                  # what a foreign caller had bound
    derived: dict[str, Tensor] = field(default_factory=dict)   # ids computed from the ids, by the table they fed
    hidden: weakref.ref[Tensor] | None = None                  # what the head was given


class Life:
    """Something a graph can keep alive."""


class KeepAlive(torch.autograd.Function):
    """The identity. Its node holds `life` for as long as the graph exists, checkpointed or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, life: Life) -> Tensor:
        ctx.life = life
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Recomputation:
    """The forwards that may run again."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.replay: tuple[int, Splice | None] = (-1, None)  # backward in flight, splice of the forward it repeats

    def clear(self) -> None:
        self.entries.clear()
        self.replay = (-1, None)

    def keep(self, ids: Tensor, splice: Splice, life: Life | None = None, source: SoftTokens | None = None) -> Entry | None:
        """Remember a forward that begins, until `life` dies or, where that is not given, `ids`."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        entries = self.entries

        def forget(dead: weakref.ref[Any]) -> None:
            entries[:] = [entry for entry in entries if entry.life is not dead and entry.ids is not dead]

        entry = Entry(weakref.ref(ids, forget), splice, weakref.ref(ids if life is None else life, forget), source)
        entries.append(entry)
        return entry

    def running(self) -> bool:
        """Is this a backward that may repeat one of ours?"""
        return not torch.compiler.is_compiling() and bool(self.entries) and torch._C._current_graph_task_id() != -1

    def begin(self, ids: Tensor) -> Splice | None:
        """A forward is being repeated from its ids on; its later parts are known by their backward."""
        found = self.by_ids(ids)
        self.replay = (torch._C._current_graph_task_id(), found)
        return found

    def begun(self) -> Splice | None:
        task, splice = self.replay
        return splice if task == torch._C._current_graph_task_id() else None

    def by_ids(self, ids: Tensor) -> Splice | None:
        """By storage: a reentrant checkpoint detaches its arguments, so the tensor may be another object."""
        return the_one([entry for entry in self.entries if same_storage(entry.ids(), ids)])

    def by_derived(self, name: str, ids: Tensor) -> Splice | None:
        """By value, since derived ids are computed again."""
        return the_one([entry for entry in self.entries if name in entry.derived
                        and entry.derived[name].shape == ids.shape and torch.equal(entry.derived[name], ids)])

    def by_hidden(self, hidden: Tensor) -> Splice | None:
        return the_one([entry for entry in self.entries if entry.hidden and same_storage(entry.hidden(), hidden)])


def same_storage(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.data_ptr() == b.data_ptr() and a.shape == b.shape


def the_one(found: list[Entry]) -> Splice | None:
    """The splice that all of `found` agree on."""
    for other in found[1:]:
        if other.source is not found[0].source or not torch.equal(other.splice.soft, found[0].splice.soft):
            raise BadInput("SoftTokenPrepender", "a checkpoint that repeats ids which two forwards gave different soft tokens",
                           "ids that tell the forwards apart", "pass idx.clone() to the second forward, or run backward first")
    return found[0].splice if found else None
