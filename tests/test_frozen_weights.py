"""Frozen weights cast once: outputs bit for bit, what is saved bit for bit, and the GPT back as it came."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import bits, fingerprint, nano_gpt, reference, tiny_hf
from torch import Tensor, nn

from omni_adapters.fingerprints import Digest, describe_host
from omni_adapters.frozen_weights import cast_frozen, frozen_cast
from omni_adapters.lora import LoRALinear, inject_lora, lora_layers, lora_parameters
from omni_adapters.prepender import SoftTokenPrepender
from omni_adapters.reference_gpt import GPT
from omni_adapters.shapes import BadInput

IDX = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
BF16 = torch.bfloat16


def nanochat_like(lora: bool = False, **sizes: Any) -> GPT:
    """fp32 masters under bf16 activations, frozen: the token table says in what dtype the blocks compute."""
    gpt = reference(**sizes)
    gpt.wte().to(BF16)
    gpt.requires_grad_(False)
    if lora:
        inject_lora(gpt, rank=4)
        for layer in lora_layers(gpt, ""):
            nn.init.normal_(layer.lora_b, std=0.1)
    return gpt


def state_bits(gpt: nn.Module) -> dict[str, str]:
    return {name: bits(tensor) for name, tensor in gpt.state_dict().items()}


def step(gpt: nn.Module) -> list[Tensor]:
    """Logits, loss, and the gradients of LoRA where there is some."""
    loss = gpt(IDX, IDX.roll(-1, 1))
    if loss.requires_grad:
        gpt.zero_grad()
        loss.backward()
    return [gpt(IDX).detach(), loss.detach(), *(p.grad.clone() for p in gpt.parameters() if p.grad is not None)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other))


@pytest.mark.parametrize("lora", [False, True])
def test_outputs_gradients_and_what_is_saved_are_the_same_bit_for_bit(lora: bool) -> None:
    gpt = nanochat_like(lora)
    before, saved, keys = step(gpt), state_bits(gpt), list(gpt.state_dict())
    cast = cast_frozen(gpt, BF16)
    linears = {name for name, m in gpt.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, LoRALinear)}
    assert set(cast.paths.values()) == linears >= {"lm_head", "smear_gate", "transformer.h.1.attn.ve_gate"}
    assert all(gpt.get_submodule(path).weight.dtype == BF16 for path in linears)
    assert same(step(gpt), before) and state_bits(gpt) == saved and list(gpt.state_dict()) == keys
    assert len(cast.paths) == len(linears), "none met another dtype"


def test_the_weights_would_have_been_rounded_in_every_forward() -> None:
    """What the equality above rests on: these weights are not bf16 numbers."""
    gpt = nanochat_like()
    master = gpt.lm_head.weight.clone()
    cast_frozen(gpt, BF16)
    assert not torch.equal(gpt.lm_head.weight.float(), master) and torch.equal(gpt.lm_head.weight, master.to(BF16))


def test_restored_it_is_as_it_came() -> None:
    gpt = nanochat_like(lora=True)
    gpt(IDX)
    before = fingerprint(gpt)
    cast = cast_frozen(gpt, BF16)
    assert {name for name in before["identity"] if before["identity"][name][0] != fingerprint(gpt)["identity"][name][0]} == set()
    cast.restore()
    cast.restore()
    assert fingerprint(gpt) == before and cast.paths == {}
    with pytest.raises(KeyboardInterrupt), frozen_cast(gpt, BF16):
        assert fingerprint(gpt)["bits"] != before["bits"]
        raise KeyboardInterrupt
    assert fingerprint(gpt) == before


def test_the_digest_that_adapters_check_stays() -> None:
    gpt = nanochat_like()
    prepender, digest = SoftTokenPrepender(gpt), Digest()
    before = describe_host(prepender, digest)
    with frozen_cast(gpt, BF16):
        assert describe_host(prepender, digest) == describe_host(prepender, Digest()) == before
    assert describe_host(prepender, digest) == before


def test_soft_tokens_beside_it() -> None:
    gpt = nanochat_like()
    prepender, soft = SoftTokenPrepender(gpt), torch.randn(2, 3, 32).to(BF16)
    before = prepender(IDX, IDX.roll(-1, 1), soft)
    with frozen_cast(gpt, BF16) as cast:
        assert torch.equal(prepender(IDX, IDX.roll(-1, 1), soft), before) and "lm_head" in cast.paths.values()


def test_loading_goes_into_the_weights_as_they_came() -> None:
    gpt, other = nanochat_like(), nanochat_like(seed=1)
    cast = cast_frozen(gpt, BF16)
    gpt.load_state_dict(other.state_dict())
    assert state_bits(gpt) == state_bits(other) and cast.paths == {}
    assert gpt.lm_head.weight.dtype == torch.float32 and same(step(gpt), step(other))
    cast.restore()
    assert state_bits(gpt) == state_bits(other)


def test_a_layer_that_reads_another_dtype_gets_its_weight_back() -> None:
    gpt = nanochat_like()
    gpt.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))  # a host with a head in fp32
    before = step(gpt)
    cast = cast_frozen(gpt, BF16)
    assert same(step(gpt), before) and "lm_head" not in cast.paths.values() and len(cast.paths) > 5
    assert gpt.lm_head.weight.dtype == torch.float32
    layer = gpt.transformer["h"][0].mlp.c_fc
    assert torch.equal(layer(x=torch.ones(1, 32)), F.linear(torch.ones(1, 32), reference().transformer["h"][0].mlp.c_fc.weight))


def test_a_weight_that_trains_is_fp32_again() -> None:
    gpt, other = nanochat_like(), nanochat_like()
    cast = cast_frozen(gpt, BF16)
    for each in (gpt, other):
        each.lm_head.weight.requires_grad_()
    assert same(step(gpt), step(other)) and gpt.lm_head.weight.grad.dtype == torch.float32
    gpt.lm_head.weight.data += 1
    assert torch.equal(gpt.state_dict()["lm_head.weight"], other.lm_head.weight + 1)
    cast.restore()
    assert torch.equal(gpt.lm_head.weight, other.lm_head.weight + 1)


def test_a_weight_replaced_meanwhile_is_not_saved_rounded() -> None:
    gpt = nanochat_like()
    cast = cast_frozen(gpt, BF16)
    came, gpt.lm_head.weight = gpt.lm_head.weight, nn.Parameter(gpt.lm_head.weight.data, requires_grad=False)
    for call in (gpt.state_dict, cast.restore):
        with pytest.raises(BadInput, match=r"a Linear whose cast weight was replaced.*Call restore\(\) before"):
            call()
    assert gpt.smear_gate.weight.dtype == BF16, "nothing restored by half"
    gpt.lm_head.weight = came
    cast.restore()
    assert state_bits(gpt) == state_bits(nanochat_like())


def test_under_torch_compile() -> None:
    gpt = nanochat_like()
    before = gpt(IDX)
    cast_frozen(gpt, BF16)
    assert torch.equal(torch.compile(gpt, backend="aot_eager", fullgraph=True)(IDX), before)
    layer = torch.compile(gpt.transformer["h"][0].mlp.c_fc, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"activations of torch\.float32 at a frozen Linear under torch\.compile"):
        layer(torch.ones(1, 32))


def test_autocast_changes_nothing() -> None:
    gpt = reference()
    gpt.requires_grad_(False)
    with torch.autocast("cpu", BF16):
        before = step(gpt)
        with frozen_cast(gpt, BF16):
            assert same(step(gpt), before)


def test_a_copy_saves_its_own_originals() -> None:
    gpt = nanochat_like()
    saved = state_bits(gpt)
    cast = cast_frozen(gpt, BF16)
    other = copy.deepcopy(gpt)
    cast.restore()
    assert state_bits(other) == saved and other.lm_head.weight.dtype == BF16
    other.load_state_dict(nanochat_like(seed=1).state_dict())
    assert state_bits(gpt) == saved and state_bits(other) == state_bits(nanochat_like(seed=1))


def test_lora_goes_in_first_or_not_at_all() -> None:
    """Merged into a rounded weight, it would be lost when the original comes back."""
    gpt = nanochat_like()
    before = fingerprint(gpt)
    cast = cast_frozen(gpt, BF16)
    with pytest.raises(BadInput, match=r"that was cast already.*Call restore\(\)"):
        cast_frozen(gpt, BF16)
    with pytest.raises(BadInput, match=r"a weight cast to torch.bfloat16, and saved as it came"):
        inject_lora(gpt, rank=4)
    cast.restore()
    assert fingerprint(gpt) == before
    inject_lora(gpt, rank=4)


def test_what_is_shared_trained_or_adapted_stays_as_it_is() -> None:
    gpt = nanochat_like(lora=True)
    gpt.lm_head.weight = gpt.value_embeds["1"].weight = nn.Parameter(torch.randn(128, 32), requires_grad=False)
    gpt.smear_gate.weight.requires_grad_()
    cast = cast_frozen(gpt, BF16)
    assert set(cast.paths.values()) == {"transformer.h.1.attn.ve_gate"}
    assert all(p.dtype == torch.float32 for p in lora_parameters(gpt))
    assert {layer.weight.dtype for layer in lora_layers(gpt, "")} == {torch.float32}


def test_two_layers_that_share_a_weight() -> None:
    gpt = nanochat_like()
    first, second = (block.mlp.c_fc for block in gpt.blocks())
    second.weight = first.weight
    before, saved = step(gpt), state_bits(gpt)
    cast = cast_frozen(gpt, BF16)
    assert same(step(gpt), before) and state_bits(gpt) == saved and second.weight.dtype == BF16
    cast.restore()
    assert first.weight is second.weight and state_bits(gpt) == saved


@pytest.mark.parametrize(("build", "dtype", "message"), [
    (reference, BF16, "a GPT without a frozen fp32 weight that its layer casts itself.*Freeze the GPT first"),
    (lambda: nano_gpt().requires_grad_(False), BF16, "a NanoGPT without a frozen"),
    (lambda: tiny_hf().requires_grad_(False), BF16, "a NanoChatForCausalLM without a frozen"),
    (nanochat_like, torch.float32, r"dtype = torch\.float32; expected torch\.bfloat16"),
    (lambda: nanochat_like().to(BF16), torch.float16, "without a frozen fp32 weight"),
])
def test_refusals_leave_the_gpt_as_it_came(build: Callable[[], nn.Module], dtype: torch.dtype, message: str) -> None:
    gpt = build()
    before = fingerprint(gpt)
    with pytest.raises(BadInput, match=message):
        cast_frozen(gpt, dtype)
    assert fingerprint(gpt) == before
