"""Transports: local process, ssh, and user-mode emulation of aarch64."""

from __future__ import annotations

from urllib.parse import urlsplit

from edgeattn import device as devices
from edgeattn.core.errors import UsageError
from edgeattn.device import Device
from edgeattn.profile.transports.base import Transport


def open_transport(device: str | Device) -> Transport:
    """The way to a device: a device's name or file, ``local``, ``ssh://user@host:port`` or ``qemu://cortex-a76``.

    A device that has no address is stood for by its CPU under emulation, which verifies numbers and measures nothing.

    Raises:
        UsageError: an unknown device or scheme, or a device that nothing stands for.
    """
    if isinstance(device, str):
        if device == "host":
            device = "local"
        place = None if device == "local" or "://" in device else devices.resolve(device)
    else:
        place = device
    url = str(device) if place is None else place.connect or (f"qemu://{place.emulate}" if place.emulate else "")
    if place is not None and place.kind == "host":
        url = "local"
    if url == "local":
        from edgeattn.profile.transports.local import Local

        return Local()
    scheme = urlsplit(url).scheme
    if scheme == "ssh":
        from edgeattn.profile.transports.ssh import Ssh

        if place is None:
            return Ssh(url)
        kept = {name: getattr(place, name) for name in ("identity", "known_hosts", "folder", "python")}
        return Ssh(url, **kept)
    if scheme == "qemu":
        from edgeattn.profile.transports.qemu import Qemu

        return Qemu(url)
    raise UsageError(
        "the device cannot be reached",
        value=url or (place.name if place else ""),
        why="known are local, ssh:// and qemu://" if url else "its file has no address, and nothing emulates it",
        fix="edgeattn device add NAME ssh://user@host --base " + (place.name if place else "raspberry-pi-5"),
    )
