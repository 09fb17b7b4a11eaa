"""Engines on a GPU against torch eager, torch.compile and CUDA graphs, on the same deploy-form model.

    python benchmarks/trt_gpu.py [--models fmvit-t fmvit-s] [--precision fp16] [--rounds 7] [--write FILE]

Needs a GPU, NVIDIA's driver, TensorRT for RTX and a CUDA build of torch: nobody has run it yet, and no figure of it is
in the documentation. Each round asks a fresh process of ``run.py --profile`` and one of torch in turns, so that both
meet the same clocks; every figure is a median of kernels' time by CUDA events, and the numbers are compared first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import ratio

#: What stands against the engine, by name.
YARDSTICKS = ("eager", "CUDA graph", "compile")

TORCH = """
import json, statistics, sys, torch
from edgeattn import recipe
from edgeattn.models.build import build
from edgeattn.reparam import reparameterize
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
built = build(recipe.resolve(sys.argv[1]))
inputs = tuple(built.random_inputs(0).values())
model = reparameterize(built.model, inputs).model.cuda()
dtype = torch.float32 if sys.argv[2] == "fp32" else torch.float16
model, inputs = model.to(dtype), tuple(x.cuda().to(dtype) for x in inputs)

def median(work):
    for _ in range(20):
        work()
    times = []
    for _ in range(200):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(); work(); end.record(); end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)

with torch.no_grad():
    found = {"eager": median(lambda: model(*inputs))}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            model(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(*inputs)
    found["CUDA graph"] = median(graph.replay)
    compiled = torch.compile(model)
    found["compile"] = median(lambda: compiled(*inputs))
print(json.dumps({**found, "torch": torch.__version__}))
"""


def answer(command: list[str]) -> dict[str, Any]:
    """What a process says as JSON on its last line, or altogether.

    Raises:
        SystemExit: it failed; says what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        sys.exit(done.returncode)
    text = done.stdout if done.stdout.lstrip().startswith("{\n") else done.stdout.strip().splitlines()[-1]
    return dict(json.loads(text))


def measure(model: str, precision: str, rounds: int, folder: str) -> list[str]:
    """Lines of the table for one model."""
    export = [sys.executable, "-m", "edgeattn", "export", model, "-t", "tensorrt", "-p", precision, "-o", folder, "-f"]
    subprocess.run(export, check=True)
    bundle = next(Path(folder).glob(f"{model}*.tensorrt.{precision}"))
    ours: dict[str, list[float]] = {"engine": [], "engine, CUDA graph": []}
    theirs: dict[str, list[float]] = {name: [] for name in YARDSTICKS}
    about: dict[str, Any] = {}
    for number in range(rounds):
        profile = answer([sys.executable, str(bundle / "run.py"), "--profile", "--json"])
        for name in ours:
            ours[name].append(profile["events"].get(name, profile["events"]["engine"])["p50"])
        torch = answer([sys.executable, "-c", TORCH, model, "fp32" if precision == "fp32" else "fp16"])
        for name in theirs:
            theirs[name].append(torch[name])
        about = {key: profile[key] for key in ("gpu", "driver", "tensorrt", "engine")} | {"torch": torch["torch"]}
        print(
            f"{model} round {number + 1}: {ours['engine'][-1]:.3f} ms, eager {theirs['eager'][-1]:.3f} ms", flush=True
        )
    where = ", ".join(f"{key} {value}" for key, value in about.items())
    lines = [f"{model} {precision}, {datetime.date.today()}: {where}, {rounds} interleaved rounds"]
    for mine, times in ours.items():
        lines += [f"  {mine} / torch {name}: {ratio(times, each)}" for name, each in theirs.items()]
    return lines


def main() -> None:
    """Measure all models; print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["fmvit-t", "fmvit-s"])
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            lines += measure(model, arguments.precision, arguments.rounds, folder)
    print("\n".join(lines))
    if arguments.write:
        arguments.write.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
