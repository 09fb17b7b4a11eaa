"""A bundle whose runner is slower by a known share, which only those who planted it know."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgeattn.bundle.manifest import FileInfo, read_manifest
from edgeattn.core.hashing import sha256_file

_RUN = "        begun = time.perf_counter()\n        execute(feeds)\n"
#: After a run the processor is kept busy for a share of what it took.
_SLOWER = _RUN + "        until = time.perf_counter() + {share} * (time.perf_counter() - begun)\n"
_SLOWER += "        while time.perf_counter() < until:\n            pass\n"


def slower(bundle: Path, folder: Path, share: float) -> Path:
    """A copy of a bundle that takes ``share`` longer for each run: 0.1 is ten percent. Its manifest is sealed anew."""
    copy = Path(shutil.copytree(bundle, folder / bundle.name))
    file = copy / "run_profile.py"
    source = file.read_text(encoding="utf-8")
    assert source.count(_RUN) == 1, "the runner is another one"
    file.write_text(source.replace(_RUN, _SLOWER.format(share=share)), encoding="utf-8")
    manifest = read_manifest(copy / "manifest.json")
    info = FileInfo(sha256=sha256_file(file), size=file.stat().st_size)
    sealed = manifest.model_copy(update={"files": {**manifest.files, "run_profile.py": info}}).sealed()
    (copy / "manifest.json").write_text(sealed.text(), encoding="utf-8")
    return copy
