"""Which of 25 timm architectures a target takes: exported by the real pipeline, compared with PyTorch, timed.

python benchmarks/timm_table.py --target tflite [--precision fp32] [--write docs/timm-tflite.md] [NAME ...]

Weights are random; every export is a process of its own. A line that fails gives the exporter's own reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ARCHITECTURES = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "seresnet50",
    "densenet121",
    "vgg11_bn",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "mobilenetv4_hybrid_medium",
    "efficientnet_b0",
    "regnety_008",
    "repvgg_a0",
    "repvit_m0_9",
    "fastvit_t8",
    "mobileone_s0",
    "ghostnet_100",
    "convnext_atto",
    "poolformer_s12",
    "edgenext_xx_small",
    "mobilevit_s",
    "efficientformer_l1",
    "levit_128s",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "nextvit_small",
)


def export(name: str, target: str, precision: str) -> dict[str, Any]:
    """Export one architecture; its figures, or the reason why not."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.executable,
            "-m",
            "edgeattn",
            "export",
            f"timm:{name}",
            "-t",
            target,
            "-p",
            precision,
            "-o",
            folder,
        ]
        begun = time.perf_counter()
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
        except subprocess.TimeoutExpired:
            return {"name": name, "code": None, "why": "took more than 900 s"}
        seconds = time.perf_counter() - begun
        manifests = list(Path(folder).glob("*/manifest.json"))
        if done.returncode or not manifests:
            said = [line.strip() for line in done.stderr.splitlines()]
            told = [line for line in said if line.startswith(("error:", "value", "for comparison:"))] or said[-3:]
            why = "; ".join(" ".join(line.split()) for line in told)[:400]
            return {"name": name, "code": done.returncode, "why": why, "seconds": seconds}
        manifest = json.loads(manifests[0].read_text())
        size = sum(i["size"] for n, i in manifest["files"].items() if n == manifest["entries"]["main"]["file"])
    samples = [s for key, s in manifest["numerics"].items() if key != "reference"]
    facts = manifest["facts"]["entries"]["main"]
    return {
        "name": name,
        "code": 0,
        "relative_l2": max(n["relative_l2"] for sample in samples for n in sample.values()),
        "nodes": sum(facts["nodes"].values()),
        "transposes": len(facts["transposes"]) if "transposes" in facts else facts["nodes"].get("Transpose", 0),
        "mb": size / 1e6,
        "seconds": seconds,
        "lint": sorted({f["rule"] for f in manifest["lint"]}),
    }


def table(rows: list[dict[str, Any]], target: str, precision: str) -> str:
    """The rows in Markdown."""
    held = sum(row["code"] == 0 for row in rows)
    lines = [
        f"# timm architectures on target {target}, {precision}",
        "",
        f"{held} of {len(rows)} hold. Random weights; relative L2 against the model as timm builds it, in float32.",
        f"Made by `python benchmarks/timm_table.py --target {target} --precision {precision}`.",
        "",
        "| architecture | relative L2 | nodes | transposes | MB | seconds | lint, or why not |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["code"] == 0:
            figures = f"{row['relative_l2']:.1e} | {row['nodes']} | {row['transposes']} | {row['mb']:.1f}"
            lines.append(f"| {row['name']} | {figures} | {row['seconds']:.0f} | {', '.join(row['lint'])} |")
        else:
            why = row["why"].replace("|", "/")
            lines.append(f"| {row['name']} | exit {row['code']} | | | | {row.get('seconds', 900):.0f} | {why} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Export all, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--target", default="tflite")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.names:
        rows.append(export(name, options.target, options.precision))
        print(json.dumps(rows[-1]), flush=True)
        if options.write:
            options.write.write_text(table(rows, options.target, options.precision))
    print(table(rows, options.target, options.precision))


if __name__ == "__main__":
    main()
