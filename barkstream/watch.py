"""Listeners who leave while a call of theirs is under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

# Triton tells a model only when asked, which takes 20 to 50 us: so every 20 ms, and not more than 1,000 times a second in all.
PERIOD_S, PERIOD_A_LISTENER_S = 0.02, 0.001


class Watch:
    """Asks again and again whether listeners have left, and sees to it, once, when one has."""

    def __init__(self, n_most: int):
        """n_most: listeners at once."""
        self._changed = threading.Condition()
        self._listeners: list[_Listener] = []
        self._is_closed = False
        self._errands = ThreadPoolExecutor(n_most, thread_name_prefix="left")
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @contextmanager
    def listener(self, has_left: Callable[[], bool], when_left: Callable[[], None]) -> Iterator[None]:
        """While the block runs, has_left is asked; the first time that it says so, when_left runs on another thread.

        Neither begins after the block: what has_left asks may be gone then.
        """
        listener = _Listener(has_left, when_left)
        with self._changed:
            self._listeners.append(listener)
            self._changed.notify()
        try:
            yield
        finally:
            with listener.lock:
                listener.is_over = True
            with self._changed:
                self._listeners.remove(listener)

    def close(self) -> None:
        """Nobody may be listening any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        self._errands.shutdown()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._listeners or self._is_closed)
                if self._is_closed:
                    return
                listeners = list(self._listeners)
            for listener in listeners:
                with listener.lock:
                    if not listener.is_over and listener.has_left():
                        listener.is_over = True
                        self._errands.submit(listener.when_left)
            time.sleep(max(PERIOD_S, PERIOD_A_LISTENER_S * len(listeners)))


class _Listener:
    def __init__(self, has_left: Callable[[], bool], when_left: Callable[[], None]):
        self.has_left, self.when_left = has_left, when_left
        self.lock = threading.Lock()
        self.is_over = False
