"""A device over ssh: the bundle goes there, its runner runs there, its JSON comes back, and nothing stays there."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import shlex
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from edgeattn.core.errors import CheckFailed, DeviceUnreachable, ToolchainMissing, UsageError
from edgeattn.core.files import inside
from edgeattn.device import check_url
from edgeattn.profile.transports.base import (
    PROBE,
    Found,
    Say,
    Transport,
    found_of,
    parse_answer,
    result_of,
    runner_of,
    silent,
)

if TYPE_CHECKING:
    import asyncssh

    from edgeattn.profile.transports.live import Start

#: How often a link that was cut is made anew within one command, and the pause before, which doubles.
RETRIES, PAUSE_S = 3, 0.5
CONNECT_S, RUN_S = 20.0, 1800.0
CHUNK = 1 << 16
#: Room that must be left after the bundle is there.
SPARE_BYTES = 1 << 18
#: How long the folder of a transfer that was cut waits there for a new link, before it removes itself.
GRACE_S = 30.0
#: What a device that was switched off in the middle could not remove goes when it is older than this.
STALE_S = 86400.0
#: Where bundles are put, without ``--folder``.
FOLDER = "~/.cache/edgeattn"

#: Prints {name: [bytes, SHA-256]} of the files in a folder.
_HASHES = """
import hashlib, json, os, sys
found = {}
for folder, _, names in os.walk(sys.argv[1]):
    for name in names:
        path = os.path.join(folder, name)
        digest = hashlib.sha256()
        with open(path, 'rb') as handle:
            for piece in iter(lambda: handle.read(1 << 20), b''):
                digest.update(piece)
        found[os.path.relpath(path, sys.argv[1])] = [os.path.getsize(path), digest.hexdigest()]
print(json.dumps(found))
"""

Value = TypeVar("Value")


class _Cut(Exception):
    """The link was cut in the middle."""


@dataclass
class _Staging:
    """Where the bundle goes: ``folder``, inside of ``root``; ``guard`` runs there and removes it in the end."""

    root: str
    folder: str
    guard: asyncssh.SSHClientProcess[str]

    async def leave(self) -> None:
        """Have everything removed now. Where the link is gone the guard does so by itself."""
        with contextlib.suppress(Exception):
            self.guard.stdin.write("clean\n")
            await asyncio.wait_for(self.guard.wait_closed(), CONNECT_S)


class Ssh(Transport):
    """A device that OpenSSH reaches: its configuration, keys, agent and known hosts are the usual ones.

    A password is read from EDGEATTN_SSH_PASSWORD. Host keys are always checked.

    Args:
        url: ``ssh://user@host:port``.
        identity, known_hosts: files that take the place of the usual ones.
        folder: on the device, for bundles while they run; ``FOLDER`` without.
        python: on the device.

    Raises:
        UsageError: the address is none, or holds a password.
    """

    def __init__(
        self,
        url: str,
        *,
        identity: str | None = None,
        known_hosts: str | None = None,
        folder: str | None = None,
        python: str | None = None,
    ) -> None:
        try:
            check_url(url)
        except ValueError as error:
            raise UsageError("the address cannot be used", where="--device", why=f"it {error}") from None
        parts = urlsplit(url)
        self.url = url
        self._host, self._port, self._user = str(parts.hostname), parts.port, parts.username
        self._identity, self._known_hosts = identity, known_hosts
        self._folder, self._python = folder or FOLDER, python or "python3"

    def run(self, bundle: Path, arguments: Sequence[str], say: Say = silent) -> dict[str, Any]:
        """See ``Transport.run``. A link that is cut while files travel is made anew and goes on where it was."""
        return self.run_all(bundle, [arguments], say)[0]

    def run_all(self, bundle: Path, runs: Sequence[Sequence[str]], say: Say = silent) -> list[dict[str, Any]]:
        """See ``Transport.run_all``; the bundle travels once."""
        runner_of(bundle)
        return self._wait(self._run(bundle, runs, say))

    @contextlib.contextmanager
    def hold(self, bundles: Sequence[Path], say: Say = silent) -> Iterator[Start]:
        """See ``Transport.hold``: one link for all of them."""
        from edgeattn.profile.transports.ssh_live import held

        for bundle in bundles:
            runner_of(bundle)
        with held(self, bundles, say) as start:
            yield start

    def _answer(self, ended: dict[str, Any]) -> dict[str, Any]:
        """What the runner said there."""
        with self._advising():
            answer = parse_answer(ended["out"], ended["code"], ended["errors"], self.url, ended["died"])
            return result_of(answer, self.url)

    @contextlib.contextmanager
    def _advising(self) -> Iterator[None]:
        """Where a runtime is missing there, say how it is installed there."""
        try:
            yield
        except ToolchainMissing as error:
            # Debian's own Python refuses pip; an environment of one's own takes both.
            lacking = (error.fix or "").partition("pip install ")[2]
            if not lacking:  # nothing that can be installed there brings it
                raise
            error.fix = (
                f"on the device: python3 -m venv --system-site-packages ~/edgeattn && ~/edgeattn/bin/pip install "
                f"{lacking}; then edgeattn device add NAME {self.url} --python '~/edgeattn/bin/python'"
            )
            raise

    def check(self) -> list[Found]:
        """See ``Transport.check``."""
        return self._wait(self._check())

    def _wait(self, work: Coroutine[Any, Any, Value]) -> Value:
        try:
            return asyncio.run(work)
        except _Cut as cut:
            raise self._unreachable("the link was cut", str(cut)) from cut

    def _unreachable(
        self, what: str, why: str, fix: str = "look at the device and its network, then try again"
    ) -> DeviceUnreachable:
        return DeviceUnreachable(what, value=self.url, why=why, fix=fix)

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[asyncssh.SSHClientConnection]:
        """A connection whose host key was checked."""
        import asyncssh

        options: dict[str, Any] = {"keepalive_interval": 10, "connect_timeout": CONNECT_S, "login_timeout": CONNECT_S}
        given = {
            "port": self._port,
            "username": self._user,
            "password": os.environ.get("EDGEATTN_SSH_PASSWORD"),
            "client_keys": [os.path.expanduser(self._identity)] if self._identity else None,
            "known_hosts": os.path.expanduser(self._known_hosts) if self._known_hosts else None,
        }
        options |= {key: value for key, value in given.items() if value is not None}
        try:
            connection = await asyncssh.connect(self._host, **options)
        except asyncssh.HostKeyNotVerifiable as error:
            raise self._stranger(error) from error
        except asyncssh.PermissionDenied as error:
            tried = "the keys of this user and its agent" + (", the password" if given["password"] else "")
            fix = "add your key there (ssh-copy-id), or set EDGEATTN_SSH_PASSWORD"
            raise self._unreachable(
                "the device does not let us in", f"{error.reason}; tried were {tried}", fix
            ) from error
        except (OSError, asyncio.TimeoutError, asyncssh.Error, asyncssh.KeyImportError) as error:
            raise self._unreachable("the device cannot be reached", str(error) or type(error).__name__) from error
        async with connection:
            yield connection

    def _stranger(self, error: asyncssh.HostKeyNotVerifiable) -> DeviceUnreachable:
        import asyncssh

        path = Path(os.path.expanduser(self._known_hosts or "~/.ssh/known_hosts"))
        known: Sequence[Any] = ()
        with contextlib.suppress(OSError, ValueError):
            known = asyncssh.read_known_hosts(str(path)).match(self._host, "", self._port or 22)[0]
        port = f"-p {self._port} " if self._port else ""
        if known:
            return self._unreachable(
                "the device shows another host key than the one that is known",
                f"{path} holds a different one; the device was set up anew, or somebody stands in between",
                f"if you know why, ssh-keygen -R '[{self._host}]:{self._port or 22}' and connect once with ssh",
            )
        return self._unreachable(
            "the device's host key is not known",
            f"{path} has none for it ({error.reason})",
            f"connect once with ssh {port}{self._host}, and compare the fingerprint that it shows with the device's",
        )

    async def _check(self) -> list[Found]:
        async with self._connected() as connection:
            return found_of(_answer_in(await self._ask(connection, PROBE)))

    async def _ask(self, connection: asyncssh.SSHClientConnection, source: str, *arguments: str) -> str:
        """What a script prints on the device.

        Raises:
            ToolchainMissing: there is no Python 3 there. CheckFailed: the script failed.
        """
        words = " ".join(shlex.quote(word) for word in ("-c", source, *arguments))
        done = await connection.run(f"{self._quoted_python} {words}", check=False)
        if done.exit_status is None:
            raise _Cut("while a script ran there")
        errors = str(done.stderr or "").strip().splitlines()
        if done.exit_status in (126, 127):
            raise ToolchainMissing(
                "the device has no Python",
                value=self._python,
                where=self.url,
                why=errors[-1] if errors else "the command was not found",
                fix="on the device: sudo apt install python3, or on a Mac xcode-select --install",
            )
        if done.exit_status:
            raise CheckFailed("a script failed on the device", where=self.url, details=errors[-5:])
        return str(done.stdout)

    @property
    def _quoted_python(self) -> str:
        """For the device's shell; a leading ~/ is its to expand."""
        home, rest = ("~/", self._python[2:]) if self._python.startswith("~/") else ("", self._python)
        return home + shlex.quote(rest)

    async def _run(self, bundle: Path, runs: Sequence[Sequence[str]], say: Say) -> list[dict[str, Any]]:
        cut: _Cut | None = None
        for attempt in range(RETRIES + 1):
            if cut is not None:
                say(f"the link was cut ({cut}); trying again")
                await asyncio.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                return await self._once(bundle, runs, say)
            except _Cut as error:
                cut = error
            except DeviceUnreachable:
                if cut is None:
                    raise
        raise self._unreachable(
            "the link was cut",
            f"{cut}; {RETRIES} more tries did not bring it back",
            f"within {GRACE_S:.0f} s the next command goes on from there; after that nothing is left there",
        )

    async def _once(self, bundle: Path, runs: Sequence[Sequence[str]], say: Say) -> list[dict[str, Any]]:
        async with self._connected() as connection, self._staged(connection, bundle, say) as staging:
            answers = []
            for number, arguments in enumerate(runs, 1):
                say(f"running there{f', {number} of {len(runs)}' if len(runs) > 1 else ''}")
                answers.append(self._answer(await self._launch(connection, staging, arguments)))
            return answers

    @contextlib.asynccontextmanager
    async def _staged(
        self, connection: asyncssh.SSHClientConnection, bundle: Path, say: Say
    ) -> AsyncIterator[_Staging]:
        """The bundle there, as long as this lasts."""
        import asyncssh

        staging: _Staging | None = None
        sftp: asyncssh.SFTPClient | None = None
        try:
            try:
                await self._ask(connection, "import sys; assert sys.version_info >= (3, 9), sys.version")
                staging = await self._stage(connection, bundle)
                sftp = await connection.start_sftp_client()
                await self._copy(connection, sftp, bundle, staging, say)
                staging.guard.stdin.write("running\n")
                yield staging
            except (asyncssh.ConnectionLost, asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection) as error:
                raise _Cut("while files travelled") from error
            except (asyncssh.DisconnectError, asyncssh.ChannelOpenError, ConnectionError) as error:
                raise _Cut(str(error)) from error
            except asyncio.TimeoutError as error:
                raise _Cut(f"no answer in {CONNECT_S:.0f} s") from error
            except asyncssh.SFTPError as error:
                raise self._unstored(
                    await self._why(sftp, staging, error), staging.folder if staging else self._folder
                ) from error
        finally:
            if staging is not None:
                await staging.leave()

    def _unstored(self, why: str, place: str) -> UsageError:
        return UsageError(
            "the bundle cannot be stored on the device",
            value=place,
            where=self.url,
            why=why,
            fix="make room, or choose another folder: edgeattn device add NAME URL --folder DIR",
        )

    async def _why(self, sftp: asyncssh.SFTPClient | None, staging: _Staging | None, error: Exception) -> str:
        """What an SFTP server of version 3 does not say: that the disk is full."""
        if sftp is not None and staging is not None:
            with contextlib.suppress(Exception):
                free = await self._free(sftp, staging.root)
                if free < SPARE_BYTES:
                    return f"the disk is full: {free / 1e6:.1f} MB are free"
        return str(error)

    @staticmethod
    async def _free(sftp: asyncssh.SFTPClient, folder: str) -> int:
        found = await sftp.statvfs(folder)
        return int(found.bavail) * int(found.frsize)

    def _far(self, role: str, **options: Any) -> str:
        """The command that plays a role of ``far.py`` there."""
        source = Path(__file__).with_name("far.py").read_text(encoding="utf-8")
        words = ("-c", source, role, json.dumps(options))
        return f"{self._quoted_python} {' '.join(shlex.quote(word) for word in words)}"

    async def _stage(self, connection: asyncssh.SSHClientConnection, bundle: Path) -> _Staging:
        """Have the staging folder made; the same bundle's comes back after a cut."""
        command = self._far(
            "stage",
            root=self._folder,
            own=self._folder == FOLDER,
            digest=hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()[:32],
            token=secrets.token_hex(16),
            stale_s=STALE_S,
            grace_s=GRACE_S,
        )
        guard = await connection.create_process(command)
        line = ""
        while not line.startswith("{"):  # a login script may greet first
            line = await asyncio.wait_for(guard.stdout.readline(), CONNECT_S)
            if not line:
                raise _Cut("before files travelled")
        answer = json.loads(line)
        if "error" in answer:
            raise self._unstored(answer["error"], self._folder)
        return _Staging(answer["root"], answer["folder"], guard)

    async def _copy(
        self,
        connection: asyncssh.SSHClientConnection,
        sftp: asyncssh.SFTPClient,
        bundle: Path,
        staging: _Staging,
        say: Say,
    ) -> None:
        """Bring every file there; what is there already, with the same bytes, is not sent again.

        Raises:
            UsageError: there is not enough room.
        """
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        names = [*manifest["files"], "manifest.json"]
        sizes = {name: inside(bundle, name).stat().st_size for name in names}
        there: dict[str, list[Any]] = _answer_in(await self._ask(connection, _HASHES, staging.folder))
        starts = {name: _kept(bundle / name, *there.get(name, (0, ""))) for name in names}
        needed = sum(sizes.values()) - sum(starts.values())
        free = await self._free(sftp, staging.root)
        if needed + SPARE_BYTES > free:
            raise UsageError(
                "the bundle does not fit on the device",
                value=f"{needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free",
                where=f"{self.url}, {staging.root}",
                fix="make room, or choose another folder: edgeattn device add NAME URL --folder DIR",
            )
        for name in names:
            target = f"{staging.folder}/{name}"
            if "/" in name:
                await sftp.makedirs(target.rpartition("/")[0], exist_ok=True)
            start = starts[name]
            if start == sizes[name] and name in there:
                continue
            async with sftp.open(target, "r+b" if start else "wb") as far:
                with (bundle / name).open("rb") as near:
                    near.seek(start)
                    if start:
                        await far.truncate(start)
                        await far.seek(start)
                    sent = start
                    while piece := near.read(CHUNK):
                        await far.write(piece)
                        sent += len(piece)
                        say(f"copying {name}, {sent / 1e6:.1f} of {sizes[name] / 1e6:.1f} MB")

    async def _launch(
        self, connection: asyncssh.SSHClientConnection, staging: _Staging, arguments: Sequence[str]
    ) -> dict[str, Any]:
        """Run it there; its input stays open as long as this side lives."""
        command = self._far("run", folder=staging.folder, words=[*arguments, "--json"])
        process = await connection.create_process(command)
        try:
            out, errors = await asyncio.wait_for(asyncio.gather(process.stdout.read(), process.stderr.read()), RUN_S)
            await process.wait_closed()
        except asyncio.TimeoutError as error:
            raise CheckFailed("the runner does not end", value=f"{RUN_S:.0f} s", where=self.url) from error
        finally:
            process.close()
        if process.exit_status is None:
            # The far side ends the runner and takes the folder away by itself.
            raise self._unreachable("the link was cut", "while the runner ran there")
        try:
            return _answer_in(str(out))
        except ValueError:
            tail = str(errors).splitlines()[-5:]
            raise CheckFailed("the runner could not be started there", where=self.url, details=tail) from None


def _answer_in(text: str) -> dict[str, Any]:
    """The JSON in a line of a script's output; a login script may have greeted before. Raises ValueError."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
    raise ValueError(text)


def _kept(path: Path, size: int, digest: str) -> int:
    """How many of a far file's bytes can stay: all, if they are the beginning of the near one."""
    if not 0 < size <= path.stat().st_size:
        return 0
    seen, left = hashlib.sha256(), size
    with path.open("rb") as handle:
        while left:
            piece = handle.read(min(left, 1 << 20))
            seen.update(piece)
            left -= len(piece)
    return size if seen.hexdigest() == digest else 0
