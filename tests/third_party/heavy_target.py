"""A target that imports torch as soon as it is looked at."""

from __future__ import annotations

import torch  # noqa: F401
from edgeattn_target_npz import NpzTarget


class Heavy(NpzTarget):
    pass
