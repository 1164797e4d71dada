"""A hub on 127.0.0.1 that huggingface_hub's own client publishes to and loads from: repositories, branches, commits and LFS
objects, tokens, and faults on demand.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
import yaml
from huggingface_hub import close_session, constants
from huggingface_hub.utils import logging

from omni_adapters import hub
from omni_adapters.hub import ADAPTER

WRITER, READER = "hf_writer", "hf_reader"


class Repository:
    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        now = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        sha = hashlib.sha1(f"{len(self.commits)} {message} {sorted(now)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = now, sha
        return sha


def git_oid(data: bytes) -> str:
    """How the Hub names a file's content: an LFS object by its sha256, any other file as git does."""
    return data[4:].decode() if data.startswith(b"lfs:") else hashlib.sha1(b"blob %d\x00%b" % (len(data), data)).hexdigest()


class Hub(ThreadingHTTPServer):
    """`fault` is asked before each request is answered: what it returns is sent instead, unless that is None."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fault: Callable[[Answer], Any] = lambda request: None
        self.closing = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def answer(self) -> None:
        if not self.path.startswith("/api/agent-"):  # the client's own business, once a process
            self.server.requests.append(f"{self.command} {self.path}")
        body = self.body()
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        sent = self.server.fault(self)
        status, headers, payload = sent if sent is not None else self.route(parts, body)
        payload = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(payload)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def route(self, parts: list[str], body: bytes) -> tuple[int, dict[str, str], Any]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if parts[0] == "cdn":  # signed URLs, which a token must not reach
            assert not token
            return self.objects(parts[1], body)
        if token not in ("", WRITER, READER):
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, {}
        if parts == ["api", "validate-yaml"]:
            data = yaml.safe_load(json.loads(body)["content"].split("\n---\n")[0])
            return (200 if isinstance(data, dict) else 400), {}, {"errors": [], "warnings": []}
        if parts == ["api", "repos", "create"]:
            return self.create(token, json.loads(body))
        repo_id = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
        repo = self.server.repositories.get(repo_id)
        if repo is None or (repo.private and not token):
            return (404 if token else 401), {"X-Error-Code": "RepoNotFound"}, {}
        if parts[0] == "api":
            return self.api(repo, repo_id, token, parts[4:], body)
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self.may_write(token) or (200, {}, {"objects": [self.place(item) for item in json.loads(body)["objects"]]})
        return self.resolve(repo, parts[3], "/".join(parts[4:]))

    def may_write(self, token: str) -> tuple[int, dict[str, str], Any] | None:
        if token == WRITER:
            return None
        return (403 if token else 401), {"X-Error-Message": "Invalid username or password." if not token else "read only"}, {}

    def create(self, token: str, asked: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if refusal := self.may_write(token):
            return refusal
        repo_id = f"{asked['organization']}/{asked['name']}"
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repositories[repo_id] = Repository(private)
        return 200, {}, {"url": f"{self.server.endpoint}/{repo_id}", "id": repo_id}

    def place(self, item: dict[str, Any]) -> dict[str, Any]:
        here = item["oid"] in self.server.objects
        upload = {"upload": {"href": f"{self.server.endpoint}/cdn/{item['oid']}"}}
        return {"oid": item["oid"], "size": item["size"], **({} if here else {"actions": upload})}

    def objects(self, oid: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        if self.command == "PUT":
            self.server.objects[oid] = body
            return 200, {}, b""
        return 200, {"ETag": f'"{oid}"'}, self.server.objects[oid]

    def api(self, repo: Repository, repo_id: str, token: str, rest: list[str], body: bytes) -> tuple[int, dict[str, str], Any]:
        if rest[:1] in (["preupload"], ["commit"], ["branch"]) and (refusal := self.may_write(token)):
            return refusal
        if rest[:1] == ["preupload"]:
            there = repo.commits[repo.branches[rest[1]]] if rest[1] in repo.branches else {}
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "shouldIgnore": False, "uploadMode": "lfs" if name == ADAPTER else "regular",
                      "oid": git_oid(there[name]) if name in there else None} for name in names]
            return 200, {}, {"files": modes}
        if rest[:1] == ["branch"]:
            if rest[1] in repo.branches:
                return 409, {}, {}
            repo.branches[rest[1]] = repo.branches["main"]
            return 200, {}, {}
        if rest[:1] == ["commit"]:
            return self.commit(repo, repo_id, rest[1], [json.loads(line) for line in body.splitlines()])
        sha = self.sha(repo, rest[1] if len(rest) > 1 else "main")
        if rest[:1] == ["tree"]:
            rows = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in repo.commits[sha].items()]
            return 200, {}, rows
        siblings = [self.listed(name, data) for name, data in repo.commits[sha].items()]
        return 200, {}, {"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings}

    def listed(self, name: str, data: bytes) -> dict[str, Any]:
        if not data.startswith(b"lfs:"):
            return {"rfilename": name, "size": len(data), "blobId": git_oid(data)}
        size = len(self.server.objects[git_oid(data)])
        return {"rfilename": name, "size": size, "blobId": None, "lfs": {"sha256": git_oid(data), "size": size, "pointerSize": 0}}

    def commit(self, repo: Repository, repo_id: str, branch: str, lines: list[Any]) -> tuple[int, dict[str, str], Any]:
        if branch not in repo.branches:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {}
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
        files |= {line["value"]["path"]: b"lfs:" + line["value"]["oid"].encode() for line in lines if line["key"] == "lfsFile"}
        sha = repo.commit(branch, files, lines[0]["value"]["summary"])
        return 200, {}, {"commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha, "success": True}

    def sha(self, repo: Repository, revision: str) -> str | None:
        return repo.branches.get(revision) or (revision if revision in repo.commits else None)

    def resolve(self, repo: Repository, revision: str, path: str) -> tuple[int, dict[str, str], Any]:
        sha = self.sha(repo, revision)
        if sha is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {}
        data = repo.commits[sha].get(path)
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}, {}
        if not data.startswith(b"lfs:"):
            return 200, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data
        oid = data[4:].decode()
        size = str(len(self.server.objects[oid]))
        elsewhere = f"http://localhost:{self.server.server_port}/cdn/{oid}"  # another host, to the client
        return 302, {"X-Repo-Commit": sha, "X-Linked-ETag": f'"{oid}"', "X-Linked-Size": size, "Location": elsewhere}, b""

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def hub_for_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and the client set to it: no token, no xet, no progress bars, a cache of its own."""
    for name in [name for name in os.environ if name.startswith("HF_") or "_PROXY" in name.upper()]:
        monkeypatch.delenv(name)
    close_session()  # the client that the next request makes sees no proxies
    logging.set_verbosity_error()  # for good: threads left behind go on to warn when the test is over
    monkeypatch.setattr(hub, "PREFLIGHT_TIMEOUT", 2.0)
    monkeypatch.setenv("OMNI_ADAPTERS_CACHE", str(tmp_path / "weights"))
    with running_hub() as running:
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {"ENDPOINT": running.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template,
                    "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "no token"), "HF_HUB_OFFLINE": False,
                    "HF_HUB_DISABLE_XET": True, "HF_HUB_DOWNLOAD_TIMEOUT": 1}
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses"), raising=False)
        yield running
