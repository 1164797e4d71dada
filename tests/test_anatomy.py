"""discover_anatomy: every field on every kind of host, nothing changed by the look, and errors that say what was found."""

from __future__ import annotations

import dataclasses
import inspect
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import NanoGPT, NanoGPTConfig, bigram_gpt, fingerprint, nano_gpt, reference, tiny_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import NanoChatForCausalLM

from omni_adapters.anatomy import Anatomy, discover_anatomy
from omni_adapters.shapes import BadInput

# From transformers 5.24 on it is "cache"
HF_CACHE: Any = "cache" if "cache" in inspect.signature(NanoChatForCausalLM.forward).parameters else "past_key_values"
REFERENCE = Anatomy(
    wte="transformer.wte", side_tables=("value_embeds.1",), derived_tables=(), lm_head="lm_head", head_source=None,
    smear_gate="smear_gate", n_embd=32, num_embeddings=128, vocab_size=97, padded_vocab_size=128, softcap=15.0,
    head_is_plain=True, position_limit=640, cache="kv_cache", cache_shape=(2, 2, 8), output="tensor",
    dtype=torch.float32)
NANO_GPT = Anatomy(
    wte="transformer.wte", side_tables=(), derived_tables=(), lm_head="lm_head", head_source="transformer.ln_f",
    smear_gate=None, n_embd=24, num_embeddings=61, vocab_size=61, padded_vocab_size=61, softcap=None, head_is_plain=True,
    position_limit=48, cache=None, cache_shape=None, output="tuple", dtype=torch.float32)
BIGRAM = Anatomy(
    wte="transformer.wte", side_tables=("transformer.h.0.values", "transformer.h.1.values"),
    derived_tables=("transformer.h.0.bigram.rows", "transformer.h.1.bigram.rows"), lm_head="lm_head", head_source=None,
    smear_gate=None, n_embd=24, num_embeddings=64, vocab_size=50, padded_vocab_size=64, softcap=15.0, head_is_plain=True,
    position_limit=None, cache=None, cache_shape=None, output="tensor", dtype=torch.float32)
TRANSFORMERS = Anatomy(
    wte="model.embed_tokens", side_tables=(), derived_tables=(), lm_head="lm_head", head_source=None, smear_gate=None,
    n_embd=32, num_embeddings=53, vocab_size=53, padded_vocab_size=53, softcap=15.0, head_is_plain=True,
    position_limit=64, cache=HF_CACHE, cache_shape=None, output="model_output", dtype=torch.float32)
HOSTS = {"reference": (reference, REFERENCE), "nano_gpt": (nano_gpt, NANO_GPT), "bigram": (bigram_gpt, BIGRAM),
         "transformers": (tiny_hf, TRANSFORMERS)}


# ---- every field -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HOSTS)
def test_every_field(kind: str) -> None:
    build, expected = HOSTS[kind]
    assert discover_anatomy(build()) == expected


@pytest.mark.parametrize("kind", HOSTS)
def test_every_field_in_bf16(kind: str) -> None:
    build, expected = HOSTS[kind]
    assert discover_anatomy(build().bfloat16()) == dataclasses.replace(expected, dtype=torch.bfloat16)


@settings(max_examples=15, deadline=None)
@given(n_layer=st.integers(1, 4), heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 6)]), head_dim=st.sampled_from([8, 12]),
       vocab_size=st.integers(2, 130), sequence_len=st.integers(1, 40))
def test_any_reference_gpt(n_layer: int, heads: tuple[int, int], head_dim: int, vocab_size: int, sequence_len: int) -> None:
    n_head, n_kv_head = heads
    n_embd = max(24, n_head * head_dim)
    n_head, n_kv_head = (n_head, n_kv_head) if n_embd == n_head * head_dim else (1, 1)
    gpt = reference(n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, vocab_size=vocab_size,
                    sequence_len=sequence_len)
    found = discover_anatomy(gpt)
    assert found.side_tables == tuple(f"value_embeds.{layer}" for layer in range(n_layer) if (n_layer - layer) % 2)
    assert (found.n_embd, found.vocab_size, found.padded_vocab_size) == (n_embd, vocab_size, -(-vocab_size // 64) * 64)
    assert found.cache_shape == (n_layer, n_kv_head, n_embd // n_head)
    assert (found.position_limit, found.softcap, found.head_is_plain) == (10 * sequence_len, 15.0, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0, 15.0, 20.0, 30.5])
@pytest.mark.parametrize("build", [bigram_gpt, nano_gpt, lambda softcap: tiny_hf(final_logit_softcapping=softcap)],
                         ids=["bigram", "nano_gpt", "transformers"])
def test_softcap_is_read_off_the_forward(build, softcap: float | None, dtype: torch.dtype) -> None:
    found = discover_anatomy(build(softcap=softcap).to(dtype))  # 30.5 and the others are exact in bf16 too
    assert (found.softcap, found.head_is_plain) == (softcap, True)


def test_softcap_in_the_hosts_own_precision() -> None:
    """15.3 has no bf16 form: where the host caps in bf16, the cap it really has is the next number, 15.3125."""
    assert discover_anatomy(nano_gpt(softcap=15.3)).softcap == pytest.approx(15.3, abs=1e-6)
    assert discover_anatomy(nano_gpt(softcap=15.3).bfloat16()).softcap == 15.3125


class Scaled(nn.Module):
    """A twin whose logits are something else than the head's output, cropped and capped."""

    def __init__(self, change) -> None:
        super().__init__()
        self.inner, self.change = bigram_gpt(softcap=None), change
        self.lm_head = self.inner.lm_head

    def forward(self, idx: Tensor) -> Tensor:
        return self.change(self.inner(idx))


@pytest.mark.parametrize("change", [
    lambda z: z / 8, lambda z: 15 * torch.tanh(z / 8), lambda z: z + 1, lambda z: F.log_softmax(z, -1), torch.relu,
    lambda z: z.clamp(-15, 15), lambda z: 15 * torch.sigmoid(z / 15)],
    ids=["divided", "another slope", "shifted", "log_softmax", "relu", "clamped", "sigmoid"])
def test_other_functions_of_the_head_are_not_taken_for_a_softcap(change) -> None:
    found = discover_anatomy(Scaled(change))
    assert (found.softcap, found.head_is_plain) == (None, False)


def test_positions_of_shape_one_by_T_are_positions() -> None:
    """Most of nanoGPT's history looks positions up as (1, T); with ids (0, 1) they must not pass for token ids."""
    assert discover_anatomy(nano_gpt(flat_positions=False)) == NANO_GPT


class ValuesFirst(nn.Module):
    """Looks a value table up before wte, both as wide as the hidden states (as modded-nanogpt does)."""

    def __init__(self, name: str = "wte") -> None:
        super().__init__()
        self.value_embeds = nn.ModuleDict({"0": nn.Embedding(40, 16)})
        self.transformer = nn.ModuleDict({name: nn.Embedding(40, 16)})
        self.lm_head = nn.Linear(16, 40, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        values = self.value_embeds["0"](idx)
        x = F.rms_norm(next(iter(self.transformer.values()))(idx), (16,))
        return self.lm_head(x + torch.tanh(x).cumsum(1) * values)


def test_a_value_table_that_is_read_first_is_not_wte() -> None:
    found = discover_anatomy(ValuesFirst())
    assert (found.wte, found.side_tables) == ("transformer.wte", ("value_embeds.0",))


class RotaryByRows(nn.Module):
    """cos (S, D/2) as a plain table, and a head that only the transformers accessor names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        angle = torch.outer(torch.arange(30.0), torch.ones(4))
        self.register_buffer("cos", angle.cos(), persistent=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        return self.unembed(torch.cat([x[..., :4] * self.cos[: idx.size(1)], x[..., 4:]], dim=-1))


def test_rotary_table_by_rows_and_head_by_accessor() -> None:
    found = discover_anatomy(RotaryByRows())
    assert (found.lm_head, found.wte, found.position_limit, found.cache) == ("unembed", "embed", 30, None)


def test_mixed_dtypes_run_under_autocast() -> None:
    """Old hosts keep wte in bf16 and linears in fp32, and only run under bf16 autocast."""
    gpt = bigram_gpt()
    gpt.transformer["wte"].bfloat16()
    with pytest.raises(RuntimeError):
        gpt(torch.tensor([[1, 2]]))
    found = discover_anatomy(gpt)
    assert dataclasses.replace(found, dtype=torch.float32) == BIGRAM


def test_inside_the_users_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = discover_anatomy(reference())
    assert dataclasses.replace(found, dtype=torch.float32) == REFERENCE


@pytest.mark.parametrize("kind", HOSTS)
def test_compiled_hosts_read_like_bare_ones(kind: str) -> None:
    build, expected = HOSTS[kind]
    gpt = build()
    assert discover_anatomy(torch.compile(gpt, backend="eager")) == expected


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_under_any_grad_mode(context) -> None:
    gpt = reference()
    with context():
        before = fingerprint(gpt)
        assert discover_anatomy(gpt) == REFERENCE
        assert fingerprint(gpt) == before


# ---- nothing changes -------------------------------------------------------------------------------------------------


def partly_training(gpt: nn.Module, seed: int = 0) -> nn.Module:
    """Training mode with some modules in evaluation mode, as with a frozen part; some parameters frozen; a user's hooks."""
    rng = random.Random(seed)
    gpt.train()
    for module in gpt.modules():
        module.training = rng.random() < 0.5
    for parameter in gpt.parameters():
        parameter.requires_grad_(rng.random() < 0.5)
    first = next(iter(gpt.children()))
    first.register_forward_hook(lambda *_: None)
    first.register_forward_pre_hook(lambda *_: None)
    return gpt


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", HOSTS)
def test_the_model_comes_back_bit_identical(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    gpt = partly_training(HOSTS[kind][0](), seed)
    before = fingerprint(gpt)
    discover_anatomy(gpt)
    assert fingerprint(gpt) == before


def test_dropout_in_training_mode_draws_nothing() -> None:
    torch.manual_seed(3)
    gpt = nano_gpt(dropout=0.5).train()
    before = fingerprint(gpt)
    assert discover_anatomy(gpt) == NANO_GPT
    assert fingerprint(gpt) == before


class Restless(nn.Module):
    """Draws random numbers in evaluation mode too, and counts the tokens it has seen in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = bigram_gpt()
        self.lm_head = self.inner.lm_head
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, idx: Tensor) -> Tensor:
        self.tokens_seen += idx.numel()
        return self.inner(idx) + 0 * torch.rand(())


def test_random_state_and_buffers_that_the_forward_changes_are_put_back() -> None:
    torch.manual_seed(4)
    gpt = Restless().train()
    before = fingerprint(gpt)
    discover_anatomy(gpt)
    assert fingerprint(gpt) == before


class GrowingTable(nn.Module):
    """Replaces a buffer during forward: a rotary table grown on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = bigram_gpt()
        self.lm_head = self.inner.lm_head
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, idx: Tensor) -> Tensor:
        if idx.size(1) > self.scale.size(0):
            self.scale = torch.ones(idx.size(1))
        return self.inner(idx) * self.scale[: idx.size(1), None]


def test_buffers_that_the_forward_replaces_are_put_back() -> None:
    gpt = GrowingTable()
    before = fingerprint(gpt)
    discover_anatomy(gpt)
    assert fingerprint(gpt) == before


class MergesOnEval(nn.Linear):
    """Folds a low-rank update into its weight when put in evaluation mode, as loralib's layers do."""

    merged = False  # of the class, until the first merge

    def train(self, mode: bool = True) -> MergesOnEval:
        if mode == self.merged:
            with torch.no_grad():
                self.weight += 0.5 if not mode else -0.5
            self.merged = not mode
        return super().train(mode)


def test_layers_that_merge_on_eval_are_left_unmerged() -> None:
    gpt = bigram_gpt()
    gpt.transformer["h"][0].mix = MergesOnEval(24, 24, bias=False)
    gpt.train()
    before = fingerprint(gpt)
    discover_anatomy(gpt)
    assert fingerprint(gpt) == before


class FailsAt(nn.Module):
    """Its forward raises from the given call on, after its sub-modules have run."""

    def __init__(self, call: int, error: type[Exception]) -> None:
        super().__init__()
        self.inner, self.call, self.calls, self.error = nano_gpt(dropout=0.3), call, [0], error
        self.lm_head = self.inner.lm_head

    def forward(self, idx: Tensor) -> tuple[Tensor, Tensor | None]:
        self.calls[0] += 1
        result = self.inner(idx)
        torch.rand(3)
        if self.calls[0] >= self.call:
            raise self.error("no more")
        return result


@pytest.mark.parametrize("error", [RuntimeError, KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_nothing_changes_when_the_probe_fails(call: int, error: type[Exception]) -> None:
    torch.manual_seed(5)
    gpt = partly_training(FailsAt(call, error))
    before = fingerprint(gpt)
    with pytest.raises((BadInput, error)):
        discover_anatomy(gpt)
    assert fingerprint(gpt) == before


# ---- models that cannot be read --------------------------------------------------------------------------------------


class Hidden(nn.Module):
    """Embedding, body and head by any name, and a forward given from outside."""

    def __init__(self, forward, **parts: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, idx: Tensor):
        return self.run(self, idx)


def message(gpt: nn.Module) -> str:
    before = fingerprint(gpt)
    with pytest.raises(BadInput) as error:
        discover_anatomy(gpt)
    assert fingerprint(gpt) == before
    assert str(error.value).startswith("discover_anatomy: got ")
    assert "; expected " in str(error.value)
    return str(error.value)


def test_no_head() -> None:
    said = message(Hidden(lambda m, idx: m.words(idx), words=nn.Embedding(7, 5), body=nn.Linear(5, 5)))
    assert "a module named lm_head, or get_output_embeddings()" in said
    assert "words (7, 5)" in said and "body: Linear" in said and "Hidden" in said


def test_no_embedding_fed_by_ids() -> None:
    def one_hot(m: nn.Module, idx: Tensor) -> Tensor:
        return m.lm_head(F.one_hot(idx, 6).float() + m.places(torch.arange(idx.size(1))))

    said = message(Hidden(one_hot, places=nn.Embedding(9, 6), lm_head=nn.Linear(6, 6)))
    assert "an nn.Embedding fed by idx and 6 wide" in said and "places (9, 6)" in said


def test_factorised_embeddings() -> None:
    said = message(Hidden(lambda m, idx: m.lm_head(m.up(m.words(idx))), words=nn.Embedding(7, 3), up=nn.Linear(3, 8),
                          lm_head=nn.Linear(8, 7)))
    assert "8 wide" in said and "words (7, 3)" in said


def test_a_head_that_forward_never_calls() -> None:
    said = message(Hidden(lambda m, idx: F.linear(m.words(idx), m.lm_head.weight), words=nn.Embedding(7, 5),
                          lm_head=nn.Linear(5, 7)))
    assert "a call of lm_head" in said and "words (7, 5)" in said


def test_a_head_that_reads_something_untraceable() -> None:
    said = message(Hidden(lambda m, idx: m.lm_head(torch.tanh(m.words(idx))[:, -1:]), words=nn.Embedding(7, 5),
                          lm_head=nn.Linear(5, 7)))
    assert "(1, 2, 5)" in said and "cropped to the last position" in said


def test_a_forward_that_fails_says_how_in_both_tries() -> None:
    def needs_more(m: nn.Module, idx: Tensor) -> Tensor:
        if idx.size(1) < 8:
            raise ValueError("eight tokens at least")
        return m.lm_head(m.words(idx))

    said = message(Hidden(needs_more, words=nn.Embedding(7, 5), lm_head=nn.Linear(5, 7)))
    assert said.count("eight tokens at least") == 2 and "plain: " in said and "bf16 autocast: " in said
    assert "gpt(idx) on a (1, 2) tensor of ids" in said


@pytest.mark.parametrize("wrap", [lambda z: {"logits": z}, lambda z: "text", lambda z: None, lambda z: (None, z)],
                         ids=["dict", "str", "None", "tuple without logits"])
def test_outputs_without_logits(wrap) -> None:
    said = message(Hidden(lambda m, idx: wrap(m.lm_head(m.words(idx))), words=nn.Embedding(7, 5), lm_head=nn.Linear(5, 7)))
    assert "logits, (logits, loss), or an output with .logits" in said


@pytest.mark.parametrize("gpt", [nn.Linear(3, 3), nn.Sequential(), nn.Embedding(3, 3), nn.ReLU()],
                         ids=lambda module: type(module).__name__)
def test_modules_that_are_no_gpt(gpt: nn.Module) -> None:
    assert "lm_head" in message(gpt)


def test_meta_device() -> None:
    with torch.device("meta"):
        gpt = NanoGPT(NanoGPTConfig())
    with pytest.raises(BadInput) as error:
        discover_anatomy(gpt)
    assert "NanoGPT on the meta device; expected a model with weights. Load the checkpoint first" in str(error.value)
    assert all(p.is_meta for p in gpt.parameters())
