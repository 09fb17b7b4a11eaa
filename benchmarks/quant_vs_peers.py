"""Accuracy and size of our w8a8, w8 and w4 against what peers make of the same float32 files; and the time it takes.

    python benchmarks/quant_vs_peers.py [--models fmvit-digits fmvit-scenes] [--time fmvit-s --rounds 5 --samples 16]

Peers: ONNX Runtime's ``quantize_static`` as it comes and its MatMulNBits quantizer, and ai-edge-quantizer's recipes
``static_wi8_ai8`` and ``dynamic_wi4_afp32``, all with the recipe's own calibration samples. Every file is scored on
all held-out samples, as its runtime runs it on this machine. ONNX Runtime's int8 kernels saturate on x86 CPUs without
VNNI, so its own default is also scored without graph optimizations, as another CPU would compute it.

``--time`` quantizes one model in turns, ours and ``quantize_static``, from the same float32 file with the same samples.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import ratio

Feeds = dict[str, Any]
Run = Callable[[Feeds], Any]


class Reader:
    """ONNX Runtime's ``CalibrationDataReader`` over a stream of feeds."""

    def __init__(self, feeds: Any) -> None:
        self._feeds: Iterator[Feeds] = iter(feeds)

    def get_next(self) -> Feeds | None:
        """The next feed; None at the end."""
        return next(self._feeds, None)


def stream(model: str, count: int | None = None) -> Any:
    """The recipe's calibration samples; random ones where it has none."""
    from edgeattn import recipe
    from edgeattn.quant.calibration import CalibrationStream

    resolved = recipe.resolve(model)
    specs = resolved.recipe.specs()
    if resolved.recipe.calibration is None:
        rng = np.random.default_rng(0)
        feeds = [{s.name: rng.standard_normal(s.shape).astype(s.dtype) for s in specs} for _ in range(count or 16)]
        return CalibrationStream.of_feeds(feeds, specs, "random")
    spec = resolved.recipe.calibration.model_copy(update={"source": resolved.calibration})
    return CalibrationStream.of_spec(spec, specs, resolved.recipe.preprocess, resolved.folder)


def heldout(model: str) -> tuple[str, Any, Any]:
    """Name of the input, inputs as the model takes them, labels."""
    from edgeattn import recipe
    from edgeattn.pipeline.stages.reference import heldout_samples

    resolved = recipe.resolve(model)
    spec = resolved.recipe.specs()[0]
    x, y = heldout_samples(resolved, spec.shape)
    return spec.name, x, y


def onnx_run(path: Path, optimized: bool = True) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options)
    return lambda feeds: session.run(None, feeds)[0]


def tflite_run(path: Path) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    runner = interpreter.get_signature_runner("main")
    given = {name: (detail["dtype"], *detail["quantization"]) for name, detail in runner.get_input_details().items()}

    def integers(name: str, value: Any) -> Any:
        """What the file takes: ai-edge-quantizer's static recipe wants its inputs as integers."""
        dtype, scale, zero = given[name]
        if np.issubdtype(dtype, np.floating):
            return value
        limits = np.iinfo(dtype)
        return np.clip(np.round(value / scale) + zero, limits.min, limits.max).astype(dtype)

    return lambda feeds: next(iter(runner(**{k: integers(k, v) for k, v in feeds.items()}).values()))


def score(run: Run, model: str) -> float:
    """Top-1 accuracy on the held-out samples."""
    name, x, y = heldout(model)
    return float(np.mean([int(np.argmax(run({name: x[i : i + 1]}))) == y[i] for i in range(len(y))]))


def ort_static(source: Path, out: Path, feeds: Any, **options: Any) -> None:
    from onnxruntime.quantization import quantize_static

    quantize_static(str(source), str(out), Reader(feeds), **options)


def ort_w4(source: Path, out: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(str(source)), block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out))


def aeq(source: Path, out: Path, recipe_name: str, feeds: Any) -> None:
    from ai_edge_quantizer import quantizer, recipe

    worker = quantizer.Quantizer(source.read_bytes())
    worker.load_quantization_recipe(getattr(recipe, recipe_name)())
    calibrated = worker.calibrate({"main": list(feeds)}) if worker.need_calibration else None
    out.write_bytes(bytes(worker.quantize(calibrated).quantized_model))


def rows(model: str, folder: Path) -> Iterator[tuple[str, float, int]]:
    """Name, accuracy and bytes of every file."""
    import edgeattn

    files: dict[str, Path] = {}
    for target, precision in (
        ("onnx", "fp32"), ("onnx", "w8a8"), ("onnx", "w8"), ("onnx", "w4"),
        ("tflite", "fp32"), ("tflite", "w8a8"), ("tflite", "w8"), ("tflite", "w4"),
    ):  # fmt: skip
        bundle = edgeattn.export(model, target=target, precision=precision, output=folder, force=True)
        file = bundle.path / f"model.{target}"
        files[f"{target} {precision}"] = file
        assert bundle.manifest.task is not None
        yield f"edgeattn {target} {precision}", bundle.manifest.task["artifact_accuracy"], file.stat().st_size
    feeds, path = stream(model), folder / "peer.onnx"
    ort_static(files["onnx fp32"], path, feeds)
    yield "quantize_static, as it comes", score(onnx_run(path), model), path.stat().st_size
    yield "quantize_static, unoptimized", score(onnx_run(path, optimized=False), model), path.stat().st_size
    ort_static(files["onnx fp32"], path, feeds, per_channel=True, reduce_range=True)
    yield "quantize_static, per channel, 7 bits", score(onnx_run(path), model), path.stat().st_size
    ort_w4(files["onnx fp32"], path)
    yield "MatMulNBitsQuantizer, 4 bits", score(onnx_run(path), model), path.stat().st_size
    path = folder / "peer.tflite"
    for name in ("static_wi8_ai8", "dynamic_wi8_afp32", "dynamic_wi4_afp32"):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                aeq(files["tflite fp32"], path, name, feeds)
            yield f"ai-edge-quantizer {name}", score(tflite_run(path), model), path.stat().st_size
        except Exception as error:  # what a peer cannot do is a result too
            print(f"ai-edge-quantizer {name} of {model}: {type(error).__name__}: {str(error).splitlines()[0]}")


def timed(model: str, rounds: int, samples: int, folder: Path) -> None:
    """Quantize in turns, in this process; each from the file in float32 to the file in w8a8.

    Ours with and without what ``quantize_static`` does not do: the report on the samples, and equalization.
    """
    import onnx_ir as ir
    import torch

    import edgeattn
    from edgeattn import recipe
    from edgeattn.capture import capture
    from edgeattn.core.specs import TensorSpec
    from edgeattn.models.build import build
    from edgeattn.pipeline.stages.quantize import looked_at
    from edgeattn.quant.calibration import CalibrationStream
    from edgeattn.quant.coverage import coverage
    from edgeattn.quant.equalize import equalize
    from edgeattn.quant.plan import QuantPlan
    from edgeattn.reparam import reparameterize
    from edgeattn.targets.onnx_graph.qdq import CPU_INT7, Calibration

    source = edgeattn.export(model, target="onnx", output=folder, force=True).path / "model.onnx"
    feeds = list(stream(model, samples))[:samples]
    specs = [TensorSpec(name, value.shape, str(value.dtype)) for name, value in feeds[0].items()]
    inputs = {name: torch.from_numpy(value) for name, value in feeds[0].items()}
    deploy = reparameterize(build(recipe.resolve(model)).model, inputs).model
    program = capture(deploy, inputs, ("logits",))

    used = CalibrationStream.of_feeds(feeds[: looked_at(len(feeds))], specs, "samples")

    def looks() -> None:
        coverage(deploy, used, "mse", used=len(feeds))
        equalize(program, feeds)

    def ranges() -> None:
        graph = ir.load(source)
        ir.save(Calibration(graph, feeds, CPU_INT7, QuantPlan("w8a8")).apply(graph), folder / "ours.onnx")

    def theirs() -> None:
        ort_static(source, folder / "theirs.onnx", feeds, per_channel=True, reduce_range=True)

    took: dict[str, list[float]] = {"looks": [], "ranges": [], "theirs": []}
    for _ in range(rounds):
        for name, work in (("looks", looks), ("ranges", ranges), ("theirs", theirs)):
            begun = time.perf_counter()
            work()
            took[name].append(time.perf_counter() - begun)
    both = [sum(pair) for pair in zip(took["looks"], took["ranges"], strict=True)]
    print(f"{model}, {len(feeds)} samples, time of quantize_static = 1:")
    print(f"  measuring ranges and writing the file {ratio(took['ranges'], took['theirs'])}")
    print(f"  with the report on the samples and equalization {ratio(both, took['theirs'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*", default=["fmvit-digits", "fmvit-scenes"])
    parser.add_argument("--time", metavar="MODEL", help="quantize MODEL in turns instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        if args.time:
            timed(args.time, args.rounds, args.samples, Path(name))
            return
        for model in args.models:
            table = Table("file", "top-1", "against fp32", "size", "of fp32", title=model)
            found: dict[str, tuple[float, int]] = {}
            folder = Path(name, model)
            folder.mkdir()
            with contextlib.redirect_stderr(io.StringIO()):
                for label, accuracy, size in rows(model, folder):
                    found[label] = (accuracy, size)
                    plain = found[f"edgeattn {'tflite' if 'tflite' in label or 'ai-edge' in label else 'onnx'} fp32"]
                    points = f"{100 * (accuracy - plain[0]):+.2f} pp"
                    table.add_row(label, f"{accuracy:.2%}", points, f"{size / 1e3:.1f} kB", f"{size / plain[1]:.2f}x")
            Console(width=120).print(table)


if __name__ == "__main__":
    main()
