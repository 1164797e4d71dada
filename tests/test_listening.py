"""The listening gap: against the plain computation row by row, on GPTs that ignore their ears and on one that learns to hear."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import fingerprint, nano_gpt, reference, tiny_hf
from hypothesis import given
from hypothesis import strategies as st
from tiny_speech import make_tiny_speech
from torch import Tensor, nn

from omni_adapters import Features, OmniGPT, Projector
from omni_adapters.encoders.hf_speech import HFSpeechEncoder
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.eval import listening_gap
from omni_adapters.eval.listening import (
    ListeningGap,
    NotListening,
    backwards_in_time,
    exchange,
    gap_of,
    loss_of,
    silence,
)
from omni_adapters.features import pad_rows
from omni_adapters.reference_gpt import GPT, GPTConfig
from omni_adapters.shapes import BadInput


class Plain(nn.Module):
    """A host that returns logits or the mean loss, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        inner = reference()
        self.transformer, self.lm_head, self.inner = inner.transformer, inner.lm_head, inner

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.inner(idx, targets)


P = 40  # a placeholder id inside every host's vocabulary
IDX = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 0], [3, 1, 2, 9]])
TARGETS = torch.tensor([[-1, 3, 4, 5], [-1, 7, 8, 9], [-1, 11, -1, -1], [-1, 2, 9, 1]])
pytestmark = pytest.mark.filterwarnings("ignore::omni_adapters.eval.listening.NotListening")


def waves(*seconds: float, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(int(16_000 * s), generator=draw) for s in seconds]


def ears(gpt: nn.Module | None = None, **options: Any) -> OmniGPT:
    gpt = reference() if gpt is None else gpt
    table = gpt.get_input_embeddings() if hasattr(gpt, "get_input_embeddings") else gpt.transformer["wte"]
    torch.manual_seed(0)
    projector = Projector(80, table.weight.size(1), 16, stack=12, zero_init=False)
    return OmniGPT(gpt, (LogMelEncoder(), projector), **options).eval()


def batch(*seconds: float, **others: Any) -> dict[str, Any]:
    return {"idx": IDX, "targets": TARGETS, "audio": waves(*seconds)} | others


@torch.no_grad()
def plain(omni: OmniGPT, sounds: list[Any]) -> list[tuple[float, int]]:
    """(mean loss, graded tokens) of each row alone, by the GPT's own loss."""
    rows = zip(IDX.split(1), TARGETS.split(1), sounds)
    return [(float(loss_of(omni(idx, targets, [sound]))), int((targets != -1).sum())) for idx, targets, sound in rows]


def mean(rows: list[tuple[float, int]]) -> float:
    return sum(loss * count for loss, count in rows) / sum(count for _, count in rows)


# ---- the equation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "options"), [
    (reference, {}), (reference, {"insert_at": 1, "loss": "fused"}), (Plain, {}),
    (nano_gpt, {}), (nano_gpt, {"loss": "fused"}), (tiny_hf, {}),
], ids=str)
def test_each_loss_is_that_of_the_rows_alone(build: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    omni, sounds = ears(build().eval(), **options), waves(0.3, 0.4, 0.25, 0.3)
    found = listening_gap(omni, batch(0.3, 0.4, 0.25, 0.3))
    other = [sounds[row] for row in (2, 3, 0, 1)]
    quiet = [torch.zeros(len(sound)) for sound in sounds]
    rows = {"right": plain(omni, sounds), "shuffled": plain(omni, other), "blank": plain(omni, quiet),
            "reversed": plain(omni, [sound.flip(0) for sound in sounds])}
    for name, expected in rows.items():  # ten tokens of some 5 nats, each good to some 1e-6 in fp32
        assert getattr(found, name) == pytest.approx(mean(expected), abs=1e-5), name
    assert (found.num_rows, found.num_graded) == (4, 10)
    assert found.gap == found.shuffled - found.right and found.gaps["blank"] == found.blank - found.right
    assert found.as_dict()["gap_reversed"] == found.reversed - found.right and len(found.as_dict()) == 10


def test_the_standard_error_is_that_of_paired_differences() -> None:
    """For equally many tokens a row it is the textbook's stdev / √K; for others, the spread of what each row has left over."""
    right, shuffled = torch.tensor([3.0, 2.0, 4.0, 0.0]), torch.tensor([6.0, 2.5, 5.0, 9.0])
    same = torch.zeros(4)
    found = gap_of({"right": right, "shuffled": shuffled, "blank": same, "reversed": same}, torch.tensor([2, 2, 2, 0]))
    each = [1.5, 0.25, 0.5]
    assert found.gap == pytest.approx(statistics.mean(each), rel=1e-12)
    assert found.standard_error == pytest.approx(statistics.stdev(each) / 3**0.5, rel=1e-12)
    ragged = gap_of({"right": right, "shuffled": shuffled, "blank": same, "reversed": same}, torch.tensor([3, 1, 2, 0]))
    left = [3.0 - 3 * 0.75, 0.5 - 0.75, 1.0 - 2 * 0.75]
    assert ragged.gap == pytest.approx(0.75, rel=1e-12)
    assert ragged.standard_error == pytest.approx(math.sqrt(3 / 2 * sum(x * x for x in left)) / 6, rel=1e-12)


@pytest.mark.parametrize(("gap", "error", "nil"), [
    (1.0, 0.49, False), (1.0, 0.5, True), (1e-9, 0.0, False), (0.0, 0.0, True), (-1.0, 0.1, True), (math.nan, 0.1, True),
])
def test_what_counts_as_nil(gap: float, error: float, nil: bool) -> None:
    assert ListeningGap(0.0, gap, 0.0, 0.0, error, 4, 10).is_nil is nil


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 100))
def test_backwards_reverses_what_is_valid(lens: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randn(length, 3, generator=draw) for length in lens]
    padded = torch.nn.functional.pad(pad_rows(rows).values, (0, 0, 0, 2), value=7.0)
    for row, flipped in zip(rows, backwards_in_time(Features(padded, torch.tensor(lens))).values):
        assert torch.equal(flipped[: len(row)], row.flip(0)) and bool((flipped[-2:] == 7).all())


# ---- whose sound is whose ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_nobody_keeps_a_sound_where_another_can_be_had(kinds: list[int]) -> None:
    """kinds: which sound each row has, 0 for none. A roll by any distance, so it finds what the best distance finds."""
    features = pad_rows([torch.full((4 if kind else 0, 2), float(kind)) for kind in kinds])
    other = exchange(features)
    sounding = [row for row, kind in enumerate(kinds) if kind]
    silent = [row for row, kind in enumerate(kinds) if not kind]
    assert sorted(other.tolist()) == list(range(len(kinds))) and other[silent].tolist() == silent
    heard = [kinds[row] for row in sounding]

    def kept(distance: int) -> int:
        return sum(a == b for a, b in zip(heard, heard[-distance:] + heard[:-distance]))

    if len(heard) > 1:
        assert sum(kinds[row] == kinds[other[row]] for row in sounding) == min(map(kept, range(1, len(heard))))


def test_a_batch_is_rolled_by_its_half_unless_that_brings_back_the_same_clip() -> None:
    a, b, c, d = (torch.full((3, 2), float(n)) for n in range(4))
    assert exchange(pad_rows([a, b, c, d])).tolist() == [2, 3, 0, 1]
    assert exchange(pad_rows([a, b, a, b])).tolist() == [3, 0, 1, 2]
    assert exchange(pad_rows([a, a, a, b])).tolist() == [2, 3, 0, 1]  # two keep their sound at any distance
    rows = torch.tensor([0, 0, 1, 1])
    assert exchange(pad_rows([a, b, c, d]), rows).tolist() == [2, 3, 0, 1]
    assert exchange(pad_rows([a, b, c, a]), torch.tensor([0, 0, 1, 2])).tolist() in ([2, 3, 0, 1], [3, 2, 1, 0])


def test_rows_without_sound_do_not_count() -> None:
    omni = ears()
    sounds: list[Any] = [*waves(0.3, 0.4), None, waves(0.25, seed=1)[0]]
    found = listening_gap(omni, batch(audio=sounds))
    rows = [0, 1, 3]
    assert found.right == pytest.approx(mean([plain(omni, sounds)[row] for row in rows]), abs=1e-5)
    swapped = plain(omni, [sounds[3], sounds[0], None, sounds[1]])
    assert found.shuffled == pytest.approx(mean([swapped[row] for row in rows]), abs=1e-5)
    assert (found.num_rows, found.num_graded) == (3, 9)


def test_clips_at_placeholders() -> None:
    """Two clips in the first row, none in the last: losses are those of the same clips laid by hand."""
    omni = ears(placeholders={"audio": P})
    idx = torch.tensor([[1, P, 3, P, 4], [P, 6, 7, 8, 0], [9, P, 11, 0, 0], [3, 1, 2, 9, 0]])
    targets = torch.tensor([[P, 3, P, 4, 5], [6, 7, 8, -1, -1], [P, 11, 2, -1, -1], [1, 2, 9, -1, -1]])
    sounds = waves(0.3, 0.4, 0.25, 0.5)
    found = listening_gap(omni, {"idx": idx, "targets": targets, "audio": sounds})

    @torch.no_grad()
    def losses(clips: list[Tensor]) -> float:
        return float(omni(idx[:3], targets[:3], clips))

    assert found.num_rows == 3 and found.num_graded == 3 + 3 + 2
    assert found.right == pytest.approx(losses(sounds), abs=1e-5)
    assert found.shuffled == pytest.approx(losses([sounds[row] for row in (2, 3, 0, 1)]), abs=1e-5)
    assert found.reversed == pytest.approx(losses([sound.flip(0) for sound in sounds]), abs=1e-5)


# ---- forms of sound ------------------------------------------------------------------------------------------------------


def test_inputs_and_features_are_reversed_in_time() -> None:
    omni = ears()
    inputs = omni.encoder.preprocess(waves(0.3, 0.4, 0.25, 0.3))
    features = omni.encoder(inputs)
    of_clips = listening_gap(omni, batch(0.3, 0.4, 0.25, 0.3))
    of_inputs = listening_gap(omni, {"idx": IDX, "targets": TARGETS, "audio_inputs": inputs})
    of_features = listening_gap(omni, {"idx": IDX, "targets": TARGETS, "audio_features": features})
    assert of_inputs == of_features  # a log-mel frame is its input's frame
    assert of_clips._replace(reversed=0.0) == of_inputs._replace(reversed=0.0)
    flipped = Features(features.values.clone(), features.lens)
    for row, length in enumerate(features.lens.tolist()):
        flipped.values[row, :length] = features.values[row, :length].flip(0)
    with torch.no_grad():
        assert of_features.reversed == pytest.approx(float(omni(IDX, TARGETS, audio_features=flipped)), abs=1e-5)
    assert of_clips.reversed == pytest.approx(mean(plain(omni, [w.flip(0) for w in waves(0.3, 0.4, 0.25, 0.3)])), abs=1e-5)


def test_arrays_are_heard_as_tensors_are() -> None:
    omni = ears()
    arrays = [wave.numpy() for wave in waves(0.3, 0.4, 0.25, 0.3)]
    assert listening_gap(omni, batch(audio=arrays)) == listening_gap(omni, batch(0.3, 0.4, 0.25, 0.3))


def test_blank_is_the_encoders_silence() -> None:
    omni = ears()
    quiet = silence(omni, pad_rows([torch.randn(12, 80), torch.randn(5, 80), torch.randn(0, 80)]))
    expected = omni.encoder(omni.encoder.preprocess([torch.zeros(12 * 160)]))
    assert torch.equal(quiet.values[1, :5], expected.values[0, :5]) and quiet.lens.tolist() == [12, 5, 0]


@pytest.mark.parametrize("kind", ["wav2vec2-layer", "bert"])
def test_silence_is_as_long_as_what_it_replaces(kind: str, tmp_path: Path) -> None:
    """24 frames' worth of samples make 23 frames in these encoders, and one frame's worth none."""
    encoder = HFSpeechEncoder(make_tiny_speech(tmp_path, kind))
    omni = OmniGPT(reference(), (encoder, Projector(32, 32, 16)))
    features = encoder(encoder.preprocess([torch.randn(8_000), torch.randn(6_000)]))
    quiet, made = silence(omni, features), encoder(encoder.preprocess([torch.zeros(24 * 320)]))
    assert features.lens[0] == 24 and quiet.lens.equal(features.lens) and quiet.values.shape == features.values.shape
    assert torch.equal(quiet.values[0], torch.cat([made.values[0], made.values[0, -1:]]))
    short = encoder(encoder.preprocess([torch.randn(600), torch.randn(700)]))
    assert silence(omni, short).values.shape == (2, 1, 32)


def test_images_are_seen_as_they_are_in_all_four() -> None:
    """The sound takes no part in what an image gives: features of an image that is exchanged would move every loss."""

    class Eye:
        d_model = 5

        def preprocess(self, signals: Any) -> Features:
            return pad_rows(list(signals))

        def __call__(self, inputs: Features) -> Features:
            return inputs

    torch.manual_seed(0)
    eye = (Eye(), Projector(5, 32, 16, zero_init=False))
    omni = ears(image=eye, placeholders={"audio": P, "image": P + 1})
    idx = torch.cat([torch.tensor([[P, P + 1]] * 4), IDX], dim=1)
    targets = torch.cat([torch.full((4, 2), -1), TARGETS], dim=1)
    sounds, sights = waves(0.3, 0.4, 0.25, 0.3), [torch.randn(n, 5) for n in (2, 3, 1, 2)]
    found = listening_gap(omni, {"idx": idx, "targets": targets, "audio": sounds, "image": sights})
    with torch.no_grad():
        assert found.shuffled == pytest.approx(float(omni(idx, targets, [*sounds[2:], *sounds[:2]], image=sights)), abs=1e-5)


# ---- who listens ---------------------------------------------------------------------------------------------------------


def test_a_gpt_that_ignores_its_ears_has_a_gap_of_exactly_nothing_and_warns() -> None:
    """A fresh GPT's attention gives zero to the residual stream, so nothing that is prepended reaches a word."""
    torch.manual_seed(0)
    omni = ears(GPT(GPTConfig(sequence_len=64, vocab_size=97, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)))
    with pytest.warns(NotListening, match=r"costs 0\.0000 ± 0\.0000 nats a token over 4 rows: nil") as caught:
        found = listening_gap(omni, batch(0.3, 0.4, 0.25, 0.3))
    assert found.gap == 0 and found.standard_error == 0 and found.gaps["reversed"] == 0
    assert caught[0].filename == __file__  # the warning names the caller's line


def test_one_that_learns_to_hear_has_a_gap_and_does_not_warn() -> None:
    """Eight tones, low or high; the word is which. Sixty steps bring the right loss near 0 and another's far above it."""
    t = torch.arange(3200) / 16_000
    tones = [0.3 * (2 * torch.pi * hertz * t).sin() for hertz in (220, 240, 260, 280, 1600, 1700, 1800, 1900)]
    omni = ears(reference(seed=2), insert_at=1)
    omni.gpt.requires_grad_(True)
    idx, targets = torch.tensor([[1, 2]] * 8), torch.tensor([[-1, 5]] * 4 + [[-1, 6]] * 4)
    optimizer = torch.optim.AdamW(omni.parameters(), lr=1e-2)
    omni.train()
    for _ in range(60):
        optimizer.zero_grad()
        omni(idx, targets, tones).backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = listening_gap(omni, {"idx": idx, "targets": targets, "audio": tones})
    assert found.right < 0.1 < 1 < found.gap and not found.is_nil
    assert found.gaps["reversed"] < 0.1 * found.gap  # a tone backwards is that tone


# ---- as it was, afterwards -----------------------------------------------------------------------------------------------


class Chancy(LogMelEncoder):
    """An encoder that draws."""

    def preprocess(self, waveforms: Any) -> Features:
        torch.rand(3)
        return super().preprocess(waveforms)


def test_state_is_as_before_also_after_an_error() -> None:
    gpt = nano_gpt(dropout=0.5)
    omni = OmniGPT(gpt, (Chancy(), Projector(80, 24, 16, stack=12, zero_init=False)))
    omni.train()
    omni.projector.eval()  # flags that differ come back one by one
    before = fingerprint(omni)
    first = listening_gap(omni, batch(0.3, 0.4, 0.25, 0.3))
    assert fingerprint(omni) == before
    assert listening_gap(omni, batch(0.3, 0.4, 0.25, 0.3)) == first  # no dropout inside
    with pytest.raises(BadInput):
        listening_gap(omni, batch(audio=waves(0.3, 0.4)))
    assert fingerprint(omni) == before
    loss = loss_of(omni(IDX, TARGETS, waves(0.3, 0.4, 0.25, 0.3)))
    loss.backward()
    gradient = omni.projector.fc2.weight.grad
    assert gradient is not None
    kept = gradient.clone()
    listening_gap(omni, batch(0.3, 0.4, 0.25, 0.3))
    assert omni.projector.fc2.weight.grad is gradient and torch.equal(gradient, kept)


def test_a_compiled_wrapper_is_asked_about_what_is_in_it() -> None:
    omni = ears()
    compiled = torch.compile(omni, backend="eager")
    assert listening_gap(compiled, batch(0.3, 0.4, 0.25, 0.3)) == listening_gap(omni, batch(0.3, 0.4, 0.25, 0.3))


# ---- refusals ------------------------------------------------------------------------------------------------------------

ONE = IDX[:1], TARGETS[:1]


@pytest.mark.parametrize(("given", "message"), [
    ({"idx": ONE[0], "targets": ONE[1], "audio": waves(0.3)},
     "got 1 rows with sound and a graded token; expected at least two. The sound of one is exchanged with another's."),
    (batch(audio=[None] * 4), "got 0 rows with sound"),
    (batch(audio=[None, None, None, *waves(0.3)]), "got 1 rows with sound"),
    (batch(0.3, 0.3, 0.3, 0.3, targets=torch.tensor([[-1, 3, 4, 5], *[[-1] * 4] * 3])), "got 1 rows with sound"),
    (batch(audio=waves(0.3) * 4), "got 4 clips that are all the same; expected at least two that differ."),
    ({"idx": IDX, "targets": TARGETS}, r"got a batch of idx, targets; expected idx, targets and one of audio"),
    ({"idx": IDX, "audio": waves(0.3)}, "got a batch of audio, idx"),
    (batch(0.3, 0.3, 0.3, 0.3, lens=3), "got lens in batch; expected idx, targets, one of audio"),
    (batch(0.3, 0.4), "got 2 clips for 4 rows of idx"),
    (batch(0.3, 0.3, 0.3, 0.3, image=[]), "OmniGPT: got an image; expected a GPT with eyes"),
])
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        listening_gap(ears(), given)


def test_a_wrapper_is_refused_in_words() -> None:
    with pytest.raises(BadInput, match=r"got a Sequential; expected an OmniGPT. Of a wrapper such as DDP give its .module."):
        listening_gap(nn.Sequential(ears()), batch(0.3, 0.3, 0.3, 0.3))  # type: ignore[arg-type]
