"""What reparameterization gains under ONNX Runtime: the training form against the deploy form of every FMViT size.

    python benchmarks/fusion_gain.py [--models fmvit-t fmvit-s ...] [--rounds 15] [--threads 1]

Both forms go through the same exporter, whose own optimizer already folds each batch norm behind a convolution into it:
the gain is that of fusing branches, batch norms in front of layers, and the attention scale. Turns are interleaved,
batch 1, random weights, which do not change the time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnx
import onnxruntime as ort
import torch

from benchmarks.measure import ratio
from edgeattn import recipe, targets
from edgeattn.capture import capture
from edgeattn.models.build import build
from edgeattn.reparam import reparameterize
from edgeattn.targets.base import LowerPlan

SIZES = ["fmvit-t", "fmvit-s", "fmvit-m", "fmvit-b", "fmvit-l"]


def export(model: torch.nn.Module, inputs: dict[str, torch.Tensor], folder: Path) -> Path:
    """Write one form as an fp32 ONNX file."""
    folder.mkdir()
    program = capture(model, inputs, ("logits",))
    targets.get("onnx").lower(program, LowerPlan("fp32", [], {}), folder)
    return folder / "model.onnx"


def session(path: Path, threads: int) -> Any:
    """An ONNX Runtime session on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def timed(run: Any, feeds: dict[str, Any], seconds: float = 0.3) -> float:
    """Milliseconds a run: the best of as many as fit into ``seconds``, at least three."""
    best, end, count = float("inf"), time.perf_counter() + seconds, 0
    while time.perf_counter() < end or count < 3:
        start = time.perf_counter()
        run.run(None, feeds)
        best, count = min(best, time.perf_counter() - start), count + 1
    return best * 1e3


def main() -> None:
    """Export both forms of every size and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.models:
        built = build(recipe.resolve(name))
        inputs = built.random_inputs(0)
        with tempfile.TemporaryDirectory() as folder:
            training = export(built.model, inputs, Path(folder) / "training")
            fused = reparameterize(built.model, tuple(inputs.values())).model
            deploy = export(fused, inputs, Path(folder) / "deploy")
            convs = [Counter(n.op_type for n in onnx.load(path).graph.node)["Conv"] for path in (training, deploy)]
            sizes = [path.stat().st_size / 1e6 for path in (training, deploy)]
            forms = [session(path, arguments.threads) for path in (training, deploy)]
        feeds = {key: value.numpy() for key, value in inputs.items()}
        taken: list[list[float]] = [[], []]
        for turn in range(arguments.rounds):
            for index in (0, 1) if turn % 2 == 0 else (1, 0):
                taken[index].append(timed(forms[index], feeds))
        gain = ratio(taken[1], taken[0])
        print(
            f"{name}: latency, deploy / training form: {gain}; "
            f"convolutions {convs[0]} -> {convs[1]}, file {sizes[0]:.1f} -> {sizes[1]:.1f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
