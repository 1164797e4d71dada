"""Ears and eyes in one GPT: each clip stands where its placeholder stands, and one file holds both projectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import fingerprint, nano_gpt, reference, tiny_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from patches import Eyes, Patches
from test_model import IDX, TARGETS, ears, trained, waves
from torch import Tensor

from omni_adapters import Features, OmniGPT, Projector, SoftTokenPrepender
from omni_adapters.anatomy import logits_of, loss_of
from omni_adapters.checkpoint import load_adapter
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.encoders.protocol import AudioEncoder, Encoder
from omni_adapters.model_card import model_card
from omni_adapters.shapes import BadInput

P, Q = 60, 61  # placeholder ids of sound and of images, in no prompt
BOTH = {"audio": P, "image": Q}


def images(*sides: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.rand(3, side, side, generator=rng) for side in sides]


def senses(gpt: Any = None, eyes: Any = None, **options: Any) -> OmniGPT:
    torch.manual_seed(0)
    encoder = LogMelEncoder()
    encoder.fit_statistics(encoder.preprocess(waves(0.5, 0.3)))
    gpt = reference() if gpt is None else gpt
    table = gpt.get_input_embeddings() if hasattr(gpt, "get_input_embeddings") else gpt.transformer["wte"]
    width = table.weight.size(1)
    return OmniGPT(gpt, (encoder, Projector(80, width, 16, stack=12, zero_init=False)),
                   image=(Eyes() if eyes is None else eyes, Projector(48, width, 8, stack=2, zero_init=False)),
                   placeholders=BOTH, **options)


def by_hand(omni: OmniGPT, sound: list[Tensor], sights: list[Tensor]) -> dict[int, Features]:
    image = omni.image_encoder
    return {P: omni.projector(omni.encoder(omni.encoder.preprocess(sound))),
            Q: omni.image_projector(image(image.preprocess(sights)))}


MIXED = torch.tensor([[1, P, 2, Q, 3], [Q, 4, Q, 5, P]])


def test_each_clip_stands_at_its_own_placeholder_in_all_forms() -> None:
    omni, sound, sights = senses().eval(), waves(0.4, 0.25), images(8, 12, 4)
    expected = SoftTokenPrepender(reference().requires_grad_(False))(MIXED, None, by_hand(omni, sound, sights))
    inputs, seen = omni.encoder.preprocess(sound), omni.image_encoder.preprocess(sights)
    for form in ({"audio": sound, "image": sights}, {"audio_inputs": inputs, "image_inputs": seen},
                 {"audio_features": omni.encoder(inputs), "image_features": omni.image_encoder(seen)},
                 {"audio": sound, "image_features": omni.image_encoder(seen)}):
        assert torch.equal(omni(MIXED, **form), expected)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.sampled_from([3, 5, P, Q]), min_size=4, max_size=4), min_size=1, max_size=3))
def test_any_mix_of_sound_images_and_text_is_what_the_prepender_makes_of_it(rows: list[list[int]]) -> None:
    idx, omni = torch.tensor(rows), senses().eval()
    heard, seen = int((idx == P).sum()), int((idx == Q).sum())
    sound, sights = waves(*[0.3] * heard), images(*[4, 8, 12, 4] * 3)[:seen]
    clips = {}
    if heard:
        clips[P] = omni.projector(omni.encoder(omni.encoder.preprocess(sound)))
    if seen:
        clips[Q] = omni.image_projector(omni.image_encoder(omni.image_encoder.preprocess(sights)))
    expected = SoftTokenPrepender(reference().requires_grad_(False))(idx, None, clips or None)
    assert torch.equal(omni(idx, None, sound or None, image=sights or None), expected)


@pytest.mark.parametrize("build", [reference, nano_gpt, tiny_hf])
@pytest.mark.parametrize("seen", ["sound", "image", "nothing"])
def test_a_sense_without_a_signal_has_a_gradient_of_zero(build: Any, seen: str) -> None:
    """Zero, not None: DDP waits for every parameter; and the loss is what it is without that sense."""
    omni = senses(build().train(), value_embeds="learned").train()
    idx = {"sound": torch.tensor([[1, P, 2, 3]]), "image": torch.tensor([[1, 2, Q, 3]]), "nothing": IDX[:1]}[seen]
    given_ = {"sound": {"audio": waves(0.4)}, "image": {"image": images(8)}, "nothing": {}}[seen]
    hand = by_hand(omni, waves(0.4), images(8))
    clips = {"sound": {P: hand[P]}, "image": {Q: hand[Q]}, "nothing": None}[seen]
    plain = SoftTokenPrepender(build().train().requires_grad_(False))
    loss = loss_of(omni(idx, TARGETS[:1], **given_))
    assert torch.equal(loss, loss_of(plain(idx, TARGETS[:1], clips)))
    loss.backward()
    for name, tensor in omni.trained().items():
        if tensor.requires_grad:
            used = name.startswith({"sound": "projector", "image": "image_projector", "nothing": "-"}[seen])
            assert tensor.grad is not None and (bool(tensor.grad.any()) == used or name.startswith("side_rows")), name
    logits_of(omni(idx, **given_)).square().mean().backward()  # a distillation loss is made of logits
    assert not logits_of(omni.eval()(IDX)).requires_grad


def test_a_placeholder_without_its_clip_is_refused_whichever_sense_it_is() -> None:
    omni = senses()
    for mode in (omni.train, omni.eval):
        mode()
        for idx, given_ in ((torch.tensor([[1, Q]]), {}), (torch.tensor([[P, Q]]), {"audio": waves(0.4)}),
                            (torch.tensor([[1, P]]), {"image": images(4)})):
            with pytest.raises(BadInput, match="0 clips for 1 placeholders"):
                omni(idx, None, **given_)


def test_it_generates_what_the_prepender_generates() -> None:
    omni, sound, sights = senses().eval(), waves(0.4), images(8)
    expected = list(omni.prepender.generate([1, P, 2, Q], by_hand(omni, sound, sights), max_tokens=6, temperature=0.7, seed=3))
    assert list(omni.generate([1, P, 2, Q], sound, image=sights, max_tokens=6, temperature=0.7, seed=3)) == expected


def test_compiled_in_one_graph() -> None:
    omni = senses()
    omni.prepender.pad_to = 64
    omni.add_lora(4)
    given_ = {"audio_features": omni.encoder(omni.encoder.preprocess(waves(0.4, 0.25))),
              "image_features": omni.image_encoder(omni.image_encoder.preprocess(images(8, 12, 4)))}
    targets = torch.where(MIXED.roll(-1, 1) >= P, -1, MIXED.roll(-1, 1))
    expected = omni(MIXED, targets, **given_)
    loss = torch.compile(omni, backend="aot_eager", fullgraph=True, dynamic=False)(MIXED, targets, **given_)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert all(p.grad is not None for group in omni.trainable_parameters() for p in group["params"])


def test_both_encoders_are_frozen_and_stay_in_evaluation_and_both_projectors_train() -> None:
    omni = senses().train()
    assert not omni.image_encoder.drop.training and not any(p.requires_grad for p in omni.image_encoder.parameters())
    groups = {group["name"]: group for group in omni.trainable_parameters()}
    assert {name: group["lr"] for name, group in groups.items()} == {"projector": 1e-3, "image_projector": 1e-3}
    omni.add_lora(4)
    groups = {group["name"]: group for group in omni.trainable_parameters()}
    assert {name: group["lr"] for name, group in groups.items()} == {"projector": 2e-5, "image_projector": 2e-5, "lora": 2e-4}
    omni.bfloat16()
    assert {p.dtype for p in omni.image_projector.parameters()} == {torch.float32}
    torch.optim.AdamW(omni.trainable_parameters()).step()


@pytest.mark.parametrize("eyes", [Eyes, Patches], ids=["weights", "fitted statistics"])
def test_an_adapter_comes_back_bit_for_bit(tmp_path: Path, eyes: Any) -> None:
    encoder = eyes()
    encoder.mean.fill_(0.25)
    omni = senses(eyes=encoder)
    omni.add_lora(3)
    trained(omni).save_adapter(tmp_path / "a")
    assert ("image_encoder.mean" in omni.trained()) == (eyes is Patches)
    gpt, own = reference(), eyes()
    own.mean.fill_(0.25 if eyes is Eyes else 0)
    again = OmniGPT.load_adapter(tmp_path / "a", gpt, image_encoder=own)
    assert again.description() == omni.description()
    assert {n: t.tolist() for n, t in again.trained().items()} == {n: t.tolist() for n, t in omni.trained().items()}
    assert torch.equal(again.eval()(MIXED, None, waves(0.4, 0.25), image=images(8, 12, 4)),
                       omni.eval()(MIXED, None, waves(0.4, 0.25), image=images(8, 12, 4)))
    if eyes is Patches:
        assert not own.mean.any()  # the user's own encoder keeps its statistics
    again.remove()
    assert fingerprint(gpt)["bits"] == fingerprint(reference())["bits"]


@pytest.mark.parametrize(("options", "message"), [
    ({}, "an adapter trained with eyes, Eyes; expected its encoder"),
    ({"image_encoder": Eyes(seed=1)}, r"image_encoder\.sha256"),
    ({"image_encoder": Patches()}, r"image_encoder\.(sha256|type)"),
    ({"image_encoder": object()}, "an encoder of type object; expected an Encoder"),
])
def test_other_eyes_are_refused_and_nothing_changes(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    senses().save_adapter(tmp_path / "a")
    gpt = reference()
    torch.manual_seed(0)
    before = fingerprint(gpt)
    with pytest.raises(BadInput, match=message):
        OmniGPT.load_adapter(tmp_path / "a", gpt, **options)
    torch.manual_seed(0)
    assert fingerprint(gpt) == before


def test_ears_alone_have_the_description_they_always_had(tmp_path: Path) -> None:
    """A file without eyes says nothing of them: versions before them read it."""
    omni = ears(reference())
    omni.save_adapter(tmp_path / "a")
    tensors, description = load_adapter(tmp_path / "a")
    assert set(description) == {"host", "encoder", "projector", "value_embeds", "insert_at", "placeholders", "lora"}
    assert set(tensors) == {"projector.fc1.weight", "projector.fc2.weight", "encoder.mean", "encoder.std"}
    with pytest.raises(BadInput, match="an image_encoder for an adapter of ears alone"):
        OmniGPT.load_adapter(tmp_path / "a", reference(), image_encoder=Eyes())
    with pytest.raises(BadInput, match="an image; expected a GPT with eyes"):
        omni(IDX, None, image=images(4, 4))


def sighted(placeholders: Any, image: Any = None) -> OmniGPT:
    eyes = (Eyes(), Projector(48, 32)) if image is None else image
    return OmniGPT(reference(), (LogMelEncoder(), Projector(80, 32)), eyes, placeholders=placeholders)


@pytest.mark.parametrize(("build", "message"), [
    (lambda: sighted(None), "no placeholders for two senses; expected {'audio': id, 'image': id}"),
    (lambda: sighted({"audio": P}), r"placeholders for \['audio'\]; expected {'audio': id, 'image': id}"),
    (lambda: sighted({"audio": P, "image": P}), "an id of its own for each sense"),
    (lambda: sighted(BOTH, (Eyes(), Projector(80, 32))), "a projector for features 80 wide; expected 48"),
    (lambda: sighted(BOTH, (Eyes(), Projector(48, 64))), "a projector to 64; expected 32"),
    (lambda: sighted(BOTH)(MIXED, image=images(8), image_features=Features(torch.zeros(1, 1, 48), torch.ones(1).long())),
     "image and image_features; expected one form of image"),
    (lambda: sighted(BOTH)(MIXED, None, waves(0.4, 0.4), image=[None, *images(8, 8)]), "1 clips that are None"),
])
def test_what_is_refused(build: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        build()


@pytest.mark.parametrize(("audio", "error"), [
    (LogMelEncoder(), TypeError), ((LogMelEncoder(), torch.nn.Linear(80, 32)), BadInput), ((LogMelEncoder(), None), BadInput)])
def test_whatever_is_wrong_the_gpt_is_as_it_came(audio: Any, error: type[Exception]) -> None:
    gpt = reference()
    torch.manual_seed(0)
    before = fingerprint(gpt)
    with pytest.raises(error):
        OmniGPT(gpt, audio)
    torch.manual_seed(0)
    assert fingerprint(gpt) == before
    OmniGPT(gpt, (LogMelEncoder(), Projector(80, 32)))


@pytest.mark.parametrize("values", [torch.zeros(0, 5, 80), torch.zeros(2, 0, 7), torch.zeros(2, 5, 80)[:, :0, :3]])
def test_features_without_a_frame_still_have_a_form(values: Tensor) -> None:
    with pytest.raises(BadInput, match=r"0 rows of features for 2 rows of idx|expected width 80"):
        ears(reference())(IDX, None, audio_features=Features(values, torch.zeros(len(values), dtype=torch.int64)))


def test_an_encoder_of_images_is_an_encoder_but_does_not_hear() -> None:
    assert isinstance(Eyes(), Encoder) and not isinstance(Eyes(), AudioEncoder) and isinstance(LogMelEncoder(), Encoder)


def test_what_people_read() -> None:
    omni = senses()
    text = omni.describe()
    assert "encoder    image: Eyes: 2,352 parameters, frozen" in text
    assert "projector  image: 48 × 2 → 32: 1,024 parameters" in text
    card = model_card("me/senses", omni.description(), {name: t.shape for name, t in omni.trained().items()})
    assert "lets a GPT hear and see" in card and ", image_encoder=image_encoder)" in card and f"at each id {Q}" in card
