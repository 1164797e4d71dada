"""OmniGPT: its parts joined give what the parts give, and an adapter comes back from its file bit for bit, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import fingerprint, nano_gpt, reference, tiny_hf
from tiny_whisper import make_tiny_whisper
from torch import Tensor, nn

from omni_adapters import Features, OmniGPT, Projector, SoftTokenPrepender, fingerprints
from omni_adapters.anatomy import logits_of
from omni_adapters.checkpoint import load_adapter, save_adapter
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.encoders.whisper import WhisperEncoder
from omni_adapters.lora import inject_lora, lora_parameters
from omni_adapters.reference_gpt import GPT
from omni_adapters.shapes import BadInput

P = 60  # inside every host's wte, in no prompt
IDX = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
TARGETS = IDX.roll(-1, 1)


def waves(*seconds: float) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(int(16_000 * s), generator=rng) for s in seconds]


def ears(gpt: nn.Module, **options: Any) -> OmniGPT:
    torch.manual_seed(0)
    encoder = LogMelEncoder()
    encoder.fit_statistics(encoder.preprocess(waves(0.5, 0.3)))
    table = gpt.get_input_embeddings() if hasattr(gpt, "get_input_embeddings") else gpt.transformer["wte"]
    return OmniGPT(gpt, (encoder, Projector(80, table.weight.size(1), 16, stack=12, zero_init=False)), **options)


def frozen() -> GPT:
    """Frozen as in an OmniGPT: attention takes another kernel, with other last bits, where a gradient is wanted."""
    return reference().requires_grad_(False)


def trained(omni: OmniGPT) -> OmniGPT:
    """Every trained tensor moved, as after training."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in omni.trained().values():
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=rng))
    return omni


def logits(omni: OmniGPT) -> Tensor:
    with torch.no_grad():
        result = omni(IDX, None, waves(0.4, 0.25))
    return result[0] if type(result) is tuple else getattr(result, "logits", result)


# ---- hearing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"insert_at": 1, "value_embeds": "learned"}], ids=["before all", "after bos"])
def test_its_parts_by_hand_and_all_three_forms_of_sound(options: dict[str, Any]) -> None:
    omni, sound = ears(reference(), **options), waves(0.4, 0.25)
    inputs = omni.encoder.preprocess(sound)
    features = omni.encoder(inputs)
    plain = SoftTokenPrepender(frozen(), **options)
    expected = plain(IDX, TARGETS, omni.projector(features))
    for form in ({"audio": sound}, {"audio": [clip.numpy() for clip in sound]}, {"audio_inputs": inputs},
                 {"audio_features": features}):
        assert torch.equal(omni(IDX, TARGETS, **form), expected)
    assert torch.equal(omni(IDX, None), frozen()(IDX))
    assert torch.equal(omni(IDX, TARGETS, loss_reduction="none", audio=sound), plain(IDX, TARGETS, omni.projector(features),
                                                                                    loss_reduction="none"))


def test_rows_without_sound_beside_rows_with() -> None:
    omni, (one,) = ears(reference()), waves(0.4)
    together = omni(IDX, None, [None, one])
    assert torch.equal(omni(IDX, None, [None, None]), omni(IDX))
    for row, alone in ((0, omni(IDX[:1])), (1, omni(IDX[1:], None, [one]))):  # a batch of another size sums in another order
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-5)


def test_clips_at_placeholders() -> None:
    omni = ears(reference(), placeholders={"audio": P})
    idx = torch.tensor([[1, P, 2, P], [3, 4, 5, 6]])
    sound = waves(0.4, 0.25)
    soft = omni.projector(omni.encoder(omni.encoder.preprocess(sound)))
    assert torch.equal(omni(idx, None, sound), SoftTokenPrepender(frozen())(idx, None, {P: soft}))


def test_it_generates_what_the_prepender_generates() -> None:
    omni, (one,) = ears(reference(), insert_at=1), waves(0.4)
    soft = omni.projector(omni.encoder(omni.encoder.preprocess([one])))
    expected = list(omni.prepender.generate([1, 2], soft, max_tokens=6, temperature=0.7, seed=3))
    assert list(omni.generate([1, 2], [one], max_tokens=6, temperature=0.7, seed=3)) == expected


def test_compiled_in_one_graph_from_cached_features() -> None:
    omni = ears(reference())
    omni.add_lora(4)
    features = omni.encoder(omni.encoder.preprocess(waves(0.4, 0.25)))
    expected = omni(IDX, TARGETS, audio_features=features)
    compiled = torch.compile(omni, backend="aot_eager", fullgraph=True, dynamic=False)
    loss = compiled(IDX, TARGETS, audio_features=features)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert all(p.grad is not None for group in omni.trainable_parameters() for p in group["params"])


# ---- what trains -----------------------------------------------------------------------------------------------------


def test_stage_1_trains_the_projector_and_stage_2_lora_too() -> None:
    omni = ears(reference(), value_embeds="learned")
    groups = {group["name"]: group for group in omni.trainable_parameters()}
    assert set(groups) == {"projector", "side_rows"} and groups["projector"]["lr"] == 1e-3
    omni.add_lora(4)
    groups = {group["name"]: group for group in omni.trainable_parameters()}
    assert {name: group["lr"] for name, group in groups.items()} == {"projector": 2e-5, "side_rows": 2e-5, "lora": 2e-4}
    assert groups["lora"]["params"] == lora_parameters(omni.gpt)
    omni(IDX, TARGETS, waves(0.4, 0.25)).backward()
    with_gradients = {id(p) for p in omni.parameters() if p.grad is not None}
    assert with_gradients == {id(p) for group in groups.values() for p in group["params"]}
    assert with_gradients == {id(p) for p in omni.parameters() if p.requires_grad}
    torch.optim.AdamW(omni.trainable_parameters()).step()


def test_lora_that_was_there_before_trains() -> None:
    gpt = reference()
    inject_lora(gpt, rank=4)
    assert {group["name"] for group in ears(gpt).trainable_parameters()} == {"projector", "lora"}


@pytest.mark.parametrize("build", [reference, nano_gpt, tiny_hf])
def test_removal_gives_the_gpt_as_it_came(build: Callable[[], nn.Module]) -> None:
    gpt = build()
    next(gpt.parameters()).requires_grad_(False)
    torch.manual_seed(0)
    before = fingerprint(gpt)
    omni = ears(gpt)
    omni.add_lora(4)
    assert omni.remove() is gpt
    torch.manual_seed(0)
    assert fingerprint(gpt) == before


def test_the_description_for_people() -> None:
    gpt = reference(sequence_len=2048)
    omni = ears(gpt)
    text = omni.describe()
    assert f"GPT: {sum(p.numel() for p in gpt.parameters()):,} parameters, frozen" in text
    assert "80 × 12 → 32: 15,872 parameters" in text and "trained    15,872 parameters" in text  # 960 · 16 + 16 · 32
    assert "8.33333 soft tokens a second; a clip of 30 s takes 250 positions of 20,480" in text
    assert "the shortest sees 2048 positions: a clip of 30 s fits" in text or "sees 512 positions: a clip of 30 s fits" in text
    assert "LoRA       none" in text
    gpt.windows[0] = 128
    omni.add_lora(4)
    text = omni.describe()
    assert "sees 128 positions: a clip of 30 s does not fit" in text and "rank 4 on 12 layers" in text


# ---- one file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"insert_at": 1, "value_embeds": "learned"}, {"placeholders": {"audio": P}}],
                         ids=["before all", "after bos, learned", "placeholders"])
@pytest.mark.parametrize("lora", [False, True], ids=["stage 1", "stage 2"])
def test_an_adapter_comes_back_bit_for_bit(tmp_path: Path, lora: bool, options: dict[str, Any]) -> None:
    omni, path = ears(reference(), **options), tmp_path / "ears.safetensors"
    if lora:
        omni.add_lora(3, 10.0, rslora=True, targets=("mlp",))
    trained(omni).save_adapter(path)
    gpt = reference()
    again = OmniGPT.load_adapter(path, gpt)
    assert again.description() == omni.description()
    assert {n: t.tolist() for n, t in again.trained().items()} == {n: t.tolist() for n, t in omni.trained().items()}
    assert "encoder.mean" in omni.trained()
    if not options.get("placeholders"):
        assert torch.equal(logits(again), logits(omni))
    again.remove()
    assert fingerprint(gpt)["bits"] == fingerprint(reference())["bits"]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("build", [nano_gpt, tiny_hf])
def test_other_hosts(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    omni = ears(build().eval())
    omni.add_lora(3)
    trained(omni).save_adapter(tmp_path / "a")
    again = OmniGPT.load_adapter(tmp_path / "a", build().eval())
    if build is tiny_hf:
        assert torch.equal(logits(again), logits(omni))
    else:
        for mine, theirs in zip(again.trained().values(), omni.trained().values()):
            assert torch.equal(mine, theirs)


def test_whisper_is_named_not_stored(tmp_path: Path) -> None:
    folder = make_tiny_whisper(tmp_path / "whisper")
    encoder = WhisperEncoder(folder)
    omni = OmniGPT(reference(), (encoder, Projector(encoder.d_model, 32, 16, stack=100)))
    trained(omni).save_adapter(tmp_path / "a")
    assert not [name for name in omni.trained() if name.startswith("encoder")]
    assert torch.equal(logits(OmniGPT.load_adapter(tmp_path / "a", reference())), logits(omni))
    with torch.no_grad():
        next(encoder.parameters()).add_(1)
    with pytest.raises(BadInput, match=r"encoder\.sha256"):
        OmniGPT.load_adapter(tmp_path / "a", reference(), encoder=encoder)


def test_whisper_in_another_dtype_comes_back_in_it(tmp_path: Path) -> None:
    encoder = WhisperEncoder(make_tiny_whisper(tmp_path / "whisper"), dtype=torch.bfloat16)
    omni = OmniGPT(reference(), (encoder, Projector(encoder.d_model, 32, 16, stack=100, zero_init=False)))
    omni.save_adapter(tmp_path / "a")
    again = OmniGPT.load_adapter(tmp_path / "a", reference())
    assert {p.dtype for p in again.encoder.parameters()} == {torch.bfloat16} and torch.equal(logits(again), logits(omni))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_does_not_say_the_encoders_dtype_still_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    encoder = WhisperEncoder(make_tiny_whisper(tmp_path / "whisper"), dtype=dtype)
    omni = OmniGPT(reference(), (encoder, Projector(encoder.d_model, 32, 16, stack=100, zero_init=False)))
    omni.save_adapter(tmp_path / "a")
    tensors, description = load_adapter(tmp_path / "a")
    assert description["encoder"].pop("dtype", "float32") == str(dtype).removeprefix("torch.")
    save_adapter(tmp_path / "old", tensors, description)
    assert torch.equal(logits(OmniGPT.load_adapter(tmp_path / "old", reference(), encoder=encoder)), logits(omni))
    if dtype == torch.float32:
        assert torch.equal(logits(OmniGPT.load_adapter(tmp_path / "old", reference())), logits(omni))
    description["encoder"]["dtype"] = "int8"
    save_adapter(tmp_path / "odd", tensors, description)
    with pytest.raises(BadInput, match="an encoder in 'int8'; expected one in float32, bfloat16"):
        OmniGPT.load_adapter(tmp_path / "odd", reference())


def test_the_gpts_digest_is_computed_once_and_again_when_a_weight_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    omni, hashed, real = ears(reference()), [], fingerprints.digest
    monkeypatch.setattr(fingerprints, "digest", lambda tensors: hashed.append(1) or real(tensors))

    def now() -> str:
        hashed.clear()
        return omni.description()["host"]["sha256"]

    def fresh() -> str:
        return fingerprints.describe_host(omni.prepender, fingerprints.Digest())["sha256"]

    first, weight = now(), omni.gpt.transformer["h"][0].mlp.c_fc.weight
    assert hashed and now() == first and not hashed
    omni.add_lora(4)
    omni(IDX, TARGETS, waves(0.4, 0.25)).backward()
    torch.optim.AdamW(omni.trainable_parameters()).step()
    assert now() == first and not hashed
    with torch.no_grad():
        weight.add_(1)
    assert now() == fresh() != first
    with torch.no_grad():
        weight.sub_(1)
    weight.requires_grad_(True)
    weight.data.add_(1)  # unseen by autograd: only that it trains says that it may have changed
    assert now() == fresh() != first
    weight.requires_grad_(False)
    omni.bfloat16()
    assert now() == fresh() and hashed and now() and not hashed


def nudged() -> GPT:
    gpt = reference()
    with torch.no_grad():
        gpt.transformer["h"][1].mlp.c_fc.weight[3, 4] += 1e-3
    return gpt


@pytest.mark.parametrize(("gpt", "message"), [
    (nudged, r"host\.sha256"),
    (lambda: reference(n_embd=64), "a projector to 32; expected 64"),
    (lambda: reference(vocab_size=50), r"host\.vocab_size.*97.*50"),
])
def test_another_gpt_is_refused_and_left_as_it_was(tmp_path: Path, gpt: Callable[[], GPT], message: str) -> None:
    omni = ears(reference())
    omni.add_lora(4)
    omni.save_adapter(tmp_path / "a")
    other = gpt()
    torch.manual_seed(0)
    before = fingerprint(other)
    with pytest.raises(BadInput, match=message):
        OmniGPT.load_adapter(tmp_path / "a", other)
    torch.manual_seed(0)
    assert fingerprint(other) == before


def test_other_weights_on_request(tmp_path: Path) -> None:
    omni = ears(reference())
    omni.save_adapter(tmp_path / "a")
    again = OmniGPT.load_adapter(tmp_path / "a", nudged(), any_weights=True)
    assert torch.equal(again.projector.fc1.weight, omni.projector.fc1.weight)


def test_a_damaged_file_changes_nothing(tmp_path: Path) -> None:
    ears(reference()).save_adapter(tmp_path / "a")
    data = bytearray((tmp_path / "a").read_bytes())
    data[-3] ^= 1
    (tmp_path / "a").write_bytes(data)
    gpt = reference()
    before = fingerprint(gpt)
    with pytest.raises(BadInput):
        OmniGPT.load_adapter(tmp_path / "a", gpt)
    assert fingerprint(gpt) == before


def test_lora_that_the_gpt_came_with_stays(tmp_path: Path) -> None:
    ears(reference()).save_adapter(tmp_path / "plain")
    omni = ears(reference())
    omni.add_lora(3)
    omni.save_adapter(tmp_path / "lora")
    gpt = reference()
    inject_lora(gpt, rank=4)
    for parameter in lora_parameters(gpt):
        parameter.data.add_(0.1)
    torch.manual_seed(0)
    before = fingerprint(gpt)
    with pytest.raises(BadInput):
        OmniGPT.load_adapter(tmp_path / "lora", gpt)
    again = ears(gpt)
    again.remove()
    assert again.remove() is gpt
    torch.manual_seed(0)
    assert fingerprint(gpt) == before


def test_compiled_blocks_have_the_same_names_in_a_file(tmp_path: Path) -> None:
    gpt = reference()
    gpt.transformer["h"][0].mlp = torch.compile(gpt.transformer["h"][0].mlp, backend="eager")
    omni = ears(gpt)
    omni.add_lora(3)
    trained(omni).save_adapter(tmp_path / "a")
    assert not any("_orig_mod" in name for name in omni.trained())
    plain = OmniGPT.load_adapter(tmp_path / "a", reference())
    torch.testing.assert_close(logits(plain), logits(omni), rtol=0, atol=1e-5)


def test_two_kinds_of_lora_do_not_fit_one_file(tmp_path: Path) -> None:
    omni = ears(reference())
    omni.add_lora(3)
    omni.lora()[0].alpha = 5.0
    with pytest.raises(BadInput, match="layers of 2 kinds"):
        omni.save_adapter(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_is_passed_keeps_its_own_statistics(tmp_path: Path) -> None:
    ears(reference()).save_adapter(tmp_path / "a")
    encoder = LogMelEncoder()
    omni = OmniGPT.load_adapter(tmp_path / "a", reference(), encoder=encoder)
    assert not encoder.mean.any() and omni.encoder.mean.any()


class Own(LogMelEncoder):
    """A user's encoder with something that could train and something that could waver."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.drop = nn.Linear(80, 80), nn.Dropout(0.5)

    def forward(self, inputs: Features) -> Features:
        values, lens = super().forward(inputs)
        return Features(self.drop(self.mix(values)), lens)


def test_any_encoder_is_frozen_and_stays_in_evaluation() -> None:
    omni = OmniGPT(reference(), (Own(), Projector(80, 32, zero_init=False))).train()
    omni(IDX, TARGETS, waves(0.4, 0.25)).backward()
    assert omni.projector.training and not omni.encoder.drop.training and omni.encoder.mix.weight.grad is None
    assert not any(p.requires_grad for p in omni.encoder.parameters())


@pytest.mark.parametrize("build", [reference, nano_gpt, tiny_hf])
@pytest.mark.parametrize(("placeholders", "audio"),
                         [(None, None), (None, [None, None]), ({"audio": P}, None), ({"audio": P}, [])])
def test_a_batch_without_sound_has_a_gradient_for_all_that_trains(build: Callable[[], nn.Module], placeholders: Any,
                                                                  audio: Any) -> None:
    """Zero, not None: DDP waits for every parameter, and a sum of losses may have no other term."""
    omni = ears(build().train(), placeholders=placeholders, value_embeds="learned").train()
    result = omni(IDX, TARGETS, audio)
    loss = result if isinstance(result, Tensor) else result[1] if type(result) is tuple else result.loss
    plain = SoftTokenPrepender(build().train().requires_grad_(False))(IDX, TARGETS)
    expected = plain if isinstance(plain, Tensor) else plain[1] if type(plain) is tuple else plain.loss
    assert torch.equal(loss, expected)
    loss.backward()
    for group in omni.trainable_parameters():
        assert all(p.grad is not None and not p.grad.any() for p in group["params"])


@pytest.mark.parametrize("build", [reference, nano_gpt, tiny_hf])
@pytest.mark.parametrize("placeholders", [None, {"audio": P}])
def test_logits_of_a_batch_without_sound_have_a_gradient_too(build: Callable[[], nn.Module], placeholders: Any) -> None:
    """A distillation loss is made of them."""
    omni = ears(build().train(), placeholders=placeholders, value_embeds="learned").train()
    result = logits_of(omni(IDX))
    expected = logits_of(SoftTokenPrepender(build().train().requires_grad_(False))(IDX))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    result.square().mean().backward()
    for group in omni.trainable_parameters():
        assert all(p.grad is not None and not p.grad.any() for p in group["params"])
    assert torch.equal(logits_of(omni.eval()(IDX)), expected) and not logits_of(omni(IDX)).requires_grad
    omni.train()
    with torch.no_grad():
        assert torch.equal(logits_of(omni(IDX)), expected)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("audio", [None, [None, None], "sound"])
def test_every_forward_runs_the_projector_once_and_then_the_gpt(mode: str, audio: Any) -> None:
    """Ranks that share sharded weights meet in the same order, whatever each of them hears."""
    omni, order = ears(reference()), []
    getattr(omni, mode)()
    omni.projector.register_forward_hook(lambda *_: order.append("projector"))
    omni.gpt.register_forward_hook(lambda *_: order.append("gpt"))
    omni(IDX, TARGETS, waves(0.4, 0.25) if audio == "sound" else audio)
    assert order == ["projector", "gpt"]


def test_a_placeholder_among_the_targets_of_a_batch_without_sound_is_not_graded() -> None:
    """The text was cut right before its clip."""
    omni = ears(reference(), placeholders={"audio": P}).train()
    targets = TARGETS.clone()
    targets[0, -1] = P
    graded = omni(IDX, targets, loss_reduction="none").view(2, 4)
    expected = omni(IDX, TARGETS, loss_reduction="none").view(2, 4)
    assert graded[0, -1] == 0 and expected[0, -1] != 0
    assert torch.equal(graded.flatten()[torch.arange(8) != 3], expected.flatten()[torch.arange(8) != 3])
    with pytest.raises(BadInput, match="0 clips for 1 placeholders"):
        omni(torch.tensor([[1, P, 2]]), torch.tensor([[1, 2, 3]]))


def test_features_without_a_frame_are_silence() -> None:
    omni = ears(reference()).train()
    nothing = Features(torch.zeros(2, 0, 80), torch.tensor([0, 0]))
    assert torch.equal(omni(IDX, TARGETS, audio_features=nothing), omni(IDX, TARGETS))
    omni(IDX, TARGETS, audio_features=nothing).backward()
    assert omni.projector.fc1.weight.grad is not None


# ---- casts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [lambda omni: omni.to(torch.bfloat16), lambda omni: omni.half().bfloat16()])
def test_a_cast_leaves_what_trains_in_fp32(cast: Callable[[OmniGPT], OmniGPT]) -> None:
    """nanochat's linear layers cast their weights to the activation's dtype, so a GPT in bf16 runs beside fp32 masters."""
    omni = ears(reference(), value_embeds="learned")
    omni.add_lora(4)
    trained(omni)
    omni(IDX, TARGETS, waves(0.4, 0.25)).backward()
    parameters = [p for group in omni.trainable_parameters() for p in group["params"]]
    before = [(p, p.detach().clone(), p.grad.clone()) for p in parameters]
    expected = logits(omni)
    assert cast(omni) is omni
    assert {p.dtype for p in omni.gpt.parameters() if not p.requires_grad} == {torch.bfloat16}
    for now, (then, value, gradient) in zip([p for g in omni.trainable_parameters() for p in g["params"]], before):
        assert now is then and torch.equal(now, value) and now.dtype == torch.float32 and torch.equal(now.grad, gradient)
    # bf16 rounds to 2⁻⁸ at some ten places between here and logits of order 1: within 0.1 of their size
    assert (logits(omni) - expected).norm() < 0.1 * expected.norm()
    omni(IDX, TARGETS, waves(0.4, 0.25)).backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in parameters)
    assert omni.to("cpu", torch.float64).projector.fc1.weight.dtype == torch.float32


class Foreign(LogMelEncoder):
    """An encoder the library does not know."""


def test_an_unknown_encoder_has_to_be_passed(tmp_path: Path) -> None:
    omni = OmniGPT(reference(), (Foreign(), Projector(80, 32)))
    omni.save_adapter(tmp_path / "a")
    with pytest.raises(BadInput, match="trained with Foreign; expected one of LogMelEncoder, WhisperEncoder"):
        OmniGPT.load_adapter(tmp_path / "a", reference())
    OmniGPT.load_adapter(tmp_path / "a", reference(), encoder=Foreign())


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "message"), [
    (lambda gpt: OmniGPT(gpt, (LogMelEncoder(), Projector(64, 32))), "a projector for features 64 wide; expected 80"),
    (lambda gpt: OmniGPT(gpt, (LogMelEncoder(), Projector(80, 48))), "a projector to 48; expected 32"),
    (lambda gpt: OmniGPT(gpt, (nn.Linear(2, 2), Projector(80, 32))), "an encoder of type Linear; expected an AudioEncoder"),
    (lambda gpt: OmniGPT(gpt, (LogMelEncoder(), Projector(80, 32)), placeholders={"video": 3}), r"placeholders for \['video'\]"),
])
def test_what_cannot_be_joined(build: Callable[[GPT], OmniGPT], message: str) -> None:
    gpt = reference()
    torch.manual_seed(0)
    before = fingerprint(gpt)
    with pytest.raises(BadInput, match=message):
        build(gpt)
    torch.manual_seed(0)
    assert fingerprint(gpt) == before


def test_sound_that_cannot_be_heard() -> None:
    omni, sound = ears(reference()), waves(0.4, 0.25)
    inputs = omni.encoder.preprocess(sound)
    with pytest.raises(BadInput, match="audio and audio_inputs; expected one form"):
        omni(IDX, None, sound, audio_inputs=inputs)
    for wrong in (sound[:1], [], [None] * 3):
        with pytest.raises(BadInput, match=f"{len(wrong)} clips for 2 rows"):
            omni(IDX, None, wrong)
    with pytest.raises(BadInput, match="width 80"):
        omni(IDX, None, audio_features=Features(torch.zeros(2, 3, 8), torch.tensor([3, 3])))
    placed = ears(reference(), placeholders={"audio": P})
    for form in ({}, {"audio": []}):
        with pytest.raises(BadInput, match="0 clips for 1 placeholders"):
            placed(torch.tensor([[1, P, 2]]), None, **form)
    with pytest.raises(BadInput, match="1 clips that are None"):
        placed(torch.tensor([[P, 1], [2, P]]), None, [sound[0], None])
    assert torch.equal(omni(IDX, None, sound), omni(IDX, None, audio_inputs=inputs))  # and nothing has changed
