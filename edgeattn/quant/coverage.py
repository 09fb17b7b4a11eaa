"""What calibration samples do inside a model: ranges, saturation, dead channels, outliers, and whether they suffice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeattn.core.numerics import Array
from edgeattn.quant.batching import takes_several
from edgeattn.quant.calibration import CalibrationStream
from edgeattn.quant.observe import METHODS, Observer

#: How many times the median of the others makes an outlier: three of eight bits.
OUTLIER = 8.0
#: Samples that go through a model at once, where it takes as many: looking at a tensor costs more than making it.
AT_ONCE = 8
#: A range that grows by less than this is settled.
GROWTH = 0.01
#: Fewer samples than these are few.
FEW = 32
#: A channel is called dead or loud by at least so many numbers.
NUMBERS = 16
#: Shares beyond which the user is told: of a module's numbers that saturate, of its channels that are dead, of the
#: modules whose ranges still grew in the last quarter, and of a range that golden samples leave.
SATURATED, DEAD, GROWING, LEFT = 0.01, 0.5, 0.5, 0.25
#: Inputs are normalized if mean and standard deviation are about 0 and 1: no further away than this.
MEAN, STD = 1.5, (0.2, 5.0)
#: Peaks of samples are counted by their size, eight to an octave, from 2**-160 up.
_OCTAVE, _LEAST, _PEAKS = 8, -160, 8 * 290


class _Watch:
    """One tensor of a module, in bounded memory whatever the number of samples."""

    def __init__(self, method: str, axis: int | None) -> None:
        self.observer = Observer(method)
        self.axis = axis
        self.low: Array = np.zeros(0)
        self.high: Array = np.zeros(0)
        self.per_channel = 0
        self.settled = 0
        self.loudest, self.loudest_at = 0.0, 0
        self._peaks: Array = np.zeros(_PEAKS, np.int64)
        self._low = self._high = self._span = 0.0

    def add(self, y: Tensor, start: int, samples: int, batch: int) -> None:
        """Count a module's output for the samples from number ``start`` on, in a feed of ``batch``."""
        self.observer.add(y.numpy())
        low, high = _ends(y, self.axis)
        if self.axis is not None:
            self._channels(low.numpy(), high.numpy(), y.numel() // low.shape[1])
        if low.shape[0] % batch:  # the samples are mixed
            self._grow([self.observer.lowest], [self.observer.highest], start + samples - 1)
            return
        lows, highs = (v.reshape(batch, -1)[:samples].double() for v in (low, high))
        ends = [np.nan_to_num(v.numpy(), posinf=0.0, neginf=0.0) for v in (lows.amin(1), highs.amax(1))]
        self._grow(ends[0], ends[1], start)
        self._loudness(np.maximum(np.abs(ends[0]), np.abs(ends[1])), start)

    def _grow(self, lows: Iterable[float], highs: Iterable[float], start: int) -> None:
        """Note the last sample by which the range grew, given the ends of each from number ``start`` on."""
        for number, (low, high) in enumerate(zip(lows, highs, strict=True), start + 1):
            self._low, self._high = min(self._low, low), max(self._high, high)
            if self._high - self._low > self._span * (1 + GROWTH):
                self._span, self.settled = self._high - self._low, number

    def _channels(self, low: Array, high: Array, numbers: int) -> None:
        """Count the ends of each channel in each row; ``numbers`` of a channel they stand for."""
        if self.low.size != low.shape[1]:
            # The first time; or a module that is used with several widths, of which the last one counts.
            self.low, self.high = np.full(low.shape[1], np.nan), np.full(low.shape[1], np.nan)
            self.per_channel = 0
        self.low = np.fmin(self.low, np.fmin.reduce(np.where(np.isfinite(low), low, np.nan)))
        self.high = np.fmax(self.high, np.fmax.reduce(np.where(np.isfinite(high), high, np.nan)))
        self.per_channel += numbers

    def _loudness(self, peaks: Array, start: int) -> None:
        first = int(peaks.argmax())
        if peaks[first] > self.loudest:
            self.loudest, self.loudest_at = float(peaks[first]), start + first
        some = peaks[peaks > 0]
        places = ((np.log2(some) - _LEAST) * _OCTAVE).astype(np.int64)
        np.add.at(self._peaks, np.clip(places, 0, _PEAKS - 1), 1)

    def median_peak(self) -> float:
        """Of the samples that are not 0 throughout, to an eighth of an octave; 0 if all are."""
        total = np.cumsum(self._peaks)
        if not total[-1]:
            return 0.0
        return float(2.0 ** ((np.searchsorted(total, total[-1] / 2) + 0.5) / _OCTAVE + _LEAST))

    def facts(self) -> dict[str, Any]:
        """Plain data."""
        seen = self.observer
        low, high = seen.limits()
        facts: dict[str, Any] = {
            "lowest": seen.lowest,
            "highest": seen.highest,
            "range": [low, high],
            "saturated": seen.beyond(low, high),
            "nonfinite": seen.nonfinite,
            "settled": self.settled,
            "channels": 0,
            "dead": 0,
            "loud": 0,
            "channel_ratio": 1.0,
            "sample_ratio": 1.0,
            "loudest_sample": self.loudest_at,
        }
        if self.low.size > 1 and self.per_channel >= NUMBERS:
            peaks = np.fmax(np.abs(self.low), np.abs(self.high))
            awake = peaks[peaks > 0]
            median = float(np.median(awake)) if awake.size else 0.0
            facts["channels"] = int(self.low.size)
            facts["dead"] = int((self.low == self.high).sum())
            facts["loud"] = int((peaks > OUTLIER * median).sum()) if median else 0
            facts["channel_ratio"] = float(np.nanmax(peaks)) / median if median else 1.0
        if median := self.median_peak():
            facts["sample_ratio"] = max(1.0, self.loudest / median)
        return facts


def _ends(y: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Lowest and highest numbers of each channel in each row (rows, channels); without channels all numbers."""
    if axis is None or y.ndim < 3:
        rows = y if y.ndim else y[None]
        return rows, rows
    places, along = (y.flatten(2), 2) if axis == 1 else (y.flatten(1, -2), 1)
    return places.amin(along), places.amax(along)  # ten times as quick as aminmax


def _axis(module: nn.Module, y: Tensor) -> int | None:
    """Where the channels of a module's output are; None for what has none."""
    if y.ndim < 2:
        return None
    last = isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm | nn.Embedding)
    spatial = isinstance(module, nn.Conv1d | nn.BatchNorm1d) or y.ndim >= 4
    return y.ndim - 1 if last or not spatial else 1


@contextmanager
def _outputs(model: nn.Module, see: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Call ``see`` with each float output of each module; what a module only hands on is seen once."""
    last: list[tuple[Tensor, int]] = []

    def hook(path: str, module: nn.Module, output: Any) -> None:
        leaves = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
        leaves = [t for t in leaves if t.numel()]
        for i, y in enumerate(leaves):
            # The version tells an activation in place from a container.
            if any(y is seen and y._version == version for seen, version in last):
                continue
            see(f"{path or '(model)'}{f':{i}' if i else ''}", module, y.detach().float().cpu())
        last[:] = [(y, y._version) for y in leaves]

    handles = [
        module.register_forward_hook(lambda m, _, output, path=path: hook(path, m, output))
        for path, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def coverage(
    model: nn.Module,
    stream: CalibrationStream,
    method: str = METHODS[0],
    golden: Iterable[Mapping[str, Array]] = (),
    used: int | None = None,
) -> dict[str, Any]:
    """Run calibration samples through a model and say what they cover.

    Args:
        model: the deploy form, in eval mode, on the CPU. method: how ranges are chosen, see ``quant.observe.METHODS``.
        golden: feeds that the ranges shall hold for as well. used: on how many samples ranges are measured, of which
            these may be a part.

    Returns:
        Plain data: ``samples``; ``settled``, the number of samples after which no module's range grew by more than 1 %
        and ``settled_half``, the same for half of the modules; ``constant`` samples; ``inputs`` (mean, std, lowest,
        highest, by name); ``modules``, each with its range in floats, the share of its numbers that int8 saturates,
        channels that are dead (one number throughout) or loud (over 8 times the median), how much louder than the
        median the loudest sample is, and with golden samples the share of their numbers ``golden_beyond`` all that was
        seen and how far they are beyond, ``golden_left``, as a share of the range; ``warnings``, sentences.

    Raises:
        UsageError: the samples are unfit, see ``CalibrationStream.survey``.
    """
    survey, batch = stream.survey(), max(1, stream.form.batch)
    names = [spec.name for spec in stream.form.inputs]
    watches: dict[str, _Watch] = {}
    total = len(stream.chosen)
    start = rows = 0

    def watch(path: str, module: nn.Module, y: Tensor) -> None:
        if path not in watches:
            watches[path] = _Watch(method, _axis(module, y))
        watches[path].add(y, start, min(rows, total - start), rows)

    two = list(islice(stream, 2))
    several = max(1, AT_ONCE // batch) if stream.form.batch and len(two) == 2 else 1
    several = several if several > 1 and takes_several(model, two, names) else 1
    feeds = iter(stream)
    with _outputs(model, watch):
        while group := list(islice(feeds, several)):
            rows = batch * len(group)
            model(*(torch.from_numpy(np.concatenate([feed[name] for feed in group])) for name in names))
            start += rows
    modules = [{"module": path, **seen.facts()} for path, seen in watches.items()]
    left: dict[str, tuple[float, float, int]] = {}

    def beyond(path: str, module: nn.Module, y: Tensor) -> None:
        if path not in watches:
            return  # a branch that no calibration sample took
        seen = watches[path].observer
        outside = float(((y < seen.lowest) | (y > seen.highest)).double().mean())
        excess = max(seen.lowest - float(y.min()), float(y.max()) - seen.highest, 0.0)
        share, ratio, count = left.get(path, (0.0, 0.0, 0))
        span = seen.highest - seen.lowest
        far = excess / span if span else float(excess > 0)
        left[path] = (share + outside, max(ratio, far), count + 1)

    with _outputs(model, beyond):
        for given in golden:
            model(*(torch.from_numpy(np.array(given[name])) for name in names))
    for facts in modules:
        if facts["module"] in left:
            share, ratio, count = left[facts["module"]]
            facts |= {"golden_beyond": share / count, "golden_left": ratio if math.isfinite(ratio) else None}
    settled = sorted(facts["settled"] for facts in modules)
    report: dict[str, Any] = {
        "samples": total,
        "settled": settled[-1] if settled else 0,
        "settled_half": settled[len(settled) // 2] if settled else 0,
        "constant": survey.constant,
        "inputs": {name: asdict(found) for name, found in survey.statistics.items()},
        "modules": modules,
    }
    return report | {"warnings": list(_warnings(report, stream, used or total))}


def _warnings(report: Mapping[str, Any], stream: CalibrationStream, used: int) -> Iterator[str]:
    total, modules = report["samples"], report["modules"]
    if used < FEW:
        yield f"only {used} calibration samples: ranges are better measured on {FEW} and more"
    if report["constant"]:
        yield f"{report['constant']} of {total} calibration samples are constant"
    yield from _input_warnings(report["inputs"], stream)

    def worst(key: str) -> Any:
        return max(modules, key=lambda facts: facts.get(key) or 0)

    if any(facts["nonfinite"] for facts in modules):
        first = next(facts for facts in modules if facts["nonfinite"])
        yield f"module {first['module']} gives NaN or infinity: {first['nonfinite']} numbers"
    if saturated := [facts for facts in modules if facts["saturated"] > SATURATED]:
        most = worst("saturated")
        yield f"{_count(saturated)} saturate over {SATURATED:.0%}: {most['module']} {most['saturated']:.1%}"
    if dead := [facts for facts in modules if facts["channels"] and facts["dead"] > DEAD * facts["channels"]]:
        most = max(dead, key=lambda facts: facts["dead"] / facts["channels"])
        yield (
            f"{_count(dead)} have over {DEAD:.0%} dead channels: {most['module']} {most['dead']} of "
            f"{most['channels']}; are the samples like those in use?"
        )
    if loud := [facts for facts in modules if facts["loud"]]:
        most = worst("channel_ratio")
        yield (
            f"{_count(loud)} have channels over {OUTLIER:g} times as loud as the median, which one range for all "
            f"serves badly: {most['module']} {most['channel_ratio']:.0f} times"
        )
    if any(facts["sample_ratio"] > OUTLIER for facts in modules):
        most = worst("sample_ratio")
        label = stream.label(most["loudest_sample"])
        yield f"{label} is {most['sample_ratio']:.0f} times as loud as the median in module {most['module']}"
    late = [facts for facts in modules if facts["settled"] > 0.75 * total]
    if total >= 4 and len(late) > GROWING * len(modules):
        more = "use more of them" if used < stream.of else "more are needed"
        which = "the samples" if used == total else f"the {total} samples that were looked at"
        yield f"the ranges of {_count(late)} of {len(modules)} still grew in the last quarter of {which}: {more}"
    if left := [facts for facts in modules if (facts.get("golden_left") or 0) > LEFT]:
        most = worst("golden_left")
        yield (
            f"calibration does not cover the golden samples: {_count(left)} go over {LEFT:.0%} beyond their range, "
            f"{most['module']} {most['golden_left']:.0%}"
        )


def _input_warnings(inputs: Mapping[str, Mapping[str, float]], stream: CalibrationStream) -> Iterator[str]:
    for spec in stream.form.inputs:
        found = inputs[spec.name]
        if not spec.dtype.startswith("float"):
            continue
        text = f"input {spec.name} has mean {found['mean']:.3g} and standard deviation {found['std']:.3g}"
        if spec.low is not None and spec.high is not None:
            if found["lowest"] < spec.low or found["highest"] > spec.high:
                ends = f"{found['lowest']:.3g} to {found['highest']:.3g}"
                yield f"input {spec.name} is {ends}, and should be {spec.low:g} to {spec.high:g}"
        elif abs(found["mean"]) > MEAN or not STD[0] <= found["std"] <= STD[1]:
            yield f"the calibration samples look unnormalized: {text}, not about 0 and 1; check [preprocess]"


def _count(modules: list[Any]) -> str:
    return f"{len(modules)} module{'s' if len(modules) != 1 else ''}"
