import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from edgeattn import targets
from edgeattn.capture import capture, run_eager
from edgeattn.core import tools
from edgeattn.core.errors import ToolchainMissing, UsageError
from edgeattn.targets.base import LowerPlan, Target
from edgeattn.targets.null import NullTarget

X = torch.arange(8.0).reshape(2, 4)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.table = nn.Parameter(torch.ones(2))

    def forward(self, x, ids):
        return {"a": self.linear(x), "nothing": None, "b": [ids + 1, self.table, 7]}


@pytest.fixture
def lowered(tmp_path):
    model, feeds = Two().eval(), {"x": X, "ids": torch.arange(3)}
    expected = run_eager(model, feeds, ("a", "b", "c"))
    artifact = NullTarget().lower(capture(model, feeds, tuple(expected)), LowerPlan("fp32", [], {}), tmp_path)
    return artifact, {k: v.numpy() for k, v in feeds.items()}, {k: v.detach().numpy() for k, v in expected.items()}


def test_the_null_target_runs_the_captured_program(lowered):
    artifact, feeds, expected = lowered
    entry = artifact.entries["main"]
    assert [(t.name, t.shape, t.dtype) for t in entry.inputs] == [("x", (2, 4), "float32"), ("ids", (3,), "int64")]
    assert [(t.name, t.shape, t.dtype) for t in entry.outputs] == [
        ("a", (2, 3), "float32"),
        ("b", (3,), "int64"),
        ("c", (2,), "float32"),
    ]
    assert (artifact.folder / entry.file).is_file()
    runtime = NullTarget().open(artifact)
    outputs = runtime.run("main", feeds)
    assert list(outputs) == list(expected)
    assert all(np.array_equal(outputs[k], expected[k]) for k in expected)
    assert [t.name for t in runtime.trace("main", feeds)] == list(expected)


def test_the_null_target_refuses_wrong_feeds(lowered):
    artifact, feeds, _ = lowered
    runtime = NullTarget().open(artifact)
    for entry, wrong in [
        ("decode", feeds),
        ("main", {"x": feeds["x"]}),
        ("main", {**feeds, "x": feeds["x"][:1]}),
        ("main", {**feeds, "ids": feeds["ids"].astype(np.int32)}),
    ]:
        with pytest.raises(UsageError):
            runtime.run(entry, wrong)


def test_registered_targets():
    assert {"null", "onnx"} <= set(targets.names())
    for name in targets.names():
        target = targets.get(name)
        assert isinstance(target, Target)
        assert target.name == name
        assert "fp32" in target.precisions(None)
        assert target.availability().found or target.availability().fix
    with pytest.raises(UsageError, match="did you mean 'onnx'"):
        targets.get("onxn")


def test_a_missing_toolchain_is_said_with_its_install_line(lowered, monkeypatch):
    monkeypatch.setattr(tools, "version", lambda name: None)
    for name in ("onnx", "null"):
        found = targets.get(name).availability()
        assert not found.found
        assert str(found.fix).startswith("pip install ")
        with pytest.raises(ToolchainMissing) as caught:
            targets.get(name).open(lowered[0])
        assert caught.value.exit_code == 3
        assert caught.value.fix == found.fix


@pytest.mark.parametrize(
    "module", ["edgeattn.targets", "edgeattn.targets.onnx", "edgeattn.targets.null", "edgeattn.bundle"]
)
def test_neither_torch_nor_a_toolchain_is_imported(module):
    code = (
        f"import sys, {module}\nfrom edgeattn import targets\n"
        "for name in targets.names(): targets.get(name).availability()\n"
        "print([m for m in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
