"""Core ML itself, on a Mac. It was never run here: the tests use a stand-in for ``MLModel``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from edgeattn.core.quiet import quiet
from edgeattn.core.specs import new_name
from edgeattn.targets.base import BGR, Artifact, Step, TraceValue, entry_of
from edgeattn.targets.coreml.states import run_with, split
from edgeattn.targets.feeds import check_feeds


class CoreMLRuntime:
    """An artifact's packages under Core ML's ``predict``, on all compute units.

    States of a decoder begin at every run as the feeds say.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._states = list(artifact.facts.get("states", ()))
        self._opened: dict[str, Any] = {}

    def _model(self, entry: str, file: str) -> Any:
        if entry not in self._opened:
            with quiet():
                import coremltools as ct

                function = {"function_name": entry} if self._states else {}
                self._opened[entry] = ct.models.MLModel(str(self._artifact.folder / file), **function)
        return self._opened[entry]

    def run(self, entry: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name.

        Raises:
            UsageError: unknown entry, or feeds that do not fit. CheckFailed: Core ML cannot load or run the package.
        """
        spec = entry_of(self._artifact, entry)
        check_feeds(spec.inputs, split(feeds, self._states)[0])
        given = dict(feeds) | {t.name: _image(feeds[t.name], t.layout) for t in spec.inputs if t.pixels}
        try:
            model = self._model(entry, spec.file)
            if self._states:
                outputs = run_with(given, self._states, model.make_state, model.predict)
            else:
                outputs = model.predict(given)
        except Exception as error:  # plain exceptions, whatever the framework says
            raise CheckFailed("Core ML cannot run the package", value=entry, why=str(error).splitlines()[0]) from error
        labels = self._artifact.facts.get("labels", ())
        rows = {name: value for name, value in outputs.items() if self._states and name.startswith(new_name(""))}
        return {t.name: _array(outputs[t.name], labels) for t in spec.outputs} | rows

    def trace(
        self, entry: str, feeds: Mapping[str, Array], wanted: Collection[str] | None = None
    ) -> Iterator[TraceValue]:
        """Core ML shows nothing of what is inside; the interpreter does."""
        yield from ()

    def steps(self, entry: str) -> list[Step]:
        """Nothing, see ``trace``."""
        return []


def _image(pixels: Array, layout: str) -> Any:
    """(1, C, H, W) uint8 as a picture, which Core ML brings to the model's order of channels."""
    from PIL import Image

    pixels = pixels[:, ::-1] if layout == BGR else pixels
    return Image.fromarray(pixels[0, 0] if pixels.shape[1] == 1 else pixels[0].transpose(1, 2, 0))


def _array(value: Any, labels: Sequence[str]) -> Array:
    """A classifier gives its numbers by label, in no order: they become a row (1, N) in the order of the labels."""
    return np.array([[value[label] for label in labels]], np.float32) if isinstance(value, dict) else np.asarray(value)
