"""Target tflite: what litert-torch makes of a program, run by LiteRT."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeattn.capture import Program, capture, run_eager
from edgeattn.core.errors import CheckFailed, ConversionFailed, UsageError
from edgeattn.core.numerics import compare
from edgeattn.lint import Finding, gate
from edgeattn.models.layers.rlmhsa import RLMHSA
from edgeattn.targets.base import Artifact, LowerPlan
from edgeattn.targets.feeds import own_feeds
from edgeattn.targets.tflite import TFLITE_RUNTIME, TFLiteTarget, flatbuffer, versions
from edgeattn.targets.tflite.heads import without_transposes
from edgeattn.targets.tflite.modules import _last, modules
from edgeattn.targets.tflite.pools import Pool, plain_pools

TARGET = TFLiteTarget()


class Lowered:
    """A module, captured and lowered; ``outputs`` are LiteRT's, ``expected`` PyTorch's."""

    def __init__(self, model: nn.Module, feeds: dict[str, torch.Tensor], folder: Path, **plan: str) -> None:
        self.model = model.eval()
        expected = run_eager(self.model, feeds, ())
        self.expected = {name: value.detach().numpy() for name, value in expected.items()}
        program = capture(self.model, feeds, tuple(expected))
        folder.mkdir(parents=True, exist_ok=True)
        precision = plan.pop("precision", "fp32")
        self.artifact = TARGET.lower(program, LowerPlan(precision, [], {"recipe": "test"}, **plan), folder)
        self.runtime = TARGET.open(self.artifact)
        self.entry = self.artifact.entries["main"]
        self.feeds = own_feeds(self.entry.inputs, {name: value.numpy() for name, value in feeds.items()})
        self.outputs = self.runtime.run("main", self.feeds)
        self.facts = self.artifact.facts["entries"]["main"]
        self.flat = flatbuffer.read((folder / "model.tflite").read_bytes())

    def close(self, tolerance: float = 1e-5) -> bool:
        return all(compare(self.expected[name], self.outputs[name]).holds(tolerance) for name in self.expected)


class Images(nn.Module):
    """An image and a number in, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU())
        self.head = nn.Linear(16, 600)

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.body(self.first(image)).mean((2, 3))
        return {"logits": self.head(x), "next": ids + 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    torch.manual_seed(0)
    feeds = {"image": torch.randn(2, 3, 9, 9), "ids": torch.tensor([3, -4])}
    return Lowered(Images(), feeds, tmp_path_factory.mktemp("images"))


def test_names_shapes_and_numbers(images: Lowered) -> None:
    assert [(t.name, t.shape, t.dtype) for t in images.entry.inputs] == [
        ("image", (2, 3, 9, 9), "float32"),
        ("ids", (2,), "int32"),
    ]
    assert [(t.name, t.shape) for t in images.entry.outputs] == [("logits", (2, 600)), ("next", (2,))]
    assert images.close()
    assert images.outputs["next"].tolist() == [4, -3]


def test_metadata_and_tensor_names_are_in_the_file(images: Lowered) -> None:
    assert flatbuffer.metadata(images.flat)["recipe"] == "test"
    graph = images.flat.subgraphs[0]
    names = [flatbuffer.text(t.name) for t in graph.tensors]
    assert {"image", "ids", "logits", "next"} <= set(names)
    assert len(set(names)) == len(names)
    assert {"first", "body.1", "head"} <= set(modules(images.flat, "main"))


def test_a_fused_operation_is_the_output_of_the_module_that_ran_last(tmp_path: Path) -> None:
    class Twice(nn.Module):
        """One activation after two convolutions, and a sum of the model's own after it."""

        def __init__(self) -> None:
            super().__init__()
            self.act, self.first, self.last = nn.ReLU(), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.act(self.first(x))
            return (y + self.act(self.last(y))).mean((2, 3))

    model, feeds = Twice(), {"x": torch.randn(1, 3, 6, 6)}
    lowered = Lowered(model, feeds, tmp_path)
    kept: list[torch.Tensor] = []
    model.act.register_forward_hook(lambda _m, _i, value: kept.append(value.permute(0, 2, 3, 1)))
    model(feeds["x"])
    traced = [item.value for item in lowered.runtime.trace("main", lowered.feeds) if item.module == "act"]
    assert len(traced) == 2
    for ours, theirs in zip(traced, kept, strict=True):
        assert np.allclose(ours, theirs.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("places", "wanted"),
    [
        ({"a": [1], "b": [2]}, "b"),
        ({"a": [5], "b": [4]}, "a"),
        ({"a": [1, 7], "b": [2, 5]}, "b"),
        ({"": [0, 3, 90], "a": [89]}, ""),
        ({}, "a"),
    ],
)
def test_the_module_that_ran_last(places: dict[str, list[int]], wanted: str) -> None:
    assert _last(list(places) or ["a", "b"], places) == wanted


def test_the_trace_names_modules_and_gives_their_values(images: Lowered) -> None:
    values = {item.name: item for item in images.runtime.trace("main", images.feeds)}
    assert np.allclose(values["logits"].value, images.expected["logits"], atol=1e-5)
    assert values["logits"].module == "head"  # though the tensor has the recipe's name
    assert {"first", "body.1"} & {item.module for item in values.values()}


def test_wrong_feeds_are_refused(images: Lowered) -> None:
    for feeds in ({"image": images.feeds["image"]}, {**images.feeds, "ids": np.array([1, 2])}):
        with pytest.raises(UsageError):
            images.runtime.run("main", feeds)
    with pytest.raises(UsageError, match="does not fit"):
        own_feeds(images.entry.inputs, {**images.feeds, "ids": np.array([1 << 40, 0])})


def test_lint_of_the_program_and_of_the_file(images: Lowered, tmp_path: Path) -> None:
    assert "transpose" in {finding.rule for finding in images.artifact.findings}

    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good = nn.AvgPool2d(2)
            self.odd = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
            self.bad = nn.MaxPool2d(2, dilation=2)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.norm(self.bad(self.odd(self.good(x)))), ids

    feeds = {"x": torch.randn(1, 3, 12, 12), "ids": torch.tensor([1])}
    program = capture(Pools().eval(), feeds, ("y", "n"))
    found = {(f.rule, f.module): f.severity for f in TARGET.lint(program, None)}
    assert found == {
        ("average-pool", "odd"): "note",
        ("reduce-window", "bad"): "warning",
        ("int64-input", ""): "note",
        ("batch-norm-left", "norm"): "warning",
    }
    old = SimpleNamespace(runtimes={"tflite": TFLITE_RUNTIME})
    assert {f.severity for f in TARGET.lint(program, old) if f.rule == "reduce-window"} == {"error"}  # type: ignore[arg-type]
    clean = capture(nn.Conv2d(3, 4, 1).eval(), {"x": torch.randn(1, 3, 4, 4)}, ("y",))
    assert TARGET.lint(clean, None) == []


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(4, 11), st.integers(4, 11)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padded=st.booleans(),
    ceil=st.booleans(),
    counts=st.booleans(),
    divisor=st.sampled_from([None, 3]),
)
def test_every_average_pooling_has_a_plain_form(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    padded: bool,
    ceil: bool,
    counts: bool,
    divisor: int | None,
) -> None:
    padding = (kernel[0] // 2, kernel[1] // 2) if padded else 0
    pool = nn.AvgPool2d(kernel, stride, padding, ceil, counts, divisor)
    x = torch.randn(2, 3, *size)
    module = capture(pool, {"x": x}, ("y",)).entries["main"].graph.module()
    assert isinstance(module, torch.fx.GraphModule)
    plain_pools(module)
    assert torch.allclose(module(x)[0], pool(x), atol=1e-6)
    assert all(p.plain for p in map(Pool.of, module.graph.nodes) if p)


@pytest.mark.parametrize("padding", [0, 1])
def test_a_pooling_in_a_network_is_one_operator(tmp_path: Path, padding: int) -> None:
    pool = nn.AvgPool2d(2 + padding, 2, padding, ceil_mode=True, count_include_pad=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), pool, nn.Conv2d(4, 4, 1))
    lowered = Lowered(model, {"x": torch.randn(1, 3, 8, 8)}, tmp_path, runtime=TFLITE_RUNTIME)
    assert lowered.close()
    assert lowered.facts["nodes"]["AVERAGE_POOL_2D"] == 1
    assert not [name for name in lowered.facts["nodes"] if name.startswith("STABLEHLO")]


def too_new(artifact: Artifact) -> list[Finding]:
    return [finding for finding in artifact.findings if finding.rule == "operator-too-new"]


def test_an_operator_that_the_old_runtime_does_not_know_is_refused(tmp_path: Path) -> None:
    model, feeds = nn.Sequential(nn.MaxPool2d(3, dilation=2), nn.Conv2d(3, 4, 1)), {"x": torch.randn(1, 3, 8, 8)}
    lowered = Lowered(model, feeds, tmp_path / "new")
    assert "reduce-window" in {finding.rule for finding in lowered.artifact.findings}
    assert [(f.severity, f.module) for f in too_new(lowered.artifact)] == [("note", "0")]
    old = Lowered(model, feeds, tmp_path / "old", runtime=TFLITE_RUNTIME)
    (finding,) = too_new(old.artifact)
    assert finding.severity == "error"
    assert finding.detail == "STABLEHLO_REDUCE_WINDOW, not known at all"
    assert "ai-edge-litert" in finding.mend
    with pytest.raises(CheckFailed, match="does not know"):
        gate(list(old.artifact.findings))


def test_the_precision_that_would_do_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.TFLITE_RUNTIME_2_14, "DEQUANTIZE", 2)  # fp16 weights are unpacked by version 3
    lowered = Lowered(nn.Linear(64, 64), {"x": torch.randn(1, 64)}, tmp_path, precision="fp16", runtime=TFLITE_RUNTIME)
    assert {finding.mend for finding in too_new(lowered.artifact)} == {"--precision fp32 would do"}


def test_operations_without_a_form_are_all_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvalsh(x @ x.transpose(0, 1))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = Odd()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.odd(x)

    with pytest.raises(ConversionFailed) as caught:
        Lowered(Net(), {"x": torch.randn(3, 3)}, tmp_path)
    assert "odd" in str(caught.value)


def test_what_the_converter_fails_at_is_named(tmp_path: Path) -> None:
    class Rotated(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turned = torch.view_as_complex(x.reshape(2, 2, 2)) * 1j
            return torch.view_as_real(turned).flatten(-2)

    with pytest.raises(ConversionFailed, match="converter failed") as caught:
        Lowered(nn.Sequential(nn.Identity(), Rotated()), {"x": torch.randn(2, 4)}, tmp_path)
    assert caught.value.value == "aten.view_as_complex.default"
    assert caught.value.where == "module 1"
    assert "complex64" in str(caught.value.why)


class Attention(nn.Module):
    def __init__(self, channels: int, sr: int, head_dim: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, channels, 1)
        block = RLMHSA(channels, sr, head_dim)
        # In the deploy form every projection is one convolution and there is no batch norm.
        for name, out in (("q", channels // 2), ("k", channels // 2), ("v", channels), ("proj", channels)):
            setattr(block, name, nn.Conv2d(channels, out, 1))
        block.scale = 1.0
        block.pool = nn.AvgPool2d(sr) if sr > 1 else nn.Identity()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        return x + self.block(x)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    sr=st.sampled_from([1, 2]),
    height=st.sampled_from([2, 4, 6]),
    width=st.sampled_from([2, 4]),
)
def test_the_rewritten_attention_is_the_same_function(batch: int, heads: int, sr: int, height: int, width: int) -> None:
    torch.manual_seed(heads)
    model = Attention(8 * heads, sr, 8).eval()
    x = torch.randn(batch, 3, height, width)
    module = capture(model, {"x": x}, ("y",)).entries["main"].graph.module()
    assert isinstance(module, torch.fx.GraphModule)
    keys = (height // sr) * (width // sr)
    count = without_transposes(module)
    assert count == (3 if keys > 1 else 1)
    with torch.no_grad():
        assert torch.allclose(module(x)[0], model(x), atol=1e-5)


def test_what_is_no_such_attention_is_left_alone() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.three, self.grouped, self.one = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b, c = (m(x).reshape(1, 2, 2, -1) for m in (self.three, self.grouped, self.one))
            return (a.transpose(-2, -1) @ a).sum() + (b.transpose(-2, -1) @ b).sum() + c.softmax(-1).sum()

    x = torch.randn(1, 4, 5, 5)
    module = capture(Other().eval(), {"x": x}, ("y",)).entries["main"].graph.module()
    assert isinstance(module, torch.fx.GraphModule)
    assert without_transposes(module) == 0


@pytest.mark.parametrize(("heads", "layout", "wanted"), [(2, "nhwc", 1), (2, "nchw", 3), (1, "nhwc", 0)])
def test_one_transpose_an_attention_block(tmp_path: Path, heads: int, layout: str, wanted: int) -> None:
    torch.manual_seed(0)
    lowered = Lowered(Attention(8 * heads, 2, 8), {"x": torch.randn(1, 3, 8, 8)}, tmp_path, layout=layout)
    assert lowered.close()
    inside = [t for t in lowered.facts["transposes"] if t["of"] == "graph"]
    assert len(inside) <= (1 if heads > 1 else 0) + 1  # the output of the whole is (B, C, H, W) again
    assert [t["module"] for t in inside if t["module"]] == ["block"] * (heads > 1)
    assert len(lowered.facts["transposes"]) <= wanted + 1
    assert "off-xnnpack" not in {f.rule for f in lowered.artifact.findings}
    image = lowered.entry.inputs[0]
    assert (image.shape, image.layout) == (((1, 8, 8, 3), "nhwc") if layout == "nhwc" else ((1, 3, 8, 8), ""))


def test_a_product_that_the_converter_gets_wrong_is_mended(tmp_path: Path) -> None:
    """litert-torch 0.10 makes a fully connected layer of it that LiteRT does not load; see matmul.py."""

    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = ((m(x) * 0.5).reshape(1, 1, 4, 64) for m in (self.q, self.k))
            return torch.softmax(q.transpose(-2, -1) @ k, -1)

    assert Lowered(Single(), {"x": torch.randn(1, 3, 8, 8)}, tmp_path).close()


def test_weights_that_no_flatbuffer_holds_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeattn.targets.tflite.lower.LARGEST", 64 * 65 * 4 - 1)
    with pytest.raises(ConversionFailed, match="do not fit"):
        Lowered(nn.Linear(64, 64), {"x": torch.randn(1, 64)}, tmp_path)
    monkeypatch.setattr("edgeattn.targets.tflite.lower.LARGEST", 64 * 65 * 4)
    assert Lowered(nn.Linear(64, 64), {"x": torch.randn(1, 64)}, tmp_path).close()


def test_fp16_halves_the_weights(images: Lowered, tmp_path: Path) -> None:
    feeds = {"image": torch.from_numpy(images.feeds["image"]), "ids": torch.tensor([3, -4])}
    half = Lowered(images.model, feeds, tmp_path, precision="fp16")
    assert half.close(5e-3)
    assert half.facts["weight_bytes"] < 0.6 * images.facts["weight_bytes"]
    assert {t.dtype for t in (*half.entry.inputs, *half.entry.outputs)} == {"float32", "int32"}


def test_weights_beyond_float16_stay(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight[0, 0] = 1e6
    half = Lowered(model, {"x": torch.randn(1, 64)}, tmp_path, precision="fp16")
    assert half.close(1e-5)


@pytest.mark.parametrize("runtime", ["", TFLITE_RUNTIME])
def test_w8(images: Lowered, tmp_path: Path, runtime: str) -> None:
    feeds = {"image": torch.from_numpy(images.feeds["image"]), "ids": torch.tensor([3, -4])}
    small = Lowered(images.model, feeds, tmp_path, precision="w8", runtime=runtime)
    assert small.close(5e-2)
    assert small.facts["weight_bytes"] < 0.4 * images.facts["weight_bytes"]
    scales = [
        len(graph.tensors[i].quantization.scale)
        for graph in small.flat.subgraphs
        for operator in graph.operators
        if flatbuffer.operator_name(small.flat, operator) == "FULLY_CONNECTED"
        for i in operator.inputs[1:2]
    ]
    assert scales == [1 if runtime else 600]


def test_entries_are_signatures_that_share_their_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 500), nn.ReLU(), nn.Linear(500, 64)).eval()
    short, long = {"x": torch.randn(1, 64)}, {"x": torch.randn(7, 64)}
    entries = {
        name: capture(model, feeds, ("y",)).entries["main"] for name, feeds in (("decode", short), ("prefill", long))
    }
    artifact = TARGET.lower(Program(entries), LowerPlan("fp32", [], {}), tmp_path)
    runtime = TARGET.open(artifact)
    for name, feeds in (("decode", short), ("prefill", long)):
        out = runtime.run(name, {"x": feeds["x"].numpy()})["y"]
        assert compare(model(feeds["x"]).detach().numpy(), out).holds(1e-5)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert (tmp_path / "model.tflite").stat().st_size < 1.2 * weights


def test_the_same_program_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, feeds = nn.Conv2d(3, 4, 3), {"x": torch.randn(1, 3, 6, 6)}
    files = []
    for name in ("a", "b"):
        Lowered(model, feeds, tmp_path / name)
        files.append((tmp_path / name / "model.tflite").read_bytes())
    assert files[0] == files[1]
