"""llama.cpp itself, where ``llama-cpp-python`` is installed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from edgeattn.core.quiet import quiet
from edgeattn.core.specs import IDS, LAST, LOGITS, POSITION
from edgeattn.targets.base import Artifact, Step, TraceValue, entry_of
from edgeattn.targets.feeds import check_feeds

#: ggml's number for float32.
_F32 = 0


class LlamaRuntime:
    """A file under llama.cpp on the CPU, which keeps a cache of its own: it can be asked what follows a whole text.

    Flash attention is off: with it llama.cpp aborts on heads of 192 and 128.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    def logits(self, ids: Array) -> Array:
        """ids (1, T) int64 -> logits (1, T, vocabulary) float32.

        Raises:
            CheckFailed: llama.cpp cannot load or run the file.
        """
        path = str(self._artifact.folder / next(iter(self._artifact.entries.values())).file)
        # Beside float32 weights a cache in float16, llama.cpp's default, would be all of the difference.
        cache: dict[str, Any] = {"type_k": _F32, "type_v": _F32} if self._artifact.precision == "fp32" else {}
        count = ids.shape[1]
        try:
            with quiet():
                import llama_cpp

                model = llama_cpp.Llama(
                    path, n_ctx=count, logits_all=True, n_gpu_layers=0, flash_attn=False, verbose=False, **cache
                )
                model.eval(ids[0].tolist())
                logits: Array = np.array(model.scores[:count], np.float32)[None]
                model.close()
        except Exception as error:  # plain exceptions, whatever the library says
            raise CheckFailed("llama.cpp cannot run the file", value=path, why=str(error)) from error
        return logits

    def run(self, entry: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The logits where nothing comes before the new tokens; nothing where a cache is given, nor any new rows.

        Raises:
            UsageError: unknown entry, or feeds that do not fit. CheckFailed: see ``logits``.
        """
        check_feeds(entry_of(self._artifact, entry).inputs, feeds)
        if POSITION not in feeds:
            return {LOGITS: self.logits(feeds[IDS])}
        if feeds[POSITION][0] != 0:
            return {}
        end = int(feeds[LAST][0]) + 1 if LAST in feeds else feeds[IDS].shape[1]
        return {LOGITS: self.logits(feeds[IDS][:, :end])[:, -1]}

    def trace(
        self, entry: str, feeds: Mapping[str, Array], wanted: Collection[str] | None = None
    ) -> Iterator[TraceValue]:
        """llama.cpp shows nothing of what is inside."""
        yield from ()

    def steps(self, entry: str) -> list[Step]:
        """Nothing, see ``trace``."""
        return []
