"""Runners that wait for their next block, over one ssh link."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgeattn.core.errors import DeviceUnreachable
from edgeattn.profile.transports.base import Say
from edgeattn.profile.transports.live import LIVE_S, Live, Start
from edgeattn.profile.transports.ssh import PAUSE_S, RETRIES, Ssh, _Cut, _Staging

if TYPE_CHECKING:
    import asyncssh

Value = TypeVar("Value")

#: How long the far side has to end what was running.
END_S = 5.0


class _Link:
    """A link and its event loop, which runs while something is waited for."""

    def __init__(self, ssh: Ssh) -> None:
        self.ssh = ssh
        self.loop = asyncio.new_event_loop()
        self.stack = contextlib.AsyncExitStack()
        self.connection: asyncssh.SSHClientConnection | None = None
        self.staged: dict[Path, _Staging] = {}

    def wait(self, work: Coroutine[Any, Any, Value], seconds: float = LIVE_S) -> Value:
        """What ``work`` gives.

        Raises:
            DeviceUnreachable: the link was cut, or nothing came for so long.
        """
        import asyncssh

        try:
            return self.loop.run_until_complete(asyncio.wait_for(work, seconds))
        except (_Cut, asyncssh.Error, OSError, asyncio.TimeoutError) as error:
            raise self.ssh._unreachable("the link was cut", str(error) or type(error).__name__) from error

    async def open(self, bundles: Sequence[Path], say: Say) -> None:
        """Connect, and bring the bundles there; a link that is cut meanwhile is made anew."""
        cut: Exception | None = None
        for attempt in range(RETRIES + 1):
            if cut is not None:
                say(f"the link was cut ({cut}); trying again")
                await asyncio.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                self.connection = await self.stack.enter_async_context(self.ssh._connected())
                for bundle in bundles:
                    staged = self.ssh._staged(self.connection, bundle, say)
                    self.staged[bundle] = await self.stack.enter_async_context(staged)
                return
            except _Cut as error:
                cut = error
                await self.leave()
            except DeviceUnreachable:
                if cut is None:
                    raise
        raise _Cut(f"{cut}; {RETRIES} more tries did not bring it back")

    async def leave(self) -> None:
        """Have everything removed there, as far as the link still is."""
        with contextlib.suppress(Exception):
            await self.stack.aclose()
        self.stack, self.staged = contextlib.AsyncExitStack(), {}


class _FarProcess(Live):
    """A runner on the far side of a link."""

    def __init__(self, link: _Link, bundle: Path, arguments: Sequence[str], file: Path | None) -> None:
        self._link, self.where = link, link.ssh.url
        self._last: dict[str, Any] | None = None
        self._process = link.wait(self._begin(link.staged[bundle], ["--json", *arguments], file))

    async def _begin(self, staging: _Staging, words: list[str], file: Path | None) -> asyncssh.SSHClientProcess[str]:
        assert self._link.connection is not None
        if file is not None:
            async with self._link.connection.start_sftp_client() as sftp:
                await sftp.put(str(file), f"{staging.folder}/{file.name}")
            words = [*words, file.name]
        command = self._link.ssh._far("run", folder=staging.folder, words=words, live=True)
        return await self._link.connection.create_process(command)

    def line(self) -> str:
        """See ``Live``."""
        if self._last is not None:
            return ""
        while not (text := self._link.wait(self._process.stdout.readline())).startswith("{"):
            if not text:
                raise self._link.ssh._unreachable("the link was cut", "while the runner ran there")
        said = json.loads(text)
        if "line" in said:
            return str(said["line"])
        self._last = said
        return ""

    def send(self, text: str) -> None:
        """See ``Live``."""
        try:
            self._process.stdin.write((text or "end") + "\n")
        except OSError as error:
            raise self._link.ssh._unreachable("the link was cut", str(error)) from error

    def ended(self) -> tuple[int, str, str]:
        """See ``Live``."""
        while self._last is None:
            self.line()
        return int(self._last["code"]), str(self._last["errors"]), str(self._last["died"])

    def kill(self) -> None:
        """See ``Live``: the far side ends it when its channel closes."""
        self._process.close()
        with contextlib.suppress(DeviceUnreachable):
            self._link.wait(self._process.wait_closed(), END_S)

    def _result(self, begun: str) -> dict[str, Any]:
        with self._link.ssh._advising():
            return super()._result(begun)


@contextlib.contextmanager
def held(ssh: Ssh, bundles: Sequence[Path], say: Say) -> Iterator[Start]:
    """See ``Transport.hold``."""
    link = _Link(ssh)
    started: list[_FarProcess] = []

    def start(bundle: Path, arguments: Sequence[str], file: Path | None = None) -> Live:
        started.append(_FarProcess(link, bundle, arguments, file))
        return started[-1]

    try:
        link.wait(link.open(bundles, say))
        yield start
    finally:
        for live in started:
            live.kill()
        with contextlib.suppress(DeviceUnreachable):
            link.wait(link.leave(), 4 * END_S)
        link.loop.run_until_complete(_ended())
        link.loop.close()


async def _ended() -> None:
    """asyncssh's own tasks end with the link."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
