"""A bundle: the folder that a device can run, and that can prove itself without PyTorch."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn import targets
from edgeattn.bundle.manifest import FileInfo, Manifest, read_manifest
from edgeattn.core.errors import CheckFailed, UsageError, unknown
from edgeattn.core.files import inside, whole_folder
from edgeattn.core.hashing import sha256_file
from edgeattn.core.numerics import Array, Numerics, compare
from edgeattn.targets.base import Artifact, ArtifactEntry, Runtime, Tensor
from edgeattn.targets.feeds import own_widths

RUNNER = Path(__file__).with_name("runner.py")
#: Held-out samples that travel with a bundle.
SCORED = "heldout.npz"
#: What the runner needs beside it for artifacts of a backend, and for the cache of a decoder where that keeps it.
_BACKENDS = {"coreml": ("coreml",), "gguf": ("gguf",), "tensorrt": ("tensorrt", "cuda")}
_CACHES = {
    "tensorrt": {"run_cache.py": RUNNER.with_name("runner_cache.py")},
    "tflite": {"run_steps.py": RUNNER.parents[1] / "targets" / "tflite" / "steps.py"},
}


def runner_files(backends: Collection[str], *, scored: bool, decoder: bool) -> dict[str, Path]:
    """The runner of a bundle with artifacts of these backends: its files by their names in the bundle."""
    names = ["inputs", "profile", "state", *(name for backend in backends for name in _BACKENDS.get(backend, ()))]
    names += ["score"] * scored + ["generate", "prompt", "text"] * decoder
    files = {"run.py": RUNNER, **{f"run_{name}.py": RUNNER.with_name(f"runner_{name}.py") for name in names}}
    for backend in backends if decoder else ():
        files |= _CACHES.get(backend, {})
    return files


@dataclass(frozen=True)
class Verified:
    """What ``Bundle.verify`` found to hold.

    Attributes:
        files: how many were re-hashed.
        numerics: by golden file and output name; files of a further artifact or runtime carry its name in front.
        tolerance: the largest relative L2 allowed.
        unproven: what stays open, in sentences.
    """

    files: int
    numerics: dict[str, dict[str, Numerics]]
    tolerance: float
    unproven: tuple[str, ...] = ()

    @property
    def worst(self) -> Numerics:
        """The output that is furthest from its reference."""
        return max((n for sample in self.numerics.values() for n in sample.values()), key=lambda n: n.relative_l2)


class Bundle:
    """An opened bundle.

    Attributes:
        path: its folder.
        manifest: read and checked against its own digest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._runtimes: dict[str, Runtime] = {}

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read a bundle's manifest; the other files are hashed by ``verify`` only.

        Raises:
            UsageError: no bundle there, or one of a newer schema. CheckFailed: the manifest was changed.
        """
        path = Path(path)
        if not (path / "manifest.json").is_file():
            found = sorted(p.parent.name for p in path.glob("*/manifest.json")) if path.is_dir() else []
            raise UsageError(
                "this is not a bundle",
                value=path,
                why="it has no manifest.json" if path.is_dir() else "there is no such folder",
                fix=f"did you mean {path / found[0]}?" if found else "edgeattn export makes one",
            )
        return cls(path, read_manifest(path / "manifest.json"))

    def artifact(self, backend: str | None = None) -> Artifact:
        """An artifact inside, as its target sees it; the one in front without a ``backend``.

        Raises:
            UsageError: the bundle has none of that backend.
        """
        infos = {info.backend: info for info in reversed(self.manifest.artifacts)}
        if backend is not None and backend not in infos:
            raise unknown("backend", backend, infos, where=str(self.path))
        info = self.manifest if backend is None else infos[backend]
        entries = {
            name: ArtifactEntry(
                entry.file,
                tuple(Tensor(**t.model_dump()) for t in entry.inputs),
                tuple(Tensor(**t.model_dump()) for t in entry.outputs),
            )
            for name, entry in info.entries.items()
        }
        for entry in entries.values():
            inside(self.path, entry.file)
        return Artifact(self.path, self.manifest.precision, entries, info.facts)

    def run(self, feeds: Mapping[str, Array], entry: str = "main", backend: str | None = None) -> dict[str, Array]:
        """Outputs by name for inputs by name, through the backend's runtime on this machine.

        Args:
            feeds: in the artifact's own layout and dtypes. backend: of which artifact; the one in front without.

        Raises:
            UsageError: an unknown entry or backend, or feeds of other names, shapes or dtypes. ToolchainMissing.
        """
        name = backend or self.manifest.backend
        if name not in self._runtimes:
            self._runtimes[name] = targets.get(name).open(self.artifact(name))
        return self._runtimes[name].run(entry, feeds)

    def golden(self) -> Iterator[tuple[str, str, dict[str, Array], dict[str, Array]]]:
        """(file, entry, inputs, reference outputs) of every golden sample.

        Raises:
            CheckFailed: a file that does not hold plain arrays; code in it is not run.
        """
        for name in sorted(n for n in self.manifest.files if n.startswith("golden/")):
            try:
                with np.load(inside(self.path, name), allow_pickle=False) as data:
                    feeds = {key[3:]: data[key] for key in data.files if key.startswith("in.")}
                    outputs = {key[4:]: data[key] for key in data.files if key.startswith("out.")}
            except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
                raise CheckFailed(
                    "a golden sample cannot be read",
                    value=name,
                    where=str(self.path),
                    why=str(error),
                    fix="export anew",
                ) from error
            yield name, Path(name).stem.split("-")[0], feeds, outputs

    def check_files(self) -> int:
        """Re-hash every file; returns how many.

        Raises:
            CheckFailed: lists what is missing or changed.
        """
        problems = []
        for name, info in sorted(self.manifest.files.items()):
            path = inside(self.path, name)
            if not path.is_file():
                problems.append(f"{name}: missing")
            elif path.stat().st_size != info.size or sha256_file(path) != info.sha256:
                problems.append(f"{name}: changed, its SHA-256 does not fit the manifest")
        if problems:
            raise CheckFailed(
                "the bundle's files do not fit its manifest",
                where=str(self.path),
                why=f"{len(problems)} of {len(self.manifest.files)} differ",
                fix="copy the bundle again, or export anew",
                details=problems,
            )
        return len(self.manifest.files)

    def verify(self) -> Verified:
        """Re-hash all files and re-run the golden inputs on this machine; works without torch where the target does.

        Raises:
            CheckFailed: a file differs, or an output is further from its reference than the tolerance.
            ToolchainMissing: the target's runtime is not installed.
        """
        files = self.check_files()
        numerics: dict[str, dict[str, Numerics]] = {}
        unproven = []
        for info in self.manifest.artifacts:
            artifact = self.artifact(info.backend)
            others = targets.get(info.backend).others(artifact)
            unproven += [info.unproven] if info.unproven and not others else []
            for name, entry, feeds, reference in self.golden():
                if entry not in artifact.entries:  # of another artifact of the bundle
                    continue
                given = own_widths(artifact.entries[entry].inputs, feeds)
                runs = {info.backend: self.run(given, entry, info.backend)}
                runs |= {other: runtime.run(entry, given) for other, runtime in others.items()}
                for by, outputs in runs.items():
                    shown = f"{by}: {name}" if self.manifest.alternatives or others else name
                    # Another runtime may keep the cache itself, and give no rows of it.
                    found = [key for key in reference if by == info.backend or key in outputs]
                    if found:
                        numerics[shown] = {key: compare(reference[key], outputs[key]) for key in found}
        if not any(numerics.values()):
            raise CheckFailed("the bundle has no golden samples", where=str(self.path), fix="export anew")
        failed = [
            f"{name} {key}: relative L2 {n.relative_l2:.3g}, {n.nonfinite} not finite"
            for name, sample in numerics.items()
            for key, n in sample.items()
            if not n.holds(self.manifest.tolerance)
        ]
        if failed:
            raise CheckFailed(
                "the numbers do not hold on this machine",
                where=str(self.path),
                why=f"tolerance is a relative L2 of {self.manifest.tolerance:g}",
                fix="the runtime here computes otherwise than the one that the bundle was proven with: "
                + ", ".join(f"{r.name} {r.version}" for a in self.manifest.artifacts for r in a.runtimes),
                details=failed,
            )
        return Verified(files, numerics, self.manifest.tolerance, tuple(unproven))


def write_bundle(
    final: Path, manifest: Manifest, artifact: Mapping[Path, str], golden: Path, readme: str, *, replace: bool = False
) -> Bundle:
    """Put a bundle together beside ``final`` and rename it into place, complete.

    Args:
        artifact: the artifact's files and their names in the bundle. golden: folder with ENTRY-NNN.npz files.
        replace: take the place of an existing folder.
    """
    with whole_folder(final, replace=replace) as folder:
        for source, name in artifact.items():
            place = inside(folder, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)
        shutil.copytree(golden, folder / "golden")
        if any(info.requirement for info in manifest.artifacts):
            backends = [info.backend for info in manifest.artifacts]
            scored, decoder = (folder / SCORED).is_file(), manifest.decoder is not None
            for name, source in runner_files(backends, scored=scored, decoder=decoder).items():
                shutil.copyfile(source, folder / name)
        (folder / "README.md").write_text(readme, encoding="utf-8")
        files: dict[str, Any] = {
            path.relative_to(folder).as_posix(): FileInfo(sha256=sha256_file(path), size=path.stat().st_size)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        sealed = manifest.model_copy(update={"files": files}).sealed()
        (folder / "manifest.json").write_text(sealed.text(), encoding="utf-8")
    return Bundle(final, sealed)
