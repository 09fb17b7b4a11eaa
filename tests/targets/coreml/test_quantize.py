"""Weights and data in few bits: what is stored, where the plan says so, and that the numbers hold."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeattn import device as devices
from edgeattn.capture import Program, run_eager
from edgeattn.core import tools
from edgeattn.core.errors import CheckFailed, EdgeAttnError, ToolchainMissing, UsageError
from edgeattn.core.numerics import Array, compare
from edgeattn.quant.plan import QuantPlan
from edgeattn.recipe import Keep, Preprocess
from edgeattn.targets.base import Artifact, LowerPlan
from edgeattn.targets.coreml import CoreMLTarget
from edgeattn.targets.coreml.facts import operations
from edgeattn.targets.coreml.lower import lower
from edgeattn.targets.coreml.mil.package import open_package
from edgeattn.targets.coreml.mil.values import DTYPES
from edgeattn.targets.coreml.runtime import MilRuntime
from edgeattn.targets.feeds import own_feeds
from tests.targets.coreml.lowering import METADATA, captured

WEIGHTED = ("conv", "conv_transpose", "linear", "matmul", "gather")


class Small(nn.Module):
    """Convolutions, one with a batch norm and one with a scale to be fused; attention; two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.depthwise, self.point = nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 64, 1)
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.expand, self.head = nn.Linear(64, 40), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.relu(self.norm(self.first(x))))
        x = (self.point(x) * 0.5).flatten(2).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        y: Tensor = self.head(F.gelu(self.expand(x))).mean(1)
        return y


MODULES = ("first", "depthwise", "point", "q", "k", "v", "expand", "head")


@pytest.fixture(scope="module")
def small() -> tuple[Small, Program, list[dict[str, Array]]]:
    torch.manual_seed(0)
    model = Small().eval()
    feeds = [{"x": (torch.randn(1, 3, 12, 12) * size).numpy()} for size in (1.0, 2.0, 0.5)]
    return model, captured(model, {"x": torch.from_numpy(feeds[0]["x"])}), feeds


def plan_of(
    precision: str,
    calibration: Any = (),
    *,
    keep: tuple[Keep, ...] = (),
    group: int = 32,
    observer: str = "mse",
    preprocess: Preprocess | None = None,
    labels: tuple[str, ...] = (),
    **options: str,
) -> LowerPlan:
    settled = CoreMLTarget().settle(options, None, precision)
    quant = QuantPlan(precision, group, observer, keep)
    return LowerPlan(
        precision,
        [],
        METADATA,
        options=settled,
        preprocess=preprocess,
        labels=labels,
        quant=quant,
        calibration=calibration,
    )


def facts_of(artifact: Artifact) -> dict[str, Any]:
    facts: dict[str, Any] = artifact.facts["entries"]["main"]
    return facts


def stored(artifact: Artifact) -> dict[str, tuple[str, str]]:
    """By module: dtype of the weight, and of the data before it was brought back, as the package on the disk says."""
    package = open_package(artifact.folder / artifact.entries["main"].file)
    made = {output.name: item for item in operations(package, constants=True) for output in item.outputs}

    def dtype(name: str) -> str:
        item = made.get(name)
        if item is None or not (item.type.startswith("constexpr_") or item.type == "dequantize"):
            return "float16"
        held = item.attributes if item.type.startswith("constexpr_") else {}
        for argument in ("quantized_data", "data", "indices", "input"):
            if argument in held:  # up to iOS17 a compressed weight is an attribute
                return DTYPES[held[argument].type.tensorType.dataType]
            if argument in item.inputs:
                (source,) = item.inputs[argument].arguments
                held_type = made[source.name].outputs[0].type if source.name else source.value.type
                return DTYPES[held_type.tensorType.dataType]
        raise AssertionError(item)

    found = {}
    for item in made.values():
        named = {name: argument.arguments[0].name for name, argument in item.inputs.items()}
        weight = next((named[n] for n in ("weight", "y", "x") if n in named and is_fixed(made.get(named[n]))), None)
        if item.type in WEIGHTED and weight is not None:
            found[package.modules.get(item.outputs[0].name, "")] = (
                dtype(weight),
                dtype(named["x"] if named["x"] != weight else ""),
            )
    return found


def is_fixed(item: Any) -> bool:
    return item is not None and (item.type == "const" or item.type.startswith("constexpr_"))


def worst(artifact: Artifact, model: nn.Module, feeds: list[dict[str, Array]]) -> float:
    """Largest relative L2 of the interpreter's output from PyTorch's."""
    runtime, inputs = MilRuntime(artifact), artifact.entries["main"].inputs
    found = []
    for sample in feeds:
        wanted = run_eager(model, {name: torch.from_numpy(value) for name, value in sample.items()}, ("y",))["y"]
        output = runtime.run("main", own_feeds(inputs, sample))["y"]
        found.append(compare(wanted.numpy(), output.reshape(wanted.shape)).relative_l2)
    return max(found)


CASES = (
    ("w8", {}, "int8", "float16", 4e-3),
    ("w8", {"deployment": "iOS18"}, "int8", "float16", 4e-3),
    ("w8", {"weights": "palette"}, "uint8", "float16", 3e-3),
    ("w4", {}, "int4", "float16", 6e-2),
    ("w4", {"weights": "palette"}, "uint8", "float16", 6e-2),  # packed
    ("w4", {"weights": "palette", "deployment": "iOS18"}, "uint4", "float16", 6e-2),
    ("w8a8", {}, "int8", "int8", 6e-3),
    ("w8a8", {"deployment": "iOS18"}, "int8", "int8", 6e-3),
)


@pytest.mark.parametrize(("precision", "options", "weights", "data", "bound"), CASES)
def test_each_precision_stores_what_it_says_and_holds(
    small: Any,
    precision: str,
    options: dict[str, str],
    weights: str,
    data: str,
    bound: float,
    tmp_path: Path,
) -> None:
    model, program, feeds = small
    (tmp_path / "half").mkdir()
    (tmp_path / "few").mkdir()
    half = lower(program, plan_of("fp16"), tmp_path / "half")
    few = lower(program, plan_of(precision, feeds, **options), tmp_path / "few")
    # Kernels over space stay in 8 bits.
    eight = {"int4": "int8", "uint4": "uint8"}.get(weights, weights)
    expected = {name: (eight if name in ("first", "depthwise") else weights, data) for name in MODULES}
    assert stored(few) == expected
    assert worst(half, model, feeds) < worst(few, model, feeds) < bound
    assert facts_of(few)["weight_bytes"] < 0.7 * facts_of(half)["weight_bytes"]
    quantized = facts_of(few)["quantized"]
    assert [noted["module"] for noted in quantized["operations"]] == list(MODULES)
    assert {noted["data"] for noted in quantized["operations"]} == {data}
    assert quantized["left_in_floats"] == []
    assert facts_of(few)["integer"] == []


@pytest.mark.parametrize("precision", ["w8", "w4", "w8a8"])
@pytest.mark.parametrize("kept", ["first", "point", "k", "head"])
def test_a_kept_module_stays_in_floats_and_nothing_else(small: Any, precision: str, kept: str, tmp_path: Path) -> None:
    _, program, feeds = small
    without = stored(lower(program, plan_of(precision, feeds), tmp_path))
    (tmp_path / "kept").mkdir()
    keep = Keep(modules=[kept], at="float", why="a test")
    artifact = lower(program, plan_of(precision, feeds, keep=(keep,)), tmp_path / "kept")
    assert stored(artifact) == without | {kept: ("float16", "float16")}
    (left,) = facts_of(artifact)["quantized"]["left_in_floats"]
    assert (left["module"], left["why"]) == (kept, f"the recipe keeps {kept}")


@pytest.mark.parametrize(("precision", "others"), [("w4", ("int4", "float16")), ("w8a8", ("int8", "int8"))])
def test_a_module_kept_at_w8_has_its_weights_alone_in_eight_bits(
    small: Any, precision: str, others: tuple[str, str], tmp_path: Path
) -> None:
    _, program, feeds = small
    keep = Keep(modules=["q"], at="w8", why="a test")
    found = stored(lower(program, plan_of(precision, feeds, keep=(keep,)), tmp_path))
    assert found["q"] == ("int8", "float16")
    # The three read the same data, two of them through the pair.
    assert found["k"] == found["v"] == others


def test_a_pair_is_made_once_for_all_that_read_the_data(small: Any, tmp_path: Path) -> None:
    _, program, feeds = small
    artifact = lower(program, plan_of("w8a8", feeds), tmp_path)
    nodes = facts_of(artifact)["nodes"]
    assert nodes["quantize"] == nodes["dequantize"] == len(MODULES) - 2
    traced = {item.name: item.module for item in MilRuntime(artifact).trace("main", feeds[0])}
    pairs = {name: module for name, module in traced.items() if name.endswith("_dequantized")}
    assert sorted(pairs.values()) == sorted(set(MODULES) - {"k", "v"})


class Widths(nn.Module):
    """A linear layer of so many inputs, in the middle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.middle = nn.Linear(64, width), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.middle(self.before(x).relu())
        return y


@pytest.mark.parametrize(
    ("width", "group", "words"),
    [
        (96, 32, "int4, blocks of 32"),
        (96, 64, "int4, blocks of 32"),
        (128, 128, "int4, blocks of 128"),
        (48, 32, "int4, blocks of 16"),
        (40, 32, "int4, blocks of 8"),
        (36, 32, "int8, by channel"),
        (15, 32, "int8, by channel"),
    ],
)
def test_blocks_divide_the_channels_or_give_way_to_eight_bits(
    width: int, group: int, words: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Widths(width).eval(), torch.randn(4, 64)
    artifact = lower(captured(model, {"x": x}), plan_of("w4", group=group), tmp_path)
    first, second = facts_of(artifact)["quantized"]["operations"]
    assert first["weights"] == f"int4, blocks of {min(group, 64)}"
    assert (second["module"], second["weights"]) == ("middle", words)
    assert stored(artifact)["middle"] == (words.split(",")[0], "float16")
    assert worst(artifact, model, [{"x": x.numpy()}]) < 0.12


class Others(nn.Module):
    """Weights that stand elsewhere: a table, a plain product, transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)
        self.product = nn.Parameter(torch.randn(32, 32) / 6)
        self.up = nn.ConvTranspose1d(32, 32, 2)
        self.grouped = nn.ConvTranspose1d(32, 32, 2, groups=4)

    def forward(self, ids: Tensor) -> Tensor:
        x = (self.table(ids) @ self.product).transpose(1, 2)
        y: Tensor = self.grouped(self.up(x))
        return y


@pytest.mark.parametrize(("precision", "data"), [("w8", "float16"), ("w4", "float16"), ("w8a8", "int8")])
def test_other_weighted_operations(precision: str, data: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Others().eval(), torch.randint(0, 64, (1, 6), dtype=torch.int32)
    feeds = [{"ids": ids.numpy()}]
    artifact = lower(captured(model, {"ids": ids}), plan_of(precision, feeds), tmp_path)
    weights = "int4" if precision == "w4" else "int8"
    found = stored(artifact)
    assert found.pop("up") == ("int8", data)  # a kernel over space
    # A row that is looked up is multiplied with nothing.
    assert found["table"] == (weights, "float16")
    assert found[""] == (weights, data)
    assert found["grouped"] == ("float16", "float16")
    (left,) = facts_of(artifact)["quantized"]["left_in_floats"]
    assert left["module"] == "grouped"
    assert worst(artifact, model, feeds) < (0.25 if precision == "w4" else 0.02)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x))
        return y


def test_activations_are_float16_and_mended_for_it(tmp_path: Path) -> None:
    """The square of 300 does not fit."""
    torch.manual_seed(0)
    model, x = Norm().eval(), 300 + torch.randn(2, 64)
    artifact = lower(captured(model, {"x": x}), plan_of("w8"), tmp_path)
    assert worst(artifact, model, [{"x": x.numpy()}]) < 2e-2


def test_an_image_classifier_stays_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 3)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 1, 3, 8, 8)).astype(np.float32)
    preprocess = Preprocess(scale=1 / 255, mean=[0.5], std=[0.25])
    feeds = [{"x": ((p / 255 - 0.5) / 0.25).astype(np.float32)} for p in pixels]
    program = captured(model, {"x": torch.from_numpy(feeds[0]["x"])})
    plan = plan_of("w8a8", feeds, preprocess=preprocess, labels=("a", "b", "c"), image="rgb", classifier="yes")
    artifact = lower(program, plan, tmp_path)
    assert stored(artifact) == {"0": ("int8", "int8"), "3": ("int8", "int8")}
    description = open_package(tmp_path / "main.mlpackage").spec.description
    assert description.input[0].type.WhichOneof("Type") == "imageType"
    assert description.predictedFeatureName == "classLabel"
    assert worst(artifact, model, feeds) < 2e-2


def scales(artifact: Artifact) -> dict[str, float]:
    return {noted["module"]: noted["activation_scale"] for noted in facts_of(artifact)["quantized"]["operations"]}


def test_every_calibration_sample_counts(small: Any, tmp_path: Path) -> None:
    """coremltools 9.0 keeps the last sample's range alone."""
    _, program, feeds = small
    ordinary, large = feeds[0], {"x": 10 * feeds[0]["x"]}
    found = []
    for i, samples in enumerate(([ordinary, large], [large, ordinary], [large], [ordinary])):
        (tmp_path / str(i)).mkdir()
        artifact = lower(program, plan_of("w8a8", samples, observer="minmax"), tmp_path / str(i))
        assert facts_of(artifact)["quantized"]["calibrated_on"] == f"{len(samples)} samples"
        found.append(scales(artifact))
    both, turned, alone, small_alone = found
    assert both == turned
    assert both["first"] == alone["first"] == pytest.approx(float(np.abs(large["x"]).max()) / 127, rel=1e-3)
    assert small_alone["first"] == pytest.approx(both["first"] / 10, rel=1e-3)


def test_calibration_holds_one_sample_at_a_time(small: Any, tmp_path: Path) -> None:
    _, program, feeds = small
    held: list[tuple[int, int]] = []

    class Stream:
        """Fresh arrays, each let go of."""

        def __iter__(self) -> Iterator[Mapping[str, Array]]:
            alive: list[weakref.ref[Array]] = []
            for i in range(6):
                gc.collect()
                tensors = sum(isinstance(item, Tensor) for item in gc.get_objects())
                held.append((sum(one() is not None for one in alive), tensors))
                value = feeds[0]["x"] * (1 + i)
                alive.append(weakref.ref(value))
                yield {"x": value}
                del value

    lower(program, plan_of("w8a8", Stream()), tmp_path)
    assert len(held) == 6
    arrays, tensors = zip(*held, strict=True)
    assert max(arrays) <= 1
    assert max(tensors[2:]) <= tensors[1]


def test_samples_stand_in_for_a_calibration_set(small: Any, tmp_path: Path) -> None:
    _, program, feeds = small
    plan = plan_of("w8a8")
    with pytest.raises(CheckFailed, match="nothing to calibrate on"):
        lower(program, plan, tmp_path)
    (tmp_path / "out").mkdir()
    given = LowerPlan(**vars(plan) | {"samples": feeds})
    assert facts_of(lower(program, given, tmp_path / "out"))["quantized"]["calibrated_on"] == "3 samples"


def test_a_model_without_anything_to_quantize(small: Any, tmp_path: Path) -> None:
    _, program, feeds = small
    with pytest.raises(CheckFailed, match="nothing to quantize"):
        lower(captured(nn.Sequential(nn.ReLU()), {"x": torch.ones(2, 3)}), plan_of("w8"), tmp_path)
    keep = Keep(modules=["*"], at="float", why="a test")
    with pytest.raises(CheckFailed, match="nothing to quantize") as caught:
        lower(program, plan_of("w8", feeds, keep=(keep,)), tmp_path)
    assert "the recipe keeps" in str(caught.value)


def test_palettes_need_scikit_learn(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, program, _ = small
    monkeypatch.setattr(tools, "version", lambda name: None)
    with pytest.raises(ToolchainMissing, match="scikit-learn") as caught:
        lower(program, plan_of("w4", weights="palette"), tmp_path)
    assert caught.value.fix == "pip install scikit-learn"


@pytest.mark.parametrize(
    ("precision", "options", "system"),
    [
        ("w8", {}, "iOS16"),
        ("w8a8", {}, "iOS17"),
        ("w4", {}, "iOS18"),
        ("w4", {"weights": "palette"}, "iOS16"),
        ("w8a8", {"deployment": "macOS15"}, "iOS18"),
        ("fp16", {}, "iOS16"),
        ("", {}, "iOS16"),
    ],
)
def test_a_precision_takes_the_system_that_it_needs(precision: str, options: dict[str, str], system: str) -> None:
    assert CoreMLTarget().settle(options, None, precision)["deployment"] == system


@pytest.mark.parametrize(
    ("precision", "options", "words"),
    [
        ("w4", {"deployment": "iOS17"}, "-O deployment=iOS18, or -O weights=palette"),
        ("w4", {"deployment": "macOS13"}, "it begins with iOS18 (macOS15)"),
        ("w8a8", {"deployment": "iOS16"}, "-O deployment=iOS17"),
        ("w8a8", {"weights": "palette"}, "there is nothing to make palettes of"),
        ("fp16", {"weights": "palette"}, "--precision w8 or w4"),
    ],
)
def test_what_a_precision_cannot_do_with_is_refused(precision: str, options: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        CoreMLTarget().settle(options, None, precision)
    assert words in str(caught.value)


def test_a_device_says_the_system() -> None:
    new = devices.resolve("iphone-15-pro")
    old = new.model_copy(update={"deployment_target": "iOS16"})
    target = CoreMLTarget()
    assert target.settle({}, new, "w8a8")["deployment"] == "iOS18"
    assert target.settle({"deployment": "iOS17"}, old, "w8a8")["deployment"] == "iOS17"
    with pytest.raises(EdgeAttnError) as caught:
        target.settle({}, old, "w8a8")
    assert "the device's" in str(caught.value)
