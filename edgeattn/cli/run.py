"""``edgeattn run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeattn.cli._options import read_feeds

if TYPE_CHECKING:
    from edgeattn.core.numerics import Array
    from edgeattn.targets.base import Artifact, Runtime


@click.command("run", short_help="Run a bundle or an artifact on your own data.")
@click.argument("path", type=click.Path())
@click.option("--input", "-i", "inputs", multiple=True, metavar="NAME=FILE.npy", help="An input; once for each.")
@click.option("--entry", "-e", help="Which graph or function. [default: main, or the only one]")
@click.option("--output", "-o", default=".", type=click.Path(), help="Folder for output.NAME.npy.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(path: str, inputs: tuple[str, ...], entry: str | None, output: str, as_json: bool) -> None:
    """Run PATH once on this machine: a bundle, or an .onnx, .tflite or .mlpackage, whoever made it.

    Inputs are .npy files of the dtype and shape that PATH takes; outputs are written as output.NAME.npy. A Core ML
    package runs in EdgeAttn's own interpreter of ML programs, on any system.

    \b
      edgeattn run fmvit-digits.coreml.fp16 --input x=data.npy
      edgeattn run Model.mlpackage --input x=data.npy
    """
    import json

    import numpy as np

    from edgeattn.cli._show import console, table
    from edgeattn.core.files import check_writable

    artifact, runtime, about = _open(Path(path))
    name = entry or ("main" if "main" in artifact.entries else next(iter(artifact.entries)))
    feeds = read_feeds(inputs, "--input")
    folder = Path(output)
    check_writable(folder)
    results = runtime.run(name, feeds)
    saved: dict[str, dict[str, Any]] = {}
    for key, value in results.items():
        file = folder / f"output.{key.replace('/', '_')}.npy"
        np.save(file, value)
        saved[key] = {"file": str(file), "shape": list(value.shape), "dtype": str(value.dtype), **_figures(value)}
    if as_json:
        click.echo(json.dumps({"path": path, "entry": name, "runtime": about, "outputs": saved}, indent=1))
        return
    out = console()
    rows = table("output", "shape", "dtype", "lowest", "highest", "mean", "file", right=("lowest", "highest", "mean"))
    for key, info in saved.items():
        figures = [f"{info[f]:.4g}" if f in info else "" for f in ("lowest", "highest", "mean")]
        rows.add_row(key, str(tuple(info["shape"])), info["dtype"], *figures, info["file"])
    out.print(rows)
    out.print()
    out.print(f"{path}, entry {name}: {about}", markup=False)


def _open(path: Path) -> tuple[Artifact, Runtime, str]:
    """The artifact at a path, what runs it here, and that in words."""
    from edgeattn import targets
    from edgeattn.bundle import Bundle

    for target in map(targets.get, targets.names()):
        artifact = target.adopt(path)
        if artifact is not None:
            return artifact, target.open(artifact), target.unproven or f"run as a {target.name} artifact"
    bundle = Bundle.open(path)
    target = targets.get(bundle.manifest.backend)
    artifact = bundle.artifact()
    proven = ", ".join(f"{r.name} {r.version}" for r in bundle.manifest.runtimes)
    return artifact, target.open(artifact), target.unproven or f"run by {proven}"


def _figures(value: Array) -> dict[str, float]:
    if value.dtype.kind not in "fiu" or not value.size:
        return {}
    return {"lowest": float(value.min()), "highest": float(value.max()), "mean": float(value.mean())}
