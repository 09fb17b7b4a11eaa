"""Where two programs are met: each tensor that both have, as a model in PyTorch runs beside the other's trace.

A tensor that does not fit is not yet a fault: a converter may have fused the batch norm behind a convolution, so that
the tensor of that name is another one. The run goes on with both, what the model expects and what the other program
has. If what follows from the first fits again further on, there was no fault. What stays open until the outputs is
tried: another run takes that single tensor from the other program, and counts what fits after it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.core.numerics import Array, compare
from edgeattn.pipeline.sides import Span, Spans, Windows, ancestry, fits

if TYPE_CHECKING:
    from edgeattn.pipeline.shadow import Frame
    from edgeattn.targets.base import TraceValue

#: A tensor is explained by what leaves less than this share of its error.
BETTER = 1 / 3
#: Operations that change no number: that these fit tells nothing.
_LAYOUT = frozenset({"reshape", "transpose", "squeeze", "unsqueeze", "flatten", "identity", "cast", "expanddims"})
#: Of a place: module, whether it is the output, and the other program's tensor.
Key = tuple[str, bool, str]


def distance(expected: Array, actual: Array) -> float:
    """Relative L2 of two tensors of a shape; infinite where one is finite and the other is not."""
    if not np.array_equal(np.isfinite(expected), np.isfinite(actual)):
        return math.inf
    return compare(expected, actual).relative_l2


@dataclass(frozen=True)
class Met:
    """A place in the model of which both programs have the tensor.

    Attributes:
        module: path of the module whose input or output it is. output: which of the two.
        tensor, op: as the other program calls it, and the operation that made it.
        error: relative L2 between both programs.
        own: relative L2 between what the other program has, and what the model makes of the other's tensors before;
            None if that is not known.
        before: the largest error among the module's inputs; None if not known.
        frames: the calls whose operations ``own`` is the error of. blamed: path of the module among them to blame.
        expected, actual: the tensors that ``own`` compares, kept where it is beyond the limit. reference: the model's.
        dtype: of the other program's tensor.
    """

    module: str
    output: bool
    tensor: str
    op: str
    error: float
    own: float | None
    before: float | None = None
    frames: tuple[Frame, ...] = ()
    blamed: str = ""
    reference: Array | None = None
    expected: Array | None = None
    actual: Array | None = None
    dtype: str = ""

    @property
    def key(self) -> Key:
        """Names the place."""
        return self.module, self.output, self.tensor


@dataclass
class Comparison:
    """All places that were met, in order.

    Attributes:
        first: number of the place at which the programs part; None if they do not, or if no single module is to blame.
        sure: the program goes on with that tensor itself; else it only stands out from the others.
        reaches: the error of ``first`` is still there in the outputs.
        passed: modules that were not compared, by the reason.
        windows: how often the other program was run for its tensors, and the most bytes of them held at once.
        shadows: the model could be run on the other program's tensors.
    """

    met: list[Met] = field(default_factory=list)
    first: int | None = None
    sure: bool = False
    reaches: bool = True
    passed: Counter[str] = field(default_factory=Counter)
    windows: tuple[int, int] = (0, 0)
    shadows: bool = True

    @property
    def culprit(self) -> str | None:
        """Path of the module to blame; None if there is none."""
        return None if self.first is None else self.met[self.first].blamed

    def jumps(self, count: int) -> list[Met]:
        """The places with the largest errors of their own, or largest growth where those are not known."""
        ranked = [m for m in self.met if growth(m) > 0]
        return sorted(ranked, key=growth, reverse=True)[:count]


def growth(met: Met) -> float:
    """A place's own error; else its error where it is much more than before it."""
    if met.own is not None:
        return met.own
    return met.error if met.before is not None and met.error > 2 * met.before else 0.0


class Meeting:
    """Compares the tensors of a running model with the other program's.

    Args:
        spans, fused: of the other program. windows: its tensors. limit: largest relative L2 of what is the same.
        trial: take the tensors of no place that does not fit but of these.
    """

    def __init__(
        self,
        spans: Spans,
        windows: Windows,
        limit: float,
        fused: frozenset[str],
        trial: frozenset[Key] | None = None,
    ) -> None:
        self._spans, self._windows, self._limit = spans, windows, limit
        self._known = fused.union(spans)
        self._trial = trial
        self.found = Comparison()
        #: Tensors that fit, but for those that only are others in another form.
        self.fitting = 0
        self._denied: set[int] = set()
        self._hidden: set[int] = set()
        self._errors: dict[int, float] = {}
        self._matched: set[str] = set()

    def _span(self, frame: Frame) -> Span | None:
        spans = self._spans.get(frame.path, [])
        return spans[frame.call] if frame.call < len(spans) else None

    def _blamed(self, place: str, frames: Sequence[Frame], output: bool) -> str:
        """The module to blame: the last with weights of those that the other program has, too, or one around it.

        Args:
            place: path of the module whose input or output it is.
        """
        weighted = [f.path for f in frames if any(True for _ in f.module.parameters(recurse=False))]
        if output and place in weighted:
            return place
        known = [path for path in weighted or [f.path for f in frames] if path in self._known]
        if known:
            return known[-1]
        path = (weighted or [f.path for f in frames])[-1]
        around = [outer for outer in ancestry(path) if outer in self._known]
        return around[-1] if around else path

    def _candidates(self, groups: Sequence[tuple[str, ...]], shape: tuple[int, ...]) -> list[tuple[TraceValue, Array]]:
        """The other program's tensors that can be one of that shape."""
        found = []
        for names in groups:
            item = next((item for item in map(self._windows.get, names) if item is not None), None)
            if item is not None:
                found += [(item, value) for value in fits(item.value, shape)]
        return found

    def enter(self, frame: Frame, tensors: tuple[Any, ...]) -> None:
        """A module is called."""
        span = self._span(frame)
        errors = []
        for tensor in tensors:
            met = self._meet(frame, tensor, span.ins, output=False) if span and tensor.is_floating_point() else None
            errors += [] if met is None else [met.error]
        self._errors[id(frame)] = max(errors, default=math.nan)

    def leave(self, frame: Frame, tensors: tuple[Any, ...]) -> None:
        """A module returns."""
        before = self._errors.pop(id(frame))
        span = self._span(frame)
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        if span is None:
            self.found.passed["nothing of it is left in the other program"] += bool(frame.path and floats)
            for tensor in floats:
                self._settle(tensor)
            return
        met = [self._meet(frame, tensor, span.outs, True, None if math.isnan(before) else before) for tensor in floats]
        if floats and not any(met):
            self.found.passed["no tensor of its shape in the other program"] += 1

    def _settle(self, tensor: Any) -> None:
        """Whether a tensor that the other program does not name is one that did not fit a name before."""
        from edgeattn.pipeline.shadow import Shadow, set_shadow, shadow_of

        shadow = shadow_of(tensor)
        if shadow is None or not shadow.points:
            return
        for number in shadow.points:
            met = self.found.met[number]
            if met.actual is None or met.actual.shape != tuple(tensor.shape):
                continue
            if distance(shadow.value.numpy(), met.actual) <= self._limit:
                self._denied.update(shadow.points)
                set_shadow(tensor, Shadow(like(met.actual, shadow.value), met=shadow.met))
                return

    def _meet(
        self, frame: Frame, tensor: Any, names: Sequence[tuple[str, ...]], output: bool, before: float | None = None
    ) -> Met | None:
        """Compare a tensor and its shadow with the other program's, and give it the shadow that follows from it."""
        from edgeattn.pipeline.shadow import Shadow, set_shadow, shadow_of

        shadow = shadow_of(tensor)
        if shadow is None:
            return None
        candidates = self._candidates(names, tuple(tensor.shape))
        if not candidates:
            return None
        own, which = _nearest(shadow.value, candidates)
        expected, resolved = shadow.value, own <= self._limit
        other = math.inf
        if shadow.doubtful is not None:
            other, at = _nearest(shadow.doubtful, candidates)
            if not resolved or other < BETTER * own:
                own, which, expected, resolved = other, at, shadow.doubtful, False
        item, actual = candidates[which]
        seen, fine = item.name in shadow.met, own <= self._limit
        if not (fine or output) and item.name in self._matched:
            return None  # what it was fused with reads another tensor of the model
        if fine:
            self._matched.add(item.name)
        # Of an operation that only the other program has, its own module is to blame, or the one that it serves.
        frames = shadow.since or (frame,)
        reference = tensor.numpy()
        met = Met(
            module=frame.path,
            output=output,
            tensor=item.name,
            op=item.op,
            error=distance(reference, actual),
            own=None if seen and shadow.points else own,
            before=before,
            frames=() if fine else frames,
            blamed=frame.path if fine else self._blamed(frame.path, frames, output),
            reference=None if fine else reference.copy(),
            expected=None if fine else expected.numpy().copy(),
            actual=None if fine else actual.copy(),
            dtype=str(item.value.dtype),
        )
        number = len(self.found.met)
        if seen and shadow.points:  # the same pair of tensors as before tells nothing new
            if output:
                self.found.met.append(replace(met, frames=(), reference=None, expected=None, actual=None))
                set_shadow(tensor, replace(shadow, points=(*shadow.points, number)))
            return met
        names_met = (*shadow.met, item.name)
        theirs = like(actual, shadow.value)
        self.fitting += fine and not (seen and frame.path) and item.op.lower().replace("_", "") not in _LAYOUT
        if self._trial is not None:
            if fine or met.key in self._trial:
                set_shadow(tensor, Shadow(theirs, met=names_met))
        elif resolved:
            # Where what was doubtful leads here too there was a fault, which what follows has levelled out.
            (self._hidden if other <= self._limit else self._denied).update(shadow.points)
            set_shadow(tensor, Shadow(theirs, met=names_met))
        else:
            points = (*shadow.points, number) if output or not fine else shadow.points
            # A second tensor that does not fit the first one may be a fault too, or again another tensor of that name.
            doubtful = theirs if fine or shadow.doubtful is None else shadow.doubtful
            set_shadow(tensor, Shadow(shadow.value, doubtful, (), points, names_met))
        if output or not fine:
            self.found.met.append(met)
        return met

    def open_places(self, tensors: Sequence[Any]) -> tuple[list[Met], list[Met]]:
        """The places whose errors are still open in the model's outputs, and those that something has levelled out.

        In order; what turned out to be another tensor is taken out of ``found``.
        """
        from edgeattn.pipeline.shadow import shadow_of

        numbers = {n for shadow in map(shadow_of, tensors) if shadow is not None for n in shadow.points}
        wrong = [i for i, met in enumerate(self.found.met) if growth(met) > self._limit]
        left = [self.found.met[i] for i in wrong if i in numbers]
        # Of a module that the other program has other parts of, as before its blocks were fused, nothing is known.
        hidden = [
            self.found.met[i]
            for i in wrong
            if i in self._hidden - self._denied and all(f.path in self._known for f in self.found.met[i].frames)
        ]
        gone = {i for i in self._denied if not any(self.found.met[i] is met for met in hidden)}
        self.found.met = [met for i, met in enumerate(self.found.met) if i not in gone]
        return left, hidden


def _nearest(expected: Any, candidates: Sequence[tuple[TraceValue, Array]]) -> tuple[float, int]:
    """The smallest distance of a tensor from one of several, and the number of that one."""
    value = expected.numpy()
    return min((distance(value, actual), i) for i, (_, actual) in enumerate(candidates))


def like(value: Array, other: Any) -> Any:
    """A tensor of those numbers, of the dtype of another one."""
    import torch

    return torch.from_numpy(np.array(value)).to(other.dtype)
