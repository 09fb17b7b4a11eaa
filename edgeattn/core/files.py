"""Files and folders that are either whole or not there.

A folder is filled under a temporary name beside its final place and then renamed. Whatever a killed process leaves
behind carries its process id and is cleared away by the next one that writes to the same place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from edgeattn.core.errors import UsageError

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)-[0-9a-f]{8}")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sibling(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def clear_leftovers(folder: Path) -> None:
    """Remove what dead processes left in ``folder``; a folder they had set aside and not yet replaced is put back."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or _alive(int(match["pid"])):
            continue
        final = folder / match["name"]
        # Another process may be clearing the same leftovers, or they may be another user's.
        with contextlib.suppress(OSError):
            if match["kind"] == "old" and not final.exists():
                path.rename(final)
            else:
                remove(path)


def remove(path: Path) -> None:
    """Delete a file or a folder tree, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _begin(final: Path) -> Path:
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(final.parent)
        temporary = _sibling(final, "tmp")
        temporary.mkdir()
    except OSError as error:
        raise UsageError(
            "the output folder cannot be written",
            value=final.parent,
            why=f"{error.strerror or error}: {error.filename}",
            fix="choose another folder with --output, or change its permissions",
        ) from error
    return temporary


def check_writable(folder: Path) -> None:
    """Say before the work, not after it, that nothing could be written into ``folder``.

    Raises:
        UsageError: as ``whole_folder`` would.
    """
    remove(_begin(folder / "probe"))


@contextlib.contextmanager
def whole_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary sibling to fill; on success it becomes ``final``, on any error it is removed.

    Its files are on the disk before it is renamed, so that a power cut leaves nothing half-written either.

    Args:
        final: the folder that is to appear, complete.
        replace: take the place of an existing ``final``; without it an existing one wins and the new one is dropped.

    Raises:
        UsageError: the parent cannot be made or written, or ``final`` is a file.
    """
    temporary = _begin(final)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
        _sync(temporary)
        if final.is_file() or (final.is_symlink() and not final.exists()):
            raise UsageError(
                "the output folder cannot be written", value=final, why="a file of that name is in its place"
            )
        if replace:
            _take_place(temporary, final)
        else:
            move_into(temporary, final)
        _sync(final.parent)
    finally:
        remove(temporary)


def _take_place(folder: Path, final: Path) -> None:
    """Rename ``folder`` to ``final``, whose old content is set aside first, and put back if that fails."""
    aside = _sibling(final, "old")
    try:
        final.rename(aside)
    except FileNotFoundError:
        pass  # nothing was there, or another process has just set it aside
    try:
        move_into(folder, final)
    except OSError:
        if aside.exists():
            move_into(aside, final)
        raise
    remove(aside)


def move_into(folder: Path, final: Path) -> None:
    """Rename a filled folder to ``final``. If another process was first its folder stands, and ours is dropped."""
    final.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            folder.rename(final)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # Unless a third process has just set it aside: then ours may take the place after all.
        if final.is_dir():
            remove(folder)
            return


def scratch_folder(parent: Path) -> Path:
    """A new empty folder in ``parent`` that is cleared away if this process dies before it is moved."""
    parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(parent)
    folder = _sibling(parent / "work", "tmp")
    folder.mkdir()
    return folder


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path, "tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        remove(temporary)


def inside(root: Path, name: str) -> Path:
    """``root / name``, for names that come from a file.

    Raises:
        UsageError: the name is absolute, holds a null byte or leaves ``root``, also through a link.
    """
    path = root / name
    if "\0" in name:
        raise UsageError("a file name holds a null byte", value=repr(name), where=str(root))
    if Path(name).is_absolute() or not path.resolve().is_relative_to(root.resolve()):
        raise UsageError("a file name leaves its folder", value=name, where=str(root), why="names must stay inside it")
    return path
