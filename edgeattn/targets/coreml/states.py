"""An entry that keeps its cache in states, called as the one that it was captured from: the cache fed, rows given.

So golden samples of a decoder run on any of its artifacts. Works on whatever has ``read_state`` and ``write_state`` as
coremltools' ``MLState`` has: the interpreter's states, and Core ML's on a Mac.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from edgeattn.core.numerics import Array
from edgeattn.core.specs import IDS, POSITION, new_name

Outputs = dict[str, Array]


def split(feeds: Mapping[str, Array], states: Collection[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    """What an entry is fed, and what its states are to hold."""
    return (
        {name: value for name, value in feeds.items() if name not in states},
        {name: feeds[name] for name in states if name in feeds},
    )


def run_with(
    feeds: Mapping[str, Array], states: Collection[str], new: Any, run: Callable[[dict[str, Array], Any], Outputs]
) -> Outputs:
    """Outputs of one run on states that begin as the feeds say, zeros where they do not, and the rows it wrote to them.

    Args:
        states: names. new: makes states. run: takes the other feeds and the states.
    """
    fed, held = split(feeds, states)
    state = new()
    for name, value in held.items():
        state.write_state(name, value.astype(np.float16))
    outputs = run(fed, state)
    if not held:
        return outputs
    begin, count = int(fed[POSITION][0]), fed[IDS].shape[1]
    return outputs | {new_name(name): state.read_state(name)[:, begin : begin + count] for name in held}
