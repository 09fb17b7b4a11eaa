"""Ctrl-C in long work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruptible(say: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Ctrl-C that is not lost: ``say``, which raises KeyboardInterrupt at its next word where the first got nowhere.

    The exception comes wherever Python just is: in a finalizer it is dropped, and libraries have bare ``except``. In
    threads, and where the caller handles the signal, ``say`` is what it was.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield say
        return
    asked = False

    def note(*_: object) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def checked(text: str) -> None:
        if asked:
            raise KeyboardInterrupt
        say(text)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield checked
    finally:
        signal.signal(signal.SIGINT, before)
