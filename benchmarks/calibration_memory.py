"""Peak memory of calibrating with many samples against few, from every source.

    python benchmarks/calibration_memory.py [--model fmvit-digits] [--batch 25] [--few 100] [--samples 10000]
        [--sources npy npz packed folder function]

Each run is a process of its own: the deploy form is built, the samples are streamed through it, and every module's
output is observed for the coverage report. The samples are random images of the model's own size, the same ones in all
sources; ``packed`` is a compressed .npz. Ends with an error if a ratio is above 1.10.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.measure import peak_mb

SOURCES = ("npy", "npz", "packed", "folder", "function")
MOST = 1.10


def images(count: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Random pixels (C, H, W) in uint8, of a brightness of their own."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.integers(0, rng.integers(64, 256), shape, dtype=np.uint8)


def write(source: str, count: int, shape: tuple[int, ...], folder: Path) -> str:
    """Write the samples, and say where they are."""
    if source == "function":
        path = folder / f"function_{count}.py"
        path.write_text(
            "import sys\n"
            f"sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})\n"
            "from benchmarks.calibration_memory import images\n"
            "def make():\n"
            f"    return (image.astype('float32') / 127.5 - 1 for image in images({count}, {shape}))\n"
        )
        return f"{path}:make"
    path = folder / f"{source}-{count}"
    if source == "folder":
        from PIL import Image

        path.mkdir()
        for i, image in enumerate(images(count, shape)):
            pixels = image[0] if shape[0] == 1 else image.transpose(1, 2, 0)
            Image.fromarray(pixels).save(path / f"{i:06}.png")
        return str(path)
    # Raw values in floats, as large as a file of samples gets.
    x = np.stack([image.astype(np.float32) for image in images(count, shape)])
    if source == "npy":
        np.save(f"{path}.npy", x)
        return f"{path}.npy"
    (np.savez_compressed if source == "packed" else np.savez)(f"{path}.npz", x=x)
    return f"{path}.npz"


def calibrate(model: str, batch: int, source: str, count: int) -> None:
    """Stream and observe ``count`` samples: what is measured."""
    from dataclasses import replace

    from edgeattn import recipe
    from edgeattn.models.build import build
    from edgeattn.quant.calibration import CalibrationStream
    from edgeattn.quant.coverage import coverage
    from edgeattn.reparam import reparameterize

    resolved = recipe.resolve(model)
    built = build(resolved)
    form = reparameterize(built.model, tuple(built.random_inputs(0).values())).model.eval()
    inputs = [replace(spec, shape=(batch, *spec.shape[1:])) for spec in built.specs]
    spec = recipe.CalibrationSpec(source=source, samples=count)
    report = coverage(form, CalibrationStream.of_spec(spec, inputs, resolved.recipe.preprocess))
    if report["samples"] != count:
        raise SystemExit(f"{report['samples']} samples, not {count}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fmvit-digits")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--few", type=int, default=100)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--calibrate", nargs=2, metavar=("SOURCE", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.calibrate:
        calibrate(options.model, options.batch, options.calibrate[0], int(options.calibrate[1]))
        return
    from edgeattn import recipe

    shape = recipe.resolve(options.model).recipe.specs()[0].shape[1:]
    size = options.samples * 4 * int(np.prod(shape)) / 1e6
    print(
        f"{options.model}, batches of {options.batch}; {options.samples} samples {shape} are {size:.0f} MB as float32"
    )
    print(f"{'source':10}{f'{options.few} samples':>16}{f'{options.samples} samples':>18}{'ratio':>8}{'time':>10}")
    worst = 0.0
    for source in options.sources:
        peaks = []
        with tempfile.TemporaryDirectory() as folder:
            for count in (options.few, options.samples):
                place = write(source, count, shape, Path(folder))
                own = ["--model", options.model, "--batch", str(options.batch), "--calibrate", place, str(count)]
                start = time.perf_counter()
                peaks.append(peak_mb([sys.executable, __file__, *own]))
        took = time.perf_counter() - start
        worst = max(worst, peaks[1] / peaks[0])
        print(f"{source:10}{peaks[0]:13.1f} MB{peaks[1]:15.1f} MB{peaks[1] / peaks[0]:7.3f}x{took:8.0f} s", flush=True)
    if worst > MOST:
        raise SystemExit(f"more than {MOST:.2f}x")


if __name__ == "__main__":
    main()
