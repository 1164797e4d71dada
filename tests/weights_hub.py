"""A hub on 127.0.0.1 that speaks Hugging Face's and ModelScope's protocol at once, well enough for both real clients, and
fails on demand.

One repository, owner/name, with revisions; `serve.faults` is asked before each answer. What a request was, and its headers,
is written down.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]
Fault = Callable[["Answer"], bool]  # whether it has answered


class Request(NamedTuple):
    line: str  # "GET /owner/name/resolve/…"
    headers: dict[str, str]


def commit_of(files: Files) -> str:
    return hashlib.sha1(json.dumps({name: git_sha1(body) for name, body in sorted(files.items())}).encode()).hexdigest()


def git_sha1(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\x00%b" % (len(body), body)).hexdigest()


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


class TwoHubs(ThreadingHTTPServer):
    """revisions: branch or tag → files. `sent`: bytes sent in place of a file's, which the listing does not know of.
    `listed`: edits the rows of a listing. `elsewhere`: endpoint that files in large-file storage are redirected to."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, files: Files) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.revisions: dict[str, Files] = {"main": files, "master": files}
        self.sent: Files = {}
        self.listed: Callable[[list[dict[str, Any]]], object] = lambda rows: None
        self.elsewhere: str | None = None
        self.ranges = True
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.closing = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def lines(self, pattern: str = "") -> list[str]:
        return [request.line for request in self.requests if re.search(pattern, request.line)]

    def files_at(self, revision: str) -> Files | None:
        by_commit = {commit_of(files): files for files in self.revisions.values()}
        return self.revisions.get(revision) or by_commit.get(revision)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""


class Answer(BaseHTTPRequestHandler):
    server: TwoHubs

    def do_GET(self) -> None:
        if self.path.startswith("/api/agent-"):  # the client's own business, once a process
            return self.json({}, 404)
        self.server.requests.append(Request(f"{self.command} {self.path}", dict(self.headers)))
        if any(fault(self) for fault in list(self.server.faults)):
            return
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[:3] == ["api", "v1", "models"]:
            self.modelscope(parts[3:], query)
        elif parts[:2] == ["api", "models"]:
            self.hugging_face(parts[2:], query)
        elif len(parts) > 1:
            self.resolve(parts)
        else:
            self.json({})

    do_HEAD = do_GET

    def hugging_face(self, parts: list[str], query: dict[str, str]) -> None:
        files = self.server.files_at(parts[3] if len(parts) > 3 else "main")
        if parts[:2] != ["owner", "name"]:
            return self.json({}, 404, {"X-Error-Code": "RepoNotFound"})
        if files is None:
            return self.json({}, 404, {"X-Error-Code": "RevisionNotFound"})
        rows = [_hf_row(name, body) for name, body in files.items()]
        self.server.listed(rows)
        if parts[2:3] == ["tree"]:
            return self.json([{"type": "file", "path": row["rfilename"], "size": row["size"], "oid": row["blobId"],
                               **({"lfs": {**row["lfs"], "oid": row["lfs"]["sha256"]}} if "lfs" in row else {})} for row in rows])
        if query.get("blobs", "").lower() != "true":
            rows = [{"rfilename": row["rfilename"]} for row in rows]
        self.json({"id": "owner/name", "sha": commit_of(files), "siblings": rows})

    def resolve(self, parts: list[str]) -> None:
        """/owner/name/resolve/revision/file, or /cdn/file where another server sent the client."""
        files = self.server.files_at(parts[3] if parts[0] != "cdn" else "main")
        name = parts[-1]
        if files is None or name not in files:
            return self.json({}, 404, {"X-Error-Code": "EntryNotFound"})
        facts = {"X-Repo-Commit": commit_of(files)}
        etag = sha256(files[name]) if _is_large(name) else git_sha1(files[name])
        if self.server.elsewhere and _is_large(name) and parts[0] != "cdn":
            return self.json({}, 302, {**facts, "X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(files[name])),
                                       "Location": f"{self.server.elsewhere}/cdn/{name}"})
        self.body(self.server.sent.get(name, files[name]), {**facts, "ETag": f'"{etag}"'})

    def modelscope(self, parts: list[str], query: dict[str, str]) -> None:
        files = self.server.files_at(query.get("Revision", "master"))
        if parts[:2] != ["owner", "name"] or files is None:
            return self.json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
        if parts[2:] == ["repo", "files"]:
            rows = [{"Path": name, "Name": name, "Type": "blob", "Size": len(body), "Sha256": sha256(body),
                     "IsLFS": _is_large(name)} for name, body in files.items()
                    if "/" not in name or query.get("Recursive") == "True"]
            rows.append({"Path": "sub", "Name": "sub", "Type": "tree", "Size": 0})
            self.server.listed(rows)
            return self.json({"Code": 200, "Success": True, "Data": {"Files": rows[:3000]}})  # as the real one, says its client
        if "FilePath" in query:
            name = query["FilePath"]
            if name not in files:
                return self.json({"Code": 404, "Message": "no such file", "Success": False}, 404)
            if self.server.elsewhere and _is_large(name):
                return self.json({}, 302, {"Location": f"{self.server.elsewhere}/cdn/{name}"})
            return self.body(self.server.sent.get(name, files[name]))
        self.json({"Code": 200, "Success": True, "Data": {"Id": 1, "Path": "owner", "Name": "name"}})

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.write(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())

    def body(self, body: bytes, headers: dict[str, str] | None = None) -> None:
        status, headers, _, part = self.part(body, headers)
        self.write(status, headers, part)

    def part(self, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], int, bytes]:
        """Status, headers, first byte and bytes of what Range asks for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None or not self.server.ranges:
            return 200, dict(headers or {}), 0, body
        start, stop = int(asked[1]), int(asked[2] or len(body) - 1) + 1
        where = {"Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"}
        return 206, {**(headers or {}), **where}, start, body[start:stop]

    def write(self, status: int, headers: dict[str, str], payload: bytes, pieces: Iterator[bytes] | None = None) -> None:
        """The whole answer; with `pieces`, these are the body that is sent, whatever Content-Length says."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(payload)), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for piece in pieces if pieces is not None else [payload]:
                self.wfile.write(piece)
                self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        pass


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _hf_row(name: str, body: bytes) -> dict[str, Any]:
    pointer = f"oid sha256:{sha256(body)}".encode()
    if _is_large(name):
        return {"rfilename": name, "size": len(body), "blobId": git_sha1(pointer),
                "lfs": {"sha256": sha256(body), "size": len(body), "pointerSize": len(pointer)}}
    return {"rfilename": name, "size": len(body), "blobId": git_sha1(body)}


@contextlib.contextmanager
def running(files: Files) -> Iterator[TwoHubs]:
    server = TwoHubs(dict(files))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


# Faults: each answers the requests whose line matches, `times` of them (None: all)


def _matching(pattern: str, answer: Callable[[Answer], None], times: int | None) -> Fault:
    left = [times]

    def fault(request: Answer) -> bool:
        if left[0] == 0 or not re.search(pattern, f"{request.command} {request.path}"):
            return False
        if left[0] is not None:
            left[0] -= 1
        answer(request)
        return True
    return fault


def mute(pattern: str = "", times: int | None = None) -> Fault:
    """Accepted, never answered."""
    return _matching(pattern, lambda request: request.server.closing.wait(60) and None, times)


def status(code: int, pattern: str = "", times: int | None = None, headers: dict[str, str] | None = None) -> Fault:
    return _matching(pattern, lambda request: request.json({"Code": code, "Message": "fault"}, code, headers), times)


def dripping_header(pattern: str, seconds: float) -> Fault:
    """A header that never ends, a byte every `seconds`."""
    def answer(request: Answer) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Endless: ")
        with contextlib.suppress(OSError):
            while not request.server.closing.wait(seconds):
                request.wfile.write(b"x")
                request.wfile.flush()
    return _matching(pattern, answer, None)


def pieces(pattern: str, body: bytes, cuts: Callable[[Answer, bytes, int], Iterator[bytes]], times: int | None = None) -> Fault:
    """The body as `cuts(request, what was asked for, its first byte)` sends it, with the headers of all of it."""
    def answer(request: Answer) -> None:
        code, headers, start, part = request.part(body)
        with contextlib.suppress(OSError):
            request.write(code, headers, part, cuts(request, part, start))
    return _matching(pattern, answer, times)


def breaking_off(pattern: str, body: bytes, after: int, times: int | None = None) -> Fault:
    """The connection ends after so many bytes, though more were announced."""
    return pieces(pattern, body, lambda request, part, start: iter([part[:after]]), times)


def stalling(pattern: str, body: bytes, after: int, times: int | None = None) -> Fault:
    """Falls mute after so many bytes."""
    def cuts(request: Answer, part: bytes, start: int) -> Iterator[bytes]:
        yield part[:after]
        request.server.closing.wait(60)
    return pieces(pattern, body, cuts, times)


def slow(pattern: str, body: bytes, size: int, seconds: float) -> Fault:
    """Pieces of `size` bytes, one every `seconds`."""
    def cuts(request: Answer, part: bytes, start: int) -> Iterator[bytes]:
        for first in range(0, len(part), size):
            time.sleep(seconds)
            yield part[first:first + size]
    return pieces(pattern, body, cuts)
