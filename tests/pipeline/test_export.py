"""The main job, end to end, on real models through the real converter and runtime."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import edgeattn
from edgeattn.bundle import Bundle
from edgeattn.core.errors import CheckFailed, ConversionFailed, UsageError
from edgeattn.core.numerics import TOLERANCES
from edgeattn.core.specs import TensorSpec
from edgeattn.pipeline.cache import Cache
from edgeattn.pipeline.export import export_job, make_job

GUEST = """
import torch
from torch import nn
{extra}
class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, {classes})

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))
"""


def write_guest(folder: Path, extra: str = "", classes: int = 5) -> Path:
    path = folder / "guest.py"
    path.write_text(GUEST.format(extra=extra, classes=classes))
    return path


def graph(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(bundle.path / "model.onnx")


def test_digits_accuracy_is_that_of_pytorch(digits: Bundle) -> None:
    task = digits.manifest.task
    assert task is not None
    assert task["samples"] == 360
    assert abs(task["artifact_correct"] - task["reference_correct"]) <= 1
    assert task["reference_accuracy"] >= 0.97
    assert task["top1_agreement"] > 0.99


def test_digits_manifest_says_what_was_proven(digits: Bundle) -> None:
    manifest = digits.manifest
    assert manifest.name == digits.path.name == "fmvit-digits.onnx.fp32"
    assert manifest.weights.kind == "checkpoint"
    assert manifest.tolerance == TOLERANCES["fp32"] == 1e-5
    assert manifest.reparam["holds"]
    assert len(manifest.reparam["fused"]) > 20
    assert {s.name for s in manifest.stages} >= {"build", "reference", "reparameterize", "capture", "lower", "verify"}
    assert all(s.peak_mb > 0 for s in manifest.stages)
    assert manifest.facts["opset"] == 20
    props = {p.key: p.value for p in graph(digits).metadata_props}
    assert props["edgeattn.recipe"] == "fmvit-digits"
    assert props["edgeattn.recipe_sha256"] == manifest.recipe_sha256


def test_bundle_runs_and_verifies(digits: Bundle) -> None:
    verified = Bundle.open(digits.path).verify()
    assert verified.worst.relative_l2 <= 1e-5
    _, entry, feeds, outputs = next(digits.golden())
    assert np.allclose(digits.run(feeds, entry)["logits"], outputs["logits"], atol=1e-4)


def test_runner_on_its_own(digits: Bundle) -> None:
    done = subprocess.run(
        [sys.executable, digits.path / "run.py", "--json"], capture_output=True, text=True, cwd=digits.path.parent
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["holds"]


def _check_fmvit(variant: str, output: Path) -> None:
    """What must hold of every size: numbers, no batch norm, fewer than half the convolutions."""
    for precision, bound in (("fp32", 1e-5), ("fp16", 5e-3)):
        bundle = edgeattn.export(f"fmvit-{variant}", precision=precision, output=output)
        assert bundle.path.name == f"fmvit-{variant}-random.onnx.{precision}"
        assert bundle.verify().worst.relative_l2 <= bound
        ops = [node.op_type for node in graph(bundle).graph.node]
        assert "BatchNormalization" not in ops
        assert ops.count("Conv") * 2 < bundle.manifest.reparam["before"]["convolutions"]


def test_fmvit_t(tmp_path: Path) -> None:
    _check_fmvit("t", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["s", "m", "b", "l"])
def test_fmvit(variant: str, tmp_path: Path) -> None:
    _check_fmvit(variant, tmp_path)


def test_features_for_dense_tasks_at_another_size(tmp_path: Path) -> None:
    job = make_job("fmvit-t", inputs=["x=1x3x64x96"], args={"features": True})
    with pytest.raises(UsageError, match="another number of outputs"):
        export_job(job, tmp_path)
    recipe = job.resolved.recipe.model_copy(update={"outputs": ("c2", "c3", "c4", "c5")})
    object.__setattr__(job, "resolved", job.resolved.model_copy(update={"recipe": recipe}))
    bundle = export_job(job, tmp_path).bundle
    shapes = {t.name: t.shape[2:] for t in bundle.manifest.entries["main"].outputs}
    assert shapes == {"c2": (16, 24), "c3": (8, 12), "c4": (4, 6), "c5": (2, 3)}


def test_a_second_export_is_a_cache_hit_without_torch(digits: Bundle, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom edgeattn.cli import main\n"
        f"main(['export', 'fmvit-digits', '-o', {str(tmp_path)!r}])\n"
        "assert 'torch' not in sys.modules and 'onnxruntime' not in sys.modules\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cached") == 7
    assert (tmp_path / "fmvit-digits.onnx.fp32" / "model.onnx").read_bytes() == (
        digits.path / "model.onnx"
    ).read_bytes()
    assert seconds < 2


def test_the_same_bundle_is_kept_and_another_one_too(digits: Bundle, tmp_path: Path) -> None:
    job = make_job("fmvit-digits")
    first = export_job(job, tmp_path)
    stamp = (first.bundle.path / "manifest.json").stat().st_mtime_ns
    again = export_job(job, tmp_path)
    assert again.unchanged
    assert (first.bundle.path / "manifest.json").stat().st_mtime_ns == stamp
    precious = first.bundle.path / "model.onnx"
    precious.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already"):
        export_job(job, tmp_path)
    assert precious.read_bytes() == b"mine"
    export_job(job, tmp_path, force=True).bundle.verify()


def test_two_exports_are_the_same_bytes(digits: Bundle, own_cache: Path, tmp_path: Path) -> None:
    bundle = edgeattn.export("fmvit-digits", output=tmp_path)
    assert (bundle.path / "model.onnx").read_bytes() == (digits.path / "model.onnx").read_bytes()


def test_a_guest_is_served_and_its_sources_count(tmp_path: Path) -> None:
    write_guest(tmp_path, extra="from helper import FACTOR")
    (tmp_path / "helper.py").write_text("FACTOR = 1\n")
    words = {"inputs": ["x=1x3x16x16"], "args": {"width": 16}}
    bundle = edgeattn.export(f"{tmp_path}/guest.py:Net", output=tmp_path, **words)  # type: ignore[arg-type]
    assert bundle.manifest.weights.kind == "random"
    assert "random" in bundle.path.name
    assert bundle.manifest.reparam["after"]["batch_norms"] == 0
    job = make_job(f"{tmp_path}/guest.py:Net", **words)  # type: ignore[arg-type]
    assert len(export_job(job, tmp_path / "again").runs["onnx"].fresh) == 0
    (tmp_path / "helper.py").write_text("FACTOR = 2\n")
    assert "build" in export_job(job, tmp_path / "touched").runs["onnx"].fresh


@pytest.mark.parametrize("how", ["safetensors", "import in forward", "file in forward", "folder"])
def test_what_a_guest_reads_counts_as_its_source(tmp_path: Path, how: str) -> None:
    from safetensors.torch import save_file

    (tmp_path / "parts").mkdir()
    reads = {
        "safetensors": ("load_file(HERE / 'parts' / 'w.safetensors')['w']", "1.0"),
        "import in forward": ("1.0", "__import__('late').GAIN"),
        "file in forward": ("1.0", "float((HERE / 'parts' / 'gain.txt').read_text())"),
        "folder": ("float(len(list((HERE / 'parts').glob('*.txt'))))", "1.0"),
    }
    build, forward = reads[how]
    (tmp_path / "net.py").write_text(
        "from pathlib import Path\nimport torch\nfrom torch import nn\nfrom safetensors.torch import load_file\n"
        "HERE = Path(__file__).parent\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.l = nn.Linear(4, 2)\n"
        f"        self.register_buffer('g', torch.as_tensor({build}))\n"
        f"    def forward(self, x):\n        return self.l(x) * self.g * {forward}\n"
    )

    def write(gain: float) -> None:
        import torch

        save_file({"w": torch.tensor(gain)}, tmp_path / "parts" / "w.safetensors")
        (tmp_path / "late.py").write_text(f"GAIN = {gain}\n")
        (tmp_path / "parts" / "gain.txt").write_text(str(gain))

    write(2.0)
    job = make_job(f"{tmp_path}/net.py:Net", inputs=["x=1x4"])
    export_job(job, tmp_path / "a")
    assert export_job(job, tmp_path / "b").runs["onnx"].fresh == ()
    write(3.0)
    (tmp_path / "parts" / "new.txt").touch()
    assert "build" in export_job(job, tmp_path / "c").runs["onnx"].fresh


GUESTS = """
import torch
from torch import nn
class Inplace(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 8)
    def forward(self, x):
        return self.l(x.sub_(0.5).mul_(2))
class Top(Inplace):
    def forward(self, x):
        return self.l(x).topk(3)
class Mixed(Inplace):
    def forward(self, x):
        return {"y": self.l(x), "scale": 3.0, "none": None}
class Noisy(Inplace):
    def forward(self, x):
        return nn.functional.dropout(self.l(x))
class Half(Inplace):
    def forward(self, x):
        return self.l(x).bfloat16()
def asks():
    return nn.Linear(int(input()), 2)
def leaves():
    raise SystemExit(0)
"""


@pytest.mark.parametrize(("name", "outputs"), [("Inplace", 1), ("Top", 2), ("Mixed", 1)])
def test_unusual_guests_hold(tmp_path: Path, name: str, outputs: int) -> None:
    (tmp_path / "guests.py").write_text(GUESTS)
    bundle = edgeattn.export(f"{tmp_path}/guests.py:{name}", inputs=["x=2x4"], output=tmp_path)
    assert len(bundle.manifest.entries["main"].outputs) == outputs
    *_, feeds, _ = next(bundle.golden())
    spec = TensorSpec("x", (2, 4))
    assert any(np.array_equal(feeds["x"], spec.random(seed)) for seed in range(2000))  # as drawn, not as changed
    bundle.verify()


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("Noisy", CheckFailed, "not deterministic"),
        ("Half", ConversionFailed, "kind that no target takes"),
        ("asks", UsageError, "factory failed"),
        ("leaves", UsageError, "factory failed"),
    ],
)
def test_unusual_guests_are_refused(tmp_path: Path, name: str, kind: type[Exception], words: str) -> None:
    (tmp_path / "guests.py").write_text(GUESTS)
    with pytest.raises(kind, match=words):
        edgeattn.export(f"{tmp_path}/guests.py:{name}", inputs=["x=2x4"], output=tmp_path)


def test_files_beside_a_guest_shadow_no_library(tmp_path: Path) -> None:
    (tmp_path / "guests.py").write_text(GUESTS)
    for name in ("profile", "onnxscript", "timeit"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('shadowed')\n")
    edgeattn.export(f"{tmp_path}/guests.py:Top", inputs=["x=2x4"], output=tmp_path)


def test_a_guests_checkpoint(tmp_path: Path) -> None:
    import torch

    sys.path.insert(0, str(tmp_path))
    write_guest(tmp_path)
    from guest import Net  # type: ignore[import-not-found]

    net = Net().eval()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pth")
    bundle = edgeattn.export(
        f"{tmp_path}/guest.py:Net", inputs=["x=1x3x16x16"], checkpoint=tmp_path / "net.pth", output=tmp_path
    )
    x = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    assert np.allclose(bundle.run({"x": x})["output"], net(torch.from_numpy(x)).detach().numpy(), atol=1e-5)
    assert bundle.manifest.weights.kind == "checkpoint"


def test_null_target_runs_the_pipeline_without_a_toolchain(tmp_path: Path) -> None:
    bundle = edgeattn.export("fmvit-digits", target="null", output=tmp_path)
    assert bundle.verify().worst.relative_l2 <= 1e-5
    assert not (bundle.path / "run.py").exists()


def test_overflow_is_found_and_kept_in_fp32(tmp_path: Path) -> None:
    path = tmp_path / "hot.py"
    path.write_text(
        "import torch\nfrom torch import nn\n"
        "class Norm(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.norm, self.b = nn.Linear(16, 16), Norm(), nn.Linear(16, 4)\n"
        "    def forward(self, x):\n"
        "        return self.b(self.norm(self.a(x) * 1e4))\n"
    )
    bundle = edgeattn.export(f"{path}:Net", precision="fp16", inputs=["x=2x16"], output=tmp_path)
    kept = bundle.manifest.facts["entries"]["main"]["kept_in_fp32"]
    assert {k["module"] for k in kept} == {"norm"}
    assert bundle.verify().worst.relative_l2 <= 5e-3


def test_data_dependent_control_flow_names_the_module(tmp_path: Path) -> None:
    path = tmp_path / "branchy.py"
    path.write_text(
        "from torch import nn\n"
        "class Gate(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x if x.sum() > 0 else -x\n"
        "def build():\n"
        "    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Gate()))\n"
    )
    with pytest.raises(ConversionFailed) as caught:
        edgeattn.export(f"{path}:build", inputs=["x=1x4"], output=tmp_path)
    assert caught.value.where == "module 1.1"
    assert list(tmp_path.iterdir()) == [path] or not list(tmp_path.glob("*.onnx.*"))


def test_non_finite_output_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nan.py"
    path.write_text(
        "import torch\nfrom torch import nn\n"
        "class Log(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.log(x - 100)\n"
        "def build():\n"
        "    return nn.Sequential(nn.Linear(4, 4), Log(), nn.Linear(4, 2))\n"
    )
    with pytest.raises(CheckFailed) as caught:
        edgeattn.export(f"{path}:build", inputs=["x=1x4"], output=tmp_path)
    assert "module 1 " in str(caught.value.where)
    assert not list(tmp_path.glob("*.onnx.*"))


def test_a_crash_of_the_converter_is_an_error_message(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "crash.py"
    path.write_text("import os, signal\ndef build():\n    os.kill(os.getpid(), signal.SIGSEGV)\n")
    with pytest.raises(ConversionFailed) as caught:
        edgeattn.export(f"{path}:build", inputs=["x=1x4"], output=tmp_path)
    assert "SIGSEGV" in str(caught.value.why)
    assert Path(str(caught.value.where)).is_file()
    assert list(Cache.default().root.glob("scratch/*")) == []


def test_a_live_module_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match="by name"):
        edgeattn.export(object())  # type: ignore[arg-type]


def test_wrong_numbers_fail_and_name_the_module(
    digits: Bundle, tmp_path: Path, edgeattn_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A third party's converter that breaks one weight: no bundle, exit code 1, the module named."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, importlib.util, sys\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name != 'edgeattn.targets.onnx.lower':\n"
        "            return None\n"
        "        sys.meta_path.remove(self)\n"
        "        spec = importlib.util.find_spec(name)\n"
        "        run = spec.loader.exec_module\n"
        "        def broken(module):\n"
        "            run(module)\n"
        "            export = module.export\n"
        "            def worse(entry):\n"
        "                model = export(entry)\n"
        "                import onnx_ir as ir\n"
        "                names = list(model.graph.initializers)\n"
        "                name = next(n for n in names if n.startswith('stages.2.0') and 'weight' in n)\n"
        "                value = model.graph.initializers[name]\n"
        "                value.const_value = ir.tensor(value.const_value.numpy() * 1.5)\n"
        "                return model\n"
        "            module.export = worse\n"
        "        spec.loader.exec_module = broken\n"
        "        return spec\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    done = edgeattn_cli(
        "export",
        "fmvit-digits",
        "-o",
        tmp_path / "out",
        PYTHONPATH=str(tmp_path),
        EDGEATTN_CACHE=str(tmp_path / "cache"),
    )
    assert done.returncode == 1, done.stderr
    assert "the artifact's numbers do not hold" in done.stderr
    assert "module stages.2.0" in done.stderr
    assert not list((tmp_path / "out").glob("*"))
