"""Our .tflite of a model against what else makes a file of it for a Raspberry Pi, side by side on this machine.

    python benchmarks/tflite_vs_peers.py [--model fmvit-s] [--rounds 15] [--conversions 2] [--threads 1]

Peers: litert-torch as it is, of the training and of the deploy form; ONNX Runtime with our ONNX; ExecuTorch (XNNPACK)
and OpenVINO of the deploy form, where they are installed. Latency is taken in turns in one process, conversion time in
turns, each in a process of its own, peak memory of conversion and of running in further ones. Our conversion is the
whole export: it also builds both forms, proves them equal, and runs and compares the result. Random weights, which do
not change the time; batch 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.fusion_gain import timed
from benchmarks.measure import peak_mb, ratio, seconds

OURS = "edgeattn"
#: Name, the file that it makes, and the package that it needs.
VARIANTS = {
    OURS: ("model.tflite", "litert_torch"),
    "edgeattn --layout nhwc": ("model.tflite", "litert_torch"),
    "litert-torch, deploy form": ("model.tflite", "litert_torch"),
    "litert-torch, training form": ("model.tflite", "litert_torch"),
    "ONNX Runtime": ("model.onnx", "onnxruntime"),
    "ExecuTorch": ("model.pte", "executorch"),
    "OpenVINO": ("model.xml", "openvino"),
}


def installed(variant: str) -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec(VARIANTS[variant][1]) is not None


def make(model: str, variant: str, folder: Path) -> None:
    """Convert; leaves the variant's file in ``folder``."""
    path = folder / VARIANTS[variant][0]
    if variant.startswith(OURS) or variant == "ONNX Runtime":
        import edgeattn

        layout = "nhwc" if variant.endswith("nhwc") else "nchw"
        target = path.suffix[1:]
        bundle = edgeattn.export(model, target=target, layout=layout, output=folder, force=True)
        (bundle.path / path.name).replace(path)
        return
    import torch

    from edgeattn import recipe
    from edgeattn.models.build import build
    from edgeattn.reparam import reparameterize

    built = build(recipe.resolve(model))
    inputs = tuple(built.random_inputs(0).values())
    form = built.model.eval() if "training" in variant else reparameterize(built.model, inputs).model.eval()
    if variant.startswith("litert"):
        import litert_torch

        litert_torch.convert(form, inputs).export(str(path))
    elif variant == "ExecuTorch":
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = to_edge_transform_and_lower(torch.export.export(form, inputs), partitioner=[XnnpackPartitioner()])
        path.write_bytes(program.to_executorch().buffer)
    else:
        import openvino

        shapes = [tuple(x.shape) for x in inputs]  # dynamic ones otherwise
        converted = openvino.convert_model(form, example_input=inputs, input=shapes)
        openvino.save_model(converted, path, compress_to_fp16=False)


class Loaded:
    """A converted file in its runtime; ``run(None, feeds)`` for ``timed``."""

    def __init__(self, path: Path, threads: int) -> None:
        self.call: Callable[[np.ndarray], Any]
        if path.suffix == ".tflite":
            from ai_edge_litert.interpreter import Interpreter

            interpreter = Interpreter(str(path), num_threads=threads)
            interpreter.allocate_tensors()
            where, out = interpreter.get_input_details()[0], interpreter.get_output_details()[0]["index"]

            def tflite(x: np.ndarray) -> Any:
                interpreter.set_tensor(where["index"], x)
                interpreter.invoke()
                return interpreter.get_tensor(out)

            self.call, self.shape = tflite, tuple(where["shape"])
        elif path.suffix == ".onnx":
            import onnxruntime as ort

            settings = ort.SessionOptions()
            settings.intra_op_num_threads = threads
            session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
            first = session.get_inputs()[0]
            self.call, self.shape = (lambda x: session.run(None, {first.name: x})), tuple(first.shape)
        elif path.suffix == ".pte":
            import torch
            from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
            from executorch.runtime import Runtime

            _unsafe_reset_threadpool(threads)  # all cores otherwise
            method = Runtime.get().load_program(path).load_method("forward")
            self.call = lambda x: method.execute([torch.from_numpy(x)])
            self.shape = tuple(method.metadata.input_tensor_meta(0).sizes())
        else:
            import openvino

            options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
            compiled = openvino.compile_model(path, "CPU", options)
            self.call, self.shape = (lambda x: compiled([x])), tuple(compiled.input(0).shape)

    def run(self, _: None, feeds: dict[str, np.ndarray]) -> Any:
        """One inference."""
        return self.call(feeds["x"])

    def feeds(self) -> dict[str, np.ndarray]:
        """A seeded random input."""
        return {"x": np.random.default_rng(0).standard_normal(self.shape).astype(np.float32)}


def nodes(path: Path) -> tuple[str, str]:
    """(operators, transposes) of a file; dashes where its format does not say."""
    if path.suffix == ".tflite":
        from edgeattn.targets.tflite import flatbuffer

        model = flatbuffer.read(path.read_bytes())
        kinds = Counter(flatbuffer.operator_name(model, op) for graph in model.subgraphs for op in graph.operators)
    elif path.suffix == ".onnx":
        import onnx

        kinds = Counter(node.op_type.upper() for node in onnx.load(path).graph.node)
    elif path.suffix == ".xml":
        import openvino

        kinds = Counter(op.get_type_name().upper() for op in openvino.Core().read_model(path).get_ops())
        kinds = Counter({k: n for k, n in kinds.items() if k not in ("CONSTANT", "PARAMETER", "RESULT")})
    else:
        return "-", "-"
    return str(sum(kinds.values())), str(kinds["TRANSPOSE"])


def size_mb(path: Path) -> float:
    """Size of a file, with OpenVINO's weights beside it."""
    weights = path.with_suffix(".bin")
    return (path.stat().st_size + (weights.stat().st_size if weights.exists() else 0)) / 1e6


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Convert with all, run all in turns, print one line each."""
    variants = [name for name in VARIANTS if installed(name)]
    for name in sorted(VARIANTS.keys() - set(variants)):
        print(f"not installed: {name}")
    command = [sys.executable, __file__, "--model", options.model, "--threads", str(options.threads)]
    places = {name: folder / str(index) for index, name in enumerate(variants)}
    taken: dict[str, list[float]] = {name: [] for name in variants}
    environ = dict(os.environ)
    for turn in range(options.conversions):
        for name in variants if turn % 2 == 0 else variants[::-1]:
            places[name].mkdir(exist_ok=True)
            environ["EDGEATTN_CACHE"] = str(folder / f"cache-{turn}-{variants.index(name)}")
            taken[name].append(seconds([*command, "--make", name, "--into", str(places[name])], environ))
            print(f"  {name}: converted in {taken[name][-1]:.1f} s", flush=True)
    peaks = {}
    for name in variants:
        environ["EDGEATTN_CACHE"] = str(folder / f"cache-peak-{variants.index(name)}")
        converting = peak_mb([*command, "--make", name, "--into", str(places[name])], environ)
        running = peak_mb([*command, "--run", str(places[name] / VARIANTS[name][0])])
        peaks[name] = (converting, running)
    loaded = {name: Loaded(places[name] / VARIANTS[name][0], options.threads) for name in variants}
    latency: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(options.rounds):
        for name in variants if turn % 2 == 0 else variants[::-1]:
            latency[name].append(timed(loaded[name], loaded[name].feeds()))
    for name in variants:
        path = places[name] / VARIANTS[name][0]
        count, moved = nodes(path)
        print(f"{name}: {count} nodes, {moved} transposes, {size_mb(path):.1f} MB")
        print(f"  peak memory: converting {peaks[name][0]:.0f} MB, running {peaks[name][1]:.0f} MB")
        if name != OURS:
            print(f"  latency, ours / theirs: {ratio(latency[OURS], latency[name])}")
            print(f"  conversion, ours / theirs: {ratio(taken[OURS], taken[name])}", flush=True)


def main() -> None:
    """Parse the command line; the hidden options are the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fmvit-s")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--conversions", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    for hidden in ("--make", "--into", "--run"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        logging.disable(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()):
            make(options.model, options.make, Path(options.into))
    elif options.run:
        loaded = Loaded(Path(options.run), options.threads)
        for _ in range(20):
            loaded.run(None, loaded.feeds())
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(options, Path(folder))


if __name__ == "__main__":
    main()
