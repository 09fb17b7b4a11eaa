"""Our whole export against a bare ``torch.onnx.export`` of the same deploy-form model: wall time and peak memory.

    python benchmarks/export_speed.py [--model fmvit-s] [--rounds 7]

Ours: ``edgeattn export MODEL --target onnx`` in a fresh process with an empty cache: build, reference,
reparameterization with proof, capture, lowering, verification under ONNX Runtime, bundle. Bare: a fresh process that
builds the same model, takes the deploy form ready-made (folded beforehand, so it pays for no fusion), calls
``torch.onnx.export`` and saves. A second baseline, "bare, loaded", does not even build the model: it unpickles the
deploy form. Turns are interleaved.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import peak_mb, ratio, seconds

#: Runs a command (with an environment, or None for this one's) and returns one figure of it.
Measure = Callable[[Sequence[str], dict[str, str] | None], float]

PREPARE = """
import sys, torch
from edgeattn import recipe
from edgeattn.models.build import build
from edgeattn.reparam import reparameterize
built = build(recipe.resolve(sys.argv[1]))
inputs = tuple(built.random_inputs(0).values())
torch.save((reparameterize(built.model, inputs).model, inputs), sys.argv[2])
"""

BARE = """
import sys, torch
if sys.argv[4] == "build":
    from edgeattn import recipe
    from edgeattn.models.build import build
    build(recipe.resolve(sys.argv[1]))
# Our own file of a moment ago; a whole module can only be unpickled.
model, inputs = torch.load(sys.argv[2], weights_only=False)
torch.onnx.export(model, inputs, dynamo=True, verbose=False).save(sys.argv[3])
"""


def main() -> None:
    """Run the rounds and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fmvit-s")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        deploy, file = str(folder / "deploy.pt"), str(folder / "bare.onnx")
        seconds([sys.executable, "-c", PREPARE, arguments.model, deploy])

        def ours(measure: Measure) -> float:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            shutil.rmtree(folder / "out", ignore_errors=True)
            command = [sys.executable, "-m", "edgeattn", "export", arguments.model, "-o", str(folder / "out")]
            return measure(command, {**os.environ, "EDGEATTN_CACHE": str(folder / "cache")})

        def bare(how: str) -> Callable[[Measure], float]:
            return lambda measure: measure([sys.executable, "-c", BARE, arguments.model, deploy, file, how], None)

        steps = {"ours": ours, "bare": bare("build"), "bare, loaded": bare("load")}
        for title, unit, measure in (("wall time", "s", seconds), ("peak memory", "MB", peak_mb)):
            taken: dict[str, list[float]] = {label: [] for label in steps}
            for turn in range(arguments.rounds):
                for label in list(steps)[:: 1 if turn % 2 == 0 else -1]:
                    taken[label].append(steps[label](measure))
                last = ", ".join(f"{label} {values[-1]:.1f} {unit}" for label, values in taken.items())
                print(f"{title}, round {turn + 1}: {last}", flush=True)
            for label in ("bare", "bare, loaded"):
                print(f"{arguments.model}: {title}, ours / {label}: {ratio(taken['ours'], taken[label])}", flush=True)


if __name__ == "__main__":
    main()
