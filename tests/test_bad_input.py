"""Bad input: the sentence it gets, and the state it leaves.

Each refusal says where, what came, what was expected and what to do. Afterwards nothing has changed: the GPT's fingerprint,
a bare call, a call with soft tokens and a conversation in mid-cache give the bits they gave before. "meta" stands in for
another device on machines that have one only.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hosts import NanoGPT, fingerprint, nano_gpt
from torch import Tensor, nn
from torch.utils.data import DataLoader

from omni_adapters.decoding import KVCache
from omni_adapters.features import Features, select
from omni_adapters.generate import generate_batch
from omni_adapters.prepender import SoftTokenPrepender
from omni_adapters.reference_gpt import GPT
from omni_adapters.shapes import BadInput, MissingExtra

P, Q = 48, 12_345  # placeholder ids, one that wte has a row for and one that it has not
IDX = torch.tensor([[1, 2, 3], [4, 5, 6]])
WITH_P = torch.tensor([[1, P, 3], [P, 5, P]])
WIDTH, LIMIT = 32, 640  # n_embd; positions in the rotary table


def soft(*sizes: int, fill: float | None = None) -> Tensor:
    if fill is not None:
        return torch.full(sizes, fill)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(len(sizes)))


def clips(*lens: int, longest: int = 4, width: int = WIDTH) -> Features:
    return Features(soft(len(lens), longest, width), torch.tensor(lens, dtype=torch.int64))


def lens(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def nan_in_row_1() -> Features:
    values = soft(2, 4, WIDTH)
    values[1, 2, 7] = torch.nan
    return Features(values, lens(4, 3))


def one_infinite_clip() -> Features:
    values = soft(3, 4, WIDTH)
    values[0, 1, 0] = -torch.inf
    return Features(values, lens(2, 1, 4))


GRADED = IDX.roll(-1, 1)
IGNORED = torch.full_like(IDX, -1)

# name: (arguments of a call, parts of the sentence in order: what came, what was expected, what to do)
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "wrong width": (
        {"idx": IDX, "soft_tokens": soft(2, 4, 24)},
        ("features (2, 4, 24), 24 wide", "width 32", "Project to the GPT's width with Projector(in_dim, out_dim=n_embd).")),
    "wrong width of a clip": (
        {"idx": WITH_P, "soft_tokens": {P: clips(1, 2, 3, width=80)}},
        ("features (3, 4, 80), 80 wide", "width 32", "Project to the GPT's width with Projector(in_dim, out_dim=n_embd).")),
    "rank 2": (
        {"idx": IDX, "soft_tokens": soft(4, WIDTH)},
        ("soft tokens (4, 32)", "a tensor (B, T_soft, 32), Features, or a dict from placeholder id to those", ".")),
    "rank 4": (
        {"idx": IDX, "soft_tokens": soft(1, 2, 4, WIDTH)},
        ("soft tokens (1, 2, 4, 32)", "a tensor (B, T_soft, 32), Features, or a dict from placeholder id to those", ".")),
    "rank 2 in Features": (
        {"idx": IDX, "soft_tokens": Features(soft(4, WIDTH), lens(3, 3))},
        ("feature values (4, 32) of torch.float32", "a floating-point tensor (B, T, 32)", ".")),
    "rank 2 in a clip": (
        {"idx": WITH_P, "soft_tokens": {P: soft(4, WIDTH)}},
        ("soft tokens (4, 32)", "a tensor (B, T_soft, 32), Features, or a dict from placeholder id to those", ".")),
    "a list": (
        {"idx": IDX, "soft_tokens": [soft(4, WIDTH), soft(2, WIDTH)]},
        ("soft tokens list", "a tensor (B, T_soft, 32), Features, or a dict from placeholder id to those", ".")),
    "whole numbers": (
        {"idx": IDX, "soft_tokens": torch.ones(2, 4, WIDTH, dtype=torch.int64)},
        ("feature values (2, 4, 32) of torch.int64", "a floating-point tensor (B, T, 32)", ".")),
    "rank 2 lens": (
        {"idx": IDX, "soft_tokens": Features(soft(2, 4, WIDTH), lens(3, 3)[None])},
        ("lens (1, 2) of torch.int64 for 2 rows", "an int64 tensor (2,)", "One length per row of values.")),
    "int32 lens": (
        {"idx": IDX, "soft_tokens": Features(soft(2, 4, WIDTH), lens(3, 3).int())},
        ("lens (2,) of torch.int32 for 2 rows", "an int64 tensor (2,)", "One length per row of values.")),
    "lens in a list": (
        {"idx": IDX, "soft_tokens": Features(soft(2, 4, WIDTH), [3, 3])},  # type: ignore[arg-type]
        ("lens", "an int64 tensor (2,)", "One length per row of values.")),
    "another device": (
        {"idx": IDX, "soft_tokens": soft(2, 4, WIDTH).to("meta")},
        ("soft tokens on meta", "cpu, where idx is", "Move them with features_to(soft_tokens, 'cpu').")),
    "a clip on another device": (
        {"idx": WITH_P, "soft_tokens": {P: Features(soft(3, 4, WIDTH).to("meta"), lens(1, 2, 3).to("meta"))}},
        ("soft tokens on meta", "cpu, where idx is", "Move them with features_to(soft_tokens, 'cpu').")),
    "lens on another device": (
        {"idx": IDX, "soft_tokens": Features(soft(2, 4, WIDTH), lens(3, 3).to("meta"))},
        ("lens on meta and values on cpu", "one device", "Move both with features_to(features, device).")),
    "lens beyond the tensor": (
        {"idx": IDX, "soft_tokens": Features(soft(2, 4, WIDTH), lens(4, 5))},
        ("lens[1] = 5 for values (2, 4, 32)", "0 ≤ lens ≤ 4", "Lens count valid steps of the padded tensor.")),
    "a negative length": (
        {"idx": IDX, "soft_tokens": Features(soft(2, 4, WIDTH), lens(-1, 2))},
        ("lens[0] = -1 for values (2, 4, 32)", "0 ≤ lens ≤ 4", "Lens count valid steps of the padded tensor.")),
    "a clip's lens beyond the tensor": (
        {"idx": WITH_P, "soft_tokens": {P: clips(1, 2, 9)}},
        ("lens[2] = 9 for values (3, 4, 32)", "0 ≤ lens ≤ 4", "Lens count valid steps of the padded tensor.")),
    "one row of soft tokens for two": (
        {"idx": IDX, "soft_tokens": soft(1, 4, WIDTH)},
        ("1 rows of soft tokens for 2 rows of idx", "one per row",
         "Give a row without sound length 0, or use {placeholder id: clips}.")),
    "more clips than placeholders": (
        {"idx": WITH_P, "soft_tokens": {P: clips(1, 2, 3, 4)}},
        ("4 clips for 3 placeholders", "one clip per placeholder",
         "Put the placeholder id into idx once for every clip, in reading order.")),
    "fewer clips than placeholders": (
        {"idx": WITH_P, "soft_tokens": {P: clips(1, 2)}},
        ("2 clips for 3 placeholders", "one clip per placeholder",
         "Put the placeholder id into idx once for every clip, in reading order.")),
    "clips without a placeholder": (
        {"idx": WITH_P, "soft_tokens": {P: clips(1, 2, 3), Q: clips(2)}},
        ("1 clips for 0 placeholders", "one clip per placeholder",
         "Put the placeholder id into idx once for every clip, in reading order.")),
    "placeholders without a clip": (
        {"idx": WITH_P, "soft_tokens": {P: Features(soft(0, 4, WIDTH), lens())}},
        ("0 clips for 3 placeholders", "one clip per placeholder",
         "Put the placeholder id into idx once for every clip, in reading order.")),
    "an empty clip": (
        {"idx": WITH_P, "soft_tokens": {P: clips(1, 0, 3)}},
        ("clip 1 with 0 soft tokens", "at least one soft token per placeholder",
         "Leave the placeholder out of a row that has no clip.")),
    "clips without steps": (
        {"idx": WITH_P, "soft_tokens": {P: soft(3, 0, WIDTH)}},
        ("clip 0 with 0 soft tokens", "at least one soft token per placeholder",
         "Leave the placeholder out of a row that has no clip.")),
    "longer than the rotary table": (
        {"idx": IDX, "soft_tokens": Features(soft(2, LIMIT, WIDTH), lens(2, LIMIT - 2))},
        ("3 text and 638 soft tokens, 641 in all", "at most 640, the GPT's table of positions",
         "Use a larger Projector(stack=…), shorter clips or a GPT with a longer sequence_len.")),
    "clips longer than the rotary table": (
        {"idx": WITH_P, "soft_tokens": {P: clips(1, 400, 300, longest=400)}},
        ("3 text and 698 soft tokens, 701 in all", "at most 640, the GPT's table of positions",
         "Use a larger Projector(stack=…), shorter clips or a GPT with a longer sequence_len.")),
    "text longer than the rotary table": (
        {"idx": IDX.repeat(1, 300)},
        ("900 text and 0 soft tokens, 900 in all", "at most 640, the GPT's table of positions", ".")),
    "an id beyond the vocabulary": (
        {"idx": torch.tensor([[1, 64, 2], [1, 2, 3]]), "soft_tokens": soft(2, 4, WIDTH)},
        ("id 64 in idx", "0 ≤ id < 64, the rows of wte",
         "If it is a placeholder, give its clips: soft_tokens={id: clips}.")),
    "a negative id": (
        {"idx": torch.tensor([[1, 2, -1], [1, 2, 3]])},
        ("id -1 in idx", "0 ≤ id < 64, the rows of wte",
         "If it is a placeholder, give its clips: soft_tokens={id: clips}.")),
    "a placeholder that nobody claims": (
        {"idx": torch.where(WITH_P == P, Q, WITH_P), "soft_tokens": {P: Features(soft(0, 4, WIDTH), lens())}},
        ("id 12345 in idx", "0 ≤ id < 64, the rows of wte",
         "If it is a placeholder, give its clips: soft_tokens={id: clips}.")),
    "NaN": (
        {"idx": IDX, "soft_tokens": nan_in_row_1()},
        ("NaN or infinity in row 1 of features (2, 4, 32)", "finite values",
         "Look at the encoder's input and at fp16 overflow; bf16 or fp32 encoders do not overflow.")),
    "infinity in a clip": (
        {"idx": WITH_P, "soft_tokens": {P: one_infinite_clip()}},
        ("NaN or infinity in row 0 of features (3, 4, 32)", "finite values",
         "Look at the encoder's input and at fp16 overflow; bf16 or fp32 encoders do not overflow.")),
    "rank 1 ids": (
        {"idx": IDX[0]},
        ("idx (3,) of torch.int64", "int64 ids (B, T)", ".")),
    "ids that are not integers": (
        {"idx": IDX.float()},
        ("idx (2, 3) of torch.float32", "int64 ids (B, T)", ".")),
}
REFUSED_WITH_TARGETS: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "all targets ignored": (
        {"idx": IDX, "targets": IGNORED, "soft_tokens": soft(2, 4, WIDTH)},
        ("6 targets that are all -1", "at least one graded text token",
         "Look at the chat template and the mask: the mean loss of nothing is NaN.")),
    "all targets ignored without soft tokens": (
        {"idx": IDX, "targets": IGNORED},
        ("6 targets that are all -1", "at least one graded text token",
         "Look at the chat template and the mask: the mean loss of nothing is NaN.")),
    "all targets placeholders": (
        {"idx": WITH_P, "targets": torch.where(IDX > 3, P, -1), "soft_tokens": {P: clips(1, 2, 3)}},
        ("6 targets that are all -1", "at least one graded text token",
         "Look at the chat template and the mask: the mean loss of nothing is NaN.")),
    "targets for soft tokens": (
        {"idx": IDX, "targets": torch.ones(2, 7, dtype=torch.int64), "soft_tokens": soft(2, 4, WIDTH)},
        ("targets (2, 7)", "the shape of idx, (2, 3)", "Give text positions only: soft tokens have no targets.")),
}
EVERY = REFUSED | REFUSED_WITH_TARGETS


class Watched:
    """A GPT with a prepender, what good calls give, and a conversation that has just heard a clip."""

    def __init__(self, gpt: GPT, insert_at: int = 0) -> None:
        self.gpt, self.prepender = gpt, SoftTokenPrepender(gpt, insert_at=insert_at)
        self.cache = self.heard_a_clip()
        self.usual = self.answers(self.heard_a_clip())
        self.fingerprint = fingerprint(gpt)

    def heard_a_clip(self) -> KVCache:
        anatomy = self.prepender.anatomy
        assert anatomy.cache_shape is not None
        cache = KVCache(2, 16, anatomy.cache_shape, IDX.device, anatomy.dtype)
        self.prepender(torch.tensor([[7, P], [8, P]]), soft_tokens={P: clips(3, 3)}, kv_cache=cache)
        return cache

    def answers(self, cache: KVCache) -> list[Tensor]:
        with torch.no_grad():
            return [
                self.gpt(IDX), self.gpt.forward(IDX[:1]), self.prepender(IDX),
                self.prepender(IDX, GRADED, Features(soft(2, 4, WIDTH), lens(4, 1))),
                self.prepender(WITH_P, soft_tokens={P: clips(2, 1, 4)}),
                self.prepender.hidden_states(IDX, soft(2, 4, WIDTH)),
                self.prepender(IDX[:, :1], kv_cache=cache), self.prepender(IDX[:, 1:2], kv_cache=cache),
            ]

    def check_untouched(self) -> None:
        assert fingerprint(self.gpt) == self.fingerprint
        assert self.cache.get_pos() == 4
        for found, expected in zip(self.answers(self.cache), self.usual):
            assert torch.equal(found, expected)


@pytest.fixture
def watched(gpt: GPT) -> Iterator[Watched]:
    scene = Watched(gpt)
    yield scene
    scene.prepender.remove()


def refused(call: Callable[[], object], where: str, parts: tuple[str, str, str]) -> None:
    """`call` raises BadInput with these parts in this order, the last of which says what to do."""
    with pytest.raises(BadInput) as error:
        call()
    message = str(error.value)
    came, expected, todo = parts
    assert message.startswith(f"{where}: got "), message
    assert came in message.partition(": got ")[2].partition("; expected ")[0], message
    assert expected in message.partition("; expected ")[2], message
    assert message.endswith(todo), message
    assert error.value.todo, "says what to do"


def where_of(name: str, method: str) -> str:
    """The method; clips that do not fit their placeholders are told apart by id."""
    key = {"clips without a placeholder": Q}.get(name, P)
    counted = ("more clips than placeholders", "fewer clips than placeholders", "clips without a placeholder",
               "placeholders without a clip", "an empty clip", "clips without steps")
    return f"SoftTokenPrepender.{method}" + (f", placeholder {key}" if name in counted else "")


# ---- forward, hidden_states, a step on a cache ------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_forward_refuses(watched: Watched, name: str) -> None:
    arguments, parts = EVERY[name]
    refused(lambda: watched.prepender(**arguments), where_of(name, "forward"), parts)
    watched.check_untouched()


@pytest.mark.parametrize("name", REFUSED)
def test_hidden_states_refuses(watched: Watched, name: str) -> None:
    arguments, parts = REFUSED[name]
    refused(lambda: watched.prepender.hidden_states(**arguments), where_of(name, "hidden_states"), parts)
    watched.check_untouched()


@pytest.mark.parametrize("name", EVERY)
def test_a_refused_turn_leaves_the_conversation_as_it_was(watched: Watched, name: str) -> None:
    """The cache ends on a clip: the next good token still knows that its neighbour is sound."""
    with pytest.raises(BadInput):
        watched.prepender(**EVERY[name][0], kv_cache=watched.cache)
    watched.check_untouched()


def test_a_turn_beyond_the_rotary_table_counts_what_is_cached(watched: Watched) -> None:
    refused(lambda: watched.prepender(IDX, soft_tokens=soft(2, 634, WIDTH), kv_cache=watched.cache),
            "SoftTokenPrepender.forward", ("4 cached positions, 3 text and 634 soft tokens, 641 in all", "at most 640",
                                           "or a GPT with a longer sequence_len."))
    watched.check_untouched()


def test_an_argument_the_host_does_not_take_leaves_the_conversation_as_it_was(watched: Watched) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        watched.prepender(IDX[:, :1], kv_cache=watched.cache, no_such_argument=1)
    watched.check_untouched()


@pytest.mark.parametrize(("idx", "given"), [(IDX, clips(4, 1)), (torch.tensor([[1, P], [2, 3]]), {P: clips(2)})],
                         ids=["prefix", "clips"])
def test_rows_of_different_fused_lengths_cannot_share_a_cache(watched: Watched, idx: Tensor, given: Any) -> None:
    """The shorter row's padding would be cached as if it had been said."""
    with pytest.raises(BadInput, match="length"):
        watched.prepender(idx, soft_tokens=given, kv_cache=watched.cache)
    watched.check_untouched()


def test_forward_refuses_a_pad_to_that_is_too_short(watched: Watched) -> None:
    watched.prepender.pad_to = 6
    refused(lambda: watched.prepender(IDX, soft_tokens=soft(2, 4, WIDTH)), "SoftTokenPrepender.forward",
            ("a fused row of 7 slots", "at most pad_to = 6", "Raise pad_to."))
    watched.prepender.pad_to = None
    watched.check_untouched()


def test_forward_refuses_a_prefix_after_the_end_of_the_text(gpt: GPT) -> None:
    watched = Watched(gpt, insert_at=2)
    refused(lambda: watched.prepender(IDX[:, :1], soft_tokens=soft(2, 4, WIDTH)), "SoftTokenPrepender.forward",
            ("insert_at = 2 for 1 text tokens", "0 ≤ insert_at ≤ 1",
             "Give at least insert_at text tokens, or prepend earlier."))
    watched.check_untouched()


def test_a_batch_refuses_a_prompt_that_is_shorter_than_insert_at(gpt: GPT) -> None:
    """As the prompt alone is refused: its answer would not hear the sound behind it."""
    watched = Watched(gpt, insert_at=2)
    prompts, given = [[1], [2, 3, 4]], Features(soft(2, 4, WIDTH), lens(4, 2))
    for order in ([0, 1], [1, 0]):
        with pytest.raises(BadInput, match="insert_at = 2 for 1 text tokens"):
            generate_batch(watched.prepender, [prompts[row] for row in order], select(given, order), max_tokens=1)
    watched.check_untouched()


def test_learned_positions_set_the_limit_where_there_is_no_rotary_table() -> None:
    gpt: NanoGPT = nano_gpt()
    idx = torch.tensor([[1, 2, 3]])
    bare = gpt(idx)[0]
    prepender = SoftTokenPrepender(gpt)
    before = prepender(idx, soft_tokens=soft(1, 45, 24))[0]
    refused(lambda: prepender(idx, soft_tokens=soft(1, 46, 24)), "SoftTokenPrepender.forward",
            ("3 text and 46 soft tokens, 49 in all", "at most 48, the GPT's table of positions",
             "Use a larger Projector(stack=…), shorter clips or a GPT with a longer sequence_len."))
    assert torch.equal(prepender(idx, soft_tokens=soft(1, 45, 24))[0], before)
    assert torch.equal(gpt(idx)[0], bare)


# ---- generate, expand, bind -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wrong width", "rank 2", "another device", "lens beyond the tensor", "NaN"])
def test_generate_expand_and_bind_refuse_soft_tokens_when_called(watched: Watched, name: str) -> None:
    """generate not at its first token, bind not in the foreign call."""
    arguments, parts = REFUSED[name]
    given = arguments["soft_tokens"]
    refused(lambda: watched.prepender.generate([1, 2], given, max_tokens=3), "SoftTokenPrepender.generate", parts)
    refused(lambda: watched.prepender.expand([1, 2], given), "SoftTokenPrepender.expand", parts)
    refused(lambda: watched.prepender.bind(given).__enter__(), "SoftTokenPrepender.bind", parts)
    watched.check_untouched()


@pytest.mark.parametrize(("arguments", "parts"), [
    ({"tokens": [1, 2], "max_tokens": -1}, ("max_tokens = -1", "max_tokens ≥ 0", ".")),
    ({"tokens": [1, 2], "max_tokens": 1, "temperature": -0.5}, ("temperature = -0.5", "a finite temperature", "greedy.")),
    ({"tokens": [1, 2], "max_tokens": 1, "temperature": float("nan")}, ("temperature = nan", "a finite", "0 is greedy.")),
    ({"tokens": [1, 2], "max_tokens": 1, "top_k": 0}, ("top_k = 0", "top_k ≥ 1 or None", ".")),
    ({"tokens": [], "max_tokens": 1}, ("tokens []", "a non-empty list of ints: one prompt", ".")),
    ({"tokens": [[1, 2]], "max_tokens": 1}, ("tokens [[1, 2]]", "a non-empty list of ints: one prompt", ".")),
    ({"tokens": [1, 99], "max_tokens": 1}, ("id 99 in idx", "0 ≤ id < 64", "soft_tokens={id: clips}.")),
    ({"tokens": [1, 2], "max_tokens": 640}, ("642 text and 0 soft tokens, 642 in all", "at most 640", ".")),
])
def test_generate_refuses_when_called(watched: Watched, arguments: dict[str, Any], parts: tuple[str, str, str]) -> None:
    with pytest.raises(BadInput) as error:
        watched.prepender.generate(**arguments)
    assert all(part in str(error.value) for part in parts)
    watched.check_untouched()


def test_expand_refuses_a_placeholder_that_a_foreign_engine_cannot_look_up(watched: Watched) -> None:
    refused(lambda: watched.prepender.expand([1, Q], {Q: clips(3)}), "SoftTokenPrepender.expand",
            ("placeholder id 12345", "0 ≤ id < 64", "Choose an unused id inside the vocabulary."))
    watched.check_untouched()


@pytest.mark.parametrize(("ids", "given"), [
    ([[1, 2, 3]], soft(1, 4, WIDTH)), ([[1, P, 3]], {P: clips(2)}), ([[1, 2, 3]], {P: clips(2)}),
    ([[1, P, P, 3], [1, P, 2, 3]], {P: clips(2)})], ids=["prefix", "clip", "no placeholder", "one row of two"])
def test_a_foreign_call_inside_bind_that_would_hear_nothing_is_refused(watched: Watched, ids: list[list[int]],
                                                                       given: Any) -> None:
    with watched.prepender.bind(given):
        refused(lambda: watched.gpt.forward(torch.tensor(ids)), "SoftTokenPrepender.bind",
                ("a call of the GPT with", "one token (a decode step) or an expanded prompt",
                 "Pass the GPT prepender.expand(tokens, soft_tokens)."))
    watched.check_untouched()


def test_a_bind_inside_a_bind_is_refused_and_the_outer_one_goes_on(watched: Watched) -> None:
    given = soft(1, 4, WIDTH)
    ids = torch.tensor([watched.prepender.expand([1, 2], given)])
    with watched.prepender.bind(given):
        first = watched.gpt.forward(ids)
        refused(lambda: watched.prepender.bind(given).__enter__(), "SoftTokenPrepender.bind",
                ("a bind inside a bind", "one at a time", "Leave the outer with-block first."))
        assert torch.equal(watched.gpt.forward(ids), first)
    watched.check_untouched()


# ---- building one -----------------------------------------------------------------------------------------------------


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.out = nn.Embedding(8, 4), nn.Linear(4, 8)

    def forward(self, idx: Tensor) -> Tensor:
        return self.out(self.wte(idx))


class Faulty(Headless):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Dropout(0.5)

    def forward(self, idx: Tensor) -> Tensor:
        raise RuntimeError("this GPT needs a mask")


@pytest.mark.parametrize(("build", "parts"), [
    (Headless, ("Headless with embeddings [wte (8, 4)] and children [wte: Embedding, out: Linear]",
                "a module named lm_head, or get_output_embeddings()", ".")),
    (Faulty, ("Faulty, whose forward of two tokens fails (plain: this GPT needs a mask",
              "a GPT that runs gpt(idx) on a (1, 2) tensor of ids", "")),
])
def test_a_gpt_that_cannot_be_read_is_refused_and_left_alone(build: Callable[[], nn.Module],
                                                             parts: tuple[str, str, str]) -> None:
    model = build()
    before = fingerprint(model)
    with pytest.raises(BadInput) as error:
        SoftTokenPrepender(model)
    assert all(part in str(error.value) for part in parts)
    assert fingerprint(model) == before


def test_a_second_prepender_on_one_gpt_is_refused_and_the_first_goes_on(watched: Watched) -> None:
    refused(lambda: SoftTokenPrepender(watched.gpt), "SoftTokenPrepender",
            ("a GPT whose transformer.wte another prepender has hooked", "one prepender per GPT",
             "Use that one, or call .remove() on it first."))
    watched.check_untouched()


def test_after_remove_a_new_prepender_may_come_and_the_old_one_says_so(watched: Watched) -> None:
    old = watched.prepender
    old.remove()
    for call in (lambda: old(IDX), lambda: old.hidden_states(IDX), lambda: old.expand([1], soft(1, 2, WIDTH)),
                 lambda: old.bind(soft(1, 2, WIDTH)).__enter__(), lambda: old.generate([1], max_tokens=1)):
        with pytest.raises(BadInput, match=r"got a call after remove\(\); expected a prepender with its hooks in place"):
            call()
    watched.prepender = SoftTokenPrepender(watched.gpt)
    watched.cache = watched.heard_a_clip()
    for found, expected in zip(watched.answers(watched.cache), watched.usual):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("options", "came", "expected"), [
    ({"value_embeds": "zeros"}, "value_embeds = 'zeros'", "'zero', 'placeholder' or 'learned'"),
    ({"insert_at": -1}, "insert_at = -1", "insert_at ≥ 0")])
def test_options_that_do_not_exist_are_refused(gpt: GPT, options: dict[str, Any], came: str, expected: str) -> None:
    before = fingerprint(gpt)
    with pytest.raises(BadInput) as error:
        SoftTokenPrepender(gpt, **options)
    assert came in str(error.value) and expected in str(error.value)
    assert fingerprint(gpt) == before


# ---- an exception inside the GPT --------------------------------------------------------------------------------------


class Boom(BaseException):
    """Not an Exception: as KeyboardInterrupt, which nobody catches by accident."""


def explode(gpt: GPT, error: type[BaseException]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise error("inside block 2")
    return gpt.transformer["h"][2].register_forward_pre_hook(hook)


@pytest.mark.parametrize("error", [RuntimeError, Boom])
@pytest.mark.parametrize("call", [
    lambda p: p(IDX, GRADED, soft(2, 4, WIDTH)),
    lambda p: p(WITH_P, soft_tokens={P: clips(1, 2, 3)}),
    lambda p: p(IDX),
    lambda p: p.hidden_states(IDX, soft(2, 4, WIDTH)),
    lambda p: p.hidden_states(IDX),
    lambda p: list(p.generate([1, 2], soft(1, 4, WIDTH), max_tokens=2)),
], ids=["loss", "clips", "no soft tokens", "hidden_states", "bare hidden_states", "generate"])
def test_after_an_exception_inside_the_gpt_all_is_clean(watched: Watched, call: Callable[[SoftTokenPrepender], object],
                                                        error: type[BaseException]) -> None:
    handle = explode(watched.gpt, error)
    with pytest.raises(error, match="inside block 2"):
        call(watched.prepender)
    handle.remove()
    watched.check_untouched()


@pytest.mark.parametrize("error", [RuntimeError, Boom])
def test_after_an_exception_inside_a_bound_call_all_is_clean(watched: Watched, error: type[BaseException]) -> None:
    """Whether it leaves the with-block or is caught within it."""
    given = soft(1, 4, WIDTH)
    ids = torch.tensor([watched.prepender.expand([1, 2], given)])
    with watched.prepender.bind(given):
        heard = watched.gpt.forward(ids)
    handle = explode(watched.gpt, error)
    with pytest.raises(error), watched.prepender.bind(given):
        watched.gpt.forward(ids)
    with watched.prepender.bind(given):
        with pytest.raises(error):
            watched.gpt.forward(ids)
        handle.remove()
        assert torch.equal(watched.gpt.forward(ids), heard)
    watched.check_untouched()


def test_a_generator_that_is_left_half_way_leaves_nothing_behind(watched: Watched) -> None:
    stream = watched.prepender.generate([1, 2], soft(1, 4, WIDTH), max_tokens=20)
    next(stream)
    del stream
    watched.check_untouched()


def test_an_exception_in_backward_leaves_the_next_step_as_it_was(watched: Watched) -> None:
    given = soft(2, 4, WIDTH).requires_grad_()

    def step() -> Tensor | None:
        given.grad = None
        watched.prepender(IDX, GRADED, given).backward()
        watched.gpt.zero_grad(set_to_none=True)
        return given.grad

    def stop(gradient: Tensor) -> None:
        raise RuntimeError("on the way back")

    usual = step()
    handle = given.register_hook(stop)
    with pytest.raises(RuntimeError, match="on the way back"):
        step()
    watched.gpt.zero_grad(set_to_none=True)
    handle.remove()
    again = step()
    assert usual is not None and again is not None and torch.equal(usual, again)
    watched.check_untouched()


@pytest.mark.parametrize("error", [BadInput("f", "1", "2", "do"), MissingExtra("speak", "espeakng-loader", "speech")])
def test_errors_survive_the_way_out_of_a_worker_process(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error) and again.args == error.args


def test_an_error_that_a_dataloader_passes_on_keeps_its_text() -> None:
    """It makes a new one of one text, the worker's traceback; other code may ask that one for its parts."""
    def checked(number: int) -> int:
        raise BadInput("f", "a clip of 0 samples", "some", "leave it out")

    with pytest.raises(BadInput, match=r"(?s)Traceback.*f: got a clip of 0 samples; expected some\. Leave it out\.") as error:
        list(DataLoader([1, 2], num_workers=1, collate_fn=lambda rows: checked(rows[0]), multiprocessing_context="fork"))
    assert error.value.came == error.value.todo == ""
