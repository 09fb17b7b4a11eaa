"""Calibration: the samples that ranges are measured on, as a stream that is checked before anything is quantized."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.core.errors import CheckFailed, UsageError
from edgeattn.core.numerics import Array
from edgeattn.core.specs import TensorSpec, batches
from edgeattn.models.build import find_callable, own_folder
from edgeattn.quant.files import ArrayFile, ImageFolder
from edgeattn.quant.sources import Form, Sample, Source, Yielded, misfit
from edgeattn.recipe import CalibrationSpec, Preprocess, preprocessed


@dataclass(frozen=True)
class Statistics:
    """Of the numbers that one input is fed with, over all samples."""

    mean: float
    std: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Survey:
    """What one pass over the samples has found.

    Attributes:
        sha256: over the digests of the samples as the model is fed with them, in order; the batch does not count.
        constant: samples of which every input is one number throughout. statistics: by input.
    """

    sha256: str
    constant: int
    statistics: dict[str, Statistics]


def open_source(text: str, form: Form, folder: str = ".") -> Source:
    """The samples that a recipe's ``calibration.source`` names.

    Args:
        text: a folder of images, a .npy or .npz file, or ``package.module:function`` (``file.py:function``).
        folder: where relative paths begin.

    Raises:
        UsageError: it is none of these, or does not fit the model. ToolchainMissing: images without Pillow.
    """
    path = Path(folder, text)
    if path.is_dir():
        return ImageFolder(path, form)
    if path.suffix in (".npy", ".npz") and path.is_file():
        return ArrayFile(path, form)
    module, colon, function = text.rpartition(":")
    if colon and module and function and not path.exists():
        with own_folder(text, folder):
            make = find_callable(text, folder, "function")
        if not callable(make):
            raise UsageError(
                "the calibration function is no function",
                value=type(make).__name__,
                where=text,
                fix="name a function without arguments that returns an iterable of samples",
            )
        return Yielded(make, text, form)
    raise UsageError(
        "the calibration samples cannot be read" if path.exists() else "the calibration samples are missing",
        value=text,
        where=str(Path(folder).resolve()),
        fix="a folder of images, a .npy or .npz file, or package.module:function",
    )


class CalibrationStream:
    """Feeds {input: array in the model's own shape}, to be gone through again and again; never in memory as a whole.

    The last feed is filled up with its own last sample. The first pass is preceded by a check of all samples; if a
    later one brings other samples, it fails at its end.

    Args:
        source: of the samples. preprocess: the recipe's, for the first input of raw samples.
        samples: at most so many are used, a subset drawn with ``seed`` where there are more; in their own order.

    Attributes:
        chosen: numbers of the samples that are used, ascending. of: how many there are.

    Raises:
        UsageError: there are none, they cannot be read, or do not fit the model.
    """

    def __init__(
        self, source: Source, preprocess: Preprocess | None = None, samples: int | None = None, seed: int = 0
    ) -> None:
        self.source = source
        self.form = source.form
        self.preprocess = preprocess if source.raw and self.form.inputs[0].dtype.startswith("float") else None
        self.seed = seed
        self.of = source.count()
        if not self.of:
            raise UsageError(
                "there are no calibration samples",
                value=source.name,
                fix="give at least one; a few hundred that are like those in use are good",
            )
        self._fits_channels()
        self.chosen: Array = np.arange(self.of)
        if samples is not None and samples < self.of:
            rng = np.random.Generator(np.random.PCG64(seed))
            self.chosen = np.sort(rng.choice(self.of, samples, replace=False))
        self._survey: Survey | None = None

    @staticmethod
    def of_spec(
        spec: CalibrationSpec, inputs: Sequence[TensorSpec], preprocess: Preprocess | None = None, folder: str = "."
    ) -> CalibrationStream:
        """The samples that a recipe names, its relative paths beginning in ``folder``."""
        source = open_source(spec.source, Form.of(inputs), folder)
        return CalibrationStream(source, preprocess, spec.samples, spec.seed)

    @staticmethod
    def of_feeds(feeds: Iterable[Mapping[str, Array]], inputs: Sequence[TensorSpec], name: str) -> CalibrationStream:
        """Feeds at hand, such as golden samples; preprocessed already."""
        return CalibrationStream(Yielded(lambda: feeds, name, Form.of(inputs)))

    def _fits_channels(self) -> None:
        shape = self.form.shapes[0]
        for key in ("mean", "std") if self.preprocess else ():
            values = getattr(self.preprocess, key)
            if len(values) not in (1, shape[0] if shape else 1):
                raise UsageError(
                    "the preprocessing does not fit the input",
                    value=f"{len(values)} values",
                    where=f"preprocess.{key}",
                    why=f"the input takes samples of {shape}",
                    fix="give one value, or one a channel",
                )

    def __len__(self) -> int:
        """How many feeds there are."""
        return math.ceil(len(self.chosen) / max(1, self.form.batch))

    def __iter__(self) -> Iterator[dict[str, Array]]:
        """The feeds. Raises UsageError as ``survey`` does; CheckFailed after the last if samples have changed."""
        known = self.survey().sha256
        digest = hashlib.sha256()
        waiting: list[Sample] = []
        for sample in self._samples():
            digest.update(_digest(sample))
            waiting.append(sample)
            if len(waiting) >= self.form.batch:
                yield self._feed(waiting)
                waiting = []
        if waiting:
            yield self._feed(waiting)
        if digest.hexdigest() != known:
            raise CheckFailed(
                "the calibration samples have changed",
                value=self.source.name,
                why="this pass brought other ones than the first",
                fix="seed whatever is random in the function, and leave the files alone while it runs",
            )

    def survey(self) -> Survey:
        """Look at all samples, once.

        Raises:
            UsageError: one is of the wrong shape or dtype, or not finite; all are constant, or all the same.
        """
        if self._survey is None:
            self._survey = self._look()
        return self._survey

    def describe(self) -> dict[str, Any]:
        """For the manifest: where the samples came from, how many of how many, and their digest."""
        return {
            "source": self.source.name,
            "samples": len(self.chosen),
            "of": self.of,
            "seed": self.seed,
            "sha256": self.survey().sha256,
        }

    def label(self, position: int) -> str:
        """What a message calls the sample at a position of the stream."""
        return self.source.label(int(self.chosen[position]))

    def _feed(self, samples: list[Sample]) -> dict[str, Array]:
        names = [spec.name for spec in self.form.inputs]
        if not self.form.batch:
            return {name: x.copy() for name, x in zip(names, samples[0], strict=True)}
        stacked = (np.stack(arrays) for arrays in zip(*samples, strict=True))
        return {name: next(batches(x, self.form.batch)) for name, x in zip(names, stacked, strict=True)}

    def _samples(self) -> Iterator[Sample]:
        """The chosen samples as the model takes them."""
        for position, sample in enumerate(self.source.read(self.chosen)):
            pairs = zip(self.form.inputs, self.form.shapes, sample, strict=True)
            yield tuple(self._value(spec, shape, x, position) for spec, shape, x in pairs)

    def _value(self, spec: TensorSpec, shape: tuple[int, ...], raw: Array, position: int) -> Array:
        if raw.shape != shape:
            raise misfit(str(raw.shape), shape, self.label(position))
        if not spec.dtype.startswith("float"):
            return self._whole(spec, raw, position)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found below
            if spec is self.form.inputs[0] and self.preprocess:
                raw = preprocessed(raw[None], self.preprocess)[0]
            value = np.asarray(raw, spec.dtype, order="C")
        if not np.isfinite(value).all():
            bad = int((~np.isfinite(value)).sum())
            raise UsageError(
                "a calibration sample is not finite",
                value=f"{bad} of {value.size} numbers of input {spec.name} are NaN or infinite",
                where=self.label(position),
                why="one would spoil the range of every layer",
                fix="take the sample out, or mend what made it",
            )
        return value

    def _whole(self, spec: TensorSpec, raw: Array, position: int) -> Array:
        """Numbers of an integer input, in its own dtype."""
        value = np.asarray(raw, spec.dtype, order="C") if raw.dtype.kind in "iub" else None
        if value is None or not np.array_equal(value, raw):
            raise UsageError(
                "a calibration sample does not fit the input's dtype",
                value=str(raw.dtype) if value is None else f"{raw.min()} to {raw.max()}",
                where=self.label(position),
                why=f"input {spec.name} takes {spec.dtype}",
                fix="give whole numbers that it holds",
            )
        return value

    def _look(self) -> Survey:
        digest, first, same, constant = hashlib.sha256(), b"", True, 0
        moments = {spec.name: np.zeros(3) for spec in self.form.inputs}
        ends = {spec.name: (math.inf, -math.inf) for spec in self.form.inputs}
        for sample in self._samples():
            own = _digest(sample)
            digest.update(own)
            first = first or own
            same &= own == first
            constant += all(x.min() == x.max() for x in sample) and any(x.size > 1 for x in sample)
            for name, x in zip(moments, sample, strict=True):
                moments[name] += x.size, x.sum(dtype=np.float64), np.square(x, dtype=np.float64).sum()
                ends[name] = min(ends[name][0], float(x.min())), max(ends[name][1], float(x.max()))
        total = len(self.chosen)
        if constant == total or (same and total > 1):
            raise UsageError(
                "the calibration samples are all constant"
                if constant == total
                else "the calibration samples are all the same",
                value=f"{total} samples",
                where=self.source.name,
                why="ranges that are measured on them are not those in use",
                fix="give samples that are like those in use",
            )
        statistics = {}
        for name, (count, summed, squared) in moments.items():
            mean = summed / count
            std = math.sqrt(max(0.0, squared / count - mean * mean))
            statistics[name] = Statistics(float(mean), std, *ends[name])
        return Survey(digest.hexdigest(), constant, statistics)


def _digest(sample: Sample) -> bytes:
    digest = hashlib.sha256()
    for x in sample:
        digest.update(f"{x.dtype.str}{x.shape}".encode())
        digest.update(x.data)
    return digest.digest()
