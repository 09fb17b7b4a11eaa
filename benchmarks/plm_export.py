"""What exporting PLM-1.8B takes: time, peak memory against the checkpoint in float32, and that the bundle makes tokens.

Without ``--checkpoint`` the weights are random.

    python benchmarks/plm_export.py [--precisions w4 w8] [--checkpoint DIR]

Every stage runs in a process of its own; its peak is the largest of them. Needs 16 GB of memory and 20 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

#: Bytes of the weights in float32.
CHECKPOINT = 4 * 1_825_458_176


def edgeattn(*words: str) -> str:
    """Run a command of ours, its progress shown; what it says on standard output."""
    done = subprocess.run([sys.executable, "-m", "edgeattn", *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"edgeattn {' '.join(words)}: exit code {done.returncode}")
    return done.stdout


def run(precision: str, checkpoint: str | None, folder: Path) -> None:
    """Export, and make a few tokens."""
    words = ["export", "plm-1.8b", "--target", "onnx", "--precision", precision, "--output", str(folder)]
    edgeattn(*words, *(["--checkpoint", checkpoint] if checkpoint else []))
    (bundle,) = folder.glob(f"plm-1.8b*.onnx.{precision}")
    manifest = json.loads((bundle / "manifest.json").read_text())
    peak = max(stage["peak_mb"] for stage in manifest["stages"])
    weights = sum(info["size"] for name, info in manifest["files"].items() if name.startswith("model.onnx"))
    said = json.loads(edgeattn("generate", str(bundle), "--prompt", "Return a new", "--max-tokens", "16", "--json"))
    print(
        f"{precision}: {sum(stage['seconds'] for stage in manifest['stages']):.0f} s, peak {peak / 1e3:.2f} GB, "
        f"{peak * 1e6 / CHECKPOINT:.2f} times the checkpoint in float32; {weights / 1e9:.2f} GB on disk; "
        f"perplexity ratio {manifest['decoding']['perplexity_ratio']:.4f}"
    )
    print(json.dumps({key: value for key, value in said.items() if not isinstance(value, (list, str))}))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=["w4", "w8"])
    parser.add_argument("--checkpoint", help="the released folder, in place of random weights")
    options = parser.parse_args()
    for precision in options.precisions:
        with tempfile.TemporaryDirectory() as name:
            run(precision, options.checkpoint, Path(name))


if __name__ == "__main__":
    main()
