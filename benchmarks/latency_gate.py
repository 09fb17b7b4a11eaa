"""How often a measured ratio says what is true: the same bundle twice, and slow-downs that were planted.

python benchmarks/latency_gate.py --times 20
python benchmarks/latency_gate.py --times 20 --noise 2

Prints for each planted slow-down how many of the intervals hold the true ratio, how many exclude 1.0, and the verdicts
with a margin of 5 %. With --noise so many other processes compute and sort at the same time.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import edgeattn
from benchmarks.planted import slower
from edgeattn.profile.measure import Effort, Job, Session
from edgeattn.profile.statistics import Ratio, paired_ratio
from edgeattn.profile.transports.local import Local

MARGIN = 0.05
NOISE = "import random\nwhile True:\n    sorted(random.random() for _ in range(200000))\n"


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Other processes on the machine, while this lasts."""
    others = [subprocess.Popen([sys.executable, "-c", NOISE]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def once(a: Path, b: Path, threads: int) -> Ratio:
    """The ratio of two bundles, measured as ``edgeattn profile A B`` does."""
    jobs = [Job(path, "onnx", "main", threads) for path in (a, b)]
    session = Session(jobs, Local(), Effort(operations=False))
    session.run()
    return paired_ratio(*(one.blocks for one in session.done))


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--noise", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", default="fmvit-digits")
    parser.add_argument("--planted", type=float, nargs="*", default=[0.0, 0.03, 0.10])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, busy(options.noise):
        bundle = edgeattn.export(options.recipe, output=Path(folder)).path
        for share in options.planted:
            other = slower(bundle, Path(folder, f"{share}"), share) if share else bundle
            found: list[Ratio] = []
            begun = time.monotonic()
            for number in range(options.times):
                found.append(once(bundle, other, options.threads))
                print(
                    f"  {share:+.0%} {number + 1:2}: {found[-1].value:.3f} [{found[-1].low:.3f}-{found[-1].high:.3f}]"
                )
            true = 1 + share
            held = sum(r.low <= true <= r.high for r in found)
            apart = sum(not r.low <= 1 <= r.high for r in found)
            verdicts = Counter(r.verdict(MARGIN) for r in found)
            width = sorted(r.high / r.low - 1 for r in found)[len(found) // 2]
            print(
                f"planted {share:+.0%}, {options.noise} other processes: {held} of {len(found)} intervals hold "
                f"{true:.2f}, {apart} exclude 1.00; median width {width:.1%}; verdicts at {MARGIN:.0%}: "
                f"{dict(verdicts)}; {(time.monotonic() - begun) / len(found):.0f} s each",
                flush=True,
            )


if __name__ == "__main__":
    main()
