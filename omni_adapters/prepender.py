"""Slip soft tokens into the forward of a GPT that is never edited.

The GPT is called with `fused_idx`, a filler id wherever a soft token sits. Hooks on its sub-modules do the rest:

    wte            rows at soft slots become soft tokens (the GPT norms them next)
    side tables    rows at soft slots become zero, the row of id 0, or a learned vector
    smear_gate     −inf at soft slots and right after them, so that its sigmoid is exactly 0
    lm_head        hidden states are gathered to one per text position *before* the vocabulary matmul

The root module has no hook: nanochat's Engine calls `model.forward`, where root hooks do not fire. This file checks
input and plans; `splice` lays out, `hooks` acts, `decoding` generates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapters import layout
from omni_adapters.anatomy import Anatomy, discover_anatomy, table, unwrap
from omni_adapters.decoding import Decoder, check_sampling, stream
from omni_adapters.features import Features, check_form, check_values, full
from omni_adapters.head_loss import FORMS, LossForm, as_returned, call_obstacle, head_loss, head_obstacle, worth_fusing
from omni_adapters.hooks import HostHooks, ValueEmbeds, refuse_second, row_key
from omni_adapters.shapes import BadInput, shape
from omni_adapters.splice import (
    FILLER,
    Columns,
    SoftTokens,
    Splice,
    crop_text,
    fuse,
    lens_of,
    placeholder_columns,
    prefix_columns,
    spoil_overflow,
    text_after,
)

IGNORE = -1  # nanochat's ignore_index


class SoftTokenPrepender(nn.Module):
    """Drive `gpt` with soft tokens between its text; from outside the soft tokens are invisible.

    gpt:          a nanochat-style GPT; never edited, its `state_dict()` never changes.
    value_embeds: what side tables (value embeddings) give at soft slots: "zero", "placeholder" (the row of id 0, as the
                  hand-patched forward had it) or "learned" (one vector per table in `side_rows`, zero at first).
    insert_at:    text position that a prefix comes before: 0 = before everything, 1 = after `<|bos|>`.
    loss:         who computes the loss of `forward` with targets. "host": its own code, bit for bit. "fused": head and loss in
                  one (`linear_cross_entropy`), without logits: fp32 sums, less time and a fraction of the memory; a host that
                  returns logits beside its loss gives None in their place, one whose head does something else is refused.
                  "auto": fused where the host returns the loss alone, nothing is in the way, and it is worth it.

    `soft_tokens` is (B, T_soft, n_embd), or ragged `Features` (rows of length 0 allowed), put before text position
    `insert_at`; or `{placeholder id: Features}`, where each occurrence of the id in idx, read row by row, gives way to
    the next clip. Placeholder ids may lie outside the vocabulary.

    A text position is answered by the last slot before the next text token: at a placeholder by the clip's last soft
    token, at position `insert_at` − 1 by the prefix's. Targets that are placeholder ids are never graded.

    `check_values` (default True) reads ids, lengths and finiteness back from the device, to refuse bad ones with a
    sentence; under torch.compile only shapes are checked. `pad_to` (default None) fixes the fused length, which
    placeholder mode needs under torch.compile; a row that does not fit is refused, in compiled code it becomes NaN. One
    thread at a time may call one GPT.

    Raises BadInput for a GPT that cannot be read or already has a prepender.
    """

    pad_to: int | None

    def __init__(self, gpt: nn.Module, *, value_embeds: ValueEmbeds = "zero", insert_at: int = 0,
                 loss: LossForm = "host") -> None:
        super().__init__()
        if value_embeds not in ("zero", "placeholder", "learned"):
            raise BadInput("SoftTokenPrepender", f"value_embeds = {value_embeds!r}", "'zero', 'placeholder' or 'learned'")
        if insert_at < 0:
            raise BadInput("SoftTokenPrepender", f"insert_at = {insert_at}", "insert_at ≥ 0")
        refuse_second(gpt)
        self.anatomy: Anatomy = discover_anatomy(gpt)
        self.wte_dtype = table(unwrap(gpt), self.anatomy.wte).weight.dtype
        self.gpt, self.insert_at, self.value_embeds = gpt, insert_at, value_embeds
        self.check_values, self.pad_to = True, None
        self.side_rows = nn.ParameterDict()
        if value_embeds == "learned":
            for name in (*self.anatomy.side_tables, *self.anatomy.derived_tables):
                weight = table(unwrap(gpt), name).weight
                self.side_rows[row_key(name)] = nn.Parameter(torch.zeros(weight.size(1), device=weight.device))
        self.head_obstacle: str | None = None  # unknown until somebody wants a fused loss: a head of its own class is run
        self.loss = loss
        self.hooks = HostHooks(gpt, self.anatomy, value_embeds, self.side_rows)

    @property
    def loss(self) -> LossForm:
        """Who computes the loss; may be set at any time."""
        return self._loss

    @loss.setter
    def loss(self, form: LossForm) -> None:
        if form not in FORMS:
            raise BadInput("SoftTokenPrepender", f"loss = {form!r}", "'host', 'fused' or 'auto'")
        if form != "host" and self.head_obstacle is None:
            self.head_obstacle = head_obstacle(self.gpt, self.anatomy)
        if form == "fused" and self.head_obstacle:
            raise unfusable("SoftTokenPrepender", self.head_obstacle)
        self._loss = form

    def remove(self) -> nn.Module:
        """Take every hook away; returns the GPT exactly as it came. The prepender is of no use afterwards."""
        self.hooks.remove(self.gpt)
        return self.gpt

    def forward(self, idx: Tensor, targets: Tensor | None = None, soft_tokens: SoftTokens | None = None,
                **gpt_kwargs: Any) -> Any:
        """What `gpt(idx, targets, **gpt_kwargs)` returns: logits or loss aligned with `idx` (B, T).

        targets (B, T) are idx shifted by one, −1 where nothing is graded. Raises BadInput; the GPT is then as before and
        the next call starts clean. A mean loss over nothing is refused too: it would be NaN.
        """
        where = "SoftTokenPrepender.forward"
        splice, fused_idx = self.plan(where, idx, soft_tokens, gpt_kwargs)
        if targets is not None:
            targets = self.graded(where, idx, targets, soft_tokens, gpt_kwargs.get("loss_reduction", "mean"))
            if self.fuses(where, targets, gpt_kwargs):
                hidden, returned = self.hooks.run_for_hidden(self.gpt, splice, fused_idx)
                loss = head_loss(hidden, targets, self.gpt, self.anatomy, gpt_kwargs.get("loss_reduction", "mean"))
                return as_returned(loss, self.anatomy, returned)
        return self.run(splice, fused_idx, targets, gpt_kwargs)

    def hidden_states(self, idx: Tensor, soft_tokens: SoftTokens | None = None) -> Tensor:
        """(B, T, n_embd): what lm_head would have read for each text position. The vocabulary matmul is skipped."""
        splice, fused_idx = self.plan("SoftTokenPrepender.hidden_states", idx, soft_tokens, {})
        return self.hooks.run_for_hidden(self.gpt, splice, fused_idx)[0]

    def generate(self, tokens: list[int], soft_tokens: SoftTokens | None = None, *, max_tokens: int,
                 temperature: float = 1.0, top_k: int | None = None, seed: int = 42) -> Iterator[int]:
        """Stream `max_tokens` token ids after one prompt: soft tokens in the prefill, then one cached step per token.

        temperature 0 is greedy. Input is checked when called, not at the first token. Hosts without a KV cache
        recompute the sequence each step.
        """
        where = "SoftTokenPrepender.generate"
        check_sampling(where, max_tokens, temperature, top_k)
        idx = as_row(where, tokens, self.device())
        room = self.room(where, idx, soft_tokens, max_tokens)
        columns = stream(Decoder(self, idx, soft_tokens, room), max_tokens, temperature, top_k, seed)
        return (int(ids) for ids in columns)

    def expand(self, tokens: list[int], soft_tokens: SoftTokens) -> list[int]:
        """The prompt with one id per soft token, so that a foreign engine sizes its cache right: the placeholder's own
        id in placeholder mode (which must then lie inside the vocabulary), id 0 for a prefix."""
        where = "SoftTokenPrepender.expand"
        splice, fused_idx = self.plan(where, as_row(where, tokens, self.device()), soft_tokens, {}, exact=True)
        if splice is None or not isinstance(soft_tokens, Mapping):
            return fused_idx[0].tolist()
        for key in soft_tokens:
            if not 0 <= key < self.anatomy.num_embeddings:
                raise BadInput(where, f"placeholder id {key}", f"0 ≤ id < {self.anatomy.num_embeddings}, since a foreign "
                               "engine looks it up", "choose an unused id inside the vocabulary")
        lens = {key: iter(lens_of(clip)) for key, clip in soft_tokens.items()}
        return [token for t in tokens for token in ([t] * next(lens[t]) if t in lens else [t])]

    @contextmanager
    def bind(self, soft_tokens: SoftTokens) -> Iterator[SoftTokenPrepender]:
        """Inside, a foreign caller of `gpt.forward` (nanochat's Engine, gpt.generate) that passes an expanded prompt
        gets the soft tokens; calls with one token are decode steps and pass through.

        The clips of one prompt serve a batch of any size. Any other call inside is refused: it would hear nothing.
        """
        where = "SoftTokenPrepender.bind"
        if self.hooks.bound is not None:
            raise BadInput(where, "a bind inside a bind", "one at a time", "leave the outer with-block first")
        self.check_attached(where)
        device = self.device()
        if isinstance(soft_tokens, Mapping):
            lens = [n for clip in soft_tokens.values() for n in self.checked(where, clip, device).lens.tolist()]
            num_soft = sum(lens)
        else:
            num_soft = max(self.checked(where, soft_tokens, device).lens.tolist(), default=0)
        with self.hooks.bind(soft_tokens, self.insert_at, num_soft):
            yield self

    # ---- plan and run ---------------------------------------------------------------------------------------------

    def plan(self, where: str, idx: Tensor, soft_tokens: SoftTokens | None, gpt_kwargs: Mapping[str, Any],
             text_lens: Tensor | None = None, exact: bool = False) -> tuple[Splice | None, Tensor]:
        """Check the input and lay it out: (splice, fused_idx). Where no row has a soft token that is (None, idx).

        text_lens (B,) crops rows of right-padded text, which then take up no slots. exact leaves out `pad_to`'s padding,
        which decoding would take for tokens.
        """
        self.check_attached(where)
        if idx.ndim != 2 or idx.dtype not in (torch.int64, torch.int32):
            raise BadInput(where, f"idx {shape(idx.shape)} of {idx.dtype}", "int64 ids (B, T)", "one prompt is idx[None]")
        columns = self.columns(where, idx, soft_tokens)
        kv_cache = gpt_kwargs.get("kv_cache")
        start = 0 if kv_cache is None else int(kv_cache.get_pos())
        if columns is None:
            self.check_room(where, start, idx.size(1), 0)
            tail = None if kv_cache is None else self.hooks.tails.get(kv_cache)
            return (None if tail is None else text_after(tail, idx)), idx
        if text_lens is not None:
            columns = crop_text(columns, text_lens)
            if not isinstance(soft_tokens, Mapping):
                layout.check_insert_at(where, int(text_lens.min()), self.insert_at)
        if torch.compiler.is_compiling():
            T_fused = self.static_length(where, idx, columns, soft_tokens)
        else:
            T_fused = self.fused_length(where, columns, exact, kv_cache)
        self.check_room(where, start, idx.size(1), T_fused - idx.size(1))
        splice, fused_idx = fuse(idx, columns, T_fused)
        tail = None if kv_cache is None else self.hooks.tails.get(kv_cache)
        if tail is not None:
            splice.edge[:, 0] |= tail
        if torch.compiler.is_compiling() and (self.pad_to is not None or T_fused < shapes_bound(idx, columns)):
            splice = spoil_overflow(splice, columns, T_fused)  # a compiled graph cannot raise: NaN, never a cropped row
        return splice, fused_idx

    def columns(self, where: str, idx: Tensor, soft_tokens: SoftTokens | None) -> Columns | None:
        """Soft tokens in any of their forms → columns, or None if there is not one."""
        if soft_tokens is None:
            self.check_ids(where, idx, ())
            return None
        if isinstance(soft_tokens, Mapping):
            clips = {key: self.checked(where, clip, idx.device) for key, clip in soft_tokens.items()}
            self.check_ids(where, idx, clips)
            if self.checking():
                for key, clip in clips.items():
                    layout.check_clips(f"{where}, placeholder {key}", int((idx == key).sum()), clip.lens.tolist())
            columns = placeholder_columns(idx, clips)
        else:
            features = self.checked(where, soft_tokens, idx.device)
            self.check_ids(where, idx, ())
            if features.values.size(0) != idx.size(0):
                raise BadInput(where, f"{features.values.size(0)} rows of soft tokens for {idx.size(0)} rows of idx",
                               "one per row", "give a row without sound length 0, or use {placeholder id: clips}")
            layout.check_insert_at(where, idx.size(1), self.insert_at)
            columns = prefix_columns(idx, features, self.insert_at)
        return columns if columns.flat.size(0) else None

    def fused_length(self, where: str, columns: Columns, exact: bool, kv_cache: Any) -> int:
        """Slots of the longest row, padded to `pad_to` unless they go into a cache."""
        lengths = (columns.text + columns.soft).sum(dim=1).tolist()
        if kv_cache is not None and min(lengths) < max(lengths):
            raise BadInput(where, f"rows of {lengths} slots for one KV cache", "rows of one length, since a cache has one "
                           "position", "use omni_adapters.generate.generate_batch, which groups them")
        if exact or kv_cache is not None or self.pad_to is None:
            return max(lengths)
        if max(lengths) > self.pad_to:
            raise BadInput(where, f"a fused row of {max(lengths)} slots", f"at most pad_to = {self.pad_to}", "raise pad_to")
        return self.pad_to

    def static_length(self, where: str, idx: Tensor, columns: Columns, soft_tokens: SoftTokens | None) -> int:
        """Under torch.compile: `pad_to`, or the bound that shapes alone give."""
        if self.pad_to is not None:
            return self.pad_to
        if isinstance(soft_tokens, Mapping):
            raise BadInput(where, "placeholder mode under torch.compile without pad_to", "a fused length it can see",
                           "set prepender.pad_to to the longest fused row of your batches")
        limit, bound = self.anatomy.position_limit, shapes_bound(idx, columns)
        if limit is None or isinstance(soft_tokens, Tensor):  # whose rows are all that long
            return bound
        return max(idx.size(1), min(bound, limit))  # the longest sound need not stand beside the longest text

    def run(self, splice: Splice | None, fused_idx: Tensor, targets: Tensor | None, gpt_kwargs: dict[str, Any]) -> Any:
        if targets is None:
            return self.hooks.run(self.gpt, splice, fused_idx, **gpt_kwargs)
        if self.anatomy.output != "model_output":
            return self.hooks.run(self.gpt, splice, fused_idx, targets, **gpt_kwargs)
        reduction = gpt_kwargs.pop("loss_reduction", "mean")
        output = self.hooks.run(self.gpt, splice, fused_idx, **gpt_kwargs)  # transformers hosts shift labels themselves
        output.loss = F.cross_entropy(output.logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE,
                                      reduction=reduction)
        return output

    def fuses(self, where: str, targets: Tensor, gpt_kwargs: Mapping[str, Any]) -> bool:
        """Whether this call's loss is fused with the head."""
        if self.loss == "host":
            return False
        obstacle = self.head_obstacle or call_obstacle(self.gpt, self.anatomy, gpt_kwargs)
        if obstacle and self.loss == "fused":
            raise unfusable(where, obstacle)
        return not obstacle and (self.loss == "fused" or worth_fusing(targets, self.gpt, self.anatomy))

    # ---- refusals ---------------------------------------------------------------------------------------------------

    def checking(self) -> bool:
        return self.check_values and not torch.compiler.is_compiling()

    def check_attached(self, where: str) -> None:
        if not self.hooks.attached:
            raise BadInput(where, "a call after remove()", "a prepender with its hooks in place", "build a new one")

    def checked(self, where: str, soft_tokens: Features | Tensor, device: torch.device) -> Features:
        """One kind of soft tokens as Features, refused where its form or its values cannot be used."""
        n_embd = self.anatomy.n_embd
        features = full(soft_tokens) if isinstance(soft_tokens, Tensor) and soft_tokens.ndim == 3 else soft_tokens
        if not isinstance(features, Features):
            came = shape(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise BadInput(where, f"soft tokens {came}", f"a tensor {shape(['B', 'T_soft', n_embd])}, Features, or a dict "
                           "from placeholder id to those", "pad ragged rows with pad_rows(rows)")
        if features.values.device != device:
            raise BadInput(where, f"soft tokens on {features.values.device}", f"{device}, where idx is",
                           f"move them with features_to(soft_tokens, {str(device)!r})")
        check_form(where, features, n_embd, "project to the GPT's width with Projector(in_dim, out_dim=n_embd)")
        if self.checking():
            check_values(where, features)
        return features

    def check_ids(self, where: str, idx: Tensor, placeholders: Mapping[int, Any] | tuple[()]) -> None:
        if not self.checking() or idx.numel() == 0:
            return
        text = idx
        for key in placeholders:
            text = torch.where(text == key, FILLER, text)
        low, high = torch.stack(text.aminmax()).tolist()
        rows = self.anatomy.num_embeddings
        if low < 0 or high >= rows:
            raise BadInput(where, f"id {low if low < 0 else high} in idx", f"0 ≤ id < {rows}, the rows of wte",
                           "if it is a placeholder, give its clips: soft_tokens={id: clips}")

    def check_room(self, where: str, start: int, num_text: int, num_soft: int) -> None:
        limit, needed = self.anatomy.position_limit, start + num_text + num_soft
        if limit is not None and needed > limit:
            cached = f"{start} cached positions, " if start else ""
            raise BadInput(where, f"{cached}{num_text} text and {num_soft} soft tokens, {needed} in all",
                           f"at most {limit}, the GPT's table of positions",
                           "use a larger Projector(stack=…), shorter clips or a GPT with a longer sequence_len")

    def room(self, where: str, idx: Tensor, soft_tokens: SoftTokens | None, max_tokens: int,
             text_lens: Tensor | None = None) -> int:
        """Positions that a prompt and `max_tokens` behind it take up, refused where the GPT has not as many."""
        with torch.inference_mode():
            _, fused_idx = self.plan(where, idx, soft_tokens, {}, text_lens, exact=True)
        num_text = idx.size(1) + max_tokens
        self.check_room(where, 0, num_text, fused_idx.size(1) - idx.size(1))
        return fused_idx.size(1) + max_tokens

    def graded(self, where: str, idx: Tensor, targets: Tensor, soft_tokens: SoftTokens | None, reduction: str) -> Tensor:
        """Targets without placeholder ids, which are nothing to predict."""
        if targets.shape != idx.shape:
            raise BadInput(where, f"targets {shape(targets.shape)}", f"the shape of idx, {shape(idx.shape)}",
                           "give text positions only: soft tokens have no targets")
        for key in soft_tokens if isinstance(soft_tokens, Mapping) else ():
            targets = torch.where(targets == key, IGNORE, targets)
        if self.checking() and reduction == "mean" and not bool((targets != IGNORE).any()):
            raise BadInput(where, f"{targets.numel()} targets that are all {IGNORE}", "at least one graded text token",
                           "look at the chat template and the mask: the mean loss of nothing is NaN")
        return targets

    def dtype(self) -> torch.dtype:
        """Of the hidden states: as probed, unless the GPT has been cast since."""
        now = table(unwrap(self.gpt), self.anatomy.wte).weight.dtype
        return self.anatomy.dtype if now == self.wte_dtype else now

    def device(self) -> torch.device:
        return table(unwrap(self.gpt), self.anatomy.wte).weight.device


def shapes_bound(idx: Tensor, columns: Columns) -> int:
    """Slots of a prefix row whose text and sound are both the batch's longest."""
    return idx.size(1) + columns.flat.size(0) // idx.size(0)


def unfusable(where: str, obstacle: str) -> BadInput:
    return BadInput(where, f"loss='fused' with {obstacle}", "the cross-entropy of logits that are one matrix, cropped and capped",
                    "use loss='auto' or loss='host'")


def as_row(where: str, tokens: list[int], device: torch.device) -> Tensor:
    """One prompt as idx (1, T)."""
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, int) for token in tokens):
        raise BadInput(where, f"tokens {tokens!r:.60}", "a non-empty list of ints: one prompt")
    return torch.tensor([tokens], dtype=torch.int64, device=device)
