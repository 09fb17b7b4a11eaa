"""Safe mends, tried on a captured program: what each changes in the graph, and the proof that nothing else changes."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from edgeattn.capture import Entry, Program
from edgeattn.core.numerics import TOLERANCES, Array, compare
from edgeattn.lint.graph import op_of, path_of
from edgeattn.lint.match import arguments_of

#: Where mends are that no lowering applies.
OWN = "edgeattn.lint.mends"
#: A mended graph is the same model: its outputs are this near, relative L2.
NEAR = TOLERANCES["fp32"]


@dataclass(frozen=True)
class Fix:
    """What a mend does to a program.

    Attributes:
        places: that it changed. modules: operations that go and that come in each, with their numbers.
        worst: largest relative L2 between outputs before and after, over ``samples`` samples. nonfinite: numbers of the
            mended outputs that are not finite.
        applied: whether the target's lowering does so already.
    """

    rule: str
    mend: str
    places: int
    modules: Mapping[str, tuple[dict[str, int], dict[str, int]]]
    worst: float
    nonfinite: int
    samples: int
    applied: bool

    @property
    def holds(self) -> bool:
        """Whether the outputs are the same."""
        return self.samples > 0 and self.nonfinite == 0 and self.worst <= NEAR

    def as_dict(self) -> dict[str, Any]:
        """Plain data; an error that is not finite is None."""
        modules = [{"module": m, "before": b, "after": a} for m, (b, a) in self.modules.items()]
        worst = self.worst if self.worst < float("inf") else None
        return {**asdict(self), "modules": modules, "worst": worst, "allowed": NEAR, "holds": self.holds}


def _described(node: torch.fx.Node) -> str:
    """An operation with the arguments that the model gives it, tensors aside."""
    given = {name: value for name, (value, said) in arguments_of(node).items() if said}
    plain = {name: value for name, value in given.items() if isinstance(value, bool | int | float | str)}
    return f"{op_of(node)}({', '.join(f'{name}={value}' for name, value in plain.items())})"


def _operations(graph: torch.export.ExportedProgram) -> dict[str, Counter[str]]:
    """Operations by module."""
    found: dict[str, Counter[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and op_of(node):
            found.setdefault(path_of(node), Counter())[_described(node)] += 1
    return found


def _mended(entry: Entry, mend: Any) -> tuple[torch.export.ExportedProgram, torch.export.ExportedProgram, int]:
    """An entry as targets decompose it, the same mended, and the number of places."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, graph = entry.graph.run_decompositions({}), entry.graph.run_decompositions({})
    places: int = mend(graph.graph_module, "fp16")
    graph.graph_module.graph.eliminate_dead_code()
    graph.graph_module.graph.lint()
    graph.graph_module.recompile()
    (returned,) = graph.graph.output_node().args
    assert isinstance(returned, list | tuple)
    for spec, node in zip(graph.graph_signature.output_specs, returned, strict=True):
        if isinstance(node, torch.fx.Node):
            spec.arg = torch.export.graph_signature.TensorArgument(name=node.name)  # a mend may have replaced it
    return plain, graph, places


def _outputs(module: torch.nn.Module, feeds: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A model may write into its buffers: each run begins with those of the program.
        given = copy.deepcopy(module)(*(torch.from_numpy(feeds[name].copy()) for name in names))
    return [value.numpy() for value in given]


def find(name: str, target: str) -> tuple[Any, bool]:
    """A mend by name, and whether the target's lowering applies it: then it is one of the target's own."""
    own = f"edgeattn.targets.{target}.mends"
    applied = importlib.util.find_spec(f"{OWN}.{name}") is None
    return importlib.import_module(f"{own if applied else OWN}.{name}").mend, applied


def fix(
    program: Program, rule: str, name: str, target: str, samples: Mapping[str, Sequence[Mapping[str, Array]]]
) -> Fix | None:
    """What a mend does; None where it finds nothing to change.

    Args:
        name: of the mend. samples: feeds by entry.
    """
    mend, applied = find(name, target)
    modules: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
    places, worst, nonfinite, tried = 0, 0.0, 0, 0
    seen: set[int] = set()
    for entry_name, entry in program.entries.items():
        if id(entry.graph) in seen:
            continue
        seen.add(id(entry.graph))
        plain, mended, count = _mended(entry, mend)
        if not count:
            continue
        places += count
        before, after = _operations(plain), _operations(mended)
        for module in {**before, **after}:
            old, new = before.get(module, Counter()), after.get(module, Counter())
            gone, come = old - new, new - old
            if gone or come:
                modules[module] = dict(gone), dict(come)
        first, second = plain.module(), mended.module()
        for feeds in samples.get(entry_name, ()):
            tried += 1
            pairs = zip(*(_outputs(m, feeds, entry.inputs) for m in (first, second)), strict=True)
            for numbers in (compare(old_, new_) for old_, new_ in pairs):
                worst, nonfinite = max(worst, numbers.relative_l2), nonfinite + numbers.nonfinite
    return Fix(rule, name, places, modules, worst, nonfinite, tried, applied) if places else None
