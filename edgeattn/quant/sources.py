"""Where calibration samples come from: what a source is, and those that are yielded by a function or at hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeattn.core.errors import EdgeAttnError, UsageError
from edgeattn.core.numerics import Array
from edgeattn.core.specs import TensorSpec
from edgeattn.models.build import guest_error

#: One array an input, in the inputs' order, without the batch.
Sample = tuple[Array, ...]

#: A function that yields more than these is taken to never end.
MOST = 1_000_000


@dataclass(frozen=True)
class Form:
    """What a sample of a model is.

    Attributes:
        inputs: of the model, with the batch. batch: samples that make a feed, along the first axis of every input;
            0 where the inputs have no batch in common, and a sample is a whole feed.
    """

    inputs: tuple[TensorSpec, ...]
    batch: int

    @staticmethod
    def of(inputs: Sequence[TensorSpec]) -> Form:
        """The batch is the first axis, if it has the same size in every input."""
        sizes = {spec.shape[0] if spec.shape else 0 for spec in inputs}
        return Form(tuple(inputs), sizes.pop() if len(sizes) == 1 else 0)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of a sample's arrays."""
        return [spec.shape[1:] if self.batch else spec.shape for spec in self.inputs]


class Source(ABC):
    """Samples by number, the same at every reading.

    Attributes:
        name: to the user. raw: whether the recipe's preprocessing is still to be done.
    """

    raw = True

    def __init__(self, name: str, form: Form) -> None:
        self.name = name
        self.form = form

    @abstractmethod
    def count(self) -> int:
        """How many samples there are. Raises UsageError as ``read`` does."""

    @abstractmethod
    def read(self, chosen: Array) -> Iterator[Sample]:
        """The samples of these ascending numbers.

        Raises:
            UsageError: one cannot be read; names it.
        """

    def label(self, number: int) -> str:
        """What a message calls a sample."""
        return f"sample {number} of {self.name}"


def misfit(found: str, wanted: tuple[int, ...], where: str) -> UsageError:
    """The error for samples of another shape than the input's."""
    return UsageError(
        "the calibration samples do not fit the input",
        value=found,
        where=where,
        why=f"the input takes samples of {wanted}",
        fix="give them in the shape of the model's own input",
    )


class Yielded(Source):
    """What an iterable yields that can be had again and again: model inputs as they are, nothing done to them.

    An item is an array of the only input, a tuple or list of the inputs in order (labels may follow), or a dict by
    name; a sample of its own, or several along a first axis, as data loaders give them.

    Args:
        make: gives the iterable, the same samples each time.
    """

    raw = False

    def __init__(self, make: Callable[[], Iterable[Any]], name: str, form: Form) -> None:
        super().__init__(name, form)
        self.make = make

    def count(self) -> int:
        """How many there are: all are yielded once for it, and none is kept. Raises UsageError: they do not end."""
        total = 0
        for _ in self._rows():
            total += 1
            if total > MOST:
                raise UsageError(
                    "the calibration samples do not end",
                    value=self.name,
                    why=f"more than {MOST:,}",
                    fix="let the function stop; it is called anew for every pass",
                )
        return total

    def read(self, chosen: Array) -> Iterator[Sample]:
        """Those that are chosen, of a pass over all. Raises UsageError: the function fails or gives something else."""
        rows, at = self._rows(), 0
        for number in chosen:
            for row in rows:
                at += 1
                if at > number:
                    yield row
                    break
            else:
                raise UsageError(
                    "the calibration samples are fewer than before",
                    value=self.name,
                    why=f"{at} now, and at least {number + 1} the first time",
                    fix="return a new iterable at every call, not one that is used up",
                )

    def _rows(self) -> Iterator[Sample]:
        try:
            items = iter(self.make())
        except EdgeAttnError:
            raise
        except (Exception, SystemExit) as error:
            raise guest_error("the calibration function failed", self.name, error) from error
        number = 0
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except EdgeAttnError:
                raise
            except (Exception, SystemExit) as error:
                raise guest_error("the calibration function failed", self.name, error) from error
            yield from self._split(item, f"item {number} of {self.name}")
            number += 1

    def _split(self, item: Any, label: str) -> Iterator[Sample]:
        """The samples in an item."""
        names = [spec.name for spec in self.form.inputs]
        given: list[Any]
        if isinstance(item, Mapping):
            given = [item[name] for name in names if name in item]
        elif isinstance(item, tuple | list):
            given = list(item[: len(names)])
        else:
            given = [item]
        if len(given) < len(names):
            held = ", ".join(map(str, item)) if isinstance(item, Mapping) else f"{len(given)} arrays"
            raise UsageError("an item lacks an input", value=held, where=label, why=f"the model has {', '.join(names)}")
        arrays = [_array(value, label) for value in given]
        shapes = self.form.shapes
        if [array.shape for array in arrays] == shapes:
            yield tuple(arrays)
            return
        for array, shape in zip(arrays, shapes, strict=True):
            if array.shape[1:] != shape or array.ndim == len(shape) or len(array) != len(arrays[0]):
                raise misfit(str(array.shape), shape, label)
        yield from zip(*arrays, strict=True)


def _array(value: Any, label: str) -> Array:
    """An array or a tensor, as an array of real numbers."""
    tensor = value.detach().cpu() if hasattr(value, "detach") else value
    try:
        array = np.asarray(tensor)
    except Exception as error:  # ragged lists, tensors of kinds that NumPy lacks
        raise UsageError("an item is no array", value=type(value).__name__, where=label, why=str(error)) from error
    if array.dtype.kind not in "fiub":
        raise UsageError("an item is not of real numbers", value=f"{type(value).__name__} {array.dtype}", where=label)
    return array
