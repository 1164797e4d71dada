"""The frozen Whisper encoder against transformers' own, on a tiny random checkpoint."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_whisper import make_tiny_whisper
from torch import nn
from transformers import WhisperFeatureExtractor, WhisperModel

from omni_adapters.encoders.protocol import AudioEncoder
from omni_adapters.encoders.weights import WeightsUnavailable
from omni_adapters.encoders.whisper import WhisperEncoder, candidates
from omni_adapters.features import Features
from omni_adapters.shapes import BadInput

RATE = 16_000        # Hz
LIMIT = 30 * RATE    # samples


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return WhisperEncoder(checkpoint)


def clip(num_samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


def test_is_an_audio_encoder(encoder, checkpoint):
    assert isinstance(encoder, AudioEncoder)
    assert (encoder.sampling_rate, encoder.d_model, encoder.frame_rate, encoder.n_mels) == (RATE, 64, 50.0, 80)
    assert encoder.source == str(checkpoint)


def test_bit_identical_to_transformers(encoder, checkpoint):
    clips = [clip(LIMIT), clip(123_456, seed=1)]
    model = WhisperModel.from_pretrained(checkpoint).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(checkpoint)
    mel = extractor([c.numpy() for c in clips], sampling_rate=RATE, return_tensors="pt")["input_features"]
    with torch.no_grad():
        expected = model.encoder(mel).last_hidden_state
    inputs = encoder.preprocess(clips)
    got = encoder(inputs)
    assert torch.equal(inputs.values, mel)
    assert got.values.shape == (2, 1500, 64) and torch.equal(got.values, expected)
    assert inputs.lens.tolist() == [3000, 772] and got.lens.tolist() == [1500, 386]
    assert got.values.std() > 0.1


def test_frozen_from_birth_and_after_a_parent_trains(encoder):
    parent = nn.Sequential(nn.Linear(2, 2), copy.deepcopy(encoder))
    inputs = encoder.preprocess([clip(8_000)])
    before = parent[1](inputs).values
    parent.train()
    assert parent[0].training and not any(module.training for module in parent[1].modules())
    assert torch.equal(parent[1](inputs).values, before)  # dropout 0.1 of the checkpoint would show
    assert not any(parameter.requires_grad for parameter in parent[1].parameters())
    assert any(parameter.requires_grad for parameter in parent.parameters())


def test_no_graph_behind_the_features_and_one_may_follow(encoder):
    inputs = encoder.preprocess([clip(8_000)])
    out = encoder(Features(inputs.values.requires_grad_(), inputs.lens)).values
    assert out.grad_fn is None and not out.requires_grad and not out.is_inference()
    projector = nn.Linear(64, 3)
    projector(out).square().sum().backward()
    assert projector.weight.grad is not None and projector.weight.grad.abs().sum() > 0


@settings(max_examples=10, deadline=None)
@given(st.integers(1, LIMIT))
def test_mel_lens_count_started_hops(encoder, size):
    inputs = encoder.preprocess([torch.zeros(size), torch.zeros(LIMIT + 1 - size)])
    assert inputs.values.shape == (2, 80, 3000) and inputs.lens.dtype == torch.int64
    assert inputs.lens.tolist() == [(size + 159) // 160, (LIMIT + 160 - size) // 160]


def test_an_odd_mel_frame_has_an_encoder_frame_of_its_own(encoder):
    lens = torch.tensor([0, 1, 2, 3, 2999, 3000])
    out = encoder(Features(torch.zeros(1, 80, 3000).expand(6, -1, -1), lens))
    assert out.lens.tolist() == [0, 1, 1, 2, 1500, 1500] and out.lens.dtype == torch.int64


def test_a_row_in_a_ragged_batch_equals_the_clip_alone(encoder):
    """The same sums in kernels blocked for another batch: a few float32 roundings of values of order 1."""
    clips = [clip(size, seed=size) for size in (1, 16_000, 47_999)]
    batch = encoder(encoder.preprocess(clips))
    for row, samples in enumerate(clips):
        alone = encoder(encoder.preprocess([samples.numpy()]))
        assert alone.lens[0] == batch.lens[row]
        torch.testing.assert_close(alone.values[0], batch.values[row], rtol=0, atol=1e-5)
    assert (batch.values[1] - batch.values[2]).abs().max() > 0.01


def test_sound_beyond_30_s_is_refused_with_both_numbers(encoder):
    with pytest.raises(BadInput) as caught:
        encoder.preprocess([clip(10), torch.zeros(LIMIT + 160)])
    for words in ("clip 1 of 30.01 s (480160 samples)", "at most 30 s (480000 samples)"):
        assert words in str(caught.value)


@pytest.mark.parametrize("waveform", [np.zeros(9, np.int16), torch.zeros(0), torch.full((9,), float("nan"))])
def test_bad_waveforms_name_the_encoder(encoder, waveform):
    with pytest.raises(BadInput, match=r"WhisperEncoder\.preprocess: got .*clip 0"):
        encoder.preprocess([waveform])


@pytest.mark.parametrize("values", [torch.zeros(1, 80, 2000), torch.zeros(1, 128, 3000), torch.zeros(2, 80, 3000)])
def test_foreign_inputs_are_refused(encoder, values):
    with pytest.raises(BadInput, match=r"expected values \(B, 80, 3000\)"):
        encoder(Features(values, torch.tensor([5])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_of_weights_and_features(checkpoint, encoder, dtype):
    other = WhisperEncoder(checkpoint, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in other.parameters()} == {dtype}
    inputs = encoder.preprocess([clip(16_000)])
    got, expected = other(inputs).values, encoder(inputs).values
    assert got.dtype == dtype
    tolerance = {torch.bfloat16: 0.1, torch.float64: 1e-4}[dtype]  # 2 layers of roundings by 2⁻⁹ or 2⁻²⁴, values to 4
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=tolerance)


def test_half_precision_checkpoints_become_float32(checkpoint, tmp_path):
    WhisperModel.from_pretrained(checkpoint).to(torch.bfloat16).save_pretrained(tmp_path)
    shutil.copy(checkpoint / "preprocessor_config.json", tmp_path)
    assert {parameter.dtype for parameter in WhisperEncoder(tmp_path).parameters()} == {torch.float32}


def test_only_the_encoder_is_held_sharded_or_not(checkpoint, encoder, tmp_path):
    WhisperModel.from_pretrained(checkpoint).save_pretrained(tmp_path, max_shard_size="200KB")
    shutil.copy(checkpoint / "preprocessor_config.json", tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    sharded = WhisperEncoder(tmp_path)
    assert not any("decoder" in name for name in sharded.state_dict())
    assert sharded.state_dict().keys() == encoder.state_dict().keys()
    assert all(torch.equal(sharded.state_dict()[name], tensor) for name, tensor in encoder.state_dict().items())


def test_random_state_is_left_alone(checkpoint):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    WhisperEncoder(checkpoint)
    assert torch.equal(torch.rand(4), expected)


def damaged(checkpoint, directory, damage):
    shutil.copytree(checkpoint, directory, dirs_exist_ok=True)
    damage(directory)
    return directory


def drop_a_tensor(directory):
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.encoder.layers.1.fc1.weight"]
    save_file(tensors, directory / "model.safetensors")


def truncate(directory):
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def edit(file, **entries):
    def damage(directory):
        config = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps({**config, **entries}))
    return damage


@pytest.mark.parametrize("damage, words", [
    (drop_a_tensor, ["disagrees with its config on layers.1.fc1.weight"]),
    (truncate, ["model.safetensors, which does not read"]),
    (edit("config.json", encoder_ffn_dim=256), ["layers.0.fc1.weight", "layers.1.fc2.weight"]),
    (edit("config.json", encoder_layers=1), ["layers.1."]),
    (edit("config.json", model_type="wav2vec2"), ["type 'wav2vec2'", "'whisper'"]),
    (edit("preprocessor_config.json", feature_size=128), ["128 mel bins", "80 × 3000"]),
])
def test_checkpoints_that_would_load_wrong_are_refused(checkpoint, tmp_path, damage, words):
    with pytest.raises(BadInput) as caught:
        WhisperEncoder(damaged(checkpoint, tmp_path, damage))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def write(file, text):
    return lambda directory: (directory / file).write_text(text)


@pytest.mark.parametrize("damage, file", [
    (write("config.json", "{"), "config.json"),
    (write("config.json", "[]"), "config.json with a JSON list"),
    (edit("config.json", encoder_attention_heads=7), "config.json"),
    (edit("config.json", d_model="wide"), "config.json"),
    (write("preprocessor_config.json", "{"), "preprocessor_config.json"),
    (write("preprocessor_config.json", "[]"), "preprocessor_config.json with a JSON list"),
    (edit("preprocessor_config.json", feature_size="many"), "preprocessor_config.json"),
    (edit("preprocessor_config.json", hop_length=None), "preprocessor_config.json"),
])
def test_settings_that_do_not_load_name_their_file(checkpoint, tmp_path, damage, file):
    with pytest.raises(BadInput) as caught:
        WhisperEncoder(damaged(checkpoint, tmp_path, damage))
    assert f"{tmp_path / file}" in str(caught.value), str(caught.value)


@pytest.mark.parametrize("length", [-1, 3001, 5000])
def test_lens_beyond_the_mel_are_refused(encoder, length):
    with pytest.raises(BadInput, match=rf"lens\[1\] = {length} .*0 ≤ lens ≤ 3000"):
        encoder(Features(torch.zeros(2, 80, 3000), torch.tensor([3000, length])))


def test_a_file_overwritten_after_loading_changes_nothing(checkpoint, encoder, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    copied = WhisperEncoder(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(bytes((tmp_path / "model.safetensors").stat().st_size))
    assert all(torch.equal(copied.state_dict()[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_directory_without_weights_names_the_file_and_the_ways_out(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsUnavailable) as caught:
        WhisperEncoder(tmp_path)
    message = str(caught.value)
    assert message.startswith("WhisperEncoder: no weights. Tried\n  - ")
    for word in ("preprocessor_config.json", "model.safetensors", "pickled", "WHISPER_HF_ID", "WHISPER_MS_ID",
                 "WHISPER_DIR", "HF_ENDPOINT", "MODELSCOPE_ENDPOINT", "several places"):
        assert word in message


@pytest.mark.parametrize("environment, source, expected", [
    ({}, None, ["hf:openai/whisper-base"]),
    ({"WHISPER_HF_ID": "a/b"}, None, ["hf:a/b"]),
    ({"WHISPER_MS_ID": "c/d"}, None, ["ms:c/d", "hf:openai/whisper-base"]),
    ({"WHISPER_MS_ID": "c/d", "WHISPER_HF_ID": "a/b"}, None, ["ms:c/d", "hf:a/b"]),
    ({"WHISPER_MS_ID": "", "WHISPER_HF_ID": "", "WHISPER_DIR": ""}, None, ["hf:openai/whisper-base"]),
    ({"WHISPER_DIR": "here/it/is"}, None, ["hf:openai/whisper-base", Path("here/it/is")]),
    ({"WHISPER_MS_ID": "c/d", "WHISPER_HF_ID": "a/b", "WHISPER_DIR": "is"}, None, ["ms:c/d", "hf:a/b", Path("is")]),
    ({"WHISPER_MS_ID": "c/d", "WHISPER_DIR": "is"}, "e/f", ["e/f"]),
    ({"WHISPER_MS_ID": "c/d"}, ["ms:e/f", Path("g"), "h"], ["ms:e/f", Path("g"), "h"]),
    ({"WHISPER_DIR": "is"}, (Path("g"),), [Path("g")]),
])
def test_the_environment_counts_only_without_a_source(monkeypatch, environment, source, expected):
    for name in ("WHISPER_MS_ID", "WHISPER_HF_ID", "WHISPER_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert candidates(source) == expected


def test_importing_the_module_imports_no_transformers():
    code = "import sys; import omni_adapters.encoders.whisper; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
