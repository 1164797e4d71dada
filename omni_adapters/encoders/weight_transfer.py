"""Bytes from a hub: patience that runs out, tokens that stay home, bodies that are what the listing says.

Notable:
- talking happens in a thread that is left behind when patience runs out: name look-up, connecting, a header that drips and
  a body that stalls are all covered by one clock, whatever the sockets and the clients think of time
- patience is renewed by `QUANTUM` bytes or a finished file, not by the clock: 3 GB may take hours over a slow line, while
  silence, and a server that drips below QUANTUM bytes per patience, are given up
- redirects are followed here: what identifies the user goes to the origin (scheme, host, port) of the hub's endpoint and
  to nobody else. ~/.netrc and cookies that servers set are not used
- a dropped connection or a 5xx is taken up again where it stopped (Range), at most `RETRIES` times in a row without news
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

from omni_adapters.background import in_thread

if TYPE_CHECKING:
    import requests

QUANTUM = 128 * 1024  # bytes that renew patience; read from the socket at once
RETRIES = 3           # in a row, without a byte that had not come before
PAUSE = 0.2           # seconds before the first of them; doubled for each next
MAX_HOPS = 10         # redirects

T = TypeVar("T")


class RemoteFile(NamedTuple):
    """One file as its hub lists it. `sha256`, else `git_sha1` (git's name of the content), is what the bytes must have."""

    name: str
    size: int                # bytes
    sha256: str | None
    git_sha1: str | None
    url: str


class Damaged(OSError):
    """What came, or what lies on the disk, is not what the listing says."""


class Dropped(ConnectionError):
    """The connection ended, or the server failed, before the file was there: worth another try."""


class Refused(PermissionError):
    """The hub wants to know who asks, or will not serve who asks (401, 403). `todo` is the way in."""

    todo = ""


class Patience:
    """Seconds that nothing may come for, from the first `renew` on. Once `over`, the thread that works for it stops at its
    next byte."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.over = seconds, False
        self.received = 0  # bytes since the last renewal
        self.since: float | None = None

    def spent(self) -> float:
        """Seconds of silence until this moment, at most all."""
        return 0.0 if self.since is None else min(self.seconds, time.monotonic() - self.since)

    def left(self) -> float:
        return self.seconds - self.spent()

    def renew(self) -> None:
        if self.over:
            raise TimeoutError("given up meanwhile")
        self.received, self.since = 0, time.monotonic()

    def earn(self, num_bytes: int) -> None:
        self.received += num_bytes
        if self.over or self.received >= QUANTUM:
            self.renew()

    def wait_for(self, whom: str, call: Callable[[], T]) -> T:
        """`call()`, in a thread of its own, or TimeoutError that names `whom` when patience is over."""
        if self.since is None:
            self.renew()
        answer = in_thread(call)
        try:
            while not wait([answer], self.left()).done:
                if self.left() <= 0:
                    raise TimeoutError(f"{whom} was silent for {self.seconds:.3g} s")
        finally:  # an interrupt from the keyboard, too
            self.over = not answer.done()
        return answer.result()


class Line:
    """Requests to one hub: `identity` (headers that carry a token) goes to the endpoint's origin only."""

    def __init__(self, endpoint: str, identity: Mapping[str, str], patience: Patience) -> None:
        from http.cookiejar import DefaultCookiePolicy

        import requests

        from omni_adapters import __version__

        self.endpoint, self.identity, self.patience = endpoint, dict(identity), patience
        self.session = requests.Session()
        self.session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        # Sizes, hashes and Range count the bytes of the file, not of a compressed body.
        self.session.headers.update({"User-Agent": f"omni_adapters/{__version__}", "Accept-Encoding": "identity"})

    def get(self, url: str, headers: Mapping[str, str] | None = None) -> requests.Response:
        """The answer after redirects, its body unread; 4xx raises what `refusal` says, 5xx and lost connections Dropped."""
        import requests

        self.patience.earn(0)  # nobody waits any more: send nothing
        try:
            for _ in range(MAX_HOPS):
                own = self.identity if origin(url) == origin(self.endpoint) else {}
                # auth: a callable keeps requests from looking into ~/.netrc. The clock above ends waits; this ends the thread.
                response = self.session.get(url, headers={**own, **(headers or {})}, auth=_as_it_is, stream=True,
                                            allow_redirects=False, timeout=2 * self.patience.seconds)
                if not response.is_redirect:
                    break
                response.close()
                url = next_hop(url, response.headers["Location"])
            else:
                raise ConnectionError(f"{url}: more than {MAX_HOPS} redirects")
        except (requests.ConnectionError, requests.Timeout) as error:
            raise Dropped(f"{url}: {_reason(error)}") from error
        if response.status_code >= 400:
            response.close()
            raise refusal(url, response.status_code)
        return response

    def read(self, url: str, most: int) -> bytes:
        """A body of at most `most` bytes."""
        body = bytearray()
        with self.get(url) as response:
            for chunk in response.iter_content(QUANTUM):
                self.patience.earn(len(chunk))
                body += chunk
                if len(body) > most:
                    raise ConnectionError(f"{url}: more than {most} bytes")
        return bytes(body)


def _reason(error: BaseException) -> object:
    """What lies behind urllib3's "max retries exceeded": requests wraps it, and says the URL again."""
    inner = error.args[0] if error.args else error
    return getattr(inner, "reason", None) or inner


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port: whoever shares them is the same server."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def next_hop(url: str, location: str) -> str:
    """Where a redirect leads. From https to http is refused: a listing's hashes could be anybody's."""
    target = urljoin(url, location)
    if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
        raise ConnectionError(f"{url} redirects to {target:.200}, which is not https")
    return target


def is_passing(status: int) -> bool:
    """Whether an HTTP status says that the server has trouble of its own, or too much to do, and nothing about what was asked."""
    return status >= 500 or status in (408, 429)


def http_status(error: BaseException) -> int | None:
    """Of a refusal that a hub's client raised; None where nobody answered."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def refusal(url: str, status: int) -> OSError:
    """The error for an HTTP status of 400 or more."""
    if is_passing(status):
        return Dropped(f"{url}: HTTP {status}")
    if status in (401, 403):
        return Refused(f"{url}: HTTP {status}")
    return FileNotFoundError(f"{url}: HTTP {status}")


def download(line: Line, file: RemoteFile, path: Path) -> str:
    """Write the file at `path`, a new one; returns its sha256.

    Raises Damaged for bytes that are not the listing's, Dropped when they stop coming, OSError for refusals and the disk.
    Whoever moves the file into place sees to its fsync, which may take longer than a hub may be silent for.
    """
    with open(path, "xb") as target:
        body = _Body(target, file)
        best = failures = 0
        while body.received < file.size:
            try:
                body.receive(line)
            except Dropped:
                failures = 1 if body.received > best else failures + 1
                best = max(best, body.received)
                if failures > RETRIES:
                    raise
                time.sleep(PAUSE * 2 ** (failures - 1))
        body.check()
    line.patience.renew()
    return body.sha256.hexdigest()


class _Body:
    """A file as far as it has come, and its hashes so far."""

    def __init__(self, target: BinaryIO, file: RemoteFile) -> None:
        self.target, self.file = target, file
        self.restart()

    def restart(self) -> None:
        self.target.seek(0)
        self.target.truncate()
        self.received, self.sha256 = 0, hashlib.sha256()
        self.git_sha1 = hashlib.sha1(b"blob %d\0" % self.file.size, usedforsecurity=False)

    def receive(self, line: Line) -> None:
        """One request, from where the body stands."""
        import requests

        asked = {"Range": f"bytes={self.received}-"} if self.received else {}
        with line.get(self.file.url, asked) as response:
            if self.received and not response.headers.get("Content-Range", "").startswith(f"bytes {self.received}-"):
                self.restart()  # the server sends all of it again
            try:
                for chunk in response.iter_content(QUANTUM):
                    line.patience.earn(len(chunk))
                    self.add(chunk)
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
                raise Dropped(f"{self.file.name} broke off after {self.received} of {self.file.size} bytes") from error
        if self.received < self.file.size:
            raise Dropped(f"{self.file.name} ended after {self.received} of {self.file.size} bytes")

    def add(self, chunk: bytes) -> None:
        self.received += len(chunk)
        if self.received > self.file.size:
            raise Damaged(f"{self.file.name} has more bytes than the {self.file.size} of the listing")
        self.target.write(chunk)
        self.sha256.update(chunk)
        if self.file.sha256 is None:
            self.git_sha1.update(chunk)

    def check(self) -> None:
        known, found = (("sha256", self.sha256) if self.file.sha256 else ("git sha1", self.git_sha1))
        expected = self.file.sha256 or self.file.git_sha1
        if found.hexdigest() != expected:
            raise Damaged(f"{self.file.name} came with {known} {found.hexdigest():.12}…, the listing says {expected:.12}…")


def in_one_line(error: BaseException) -> str:
    """An error in one line: its type, and the beginning of what it says, without what a terminal would obey."""
    said = "".join(character if character.isprintable() else "?" for character in " ".join(str(error).split())[:300])
    return f"{type(error).__name__}: {said}".rstrip(": ")
