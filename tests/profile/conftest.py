"""The OpenSSH server that stands for a device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeattn.profile.transports import ssh
from tests.profile.sshd import Sshd, needed


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """One on loopback that this user can log into, with a home folder of its own; it is down after the test."""
    needed()
    made = Sshd(tmp_path / "ssh")
    made.make()
    made.start()
    monkeypatch.setenv("HOME", str(made.home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.delenv("EDGEATTN_SSH_PASSWORD", raising=False)
    monkeypatch.setattr(ssh, "PAUSE_S", 0.05)
    yield made
    made.stop()
