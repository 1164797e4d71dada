"""Where weights come from: what is loaded is what was listed, nothing hangs, nothing is torn; each fault injected by hand.

Hubs are servers on 127.0.0.1 (`weights_hub`), which both real clients are shown to accept. Most fetches run in this process,
whose environment names those servers; what is killed, or races, is a process of its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session, constants
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_speech import make_tiny_speech
from tiny_whisper import make_tiny_whisper
from weights_hub import (
    TwoHubs,
    breaking_off,
    commit_of,
    dripping_header,
    mute,
    pieces,
    running,
    sha256,
    slow,
    stalling,
    status,
)

from omni_adapters.encoders import weight_cache, weight_transfer, weights
from omni_adapters.encoders.hf_speech import HFSpeechEncoder
from omni_adapters.encoders.weight_hubs import MAX_FILES, check_client_copy
from omni_adapters.encoders.weight_transfer import (
    QUANTUM,
    RETRIES,
    Damaged,
    Dropped,
    Line,
    Patience,
    RemoteFile,
    download,
    in_one_line,
    next_hop,
    origin,
)
from omni_adapters.encoders.weights import (
    DEADLINE,
    Weights,
    WeightsUnavailable,
    cache_folder,
    cached_copies,
    endpoints,
    fetch_weights,
    missing_files,
    probe,
    weight_files,
)
from omni_adapters.encoders.whisper import WhisperEncoder
from omni_adapters.files import json_bytes
from omni_adapters.fingerprints import describe_encoder
from omni_adapters.shapes import BadInput

HEADER = b'{"a":{"dtype":"U8","shape":[300000],"data_offsets":[0,300000]}}'
BODY = len(HEADER).to_bytes(8, "little") + HEADER + bytes(range(250)) * 1200  # 300 kB: more than two renewals
FILES = {
    "config.json": b"{}",
    "model.safetensors": BODY,
    "model.fp32-00001-of-00001.safetensors": b"twice the size",
    "model-00001-of-00001.safetensors": b"the same in shards",
    "pytorch_model.bin": b"a pickle",
    "notes.txt": b"text",
    "README.md": b"a page",
    "sub/config.json": b"[]",
}
WANTED = {"config.json", "model.safetensors", "notes.txt"}
PLACES = ["hf:owner/name", "ms:owner/name"]
HF, MS = r" /(api/models|owner)/", r" /api/v1/"  # what each hub's requests look like
WEIGHTS = "model.safetensors"
SLACK = 1.5  # seconds that imports and a busy machine may cost besides what a test measures

each_hub = pytest.mark.parametrize("place", PLACES)


def flipped(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token, no proxy, caches in tmp_path, and hubs that refuse connections until a test starts one."""
    for name in list(os.environ):
        ours = name.startswith(("HF_", "HUGGING_FACE_", "MODELSCOPE_", "TRANSFORMERS_", "OMNI_ADAPTERS_"))
        if ours or "_PROXY" in name.upper():
            monkeypatch.delenv(name)
    for name, value in environment_of(tmp_path, "http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))  # the client has read its settings
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no tokens"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weight_transfer, "PAUSE", 0.01)
    close_session()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoHubs]:
    with running(FILES) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.endpoint)
        yield server


def environment_of(tmp_path: Path, endpoint: str) -> dict[str, str]:
    return {"HF_ENDPOINT": endpoint, "MODELSCOPE_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "NETRC": os.devnull,
            "MODELSCOPE_CACHE": str(tmp_path / "ms"), "MODELSCOPE_HOME": str(tmp_path / "ms_home"),
            "OMNI_ADAPTERS_CACHE": str(tmp_path / "cache")}


def fetch(*places: str | Path, deadline: float = 10.0, **options: object) -> Weights:
    """With warnings as errors: a test that expects one says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return fetch_weights("Test", places, todo="Ways out: none.", deadline=deadline, **options)


def failures(*places: str | Path, **options: object) -> list[str]:
    with pytest.raises(WeightsUnavailable) as caught:
        fetch(*places, **options)
    return caught.value.failures


def is_whole(found: Weights, files: dict[str, bytes] = FILES) -> bool:
    there = {path.name: path.read_bytes() for path in found.directory.iterdir() if path.name != ".copy.json"}
    return there == {name: files[name] for name in WANTED}


def nothing_cached() -> bool:
    """Locks are all that a failed fetch may leave."""
    return not any(path.is_file() and path.suffix != ".lock" for path in cache_folder().rglob("*"))


def hub_of(place: str) -> str:
    return HF if place.startswith("hf") else MS


@contextlib.contextmanager
def seconds() -> Iterator[SimpleNamespace]:
    taken = SimpleNamespace(seconds=0.0)
    started = time.monotonic()
    yield taken
    taken.seconds = time.monotonic() - started


# The package without its index, which imports torch: seconds that have nothing to do with weights.
LIGHT = f"""
import sys, types
package = sys.modules["omni_adapters"] = types.ModuleType("omni_adapters")
package.__path__, package.__version__ = [{str(Path(weights.__file__).parents[1])!r}], "0"
"""
FETCH = "from omni_adapters.encoders.weights import fetch_weights\nprint(fetch_weights('T', sys.argv[1:]).directory)"


def start(tmp_path: Path, hub: TwoHubs, code: str, *arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, **environment_of(tmp_path, hub.endpoint), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen([sys.executable, "-c", LIGHT + code, *arguments], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def output(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err[-2000:]
    return out


# ---- a good hub --------------------------------------------------------------------------------------------------------


@each_hub
def test_a_download_is_what_the_hub_has_and_is_needed_once(hub, monkeypatch, place):
    found = fetch(place)
    assert found.source == place and is_whole(found)
    assert hub.lines() and not hub.lines(r"\.bin|fp32|00001|README|sub")
    assert {name for name in WANTED if not hub.lines(name)} == set()
    copy, = cached_copies(verify=True)
    num_bytes = sum(len(FILES[name]) for name in WANTED) + (found.directory / ".copy.json").stat().st_size
    assert copy == (place, commit_of(FILES) if place.startswith("hf") else "master", found.directory, num_bytes, True)
    hub.requests.clear()
    assert fetch(place) == found
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(place) == found
    assert hub.lines() == []


REAL_CLIENTS = """
import json, pathlib
from huggingface_hub import snapshot_download
from modelscope.hub.snapshot_download import snapshot_download as modelscope_download
from omni_adapters.encoders.weights import WANTED_FILES, fetch_weights
hf = snapshot_download("owner/name", allow_patterns=WANTED_FILES)
ms = modelscope_download("owner/name", allow_patterns=WANTED_FILES)
print("downloaded", flush=True)
places = ["hf:owner/name", "ms:owner/name", "hf:owner/name@v1", "ms:owner/name@v1"]
ours = [str(fetch_weights("T", [place]).directory) for place in places]
print(json.dumps([hf, ms, *ours]))
"""


def test_both_real_clients_accept_the_servers_and_what_they_cached_is_used_unless_it_changed(hub, tmp_path):
    hub.revisions["v1"] = {**FILES, "config.json": b'{"v": 1}'}
    process = start(tmp_path, hub, REAL_CLIENTS)
    hf, ms, *ours = (Path(path) for path in json.loads(output(process).splitlines()[-1]))
    for directory in (hf, ms):
        assert all((directory / name).read_bytes() == FILES[name] for name in WANTED)
    assert ours[:2] == [hf, ms]
    assert [(path / "config.json").read_bytes() for path in ours[2:]] == [b'{"v": 1}'] * 2  # no other revision's copy
    assert {copy.source for copy in cached_copies()} == {"hf:owner/name@v1", "ms:owner/name@v1"}
    hub.requests.clear()
    assert fetch("hf:owner/name").directory == hf and hub.lines() == []
    blob = (hf / WEIGHTS).resolve()
    blob.chmod(0o644)
    blob.write_bytes(flipped(BODY))
    assert is_whole(fetch("hf:owner/name")) and (hf / WEIGHTS).read_bytes() == flipped(BODY)  # others' files stay as they are
    assert hub.lines(WEIGHTS)
    (Path(ms) / WEIGHTS).write_bytes(BODY[:-1])  # no hash is known of it, but its length is
    with pytest.raises(Damaged, match=f"{len(BODY) - 1} bytes, its header says {len(BODY)}"):
        check_client_copy(ms)


@each_hub
def test_a_pinned_revision_is_another_copy_and_is_written_down(hub, place):
    hub.revisions["v1"] = v1 = {**FILES, "config.json": b'{"v": 1}'}
    found, pinned = fetch(place), fetch(f"{place}@v1")
    assert pinned.source == f"{place}@v1" and is_whole(pinned, v1) and is_whole(found)
    revision = commit_of(v1) if place.startswith("hf") else "v1"
    assert {(copy.source, copy.revision) for copy in cached_copies()} >= {(f"{place}@v1", revision)}
    assert len(failures(f"{place}@no-such")) == 1


def test_a_commit_is_that_commit_or_refused(hub):
    sha = commit_of(FILES)
    assert is_whole(fetch(f"hf:owner/name@{sha}"))
    hub.revisions["0" * 40] = FILES
    line, = failures(f"hf:owner/name@{'0' * 40}")
    assert f"asked for {'0' * 40}" in line and sha in line


@each_hub
def test_refresh_replaces_the_copy_and_a_failed_one_leaves_it(hub, place):
    fetch(place)
    newer = {**FILES, "config.json": b'{"new": true}'}
    hub.revisions["main"] = hub.revisions["master"] = newer
    assert is_whole(fetch(place))
    assert is_whole(fetch(place, refresh=True), newer) and is_whole(fetch(place), newer)
    hub.sent[WEIGHTS] = flipped(BODY)
    failures(place, refresh=True)
    assert is_whole(fetch(place), newer)


@pytest.mark.parametrize("write", [True, False], ids=["the manifest", "the rename"])
def test_a_refresh_that_the_disk_refuses_leaves_the_copy(hub, monkeypatch, write):
    found = fetch("hf:owner/name")
    rename, refused = os.rename, []

    def full(*arguments: object) -> None:
        if write or (arguments[1] == found.directory and not refused):
            refused.append(arguments)
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(*((weight_cache, "write_all", full) if write else (os, "rename", full)))
        line, = failures("hf:owner/name", refresh=True)
    assert "No space left" in line and len(refused) == 1 and not list(cache_folder().rglob("*.partial"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch("hf:owner/name") == found and is_whole(found)


def test_a_repository_that_gains_the_required_file_is_fetched_again(hub):
    fetch("hf:owner/name")
    hub.revisions["main"] = {**FILES, "other.json": b"1"}
    found = fetch("hf:owner/name", required=["other.json"])
    assert (found.directory / "other.json").read_bytes() == b"1"


def test_shards_are_fetched_where_there_is_no_whole_file(hub):
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    files = {name: body for name, body in FILES.items() if name != WEIGHTS}
    hub.revisions["main"] = {**files, "model.safetensors.index.json": json.dumps(index).encode()}
    assert (fetch("hf:owner/name").directory / "model-00001-of-00001.safetensors").read_bytes() == b"the same in shards"
    index["weight_map"]["b"] = "model-00002-of-00002.safetensors"
    hub.revisions["v2"] = {**files, "model.safetensors.index.json": json.dumps(index).encode()}
    line, = failures("hf:owner/name@v2")
    assert "without model-00002-of-00002.safetensors" in line


# ---- another place takes over ------------------------------------------------------------------------------------------


def test_500_leads_to_the_other_place_and_stays_there(hub):
    hub.faults.append(status(500, MS))
    found = fetch("ms:owner/name", "hf:owner/name")
    assert found.source == "hf:owner/name" and is_whole(found)
    hub.requests.clear()
    assert fetch("ms:owner/name", "hf:owner/name") == found and hub.lines() == []
    hub.faults.clear()
    assert fetch("ms:owner/name").source == "ms:owner/name"  # another question
    assert fetch("ms:owner/name", "hf:owner/name", refresh=True).source == "ms:owner/name"
    assert fetch("ms:owner/name", "hf:owner/name").source == "ms:owner/name"


@pytest.mark.parametrize("places", [PLACES, PLACES[::-1]])
def test_refused_connections_are_both_listed(monkeypatch, places):
    with closed_port() as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{port}")
        with seconds() as taken, pytest.raises(WeightsUnavailable) as caught:
            fetch(*places)
    assert taken.seconds < SLACK + 1
    lines = caught.value.failures
    assert [line.split(":")[0] for line in lines] == [f"{'Hugging Face' if p < 'm' else 'ModelScope'} owner/name" for p in places]
    assert all("refused" in line and f"{port}" in line for line in lines)
    assert str(caught.value).splitlines() == ["Test: no weights. Tried", *(f"  - {line}" for line in lines), "Ways out: none."]


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield server.getsockname()[1]


@each_hub
@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])  # by sha256, and on Hugging Face by git's name
def test_a_flipped_byte_is_refused_and_the_other_place_asked(hub, monkeypatch, place, name):
    hub.sent[name] = flipped(FILES[name])
    line, = failures(place)
    assert f"{name} came with" in line and "the listing says" in line and nothing_cached()
    other = PLACES[place == PLACES[0]]
    with running(FILES) as good:
        monkeypatch.setenv("HF_ENDPOINT" if other.startswith("hf") else "MODELSCOPE_ENDPOINT", good.endpoint)
        found = fetch(place, other)
        assert found.source == other and is_whole(found)


@each_hub
def test_more_bytes_than_listed_are_refused(hub, place):
    hub.sent["notes.txt"] = b"text and more"
    line, = failures(place)
    assert "notes.txt has more bytes than the 4 of the listing" in line and nothing_cached()


@each_hub
@pytest.mark.parametrize("edit, message", [
    (lambda row: [row.pop(key, None) for key in ("Sha256", "lfs", "blobId")], "no hash"),
    (lambda row: row.update(lfs={"sha256": "no hex", "size": 5, "pointerSize": 1}, blobId="?", Sha256="no hex"), "no hash"),
    (lambda row: [row.update({key: -1}) for key in ("Size", "size")] and row.pop("lfs", None), "the size -1"),
])
def test_a_listing_that_promises_nothing_is_refused(hub, place, edit, message):
    hub.listed = lambda rows: [edit(row) for row in rows if WEIGHTS in row.values()]
    line, = failures(place)
    assert message in line and not hub.lines(r"resolve|FilePath") and nothing_cached()


@each_hub
@pytest.mark.parametrize("name", ["../out.json", "/out.json", "..", ".hidden.json", "a\\b.json", "a b.json", "sub/../out.json"])
def test_names_that_lead_elsewhere_are_not_asked_for(hub, tmp_path, place, name):
    hub.revisions["main"] = hub.revisions["master"] = {**FILES, name: b"1"}
    assert is_whole(fetch(place)) and not list(tmp_path.rglob("*out.json"))


@each_hub
def test_a_listing_without_end_is_refused(hub, place):
    hub.revisions["main"] = hub.revisions["master"] = {**FILES, **{f"{number}.json": b"1" for number in range(MAX_FILES)}}
    line, = failures(place)
    assert f"has {MAX_FILES + len(WANTED)} files" in line and not hub.lines(r"resolve|FilePath") and nothing_cached()


def test_modelscope_lists_no_more_than_3000_files_and_does_not_say_so(hub):
    hub.revisions["master"] = {**{f"sub/{number}.bin": b"" for number in range(3000)}, **FILES}
    assert is_whole(fetch("ms:owner/name"))
    hub.revisions["v1"] = {**FILES, **{f"{number}.bin": b"" for number in range(3000)}, "z.json": b"{}"}
    line, = failures("ms:owner/name@v1")
    assert "it lists 3000 entries, the most it sends" in line and not hub.lines("FilePath=z.json")


@pytest.mark.parametrize("body", [b"<html>Sign in to the network</html>", b"[]", b'{"Data": {"Files": [7]}}', b"[" * 100_000,
                                  b'{"Data": {"Files": [{"Path": "config.json"}]}}', b'{"Data": null}'])
def test_what_is_no_listing_is_called_that(hub, body):
    hub.faults.append(lambda answer: answer.write(200, {}, body) is None)
    line, = failures("ms:owner/name")
    assert f"{hub.endpoint}: no listing: {body[:9].decode()}" in line and nothing_cached()


@each_hub
def test_pickles_alone_are_not_even_asked_for(hub, place):
    hub.revisions["main"] = hub.revisions["master"] = {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}
    line, = failures(place)
    assert "without model.safetensors (pickled weights are not loaded)" in line
    assert not hub.lines(r"resolve|FilePath") and nothing_cached()


# ---- bodies that stop --------------------------------------------------------------------------------------------------


@each_hub
@pytest.mark.parametrize("ranges", [True, False])
def test_a_dropped_connection_is_taken_up_again(hub, place, ranges):
    hub.ranges = ranges
    hub.faults.append(breaking_off(WEIGHTS, BODY, 150_000, times=1))
    assert is_whole(fetch(place))
    asked = [request.headers.get("Range") for request in hub.requests if WEIGHTS in request.line]
    assert len(asked) == 2 and asked[0] is None and asked[1] is not None
    start = int(asked[1].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= 150_000


@each_hub
def test_a_body_that_is_always_cut_gives_up(hub, place):
    hub.ranges = False
    hub.faults.append(breaking_off(WEIGHTS, BODY, 1000))
    line, = failures(place)
    assert "broke off after" in line or "ended after" in line
    assert len(hub.lines(WEIGHTS)) <= 1 + RETRIES + 1 and nothing_cached()  # the first news, and RETRIES without


def test_a_server_that_cannot_go_on_where_it_stopped_gives_up(hub):
    hub.faults.append(breaking_off(WEIGHTS, BODY, 150_000, times=1))
    hub.faults.append(lambda answer: "Range" in answer.headers and answer.json({}, 416) is None)
    line, = failures("hf:owner/name")
    assert "416" in line and nothing_cached()


@pytest.mark.parametrize("code, headers, sent", [
    (206, {"Content-Range": f"bytes 5-{len(BODY) - 1}/{len(BODY)}"}, BODY[5:] + BODY[:5]),  # a part that nobody asked for
    (200, {"Content-Encoding": "gzip"}, gzip.compress(flipped(BODY), 1)),                    # compressed, and wrong
    (200, {"Content-Encoding": "gzip"}, gzip.compress(BODY + bytes(50 << 20), 1)),           # a bomb
    (200, {"Content-Encoding": "gzip"}, BODY),                                               # not compressed at all
    (200, {"Content-Length": str(len(BODY) + 5)}, BODY),                                     # fewer than announced
], ids=["206", "gzip", "bomb", "no gzip", "length"])
def test_bodies_that_are_not_what_was_asked_for_are_refused(hub, code, headers, sent):
    hub.faults.append(lambda answer: WEIGHTS in answer.path and answer.write(code, headers, sent) is None)
    line, = failures("hf:owner/name")
    assert nothing_cached() and ("came with" in line or "more bytes" in line or "decode" in line or "broke off" in line)


def test_a_body_that_comes_compressed_all_the_same_is_unpacked(hub):
    sent = gzip.compress(BODY, 1)
    hub.faults.append(lambda answer: WEIGHTS in answer.path and answer.write(200, {"Content-Encoding": "gzip"}, sent) is None)
    assert is_whole(fetch("hf:owner/name"))


@each_hub
def test_a_short_body_that_calls_itself_whole_gives_up(hub, place):
    hub.ranges = False
    hub.sent[WEIGHTS] = BODY[:-5]
    line, = failures(place)
    assert f"ended after {len(BODY) - 5} of {len(BODY)} bytes" in line and nothing_cached()


def test_a_busy_moment_between_files_is_waited_out(hub):
    hub.faults.append(status(503, r"resolve.*" + WEIGHTS, times=2))
    assert is_whole(fetch("hf:owner/name"))


@each_hub
def test_404_of_one_file_poisons_nothing(hub, place):
    hub.faults.append(status(404, "config.json", times=1))
    line, = failures(place)
    assert "404" in line and "config.json" in line and nothing_cached()
    assert is_whole(fetch(place))


@settings(max_examples=25, deadline=None)
@given(size=st.integers(0, 3 * QUANTUM), cuts=st.lists(st.integers(0, 2 * QUANTUM), max_size=6), ranges=st.booleans(),
       seed=st.integers(0, 255))
def test_wherever_it_breaks_off_a_file_is_whole_or_refused(tmp_path_factory, size, cuts, ranges, seed):
    body = bytes((seed + i * i) % 251 for i in range(509)) * (size // 509 + 1)
    body = body[:size]
    path = tmp_path_factory.mktemp("body") / "file"
    with running({"file": body}) as server:
        server.ranges = ranges
        server.faults += [breaking_off("file", body, cut, times=1) for cut in cuts]
        line = Line(server.endpoint, {}, Patience(5))
        wanted = RemoteFile("file", size, sha256(body), None, f"{server.endpoint}/owner/name/resolve/main/file")
        try:
            assert download(line, wanted, path) == sha256(body) and path.read_bytes() == body
        except Dropped:
            assert len(cuts) > RETRIES  # so many tries are never used up by fewer cuts


# ---- silence -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", [[MS], [HF], [MS, HF]], ids=["ModelScope", "Hugging Face", "both"])
def test_mute_hubs_cost_their_share_of_one_deadline(hub, silent):
    hub.faults += [mute(pattern) for pattern in silent]
    with seconds() as taken:
        if len(silent) == 2:
            lines = failures(*PLACES, deadline=1.0)
            assert all("was silent for 0.5 s" in line for line in lines) and len(lines) == 2
        else:
            place = PLACES[silent == [MS]]
            found = fetch(place, PLACES[silent == [HF]], deadline=1.0)
            assert is_whole(found) and found.source != place
    assert 0.5 * len(silent) <= taken.seconds < 0.5 * len(silent) + SLACK


def test_shares_of_the_deadline_add_up(hub, monkeypatch):
    given_out = []

    class Watched(Patience):
        def __init__(self, seconds: float) -> None:
            super().__init__(seconds)
            given_out.append(seconds)

        def spent(self) -> float:
            return self.seconds if self.since else 0.0  # as if nothing ever came

    monkeypatch.setattr(weights, "Patience", Watched)
    monkeypatch.setattr(weight_cache, "POLL", 0.001)
    hub.faults.append(mute())
    for places in (["ms:owner/name"], PLACES, [*PLACES, "./nowhere", "owner/name"]):
        given_out.clear()
        failures(*places, deadline=DEADLINE)
        hubs = [share for share, place in zip(given_out, places) if place != "./nowhere"]
        assert sum(hubs) == pytest.approx(DEADLINE) and hubs == pytest.approx([hubs[0]] * len(hubs))
    assert DEADLINE + 5 < 30  # 5 s for imports and a slow disk


@pytest.mark.slow
def test_two_mute_hubs_cost_less_than_30_seconds_by_default(hub, tmp_path):
    hub.faults.append(mute())
    with seconds() as taken:
        process = start(tmp_path, hub, FETCH, *PLACES)
        _, err = process.communicate(timeout=60)
    assert taken.seconds < 30 and err.count("was silent for 10 s") == 2


@each_hub
def test_silence_in_the_middle_of_a_body_is_given_up(hub, place):
    hub.faults.append(stalling(WEIGHTS, BODY, 150_000))
    with seconds() as taken:
        line, = failures(place, deadline=0.6)
    assert "was silent for 0.6 s" in line and nothing_cached()
    assert taken.seconds < 2 * 0.6 + SLACK  # once from the last 128 KiB


@pytest.mark.parametrize("fault", [dripping_header("resolve", 0.05), slow(WEIGHTS, BODY, 100, 0.05)], ids=["header", "body"])
def test_a_server_that_drips_is_given_up(hub, fault):
    hub.faults.append(fault)
    with seconds() as taken:
        line, = failures("hf:owner/name", deadline=0.6)
    assert "was silent" in line and taken.seconds < 0.6 + SLACK


def test_a_drip_in_small_chunks_is_no_progress(hub):
    def chunked(request, part, start):
        while not request.server.closing.wait(0.02):
            yield b"1\r\nx\r\n"
    answer = pieces(WEIGHTS, BODY, chunked)

    def fault(request):
        if WEIGHTS not in request.path:
            return False
        part = request.part
        request.part = lambda body, headers=None: (200, {"Transfer-Encoding": "chunked"}, 0, part(body, headers)[3])
        return answer(request)
    hub.faults.append(fault)
    with seconds() as taken:
        line, = failures("hf:owner/name", deadline=0.6)
    assert "was silent" in line and taken.seconds < 0.6 + SLACK


def test_a_slow_line_that_keeps_bringing_bytes_may_take_longer_than_the_deadline(hub):
    big = BODY + bytes(5 * QUANTUM)
    hub.revisions["main"] = {**FILES, WEIGHTS: big}
    hub.faults.append(slow(WEIGHTS, big, QUANTUM, 0.25))
    with seconds() as taken:
        found = fetch("hf:owner/name", deadline=1.0)
    assert taken.seconds > 1.5 and (found.directory / WEIGHTS).read_bytes() == big


def test_a_slow_disk_is_no_silent_hub(hub, monkeypatch):
    fsync, slow_ones = os.fsync, [0.8]
    monkeypatch.setattr(os, "fsync", lambda file: (time.sleep(slow_ones.pop() if slow_ones else 0), fsync(file)))
    assert is_whole(fetch("hf:owner/name", deadline=0.6)) and not slow_ones


def test_a_deadline_beyond_what_sockets_can_wait_for_is_as_long_as_they_can(hub):
    assert is_whole(fetch("ms:owner/name", deadline=1e300))


def test_the_deadline_comes_from_the_environment_too(hub, monkeypatch):
    hub.faults.append(mute())
    monkeypatch.setenv("OMNI_ADAPTERS_DEADLINE", "0.3")
    assert "was silent for 0.3 s" in failures("hf:owner/name", deadline=None)[0]
    for wrong in ("soon", "0", "nan", "inf", "-1"):
        monkeypatch.setenv("OMNI_ADAPTERS_DEADLINE", wrong)
        with pytest.raises(BadInput, match="OMNI_ADAPTERS_DEADLINE"):
            fetch("hf:owner/name", deadline=None)


# ---- who is asked, and what they learn ---------------------------------------------------------------------------------


@pytest.mark.parametrize("code, headers", [(401, {}), (403, {"X-Error-Code": "GatedRepo"})])
@pytest.mark.parametrize("where", ["listing", "file"])
@each_hub
def test_a_gated_repository_says_what_to_do(hub, place, where, code, headers):
    pattern = r"/(revision|models/owner/name|repo/files)(\?|$)" if where == "listing" else r"resolve|FilePath"
    hub.faults.append(status(code, pattern, headers=headers))
    line, = failures(place)
    assert f"{code}" in line and "gated or private" in line and nothing_cached()
    assert ("HF_TOKEN" in line and "accept its terms" in line) if place.startswith("hf") else "MODELSCOPE_API_TOKEN" in line


@each_hub
def test_a_token_goes_to_its_hub_and_nowhere_else(hub, monkeypatch, place):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret")
    with running(FILES) as elsewhere:
        hub.elsewhere = elsewhere.endpoint
        assert is_whole(fetch(place))
        sent = json.dumps([request.headers for request in hub.requests])
        assert ("hf_secret" in sent, "ms_secret" in sent) == (place.startswith("hf"), place.startswith("ms"))
        assert all("Authorization" in headers or "authorization" in headers for headers in (r.headers for r in hub.requests))
        assert elsewhere.lines("cdn/" + WEIGHTS)
        assert "secret" not in json.dumps([request.headers for request in elsewhere.requests])


@each_hub
def test_a_listing_that_is_redirected_takes_no_token_along(hub, monkeypatch, place):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret")
    with running(FILES) as elsewhere:
        hub.faults.append(lambda answer: answer.json({}, 307, {"Location": elsewhere.endpoint + answer.path}) is None)
        with contextlib.suppress(WeightsUnavailable):  # allowed, not needed
            fetch(place)
        assert hub.lines() and elsewhere.lines()
        assert "secret" not in json.dumps([request.headers for request in elsewhere.requests])


def test_a_redirect_at_home_keeps_the_token(hub, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret")
    hub.faults.append(status(302, "FilePath=config.json$", headers={"Location": "/cdn/config.json"}))
    assert is_whole(fetch("ms:owner/name"))
    moved, = (request for request in hub.requests if "cdn" in request.line)
    assert moved.headers["Authorization"] == "Bearer ms_secret"


def test_redirects_in_a_circle_end(hub):
    hub.faults.append(lambda answer: "FilePath" in answer.path and answer.json({}, 302, {"Location": answer.path}) is None)
    line, = failures("ms:owner/name")
    assert "more than 10 redirects" in line and nothing_cached()


@pytest.mark.parametrize("url, location, leads", [
    ("https://a/x/y", "z", "https://a/x/z"), ("https://a/x", "//b/y", "https://b/y"), ("http://a", "https://b", "https://b"),
    ("http://a/x", "/y", "http://a/y"), ("https://a/x", "http://a/x", None), ("https://a/x", "http://b/x", None),
    ("https://a/x", "file:///etc/passwd", None),
])
def test_a_redirect_does_not_lead_from_https_to_http(url, location, leads):
    with contextlib.nullcontext() if leads else pytest.raises(ConnectionError, match="not https"):
        assert next_hop(url, location) == leads


def test_a_hubs_words_do_not_steer_the_terminal():
    assert in_one_line(OSError("\x1b]0;title\x07 one\n\ttwo\u202e")) == "OSError: ?]0;title? one two?"


def test_passwords_in_netrc_are_not_used(hub, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert is_whole(fetch("hf:owner/name"))
    assert {request.headers.get("Authorization") for request in hub.requests if "resolve" in request.line} == {"Bearer hf_secret"}


@pytest.mark.parametrize("one, other, same", [
    ("http://a/x", "http://a:80/y", True), ("https://a", "https://a:443", True), ("https://A/x", "https://a/x", True),
    ("http://a", "https://a", False), ("http://a", "http://a:81", False), ("http://a", "http://a.b", False),
    ("https://a", "https://a@b", False),
])
def test_origins(one, other, same):
    assert (origin(one) == origin(other)) == same


def test_offline_sends_nothing_and_says_so(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = failures(*PLACES)
    assert hub.lines() == [] and all("HF_HUB_OFFLINE is set and no whole copy is cached" in line for line in lines)
    assert all("refresh" in line for line in failures(*PLACES, refresh=True)) and hub.lines() == []


def test_endpoints_are_read_when_asked(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror/")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "www.modelscope.ai")
    assert endpoints() == {"Hugging Face": "http://mirror", "ModelScope": "https://www.modelscope.ai"}
    monkeypatch.setenv("HF_ENDPOINT", "")
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.delenv("MODELSCOPE_ENDPOINT")
    assert endpoints() == {"Hugging Face": "https://huggingface.co", "ModelScope": "https://www.modelscope.cn"}


def test_probe(hub):
    assert probe(hub.endpoint, 5) is None
    hub.faults.append(status(500))
    assert probe(hub.endpoint, 5) is None  # it answers
    hub.faults[:] = [mute()]
    with seconds() as taken:
        assert "silent" in (probe(hub.endpoint, 0.3) or "") or "timed out" in (probe(hub.endpoint, 0.3) or "")
    assert taken.seconds < 2 * 0.3 + SLACK
    with closed_port() as port:
        assert "refused" in (probe(f"http://127.0.0.1:{port}", 5) or "")
    assert "\n" not in (probe("no url", 5) or "\n")


# ---- what lies on the disk ---------------------------------------------------------------------------------------------


def flip_on_disk(directory: Path, name: str = WEIGHTS) -> None:
    (directory / name).write_bytes(flipped((directory / name).read_bytes()))


def relabel(directory: Path) -> None:
    facts = json.loads((directory / ".copy.json").read_text())
    (directory / ".copy.json").write_text(json.dumps({**facts, "revision": "0" * 40}))


DAMAGE = {
    "flipped weights": (flip_on_disk, "have changed since"),
    "flipped config": (lambda d: flip_on_disk(d, "config.json"), "have changed since"),
    "truncated": (lambda d: (d / WEIGHTS).write_bytes(BODY[:-1]), "bytes long"),
    "absent": (lambda d: (d / "notes.txt").unlink(), "is absent"),
    "planted": (lambda d: (d / "model-00009-of-00009.safetensors").write_bytes(b""), "was not fetched with the rest"),
    "relabelled": (relabel, "is not as it was written"),
    "no manifest": (lambda d: (d / ".copy.json").unlink(), "does not read"),
    "no JSON": (lambda d: (d / ".copy.json").write_text("{"), "does not read"),
    "no fields": (lambda d: (d / ".copy.json").write_text("{}"), "does not read"),
}


@each_hub
@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_a_copy_that_changed_is_set_aside_and_fetched_again(hub, monkeypatch, place, damage, message):
    found = fetch(place)
    damage(found.directory)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line, = failures(place)  # no way to heal it, no way around it
    assert message in line and found.directory.is_dir()
    assert [(copy.directory, copy.ok) for copy in cached_copies(verify=True)] == [(found.directory, False)]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.warns(UserWarning, match=message):
        healed = fetch_weights("Test", [place])
    assert healed == found and is_whole(healed)
    aside, = found.directory.parent.glob(".bad-*")
    assert not is_whole(Weights(aside, "")) or message in ("is not as it was written", "does not read")
    assert fetch(place) == found and len(cached_copies()) == 1


def test_a_copy_that_the_disk_does_not_give_back_is_set_aside_too(hub, monkeypatch):
    found = fetch("hf:owner/name")
    bad, hash_file = (found.directory / WEIGHTS).stat().st_ino, weight_cache.hash_file

    def read(path: Path, digest: object) -> str:
        if path.stat().st_ino == bad:
            raise OSError(errno.EIO, "Input/output error")
        return hash_file(path, digest)
    monkeypatch.setattr(weight_cache, "hash_file", read)
    assert [copy.ok for copy in cached_copies(verify=True)] == [False]
    with pytest.warns(UserWarning, match="cannot be read .*Input/output error"):
        assert fetch_weights("Test", ["hf:owner/name"]) == found
    assert is_whole(found) and [copy.ok for copy in cached_copies(verify=True)] == [True]


def test_rubbish_in_the_cache_is_listed_as_damaged_and_hides_nothing(hub):
    found = fetch("hf:owner/name")
    owner = found.directory.parent
    for name, manifest in {"empty": None, "list": b"[]", "folder": b"", "link": b""}.items():
        (owner / name).mkdir()
        if name == "folder":
            (owner / name / ".copy.json").mkdir()
        elif name == "link":
            (owner / name / ".copy.json").symlink_to("/dev/null/nowhere")
        elif manifest is not None:
            (owner / name / ".copy.json").write_bytes(manifest)
    for wrong in ({"source": 7}, {"revision": None}, {"files": [{"name": "config.json", "size": "2", "sha256": "0"}]},
                  {"files": [{"name": "../config.json", "size": 2, "sha256": "0"}]}, {"files": [[]]}, {"format": 2}):
        resign(found.directory, owner / f"signed{len(list(owner.iterdir()))}", wrong)
    (owner / "file").write_text("")
    copies = cached_copies(verify=True)
    assert [copy.directory for copy in copies if copy.ok] == [found.directory] and len(copies) == 1 + 4 + 6
    assert all(copy.source == f"hf/owner--name/{copy.directory.name}" for copy in copies if not copy.ok)


def resign(directory: Path, target: Path, wrong: dict[str, object]) -> None:
    """A manifest with a true hash of itself and other values."""
    facts = {**json.loads((directory / ".copy.json").read_text()), **wrong}
    facts.pop("sha256")
    target.mkdir()
    (target / ".copy.json").write_bytes(json_bytes({**facts, "sha256": sha256(json_bytes(facts))}))


def test_only_the_last_bad_copy_is_kept(hub):
    found = fetch("hf:owner/name")
    for _ in range(3):
        flip_on_disk(found.directory)
        with pytest.warns(UserWarning, match="set aside"):
            fetch_weights("Test", ["hf:owner/name"])
    assert len(list(found.directory.parent.glob(".bad-*"))) == 1


def test_without_verify_sizes_alone_are_compared(hub):
    found = fetch("hf:owner/name")
    flip_on_disk(found.directory)
    assert fetch("hf:owner/name", verify=False) == found
    assert [copy.ok for copy in cached_copies()] == [None]
    (found.directory / WEIGHTS).write_bytes(BODY[:-1])
    assert [copy.ok for copy in cached_copies()] == [False]
    with pytest.warns(UserWarning, match="bytes long"):
        assert is_whole(fetch_weights("Test", ["hf:owner/name"], verify=False))


def test_a_copy_of_something_else_is_not_taken_for_it(hub):
    found = fetch("hf:owner/name")
    other = found.directory.parent.with_name("owner--other") / found.directory.name
    other.parent.mkdir()
    found.directory.rename(other)
    message = "holds 'hf:owner/name', not hf:owner/other"
    with pytest.warns(UserWarning, match=message), pytest.raises(WeightsUnavailable) as caught:
        fetch_weights("Test", ["hf:owner/other"])
    line, = caught.value.failures
    assert "404" in line or "RepositoryNotFound" in line  # the copy is no answer, and the hub has none


def test_a_cache_that_cannot_be_written_to_is_one_line(hub, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OMNI_ADAPTERS_CACHE", str(tmp_path / "file"))
    line, = failures("hf:owner/name")
    assert "file" in line


def test_the_cache_folder(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("OMNI_ADAPTERS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "omni_adapters" / "weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "omni_adapters" / "weights"


def test_without_a_home_a_directory_still_does(hub, monkeypatch, tmp_path):
    for name in ("HOME", "OMNI_ADAPTERS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # no entry for this user
    for name in ("config.json", WEIGHTS):
        (tmp_path / name).write_bytes(FILES[name])
    assert fetch("hf:owner/name", "~/nowhere", tmp_path).directory == tmp_path
    assert [line.count("set OMNI_ADAPTERS_CACHE to a folder") for line in failures("ms:owner/name", "~nobody/x")] == [1, 0]
    assert hub.lines() == []


# ---- several processes -------------------------------------------------------------------------------------------------


def wait_until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_download_leaves_nothing_that_counts(hub, tmp_path):
    hub.faults.append(stalling(WEIGHTS, BODY, 2 * QUANTUM, times=1))
    process = start(tmp_path, hub, FETCH, "hf:owner/name")
    wait_until(lambda: any(path.stat().st_size >= QUANTUM for path in cache_folder().rglob(f".*.partial/{WEIGHTS}")))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert list(cache_folder().rglob("*.partial")) and cached_copies() == []
    found = fetch("hf:owner/name")
    assert is_whole(found) and not list(cache_folder().rglob("*.partial"))


def test_whoever_waits_for_a_process_that_is_killed_takes_over(hub, tmp_path):
    hub.faults.append(stalling(WEIGHTS, BODY, 2 * QUANTUM, times=1))
    process = start(tmp_path, hub, FETCH, "hf:owner/name")
    wait_until(lambda: hub.lines(WEIGHTS))
    found: list[Weights] = []
    waiting = threading.Thread(target=lambda: found.append(fetch_weights("Test", ["hf:owner/name"], deadline=20.0)))
    waiting.start()
    time.sleep(0.2)
    assert len(hub.lines(WEIGHTS)) == 1  # it waits
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    with seconds() as taken:
        waiting.join(30)
    assert is_whole(found[0]) and taken.seconds < SLACK + 1  # not the 10 s after which it would go on alone


def test_those_who_wait_for_a_mute_hub_wait_no_longer_than_the_first(hub):
    hub.faults.append(mute())
    lines: list[str] = []

    def ask() -> None:  # without pytest.raises and warning filters, which threads share
        try:
            fetch_weights("Test", ["ms:owner/name"], deadline=1.0)
        except WeightsUnavailable as error:
            lines.extend(error.failures)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    with seconds() as taken:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(lines) == 4 and all("was silent for 1 s" in line for line in lines) and taken.seconds < 1 + SLACK


def test_two_processes_at_once_download_once(hub, tmp_path):
    hub.faults.append(slow(WEIGHTS, BODY, 100_000, 0.5))
    both = [start(tmp_path, hub, FETCH, "hf:owner/name") for _ in range(2)]
    assert len({output(process) for process in both}) == 1
    assert is_whole(fetch("hf:owner/name")) and len(hub.lines(WEIGHTS)) == 1


def test_threads_at_once_download_once(hub):
    hub.faults.append(slow(WEIGHTS, BODY, 100_000, 0.1))
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch_weights("Test", ["ms:owner/name"]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 4 and len(set(found)) == 1 and is_whole(found[0]) and len(hub.lines(WEIGHTS)) == 1


def test_a_process_that_stands_still_is_not_waited_for(hub):
    slot = weight_cache.slot_of("hf", "owner/name", None)
    slot.directory.parent.mkdir(parents=True)
    with open(slot.directory.with_name(f".{slot.directory.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with seconds() as taken:
            assert is_whole(fetch("hf:owner/name", deadline=1.0))
    assert 0.5 <= taken.seconds < 0.5 + SLACK


def test_whoever_removes_orphans_first_makes_headway_all_the_same(tmp_path):
    slot = weight_cache.Slot("hf:owner/name", tmp_path / "@default")
    orphan, fresh = (tmp_path / f".@default.{digit * 8}.partial" for digit in "01")
    orphan.mkdir()
    (orphan / WEIGHTS).write_bytes(bytes(10_000))
    released, seen = [], []

    def work() -> None:
        time.sleep(0.2)  # the other one has looked at what is there
        (orphan / WEIGHTS).unlink()
        fresh.mkdir()
        for size in range(15):
            (fresh / WEIGHTS).write_bytes(bytes(size))
            time.sleep(0.1)
        released.append(time.monotonic())
        os.close(held)
    held = os.open(tmp_path / ".@default.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    worker = threading.Thread(target=work)
    worker.start()
    with weight_cache.turn(slot, lambda: seen.append(1), 0.7):
        assert released and len(seen) > 1
    worker.join()


def test_a_new_folder_that_a_rival_is_removing_is_not_used(tmp_path, monkeypatch):
    answers = [False, True]
    monkeypatch.setattr(weight_cache, "lock", lambda file: answers.pop(0))
    with weight_cache.partial_folder(weight_cache.Slot("hf:owner/name", tmp_path / "@default")) as folder:
        first, second = sorted(tmp_path.iterdir(), key=lambda path: path == folder)
        assert second == folder != first and not answers


def test_a_rival_that_was_faster_wins_and_its_partial_work_is_left_alone(hub, monkeypatch):
    """As on a file system without locks: everybody downloads, and the first copy stays."""
    monkeypatch.setattr(weight_cache, "lock", lambda file: None)
    slot = weight_cache.slot_of("hf", "owner/name", None)
    rival = slot.directory.with_name(f".{slot.directory.name}.{'0' * 8}.partial")
    rival.mkdir(parents=True)
    hub.faults.append(slow(WEIGHTS, BODY, 100_000, 0.1))
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch_weights("Test", ["hf:owner/name"]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 3 and is_whole(found[0]) and len(hub.lines(WEIGHTS)) > 1
    assert rival.is_dir() and list(cache_folder().rglob("*.partial")) == [rival]


# ---- directories and candidates ----------------------------------------------------------------------------------------


def test_absent_ids_fall_through_and_offline_uses_what_is_cached(hub, monkeypatch):
    places = ["ms:owner/absent", "hf:owner/absent", "owner/name"]
    found = fetch(*places)
    assert found.source == "hf:owner/name" and hub.lines("/v1/models/owner/absent")
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(*places) == found
    assert all("HF_HUB_OFFLINE is set" in line for line in failures(*places[:2])) and hub.lines() == []


def test_directories_in_order_and_their_failures(tmp_path):
    empty, whole = tmp_path / "empty", tmp_path / "whole"
    empty.mkdir()
    whole.mkdir()
    for name in ("config.json", WEIGHTS):
        (whole / name).write_bytes(FILES[name])
    assert fetch(tmp_path / "nowhere", empty, whole) == (whole, str(whole))
    with pytest.raises(WeightsUnavailable) as caught:
        fetch_weights("Test", [tmp_path / "nowhere", str(empty), "./no/such"], ["config.json", "other.json"])
    assert isinstance(caught.value, OSError) and caught.value.where == "Test"
    assert caught.value.failures == [
        f"{tmp_path / 'nowhere'}: FileNotFoundError: no such directory",
        f"{empty}: FileNotFoundError: without config.json, other.json, model.safetensors",
        "no/such: FileNotFoundError: no such directory",
    ]


@pytest.fixture(scope="module", params=["Whisper", "wav2vec2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[type, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "Whisper":
        return WhisperEncoder, make_tiny_whisper(folder)
    return HFSpeechEncoder, make_tiny_speech(folder, "wav2vec2-group")


def test_encoders_take_the_first_of_several_places_that_has_them(hub, checkpoint, monkeypatch):
    encoder, folder = checkpoint
    hub.revisions["main"] = hub.revisions["master"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    for places, source in ((["ms:owner/absent", "hf:owner/name", folder], "hf:owner/name"), (PLACES[::-1], "ms:owner/name"),
                           (["ms:owner/absent", "hf:owner/absent", folder], str(folder)), ((folder, "owner/name"), str(folder))):
        found = encoder(places)
        assert found.source == source == describe_encoder(found)["source"]
    with pytest.raises(WeightsUnavailable, match=encoder.__name__) as caught:
        encoder(["ms:owner/absent", "hf:owner/absent", folder / "no"])
    assert [line.split(":")[0] for line in caught.value.failures] == [
        "ModelScope owner/absent", "Hugging Face owner/absent", str(folder / "no")]
    monkeypatch.setenv("OMNI_ADAPTERS_DEADLINE", "0.6")
    hub.faults.append(mute())
    with seconds() as taken:
        assert encoder(["ms:owner/mute", "hf:owner/mute", folder]).source == str(folder)
    assert taken.seconds < 0.6 + SLACK


def test_a_whisper_without_a_source_asks_modelscope_hugging_face_and_a_directory(hub, tmp_path, monkeypatch):
    folder = make_tiny_whisper(tmp_path / "whisper")
    hub.revisions["main"] = hub.revisions["master"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("WHISPER_MS_ID", "WHISPER_HF_ID"):
        monkeypatch.setenv(name, "owner/absent")
    monkeypatch.setenv("WHISPER_DIR", str(folder))
    assert WhisperEncoder().source == str(folder)
    assert hub.lines(f"{MS}.*absent") and hub.lines(f"{HF}.*absent")
    monkeypatch.setenv("WHISPER_HF_ID", "owner/name")
    assert WhisperEncoder().source == "hf:owner/name"
    monkeypatch.setenv("WHISPER_MS_ID", "owner/name")
    assert WhisperEncoder().source == "ms:owner/name"


@pytest.mark.parametrize("candidate", ["hf:", "hf:../up", "ms:a/b/c", "hf:a/b@", "ms:a/b@../x", "hf:a b", "hf:a/b@c d",
                                       "hf:a/b@c@d"])
def test_candidates_that_are_none_send_nothing(hub, candidate):
    line, = failures(candidate)
    assert "owner/name@revision" in line and hub.lines() == []


def test_shards_are_all_required(tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert missing_files(tmp_path, []) == ["model-00002-of-00002.safetensors"]
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert missing_files(tmp_path, []) == []


@pytest.mark.parametrize("index", [
    '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": "/model.safetensors"}}', '{"weight_map": {}}',
    '{"weight_map": {"a": "model.bin"}}', '{"weight_map": {"a": 7, "b": "model.safetensors"}}', '{"weight_map": []}', "[]", "{",
])
def test_an_index_that_leads_elsewhere_or_nowhere_is_refused(hub, tmp_path, index):
    inside = tmp_path / "inside"
    inside.mkdir()
    for path in (inside / "config.json", tmp_path / WEIGHTS, inside / "model.bin"):
        path.write_bytes(b"{}")
    (inside / "model.safetensors.index.json").write_text(index.replace('"/', f'"{tmp_path}/'))
    with pytest.raises(Damaged, match=r"model\.safetensors\.index\.json (lists|is no index)"):
        weight_files(inside)
    hub.revisions["main"] = {**{name: body for name, body in FILES.items() if name != WEIGHTS},
                             "model.safetensors.index.json": (inside / "model.safetensors.index.json").read_bytes()}
    assert all("model.safetensors.index.json" in line for line in failures(inside, "hf:owner/name")) and nothing_cached()


def test_a_path_that_is_no_text(tmp_path):
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    directory.mkdir()
    for name in ("config.json", WEIGHTS):
        (directory / name).write_bytes(FILES[name])
    assert fetch("hf:owner/name", directory).directory == directory == fetch(directory).directory


@pytest.mark.parametrize("arguments", [("hf:owner/name",), (["hf:owner/name"], "config.json")])
def test_one_str_is_not_a_list_of_characters(hub, arguments):
    with pytest.raises(BadInput, match="as lists"):
        fetch_weights("Test", *arguments)
    assert hub.lines() == []


def test_importing_the_module_imports_no_client():
    code = ("import omni_adapters.encoders.weights\n"
            "sys.exit(bool({'requests', 'huggingface_hub', 'modelscope'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", LIGHT + code]).returncode == 0
