"""The library on a GPU: the equalities that tests hold on the CPU, where kernels are others. Skipped where there is none.

Run by `benchmarks/gpu.sh`. Tolerances: fp32 sums of at most 128 terms of order 1, in another order than on the CPU, 1e-5 (TF32
is off unless it is asked for); bf16 against the same in fp64, at most three times the hand-patched forward's own error.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_patched import hand_patched_logits, hand_patched_loss
from hosts import reference
from tiny_whisper import make_tiny_whisper
from torch import Tensor

from benchmarks.group import worst
from benchmarks.step import view_of
from omni_adapters import Features, OmniGPT, Projector, SoftTokenPrepender
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.encoders.whisper import WhisperEncoder
from omni_adapters.reference_gpt import GPT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

FP32 = 1e-5
B, T, T_SOFT, WIDTH = 2, 6, 5, 32


def cuda_gpt(dtype: torch.dtype = torch.float32) -> GPT:
    """fp32 masters with tables of `dtype`, as nanochat has them."""
    gpt = reference()
    gpt.wte().to(dtype)
    gpt.value_embeds.to(dtype)
    return gpt.cuda()


def text() -> tuple[Tensor, Tensor]:
    idx = torch.randint(97, (B, T), generator=torch.Generator().manual_seed(0)).cuda()
    return idx, idx.roll(-1, dims=1)


def soft_tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(B, T_SOFT, WIDTH, generator=rng).to(dtype).cuda().requires_grad_()


def hearing(gpt: GPT) -> tuple[OmniGPT, Features]:
    omni = OmniGPT(gpt, (LogMelEncoder(), Projector(80, WIDTH, stack=2, zero_init=False).cuda()), insert_at=1)
    frames = torch.randn(B, 8, 80, generator=torch.Generator().manual_seed(2)).cuda()
    return omni, Features(frames, torch.tensor([8, 5], device="cuda"))


def gradients(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    return [loss.detach().double(), *(gradient.double() for gradient in torch.autograd.grad(loss, wanted))]


def distance(came: list[Tensor], expected: list[Tensor]) -> float:
    return worst(float((one - other).abs().max() / other.abs().max()) for one, other in zip(came, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_loss_and_gradients_on_cuda_are_those_of_the_hand_patched_forward(dtype: torch.dtype) -> None:
    gpt, (idx, targets), soft = cuda_gpt(dtype), text(), soft_tokens(dtype)
    twin, exact = copy.deepcopy(gpt).double(), soft.detach().double().requires_grad_()
    expected = gradients(hand_patched_loss(twin, idx, targets, exact), [exact, twin.lm_head.weight])
    by_hand = gradients(hand_patched_loss(view_of(gpt, dtype), idx, targets, soft), [soft, gpt.lm_head.weight])
    prepender = SoftTokenPrepender(gpt, value_embeds="placeholder")
    came = gradients(prepender(idx, targets, soft), [soft, gpt.lm_head.weight])
    assert distance(came, expected) <= (FP32 if dtype is torch.float32 else max(2**-7, 3 * distance(by_hand, expected)))


def test_no_soft_tokens_on_cuda_is_the_bare_gpt() -> None:
    gpt, (idx, _) = cuda_gpt(torch.bfloat16), text()
    bare = gpt(idx)
    assert torch.equal(SoftTokenPrepender(gpt)(idx), bare)


def test_a_step_on_cuda_trains_projector_and_lora_alone() -> None:
    gpt, (idx, targets) = cuda_gpt(torch.bfloat16), text()
    omni, features = hearing(gpt)
    omni.add_lora(4)
    before = {name: p.detach().clone() for name, p in omni.named_parameters()}
    frozen = {name for name, p in omni.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(omni.trainable_parameters())
    losses = []
    for _ in range(2):  # lora_a moves from the second step on: lora_b is zero in the first
        optimizer.zero_grad()
        loss = omni(idx, targets, audio_features=features)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    moved = {name for name, p in omni.named_parameters() if not torch.equal(p, before[name])}
    assert all(0 < loss < 20 for loss in losses)  # nats; NaN is neither
    assert moved and not moved & frozen
    assert any("lora_b" in name for name in moved) and any("fc2" in name for name in moved)


def test_cached_tokens_on_cuda_are_those_of_the_whole_forward() -> None:
    gpt = cuda_gpt()
    prepender, soft = SoftTokenPrepender(gpt, value_embeds="placeholder"), soft_tokens()[:1].detach()
    tokens = [3, 1, 4]
    for token in prepender.generate(tokens, soft, max_tokens=8, temperature=0.0):
        with torch.no_grad():
            logits = hand_patched_logits(gpt, torch.tensor([tokens], device="cuda"), soft)[0, -1]
        assert logits.max() - logits[token] <= FP32 * logits.abs().max()  # the greatest, or as great
        tokens = [*tokens, token]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_compiled_graph_on_cuda_equals_eager(dtype: torch.dtype) -> None:
    """In bf16 a fused kernel rounds less often than eager kernels do: both are held against fp64."""
    torch._dynamo.reset()
    gpt, (idx, targets), soft = cuda_gpt(dtype), text(), soft_tokens(dtype)
    twin, exact = copy.deepcopy(gpt).double(), soft.detach().double().requires_grad_()
    expected = gradients(hand_patched_loss(twin, idx, targets, exact), [exact])
    prepender = SoftTokenPrepender(gpt, value_embeds="placeholder")
    eager = gradients(prepender(idx, targets, soft), [soft])
    compiled: Any = torch.compile(prepender, fullgraph=True, dynamic=False)
    came = gradients(compiled(idx, targets, soft), [soft])
    assert distance(came, expected) <= (FP32 if dtype is torch.float32 else max(2**-7, 3 * distance(eager, expected)))


def test_ragged_rows_on_cuda_are_the_rows_alone() -> None:
    gpt, (idx, _) = cuda_gpt(), text()
    omni, features = hearing(gpt)
    together = omni(idx, audio_features=features)
    for row, length in enumerate(features.lens.tolist()):
        alone = Features(features.values[row : row + 1, :length], features.lens[row : row + 1])
        one = omni(idx[row : row + 1], audio_features=alone)[0]
        torch.testing.assert_close(together[row], one, rtol=FP32, atol=15 * FP32)  # logits lie within ±15


def test_whisper_on_cuda_says_what_it_says_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions are in TF32 unless it is switched off
    encoder = WhisperEncoder(make_tiny_whisper(tmp_path))
    waves = [0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(3)), torch.zeros(8_000)]
    inputs = encoder.preprocess(waves)
    here = encoder(inputs)
    there = encoder.to("cuda")(Features(inputs.values.cuda(), inputs.lens.cuda()))
    assert torch.equal(there.lens.cpu(), here.lens)
    for row, length in enumerate(here.lens.tolist()):
        torch.testing.assert_close(there.values[row, :length].cpu(), here.values[row, :length], rtol=1e-4, atol=1e-4)
