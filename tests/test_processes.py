"""Workers end with whoever started them: in order, interrupted, killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omni_adapters.processes import worker_pool

SCRIPT = """
import os, signal, time
from omni_adapters.processes import worker_pool

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    with worker_pool(2) as pool:
        print(*sorted({pool.submit(os.getpid).result() for _ in range(20)}), flush=True)
        list(pool.map(time.sleep, [0.2] * 1000))  # 100 s
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" if Path("/proc").is_dir() else True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_do_not_outlive_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              start_new_session=True)
    assert parent.stdout is not None and parent.stderr is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers and all(map(alive, workers))
    if number == signal.SIGINT:
        os.killpg(parent.pid, number)  # as a terminal does: to the workers too
    else:
        parent.send_signal(number)
    assert parent.wait(20) == -number  # of 100 s
    end = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    if number == signal.SIGINT:  # a worker that is starting when its parent is killed says so
        assert parent.stderr.read().count("Traceback") == 1  # the parent's own


def test_what_waits_is_dropped_with_the_block() -> None:
    began = time.monotonic()
    with worker_pool(1) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
        waiting = [pool.submit(time.sleep, 0.5) for _ in range(100)]
    assert time.monotonic() - began < 30 and waiting[-1].cancelled()  # of 50 s
