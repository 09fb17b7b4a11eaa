"""What runs on the far side, without a link: a folder is made, guarded, and goes with everything above that it made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edgeattn.profile.transports import far


def stage(root: Path, said: str, **options: Any) -> list[dict[str, Any]]:
    """Play the guard with ``said`` as all that comes over the link; its answers."""
    given = {"root": str(root), "own": False, "digest": "a" * 32, "token": "t", "stale_s": 1e9, "grace_s": 0.0}
    words = [sys.executable, far.__file__, "stage", json.dumps(given | options)]
    done = subprocess.run(words, input=said, capture_output=True, text=True, check=True, timeout=30)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_everything_that_was_made_goes(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    first, last = stage(root, "running\nclean\n")
    assert first == {"root": str(root), "folder": str(root / ("a" * 32))}
    assert last == {"gone": True}
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    stage(tmp_path, "clean\n", own=True)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    (tmp_path / "theirs").rmdir()
    stage(tmp_path, "clean\n")
    assert tmp_path.is_dir()
    stage(tmp_path, "clean\n", own=True)
    assert not tmp_path.exists()


def test_it_waits_for_a_new_link_unless_it_runs(tmp_path: Path) -> None:
    for said, waits in (("", True), ("running\n", False), ("clean\n", False)):
        begun = time.monotonic()
        stage(tmp_path / "root", said, grace_s=3.0)
        assert (time.monotonic() - begun >= 3.0) == waits
        assert list(tmp_path.iterdir()) == []


def test_a_later_link_takes_the_folder_over(tmp_path: Path) -> None:
    root = tmp_path / "root"
    given = {"root": str(root), "own": False, "digest": "a" * 32, "stale_s": 1e9, "grace_s": 0.0}
    words = [sys.executable, far.__file__, "stage"]
    links = []
    for token in ("first", "second"):
        command = [*words, json.dumps({**given, "token": token})]
        links.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert links[-1].stdout is not None
        assert "folder" in json.loads(links[-1].stdout.readline())
    links[0].communicate("clean\n", timeout=10)
    assert (root / ("a" * 32)).is_dir()
    links[1].communicate("clean\n", timeout=10)
    assert list(tmp_path.iterdir()) == []  # also what the first one had made


def test_only_old_bundles_of_our_own_are_removed(tmp_path: Path) -> None:
    for name, marked, age in (("b" * 32, True, 100), ("c" * 32, True, 0), ("d" * 32, False, 100)):
        (tmp_path / name).mkdir()
        if marked:
            (tmp_path / name / far.MARK).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    stage(tmp_path, "clean\n", stale_s=50.0)
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["c", "d"]


def test_a_place_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (answer,) = stage(tmp_path / "file" / "root", "clean\n")
    assert "file" in answer["error"]
    assert (tmp_path / "file").is_file()


def test_engines_are_kept_where_the_rest_of_a_cache_goes_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    words = [sys.executable, far.__file__, "run", json.dumps({"folder": str(tmp_path), "words": []})]
    environ = {**os.environ, "XDG_CACHE_HOME": "/somewhere"}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True) as process:
        assert process.stdout is not None
        given = json.loads(json.loads(process.stdout.readline())["out"])
    assert given["EDGEATTN_ENGINES"] == os.path.join("/somewhere", "edgeattn", "engines")
    assert given["XDG_CACHE_HOME"] == str(tmp_path / "cache")
