"""LoRA: the equation, PEFT on the same weights, and what a host must not notice."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import bits, fingerprint, nano_gpt, reference, tiny_hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from omni_adapters.lora import (
    LoRALinear,
    inject_lora,
    lora_by_path,
    lora_disabled,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from omni_adapters.prepender import SoftTokenPrepender
from omni_adapters.reference_gpt import GPT, Linear
from omni_adapters.shapes import BadInput

IDX = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
SUMS = {"rtol": 1e-5, "atol": 1e-5}  # fp32 dot products of at most 128 terms of order 1, added in another order
HOSTS = {"reference": reference, "nano_gpt": nano_gpt, "transformers": tiny_hf}


def tuned(gpt: nn.Module, seed: int = 0, **options: Any) -> nn.Module:
    """LoRA whose lora_b is no longer zero, as after training."""
    inject_lora(gpt, **({"rank": 4} | options))
    rng = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(gpt)[1::2]:
        parameter.data.normal_(std=0.1, generator=rng)
    return gpt


def logits(gpt: nn.Module) -> Tensor:
    result = gpt(IDX)
    result = result[0] if type(result) is tuple else getattr(result, "logits", result)
    return result.detach()


# ---- one layer -------------------------------------------------------------------------------------------------------


@given(n_in=st.integers(1, 9), n_out=st.integers(1, 9), data=st.data(), bias=st.booleans(), rslora=st.booleans())
def test_the_equation(n_in: int, n_out: int, data: st.DataObject, bias: bool, rslora: bool) -> None:
    rank, alpha = data.draw(st.integers(1, min(n_in, n_out))), data.draw(st.sampled_from([1.0, 8.0, 32.0]))
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
    base = nn.Linear(n_in, n_out, bias=bias)
    layer = LoRALinear(base, rank, alpha, rslora=rslora)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(*shape, n_in)
    scaling = alpha / rank**0.5 if rslora else alpha / rank
    weight = base.weight.double() + scaling * layer.lora_b.double() @ layer.lora_a.double()
    expected = F.linear(x.double(), weight, None if base.bias is None else base.bias.double())
    assert layer(x).shape == (*shape, n_out)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5 * alpha)


def test_at_first_it_is_the_base_bit_for_bit() -> None:
    base = nn.Linear(20, 30)
    x = torch.randn(7, 20)
    before = base(x)
    layer = LoRALinear(base)
    assert torch.equal(layer(x), before) and bool(layer.lora_a.any()) and not bool(layer.lora_b.any())
    assert layer.lora_a.abs().max() <= 20**-0.5
    assert layer.weight is base.weight and layer.bias is base.bias


def test_it_is_an_instance_of_the_hosts_own_linear_and_runs_its_forward() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer, other = LoRALinear(Doubling(8, 8), rank=2), LoRALinear(Doubling(8, 8), rank=2)
    assert isinstance(layer, LoRALinear) and isinstance(layer, Doubling) and type(layer) is type(other)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), 2 * F.linear(x, layer.weight, layer.bias))
    assert isinstance(LoRALinear(Linear(8, 8), rank=2), Linear)
    assert type(LoRALinear(nn.Linear(8, 8), rank=2)) is LoRALinear


def test_masters_stay_fp32_under_a_bf16_host_and_tiny_updates_survive_in_them() -> None:
    layer = LoRALinear(Linear(16, 16).bfloat16(), rank=4)
    assert layer.lora_a.dtype == layer.lora_b.dtype == torch.float32
    x = torch.randn(2, 16, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    before = layer.lora_a.detach().clone()
    layer.lora_a.data += 1e-6
    assert bool((layer.lora_a != before).all())


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.to("cpu", torch.bfloat16)])
def test_masters_stay_fp32_when_the_host_is_cast_later(cast: Callable[[nn.Module], nn.Module]) -> None:
    gpt = tuned(reference())
    gpt(IDX).sum().backward()
    before = {id(p): (bits(p), bits(p.grad)) for p in lora_parameters(gpt)}
    cast(gpt)
    assert {id(p): (bits(p), bits(p.grad)) for p in lora_parameters(gpt)} == before
    layers = lora_layers(gpt, "")
    assert all(layer.weight.dtype != torch.float32 for layer in layers)
    x = torch.randn(3, layers[0].in_features, dtype=layers[0].weight.dtype)
    assert layers[0](x).dtype == x.dtype


def test_masters_move_with_the_host() -> None:
    gpt = tuned(reference()).to("meta", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in lora_parameters(gpt)} == {("meta", torch.float32)}


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_on_the_same_weights(rslora: bool) -> None:
    """Outputs and gradients of input, A and B, ≤ 1e-6: both are three matmuls of 24 terms in fp32."""
    peft = pytest.importorskip("peft")
    host = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24, bias=False))
    ours = copy.deepcopy(host)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["0", "2"], use_rslora=rslora, lora_dropout=0.0)
    theirs = peft.get_peft_model(host, config)
    for name in ("0", "2"):
        layer = theirs.base_model.model.get_submodule(name)
        mine = LoRALinear(ours.get_submodule(name), 4, 16.0, rslora=rslora)
        nn.init.normal_(layer.lora_B["default"].weight)
        mine.lora_a.data.copy_(layer.lora_A["default"].weight)
        mine.lora_b.data.copy_(layer.lora_B["default"].weight)
        setattr(ours, name, mine)
    x = torch.randn(5, 24)
    results = []
    for model in (ours, theirs):
        given_x = x.clone().requires_grad_()
        out = model(given_x)
        out.square().mean().backward()
        results.append([out, given_x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        assert len(results[-1]) == 6
    for mine, other in zip(*results):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_dropout_follows_torchs_seed_and_sleeps_in_evaluation() -> None:
    layer = LoRALinear(nn.Linear(64, 8), rank=4, dropout=0.5)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(100, 64)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x).detach()

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    layer.eval()
    assert torch.equal(drawn(1), drawn(2))
    expected = layer(x).detach() - F.linear(x, layer.weight, layer.bias)
    layer.train()
    mean = torch.stack([drawn(seed) for seed in range(400)]).mean(0) - F.linear(x, layer.weight, layer.bias)
    # Inverted dropout keeps the mean. At p = 0.5 one draw strays by Σ(aᵢxᵢ)² about (Σ aᵢxᵢ)², which for random signs is of the
    # same size, so the mean of 400 draws strays by 1/400 of it; 20 times that is allowed.
    assert (mean - expected).square().mean() < 0.05 * expected.square().mean()


def test_merge_and_unmerge() -> None:
    layer = LoRALinear(nn.Linear(24, 16), rank=4)
    nn.init.normal_(layer.lora_b)
    before, x = bits(layer.weight), torch.randn(9, 24)
    expected = layer.eval()(x)
    layer.merge()
    layer.merge()
    assert layer.merged and bits(layer.weight) != before
    torch.testing.assert_close(layer(x), expected, **SUMS)
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged and bits(layer.weight) == before and torch.equal(layer(x), expected)


def test_what_is_saved_is_the_base_and_lora_apart_even_while_merged() -> None:
    layer = LoRALinear(nn.Linear(24, 16), rank=4)
    nn.init.normal_(layer.lora_b)
    apart = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.merge()
    assert {name: bits(tensor) for name, tensor in layer.state_dict().items()} == {n: bits(t) for n, t in apart.items()}
    other = LoRALinear(nn.Linear(24, 16), rank=4)
    other.merge()
    other.load_state_dict(layer.state_dict())
    assert not other.merged and all(torch.equal(tensor, apart[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_independent(again: Callable[[nn.Module], nn.Module]) -> None:
    gpt = tuned(reference())
    other = again(gpt)
    assert torch.equal(logits(other), logits(gpt))
    lora_parameters(other)[1].data.add_(1)
    assert not torch.equal(logits(other), logits(gpt))
    first = lora_layers(other, "")[0]
    assert first.base.weight is first.weight and isinstance(first, Linear)


def test_layers_by_path_whatever_is_compiled() -> None:
    gpt = reference()
    assert lora_by_path(gpt) == {}
    paths = inject_lora(gpt, rank=4)
    gpt.transformer["h"][0].mlp = torch.compile(gpt.transformer["h"][0].mlp, backend="eager")
    found = lora_by_path(torch.compile(gpt, backend="eager"))
    assert list(found) == paths and all(isinstance(layer, LoRALinear) for layer in found.values())


# ---- a host ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", HOSTS.values(), ids=HOSTS)
def test_injection_keeps_every_bit_and_every_key(build: Callable[[], nn.Module]) -> None:
    gpt = build().eval()
    before, keys, parameters = logits(gpt), list(gpt.state_dict()), dict(gpt.named_parameters())
    random = bits(torch.get_rng_state())
    paths = inject_lora(gpt, rank=4)
    assert torch.equal(logits(gpt), before) and bits(torch.get_rng_state()) == random
    assert [key for key in gpt.state_dict() if "lora_" not in key] == keys
    assert all(dict(gpt.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert paths and all(isinstance(gpt.get_submodule(path), LoRALinear) for path in paths)
    assert len(lora_parameters(gpt)) == 2 * len(paths)
    again = build()
    inject_lora(again, rank=4)
    for mine, theirs in zip(lora_parameters(gpt), lora_parameters(again)):
        assert torch.equal(mine, theirs)


def test_attention_and_mlp_by_default_gates_left_alone() -> None:
    paths = inject_lora(reference(n_embd=64), rank=16)
    assert paths == [f"transformer.h.{i}.{name}" for i in range(2) for name in
                     ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


@pytest.mark.parametrize("build", HOSTS.values(), ids=HOSTS)
def test_merged_logits_and_the_way_back(build: Callable[[], nn.Module]) -> None:
    gpt = tuned(build()).eval()
    before, expected = fingerprint(gpt)["bits"], logits(gpt)
    merge_lora(gpt)
    torch.testing.assert_close(logits(gpt), expected, **SUMS)
    unmerge_lora(gpt)
    assert fingerprint(gpt)["bits"] == before and torch.equal(logits(gpt), expected)


@pytest.mark.parametrize("build", HOSTS.values(), ids=HOSTS)
def test_removal_gives_the_gpt_as_it_came(build: Callable[[], nn.Module]) -> None:
    gpt = build()
    next(gpt.parameters()).requires_grad_(False)
    before, modules = fingerprint(gpt), list(gpt.modules())
    tuned(gpt)
    merge_lora(gpt)
    assert remove_lora(gpt) is gpt
    assert fingerprint(gpt) == before and all(a is b for a, b in zip(gpt.modules(), modules))


def test_removal_with_the_update_left_in() -> None:
    gpt = tuned(reference()).eval()
    expected, keys = logits(gpt), [key for key in gpt.state_dict() if "lora_" not in key]
    remove_lora(gpt, merged=True)
    torch.testing.assert_close(logits(gpt), expected, **SUMS)
    assert list(gpt.state_dict()) == keys and not any(isinstance(m, LoRALinear) for m in gpt.modules())


def test_removal_after_the_parameters_have_been_replaced() -> None:
    gpt = tuned(reference())
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        gpt.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    remove_lora(gpt)
    assert {p.dtype for p in gpt.parameters()} == {torch.float64}


def test_disabled_is_the_bare_gpt_bit_for_bit_and_comes_back_whatever_happens() -> None:
    gpt = reference().eval()
    bare = logits(gpt)
    tuned(gpt)
    heard = logits(gpt)
    assert not torch.equal(heard, bare)
    with lora_disabled(gpt), lora_disabled(gpt):
        assert torch.equal(logits(gpt), bare)
    lora_layers(gpt, "")[0].enabled = False
    one_off = logits(gpt)
    with pytest.raises(RuntimeError), lora_disabled(gpt):
        raise RuntimeError
    assert torch.equal(logits(gpt), one_off) and not torch.equal(one_off, heard)


def test_a_module_in_two_places_gets_one_lora() -> None:
    gpt = reference()
    gpt.transformer["h"][1].mlp = gpt.transformer["h"][0].mlp
    gpt.transformer["h"][0].attn.twin = gpt.transformer["h"][0].attn.c_q
    inject_lora(gpt, rank=4)
    assert gpt.transformer["h"][0].attn.twin is gpt.transformer["h"][0].attn.c_q
    assert isinstance(gpt.transformer["h"][0].attn.twin, LoRALinear)
    remove_lora(gpt)
    assert gpt.transformer["h"][0].attn.twin is gpt.transformer["h"][0].attn.c_q
    assert type(gpt.transformer["h"][0].attn.twin) is Linear


def test_only_lora_learns_and_a_step_lowers_the_loss() -> None:
    gpt = reference()
    gpt.requires_grad_(False)
    inject_lora(gpt, rank=4)
    optimizer = torch.optim.AdamW(lora_parameters(gpt), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = gpt(IDX, IDX.roll(-1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {name.split(".")[-1] for name, p in gpt.named_parameters() if p.grad is not None} == {"lora_a", "lora_b"}


@pytest.mark.parametrize("first", ["lora", "prepender"])
def test_beside_a_prepender_in_either_order(first: str) -> None:
    def build() -> tuple[GPT, SoftTokenPrepender]:
        gpt = reference()
        if first == "lora":
            tuned(gpt)
            return gpt, SoftTokenPrepender(gpt)
        prepender = SoftTokenPrepender(gpt)
        tuned(gpt)
        return gpt, prepender

    gpt, prepender = build()
    other = reference()
    tuned(other)
    remove_lora(other, merged=True)  # the same weights without LoRA's machinery
    plain = SoftTokenPrepender(other)
    soft = torch.randn(2, 3, 32)
    torch.testing.assert_close(prepender(IDX, None, soft), plain(IDX, None, soft), **SUMS)
    prepender(IDX, IDX.roll(-1, 1), soft).backward()
    assert all(p.grad is not None for p in lora_parameters(gpt))
    prepender.remove()
    remove_lora(gpt)
    assert fingerprint(gpt)["hooks"] == fingerprint(reference())["hooks"]


def test_hooks_on_a_layer_outlive_injection_and_can_be_taken_away_after_it() -> None:
    gpt, calls = reference(), []
    handle = gpt.transformer["h"][0].mlp.c_fc.register_forward_hook(lambda *_: calls.append(1))
    inject_lora(gpt, rank=4)
    gpt(IDX)
    handle.remove()
    gpt(IDX)
    remove_lora(gpt)
    gpt(IDX)
    assert calls == [1]


def test_compiled_in_one_graph() -> None:
    gpt = tuned(reference())
    expected = gpt(IDX, IDX.roll(-1, 1))
    compiled = torch.compile(gpt, backend="aot_eager", fullgraph=True, dynamic=False)
    loss = compiled(IDX, IDX.roll(-1, 1))
    torch.testing.assert_close(loss, expected, **SUMS)
    loss.backward()
    assert all(p.grad is not None for p in lora_parameters(gpt))


def test_one_target_may_be_a_plain_string() -> None:
    assert inject_lora(reference(), 4, targets="mlp") == inject_lora(reference(), 4, targets=("mlp",))
    with pytest.raises(BadInput, match=r"targets \('lm',\) at rank 999"):
        inject_lora(reference(), 999, targets="lm")


def test_a_form_that_is_none_is_refused() -> None:
    layer = LoRALinear(nn.Linear(6, 5), 2)
    layer.form = "mergd"  # type: ignore[assignment]
    with pytest.raises(BadInput, match="form = 'mergd'; expected one of auto, merged, two_path"):
        layer(torch.ones(1, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_merge_is_exact_whatever_autocast_says(dtype: torch.dtype) -> None:
    layer = LoRALinear(nn.Linear(64, 48, bias=False, dtype=dtype), 8)
    nn.init.normal_(layer.lora_b)
    exact = layer.weight.double() + layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
    with torch.autocast("cpu", torch.bfloat16):
        layer.merge()
    assert float((layer.weight.double() - exact).abs().max()) <= 16 * torch.finfo(dtype).eps * float(exact.abs().max())


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "message"), [
    (lambda gpt: inject_lora(gpt, rank=0), "rank = 0; expected an integer, 1 ≤ rank"),
    (lambda gpt: inject_lora(gpt, rank=99), r"at rank 99; expected parts of a path among \[.*at least rank wide"),
    (lambda gpt: inject_lora(gpt, targets=("convolution",)), r"targets \('convolution',\)"),
    (lambda gpt: inject_lora(gpt, rank=4, dropout=1.0), "dropout = 1.0; expected 0 ≤ dropout < 1"),
    (lambda gpt: inject_lora(gpt, rank=4, alpha=float("nan")), "alpha = nan"),
    (lambda gpt: inject_lora(gpt, rank=4, alpha="16"), "alpha = '16'; expected a finite alpha"),  # type: ignore[arg-type]
    (lambda gpt: inject_lora(gpt, rank=True), "rank = True; expected an integer"),
    (lambda gpt: LoRALinear(gpt), "a GPT; expected an nn.Linear without LoRA"),
    (lambda gpt: lora_parameters(gpt), r"without LoRA; expected one with\. Call inject_lora"),
    (lambda gpt: merge_lora(gpt), "merge_lora: got a GPT without LoRA"),
    (lambda gpt: remove_lora(gpt), "remove_lora: got a GPT without LoRA"),
])
def test_refusals_leave_the_gpt_as_it_came(call: Callable[[GPT], Any], message: str) -> None:
    gpt = reference()
    before = fingerprint(gpt)
    with pytest.raises(BadInput, match=message):
        call(gpt)
    assert fingerprint(gpt) == before


def test_refusals_of_a_gpt_that_has_lora() -> None:
    gpt = tuned(reference())
    before = fingerprint(gpt)
    with pytest.raises(BadInput, match="has LoRA already"):
        inject_lora(gpt)
    with pytest.raises(BadInput, match=r"an nn\.Linear without LoRA"):
        LoRALinear(lora_layers(gpt, "")[0])
    merge_lora(gpt)
    with pytest.raises(BadInput, match="whose LoRA is merged"), lora_disabled(gpt):
        pass
    with pytest.raises(BadInput, match=r"a training step while merged.*unmerge_lora"):
        gpt.train()(IDX)
    with torch.no_grad():
        gpt(IDX)
    unmerge_lora(gpt)
    assert fingerprint(gpt) == before


def test_layers_that_share_a_weight_are_refused() -> None:
    gpt = reference()
    gpt.transformer["h"][1].mlp.c_fc.weight = gpt.transformer["h"][0].mlp.c_fc.weight
    before = fingerprint(gpt)
    with pytest.raises(BadInput, match=r"that share a weight; expected a weight for each\. Narrow"):
        inject_lora(gpt, rank=4)
    assert fingerprint(gpt) == before


def test_a_head_tied_to_the_embedding_keeps_lora_apart() -> None:
    gpt = tuned(nano_gpt(), targets=("lm_head",)).eval()
    expected, before = logits(gpt), fingerprint(gpt)
    for call in (merge_lora, lambda gpt: remove_lora(gpt, merged=True)):
        with pytest.raises(BadInput, match="lm_head, whose weight another module shares"):
            call(gpt)
    assert torch.equal(logits(gpt), expected) and fingerprint(gpt) == before


def test_a_layer_compiled_by_itself_is_not_deaf_to_its_update() -> None:
    base = nn.Linear(8, 8)
    base.compile(backend="eager")
    layer, x = LoRALinear(base, 2), torch.randn(3, 8)
    nn.init.normal_(layer.lora_b)
    torch.testing.assert_close(layer(x) - base(x), F.linear(x, layer.update()), **SUMS)


def test_layers_that_are_wrapped_or_computed_are_refused() -> None:
    base = nn.Linear(8, 8)
    base.forward = lambda x: x
    with pytest.raises(BadInput, match=r"with a forward of its own instance.*Inject LoRA before"):
        LoRALinear(base, 2)
    with pytest.raises(BadInput, match="whose weight is computed"):
        LoRALinear(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), 2)


def test_a_merged_layer_moves_whole_and_does_not_merge_while_disabled() -> None:
    gpt = tuned(reference())
    merge_lora(gpt)
    gpt.bfloat16()
    assert {tensor.dtype for name, tensor in gpt.state_dict().items() if "lora_" not in name} == {torch.bfloat16}
    unmerge_lora(gpt)
    assert torch.equal(gpt.transformer["h"][0].mlp.c_fc.weight, reference().bfloat16().transformer["h"][0].mlp.c_fc.weight)
    with lora_disabled(gpt), pytest.raises(BadInput, match="a merge while disabled"):
        merge_lora(gpt)
