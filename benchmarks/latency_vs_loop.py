"""Our p50 beside that of a bare loop around ONNX Runtime, on the same file, in turns.

python benchmarks/latency_vs_loop.py

The bare loop is what benchmark programs do: a session, inputs, and nothing but the call between two looks at the clock.
Each round starts a fresh process of both, whose blocks of 30 ms take turns, there and back; its ratio is the median of
those of neighbouring blocks. onnxruntime_perf_test is not in ONNX Runtime's wheels; where it is on the PATH it is
measured as well.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import edgeattn
from benchmarks.measure import ratio
from edgeattn.profile.measure import Effort, Job, Session
from edgeattn.profile.transports.local import Local

#: Run by a process of its own: waits for a line, then times runs for so many seconds and prints their median in ms.
LOOP = """
import json, sys, time, numpy as np, onnxruntime as ort
file, golden, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = ort.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = threads, 3
session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
with np.load(golden) as data:
    feeds = {key[3:]: data[key] for key in data.files if key.startswith("in.")}
names = [output.name for output in session.get_outputs()]
run, clock = session.run, time.perf_counter
begun = clock()
while clock() - begun < 0.5:
    run(names, feeds)
print("ready", flush=True)
for line in sys.stdin:
    times, seconds, begun = [], float(line), clock()
    while clock() - begun < seconds or len(times) < 3:
        start = clock()
        run(names, feeds)
        times.append(clock() - start)
    print(json.dumps(sorted(times)[len(times) // 2] * 1e3), flush=True)
"""


def one_round(bundle: Path, threads: int, blocks: int) -> tuple[float, float]:
    """Median of the runner's blocks, and that over the median of the ratios to the bare loop's neighbouring ones."""
    golden = sorted((bundle / "golden").glob("main-*.npz"))[0]
    words = [sys.executable, "-c", LOOP, str(bundle / "model.onnx"), str(golden), str(threads)]
    with Local().hold([bundle]) as start:
        ours = start(bundle, ["--profile", "--entry", "main", "--threads", str(threads), "--paced"])
        ours.ready()
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as loop:
            assert loop.stdin is not None
            assert loop.stdout is not None
            loop.stdout.readline()
            found: tuple[list[float], list[float]] = ([], [])
            for block in range(blocks):
                for which in (0, 1) if block % 2 == 0 else (1, 0):
                    if which == 0:
                        found[0].append(statistics.median(ours.ask("times", seconds=0.03, least=3)))
                    else:
                        loop.stdin.write("0.03\n")
                        loop.stdin.flush()
                        found[1].append(json.loads(loop.stdout.readline()))
            loop.stdin.close()
        ours.finish()
    # Neighbouring blocks have met the same machine.
    pairs = [a / b for a, b in zip(*found, strict=True)]
    return statistics.median(found[0]), statistics.median(found[0]) / statistics.median(pairs)


def perf_test(tool: str, file: Path, threads: int) -> float:
    """Median in ms by ONNX Runtime's own program."""
    command = [tool, "-e", "cpu", "-I", "-m", "times", "-r", "500", "-x", str(threads), str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"P50 Latency:\s*([0-9.e-]+)\s*s", said)
    assert found, said
    return float(found[1]) * 1e3


def main() -> None:
    """Measure, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", nargs="*", default=["fmvit-digits", "fmvit-t"])
    options = parser.parse_args()
    tool = shutil.which("onnxruntime_perf_test")
    with tempfile.TemporaryDirectory() as folder:
        for recipe in options.recipe:
            bundle = edgeattn.export(recipe, output=Path(folder)).path
            rounds = [one_round(bundle, options.threads, options.blocks) for _ in range(options.rounds)]
            ours, theirs = zip(*rounds, strict=True)
            print(f"{recipe}: p50 {statistics.median(ours):.4g} ms, bare loop {statistics.median(theirs):.4g} ms")
            print(f"  ours / bare loop {ratio(ours, theirs)}", flush=True)
            session = Session([Job(bundle, "onnx", "main", options.threads)], Local(), Effort(operations=False))
            session.run()
            clock = max(ready["clock_ms"] for ready in session.done[0].ready)
            print(f"  timing an empty run takes {clock * 1e6:.0f} ns, {clock / statistics.median(ours):.3%} of the p50")
            if tool:
                theirs = tuple(perf_test(tool, bundle / "model.onnx", options.threads) for _ in rounds)
                print(f"  ours / onnxruntime_perf_test {ratio(ours, theirs)}")


if __name__ == "__main__":
    main()
