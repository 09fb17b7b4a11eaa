"""A real OpenSSH server on loopback, with keys and a port of its own, and a proxy that cuts links."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


@dataclass
class Sshd:
    """A server; ``far`` is the home folder that its users find."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def far(self) -> Path:
        return self.folder / "far"

    @property
    def home(self) -> Path:
        """Of the client."""
        return self.folder / "home"

    @property
    def url(self) -> str:
        return f"ssh://root@127.0.0.1:{self.port}" if os.getuid() == 0 else f"ssh://127.0.0.1:{self.port}"

    def make(self) -> None:
        self.far.mkdir(parents=True)
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        _key(self.folder / "host")
        _key(self.home / ".ssh" / "id_ed25519")
        shutil.copy(self.home / ".ssh" / "id_ed25519.pub", self.folder / "authorized")
        self.trust(self.port)
        (self.folder / "conf").write_text(
            f"HostKey {self.folder}/host\nAuthorizedKeysFile {self.folder}/authorized\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication yes\nPermitRootLogin yes\nListenAddress 127.0.0.1\nPidFile none\n"
            f"SetEnv HOME={self.far}\nSubsystem sftp internal-sftp -d {self.far}\n"
        )

    def trust(self, port: int) -> None:
        kind, key, *_ = (self.folder / "host.pub").read_text().split()
        with (self.home / ".ssh" / "known_hosts").open("a") as file:
            file.write(f"[127.0.0.1]:{port} {kind} {key}\n")

    def start(self) -> None:
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where it separates privileges
        log = (self.folder / "log").open("ab")
        words = [SSHD, "-D", "-e", "-f", str(self.folder / "conf"), "-p", str(self.port)]
        self.process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self) -> None:
        """As if the host died: the server and every connection of it."""
        if self.process is not None:
            found = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
            children: dict[int, list[int]] = {}
            for line in found.splitlines()[1:]:
                pid, parent = map(int, line.split())
                children.setdefault(parent, []).append(pid)
            # Only the servers' own processes: what they started belongs to the far side, and must end by itself.
            for pid in children.get(self.process.pid, []):
                for inner in [pid, *children.get(pid, [])]:
                    name = Path(f"/proc/{inner}/comm")
                    if name.exists() and name.read_text().startswith("sshd"):
                        os.kill(inner, 9)
            self.process.kill()
            self.process.wait()
            self.process = None

    def left(self) -> list[str]:
        """Everything on the far side; it may be going away meanwhile."""
        found = [Path(folder, name) for folder, folders, files in os.walk(self.far) for name in (*folders, *files)]
        return sorted(path.relative_to(self.far).as_posix() for path in found)


class Proxy:
    """Passes bytes on to a port; cuts a link after so many bytes towards it."""

    def __init__(self, target: int, cuts: list[int]) -> None:
        self.target, self.cuts, self.sent = target, cuts, [0]
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.server.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            limit = self.cuts.pop(0) if self.cuts else None
            if limit == 0:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:  # the server was stopped
                near.close()
                continue
            self.sent.append(0)
            for a, b, counted in ((near, far, True), (far, near, False)):
                threading.Thread(
                    target=self._pump, args=(a, b, limit, counted, len(self.sent) - 1), daemon=True
                ).start()

    def _pump(self, a: socket.socket, b: socket.socket, limit: int | None, counted: bool, link: int) -> None:
        try:
            while data := a.recv(4096):
                b.sendall(data)
                if counted:
                    self.sent[link] += len(data)
                    if limit is not None and self.sent[link] > limit:
                        break
        except OSError:
            pass
        for end in (a, b):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self) -> None:
        self.server.close()


def needed() -> None:
    """Skip where there is no sshd; in CI that is an error."""
    if not Path(SSHD).is_file() and not os.environ.get("CI"):
        pytest.skip("no OpenSSH server here: apt install openssh-server")
