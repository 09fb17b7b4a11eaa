"""What a decoder of language offers beside its forward, so that it can be exported with a cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Decoder(Protocol):
    """A language model whose tokens can be computed one after the other from a cache of rows.

    Its ``forward(ids (B, T)) -> logits (B, T, vocabulary)`` computes all positions anew: the reference.

    Attributes:
        context: most tokens that it can see. vocabulary: number of logits.
    """

    context: int
    vocabulary: int

    def cache_rows(self) -> list[tuple[str, int]]:
        """Name and width of every tensor that the cache keeps a row of for each token."""
        ...

    def rows(self, ids: Tensor, at: Tensor) -> tuple[Tensor, list[Tensor]]:
        """All positions anew: logits (M, vocabulary) at positions ``at`` (M,), and all rows, (T, width) each.

        Args:
            ids: (1, T).
        """
        ...

    def step(
        self, ids: Tensor, position: Tensor, cache: Sequence[Tensor], last: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """New tokens behind cached ones, in the deploy form: logits (1, vocabulary), and the new rows (1, T, width).

        Args:
            ids: (1, T). position: (1,), how many tokens there are before; of the cache only so many rows count.
            cache: (1, P, width) each, in the order of ``cache_rows``.
            last: (1,), the token whose logits are wanted; None for the last of them.
        """
        ...


def as_step(model: nn.Module, with_last: bool) -> nn.Module:
    """A decoder whose forward is one step: (ids, position, [last], *cache) -> (logits, *new rows).

    It has the modules and parameters of ``model`` under the same paths, which graphs and messages name.

    Args:
        with_last: ``last`` is an input, as where there are several tokens of fixed number.
    """

    class Step(type(model)):  # type: ignore[misc]
        def forward(self, ids: Tensor, position: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            last, cache = (rest[0], rest[1:]) if with_last else (None, rest)
            logits, rows = self.step(ids, position, cache, last)
            return (logits, *rows)

    step = copy.copy(model)
    step.__class__ = Step
    return step
