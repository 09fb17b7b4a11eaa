"""What ConvShareViT would take on a 4f correlator, by the cost model, against the same model on this machine.

    python benchmarks/optical_vs_digital.py [--models convsharevit-v2 ...] [--batches 1 8 64] [--rounds 7]
        [--device optical-4f-4k-2mhz] [--baseline SECONDS]

The paper (arXiv 2504.11517) says up to 3.04 times faster than a GPU. That figure is its own, and theoretical; which
GPU, batch, plane and frame rate are behind it, and how the model was sized, we do not know. Nothing here reproduces it:
models are our reconstruction, optical times are computed from a device file's figures and not measured, and digital
times are this machine's. What is printed is our own ratio under assumptions that are stated, and which frame rates
would give 3.04 against the digital time measured here, or against one that is given.

Digital: ONNX Runtime with the deploy form, with and without shared convolutions made matrices, whichever is faster; one
thread, and one a core. On a GPU, where there is one: PyTorch, eager, CUDA events, float32 and float16, which is not the
most that a GPU can do. Electronics of the optical program (all between two optical operations) run under ONNX Runtime
too and are measured in the same turns, so that "optics and electronics" is optics as computed and electronics as
measured, one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnxruntime as ort
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.fusion_gain import session
from benchmarks.measure import ratio
from benchmarks.optical_layer import typical
from edgeattn import device, recipe, targets
from edgeattn.capture import capture
from edgeattn.device import Device, Optics
from edgeattn.models.build import build
from edgeattn.reparam import reparameterize
from edgeattn.reparam.engine import RULES
from edgeattn.targets.base import LowerPlan
from edgeattn.targets.onnx_graph.export import export
from edgeattn.targets.onnx_graph.files import save
from edgeattn.targets.optical.cost import cost, plans_of
from edgeattn.targets.optical.lower import operations
from edgeattn.targets.optical.partition import turns
from edgeattn.targets.optical.program import OpticalProgram

MODELS = ["convsharevit-v1", "convsharevit-v2", "convsharevit-v3"]
#: The paper's figure; see above what it is not.
PAPER = 3.04
PLANES, BATCHES, RATES = (512, 1024, 2160, 4096), (1, 4, 16, 64, 256, 1024, 4096), (1e3, 1e7)
Call = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """What of a program the cost model needs, for one image.

    Attributes:
        works, signed: of the optical operations. ops: electronic operations.
    """

    works: list[Any]
    signed: list[bool]
    ops: int

    def cost(self, optics: Optics, batch: int, rate: float | None = None) -> Any:
        """With electronics at ``rate`` operations a second, or without any."""
        plans = plans_of(self.works, self.signed, optics, batch)
        return cost(plans, optics.model_copy(update={"electronics_ops_s": rate}), batch, self.ops)


class Forms:
    """A model in its two deploy forms: for processors, and with its shared convolutions left as they are."""

    def __init__(self, name: str, where: Device) -> None:
        self.name, self.where = name, where
        self.built = build(recipe.resolve(name))
        inputs = tuple(self.built.random_inputs(0).values())
        shared = [rule for rule in RULES if rule.name not in targets.get("optical").leaves]
        self.shared = reparameterize(self.built.model, inputs, rules=shared).model
        self.matrices = reparameterize(self.built.model, inputs).model

    def image(self, batch: int) -> torch.Tensor:
        """A seeded random batch."""
        shape = self.built.specs[0].shape
        return torch.randn(batch, *shape[1:], generator=torch.Generator().manual_seed(0))

    def digital(self, batch: int, threads: Sequence[int], folder: Path) -> dict[str, Call]:
        """ONNX Runtime's sessions, each a call."""
        calls = {}
        x = self.image(batch)
        for form, model in (("convolutions", self.shared), ("matrices", self.matrices)):
            place = folder / f"{form}-{batch}"
            place.mkdir()
            program = capture(model, {"x": x}, ("logits",))
            targets.get("onnx").lower(program, LowerPlan("fp32", [], {}), place)
            for count in threads:
                run = session(place / "model.onnx", count)
                calls[f"{form}, {count}"] = lambda run=run: run.run(None, {"x": x.numpy()})
        return calls

    def lowered(self, folder: Path) -> OpticalProgram:
        """The optical program of one image, whose plans are carried out."""
        x = self.image(1)
        plan = LowerPlan("fp32", [{"x": x.numpy()}], {}, device=self.where)
        artifact = targets.get("optical").lower(capture(self.shared, {"x": x}, ("logits",)), plan, folder)
        return OpticalProgram.read(folder / artifact.entries["main"].file)

    def electronics(self, batch: int, threads: Sequence[int], folder: Path) -> tuple[dict[str, Call], int]:
        """All electronic parts of a batch one after the other, each way a call; and the operations in them."""
        optics = self.where.optics
        assert optics is not None
        model = export(capture(self.shared, {"x": self.image(batch)}, ("logits",)).entries["main"])
        found = [turn.electronic for turn in turns(model, (optics.rows, optics.cols)) if turn.electronic is not None]
        files = [folder / f"electronics-{batch}-{i}.onnx" for i in range(len(found))]
        for file, part in zip(files, found, strict=True):
            save(part, file)
        count = sum(operations(node) for part in found for node in part.graph)
        rng, calls = np.random.default_rng(0), {}
        for threaded in threads:
            parts = []
            for file in files:
                run = quiet(file, threaded)
                given = {v.name: rng.standard_normal(v.shape).astype(np.float32) for v in run.get_inputs()}
                parts.append((run, given))
            calls[f"electronics, {threaded}"] = lambda parts=parts: [run.run(None, given) for run, given in parts]
        return calls, count


@torch.no_grad()
def gpu_seconds(model: torch.nn.Module, x: torch.Tensor, dtype: torch.dtype) -> float:
    """Seconds a batch on the GPU: the median of 50 after 10 that warm up, by CUDA events."""
    model, x = model.to("cuda", dtype), x.to("cuda", dtype)
    taken = []
    for i in range(60):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        model(x)
        end.record()
        torch.cuda.synchronize()
        if i >= 10:
            taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def on_gpu(forms: Forms, batches: Sequence[int]) -> float:
    """Prints seconds an image on the GPU; returns the fewest."""
    found = []
    for form, model in (("convolutions", forms.shared), ("matrices", forms.matrices)):
        for dtype in (torch.float32, torch.float16):
            for batch in batches:
                spent = gpu_seconds(model, forms.image(batch), dtype) / batch
                found.append(spent)
                print(f"  GPU, {form}, {str(dtype)[6:]}, batch {batch}: {si(spent, 's')} an image")
            model.float().cpu()
    return min(found)


def quiet(path: Path, threads: int) -> Any:
    """A session whose threads do not wait busily: a program has many parts, and those of one would hold up the next."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def si(value: float, unit: str) -> str:
    """A number with three digits and a prefix."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.2g} {unit}"


def measure(forms: Forms, sizes: Sizes, options: argparse.Namespace) -> tuple[float, float]:
    """Print a model's table; returns the fewest digital seconds an image, the most electronic operations a second."""
    threads = sorted({1, os.cpu_count() or 1})
    optics = forms.where.optics
    assert optics is not None
    table = Table(title=f"{forms.name}: an image, {forms.where.name}", title_justify="left")
    columns = ["batch", *(f"digital, {n} thread{'s' * (n > 1)}" for n in threads), "frames", "masks", "frames take"]
    columns += ["masks take", "read-out", *(f"electronics, {n}" for n in threads)]
    for column in columns:
        table.add_column(column, justify="right")
    fewest, rate, lines = float("inf"), 0.0, []
    for batch in options.batches:
        with tempfile.TemporaryDirectory() as folder:
            calls = forms.digital(batch, threads, Path(folder))
            parts, count = forms.electronics(batch, threads, Path(folder))
        calls |= parts
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(options.rounds):
            for name in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
                taken[name].append(typical(calls[name], options.seconds) / batch)
        spent = sizes.cost(optics, batch)
        optical = spent.total_s / batch
        digital, electronic = {}, {}
        for n in threads:
            each = [taken[f"{form}, {n}"] for form in ("convolutions", "matrices")]
            digital[n] = min(each, key=statistics.median)
            # What is measured lacks biases and sums of frames, which are few.
            all_of_them = sizes.ops * batch / count
            electronic[n] = [each * all_of_them for each in taken[f"electronics, {n}"]]
            fewest = min(fewest, statistics.median(digital[n]))
            rate = max(rate, sizes.ops / statistics.median(electronic[n]))
            both = [optical + extra for extra in electronic[n]]
            lines.append(
                f"  batch {batch}, {n} thread(s): digital / optics alone {ratio(digital[n], [optical] * len(both))}; "
                f"digital / optics and electronics {ratio(digital[n], both)}; "
                f"electronics / digital {ratio(electronic[n], digital[n])}"
            )
        table.add_row(
            str(batch),
            *(si(statistics.median(digital[n]), "s") for n in threads),
            f"{spent.frames / batch:.1f}",
            f"{spent.mask_writes / batch:.1f}",
            *(si(spent.seconds[part] / batch, "s") for part in ("frames", "masks", "readout")),
            *(si(statistics.median(electronic[n]), "s") for n in threads),
        )
    Console(width=180).print(table)
    print("\n".join(lines))
    print(f"  {spent.share:.1%} of all operations are optical; {sizes.ops:,} electronic ones an image", flush=True)
    return fewest, rate


def sweep(sizes: Sizes, where: Device, baseline: float, rate: float) -> None:
    """Print the smallest frame rate that reaches the paper's figure, by plane and batch, in three ways of counting."""
    optics = where.optics
    assert optics is not None
    target = baseline / PAPER
    electronics = sizes.ops / rate
    print(
        f"  smallest frame rate at which the optical time is {PAPER} times less than {si(baseline, 's')} an image, "
        f"the fewest measured or given;\n  of {si(RATES[0], 'Hz')} to {si(RATES[1], 'Hz')}; a dash: none of them does"
    )
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for side in PLANES:
        for batch in BATCHES:
            spent = sizes.cost(optics.model_copy(update={"rows": side, "cols": side}), batch)
            found[side, batch] = spent.frames, spent.mask_writes
    ways: list[tuple[str, float, bool]] = [
        ("optics alone, frames only: as the literature appears to count", target, False),
        ("and every mask takes as long as a frame", target, True),
        (f"frames, and electronics at the {si(rate, 'operations/s')} measured here", target - electronics, False),
    ]
    for title, left, masks in ways:
        if left <= 0:
            print(f"  {title}: at no frame rate, electronics alone take {si(electronics, 's')} an image")
            continue
        table = Table(title=title, title_justify="left")
        for column in ("plane", *(f"batch {batch}" for batch in BATCHES)):
            table.add_column(column, justify="right")
        for side in PLANES:
            cells = []
            for batch in BATCHES:
                frames, writes = found[side, batch]
                least = (frames + writes * masks) / batch / left
                cells.append("-" if least > RATES[1] else si(least, "Hz") if least > RATES[0] else "any")
            table.add_row(f"{side}²", *cells)
        Console(width=180).print(table)


def main() -> None:
    """Measure, compute, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each turn of each contender")
    parser.add_argument("--device", default="optical-4f-4k-2mhz")
    parser.add_argument("--baseline", type=float, help="digital seconds an image for the sweep, as of a GPU of yours")
    options = parser.parse_args()
    where = device.resolve(options.device)
    print(
        f"{PAPER} is the figure of the ConvShareViT paper: theoretical, its GPU, batch, plane and frame rate unknown. "
        "This does not reproduce it.\nModels are a reconstruction with random weights, which change no time; optical "
        "times are computed, not measured."
    )
    for name in options.models:
        print(f"\n{name}", flush=True)
        forms = Forms(name, where)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            program = forms.lowered(Path(folder) / "one")
        done = program.operations
        sizes = Sizes([op.work for op in done], [op.signed for op in done], program.electronic_ops)
        assumed = sizes.cost(program.optics, 1).assumptions
        print("  assumed: " + "; ".join(assumed))
        baseline, rate = measure(forms, sizes, options)
        if torch.cuda.is_available():
            print(f"  GPU: {torch.cuda.get_device_name()}")
            baseline = min(baseline, on_gpu(forms, BATCHES))
        sweep(sizes, where, options.baseline or baseline, rate)


if __name__ == "__main__":
    main()
