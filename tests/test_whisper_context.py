"""Whisper over clips as long as they are, and over sound longer than 30 s: against the equation, transformers' own encoder at
another length, and what each chunk gives alone."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hosts import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_whisper import make_tiny_whisper
from torch import Tensor

from omni_adapters import OmniGPT, Projector
from omni_adapters.checkpoint import load_adapter, save_adapter
from omni_adapters.cli import main
from omni_adapters.data.audio import save_audio
from omni_adapters.encoders.whisper import WhisperEncoder
from omni_adapters.encoders.whisper_chunks import Chunk, encode_clips, num_frames, plan, similar
from omni_adapters.features import Features
from omni_adapters.fingerprints import describe_encoder
from omni_adapters.shapes import BadInput
from omni_adapters.training.options import deciding
from omni_adapters.training.sources import open_encoder, open_source

RATE = 16_000        # Hz
LIMIT = 30 * RATE    # samples
FRAMES = 3000        # mel frames in 30 s
# A frame is layer-normed, so of order 1 to 4, after 2 layers of sums of up to 240 products (conv1) and up to 1500 keys whose
# weights add to 1. Blocked another way a sum of n terms moves by √n roundings: √240 × 4 × 2⁻²⁴ ≈ 4e-6, over 2 layers 1e-5.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-5 * 2**-29}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def full(checkpoint: Path) -> WhisperEncoder:
    return WhisperEncoder(checkpoint)


@pytest.fixture(scope="module")
def clipped(checkpoint: Path) -> WhisperEncoder:
    return WhisperEncoder(checkpoint, context="clip")


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> WhisperEncoder:
    """In float64, where a mask that leaks stands nine digits above rounding."""
    return WhisperEncoder(checkpoint, context="clip", dtype=torch.float64)


def sound(num_samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


def mel_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(came: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(came, expected, rtol=0, atol=ROUNDING[came.dtype])


# ---- integers -------------------------------------------------------------------------------------------------------------


def test_every_mel_frame_is_in_one_chunk_in_order():
    for lens in ([0], [1], [3], [4], [7, 0, 3], [6, 1, 9]):
        covered = [(chunk.row, at) for chunk in plan(lens, 3) for at in range(chunk.start, chunk.start + chunk.frames)]
        assert covered == [(row, at) for row, length in enumerate(lens) for at in range(length)]
        assert all(chunk.start % 3 == 0 and 1 <= chunk.frames <= 3 for chunk in plan(lens, 3))


@given(st.lists(st.integers(1, 3000), max_size=40), st.integers(1, 20_000))
def test_batches_hold_every_chunk_once_at_similar_lengths_within_memory(frames, most):
    chunks = [Chunk(row, 0, length) for row, length in enumerate(frames)]
    batches = similar(chunks, most)
    assert sorted(chunk for batch in batches for chunk in batch) == chunks
    for batch in batches:
        longest, shortest = max(c.frames for c in batch), min(c.frames for c in batch)
        assert longest < 2 * shortest and (len(batch) == 1 or len(batch) * longest <= most)
    assert len(similar([Chunk(row, 0, 500) for row in range(12)], 6000)) == 1


# ---- mel ------------------------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.one_of(st.sampled_from([1, 160, 161, 320, 479_679, 479_999, LIMIT]), st.integers(1, LIMIT)))
def test_mel_frames_are_those_of_the_clip_padded_to_30_s(full, clipped, size):
    """A cell is log10 of 201 products: another block moves it by at most 201 × 2⁻²⁴ / ln 10 / 4 = 1.3e-6, at both ends."""
    short, whole = clipped.preprocess([sound(size)]), full.preprocess([sound(size)])
    frames = -(-size // 160)
    assert short.values.shape == (1, 80, frames) and short.lens.tolist() == whole.lens.tolist() == [frames]
    torch.testing.assert_close(short.values, whole.values[:, :, :frames], rtol=0, atol=3e-6)


def test_mel_is_the_same_to_the_bit_in_any_batch(clipped):
    clips = [sound(size, seed=size) for size in (47_999, 1, 160, LIMIT + 161)]
    batch = clipped.preprocess(clips)
    assert batch.values.shape == (4, 80, 3002) and batch.lens.tolist() == [300, 1, 1, 3002]
    for row, samples in enumerate(clips):
        alone = clipped.preprocess([samples]).values[0]
        assert torch.equal(batch.values[row, :, :alone.size(1)], alone) and not batch.values[row, :, alone.size(1):].any()


# ---- the encoder ------------------------------------------------------------------------------------------------------------


def by_hand(encoder, mel: Tensor) -> Tensor:
    """The equation on one clip (n_mels, T): convolutions, positions, pre-norm layers whose softmax is written out."""
    x = F.gelu(F.conv1d(mel, encoder.conv1.weight, encoder.conv1.bias, padding=1))
    x = F.gelu(F.conv1d(x, encoder.conv2.weight, encoder.conv2.bias, stride=2, padding=1)).T  # (T_enc, d_model)
    x = x + encoder.embed_positions.weight[:len(x)]
    for layer in encoder.layers:
        attention, normed = layer.self_attn, layer.self_attn_layer_norm(x)
        q, k, v = (of(normed).unflatten(1, (attention.num_heads, -1)).transpose(0, 1)
                   for of in (attention.q_proj, attention.k_proj, attention.v_proj))  # (heads, T_enc, head_dim)
        heard = (q @ k.mT / q.size(-1) ** 0.5).softmax(-1) @ v
        x = x + attention.out_proj(heard.transpose(0, 1).flatten(1))
        x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
    return encoder.layer_norm(x)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 177, 500])
def test_equals_the_equation(exact, frames):
    mel = mel_of(80, frames)
    came = exact(Features(mel[None], torch.tensor([frames])))
    assert came.lens.tolist() == [(frames + 1) // 2]
    close(came.values[0], by_hand(exact.encoder, mel))


@torch.no_grad()
@pytest.mark.parametrize("frames", [2, 500, 2998])
def test_bit_identical_to_transformers_encoder_of_that_length(clipped, frames):
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Encoder

    config = WhisperConfig(**{**clipped.encoder.config.to_dict(), "max_source_positions": frames // 2})
    own, state = Encoder(config).eval(), clipped.encoder.state_dict()
    own.load_state_dict({**state, "embed_positions.weight": state["embed_positions.weight"][:frames // 2]})
    mel = mel_of(2, 80, frames).float()
    came = clipped(Features(mel, torch.tensor([frames, frames]))).values
    assert torch.equal(came, own(mel).last_hidden_state)


def test_30_s_are_the_same_in_both_contexts(full, clipped):
    inputs = full.preprocess([sound(LIMIT)])
    assert torch.equal(inputs.values, clipped.preprocess([sound(LIMIT)]).values)
    assert torch.equal(full(inputs).values, clipped(inputs).values)


def test_a_short_clip_is_not_what_30_s_make_of_it(full, clipped):
    short, padded = (encoder(encoder.preprocess([sound(16_000)])).values for encoder in (clipped, full))
    assert short.shape == (1, 50, 64) and padded.shape == (1, 1500, 64)
    assert (short - padded[:, :50]).abs().max() > 0.1


@settings(max_examples=25)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=6), st.integers(0, 10))
def test_a_row_in_a_ragged_batch_equals_the_clip_alone(exact, lens, surplus):
    """Whatever stands beyond a clip, NaN even; frames beyond its length come out as zeros."""
    values = torch.full((len(lens), 80, max(lens) + surplus or 1), float("nan"), dtype=torch.float64)
    clips = [mel_of(80, length, seed=seed) for seed, length in enumerate(lens)]
    for row, clip in zip(values, clips):
        row[:, :clip.size(1)] = clip
    batch = exact(Features(values, torch.tensor(lens)))
    assert batch.values.shape == (len(lens), (values.size(2) + 1) // 2, 64) and batch.lens.tolist() == [-(-n // 2) for n in lens]
    for came, clip, length in zip(batch.values, clips, lens):
        assert not came[-(-length // 2):].any()
        if length:
            close(came[:-(-length // 2)], exact(Features(clip[None], torch.tensor([length]))).values[0])


def test_waveforms_of_any_length_in_one_batch(clipped):
    clips = [sound(size, seed=size) for size in (1, 16_000, 47_999, 16_161, 480)]
    batch = clipped(clipped.preprocess(clips))
    assert batch.values.shape == (5, 150, 64) and batch.lens.tolist() == [1, 50, 150, 51, 2]
    for came, samples, length in zip(batch.values, clips, batch.lens.tolist()):
        close(came[:length], clipped(clipped.preprocess([samples.numpy()])).values[0])


@torch.no_grad()
def test_neighbours_in_one_padded_batch_do_not_touch_a_row(exact):
    """The masks themselves, odd and even lengths: `similar` would keep lengths this far apart from meeting."""
    lens = [1, 2, 3, 10, 11, 64]
    mel = mel_of(len(lens), 80, 64)
    batch = encode_clips(exact.encoder, mel, lens)
    for came, row, length in zip(batch, mel, lens):
        close(came[:num_frames(length)], by_hand(exact.encoder, row[:, :length]))


def test_eager_attention_takes_the_mask_too(checkpoint, clipped):
    eager = WhisperEncoder(checkpoint, context="clip")
    assert clipped.encoder.config._attn_implementation == "sdpa"
    eager.encoder.config._attn_implementation = "eager"
    inputs = clipped.preprocess([sound(16_000), sound(20_000, seed=1)])
    close(eager(inputs).values, clipped(inputs).values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_weights_or_by_autocast(checkpoint, clipped, dtype):
    """Two layers of roundings by 2⁻⁹ (bfloat16) of values to 4, as in the full context."""
    inputs = clipped.preprocess([sound(16_000), sound(20_161, seed=1)])
    expected = clipped(inputs).values
    half = WhisperEncoder(checkpoint, context="clip", dtype=dtype)(inputs)
    with torch.autocast("cpu", dtype):
        cast = clipped(inputs).values
    assert half.values.dtype == dtype and half.lens.tolist() == [50, 64]
    for came in (half.values, cast):
        torch.testing.assert_close(came.float(), expected, rtol=0, atol=0.1)


def test_no_graph_behind_the_features(clipped):
    inputs = clipped.preprocess([sound(8_000), sound(9_000)])
    out = clipped(Features(inputs.values.requires_grad_(), inputs.lens)).values
    assert out.grad_fn is None and not out.requires_grad and not out.is_inference()


def frames_run(encoder: WhisperEncoder, inputs: Features) -> list[tuple[int, int]]:
    """(rows, mel frames) of each batch that enters the convolutions."""
    seen: list[tuple[int, int]] = []
    handle = encoder.encoder.conv1.register_forward_pre_hook(lambda module, mel: seen.append((len(mel[0]), mel[0].size(2))))
    try:
        encoder(inputs)
    finally:
        handle.remove()
    return seen


def test_a_clip_costs_what_it_is_long(full, clipped):
    clips = [sound(RATE * seconds) for seconds in (5, 4, 1, 20)]
    assert frames_run(full, full.preprocess(clips[:1])) == [(1, 3000)]
    assert frames_run(clipped, clipped.preprocess(clips[:1])) == [(1, 500)]
    assert frames_run(clipped, clipped.preprocess(clips)) == [(1, 2000), (2, 500), (1, 100)]


# ---- over 30 s --------------------------------------------------------------------------------------------------------------


def test_70_s_are_three_clips_joined_bit_for_bit_in_the_full_context(checkpoint, full):
    encoder, samples = WhisperEncoder(checkpoint, long="chunk"), sound(70 * RATE)
    pieces = samples.split(LIMIT)
    inputs = encoder.preprocess([samples])
    assert inputs.values.shape == (1, 80, 9000) and inputs.lens.tolist() == [7000]
    mels = torch.cat([full.preprocess([piece]).values for piece in pieces])
    assert torch.equal(inputs.values[0], torch.cat(list(mels), dim=1))
    came, expected = encoder(inputs), full(Features(mels, torch.tensor([3000, 3000, 1000]))).values
    assert came.values.shape == (1, 4500, 64) and came.lens.tolist() == [3500]
    assert torch.equal(came.values[0], torch.cat([expected[0], expected[1], torch.where(
        torch.arange(1500)[:, None] < 500, expected[2], 0.0)]))


def test_long_and_short_clips_in_one_batch_of_the_full_context(checkpoint, full):
    encoder, clips = WhisperEncoder(checkpoint, long="chunk", max_chunks=2), [sound(LIMIT + 1), sound(16_000, seed=1)]
    came = encoder(encoder.preprocess(clips))
    assert came.values.shape == (2, 3000, 64) and came.lens.tolist() == [1501, 50]
    for row, start, piece in ((0, 0, clips[0][:LIMIT]), (0, 1500, clips[0][LIMIT:]), (1, 0, clips[1])):
        alone = full(full.preprocess([piece]))
        length = int(alone.lens[0])
        close(came.values[row, start:start + length], alone.values[0, :length])
    assert torch.equal(encoder(encoder.preprocess(clips[1:])).values, full(full.preprocess(clips[1:])).values)


def test_70_s_are_three_clips_joined_in_the_clip_context(clipped):
    samples, short = sound(70 * RATE + 5), sound(8_000, seed=1)
    batch = clipped(clipped.preprocess([short, samples]))
    assert batch.values.shape == (2, 3501, 64) and batch.lens.tolist() == [25, 3501]
    apart = [clipped(clipped.preprocess([piece])).values[0] for piece in samples.split(LIMIT)]
    assert [len(piece) for piece in apart] == [1500, 1500, 501]
    close(batch.values[1], torch.cat(apart))
    close(batch.values[0, :25], clipped(clipped.preprocess([short])).values[0])


@pytest.mark.parametrize("options, most", [({"context": "clip"}, 3000), ({"long": "chunk"}, 3000)])
def test_max_chunks_bounds_what_is_encoded_at_once(checkpoint, options, most):
    few, many = (WhisperEncoder(checkpoint, max_chunks=count, **options) for count in (1, 16))
    inputs = few.preprocess([sound(75 * RATE), sound(31 * RATE, seed=1)])
    runs = frames_run(few, inputs)
    assert len(runs) == 5 and all(rows * frames <= most for rows, frames in runs)
    assert len(frames_run(many, inputs)) < 5
    close(few(inputs).values, many(inputs).values)


def test_sound_is_never_cut_unasked(checkpoint):
    for options in ({}, {"context": "clip", "long": "refuse"}):
        with pytest.raises(BadInput, match=r"clip 0 of 30\.01 s.*at most 30 s.*long=\"chunk\""):
            WhisperEncoder(checkpoint, **options).preprocess([torch.zeros(LIMIT + 160)])


# ---- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, words", [
    ({"context": "short"}, "context 'short'; expected 'full' or 'clip'"),
    ({"long": "cut"}, "long 'cut'; expected 'refuse', 'chunk' or None"),
    ({"max_chunks": 0}, "max_chunks 0; expected an integer ≥ 1"),
])
def test_settings_that_mean_nothing_are_refused(checkpoint, options, words):
    with pytest.raises(BadInput, match=words):
        WhisperEncoder(checkpoint, **options)


@pytest.mark.parametrize("options, frames, words", [
    ({"context": "clip"}, 0, r"expected values \(B, 80, T_mel\)"),
    ({"long": "chunk"}, 3500, r"expected values \(B, 80, a multiple of 3000\)"),
    ({}, 6000, r"expected values \(B, 80, 3000\)"),
])
def test_foreign_inputs_are_refused(checkpoint, options, frames, words):
    with pytest.raises(BadInput, match=words):
        WhisperEncoder(checkpoint, **options)(Features(torch.zeros(1, 80, frames), torch.tensor([0])))


@pytest.mark.parametrize("length", [-1, 101])
def test_lens_outside_the_tensor_are_refused(clipped, length):
    with pytest.raises(BadInput, match=rf"lens\[1\] = {length} for values \(2, 80, 100\)"):
        clipped(Features(torch.zeros(2, 80, 100), torch.tensor([3, length])))


# ---- what records it --------------------------------------------------------------------------------------------------------


def test_the_full_context_is_told_by_saying_nothing(checkpoint, full, clipped):
    assert full.settings() == {} and "context" not in describe_encoder(full) and "long" not in describe_encoder(full)
    assert clipped.settings() == {"context": "clip"}
    assert describe_encoder(clipped) == describe_encoder(full) | {"context": "clip"}
    assert WhisperEncoder(checkpoint, context="clip", long="refuse").settings() == {"context": "clip", "long": "refuse"}
    assert WhisperEncoder(checkpoint, long="chunk").settings() == {"long": "chunk"}


def ears(encoder: WhisperEncoder) -> OmniGPT:
    return OmniGPT(reference(), (encoder, Projector(encoder.d_model, 32, 16, stack=10, zero_init=False)))


def logits(omni: OmniGPT) -> Tensor:
    return omni(torch.tensor([[1, 2, 3]]), audio=[sound(16_000)])


def test_an_adapter_belongs_to_its_context(checkpoint, full, clipped, tmp_path):
    omni = ears(clipped)
    omni.save_adapter(tmp_path / "a")
    again = OmniGPT.load_adapter(tmp_path / "a", reference())
    assert again.encoder.context == "clip" and torch.equal(logits(again), logits(omni))
    for options in ({}, {"any_weights": True}):
        with pytest.raises(BadInput, match=r"encoder\.context: saved 'clip', here nothing"):
            OmniGPT.load_adapter(tmp_path / "a", reference(), encoder=full, **options)
    cautious = WhisperEncoder(checkpoint, context="clip", long="refuse")  # hears the same in what it takes
    assert torch.equal(logits(OmniGPT.load_adapter(tmp_path / "a", reference(), encoder=cautious)), logits(omni))


def test_an_adapter_of_the_full_context_is_as_it_ever_was(checkpoint, full, clipped, tmp_path):
    omni = ears(full)
    omni.save_adapter(tmp_path / "a")
    keys = {"type", "source", "d_model", "frame_rate", "sampling_rate", "sha256"}
    assert set(load_adapter(tmp_path / "a")[1]["encoder"]) == keys
    assert OmniGPT.load_adapter(tmp_path / "a", reference()).encoder.context == "full"
    with pytest.raises(BadInput, match=r"encoder\.context: saved nothing, here 'clip'"):
        OmniGPT.load_adapter(tmp_path / "a", reference(), encoder=clipped)


def test_an_adapter_that_names_no_known_context_is_refused(clipped, tmp_path):
    ears(clipped).save_adapter(tmp_path / "a")
    tensors, description = load_adapter(tmp_path / "a")
    description["encoder"]["context"] = ["clip"]
    save_adapter(tmp_path / "a", tensors, description)
    with pytest.raises(BadInput, match="expected 'full' or 'clip'"):
        OmniGPT.load_adapter(tmp_path / "a", reference())


def test_shards_belong_to_their_context(checkpoint, full, clipped, tmp_path, capsys):
    clips = {"a": sound(16_000), "b": sound(31 * RATE, seed=1)}
    for name, samples in clips.items():
        save_audio(tmp_path / f"{name}.wav", samples, RATE)
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text("".join(json.dumps({"audio": f"{name}.wav", "text": name, "seconds": len(samples) / RATE}) + "\n"
                                for name, samples in clips.items()))
    command = ["extract", "--manifest", str(manifest), "--encoder", str(checkpoint), "--dtype", "float32"]
    assert main([*command, "--out", str(tmp_path / "clip"), "--context", "clip"]) == 0
    source = open_source(tmp_path / "clip", clipped)
    assert source.lens.tolist() == [50, 1550]
    with pytest.raises(BadInput, match=r"encoder\.context: saved 'clip', here nothing.*--context"):
        open_source(tmp_path / "clip", full)
    assert main([*command, "--out", str(tmp_path / "full")]) == 2  # 31 s
    assert "at most 30 s" in capsys.readouterr().err
    short = tmp_path / "short.jsonl"
    short.write_text(manifest.read_text().splitlines()[0] + "\n")
    assert main(["extract", "--manifest", str(short), *command[3:], "--out", str(tmp_path / "full")]) == 0
    assert open_source(tmp_path / "full", full).lens.tolist() == [50]
    with pytest.raises(BadInput, match=r"encoder\.context: saved nothing, here 'clip'"):
        open_source(tmp_path / "full", clipped)


def test_an_encoder_is_opened_by_name_and_context(checkpoint):
    assert open_encoder(str(checkpoint)).settings() == {}
    assert open_encoder(str(checkpoint), context="clip").settings() == {"context": "clip"}
    with pytest.raises(BadInput, match="log_mel with context 'clip'"):
        open_encoder("log_mel", context="clip")


def test_a_run_of_before_the_option_goes_on(full):
    """The encoder's identity tells the context; among the options a run folder's record has no word of it."""
    args = SimpleNamespace(encoder="x", context="full", layer=None, steps=3)
    assert deciding(args, encoder={}) == {"options": {"steps": 3}, "encoder": {}}


# ---- layers -----------------------------------------------------------------------------------------------------------------

SELECTIONS = [(0, [0]), (1, [1]), (2, [2]), (-1, [2]), (-3, [0]), ((2, 0), [2, 0]), ((1,), [1]), ("all", [0, 1, 2])]


@pytest.mark.parametrize("layer, numbers", SELECTIONS)
def test_hidden_layers_are_those_of_transformers_bit_for_bit(checkpoint, layer, numbers):
    """The last of them is normed, as the last hidden state is."""
    from transformers import WhisperModel

    encoder = WhisperEncoder(checkpoint, layer=layer)
    inputs = encoder.preprocess([sound(48_000), sound(LIMIT, seed=1)])
    with torch.no_grad():
        theirs = WhisperModel.from_pretrained(checkpoint).eval().encoder(inputs.values, output_hidden_states=True)
    assert len(theirs.hidden_states) == 3 and torch.equal(theirs.hidden_states[2], theirs.last_hidden_state)
    came = encoder(inputs)
    assert torch.equal(came.values, torch.cat([theirs.hidden_states[number] for number in numbers], dim=-1))
    assert (encoder.num_layers, encoder.width, encoder.d_model) == (len(numbers), 64, 64 * len(numbers))
    assert came.lens.tolist() == [150, 1500]


def test_without_a_layer_there_is_one_and_its_width(full):
    assert (full.num_layers, full.width, full.d_model) == (1, 64, 64)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=5))
def test_layers_of_a_row_in_a_ragged_batch_are_those_of_the_clip_alone(every, lens):
    """Each layer against the equation's, which never saw a batch."""
    values = torch.full((len(lens), 80, max(lens)), float("nan"), dtype=torch.float64)
    clips = [mel_of(80, length, seed=seed) for seed, length in enumerate(lens)]
    for row, clip in zip(values, clips):
        row[:, :clip.size(1)] = clip
    batch = every(Features(values, torch.tensor(lens)))
    for came, clip, length in zip(batch.values, clips, lens):
        alone = every(Features(clip[None], torch.tensor([length]))).values[0]
        close(came[:len(alone)], alone)
        assert not came[len(alone):].any()


@pytest.fixture(scope="module")
def every(checkpoint: Path) -> WhisperEncoder:
    return WhisperEncoder(checkpoint, context="clip", layer="all", dtype=torch.float64)


@torch.no_grad()
def test_each_layer_equals_the_equation(exact, every):
    mel, count = mel_of(80, 177), len(exact.encoder.layers)
    came = every(Features(mel[None], torch.tensor([177]))).values[0]
    for number in range(count + 1):
        twin = SimpleNamespace(conv1=exact.encoder.conv1, conv2=exact.encoder.conv2, layers=exact.encoder.layers[:number],
                               embed_positions=exact.encoder.embed_positions,
                               layer_norm=exact.encoder.layer_norm if number == count else torch.nn.Identity())
        close(came[:, 64 * number:64 * (number + 1)], by_hand(twin, mel))


@pytest.mark.parametrize("options", [{"context": "clip"}, {"long": "chunk"}])
def test_layers_of_long_sound_are_those_of_its_chunks(checkpoint, options):
    encoder, samples = WhisperEncoder(checkpoint, layer=(2, 1), **options), sound(31 * RATE)
    came = encoder(encoder.preprocess([samples]))
    assert came.lens.tolist() == [1550] and came.values.size(2) == 128
    apart = [encoder(encoder.preprocess([piece])) for piece in samples.split(LIMIT)]
    close(came.values[0, :1550], torch.cat([values[0, :lens[0]] for values, lens in apart]))


@pytest.mark.parametrize("layer, held", [(0, 0), (1, 1), ((1, 0), 1), (2, 2), ("all", 2), (None, 2)])
def test_layers_above_the_highest_are_dropped(checkpoint, layer, held):
    assert len(WhisperEncoder(checkpoint, layer=layer).encoder.layers) == held


@pytest.mark.parametrize("layer", [3, -4, True, "1", (), (1, 1), (0, -3), 1.0, [0, None]])
def test_layers_that_are_none_are_refused(checkpoint, layer):
    with pytest.raises(BadInput, match=r"WhisperEncoder: got layer .*different numbers from 0 to 2.*-1 is 2"):
        WhisperEncoder(checkpoint, layer=layer)


def test_an_adapter_belongs_to_its_layer(checkpoint, full, tmp_path):
    for layer, told in ((-2, 1), ((0, 2), [0, 2]), ("all", "all"), ([0, 1, 2], "all")):
        encoder = WhisperEncoder(checkpoint, layer=layer)
        assert encoder.settings() == {"layer": told}
        omni = ears(encoder)
        omni.save_adapter(tmp_path / "a")
        again = OmniGPT.load_adapter(tmp_path / "a", reference())
        assert again.encoder.layers == encoder.layers and torch.equal(logits(again), logits(omni))
    ears(WhisperEncoder(checkpoint, layer=1)).save_adapter(tmp_path / "a")
    with pytest.raises(BadInput, match=r"encoder\.layer: saved 1, here nothing"):
        OmniGPT.load_adapter(tmp_path / "a", reference(), encoder=full, any_weights=True)


# ---- the benchmark ----------------------------------------------------------------------------------------------------------


def test_the_benchmark_measures_what_it_says(monkeypatch):
    from benchmarks import encoder as bench

    monkeypatch.setattr(bench, "SIZES", {"small": (64, 2, 4)})
    monkeypatch.setattr(bench, "cases", lambda suite, device: [bench.Case("small", 1, 2)])
    groups = list(bench.groups("quick", "cpu"))
    assert [group.case.rsplit(": ")[1] for group in groups] == ["mel frames → features", "waveforms → features"]
    for group in groups:
        full, clip, own = (variant.step() for variant in group.variants[:3])
        assert torch.equal(full.values, own) and clip.values.shape == (2, 50, 64)
        assert all(variant.error < group.bound for variant in group.variants[:3])
        assert group.variants[3].step is None and group.variants[3].why


@pytest.mark.parametrize("context, frames", [("full", 1500), ("clip", 50)])
def test_the_benchmark_counts_the_flops_that_torch_counts(tmp_path, context, frames):
    """Of matmuls and convolutions; torch counts none in its fused attention on the CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.encoder import flops_of

    encoder = WhisperEncoder(make_tiny_whisper(tmp_path, encoder_ffn_dim=256), context=context)
    encoder.encoder.config._attn_implementation = "eager"
    inputs = encoder.preprocess([sound(16_000)])
    with FlopCounterMode(display=False) as counter:
        encoder(inputs)
    assert counter.get_total_flops() == flops_of(64, 2, frames, 80)
