"""Every mend: the model holds with it, and does not convert, or is wrong, without it.

A test of the second kind that fails says that coremltools does without the mend now, and that its file can go.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeattn.core.errors import ConversionFailed
from edgeattn.core.numerics import compare
from edgeattn.targets.coreml import mends
from edgeattn.targets.coreml.mil.package import open_package
from edgeattn.targets.coreml.mil.program import Function
from edgeattn.targets.coreml.runtime import MilRuntime
from tests.targets.coreml.lowering import captured, converted_without, lowered, plan_of

DEPLOYMENTS = ("iOS16", "iOS18")


class Masked(nn.Module):
    """Slices a mask by its full length."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros(6, 6))
        self.scale = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.shape[-1]
        return (self.scale(x) + self.mask[:steps, :steps]).softmax(-1)


class Grouped(nn.Module):
    """Eight heads of queries, two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 16), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (heads, 8)).transpose(1, 2)
            for layer, heads in ((self.q, 8), (self.k, 2), (self.v, 2))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)


class Packed(nn.Module):
    """One projection for queries, keys and values, taken apart by ``unbind`` or by index."""

    def __init__(self, unbind: bool) -> None:
        super().__init__()
        self.qkv, self.unbind = nn.Linear(32, 96), unbind

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        packed = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        q, k, v = packed.unbind(0) if self.unbind else (packed[0], packed[1], packed[-1])
        y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(b, n, c)


class Pooled(nn.Module):
    """A maximum pooling by 2 whose stride is left away."""

    def __init__(self, pool: Callable[..., Tensor]) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x, 2)


class Logic(nn.Module):
    """Truth values joined by operators."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(((x > 0) & (x < 1)) | ((x < -1) ^ (x > 2)), x, -x)


class Filled(nn.Module):
    """Numbers on one side of a choice, on the other, on both."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 1, x, -1e4) + torch.where(x > 0, 2.0, x) + torch.where(x > 2, 1.0, 0.0)


def test_all_mends_are_tested() -> None:
    assert mends.names() == [
        "alias", "avg_pool_ceil", "dunder", "gqa", "max_pool_stride", "qkv_rank5", "rms_norm", "squared_relu",
        "where_scalar", "written_norm",
    ]  # fmt: skip


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("name", "model", "shape"),
    [
        ("alias", Masked(), (2, 6, 6)),
        ("gqa", Grouped(), (2, 7, 64)),
        ("avg_pool_ceil", nn.AvgPool2d(2, ceil_mode=True), (2, 3, 7, 5)),
        ("avg_pool_ceil", nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), (2, 3, 8, 6)),
        ("avg_pool_ceil", nn.AvgPool2d(3, 2, 1, ceil_mode=True), (1, 4, 8, 9)),
        ("avg_pool_ceil", nn.AvgPool2d((3, 2), (2, 3), (1, 0), ceil_mode=True, count_include_pad=False), (1, 4, 8, 9)),
        ("max_pool_stride", Pooled(F.max_pool1d), (2, 6, 8)),
        ("max_pool_stride", Pooled(F.max_pool2d), (2, 3, 7, 6)),
        ("dunder", Logic(), (4, 8)),
        ("where_scalar", Filled(), (4, 8)),
        ("qkv_rank5", Packed(True), (2, 9, 32)),
        ("qkv_rank5", Packed(False), (2, 9, 32)),
        ("rms_norm", nn.RMSNorm(32), (2, 9, 32)),
        ("rms_norm", nn.RMSNorm((9, 32), elementwise_affine=False, eps=1e-6), (2, 9, 32)),
    ],
)
def test_holds(
    name: str, model: nn.Module, shape: tuple[int, ...], precision: str, deployment: str, tmp_path: Path
) -> None:
    made = lowered(model, {"x": torch.randn(shape)}, tmp_path, precision, deployment=deployment)
    assert made.facts["mends"] == {name: 3 if name in ("dunder", "where_scalar") else 1}
    assert made.numerics()["y"].holds(1e-6 if precision == "fp32" else 5e-3)
    assert not made.facts["high_rank"]


def test_a_pooling_over_three_axes_without_a_stride_holds(tmp_path: Path) -> None:
    made = lowered(Pooled(F.max_pool3d), {"x": torch.randn(1, 2, 4, 7, 6)}, tmp_path, "fp16")
    assert made.facts["mends"] == {"max_pool_stride": 1}
    assert made.numerics()["y"].holds(5e-3)


@pytest.mark.parametrize(
    ("name", "model", "shape"),
    [
        ("alias", Masked(), (2, 6, 6)),
        ("dunder", Logic(), (4, 8)),
        ("gqa", Grouped(), (2, 7, 64)),
        ("max_pool_stride", Pooled(F.max_pool2d), (2, 3, 7, 6)),
        ("where_scalar", Filled(), (4, 8)),
    ],
)
def test_needed_to_convert(name: str, model: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(shape)
    with pytest.raises(ConversionFailed):
        converted_without(name, model, {"x": x}, tmp_path / "m.mlpackage", deployment="iOS18")


def test_average_pooling_is_still_wrong_without(tmp_path: Path) -> None:
    model, x = nn.AvgPool2d(3, 2, 1, ceil_mode=True), torch.rand(1, 4, 8, 8) + 1
    converted_without("avg_pool_ceil", model, {"x": x}, tmp_path / "m.mlpackage")
    wrong = Function(open_package(tmp_path / "m.mlpackage")).run({"x": x.numpy()})["y"]
    right = model(x).numpy()
    np.testing.assert_allclose(wrong[..., :-1, :-1], right[..., :-1, :-1], rtol=1e-5)
    assert np.abs(wrong - right).max() > 0.1


def test_rank5_is_still_what_is_made_without(tmp_path: Path) -> None:
    converted_without("qkv_rank5", Packed(True), {"x": torch.randn(2, 9, 32)}, tmp_path / "m.mlpackage")
    package = open_package(tmp_path / "m.mlpackage")
    block = package.spec.mlProgram.functions["main"].block_specializations["CoreML6"]
    ranks = {output.type.tensorType.rank for item in block.operations for output in item.outputs}
    assert 5 in ranks


def test_rms_norm_is_still_wrong_without(tmp_path: Path) -> None:
    """Small inputs are off, and a row of zeros gives NaN."""
    model, x = nn.RMSNorm(32, eps=1e-6), torch.randn(2, 9, 32) * 1e-3
    x[0, 0] = 0
    converted_without("rms_norm", model, {"x": x}, tmp_path / "m.mlpackage")
    wrong = Function(open_package(tmp_path / "m.mlpackage")).run({"x": x.numpy()})["y"]
    assert np.isnan(wrong[0, 0]).all()
    assert np.abs(wrong[1] - model(x)[1].detach().numpy()).max() > 0.1


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e-2, 1.0, 300.0, 3e4])
def test_rms_norm_over_all_scales(scale: float, tmp_path: Path) -> None:
    """In float16 too, where the square of 300 would overflow."""
    model, x = nn.RMSNorm(64, eps=1e-5), (torch.rand(1, 5, 64) * 2 - 1) * scale
    assert lowered(model, {"x": x}, tmp_path / "a", "fp32").numerics()["y"].holds(1e-6)
    assert lowered(model, {"x": x}, tmp_path / "b", "fp16").numerics()["y"].holds(1e-2)


def test_a_split_that_is_read_otherwise_is_left_alone() -> None:
    class Reads(Packed):
        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            packed = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
            return packed[0] + packed.sum(0)

    graph = captured(Reads(True), {"x": torch.randn(2, 9, 32)}).entries["main"].graph.run_decompositions({})
    assert mends.mend(graph.graph_module, "fp32") == {}


def test_outputs_may_be_what_a_mend_replaced(tmp_path: Path) -> None:
    made = lowered(nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8)), {"x": torch.randn(2, 8)}, tmp_path)
    assert made.numerics()["y"].holds(1e-6)
    assert plan_of().options["deployment"] == "iOS16"


class WrittenNorm(nn.Module):
    """As language models have it, statistics in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 32))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class SquaredReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(x).square())


@pytest.mark.parametrize("mend", ["written_norm", "squared_relu"])
def test_squares_do_not_overflow(mend: str, tmp_path: Path) -> None:
    """With some numbers beyond 255, whose squares float16 does not have; without the mend the rows are lost."""
    torch.manual_seed(0)
    model = WrittenNorm() if mend == "written_norm" else SquaredReLU()
    x = torch.randn(6, 32 if mend == "written_norm" else 64)
    x[0], x[3:, 5] = 0.0, torch.tensor([300.0, 900.0, 2500.0])
    if isinstance(model, SquaredReLU):
        with torch.no_grad():
            model.down.weight /= 30  # the results are numbers that float16 holds
    else:
        x[1], x[2] = x[1] * 1e-3, x[2] * 1e-2
    made = lowered(model, {"x": x}, tmp_path / "with", "fp16", deployment="iOS18")
    assert made.facts["mends"] == {mend: 1}
    outputs = MilRuntime(made.artifact).run("main", made.feeds)["y"]
    for row, wanted in zip(outputs, made.reference["y"], strict=True):
        assert compare(wanted, row).relative_l2 <= 1e-2
    converted_without(mend, model, {"x": x}, tmp_path / "m.mlpackage", precision="fp16", deployment="iOS18")
    function = Function(open_package(tmp_path / "m.mlpackage"))
    plain = function.run({"x": x.numpy()})["y"]
    with np.errstate(invalid="ignore"):
        assert not np.isclose(plain[3:], made.reference["y"][3:], rtol=0.1).any(axis=1).all()
    exact = lowered(model, {"x": x}, tmp_path / "exact", "fp32")
    assert exact.facts["mends"] == {}
