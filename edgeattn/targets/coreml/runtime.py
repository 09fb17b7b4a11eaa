"""The MIL interpreter as a runtime of the target: outputs, and every tensor on the way to them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor as TorchTensor

from edgeattn.core.numerics import Array
from edgeattn.targets.base import Artifact, ArtifactEntry, Step, Tensor, TraceValue, entry_of
from edgeattn.targets.coreml.describe import PREFIX
from edgeattn.targets.coreml.mil.features import Feature, features_of
from edgeattn.targets.coreml.mil.package import open_package
from edgeattn.targets.coreml.mil.program import Function, States
from edgeattn.targets.coreml.states import run_with, split
from edgeattn.targets.feeds import check_feeds


class Opened:
    """An entry to be called again and again, see ``bundle.runner_generate.Run``.

    Attributes:
        stateful: whether it keeps something from call to call.
    """

    def __init__(self, function: Function, states: States) -> None:
        """``states`` may be other entries' as well."""
        self.stateful = bool(function.states)
        self._function, self._states = function, states

    def reset(self) -> None:
        """Begin with zeros again."""
        self._states.reset()

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        return _arrays(self._function.run(feeds, self._states))


class MilRuntime:
    """An artifact's packages under the interpreter; states begin as zeros at every run, or as the feeds say."""

    def __init__(self, artifact: Artifact, mode: str = "fp32acc") -> None:
        """Nothing is read yet; ``mode`` as in ``Function``."""
        self._artifact, self._mode = artifact, mode
        self._opened: dict[str, Function] = {}
        self._states: States | None = None

    def opened(self, entry: str) -> Opened:
        """An entry that shares its states with all others that are opened so."""
        function = self._function(entry)
        self._states = self._states or function.make_state()
        return Opened(function, self._states)

    def _function(self, entry: str) -> Function:
        if entry not in self._opened:
            package = open_package(self._artifact.folder / entry_of(self._artifact, entry).file)
            # The only function of a package of ours is called main, whatever the entry is.
            function = entry if entry in package.functions or self._artifact.facts.get("adopted") else None
            self._opened[entry] = Function(package, function, self._mode)
        return self._opened[entry]

    def run(self, entry: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; where states are among the feeds, the rows that were written to them as well.

        Raises:
            UsageError: unknown entry, a damaged package, or feeds of other names, shapes or dtypes, or with NaN.
            ConversionFailed: an operation that the interpreter does not have.
        """
        function = self._function(entry)
        names = [state.name for state in function.states]
        if not self._artifact.facts.get("adopted"):
            check_feeds(entry_of(self._artifact, entry).inputs, split(feeds, names)[0])
        return run_with(feeds, names, function.make_state, lambda fed, states: _arrays(function.run(fed, states)))

    def trace(
        self, entry: str, feeds: Mapping[str, Array], wanted: Collection[str] | None = None
    ) -> Iterator[TraceValue]:
        """Every float tensor that an operation gives, in order; what is not wanted is not kept."""
        function = self._function(entry)
        seen: list[TraceValue] = []

        def keep(name: str, operation: str, value: TorchTensor) -> None:
            if wanted is None or name in wanted:
                seen.append(TraceValue(name, function.module_of(name), operation, value.numpy().copy()))

        names = [state.name for state in function.states]
        run_with(feeds, names, function.make_state, lambda fed, states: function.run(fed, states, keep))
        yield from seen

    def steps(self, entry: str) -> list[Step]:
        """The operations of the function; what is inside of control flow is part of its operation."""
        function = self._function(entry)
        return [Step(outs, ins, function.module_of(outs[0]), kind) for outs, ins, kind in function.operations() if outs]


def _arrays(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """A classifier's probabilities by label become a row (1, N) in the order of the labels, its label a text array."""
    return {
        name: np.array([list(value.values())], np.float32) if isinstance(value, dict) else np.asarray(value)
        for name, value in outputs.items()
    }


def _tensor(feature: Feature) -> Tensor:
    return Tensor(feature.name, feature.shape, feature.dtype)


def adopt(path: Path) -> Artifact:
    """A package as it is: its functions are the entries. Its precision is the one that EdgeAttn noted in it, or "".

    Shapes may be flexible.

    Raises:
        UsageError: it cannot be read.
    """
    package = open_package(path)
    entries = {}
    for name in package.functions:
        inputs, outputs, _ = features_of(package, name)
        entries[name] = ArtifactEntry(path.name, tuple(map(_tensor, inputs)), tuple(map(_tensor, outputs)))
    return Artifact(path.parent, package.metadata.get(f"{PREFIX}precision", ""), entries, {"adopted": True})
