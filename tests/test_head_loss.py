"""The host's loss without its logits: equal to the host's own, wherever it is allowed, and refused where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import fingerprint, nano_gpt, reference, tiny_hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_model import ears, waves
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omni_adapters import Features, SoftTokenPrepender, head_loss, loss
from omni_adapters.anatomy import discover_anatomy, loss_is_plain, loss_of
from omni_adapters.lora import inject_lora
from omni_adapters.reference_gpt import GPT
from omni_adapters.shapes import BadInput

# fp32: a loss is a sum of some hundred terms of order 1, a gradient one of some thousand; either has 2⁻²⁴ a term
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
HOSTS = [reference, nano_gpt, tiny_hf]


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every loss that was fused."""
    calls: list[int] = []
    monkeypatch.setattr("omni_adapters.prepender.head_loss", lambda *args: calls.append(1) or head_loss.head_loss(*args))
    return calls


def batch(n_embd: int, T: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Features]:
    rng = torch.Generator().manual_seed(seed)
    idx = torch.randint(1, 49, (2, T), generator=rng)
    targets = torch.randint(0, 49, (2, T), generator=rng)
    targets[0, :3] = -1
    return idx, targets, Features(torch.randn(2, 5, n_embd, generator=rng).requires_grad_(), torch.tensor([5, 2]))


def gradients(prepender: SoftTokenPrepender, idx: Tensor, targets: Tensor, soft: Features, **kwargs: Any) -> list[Tensor]:
    """Loss, gradient of the soft tokens and of every parameter of the GPT."""
    prepender.gpt.zero_grad(set_to_none=True)
    soft.values.grad = None
    value = loss_of(prepender(idx, targets, soft, **kwargs))
    value.sum().backward()
    return [value.detach(), soft.values.grad, *(p.grad.clone() for p in prepender.gpt.parameters() if p.grad is not None)]


@pytest.mark.parametrize("build", HOSTS)
@pytest.mark.parametrize("frozen", [True, False])
def test_loss_and_gradients_are_the_hosts(build: Callable[[], nn.Module], frozen: bool, fused: list[int]) -> None:
    gpt = build().requires_grad_(not frozen)
    prepender = SoftTokenPrepender(gpt)
    given_ = batch(prepender.anatomy.n_embd)
    expected = gradients(prepender, *given_)
    assert not fused
    prepender.loss = "fused"
    came = gradients(prepender, *given_)
    assert fused
    assert len(came) == len(expected) > 1
    for one, other in zip(came, expected):
        torch.testing.assert_close(one, other, **CLOSE)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 12), st.sampled_from(["mean", "sum", "none"]), st.integers(0, 99), st.booleans())
def test_every_reduction_with_and_without_sound(fused: list[int], T: int, reduction: str, seed: int, silent: bool) -> None:
    idx, targets, soft = batch(32, T, seed)
    prepender = SoftTokenPrepender(reference().requires_grad_(False))
    sound = None if silent else soft
    expected = prepender(idx, targets, sound, loss_reduction=reduction)
    prepender.loss = "fused"
    fused.clear()
    came = prepender(idx, targets, sound, loss_reduction=reduction)
    assert fused
    assert came.shape == expected.shape
    torch.testing.assert_close(came, expected, **CLOSE)


def test_the_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head reads one position a row."""
    prepender, read = SoftTokenPrepender(reference(), loss="fused"), []
    kind = type(prepender.gpt.lm_head)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda layer, x: (layer is prepender.gpt.lm_head and read.append(x.size(1)))
                        or forward(layer, x))
    prepender(*batch(32))
    assert read == [1]


@pytest.mark.parametrize("build", [nano_gpt, tiny_hf])
def test_a_host_that_gives_logits_too_gives_none_in_their_place(build: Callable[[], nn.Module]) -> None:
    prepender = SoftTokenPrepender(build(), loss="fused")
    idx, targets, soft = batch(prepender.anatomy.n_embd)
    result = prepender(idx, targets, soft)
    assert (result[0] if type(result) is tuple else result.logits) is None
    prepender.loss = "auto"
    result = prepender(idx, targets, soft)
    assert (result[0] if type(result) is tuple else result.logits) is not None


def test_auto_is_the_hosts_own_bit_for_bit_where_logits_are_few_and_fused_where_they_are_many(
        monkeypatch: pytest.MonkeyPatch, fused: list[int]) -> None:
    given_, gpt = batch(32), reference().requires_grad_(False)
    prepender = SoftTokenPrepender(gpt)
    own = prepender(*given_)
    prepender.loss = "auto"
    assert torch.equal(prepender(*given_), own)
    rows = int((given_[1] != -1).sum())
    monkeypatch.setattr(loss, "WORTH_CHUNKING", rows * prepender.anatomy.vocab_size)
    assert not fused
    torch.testing.assert_close(prepender(*given_), own, **CLOSE)
    assert fused
    monkeypatch.setattr(loss, "WORTH_CHUNKING", rows * prepender.anatomy.vocab_size + 1)
    fused.clear()
    assert torch.equal(prepender(*given_), own) and not fused
    assert torch.equal(prepender(given_[0]), gpt(given_[0]))  # without targets nothing changes


def test_compiled_in_one_graph(fused: list[int]) -> None:
    prepender = SoftTokenPrepender(reference().requires_grad_(False), loss="fused")
    given_ = batch(32)
    expected = gradients(prepender, *given_)
    compiled = torch.compile(prepender, backend="aot_eager", fullgraph=True, dynamic=False)
    given_[2].values.grad = None
    fused.clear()
    value = compiled(*given_)
    assert fused  # while it was traced
    value.backward()
    torch.testing.assert_close(value.detach(), expected[0], **CLOSE)
    torch.testing.assert_close(given_[2].values.grad, expected[1], **CLOSE)


@pytest.mark.parametrize("whole", [True, False], ids=["the whole forward", "blocks"])
def test_with_activation_checkpointing(whole: bool, monkeypatch: pytest.MonkeyPatch, fused: list[int]) -> None:
    prepender = SoftTokenPrepender(reference().requires_grad_(False), loss="fused")
    idx, targets, soft = batch(32)
    expected = gradients(prepender, idx, targets, soft)
    if not whole:
        for block in prepender.gpt.transformer["h"]:
            monkeypatch.setattr(block, "forward", lambda *args, own=block.forward: checkpoint(own, *args, use_reentrant=False))
    soft.values.grad = None
    value = checkpoint(prepender, idx, targets, soft, use_reentrant=False) if whole else prepender(idx, targets, soft)
    value.backward()
    assert len(fused) == (3 if whole else 2)  # once for what is expected, and again where the whole forward is
    torch.testing.assert_close(soft.values.grad, expected[1], **CLOSE)


def test_under_bf16_autocast_it_is_nearer_to_fp32_than_the_host_is() -> None:
    """Of the same hidden states: the host rounds its logits to bf16; fused sums in fp32 whatever the autocast."""
    prepender, off = SoftTokenPrepender(reference().requires_grad_(False)), {"host": 0.0, "fused": 0.0}
    for seed in range(8):
        given_ = batch(32, T=40, seed=seed)
        for form in off:
            prepender.loss = form
            with torch.autocast("cpu", torch.bfloat16):
                hidden = prepender.hidden_states(given_[0], given_[2])
                value = prepender(*given_)
            exact = head_loss.head_loss(hidden.double(), given_[1], prepender.gpt, prepender.anatomy)
            off[form] += float((value - exact).abs())
    assert value.dtype == torch.float32
    assert off["fused"] < 1e-5 < off["host"]  # of the same hidden states: sums in fp32 against logits of bf16, rounded by 2⁻⁹


def test_an_omni_gpt_says_who_computes_its_loss_at_any_time(fused: list[int]) -> None:
    omni = ears(reference())
    idx, targets, _ = batch(32)
    assert omni.loss == "host"
    omni.loss = "fused"
    omni(idx, targets, waves(0.4, 0.25))
    assert fused and omni.prepender.loss == omni.loss == "fused"
    with pytest.raises(BadInput, match="loss = 'best'"):
        omni.loss = "best"  # type: ignore[assignment]
    assert omni.loss == "fused"


def test_an_omni_gpt_trains_with_it_and_a_silent_batch_has_its_gradient_of_zero(fused: list[int]) -> None:
    omni = ears(reference(), loss="fused").train()
    plain = ears(reference()).train()
    idx, targets, _ = batch(32)
    for sound in (waves(0.4, 0.25), None):
        for one in (omni, plain):
            one.zero_grad(set_to_none=True)
            one(idx, targets, sound).backward()
        for name, tensor in omni.trained().items():
            if tensor.requires_grad:
                assert fused
                torch.testing.assert_close(tensor.grad, plain.trained()[name].grad, **CLOSE)
                assert tensor.grad is not None and bool(tensor.grad.any()) == (sound is not None)


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class AuxiliaryLoss(GPT):
    """As mixtures of experts have one, in training mode only."""

    def forward(self, idx: Tensor, targets: Tensor | None = None, **kwargs: Any) -> Tensor:
        result = super().forward(idx, targets, **kwargs)
        return result + 0.01 * self.training if targets is not None else result


class ZLoss(GPT):
    def forward(self, idx: Tensor, targets: Tensor | None = None, **kwargs: Any) -> Tensor:
        if targets is None:
            return super().forward(idx)
        return super().forward(idx, targets) + 1e-3 * super().forward(idx).logsumexp(-1).square().mean()


class Smoothed(GPT):
    def forward(self, idx: Tensor, targets: Tensor | None = None, **kwargs: Any) -> Tensor:
        logits = super().forward(idx)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, label_smoothing=0.1)


class Summed(GPT):
    def forward(self, idx: Tensor, targets: Tensor | None = None, **kwargs: Any) -> Tensor:
        return super().forward(idx, targets, **({} if targets is None else {"loss_reduction": "sum"}))


class Failing(GPT):
    """A loss that runs on a GPU only, say."""

    def forward(self, idx: Tensor, targets: Tensor | None = None, **kwargs: Any) -> Tensor:
        torch.rand(3)
        if targets is not None and self.training:
            raise KeyError("no such kernel")
        return super().forward(idx, targets, **kwargs)


class RoundTheHead(nn.Module):
    """A loss of its own kernel, from lm_head.weight: the head is not called."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.wte, self.lm_head, self.scale = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False), scale

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.wte(idx)
        if targets is None:
            return self.lm_head(x)
        return self.scale * F.cross_entropy((x @ self.lm_head.weight.T).flatten(0, 1), targets.flatten(), ignore_index=-1)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_host_that_goes_round_its_head_is_asked_about_its_logits(scale: float) -> None:
    gpt = RoundTheHead(scale)
    assert loss_is_plain(gpt, discover_anatomy(gpt)) == (scale == 1)


def of_class(kind: type[GPT]) -> GPT:
    gpt = reference()
    gpt.__class__ = kind
    return gpt


@pytest.mark.parametrize("kind", [AuxiliaryLoss, ZLoss, Smoothed, Summed])
def test_a_loss_of_the_hosts_own_is_its_own(kind: type[GPT], monkeypatch: pytest.MonkeyPatch, fused: list[int]) -> None:
    """Else "auto" would leave out a term as soon as a batch is large enough."""
    monkeypatch.setattr(loss, "WORTH_CHUNKING", 0)
    with pytest.raises(BadInput, match="a loss that is not the mean cross-entropy of the logits"):
        SoftTokenPrepender(of_class(kind), loss="fused")
    gpt = of_class(kind).train()
    own = SoftTokenPrepender(gpt)(*batch(32))
    assert own != SoftTokenPrepender(reference())(*batch(32))
    assert torch.equal(SoftTokenPrepender(of_class(kind).train(), loss="auto")(*batch(32)), own) and not fused


@pytest.mark.parametrize("kind", [ZLoss, Smoothed, Summed])
def test_so_it_is_in_half_precision(kind: type[GPT]) -> None:
    gpt = of_class(kind).bfloat16()
    assert not loss_is_plain(gpt, discover_anatomy(gpt))
    plain = reference().bfloat16()
    assert loss_is_plain(plain, discover_anatomy(plain))


@pytest.mark.parametrize("kind", [GPT, AuxiliaryLoss, Failing])
def test_asking_leaves_the_host_as_it_was(kind: type[GPT]) -> None:
    torch.manual_seed(3)
    gpt = of_class(kind)
    gpt.train()
    gpt.transformer["h"][0].eval()
    anatomy, before = discover_anatomy(gpt), fingerprint(gpt)
    assert loss_is_plain(gpt, anatomy) == (kind is GPT)
    assert fingerprint(gpt) == before


def test_a_hook_on_the_heads_gradient_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, fused: list[int]) -> None:
    monkeypatch.setattr(loss, "WORTH_CHUNKING", 0)
    prepender, (idx, targets, soft) = SoftTokenPrepender(reference(), loss="auto"), batch(32)
    prepender.gpt.lm_head.register_full_backward_hook(lambda module, given, out: (given[0] * 0,))
    prepender(idx, targets, soft).backward()
    assert not fused and not soft.values.grad.any()
    prepender.loss = "fused"
    with pytest.raises(BadInput, match="somebody's hook may change"):
        prepender(idx, targets, soft)


@pytest.mark.parametrize("form", ["host", "fused"])
def test_a_transformers_host_has_every_reduction(form: Any) -> None:
    prepender, losses = SoftTokenPrepender(tiny_hf(), loss=form), {}
    idx, targets, soft = batch(prepender.anatomy.n_embd)
    for reduction in ("none", "sum", "mean"):
        losses[reduction] = prepender(idx, targets, soft, loss_reduction=reduction).loss
    assert losses["none"].shape == (targets.numel(),) and not losses["none"][targets.flatten() == -1].any()
    torch.testing.assert_close(losses["none"].sum(), losses["sum"])
    torch.testing.assert_close(losses["mean"] * (targets != -1).sum(), losses["sum"])


def test_a_head_that_was_exchanged_is_named() -> None:
    prepender, (idx, targets, _) = SoftTokenPrepender(reference(), loss="fused"), batch(32)
    prepender.gpt.lm_head = nn.Linear(32, 128, bias=False)
    with pytest.raises(BadInput, match=r"did not call the lm_head it had; expected .* Build a new prepender"):
        prepender(idx, targets)


def with_head(head: nn.Module) -> nn.Module:
    gpt = reference()
    gpt.lm_head = head
    return gpt


def hooked(prepender: SoftTokenPrepender) -> SoftTokenPrepender:
    prepender.gpt.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    return prepender


def patched_gpt() -> nn.Module:
    """As accelerate does it: the instance has a forward of its own."""
    gpt = reference()
    own = gpt.lm_head.forward
    gpt.lm_head.forward = lambda x: own(x) * 2
    return gpt


def patched(prepender: SoftTokenPrepender) -> SoftTokenPrepender:
    own = prepender.gpt.lm_head.forward
    prepender.gpt.lm_head.forward = lambda x: own(x) * 2
    return prepender


def with_lora_on_the_head() -> SoftTokenPrepender:
    gpt = reference()
    prepender = SoftTokenPrepender(gpt, loss="fused")
    inject_lora(gpt, 4, targets=("lm_head",))
    return prepender


@pytest.mark.parametrize(("build", "kwargs", "message"), [
    (lambda: SoftTokenPrepender(with_head(Doubling(32, 128, bias=False)), loss="fused"), {}, "a head Doubling that is more than"),
    (lambda: SoftTokenPrepender(with_head(nn.Linear(32, 128)), loss="fused"), {}, "a head Linear that is more than one matrix"),
    (with_lora_on_the_head, {}, "LoRA on the head"),
    (lambda: hooked(SoftTokenPrepender(reference(), loss="fused")), {}, "somebody's hook"),
    (lambda: patched(SoftTokenPrepender(reference(), loss="fused")), {}, "somebody's hook"),
    (lambda: SoftTokenPrepender(patched_gpt(), loss="fused"), {}, "more than one matrix"),
    (lambda: SoftTokenPrepender(reference(), loss="fused"), {"kv_cache": None}, "arguments of the host's own, kv_cache"),
    (lambda: SoftTokenPrepender(reference(), loss="fused"), {"loss_reduction": "max"}, "loss_reduction = 'max'"),
    (lambda: SoftTokenPrepender(reference(), loss="best"), {}, "loss = 'best'; expected 'host', 'fused' or 'auto'"),
])
def test_what_is_refused_and_auto_leaves_to_the_host(build: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        build()(*batch(32), **kwargs)


@pytest.mark.parametrize("head", [Doubling(32, 128, bias=False), nn.Linear(32, 128)])
def test_auto_leaves_a_head_of_its_own_to_the_host(head: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "WORTH_CHUNKING", 0)
    prepender = SoftTokenPrepender(with_head(head))
    own = prepender(*batch(32))
    prepender.loss = "auto"
    assert torch.equal(prepender(*batch(32)), own)
    with pytest.raises(BadInput, match="that is more than one matrix"):
        prepender.loss = "fused"
    assert prepender.loss == "auto"


def test_nothing_graded_is_refused() -> None:
    idx, targets, soft = batch(32)
    with pytest.raises(BadInput, match="targets that are all -1"):
        SoftTokenPrepender(reference(), loss="fused")(idx, torch.full_like(targets, -1), soft)
