"""Our engine build against a bare parser and builder script on the same ONNX file.

    python benchmarks/trt_build.py [--model fmvit-s] [--precision fp16] [--rounds 9]

The typed graph is made beforehand by a real export. Ours: ``targets.tensorrt.engine.Builder`` in a fresh process, which
parses, reads the network back and builds. Bare: the fewest calls of TensorRT for RTX that give an engine. Turns are
interleaved. Both build the portable engine on the CPU. Two ratios: of the build, from an imported TensorRT to the file;
and of the whole processes, in which ours also imports NumPy and what a target is made of.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import ratio, seconds

OURS = """
import sys, time
from pathlib import Path
import tensorrt_rtx
from edgeattn.targets import get
from edgeattn.targets.tensorrt.engine import Builder
begun = time.perf_counter()
file, precision = Path(sys.argv[1]), sys.argv[2]
builder = Builder(file, "rtx")
builder.parse()
plan = builder.build("portable", precision, get("tensorrt").settle({}, None), {}).plan
Path(sys.argv[3]).write_bytes(plan)
print(time.perf_counter() - begun)
"""

BARE = """
import sys, time
import tensorrt_rtx as trt
begun = time.perf_counter()
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1])
config = builder.create_builder_config()
if sys.argv[2] == "fp32":
    config.clear_flag(trt.BuilderFlag.TF32)
with open(sys.argv[3], "wb") as handle:
    handle.write(builder.build_serialized_network(network, config))
print(time.perf_counter() - begun)
"""


def main() -> None:
    """Run the rounds and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fmvit-s")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        words = ["-t", "tensorrt", "-p", arguments.precision, "-o", name]
        seconds([sys.executable, "-m", "edgeattn", "export", arguments.model, *words])
        file = str(next(Path(name).glob("*/model.onnx")))
        builds: dict[str, list[float]] = {"ours": [], "bare": []}
        processes: dict[str, list[float]] = {"ours": [], "bare": []}
        for number in range(arguments.rounds):
            for which, script in (("ours", OURS), ("bare", BARE)):
                engine = str(Path(name, f"{which}.engine"))
                command = [sys.executable, "-c", script, file, arguments.precision, engine]
                begun = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                processes[which].append(time.perf_counter() - begun)
                builds[which].append(float(done.stdout.split()[-1]))
            print(f"round {number + 1}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in builds.items()), flush=True)
        sizes = [Path(name, f"{which}.engine").stat().st_size for which in builds]
    print(f"build, ours / bare: {ratio(builds['ours'], builds['bare'])}")
    print(f"process, ours / bare: {ratio(processes['ours'], processes['bare'])}")
    print(f"engines of {sizes[0]} and {sizes[1]} bytes")


if __name__ == "__main__":
    main()
