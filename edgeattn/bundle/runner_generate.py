"""Tokens one after the other from a decoder's bundle: the cache, and which entry computes what.

A part of ``run.py``: Python 3.9+, NumPy and the bundle's runtime. EdgeAttn itself verifies decoders with it.
"""

from __future__ import annotations

from typing import Any, Callable

Data = dict[str, Any]
#: Outputs for inputs. A runtime that keeps the cache itself has an attribute ``stateful``, and ``reset()``: it is given
#: no rows, and gives none. One that lets its own input buffers be written has ``views``, arrays by name, and is called
#: without them.
Run = Callable[[Data], Data]

#: So few tokens are decoded one by one before a larger entry is filled up with padding.
FEW = 4


class Full(Exception):
    """The context has no room for more tokens."""


class Session:
    """One sequence of tokens.

    Args:
        decoder: the manifest's: ``context``, ``cache`` (name and width of every tensor). entries: of the artifact.
        opener: what runs an entry, see ``Run``.

    Attributes:
        context: tokens that the cache can hold. position: tokens that it holds.
        rows: the cache, (1, context, width) each; {} where no entry takes it.
    """

    def __init__(self, decoder: Data, entries: Data, opener: Callable[[str], Run]) -> None:
        import numpy as np

        self.context = int(decoder["context"])
        self._opener, self._opened = opener, dict[str, Run]()
        self._entries = [_Shape(name, entry) for name, entry in entries.items()]
        self._synced: dict[str, int] = {}
        self.position = 0
        types = {spec["name"]: spec["dtype"] for entry in entries.values() for spec in entry["inputs"]}
        self.rows = {
            row["name"]: np.zeros((1, self.context, row["width"]), types[row["name"]])
            for row in decoder["cache"]
            if row["name"] in types
        }

    @property
    def cache_bytes(self) -> int:
        """Of the cache as it is allocated; 0 where the runtime has it."""
        kept = any(getattr(run, "stateful", False) for run in self._opened.values())
        return 0 if kept else sum(rows.nbytes for rows in self.rows.values())

    def reset(self) -> None:
        """Begin a new sequence."""
        self.position = 0
        self._synced.clear()
        for run in self._opened.values():
            if getattr(run, "stateful", False):
                run.reset()  # type: ignore[attr-defined]

    def prepare(self, count: int) -> None:
        """Open the entries that so many tokens, and one more behind them, will run on: what takes long is done then."""
        position, end = self.position, self.position + count
        while position < end:
            shape, taken = self._next(position, end - position)
            self._open(shape)
            position += taken
        if end < self.context:
            self._open(self._next(end, 1)[0])

    def feed(self, ids: Any, each: Callable[[], None] = lambda: None) -> Any:
        """Take tokens in; the logits (vocabulary,) behind the last of them, in float32.

        Args:
            each: is called after every run of an entry.

        Raises:
            Full: there is no room for them; nothing was taken in.
        """
        if self.position + len(ids) > self.context:
            raise Full(f"{self.position} + {len(ids)} tokens are more than the context of {self.context}")
        logits, done = None, 0
        while done < len(ids):
            shape, count = self._next(self.position, len(ids) - done)
            logits = self._run(shape, ids[done : done + count])
            done += count
            each()
        return logits

    def _next(self, position: int, left: int) -> tuple[_Shape, int]:
        """The entry for the tokens from ``position`` on, and how many it takes of ``left``."""
        fits = [s for s in self._entries if s.rows >= position and position + s.least <= self.context]
        fits.sort(key=lambda s: (s.rows, s.tokens))
        one = next(s for s in fits if s.tokens == 1)
        several = [s for s in fits if s.rows == one.rows and s.tokens > 1]
        if not several or left == 1 or (left <= FEW and several[0].least > left):
            return one, 1
        enough = next((s for s in several if s.tokens >= left), several[-1])
        return enough, min(left, enough.tokens)

    def _open(self, shape: _Shape) -> Run:
        if shape.name not in self._opened:
            self._opened[shape.name] = self._opener(shape.name)
        return self._opened[shape.name]

    def _run(self, shape: _Shape, ids: Any) -> Any:
        import numpy as np

        run, count, begin = self._open(shape), len(ids), self.position
        held = {} if getattr(run, "stateful", False) else self.rows
        padded = np.zeros((1, max(count, shape.least)), np.int64)
        padded[0, :count] = ids
        feeds: Data = {"ids": padded, "position": np.array([begin])}
        if shape.with_last:
            feeds["last"] = np.array([count - 1])
        feeds = {name: value.astype(shape.types[name]) for name, value in feeds.items()}
        views = getattr(run, "views", None)
        if views is None:
            filled = shape.rows if shape.fixed else max(begin, 1)  # a row that is masked, before there is any
            feeds.update({name: rows[:, :filled] for name, rows in held.items()})
        else:
            since = self._synced.get(shape.name, 0)
            for name, rows in held.items():
                views[name][:, since:begin] = rows[:, since:begin]
            self._synced[shape.name] = begin
        outputs = run(feeds)
        for name, rows in held.items():
            rows[:, begin : begin + count] = outputs[f"new_{name}"][:, :count]
        self.position = begin + count
        return outputs["logits"][0].astype(np.float32)


class _Shape:
    """How many tokens an entry takes, and behind how many rows of the cache.

    Attributes:
        tokens: at most. least: tokens that it takes at least, or is filled up to. rows: of the cache, at most.
        fixed: it takes exactly so many rows.
    """

    def __init__(self, name: str, entry: Data) -> None:
        inputs = {spec["name"]: spec for spec in entry["inputs"]}
        self.name, self.types = name, {key: spec["dtype"] for key, spec in inputs.items()}
        self.with_last = "last" in inputs
        self.least, self.tokens, _ = _ends(inputs["ids"])
        caches = [spec for key, spec in inputs.items() if key not in ("ids", "position", "last")]
        _, self.rows, self.fixed = _ends(caches[0]) if caches else (0, 1 << 30, False)


def _ends(spec: Data) -> tuple[int, int, bool]:
    """Smallest and largest size of axis 1, and whether it is fixed."""
    for axis, low, _, high, *_ in spec.get("dynamic", ()):
        if axis == 1:
            return low, high, False
    return spec["shape"][1], spec["shape"][1], True
