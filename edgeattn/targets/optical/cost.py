"""What a program costs on a 4f correlator: frames, mask writes, read-out and electronics, each by its own rate.

Nothing here is measured: every figure follows from a plan and from what a device file says, and comes with what was
assumed. What a device file is silent about is not counted, as in the literature, and named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgeattn.device import Optics
from edgeattn.targets.optical.convolve import parts
from edgeattn.targets.optical.schedule import TILINGS, Plan, Workload, in_parts, make_plan


@dataclass(frozen=True)
class Cost:
    """Of one run of a program with a batch of inputs.

    Attributes:
        batch: inputs. frames: exposures of the camera. mask_writes, input_writes: of whole planes.
        optical_macs, electronic_ops: of the whole batch; what guards and unread zones multiply does not count.
        seconds: by part: ``frames``, ``masks``, ``readout``, ``electronics``; of the whole batch.
        joules: by part: ``input``, ``masks``, ``readout``, ``electronics``, ``static``.
        roi_readout_s, roi_readout_j: read-out where the camera reads the wanted pixels alone instead of whole frames.
        fill: share of the planes' pixels that zones lie on. macs_a_pixel: multiply-accumulates for each pixel of each
            frame.
        assumptions: sentences.
    """

    batch: int
    frames: int
    mask_writes: int
    input_writes: int
    optical_macs: int
    electronic_ops: int
    seconds: dict[str, float]
    joules: dict[str, float]
    roi_readout_s: float
    roi_readout_j: float
    fill: float
    macs_a_pixel: float
    assumptions: tuple[str, ...]

    @property
    def total_s(self) -> float:
        """Seconds of the whole batch."""
        return math.fsum(self.seconds.values())

    @property
    def per_input_s(self) -> float:
        """Seconds an input."""
        return self.total_s / self.batch

    @property
    def total_j(self) -> float:
        """Joules of the whole batch."""
        return math.fsum(self.joules.values())

    @property
    def share(self) -> float:
        """Optical multiply-accumulates, as a share of all operations."""
        return self.optical_macs / max(1, self.optical_macs + self.electronic_ops)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        derived = {"total_s": self.total_s, "per_input_s": self.per_input_s, "total_j": self.total_j}
        return asdict(self) | derived | {"share": self.share}


def plans_of(
    works: Sequence[Workload],
    signed: Sequence[bool],
    optics: Optics,
    batch: int = 1,
    tilings: tuple[str, ...] = TILINGS,
    full_pitch: bool = False,
) -> list[Plan]:
    """A plan for each workload of a batch, under the optics' sign scheme.

    Args:
        works: of one input. full_pitch: tiles M + N - 1 apart, as for full convolutions, whatever is wanted of them.
    """
    found = []
    for work, negative in zip(works, signed, strict=True):
        whole = replace(work, rows=work.rows * batch, macs=work.macs * batch)
        pitch = tuple(m + n - 1 for m, n in zip(work.map, work.kernel, strict=True)) if full_pitch else None
        shown = in_parts(whole, *parts(optics.effects, negative))
        found.append(make_plan(shown, (optics.rows, optics.cols), tilings, pitch))  # type: ignore[arg-type]
    return found


def cost(plans: Sequence[Plan], optics: Optics, batch: int = 1, electronic_ops: int = 0) -> Cost:
    """What plans for a batch cost.

    Args:
        electronic_ops: of one input.
    """
    pixels = optics.rows * optics.cols
    orders = [_order(plan, optics, pixels) for plan in plans]
    frames = optics.repeats * sum(plan.frames for plan in plans)
    masks, inputs = (optics.repeats * sum(order[i] for order in orders) for i in (0, 1))
    useful = optics.repeats * sum(plan.useful_pixels for plan in plans)
    seconds = {
        "frames": frames / optics.frame_rate_hz,
        "masks": _over(masks, optics.mask_rate_hz),
        "readout": _over(frames * pixels, optics.readout_px_s),
        "electronics": _over(electronic_ops * batch, optics.electronics_ops_s),
    }
    static = optics.static_w or 0.0
    joules = {
        "input": 1e-12 * inputs * pixels * (optics.input_pj_px or 0.0),
        "masks": 1e-12 * masks * pixels * (optics.mask_pj_px or 0.0),
        "readout": 1e-12 * frames * pixels * (optics.readout_pj_px or 0.0),
        "electronics": 1e-12 * electronic_ops * batch * (optics.electronics_pj_op or 0.0),
        "static": static * math.fsum(seconds.values()),
    }
    macs = sum(plan.work.macs for plan in plans)
    return Cost(
        batch,
        frames,
        masks,
        inputs,
        macs,
        electronic_ops * batch,
        seconds,
        joules,
        _over(useful, optics.readout_px_s),
        1e-12 * useful * (optics.readout_pj_px or 0.0),
        sum(plan.frames * math.prod(plan.extent) for plan in plans) / (pixels * sum(plan.frames for plan in plans)),
        macs / (frames * pixels),
        assumptions(optics),
    )


def _over(count: int, rate: float | None) -> float:
    return count / rate if rate else 0.0


def _order(plan: Plan, optics: Optics, pixels: int) -> tuple[int, int]:
    """Mask and input writes, of the order that costs less: masks stay while inputs change, or the other way round."""
    orders = ((plan.masks, plan.frames), (plan.frames, plan.inputs))

    def price(writes: tuple[int, int]) -> tuple[float, float]:
        masks, inputs = writes
        energy = masks * (optics.mask_pj_px or 0.0) + inputs * (optics.input_pj_px or 0.0)
        return _over(masks, optics.mask_rate_hz), energy * pixels

    return min(orders, key=price)


def assumptions(optics: Optics) -> tuple[str, ...]:
    """What figures of these optics rest on, in sentences."""
    found = [f"planes of {optics.rows} x {optics.cols} pixels, {optics.frame_rate_hz:g} frames a second"]
    if optics.repeats > 1:
        found.append(f"every pass is shown {optics.repeats} times")
    found.append(
        f"{optics.mask_rate_hz:g} masks a second, on top of the frames"
        if optics.mask_rate_hz
        else "a mask is written while a frame is shown, at no time of its own"
    )
    found.append(
        f"the camera is read at {optics.readout_px_s:g} pixels a second, whole frames"
        if optics.readout_px_s
        else "reading the camera takes no time of its own"
    )
    found.append(
        f"electronics do {optics.electronics_ops_s:g} operations a second, in turn with the optics"
        if optics.electronics_ops_s
        else "electronics take no time"
    )
    found.append(f"sign scheme {optics.effects.sign}")
    energies = ("static_w", "input_pj_px", "mask_pj_px", "readout_pj_px", "electronics_pj_op")
    missing = [name for name in energies if getattr(optics, name) is None]
    if missing:
        found.append(f"energy without {', '.join(missing)}, which the device file does not say")
    return tuple(found)
