"""From an ``nn.Module`` to a ``Program``: one exported graph for each entry, sharing their weights."""

from edgeattn.capture.export import ModulePath, capture, name_outputs, own_copies, run_eager, tensors_of
from edgeattn.capture.program import Caches, Dynamic, Entry, Program

__all__ = [
    "Caches",
    "Dynamic",
    "Entry",
    "ModulePath",
    "Program",
    "capture",
    "name_outputs",
    "own_copies",
    "run_eager",
    "tensors_of",
]
