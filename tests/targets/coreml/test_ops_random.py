"""Random numbers by their distributions, and what a classifier gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeattn.core.numerics import Array
from edgeattn.core.quiet import quiet
from edgeattn.targets.coreml.mil.package import open_package
from edgeattn.targets.coreml.mil.program import Function
from tests.targets.coreml.cases import defined_in
from tests.targets.coreml.harness import TARGETS, ct, interpret, mb, types
from tests.targets.coreml.judging import judgeable, numbers

FAMILY = defined_in("random") | defined_in("classify")
UNUSED = {"x": np.zeros(1, np.float32)}
COUNT = 20000
SHAPE = (4, 50, COUNT // 200)
# An operation, its parameters, and mean and deviation of what it draws.
DRAWN: list[tuple[str, dict[str, Any], float, float]] = [
    ("random_normal", {}, 0, 1),
    ("random_normal", {"mean": -2.0, "stddev": 0.25}, -2, 0.25),
    ("random_uniform", {}, 0.5, 12**-0.5),
    ("random_uniform", {"low": -2.0, "high": 4.0}, 1, 6 * 12**-0.5),
    ("random_bernoulli", {}, 0.5, 0.5),
    ("random_bernoulli", {"prob": 0.125}, 0.125, (0.125 * 0.875) ** 0.5),
]
PROBS = np.array([[0.5, 0.25, 0.125, 0.125], [0, 0, 1, 0]])
# mode, and what is fed in it to draw with PROBS.
CATEGORICAL: list[tuple[dict[str, str], Array]] = [
    ({}, np.log(PROBS + 1e-9)),
    ({"mode": "logits"}, np.log(PROBS + 1e-9) + 3),
    ({"mode": "probs"}, PROBS),
    ({"mode": "probs"}, 8 * PROBS),
]


def draw(op: str, given: dict[str, Any], shape: tuple[int, ...] = SHAPE) -> Array:
    return interpret(lambda x: getattr(mb, op)(shape=shape, **given), UNUSED)[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("op", "given", "mean", "deviation"), DRAWN)
def test_mean_and_deviation(op: str, given: dict[str, Any], mean: float, deviation: float, dtype: type) -> None:
    drawn = draw(op, {"seed": 3, **{name: dtype(value) for name, value in given.items()}})
    assert drawn.shape == SHAPE
    assert drawn.dtype == (dtype if given else np.float32)
    wide = drawn.astype(np.float64)
    # Five standard errors; that of a deviation is at most that of a normal distribution.
    assert abs(wide.mean() - mean) < 5 * deviation / COUNT**0.5
    assert abs(wide.std() - deviation) < 5 * deviation / (2 * COUNT) ** 0.5


def test_what_lies_where() -> None:
    uniform = draw("random_uniform", {"low": -2.0, "high": 4.0})
    assert -2 <= uniform.min() < -1.99
    assert 3.99 < uniform.max() < 4
    assert set(np.unique(draw("random_bernoulli", {}))) == {0, 1}
    normal = draw("random_normal", {"mean": 1.0, "stddev": 2.0})
    shares = [np.mean(np.abs(normal - 1) < 2 * k) for k in (1, 2, 3)]
    np.testing.assert_allclose(shares, [math.erf(k / 2**0.5) for k in (1, 2, 3)], atol=0.02)


@pytest.mark.parametrize("op", ["random_normal", "random_uniform", "random_bernoulli"])
def test_the_seed_says_what_is_drawn(op: str) -> None:
    first, again, other = (draw(op, {"seed": seed}, (500,)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_without_a_seed_each_operation_draws_its_own_the_same_in_every_run() -> None:
    def build(x: Any) -> Any:
        return [mb.random_normal(shape=(1000,), name=name) for name in ("one", "two")]

    (one, two), (again, _) = interpret(build, UNUSED), interpret(build, UNUSED)
    np.testing.assert_array_equal(one, again)
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / 1000**0.5


def test_a_shape_that_is_computed() -> None:
    feeds = {"shape": np.array([3, 5], np.int32)}
    (drawn,) = interpret(lambda shape: mb.random_uniform(shape=shape, low=1.0, high=2.0), feeds)
    assert drawn.shape == (3, 5)
    assert drawn.min() >= 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("mode", "fed"), CATEGORICAL)
def test_categories_come_as_often_as_is_probable(mode: dict[str, str], fed: Array, dtype: type) -> None:
    x = np.stack([fed, fed[::-1], fed]).astype(dtype)
    (drawn,) = interpret(lambda x: mb.random_categorical(x=x, size=5000, seed=4, **mode), {"x": x})
    assert drawn.shape == (3, 2, 5000)
    assert drawn.dtype == dtype
    shares = (drawn[..., None] == np.arange(4)).mean(2)
    np.testing.assert_allclose(shares, np.stack([PROBS, PROBS[::-1], PROBS]), atol=5 * 0.5 / 5000**0.5)
    assert not np.array_equal(drawn[0], drawn[2])


def test_one_category_is_drawn_by_default() -> None:
    x = {"x": np.array([[0, 90, 0], [0, 0, 90]], np.float32)}
    np.testing.assert_array_equal(interpret(lambda x: mb.random_categorical(x=x), x)[0], [[1], [2]])


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
@pytest.mark.parametrize("labels", [["cat", "dog", "ant", "ape"], [7, -2, 1000, 0]])
def test_a_classifier_gives_a_label_and_all_probabilities(
    labels: list[str] | list[int], shape: tuple[int, ...], tmp_path: Path
) -> None:
    @mb.program(input_specs=[mb.TensorSpec(shape, types.fp32)], opset_version=TARGETS[16])
    def program(x: Any) -> Any:
        return mb.softmax(x=x, name="probabilities")

    with quiet():
        model = ct.convert(
            program,
            convert_to="mlprogram",
            classifier_config=ct.ClassifierConfig(labels, predicted_probabilities_output="probabilities"),
            minimum_deployment_target=TARGETS[16],
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        model.save(str(tmp_path / "classifier.mlpackage"))
    x = numbers(6, shape)
    outputs = Function(open_package(tmp_path / "classifier.mlpackage")).run({"x": x})
    (label,) = (value for value in outputs.values() if not isinstance(value, dict))
    (table,) = (value for value in outputs.values() if isinstance(value, dict))
    assert label == labels[int(x.argmax())]
    assert type(label) is type(labels[0])
    assert list(table) == labels
    np.testing.assert_allclose(list(table.values()), (np.exp(x) / np.exp(x).sum()).ravel(), rtol=1e-5)


def test_coremltools_infers_none_of_these() -> None:
    assert judgeable(FAMILY) == set()
    assert {op for op, *_ in DRAWN} | {"random_categorical", "classify"} == FAMILY
