"""PLM's own forward with the numbers that a GGUF file's blocks stand for: what the file means, without llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from edgeattn.core.numerics import Array
from edgeattn.core.specs import IDS, LAST, LOGITS, POSITION
from edgeattn.models.layers.mla import AbsorbedAttention, LatentAttention
from edgeattn.models.plm import PLM, Layer, PLMConfig, reordered
from edgeattn.targets.base import Artifact, ArtifactEntry, OneStep, Tensor, entry_of
from edgeattn.targets.feeds import check_feeds
from edgeattn.targets.gguf.file import open_gguf, read_gguf, sizes_of

#: The entry of a file that was made elsewhere: all positions anew, as in the model's own forward.
WHOLE = "main"


def _whole(config: PLMConfig, file: str) -> ArtifactEntry:
    """Entry ``WHOLE``: ids (1, T) -> logits (1, T, vocabulary)."""
    longest = config.max_position_embeddings
    usual = min(128, longest)
    ids = Tensor(IDS, (1, usual), "int64", dynamic=((1, 1, usual, longest),))
    logits = Tensor(LOGITS, (1, usual, config.vocab_size), "float32", dynamic=((1, 1, usual, longest),))
    return ArtifactEntry(file, (ids,), (logits,))


def adopt(path: Path) -> Artifact:
    """A PLM file as it is, whoever made it; its precision is the one that EdgeAttn noted in it, or "".

    Raises:
        UsageError: it is damaged, or of another model.
    """
    reader = open_gguf(path)
    noted = reader.get_field("edgeattn.precision")
    entries = {WHOLE: _whole(sizes_of(reader), path.name)}
    return Artifact(path.parent, noted.contents() if noted else "", entries, {"adopted": True})


def load(path: Path) -> PLM:
    """The model of a file in its deploy form, float32; of its weights there is one copy.

    Raises:
        UsageError: see ``read_gguf``.
    """
    config, weights = read_gguf(path)
    state: dict[str, torch.Tensor] = {}
    for name in list(weights):
        state[name] = reordered(name, torch.from_numpy(weights.pop(name)), config, split=True)
    with torch.device("meta"):
        model = PLM(config)
    model.load_state_dict(state, assign=True)
    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        assert isinstance(layer.self_attn.kv_b_proj, LatentAttention)
        layer.self_attn.kv_b_proj = AbsorbedAttention(layer.self_attn.kv_b_proj)
    return model.eval()


class PlmRuntime(OneStep):
    """An artifact's file, read when an entry is first run."""

    @cached_property
    def _model(self) -> PLM:
        first = next(iter(self._artifact.entries.values()))
        return load(self._artifact.folder / first.file)

    def logits(self, ids: Array) -> Array:
        """ids (1, T) int64 -> logits (1, T, vocabulary), every position computed anew.

        Raises:
            UsageError: a damaged file.
        """
        with torch.no_grad():
            logits: Array = self._model(torch.from_numpy(ids.copy())).numpy()
        return logits

    def run(self, entry: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name.

        Raises:
            UsageError: unknown entry, feeds that do not fit, or a damaged file.
        """
        spec = entry_of(self._artifact, entry)
        check_feeds(spec.inputs, feeds)
        if entry == WHOLE:
            return {LOGITS: self.logits(feeds[IDS])}
        given = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in feeds.items()}
        with torch.no_grad():
            cache = [given[name] for name, _ in self._model.cache_rows()]
            logits, rows = self._model.step(given[IDS], given[POSITION], cache, given.get(LAST))
        return {output.name: value.numpy() for output, value in zip(spec.outputs, (logits, *rows), strict=True)}
