"""Devices: where a model runs. One TOML file each, with the source of every figure."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from edgeattn.core import schema
from edgeattn.core.errors import unknown


class Device(schema.Strict):
    """A device and what is documented of it.

    Attributes:
        kind: what sort of machine it is.
        machine: instruction set, as ``platform.machine()`` names it.
        targets: which targets can run there, best first.
        cores: CPU cores. clock_ghz: their highest clock. memory_gb: RAM. bandwidth_gb_s: documented peak.
        extensions: instruction set extensions that the kernels can use.
        sources: where the figures come from.
    """

    name: str
    description: str
    kind: Literal["host", "board", "phone", "gpu", "optical"]
    machine: str
    targets: tuple[str, ...] = Field(min_length=1)
    cores: int | None = Field(default=None, ge=1)
    clock_ghz: float | None = Field(default=None, gt=0)
    memory_gb: float | None = Field(default=None, gt=0)
    bandwidth_gb_s: float | None = Field(default=None, gt=0)
    extensions: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


def load(path: Path) -> Device:
    """Read a device file.

    Raises:
        UsageError: not readable, not TOML, or not a valid device.
    """
    return schema.validate(Device, schema.read_toml(path), str(path))


def resolve(text: str) -> Device:
    """The device of that name, or in that .toml file.

    Raises:
        UsageError: unknown, with the closest name.
    """
    if text.endswith(".toml"):
        return load(Path(text))
    known = schema.find("devices")
    if text not in known:
        raise unknown("device", text, known)
    return load(known[text])
