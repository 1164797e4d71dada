"""SoftTokenPrepender on the reference GPT: guarantees 1–7 of the contract.

The oracle is `hear`: one row, slot by slot, through the GPT's sub-modules, with no hook, no batch and no padding. What sits
in the slots comes from `layout`, the specification. Soft tokens beyond `lens` are NaN wherever a case has any.

Most comparisons run a float64 host. Its rounding error is below 1e-12: hidden states are of order 1 and come from some
hundred additions in four layers, each 2⁻⁵³ off. A feature that is missing moves them by more than 1e-3, as a test shows.
EXACT = 1e-10 lies between.
Logits are cast to float32 by the host, so that a difference of 1e-12 may flip a rounding: one float32 step of a logit
before the softcap, under 64 in size, is 2⁻¹⁸ = 4e-6, and the softcap shrinks it. LOGITS = 8e-6 allows two.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hand_patched import hand_patched_logits, hand_patched_loss
from hosts import bigram_gpt, fingerprint, nano_gpt, reference, tiny_hf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_adapters import layout
from omni_adapters.anatomy import logits_of
from omni_adapters.decoding import KVCache
from omni_adapters.features import Features, select
from omni_adapters.prepender import SoftTokenPrepender
from omni_adapters.projector import Projector
from omni_adapters.reference_gpt import GPT, SOFTCAP, norm

EXACT, LOGITS = 1e-10, 8e-6
POLICIES = "zero", "placeholder", "learned"
INSIDE, BEYOND, NEGATIVE = 49, 12_345, -7  # placeholder ids: the last of the vocabulary, and two that no table has
TEXT_IDS = 1, 48
WIDTH = 32


# ---- the oracle -------------------------------------------------------------------------------------------------------


@contextmanager
def ears(gpt: GPT, **options: Any) -> Iterator[SoftTokenPrepender]:
    prepender = SoftTokenPrepender(gpt, **options)
    try:
        yield prepender
    finally:
        prepender.remove()


def hear(gpt: GPT, slots: list[int | Tensor], value_embeds: str = "zero",
         learned: dict[str, Tensor] | None = None) -> Tensor:
    """Hidden states (1, T_fused, n_embd) of one row of ids and soft tokens (n_embd,)."""
    soft = torch.tensor([isinstance(what, Tensor) for what in slots])
    ids = torch.tensor([[0 if isinstance(what, Tensor) else what for what in slots]])
    table = gpt.transformer.wte.weight
    x = norm(torch.stack([what if isinstance(what, Tensor) else table[what] for what in slots]))[None]
    both_text = ~(soft[1:] | soft[:-1])
    share = gpt.smear_share(x[:, 1:]) * both_text[None, :, None]
    x = x0 = torch.cat([x[:, :1], x[:, 1:] + share * x[:, :-1]], dim=1)
    cos_sin = gpt.cos[:, : len(slots)].to(x), gpt.sin[:, : len(slots)].to(x)
    for layer, block in enumerate(gpt.transformer.h):
        x = gpt.resid_lambdas[layer] * x + gpt.x0_lambdas[layer] * x0
        ve = None
        if str(layer) in gpt.value_embeds:
            ve = gpt.value_embeds[str(layer)].weight[ids]
            at_soft = {"zero": torch.zeros_like(ve), "placeholder": ve,
                       "learned": (learned or {}).get(str(layer), torch.zeros_like(ve[0, 0])).expand_as(ve)}[value_embeds]
            ve = torch.where(soft[None, :, None], at_soft, ve)
        x = block(x, ve, cos_sin, gpt.windows[layer], None)
        if layer == gpt.config.n_layer // 2:
            middle = x
    return norm(x - gpt.backout_lambda * middle)


def head(gpt: GPT, hidden: Tensor) -> Tensor:
    logits = gpt.lm_head(hidden)[..., : gpt.config.vocab_size].float()
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


# ---- cases ------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A batch, and what its rows hold according to `layout`."""

    idx: Tensor
    soft_tokens: Features | dict[int, Features]
    insert_at: int
    rows: list[list[int | Tensor]]
    answers: list[tuple[int, ...]]

    def alone(self, row: int) -> tuple[Tensor, Features | dict[int, Features]]:
        """One row as a batch of its own, its clips cropped to what they need."""
        idx = self.idx[row : row + 1]
        if isinstance(self.soft_tokens, Features):
            return idx, select(self.soft_tokens, [row])
        return idx, {key: select(clips, torch.arange(len(clips.lens))[occurrences(self.idx, key) == row])
                     for key, clips in self.soft_tokens.items()}


def occurrences(idx: Tensor, key: int) -> Tensor:
    """The row of each occurrence of `key`, in reading order."""
    return (idx == key).nonzero()[:, 0]


def ragged(lens: list[int], rng: torch.Generator, extra: int = 0, dtype: torch.dtype = torch.float64) -> Features:
    """Random soft tokens, NaN beyond lens."""
    values = torch.randn(len(lens), max(lens, default=0) + extra, WIDTH, generator=rng, dtype=dtype)
    at = torch.tensor(lens).long()
    values[torch.arange(values.size(1)) >= at.unsqueeze(1)] = torch.nan
    return Features(values, at)


def prefix_case(num_text: int, lens: list[int], insert_at: int, seed: int = 0,
                dtype: torch.dtype = torch.float64) -> Case:
    rng = torch.Generator().manual_seed(seed)
    idx = torch.randint(*TEXT_IDS, (len(lens), num_text), generator=rng)
    soft = ragged(lens, rng, extra=seed % 3, dtype=dtype)
    plans = [layout.prepend(num_text, n, insert_at) for n in lens]
    rows = [[idx[b, what].item() if isinstance(what, int) else soft.values[b, what[1]] for what in plan.source()]
            for b, plan in enumerate(plans)]
    return Case(idx, soft, insert_at, rows, [plan.answer_at for plan in plans])


Columns = list[list[tuple[int, int] | None]]  # per row and column: None for text, or (placeholder id, clip length)


def clip_case(columns: Columns, seed: int = 0, dtype: torch.dtype = torch.float64) -> Case:
    rng = torch.Generator().manual_seed(seed)
    idx = torch.randint(*TEXT_IDS, (len(columns), len(columns[0])), generator=rng)
    lens: dict[int, list[int]] = {INSIDE: [], BEYOND: [], NEGATIVE: []}
    for b, row in enumerate(columns):
        for t, column in enumerate(row):
            if column is not None:
                idx[b, t] = column[0]
                lens[column[0]].append(column[1])
    clips = {key: ragged(of_key, rng, extra=seed % 3, dtype=dtype) for key, of_key in lens.items()}
    used = dict.fromkeys(clips, 0)
    rows, answers = [], []
    for b, row in enumerate(columns):
        plan = layout.replace([column is not None for column in row], [column[1] for column in row if column is not None])
        heard = []
        for column in row:
            if column is not None:
                heard.append(clips[column[0]].values[used[column[0]]])
                used[column[0]] += 1
        rows.append([idx[b, what].item() if isinstance(what, int) else heard[what[0]][what[1]] for what in plan.source()])
        answers.append(plan.answer_at)
    return Case(idx, clips, 0, rows, answers)


@st.composite
def prefix_cases(draw: st.DrawFn) -> Case:
    num_text = draw(st.integers(1, 6))
    return prefix_case(num_text, draw(st.lists(st.integers(0, 7), min_size=1, max_size=3)),
                       draw(st.integers(0, min(2, num_text))), draw(st.integers(0, 99)))


COLUMN = st.one_of(st.none(), st.none(), st.tuples(st.sampled_from([INSIDE, BEYOND, NEGATIVE]), st.integers(1, 5)))


@st.composite
def clip_cases(draw: st.DrawFn) -> Case:
    num_text = draw(st.integers(1, 6))
    row = st.lists(COLUMN, min_size=num_text, max_size=num_text)
    return clip_case(draw(st.lists(row, min_size=1, max_size=3)), draw(st.integers(0, 99)))


CASES = st.one_of(prefix_cases(), clip_cases())
PREFIX = prefix_case(5, [6, 0, 3], insert_at=1)
CLIPS = clip_case([[None, (BEYOND, 4), None, None, (INSIDE, 2)],
                   [None] * 5,
                   [(INSIDE, 1), (INSIDE, 3), None, (NEGATIVE, 5), None]])


@pytest.fixture(scope="module")
def gpt64(make_gpt: Callable[..., GPT]) -> GPT:
    return make_gpt(torch.float64)


def grads(gpt: GPT) -> dict[str, Tensor | None]:
    found = {name: parameter.grad for name, parameter in gpt.named_parameters()}
    gpt.zero_grad(set_to_none=True)
    return found


def same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    return a is b is None or torch.equal(a, b)


# ---- 1: soft tokens are invisible from outside ------------------------------------------------------------------------


@pytest.mark.parametrize("value_embeds", POLICIES)
@settings(max_examples=25)
@given(case=CASES)
@example(case=PREFIX)
@example(case=CLIPS)
def test_each_text_position_is_answered_as_by_a_row_computed_slot_by_slot(gpt64: GPT, value_embeds: str, case: Case) -> None:
    with ears(gpt64, value_embeds=value_embeds, insert_at=case.insert_at) as prepender, torch.no_grad():
        for row in prepender.side_rows.values():
            row.copy_(torch.linspace(-1, 1, len(row)))
        learned = {name.split("-")[-1]: row.double() for name, row in prepender.side_rows.items()}
        hidden = prepender.hidden_states(case.idx, case.soft_tokens)
        logits = prepender(case.idx, soft_tokens=case.soft_tokens)
        assert hidden.shape == (*case.idx.shape, WIDTH)
        assert logits.shape == (*case.idx.shape, gpt64.config.vocab_size)
        for b, (slots, answers) in enumerate(zip(case.rows, case.answers)):
            expected = hear(gpt64, slots, value_embeds, learned)[0, list(answers)]
            torch.testing.assert_close(hidden[b], expected, rtol=0, atol=EXACT)
            torch.testing.assert_close(logits[b], head(gpt64, expected), rtol=0, atol=LOGITS)


def test_every_feature_of_the_host_is_at_work_in_these_tests(make_gpt: Callable[..., GPT]) -> None:
    """Else the tests above would prove less than they say: silencing any one of them moves the answers by > 1e-3."""
    def silence(part: str) -> GPT:
        gpt = make_gpt(torch.float64)
        with torch.no_grad():
            if part == "windows":
                gpt.windows = [gpt.config.sequence_len] * gpt.config.n_layer
            elif part == "value_embeds":
                for table in gpt.value_embeds.values():
                    table.weight.zero_()
            elif part != "none":
                getattr(gpt, part).zero_()
        return gpt

    def answers(gpt: GPT) -> Tensor:
        with ears(gpt, insert_at=PREFIX.insert_at) as prepender, torch.no_grad():
            return prepender.hidden_states(PREFIX.idx, PREFIX.soft_tokens)

    usual = answers(silence("none"))
    for part in ("windows", "value_embeds", "smear_lambda", "x0_lambdas", "backout_lambda"):
        assert (answers(silence(part)) - usual).abs().max() > 1e-3, part


@pytest.mark.parametrize("case", [PREFIX, CLIPS], ids=["prefix", "clips"])
def test_the_head_reads_hidden_states_and_nothing_else(gpt64: GPT, case: Case) -> None:
    """Bit for bit, and the vocabulary matmul sees one row per text position, or one per row for hidden_states."""
    seen: list[tuple[int, ...]] = []
    with ears(gpt64, insert_at=case.insert_at) as prepender, torch.no_grad():
        handle = gpt64.lm_head.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
        logits = prepender(case.idx, soft_tokens=case.soft_tokens)
        hidden = prepender.hidden_states(case.idx, case.soft_tokens)
        handle.remove()
        assert seen == [(*case.idx.shape, WIDTH), (case.idx.size(0), 1, WIDTH)]
        assert torch.equal(head(gpt64, hidden), logits)
        text = case.idx.clamp(0, 49)
        assert torch.equal(head(gpt64, prepender.hidden_states(text)), gpt64(text))


def test_pad_to_changes_nothing_that_is_seen(gpt64: GPT) -> None:
    for case in (PREFIX, CLIPS):
        with ears(gpt64, insert_at=case.insert_at) as prepender, torch.no_grad():
            usual = prepender.hidden_states(case.idx, case.soft_tokens)
            prepender.pad_to = 40
            torch.testing.assert_close(prepender.hidden_states(case.idx, case.soft_tokens), usual, rtol=0, atol=EXACT)


def test_pad_to_never_reaches_a_cache_or_an_expanded_prompt(gpt64: GPT) -> None:
    """They go on where the prompt ends: padding there would be heard as if it had been said."""
    tokens, soft = [3, 5, 8], torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def everything(prepender: SoftTokenPrepender) -> list[Any]:
        cache = cache_for(prepender, 1)
        prefill = prepender(torch.tensor([tokens]), soft_tokens=soft, kv_cache=cache)
        step = prepender(torch.tensor([[7]]), kv_cache=cache)
        generated = list(prepender.generate(tokens, soft, max_tokens=6, temperature=0))
        return [prefill.tolist(), step.tolist(), cache.get_pos(), generated, prepender.expand(tokens, soft)]

    with ears(gpt64) as prepender, torch.no_grad():
        usual = everything(prepender)
        prepender.pad_to = 20
        for found, expected in zip(everything(prepender), usual):
            assert found == expected


def test_a_prefix_needs_no_text(gpt64: GPT) -> None:
    """Sound alone fills a cache: the text that follows hears it."""
    soft = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    idx = torch.tensor([[3, 5]])
    with ears(gpt64) as prepender, torch.no_grad():
        cache = cache_for(prepender, 1)
        assert prepender(idx[:, :0], soft_tokens=soft, kv_cache=cache).shape == (1, 0, gpt64.config.vocab_size)
        logits = prepender(idx, kv_cache=cache)
        torch.testing.assert_close(logits, prepender(idx, soft_tokens=soft), rtol=0, atol=LOGITS)


@pytest.mark.parametrize("case", [PREFIX, CLIPS], ids=["prefix", "clips"])
def test_ids_may_be_int32(gpt64: GPT, case: Case) -> None:
    with ears(gpt64, insert_at=case.insert_at) as prepender, torch.no_grad():
        assert torch.equal(prepender(case.idx.int(), soft_tokens=case.soft_tokens),
                           prepender(case.idx, soft_tokens=case.soft_tokens))


# ---- the forward that was patched by hand -----------------------------------------------------------------------------


@pytest.mark.parametrize(("num_text", "num_soft"), [(1, 1), (2, 9), (7, 1), (6, 12)])
def test_loss_and_all_gradients_equal_the_forward_patched_by_hand(gpt: GPT, num_text: int, num_soft: int) -> None:
    """To 1e-6 in float32, of the value or, where it is above 1, of its size: some 16 roundings of 2⁻²⁴ = 6e-8.

    Logits are sums of 32 products of such numbers with a head of 0.3: 0.3 · 32 · 1e-6 = 1e-5 at most.
    """
    rng = torch.Generator().manual_seed(num_text)
    idx = torch.randint(0, 50, (3, num_text), generator=rng)
    targets = torch.randint(0, 50, (3, num_text), generator=rng)
    targets[1:, -1] = -1
    soft = torch.randn(3, num_soft, WIDTH, generator=rng).requires_grad_()

    expected = hand_patched_loss(gpt, idx, targets, soft)
    expected.backward()
    wanted, wanted_soft = grads(gpt), soft.grad
    soft.grad = None
    with ears(gpt, value_embeds="placeholder") as prepender:
        loss = prepender(idx, targets, soft)
        loss.backward()
        logits = prepender(idx, soft_tokens=soft)
    found = grads(gpt)

    assert abs(loss.item() - expected.item()) <= 1e-6 * max(1, abs(expected.item()))
    torch.testing.assert_close(logits, hand_patched_logits(gpt, idx, soft)[:, num_soft:], rtol=0, atol=1e-5)
    for name, gradient in {**found, "soft tokens": soft.grad}.items():
        want = wanted_soft if name == "soft tokens" else wanted[name]
        assert gradient is not None, name
        want = torch.zeros_like(gradient) if want is None else want  # by hand, one text token does not reach smear at all
        assert (gradient - want).abs().max() <= 1e-6 * want.abs().max().clamp(min=1), name


# ---- 2: no soft tokens, no trace --------------------------------------------------------------------------------------


def silences(num_rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """All the ways to give no soft token."""
    return {
        "none": None,
        "an empty dict": {},
        "no clips": {INSIDE: Features(torch.zeros(0, 3, WIDTH, dtype=dtype), torch.zeros(0, dtype=torch.int64))},
        "no steps": torch.zeros(num_rows, 0, WIDTH, dtype=dtype),
        "zero lens": Features(torch.full((num_rows, 4, WIDTH), torch.nan, dtype=dtype),
                              torch.zeros(num_rows, dtype=torch.int64)),
    }


@pytest.mark.parametrize("way", silences(1, torch.float32))
@pytest.mark.parametrize("insert_at", [0, 1, 2])
@pytest.mark.parametrize("value_embeds", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_soft_tokens_logits_losses_and_gradients_are_the_bare_gpts_bit_for_bit(
        make_gpt: Callable[..., GPT], dtype: torch.dtype, value_embeds: str, insert_at: int, way: str) -> None:
    gpt = make_gpt(dtype)
    idx = torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = idx.roll(-1, 1)

    def everything(model: Any, **soft: Any) -> dict[str, Any]:
        model(idx, targets, **soft).backward()
        return {"logits": model(idx, **soft), "none": model(idx, targets, loss_reduction="none", **soft),
                "sum": model(idx, targets, loss_reduction="sum", **soft), **grads(gpt)}

    bare, before = everything(gpt), fingerprint(gpt)
    prepender = SoftTokenPrepender(gpt, value_embeds=value_embeds, insert_at=insert_at)
    assert same_bits(everything(prepender, soft_tokens=silences(2, dtype)[way]), bare)
    assert same_bits(everything(gpt), bare), "hooks are inert in a bare call"
    assert prepender.remove() is gpt
    assert same_bits(everything(gpt), bare)
    assert fingerprint(gpt) == before


@pytest.mark.parametrize("value_embeds", POLICIES)
@pytest.mark.parametrize("case", [PREFIX, CLIPS], ids=["prefix", "clips"])
def test_after_soft_tokens_the_bare_gpt_is_as_it_was(gpt: GPT, value_embeds: str, case: Case) -> None:
    """Between calls with soft tokens, and once more after remove()."""
    idx = case.idx.clamp(0, 48)
    bare, before, weights = gpt(idx), fingerprint(gpt), {name: t.clone() for name, t in gpt.state_dict().items()}
    prepender = SoftTokenPrepender(gpt, value_embeds=value_embeds, insert_at=case.insert_at)
    first = prepender(case.idx, soft_tokens=case.soft_tokens)
    assert torch.equal(gpt(idx), bare)
    assert torch.equal(prepender(idx), bare)
    assert torch.equal(gpt.forward(idx), bare)
    assert same_bits(gpt.state_dict(), weights)
    assert torch.equal(prepender(case.idx, soft_tokens=case.soft_tokens), first)
    assert not torch.equal(first, bare), "the soft tokens were heard at all"
    prepender.remove()
    assert torch.equal(gpt(idx), bare)
    assert fingerprint(gpt) == before


def test_remove_takes_its_own_hooks_and_leaves_those_of_others(gpt: GPT) -> None:
    calls: list[str] = []
    earlier = gpt.transformer.wte.register_forward_hook(lambda *_: calls.append("earlier"))
    prepender = SoftTokenPrepender(gpt)
    later = gpt.lm_head.register_forward_pre_hook(lambda *_: calls.append("later"))
    prepender.remove()
    calls.clear()
    gpt(torch.tensor([[1, 2]]))
    assert calls == ["earlier", "later"]
    earlier.remove()
    later.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in gpt.modules())
    prepender.remove()  # twice does no harm


def test_learned_rows_begin_as_zero_rows(gpt64: GPT) -> None:
    found = []
    for value_embeds in ("zero", "learned"):
        with ears(gpt64, value_embeds=value_embeds, insert_at=PREFIX.insert_at) as prepender, torch.no_grad():
            found.append(prepender.hidden_states(PREFIX.idx, PREFIX.soft_tokens))
    assert torch.equal(*found)


def test_only_learned_rows_are_new_in_the_prependers_state_dict(gpt: GPT) -> None:
    for value_embeds, new in (("zero", set()), ("learned", {"side_rows.value_embeds-1", "side_rows.value_embeds-3"})):
        with ears(gpt, value_embeds=value_embeds) as prepender:
            assert prepender.state_dict().keys() == {f"gpt.{name}" for name in gpt.state_dict()} | new


@pytest.mark.parametrize("last", ["a training step", "a loss nobody kept", "a forward without gradients", "generate"])
def test_what_is_over_keeps_no_soft_token_alive(gpt: GPT, last: str) -> None:
    idx, soft = torch.tensor([[1, 2]]), torch.randn(1, 3, WIDTH, requires_grad=True)
    with ears(gpt) as prepender:
        if last == "a training step":
            prepender(idx, idx, soft).backward()
        elif last == "a loss nobody kept":
            prepender(idx, idx, soft)
        elif last == "generate":
            list(prepender.generate([1, 2], soft, max_tokens=2))
        else:
            with torch.no_grad():
                prepender(idx, soft_tokens=soft)
        gone = weakref.ref(soft)
        del soft
        gc.collect()
        assert gone() is None


# ---- 3: a row in a ragged batch is the row alone ----------------------------------------------------------------------


@settings(max_examples=25)
@given(case=CASES)
@example(case=PREFIX)
@example(case=CLIPS)
def test_a_row_in_a_ragged_batch_equals_the_row_alone(gpt64: GPT, case: Case) -> None:
    with ears(gpt64, insert_at=case.insert_at) as prepender, torch.no_grad():
        together = prepender.hidden_states(case.idx, case.soft_tokens)
        for row in range(case.idx.size(0)):
            alone = prepender.hidden_states(*case.alone(row))
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=EXACT)


def test_a_row_in_a_ragged_batch_equals_the_row_alone_in_bf16(make_gpt: Callable[..., GPT]) -> None:
    """A bf16 rounding is 2⁻⁹ off; forty of them in four layers walk √40 · 2⁻⁹ = 1.2 % away. 5 % leaves a factor of four."""
    gpt = make_gpt(torch.bfloat16)
    for case in (PREFIX, CLIPS):
        with ears(gpt, insert_at=case.insert_at) as prepender, torch.no_grad():
            together = prepender.hidden_states(case.idx, case.soft_tokens)
            assert together.dtype == torch.bfloat16
            for row in range(case.idx.size(0)):
                error = prepender.hidden_states(*case.alone(row)) - together[row : row + 1]
                assert error.float().square().mean().sqrt() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [PREFIX, CLIPS], ids=["prefix", "clips"])
def test_what_lies_beyond_lens_is_never_looked_at(make_gpt: Callable[..., GPT], case: Case, dtype: torch.dtype) -> None:
    """NaN, infinity and huge numbers there give the loss and the gradients of zeros there, bit for bit."""
    gpt = make_gpt(dtype)
    targets = torch.randint(0, 48, case.idx.shape, generator=torch.Generator().manual_seed(0))

    def filled(features: Features, garbage: float) -> Features:
        beyond = torch.arange(features.values.size(1)) >= features.lens.unsqueeze(1)
        values = features.values.float().masked_fill(beyond.unsqueeze(-1), garbage)
        return Features(values.requires_grad_(), features.lens)

    def step(garbage: float) -> dict[str, Any]:
        kinds = case.soft_tokens if isinstance(case.soft_tokens, dict) else {0: case.soft_tokens}
        given = {key: filled(features, garbage) for key, features in kinds.items()}
        loss = prepender(case.idx, targets, given if isinstance(case.soft_tokens, dict) else given[0])
        loss.backward()
        for features in given.values():
            beyond = torch.arange(features.values.size(1)) >= features.lens.unsqueeze(1)
            assert features.values.grad is not None and not features.values.grad[beyond].any()
        return {"loss": loss, **grads(gpt), **{f"soft {key}": clips.values.grad for key, clips in given.items()}}

    with ears(gpt, insert_at=case.insert_at, value_embeds="learned") as prepender:
        clean = step(0.0)
        for garbage in (torch.nan, torch.inf, 1e30):
            assert same_bits(step(garbage), clean)


def test_the_order_of_rows_and_their_mates_do_not_matter(gpt64: GPT) -> None:
    order = [2, 0, 1]
    with ears(gpt64, insert_at=PREFIX.insert_at) as prepender, torch.no_grad():
        usual = prepender.hidden_states(PREFIX.idx, PREFIX.soft_tokens)
        assert isinstance(PREFIX.soft_tokens, Features)
        shuffled = prepender.hidden_states(PREFIX.idx[order], select(PREFIX.soft_tokens, order))
        torch.testing.assert_close(shuffled, usual[order], rtol=0, atol=EXACT)


# ---- 4: soft tokens that are rows of wte ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value_embeds", POLICIES)
@settings(max_examples=15)
@given(case=CASES, seed=st.integers(0, 99))
@example(case=PREFIX, seed=0)
@example(case=CLIPS, seed=0)
def test_rows_of_wte_as_soft_tokens_are_plain_text_bit_for_bit(make_gpt: Callable[..., GPT], dtype: torch.dtype,
                                                               value_embeds: str, case: Case, seed: int) -> None:
    """Side tables and smear silenced. Rows are padded on the right with id 0 on both sides, so shapes agree too."""
    gpt = silent_gpt(make_gpt, dtype)
    rng = torch.Generator().manual_seed(seed)

    def spoken(features: Features) -> tuple[Features, Tensor]:
        ids = torch.randint(0, 50, features.values.shape[:2], generator=rng)
        return Features(gpt.transformer.wte.weight[ids], features.lens), ids

    with ears(gpt, value_embeds=value_embeds, insert_at=case.insert_at) as prepender, torch.no_grad():
        plans, said, soft = said_by(case, spoken)
        width = max(plan.length for plan in plans)
        ids = torch.zeros(len(plans), width, dtype=torch.int64)
        for b, plan in enumerate(plans):
            for slot, what in enumerate(plan.source()):
                ids[b, slot] = case.idx[b, what] if isinstance(what, int) else said[b][what[0]][what[1]]
        answers = torch.tensor([plan.answer_at for plan in plans])
        plain = prepender.hidden_states(ids)
        expected = plain.gather(1, answers.unsqueeze(-1).expand(-1, -1, WIDTH))
        assert torch.equal(prepender.hidden_states(case.idx, soft), expected)


def silent_gpt(make_gpt: Callable[..., GPT], dtype: torch.dtype) -> GPT:
    gpt = make_gpt(dtype)
    with torch.no_grad():
        gpt.smear_lambda.zero_()
        for table in gpt.value_embeds.values():
            table.weight.zero_()
    return gpt


def said_by(case: Case, spoken: Callable[[Features], tuple[Features, Tensor]],
            ) -> tuple[list[layout.Row], list[list[Tensor]], Features | dict[int, Features]]:
    """The case's layout, the ids of each row's clips, and its soft tokens as rows of wte."""
    num_text = case.idx.size(1)
    if isinstance(case.soft_tokens, Features):
        soft, ids = spoken(case.soft_tokens)
        plans = [layout.prepend(num_text, n, case.insert_at) for n in soft.lens.tolist()]
        return plans, [[row] for row in ids], soft
    clips = {key: spoken(features) for key, features in case.soft_tokens.items()}
    queues = {key: iter(zip(ids, features.lens.tolist())) for key, (features, ids) in clips.items()}
    heard = [[next(queues[t]) for t in row if t in queues] for row in case.idx.tolist()]
    plans = [layout.replace([t in queues for t in row], [n for _, n in heard[b]]) for b, row in enumerate(case.idx.tolist())]
    return plans, [[ids for ids, _ in row] for row in heard], {key: features for key, (features, _) in clips.items()}


# ---- 5: targets count text only ---------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(case=CASES, data=st.data())
def test_the_loss_is_that_of_the_graded_text_alone(gpt64: GPT, case: Case, data: st.DataObject) -> None:
    """Targets of −1 and targets that are placeholder ids are left out, in every reduction; others may be anything."""
    ids = list(case.soft_tokens) if isinstance(case.soft_tokens, dict) else []
    target = st.one_of(st.just(-1), st.integers(0, 48), st.sampled_from([*ids, 3]))
    size = case.idx.numel()
    targets = torch.tensor(data.draw(st.lists(target, min_size=size, max_size=size))).view_as(case.idx)
    targets[0, 0] = 5
    graded = targets.clone()
    for key in ids:
        graded[targets == key] = -1
    given = targets.clone()
    with ears(gpt64, insert_at=case.insert_at) as prepender, torch.no_grad():
        logits = prepender(case.idx, soft_tokens=case.soft_tokens).flatten(0, 1)
        each = prepender(case.idx, given, case.soft_tokens, loss_reduction="none")
        assert each.shape == gpt64(case.idx.clamp(0, 49), graded, loss_reduction="none").shape == (case.idx.numel(),)
        assert torch.equal(each, F.cross_entropy(logits, graded.flatten(), ignore_index=-1, reduction="none"))
        total = prepender(case.idx, given, case.soft_tokens, loss_reduction="sum")
        assert torch.equal(total, F.cross_entropy(logits, graded.flatten(), ignore_index=-1, reduction="sum"))
        mean = prepender(case.idx, given, case.soft_tokens)
        assert torch.equal(mean, F.cross_entropy(logits, graded.flatten(), ignore_index=-1))
        assert torch.equal(given, targets), "the caller's targets are not written to"


def test_a_placeholder_grades_its_own_target_by_the_clips_last_soft_token(gpt64: GPT) -> None:
    """The text after a clip is predicted from the clip."""
    case = clip_case([[None, (BEYOND, 3), None]])
    with ears(gpt64) as prepender, torch.no_grad():
        logits = prepender(case.idx, soft_tokens=case.soft_tokens)
    expected = head(gpt64, hear(gpt64, case.rows[0]))[0, [0, 3, 4]]
    torch.testing.assert_close(logits[0], expected.detach(), rtol=0, atol=LOGITS)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_sum_of_nothing_is_zero(gpt64: GPT, reduction: str) -> None:
    with ears(gpt64, insert_at=1) as prepender, torch.no_grad():
        targets = torch.full_like(PREFIX.idx, -1)
        assert not prepender(PREFIX.idx, targets, PREFIX.soft_tokens, loss_reduction=reduction).any()


# ---- 6: prefill and cached decode -------------------------------------------------------------------------------------


def cache_for(prepender: SoftTokenPrepender, num_rows: int, room: int = 80) -> KVCache:
    anatomy = prepender.anatomy
    assert anatomy.cache_shape is not None
    return KVCache(num_rows, room, anatomy.cache_shape, prepender.device(), anatomy.dtype)


@pytest.mark.parametrize("way", silences(1, torch.float64))
@pytest.mark.parametrize(("num_text", "num_prompt", "insert_at"), [
    (6, 3, 0), (6, 3, 1), (6, 3, 2), (6, 1, 1), (6, 2, 2), (6, 6, 0)])
def test_prefill_and_cached_steps_equal_the_full_forward(gpt64: GPT, num_text: int, num_prompt: int, insert_at: int,
                                                         way: str) -> None:
    """Also where the prompt ends on the prefix (insert_at = its length): the next token is not smeared with sound."""
    case = prefix_case(num_text, [5, 5], insert_at)
    with ears(gpt64, insert_at=insert_at) as prepender, torch.no_grad():
        whole = prepender(case.idx, soft_tokens=case.soft_tokens)
        cache = cache_for(prepender, 2)
        parts = [prepender(case.idx[:, :num_prompt], soft_tokens=case.soft_tokens, kv_cache=cache)]
        prepender.insert_at = 0  # where nothing would go in a step
        for t in range(num_prompt, num_text):
            parts.append(prepender(case.idx[:, t : t + 1], soft_tokens=silences(2, torch.float64)[way], kv_cache=cache))
        assert cache.get_pos() == 5 + num_text
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=LOGITS)


def turns(columns: list[tuple[int, int] | None], cuts: list[bool]) -> list[range]:
    """A conversation in chunks, cut next to clips only: a host does not smear the first token of a chunk of text with the
    last one before it, whether or not anybody listens."""
    starts = [0] + [t for t in range(1, len(columns)) if cuts[t] and (columns[t] or columns[t - 1])]
    bounds = [*starts, len(columns)]
    return [range(start, end) for start, end in pairwise(bounds)]


@settings(max_examples=60)
@given(st.data())
def test_a_conversation_in_turns_equals_one_forward(gpt64: GPT, data: st.DataObject) -> None:
    """Text and clips in any order, cut before or after any clip into turns on one cache; then single tokens."""
    columns = data.draw(st.lists(COLUMN, min_size=2, max_size=7))
    chunks = turns(columns, data.draw(st.lists(st.booleans(), min_size=len(columns), max_size=len(columns))))
    num_steps = data.draw(st.integers(0, 3))
    case = clip_case([columns + [None] * num_steps] * 2, data.draw(st.integers(0, 99)))
    assert isinstance(case.soft_tokens, dict)
    with ears(gpt64) as prepender, torch.no_grad():
        whole = prepender(case.idx, soft_tokens=case.soft_tokens)
        cache, parts = cache_for(prepender, 2), []
        for chunk in chunks + [range(len(columns) + step, len(columns) + step + 1) for step in range(num_steps)]:
            # The second row repeats the first one's columns, so clip n of either row is its n-th of each key.
            soft = {}
            for key, clips in case.soft_tokens.items():
                number = [(case.idx[0, :t] == key).sum().item() for t in chunk if case.idx[0, t] == key]
                half = len(clips.lens) // 2
                soft[key] = select(clips, [n + half * row for row in range(2) for n in number])
            parts.append(prepender(case.idx[:, chunk.start : chunk.stop], soft_tokens=soft, kv_cache=cache))
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=LOGITS)


def test_a_prefix_may_come_in_a_later_turn(gpt64: GPT) -> None:
    """Text first, then a prefix before more text on the same cache: what a placeholder between them would give."""
    case = clip_case([[None, None, (BEYOND, 4), None, None]])
    assert isinstance(case.soft_tokens, dict)
    with ears(gpt64) as prepender, torch.no_grad():
        whole = prepender(case.idx, soft_tokens=case.soft_tokens)
        cache = cache_for(prepender, 1)
        first = prepender(case.idx[:, :2], kv_cache=cache)
        then = prepender(case.idx[:, 3:], soft_tokens=case.soft_tokens[BEYOND], kv_cache=cache)
        torch.testing.assert_close(torch.cat([first, then], dim=1), whole[:, [0, 1, 3, 4]], rtol=0, atol=LOGITS)


def test_two_caches_do_not_mix(gpt64: GPT) -> None:
    """One ends on a clip and one on text; their steps alternate."""
    heard, read = clip_case([[None, (BEYOND, 3), None, None]]), clip_case([[None, None, None, None]], seed=1)
    with ears(gpt64) as prepender, torch.no_grad():
        whole = [prepender(case.idx, soft_tokens=case.soft_tokens) for case in (heard, read)]
        caches = [cache_for(prepender, 1) for _ in whole]
        parts = [[prepender(case.idx[:, :2], soft_tokens=case.soft_tokens, kv_cache=cache)]
                 for case, cache in zip((heard, read), caches)]
        for t in (2, 3):
            for part, case, cache in zip(parts, (heard, read), caches):
                part.append(prepender(case.idx[:, t : t + 1], kv_cache=cache))
        for part, expected in zip(parts, whole):
            torch.testing.assert_close(torch.cat(part, dim=1), expected, rtol=0, atol=LOGITS)


def test_prefill_and_cached_steps_in_bf16(make_gpt: Callable[..., GPT]) -> None:
    """Logits are 0.3 · √32 = 1.7 times a hidden state: 5 % of that in the mean, as for ragged rows."""
    case, gpt = prefix_case(6, [5, 5], 1), make_gpt(torch.bfloat16)
    with ears(gpt, insert_at=1) as prepender, torch.no_grad():
        whole, cache = prepender(case.idx, soft_tokens=case.soft_tokens), cache_for(prepender, 2)
        parts = [prepender(case.idx[:, :3], soft_tokens=case.soft_tokens, kv_cache=cache)]
        parts += [prepender(case.idx[:, t : t + 1], kv_cache=cache) for t in range(3, 6)]
        assert (torch.cat(parts, dim=1) - whole).square().mean().sqrt() < 0.05 * 1.7


@pytest.mark.parametrize("value_embeds", ["zero", "learned"])
def test_a_host_that_is_cast_afterwards_still_generates(make_gpt: Callable[..., GPT], value_embeds: str) -> None:
    """`.to(bfloat16)` for inference, as of any module: the cache follows."""
    gpt, soft = make_gpt(), torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    with ears(gpt, value_embeds=value_embeds) as prepender:
        prepender.to(torch.bfloat16)
        found = list(prepender.generate([1, 2], soft, max_tokens=4, temperature=0))
    with ears(gpt, value_embeds=value_embeds) as prepender:
        assert found == list(prepender.generate([1, 2], soft, max_tokens=4, temperature=0))


@pytest.mark.parametrize("case", [prefix_case(4, [3], 0), prefix_case(4, [3], 2), clip_case([[(INSIDE, 1)]]),
                                  clip_case([[None, (INSIDE, 3), None, (INSIDE, 1)]])],
                         ids=["prefix at 0", "prefix at 2", "one slot", "two clips"])
def test_a_foreign_caller_inside_bind_hears_what_the_prepender_hears(gpt64: GPT, case: Case) -> None:
    """The expanded prompt through gpt.forward, then cached steps."""
    with ears(gpt64, insert_at=case.insert_at) as prepender, torch.no_grad():
        expected = prepender(case.idx, soft_tokens=case.soft_tokens)[:, -1:]
        more = F.pad(case.idx, (0, 2), value=7)
        steps = prepender(more, soft_tokens=case.soft_tokens)[:, -2:]
        soft = case.soft_tokens if isinstance(case.soft_tokens, Features) else {INSIDE: case.soft_tokens[INSIDE]}
        ids = torch.tensor([prepender.expand(case.idx[0].tolist(), soft)])
        assert ids.size(1) == len(case.rows[0])
        with prepender.bind(soft):
            cache = cache_for(prepender, 1)
            found = [gpt64.forward(ids, kv_cache=cache)[:, -1:]]
            found += [gpt64.forward(more[:, :1] * 0 + 7, kv_cache=cache) for _ in range(2)]
        torch.testing.assert_close(torch.cat(found, dim=1), torch.cat([expected, steps], dim=1), rtol=0, atol=LOGITS)


def test_bind_keeps_the_precision_of_clips(gpt64: GPT) -> None:
    case = clip_case([[None, (INSIDE, 3), None]])
    assert isinstance(case.soft_tokens, dict)
    seen: list[Tensor] = []
    with ears(gpt64) as prepender, torch.no_grad():
        soft = {INSIDE: case.soft_tokens[INSIDE]}
        handle = gpt64.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with prepender.bind(soft):
            gpt64.forward(torch.tensor([prepender.expand(case.idx[0].tolist(), soft)]))
        handle.remove()
        torch.testing.assert_close(seen[0], hear(gpt64, case.rows[0]), rtol=0, atol=EXACT)


# ---- 7: gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [PREFIX, CLIPS], ids=["prefix", "clips"])
def test_gradients_reach_soft_tokens_and_learned_rows_and_nothing_frozen(gpt: GPT, case: Case) -> None:
    gpt.requires_grad_(False)
    kinds = case.soft_tokens if isinstance(case.soft_tokens, dict) else {0: case.soft_tokens}
    soft = {key: Features(clips.values.float().requires_grad_(), clips.lens) for key, clips in kinds.items()}
    with ears(gpt, value_embeds="learned", insert_at=case.insert_at) as prepender:
        loss = prepender(case.idx, case.idx.clamp(0, 40), soft if isinstance(case.soft_tokens, dict) else soft[0])
        loss.backward()
        for clips in soft.values():
            assert clips.values.grad is not None
            valid = torch.arange(clips.values.size(1)) < clips.lens.unsqueeze(1)
            assert clips.values.grad[valid].abs().amax(dim=-1).gt(0).all(), "each valid soft token"
            assert not clips.values.grad[~valid].any(), "and none beyond lens"
        assert len(prepender.side_rows) == 2
        assert all(row.grad is not None and row.grad.any() for row in prepender.side_rows.values())
    assert all(parameter.grad is None for parameter in gpt.parameters())


def test_gradients_reach_only_what_asks_for_them(gpt: GPT) -> None:
    gpt.requires_grad_(False)
    idx, soft = torch.tensor([[1, 2, 3]]), torch.randn(1, 4, WIDTH)
    with ears(gpt) as prepender:
        assert not prepender(idx, idx, soft).requires_grad
        gpt.transformer.wte.weight.requires_grad_()
        prepender(idx, idx, soft).backward()
    found = {name: grad for name, grad in grads(gpt).items() if grad is not None}
    assert found.keys() == {"transformer.wte.weight"}
    assert found["transformer.wte.weight"].abs().sum(dim=1).nonzero().flatten().tolist() == [1, 2, 3], "not the filler id"


@pytest.mark.parametrize(("value_embeds", "filler_row"), [("zero", False), ("placeholder", True), ("learned", False)])
def test_only_the_placeholder_policy_trains_row_0_of_value_tables(gpt: GPT, value_embeds: str, filler_row: bool) -> None:
    idx = torch.tensor([[1, 2, 3]])
    with ears(gpt, value_embeds=value_embeds) as prepender:
        prepender(idx, idx, torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(0))).backward()
    assert bool(gpt.value_embeds["1"].weight.grad[0].any()) is filler_row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_projector_trains_against_a_frozen_host(make_gpt: Callable[..., GPT], dtype: torch.dtype) -> None:
    """Thirty steps halve the loss. Masters and their gradients stay float32 under a bf16 host."""
    gpt = make_gpt(dtype).requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    features = Features(torch.randn(3, 9, 12, generator=rng, dtype=dtype), torch.tensor([9, 4, 6]))
    idx = torch.randint(1, 48, (3, 4), generator=rng)
    torch.manual_seed(0)
    projector = Projector(12, WIDTH, stack=2, zero_init=False)
    adam = torch.optim.Adam(projector.parameters(), lr=1e-2)
    with ears(gpt, insert_at=1) as prepender:
        losses = []
        for _ in range(30):
            loss = prepender(idx, idx.roll(-1, 1), projector(features))
            adam.zero_grad()
            loss.backward()
            assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in projector.parameters())
            adam.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(parameter.grad is None for parameter in gpt.parameters())


def test_a_zero_initialised_projector_begins_as_silence_that_can_learn(gpt: GPT) -> None:
    """norm(0) = 0: what is projected does not matter, and the gradient of the last layer is finite and not zero."""
    gpt.requires_grad_(False)
    projector, idx = Projector(12, WIDTH), torch.tensor([[1, 2, 3]])
    with ears(gpt) as prepender:
        one, other = (prepender(idx, idx, projector(torch.randn(1, 5, 12))) for _ in range(2))
        assert torch.equal(one, other)
        one.backward()
    assert projector.fc2.weight.grad is not None
    assert projector.fc2.weight.grad.isfinite().all() and projector.fc2.weight.grad.any()


def test_under_autocast_the_bare_gpt_is_bit_identical_and_soft_tokens_learn(gpt: GPT) -> None:
    idx, soft = torch.tensor([[1, 2, 3]]), torch.randn(1, 4, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        bare = gpt(idx)
        with ears(gpt) as prepender:
            assert torch.equal(prepender(idx), bare)
            prepender(idx, idx, soft).backward()
    assert soft.grad is not None and soft.grad.isfinite().all() and soft.grad.any()


# ---- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
@pytest.mark.parametrize("value_embeds", ["zero", "learned"])
@pytest.mark.parametrize("build", [reference, nano_gpt, tiny_hf, bigram_gpt])
def test_a_copy_hears_by_itself_and_lets_go_of_its_gpt_alone(build: Callable[[], Any], value_embeds: Any, again: Any) -> None:
    """As DataLoader workers, torch.save of a whole module and averages of weights make them."""
    prepender = SoftTokenPrepender(build(), value_embeds=value_embeds)
    idx, soft = torch.randint(1, 40, (2, 6)), torch.randn(2, 3, prepender.anatomy.n_embd, requires_grad=True)
    expected = logits_of(prepender(idx, None, soft))  # its graph is alive: the copy has no part in it
    other = again(prepender)
    assert torch.equal(logits_of(other(idx, None, soft)), expected)
    for parameter in other.parameters():
        parameter.data.zero_()
    bare = other.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bare.modules())
    assert torch.equal(logits_of(prepender(idx, None, soft)), expected)
