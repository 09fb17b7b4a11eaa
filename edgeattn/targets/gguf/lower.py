"""From a captured program of PLM to a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor as TorchTensor

from edgeattn.capture import Entry, Program
from edgeattn.core.errors import ConversionFailed
from edgeattn.models.plm import PLMConfig
from edgeattn.quant.plan import QuantPlan
from edgeattn.targets.base import Artifact, ArtifactEntry, LowerPlan, Tensor
from edgeattn.targets.gguf import K
from edgeattn.targets.gguf.blocks import F16, F32, Q4_0, Q4_K, Q8_0, Kind
from edgeattn.targets.gguf.file import write_gguf
from edgeattn.targets.gguf.vocabulary import Vocabulary

FILE = "model.gguf"


def _kind(module: str, quant: QuantPlan, fours: Kind) -> Kind:
    """How a matrix is stored: float16 also where the plan keeps a module in floats."""
    if quant.precision == "fp32":
        return F32
    return {4: fours, 8: Q8_0}.get(quant.scheme(module).weights, F16)


def _state(entry: Entry) -> dict[str, TorchTensor]:
    """PLM's weights by its own names, whatever module the entry wraps it in."""
    state = entry.graph.state_dict
    end = "model.embed_tokens.weight"
    prefix = next((name.removesuffix(end) for name in state if name.endswith(end)), "")
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _entry(entry: Entry) -> ArtifactEntry:
    """The entry's inputs and outputs; sizes that vary in its graph and not in its ranges are 1."""
    graph = entry.graph
    given = set(graph.graph_signature.user_inputs)
    values = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder" and n.name in given]
    results: list[Any] = [getattr(n, "meta", {}).get("val") for n in graph.graph.output_node().args[0]]
    known: dict[str, tuple[int, ...]] = {}  # ranges by the name of the size in the graph

    def tensor(name: str, value: Any, ranges: Mapping[int, tuple[int, ...]]) -> Tensor:
        shape, dynamic = [], []
        for axis, size in enumerate(value.shape):
            usual = (size, size, size) if isinstance(size, int) else ranges.get(axis, (1, 1, 1))
            ends = known.setdefault(str(size), usual)
            shape.append(ends[1])
            dynamic += [(axis, *ends)] if ends[0] != ends[2] else []
        return Tensor(name, tuple(shape), str(value.dtype).removeprefix("torch."), dynamic=tuple(dynamic))

    inputs = [tensor(n, v, entry.dynamic.get(n, {})) for n, v in zip(entry.inputs, values, strict=True)]
    outputs = [tensor(n, v, {}) for n, v in zip(entry.outputs, results, strict=True)]
    return ArtifactEntry(FILE, tuple(inputs), tuple(outputs))


def lower(program: Program, plan: LowerPlan, out: Path) -> Artifact:
    """Write ``model.gguf`` into ``out``: weights and sizes, and no graph; every entry is that one file.

    Raises:
        ConversionFailed: the program is not PLM's, or its tokenizer is none that llama.cpp knows; see ``write_gguf``.
    """
    decoder = program.decoder
    config = decoder.config if decoder else None
    if decoder is None or not isinstance(config, PLMConfig):
        raise ConversionFailed(
            "a GGUF file cannot hold this model",
            value=", ".join(program.entries),
            why="it has weights for an architecture that llama.cpp has code for; of those EdgeAttn writes plm alone",
            fix="take another target, or llama.cpp's own converter",
        )
    vocabulary = Vocabulary.of(plan.tokenizer) if plan.tokenizer else None
    fours = Q4_K if plan.options.get("blocks") == K else Q4_0
    state = _state(next(iter(program.entries.values())))
    metadata = {**plan.metadata, "precision": plan.precision}
    facts = write_gguf(state, config, vocabulary, lambda m: _kind(m, plan.quant, fours), out / FILE, metadata)
    notes = list(vocabulary.notes) if vocabulary else ["no tokenizer: the file can be computed with, but knows no text"]
    entries = {name: _entry(entry) for name, entry in program.entries.items()}
    return Artifact(out, plan.precision, entries, {**facts, "notes": notes})
