"""Which timm architectures a target takes: exported by the real pipeline, compared with PyTorch, timed.

python benchmarks/timm_table.py -t tflite [-p fp32 ...] [-O NAME=CHOICE ...] [--photographs] [--write FILE] [NAME ...]

Weights are random; every export is a process of its own. A line that fails gives the exporter's own reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
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

#: For photographs in several variants: small ones, one a family, most of them with attention.
SMALL = (
    "resnet18",
    "densenet121",
    "mnasnet_small",
    "regnety_004",
    "repvgg_a0",
    "mobileone_s0",
    "vgg11",
    "convnext_atto",
    "inception_next_atto",
    "poolformer_s12",
    "edgenext_xx_small",
    "repvit_m0_9",
    "fastvit_t8",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "efficientformer_l1",
    "efficientvit_b0",
    "levit_128s",
    "nextvit_small",
    "pvt_v2_b0",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
    "xcit_nano_12_p16_224",
    "cait_xxs24_224",
    "resmlp_12_224",
    "gmlp_ti16_224",
    "mixer_s32_224",
    "pit_ti_224",
    "coat_lite_tiny",
    "visformer_tiny",
)


@dataclass(frozen=True)
class Variant:
    """What every architecture is exported to: a target, a precision, and one of the target's options or ""."""

    target: str
    precision: str
    option: str

    def words(self) -> list[str]:
        """On the command line."""
        return ["-t", self.target, "-p", self.precision, *(["-O", self.option] if self.option else [])]

    def __str__(self) -> str:
        return f"{self.target} {self.precision}{f', {self.option}' if self.option else ''}"


def photographs(name: str, folder: Path) -> str:
    """Write a recipe for an architecture whose golden inputs are scikit-learn's two photographs; its path."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    from edgeattn.models.build import import_timm

    timm = import_timm()
    cfg = timm.get_pretrained_cfg(name)
    channels, height, width = cfg.input_size
    images = [Image.fromarray(image).resize((width, height)) for image in load_sample_images().images]
    np.savez(folder / "photographs.npz", x=np.stack([np.asarray(i).transpose(2, 0, 1) for i in images]))
    (folder / "recipe.toml").write_text(
        f'name = "{name}"\n[model]\nfactory = "timm:{name}"\n[inputs.x]\nshape = [1, {channels}, {height}, {width}]\n'
        f"[preprocess]\nscale = {1 / 255}\nmean = {list(cfg.mean)}\nstd = {list(cfg.std)}\n"
        '[heldout]\nfile = "photographs.npz"\ngolden = 2\n'
    )
    return str(folder / "recipe.toml")


def export(name: str, variant: Variant, real: bool) -> dict[str, Any]:
    """Export one architecture; its figures, or the reason why not."""
    with tempfile.TemporaryDirectory() as folder:
        model = photographs(name, Path(folder)) if real else f"timm:{name}"
        words = [sys.executable, "-m", "edgeattn", "export", model, "-o", folder, *variant.words()]
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
        file = manifest["entries"]["main"]["file"]
        size = sum(i["size"] for n, i in manifest["files"].items() if n == file or n.startswith(f"{file}/"))
    samples = [s for key, s in manifest["numerics"].items() if key != "reference"]
    facts = manifest["facts"]["entries"]["main"]
    transposes = facts["nodes"].get("Transpose", 0) + facts["nodes"].get("transpose", 0)
    return {
        "name": name,
        "code": 0,
        "relative_l2": max(n["relative_l2"] for sample in samples for n in sample.values()),
        "nodes": sum(facts["nodes"].values()),
        "transposes": len(facts["transposes"]) if "transposes" in facts else transposes,
        "mb": size / 1e6,
        "seconds": seconds,
        "lint": sorted({f["rule"] for f in manifest["lint"] if f["severity"] != "note"}),
    }


def table(rows: list[dict[str, Any]], variant: Variant, real: bool) -> str:
    """The rows of one variant in Markdown."""
    held = sum(row["code"] == 0 for row in rows)
    golden = "scikit-learn's two photographs" if real else "random inputs"
    lines = [
        f"## {variant}",
        "",
        f"{held} of {len(rows)} hold. Random weights, {golden}; relative L2 against the model as timm builds it, in "
        "float32.",
        f"Made by `python benchmarks/timm_table.py {' '.join(variant.words())}{' --photographs' * real}`.",
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
    parser.add_argument("names", nargs="*")
    parser.add_argument("--target", "-t", default="tflite")
    parser.add_argument("--precision", "-p", nargs="+", default=["fp32"])
    parser.add_argument("--option", "-O", nargs="+", default=[""], help="of the target; each in a table of its own")
    parser.add_argument("--photographs", action="store_true", help="real images as inputs")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    variants = [Variant(options.target, p, o) for o in options.option for p in options.precision]
    rows: dict[Variant, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for name in options.names or (SMALL if options.photographs else ARCHITECTURES):
        for variant in variants:
            rows[variant].append(export(name, variant, options.photographs))
            print(variant, json.dumps(rows[variant][-1]), flush=True)
        page = [f"# timm architectures on target {options.target}", ""]
        page += [table(rows[variant], variant, options.photographs) for variant in variants]
        if options.write:
            options.write.write_text("\n".join(page))


if __name__ == "__main__":
    main()
