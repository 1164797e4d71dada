"""Padding to a bucket changes no loss and no gradient, and a training step compiles once per bucket, whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hosts import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from omni_adapters import Features, OmniGPT, Projector
from omni_adapters.data.buckets import LEAST, bucket, to_bucket
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.shapes import BadInput


def test_buckets_are_powers_of_two_and_their_three_halves() -> None:
    buckets = sorted({2**n for n in range(12)} | {3 * 2**n for n in range(11)})
    for size in range(1, 2000):
        assert bucket(size) == min(b for b in buckets if b >= size)
        assert bucket(size, LEAST) == min(b for b in buckets if b >= max(size, LEAST))
    assert max(bucket(size) / size for size in range(1, 2000)) < 1.5


def omni_gpt(lora: bool, **options: Any) -> OmniGPT:
    torch.manual_seed(0)
    omni = OmniGPT(reference(), (LogMelEncoder(), Projector(80, 32, 16, stack=4, zero_init=False)), insert_at=1, **options)
    if lora:
        omni.add_lora(4)
    return omni.train()


def batch(B: int, T_enc: int, T: int, seed: int = 0) -> tuple[Features, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    idx = torch.randint(1, 50, (B, T), generator=rng)
    targets = idx.roll(-1, 1)
    targets[:, -1] = -1
    lens = torch.randint(0, T_enc + 1, (B,), generator=rng)
    lens[0] = T_enc
    return Features(torch.randn(B, T_enc, 80, generator=rng), lens), idx, targets


def step(model: Any, omni: OmniGPT, features: Features, idx: Tensor, targets: Tensor) -> list[Tensor]:
    """Σ of losses, as the recipes take it, and every gradient."""
    omni.zero_grad(set_to_none=True)
    loss = model(idx, targets, audio_features=features) * (targets != -1).sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for group in omni.trainable_parameters() for p in group["params"])]


def near(one: Tensor, other: Tensor) -> bool:
    """fp32 sums of some hundred terms in another order, through four layers: a hundred times 2⁻²⁴ of the largest entry."""
    return one.shape == other.shape and float((one - other).abs().max()) <= 100 * 2**-24 * float(other.abs().max())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(2, 20), st.booleans())
def test_loss_and_gradients_stay(B: int, T_enc: int, T: int, lora: bool) -> None:
    omni, given_ = omni_gpt(lora), batch(B, T_enc, T)
    padded = to_bucket(*given_)
    assert padded[0].values.shape == (2 ** math.ceil(math.log2(B)), bucket(T_enc, LEAST), 80)
    assert padded[1].shape == padded[2].shape == (len(padded[0].lens), 2 ** math.ceil(math.log2(max(T, LEAST))))
    for one, other in zip(step(omni, omni, *padded), step(omni, omni, *given_)):
        assert near(one, other)


def test_a_batch_keeps_its_sizes_where_padding_would_not_fit() -> None:
    features, idx, targets = batch(3, 33, 33)  # buckets of 48 and 64: 64 + ceil(48 / 4) = 76 positions
    for room, sizes in ((76, (48, 64)), (75, (33, 33)), (None, (48, 64))):
        padded, ids, _ = to_bucket(features, idx, targets, soft_tokens=Projector(80, 8, stack=4).num_soft_tokens, room=room)
        assert (padded.values.size(1), ids.size(1)) == sizes and len(ids) == 4


def test_a_pool_takes_as_many_positions_however_long_the_clip() -> None:
    features, idx, targets = batch(3, 33, 33)  # 64 + 5 positions, with padding as without
    soft_tokens = Projector(80, 8, stack=4, pool=5).num_soft_tokens
    for room, sizes in ((69, (48, 64)), (68, (33, 33))):
        padded, ids, _ = to_bucket(features, idx, targets, soft_tokens=soft_tokens, room=room)
        assert (padded.values.size(1), ids.size(1)) == sizes


def test_rows_that_do_not_meet_are_refused() -> None:
    features, idx, targets = batch(3, 8, 5)
    with pytest.raises(BadInput, match="3 rows of features, idx"):
        to_bucket(features, idx[:2], targets[:2])
    with pytest.raises(BadInput, match="targets"):
        to_bucket(features, idx, targets[:, :-1])


SIZES = [(3, 20, 9), (4, 32, 12), (4, 47, 16), (3, 33, 3), (4, 30, 9), (3, 48, 32)]  # buckets (4, 32, 32) and (4, 48, 32)


@pytest.mark.parametrize("loss", [pytest.param("host", marks=pytest.mark.slow), "fused"])
@pytest.mark.parametrize("lora", [False, True], ids=["stage 1", "stage 2"])
def test_a_training_step_is_one_graph_and_compiles_once_per_bucket(lora: bool, loss: Any) -> None:
    """fullgraph: a graph break would raise. The optimizer moves the parameters between steps, which compiles nothing again."""
    torch._dynamo.reset()
    omni, plain = omni_gpt(lora, loss=loss), omni_gpt(lora, loss=loss)
    counter = CompileCounterWithBackend("aot_eager")
    model = torch.compile(omni, backend=counter, fullgraph=True, dynamic=False)
    optimizers = [torch.optim.SGD(one.trainable_parameters(), lr=1e-3) for one in (omni, plain)]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = 1e-3
    for seed, sizes in enumerate(SIZES):
        given_ = batch(*sizes, seed=seed)
        for one, other in zip(step(model, omni, *to_bucket(*given_)), step(plain, plain, *given_)):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # as above, over six steps
        for optimizer in optimizers:
            optimizer.step()
    assert counter.frame_count == len({tuple(t.shape for t in (features.values, idx)) for features, idx, _ in
                                       (to_bucket(*batch(*sizes)) for sizes in SIZES)}) == 2
