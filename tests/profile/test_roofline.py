"""The uncalibrated estimate: bounds on numbers by hand, and what must hold of every estimate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn import device
from edgeattn.core import tools
from edgeattn.core.errors import UsageError
from edgeattn.profile import roofline
from edgeattn.profile.roofline import CALL_MS, DEPTHWISE, Roof, clock_ghz, copied_gb_s, estimate, roof_of
from edgeattn.targets.base import OpCost

#: 1e9 operations, or 1e7 bytes, in a millisecond.
ROOF = Roof({"fp32": 1.0, "w8a8": 4.0}, 10.0, call_ms=0.01)


def op(kind: str = "Conv", macs: int = 0, **fields: object) -> OpCost:
    """An operation that reads x and gives y."""
    wide = 64 if macs else 0
    return replace(OpCost(kind, "", kind, macs, 0, 0, 0, "fp32", wide, wide, 9, ("x",), ("y",)), **fields)  # type: ignore[arg-type]


def one(operation: OpCost, roof: Roof = ROOF) -> tuple[float, str]:
    (found,) = estimate([operation], roof)
    return pytest.approx(found.ms), found.bound


def test_bounds_by_hand() -> None:
    assert one(op(macs=500_000_000, bytes_in=100)) == (1.01, "compute")
    assert one(op(macs=50_000_000, bytes_in=6_000_000, bytes_weights=3_000_000, bytes_out=1_000_000)) == (
        1.01,
        "memory",
    )
    assert one(op(macs=5, bytes_in=5)) == (0.0100005, "call")
    assert one(op("Reshape")) == (0.0, "")
    cpu = replace(ROOF, view_ms=0.002)
    assert one(op("Reshape"), cpu) == (0.002, "call")
    for free in (op("Reshape", inputs=()), op("QuantizeLinear"), op("dequantize")):
        assert one(free, cpu) == (0.0, "")


def test_types_kernels_and_curves() -> None:
    assert one(op(macs=500_000_000, dtype="w8a8")) == (0.26, "compute")
    assert one(op(macs=500_000_000, dtype="fp16")) == (1.01, "compute")  # computed in fp32 where there is no peak
    for kind in ("Conv", "DEPTHWISE_CONV_2D", "conv"):
        assert one(op(kind, macs=500_000_000, channels=1, fan=1)) == (1 / DEPTHWISE + 0.01, "compute")
    assert one(op(macs=500_000_000, channels=3)) == (1.01, "compute")  # a stem: few channels in, many out
    assert one(op("MatMul", macs=500_000_000, channels=1, fan=1)) == (1.01, "compute")
    narrow = op(macs=8_000_000, channels=4, fan=8, bytes_in=1_000_000)  # unfolded it has 1e6 floats
    assert one(narrow) == (0.91, "memory")
    assert one(replace(narrow, taps=1)) == (0.11, "memory")
    for kind in ("ConvTranspose", "TRANSPOSE_CONV", "conv_transpose"):
        assert one(replace(narrow, op=kind)) == (1.71, "memory")
    curved = op("Gelu", bytes_in=4_000_000, bytes_out=4_000_000)
    assert one(curved, Roof({"fp32": 0.001}, 1e6, 0.0))[0] == 1e6 * roofline.CURVED / 1e6


def test_what_follows_a_product_is_part_of_it() -> None:
    size = 1_000_000
    wide = {"bytes_in": size, "bytes_out": size}
    conv = op(macs=1000, outputs=("a",), **wide)
    graph = [
        conv,
        op("Reshape", inputs=("a",), outputs=("b",)),
        op("Relu", inputs=("b",), outputs=("c",), **wide),
        op("Add", inputs=("c", "x"), outputs=("d",), bytes_in=2 * size, bytes_out=size),
        op("Gelu", inputs=("d",), outputs=("e",), **wide),
        op("Relu", inputs=("e",), outputs=("f",), **wide),
    ]
    found = estimate(graph, ROOF)
    assert [f.ms for f in found] == pytest.approx([0.21, 0.0, 0.0, 0.1, 0.21, 0.21])
    assert [f.bound for f in found] == ["memory", "", "", "memory", "memory", "memory"]
    curve = op("Sigmoid", inputs=("x",), outputs=("s",), **wide)
    product = op("Mul", inputs=("x", "s"), outputs=("y",), bytes_in=2 * size, bytes_out=size)
    assert [f.ms for f in estimate([curve, product], ROOF)] == pytest.approx([0.21, 0.0])
    assert estimate([curve, replace(product, inputs=("z", "s"))], ROOF)[1].ms == pytest.approx(0.31)
    # What another reads as well has to be stored, and a factor that is computed has to be read.
    shared = [conv, op("Relu", inputs=("a",), **wide), op("Sigmoid", inputs=("a",), **wide)]
    assert all(f.ms > 0.2 for f in estimate(shared, ROOF))
    gate = [conv, op("Mul", inputs=("a", "x"), bytes_in=2 * size, bytes_out=size)]
    assert estimate(gate, ROOF)[1].ms == pytest.approx(0.31)
    constant = [conv, op("Mul", inputs=("a",), **wide)]
    assert estimate(constant, ROOF)[1].ms == 0.0


SIZES = st.integers(0, 10**10)
OPERATIONS = st.builds(
    lambda kind, macs, read, weights, made, channels, fan, taps, dtype: replace(
        op(kind, macs, bytes_in=read, bytes_weights=weights, bytes_out=made, dtype=dtype),
        channels=channels,
        fan=fan,
        taps=taps,
    ),
    st.sampled_from(["Conv", "CONV_2D", "linear", "Relu", "Softmax", "Add", "Gather"]),
    SIZES,
    SIZES,
    SIZES,
    SIZES,
    st.integers(1, 512),
    st.integers(0, 64),
    st.sampled_from([1, 9]),
    st.sampled_from(["fp32", "w8a8", "fp16", "int"]),
)
ROOFS = st.builds(lambda peak, speed: Roof({"fp32": peak}, speed), st.floats(1e-3, 1e3), st.floats(1.0, 1e4))


@given(OPERATIONS, ROOFS, SIZES, SIZES)
def test_more_work_takes_no_less(operation: OpCost, roof: Roof, macs: int, size: int) -> None:
    (before,) = estimate([operation], roof)
    assert before.ms >= 0
    fields = [{"bytes_in": operation.bytes_in + size}, {"bytes_weights": operation.bytes_weights + size}]
    fields += [{"bytes_out": operation.bytes_out + size}]
    fields += [{"macs": operation.macs + macs}] if operation.macs else []
    for more in fields:
        assert estimate([replace(operation, **more)], roof)[0].ms >= before.ms  # type: ignore[arg-type]


@given(OPERATIONS, ROOFS, st.integers(2, 16))
def test_it_scales(operation: OpCost, roof: Roof, times: int) -> None:
    free = replace(roof, call_ms=0.0)
    (before,) = estimate([operation], free)
    sizes = {name: times * getattr(operation, name) for name in ("macs", "bytes_in", "bytes_weights", "bytes_out")}
    (after,) = estimate([replace(operation, **sizes)], free)
    assert after.ms == pytest.approx(times * before.ms)
    fast = Roof({name: times * peak for name, peak in free.tflops.items()}, times * free.gb_s, 0.0)
    assert estimate([operation], fast)[0].ms == pytest.approx(before.ms / times)
    assert estimate([operation, operation], free) == [before, before]


def test_roofs_of_documented_devices() -> None:
    board = device.resolve("raspberry-pi-5")
    four, single = roof_of(board, "fp32"), roof_of(board, "fp32", threads=1)
    assert four.tflops["fp32"] == board.peak["fp32"]
    assert single.tflops["fp32"] == pytest.approx(board.peak["fp32"] / 4)
    assert single.gb_s == four.gb_s == board.bandwidth_gb_s
    gpu = roof_of(device.resolve("jetson-orin-nano"), "w4", threads=1)
    assert (single.call_ms, single.view_ms, gpu.view_ms) == (CALL_MS["cpu"], CALL_MS["cpu"], 0.0)
    assert (gpu.tflops["fp16"], gpu.call_ms, gpu.source) == (17.0, CALL_MS["gpu"], "documented")
    assert gpu.peak("bf16") == gpu.tflops["fp16"]
    assert Roof({"fp16": 15.0}, 30.0).peak("fp32") == 15.0


@pytest.mark.parametrize(
    ("fields", "precision", "missing"),
    [
        ({"peak": {}, "peak_unit": None, "peak_kind": None}, "fp32", "no table"),
        ({"peak": {"fp16": 1.0}}, "fp32", "peaks of fp16"),
        ({"peak": {"w8a8": 1.0}}, "w4", "peaks of w8a8"),
        ({"bandwidth_gb_s": None, "bandwidth_kind": None}, "fp32", "bandwidth_gb_s"),
    ],
)
def test_what_is_missing_is_said(fields: dict[str, object], precision: str, missing: str) -> None:
    board = device.resolve("raspberry-pi-5").model_copy(update=fields)
    with pytest.raises(UsageError, match="no roofline") as found:
        roof_of(board, precision)
    assert missing in f"{found.value.why} {found.value.value}"
    assert "device file" in str(found.value.fix)


@pytest.mark.parametrize(
    ("extensions", "gflops", "eight", "half"),
    [
        (("avx2", "avx512f", "avx512_vnni"), 64, 4, 1),
        (("avx", "avx2", "fma"), 32, 1, 1),
        (("asimd", "asimdhp", "asimddp"), 16, 4, 2),
    ],
)
def test_this_machine_by_its_extensions(
    extensions: tuple[str, ...], gflops: int, eight: int, half: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "cpu_extensions", lambda: extensions)
    monkeypatch.setattr(roofline, "clock_ghz", lambda: 2.0)
    monkeypatch.setattr(roofline, "copied_gb_s", lambda: 12.0)
    roof = roof_of(device.resolve("host"), "fp32", threads=2)
    assert roof.tflops["fp32"] == pytest.approx(2 * 2 * gflops / 1e3)
    assert roof.tflops["w8a8"] == pytest.approx(eight * roof.tflops["fp32"])
    assert roof.tflops["fp16"] == pytest.approx(half * roof.tflops["fp32"])
    assert (roof.gb_s, roof.source) == (12.0, "computed, measured")
    monkeypatch.setattr(tools, "cpu_extensions", lambda: ())
    with pytest.raises(UsageError, match="no roofline"):
        roof_of(device.resolve("host"), "fp32")


def test_the_clock_and_the_copy(tmp_path: Path) -> None:
    assert clock_ghz(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\ncpu MHz\t\t: 2300.000\n\nprocessor : 1\ncpu MHz : 1800\n")
    assert clock_ghz(tmp_path) == pytest.approx(2.3)
    folder = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    folder.mkdir(parents=True)
    (folder / "cpuinfo_max_freq").write_text("3200000\n")
    assert clock_ghz(tmp_path) == pytest.approx(3.2)
    assert copied_gb_s(megabytes=8, rounds=1) > 0.1
