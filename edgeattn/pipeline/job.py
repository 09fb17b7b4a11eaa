"""A job: one model to one target in one precision, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgeattn import device as devices
from edgeattn import targets
from edgeattn.core.specs import StepShape
from edgeattn.quant.plan import QuantPlan
from edgeattn.recipe import Resolved
from edgeattn.targets.base import NCHW


@dataclass(frozen=True)
class Job:
    """What is to be exported.

    Attributes:
        resolved: the recipe and its files.
        target, precision: names.
        device: name of the device that the export is for, or None.
        layout: of image inputs, one of the target's ``layouts``.
        options: of the target, as they were asked for.
        strict: refuse to keep operations in a wider precision.
        tolerance: the largest relative L2, in place of the target's own. accuracy_drop: of the held-out samples' share
            that is right, in place of the precision's own bound.
    """

    resolved: Resolved
    target: str
    precision: str
    device: str | None = None
    layout: str = NCHW
    options: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    tolerance: float | None = None
    accuracy_drop: float | None = None

    @property
    def title(self) -> str:
        """Name of the bundle's folder."""
        layout = "" if self.layout == NCHW else f"-{self.layout}"
        words = (name if choice == "yes" else choice for name, choice in sorted(self.options.items()))
        options = "".join(f"-{word.replace(',', '+')}" for word in words)
        return f"{self.resolved.title}{layout}{options}.{self.target}.{self.precision}"

    @property
    def settled(self) -> dict[str, str]:
        """All of the target's options, see ``Target.settle`` and ``Target.settle_decoder``."""
        place, target = devices.resolve(self.device) if self.device else None, targets.get(self.target)
        settled = target.settle(self.options, place, self.precision)
        if self.resolved.recipe.decoder is None or not target.cache:
            return settled
        return target.settle_decoder(settled, self.options, place, self.precision)

    @property
    def bounds(self) -> dict[str, float]:
        """What the numbers are held to, where that was asked for."""
        asked = {"tolerance": self.tolerance, "accuracy_drop": self.accuracy_drop}
        return {name: bound for name, bound in asked.items() if bound is not None}

    @property
    def quant(self) -> QuantPlan:
        """Which module is stored in how many bits."""
        return QuantPlan.of(self.resolved.recipe.quant, self.precision, self.target)

    @property
    def ranges(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """(min, opt, max), or with a step, of the recipe's dimensions that may vary, by input and axis."""
        inputs = self.resolved.recipe.inputs.items()
        return {name: {axis: tuple(ends) for axis, *ends in spec.ranges} for name, spec in inputs if spec.dynamic}

    @property
    def steps(self) -> tuple[StepShape, ...]:
        """The entries of a decoder, as the target takes them; () for all other models."""
        spec, form = self.resolved.recipe.decoder, targets.get(self.target).cache
        if spec is None or not form:
            return ()
        sizes = [("decode", 1), *((f"prefill_{n}", n) for n in spec.prefill)]
        if form == "dynamic":
            return tuple(StepShape(name, n, spec.context, True) for name, n in sizes)
        lengths = sorted({*(spec.buckets if form == "buckets" else ()), spec.context})
        return tuple(
            StepShape(name if len(lengths) == 1 else f"{name}_{rows}", n, rows)
            for name, n in sizes
            for rows in lengths
            if n <= rows
        )

    @property
    def dynamic(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """The ranges that the export keeps: all of them, or none where the target takes one shape only."""
        return self.ranges if targets.get(self.target).dynamic else {}

    @property
    def runtime(self) -> str:
        """The distribution that runs the target on the device; "" where no device says so."""
        return devices.resolve(self.device).runtimes.get(self.target, "") if self.device else ""

    @property
    def parts(self) -> tuple[Job, ...]:
        """A job for each artifact of the bundle: this one, or those of the targets that its target stands for."""
        return tuple(replace(self, target=part) for part in targets.get(self.target).parts) or (self,)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the worker process."""
        return {
            "resolved": self.resolved.model_dump(mode="json"),
            "target": self.target,
            "precision": self.precision,
            "device": self.device,
            "layout": self.layout,
            "options": dict(self.options),
            "strict": self.strict,
            **self.bounds,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Job:
        """The inverse of ``to_dict``."""
        return Job(**{**data, "resolved": Resolved.model_validate(data["resolved"])})


def takes_pixels(job: Job) -> bool:
    """Whether the artifact's first input is asked to be an image of raw pixels, which the recipe says how to read."""
    return job.settled.get("image", "no") != "no" and job.resolved.recipe.preprocess is not None
