"""The file that ``edgeattn check --init`` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from edgeattn import targets
from edgeattn.core.errors import UsageError
from edgeattn.core.files import write_whole
from edgeattn.pipeline.cells import Cell

_TEXT = """\
# What must hold of this repository's exports: edgeattn check
# Every model is exported to each of its targets, in each precision, for each device, if it names some. The numbers of
# each artifact are compared with the model's own; what changed since the last run is exported anew, the rest is not.

[models.{key}]
model = {model}        # a recipe, file.py:factory, package.module:factory or timm:NAME
targets = {targets}    # edgeattn targets lists them
precisions = ["fp32"]  # fp32, fp16, w8a8, w8, w4
# devices = ["raspberry-pi-5"]
{inputs}# checkpoint = "weights.safetensors"

# Budgets of all models; a table [models.{key}.budgets] is for one, and comes first.
[budgets]
lint = "error"               # the mildest finding that fails: error, warning or note
# size_mb = 10.0             # of the artifact's files, MB of 1e6 bytes
# parameters = 5_000_000     # of the deploy form
# nodes = 500                # operations of the artifact's graph
# macs = 1_000_000_000
# accuracy_drop = 0.01       # of the share of held-out samples that is right, where the recipe has some
# max_fallback = 0.1         # share of operations that the wanted compute unit does not take
# peak_memory_mb = 500.0     # of a process that runs the artifact on this machine
# export_memory_mb = 4000.0
# export_time_ratio = 3.0    # over what edgeattn.lock holds, on the same machine

# [budgets.numerics]         # largest relative L2, in place of the target's own
# fp16 = 0.005

# [budgets.growth]           # by how much more than edgeattn.lock holds: edgeattn check --update writes it
# size_mb = 0.02
# nodes = 0.0

# [budgets.latency]          # against the bundles that were there at the last edgeattn check --update
# margin = 0.05              # five percent slower is allowed
# inconclusive = "pass"      # or "fail", where the machine is too restless to tell
"""


def write(path: Path, model: str, inputs: Sequence[str]) -> None:
    """Write a commented file for a model, which passes as it stands if the model exports to ONNX in fp32.

    Args:
        inputs: of a model from outside, as ``x=1x3x224x224``.

    Raises:
        UsageError: the file is there already, or there is no such model.
    """
    if path.exists() or path.is_symlink():
        raise UsageError("there is a file of checks already", value=path.name, why="it was kept", fix="edit it")
    Cell(model, "onnx", inputs=tuple(inputs)).job()
    key = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in Path(model).name).strip("-")
    offered = [name for name in ("onnx",) if name in targets.names()]
    listed = f"inputs = {json.dumps(list(inputs))}\n" if inputs else ""
    text = _TEXT.format(key=key or "model", model=json.dumps(model), targets=json.dumps(offered), inputs=listed)
    write_whole(path, text.encode())
