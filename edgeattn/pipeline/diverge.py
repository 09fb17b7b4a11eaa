"""Where two programs part: the first torch module whose output the other program no longer gives.

A PyTorch model is run beside the other program's trace. Wherever both have the same tensor, at the inputs and outputs
of modules, the model's shadow (``shadow``) is what its own operations make of the other program's last tensors: how
far the two are apart is the error of the operations in between alone, not what has built up before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn import targets
from edgeattn.core.numerics import Array, compare
from edgeattn.pipeline.meeting import Comparison, Key, Meeting, Met, distance, growth
from edgeattn.pipeline.sides import ArtifactSide, Side, Span, Spans, TorchSide, Windows, fits
from edgeattn.targets.base import Tensor

if TYPE_CHECKING:
    from edgeattn.pipeline.context import Context
    from edgeattn.targets.base import Runtime, TraceValue

#: A place's own error stands out if it is this many times that of the median place.
JUMP = 10.0
#: An open error of less than this part of the largest is not the one that is looked for.
SMALL = 300.0
#: An error has grown in a module if it is this many times that of its inputs, where nothing better is known.
GROWN = 5.0
#: Most places that are tried one by one.
MOST_TRIALS = 12


def _with_outputs(spans: Spans, names: Sequence[str]) -> Spans:
    """The calls of modules, and the model's own, whose outputs are in the other program under these names."""
    return {**spans, "": [Span(tuple((name,) for name in names), ())]}


def _order(spans: Spans) -> list[str]:
    """Names of all tensors of interest, about as they are computed."""
    return [name for calls in spans.values() for span in calls for name in span.names]


@dataclass
class _Beside:
    """A model in PyTorch and another program, to be run beside each other several times."""

    model: TorchSide
    feeds: Mapping[str, Array]
    limit: float
    spans: Spans
    fused: frozenset[str]
    windows: Windows

    def run(self, trial: frozenset[Key] | None = None) -> tuple[Meeting, Sequence[Any]]:
        """One run: what was met, and the model's outputs. Args: see ``Meeting``."""
        from edgeattn.capture import tensors_of
        from edgeattn.pipeline.shadow import Shadow, Walk, set_shadow

        meeting = Meeting(self.spans, self.windows, self.limit, self.fused, trial)
        inputs = tuple(self.model.tensors(self.feeds).values())
        for tensor in inputs:
            set_shadow(tensor, Shadow(tensor.clone()))
        result = Walk(self.model.model, meeting.enter, meeting.leave).run(inputs)
        return meeting, tensors_of(result)


def beside(model: TorchSide, other: Side, feeds: Mapping[str, Array], limit: float) -> Comparison:
    """Run a model with shadows beside another program.

    Args:
        limit: largest relative L2 of what is the same.
    """
    spans = _with_outputs(other.spans(feeds, model.calls(feeds)), other.outputs)
    windows = Windows(lambda wanted: other.values(feeds, wanted), _order(spans))
    both = _Beside(model, feeds, limit, spans, other.fused, windows)
    meeting, outputs = both.run()
    found = meeting.found
    left, hidden = meeting.open_places(outputs)
    # A program has small differences of its own, as of another formula for the same function, before the real one.
    most = max((min(growth(met), 1.0) for met in left), default=0.0)
    left = [met for met in left if min(growth(met), 1.0) >= most / SMALL]
    first = _tried(both, left) if left else next(iter(hidden), None)
    if first is not None:
        found.first = next(i for i, met in enumerate(found.met) if met.key == first.key)
        found.met[found.first] = first
        found.sure, found.reaches = True, bool(left)
    found.windows = (windows.runs, windows.peak)
    return found


def _tried(both: _Beside, left: Sequence[Met]) -> Met:
    """The first of several places from which on more fits if the other program's tensor is taken there.

    Then it is the other program's own, and what was before it is not enough to explain it.
    """
    plain, _ = both.run(frozenset())
    for met in left[:MOST_TRIALS]:
        trial, _ = both.run(frozenset({met.key}))
        if trial.fitting > plain.fitting:
            return next((m for m in plain.found.met if m.key == met.key), met)
    return left[0]


def side_by_side(a: Side, b: Side, feeds: Mapping[str, Array], limit: float) -> Comparison:
    """Compare what two programs have of the same modules, where no model can be run on the tensors of either.

    The first module is to blame whose error is beyond ``limit`` and ``GROWN`` times that of its inputs.
    """
    found = Comparison(shadows=False)
    ours = _with_outputs(a.spans(feeds, {}), a.outputs)
    calls = {path: len(spans) for path, spans in ours.items()}
    theirs = _with_outputs(b.spans(feeds, calls), b.outputs)
    windows = [
        Windows(lambda wanted, side=side: side.values(feeds, wanted), _order(spans))  # type: ignore[misc]
        for side, spans in ((a, ours), (b, theirs))
    ]
    last = 0.0
    for path, spans in ours.items():
        if len(theirs.get(path, ())) != len(spans):
            found.passed["nothing of it is left in the other program"] += 1
            continue
        for own, other in zip(spans, theirs[path], strict=True):
            pairs = _pairs(windows, own.outs, other.outs)
            if not pairs:
                found.passed["no tensor of its shape in the other program"] += 1
                continue
            before = max((error for error, *_ in _pairs(windows, own.ins, other.ins)), default=last)
            error, item, reference, actual = max(pairs, key=lambda pair: pair[0])
            wrong = error > limit
            found.met.append(
                Met(
                    module=path,
                    output=True,
                    tensor=item.name,
                    op=item.op,
                    error=error,
                    blamed=path,
                    own=None,
                    before=before,
                    reference=reference if wrong else None,
                    expected=reference if wrong else None,
                    actual=actual if wrong else None,
                    dtype=str(item.value.dtype),
                )
            )
            last = error
    found.windows = (max(w.runs for w in windows), sum(w.peak for w in windows))
    grown = (i for i, m in enumerate(found.met) if m.error > limit and m.error > GROWN * (m.before or 0.0))
    found.first = next((i for i in grown if _lasts(found.met, i, limit)), None)
    return found


def _lasts(met: Sequence[Met], number: int, limit: float) -> bool:
    """Whether an error is still there in the output of the module around: else the two tensors are not the same one."""
    path = met[number].module
    around = [m for m in met[number + 1 :] if not m.module or path.startswith(f"{m.module}.")]
    return not around or around[0].error > limit


def _pairs(
    windows: Sequence[Windows], ours: Sequence[tuple[str, ...]], theirs: Sequence[tuple[str, ...]]
) -> list[tuple[float, TraceValue, Array, Array]]:
    """For each of our tensors that one of theirs fits: the error of the nearest, it, and both as of one shape."""
    pairs = []
    for names in ours:
        mine = next((item for item in map(windows[0].get, names) if item is not None), None)
        found = []
        for others in theirs if mine is not None else ():
            item = next((item for item in map(windows[1].get, others) if item is not None), None)
            if mine is None or item is None:
                continue
            ways = [(mine.value, way) for way in fits(item.value, mine.value.shape)]
            ways += [(way, item.value) for way in fits(mine.value, item.value.shape)]
            found += [(distance(x, y), item, np.asarray(x), np.asarray(y)) for x, y in ways]
        pairs += [min(found, key=lambda pair: pair[0])] if found else []
    return pairs


def compare_sides(a: Side, b: Side, feeds: Mapping[str, Array], limit: float) -> Comparison:
    """Compare two programs; the first with the model's own operations where it is a model in PyTorch.

    Where no place is beyond ``limit`` and the outputs are, a place that stands out far enough from the others counts.
    """
    if not isinstance(a, TorchSide):
        return side_by_side(a, b, feeds, limit)
    try:
        found = beside(a, b, feeds, limit)
    except (RuntimeError, NotImplementedError, TypeError):  # operations that cannot be followed
        return side_by_side(a, b, feeds, limit)
    if found.first is None:
        own = sorted(m.own for m in found.met if m.own)
        if own and own[-1] > JUMP * (usual := own[len(own) // 2]) and found.met[-1].error > limit:
            again = beside(a, b, feeds, max(JUMP * usual, own[-1] / 2))
            return again if again.first is not None else found
    return found


def first_divergence(
    context: Context,
    runtime: Runtime,
    inputs: Sequence[Tensor],
    feeds: dict[str, Array],
    entry: str = "main",
    form: Callable[[Any], Any] = lambda model: model,
) -> str:
    """Names the first module of the deploy form whose output the artifact no longer gives, in words.

    Args:
        inputs: of the artifact's ``entry``. feeds: of the model. form: what of the deploy form the entry computes.
    """
    model: Any = form(context.value("reparameterize"))
    given = [Tensor(name, value.shape, str(value.dtype)) for name, value in feeds.items()]
    tolerance = targets.get(context.job.target).tolerance(context.job.precision)
    outputs = tuple(context.results["reference"].facts["outputs"])
    artifact = ArtifactSide("the artifact", runtime, inputs, outputs, entry)
    found = compare_sides(TorchSide("the deploy form", model, given, outputs), artifact, feeds, tolerance)
    if found.first is None:
        return "no single module: the error builds up over the whole graph"
    met = found.met[found.first]
    largest = "" if met.reference is None else f", largest reference value {float(np.abs(met.reference).max()):.3g}"
    return (
        f"module {found.culprit or '(model)'} is the first to diverge (its {met.op}, tensor {met.tensor}): "
        f"relative L2 {met.error:.3g}{largest}"
    )


def own_rounding(context: Context, feeds: dict[str, Array], reference: dict[str, Array]) -> list[str]:
    """How far the reference itself, in float32, is from the deploy form in float64, by output, in words.

    An artifact cannot be held to less than its model's own rounding; random weights can amplify it without bound.
    """
    import copy

    import torch

    from edgeattn.capture import run_eager

    wide = {k: torch.from_numpy(v.copy()) for k, v in feeds.items()}
    wide = {k: v.double() if v.is_floating_point() else v for k, v in wide.items()}
    try:
        exact = run_eager(copy.deepcopy(context.value("reparameterize")).double(), wide, tuple(reference))
    except Exception:  # not every model can be copied, or runs in float64 with float32 tensors of its own making
        return []
    far = {
        k: compare(exact[k].numpy().astype(np.float64), v.astype(np.float64)).relative_l2 for k, v in reference.items()
    }
    return [
        f"for comparison: the float32 reference's own rounding of {k} is {n:.2g} (from float64)" for k, n in far.items()
    ]
