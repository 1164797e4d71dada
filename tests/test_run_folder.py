"""Run folders: whenever a process dies, and at whichever call, the folder goes on from a whole checkpoint and its very log."""

import copy
import errno
import fcntl
import json
import math
import mmap
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import traceback

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_adapters.checkpoint import save_adapter
from omni_adapters.shapes import BadInput
from omni_adapters.training.run_folder import Checkpoint, RunFolder

CONFIG = {"seed": 1, "data": {"train": "a.jsonl", "rates": [1e-3, 2.5e-4]}, "name": "γ"}
EVERY = 5  # steps from one checkpoint to the next
CALLS = ["fsync", "replace", "rename", "unlink", "ftruncate", "write", "open", "mkdir"]


def content(step):
    """What a checkpoint of a step holds; each step its own."""
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.randn(7, 3, generator=generator), "step": torch.tensor(float(step))}, {"step": step, "seen": [step, "ö"]}


def row(step):
    return {"step": step, "loss": 1 / (step + 3), "words": "größer" * (step % 4)}


def save(run, step):
    run.save(step, *content(step))


def train(run, start, steps, every=EVERY):
    for step in range(start + 1, start + steps + 1):
        run.log(row(step))
        if step % every == 0:
            save(run, step)


def holds(run, step):
    """Whether the checkpoint and the log are exactly those of the step."""
    if step is None:
        assert run.steps() == [] and run.rows() == []
        return True
    found = run.read(step)
    tensors, state = content(step)
    assert isinstance(found, Checkpoint) and found.step == step and found.state == state
    assert found.tensors.keys() == tensors.keys() and all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)
    assert run.rows() == [row(number) for number in range(1, step + 1)]
    return True


def contents(folder):
    """Every file but the lock, which carries nothing."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def forked(work):
    """Run `work` in a fork of this process; its exit status: 0, or 7 where `crash_at` ended it, or −9 …; 1 with a traceback."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "one"


@pytest.fixture
def run(folder):
    run = RunFolder(folder, CONFIG)
    assert run.recover() is None
    yield run
    run.close()


# What is written comes back


def test_a_fresh_folder(folder):
    run = RunFolder(folder, CONFIG)
    assert not folder.parent.exists() and run.steps() == [] and run.rows() == []
    assert run.recover() is None
    assert json.loads((folder / "run.json").read_text()) == CONFIG and "γ" in (folder / "run.json").read_text()
    assert sorted(os.listdir(folder)) == [".lock", "log.jsonl", "run.json"] and run.rows() == []


def test_saved_read_and_pruned(run, folder):
    train(run, 0, 23)
    assert run.steps() == [15, 20] and len(run.rows()) == 23
    assert sorted(contents(folder)) == ["log.jsonl", "run.json", "step-00000015.safetensors", "step-00000020.safetensors"]
    reader = RunFolder(folder, {})  # any process; it neither compares nor locks
    assert reader.read(20).state == content(20)[1] and reader.rows() == run.rows()
    run.close()
    again = RunFolder(folder, copy.deepcopy(CONFIG))
    assert again.recover() == 20 and holds(again, 20)
    assert again.recover() == 20  # by the one that has the lock
    with pytest.raises(BadInput, match=r"step 5; expected one of the steps saved: 15, 20"):
        again.read(5)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_keep(folder, keep):
    run = RunFolder(folder, CONFIG, keep=keep)
    run.recover()
    for step in range(0, 8):
        save(run, step)
        assert run.steps() == list(range(max(0, step - keep + 1), step + 1))
    save(run, 7)  # replaced
    assert len(run.steps()) == keep and run.read(7).step == 7
    run.save(2, *content(2))
    assert 2 in run.steps() and run.read(2).state == content(2)[1]  # never the one just written
    with pytest.raises(BadInput, match="keep = 0; expected at least 1"):
        RunFolder(folder, CONFIG, keep=0)


def test_steps_of_more_than_eight_digits(run):
    for step in (99_999_999, 100_000_000, 2_000_000_000):
        save(run, step)
    assert run.steps() == [100_000_000, 2_000_000_000] and run.recover() == 2_000_000_000


def test_rows_are_seen_at_once_and_torn_ones_never(run, folder):
    run.log(row(1))
    assert RunFolder(folder, CONFIG).rows() == [row(1)]
    with open(folder / "log.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo')
    assert run.rows() == [row(1)]
    run.log(row(2))
    assert run.rows() == [row(1), row(2)]
    (folder / "log.jsonl").write_bytes(b'{"step": 1}\n{"st\xffep": 2}\n')
    with pytest.raises(BadInput, match=r"log\.jsonl, line 2, which is not UTF-8"):
        run.rows()


def test_odd_text_stays_on_its_line(run):
    odd = {"text": "a\nb\r\x85\u2028\x00\\\"", "other\nkey": None, "n": -(2**63), "t": (1, [True])}
    run.log(odd)
    run.log({})
    assert run.rows() == [{**odd, "t": [1, [True]]}, {}]


BAD_VALUES = [math.nan, math.inf, -math.inf, 2**64, {1, 2}, b"a", 1j, object(), torch.ones(1), "\ud800", {1: 2}, {"\udfff": 1}]


@pytest.mark.parametrize("value", BAD_VALUES, ids=lambda value: f"{value!r:.20}".encode("ascii", "replace").decode())
def test_what_is_no_json_is_refused(run, folder, value):
    train(run, 0, 6)
    before = contents(folder)
    for refused in (lambda: run.log({"a": [value]}), lambda: run.save(10, content(10)[0], {"a": [value]}),
                    lambda: RunFolder(folder, {"a": [value]})):
        with pytest.raises(BadInput, match=r"a\[0\]"):
            refused()
    assert contents(folder) == before


def test_a_configuration_that_contains_itself():
    endless = {}
    endless["self"] = endless
    with pytest.raises(BadInput, match="nested deeper than 32 levels"):
        RunFolder("anywhere", endless)


@pytest.mark.parametrize("step, tensors", [(-1, {"w": torch.ones(1)}), (1.0, {"w": torch.ones(1)}), (10, {}),
                                           (10, {"w": torch.tensor(math.nan)}), (10**16, {"w": torch.ones(1)})])
def test_bad_checkpoints_are_refused(run, folder, step, tensors):
    train(run, 0, 6)
    before = contents(folder)
    with pytest.raises(BadInput):
        run.save(step, tensors, {})
    assert contents(folder) == before


def test_only_the_process_that_recovered_writes(run, folder):
    other = RunFolder(folder, CONFIG)
    for call in (lambda: other.log({}), lambda: save(other, 1)):
        with pytest.raises(BadInput, match=r"a call of recover\(\) before"):
            call()

    def child():
        with pytest.raises(BadInput, match="not locked"):
            run.log({})
    assert forked(child) == 0


# Whose folder


KEYS = st.text("xyz", min_size=1, max_size=2)
LEAVES = (st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9).filter(lambda value: value % 1)
          | st.text("abé", max_size=3))
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8)
CONFIGS = st.dictionaries(KEYS, JSON, max_size=4)


def leaves(config, path=()):
    """Path → value; an empty dict is a leaf, a list too."""
    if isinstance(config, dict) and (config or not path):
        return {way: value for key, item in config.items() for way, value in leaves(item, (*path, key)).items()}
    return {path: config}


def put(config, path, value):
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value


@settings(max_examples=60)
@given(config=CONFIGS, data=st.data())
def test_a_changed_configuration_is_refused_and_every_difference_named(tmp_path_factory, config, data):
    folder = tmp_path_factory.mktemp("run")
    old = RunFolder(folder, config)
    old.recover()
    train(old, 0, 6)
    old.close()
    again = RunFolder(folder, dict(reversed(copy.deepcopy(config).items())))  # the order of keys says nothing
    assert again.recover() == 5
    again.close()
    before = contents(folder)
    ways = leaves(config)
    changed = data.draw(st.lists(st.sampled_from(sorted(ways)), unique=True)) if ways else []
    other = copy.deepcopy(config)
    for way in changed:
        put(other, way, ["changed"])
    if data.draw(st.booleans()) or not changed:
        other["new"], changed = 7, [*changed, ("new",)]
    with pytest.raises(BadInput) as caught:
        RunFolder(folder, other).recover()
    assert contents(folder) == before
    said = str(caught.value)
    pieces = [f"{'.'.join(way)}: saved {ways[way]!r:.100}, here ['changed']" if way != ("new",) else "new: saved nothing, here 7"
              for way in sorted(changed)]
    assert all(piece in said for piece in pieces)
    assert said.count(": saved ") == len(pieces) and "--out" in said and "old settings" in said


def test_equal_configurations(folder):
    first = RunFolder(folder, {"betas": (0.9, 0.95), "n": 2})
    first.recover()
    train(first, 0, 5)
    first.close()
    assert RunFolder(folder, {"n": 2.0, "betas": [0.9, 0.95]}).recover() == 5
    with pytest.raises(BadInput, match=r"n: saved 2, here True"):
        RunFolder(folder, {"n": True, "betas": [0.9, 0.95]}).recover()


def test_without_a_checkpoint_a_run_begins_anew_as_it_is_now(folder):
    """A first attempt that failed on its data, say, is in nobody's way."""
    first = RunFolder(folder, {"data": "wrong"})
    first.recover()
    train(first, 0, EVERY - 1)
    first.close()
    second = RunFolder(folder, {"data": "right"})
    assert second.recover() is None and second.rows() == []
    train(second, 0, EVERY)
    second.close()
    with pytest.raises(BadInput, match="data: saved 'right', here 'wrong'"):
        RunFolder(folder, {"data": "wrong"}).recover()


@pytest.mark.parametrize("name", ["log.jsonl", "step-00000100.safetensors"])
def test_a_folder_of_something_else(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(BadInput, match=rf"a folder with {name}, but without a run\.json"):
        RunFolder(tmp_path, CONFIG).recover()
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == b"mine"


def test_other_things_at_the_place(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(BadInput, match="got a file; expected a folder"):
        RunFolder(tmp_path / "file", CONFIG).recover()
    for text in (b"", b"{", b"[1]", b"\xff"):
        (tmp_path / "run.json").write_bytes(text)
        with pytest.raises(BadInput, match=r"run\.json, which is"):
            RunFolder(tmp_path, CONFIG).recover()
        assert sorted(os.listdir(tmp_path)) == ["file", "run.json"]
    (tmp_path / "run.json").unlink()
    assert RunFolder(tmp_path, CONFIG).recover() is None and (tmp_path / "file").read_bytes() == b"mine"


def test_a_log_shorter_than_its_checkpoint_says(run, folder):
    train(run, 0, 12)
    lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "log.jsonl").write_bytes(b"".join(lines[:9]))
    for call in (lambda: run.log(row(13)), lambda: save(run, 15)):
        with pytest.raises(BadInput, match="that were written"):
            call()
    run.close()
    before = contents(folder)
    with pytest.raises(BadInput, match=r"a log\.jsonl of \d+ bytes; expected the \d+ .* at step 10.*remove step-00000010"):
        RunFolder(folder, CONFIG).recover()
    assert contents(folder) == before
    (folder / "step-00000010.safetensors").unlink()  # as it says
    assert RunFolder(folder, CONFIG).recover() == 5


# One writer


def hold(folder, pipe):
    run = RunFolder(folder, CONFIG)
    run.recover()
    os.write(pipe, b"!")
    time.sleep(60)


def test_a_second_process_is_refused_until_the_first_is_dead(folder):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        hold(folder, writer)
        os._exit(0)
    try:
        assert os.read(reader, 1) == b"!"
        before = contents(folder)
        with pytest.raises(BadInput, match="another process writes to"):
            RunFolder(folder, CONFIG).recover(patience=0)
        assert contents(folder) == before
        os.kill(child, signal.SIGKILL)  # and no wait: the lock comes within `patience`
        assert RunFolder(folder, CONFIG).recover() is None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def test_a_run_that_began_while_one_waited_for_the_lock(folder):
    """Both came to an empty folder. The second has looked before it waits, and must look again."""
    folder.mkdir(parents=True)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(file, fcntl.LOCK_EX)
        os.write(writer, b"!")
        time.sleep(0.3)
        (folder / "step-00000005.safetensors").write_bytes(b"theirs")
        (folder / "run.json").write_text('{"seed": 2}')
        os._exit(0)
    assert os.read(reader, 1) == b"!"
    with pytest.raises(BadInput, match="seed: saved 2, here 1"):
        RunFolder(folder, CONFIG).recover()
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    assert contents(folder) == {"run.json": b'{"seed": 2}', "step-00000005.safetensors": b"theirs"}


def test_a_second_object_of_this_process_is_refused_and_close_lets_go(run, folder):
    other = RunFolder(folder, CONFIG)
    with pytest.raises(BadInput, match="another process writes to"):
        other.recover(patience=0)
    run.close()
    run.close()
    assert other.recover() is None
    with pytest.raises(BadInput, match="not locked"):
        run.log({})
    del other  # an object nobody has any more holds nothing
    assert run.recover(patience=0) is None


def test_a_refusal_leaves_the_folder_to_others(folder):
    first = RunFolder(folder, CONFIG)
    first.recover()
    train(first, 0, 5)
    first.close()
    refused = RunFolder(folder, {})
    with pytest.raises(BadInput, match="another configuration"):
        refused.recover()
    run = RunFolder(folder, CONFIG)
    assert run.recover(patience=0) == 5
    train(run, 5, 1)
    run.close()
    (folder / "log.jsonl").write_bytes(b"")  # found out under the lock
    with pytest.raises(BadInput, match="at step 5"):
        run.recover(patience=0)
    (folder / "step-00000005.safetensors").unlink()
    assert RunFolder(folder, CONFIG).recover(patience=0) is None


WITH_WORKERS = """
import os, signal, sys, time, torch
from torch.utils.data import DataLoader
from omni_adapters.training.run_folder import RunFolder
run = RunFolder(sys.argv[1], {})
print(run.recover(), flush=True)
for step, _ in enumerate(DataLoader(range(9), num_workers=2, multiprocessing_context="fork", batch_size=1), 1):
    if step == int(sys.argv[2]):
        run.save(step, {"w": torch.ones(1)}, {})
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_of_a_killed_process_do_not_hold_its_folder(folder):
    """As torchrun restarts: the loader's workers outlive their parent by seconds."""
    said = []
    for step in (2, 4):
        child = subprocess.Popen([sys.executable, "-c", WITH_WORKERS, str(folder), str(step)], stdout=subprocess.PIPE, text=True,
                                 stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        with child.stdout:
            said.append(child.stdout.readline())
        assert child.wait() == -signal.SIGKILL
        assert RunFolder(folder, {}).recover(patience=0) == step
    assert said == ["None\n", "2\n"]


# Damage


def damages(data, rng):
    at = rng.randrange(len(data))
    yield data[:at]
    yield data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
    yield data + b"x"
    yield b""


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(folder, seed):
    with_run(folder, 23)
    newest = folder / "step-00000020.safetensors"
    for number, damaged in enumerate(damages(newest.read_bytes(), random.Random(seed)), 1):
        newest.write_bytes(damaged)
        run = RunFolder(folder, CONFIG)
        assert run.recover() == 15 and holds(run, 15) and run.steps() == [15]
        aside = folder / (".bad-step-00000020.safetensors" if number == 1 else f".bad-step-00000020-{number}.safetensors")
        assert aside.read_bytes() == damaged
        assert len(list(folder.glob(".bad-*"))) == number  # none was overwritten
        train(run, 15, 6)
        run.close()
        assert RunFolder(folder, CONFIG).recover() == 20 and holds(run, 20)


def with_run(folder, steps):
    run = RunFolder(folder, CONFIG)
    run.recover()
    train(run, 0, steps)
    run.close()


def test_all_checkpoints_damaged(folder):
    with_run(folder, 12)
    before = contents(folder)
    for step in (5, 10):
        (folder / f"step-{step:08d}.safetensors").write_bytes(b"half")
    run = RunFolder(folder, CONFIG)
    assert run.recover() is None and holds(run, None)
    assert (folder / ".bad-log.jsonl").read_bytes() == before["log.jsonl"]
    assert len(list(folder.glob(".bad-step-*"))) == 2


def test_files_that_are_no_checkpoints_of_this_step(folder):
    with_run(folder, 12)
    os.replace(folder / "step-00000010.safetensors", folder / "step-00000011.safetensors")
    save_adapter(folder / "step-00000012.safetensors", content(12)[0], {"an": "adapter"})
    (folder / "step-00000013.safetensors").mkdir()
    run = RunFolder(folder, CONFIG)
    with pytest.raises(BadInput, match="no checkpoint of a run"):
        run.read(11)
    assert run.recover() == 5 and holds(run, 5) and len(list(folder.glob(".bad-*"))) == 3


def test_leftovers_of_killed_writers_and_only_those(folder):
    with_run(folder, 6)
    leftovers = [".step-00000005.safetensors.0123abcd.saving", ".step-00000099.safetensors.0123abcd.saving",
                 ".run.json.0123abcd.tmp"]
    others = [".adapter.safetensors.0123abcd.saving", ".other.tmp", "notes.txt", "step-5.safetensors",
              "step-00000005.safetensors.bak"]
    for name in leftovers + others:
        (folder / name).write_bytes(b"half")
    assert RunFolder(folder, CONFIG).recover() == 5
    assert sorted(contents(folder)) == sorted([*others, "log.jsonl", "run.json", "step-00000005.safetensors"])


# A full disk


@pytest.mark.parametrize("name", ["write", "fsync", "replace"])
@pytest.mark.parametrize("number", range(4))
def test_a_failed_save_or_row_changes_nothing(run, folder, monkeypatch, name, number):
    train(run, 0, 12)
    for attempt in (lambda: save(run, 15), lambda: run.log(row(13))):
        before = contents(folder)
        with monkeypatch.context() as patch:
            failed = fail_at(patch, name, number)
            try:
                attempt()
            except OSError as error:
                assert failed and error.errno == errno.ENOSPC
        if failed and (name, number) != ("fsync", 2):  # the folder's: the file is in place by then
            assert contents(folder) == before
    after = 12 if run.rows() == [row(number) for number in range(1, 13)] else 13
    train(run, after, 3)  # the run goes on
    assert run.rows() == [row(number) for number in range(1, after + 4)] and run.recover() == 15 and holds(run, 15)


def fail_at(patch, name, number):
    """The `number`-th call of an os function raises ENOSPC, a write after half of its bytes."""
    real, calls, failed = getattr(os, name), iter(range(10**6)), []

    def call(*args):
        if next(calls) != number:
            return real(*args)
        failed.append(name)
        if name == "write":
            real(args[0], args[1][:len(args[1]) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(os, name, call)
    return failed


def test_a_disk_that_is_really_full(run, folder):
    train(run, 0, 12)
    before, limits = contents(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, attempt in ((100, lambda: save(run, 15)), (len(before["log.jsonl"]) + 5, lambda: run.log(row(13)))):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))  # Python ignores the SIGXFSZ
        try:
            with pytest.raises(OSError, match="File too large"):
                attempt()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert contents(folder) == before
    train(run, 12, 3)
    assert run.recover() == 15 and holds(run, 15)


def test_what_a_failed_row_left_is_cut_off_later_when_it_cannot_be_cut_off_at_once(run, monkeypatch):
    run.log(row(1))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        fail_at(patch, "write", 0)
        fail_at(patch, "ftruncate", 0)
        run.log(row(2))
    assert (run.folder / "log.jsonl").read_bytes()[-1:] != b"\n" and run.rows() == [row(1)]
    run.log(row(2))
    assert run.rows() == [row(1), row(2)]


# The values are on the disk before the names, the log before the checkpoint


def test_the_order_of_a_save(run, folder, monkeypatch):
    train(run, 0, 14)
    calls = []

    def noted(name):
        real = getattr(os, name)

        def call(first, *rest):
            file = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fsdecode(rest[0] if rest else first)
            calls.append((name, re.sub(r"\.[0-9a-f]{8}\.saving", "*", os.path.basename(file))))
            return real(first, *rest)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "unlink"):
            patch.setattr(os, name, noted(name))
        save(run, 15)
    assert calls == [("fsync", "log.jsonl"), ("fsync", ".step-00000015.safetensors*"), ("replace", "step-00000015.safetensors"),
                     ("fsync", folder.name), ("unlink", "step-00000005.safetensors")]


# Death at every call


def crash_at(number, torn):
    """In this process, from now on: die at the `number`-th call that changes something, before it, or in the midst of a write."""
    calls = iter(range(10**6))

    def deadly(name):
        real = getattr(os, name)

        def call(*args, **options):
            if next(calls) == number:
                if torn and name == "write":
                    real(args[0], args[1][:max(1, len(args[1]) // 2)])
                os._exit(7)
            return real(*args, **options)

        setattr(os, name, call)

    for name in CALLS:
        deadly(name)


def crashes(work, prepare, check, torn):
    """Let `work` die at its n-th call, n = 0, 1, …, until it comes through; `check` after each. How often it died."""
    for number in range(10**6):
        prepare()

        def doomed(number=number):
            crash_at(number, torn)
            work()

        status = forked(doomed)
        assert status in (0, 7)
        check(status)
        if status == 0:
            return number


def copy_of(files, folder):
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


@pytest.fixture(params=[False, True], ids=["before", "in the midst"])
def torn(request):
    return request.param


def bounded(folder, keep=2):
    """Three files and the checkpoints; one more where death came before the oldest was removed, as the next save does."""
    names = [name for name in os.listdir(folder) if not name.startswith(".bad-")]
    assert len(names) <= 3 + keep + 1, names


@pytest.mark.slow
def test_death_at_every_call_of_rows_and_saves(folder, torn):
    """From a new folder to the third checkpoint. What was saved before the death is there after it."""
    saved = mmap.mmap(-1, 8)

    def work():
        run = RunFolder(folder, CONFIG)
        start = run.recover() or 0
        while start < 3 * EVERY:
            train(run, start, EVERY)
            start += EVERY
            saved[:] = struct.pack("q", start)

    def prepare():
        saved[:] = struct.pack("q", 0)
        if folder.exists():
            copy_of({}, folder)
            folder.rmdir()

    def check(status):
        run = RunFolder(folder, CONFIG)
        step = run.recover(patience=0)
        assert holds(run, step)
        assert (step or 0) - struct.unpack("q", saved)[0] in (0, EVERY)  # the last one may be in place already
        bounded(folder)
        train(run, step or 0, EVERY)
        assert holds(run, (step or 0) + EVERY)

    assert crashes(work, prepare, check, torn) > 40


@pytest.mark.parametrize("damaged", [[], [20], [15, 20]], ids=lambda damaged: f"{len(damaged)} damaged")
def test_death_at_every_call_of_recover(folder, torn, damaged):
    with_run(folder, 23)
    for step in damaged:
        (folder / f"step-{step:08d}.safetensors").write_bytes(b"half")
    (folder / ".step-00000025.safetensors.01234567.saving").write_bytes(b"half")
    (folder / ".bad-step-00000020.safetensors").write_bytes(b"an older one")
    files, expected = contents(folder), {0: 20, 1: 15, 2: None}[len(damaged)]

    def check(status):
        run = RunFolder(folder, CONFIG)
        assert run.recover(patience=0) == expected and holds(run, expected)
        bounded(folder)
        assert (folder / ".bad-step-00000020.safetensors").read_bytes() == b"an older one"
        assert len(list(folder.glob(".bad-step-*"))) == 1 + len(damaged)
        if expected is None:
            assert (folder / ".bad-log.jsonl").read_bytes() == files["log.jsonl"]
        run.close()

    died = crashes(lambda: RunFolder(folder, CONFIG).recover(), lambda: copy_of(files, folder), check, torn)
    assert died >= 5 + len(damaged)


def test_killed_at_random_moments(folder):
    """SIGKILL, twenty times, while a process saves and logs as fast as it can."""
    rng, marks, reached = random.Random(0), mmap.mmap(-1, 16), []

    def work():
        run = RunFolder(folder, CONFIG)
        step = run.recover() or 0
        while True:
            step += 1
            marks[:8] = struct.pack("q", step)  # the step that was begun
            run.log(row(step))
            if step % EVERY == 0:
                save(run, step)
                marks[8:] = struct.pack("q", step)  # the step that was saved

    for _ in range(20):
        child = os.fork()
        if not child:
            try:
                work()
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.005, 0.12))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        begun, saved = struct.unpack("2q", marks)
        run = RunFolder(folder, CONFIG)
        step = run.recover(patience=0)
        assert holds(run, step) and (step or 0) >= saved and begun - (step or 0) <= EVERY
        assert not list(folder.glob(".bad-*"))
        bounded(folder)
        reached.append(step or 0)
        run.close()
    assert reached == sorted(reached) and len(set(reached)) > 5  # killed early, late, and never set back
