"""Samples of a decoder's entries, cut out of the reference over a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeattn.core.numerics import Array
from edgeattn.core.specs import IDS, LAST, LOGITS, POSITION, StepShape, new_name


@dataclass(frozen=True)
class Text:
    """What ``reference.run`` wrote.

    Attributes:
        ids: (T,). at: positions (M,) with logits (M, V). prompt and greedy: a continuation. rows: (K, width) by name.
        before: (), tokens before a golden sample that has something in its cache.
    """

    ids: Array
    at: Array
    logits: Array
    prompt: Array
    greedy: Array
    before: Array
    rows: Mapping[str, Array]

    @staticmethod
    def load(folder: Path) -> Text:
        """Of a finished reference stage."""
        with np.load(folder / "text.npz", allow_pickle=False) as data:
            own = {name: data[name] for name in ("ids", "at", "logits", "prompt", "greedy", "before")}
            return Text(**own, rows={name: data[name] for name in data.files if name not in own})

    def logits_at(self, position: int) -> Array:
        """(1, V)."""
        (found,) = np.flatnonzero(self.at == position)
        wanted: Array = self.logits[found : found + 1]
        return wanted


@dataclass(frozen=True)
class Sample:
    """Inputs of one entry and what the reference makes of them, both by name."""

    entry: str
    number: int
    feeds: dict[str, Array]
    reference: dict[str, Array]

    @property
    def name(self) -> str:
        """As golden files are called."""
        return f"{self.entry}-{self.number:03}"


def _sample(text: Text, shape: StepShape, start: int, number: int) -> Sample:
    """``shape.tokens`` tokens from ``start`` on, the rows before them in the cache."""
    end = start + shape.tokens
    cached = max(start, 1) if shape.dynamic else shape.cached
    feeds = {IDS: text.ids[None, start:end], POSITION: np.array([start])}
    if shape.tokens > 1 and not shape.dynamic:
        feeds[LAST] = np.array([shape.tokens - 1])
    reference = {LOGITS: text.logits_at(end - 1)}
    for name, rows in text.rows.items():
        feeds[name] = np.zeros((1, cached, rows.shape[1]), np.float32)
        feeds[name][0, :start] = rows[:start]
        reference[new_name(name)] = rows[None, start:end]
    return Sample(shape.name, number, feeds, reference)


def golden(text: Text, shapes: Sequence[StepShape]) -> list[Sample]:
    """Two samples of every entry: with an empty cache, and with tokens before it."""
    return [
        _sample(text, shape, start, number)
        for shape in shapes
        for number, start in enumerate((0, int(text.before)))
        if start < shape.cached and start + shape.tokens <= min(len(text.ids), len(next(iter(text.rows.values()))))
    ]
