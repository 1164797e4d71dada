"""Where weights come from: the order of the places, the one error, silence bounded in time, caches without requests.

Both hubs' real clients run against servers on 127.0.0.1. They read their endpoints when they are imported, so each
fetch is a process of its own.
"""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

from omni_adapters.encoders.weights import WeightsUnavailable, fetch_weights, missing_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "model.fp32-00001-of-00001.safetensors": b"twice the size",
    "pytorch_model.bin": b"a pickle",
    "notes.txt": b"text",
}
WANTED = {"config.json", "model.safetensors", "notes.txt"}
FETCH = """
import json, sys
from omni_adapters.encoders import weights
weights.PREFLIGHT_TIMEOUT = float(sys.argv[1])
try:
    found = weights.fetch_weights("Test", sys.argv[2:], todo="Ways out: none.")
    print(json.dumps({"directory": str(found.directory), "source": found.source}))
except weights.WeightsUnavailable as error:
    print(json.dumps({"failures": error.failures, "message": str(error)}))
"""


class FakeHub(BaseHTTPRequestHandler):
    """The requests of both hubs' clients for one small repository, owner/name."""

    def do_GET(self):
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.server.requests.append(self.path)
        parts = url.path.strip("/").split("/")
        if "absent" in parts:
            self.answer(404, b'{"Code": 10010205001, "Message": "absent"}', {"X-Error-Code": "RepoNotFound"})
        elif parts[-2:] == ["repo", "files"]:
            rows = [{"Path": name, "Type": "blob", "Size": len(body), "Sha256": hashlib.sha256(body).hexdigest()}
                    for name, body in FILES.items()]
            self.answer(200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": rows}}).encode())
        elif "FilePath" in query:
            self.answer(200, FILES[query["FilePath"]])
        elif "tree" in parts:
            rows = [{"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                    for name, body in FILES.items()]
            self.answer(200, json.dumps(rows).encode())
        elif "resolve" in parts:
            body = FILES[parts[-1]]
            self.answer(200, body, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'})
        else:
            self.answer(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode())

    do_HEAD = do_GET

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def fake_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def fetch(tmp_path, port, *candidates, timeout=5.0, **environment):
    """Run fetch_weights in a process whose hubs are 127.0.0.1:port and whose caches lie in tmp_path."""
    endpoint = f"http://127.0.0.1:{port}"
    inherited = {name: value for name, value in os.environ.items()
                 if not name.startswith(("HF_", "MODELSCOPE_", "TRANSFORMERS_")) and "_PROXY" not in name.upper()}
    env = {**inherited, "HF_ENDPOINT": endpoint, "MODELSCOPE_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"),
           "MODELSCOPE_CACHE": str(tmp_path / "ms"), "MODELSCOPE_HOME": str(tmp_path / "ms_home"), **environment}
    done = subprocess.run([sys.executable, "-c", FETCH, str(timeout), *candidates], env=env, timeout=60,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def listening_socket(listen):
    """A port nobody answers on: refused without `listen`; with it, connections open and stay mute."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listen:
            server.listen()
        yield server.getsockname()[1]


def test_refused_hubs_are_both_listed(tmp_path):
    started = time.monotonic()
    with listening_socket(listen=False) as port:
        got = fetch(tmp_path, port, "ms:owner/name", "hf:owner/name")
    assert time.monotonic() - started < 30
    asked = [failure.split(":")[0] for failure in got["failures"]]
    assert asked == ["ModelScope owner/name", "Hugging Face owner/name"]
    assert all("refused" in failure and f"{port}" in failure for failure in got["failures"])
    lines = ["Test: no weights. Tried", *(f"  - {failure}" for failure in got["failures"]), "Ways out: none."]
    assert got["message"].splitlines() == lines


def test_mute_hubs_cost_a_timeout_each(tmp_path):
    started = time.monotonic()
    with listening_socket(listen=True) as port:
        got = fetch(tmp_path, port, "ms:owner/name", "hf:owner/name", timeout=1.0)
    assert time.monotonic() - started < 30  # two timeouts of 1 s, and the imports
    assert len(got["failures"]) == 2 and all("timed out" in failure for failure in got["failures"])


@pytest.mark.parametrize("candidate", ["hf:owner/name", "ms:owner/name"])
def test_a_download_brings_no_pickle_and_is_needed_once(tmp_path, candidate):
    with fake_hub() as hub:
        got = fetch(tmp_path, hub.server_port, candidate)
        assert got["source"] == candidate
        files = {name for name in os.listdir(got["directory"]) if not name.startswith(".")}
        assert files == WANTED
        assert (Path(got["directory"]) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
        assert hub.requests and not any(".bin" in path or "fp32" in path for path in hub.requests)
        hub.requests.clear()
        assert fetch(tmp_path, hub.server_port, candidate) == got
        assert hub.requests == []


def test_absent_ids_fall_through_and_offline_uses_what_is_cached(tmp_path):
    places = ["ms:owner/absent", "hf:owner/absent", "owner/name"]
    with fake_hub() as hub:
        got = fetch(tmp_path, hub.server_port, *places)
        assert got["source"] == "hf:owner/name"
        assert any("/v1/models/owner/absent" in path for path in hub.requests)
        hub.requests.clear()
        assert fetch(tmp_path, hub.server_port, *places, HF_HUB_OFFLINE="1") == got
        absent = fetch(tmp_path, hub.server_port, *places[:2], HF_HUB_OFFLINE="1")
        assert hub.requests == []
    assert len(absent["failures"]) == 2 and all("HF_HUB_OFFLINE is set" in failure for failure in absent["failures"])


def test_directories_in_order_and_their_failures(tmp_path):
    empty, whole = tmp_path / "empty", tmp_path / "whole"
    empty.mkdir()
    whole.mkdir()
    for name in ("config.json", "model.safetensors"):
        (whole / name).write_bytes(FILES[name])
    found = fetch_weights("Test", [tmp_path / "nowhere", empty, whole])
    assert found == (whole, str(whole))
    with pytest.raises(WeightsUnavailable) as caught:
        fetch_weights("Test", [tmp_path / "nowhere", str(empty), "./no/such"], ["config.json", "other.json"])
    assert isinstance(caught.value, OSError) and caught.value.where == "Test"
    assert caught.value.failures == [
        f"{tmp_path / 'nowhere'}: FileNotFoundError: no such directory",
        f"{empty}: FileNotFoundError: without config.json, other.json, model.safetensors",
        "no/such: FileNotFoundError: no such directory",
    ]


def test_shards_are_all_required(tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert missing_files(tmp_path, []) == ["model-00002-of-00002.safetensors"]
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert missing_files(tmp_path, []) == []
