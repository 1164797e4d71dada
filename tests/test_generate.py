"""Generation: cached equals uncached token for token, streams lazily but checks at once, and foreign engines inside bind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from hosts import EngineCache, bigram_gpt, engine, fingerprint, nano_gpt, reference, tiny_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from omni_adapters.anatomy import logits_of
from omni_adapters.features import Features, pad_rows
from omni_adapters.prepender import SoftTokenPrepender
from omni_adapters.shapes import BadInput

STEPS = 8
PROMPT = [5, 17, 3, 41, 8]
P, Q = 48, 49  # placeholder ids: inside every host's vocabulary, so that a foreign engine can look them up
HOSTS: dict[str, Callable[..., nn.Module]] = {
    "reference": reference, "nano_gpt": nano_gpt, "transformers": tiny_hf, "bigram": lambda seed=0: bigram_gpt(seed)}


def noise(num: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(1, num, width, generator=torch.Generator().manual_seed(seed))


def prefix(width: int) -> Tensor:
    return noise(4, width)


def clips(width: int) -> dict[int, Features]:
    return {P: pad_rows([noise(2, width, 1)[0], noise(3, width, 2)[0]]), Q: Features(noise(1, width, 3), torch.tensor([1]))}


PLACES: dict[str, Callable[[int], tuple[list[int], Any, dict[str, Any]]]] = {
    "no soft tokens": lambda width: (PROMPT, None, {}),
    "prefix": lambda width: (PROMPT, prefix(width), {}),
    "prefix with padding": lambda width: (PROMPT, Features(prefix(width), torch.tensor([3])), {}),
    "after the first token": lambda width: (PROMPT, prefix(width), {"insert_at": 1}),
    "after the prompt": lambda width: (PROMPT, prefix(width), {"insert_at": len(PROMPT)}),
    "one token": lambda width: ([5], prefix(width), {}),
    "clips": lambda width: ([5, P, 3, Q, P, 8], clips(width), {}),
    "prompt ends in a clip": lambda width: ([5, P, 3, P, Q], clips(width), {}),
    "nothing but clips": lambda width: ([P, Q, P], clips(width), {}),
}
FOREIGN = [place for place in PLACES if place != "no soft tokens"]


def again_each_step(prepender: SoftTokenPrepender, tokens: list[int], soft: Any, steps: int = STEPS) -> list[int]:
    """Greedy ids with the whole sequence computed again for every one of them.

    Placeholders move out of the vocabulary first: what is generated is text, whatever its id.
    """
    if isinstance(soft, dict):
        tokens = [1000 + token if token in soft else token for token in tokens]
        soft = {1000 + key: value for key, value in soft.items()}
    ids = list(tokens)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(logits_of(prepender(torch.tensor([ids]), None, soft))[0, -1].argmax()))
    return ids[len(tokens) :]


def again_logits(prepender: SoftTokenPrepender, tokens: list[int], soft: Any, ids: list[int]) -> Tensor:
    """Logits (1, vocab_size) after a prompt and what was generated behind it."""
    with torch.no_grad():
        return logits_of(prepender(torch.tensor([tokens + ids]), None, soft))[:, -1]


def set_up(host: str, place: str, seed: int = 0) -> tuple[nn.Module, SoftTokenPrepender, list[int], Any]:
    gpt = HOSTS[host](seed).eval()
    width = {"reference": 32, "transformers": 32}.get(host, 24)
    tokens, soft, options = PLACES[place](width)
    return gpt, SoftTokenPrepender(gpt, **options), tokens, soft


# ---- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("host", HOSTS)
def test_greedy_equals_the_full_forward_token_for_token(host: str, place: str) -> None:
    _, prepender, tokens, soft = set_up(host, place, seed=2)
    came = list(prepender.generate(tokens, soft, max_tokens=STEPS, temperature=0.0))
    assert came == again_each_step(prepender, tokens, soft)
    assert len(came) == STEPS and all(type(token) is int for token in came)


@settings(max_examples=25, deadline=None)
@given(tokens=st.lists(st.integers(0, 96), min_size=1, max_size=7), lens=st.lists(st.integers(1, 4), max_size=3),
       where=st.data(), seed=st.integers(0, 50))
def test_greedy_anywhere(tokens: list[int], lens: list[int], where: st.DataObject, seed: int) -> None:
    """Clips of any length at any places of any prompt, on a host with smear, value embeddings and backout."""
    prepender = SoftTokenPrepender(reference(seed))
    for _ in lens:
        tokens.insert(where.draw(st.integers(0, len(tokens))), 500)  # an id outside the vocabulary is never generated
    soft = {500: pad_rows([noise(n, 32, seed + i)[0] for i, n in enumerate(lens)])} if lens else None
    came = list(prepender.generate(tokens, soft, max_tokens=4, temperature=0.0))
    assert came == again_each_step(prepender, tokens, soft, 4)


def test_logits_of_cached_steps_equal_the_full_forward() -> None:
    """Not only the best id: prefill and each cached step, to 1e-5 of logits within ±15 (fp32, two layers)."""
    from omni_adapters.decoding import Decoder

    _, prepender, tokens, soft = set_up("reference", "prompt ends in a clip")
    with torch.inference_mode():
        decoder = Decoder(prepender, torch.tensor([tokens]), soft, 64)
        logits, ids = decoder.start(), list(tokens)
        for token in (7, 0, 13, 90):
            torch.testing.assert_close(logits, prepender(torch.tensor([ids]), None, soft)[:, -1], rtol=0, atol=1e-5)
            logits = decoder.step(torch.tensor([[token]]))
            ids.append(token)


def test_bf16_and_autocast_generate() -> None:
    _, prepender, tokens, soft = set_up("reference", "prefix")
    with torch.autocast("cpu", torch.bfloat16):
        assert len(list(prepender.generate(tokens, soft, max_tokens=3, temperature=0.0))) == 3
    low = SoftTokenPrepender(reference().bfloat16())
    assert len(list(low.generate(tokens, soft, max_tokens=3, temperature=0.0))) == 3


@pytest.mark.parametrize("host", HOSTS)
def test_a_generated_placeholder_id_is_text(host: str) -> None:
    """Once generated, the placeholder's id is an ordinary token, with a cache and without."""
    gpt = HOSTS[host]()
    head = gpt.lm_head
    gpt.lm_head = nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        gpt.lm_head.weight.mul_(0.01)
        gpt.lm_head.bias[P] = 10.0
    prepender = SoftTokenPrepender(gpt)
    soft = {P: Features(noise(3, head.in_features), torch.tensor([3]))}
    assert list(prepender.generate([4, P, 6], soft, max_tokens=4, temperature=0.0)) == [P] * 4
    if host == "reference":
        expanded = prepender.expand([4, P, 6], soft)
        with prepender.bind(soft):
            assert list(gpt.generate(expanded, 4, temperature=0.0)) == [P] * 4
            assert list(engine(gpt, expanded, 2, 4)) == [[P, P]] * 4


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["reference", "nano_gpt", "transformers"])
def test_seeds(host: str) -> None:
    _, prepender, tokens, soft = set_up(host, "prefix")
    state = torch.get_rng_state()

    def draw(seed: int, **options: Any) -> list[int]:
        return list(prepender.generate(tokens, soft, max_tokens=15, seed=seed, **options))

    assert draw(1) == draw(1) and draw(1) != draw(2)
    assert draw(1, top_k=5) == draw(1, top_k=5)
    assert draw(1, top_k=10_000) == draw(1)
    assert draw(1, temperature=0.01) != draw(1, temperature=3.0)
    assert draw(1, temperature=0.0) == draw(2, temperature=0.0) == draw(3, top_k=1, temperature=2.0)
    assert list(prepender.generate(tokens, soft, max_tokens=15)) == draw(42)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_top_k_draws_from_the_k_best(top_k: int) -> None:
    _, prepender, tokens, soft = set_up("reference", "clips")
    came = list(prepender.generate(tokens, soft, max_tokens=12, temperature=2.0, top_k=top_k))
    ids = list(tokens)
    ranks = []
    for token in came:
        with torch.no_grad():
            logits = prepender(torch.tensor([ids]), None, soft)[0, -1]
        ranks.append(int((logits > logits[token]).sum()))
        ids.append(token)
    assert max(ranks) < top_k and (top_k == 1 or len(set(ranks)) > 1)


def test_sampling_draws_what_the_hosts_own_generate_draws() -> None:
    gpt, prepender, tokens, soft = set_up("reference", "prefix")
    for seed in (1, 2, 3):
        bare = list(gpt.generate(tokens, 10, temperature=0.9, seed=seed))
        assert list(prepender.generate(tokens, max_tokens=10, temperature=0.9, seed=seed)) == bare
        with prepender.bind(soft):
            heard = list(gpt.generate(prepender.expand(tokens, soft), 10, temperature=0.9, seed=seed))
        assert list(prepender.generate(tokens, soft, max_tokens=10, temperature=0.9, seed=seed)) == heard


# ---- a stream --------------------------------------------------------------------------------------------------------


def count_forwards(gpt: nn.Module) -> list[int]:
    widths: list[int] = []
    gpt.get_submodule("transformer.wte").register_forward_pre_hook(lambda module, args: widths.append(args[0].size(1)))
    return widths


def test_nothing_runs_before_the_first_token_is_asked_for() -> None:
    gpt, prepender, tokens, soft = set_up("reference", "prefix")
    widths = count_forwards(gpt)
    stream = prepender.generate(tokens, soft, max_tokens=STEPS)
    assert isinstance(stream, Iterator) and widths == []
    next(stream)
    assert widths == [len(tokens) + 4]
    next(stream)
    next(stream)
    assert widths == [len(tokens) + 4, 1, 1]
    list(stream)
    assert len(widths) == STEPS


def test_no_tokens_asked_no_forward() -> None:
    gpt, prepender, tokens, soft = set_up("reference", "prefix")
    widths = count_forwards(gpt)
    assert list(prepender.generate(tokens, soft, max_tokens=0)) == [] and widths == []


TWO_ROWS = torch.zeros(2, 3, 32)
BAD_CALLS: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "no tokens": ([], None, {}, "tokens"),
    "a tensor of tokens": (torch.tensor([1, 2]), None, {}, "tokens"),
    "rows of tokens": ([[1, 2]], None, {}, "tokens"),
    "words": (["a"], None, {}, "tokens"),
    "id beyond wte": ([5, 128], None, {}, "id 128 in idx"),
    "negative id": ([5, -1], None, {}, "id -1 in idx"),
    "negative max_tokens": ([5], None, {"max_tokens": -1}, "max_tokens = -1"),
    "negative temperature": ([5], None, {"temperature": -0.1}, "temperature = -0.1"),
    "temperature NaN": ([5], None, {"temperature": float("nan")}, "temperature = nan"),
    "infinite temperature": ([5], None, {"temperature": float("inf")}, "temperature = inf"),
    "top_k 0": ([5], None, {"top_k": 0}, "top_k = 0"),
    "another width": ([5], torch.zeros(1, 2, 31), {}, "31 wide"),
    "rank 2": ([5], torch.zeros(2, 32), {}, "(2, 32)"),
    "two rows": ([5], TWO_ROWS, {}, "2 rows of soft tokens for 1 rows of idx"),
    "NaN": ([5], torch.full((1, 2, 32), float("nan")), {}, "NaN or infinity in row 0"),
    "too few clips": ([P, P], {P: noise(2, 32)}, {}, "1 clips for 2 placeholders"),
    "too many clips": ([P, 5], {P: TWO_ROWS}, {}, "2 clips for 1 placeholders"),
    "an empty clip": ([P], {P: Features(noise(2, 32), torch.tensor([0]))}, {}, "0 soft tokens"),
    "too long": (PROMPT, noise(600, 32), {"max_tokens": 36}, "5 + 36 = 41"),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_input_is_refused_at_the_call(call: str) -> None:
    gpt = reference()
    prepender = SoftTokenPrepender(gpt)
    widths = count_forwards(gpt)
    before = fingerprint(gpt)
    tokens, soft, options, said = BAD_CALLS[call]
    with pytest.raises(BadInput) as error:
        prepender.generate(tokens, soft, **({"max_tokens": 4} | options))
    if call != "too long":  # its wording has a test of its own
        assert said in str(error.value)
    assert widths == [] and fingerprint(gpt) == before


def test_a_removed_prepender_refuses_at_the_call() -> None:
    prepender = SoftTokenPrepender(reference())
    prepender.remove()
    with pytest.raises(BadInput, match="after remove"):
        prepender.generate([5], max_tokens=1)


@pytest.mark.parametrize(("host", "limit"), [("reference", 640), ("nano_gpt", 48), ("transformers", 64)])
def test_the_table_of_positions_is_used_to_its_end_and_not_beyond(host: str, limit: int) -> None:
    _, prepender, tokens, soft = set_up(host, "prefix")
    soft = noise(limit - len(tokens) - 3, soft.size(-1))
    assert len(list(prepender.generate(tokens, soft, max_tokens=3, temperature=0.0))) == 3
    with pytest.raises(BadInput) as error:
        prepender.generate(tokens, soft, max_tokens=4)
    said = str(error.value)
    assert f"{limit + 1} in all" in said and f"at most {limit}" in said and "Projector(stack=" in said


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["prefix", "prompt ends in a clip"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_half_consumed_stream_leaves_nothing_behind(host: str, place: str) -> None:
    gpt, prepender, tokens, soft = set_up(host, place)
    idx = torch.tensor([PROMPT])
    with torch.no_grad():
        bare = logits_of(gpt(idx))
    before = fingerprint(gpt)
    stream = prepender.generate(tokens, soft, max_tokens=STEPS)
    first = list(islice(stream, 2))
    assert fingerprint(gpt) == before and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.no_grad():
        assert torch.equal(logits_of(gpt(idx)), bare) and torch.equal(logits_of(prepender(idx)), bare)
    row = torch.randn(1, 2, prepender.anatomy.n_embd, requires_grad=True)
    logits_of(prepender(idx, None, row)).sum().backward()
    assert row.grad is not None and bool(row.grad.abs().sum())
    rest = list(stream)  # and all that did not disturb the stream either
    assert first + rest == list(prepender.generate(tokens, soft, max_tokens=STEPS))


@pytest.mark.parametrize("host", HOSTS)
def test_streams_run_side_by_side(host: str) -> None:
    _, prepender, tokens, soft = set_up(host, "clips")
    calls = [(tokens, soft), ([5, P, 9], {P: noise(2, prepender.anatomy.n_embd, 9)}), (PROMPT, None)]
    alone = [list(prepender.generate(*call, max_tokens=5)) for call in calls]
    streams = [prepender.generate(*call, max_tokens=5) for call in calls]
    assert [list(ids) for ids in zip(*(list(column) for column in zip(*streams)))] == alone


def test_a_dropped_stream_frees_its_cache() -> None:
    _, prepender, tokens, soft = set_up("reference", "prefix")
    stream = prepender.generate(tokens, soft, max_tokens=STEPS)
    next(stream)
    caches = [weakref.ref(thing) for thing in gc.get_objects() if type(thing).__name__ == "KVCache"]
    assert caches
    del stream
    gc.collect()
    assert all(cache() is None for cache in caches)


def test_repeated_calls_hold_no_memory() -> None:
    """A caller may keep one prompt tensor for a thousand forwards inside bind: nothing piles up behind it."""
    gpt, prepender, tokens, soft = set_up("reference", "prefix")
    ids = torch.tensor([prepender.expand(tokens, soft)])

    def rows_alive() -> int:
        gc.collect()
        tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
        return sum(1 for tensor in tensors if tensor.shape == (1, ids.size(1), 32))

    with prepender.bind(soft), torch.no_grad():
        gpt(ids)
        before = rows_alive()
        for _ in range(10):
            gpt(ids)
        assert rows_alive() <= before + 1


@pytest.mark.parametrize("place", ["prefix", "after the prompt", "prompt ends in a clip"])
def test_a_cache_copied_to_more_rows(place: str) -> None:
    """An engine written upon the prepender: prefill of one row, its cache copied into every row of a larger one."""
    gpt, prepender, tokens, soft = set_up("reference", place, seed=3)
    expected = again_each_step(prepender, tokens, soft, 4)
    one, many = EngineCache(1, 32, gpt), EngineCache(3, 32, gpt)
    came = []
    with torch.inference_mode():
        logits = prepender(torch.tensor([tokens]), None, soft, kv_cache=one).expand(3, -1, -1)
        many.copy_from(one)
        for _ in range(4):
            ids = logits[:, -1].argmax(dim=-1, keepdim=True)
            came.append(ids[:, 0].tolist())
            logits = prepender(ids, kv_cache=many)
    again = again_logits(prepender, tokens, soft, expected).expand(3, -1)
    torch.testing.assert_close(logits[:, -1], again, rtol=0, atol=1e-5)
    assert came == [[token] * 3 for token in expected]


# ---- foreign engines inside bind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", FOREIGN)
def test_a_twin_of_nanochats_engine(place: str) -> None:
    gpt, prepender, tokens, soft = set_up("reference", place, seed=3)
    expected = list(prepender.generate(tokens, soft, max_tokens=STEPS, temperature=0.0))
    expanded = prepender.expand(tokens, soft)
    with prepender.bind(soft) as inside:
        assert inside is prepender
        for _ in range(2):  # a second prefill starts afresh
            assert [column[0] for column in engine(gpt, expanded, 1, STEPS)] == expected
        assert list(engine(gpt, expanded, 3, STEPS)) == [[token] * 3 for token in expected]
        assert list(gpt.generate(expanded, STEPS, temperature=0.0)) == expected
    assert [column[0] for column in engine(gpt, PROMPT, 1, STEPS)] == list(gpt.generate(PROMPT, STEPS, temperature=0.0))


def test_the_twin_samples_what_generate_samples() -> None:
    gpt, prepender, tokens, soft = set_up("reference", "clips")
    with prepender.bind(soft):
        heard = [column[0] for column in engine(gpt, prepender.expand(tokens, soft), 1, STEPS, temperature=1.0, seed=9)]
        rows = list(engine(gpt, prepender.expand(tokens, soft), 4, STEPS, temperature=1.5))
    assert heard == list(prepender.generate(tokens, soft, max_tokens=STEPS, temperature=1.0, seed=9))
    assert any(len(set(column)) > 1 for column in rows)


@pytest.mark.parametrize("place", FOREIGN)
def test_transformers_own_generate(place: str) -> None:
    gpt, prepender, tokens, soft = set_up("transformers", place, seed=4)
    expected = list(prepender.generate(tokens, soft, max_tokens=STEPS, temperature=0.0))
    ids = torch.tensor([prepender.expand(tokens, soft)])
    with prepender.bind(soft):
        for options in ({}, {"use_cache": False}):
            out = gpt.generate(ids, max_new_tokens=STEPS, do_sample=False, **options)
            assert out[0, ids.size(1) :].tolist() == expected


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("place", FOREIGN)
def test_a_bare_loop_over_forward(host: str, place: str) -> None:
    """Any caller that passes the expanded prompt, with what it generated behind it, again each step."""
    gpt, prepender, tokens, soft = set_up(host, place, seed=5)
    ids = prepender.expand(tokens, soft)
    came = []
    with prepender.bind(soft), torch.no_grad():
        for _ in range(STEPS):
            came.append(int(logits_of(gpt.forward(torch.tensor([ids + came])))[0, -1].argmax()))
    assert came == list(prepender.generate(tokens, soft, max_tokens=STEPS, temperature=0.0))


@pytest.mark.parametrize("value_embeds", ["zero", "placeholder", "learned"])
@pytest.mark.parametrize("host", ["reference", "bigram"])
@pytest.mark.parametrize("place", ["prefix", "clips", "prompt ends in a clip"])
def test_side_tables_give_a_foreign_caller_what_they_give_us(place: str, host: str, value_embeds: Any) -> None:
    gpt, prepender, tokens, soft = set_up(host, place)
    gpt = prepender.remove()
    prepender = SoftTokenPrepender(gpt, value_embeds=value_embeds)
    with torch.no_grad():
        for row in prepender.side_rows.values():
            row.normal_(generator=torch.Generator().manual_seed(1))
        ours = prepender(torch.tensor([tokens]), None, soft)[:, -1]
        with prepender.bind(soft):
            theirs = gpt(torch.tensor([prepender.expand(tokens, soft)]))[:, -1]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_rows_of_a_bound_batch() -> None:
    """Two rows bound, of different lengths: expanded by hand, each is heard where it is."""
    gpt = reference()
    prepender = SoftTokenPrepender(gpt)
    soft = Features(torch.randn(2, 3, 32), torch.tensor([3, 1]))
    ids = torch.tensor([[0, 0, 0, 5, 6], [0, 5, 6, 7, 8]])
    with torch.no_grad():
        with prepender.bind(soft):
            logits = gpt(ids)
        one = prepender(torch.tensor([[5, 6]]), None, soft.values[:1])
        two = prepender(torch.tensor([[5, 6, 7, 8]]), None, soft.values[1:, :1])
    torch.testing.assert_close(logits[:1, 3:], one, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1:, 1:], two, rtol=0, atol=1e-5)


def test_our_own_calls_inside_bind_are_our_own() -> None:
    gpt, prepender, tokens, soft = set_up("reference", "prefix")
    other = noise(2, 32, 5)
    idx = torch.tensor([PROMPT])
    with torch.no_grad():
        bare, ours = gpt(idx), prepender(idx, None, other)
        stream = list(prepender.generate([7], other, max_tokens=4))
        with prepender.bind(soft):
            twin = engine(gpt, prepender.expand(tokens, soft), 2, STEPS)
            heard = [next(twin)]
            assert torch.equal(prepender(idx), bare) and torch.equal(prepender(idx, None, other), ours)
            assert list(prepender.generate([7], other, max_tokens=4)) == stream
            heard += list(twin)
    assert [column[0] for column in heard] == list(prepender.generate(tokens, soft, max_tokens=STEPS, temperature=0.0))


def test_expand() -> None:
    gpt, prepender, _, soft = set_up("reference", "clips")
    assert prepender.expand([5, P, 3, Q, P, 8], soft) == [5, P, P, 3, Q, P, P, P, 8]
    assert prepender.expand([5, 6], noise(3, 32)) == [0, 0, 0, 5, 6]
    assert prepender.expand([5, 6], Features(noise(3, 32), torch.tensor([2]))) == [0, 0, 5, 6]
    assert prepender.expand([5, 6], noise(0, 32)) == [5, 6]
    gpt = prepender.remove()
    assert SoftTokenPrepender(gpt, insert_at=1).expand([5, 6], noise(3, 32)) == [5, 0, 0, 0, 6]


def test_expand_refuses_an_id_that_an_engine_could_not_look_up() -> None:
    prepender = SoftTokenPrepender(reference())
    with pytest.raises(BadInput) as error:
        prepender.expand([5, 128], {128: noise(2, 32)})
    assert "placeholder id 128" in str(error.value) and "0 ≤ id < 128" in str(error.value)
    assert "unused id inside the vocabulary" in str(error.value)


def test_bind_inside_bind() -> None:
    gpt, prepender, tokens, soft = set_up("reference", "prefix")
    expanded = prepender.expand(tokens, soft)
    with prepender.bind(soft):
        with pytest.raises(BadInput, match="a bind inside a bind"), prepender.bind(soft):
            pass
        heard = [column[0] for column in engine(gpt, expanded, 1, STEPS)]  # the outer one still holds
    assert heard == list(prepender.generate(tokens, soft, max_tokens=STEPS, temperature=0.0))
    with prepender.bind(soft):
        pass


NOT_EXPANDED: dict[str, tuple[Any, list[list[int]]]] = {
    "a prompt": (noise(4, 32), [PROMPT]),
    "a prompt shorter than the prefix": (noise(4, 32), [[0, 0]]),
    "another id in the prefix": (noise(4, 32), [[0, 0, 7, 0, 5, 17]]),
    "a prompt with placeholders": ({P: noise(3, 32)}, [[5, P, 6]]),
    "a prompt without placeholders": ({P: noise(3, 32)}, [[5, 6]]),
    "one of two rows": ({P: noise(2, 32)}, [[5, P, P, 6], [5, P, 6, 7]]),
    "three rows for two": (torch.zeros(2, 1, 32), [[0, 5], [0, 6], [0, 7]]),
    "one token, and nothing before it": (noise(4, 32), [[5]]),
    "one placeholder, and nothing before it": ({P: noise(3, 32)}, [[P]]),
}


@pytest.mark.parametrize("case", NOT_EXPANDED)
def test_what_would_hear_nothing_is_refused(case: str) -> None:
    gpt = reference()
    prepender = SoftTokenPrepender(gpt)
    soft, rows = NOT_EXPANDED[case]
    idx = torch.tensor(PROMPT).unsqueeze(0)
    bare = gpt(idx)
    before = fingerprint(gpt)
    with prepender.bind(soft):
        with pytest.raises(BadInput) as error:
            gpt(torch.tensor(rows))
        with pytest.raises(BadInput):
            gpt.forward(torch.tensor(rows))
    assert str(error.value).startswith("SoftTokenPrepender.bind: got ")
    assert fingerprint(gpt) == before and torch.equal(gpt(idx), bare)


def test_a_prompt_of_one_clip_of_one_soft_token_is_heard() -> None:
    """Expanded it is one id long, as a decode step is."""
    gpt = reference(3)
    prepender = SoftTokenPrepender(gpt)
    soft = {P: noise(1, 32, 4)}
    expected = list(prepender.generate([P], soft, max_tokens=STEPS, temperature=0.0))
    expanded = prepender.expand([P], soft)
    with prepender.bind(soft):
        assert [column[0] for column in engine(gpt, expanded, 1, STEPS)] == expected


def test_a_refused_call_does_not_spoil_the_next() -> None:
    gpt, prepender, tokens, soft = set_up("reference", "clips")
    with prepender.bind(soft):
        with pytest.raises(BadInput):
            gpt(torch.tensor([tokens]))
        heard = [column[0] for column in engine(gpt, prepender.expand(tokens, soft), 1, STEPS)]
    assert heard == list(prepender.generate(tokens, soft, max_tokens=STEPS, temperature=0.0))


def test_leaving_bind_by_an_exception() -> None:
    gpt, prepender, tokens, soft = set_up("reference", "prefix")
    idx = torch.tensor([PROMPT])
    bare = gpt(idx)
    with pytest.raises(ZeroDivisionError), prepender.bind(soft):
        next(engine(gpt, prepender.expand(tokens, soft), 1, STEPS))
        raise ZeroDivisionError
    assert torch.equal(gpt(idx), bare) and torch.equal(prepender(idx), bare)
    with prepender.bind(soft):
        pass


@pytest.mark.parametrize(("soft", "said"), [
    (torch.zeros(1, 2, 31), "31 wide"), (torch.full((1, 2, 32), float("inf")), "NaN or infinity"),
    ({P: torch.zeros(1, 2, 31)}, "31 wide"), (Features(torch.zeros(1, 2, 32), torch.tensor([3])), "lens[0] = 3"),
    ("sound", "soft tokens str"), (None, "soft tokens NoneType")], ids=lambda value: str(value)[:12])
def test_bind_checks_what_it_is_given(soft: Any, said: str) -> None:
    gpt = reference()
    prepender = SoftTokenPrepender(gpt)
    with pytest.raises(BadInput) as error, prepender.bind(soft):
        pass
    assert said in str(error.value)
    with prepender.bind(noise(1, 32)):
        pass


@pytest.mark.parametrize("nothing", [torch.zeros(1, 0, 32), Features(torch.zeros(1, 3, 32), torch.tensor([0])), {}],
                         ids=["no rows", "length 0", "no clips"])
def test_binding_nothing_changes_nothing(nothing: Any) -> None:
    gpt = reference()
    prepender = SoftTokenPrepender(gpt)
    idx = torch.tensor([PROMPT])
    bare = gpt(idx)
    with prepender.bind(nothing):
        assert torch.equal(gpt(idx), bare)
        assert list(engine(gpt, PROMPT, 2, 3)) == [[token] * 2 for token in gpt.generate(PROMPT, 3, temperature=0.0)]
