"""Devices: where a model runs. One TOML file each, with the source of every figure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from edgeattn.core import schema
from edgeattn.core.errors import UsageError, unknown
from edgeattn.core.files import write_whole

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

#: CPUs that the emulator stands for.
EMULATED = ("cortex-a53", "cortex-a72", "cortex-a76")


def check_url(url: str) -> str:
    """An address of a device, as it was given.

    Raises:
        ValueError: another scheme than ssh and qemu, a password inside, no host.
    """
    if url == "local":
        return url
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (parsed when it is read)
    except ValueError as error:
        raise ValueError(f"not an address: {error}") from None
    if parts.scheme not in ("ssh", "qemu"):
        raise ValueError("must be ssh://user@host, qemu://cortex-a76 or local")
    if parts.password is not None:
        raise ValueError("holds a password, which files and histories keep; use a key, or EDGEATTN_SSH_PASSWORD")
    if not parts.hostname or parts.hostname.startswith("-") or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError("must be ssh://user@host:port, with nothing after it")
    if parts.scheme == "qemu" and parts.hostname not in EMULATED:
        raise ValueError(f"emulated are {', '.join(EMULATED)}")
    return url


class Device(schema.Strict):
    """A device and what is documented of it.

    Attributes:
        base: another device, whose fields are this one's where it has none of its own.
        kind: what sort of machine it is.
        machine: instruction set, as ``platform.machine()`` names it; "any" for the host.
        targets: which targets can run there, best first.
        cpu: the cores' name. cores: their number. clock_ghz: their highest clock. memory_gb: RAM.
        bandwidth_gb_s: of the memory. bandwidth_kind: whether that is documented, measured, or computed from the
            memory's data rate and width.
        extensions: instruction set extensions that the kernels can use.
        sources: where the figures come from.
        runtimes: the distribution that runs a target there, by target.
        wheels: versions of distributions that are known to exist for it.
        connect: its address. emulate: the emulated CPU that can stand for it in verifying numbers.
        identity, known_hosts: files for ssh, where they are not the usual ones.
        folder: where bundles are put on it while they run.
    """

    name: str
    base: str | None = None
    description: str
    kind: Literal["host", "board", "phone", "gpu", "optical"]
    machine: str
    os_bits: Literal[32, 64] | None = None
    targets: tuple[str, ...] = Field(min_length=1)
    cpu: str | None = None
    cores: int | None = Field(default=None, ge=1)
    clock_ghz: float | None = Field(default=None, gt=0)
    memory_gb: float | None = Field(default=None, gt=0)
    bandwidth_gb_s: float | None = Field(default=None, gt=0)
    bandwidth_kind: Literal["documented", "measured", "computed"] | None = None
    extensions: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    runtimes: dict[str, str] = Field(default_factory=dict)
    wheels: dict[str, str] = Field(default_factory=dict)
    connect: str | None = None
    emulate: Literal["", "cortex-a53", "cortex-a72", "cortex-a76"] = ""
    identity: str | None = None
    known_hosts: str | None = None
    folder: str | None = None

    @field_validator("connect")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return value if value is None else check_url(value)

    @model_validator(mode="after")
    def _bandwidth(self) -> Device:
        if (self.bandwidth_gb_s is None) != (self.bandwidth_kind is None):
            raise ValueError("bandwidth_gb_s needs bandwidth_kind, and the other way round")
        return self


def _merged(path: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """A file's fields over those of its base."""
    data = schema.read_toml(path)
    base = data.get("base")
    if base is None:
        return data
    known = schema.find("devices")
    if base not in known:
        raise unknown("device", str(base), known, where=f"{path}, base")
    if base in seen:
        raise UsageError(
            "devices are each other's base", value=" -> ".join((*seen, base)), where=str(path), fix="take one out"
        )
    below = _merged(known[base], (*seen, base))
    tables = {k: {**below[k], **v} for k, v in data.items() if isinstance(v, dict) and isinstance(below.get(k), dict)}
    # What runs on a device is one thing: a list or table of runtimes replaces the base's.
    return {**below, **data, **{k: v for k, v in tables.items() if k not in ("runtimes", "wheels")}}


def load(path: Path) -> Device:
    """Read a device file and its bases.

    Raises:
        UsageError: not readable, not TOML, not a valid device, or a base that is unknown or its own.
    """
    return schema.validate(Device, _merged(path, (path.stem,)), str(path))


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


def store(name: str, fields: Mapping[str, Any], *, force: bool = False) -> Path:
    """Write a device of the user's; returns its file.

    Args:
        fields: of a ``Device``, without ``name``; None is left out.
        force: replace one of that name.

    Raises:
        UsageError: the name cannot be a file's, there is one already, or the fields are not a device's.
    """
    if not _NAME.fullmatch(name) or name.endswith(".toml"):
        raise UsageError("a device cannot have this name", value=name, fix="use letters, digits, '.', '_' and '-'")
    path = schema.folders("devices")[0] / f"{name}.toml"
    if path.exists() and not force:
        raise UsageError("there is a device of this name", value=name, where=str(path), fix="--force replaces it")
    given = {"name": name, **{key: value for key, value in fields.items() if value is not None}}
    base = given.get("base")
    known = schema.find("devices")
    if base is not None and (base == name or base not in known):
        raise unknown("device", str(base), [other for other in known if other != name], where="--base")
    below = _merged(known[base], (name,)) if base is not None else {}
    schema.validate(Device, {**below, **given}, f"device {name}")
    # A JSON text or array of texts is one of TOML too.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]
    write_whole(path, ("\n".join(lines) + "\n").encode())
    return path


def forget(name: str) -> Path:
    """Remove a device of the user's; returns the file that it was in.

    Raises:
        UsageError: the user has none of that name; shipped ones stay.
    """
    folder = schema.folders("devices")[0]
    if not _NAME.fullmatch(name) or not (folder / f"{name}.toml").is_file():
        raise unknown("device of your own", name, [p.stem for p in sorted(folder.glob("*.toml"))])
    (folder / f"{name}.toml").unlink()
    return folder / f"{name}.toml"
