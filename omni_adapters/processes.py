"""Processes that share work and are gone when it is: with the block, with Ctrl-C, with the parent, however that ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process


@contextmanager
def worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """`num_workers` fresh interpreters; what waits when the block ends is dropped, what runs is waited for.

    A script that comes here needs the `if __name__ == "__main__":` of `multiprocessing`; functions are named by their module.
    """
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=follow_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def follow_parent() -> None:
    """Ctrl-C is for the parent, which ends its workers in order. One that was killed cannot: workers hold both ends of the
    queue that they wait at, so that its death does not wake them; this thread does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_after_parent, daemon=True).start()


def end_after_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
