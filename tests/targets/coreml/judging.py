"""What the tests of operations share: random feeds, tolerances by dtype, and which operations coremltools can judge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from edgeattn.core.numerics import Array
from edgeattn.core.quiet import quiet
from edgeattn.targets.coreml.mil import ops
from edgeattn.targets.coreml.mil.registry import OPS

with quiet():
    from coremltools.converters.mil.mil.operation import Operation
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

assert ops.__path__
#: By dtype: how far a result may lie from the exact one, relative to the largest value that it is made of.
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "int32": 0.0, "int8": 0.0, "uint8": 0.0}


def numbers(seed: int, shape: Sequence[int], dtype: str = "float32") -> Array:
    """Random numbers of a dtype: floats of a normal distribution, integers of one digit."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.standard_normal(tuple(shape)).astype(dtype)
    low = 0 if np.dtype(dtype).kind == "u" else -9
    return rng.integers(low, 10, tuple(shape)).astype(dtype)


def agree(found: Sequence[Array], expected: Sequence[Any], dtype: str, factor: float = 1.0) -> None:
    """Shapes and values; infinities and NaN stand at the same places."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        want = np.asarray(other, dtype=np.float64)
        assert one.shape == want.shape
        finite = np.abs(want[np.isfinite(want)])
        scale = max(1.0, float(finite.max(initial=0.0)))
        np.testing.assert_allclose(one.astype(np.float64), want, rtol=0, atol=factor * TOLERANCE[dtype] * scale)


def judgeable(family: Iterable[str]) -> set[str]:
    """Those operations of a family whose values coremltools infers, in any version of them."""
    names = set(family)
    assert names <= set(OPS)
    methods = ("value_inference", "materialized_val_inference")
    return {
        name
        for name in names
        for version in SSAOpRegistry.core_ops[name].values()
        if any(method in vars(base) for base in version.__mro__ if base not in Operation.__mro__ for method in methods)
    }
