"""What a function takes and gives, as the model's description declares it: arrays, images, states, labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from edgeattn.core.errors import UsageError
from edgeattn.core.numerics import Array
from edgeattn.targets.coreml.mil.package import Package

#: ``ArrayFeatureType.ArrayDataType`` of Core ML's protobuf.
ARRAYS = {65552: "float16", 65568: "float32", 65600: "float64", 131104: "int32", 131080: "int8"}
#: ``ImageFeatureType.ColorSpace``: channels of an image.
COLORS = {10: ("gray", 1), 20: ("rgb", 3), 30: ("bgr", 3), 40: ("gray float16", 1)}


@dataclass(frozen=True)
class Feature:
    """One input, output or state.

    Attributes:
        shape: the default one. dtype: NumPy's name, "" for what is no array.
        ranges: lowest and highest size of each dimension, where it is flexible; -1 for no limit.
        choices: all shapes that it may have, where they are listed.
        color: of an image: gray, rgb or bgr; else "".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    ranges: tuple[tuple[int, int], ...] = ()
    choices: tuple[tuple[int, ...], ...] = ()
    color: str = ""

    def _takes(self, shape: tuple[int, ...]) -> bool:
        if self.ranges:
            inside = (low <= n and (high < 0 or n <= high) for n, (low, high) in zip(shape, self.ranges, strict=False))
            return len(shape) == len(self.ranges) and all(inside)
        return shape in self.choices if self.choices else shape == self.shape

    def wanted(self) -> str:
        """Shape and dtype in words."""
        if self.ranges:
            sizes = (f"{a}" if a == b else f"{a}..{b if b >= 0 else ''}" for a, b in self.ranges)
            shape = f"({', '.join(sizes)})"
        else:
            shape = " or ".join(map(str, self.choices or (self.shape,)))
        return f"{shape} {self.dtype}{f' pixels, {self.color}' if self.color else ''}"

    def check(self, given: Array) -> Array:
        """A feed as the function takes it; pixels (1, C, H, W) are in the model's own order of channels.

        Raises:
            UsageError: another shape or dtype, or NaN in it.
        """
        if not self._takes(tuple(given.shape)) or str(given.dtype) != self.dtype:
            raise UsageError(
                "an input has another shape or dtype",
                value=f"{self.name}: {tuple(given.shape)} {given.dtype}",
                why=f"the model takes {self.wanted()}",
            )
        if given.dtype.kind == "f" and np.isnan(given).any():
            raise UsageError(
                "an input holds NaN",
                value=f"{self.name}: {int(np.isnan(given).sum())} of {given.size} values",
                why="every result that depends on them would be NaN",
                fix="look at where the data comes from",
            )
        return given

    def from_result(self, value: Any) -> Any:
        """What a function returned, as NumPy's."""
        if isinstance(value, Tensor):
            return value.numpy().astype(self.dtype or None)
        return value


def _feature(item: Any) -> Feature:
    kind = item.type.WhichOneof("Type")
    if kind == "imageType":
        image = item.type.imageType
        color, channels = COLORS.get(image.colorSpace, ("", 0))
        return Feature(
            item.name, (1, channels, image.height, image.width), "uint8", *_flexible_image(image, channels), color
        )
    if kind in ("multiArrayType", "stateType"):
        array = item.type.multiArrayType if kind == "multiArrayType" else item.type.stateType.arrayType
        dtype = ARRAYS.get(array.dataType, "")
        flexible = array.WhichOneof("ShapeFlexibility")
        ranges: tuple[tuple[int, int], ...] = ()
        choices: tuple[tuple[int, ...], ...] = ()
        if flexible == "shapeRange":
            ranges = tuple((int(r.lowerBound), int(r.upperBound)) for r in array.shapeRange.sizeRanges)
        elif flexible == "enumeratedShapes":
            choices = tuple(tuple(shape.shape) for shape in array.enumeratedShapes.shapes)
        return Feature(item.name, tuple(array.shape), dtype, ranges, choices)
    return Feature(item.name, (), "")


def _flexible_image(image: Any, channels: int) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, ...], ...]]:
    flexible = image.WhichOneof("SizeFlexibility")
    if flexible == "imageSizeRange":
        sizes = image.imageSizeRange
        ranges = [(int(r.lowerBound), int(r.upperBound)) for r in (sizes.heightRange, sizes.widthRange)]
        return ((1, 1), (channels, channels), *ranges), ()
    if flexible == "enumeratedSizes":
        return (), tuple((1, channels, int(s.height), int(s.width)) for s in image.enumeratedSizes.sizes)
    return (), ()


def features_of(
    package: Package, function: str
) -> tuple[tuple[Feature, ...], tuple[Feature, ...], tuple[Feature, ...]]:
    """Inputs, outputs and states of a function as described."""
    description = package.spec.description
    own = [item for item in description.functions if item.name == function]
    found = own[0] if own else description
    inputs, outputs, states = (tuple(map(_feature, getattr(found, kind))) for kind in ("input", "output", "state"))
    return inputs, outputs, states
