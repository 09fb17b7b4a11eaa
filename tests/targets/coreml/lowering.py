"""A torch module through capture, lowering and the interpreter, without the pipeline around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeattn.capture import Program, capture, run_eager
from edgeattn.core.numerics import Array, Numerics, compare
from edgeattn.recipe import Preprocess
from edgeattn.targets.base import Artifact, LowerPlan
from edgeattn.targets.coreml import CoreMLTarget
from edgeattn.targets.coreml.lower import convert, lower, prepare
from edgeattn.targets.coreml.runtime import MilRuntime
from edgeattn.targets.feeds import own_feeds

METADATA = {"edgeattn": "0", "recipe": "test", "recipe_sha256": "0" * 64, "weights": "random"}


def plan_of(
    precision: str = "fp32", *, preprocess: Preprocess | None = None, labels: tuple[str, ...] = (), **options: str
) -> LowerPlan:
    settled = CoreMLTarget().settle(options, None)
    return LowerPlan(precision, [], METADATA, options=settled, preprocess=preprocess, labels=labels)


def captured(model: nn.Module, inputs: Mapping[str, torch.Tensor], outputs: tuple[str, ...] = ("y",)) -> Program:
    return capture(model.eval(), inputs, outputs)


@dataclass
class Lowered:
    """What came out, with the reference's outputs."""

    artifact: Artifact
    feeds: dict[str, Array]
    reference: dict[str, Array]

    def numerics(self, mode: str = "fp32acc") -> dict[str, Numerics]:
        runtime = MilRuntime(self.artifact, mode)
        outputs = runtime.run("main", own_feeds(self.artifact.entries["main"].inputs, self.feeds))
        return {name: compare(value, outputs[name].reshape(value.shape)) for name, value in self.reference.items()}

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = self.artifact.facts["entries"]["main"]
        return facts


def lowered(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    out: Path,
    precision: str = "fp32",
    outputs: tuple[str, ...] = ("y",),
    **plan: Any,
) -> Lowered:
    out.mkdir(parents=True, exist_ok=True)
    artifact = lower(captured(model, inputs, outputs), plan_of(precision, **plan), out)
    reference = {name: value.numpy() for name, value in run_eager(model, inputs, outputs).items()}
    return Lowered(artifact, {name: value.numpy() for name, value in inputs.items()}, reference)


def converted_without(mend: str, model: nn.Module, inputs: Mapping[str, torch.Tensor], path: Path, **plan: Any) -> None:
    """Convert as ``lower`` does, leaving one mend out, and save the package at ``path``."""
    asked = plan_of(**plan)
    entry = captured(model, inputs).entries["main"]
    convert(prepare(entry, asked, without=frozenset({mend})), asked).save(str(path))
