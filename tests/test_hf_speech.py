"""wav2vec2, HuBERT, WavLM and w2v-BERT 2.0 against transformers' own classes, on tiny random checkpoints of each."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hosts import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_speech import KINDS, make_tiny_speech
from torch import Tensor, nn

from omni_adapters import OmniGPT, Projector
from omni_adapters.checkpoint import load_adapter, save_adapter
from omni_adapters.cli import main
from omni_adapters.data.audio import save_audio
from omni_adapters.encoders.hf_speech import FAMILIES, Conv, HFSpeechEncoder, fewest
from omni_adapters.encoders.protocol import AudioEncoder
from omni_adapters.encoders.weights import WeightsUnavailable
from omni_adapters.encoders.whisper import WhisperEncoder
from omni_adapters.features import Features
from omni_adapters.fingerprints import describe_encoder
from omni_adapters.shapes import BadInput
from omni_adapters.training.options import parse_layer
from omni_adapters.training.sources import open_encoder, open_source

RATE = 16_000  # Hz
WAVES = [kind for kind in KINDS if kind != "bert"]
GROUP = [kind for kind in KINDS if "group" in kind]
LAYERED = ["wav2vec2-layer", "hubert-layer", "wavlm-layer"]
# Frames are layer-normed, of order 1 to 4. The longest sums have 128 products (positional convolution: 8 channels × 16 steps) or
# 160 (w2v-BERT's projection), and blocked another way a sum of n terms moves by √n roundings: √160 × 4 × 2⁻²⁴ = 3e-6, over 3
# layers 1e-5, which is the contract's bound as well.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-5 * 2**-29}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @cache
    def made(kind: str, head: str = "Model", **config: Any) -> Path:
        return make_tiny_speech(tmp_path_factory.mktemp(kind), kind, head, **config)
    return made


@pytest.fixture(scope="module")
def opened(checkpoint: Callable[..., Path]) -> Callable[..., HFSpeechEncoder]:
    @cache
    def made(kind: str, **options: Any) -> HFSpeechEncoder:
        return HFSpeechEncoder(checkpoint(kind), **options)
    return made


def sound(num_samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed)) + 0.02


def close(came: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(came, expected, rtol=0, atol=ROUNDING[came.dtype])


@torch.no_grad()
def by_transformers(directory: Path, clips: list[Tensor], **options: Any) -> Any:
    """Its own extractor and model, read by from_pretrained."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(directory)
    made = extractor([clip.numpy() for clip in clips], sampling_rate=RATE, padding=True, return_tensors="pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModel.from_pretrained(directory).eval()(**made, output_hidden_states=True, **options)


# ---- against transformers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_is_an_audio_encoder(checkpoint, opened, kind):
    encoder, channels = opened(kind), 160 if kind == "bert" else 1
    assert isinstance(encoder, AudioEncoder)
    assert (encoder.sampling_rate, encoder.d_model, encoder.width, encoder.num_layers) == (RATE, 32, 32, 1)
    assert encoder.frame_rate == 50.0 and encoder.source == str(checkpoint(kind)) and encoder.num_channels == channels
    inputs = encoder.preprocess([sound(RATE)])
    assert inputs.values.shape[:2] == (1, channels) and inputs.values.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_one_clip_is_bit_identical_to_transformers(checkpoint, opened, kind):
    encoder, clip = opened(kind), sound(6_000)
    came, theirs = encoder(encoder.preprocess([clip])), by_transformers(checkpoint(kind), [clip]).last_hidden_state
    assert came.lens.tolist() == [theirs.size(1)] and came.values.std() > 0.3
    assert torch.equal(came.values, theirs)


@pytest.mark.parametrize("kind", WAVES)
def test_a_clip_without_normalisation_is_taken_as_it_is(kind, tmp_path):
    encoder = HFSpeechEncoder(make_tiny_speech(tmp_path, kind, do_normalize=False))
    assert torch.equal(encoder.preprocess([sound(5_000)]).values[0, 0], sound(5_000))
    assert torch.equal(encoder(encoder.preprocess([sound(5_000)])).values, by_transformers(tmp_path, [sound(5_000)])[0])


def test_an_odd_frame_of_the_filter_bank_is_one_that_transformers_masks(checkpoint, opened):
    encoder, clip = opened("bert"), sound(400 + 160 * 20)  # 21 frames of 10 ms
    came, theirs = encoder(encoder.preprocess([clip])), by_transformers(checkpoint("bert"), [clip]).last_hidden_state
    assert came.lens.tolist() == [10] and theirs.size(1) == 11
    close(came.values, theirs[:, :10])


@pytest.mark.parametrize("kind", [*LAYERED, "bert"])
def test_a_ragged_batch_is_that_of_transformers_with_its_mask(checkpoint, opened, kind):
    encoder, clips = opened(kind), [sound(8_240), sound(5_680, seed=1)]  # even numbers of 10 ms frames
    came, theirs = encoder(encoder.preprocess(clips)), by_transformers(checkpoint(kind), clips).last_hidden_state
    for row, length in enumerate(came.lens.tolist()):
        close(came.values[row, :length], theirs[row, :length])


@pytest.mark.parametrize("kind", GROUP)
def test_group_norm_would_hear_the_padding(checkpoint, opened, kind):
    """Why such clips pass the convolutions apart: transformers' padded batch is another function of the clip."""
    encoder, clips = opened(kind), [sound(8_240), sound(5_680, seed=1)]
    alone = encoder(encoder.preprocess(clips[1:])).values[0]
    assert (by_transformers(checkpoint(kind), clips).last_hidden_state[1, :len(alone)] - alone).abs().max() > 0.01


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(KINDS)), st.integers(560, 40_000))
def test_lens_are_transformers_arithmetic_and_what_the_convolutions_make(opened, kind, size):
    encoder = opened(kind)
    steps = int(encoder.preprocess([torch.zeros(size)]).lens)
    assert steps == (size if kind != "bert" else ((size - 400) // 160 + 1) // 2)
    assert encoder.num_frames(steps) == int(encoder.model._get_feat_extract_output_lengths(torch.tensor(steps)))
    if kind != "bert":
        with torch.no_grad():
            assert encoder.model.feature_extractor(torch.zeros(1, size)).size(2) == encoder.num_frames(size)


@given(st.lists(st.builds(Conv, st.integers(1, 9), st.integers(1, 5), st.just(0)), max_size=4))
def test_the_fewest_steps_make_one_frame_and_one_less_none(convs):
    steps = fewest(convs)

    def frames(length: int) -> int:
        for conv in convs:
            length = conv.frames(length)
        return length

    assert frames(steps) == 1 and frames(steps - 1) == 0


# ---- a clip alone and beside others ---------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(lens=st.lists(st.integers(400, 3_000), min_size=1, max_size=5), surplus=st.integers(0, 900))
@pytest.mark.parametrize("kind", WAVES)
def test_a_row_in_a_ragged_batch_equals_the_clip_alone(opened, kind, lens, surplus):
    """All layers, in float64, where a leak stands nine digits above rounding; whatever is beyond a clip, NaN even."""
    encoder = opened(kind, dtype=torch.float64, layer="all")
    check_rows(encoder, [sound(n, seed=n)[None].double() for n in lens], surplus)


@settings(max_examples=8, deadline=None)
@given(lens=st.lists(st.integers(1, 40), min_size=1, max_size=5), surplus=st.integers(0, 9))
def test_a_row_in_a_ragged_batch_equals_the_clip_alone_in_w2v_bert(opened, lens, surplus):
    encoder = opened("bert", dtype=torch.float64, layer="all")
    check_rows(encoder, [10 * sound(160 * n, seed=n).view(160, n).double() for n in lens], surplus)


def check_rows(encoder: HFSpeechEncoder, clips: list[Tensor], surplus: int = 0) -> None:
    """Clips (num_channels, T_i) in one batch and alone."""
    lens = [clip.size(1) for clip in clips]
    values = torch.full((len(clips), encoder.num_channels, max(lens) + surplus), float("nan"), dtype=clips[0].dtype)
    for row, clip in zip(values, clips):
        row[:, :clip.size(1)] = clip
    batch = encoder(Features(values, torch.tensor(lens)))
    assert batch.values.shape == (len(clips), encoder.num_frames(values.size(2)), encoder.d_model)
    for came, clip, length in zip(batch.values, clips, batch.lens.tolist()):
        alone = encoder(Features(clip[None], torch.tensor([clip.size(1)])))
        assert alone.lens.tolist() == [length] and not came[length:].any()
        close(came[:length], alone.values[0])


@pytest.mark.parametrize("kind", KINDS)
def test_waveforms_of_any_length_in_one_batch(opened, kind):
    encoder = opened(kind)
    clips = [sound(size, seed=size) for size in (4_000, 6_100, 720, 4_000, 16_000)]
    inputs = encoder.preprocess(clips)
    batch = encoder(inputs)
    for row, clip in enumerate(clips):
        alone = encoder.preprocess([clip.numpy()])
        steps, frames = int(alone.lens), int(batch.lens[row])
        assert torch.equal(inputs.values[row, :, :steps], alone.values[0]) and not inputs.values[row, :, steps:].any()
        close(batch.values[row, :frames], encoder(alone).values[0])


def test_each_clip_is_normalised_by_itself(opened):
    values, lens = opened("wavlm-layer").preprocess([100 * sound(8_000), sound(2_000, seed=1)])
    for row, length in zip(values, lens.tolist()):
        clip = row[0, :length]
        assert abs(clip.mean()) < 1e-5 and abs(clip.var() - 1) < 0.01


@pytest.mark.parametrize("kind, config", [
    ("wav2vec2-group", {"add_adapter": True, "num_adapter_layers": 2, "output_hidden_size": 24}),
    ("wav2vec2-layer", {"add_adapter": True, "num_adapter_layers": 2}),
    ("wavlm-layer", {"add_adapter": True, "num_adapter_layers": 1}),
    ("bert", {"add_adapter": True, "use_intermediate_ffn_before_adapter": True, "output_hidden_size": 24}),
])
def test_adapter_layers_of_the_checkpoint_count(checkpoint, kind, config):
    """They shorten the frames, and read across a clip's end: only clips of one length share a batch."""
    directory = checkpoint(kind, **config)
    encoder, layers = HFSpeechEncoder(directory), config.get("num_adapter_layers", 1)
    assert encoder.frame_rate == 50 / 2**layers and encoder.d_model == config.get("output_hidden_size", 32)
    clips = [sound(8_240), sound(5_680, seed=1), sound(8_240, seed=2)]
    batch = encoder(encoder.preprocess(clips))
    for row, clip in enumerate(clips):
        alone, theirs = encoder(encoder.preprocess([clip])), by_transformers(directory, [clip]).last_hidden_state
        assert alone.lens.tolist() == [theirs.size(1)] == [batch.lens[row]]
        assert torch.equal(alone.values, theirs)
        close(batch.values[row, :theirs.size(1)], theirs[0])
    hidden = HFSpeechEncoder(directory, layer=2)
    assert hidden.frame_rate == 50 and hidden.d_model == 32
    assert torch.equal(hidden(hidden.preprocess(clips[:1])).values, by_transformers(directory, clips[:1]).hidden_states[2])


@pytest.mark.parametrize("kind, config", [
    ("hubert-layer", {"conv_pos_batch_norm": True}), ("hubert-group", {"feat_proj_layer_norm": False}),
    ("wav2vec2-layer", {"adapter_attn_dim": 8}), ("wav2vec2-group", {"num_conv_pos_embeddings": 15}),
    ("bert", {"position_embeddings_type": "relative"}), ("bert", {"position_embeddings_type": "rotary"}),
    ("bert", {"position_embeddings_type": None}),
])
def test_other_settings_of_the_families(checkpoint, kind, config):
    directory = checkpoint(kind, **config)
    encoder, exact = HFSpeechEncoder(directory), HFSpeechEncoder(directory, dtype=torch.float64)
    clip = sound(6_000)
    assert torch.equal(encoder(encoder.preprocess([clip])).values, by_transformers(directory, [clip]).last_hidden_state)
    if kind == "bert":
        check_rows(exact, [10 * sound(160 * n).view(160, n).double() for n in (5, 9, 2)])
    else:
        check_rows(exact, [sound(n)[None].double() for n in (1_000, 1_777, 420)])


def test_a_rotary_table_follows_the_model_to_another_dtype(checkpoint):
    encoder = HFSpeechEncoder(checkpoint("bert", position_embeddings_type="rotary"))
    inputs = encoder.preprocess([sound(6_000)])
    expected = encoder(inputs).values
    assert encoder.double()(inputs).values.dtype == torch.float64
    torch.testing.assert_close(encoder(inputs).values.float(), expected, rtol=0, atol=1e-4)  # 3 layers of roundings by 2⁻²⁴


# ---- memory ----------------------------------------------------------------------------------------------------------------


def batches_run(encoder: HFSpeechEncoder, inputs: Features) -> list[tuple[int, int]]:
    """(rows, frames) of each batch that enters the layers."""
    seen: list[tuple[int, int]] = []
    handle = encoder.model.encoder.layers[0].register_forward_pre_hook(
        lambda module, args: seen.append((args[0].size(0), args[0].size(1))))
    try:
        encoder(inputs)
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", ["wavlm-group", "wav2vec2-layer", "bert"])
def test_batch_seconds_bound_what_is_encoded_at_once(checkpoint, kind):
    few, many = (HFSpeechEncoder(checkpoint(kind), batch_seconds=seconds) for seconds in (1.0, 120.0))
    inputs = few.preprocess([sound(size, seed=size) for size in (8_000, 7_000, 6_000, 20_000, 5_680, 8_000)])
    runs = batches_run(few, inputs)
    assert all(rows == 1 or rows * frames <= 50 for rows, frames in runs) and sum(rows for rows, _ in runs) == 6
    assert [rows for rows, _ in batches_run(many, inputs)] == [1, 5]  # lengths that differ by a factor of two do not meet
    close(few(inputs).values, many(inputs).values)


def test_long_clips_are_refused_unless_allowed(checkpoint):
    encoder = HFSpeechEncoder(checkpoint("hubert-group"), max_seconds=0.5)
    with pytest.raises(BadInput, match=r"clip 1 of 0\.5001 s \(8001 samples\); expected at most 0\.5 s.*max_seconds"):
        encoder.preprocess([sound(8_000), sound(8_001)])
    default, free = HFSpeechEncoder(checkpoint("hubert-group")), HFSpeechEncoder(checkpoint("hubert-group"), max_seconds=None)
    with pytest.raises(BadInput, match="at most 60 s"):
        default.preprocess([torch.zeros(60 * RATE + 1)])
    assert free.preprocess([torch.zeros(60 * RATE + 1)]).lens.tolist() == [60 * RATE + 1]


# ---- layers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_layers_are_those_of_transformers_bit_for_bit(checkpoint, opened, kind):
    clip = sound(6_000)
    out = by_transformers(checkpoint(kind), [clip])
    theirs, normed = out.hidden_states, kind in LAYERED and torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert len(theirs) == 4
    for layer, numbers in ((0, [0]), (2, [2]), (-1, [3]), (-3, [1]), ((2, 0), [2, 0]), ("all", [0, 1, 2, 3])):
        if normed and 3 in numbers:  # transformers 5.0 norms the last one; test_the_last_layer_… knows what it is here
            continue
        encoder = opened(kind, layer=layer)
        came = encoder(encoder.preprocess([clip])).values
        assert (encoder.num_layers, encoder.width, encoder.d_model) == (len(numbers), 32, 32 * len(numbers))
        assert torch.equal(came, torch.cat([theirs[number] for number in numbers], dim=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_comes_before_the_final_norm_where_there_is_one(opened, kind):
    last, normed = opened(kind, layer=-1), opened(kind)
    inputs = last.preprocess([sound(6_000)])
    expected = normed(inputs).values
    same = torch.equal(last(inputs).values, expected)
    assert same == (kind not in LAYERED)
    if not same:
        assert torch.equal(last.model.encoder.layer_norm(last(inputs).values), expected)


@pytest.mark.parametrize("layer, held", [(0, 1), (1, 1), (2, 2), ((0, 2), 2), (-1, 3), ("all", 3), (None, 3)])
def test_layers_above_the_highest_are_dropped(opened, layer, held):
    assert len(opened("wav2vec2-layer", layer=layer).model.encoder.layers) == held


@pytest.mark.parametrize("layer", [4, -5, True, "7", "last", (), (1, 1), (3, -1), (0, 9), 1.0, [0, None]])
def test_layers_that_are_none_are_refused(checkpoint, layer):
    with pytest.raises(BadInput, match=r"HFSpeechEncoder: got layer .*different numbers from 0 to 3.*-1 is 3"):
        HFSpeechEncoder(checkpoint("wav2vec2-group"), layer=layer)


# ---- frozen ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_from_birth_and_after_a_parent_trains(opened, kind):
    """Dropout 0.1, layerdrop 0.5 and SpecAugment of the checkpoints would show."""
    parent = nn.Sequential(nn.Linear(2, 2), copy.deepcopy(opened(kind)))
    inputs = parent[1].preprocess([sound(8_000)])
    before = parent[1](inputs).values
    parent.train()
    assert parent[0].training and not any(module.training for module in parent[1].modules())
    assert torch.equal(parent[1](inputs).values, before)
    assert not any(parameter.requires_grad for parameter in parent[1].parameters())
    out = parent[1](Features(inputs.values.requires_grad_(), inputs.lens)).values
    assert out.grad_fn is None and not out.requires_grad and not out.is_inference()


@pytest.mark.parametrize("kind", KINDS)
def test_random_state_is_left_alone(checkpoint, kind):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    encoder = HFSpeechEncoder(checkpoint(kind))
    encoder(encoder.preprocess([sound(4_000)]))
    assert torch.equal(torch.rand(4), expected)


def test_no_word_of_torch_about_masks(opened):
    encoder = opened("wavlm-layer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(encoder.preprocess([sound(4_000), sound(5_000)]))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_weights(checkpoint, kind):
    """Roundings by 2⁻⁹ of values to 4 in ten places: some hundredths each. Groups of 16 channels, since oneDNN's bfloat16
    convolution of fewer is wrong on CPUs with AMX (torch 2.9 to 2.13); released checkpoints have 48 and more."""
    directory = checkpoint(kind, **({} if kind == "bert" else {"num_conv_pos_embedding_groups": 2}))
    half, whole = HFSpeechEncoder(directory, dtype=torch.bfloat16), HFSpeechEncoder(directory)
    inputs = whole.preprocess([sound(6_000), sound(4_000)])
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    came, expected = half(inputs).values, whole(inputs).values
    assert came.dtype == torch.bfloat16 and (came.float() - expected).abs().mean() < 0.05


@pytest.mark.parametrize("kind, options, config", [
    *((kind, {"layer": layer}, {}) for kind, layer in zip(KINDS, (None, 2, "all", None, (3, 0), 1, 0))),
    ("wav2vec2-group", {}, {"add_adapter": True, "num_adapter_layers": 2}),
    ("bert", {"dtype": torch.float64}, {"position_embeddings_type": "rotary"}),
    ("bert", {}, {"position_embeddings_type": "relative"}),
])
def test_what_pickle_brings_to_another_process_is_the_same(checkpoint, kind, options, config):
    """Weight norm's modules refuse pickle; spawned workers of a loader get the encoder by it."""
    encoder = HFSpeechEncoder(checkpoint(kind, **config), **options)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    again = pickle.loads(pickle.dumps(encoder))
    assert torch.equal(torch.rand(4), expected)
    inputs = encoder.preprocess([sound(6_000), sound(4_000, seed=1)])
    assert same_weights(again, encoder) and describe_encoder(again) == describe_encoder(encoder)
    assert torch.equal(again.preprocess([sound(6_000), sound(4_000, seed=1)]).values, inputs.values)
    assert torch.equal(again(inputs).values, encoder(inputs).values)
    assert not again.training and not any(parameter.requires_grad for parameter in again.parameters())


def test_threads_do_not_hear_each_others_layers(opened):
    """Barriers before the first layer and behind the last: both forwards record before either is read."""
    encoder = copy.deepcopy(opened("wav2vec2-layer", layer="all"))
    inputs = [encoder.preprocess([sound(6_000, seed=seed)]) for seed in range(2)]
    expected = [encoder(one).values for one in inputs]
    barrier = Barrier(2, timeout=20)
    for module in (encoder.model.encoder.layers[0], encoder.model.encoder.layer_norm):
        module.register_forward_pre_hook(lambda module, args: (barrier.wait(), None)[1])
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda one: encoder(one).values, inputs))
    assert all(torch.equal(came, values) for came, values in zip(found, expected))


# ---- checkpoints -----------------------------------------------------------------------------------------------------------


def save_with(directory: Path, checkpoint: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of the checkpoint with other tensors."""
    shutil.copytree(checkpoint, directory, dirs_exist_ok=True)
    save_file(change(load_file(checkpoint / "model.safetensors")), directory / "model.safetensors")
    return directory


def same_weights(one: HFSpeechEncoder, other: HFSpeechEncoder) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind, head", [*((kind, "ForCTC") for kind in KINDS), ("wav2vec2-group", "ForPreTraining"),
                                        ("wav2vec2-layer", "ForPreTraining")])
def test_heads_are_dropped(checkpoint, kind, head, tmp_path):
    directory = checkpoint(kind, head)
    names = load_file(directory / "model.safetensors").keys()
    prefix = {"bert": "wav2vec2_bert"}.get(kind, kind.split("-")[0]) + "."
    assert any(name.startswith(prefix) for name in names) and not all(name.startswith(prefix) for name in names)
    bare = save_with(tmp_path, directory, lambda tensors: {
        name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)})
    assert same_weights(HFSpeechEncoder(directory), HFSpeechEncoder(bare))


@pytest.mark.parametrize("kind", WAVES)
def test_both_spellings_of_weight_norm_load(checkpoint, opened, kind, tmp_path):
    spellings = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    here = load_file(checkpoint(kind) / "model.safetensors")
    back = spellings if any("original0" in name for name in here) else {old: new for new, old in spellings.items()}

    def respelt(name: str) -> str:
        for old, new in back.items():
            name = name.replace(f"pos_conv_embed.conv.{old}", f"pos_conv_embed.conv.{new}")
        return name

    other = save_with(tmp_path, checkpoint(kind), lambda tensors: {respelt(name): tensor for name, tensor in tensors.items()})
    assert {respelt(name) for name in here} != set(here)
    assert same_weights(HFSpeechEncoder(other), opened(kind))


def test_the_vector_of_specaugment_may_be_there_or_not(checkpoint, opened, tmp_path):
    kind = "wav2vec2-group"
    assert "masked_spec_embed" in load_file(checkpoint(kind) / "model.safetensors")
    assert not any("masked_spec_embed" in name for name in opened(kind).state_dict())
    without = save_with(tmp_path, checkpoint(kind), lambda tensors: {
        name: tensor for name, tensor in tensors.items() if name != "masked_spec_embed"})
    assert same_weights(HFSpeechEncoder(without), opened(kind))


def edit(file: str, **entries: Any) -> Callable[[Path], object]:
    return lambda at: (at / file).write_text(json.dumps({**json.loads((at / file).read_text()), **entries}))


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def damage(at: Path) -> None:
        found = load_file(at / "model.safetensors")
        change(found)
        save_file(found, at / "model.safetensors")
    return damage


@pytest.mark.parametrize("damage, words", [
    (tensors(lambda found: found.pop("encoder.layers.1.feed_forward.output_dense.weight")),
     ["disagrees with its config on encoder.layers.1.feed_forward.output_dense.weight"]),
    (tensors(lambda found: found.update({"encoder.layers.9.bias": torch.zeros(2)})), ["encoder.layers.9.bias"]),
    (lambda at: (at / "model.safetensors").write_bytes((at / "model.safetensors").read_bytes()[:5_000]), ["does not read"]),
    (edit("config.json", intermediate_size=40), ["encoder.layers.0.feed_forward.intermediate_dense.weight"]),
    (edit("config.json", num_hidden_layers=2), ["encoder.layers.2."]),
    (edit("config.json", model_type="whisper"), ["'whisper'", "'wav2vec2', 'hubert', 'wavlm', 'wav2vec2-bert'",
                                                 "WhisperEncoder"]),
    (edit("config.json", model_type=["wavlm"]), ["['wavlm']"]),
    (edit("config.json", hidden_size="wide"), ["config.json"]),
    (edit("config.json", feat_extract_norm="batch"), ["config.json"]),
    (lambda at: (at / "config.json").write_text("["), ["config.json"]),
    (lambda at: (at / "preprocessor_config.json").write_text("[]"), ["preprocessor_config.json with a JSON list"]),
    (edit("preprocessor_config.json", feature_extractor_type="WhisperFeatureExtractor"), ["'WhisperFeatureExtractor'"]),
    (edit("preprocessor_config.json", feature_size=2), ["2 channels at 16000 Hz"]),
    (edit("preprocessor_config.json", sampling_rate=None), ["preprocessor_config.json"]),
])
def test_checkpoints_that_would_load_wrong_are_refused(checkpoint, tmp_path, damage, words):
    shutil.copytree(checkpoint("wavlm-layer"), tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(BadInput) as caught:
        HFSpeechEncoder(tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_directory_without_weights_names_the_file_and_the_ways_out(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsUnavailable) as caught:
        HFSpeechEncoder(tmp_path)
    assert all(word in str(caught.value) for word in ("HFSpeechEncoder: no weights", "preprocessor_config.json", "pickled",
                                                      "model.safetensors", "HF_ENDPOINT", "MODELSCOPE_ENDPOINT"))


# ---- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, least", [("wav2vec2-group", 400), ("hubert-layer", 400), ("wavlm-layer", 400), ("bert", 560)])
def test_clips_too_short_for_a_frame_are_refused_with_the_least(opened, kind, least):
    encoder = opened(kind)
    assert encoder.min_samples == least
    out = encoder(encoder.preprocess([sound(least), sound(2 * least)]))
    assert out.lens[0] == 1 and out.values.isfinite().all()
    with pytest.raises(BadInput, match=rf"clip 1 of .*\({least - 1} samples\); expected at least {least} samples"):
        encoder.preprocess([sound(least), sound(least - 1)])


@pytest.mark.parametrize("kind", KINDS)
def test_silence_makes_finite_frames(opened, kind):
    encoder = opened(kind)
    assert encoder(encoder.preprocess([torch.zeros(4_000)])).values.isfinite().all()


@pytest.mark.parametrize("waveform", [np.zeros(900, np.int16), torch.zeros(0), torch.full((900,), float("nan"))])
def test_bad_waveforms_name_the_encoder(opened, waveform):
    with pytest.raises(BadInput, match=r"HFSpeechEncoder\.preprocess: got .*clip 0"):
        opened("wavlm-group").preprocess([waveform])


@pytest.mark.parametrize("values, lens", [
    (torch.zeros(1, 160, 2000), [500]), (torch.zeros(1, 2000), [500]), (torch.zeros(2, 1, 2000), [500]),
    (torch.zeros(1, 1, 2000, dtype=torch.int64), [500]),
])
def test_foreign_inputs_are_refused(opened, values, lens):
    with pytest.raises(BadInput, match=r"expected floating-point values \(B, 1, T\)"):
        opened("wavlm-group")(Features(values, torch.tensor(lens)))


@pytest.mark.parametrize("length", [-1, 1, 399, 2001])
def test_lens_that_make_no_frames_are_refused(opened, length):
    with pytest.raises(BadInput, match=rf"lens\[1\] = {length} .*0, or 400 ≤ lens ≤ 2000"):
        opened("wavlm-group")(Features(torch.zeros(2, 1, 2000), torch.tensor([2000, length])))


def test_a_row_without_sound_has_no_frames(opened):
    out = opened("hubert-group")(Features(torch.ones(2, 1, 2000), torch.tensor([0, 2000])))
    assert out.lens.tolist() == [0, 6] and not out.values[0].any() and out.values[1].any()
    silent = opened("hubert-group")(Features(torch.zeros(1, 1, 0), torch.tensor([0])))
    assert silent.values.shape == (1, 0, 32) and silent.lens.tolist() == [0]


@pytest.mark.parametrize("options, words", [
    ({"max_seconds": 0}, "max_seconds 0"), ({"max_seconds": "60"}, "max_seconds '60'"),
    ({"max_seconds": float("nan")}, "max_seconds nan"), ({"batch_seconds": float("inf")}, "batch_seconds inf"),
    ({"max_seconds": float("inf")}, "max_seconds inf"), ({"batch_seconds": None}, "batch_seconds None"),
    ({"batch_seconds": True}, "batch_seconds True"),
])
def test_settings_that_mean_nothing_are_refused(checkpoint, options, words):
    with pytest.raises(BadInput, match=f"{words}; expected seconds > 0"):
        HFSpeechEncoder(checkpoint("wavlm-group"), **options)
    for nothing in ("", [], ["hf:a/b", ""], None, 7, [7]):
        with pytest.raises(BadInput, match=r"HFSpeechEncoder: got source .* a directory, the id of a model, or several"):
            HFSpeechEncoder(nothing)


# ---- what records it --------------------------------------------------------------------------------------------------------


def test_settings_are_told_where_they_are_not_the_defaults(checkpoint, opened):
    kind = "wav2vec2-layer"
    for layer, told in ((None, {}), (2, {"layer": 2}), (-2, {"layer": 2}), ((1,), {"layer": 1}), ((2, 0), {"layer": [2, 0]}),
                        ("all", {"layer": "all"}), ((0, 1, 2, 3), {"layer": "all"})):
        assert opened(kind, layer=layer).settings() == told
        assert told.items() <= describe_encoder(opened(kind, layer=layer)).items()
    assert "layer" not in describe_encoder(opened(kind)) and "max_seconds" not in describe_encoder(opened(kind))
    assert HFSpeechEncoder(checkpoint(kind), max_seconds=90).settings() == {"max_seconds": 90}


def ears(encoder: HFSpeechEncoder) -> OmniGPT:
    return OmniGPT(reference(), (encoder, Projector(encoder.d_model, 32, 16, stack=10, zero_init=False)))


def logits(omni: OmniGPT) -> Tensor:
    return omni(torch.tensor([[1, 2, 3]]), audio=[sound(16_000)])


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_opens_the_encoder_that_it_names(checkpoint, kind, tmp_path):
    omni = ears(HFSpeechEncoder(checkpoint(kind), layer=(1, 3), max_seconds=90))
    omni.save_adapter(tmp_path / "a")
    again = OmniGPT.load_adapter(tmp_path / "a", reference())
    assert isinstance(again.encoder, HFSpeechEncoder) and again.encoder.layers == (1, 3) and again.encoder.max_seconds == 90
    assert torch.equal(logits(again), logits(omni))


def test_an_adapter_belongs_to_its_layer(checkpoint, opened, tmp_path):
    kind = "wavlm-group"
    omni = ears(opened(kind, layer=2))
    omni.save_adapter(tmp_path / "a")
    for layer, here in ((None, "here nothing"), (1, "here 1")):
        with pytest.raises(BadInput, match=rf"encoder\.layer: saved 2, {here}"):
            OmniGPT.load_adapter(tmp_path / "a", reference(), encoder=opened(kind, layer=layer), any_weights=True)
    shorter = HFSpeechEncoder(checkpoint(kind), layer=2, max_seconds=5)  # hears the same in what it takes
    assert torch.equal(logits(OmniGPT.load_adapter(tmp_path / "a", reference(), encoder=shorter)), logits(omni))
    tensors, description = load_adapter(tmp_path / "a")
    for wrong in ({"layer": "second"}, {"source": None}):
        save_adapter(tmp_path / "b", tensors, {**description, "encoder": description["encoder"] | wrong})
        with pytest.raises(BadInput, match="HFSpeechEncoder: got"):
            OmniGPT.load_adapter(tmp_path / "b", reference())


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_is_opened_by_its_model_type(checkpoint, kind):
    encoder = open_encoder(str(checkpoint(kind)), layer=(0, 2))
    assert isinstance(encoder, HFSpeechEncoder) and encoder.layers == (0, 2) and encoder.model_type in FAMILIES
    with pytest.raises(BadInput, match=r"with context 'clip'; expected a Whisper"):
        open_encoder(str(checkpoint(kind)), context="clip")


def test_open_encoder_refuses_what_no_encoder_reads(checkpoint, tmp_path):
    shutil.copytree(checkpoint("bert"), tmp_path, dirs_exist_ok=True)
    edit("config.json", model_type="bert")(tmp_path)
    with pytest.raises(BadInput, match=r"checkpoint of type 'bert' .*'whisper', 'wav2vec2', 'hubert', 'wavlm', 'wav2vec2-bert'"):
        open_encoder(str(tmp_path))
    with pytest.raises(BadInput, match="log_mel with layer 3"):
        open_encoder("log_mel", layer=3)


@pytest.mark.parametrize("text, layer", [("7", 7), ("-1", -1), ("3,7,11", (3, 7, 11)), ("0,-1", (0, -1)), ("all", "all")])
def test_layers_are_read_from_the_command_line(text, layer):
    assert parse_layer(text) == layer


def test_shards_belong_to_their_layer(checkpoint, opened, tmp_path, capsys):
    save_audio(tmp_path / "a.wav", sound(16_000), RATE)
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text(json.dumps({"audio": "a.wav", "text": "a", "seconds": 1.0}) + "\n")
    kind, out = "wavlm-group", str(tmp_path / "out")
    command = ["extract", "--manifest", str(manifest), "--encoder", str(checkpoint(kind)), "--dtype", "float32", "--out", out]
    assert main([*command, "--layer", "1,2"]) == 0
    encoder = opened(kind, layer=(1, 2))
    source = open_source(out, encoder)
    (values, lens), _ = source.load_batch([0])
    assert source.lens.tolist() == lens.tolist() == [49] and values.shape == (1, 49, 64)
    with pytest.raises(BadInput, match=r"encoder\.layer: saved \[1, 2\], here nothing.*--layer"):
        open_source(out, opened(kind))
    assert main([*command[:-1], str(tmp_path / "other"), "--layer", "9"]) == 2
    assert "layer 9" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--layer", "deep"])
    assert "'deep' is no layer" in capsys.readouterr().err


def test_importing_the_module_imports_no_transformers():
    code = "import sys; import omni_adapters.encoders.hf_speech; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_whisper_is_still_a_whisper(tmp_path):
    from tiny_whisper import make_tiny_whisper

    encoder = open_encoder(str(make_tiny_whisper(tmp_path)), layer=1)
    assert isinstance(encoder, WhisperEncoder) and encoder.settings() == {"layer": 1}
