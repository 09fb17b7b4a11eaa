"""Programs through the optical target: partition, planes, bundles, and what is refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgeattn
from edgeattn import device, targets
from edgeattn.bundle import Bundle
from edgeattn.capture import capture
from edgeattn.core.errors import CheckFailed, ConversionFailed, UsageError
from edgeattn.device import Effects, Optics
from edgeattn.targets.base import Artifact, LowerPlan
from edgeattn.targets.optical.lower import lower
from edgeattn.targets.optical.program import FILE, OpticalProgram
from edgeattn.targets.optical.runtime import OpticalRuntime

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def place(rows: int = 200, cols: int = 150, **effects: object) -> device.Device:
    optics = Optics(rows=rows, cols=cols, frame_rate_hz=1e3, effects=Effects(**effects))  # type: ignore[arg-type]
    return device.Device(
        name="bench", description="", kind="optical", machine="any", targets=("optical",), optics=optics
    )


def lowered(
    model: nn.Module, out: Path, *inputs: Tensor, on: device.Device | None = None
) -> tuple[Artifact, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The artifact, feeds and what the model makes of them."""
    model.eval()
    names = [f"x{i}" for i in range(len(inputs))]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    with torch.no_grad():
        y = model(*inputs)
    results = y if isinstance(y, tuple) else (y,)
    program = capture(model, dict(zip(names, inputs, strict=True)), tuple(f"y{i}" for i in range(len(results))))
    artifact = lower(program, LowerPlan("fp32", [feeds], {}), on or place(), out)
    return artifact, feeds, {t.name: r.numpy() for t, r in zip(artifact.entries["main"].outputs, results, strict=True)}


def error(reference: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(other - reference) / np.linalg.norm(reference))


class Mixed(nn.Module):
    """All that optics take: 1-D and 2-D, strides, groups, dilation, transposed, linear on both sides, no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)
        self.dilated = nn.Conv2d(8, 6, 3, dilation=2, padding=3)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.row = nn.Conv1d(4, 5, 4, stride=3, padding=1)
        self.up_row = nn.ConvTranspose1d(5, 3, 5, stride=2, padding=2, dilation=2)
        self.mix = nn.Parameter(torch.randn(7, 3))
        self.head = nn.Linear(11, 10)
        self.last = nn.Linear(10, 13, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        x = self.dilated(x + self.depthwise(x))
        up = self.up(x)
        y = self.up_row(torch.tanh(self.row(up.flatten(2))))
        y = torch.matmul(self.mix, y)[..., :11]  # constants on the left
        scores = torch.softmax(self.head(y) @ self.head(y).transpose(1, 2), -1)  # two tensors of data: electronic
        return scores @ self.last(self.head(y)), up


def test_all_kinds_of_operations_give_the_models_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact, feeds, wanted = lowered(Mixed(), tmp_path, torch.randn(2, 3, 16, 16))
    runtime = targets.get("optical").open(artifact)
    seen = runtime.run("main", feeds)
    assert {name: error(wanted[name], seen[name]) < 1e-5 for name in wanted} == dict.fromkeys(wanted, True)
    program = OpticalProgram.read(tmp_path / "optical")
    kinds = sorted(op.op for op in program.operations)
    assert [k for k in kinds if k.startswith("Conv")] == ["Conv"] * 4 + ["ConvTranspose"] * 2
    assert sum(k in ("MatMul", "Gemm") for k in kinds) >= 3
    assert {op.module for op in program.operations} >= {"stem", "depthwise", "dilated", "up", "row", "up_row", "last"}
    assert max(op.error for op in program.operations) < 1e-5
    facts = artifact.facts["entries"]["main"]["optics"]
    assert facts["frames"] == sum(op.plan.frames for op in program.operations)
    assert 0.5 < facts["share"] < 1
    assert facts["seconds"]["frames"] == pytest.approx(facts["frames"] / 1e3)
    # Electronics have what is left, and nothing of what is optical.
    for turn in program.turns:
        if turn.electronics:
            graph = ir.load(tmp_path / "optical" / turn.electronics).graph
            assert not [node.op_type for node in graph if node.op_type.startswith("Conv")]


def test_several_samples_share_the_planes_and_keep_their_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact, feeds, _ = lowered(Mixed(), tmp_path, torch.randn(1, 3, 16, 16))
    runtime = OpticalRuntime(artifact)
    others = [{"x0": np.random.default_rng(i).normal(size=feeds["x0"].shape).astype(np.float32)} for i in range(3)]
    for given, seen in zip(others, runtime.run_many("main", others), strict=True):
        alone = runtime.run("main", given)
        assert all(error(alone[name], seen[name]) < 1e-5 for name in alone)


@pytest.mark.parametrize("sign", ["reference", "offset", "kernel_split", "full_split"])
def test_a_devices_sign_scheme_holds_and_its_camera_is_felt(sign: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    on = place(sign=sign, full_well_e=1e4, read_noise_e=3.0, adc_bits=12)
    artifact, feeds, wanted = lowered(Mixed(), tmp_path, torch.randn(1, 3, 16, 16), on=on)
    program = OpticalProgram.read(tmp_path / "optical")
    first = program.operations[0]
    assert first.signed
    assert first.plan.work.rows == (2 if "split" in sign else 1) * first.work.rows
    name = list(wanted)[1]
    errors = {}
    for label, effects in (("ideal", None), ("sign", Effects(sign=sign)), ("device", program.optics.effects)):
        errors[label] = error(wanted[name], OpticalRuntime(artifact, effects).run("main", feeds)[name])
    assert errors["ideal"] < 1e-5
    assert errors["sign"] < 1e-3
    assert 2e-3 < errors["device"] < 0.3


def test_traces_name_modules_for_the_search_of_a_divergence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact, feeds, wanted = lowered(Mixed(), tmp_path, torch.randn(1, 3, 16, 16))
    runtime = targets.get("optical").open(artifact)
    traced = {item.name: item for item in runtime.trace("main", feeds)}
    assert {item.module for item in traced.values()} >= {"stem", "head"}
    steps = runtime.steps("main")
    assert {name for step in steps for name in step.outputs} >= set(wanted)
    known = {*feeds}
    for step in steps:
        assert set(step.inputs) <= known, step
        known |= set(step.outputs)
    wanted_only = list(runtime.trace("main", feeds, [steps[0].outputs[0]]))
    assert [item.name for item in wanted_only] == [steps[0].outputs[0]]


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(1, 2), -1)


def test_a_model_without_anything_for_optics_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConversionFailed, match="nothing that optics can compute") as caught:
        lowered(Silent(), tmp_path, torch.randn(1, 4, 4))
    assert "constant weights" in str(caught.value.why)


def test_a_kernel_larger_than_the_plane_is_refused_by_module(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 21, padding=10))
    with pytest.raises(ConversionFailed, match="kernel is larger than the optical plane") as caught:
        lowered(model, tmp_path, torch.randn(1, 1, 16, 16), on=place(16, 16))
    assert caught.value.value == "21 x 21"
    assert caught.value.where == "module 0"


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 2, 9])
def test_a_map_larger_than_the_plane_is_shown_in_pieces(stride: int, padding: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, (7, 3), stride=stride, padding=padding)
    artifact, feeds, wanted = lowered(model, tmp_path, torch.randn(2, 2, 50, 12), on=place(16, 33))
    (op,) = OpticalProgram.read(tmp_path / "optical").operations
    assert op.layout.pieces[0] > 1
    (seen,) = targets.get("optical").open(artifact).run("main", feeds).values()
    assert error(next(iter(wanted.values())), seen) < 1e-5


def test_long_signals_and_transposed_ones_are_shown_in_pieces(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 9, stride=4, dilation=2), nn.ConvTranspose1d(4, 3, 6, stride=3, padding=1))
    artifact, feeds, wanted = lowered(model, tmp_path, torch.randn(1, 2, 1000), on=place(20, 60))
    assert [op.layout.pieces[1] > 3 for op in OpticalProgram.read(tmp_path / "optical").operations] == [True, True]
    (seen,) = targets.get("optical").open(artifact).run("main", feeds).values()
    assert error(next(iter(wanted.values())), seen) < 1e-5


def test_a_vector_larger_than_the_plane_is_shown_in_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact, feeds, wanted = lowered(nn.Linear(1000, 7), tmp_path, torch.randn(3, 1000), on=place(16, 20))
    (op,) = OpticalProgram.read(tmp_path / "optical").operations
    assert op.work.channels == 4
    (seen,) = targets.get("optical").open(artifact).run("main", feeds).values()
    assert error(next(iter(wanted.values())), seen) < 1e-5


def test_numbers_that_are_not_finite_are_no_proof(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckFailed, match="gives other numbers"):
        lowered(model, tmp_path, torch.randn(1, 4))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A guest's bundle, by the real pipeline."""
    folder = tmp_path_factory.mktemp("optical")
    source = "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), "
    source += "nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))\n"
    (folder / "guest.py").write_text(source)
    factory, spec = f"{folder / 'guest.py'}:net", "x=1x2x8x8"
    return edgeattn.export(factory, device="optical-4f-lcos-1khz", inputs=[spec], output=folder)


def test_a_bundle_has_program_masks_and_electronics_and_proves_itself(bundle: Bundle) -> None:
    names = set(bundle.manifest.files)
    assert f"optical/{FILE}" in names
    assert {"optical/masks/000-0.npy", "optical/masks/000-0.bias.npy"} <= names
    assert any(name.startswith("optical/electronics/") for name in names)
    assert "run.py" not in names, "no device runs it without EdgeAttn"
    assert bundle.manifest.target == "optical"
    assert bundle.manifest.device == "optical-4f-lcos-1khz"
    assert bundle.verify().worst.relative_l2 < 1e-4
    assert "no optical hardware" in bundle.manifest.unproven


def test_a_damaged_program_is_an_error_in_words(bundle: Bundle, tmp_path: Path) -> None:
    artifact = bundle.artifact()
    data = json.loads((artifact.folder / "optical" / FILE).read_text())
    for damage in ("{", json.dumps({**data, "version": 99}), json.dumps({**data, "turns": [{}]})):
        (tmp_path / "optical").mkdir(exist_ok=True)
        (tmp_path / "optical" / FILE).write_text(damage)
        with pytest.raises(CheckFailed, match="program cannot be read"):
            OpticalRuntime(Artifact(tmp_path, "fp32", artifact.entries)).program("main")


def test_a_mask_file_cannot_be_outside_of_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    artifact = bundle.artifact()
    data = json.loads((artifact.folder / "optical" / FILE).read_text())
    data["turns"][0]["optics"][0]["masks"] = "../../secret.npy"
    (tmp_path / "optical").mkdir()
    (tmp_path / "optical" / FILE).write_text(json.dumps(data))
    runtime = OpticalRuntime(Artifact(tmp_path, "fp32", artifact.entries))
    with pytest.raises(UsageError):
        runtime.program("main").operations[0].kernels(tmp_path / "optical")


def test_the_same_device_with_other_planes_is_lowered_anew(bundle: Bundle) -> None:
    target = targets.get("optical")
    named = [target.of_device(device.resolve(f"optical-4f-{name}")) for name in ("4k-2mhz", "lcos-1khz")]
    assert named[0] != named[1]
    assert target.of_device(None) == named[0], "what the literature assumes is the default"
    assert targets.get("onnx").of_device(device.resolve("raspberry-pi-5")) == {}


def test_a_device_of_another_target_is_refused(edgeattn_cli: Cli) -> None:
    done = edgeattn_cli("export", "fmvit-digits", "--target", "optical", "--device", "iphone-15-pro")
    assert done.returncode == 2
    assert "does not run this target" in done.stderr
    done = edgeattn_cli("export", "fmvit-digits", "--target", "onnx", "--device", "optical-4f-4k-2mhz")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "it runs optical" in done.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("adc_bits = 0", "adc_bits: given 0"),
        ("mask_phase_bits = 40", "mask_phase_bits: given 40"),
        ("input_amplitude_bits = -1", "input_amplitude_bits: given -1"),
        ("full_well_e = -5.0", "full_well_e: given -5.0"),
        ("laser_drift = nan", "laser_drift: given nan"),
        ("read_noise_e = 3.0", "full_well_e says how many"),
        ('sign = "field"', "a camera sees no sign"),
        ('sign = "both"', "sign: given 'both'"),
        ("mask_shift_px = [1.0]", "mask_shift_px"),
        ("mask_shift_px = [inf, 0.0]", "two numbers of pixels"),
        ("adc_bit = 8", "did you mean 'adc_bits'?"),
    ],
)
def test_impossible_effects_of_a_device_file_are_named(line: str, words: str, tmp_path: Path) -> None:
    good = 'sign = "kernel_split"' if not line.startswith("sign") else "adc_bits = 8"
    text = (
        'name = "bench"\ndescription = "b"\nkind = "optical"\nmachine = "any"\ntargets = ["optical"]\n[optics]\n'
        f"rows = 100\ncols = 100\nframe_rate_hz = 10.0\n[optics.effects]\n{good}\n{line}\n"
    )
    (tmp_path / "bench.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        device.load(tmp_path / "bench.toml")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("frame_rate_hz = -1.0", "frame_rate_hz: given -1.0"),
        ("frame_rate_hz = nan", "frame_rate_hz: given nan"),
        ("frame_rate_hz = 1.0\nmask_rate_hz = 0.0", "mask_rate_hz: given 0.0"),
        ("frame_rate_hz = 1.0\nreadout_px_s = -3.0", "readout_px_s: given -3.0"),
        ("", "frame_rate_hz: missing"),
        ("frame_rate_hz = 1.0\nrepeats = 0", "repeats: given 0"),
    ],
)
def test_impossible_rates_are_named(line: str, words: str, tmp_path: Path) -> None:
    text = (
        'name = "bench"\ndescription = "b"\nkind = "optical"\nmachine = "any"\ntargets = ["optical"]\n[optics]\n'
        f"rows = 100\ncols = 100\n{line}\n"
    )
    (tmp_path / "bench.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        device.load(tmp_path / "bench.toml")
    assert words in str(caught.value)


def test_optics_and_their_target_go_together(tmp_path: Path) -> None:
    head = 'name = "bench"\ndescription = "b"\nkind = "optical"\nmachine = "any"\n'
    (tmp_path / "bench.toml").write_text(f'{head}targets = ["optical"]\n')
    with pytest.raises(UsageError) as caught:
        device.load(tmp_path / "bench.toml")
    assert "needs a table [optics]" in str(caught.value)
    optics = "[optics]\nrows = 9\ncols = 9\nframe_rate_hz = 1.0\n"
    (tmp_path / "bench.toml").write_text(f'{head}targets = ["onnx"]\n{optics}')
    with pytest.raises(UsageError) as caught:
        device.load(tmp_path / "bench.toml")
    assert "is of target optical" in str(caught.value)
