"""Calibration streams for the tests of what reads them."""

from __future__ import annotations

import numpy as np

from edgeattn.core.specs import TensorSpec
from edgeattn.quant.calibration import CalibrationStream
from edgeattn.quant.sources import Form, Yielded
from edgeattn.recipe import CalibrationSpec

IMAGE = TensorSpec("x", (1, 3, 8, 12))
TEXT = (TensorSpec("ids", (2, 5), "int64"), TensorSpec("mask", (2, 5), "bool"), TensorSpec("h", (2, 3)))


def text_arrays(n):
    rng = np.random.default_rng(1)
    return {
        "ids": rng.integers(0, 99, (n, 5), dtype=np.int32),
        "mask": rng.random((n, 5)) < 0.5,
        "h": rng.standard_normal((n, 3)),
    }


def stream(source, *inputs, preprocess=None, samples=1000, seed=0, folder="."):
    spec = CalibrationSpec(source=str(source), samples=samples, seed=seed)
    return CalibrationStream.of_spec(spec, inputs or (IMAGE,), preprocess, str(folder))


def yielded(items, *inputs, samples=None, seed=0):
    return CalibrationStream(Yielded(lambda: items, "items", Form.of(inputs or (IMAGE,))), None, samples, seed)
