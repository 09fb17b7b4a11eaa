"""Our engine build against a bare parser and builder script on the same ONNX file: wall time of whole processes.

    python benchmarks/trt_build.py [--model fmvit-s] [--precision fp16] [--rounds 9]

The typed graph is made beforehand by a real export. Ours: ``targets.tensorrt.engine.Builder`` in a fresh process, which
parses, reads the network back and builds. Bare: the fewest calls of TensorRT for RTX that give an engine. Turns are
interleaved. Both build the portable engine on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import ratio, seconds

OURS = """
import sys
from pathlib import Path
from edgeattn.targets import get
from edgeattn.targets.tensorrt.engine import Builder
file, precision = Path(sys.argv[1]), sys.argv[2]
builder = Builder(file, "rtx")
builder.parse()
plan = builder.build("portable", precision, get("tensorrt").settle({}, None), {}).plan
Path(sys.argv[3]).write_bytes(plan)
"""

BARE = """
import sys
import tensorrt_rtx as trt
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
        times: dict[str, list[float]] = {"ours": [], "bare": []}
        for number in range(arguments.rounds):
            for which, script in (("ours", OURS), ("bare", BARE)):
                engine = str(Path(name, f"{which}.engine"))
                times[which].append(seconds([sys.executable, "-c", script, file, arguments.precision, engine]))
            print(f"round {number + 1}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in times.items()), flush=True)
        sizes = [Path(name, f"{which}.engine").stat().st_size for which in times]
    print(f"ours / bare: {ratio(times['ours'], times['bare'])}; engines of {sizes[0]} and {sizes[1]} bytes")


if __name__ == "__main__":
    main()
