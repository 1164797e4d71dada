"""Files: JSON is read as it was written or refused, and whenever a writer stops there is the old file or the new one."""

import enum
import errno
import fcntl
import json
import math
import os
import random
import signal
import time
from collections import UserDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_adapters import files
from omni_adapters.files import CHUNK, MAX_DIGITS, MAX_LEVELS, json_bytes, json_object, json_values, write_parts, write_whole
from omni_adapters.shapes import BadInput

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=9)
OBJECTS = st.dictionaries(TEXT, JSON, max_size=4)
DAMAGE = [b"", b'"', b"1", b"e9", b"NaN", b",", b"{}", b"\\ud800", b"\xff", b'"a":1,']


def nested(levels):
    """An object of so many levels, the leaf among them."""
    return {"a": 1} if levels == 2 else {"a": nested(levels - 1)}


# JSON


@settings(max_examples=300)
@given(OBJECTS)
def test_what_is_written_is_read(values):
    content = json_bytes(values)
    found = json_object("test", "it", content)
    assert found == values == json_values("test", "it", values)
    assert json_bytes(found) == content == json_bytes(dict(reversed(values.items())))  # True stays True, 1.0 stays 1.0


@settings(max_examples=600)
@given(OBJECTS, st.randoms(use_true_random=False))
def test_what_is_read_is_what_json_reads_and_could_be_written(values, rng):
    """Damaged at one or two places: refused, or the plain reader's value, which `json_values` lets pass."""
    content = bytearray(json_bytes(values))
    for _ in range(rng.randrange(1, 3)):
        at = rng.randrange(len(content) + 1)
        content[at:at + rng.randrange(2)] = rng.choice(DAMAGE)
    try:
        found = json_object("test", "it", bytes(content))
    except BadInput as error:
        assert str(error).startswith("test: got it, ") and "; expected " in str(error)
        str(error).encode()  # can be printed
    else:
        assert found == json.loads(content) == json_values("test", "it", found)


@pytest.mark.parametrize("content, message", [
    (b"", "which is not JSON .Expecting value"),
    (b"{} {}", "which is not JSON .Extra data"),
    (b"[1]", "which is a list; expected a JSON object"),
    (b'{"a": "\xff"}', "which is not UTF-8 .*; expected UTF-8. Save the file as UTF-8"),
    ('{"a": 1}'.encode("utf-16"), "which is not UTF-8"),
    (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' twice"),
    (b'{"a": [{"b": 1, "b": 2}]}', "the key 'b' twice"),
    (b'{"a": NaN}', "the constant NaN"),
    (b'{"a": -Infinity}', "the constant -Infinity"),
    (b'{"a": [0, 1e999]}', r"where 'a\[1\]' is inf \(float\)"),
    (b'{"a": 18446744073709551616}', r"where 'a' is 18446744073709551616 \(int\)"),
    (b'{"a": -9223372036854775809}', "an integer of 64 bits"),
    (b'{"a": "\\ud83d"}', r"where 'a' is '.ud83d' \(str\); expected .* without lone surrogates"),
    (b'{"a": {"\\udfff": 1}}', r"with the key '.udfff' in 'a'"),
    (b'{"a": ' + b"[" * 100_000, "which is not JSON .maximum recursion depth"),
    (b'{"a": {"' + b"x" * 100_000 + b'": ["\\ud800"]}}', r"where 'a.x{70,90}\[0\]' is"),
    (b'{"' + b"x" * 100_000 + b'": ["\\ud800"]}', r"where 'x{70,90}\[0\]' is"),
])
def test_what_json_alone_lets_pass_is_refused(content, message):
    with pytest.raises(BadInput, match=message) as caught:
        json_object("read", "log.jsonl, line 3", content)
    assert caught.value.where == "read" and caught.value.came.startswith("log.jsonl, line 3, ") and len(str(caught.value)) < 500


def test_a_pair_of_surrogates_is_a_character():
    assert json_object("test", "it", b'{"\\ud83d\\ude00": "\\ud83d\\ude00"}') == {"😀": "😀"}


@pytest.mark.parametrize("digits", ["1" * 20, "0." + "1" * 30, "1" + "0" * 27 + ".0e4"])
def test_numbers_may_have_32_characters(digits):
    assert json_object("test", "it", f'{{"a": {digits}}}'.encode()) == {"a": json.loads(digits)}
    longer = digits + "0" * (MAX_DIGITS + 1 - len(digits))
    with pytest.raises(BadInput, match="a number of 33 characters"):
        json_object("test", "it", f'{{"a": {longer}}}'.encode())


def test_there_may_be_32_levels():
    deepest, deeper = nested(MAX_LEVELS), nested(MAX_LEVELS + 1)
    assert json_object("test", "it", json_bytes(deepest)) == deepest == json_values("test", "it", deepest)
    for refuse in (lambda: json_object("test", "it", json_bytes(deeper)), lambda: json_values("test", "it", deeper)):
        with pytest.raises(BadInput, match="it, nested deeper than 32 levels"):
            refuse()
    endless = {}
    endless["self"] = [endless]
    with pytest.raises(BadInput, match="or without end"):
        json_values("test", "it", endless)


class Colour(str, enum.Enum):
    RED = "red"


def test_a_copy_is_what_json_gives_back():
    inner = [1, {"b": 2}]
    values = UserDict(z=np.float64(0.5), a=inner, n=enum.IntEnum("Number", "one").one, c=Colour.RED)
    copy = json_values("test", "it", values)
    assert copy == {"z": 0.5, "a": inner, "n": 1, "c": "red"} and list(copy) == list(values)
    assert [type(value) for value in copy.values()] == [float, list, int, str]
    copy["a"][1]["b"] = 3
    assert inner == [1, {"b": 2}]


def test_tuples_count_as_lists_where_that_is_wanted():
    values = {"a": (1, (2,)), "b": [UserDict(c=())]}
    assert json_values("test", "it", values, tuples=True) == {"a": [1, [2]], "b": [{"c": []}]}


@pytest.mark.parametrize("values, message", [
    ([("a", 1)], "it of type list; expected a dict of JSON values"),
    ({"a": {"b": [(1, 2)]}}, r"it, where 'a.b\[0\]' is \(1, 2\) \(tuple\); expected a JSON value.* Make lists of tuples"),
    ({"a": UserDict()}, r"where 'a' is {} \(UserDict\)"),
    ({"a": {1: 2}}, "with the key 1 in 'a'"),
    ({None: 2}, "it, with the key None; expected"),
    ({"a": math.nan}, "where 'a' is nan"),
    ({"a": -math.inf}, "where 'a' is -inf"),
    ({"a": np.int64(1)}, r"\(int64\)"),
    ({"a": 10**6000}, r"where 'a' is something unprintable \(int\)"),
    ({"a\nb": b"c"}, r"where 'a\\nb' is b'c' \(bytes\)"),
    ({"a": "\udc00"}, r"where 'a' is '.udc00'"),
])
def test_what_json_would_change_is_refused(values, message):
    with pytest.raises(BadInput, match=message) as caught:
        json_values("test", "it", values)
    assert "\n" not in str(caught.value) and str(caught.value).encode()


# Writing

OLD, NEW = b"old", os.urandom(1000) * 3000  # three chunks


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file").write_bytes(OLD)
    return tmp_path / "file"


def orphan(path, digits="0123abcd"):
    beside = path.with_name(f".{path.name}.{digits}.saving")
    beside.write_bytes(b"half")
    return beside


def test_parts_follow_each_other_in_a_new_file(path):
    number = path.stat().st_ino
    write_parts(path, [b"one", memoryview(NEW), b"", b"two"])
    assert path.read_bytes() == b"one" + NEW + b"two" and os.listdir(path.parent) == ["file"] and path.stat().st_ino != number


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_follows_the_umask(path, umask):
    before = os.umask(umask)
    try:
        write_whole("test", path, NEW)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o7777 == 0o666 & ~umask


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match=r"^test: got .*no.file, in a folder that does not exist; .* Create .*no first"):
        write_whole("test", tmp_path / "no" / "file", NEW)
    with pytest.raises(FileNotFoundError):
        write_parts(tmp_path / "no" / "file", [NEW])


def test_values_reach_the_disk_before_the_name_does(path, monkeypatch):
    calls = []

    def noted(name):
        real = getattr(os, name)

        def call(first, *rest):
            file = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(rest[0])
            calls.append((name, os.path.basename(file)))
            return real(first, *rest)

        monkeypatch.setattr(os, name, call)

    for name in ("write", "fsync", "replace"):
        noted(name)
    write_whole("test", path, NEW)
    monkeypatch.undo()
    beside = calls[0][1]
    assert beside.startswith(".file.") and beside.endswith(".saving")
    assert calls == [("write", beside)] * 3 + [("fsync", beside), ("replace", "file"), ("fsync", path.parent.name)]


@pytest.mark.parametrize("name, number", [("open", 0), ("write", 0), ("write", 2), ("fsync", 0), ("replace", 0)])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_a_failed_write_changes_nothing(path, monkeypatch, name, number, error):
    real, calls = getattr(os, name), iter(range(10**6))

    def call(*args):
        if next(calls) == number:
            raise error
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(os, name, call)
        write_whole("test", path, NEW)
    assert path.read_bytes() == OLD and os.listdir(path.parent) == ["file"]


def test_short_writes_are_continued(path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, part: real(file, part[:CHUNK // 7]))
    write_whole("test", path, NEW)
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("torn", [False, True], ids=["before", "in the midst"])
def test_death_at_every_call(path, torn):
    """The file is the old or the new one, and the next write leaves nothing else."""
    seen = []
    for number in range(99):
        path.write_bytes(OLD)
        child = os.fork()
        if not child:
            die_at(number, torn)
            write_whole("test", path, NEW)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen.append((path.read_bytes() == NEW, len(os.listdir(path.parent)) - 1))
        assert status in (0, 7) and path.read_bytes() in (OLD, NEW)
        write_whole("test", path, b"next")
        assert os.listdir(path.parent) == ["file"] and path.read_bytes() == b"next"
        if status == 0:
            break
    # open, write × 3, fsync, replace: the file and an orphan, but none before it is open; then opening and syncing the folder
    assert seen == [(False, 0)] + [(False, 1)] * 5 + [(True, 0)] * 3


def die_at(number, torn):
    calls = iter(range(10**6))

    def deadly(name):
        real = getattr(os, name)

        def call(*args):
            if next(calls) == number:
                if torn and name == "write":
                    real(args[0], args[1][:len(args[1]) // 2])
                os._exit(7)
            return real(*args)

        setattr(os, name, call)

    for name in ("open", "write", "fsync", "replace"):
        deadly(name)


def forever(path, content):
    """A process that writes until it is killed, or fails."""
    child = os.fork()
    if not child:
        try:
            while True:
                write_whole("test", path, content)
        finally:
            os._exit(1)
    return child


def test_rivals_and_kills(path):
    """Four processes write one path as fast as they can and are killed; every reader sees one of them, whole."""
    contents, rng = [bytes([number]) * (CHUNK + number) for number in range(4)], random.Random(0)
    path.write_bytes(contents[0])
    for _ in range(6):
        children = [forever(path, content) for content in contents]
        try:
            end = time.monotonic() + rng.uniform(0.05, 0.2)
            while time.monotonic() < end:
                assert path.read_bytes() in contents
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
            ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert ends == [-signal.SIGKILL] * 4, "none failed before"
        assert path.read_bytes() in contents
    write_whole("test", path, NEW)
    assert os.listdir(path.parent) == ["file"] and path.read_bytes() == NEW


def test_only_orphans_of_the_same_name_are_removed(path):
    others = [".file.0123.saving", ".other.0123abcd.saving", "file.0123abcd.saving", ".fileX.0123abcd.saving",
              ".file.0123abcd.saving.txt", ".file.0123ABCD.saving", ".file.0123abcd.tmp"]
    for name in others:
        path.with_name(name).write_bytes(b"half")
    orphan(path)
    with open(orphan(path, "89abcdef"), "rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        write_whole("test", path, NEW)
        assert sorted(os.listdir(path.parent)) == sorted([*others, "file", ".file.89abcdef.saving"])
    write_whole("test", path, NEW)
    assert sorted(os.listdir(path.parent)) == sorted([*others, "file"])


def test_without_a_sweep_the_folder_is_not_listed(path, monkeypatch):
    left = orphan(path)
    with monkeypatch.context() as patch:
        for name in ("listdir", "scandir"):
            patch.setattr(os, name, None)
        write_whole("test", path, NEW, sweep=False)
    assert path.read_bytes() == NEW and left.exists()


def test_a_file_taken_for_an_orphan_before_it_was_locked_is_made_anew(path, monkeypatch):
    real, taken = files._lock, []

    def lock(file, wait=True):
        if not taken:
            taken.append(os.readlink(f"/proc/self/fd/{file}"))
            os.unlink(taken[0])
        return real(file, wait)

    monkeypatch.setattr(files, "_lock", lock)
    write_whole("test", path, NEW)
    assert path.read_bytes() == NEW and os.listdir(path.parent) == ["file"] and taken
