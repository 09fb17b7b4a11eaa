"""A decoder's entries: steps of one token or of several, behind a cache that the caller keeps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgeattn.capture.export import ModulePath, conversion_failed, forget_paths
from edgeattn.capture.program import Caches, Entry, Program
from edgeattn.core.errors import EdgeAttnError
from edgeattn.core.specs import IDS, LAST, LOGITS, POSITION, StepShape, new_name
from edgeattn.models.decoder import Decoder, as_step


def caches_of(model: Decoder, context: int) -> Caches:
    """What a decoder's entries take and give."""
    return Caches(context, tuple(model.cache_rows()), getattr(model, "config", None))


def _example(caches: Caches, tokens: int, cached: int, with_last: bool) -> dict[str, Tensor]:
    """Zeros by input name."""
    index = torch.zeros(1, dtype=torch.int64)
    given = {IDS: torch.zeros(1, tokens, dtype=torch.int64), POSITION: index.clone()}
    if with_last:
        given[LAST] = index.clone()
    return given | {name: torch.zeros(1, cached, width) for name, width in caches.rows}


def _export(
    model: nn.Module, caches: Caches, shape: StepShape
) -> tuple[torch.export.ExportedProgram, tuple[str, ...], tuple[str, ...]]:
    """The graph, its inputs and its outputs.

    Raises:
        ConversionFailed: it cannot be captured; names the module.
    """
    assert isinstance(model, Decoder)
    with_last = shape.tokens > 1 and not shape.dynamic
    step, path = as_step(model, with_last), ModulePath()
    # Sizes that differ from each other, from 1 and from the largest: torch.export takes equal ones for the same.
    sizes = (min(5, shape.tokens), 7) if shape.dynamic else (shape.tokens, shape.cached)
    example, dims = _example(caches, *sizes, with_last), None
    if shape.dynamic:
        tokens = {1: torch.export.Dim("tokens", min=1, max=shape.tokens)} if shape.tokens > 1 else None
        cached = torch.export.Dim("cached", min=1, max=shape.cached)
        dims = {"ids": tokens, "position": None, "rest": tuple({1: cached} for _ in caches.rows)}
    try:
        with torch.no_grad(), warnings.catch_warnings(), path.follow(step):
            warnings.simplefilter("ignore")
            graph = torch.export.export(step, tuple(example.values()), dynamic_shapes=dims)
    except EdgeAttnError:
        raise
    except Exception as error:
        raise conversion_failed(error, path) from error
    forget_paths(graph)
    outputs = (LOGITS, *(new_name(name) for name, _ in caches.rows))
    return graph, tuple(example), outputs


def capture_decoder(model: nn.Module, caches: Caches, shapes: Sequence[StepShape]) -> Program:
    """Entries of a decoder in its deploy form; those that may vary in size are one graph.

    Raises:
        ConversionFailed: see ``capture``.
    """
    entries: dict[str, Entry] = {}
    widest = max((s for s in shapes if s.dynamic), key=lambda s: s.tokens, default=None)
    one = _export(model, caches, widest) if widest else None
    for shape in shapes:
        graph, inputs, outputs = one if one and shape.dynamic else _export(model, caches, shape)
        ends: dict[str, dict[int, tuple[int, ...]]] = {}
        if shape.dynamic:
            ends = {name: {1: (1, shape.cached, shape.cached)} for name, _ in caches.rows}
            if shape.tokens > 1:
                ends[IDS] = {1: (1, shape.tokens, shape.tokens)}
        entries[shape.name] = Entry(graph, inputs, outputs, ends)
    return Program(entries, caches)
