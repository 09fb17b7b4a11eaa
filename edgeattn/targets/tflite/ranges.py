"""Which ranges the tensors of a .tflite file take, measured by LiteRT on a stream of samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from edgeattn.quant.observe import Observer
from edgeattn.targets.base import Tensor
from edgeattn.targets.feeds import check_feeds, own_feeds
from edgeattn.targets.tflite import flatbuffer
from edgeattn.targets.tflite.litert import interpreter


def measure(
    model: Any,
    wanted: Iterable[tuple[int, int]],
    inputs: Mapping[str, Sequence[Tensor]],
    samples: Iterable[Mapping[str, Array]],
    method: str,
) -> dict[tuple[int, int], tuple[float, float]]:
    """Lowest and highest number that each tensor shall tell apart in int8; gone through once, in bounded memory.

    The tensors become outputs of the file that is run, so that XNNPACK computes it all as it will on the device.

    Args:
        wanted: (graph, tensor) of each. inputs: of every entry, named as in ``samples``; the converter's own names
            have the same order. Samples that have the shapes of some entries only go through those.
        method: see ``Observer``.

    Raises:
        UsageError: a sample that no entry takes.
        CheckFailed: there are no samples of an entry, or the model makes numbers of them that are not finite.
    """
    observers = {key: Observer(method) for key in sorted(wanted)}
    kept = [list(graph.outputs) for graph in model.subgraphs]
    for number, tensor in observers:
        graph = model.subgraphs[number]
        if tensor not in (*graph.outputs, *graph.inputs):
            graph.outputs = [*graph.outputs, tensor]
    opened = interpreter(flatbuffer.write(model))
    for graph, outputs in zip(model.subgraphs, kept, strict=True):
        graph.outputs = outputs
    for feeds in samples:
        given = {entry: own_feeds(specs, feeds) for entry, specs in inputs.items()}
        fitting = [entry for entry, specs in inputs.items() if _fits(specs, given[entry])]
        if not fitting:
            check_feeds(*next((specs, given[entry]) for entry, specs in inputs.items()))
        for entry in fitting:
            _run(model, opened, entry, given[entry], inputs[entry], observers)
    if not all(observer.count or observer.nonfinite for observer in observers.values()):
        raise CheckFailed(
            "there are no samples to measure ranges on",
            value="w8a8",
            why="every entry needs some" if len(inputs) > 1 else None,
            fix="give the recipe [calibration] or [heldout] samples",
        )
    for (number, tensor), observer in observers.items():
        if observer.nonfinite:
            raise CheckFailed(
                "the model makes numbers that are not finite",
                value=f"{observer.nonfinite} NaN or infinite",
                where=f"tensor {flatbuffer.text(model.subgraphs[number].tensors[tensor].name)}",
            )
    return {key: observer.limits(8) for key, observer in observers.items()}


def _fits(specs: Sequence[Tensor], feeds: Mapping[str, Array]) -> bool:
    """Whether an entry takes a sample."""
    names = {spec.name for spec in specs}
    return names == set(feeds) and all(spec.takes(feeds[spec.name].shape) for spec in specs)


def _run(
    model: Any,
    opened: Any,
    entry: str,
    feeds: Mapping[str, Array],
    specs: Sequence[Tensor],
    observers: Mapping[tuple[int, int], Observer],
) -> None:
    """One sample through one entry."""
    item = flatbuffer.signature(model, entry)
    numbered = flatbuffer.numbered(item.inputs)
    given = {numbered[i].tensorIndex: (numbered[i].name, feeds[spec.name]) for i, spec in enumerate(specs)}
    opened.get_signature_runner(entry)(**{flatbuffer.text(name): value for name, value in given.values()})
    for (number, tensor), observer in observers.items():
        if number == item.subgraphIndex:
            # An input's memory may hold something else by now.
            observer.add(given[tensor][1] if tensor in given else opened.get_tensor(tensor, number))
