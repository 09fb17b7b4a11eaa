"""Several feeds at once, for models that take more than they were captured with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from edgeattn.core.numerics import Array


def takes_several(model: nn.Module, feeds: Sequence[Mapping[str, Array]], names: Sequence[str]) -> bool:
    """Whether a model makes of several feeds at once what it makes of each.

    Args:
        feeds: two or more, by input name; ``names`` in the order of the model's arguments.
    """

    def run(*some: Mapping[str, Array]) -> list[Tensor]:
        made = model(*(torch.from_numpy(np.concatenate([feed[name] for feed in some])) for name in names))
        return [leaf for leaf in torch.utils._pytree.tree_leaves(made) if isinstance(leaf, Tensor)]

    try:
        with torch.no_grad():
            apart, together = [run(feed) for feed in feeds], run(*feeds)
            return all(
                torch.allclose(torch.cat(parts).float(), whole.float(), rtol=1e-2, atol=1e-3, equal_nan=True)
                for *parts, whole in zip(*apart, together, strict=True)
            )
    except Exception:  # written for its own batch size only
        return False
