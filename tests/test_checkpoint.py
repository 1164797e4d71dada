"""The adapter file: what is saved comes back bit for bit, a save happens wholly or not at all, and nothing else is loaded."""

import errno
import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tracemalloc
from collections import UserDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from omni_adapters import __version__
from omni_adapters.checkpoint import CHUNK, DTYPES, FORMAT, load_adapter, save_adapter
from omni_adapters.files import MAX_LEVELS
from omni_adapters.shapes import BadInput

DIGEST = slice(35, 99)  # as docs/adapter_format.md has it; not taken from the code
DESCRIPTION = {"host": {"n_embd": 64, "side": [1, 2]}, "encoder": {"id": "whisper-tiny", "γ": 0.1}, "steps": 1000}
W = {"w": torch.ones(2)}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensors(seed=0):
    """Every dtype, a scalar, and an empty axis."""
    generator = torch.Generator().manual_seed(seed)
    found = {f"of.{code}": torch.randint(0, 2 if code == "BOOL" else 100, (3, 5), generator=generator).to(dtype)
             for code, dtype in DTYPES.items()}
    return {**found, "scalar": torch.randn((), generator=generator), "empty": torch.empty(0, 7, dtype=torch.bfloat16)}


def same(one, other):
    """Equal names, dtypes, shapes and bits: -0.0 is not 0.0 here."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].shape == other[name].shape
        and torch.equal(one[name].contiguous().view(BITS[one[name].itemsize]),
                        other[name].contiguous().view(BITS[one[name].itemsize])) for name in one)


def with_true_digest(data):
    """The bytes with the digest that belongs to them, so that only other checks can refuse them.

    Where a damaged header has no place for a digest, the bytes as they are.
    """
    if data[8:DIGEST.start] != b'{"__metadata__":{"sha256":"' or data[DIGEST.stop:][:1] != b'"':
        return data
    zeros = data[:DIGEST.start] + b"0" * 64 + data[DIGEST.stop:]
    return zeros[:DIGEST.start] + hashlib.sha256(zeros).hexdigest().encode() + data[DIGEST.stop:]


def file_bytes(header, body=b""):
    header = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


def metadata(**changes):
    found = {"sha256": "0" * 64, "adapter_format": "1", "omni_adapters": "9.9", "description": "{}", **changes}
    return json.dumps({key: value for key, value in found.items() if value is not None}, separators=(",", ":"))


def header(entries='"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', **changes):
    return f'{{"__metadata__":{metadata(**changes)},{entries}}}'


def entry(dtype='"F32"', shape="[2]", offsets="[0,8]"):
    return f'"w":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


def leftovers(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".saving"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def saved(path):
    save_adapter(path, tensors(), DESCRIPTION)
    return path


# Round trips

NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=20)
LEAVES = (st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
          | st.text(st.characters(exclude_categories=["Cs"]), max_size=9))
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=9)


@st.composite
def any_tensor(draw):
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    sizes = draw(st.lists(st.integers(0, 4), max_size=4))
    seed = draw(st.integers(0, 99))
    tensor = (torch.randn(sizes, generator=torch.Generator().manual_seed(seed)) * 50).to(dtype)
    return tensor.transpose(0, -1) if sizes and draw(st.booleans()) else tensor


@settings(max_examples=150)
@given(st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), any_tensor(), min_size=1, max_size=5),
       st.dictionaries(NAMES, JSON, max_size=4))
def test_what_is_saved_comes_back(tmp_path_factory, weights, description):
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    save_adapter(path, weights, description)
    found, told = load_adapter(path)
    assert same(found, weights) and told == description
    assert json.dumps(told, sort_keys=True) == json.dumps(description, sort_keys=True)  # True stays True, 1.0 stays 1.0
    assert same(load_file(path), weights)


def test_views_parameters_and_shared_memory_are_written_out(path):
    base = torch.randn(4, 6)
    weights = {"base": base, "turned": base.T, "row": base[1], "expanded": base[0, :1].expand(3, 2), "every": base[:, ::2],
               "parameter": nn.Parameter(base), "negated": torch.complex(base, base).conj().imag, "one": base[0, ::9],
               "one.negated": torch.complex(base, base)[0, :1].conj().imag}
    save_adapter(path, weights, {})
    found, _ = load_adapter(path)
    assert same(found, {name: tensor.detach().resolve_neg() for name, tensor in weights.items()})
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == len(weights)  # nothing is shared
    assert not any(tensor.requires_grad for tensor in found.values())


def test_the_bits_of_floats_survive(path):
    odd = torch.tensor([-0.0, 1e-45, torch.finfo(torch.float32).max, -1e-40])
    save_adapter(path, {"odd": odd}, {})
    assert same(load_adapter(path)[0], {"odd": odd})


def test_one_content_has_one_file(tmp_path):
    weights = tensors()
    save_adapter(tmp_path / "a", weights, {"x": 1, "y": {"b": 2, "a": 3}})
    save_adapter(tmp_path / "b", dict(reversed(weights.items())), {"y": {"a": 3, "b": 2}, "x": 1})
    save_adapter(str(tmp_path / "c"), weights, {"x": 1, "y": {"b": 2, "a": 4}})
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_the_file_is_a_safetensors_file(saved):
    data = saved.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0 and data == with_true_digest(data)
    read = json.loads(data[8:8 + length])
    assert all(read[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in tensors().items())
    assert same(load_file(saved), tensors())
    with safe_open(saved, "pt") as file:
        told = file.metadata()
    assert told["adapter_format"] == str(FORMAT) and told["omni_adapters"] == __version__
    assert json.loads(told["description"]) == DESCRIPTION and told["sha256"] == data[DIGEST].decode()


@pytest.mark.parametrize("length", range(8))
def test_the_body_begins_at_a_multiple_of_8(path, length):
    save_adapter(path, W, {"x": "x" * length})
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_descriptions_may_be_any_mapping_and_are_not_touched(path):
    description = UserDict(DESCRIPTION)
    save_adapter(path, tensors(), description)
    assert load_adapter(path)[1] == DESCRIPTION and description == DESCRIPTION


# Refused before anything is written

SELF: dict = {}
SELF["self"] = SELF


@pytest.mark.parametrize("weights, description, message", [
    ({}, {}, "no tensors"),
    ({"w": torch.tensor([1.0, float("nan")])}, {}, "NaN or infinity in tensor 'w'"),
    ({"w": torch.tensor(float("-inf"), dtype=torch.bfloat16)}, {}, "NaN or infinity in tensor 'w'"),
    ({"w": torch.zeros(CHUNK + 1).index_fill(0, torch.tensor([CHUNK]), float("inf"))}, {}, "NaN or infinity"),
    ({"w": torch.ones(2, dtype=torch.complex64)}, {}, "of torch.complex64; expected one of torch.float64"),
    ({"w": torch.ones(2, 2).to_sparse()}, {}, "torch.sparse_coo"),
    ({"w": torch.ones(2, device="meta")}, {}, "on meta"),
    ({"w": torch.ones([1] * 65)}, {}, "65 axes"),
    ({"w": [1.0]}, {}, "of type list; expected a torch.Tensor"),
    ({"a\nb": torch.ones(1)}, {}, r"a tensor named 'a\\nb'"),
    ({"a\x7f": torch.ones(1)}, {}, "without control characters"),
    ({"a\u2028": torch.ones(1)}, {}, "without control characters"),
    ({"\ud800": torch.ones(1)}, {}, "without control characters"),
    ({"": torch.ones(1)}, {}, "not empty"),
    ({"__metadata__": torch.ones(1)}, {}, "not __metadata__"),
    ({7: torch.ones(1)}, {}, "a tensor named 7"),
    (W, [("a", 1)], "a description of type list"),
    (W, {"a": {"b": torch.ones(1)}}, r"a description, where 'a.b' is tensor\(\[1.\]\) \(Tensor\)"),
    (W, {"a": [1, (2, 3)]}, r"where 'a\[1\]' is \(2, 3\) \(tuple\)"),
    (W, {"a": float("nan")}, "where 'a' is nan"),
    (W, {"a": float("inf")}, "where 'a' is inf"),
    (W, {"a": 2**64}, "an integer of 64 bits"),
    (W, {"a": 10**6000}, "where 'a' is something unprintable .int"),
    (W, {"a": b"bytes"}, "where 'a' is b'bytes'"),
    (W, {"a": {1: 2}}, "a description, with the key 1 in 'a'"),
    (W, {"a": "\udfff"}, "where 'a' is '.udfff'"),
    (W, {"\udfff": 1}, "a description, with the key '.udfff'; expected"),
    (W, SELF, "deeper than 32 levels"),
    (W, {"a": "x" * (17 << 20)}, "a header of 178"),
])
def test_what_cannot_be_saved_is_refused(saved, weights, description, message):
    before = saved.read_bytes()
    with pytest.raises(BadInput, match=message) as caught:
        save_adapter(saved, weights, description)
    assert caught.value.where == f"save_adapter({str(saved)!r})" and len(str(caught.value)) < 600
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_places_that_cannot_hold_a_file(tmp_path):
    with pytest.raises(BadInput, match="got a directory; expected a regular file"):
        save_adapter(tmp_path, W, {})
    with pytest.raises(BadInput, match="a device, socket or pipe"):
        save_adapter("/dev/null", W, {})
    with pytest.raises(FileNotFoundError):
        save_adapter(tmp_path / "no" / "adapter", W, {})


# Saving is atomic

BIG = {"w": torch.arange(3 * CHUNK // 4, dtype=torch.float32)}  # three chunks and a bit: several writes


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_follows_the_umask(path, umask):
    before = os.umask(umask)
    try:
        save_adapter(path, W, {})
        save_adapter(path, W, {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o7777 == 0o666 & ~umask


def test_a_link_is_followed(tmp_path, saved):
    (tmp_path / "latest").symlink_to(saved.name)
    save_adapter(tmp_path / "latest", W, {})
    assert (tmp_path / "latest").is_symlink() and same(load_adapter(saved)[0], W)


def fail_at_call(number, real, error):
    """`real`, but its call of that number, counted from 0, does nothing and raises."""
    calls = iter(range(1_000_000))

    def call(*args):
        if next(calls) == number:
            raise error
        return real(*args)

    return call


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
@pytest.mark.parametrize("name, number", [("write", 0), ("write", 1), ("write", 3), ("fsync", 0), ("replace", 0)])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(saved, monkeypatch, name, number, error):
    before = saved.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
        patch.setattr(os, name, fail_at_call(number, getattr(os, name), error))
        save_adapter(saved, BIG, {})
    assert caught.value is error
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_a_disk_that_is_really_full(saved):
    before, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK + 1000, limits[1]))  # Python ignores the SIGXFSZ
    try:
        with pytest.raises(OSError, match="File too large"):
            save_adapter(saved, BIG, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_short_writes_are_continued(path, monkeypatch):
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, part: real(file, part[:100_003]))
        save_adapter(path, BIG, {})
    assert same(load_adapter(path)[0], BIG)


def test_when_the_folder_cannot_be_synced_the_new_file_stands(saved, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(os, "fsync", fail_at_call(1, os.fsync, OSError(errno.EIO, "Input/output error")))
        save_adapter(saved, BIG, {})
    assert same(load_adapter(saved)[0], BIG) and os.listdir(saved.parent) == [saved.name]


def test_values_reach_the_disk_before_the_name_does(path, monkeypatch):
    calls = []

    def noted(name, real):
        return lambda *args: (calls.append(name), real(*args))[1]

    with monkeypatch.context() as patch:
        for name in ("write", "fsync", "replace"):
            patch.setattr(os, name, noted(name, getattr(os, name)))
        save_adapter(path, W, {})
    assert calls == ["write", "write", "fsync", "replace", "fsync"]


SAVE_AND_HANG = """
import os, sys, time, torch
from omni_adapters.checkpoint import save_adapter
name, number = sys.argv[2], int(sys.argv[3])
real, calls = getattr(os, name), iter(range(100))
def hang(*args):
    if next(calls) == number:
        print("now", flush=True)
        time.sleep(600)
    return real(*args)
setattr(os, name, hang)
save_adapter(sys.argv[1], {"w": torch.ones(1 << 20)}, {})
"""


@pytest.mark.parametrize("name, number, replaced", [("write", 2, False), ("fsync", 0, False), ("replace", 0, False),
                                                    ("fsync", 1, True)])
def test_a_killed_save_leaves_the_old_file_or_the_new_one(saved, name, number, replaced):
    before = saved.read_bytes()
    # `print` and `write` do not meet: Python's own files do not go through os.write.
    child = subprocess.Popen([sys.executable, "-c", SAVE_AND_HANG, str(saved), name, str(number)],
                             stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert child.stdout.readline() == "now\n"
        rival = leftovers(saved.parent)
        assert len(rival) == (not replaced)
        if name == "write":  # a save meanwhile leaves a living writer's file alone
            save_adapter(saved, tensors(), DESCRIPTION)
            assert leftovers(saved.parent) == rival
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    found, _ = load_adapter(saved)
    assert same(found, {"w": torch.ones(1 << 20)}) if replaced else saved.read_bytes() == before
    orphans = leftovers(saved.parent)
    assert orphans == rival and all(re.fullmatch(r"\.adapter\.safetensors\.[0-9a-f]{8}\.saving", orphan) for orphan in orphans)
    save_adapter(saved, W, {})
    assert os.listdir(saved.parent) == [saved.name] and same(load_adapter(saved)[0], W)


def test_only_orphans_of_the_same_path_are_removed(tmp_path, path):
    others = [".adapter.safetensors.0123.saving", ".other.safetensors.01234567.saving", "adapter.safetensors.01234567.saving",
              ".adapterXsafetensors.01234567.saving", ".adapter.safetensors.01234567.saving.txt"]
    for name in [*others, ".adapter.safetensors.01234567.saving"]:
        (tmp_path / name).write_bytes(b"half")
    save_adapter(path, W, {})
    assert sorted(os.listdir(tmp_path)) == sorted([*others, path.name])


# Damage

def mutations(data, rng):
    """One random damage: flip a bit, overwrite, delete, insert, truncate, append, or swap two stretches."""
    at, other, length = rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(1, 9)
    kind = rng.choice(["flip", "byte", "delete", "insert", "truncate", "append", "swap"])
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
    if kind == "byte":
        return data[:at] + rng.choice(b'0129-.eE"{}[],: \\u\x00\xff').to_bytes(1, "little") + data[at + 1:]
    if kind == "delete":
        return data[:at] + data[at + length:]
    if kind == "insert":
        return data[:at] + rng.randbytes(length) + data[at:]
    if kind == "truncate":
        return data[:at]
    if kind == "append":
        return data + rng.randbytes(length)
    first, second = min(at, other), max(at, other)
    length = min(length, second - first, len(data) - second)
    return (data[:first] + data[second:second + length] + data[first + length:second]
            + data[first:first + length] + data[second + length:])


def test_damage_is_refused_or_harmless(saved):
    data, rng, refused = saved.read_bytes(), random.Random(0), 0
    assert len(data) < 3000  # small, so that most damage meets the header
    for _ in range(2000):
        damaged = mutations(data, rng)
        saved.write_bytes(damaged)
        try:
            found, told = load_adapter(saved)
        except BadInput as error:
            assert str(saved) in str(error) and len(str(error)) < 700
            refused += 1
        else:
            assert damaged == data and same(found, tensors()) and told == DESCRIPTION
    assert refused > 1900


def test_damage_under_a_right_digest_raises_nothing_else(saved):
    """Here other values may come back, as whoever hashed them wanted; but no other exception."""
    data, rng, loaded = saved.read_bytes(), random.Random(1), 0
    length = 8 + int.from_bytes(data[:8], "little")
    for _ in range(2000):
        changed = mutations(data[8:length], rng)
        saved.write_bytes(with_true_digest(len(changed).to_bytes(8, "little") + changed + data[length:]))
        try:
            found, told = load_adapter(saved)
        except BadInput as error:
            str(error).encode()  # can be printed
        else:
            loaded += 1
            assert same(found, load_file(saved)) and isinstance(told, dict)
    assert 0 < loaded < 1000


# Malformed by hand: the digest is right, so that each is refused for its own reason

TWO = bytes(8)
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text, body, message", [
    ("[" + "1," * 40 + "1]", TWO, "a header, which is a list; expected a JSON object"),
    ('{"w":' + "1" * 3000 + "}", TWO, "a number of 3000 characters"),
    (f'{{"__metadata__":{metadata()},"w":{DEEP}}}', TWO, "a header, which is not JSON .maximum recursion"),
    (header().encode() + b"\xff", TWO, "not UTF-8 .*utf-8"),
    (header().encode("utf-16"), TWO, "not UTF-8"),
    (header()[:-1], TWO, "not JSON"),
    (header() + "{}", TWO, "not JSON .Extra data"),
    (header(entry() + "," + entry()), TWO, "the key 'w' twice"),
    (header('"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}'), TWO, "the key 'dtype' twice"),
    (header().replace('"omni_adapters"', '"sha256":"","omni_adapters"'), TWO, "the key 'sha256' twice"),
    (header()[:-1] + ',"__metadata__":{}}', TWO, "the key '__metadata__' twice"),
    (header(entry(shape="[NaN]")), TWO, "the constant NaN"),
    (header(entry(offsets="[0,-Infinity]")), TWO, "the constant -Infinity"),
    # metadata
    (header(adapter_format=None), TWO, "without adapter_format"),
    ('{"__metadata__":"sha256","w":1}' + " " * 99, TWO, "without adapter_format"),
    (header(adapter_format="2"), TWO, "got adapter format 2, written by omni_adapters '9.9'; expected format 1"),
    (header(adapter_format="2", sha256=None, more="2"), TWO, "format 2, .* Upgrade omni-adapters"),
    (header(adapter_format="0"), TWO, "adapter format '0'"),
    (header(adapter_format="one"), TWO, "adapter format 'one'"),
    (header(adapter_format="٢"), TWO, "adapter format '٢'"),
    (header(adapter_format=1), TWO, "not all text"),
    (header(description={}), TWO, "not all text"),
    (header(description=None), TWO, r"unknown keys \('description'\)"),
    (header(more="more"), TWO, r"unknown keys \('more'\)"),
    (header(sha256=None), TWO, "'sha256'"),
    ('{"__metadata__":' + json.dumps(dict(reversed(json.loads(metadata()).items()))) + f",{entry()}}}", TWO, "35 bytes into"),
    ("{ " + header()[1:], TWO, "35 bytes into"),
    (header(description="{"), TWO, "a description, which is not JSON"),
    (header(description="[]"), TWO, "a description, which is a list; expected a JSON object"),
    (header(description='{"a":1,"a":1}'), TWO, "the key 'a' twice"),
    (header(description='{"a":{"b":[{"c":1,"c":1}]}}'), TWO, "the key 'c' twice"),
    (header(description='{"a":1e999}'), TWO, "where 'a' is inf"),
    (header(description='{"a":NaN}'), TWO, "the constant NaN"),
    (header(description='{"a":' + "9" * 33 + "}"), TWO, "a number of 33 characters"),
    (header(description='{"a":18446744073709551616}'), TWO, "an integer of 64 bits"),
    (header(description='{"a":"\\ud800"}'), TWO, "a description, where 'a' is '.ud800'"),
    (header(description='{"a":' + DEEP + "}"), TWO, "a description, which is not JSON .maximum recursion"),
    (header(description='{"a":' + "[" * 32 + "]" * 32 + "}"), TWO, f"a description, nested deeper than {MAX_LEVELS} levels"),
    # entries
    (f'{{"__metadata__":{metadata()}}}', b"", "without tensors"),
    (header('"w":7'), TWO, "'w' with 7; expected exactly dtype, shape and data_offsets"),
    (header('"w":{"dtype":"F32","shape":[2]}'), TWO, "exactly dtype, shape and data_offsets"),
    (header(entry()[:-1] + ',"more":1}'), TWO, "exactly dtype, shape and data_offsets"),
    (header(entry().replace('"w"', '"a\\u0000"')), TWO, r"a tensor named 'a\\x00'"),
    (header(entry().replace('"w"', '"a\\ud800"')), TWO, r"a header, with the key 'a\\ud800'; expected"),
    (header(entry().replace('"w"', '""')), TWO, "a tensor named ''"),
    (header(entry(dtype='"F31"')), TWO, "dtype 'F31'; expected one of F64, F32"),
    (header(entry(dtype='"F8_E4M3"', shape="[8]")), TWO, "dtype 'F8_E4M3'"),
    (header(entry(dtype="[]")), TWO, r"dtype \[\]"),
    (header(entry(dtype="null")), TWO, "dtype None"),
    (header(entry(shape="2")), TWO, "shape 2; expected up to 64 integers"),
    (header(entry(shape="[2.0]")), TWO, r"shape \[2.0\]"),
    (header(entry(shape="[true,2]")), TWO, r"shape \[True, 2\]"),
    (header(entry(shape="[-1,-2]")), TWO, r"shape \[-1, -2\]"),
    (header(entry(shape='["2"]')), TWO, r"shape \['2'\]"),
    (header(entry(shape="[" + "1," * 64 + "2]")), TWO, "up to 64 integers"),
    (header(entry(shape="[0,4294967296,4294967296]", offsets="[0,0]")), b"", "below 2.*63 values"),
    (header(entry(shape="[9223372036854775808]")), TWO, "below 2.*63 values"),
    (header(entry(shape=f"[{DEEP[:200]}{DEEP[-200:]}]")), TWO, f"a header, nested deeper than {MAX_LEVELS} levels"),
    (header(entry(shape="[" * 20 + "]" * 20)), TWO, r"shape \[\["),
    (header(entry(offsets="8")), TWO, "data_offsets 8; expected two integers"),
    (header(entry(offsets="[0,8,8]")), TWO, "expected two integers"),
    (header(entry(offsets="[0]")), TWO, "expected two integers"),
    (header(entry(offsets="[false,8]")), TWO, "expected two integers"),
    (header(entry(offsets="[0,8.0]")), TWO, "expected two integers"),
    (header(entry(offsets="[-8,0]")), TWO, "expected two integers"),
    (header(entry(offsets="[8,0]")), TWO, r"data_offsets \[8, 0\]; expected \[0, 8\]"),
    (header(entry(offsets="[0,4]")), TWO[:4], r"data_offsets \[0, 4\]; expected \[0, 8\]: \(2,\) of F32"),
    (header(entry(dtype='"F16"')), TWO, r"expected \[0, 4\]: \(2,\) of F16"),
    (header(entry(offsets="[8,16]")), TWO + TWO, r"expected \[0, 8\]"),  # a hole at the start
    (header(entry() + "," + entry(offsets="[12,20]").replace("w", "x")), TWO * 3, r"expected \[8, 16\]"),  # in between
    (header(entry() + "," + entry(offsets="[4,12]").replace("w", "x")), TWO * 2, r"expected \[8, 16\]"),  # an overlap
    (header(entry() + "," + entry().replace("w", "x")), TWO, r"expected \[8, 16\]"),  # the same bytes twice
    (header(), TWO + b"\0", "got 9 bytes of values; expected 8"),
    (header(), TWO[1:], "got 7 bytes of values; expected 8"),
    # values
    (header(), b"\0\0\x80\x7f" + TWO[:4], "NaN or infinity in tensor 'w'"),
    (header(), TWO[:4] + b"\1\0\x80\xff", "NaN or infinity in tensor 'w'"),
    (header(entry(dtype='"BF16"', shape="[4]")), b"\x80\x7f" + TWO[2:], "NaN or infinity"),
    (header(entry(dtype='"BOOL"', shape="[8]")), TWO[1:] + b"\2", "BOOL with a byte of 2"),
])
def test_malformed_files_are_refused(path, text, body, message):
    path.write_bytes(with_true_digest(file_bytes(text, body)))
    with pytest.raises(BadInput, match=message) as caught:
        load_adapter(path)
    error = caught.value
    assert error.where == f"load_adapter({str(path)!r})" and error.came and error.expected and error.todo
    str(error).encode()  # whatever the file holds, its message can be printed
    assert len(str(error)) < 700 and "\n" not in str(error)


def test_the_file_that_the_malformed_ones_vary_is_accepted(path):
    path.write_bytes(with_true_digest(file_bytes(header(), TWO)))
    assert same(load_adapter(path)[0], {"w": torch.zeros(2)}) and load_adapter(path)[1] == {}


@pytest.mark.parametrize("text", [header("\n" + entry()), header(description=json.dumps({"a": [[[[1]]]]})),
                                  header(entry(shape="[0,4611686018427387904]", offsets="[0,0]") + ","
                                         + entry().replace("w", "x"))])
def test_unusual_but_right(path, text):
    path.write_bytes(with_true_digest(file_bytes(text, TWO)))
    load_adapter(path)


@pytest.mark.parametrize("data", [b"", b"\0", bytes(7), bytes(8), (2).to_bytes(8, "little") + b"{}", b"\xff" * 300,
                                  (2**60).to_bytes(8, "little") + b'{"a":1}' * 50, (16 << 20).to_bytes(8, "little") + bytes(99)])
def test_lengths_that_lie_are_refused_before_anything_is_allocated(path, data):
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match=r"a file of \d bytes|a header length of \d+ bytes in a file of \d+"):
            load_adapter(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_above_16_MiB_is_refused(path):
    with open(path, "wb") as file:  # sparse: it takes no room on the disk
        file.write(((16 << 20) + 8).to_bytes(8, "little"))
        file.truncate(20 << 20)
    with pytest.raises(BadInput, match="a header length of 16777224 bytes in a file of 20971520"):
        load_adapter(path)


def test_values_that_are_declared_but_absent_are_not_allocated(path):
    path.write_bytes(with_true_digest(file_bytes(header(entry(dtype='"U8"', shape=f"[{2**60}]", offsets=f"[0,{2**60}]")))))
    with pytest.raises(BadInput, match=f"got 0 bytes of values; expected {2**60}"):
        load_adapter(path)


def test_a_large_file_needs_to_be_allowed(saved):
    size = saved.stat().st_size
    with pytest.raises(BadInput, match=f"a file of {size} bytes; expected at most max_bytes = {size - 1}"):
        load_adapter(saved, max_bytes=size - 1)
    load_adapter(saved, max_bytes=size)


def test_a_file_that_shrinks_while_it_is_read(path, monkeypatch):
    save_adapter(path, BIG, {})
    real = hashlib.sha256
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="became shorter while it was read"):
        patch.setattr(hashlib, "sha256", lambda head: os.truncate(path, CHUNK) or real(head))  # after all header checks
        load_adapter(path)


def test_other_things_at_the_path(tmp_path, path):
    with pytest.raises(FileNotFoundError):
        load_adapter(path)
    with pytest.raises(BadInput, match=f"{re.escape(repr(str(tmp_path)))}.*got a directory"):
        load_adapter(tmp_path)
    os.mkfifo(path)
    with pytest.raises(BadInput, match="pipe"):  # and does not wait for a writer
        load_adapter(str(path))


@pytest.mark.parametrize("told", [None, {"format": "pt"}])
def test_other_safetensors_files_are_refused(path, told):
    save_file({"w": torch.ones(3)}, path, metadata=told)
    with pytest.raises(BadInput, match=r"without adapter_format in its metadata; .*safetensors\.torch\.load_file"):
        load_adapter(path)


def test_pickles_are_refused_unopened(path):
    torch.save({"w": torch.ones(3)}, path)
    with pytest.raises(BadInput, match="header length"):
        load_adapter(path)
