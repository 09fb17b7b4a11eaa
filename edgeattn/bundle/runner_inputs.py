"""The runner's part that runs an entry on .npy files of the user's own.

Standard library, NumPy and the runtime; Python 3.9 and newer. Beside run.py in a bundle as run_inputs.py.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeattn.bundle import runner as run
else:
    import run  # run.py, beside this file


def run_inputs(
    manifest: dict[str, Any], part: dict[str, Any], texts: list[str], entry: str, threads: int
) -> dict[str, Any]:
    """Run one entry on .npy files and save what comes out."""
    import numpy as np

    if entry not in part["entries"]:
        raise run.Problem(2, f"no entry {entry!r}; there are {', '.join(part['entries'])}")
    feeds = {}
    for text in texts:
        name, _, path = text.partition("=")
        try:
            feeds[name] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise run.Problem(2, f"--input {text}: {error}") from error
        if not isinstance(feeds[name], np.ndarray):
            raise run.Problem(2, f"--input {text}: holds several arrays; save one with numpy.save")
    wanted = part["entries"][entry]["inputs"]
    for spec in wanted:
        given = feeds.get(spec["name"])
        if given is None:
            raise run.Problem(2, f"missing --input {spec['name']}=FILE.npy")
        ends = {axis: range(low, high + 1, *step) for axis, low, _, high, *step in spec.get("dynamic", ())}
        sizes = [ends.get(axis, range(size, size + 1)) for axis, size in enumerate(spec["shape"])]
        fits = len(sizes) == given.ndim and all(n in size for n, size in zip(given.shape, sizes))  # noqa: B905
        if not fits or str(given.dtype) != spec["dtype"]:
            words = [f"{s[0]} to {s[-1]}" + f" by {s.step}" * (s.step > 1) if s[1:] else str(s[0]) for s in sizes]
            has, needs = f"{given.shape} {given.dtype}", f"({', '.join(words)}) {spec['dtype']}"
            raise run.Problem(2, f"input {spec['name']} is {has}, wanted is {needs}")
    if unknown := sorted(set(feeds) - {spec["name"] for spec in wanted}):
        raise run.Problem(2, f"no input named {', '.join(unknown)}")
    run.check_first_use(manifest, part, threads)
    execute, runtime = run.open_entry(part, entry, threads)
    saved = {}
    for name, value in execute(feeds).items():
        path = f"output.{name.replace(os.sep, '_')}.npy"
        np.save(path, value)
        saved[name] = {"file": path, "shape": list(value.shape), "dtype": str(value.dtype)}
    return {"backend": part["backend"], "runtime": runtime, "threads": threads, "outputs": saved, "holds": True}
