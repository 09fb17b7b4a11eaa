"""Target tflite's integers: what is stored and computed how, by the plan, and whether LiteRT gets it right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from edgeattn.capture import Program, capture, run_eager
from edgeattn.core.errors import CheckFailed, ConversionFailed, UsageError
from edgeattn.core.numerics import Array, compare
from edgeattn.models.layers.rlmhsa import RLMHSA
from edgeattn.quant.plan import QuantPlan
from edgeattn.recipe import Keep
from edgeattn.targets.base import Artifact, LowerPlan
from edgeattn.targets.feeds import own_feeds
from edgeattn.targets.tflite import TFLITE_RUNTIME, TFLiteTarget, flatbuffer
from edgeattn.targets.tflite.floats import in_floats, unpack
from edgeattn.targets.tflite.litert import interpreter

TARGET = TFLiteTarget()


class Hybrid(nn.Module):
    """What FMViT is made of: convolutions of every kind, attention with two heads, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.act = nn.ReLU()
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.grouped = nn.Conv2d(32, 64, 3, padding=1, groups=2)
        self.point = nn.Conv2d(64, 48, 1)
        self.expand = nn.Conv2d(48, 64, 1)
        self.attention = RLMHSA(64, 1, 32)
        for name, out in (("q", 32), ("k", 32), ("v", 64), ("proj", 64)):
            setattr(self.attention, name, nn.Conv2d(64, out, 1))
        self.attention.scale = 1.0
        self.attention.pool = nn.Identity()
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.act(self.depthwise(self.act(self.stem(x)))))
        x = self.expand(self.act(self.point(x)))
        y: torch.Tensor = self.head((x + self.attention(x)).mean((2, 3)))
        return y


CONVS = ("stem", "depthwise", "grouped", "point", "expand")
PROJECTIONS = ("attention.q", "attention.k", "attention.v", "attention.proj")
MODULES = {*CONVS, *PROJECTIONS, "head"}


class Lowered:
    """A model in a precision; ``outputs`` are LiteRT's of one sample, ``expected`` PyTorch's."""

    def __init__(
        self, program: Program, expected: Array, feeds: dict[str, Array], folder: Path, plan: LowerPlan
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.expected = expected
        self.artifact: Artifact = TARGET.lower(program, plan, folder)
        self.runtime = TARGET.open(self.artifact)
        self.feeds = own_feeds(self.artifact.entries["main"].inputs, feeds)
        self.output = self.runtime.run("main", self.feeds)["y"]
        self.facts = self.artifact.facts["entries"]["main"]
        self.quantized = self.facts.get("quantized", {})
        self.data = (folder / "model.tflite").read_bytes()
        self.flat = flatbuffer.read(self.data)

    @property
    def error(self) -> float:
        return compare(self.expected, self.output).relative_l2

    def weights(self) -> dict[str, str]:
        return {item["module"]: item["weights"] for item in self.quantized["operations"]}

    def rules(self) -> set[str]:
        return {finding.rule for finding in self.artifact.findings}


Lower = Callable[..., Lowered]


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    torch.manual_seed(0)
    model = Hybrid().eval()
    samples = [{"x": torch.randn(1, 3, 16, 16)} for _ in range(8)]
    program = capture(model, samples[0], ("y",))
    expected = run_eager(model, samples[0], ("y",))["y"].detach().numpy()
    arrays = [{"x": feeds["x"].numpy()} for feeds in samples]

    def make(precision: str, keep: Sequence[Keep] = (), group: int = 32, **more: object) -> Lowered:
        quant = QuantPlan(precision, group, keep=tuple(keep))
        plan = LowerPlan(precision, [], {}, quant=quant, **{"calibration": arrays, **more})  # type: ignore[arg-type]
        return Lowered(program, expected, arrays[0], tmp_path_factory.mktemp(precision), plan)

    return make


@pytest.fixture(scope="module")
def fp32(lower: Lower) -> Lowered:
    return lower("fp32")


@pytest.fixture(scope="module")
def w8a8(lower: Lower) -> Lowered:
    return lower("w8a8")


@pytest.fixture(scope="module")
def w4(lower: Lower) -> Lowered:
    return lower("w4")


def types(lowered: Lowered, kind: str) -> list[tuple[str, ...]]:
    """Types of data, weights and output of every operation of that kind."""
    graph = lowered.flat.subgraphs[0]
    return [
        tuple(flatbuffer.tensor_of(graph, int(i), "").dtype for i in (*op.inputs[:2], op.outputs[0]))
        for op in graph.operators
        if flatbuffer.operator_name(lowered.flat, op) == kind
    ]


def test_w8(lower: Lower, fp32: Lowered) -> None:
    small = lower("w8")
    assert small.error < 2e-2
    assert small.weights() == dict.fromkeys(MODULES, "int8")
    assert small.quantized["left_in_floats"] == []
    assert small.facts["weight_bytes"] < 0.3 * fp32.facts["weight_bytes"]
    data = {item["module"]: item["data"] for item in small.quantized["operations"]}
    assert data.pop("depthwise") == "float"
    assert set(data.values()) == {"int8 as it runs"}
    assert "off-xnnpack" not in small.rules()


def test_w8a8_runs_in_integers(w8a8: Lowered) -> None:
    assert w8a8.error < 3e-2
    assert w8a8.weights() == dict.fromkeys(MODULES, "int8")
    data = {item["module"]: item["data"] for item in w8a8.quantized["operations"]}
    # A product of heads has no kernel for it, and the logits are not rounded to 256 levels.
    assert {name for name, words in data.items() if words == "int8"} == {*CONVS, "attention.proj"}
    assert set(types(w8a8, "CONV_2D")) == set(types(w8a8, "DEPTHWISE_CONV_2D")) == {("int8", "int8", "int8")}
    assert types(w8a8, "FULLY_CONNECTED")[-1] == ("float32", "int8", "float32")
    assert all(set(each) == {"float32"} for each in types(w8a8, "SOFTMAX"))
    assert w8a8.facts["nodes"]["QUANTIZE"] <= 3
    assert w8a8.facts["nodes"]["DEQUANTIZE"] <= 2
    (entry,) = w8a8.artifact.entries.values()
    assert {t.dtype for t in (*entry.inputs, *entry.outputs)} == {"float32"}
    assert "off-xnnpack" not in w8a8.rules()


def test_w8a8_has_scales_of_its_own_for_each_channel_and_tensor(w8a8: Lowered) -> None:
    graph = w8a8.flat.subgraphs[0]
    convs = [op for op in graph.operators if flatbuffer.operator_name(w8a8.flat, op) == "CONV_2D"]
    for conv in convs:
        weights = graph.tensors[conv.inputs[1]]
        assert len(weights.quantization.scale) == weights.shape[0]
    scales = {float(graph.tensors[conv.outputs[0]].quantization.scale[0]) for conv in convs}
    assert len(scales) == len(convs)


def test_every_calibration_sample_counts(lower: Lower) -> None:
    quiet = [{"x": np.full((1, 3, 16, 16), 0.01, np.float32)}] * 3
    loud = {"x": np.random.default_rng(0).normal(0, 3, (1, 3, 16, 16)).astype(np.float32)}

    def first_scale(lowered: Lowered) -> float:
        graph = lowered.flat.subgraphs[0]
        names = [flatbuffer.operator_name(lowered.flat, op) for op in graph.operators]
        quantize = graph.operators[names.index("QUANTIZE")]
        return float(graph.tensors[quantize.outputs[0]].quantization.scale[0])

    only_quiet, last_is_loud = lower("w8a8", calibration=quiet), lower("w8a8", calibration=[*quiet, loud])
    assert first_scale(only_quiet) == pytest.approx(0.01 / 255, rel=0.02)
    assert first_scale(last_is_loud) > 100 * first_scale(only_quiet)


def test_calibration_is_a_stream_and_its_lack_is_said(lower: Lower) -> None:
    class Stream:
        """Samples that are made when asked for."""

        def __init__(self) -> None:
            self.alive = 0

        def __iter__(self) -> Iterator[dict[str, Array]]:
            for seed in range(4):
                yield {"x": np.random.default_rng(seed).normal(size=(1, 3, 16, 16)).astype(np.float32)}
                self.alive += 1

    stream = Stream()
    assert lower("w8a8", calibration=stream).error < 5e-2
    assert stream.alive == 4
    with pytest.raises(CheckFailed, match="no samples"):
        lower("w8a8", calibration=())
    with pytest.raises(CheckFailed, match="not finite"):
        lower("w8a8", calibration=[{"x": np.full((1, 3, 16, 16), np.inf, np.float32)}])


def test_the_trace_of_w8a8_is_in_floats(w8a8: Lowered, fp32: Lowered) -> None:
    def last(lowered: Lowered) -> dict[str, Array]:
        return {item.module: item.value for item in lowered.runtime.trace("main", lowered.feeds)}

    ours, theirs = last(w8a8), last(fp32)
    assert {"expand", "attention.proj", "head"} <= set(ours)
    assert all(value.dtype == np.float32 for value in ours.values())
    for name in set(ours) & set(theirs):
        assert compare(theirs[name], ours[name]).relative_l2 < 5e-2, name
    outputs = {item.name: item.value for item in w8a8.runtime.trace("main", w8a8.feeds)}
    assert compare(w8a8.output, outputs["y"]).relative_l2 < 2e-2


def test_w4(w4: Lowered, fp32: Lowered) -> None:
    assert w4.error < 0.12
    weights = w4.weights()
    # 48 channels are no multiple of 32: one scale each. What 4 bits have no kernel for has 8.
    assert weights.pop("expand") == "int4"
    assert {name for name, words in weights.items() if words == "int8"} == {
        "stem", "depthwise", "grouped", "attention.q", "attention.k", "attention.v",
    }  # fmt: skip
    assert {weights[name] for name in ("point", "attention.proj", "head")} == {"int4 in blocks of 32"}
    assert "off-xnnpack" not in w4.rules()
    unpacked = flatbuffer.read(w4.data)
    assert unpack(unpacked) == 4
    alone = interpreter(flatbuffer.write(unpacked)).get_signature_runner("main")(x=w4.feeds["x"])["y"]
    assert compare(alone, w4.output).relative_l2 < 2e-2
    stored = sum(len(w4.flat.buffers[t.buffer].data) for t in w4.flat.subgraphs[0].tensors if t.type == 17)
    assert stored == (64 * 48 + 48 * 64 + 64 * 64 + 64 * 10) // 2


def test_blocks_are_the_longest_that_divide_the_channels(lower: Lower) -> None:
    weights = lower("w4", group=128).weights()
    assert weights["point"] == "int4 in blocks of 64"
    assert weights["expand"] == "int4"


def test_the_trace_of_w4_is_right_where_the_kernel_is_not(w4: Lowered) -> None:
    outputs = {item.name: item.value for item in w4.runtime.trace("main", w4.feeds)}
    assert compare(w4.output, outputs["y"]).relative_l2 < 2e-2
    alone = interpreter(w4.data, delegate=False).get_signature_runner("main")(x=w4.feeds["x"])["y"]
    assert compare(w4.output, alone).relative_l2 > 0.1


@pytest.mark.parametrize("precision", ["w8", "w8a8", "w4"])
def test_kept_modules_stay_and_nothing_else(lower: Lower, precision: str) -> None:
    keep = [Keep(modules=("attention", "grouped")), Keep(modules=("point",), at="w8")]
    kept = lower(precision, keep)
    assert set(kept.weights()) == MODULES - {*PROJECTIONS, "grouped"}
    assert kept.quantized["modules_in_floats"] == sorted({*PROJECTIONS, "grouped"})
    assert len(kept.quantized["left_in_floats"]) == 5
    assert kept.weights()["point"] == "int8"
    data = {item["module"]: item["data"] for item in kept.quantized["operations"]}
    assert data["point"] == "int8 as it runs"
    graph = kept.flat.subgraphs[0]
    floats = {
        str(np.prod(graph.tensors[op.inputs[1]].shape))
        for op in graph.operators
        if flatbuffer.operator_name(kept.flat, op) in ("CONV_2D", "FULLY_CONNECTED")
        and flatbuffer.tensor_of(graph, int(op.inputs[1]), "").dtype == "float32"
    }
    assert floats == {str(64 * 16 * 9), str(64 * 64)}


def test_nothing_to_quantize_is_refused(lower: Lower) -> None:
    with pytest.raises(CheckFailed, match="nothing to quantize"):
        lower("w8", [Keep(modules=("*",))])


def test_tflite_runtime_is_not_given_what_it_gets_wrong(lower: Lower) -> None:
    with pytest.raises(ConversionFailed, match="int4") as caught:
        lower("w4", runtime=TFLITE_RUNTIME)
    assert "w8" in str(caught.value.fix)
    old = SimpleNamespace(runtimes={"tflite": TFLITE_RUNTIME})
    assert TARGET.precisions(old) == ("fp32", "fp16", "w8", "w8a8")  # type: ignore[arg-type]
    assert TARGET.precisions(None) == ("fp32", "fp16", "w8", "w8a8", "w4")
    made = lower("w8a8", runtime=TFLITE_RUNTIME)
    graph = made.flat.subgraphs[0]
    for op in graph.operators:
        # With a scale for each channel it would compute other numbers, unless the data are int8 as well.
        if flatbuffer.operator_name(made.flat, op) in ("FULLY_CONNECTED", "BATCH_MATMUL"):
            weights, data = graph.tensors[op.inputs[1]], flatbuffer.tensor_of(graph, int(op.inputs[0]), "")
            if weights.type == 9 and data.dtype == "float32":
                assert len(weights.quantization.scale) == 1
    assert not [f for f in made.artifact.findings if f.severity == "error"]


def test_blocks_that_xnnpack_leaves_are_refused(lower: Lower, monkeypatch: pytest.MonkeyPatch) -> None:
    def undelegated(source: Path | bytes, *, delegate: bool = True, **options: object) -> object:
        return interpreter(source, delegate=False, **options)

    monkeypatch.setattr("edgeattn.targets.tflite.xnnpack.interpreter", undelegated)
    with pytest.raises(ConversionFailed, match="wrong") as caught:
        lower("w4")
    assert caught.value.details == ["attention.proj", "head", "point"]


@pytest.mark.parametrize("precision", ["w8", "w8a8", "w4"])
def test_two_entries_and_large_weights(tmp_path: Path, precision: str) -> None:
    """The quantizer appends what is larger than 256 KiB to the flatbuffer; entries share their weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 800), nn.ReLU(), nn.Linear(800, 256), nn.Linear(256, 8)).eval()
    feeds = {"decode": {"x": torch.randn(1, 256)}, "prefill": {"x": torch.randn(5, 256)}}
    entries = {name: capture(model, each, ("y",)).entries["main"] for name, each in feeds.items()}
    calibration = [{"x": each["x"].numpy()} for each in feeds.values()]
    plan = LowerPlan(precision, [], {}, quant=QuantPlan(precision), calibration=calibration)
    if precision == "w8a8":
        with pytest.raises(CheckFailed, match="no samples"):
            TARGET.lower(Program(entries), replace(plan, calibration=calibration[:1]), tmp_path)
        with pytest.raises(UsageError, match="another shape"):
            TARGET.lower(Program(entries), replace(plan, calibration=[{"x": np.zeros((2, 256), np.float32)}]), tmp_path)
    runtime = TARGET.open(TARGET.lower(Program(entries), plan, tmp_path))
    for name in entries:
        out = runtime.run(name, {"x": feeds[name]["x"].numpy()})["y"]
        assert compare(model(feeds[name]["x"]).detach().numpy(), out).relative_l2 < (
            0.15 if precision == "w4" else 0.02
        )
    weights = sum(p.numel() for p in model.parameters())
    assert (tmp_path / "model.tflite").stat().st_size < weights * (0.7 if precision == "w4" else 1.15)


def test_integers_stand_for_floats() -> None:
    def tensor(scale: list[float], zero: list[int], axis: int = 0) -> SimpleNamespace:
        return SimpleNamespace(quantization=SimpleNamespace(scale=scale, zeroPoint=zero, quantizedDimension=axis))

    value = np.array([[1, 2], [3, -4]], np.int8)
    assert in_floats(tensor([0.5], [1]), value).tolist() == [[0, 0.5], [1, -2.5]]
    assert in_floats(tensor([0.5, 2.0], [0, 1], 1), value).tolist() == [[0.5, 2], [1.5, -10]]
    ids = np.array([3], np.int32)
    assert in_floats(SimpleNamespace(quantization=None), ids) is ids
