"""Feeds as an artifact takes them: names, shapes, layouts, widths and pixels of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgeattn.core.errors import UsageError
from edgeattn.core.numerics import Array
from edgeattn.core.specs import shape_words
from edgeattn.targets.base import NHWC, Tensor


def check_feeds(inputs: Sequence[Tensor], feeds: Mapping[str, Array]) -> None:
    """Compare feeds with an entry's inputs.

    Raises:
        UsageError: a missing or unknown name, another shape or dtype.
    """
    wanted = {spec.name: spec for spec in inputs}
    if set(wanted) != set(feeds):
        raise UsageError("the inputs do not match", value=", ".join(feeds), why=f"wanted are {', '.join(wanted)}")
    for name, spec in wanted.items():
        given = feeds[name]
        if not spec.takes(given.shape) or str(given.dtype) != spec.dtype:
            raise UsageError(
                "an input has another shape or dtype",
                value=f"{name}: {tuple(given.shape)} {given.dtype}",
                why=f"the artifact takes {shape_words(spec.shape, spec.dynamic)} {spec.dtype}",
            )


def own_feeds(inputs: Sequence[Tensor], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """A model's feeds as the artifact takes them: its own layout, widths and pixels.

    Raises:
        UsageError: a number that the artifact's narrower integers cannot hold, or values that are of no pixels.
    """
    given = dict(feeds)
    for spec in inputs:
        value = given.get(spec.name)
        if value is None:
            continue
        if spec.layout == NHWC:
            value = np.ascontiguousarray(value.transpose(0, 2, 3, 1))
        if spec.pixels:
            value = _pixels(spec, value)
        if value.ndim == 0 and spec.shape == (1,):
            value = value.reshape(1)
        given[spec.name] = value
    return own_widths(inputs, given)


def _pixels(spec: Tensor, value: Array) -> Array:
    """The raw pixels (uint8) that a preprocessed image (B, C, H, W) was made of.

    Raises:
        UsageError: it was not made of whole numbers from 0 to 255.
    """
    factor, offset = (np.array(part).reshape(1, -1, 1, 1) for part in zip(*spec.pixels, strict=True))
    raw = (value.astype(np.float64) - offset) / factor
    whole: Array = np.clip(np.rint(raw), 0, 255)
    if np.abs(raw - whole).max() > 0.01:
        raise UsageError(
            "a sample was not made of pixels",
            value=f"{spec.name}: {raw.min():g} to {raw.max():g} before the preprocessing",
            why="the artifact takes images of whole numbers from 0 to 255",
            fix="give the recipe held-out images, or leave the image input away",
        )
    return whole.astype(np.uint8)


def own_widths(inputs: Sequence[Tensor], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Feeds with numbers as wide as the artifact takes them: targets differ in what they make of 64 bits.

    Raises:
        UsageError: a number that the artifact's narrower integers cannot hold.
    """
    given = dict(feeds)
    for spec in inputs:
        value = given.get(spec.name)
        if value is None:
            continue
        wanted = np.dtype(spec.dtype)
        if value.dtype != wanted and value.dtype.kind in "iu" and wanted.kind in "iu":
            limits = np.iinfo(wanted)
            if value.size and (value.min() < limits.min or value.max() > limits.max):
                raise UsageError(
                    "an input does not fit the artifact's integers",
                    value=f"{spec.name}: {value.min()} to {value.max()}",
                    why=f"the artifact takes {wanted}, {limits.min} to {limits.max}",
                )
            value = value.astype(wanted)
        elif value.dtype.kind in "fb" and value.dtype.itemsize != wanted.itemsize and wanted.kind in "fi":
            value = value.astype(wanted)
        given[spec.name] = value
    return given
