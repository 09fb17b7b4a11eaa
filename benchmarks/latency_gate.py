"""How often the gate says what is true: the same bundle twice, and slow-downs that were planted.

python benchmarks/latency_gate.py --times 20 --planted 0 0.10
python benchmarks/latency_gate.py --times 20 --noise 2
python benchmarks/latency_gate.py --simulate 400

Prints for each planted slow-down the verdicts so far, how many of the intervals hold the true ratio, and how many
exclude 1.0. With --noise so many other processes compute and sort at the same time. With --simulate nothing is
measured: the verdicts are on simulated times under noise of several kinds, see benchmarks/noise.py, and both kinds of
intervals are counted.
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
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import edgeattn
from benchmarks.noise import MODELS, bootstrap, coverage, job, ordered
from benchmarks.planted import slower
from edgeattn.profile.gate import LEAST, MARGIN, Verdict, gate

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


def once(base: Path, head: Path, threads: int) -> Verdict:
    """A job of the gate, also where both are the same bundle."""
    return gate(base, head, threads=threads, always=True)


def simulated(times: int) -> None:
    """Verdicts on simulated jobs, and how many intervals hold the truth."""
    for name, noise in MODELS.items():
        for share in (0.0, 0.10):
            found = [job(noise, 1 + share, seed) for seed in range(times)]
            rounds = sum(each.ratio.rounds for each in found if each.ratio) / times
            verdicts = dict(Counter(each.verdict for each in found))
            print(f"{name}, {share:+.0%}: {verdicts}; {rounds:.0f} rounds on average", flush=True)
        for rounds in (LEAST, 16):
            ours, usual = (coverage(ends, noise, times, rounds) for ends in (ordered, partial(bootstrap, draws=500)))
            print(f"{name}, {rounds} rounds: {ours:.1%} of the gate's intervals hold the truth, {usual:.1%} of a")
            print("  paired bootstrap's", flush=True)


def main() -> None:
    """Measure or simulate, and print how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--noise", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", default="fmvit-digits")
    parser.add_argument("--planted", type=float, nargs="*", default=[0.0, 0.03, 0.10])
    parser.add_argument("--simulate", type=int, metavar="JOBS", help="of each kind of noise; nothing is measured")
    options = parser.parse_args()
    if options.simulate:
        simulated(options.simulate)
        return
    with tempfile.TemporaryDirectory() as folder, busy(options.noise):
        bundle = edgeattn.export(options.recipe, output=Path(folder)).path
        for share in options.planted:
            other = slower(bundle, Path(folder, f"{share}"), share) if share else bundle
            found: list[Verdict] = []
            begun = time.monotonic()
            for number in range(options.times):
                start = time.monotonic()
                found.append(once(bundle, other, options.threads))
                counts = dict(Counter(each.verdict for each in found))
                print(f"  {share:+.0%} {number + 1:2}: {told(found[-1])}; {time.monotonic() - start:.0f} s; {counts}")
                sys.stdout.flush()
            true = 1 + share
            ratios = [each.ratio for each in found if each.ratio]
            held = sum(r.low <= true <= r.high for r in ratios)
            apart = sum(not r.low <= 1 <= r.high for r in ratios)
            width = sorted(r.high / r.low - 1 for r in ratios)[len(ratios) // 2] if ratios else float("nan")
            print(
                f"planted {share:+.0%}, {options.noise} other processes: {held} of {len(ratios)} intervals hold "
                f"{true:.2f}, {apart} exclude 1.00; median width {width:.1%}; verdicts at {MARGIN:.0%}: "
                f"{dict(Counter(each.verdict for each in found))}; "
                f"{(time.monotonic() - begun) / len(found):.0f} s each",
                flush=True,
            )


def told(verdict: Verdict) -> str:
    """A verdict in a line."""
    parts = [verdict.verdict]
    for name, ratio in (("", verdict.ratio), ("itself ", verdict.self_check)):
        parts += [f"{name}{ratio.value:.3f} [{ratio.low:.3f}-{ratio.high:.3f}], {ratio.rounds} rounds"] if ratio else []
    return ", ".join(parts if verdict.ratio else [*parts, verdict.why])


if __name__ == "__main__":
    main()
