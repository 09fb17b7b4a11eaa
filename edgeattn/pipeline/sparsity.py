"""Sparsity of a recipe's model: exact zeros behind its ReLUs on data of its own, and what skipping them is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeattn.core.errors import EdgeAttnError, UsageError
from edgeattn.core.specs import batches
from edgeattn.models.build import Built, build, guest_error, own_folder
from edgeattn.models.decoder import Decoder
from edgeattn.models.sparsity import Reader, Site, measure
from edgeattn.pipeline.decoding.reference import read_text
from edgeattn.pipeline.stages.reference import heldout_samples
from edgeattn.recipe import Resolved

#: Tokens, held-out samples and random inputs that are measured on unless another number is asked for.
TOKENS, SAMPLES, RANDOM = 4096, 64, 4
#: Tokens in a forward: attention to more of them costs memory and changes little.
WINDOW = 1024


@dataclass(frozen=True)
class Sparsity:
    """What was found.

    Attributes:
        title: of the recipe. random: its weights are, and say nothing of a trained model's.
        data: what it was measured on, in words. unit: of the rows, ``tokens``, or ``inputs`` of a whole forward.
        sites: in order of first use. readers: the linear layers that are given zeros.
        weights: elements of all matrices that a decoded token reads; None of models that do not decode.
    """

    title: str
    random: bool
    data: str
    unit: str
    sites: list[Site]
    readers: list[Reader]
    weights: int | None

    @property
    def zeros(self) -> float:
        """Mean share of zeros over all activations, weighted by their size."""
        return sum(site.zeros * site.elements for site in self.sites) / sum(site.elements for site in self.sites)

    @property
    def read(self) -> float | None:
        """Share of the weights that a decoded token still reads if columns that meet a zero are skipped: exact.

        Of one token: several tokens at once need the union of their columns.
        """
        if self.weights is None:
            return None
        return 1.0 - sum(reader.weights * reader.zeros for reader in self.readers) / self.weights

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        worth = {"read": self.read, "ceiling": 1.0 / self.read} if self.read else {}
        return asdict(self) | {"zeros": self.zeros} | worth


def _tokens(built: Built, model: Decoder, resolved: Resolved, count: int) -> tuple[list[tuple[Tensor, ...]], str]:
    """Windows (1, T) of the recipe's text, or of random tokens."""
    ids, words = read_text(resolved, model.vocabulary)
    if ids is None:
        ids = np.random.Generator(np.random.PCG64(resolved.recipe.seed)).integers(0, model.vocabulary, count)
    ids, window = ids[:count], min(WINDOW, model.context)
    if not len(ids):
        raise UsageError("the held-out text is empty", value=resolved.text, where="decoder.text")
    kind = torch.from_numpy(built.specs[0].random(0)).dtype
    parts = [torch.from_numpy(ids[i : i + window][None].copy()).to(kind) for i in range(0, len(ids), window)]
    return [(part,) for part in parts], f"{len(ids):,} tokens of {words}" if resolved.text else f"{len(ids):,} {words}"


def _inputs(built: Built, resolved: Resolved, count: int | None) -> tuple[Iterator[tuple[Tensor, ...]], int, str]:
    """Held-out samples in batches of the input's size, or random inputs; how many forwards, and what they are."""
    if resolved.heldout is not None:
        spec = built.specs[0]
        x, _ = heldout_samples(resolved, spec.shape)
        x = x[: count or SAMPLES]
        size = spec.shape[0]
        feeds = ((torch.from_numpy(part),) for part in batches(x, size))
        return feeds, -(-len(x) // size), f"{len(x):,} held-out samples"
    number, seed = count or RANDOM, resolved.recipe.seed
    random = (tuple(built.random_inputs(seed + 1000 * (i + 1)).values()) for i in range(number))
    return random, number, f"{number:,} random inputs"


def find_sparsity(
    resolved: Resolved, on: int | None = None, say: Callable[[str], None] = lambda text: None
) -> Sparsity:
    """Build a recipe's model, run it and count.

    A decoder is run on the recipe's held-out text; other models on held-out samples, or on random inputs where there
    are none.

    Args:
        on: tokens or samples. say: is told how far it is.

    Raises:
        UsageError: the model cannot be built or run, its data cannot be read, or no ReLU is run in it.
    """
    say("building the model")
    built = build(resolved)
    model, count = built.model, 0
    feeds: Any
    if isinstance(model, Decoder):
        feeds, data = _tokens(built, model, resolved, on or TOKENS)
        count, unit = len(feeds), "tokens"
    else:
        feeds, count, data = _inputs(built, resolved, on)
        unit = "inputs"
    try:
        with own_folder(resolved.recipe.model.factory, resolved.folder):
            found = measure(model, feeds, unit == "tokens", lambda done: say(f"{data}: {done} of {count} forwards"))
    except EdgeAttnError:
        raise
    except Exception as error:
        raise guest_error("the model cannot be run", resolved.recipe.model.factory, error) from error
    if not found.sites:
        raise UsageError(
            "the model has no ReLU",
            value=resolved.recipe.name,
            why="none of the operations that make exact zeros of all that is negative is run in it",
            fix="other activations are small there, but not zero: nothing can be skipped without an error",
        )
    weights = found.weights if unit == "tokens" else None
    return Sparsity(resolved.title, resolved.random_weights, data, unit, found.sites, found.readers, weights)
