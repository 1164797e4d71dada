"""A call that may never return: it runs in a thread that can be left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_thread(call: Callable[[], T]) -> Future[T]:
    """`call()` in a thread of its own, whose answer or error will stand in the future. The thread keeps no process alive, so it
    may be left behind: a ThreadPoolExecutor's would be waited for at the end."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name="omni_adapters").start()
    return answer
