"""A tiny ONNX bundle made by hand: y = relu(x) * 2 and n = ids + 1, without torch."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeattn.bundle import Bundle, Manifest, write_bundle
from edgeattn.bundle.manifest import EntryInfo, TensorInfo, Weights


def model() -> onnx.ModelProto:
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("Mul", ["r", "two"], ["y"]),
            helper.make_node("Add", ["ids", "one"], ["n"]),
        ],
        "main",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, [2]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2]),
            helper.make_tensor_value_info("n", TensorProto.INT64, [2]),
        ],
        [
            helper.make_tensor("two", TensorProto.FLOAT, [], [2.0]),
            helper.make_tensor("one", TensorProto.INT64, [], [1]),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def manifest(**changes: object) -> Manifest:
    fields = {
        "name": "tiny.onnx.fp32",
        "target": "onnx",
        "precision": "fp32",
        "device": None,
        "created": "2026-01-01T00:00:00Z",
        "key": "0" * 64,
        "weights": Weights(kind="random", seed=0),
        "recipe": {"name": "tiny", "description": "ü"},
        "recipe_sha256": "0" * 64,
        "entries": {
            "main": EntryInfo(
                file="model.onnx",
                inputs=(
                    TensorInfo(name="x", shape=(2, 2), dtype="float32"),
                    TensorInfo(name="ids", shape=(2,), dtype="int64"),
                ),
                outputs=(
                    TensorInfo(name="y", shape=(2, 2), dtype="float32"),
                    TensorInfo(name="n", shape=(2,), dtype="int64"),
                ),
            )
        },
        "backend": "onnx",
        "runtimes": [{"name": "onnxruntime", "version": "1", "machine": "x"}],
        "requirement": "onnxruntime",
        "tolerance": 1e-05,
        "tools": {"onnxruntime": "1"},
        "host": {"machine": "x"},
        "stages": (),
        "reparam": {},
        "numerics": {},
    }
    return Manifest.model_validate({**fields, **changes})


def make(folder: Path, *, off: float = 0.0, **changes: object) -> Bundle:
    """Write the bundle into ``folder``; its golden outputs are wrong by ``off``."""
    work = folder / "work"
    (work / "golden").mkdir(parents=True)
    onnx.save(model(), work / "model.onnx")
    for i in range(2):
        x = np.array([[1.0, -2.0], [3.0, i]], np.float32)
        ids = np.array([i, 7])
        outputs = {"out.y": np.maximum(x, 0) * 2 + np.float32(off), "out.n": ids + 1}
        np.savez(work / f"golden/main-{i:03}.npz", **{"in.x": x, "in.ids": ids}, **outputs)
    bundle = write_bundle(
        folder / "tiny.onnx.fp32", manifest(**changes), {work / "model.onnx": "model.onnx"}, work / "golden", "# tiny\n"
    )
    shutil.rmtree(work)
    return bundle


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One whole bundle for all tests; they copy it before they change it."""
    return make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_bundle():
    return make


@pytest.fixture
def copy(tiny: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(tiny.path, tmp_path / "copy"))
