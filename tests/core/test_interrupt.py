"""Ctrl-C that a library or a finalizer swallows."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from edgeattn.core.interrupt import interruptible


def lose_one() -> None:
    """As a library does that tries something."""
    with contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGINT)


def test_what_was_lost_is_raised_at_the_next_word() -> None:
    said: list[str] = []
    with interruptible(said.append) as say:
        say("one")
        lose_one()
        with pytest.raises(KeyboardInterrupt):
            say("two")
    assert said == ["one"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_was_not_lost_comes_at_once() -> None:
    with interruptible(print), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_thread_and_a_handler_of_the_callers_are_left_alone() -> None:
    def inside() -> Callable[[str], None]:
        with interruptible(print) as say:
            return say

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result() is print
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert inside() is print
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
