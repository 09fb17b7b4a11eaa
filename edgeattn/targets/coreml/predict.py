"""Core ML itself, on a Mac. It was never run here: the tests use a stand-in for ``MLModel``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from edgeattn.core.quiet import quiet
from edgeattn.targets.base import BGR, Artifact, Step, TraceValue, check_feeds, entry_of


class CoreMLRuntime:
    """An artifact's packages under Core ML's ``predict``, on all compute units."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._opened: dict[str, Any] = {}

    def run(self, entry: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name.

        Raises:
            UsageError: unknown entry, or feeds that do not fit. CheckFailed: Core ML cannot load or run the package.
        """
        spec = entry_of(self._artifact, entry)
        check_feeds(spec.inputs, feeds)
        given = {t.name: _image(feeds[t.name], t.layout) if t.pixels else feeds[t.name] for t in spec.inputs}
        try:
            if entry not in self._opened:
                with quiet():
                    import coremltools as ct

                    self._opened[entry] = ct.models.MLModel(str(self._artifact.folder / spec.file))
            outputs = self._opened[entry].predict(given)
        except Exception as error:  # plain exceptions, whatever the framework says
            raise CheckFailed("Core ML cannot run the package", value=entry, why=str(error).splitlines()[0]) from error
        labels = self._artifact.facts.get("labels", ())
        return {t.name: _array(outputs[t.name], labels) for t in spec.outputs}

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
