"""Sources of clips: shards and manifests look alike to a training loop, and workers change nothing but the waiting."""

import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("soundfile")
from omni_adapters import OmniGPT, Projector
from omni_adapters.data.audio import load_audio, save_audio
from omni_adapters.data.clips import ClipSource, ManifestClips, loader
from omni_adapters.data.collate import collate
from omni_adapters.data.epochs import Order, deal, fill
from omni_adapters.data.extract import write_shards
from omni_adapters.data.manifest import ManifestRow, read_manifest, write_manifest
from omni_adapters.data.shards import ShardReader
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.features import Features
from omni_adapters.shapes import BadInput, MissingExtra

SECONDS = [0.31, 0.1, 0.22, 0.007, 0.15, 0.4, 0.05, 0.28]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder, rows = tmp_path_factory.mktemp("data"), []
    for number, seconds in enumerate(SECONDS):
        path = folder / "audio" / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        save_audio(path, np.random.default_rng(number).uniform(-0.5, 0.5, round(16_000 * seconds)), 16_000)
        rows.append(ManifestRow(str(path), f"clip {number} é", seconds, {"speaker": {"id": number}}))
    write_manifest(folder / "rows.jsonl", rows)
    return read_manifest(folder / "rows.jsonl")


@pytest.fixture(scope="module")
def encoder():
    return LogMelEncoder(mean=torch.full((80,), 0.3), std=torch.full((80,), 0.7))


@pytest.fixture(scope="module")
def clips(manifest, encoder):
    return ManifestClips(manifest, encoder)


@pytest.fixture(scope="module")
def shards(manifest, encoder, tmp_path_factory):
    return ShardReader(write_shards(manifest, encoder, tmp_path_factory.mktemp("shards"), description={"encoder": "log_mel"},
                                    samples_per_shard=3, dtype=torch.float32, progress=False), verify=True)


# --- sources ----------------------------------------------------------------------------------------------------------

def test_both_are_sources_and_a_list_is_none(clips, shards):
    assert isinstance(clips, ClipSource) and isinstance(shards, ClipSource) and not isinstance([1], ClipSource)
    assert (clips.kind, shards.kind) == ("audio_inputs", "audio_features")
    for source in (clips, shards):
        assert len(source) == len(source.lens) == len(SECONDS) and source.lens.dtype == np.int64
        assert json.loads(json.dumps(source.identity)) == source.identity


@given(numbers=st.lists(st.integers(0, len(SECONDS) - 1), min_size=1, max_size=6))
def test_what_shards_hold_is_what_the_encoder_makes_of_a_manifest(clips, shards, encoder, manifest, numbers):
    """Log-mel frames a clip alone, so shards written in other batches are equal bit for bit."""
    inputs, rows = clips.load_batch(numbers)
    alone = encoder.preprocess([load_audio(manifest[number].audio) for number in numbers])
    assert torch.equal(inputs.values, alone.values) and torch.equal(inputs.lens, alone.lens)
    features, stored = shards.load_batch(numbers)
    encoded = encoder(inputs)
    assert torch.equal(features.lens, encoded.lens) and rows == stored
    for row, length in enumerate(encoded.lens.tolist()):
        assert torch.equal(features.values[row, :length], encoded.values[row, :length])
    assert rows[0] == {"audio": f"{numbers[0]}.wav", "text": f"clip {numbers[0]} é", "seconds": SECONDS[numbers[0]],
                       "speaker": {"id": numbers[0]}}


def test_a_gpt_hears_the_same_from_both(clips, shards, encoder, gpt):
    torch.manual_seed(0)
    omni = OmniGPT(gpt, (encoder, Projector(80, 32, stack=8, zero_init=False)))
    losses, deaf = [], omni(*collate([[1, 2, 3], [4, 5]])).item()
    for source in (clips, shards):
        sound, _ = source.load_batch([2, 0])
        losses.append(omni(*collate([[1, 2, 3], [4, 5]]), **{source.kind: sound}).item())
    assert losses[0] == losses[1] != deaf


def test_lens_follow_the_manifests_seconds(manifest, encoder):
    rows = [ManifestRow(manifest[0].audio, "", seconds) for seconds in (0, 0.31, 1, 1.344, 599.999, 600)]
    assert ManifestClips(rows, encoder).lens.tolist() == [100, 100, 100, 134, 60_000, 60_000]  # 100 frames a second
    unknown = [ManifestRow(manifest[0].audio, "", 0.0)] * 12_000
    assert max(map(len, fill(range(12_000), ManifestClips(unknown, encoder).lens, 3000))) == 30, "no durations, no endless batch"
    slow = LogMelEncoder()
    slow.frame_rate = 0.1
    assert ManifestClips(rows[:1], slow).lens.tolist() == [1]
    assert ManifestClips([ManifestRow("a.wav", "", 1e300)], encoder, max_seconds=float("inf")).lens[0] > 1e12, "no overflow"


def test_one_manifest_has_one_sha256(clips, shards, manifest, encoder, monkeypatch):
    expected = hashlib.sha256()
    for number, seconds in enumerate(SECONDS):
        expected.update(f'{{"audio":"{number}.wav","seconds":{seconds},"speaker":{{"id":{number}}},'
                        f'"text":"clip {number} é"}}\n'.encode())
    assert clips.identity["manifest_sha256"] == shards.identity["manifest_sha256"] == expected.hexdigest()
    monkeypatch.chdir(Path(manifest[0].audio).parent)
    moved = [ManifestRow(os.path.basename(row.audio), row.text, row.seconds, row.attributes) for row in manifest]
    assert ManifestClips(moved, encoder).identity == clips.identity, "the place of a data set does not count"
    for change in ({"text": "other"}, {"seconds": 0.5}, {"attributes": {}}, {"audio": moved[1].audio}):
        changed = [ManifestRow(**{**vars(moved[0]), **change}), *moved[1:]]
        assert ManifestClips(changed, encoder).identity != clips.identity
    slower = LogMelEncoder()
    slower.frame_rate = 50.0
    assert ManifestClips(moved, slower).identity != clips.identity, "another rate plans other batches"


def test_rows_may_be_changed_by_who_got_them(clips):
    clips.load_batch([0])[1][0]["speaker"]["id"] = 99
    clips.row(0)["speaker"]["id"] = 99
    assert clips.load_batch([0])[1][0]["speaker"]["id"] == clips.row(0)["speaker"]["id"] == 0


def test_rows_are_those_of_the_batches(clips, shards):
    for source in (clips, shards):
        assert [source.row(number) for number in (5, 0, 7)] == source.load_batch([5, 0, 7])[1]


@pytest.mark.parametrize("change, message", [
    (dict(rows=[]), "ManifestClips: got no manifest rows; expected at least one"),
    (dict(encoder=object()), "ManifestClips: got an encoder of type object; expected an AudioEncoder"),
    (dict(max_seconds=0), "got max_seconds 0; expected a positive number"),
    (dict(max_seconds=0.3), "ManifestClips, manifest lines 1, 6: got clips of up to 0.4 s; expected 0 to max_seconds = 0.3 s"),
    (dict(rows=[ManifestRow("a.wav", "", 1.0), ManifestRow("a.wav", "", -1.0)]), "manifest line 2: got clips of up to -1 s"),
    (dict(rows=[ManifestRow("a.wav", "", 1.0, {"x": (1,)})]), "manifest line 1: got a row, where 'x' is (1,) (tuple)"),
])
def test_a_bad_manifest(manifest, encoder, change, message):
    with pytest.raises(BadInput) as refusal:
        ManifestClips(**{"rows": manifest, "encoder": encoder, **change})
    assert message in str(refusal.value)


@pytest.fixture
def damaged(manifest, encoder, tmp_path):
    """Row 4 has no audio file."""
    rows = [*manifest[:4], ManifestRow(str(tmp_path / "gone.wav"), "", 1.0), *manifest[5:]]
    return ManifestClips(rows, encoder)


def test_errors_name_the_manifest_line(damaged, manifest, encoder):
    with pytest.raises(BadInput, match=r"ManifestClips, manifest line 5, load_audio\('.*gone\.wav'\): got a path where "):
        damaged.load_batch([1, 4])
    shorter = [ManifestRow(row.audio, row.text, 0.01) for row in manifest]
    with pytest.raises(BadInput, match=r"ManifestClips, manifest line 6, load_audio\(.*\): got a file longer than 0.35 s"):
        ManifestClips(shorter, encoder, max_seconds=0.35).load_batch([1, 5])

    class Refusing(LogMelEncoder):
        def preprocess(self, waveforms):
            raise BadInput("preprocess", "clip 0 of 31 s", "at most 30 s")

    with pytest.raises(BadInput, match="ManifestClips, manifest lines 2, 1 as one batch, preprocess: got clip 0 of 31 s"):
        ManifestClips(manifest, Refusing()).load_batch([1, 0])


# --- the loader -------------------------------------------------------------------------------------------------------

class Numbers:
    """A source whose clip `number` is one frame that says so. Refuses what `refusals` has."""

    kind, identity, lens = "audio_features", {}, np.ones(1000, np.int64)

    def __init__(self, refusals=None):
        self.refusals = refusals or {}

    def __len__(self):
        return len(self.lens)

    def load_batch(self, numbers):
        for number in numbers:
            if number in self.refusals:
                raise self.refusals[number]
        values = torch.tensor(numbers, dtype=torch.float32).reshape(-1, 1, 1)
        return Features(values, torch.ones(len(numbers), dtype=torch.int64)), [self.row(number) for number in numbers]

    def row(self, number):
        return {"text": str(number), "pid": os.getpid()}


def alike(left, right):
    """Loaded steps hold the same bits."""
    assert len(left) == len(right)
    for (one, one_rows), (two, two_rows) in zip(itertools.chain(*left), itertools.chain(*right)):
        assert isinstance(one, Features) and one_rows == two_rows
        assert torch.equal(one.values, two.values) and torch.equal(one.lens, two.lens)


@pytest.mark.parametrize("name", ["clips", "shards"])
def test_workers_change_nothing(name, request):
    source = request.getfixturevalue(name)
    order = Order(source.lens, max_tokens={"clips": 200, "shards": 50}[name], seed=3, num_groups=2)
    for rank, num_ranks in ((0, 1), (1, 2)):
        steps = [deal(step.groups, rank, num_ranks) for step in itertools.islice(order.steps(1, 1), 5)]
        expected = [[source.load_batch(numbers) for numbers in step] for step in steps]
        for num_workers in (0, 1, 2):
            alike(list(loader(source, steps, num_workers=num_workers)), expected)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_an_endless_iterator_is_read_as_far_as_it_is_loaded(num_workers):
    drawn = []

    def endless():
        for number in itertools.count():
            drawn.append(number)
            yield [[number], [number, number + 1]]

    loaded = loader(Numbers(), endless(), num_workers=num_workers)
    assert drawn == [], "nothing starts before it is asked for"
    for number in range(20):
        (one, _), (two, rows) = next(loaded)
        assert one.values.flatten().tolist() == [number] and two.values.flatten().tolist() == [number, number + 1]
        assert (rows[0]["pid"] == os.getpid()) == (num_workers == 0)
        assert len(drawn) <= number + 1 + 2 * num_workers
    loaded.close()


def wait_for_workers_to_end():
    """The seconds until no child process is left."""
    gc.collect()
    start = time.monotonic()
    while multiprocessing.active_children():
        assert time.monotonic() - start < 20, multiprocessing.active_children()
        time.sleep(0.01)


@pytest.mark.parametrize("end", ["close", "drop", "exhaust", "refuse"])
def test_workers_end_with_the_iterator(end):
    assert not multiprocessing.active_children()
    steps = [[[number]] for number in range(6)]
    loaded = loader(Numbers({5: BadInput("here", "a", "b")} if end == "refuse" else None), steps, num_workers=2)
    next(loaded)
    assert len(multiprocessing.active_children()) == 2
    if end == "close":
        loaded.close()
    elif end == "drop":
        del loaded
    elif end == "exhaust":
        assert len(list(loaded)) == 5
    else:
        with pytest.raises(BadInput) as refusal:
            list(loaded)
        wait_for_workers_to_end()  # while the error, and the frames it has passed, are still held
        assert refusal.value.where == "here"
    wait_for_workers_to_end()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_refusal_arrives_as_it_was_and_in_its_turn(damaged, num_workers):
    with pytest.raises(BadInput) as here:
        damaged.load_batch([4])
    loaded = loader(damaged, [[[0]], [[1], [2]], [[3], [4]], [[5]]], num_workers=num_workers)
    assert [len(next(loaded)) for _ in range(2)] == [1, 2], "what comes before it is loaded"
    with pytest.raises(BadInput) as there:
        next(loaded)
    assert pickle.dumps(here.value) == pickle.dumps(there.value), "where, came, expected and todo"
    assert next(loaded, None) is None


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("error", [MissingExtra("load_audio", "soundfile", "audio"), ZeroDivisionError("a bug"), OSError("disk")])
def test_other_errors_arrive_too(num_workers, error):
    loaded = loader(Numbers({1: error}), [[[0]], [[1]]], num_workers=num_workers)
    next(loaded)
    with pytest.raises(type(error), match=str(error.args[0])[:20]) as arrived:
        next(loaded)
    assert not multiprocessing.active_children(), "though the error is still held"
    if not isinstance(error, MissingExtra):
        assert "in load_batch" in "".join(traceback.format_exception(arrived.value)), "where it happened is told"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_torchs_random_numbers_are_left_alone(num_workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert len(list(loader(Numbers(), [[[0]], [[1]]], num_workers=num_workers))) == 2
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change, message", [
    (dict(source=[1, 2]), "loader: got a source of type list; expected a ClipSource"),
    (dict(num_workers=-1), "loader: got num_workers -1; expected an integer ≥ 0"),
    (dict(num_workers=0.5), "loader: got num_workers 0.5"),
])
def test_bad_arguments(change, message):
    with pytest.raises(BadInput, match=message):
        loader(**{"source": Numbers(), "batches": [], **change})


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_worker_is_an_error_and_no_endless_wait():
    class Deadly(Numbers):
        def load_batch(self, numbers):
            if 1 in numbers:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().load_batch(numbers)

    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(loader(Deadly(), [[[0]], [[1]]], num_workers=1))


@pytest.mark.parametrize("name", ["clips", "shards"])
def test_sources_travel_to_spawned_workers(name, request):
    source = request.getfixturevalue(name)
    alike([[pickle.loads(pickle.dumps(source)).load_batch([2, 5])]], [[source.load_batch([2, 5])]])
