"""What a reparameterization did and how well it holds: plain data, for the manifest of a bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

#: Largest relative L2 between the training form and the deploy form of one block.
FLOAT64_TOLERANCE = 1e-10
FLOAT32_TOLERANCE = 1e-5
#: Largest relative L2 between the outputs of the whole models in float32: rounding grows with depth.
MODEL_TOLERANCE = 1e-4
#: The same in float64, measured where float32 leaves a doubt (a model may amplify rounding by many orders).
MODEL_TOLERANCE_FLOAT64 = 1e-8
#: Growth of the weight range above which post-training quantization of a fused kernel deserves a look.
PTQ_GROWTH = 4.0


@dataclass(frozen=True)
class Errors:
    """Relative L2 of deploy against training form of one block; infinite where an output was not finite.

    *real*: on the tensors that reached the block in the recorded forward; *random*: on normal noise of their shapes.
    """

    float64_real: float
    float64_random: float
    float32_real: float
    float32_random: float

    @property
    def holds(self) -> bool:
        """True when all four are within the tolerances."""
        return (
            max(self.float64_real, self.float64_random) <= FLOAT64_TOLERANCE
            and max(self.float32_real, self.float32_random) <= FLOAT32_TOLERANCE
        )

    def __str__(self) -> str:
        return (
            f"relative L2 in float64 {self.float64_real:.1e} real, {self.float64_random:.1e} random (at most "
            f"{FLOAT64_TOLERANCE:.0e}), in float32 {self.float32_real:.1e} real, {self.float32_random:.1e} random "
            f"(at most {FLOAT32_TOLERANCE:.0e})"
        )


@dataclass(frozen=True)
class BlockProof:
    """One fusion that was made.

    Attributes:
        path: module path of the block in the training form.
        rule: name of the rule.
        modules: paths of all modules that took part; ``path`` is the first.
        errors: deploy against training form.
        parameters_before, parameters_after: of the block (parameters only, not buffers).
        range_growth: max|W| over the kernels of the deploy form, divided by max|W| over those of the training form as
            they are stored, before any batch norm is folded: how much the range of a per-tensor quantizer grows.
        crest_growth: the same for max|W| / rms(W), the largest over the kernels of each form. A mere rescaling, which
            a quantizer's scale absorbs, leaves it at 1; above 1 a few large weights take resolution from the others.
    """

    path: str
    rule: str
    modules: tuple[str, ...]
    errors: Errors
    parameters_before: int
    parameters_after: int
    range_growth: float
    crest_growth: float

    @property
    def ptq_risk(self) -> bool:
        """True when the weight range grew more than four times: int8 may lose accuracy here.

        With ``crest_growth`` near 1 the growth is a rescaling, which a scale for each channel absorbs; a large one
        means outliers, which no scale does.
        """
        return self.range_growth > PTQ_GROWTH


@dataclass(frozen=True)
class NotFused:
    """A block that kept its training form; ``errors`` if it was tried and did not hold."""

    path: str
    rule: str
    reason: str
    errors: Errors | None = None


@dataclass(frozen=True)
class Totals:
    """Counts of a whole model; ``batch_norms`` are modules of that kind, subclasses included."""

    parameters: int
    modules: int
    convolutions: int
    batch_norms: int


@dataclass(frozen=True)
class Proof:
    """Everything that was fused, everything that was not, and the comparison of the whole models.

    Attributes:
        fused, not_fused: by block; ``fused`` is empty when nothing was fused.
        before, after: totals of the training and of the deploy form.
        float32, float64: relative L2 between the outputs of both forms on the given inputs. float64 is measured, with
            the folds kept in float64, only where float32 leaves a doubt (None otherwise): an untrained model may
            amplify its own rounding. Blocks are always measured in float64. After a rollback of everything float32 is
            0 and float64 None.
        seed: of the random activations.
    """

    fused: list[BlockProof]
    not_fused: list[NotFused]
    before: Totals
    after: Totals
    float32: float
    float64: float | None
    seed: int

    @property
    def holds(self) -> bool:
        """True when the outputs of the returned model are those of the training form; always so from the engine."""
        exact = self.float64 is not None and self.float64 <= MODEL_TOLERANCE_FLOAT64
        return not self.fused or self.float32 <= MODEL_TOLERANCE or exact

    @property
    def ptq_risks(self) -> list[BlockProof]:
        """The fused blocks with a PTQ risk."""
        return [block for block in self.fused if block.ptq_risk]

    def summary(self) -> str:
        """One or two sentences for people."""
        left = f" {_count(len(self.not_fused), 'place')} kept the training form." if self.not_fused else ""
        if not self.fused:
            return f"Nothing was fused: the deploy form is the training form.{left}"
        worst64 = max(max(b.errors.float64_real, b.errors.float64_random) for b in self.fused)
        exact = "" if self.float64 is None else f", {self.float64:.1e} in float64 (the model amplifies rounding)"
        risks = len(self.ptq_risks)
        outliers = sum(block.crest_growth > PTQ_GROWTH for block in self.ptq_risks)
        risk = (
            f" PTQ risk in {risks}: the weight range grew more than {PTQ_GROWTH:g}x, in {outliers} of them "
            "against the typical weight too (outliers)."
            if risks
            else ""
        )
        return (
            f"{_count(len(self.fused), 'block')} fused; {self.before.parameters:,} -> {self.after.parameters:,} "
            f"parameters, {self.before.batch_norms} -> {self.after.batch_norms} batch norms; largest relative L2 of a "
            f"block {worst64:.1e} in float64, of the whole model {self.float32:.1e} in float32{exact}."
            f"{risk}{left}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a figure that is not finite becomes None."""
        data: dict[str, Any] = _finite(asdict(self))
        for block, entry in zip(self.fused, data["fused"], strict=True):
            entry["ptq_risk"] = block.ptq_risk
        data["holds"] = self.holds
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Proof:
        """The proof that ``to_dict`` wrote; KeyError or TypeError for other data."""
        fused = [
            _build(BlockProof, {**entry, "errors": _errors(entry["errors"]), "modules": tuple(entry["modules"])})
            for entry in data["fused"]
        ]
        kept = [_build(NotFused, {**entry, "errors": _errors(entry["errors"])}) for entry in data["not_fused"]]
        return cls(
            fused=fused,
            not_fused=kept,
            before=Totals(**data["before"]),
            after=Totals(**data["after"]),
            float32=_number(data["float32"]),
            float64=data["float64"],
            seed=data["seed"],
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def _errors(data: Mapping[str, float | None] | None) -> Errors | None:
    return None if data is None else Errors(**{name: _number(value) for name, value in data.items()})


def _build(kind: Any, data: Mapping[str, Any]) -> Any:
    """``kind`` from plain data, derived entries left out and None read as infinite where a float is due."""
    named = {entry.name: data[entry.name] for entry in fields(kind)}
    return kind(**{name: _number(value) if name.endswith("_growth") else value for name, value in named.items()})
