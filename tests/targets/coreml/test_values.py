"""Values of less than a byte, as they are packed and as coremltools packs them; and weight files that are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.core.errors import UsageError
from edgeattn.core.numerics import Array
from edgeattn.targets.coreml.mil.package import open_package
from edgeattn.targets.coreml.mil.values import PACKED, Weights, decode, type_of, unpack
from tests.targets.coreml.harness import mb, save, types

_BITS = {(bits, signed) for bits, signed in PACKED.values()} | {(8, False), (8, True), (5, False), (7, True)}


@given(st.data(), st.sampled_from(sorted(_BITS)))
def test_what_is_packed_is_unpacked(data: st.DataObject, form: tuple[int, bool]) -> None:
    bits, signed = form
    low = -(2 ** (bits - 1)) if signed else 0
    numbers = data.draw(st.lists(st.integers(low, low + 2**bits - 1), max_size=40))
    # As one long binary number, the first value in its lowest bits; what follows the last one is any bits.
    total = sum((number % 2**bits) << (bits * i) for i, number in enumerate(numbers))
    size = (bits * len(numbers) + 7) // 8
    total |= data.draw(st.integers(0, 255)) << (bits * len(numbers))
    packed = np.frombuffer((total % 256**size).to_bytes(size, "little"), np.uint8)
    found = unpack(packed, bits, signed, len(numbers))
    assert found.dtype == (np.int8 if signed else np.uint8)
    assert found.tolist() == numbers


def whole(dtype: str, shape: tuple[int, ...]) -> Array:
    """Whole numbers over all of the range of a type of less than a byte."""
    bits, signed = PACKED[dtype]
    low = -(2 ** (bits - 1)) if signed else 0
    return np.random.default_rng(1).integers(low, low + 2**bits, shape).astype(getattr(types, f"np_{dtype}_dtype"))


@pytest.fixture
def held(tmp_path: Path) -> Any:
    """A package that holds one value, as argument of an operation; its folder, and the value in it."""

    def make(value: Array, dtype: str) -> tuple[Path, Any]:
        def build(unused: Any) -> Any:
            if dtype == "uint1":
                return mb.constexpr_sparse_to_dense(nonzero_data=np.ones(int(value.sum()), np.float16), mask=value)
            if dtype in ("int4", "uint4"):
                scale = np.ones([1] * value.ndim, np.float32)
                return mb.constexpr_blockwise_shift_scale(data=value, scale=scale)
            table = np.arange(2 ** PACKED[dtype][0], dtype=np.float32).reshape(*[1] * value.ndim, -1, 1)
            return mb.constexpr_lut_to_dense(indices=value, lut=table)

        path = tmp_path / "one.mlpackage"
        save(build, {"unused": np.zeros(1, np.float32)}, path)
        block = next(iter(open_package(path).spec.mlProgram.functions["main"].block_specializations.values()))
        (operation,) = [item for item in block.operations if item.type.startswith("constexpr_")]
        name = next(name for name in ("mask", "data", "indices") if name in operation.inputs)
        return path, operation.inputs[name].arguments[0].value

    return make


# So few that they stand in the program itself, and so many that they stand in the weight file; no whole bytes.
@pytest.mark.parametrize("shape", [(1,), (3,), (9,), (11,), (3, 5, 7), (1, 1, 64), (257, 3)])
@pytest.mark.parametrize("dtype", sorted(PACKED))
def test_what_coremltools_packed_is_unpacked(dtype: str, shape: tuple[int, ...], held: Any) -> None:
    value = whole(dtype, shape)
    path, spec = held(value, dtype)
    assert type_of(spec.type) == (dtype, shape)
    assert spec.WhichOneof("value") == ("immediateValue" if value.size < 10 else "blobFileValue")
    found = decode(spec, Weights(open_package(path).root))
    assert found.dtype == (np.int8 if dtype == "int4" else np.uint8)
    np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize(
    ("dtype", "held_in"),
    [(np.float16, "fp16"), (np.float32, "fp32"), (np.int32, "int32"), (np.bool_, "bool"), (np.int8, "int8")],
)
@pytest.mark.parametrize("shape", [(), (5,), (3, 40)])
def test_whole_bytes(dtype: Any, held_in: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    value = np.random.default_rng(1).integers(-100, 100, shape).astype(dtype)
    if dtype == np.bool_:
        value = np.random.default_rng(1).random(shape) < 0.5
    value = np.asarray(value)
    path = tmp_path / "one.mlpackage"
    save(lambda x: mb.identity(x=mb.identity(x=mb.const(val=value))), {"x": np.zeros(1, np.float32)}, path)
    package = open_package(path)
    block = next(iter(package.spec.mlProgram.functions["main"].block_specializations.values()))
    found = [decode(item.attributes["val"], Weights(package.root)) for item in block.operations if item.type == "const"]
    same = [item for item in found if isinstance(item, np.ndarray) and item.dtype == dtype and item.shape == shape]
    assert any(np.array_equal(item, value) for item in same)


def damaged(path: Path, how: str) -> None:
    (weights,) = path.rglob("weight.bin")
    data = bytearray(weights.read_bytes())
    if how == "gone":
        weights.unlink()
        return
    if how == "sentinel":
        at = data.index((0xDEADBEEF).to_bytes(4, "little"))
        data[at] ^= 1
    weights.write_bytes(data[: 20 if how == "header" else 150 if how == "short" else len(data)])


@pytest.mark.parametrize(
    ("how", "message"),
    [("gone", "cannot be read"), ("header", "it ends at byte"), ("short", "it ends at byte"), ("sentinel", "no value")],
)
def test_a_damaged_weight_file_is_named(how: str, message: str, held: Any) -> None:
    path, spec = held(whole("int4", (40, 8)), "int4")
    damaged(path, how)
    with pytest.raises(UsageError, match=message) as caught:
        decode(spec, Weights(open_package(path).root))
    assert "weight.bin" in str(caught.value)
