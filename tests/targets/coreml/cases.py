"""Cases of single operations: what is fed, with which parameters, and what its definition says comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from edgeattn.core.numerics import Array
from tests.targets.coreml.harness import Build, inferred, interpret, mb, types
from tests.targets.coreml.judging import SSAOpRegistry, agree, numbers

#: dtypes that operations take, as ``Case`` wants them.
FLOATS, NUMBERS, ALL = "float32 float16", "float32 float16 int32", "float32 float16 int32 bool"


@dataclass(frozen=True)
class Case:
    """One use of an operation.

    Attributes:
        dtypes: of what is fed as a shape, separated by spaces.
        feeds: shapes, of random numbers, or arrays as they are; by name of the parameter.
        given: the other parameters.
        expected: takes feeds and given, and gives what comes out, or a tuple of it.
        build: takes them too, the feeds as variables; without it they are just passed to the operation.
        factor: how many times the tolerance of the dtype is allowed.
    """

    op: str
    opset: int
    dtypes: str
    feeds: Mapping[str, tuple[int, ...] | Array]
    given: Mapping[str, Any]
    expected: Callable[..., Any]
    build: Build | None = None
    factor: float = 1.0

    def arrays(self, dtype: str) -> dict[str, Array]:
        """The feeds, with numbers for the shapes."""
        return {
            name: numbers(place, feed, dtype) if isinstance(feed, tuple) else feed
            for place, (name, feed) in enumerate(self.feeds.items(), len(self.op))
        }

    def built(self, **variables: Any) -> Any:
        """The operation's outputs."""
        return (self.build or getattr(mb, self.op))(**variables, **self.given)


def each(cases: Iterable[Case]) -> Any:
    """A test's parameters ``case`` and ``dtype``."""
    rows = [
        pytest.param(case, dtype, id=f"{case.op}-{place}-{dtype}")
        for place, case in enumerate(cases)
        for dtype in case.dtypes.split()
    ]
    return pytest.mark.parametrize(("case", "dtype"), rows)


def check(case: Case, dtype: str, judged: bool) -> None:
    """The interpreter gives what is expected, and so does coremltools where it judges."""
    opset = max(16, case.opset) if dtype == "float16" else case.opset
    feeds = case.arrays(dtype)
    found, expected = interpret(case.built, feeds, opset), case.expected(**feeds, **case.given)
    expected = list(expected) if isinstance(expected, tuple) else [expected]
    exactness = dtype if np.dtype(dtype).kind == "f" else "int32"
    agree(found, expected, exactness, case.factor)
    if judged:
        judgement = inferred(case.built, feeds, opset)
        assert judgement is not None
        agree(found, judgement, exactness, case.factor)


def like(variable: Any, value: float) -> Any:
    """A number in the type of a variable, where MIL wants the same type."""
    return types.nptype_from_builtin(variable.dtype)(value)


def defined_in(module: str) -> set[str]:
    """Names of all operations that a module of coremltools' definitions has, in any version."""
    return {
        name
        for name, versions in SSAOpRegistry.core_ops.items()
        if any(version.__module__.rsplit(".", 1)[-1] == module for version in versions.values())
    }
