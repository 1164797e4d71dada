"""Feature shards: what was encoded comes back, a killed run leaves no trace, and nothing damaged is trained on."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("soundfile")
from omni_adapters.data import shard_format
from omni_adapters.data.audio import load_audio, save_audio
from omni_adapters.data.epochs import plan_epoch
from omni_adapters.data.extract import write_shards
from omni_adapters.data.manifest import ManifestRow, read_manifest, write_manifest
from omni_adapters.data.preflight import limit
from omni_adapters.data.shards import ShardReader
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.features import Features, pad_rows
from omni_adapters.shapes import BadInput

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LENS = [5, 3, 8, 1, 7, 2, 9, 4]  # frames of the clips that `make_rows` writes


class CompanyEncoder:
    """One frame a second of a 1 kHz waveform. Like real kernels, but visibly, it depends on what shares the batch."""

    sampling_rate, d_model, frame_rate = 1000, 3, 1.0

    def __init__(self):
        self.calls = 0

    def preprocess(self, waveforms):
        frames = pad_rows([torch.as_tensor(wave).reshape(-1, 1000).mean(dim=1, keepdim=True) for wave in waveforms])
        return Features(frames.values.transpose(1, 2), frames.lens)

    def __call__(self, inputs):
        self.calls += 1
        values = inputs.values.transpose(1, 2).repeat(1, 1, 3)
        return Features(values + inputs.lens.sum() / 16, inputs.lens)


def make_rows(folder, lens=LENS):
    """A clip for each number of frames, and a manifest; the rows as `read_manifest` gives them."""
    rows = []
    (folder / "audio").mkdir(parents=True)
    for number, steps in enumerate(lens):
        path = folder / "audio" / f"{number}.wav"
        save_audio(path, np.random.default_rng(number).uniform(-0.5, 0.5, steps * 1000), 1000)
        rows.append(ManifestRow(str(path), f"clip {number} é", steps, {"speaker": {"id": number}}))
    write_manifest(folder / "rows.jsonl", rows)
    return read_manifest(folder / "rows.jsonl")


def write(rows, out, encoder=None, **options):
    """Three shards of eight rows; two encoder batches to a shard."""
    options = {"description": {"encoder": "company"}, "samples_per_shard": 3, "batch_seconds": 16, "progress": False, **options}
    return write_shards(rows, encoder or CompanyEncoder(), out, **options)


def batches(reader, max_tokens=10):
    """An epoch's batches, one after another."""
    steps = plan_epoch(reader.lens, max_tokens=max_tokens, seed=0, epoch=0, num_groups=1)
    return (reader.load_batch(numbers) for numbers, in steps)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    return write(data, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def folder(undisturbed, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(undisturbed, tmp_path / "shards"))


# --- what is written --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path, dtype):
    rows, encoder = [], LogMelEncoder(mean=torch.full((80,), 0.3), std=torch.full((80,), 0.7))
    for number, seconds in enumerate([0.31, 0.1, 0.22, 0.007]):
        path = tmp_path / f"{number}.wav"
        save_audio(path, np.random.default_rng(number).uniform(-0.5, 0.5, round(16_000 * seconds)), 16_000)
        rows.append(ManifestRow(str(path), f"clip {number}", seconds))
    reader = ShardReader(write_shards(rows, encoder, tmp_path / "out", description={"encoder": "log_mel"}, dtype=dtype,
                                      samples_per_shard=3, progress=False))
    assert len(reader) == 4 and reader.config["d_model"] == 80 and reader.config["frame_rate"] == 100
    assert reader.config["description"] == {"encoder": "log_mel"}
    for number, row in enumerate(rows):
        expected = encoder(encoder.preprocess([load_audio(row.audio)])).values[0].to(dtype)
        values, stored = reader.read(number)
        assert values.dtype == dtype and torch.equal(values, expected)
        assert stored == {"audio": f"{number}.wav", "text": row.text, "seconds": row.seconds}
        assert reader.lens[number] == len(expected)


def test_the_format(undisturbed, data):
    index = json.loads((undisturbed / "index.json").read_bytes())
    assert sorted(contents(undisturbed)) == ["index.json", *(f"shard-00000{n}.{kind}" for n in range(3)
                                                              for kind in ("json", "tar"))]
    assert {name: index["config"][name] for name in ("version", "dtype", "num_samples", "samples_per_shard")} == {
        "version": 1, "dtype": "float16", "num_samples": 8, "samples_per_shard": 3}
    keys = []
    for shard in index["shards"]:
        content = (undisturbed / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        keys += [sample["key"] for sample in shard["samples"]]
        with tarfile.open(undisturbed / shard["name"]) as tar:
            assert tar.getnames() == sorted(tar.getnames())
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
                assert (member.uname, member.gname) == ("", "") and member.isreg()
    assert keys == [f"{number:09d}" for number in range(8)]
    assert [sample["T"] for shard in index["shards"] for sample in shard["samples"]] == LENS
    assert ShardReader(undisturbed).read(7)[1] == {"audio": "7.wav", "text": "clip 7 é", "seconds": 4.0, "speaker": {"id": 7}}


def test_webdataset_reads_the_shards(undisturbed):
    webdataset = pytest.importorskip("webdataset")
    from safetensors.torch import load

    reader = ShardReader(undisturbed)
    urls = [str(path) for path in sorted(undisturbed.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(8)]
    for number, sample in enumerate(samples):
        values, row = reader.read(number)
        assert json.loads(sample["json"]) == row
        assert torch.equal(load(sample["safetensors"])["values"], values)


def test_equal_runs_give_equal_bytes_and_a_finished_folder_is_left_alone(data, undisturbed, tmp_path):
    out, encoder = write(data, tmp_path / "deep" / "out"), CompanyEncoder()
    assert contents(out) == contents(undisturbed)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    write(data, out, encoder)
    assert encoder.calls == 0 and before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    alone = write(data, tmp_path / "alone", batch_seconds=1)
    assert contents(alone) != contents(undisturbed), "or the tests of restarts would not notice another batch"


def test_ranks_share_the_work_and_leave_the_same_bytes(data, undisturbed, tmp_path):
    write(data, tmp_path / "turns", rank=1, num_ranks=2)
    assert sorted(contents(tmp_path / "turns")) == ["shard-000001.json", "shard-000001.tar"]
    with pytest.raises(BadInput, match=r"which has no index\.json; expected a finished folder of shards\. Run write_shards"):
        ShardReader(tmp_path / "turns")
    encoder = CompanyEncoder()
    write(data, tmp_path / "turns", encoder, rank=0, num_ranks=2)
    assert encoder.calls == 2 * 2, "two shards of two encoder batches"
    with ThreadPoolExecutor(4) as pool:
        for _ in [pool.submit(write, data, tmp_path / "at once", rank=rank, num_ranks=4) for rank in range(4)]:
            _.result()
    assert contents(tmp_path / "turns") == contents(tmp_path / "at once") == contents(undisturbed)


def test_a_moved_data_set_goes_on(tmp_path, monkeypatch):
    rows = make_rows(tmp_path / "before", LENS[:4])
    write(rows, tmp_path / "out", rank=0, num_ranks=2)
    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.chdir(tmp_path)
    moved = [ManifestRow(f"after/audio/{number}.wav", row.text, row.seconds, row.attributes) for number, row in enumerate(rows)]
    write(moved, "out")
    assert len(ShardReader("out", verify=True)) == 4


def test_the_order_of_keys_does_not_count(data, tmp_path):
    rows = [ManifestRow(row.audio, row.text, row.seconds, {"b": 1, **row.attributes, "a": 2}) for row in data]
    turned = [ManifestRow(row.audio, row.text, row.seconds, dict(reversed(row.attributes.items()))) for row in rows]
    assert contents(write(rows, tmp_path / "rows")) == contents(write(turned, tmp_path / "turned"))


def test_a_manifest_without_durations_does_not_fill_one_batch(data, tmp_path):
    encoder = CompanyEncoder()
    write([ManifestRow(row.audio, row.text, 0.0) for row in data], tmp_path, encoder, samples_per_shard=8, batch_seconds=2)
    assert encoder.calls == 4


# --- after a kill -----------------------------------------------------------------------------------------------------

KILLED = """
import contextlib, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_shards import CompanyEncoder, write
from omni_adapters.data.manifest import read_manifest

class Deadly(CompanyEncoder):
    def __call__(self, inputs):
        return at("encode", super().__call__, inputs)

def at(name, call, *arguments):
    calls[name] = calls.get(name, 0) + 1
    if (name, calls[name]) == point and name == "fsync":
        with contextlib.suppress(OSError):  # the folder's
            os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)  # as if the file had been half written
    result = call(*arguments)
    if (name, calls[name]) == point:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

rows, out = read_manifest(sys.argv[1]), Path(sys.argv[2])
fsync, replace = os.fsync, os.replace
MOST = {"encode": 7, "fsync": 14, "replace": 7}  # a file is synced, then its folder
for point in [(name, count) for count in range(1, 15) for name in MOST if count <= MOST[name]]:
    for folder in ("chain", "-".join(map(str, point))):  # the chain is killed again and again
        child = os.fork()
        if not child:
            calls = {}
            os.fsync, os.replace = lambda *a: at("fsync", fsync, *a), lambda *a: at("replace", replace, *a)
            write(rows, out / folder, Deadly())
            os._exit(0)
        print(folder, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL")
def test_after_a_kill_the_outcome_is_that_of_an_undisturbed_run(data, undisturbed, tmp_path):
    manifest = Path(data[0].audio).parents[1] / "rows.jsonl"
    run = subprocess.run([sys.executable, "-c", KILLED, manifest, tmp_path], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])})
    ends = [line.split() for line in run.stdout.splitlines()]
    assert [folder for folder, code in ends if folder != "chain" and code != "-9"] == ["encode-7"], "there are six calls"
    assert [code for folder, code in ends if folder == "chain"].count("-9") > 6
    calls = {}
    for out in sorted(tmp_path.iterdir()):
        encoder = CompanyEncoder()
        write(data, out, encoder)
        calls[out.name] = encoder.calls
        assert contents(out) == contents(undisturbed), out.name
    # Two encoder batches a shard; replace 1 puts the first tar in place, 2 its sidecar, 6 the last one, 7 the index.
    assert [calls[f"replace-{count}"] for count in range(1, 8)] == [6, 4, 4, 2, 2, 0, 0]
    assert [calls[f"encode-{count}"] for count in range(1, 8)] == [6, 6, 4, 4, 2, 2, 0]


def test_two_ranks_do_not_sweep_each_others_files(data, tmp_path):
    tmp_path.joinpath(".shard-000001.tar.0a.tmp").write_bytes(b"being written")
    tmp_path.joinpath(".shard-000000.tar.0b.tmp").write_bytes(b"left behind")
    tmp_path.joinpath(".shard-000000.json.0123abcd.saving").write_bytes(b"left behind")
    write(data, tmp_path, rank=0, num_ranks=2)
    assert [path.name for path in tmp_path.glob(".*")] == [".shard-000001.tar.0a.tmp"]


# --- refusals when writing --------------------------------------------------------------------------------------------

def test_a_changed_configuration_is_refused_and_nothing_overwritten(data, undisturbed, folder, tmp_path):
    longer = CompanyEncoder()
    longer.frame_rate = 2.0
    changes = [
        (dict(dtype=torch.float32), "dtype 'float32'; expected dtype 'float16', as .*index.json has it. Choose another folder"),
        (dict(description={"encoder": "b"}), "{'encoder': 'b'}; expected description {'encoder': 'company'}"),
        (dict(samples_per_shard=2), "samples_per_shard 2; expected samples_per_shard 3"),
        (dict(encoder=longer), "frame_rate 2.0; expected frame_rate 1.0"),
        (dict(rows=data[:-1]), "num_samples 7, manifest_sha256 '.*'; expected num_samples 8, manifest_sha256 '"),
        (dict(rows=[*data[:-1], ManifestRow(data[-1].audio, "other text", 4.0, {"speaker": {"id": 7}})]), "manifest_sha256 '"),
    ]
    for change, message in changes:
        with pytest.raises(BadInput, match=message):
            write(**{"rows": data, "out": folder, **change})
    assert contents(folder) == contents(undisturbed)
    write(data, tmp_path / "begun", rank=2, num_ranks=3)
    with pytest.raises(BadInput, match=r"as .*shard-000002\.json has it"):
        write(data, tmp_path / "begun", dtype=torch.bfloat16)


def lines_of(refusal):
    """The lines that a refusal names, and their reasons."""
    return dict(re.findall(r"\n  line (\d+): \S*\.wav, ([^\n]*)", str(refusal.value)))


def test_all_bad_clips_are_told_of_before_anything_is_written(tmp_path):
    rows = make_rows(tmp_path / "data", [*LENS, 12, 2])
    contents_of = [Path(row.audio).read_bytes() for row in rows]
    Path(rows[1].audio).unlink()
    Path(rows[2].audio).write_bytes(b"")
    Path(rows[4].audio).write_bytes(b"noise")
    Path(rows[5].audio).write_bytes(contents_of[5][:-20])
    Path(rows[6].audio).write_bytes(contents_of[6][:44])
    rows[9] = ManifestRow(rows[9].audio, "", 11.0)
    with pytest.raises(BadInput, match=r"write_shards: got 7 of 10 clips .* no longer than max_seconds = 10 ") as refusal:
        write(rows, tmp_path / "out", max_seconds=10)
    reasons = lines_of(refusal)
    assert list(reasons) == ["2", "3", "5", "6", "7", "9", "10"] and not (tmp_path / "out").exists()
    for line, words in {"2": "where there is no file", "3": "cannot be decoded", "5": "cannot be decoded", "6": "cut short",
                        "9": "a file longer than 10 s", "10": "11 s by the manifest"}.items():
        assert words in reasons[line]
    for row, content in zip(rows, contents_of):
        Path(row.audio).write_bytes(content)
    assert len(ShardReader(write(rows, tmp_path / "out"))) == 10


def test_of_many_bad_clips_twenty_are_named(tmp_path):
    rows = [ManifestRow(str(tmp_path / f"{number}.wav"), "", 1.0) for number in range(23)]
    with pytest.raises(BadInput, match=r"got 23 of 23 clips[^\n]*(\n  line [^\n]*){20}\n  and 3 more\.$"):
        write(rows, tmp_path / "out")


def test_only_unfinished_clips_of_the_own_share_are_looked_at(tmp_path, capfd):
    rows = make_rows(tmp_path / "data")
    write(rows, tmp_path / "out", rank=0, num_ranks=3)
    for number in (0, 4, 7):  # in shards 0, 1 and 2
        Path(rows[number].audio).unlink()
    write(rows, tmp_path / "out", rank=0, num_ranks=3, progress=True)
    assert "1 of 1 shards already finished" in capfd.readouterr().err
    with pytest.raises(BadInput, match="got 1 of 3 clips") as refusal:
        write(rows, tmp_path / "out", rank=1, num_ranks=3)
    assert list(lines_of(refusal)) == ["5"]


def test_a_header_is_no_verdict(tmp_path):
    """What the header gives wrong and decoding gives right is encoded: the data size that pipes write."""
    rows = make_rows(tmp_path / "data", [3, 2])
    content = bytearray(Path(rows[1].audio).read_bytes())
    place = content.index(b"data") + 4
    content[place:place + 4] = b"\xff\xff\xff\xff"
    Path(rows[1].audio).write_bytes(content)
    assert ShardReader(write(rows, tmp_path / "out", max_seconds=5)).lens.tolist() == [3, 2]


class AtMost(CompanyEncoder):
    """Takes clips of up to 7 s, and none with a 1.0 in it: the first can be told by lengths, the second cannot."""

    def preprocess(self, waveforms):
        for number, wave in enumerate(waveforms):
            if len(wave) > 7000 or np.abs(np.asarray(wave)).max() > 0.99:
                raise BadInput("preprocess", f"clip {number} of {len(wave) / 1000:g} s", "at most 7 s, and no 1.0")
        return super().preprocess(waveforms)


def test_clips_beyond_the_encoders_limit_are_told_of_before_anything_is_written(data, tmp_path):
    with pytest.raises(BadInput, match="got 2 of 8 clips") as refusal:
        write(data, tmp_path / "out", AtMost())
    assert lines_of(refusal) == {line: f"a clip of {seconds} s, where preprocess expects at most 7 s, and no 1.0{stop}"
                                 for line, seconds, stop in (("3", 8, ""), ("7", 9, "."))}
    assert not (tmp_path / "out").exists()


@given(lens=st.lists(st.integers(0, 50), max_size=20), most=st.integers(0, 50))
def test_the_limit_is_found(lens, most):
    class Limited(CompanyEncoder):
        def preprocess(self, waveforms):
            if len(waveforms[0]) > most:
                raise BadInput("preprocess", "a clip", f"{most}")

    longest, _ = limit(Limited(), lens)
    assert {n for n in lens if n > longest} == {n for n in lens if n > most}


# --- skipping ---------------------------------------------------------------------------------------------------------

def spoil(rows, number):
    """A clip whose header is whole and whose encoder refuses it."""
    seconds = rows[number].seconds
    wave = np.zeros(int(seconds * 1000))
    wave[5] = 1.0
    save_audio(rows[number].audio, wave, 1000)


@pytest.fixture
def spoilt(tmp_path):
    """Rows with a clip that is too long (7 s is the most), one that is refused for its sound, one that does not decode."""
    rows = make_rows(tmp_path / "data", [5, 3, 8, 1, 7, 2, 6, 4])
    spoil(rows, 3)
    Path(rows[4].audio).write_bytes(b"noise")
    return rows


def test_what_is_found_late_stops_the_run_or_is_skipped_and_nothing_finished_is_lost(tmp_path):
    rows = make_rows(tmp_path / "data", [5, 3, 7, 1, 7, 2, 6, 4])
    spoil(rows, 4)
    with pytest.raises(BadInput, match=r'manifest line 5, preprocess: .* Go on with on_bad="skip" \(--skip-bad\), which keeps'):
        write(rows, tmp_path / "out", AtMost())
    assert sorted(contents(tmp_path / "out")) == ["shard-000000.json", "shard-000000.tar"]
    encoder = AtMost()
    write(rows, tmp_path / "out", encoder, on_bad="skip")
    assert contents(tmp_path / "out") == contents(write(rows, tmp_path / "fresh", AtMost(), on_bad="skip"))
    assert encoder.calls == 2, "a batch of shard 1, one of shard 2, none of shard 0"
    assert [key for key, _ in ShardReader(tmp_path / "out", verify=True).skipped] == ["000000004"]
    with pytest.raises(BadInput, match=r"max_seconds None, on_bad None; expected max_seconds 600\.0, on_bad 'skip'"):
        write(rows, tmp_path / "out", AtMost())
    with pytest.raises(BadInput, match=r"max_seconds 20\.0; expected max_seconds 600\.0"):
        write(rows, tmp_path / "out", AtMost(), on_bad="skip", max_seconds=20)


def test_what_is_skipped_has_no_number(spoilt, tmp_path):
    reader = ShardReader(write(spoilt, tmp_path / "out", AtMost(), on_bad="skip"), verify=True)
    left = [0, 1, 5, 6, 7]
    assert len(reader) == len(reader.lens) == 5 and reader.lens.tolist() == [5, 3, 2, 6, 4] and reader.config["num_samples"] == 8
    for number, line in enumerate(left):
        values, row = reader.read(number)
        assert len(values) == reader.lens[number] and row == reader.row(number) and row["audio"] == f"{line}.wav"
        assert "skipped" not in row
    features, rows = reader.load_batch([4, 0])
    assert features.lens.tolist() == [4, 5] and [row["text"] for row in rows] == ["clip 7 é", "clip 0 é"]
    assert sorted(row["text"] for _, rows in batches(reader) for row in rows) == [f"clip {line} é" for line in left]
    keys, reasons = zip(*reader.skipped)
    assert keys == ("000000002", "000000003", "000000004")
    assert reasons[0].startswith("clip 0 of 8 s; expected at most 7 s") and reasons[1].startswith("clip 0 of 1 s; expected")
    assert "'4.wav'" in reasons[2] and str(tmp_path) not in reasons[2], "the place of the data set is not told"
    with pytest.raises(IndexError):
        reader.row(5)


def test_what_shares_a_batch_with_a_bad_clip_is_encoded_alone(spoilt, tmp_path):
    reader = ShardReader(write(spoilt, tmp_path / "out", AtMost(), on_bad="skip", dtype=torch.float32))
    for number, line, is_alone in ((0, 0, False), (1, 1, False), (2, 5, True)):  # 0 and 1 make a batch, 3 and 5 did
        encoder = AtMost()
        alone = encoder(encoder.preprocess([load_audio(spoilt[line].audio, 1000)])).values[0]
        assert torch.equal(reader.read(number)[0], alone) == is_alone


def test_skipping_leaves_the_same_bytes_after_a_stop_with_any_ranks_and_from_any_place(spoilt, tmp_path):
    alone = contents(write(spoilt, tmp_path / "alone", AtMost(), on_bad="skip"))
    for rank in (2, 0, 1):
        write(spoilt, tmp_path / "ranks", AtMost(), on_bad="skip", rank=rank, num_ranks=3)
    assert contents(tmp_path / "ranks") == alone

    class Stopping(AtMost):
        def __call__(self, inputs):
            if self.calls == 1:
                raise KeyboardInterrupt
            return super().__call__(inputs)

    with pytest.raises(KeyboardInterrupt):
        write(spoilt, tmp_path / "stopped", Stopping(), on_bad="skip")
    assert not (tmp_path / "stopped" / "index.json").exists()
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = [ManifestRow(row.audio.replace("data", "moved"), row.text, row.seconds, row.attributes) for row in spoilt]
    assert contents(write(moved, tmp_path / "stopped", AtMost(), on_bad="skip")) == alone


def test_without_bad_clips_skipping_changes_the_configuration_only(data, undisturbed, tmp_path):
    out = write(data, tmp_path / "out", on_bad="skip")
    mine, theirs = contents(out), contents(undisturbed)
    assert {name for name in mine if mine[name] != theirs[name]} == {name for name in theirs if name.endswith(".json")}
    assert ShardReader(out).skipped == ShardReader(undisturbed).skipped == []
    changed = ShardReader(out).config
    assert (changed.pop("on_bad"), changed.pop("max_seconds")) == ("skip", 600.0) and changed == ShardReader(undisturbed).config
    assert ShardReader(write(data, tmp_path / "inf", on_bad="skip", max_seconds=float("inf"))).config["max_seconds"] is None


def test_features_that_are_not_finite_are_skipped_and_a_wrong_form_is_not(data, tmp_path):
    class Loud(CompanyEncoder):
        def __call__(self, inputs):
            values, lens = super().__call__(inputs)
            return Features(values * torch.where(lens == 8, 1e6, 1.0).where(lens != 5, torch.nan)[:, None, None], lens)

    reader = ShardReader(write(data, tmp_path / "out", Loud(), on_bad="skip"))
    assert [key for key, _ in reader.skipped] == ["000000000", "000000002"]
    assert "NaN" in reader.skipped[0][1] and "infinite in float16" in reader.skipped[1][1]

    class Narrow(CompanyEncoder):
        def __call__(self, inputs):
            values, lens = super().__call__(inputs)
            return Features(values[..., :2], lens)

    with pytest.raises(BadInput, match="2 wide; expected width 3"):
        write(data, tmp_path / "narrow", Narrow(), on_bad="skip")


def test_a_folder_of_which_nothing_is_left_is_refused(tmp_path):
    rows = [ManifestRow(str(tmp_path / "gone.wav"), "", 1.0)]
    with pytest.raises(BadInput, match=r"where all 1 samples are skipped, 000000000 for a path where there is no file"):
        ShardReader(write(rows, tmp_path / "out", on_bad="skip"))


@pytest.mark.parametrize("change, message", [
    (lambda values, lens: (values * 1e6, lens), r"line \d: got features up to .*, infinite in float16; .* Write bfloat16"),
    (lambda values, lens: (values / 0, lens), "manifest lines 2, 1 as one batch, encoder: got NaN or infinity in row 0"),
    (lambda values, lens: (values[..., :2], lens), "encoder: got features .* 2 wide; expected width 3"),
    (lambda values, lens: (values[:1], lens[:1]), "manifest lines 2, 1: got 1 rows of features; expected 2"),
    (lambda values, lens: (values, lens + 9), r"encoder: got lens\[0\] = 12"),
])
def test_an_encoder_that_misbehaves(data, tmp_path, change, message):
    class Misbehaving(CompanyEncoder):
        def __call__(self, inputs):
            return Features(*change(*super().__call__(inputs)))

    with pytest.raises(BadInput, match=message):
        write(data, tmp_path / "out", Misbehaving())
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("change, message", [
    (dict(rows=[]), "got no manifest rows"),
    (dict(encoder=object()), "got an encoder of type object; expected an AudioEncoder"),
    (dict(rank=2, num_ranks=2), "got rank 2 of 2; expected 0 ≤ rank < num_ranks"),
    (dict(samples_per_shard=0), "got samples_per_shard 0; expected an integer ≥ 1"),
    (dict(dtype=torch.int8), "got dtype torch.int8; expected float16, bfloat16, float32"),
    (dict(on_bad="drop"), "got on_bad 'drop'; expected 'refuse' or 'skip'"),
    (dict(on_bad="skip", rows=[ManifestRow("a.wav", "", 1.0, {"skipped": 1})]), "manifest line 1: got a key 'skipped'"),
    (dict(batch_seconds=0), "got batch_seconds 0 and max_seconds 600"),
    (dict(description={"a": (1, 2)}), r"got a description, where 'a' is \(1, 2\) \(tuple\); .* Make lists of tuples"),
    (dict(description={"a": float("nan")}), "got a description, where 'a' is nan"),
    (dict(rows=[ManifestRow("a.wav", "", 1.0, {"text": "b"})]), "manifest line 1: got a row with attributes text; expected"),
    (dict(rows=[ManifestRow("a.wav", "", 10**400)]), "manifest line 1: got a row, where 'seconds' is 1000"),
    (dict(rows=[ManifestRow("a.wav", "", 1.0, {"a": {1: 2}})]), "manifest line 1: got a row, with the key 1 in 'a'"),
])
def test_bad_arguments(data, tmp_path, change, message):
    with pytest.raises(BadInput, match=message):
        write(**{"rows": data, "out": tmp_path / "out", **change})
    assert not (tmp_path / "out").exists()


def test_out_must_be_a_folder(data, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(BadInput, match="which is a file; expected a folder"):
        write(data, tmp_path / "out")


# --- damage -----------------------------------------------------------------------------------------------------------

def truncate(folder, tar):
    tar.write_bytes(tar.read_bytes()[:-512])


def flip(folder, tar):
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)


def swap(folder, tar):
    """The same names and sizes in another folder's shard."""
    rows = [ManifestRow(row.audio, row.text.upper(), row.seconds, row.attributes)
            for row in read_manifest(folder.parent / "rows.jsonl")]
    write(rows, folder.parent / "other")
    shutil.copy(folder.parent / "other" / tar.name, tar)


def remove(folder, tar):
    tar.unlink()


def exchange(folder, tar):
    shutil.copy(folder / "shard-000000.tar", tar)


@pytest.mark.parametrize("damage", [truncate, flip, swap, remove, exchange])
def test_a_damaged_shard_is_refused_and_rebuilt(data, undisturbed, folder, damage):
    write_manifest(folder.parent / "rows.jsonl", data)
    tar = folder / "shard-000001.tar"
    damage(folder, tar)
    message = r"ShardReader: got .*shard-000001.tar.*; expected shard-000001.tar of \d+ bytes with sha256 .*as index.json has it"
    with pytest.raises(BadInput, match=message):
        ShardReader(folder, verify=True)
    with pytest.raises(BadInput, match=message):
        reader = ShardReader(folder)
        assert damage not in (truncate, remove), "sizes are looked at when the folder is opened"
        list(batches(reader))
    encoder = CompanyEncoder()
    write(data, folder, encoder)
    assert encoder.calls == 2, "one shard of two encoder batches"
    assert contents(folder) == contents(undisturbed)


def test_no_rank_vouches_for_a_truncated_shard_of_another(data, undisturbed, folder):
    truncate(folder, folder / "shard-000001.tar")
    (folder / "index.json").unlink()
    write(data, folder, rank=0, num_ranks=2)
    assert not (folder / "index.json").exists()
    write(data, folder, rank=1, num_ranks=2)
    assert contents(folder) == contents(undisturbed)


def test_an_extra_shard_is_refused(folder):
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000003.tar")
    with pytest.raises(BadInput, match=r"got shard-000003.tar in .*; expected the 3 shards of its index.json"):
        ShardReader(folder)


def test_a_shard_that_changes_while_it_is_read_is_refused(folder):
    reader = ShardReader(folder, verify=True)
    loaded = batches(reader)
    next(loaded)
    for tar in folder.glob("*.tar"):
        flip(folder, tar)
    with pytest.raises(BadInput, match="with sha256"):
        next(loaded)
    shutil.rmtree(folder)
    with pytest.raises(BadInput, match="which is missing"):
        reader.read(0)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"config": {}}', b'{"config": {"version": 1}, "shards": []}', b"\xff"])
def test_a_damaged_index_or_sidecar(data, undisturbed, folder, content):
    (folder / "index.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"index\.json, which is damaged"):
        ShardReader(folder)
    (folder / "shard-000000.json").write_bytes(content)
    if b"config" in content:  # whole as it looks, so it tells of another configuration
        with pytest.raises(BadInput, match=r"expected .*d_model None, .* as .*index\.json has it"):
            write(data, folder)
    else:
        write(data, folder)
        assert contents(folder) == contents(undisturbed)


def tampered(folder, change):
    index = json.loads((folder / "index.json").read_bytes())
    change(index, index["shards"][1])
    (folder / "index.json").write_text(json.dumps(index))
    reader = ShardReader(folder)
    for number in range(len(reader)):
        reader.read(number)


@pytest.mark.parametrize("change, message", [
    (lambda index, shard: index["config"].update(version=2), "of format version 2; expected version 1"),
    (lambda index, shard: index["config"].update(dtype="float32"), r"a sample 000000000 of torch.float16 \(5, 3\)"),
    (lambda index, shard: index["config"].update(num_samples=7), "which is damaged"),
    (lambda index, shard: index["config"].update(frame_rate=float("nan")), "which is damaged"),
    (lambda index, shard: index["shards"].pop(), "which is damaged"),
    (lambda index, shard: shard.update(name="../shard-000001.tar"), "which is damaged"),
    (lambda index, shard: shard.update(bytes=-1), "which is damaged"),
    (lambda index, shard: shard["samples"].pop(), "which is damaged"),
    (lambda index, shard: shard["samples"][0].update(key="000000004"), "which is damaged"),
    (lambda index, shard: shard["samples"][0].update(T=2), r"a sample 000000003 of torch.float16 \(1, 3\)"),
    (lambda index, shard: shard["samples"][0].update(shard["samples"][1] | {"key": "000000003"}), "no 000000003.json there"),
    (lambda index, shard: shard["samples"][0].update(offset=100), "a sample 000000003 that does not read"),
    (lambda index, shard: shard["samples"][0].update(offset=1 << 40), "a sample 000000003 that does not read"),
    (lambda index, shard: shard["samples"][0].update(bytes=1600), "a sample 000000003 that does not read"),
])
def test_an_index_that_lies(folder, change, message):
    with pytest.raises(BadInput, match=message):
        tampered(folder, change)


# --- as a source of training data -------------------------------------------------------------------------------------

def test_a_sample_without_frames(tmp_path):
    class Deaf(CompanyEncoder):
        def __call__(self, inputs):
            features = super().__call__(inputs)
            return Features(features.values, features.lens.where(features.lens > 4, 0))

    reader = ShardReader(write(make_rows(tmp_path / "data"), tmp_path / "out", Deaf()))
    assert sorted(features.lens.tolist() for features, _ in batches(reader, 2)) == [[5], [7], [8], [9]]
    assert reader.skipped == [(f"{number:09d}", "no frames") for number in (1, 3, 5, 7)]


def test_rows_are_read_without_values(undisturbed, folder):
    reader = ShardReader(undisturbed)
    assert [reader.row(number) for number in range(8)] == [reader.read(number)[1] for number in range(8)]
    looking = ShardReader(folder)
    content = bytearray((folder / "shard-000000.tar").read_bytes())
    content[-1500] ^= 1  # in the values of the shard's last sample
    (folder / "shard-000000.tar").write_bytes(content)
    assert [looking.row(number) for number in range(8)] == [reader.row(number) for number in range(8)]
    with pytest.raises(BadInput, match="with sha256"):
        looking.read(0)
    (folder / "shard-000000.tar").write_bytes(b"\0" * len(content))
    with pytest.raises(BadInput, match="a sample 000000001 that does not read"):
        looking.row(1)
    (folder / "shard-000000.tar").unlink()
    with pytest.raises(BadInput, match="which is missing"):
        looking.row(1)


def test_a_batch_is_padded_to_its_longest(undisturbed):
    reader = ShardReader(undisturbed)
    (values, lens), rows = reader.load_batch([3, 6, 1])
    assert values.shape == (3, 9, 3) and values.dtype == torch.float16 and lens.tolist() == [1, 9, 3]
    for row, number in enumerate([3, 6, 1]):
        alone, manifest_row = reader.read(number)
        assert torch.equal(values[row, : LENS[number]], alone) and rows[row] == manifest_row


def test_the_identity_tells_of_any_change(data, undisturbed, folder, tmp_path):
    identity = ShardReader(undisturbed).identity
    assert identity == ShardReader(folder).identity and json.loads(json.dumps(identity)) == identity, "the place does not count"
    assert identity["kind"] == ShardReader.kind == "audio_features" and identity["description"] == {"encoder": "company"}
    index = json.loads((folder / "index.json").read_bytes())
    (folder / "index.json").write_text(json.dumps(dict(reversed(index.items())), indent=1))
    assert ShardReader(folder).identity == identity, "nor does the spacing"
    # What the configuration does not tell, the sha256 does: features that changed in rounding, as here with the batches.
    other = ShardReader(write(data, tmp_path / "alone", batch_seconds=1)).identity
    assert {name for name in identity if identity[name] != other[name]} == {"index_sha256"}


def test_equal_members_are_equal_bytes_everywhere():
    """Golden, from the run that introduced the format: other bytes would make every folder look damaged."""
    members = [shard_format.Member(shard_format.sample_key(number), b'{"text":"a"}', 2, bytes(range(number, 200)))
               for number in (0, 1)]
    content, samples = shard_format.pack(members)
    assert hashlib.sha256(content).hexdigest()[:16] == "953085f5a755c732"
    assert [sample[1:] for sample in samples] == [(2, 0, 2048), (2, 2048, 2048)], "a member: a header and a block, of 512 bytes"
