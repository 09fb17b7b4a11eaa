"""What interpreting a Core ML package costs: the MIL interpreter against PyTorch eager on the same input, interleaved.

    python benchmarks/mil_interpreter.py [--models fmvit-s ...] [--precision fp32] [--rounds 15] [--threads 2]
    python benchmarks/mil_interpreter.py --large

Eager runs the deploy form, which has the same convolutions as the package, and the training form. ``--large`` makes a
transformer of about 300 M parameters in float16 and tells the peak memory of a process that reads and interprets it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.measure import peak_mb, ratio
from edgeattn import recipe, targets
from edgeattn.capture import capture
from edgeattn.models.build import build
from edgeattn.reparam import reparameterize
from edgeattn.targets.base import LowerPlan


def package(model: torch.nn.Module, inputs: dict[str, torch.Tensor], precision: str, folder: Path) -> Any:
    """Lower a module to Core ML; the artifact."""
    target = targets.get("coreml")
    return target.lower(
        capture(model, inputs, ("y",)), LowerPlan(precision, [], {}, options=target.settle({}, None)), folder
    )


def timed(run: Callable[[], Any], seconds: float = 0.5) -> float:
    """Milliseconds a run: the best of as many as fit into ``seconds``, at least three."""
    best, end, count = float("inf"), time.perf_counter() + seconds, 0
    while time.perf_counter() < end or count < 3:
        start = time.perf_counter()
        run()
        best, count = min(best, time.perf_counter() - start), count + 1
    return best * 1e3


def compare(name: str, precision: str, rounds: int) -> None:
    """Print the ratios for one recipe."""
    built = build(recipe.resolve(name))
    inputs = built.random_inputs(0)
    values = tuple(inputs.values())
    deploy = reparameterize(built.model, values).model
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        artifact = package(deploy, inputs, precision, Path(folder))
        runtime = targets.get("coreml").open(artifact)
        feeds = {key: value.numpy() for key, value in inputs.items()}
        runs: list[Callable[[], Any]] = [
            lambda: runtime.run("main", feeds),
            lambda: deploy(*values),
            lambda: built.model(*values),
        ]
        taken: list[list[float]] = [[] for _ in runs]
        with torch.no_grad():
            for turn in range(rounds):
                order = range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs)))
                for index in order:
                    taken[index].append(timed(runs[index]))
    for what, others in (("deploy", taken[1]), ("training", taken[2])):
        print(f"{name} {precision}: interpreter / PyTorch eager, {what} form: {ratio(taken[0], others)}", flush=True)


class Large(torch.nn.Module):
    """A transformer encoder of about 300 M parameters."""

    def __init__(self, width: int = 1024, depth: int = 24) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(width, 16, 4 * width, batch_first=True, norm_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        for parameter in self.parameters():  # its layers are copies, whose weights the converter would store once
            torch.nn.init.normal_(parameter, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to the same."""
        y: torch.Tensor = self.encoder(x)
        return y


RUN = """
import sys, numpy as np
from pathlib import Path
from edgeattn.targets.coreml.runtime import MilRuntime, adopt
runtime = MilRuntime(adopt(Path(sys.argv[1])))
y = runtime.run('main', {'x': np.load(sys.argv[2])})['y']
assert np.isfinite(y).all()
"""


def large() -> None:
    """Print the peak memory of a process that interprets a large package."""
    import numpy as np

    model, x = Large().eval(), torch.randn(1, 128, 1024)
    count = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        package(model, {"x": x}, "fp16", Path(folder))
        np.save(Path(folder) / "x.npy", x.numpy())
        del model
        words = [sys.executable, "-c", RUN, f"{folder}/main.mlpackage", f"{folder}/x.npy"]
        print(f"{count / 1e6:.0f} M parameters, float16: read and run within {peak_mb(words) / 1e3:.2f} GB")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["fmvit-s"])
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.large:
        large()
        return
    for name in arguments.models:
        compare(name, arguments.precision, arguments.rounds)


if __name__ == "__main__":
    main()
