"""The convolutional encoder: its equation, a clip alone and in a batch, saving and loading; and the heads that teach it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_adapters import Features, OmniGPT, Projector
from omni_adapters.encoders.conv import ConvEncoder
from omni_adapters.encoders.protocol import AudioEncoder
from omni_adapters.encoders.weights import WeightsUnavailable
from omni_adapters.fingerprints import describe_encoder
from omni_adapters.reference_gpt import GPT, GPTConfig
from omni_adapters.shapes import BadInput
from omni_adapters.training.acoustic import UNKNOWN, AcousticHeads
from omni_adapters.training.sources import open_encoder

RATE = 16_000  # Hz


def noise(num_samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


def tiny(seed: int = 0) -> ConvEncoder:
    torch.manual_seed(seed)
    encoder = ConvEncoder(width=16, num_blocks=2, kernel=5)
    encoder.frontend.fit_statistics(encoder.preprocess([noise(8000, seed)]))
    return encoder


def plain(encoder: ConvEncoder, waveform: Tensor) -> Tensor:
    """One clip, each convolution written out frame by frame: (T, width)."""

    def convolved(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
        half = weight.size(2) // 2
        padded = F.pad(x, (0, 0, half, half))  # zeros before and after
        frames = [torch.einsum("oik,ki->o", weight, padded[t : t + 2 * half + 1]) + bias for t in range(0, len(x), stride)]
        return torch.stack(frames)

    x = encoder.frontend(encoder.frontend.preprocess([waveform])).values[0]
    first, second = encoder.subsample
    x = convolved(x, first.weight, first.bias, 2)
    x = convolved(F.gelu(x), second.weight, second.bias, 2)
    for block in encoder.blocks:
        alone = torch.diag_embed(block.depthwise.weight[:, 0].T).permute(1, 2, 0)  # each channel sees itself
        mixed = block.norm(convolved(x, alone, block.depthwise.bias, 1))
        x = x + F.gelu(mixed @ block.up.weight.T + block.up.bias) @ block.down.weight.T + block.down.bias
    return encoder.norm(x)


@pytest.mark.parametrize("num_samples", [1, 160, 640, 641, 5000])
@torch.no_grad()
def test_equals_its_equation(num_samples: int) -> None:
    """Sums of at most 585 products of order 1, normed: 2e-5 is some hundred times fp32's step."""
    encoder, samples = tiny(), noise(num_samples, 1)
    got = encoder(encoder.preprocess([samples]))
    frames = (num_samples + 639) // 640  # 40 ms each
    assert got.lens.tolist() == [frames] and got.values.shape == (1, frames, 16)
    torch.testing.assert_close(got.values[0], plain(encoder, samples), rtol=0, atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=5))
@torch.no_grad()
def test_a_clip_alone_equals_the_clip_in_a_batch(sizes: list[int]) -> None:
    encoder, clips = tiny(), [noise(size, size) for size in sizes]
    inputs = encoder.preprocess(clips)
    for row, length in enumerate(inputs.lens.tolist()):
        inputs.values[row, :, length:] = 1e3  # padding may hold anything
    batch = encoder(inputs)
    for row, samples in enumerate(clips):
        alone = encoder(encoder.preprocess([samples]))
        torch.testing.assert_close(alone.values[0], batch.values[row, : alone.lens[0]], rtol=0, atol=1e-5)


def test_it_is_an_audio_encoder_that_learns_until_it_is_loaded(tmp_path: Path) -> None:
    encoder = tiny()
    assert isinstance(encoder, AudioEncoder) and encoder.source is None
    assert (encoder.d_model, encoder.frame_rate, encoder.sampling_rate) == (16, 25.0, RATE)
    encoder(encoder.preprocess([noise(4000)])).values.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters()
               if parameter is not encoder.norm.bias)
    encoder.save(tmp_path / "new" / "ears")
    assert encoder.source == str(tmp_path / "new" / "ears")
    again = open_encoder(str(tmp_path / "new" / "ears"))
    assert isinstance(again, ConvEncoder) and again.source is not None and not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    inputs = encoder.preprocess([noise(4000)])
    assert torch.equal(again(inputs).values, encoder(inputs).values)
    assert describe_encoder(again)["sha256"] == describe_encoder(encoder)["sha256"] is not None


@torch.no_grad()
def test_in_bfloat16_it_hears_much_the_same(tmp_path: Path) -> None:
    """Normed features of order 1 after a dozen roundings of 2⁻⁹ each."""
    encoder = tiny()
    encoder.save(tmp_path / "ears")
    half = ConvEncoder.load(tmp_path / "ears", dtype=torch.bfloat16)
    inputs = encoder.preprocess([noise(4000)])
    assert half(inputs).values.dtype == torch.bfloat16
    for name in ("mean", "std"):
        assert torch.equal(getattr(half.frontend, name), getattr(encoder.frontend, name))  # in float32, to the last bit
    torch.testing.assert_close(half(inputs).values.float(), encoder(inputs).values, rtol=0, atol=0.1)
    assert AcousticHeads(16, 3, {"style": 2})(half(inputs))[0].dtype == torch.float32


def tiny_gpt() -> GPT:
    return GPT(GPTConfig(sequence_len=64, vocab_size=64, n_layer=2, n_head=1, n_kv_head=1, n_embd=32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_adapter_in_any_dtype_finds_it_again_wherever_both_are_moved(dtype: torch.dtype, tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny().save("run/ears")
    gpt, waves, idx = tiny_gpt(), [noise(5000), noise(3000, 1)], torch.tensor([[1, 2], [3, 4]])
    omni = OmniGPT(gpt, (ConvEncoder.load("run/ears"), Projector(16, 32, stack=3, zero_init=False))).to(dtype)
    expected = omni(idx, audio=waves)
    omni.save_adapter("run/adapter.safetensors")
    omni.remove()
    Path("run").rename("elsewhere")
    monkeypatch.chdir("/")
    again = OmniGPT.load_adapter(tmp_path / "elsewhere" / "adapter.safetensors", gpt)
    assert torch.equal(again(idx, audio=waves), expected)


def test_an_adapter_is_not_saved_without_its_ears(tmp_path: Path) -> None:
    omni = OmniGPT(tiny_gpt(), (tiny(), Projector(16, 32)))
    with pytest.raises(BadInput, match=r"saved nowhere.*omni\.encoder\.save"):
        omni.save_adapter(tmp_path / "adapter.safetensors")
    assert not list(tmp_path.iterdir())
    omni.encoder.save(tmp_path / "ears")
    omni.save_adapter(tmp_path / "adapter.safetensors")


def test_an_adapter_finds_it_again(tmp_path: Path) -> None:
    tiny().save(tmp_path / "ears")
    gpt = tiny_gpt()
    encoder, waves, idx = ConvEncoder.load(tmp_path / "ears"), [noise(5000), noise(3000, 1)], torch.tensor([[1, 2], [3, 4]])
    omni = OmniGPT(gpt, (encoder, Projector(16, 32, stack=3, zero_init=False)))
    expected = omni(idx, audio=waves)
    omni.save_adapter(tmp_path / "adapter.safetensors")
    omni.remove()
    again = OmniGPT.load_adapter(tmp_path / "adapter.safetensors", gpt)
    assert torch.equal(again(idx, audio=waves), expected)
    again.remove()
    tiny(seed=1).save(tmp_path / "ears")  # others in their place
    with pytest.raises(BadInput, match="sha256"):
        OmniGPT.load_adapter(tmp_path / "adapter.safetensors", gpt)


def test_what_is_no_such_encoder_is_refused(tmp_path: Path) -> None:
    for sizes in ({"width": 0}, {"kernel": 4}, {"num_blocks": 1.5}):
        with pytest.raises(BadInput, match="ConvEncoder"):
            ConvEncoder(**sizes)  # type: ignore[arg-type]
    with pytest.raises(WeightsUnavailable, match="ConvEncoder"):
        ConvEncoder.load(tmp_path / "nowhere")
    tiny().save(tmp_path / "ears")
    config = tmp_path / "ears" / "config.json"
    sizes = json.loads(config.read_text())
    config.write_text(json.dumps(sizes | {"width": 24}))
    with pytest.raises(BadInput, match="disagrees with its config"):
        ConvEncoder.load(tmp_path / "ears")
    config.write_text(json.dumps(sizes | {"depth": 3}))
    with pytest.raises(BadInput, match=r"Was it written by ConvEncoder\.save"):
        ConvEncoder.load(tmp_path / "ears")
    config.write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(BadInput, match="Was it written"):
        ConvEncoder.load(tmp_path / "ears")
    with pytest.raises(BadInput, match="'omni_conv'"):
        open_encoder(str(tmp_path / "ears"))


# ---- heads -----------------------------------------------------------------------------------------------------------------


def features(seed: int = 0, lens: tuple[int, ...] = (9, 6, 4), width: int = 8) -> Features:
    values = torch.randn(len(lens), max(lens), width, generator=torch.Generator().manual_seed(seed))
    return Features(values, torch.tensor(lens))


def test_the_loss_is_ctc_and_a_mean_over_known_tags() -> None:
    torch.manual_seed(0)
    heads, heard = AcousticHeads(8, 5, {"style": 3, "tone": 2}), features()
    events, tags = [[0, 4, 4], [2], [1, 3]], {"style": torch.tensor([2, UNKNOWN, 0]), "tone": torch.tensor([UNKNOWN, 1, UNKNOWN])}
    classes, logits = heads(heard)
    assert (classes.shape, logits["style"].shape, logits["tone"].shape) == ((3, 9, 6), (3, 3), (3, 2))
    ctc = torch.stack([F.ctc_loss(classes[row, : heard.lens[row]], torch.tensor([each]) + 1, heard.lens[row : row + 1],
                                  torch.tensor([len(each)]), blank=0) for row, each in enumerate(events)]).mean()
    style = [-logits["style"].log_softmax(-1)[0, 2], -logits["style"].log_softmax(-1)[2, 0]]
    tone = -logits["tone"].log_softmax(-1)[1, 1]
    torch.testing.assert_close(heads.loss(heard, events, tags), ctc + (sum(style) + tone) / 3)
    weighed = heads.loss(heard, events, tags, {"tone": 4.0}, tagging=0.5)
    torch.testing.assert_close(weighed, ctc + 0.5 * (sum(style) + 4 * tone) / 6)
    unknown = dict.fromkeys(tags, torch.full((3,), UNKNOWN))
    torch.testing.assert_close(heads.loss(heard, events, unknown), ctc)


def test_heads_look_at_nothing_beyond_a_clip() -> None:
    torch.manual_seed(0)
    heads, heard = AcousticHeads(8, 5, {"style": 3}), features()
    classes, logits = heads(heard)
    noisy = heard.values.clone()
    for row, length in enumerate(heard.lens.tolist()):
        noisy[row, length:] = torch.nan
    other = heads(Features(noisy, heard.lens))
    assert torch.equal(other[1]["style"], logits["style"])
    for row, length in enumerate(heard.lens.tolist()):
        assert torch.equal(other[0][row, :length], classes[row, :length])
        alone = heads(Features(heard.values[row : row + 1, :length], heard.lens[row : row + 1]))
        torch.testing.assert_close(alone[1]["style"][0], logits["style"][row])


def test_an_encoder_learns_what_is_asked_of_it() -> None:
    """Two tones in either order: their names in order by CTC, whether the first is high as a tag."""
    torch.manual_seed(0)
    time = torch.arange(4800) / RATE
    tones = [0.3 * torch.sin(2 * torch.pi * hertz * time) for hertz in (300, 2000)]
    order = [[0, 1], [1, 0], [0, 0], [1, 1]]
    encoder = ConvEncoder(width=32, num_blocks=1, kernel=5)
    inputs = encoder.preprocess([torch.cat([tones[first], torch.zeros(1600), tones[second]]) for first, second in order])
    encoder.frontend.fit_statistics(inputs)
    heads, tags = AcousticHeads(32, 2, {"first": 2}), {"first": torch.tensor([0, 1, 0, 1])}
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], 3e-3)
    for _ in range(150):
        loss = heads.loss(encoder(inputs), order, tags)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    classes, logits = heads(encoder(inputs))
    assert logits["first"].argmax(-1).tolist() == [0, 1, 0, 1]
    found = [torch.unique_consecutive(row).tolist() for row in classes.argmax(-1)]
    assert [[one - 1 for one in row if one] for row in found] == order


@pytest.mark.parametrize("events, tags", [
    ([[0]], {"style": torch.zeros(3, dtype=torch.long)}), ([[0]] * 3, {"style": torch.zeros(2, dtype=torch.long)}),
    ([[0]] * 3, {"accent": torch.zeros(3, dtype=torch.long)})])
def test_labels_that_do_not_fit_are_refused(events: list[list[int]], tags: dict[str, Tensor]) -> None:
    with pytest.raises(BadInput, match=r"AcousticHeads\.loss"):
        AcousticHeads(8, 5, {"style": 3}).loss(features(), events, tags)
    with pytest.raises(BadInput, match="AcousticHeads"):
        AcousticHeads(8, 0, {})


@pytest.mark.parametrize("events, tags, weights", [
    ([[5], [0], [0]], {}, None), ([[-1], [0], [0]], {}, None), ([[10**6], [0], [0]], {}, None),
    ([[0]] * 3, {"style": torch.tensor([0, 3, 0])}, None), ([[0]] * 3, {"style": torch.tensor([0, -2, 0])}, None),
    ([[0]] * 3, {"style": torch.tensor([0, 1, 0])}, {"typo": 9.0})])
def test_labels_out_of_range_are_refused(events: list[list[int]], tags: dict[str, Tensor],
                                         weights: dict[str, float] | None) -> None:
    with pytest.raises(BadInput, match=r"AcousticHeads\.loss"):
        AcousticHeads(8, 5, {"style": 3}).loss(features(), events, tags, weights)


def test_a_clip_without_frames_teaches_nothing_and_breaks_nothing() -> None:
    torch.manual_seed(0)
    heads, heard = AcousticHeads(8, 5, {"style": 3}), features(lens=(4, 0))
    heads.loss(heard, [[1], []], {"style": torch.tensor([2, UNKNOWN], dtype=torch.int32)}).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in heads.parameters())
