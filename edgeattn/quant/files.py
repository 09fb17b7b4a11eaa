"""Calibration samples out of files: a folder of images, a .npy or a .npz.

None is ever held in memory as a whole. Files are read, not memory-mapped: what is mapped counts as the process's own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from edgeattn.core.errors import ToolchainMissing, UsageError
from edgeattn.core.numerics import Array
from edgeattn.quant.sources import Form, Sample, Source, misfit

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
#: Pillow's name of an image's kind, by channels.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
#: So many bytes of a compressed file are unpacked at a time on the way to a sample.
_BLOCK = 1 << 20


class ImageFolder(Source):
    """Images in a folder and the folders in it, in the order of their paths; hidden files and linked folders left out.

    Each is brought to the input's size: bilinear, so that the shorter side fits, and the middle is kept. An orientation
    that a camera noted is heeded. Grey, RGB or RGBA by the input's channels.

    Raises:
        UsageError: the model does not take one image. ToolchainMissing: Pillow is not installed.
    """

    def __init__(self, folder: Path, form: Form) -> None:
        super().__init__(str(folder), form)
        shape = form.shapes[0]
        if len(form.inputs) != 1 or len(shape) != 3 or shape[0] not in _MODES:
            raise UsageError(
                "images cannot be the model's input",
                value=", ".join(map(str, form.inputs)),
                where=str(folder),
                why="a folder of images is for one input (B, C, H, W) of 1, 3 or 4 channels",
                fix="give a .npz with an array for each input, or package.module:function",
            )
        if importlib.util.find_spec("PIL") is None:
            raise ToolchainMissing("Pillow is not installed", why="it reads images", fix="pip install pillow")
        self.mode, self.size = _MODES[shape[0]], (shape[2], shape[1])
        self.files: list[str] = []
        for root, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            names = [name for name in files if not name.startswith(".") and name.lower().endswith(IMAGES)]
            self.files += [os.path.relpath(os.path.join(root, name), folder) for name in names]
        self.files.sort(key=lambda name: name.split(os.sep))

    def count(self) -> int:
        """How many images there are."""
        return len(self.files)

    def label(self, number: int) -> str:
        """The image's path."""
        return os.path.join(self.name, self.files[number])

    def read(self, chosen: Array) -> Iterator[Sample]:
        """The images (C, H, W) in uint8. Raises UsageError: one cannot be read; names its file."""
        for number in chosen:
            yield (self._image(self.label(number)),)

    def _image(self, path: str) -> Array:
        """One image (C, H, W) in uint8."""
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as image:
                deep = image.mode.startswith(("I", "F"))
                if not deep:
                    upright = ImageOps.exif_transpose(image).convert(self.mode)
                    fitted = ImageOps.fit(upright, self.size, Image.Resampling.BILINEAR)
        except Exception as error:  # whatever a damaged file makes Pillow raise
            raise UsageError(
                "an image cannot be read",
                value=path,
                why=f"{type(error).__name__}: {error}",
                fix="take it out of the folder, or replace it",
            ) from error
        if deep:
            raise UsageError(
                "an image has more than 8 bits a channel",
                value=path,
                why="what its numbers mean is not known",
                fix="save it with 8 bits, or give the values as a .npy file",
            )
        pixels = np.asarray(fitted, np.uint8)
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


@dataclass(frozen=True)
class _Member:
    """An array in a file: where its samples begin, and of what shape and dtype they are."""

    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def step(self) -> int:
        """Bytes of a sample."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize


class ArrayFile(Source):
    """A .npy (N, ...), or a .npz with such an array for each input, by its name; ``x`` may stand for the first.

    Raises:
        UsageError: not such a file, damaged, or its arrays do not fit the inputs.
    """

    def __init__(self, path: Path, form: Form) -> None:
        super().__init__(str(path), form)
        self.path = path
        try:
            self.archive = zipfile.ZipFile(path) if path.suffix == ".npz" else None
        except (OSError, zipfile.BadZipFile) as error:
            raise self._unreadable(error) from error
        self.keys = self._keys()
        self.members = [self._member(key, shape) for key, shape in zip(self.keys, form.shapes, strict=True)]
        if len({member.shape[0] for member in self.members}) > 1:
            lengths = (f"{key} {member.shape[0]}" for key, member in zip(self.keys, self.members, strict=True))
            raise UsageError(
                "the inputs have different numbers of calibration samples",
                value=", ".join(lengths),
                where=self.name,
                fix="give every input as many",
            )

    def _unreadable(self, error: object) -> UsageError:
        return UsageError(
            "the calibration samples cannot be read",
            value=self.path,
            why=f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error),
            fix="a .npy or .npz file of numbers (N, ...), as numpy.save and numpy.savez write them",
        )

    def _keys(self) -> list[str]:
        names = [spec.name for spec in self.form.inputs]
        if self.archive is None:
            if len(names) > 1:
                raise UsageError(
                    "a .npy file holds samples of one input only",
                    value=self.path,
                    why=f"the model has {', '.join(names)}",
                    fix="a .npz file with an array for each, or package.module:function",
                )
            return [""]
        there = {name.removesuffix(".npy") for name in self.archive.namelist()}
        keys = [name if name in there or i else "x" for i, name in enumerate(names)]
        if missing := [key for key in keys if key not in there]:
            raise UsageError(
                "the calibration file lacks an input",
                value=missing[0],
                where=self.name,
                why=f"it holds {', '.join(sorted(there)) or 'nothing'}",
                fix=f"numpy.savez(file, {', '.join(f'{name}=...' for name in names)})",
            )
        return keys

    def _open(self, key: str) -> tuple[IO[bytes], int]:
        """The member's bytes, and where in them it begins; what is not compressed can be gone to directly."""
        if self.archive is None:
            return self.path.open("rb"), 0
        info = self.archive.getinfo(f"{key}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return self.archive.open(info), 0
        handle = self.path.open("rb")
        handle.seek(info.header_offset + 26)
        return handle, info.header_offset + 30 + sum(struct.unpack("<HH", handle.read(4)))

    def _member(self, key: str, shape: tuple[int, ...]) -> _Member:
        try:
            handle, base = self._open(key)
            with handle:
                if base:
                    handle.seek(base)
                version = np.lib.format.read_magic(handle)  # type: ignore[no-untyped-call]
                header = np.lib.format.read_array_header_1_0 if version == (1, 0) else _header_2
                found, fortran, dtype = header(handle)
                member = _Member(handle.tell(), found, dtype)
            size = self.path.stat().st_size
            if self.archive:
                size = base + self.archive.getinfo(f"{key}.npy").file_size
        except Exception as error:  # whatever a damaged file makes zipfile and NumPy raise
            raise self._unreadable(error) from error
        where = f"{self.name}, {key}" if key else self.name
        if dtype.kind not in "fiub" or not found:
            raise UsageError(
                "the calibration samples are not numbers",
                value=f"{dtype} {found}",
                where=where,
                fix="an array (N, ...) of real numbers",
            )
        if found[1:] != shape:
            raise misfit(f"{found[0]} samples of {found[1:]}", shape, where)
        if fortran and len(found) > 1:
            raise UsageError(
                "the calibration samples are stored column by column",
                where=where,
                why="no sample is in one place",
                fix="numpy.save(file, numpy.ascontiguousarray(x))",
            )
        if member.start + found[0] * member.step > size:
            raise self._unreadable(f"it ends early: {found} {dtype} do not fit in {size:,} bytes")
        return member

    def count(self) -> int:
        """How many samples there are."""
        return int(self.members[0].shape[0])

    def read(self, chosen: Array) -> Iterator[Sample]:
        """The samples in the file's own dtype. Raises UsageError: the file is damaged."""
        with contextlib.ExitStack() as stack:
            handles = [stack.enter_context(self._open(key)[0]) for key in self.keys]
            for number in chosen:
                parts = zip(handles, self.members, strict=True)
                yield tuple(self._row(handle, member, int(number)) for handle, member in parts)

    def _row(self, handle: IO[bytes], member: _Member, number: int) -> Array:
        wanted = member.start + number * member.step
        try:
            if isinstance(handle, zipfile.ZipExtFile):
                while (gap := wanted - handle.tell()) > 0 and handle.read(min(gap, _BLOCK)):
                    pass
            else:
                handle.seek(wanted)
            data = handle.read(member.step)
        except Exception as error:  # a damaged archive
            raise self._unreadable(error) from error
        if len(data) < member.step:
            raise self._unreadable(f"it ends early, in sample {number}")
        return np.frombuffer(data, member.dtype).reshape(member.shape[1:])


def _header_2(handle: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Of arrays whose header is too long for version 1; a ValueError for what is newer than that."""
    found: tuple[tuple[int, ...], bool, np.dtype[Any]]
    found = np.lib.format.read_array_header_2_0(handle)  # type: ignore[no-untyped-call]
    return found
