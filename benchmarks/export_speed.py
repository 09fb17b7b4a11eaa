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
from pathlib import Path

from benchmarks.measure import Run, ratio, run

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
        run([sys.executable, "-c", PREPARE, arguments.model, deploy])

        def ours() -> Run:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            shutil.rmtree(folder / "out", ignore_errors=True)
            command = [sys.executable, "-m", "edgeattn", "export", arguments.model, "-o", str(folder / "out")]
            return run(command, {**os.environ, "EDGEATTN_CACHE": str(folder / "cache")})

        def bare(how: str) -> Run:
            return run([sys.executable, "-c", BARE, arguments.model, deploy, file, how])

        taken: dict[str, list[Run]] = {"ours": [], "bare": [], "bare, loaded": []}
        for turn in range(arguments.rounds):
            steps = [("ours", ours), ("bare", lambda: bare("build")), ("bare, loaded", lambda: bare("load"))]
            for label, step in steps if turn % 2 == 0 else steps[::-1]:
                taken[label].append(step())
            last = {label: runs[-1] for label, runs in taken.items()}
            print(
                f"round {turn + 1}: " + ", ".join(f"{k} {r.seconds:.1f} s {r.peak_mb:.0f} MB" for k, r in last.items())
            )
        for label in ("bare", "bare, loaded"):
            seconds = ratio([r.seconds for r in taken["ours"]], [r.seconds for r in taken[label]])
            memory = ratio([r.peak_mb for r in taken["ours"]], [r.peak_mb for r in taken[label]])
            print(f"{arguments.model}: wall time, ours / {label}: {seconds}")
            print(f"{arguments.model}: peak memory, ours / {label}: {memory}")


if __name__ == "__main__":
    main()
