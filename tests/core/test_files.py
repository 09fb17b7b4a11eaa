import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.core import files
from edgeattn.core.errors import UsageError
from edgeattn.core.files import check_writable, clear_leftovers, inside, scratch_folder, whole_folder, write_whole


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def fill(folder: Path, text: str) -> None:
    (folder / "golden").mkdir()
    (folder / "a").write_text(text)
    (folder / "golden/b").write_text(text)


def fail_half_way(folder: Path) -> None:
    fill(folder, "new")
    raise KeyError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_complete(tmp_path):
    final = tmp_path / "new/deep/out"
    with whole_folder(final) as folder:
        fill(folder, "1")
        assert not final.exists()
        assert folder.parent == final.parent
    assert names(final) == ["a", "golden"]
    assert names(final.parent) == ["out"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), whole_folder(tmp_path / "out") as folder:
        fail_half_way(folder)
    assert names(tmp_path) == []


def test_an_existing_folder_stands_unless_replaced(tmp_path):
    for text, replace, expected in [("1", False, "1"), ("2", False, "1"), ("3", True, "3")]:
        with whole_folder(tmp_path / "out", replace=replace) as folder:
            fill(folder, text)
        assert (tmp_path / "out/golden/b").read_text() == expected
    assert names(tmp_path) == ["out"]


def test_an_error_while_replacing_keeps_the_old(tmp_path):
    with whole_folder(tmp_path / "out") as folder:
        fill(folder, "old")
    with pytest.raises(KeyError), whole_folder(tmp_path / "out", replace=True) as folder:
        fail_half_way(folder)
    assert (tmp_path / "out/a").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_failed_rename_puts_the_old_back(tmp_path, monkeypatch):
    with whole_folder(tmp_path / "out") as folder:
        fill(folder, "old")
    rename = Path.rename

    def fail(self, target):
        if ".tmp-" in self.name:
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="the disk"), whole_folder(tmp_path / "out", replace=True) as folder:
        fill(folder, "new")
    assert (tmp_path / "out/a").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("what", ["file", "broken link"])
def test_a_file_in_the_place_is_a_usage_error_and_stays(tmp_path, what, replace):
    final = tmp_path / "out"
    if what == "file":
        final.write_text("mine")
    else:
        final.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="cannot be written"), whole_folder(final, replace=replace) as folder:
        fill(folder, "1")
    assert os.path.lexists(final)
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_a_usage_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UsageError, match="--output"):
            check_writable(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_a_parent_that_is_a_file_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError) as caught:
        check_writable(tmp_path / "file")
    assert "--output" in str(caught.value)
    assert str(tmp_path / "file") in str(caught.value)


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path)
    assert names(tmp_path) == []


def write_and_hang(final: Path, replace: bool, started) -> None:
    if replace:  # dies between setting the old one aside and putting the new one in its place
        files.move_into = lambda *_: (started.set(), time.sleep(60))
    with whole_folder(final, replace=replace) as folder:
        fill(folder, "half")
        if not replace:
            started.set()
            time.sleep(60)


@pytest.mark.parametrize("replace", [False, True])
def test_killed_half_way(tmp_path, replace):
    final = tmp_path / "out"
    if replace:
        with whole_folder(final) as folder:
            fill(folder, "old")
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=write_and_hang, args=(final, replace, started))
    process.start()
    assert started.wait(20)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not final.exists()
    assert len(names(tmp_path)) == (2 if replace else 1)
    clear_leftovers(tmp_path)
    assert names(tmp_path) == (["out"] if replace else [])
    if replace:
        assert (final / "golden/b").read_text() == "old"
    with whole_folder(final, replace=True) as folder:
        fill(folder, "new")
    assert names(tmp_path) == ["out"]


def test_leftovers_of_the_dead_go_and_of_the_living_stay(tmp_path):
    dead, mine = dead_pid(), os.getpid()
    (tmp_path / f".a.tmp-{dead}-00000000").mkdir()
    (tmp_path / f".f.tmp-{dead}-00000000").write_text("half a file")
    (tmp_path / f".a.tmp-{mine}-00000001").mkdir()
    (tmp_path / f".b.old-{mine}-00000001").mkdir()
    (tmp_path / f".a.tmp-{10**30}-00000000").mkdir()  # no process can have this number
    keep = [".a.tmp", ".a.tmp-1", f".a.tmp-{dead}-0000000g", f"a.tmp-{dead}-00000000", "a"]
    for name in keep:
        (tmp_path / name).write_text("")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*keep, f".a.tmp-{mine}-00000001", f".b.old-{mine}-00000001"])


def test_what_the_dead_had_set_aside_comes_back_only_where_nothing_is(tmp_path):
    dead = dead_pid()
    for name in ("gone", "there"):
        (tmp_path / f".{name}.old-{dead}-00000000").mkdir()
        (tmp_path / f".{name}.old-{dead}-00000000/content").write_text("old")
    (tmp_path / "there").mkdir()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["gone", "there"]
    assert names(tmp_path / "gone") == ["content"]
    assert names(tmp_path / "there") == []


def test_clearing_follows_no_link(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious").write_text("")
    (tmp_path / f".a.tmp-{dead_pid()}-00000000").symlink_to(tmp_path / "mine")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == ["precious"]


def test_clearing_a_folder_that_is_not_there(tmp_path):
    clear_leftovers(tmp_path / "none")


@pytest.mark.parametrize("replace", [False, True])
def test_writers_race_and_one_whole_folder_wins(tmp_path, replace):
    final, errors = tmp_path / "out", []

    def write(text: str) -> None:
        try:
            for _ in range(12):
                with whole_folder(final, replace=replace) as folder:
                    fill(folder, text)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert (final / "a").read_text() == (final / "golden/b").read_text()
    assert names(final) == ["a", "golden"]
    assert names(tmp_path) == ["out"]


def test_scratch_folders_are_apart_and_cleared_after_death(tmp_path):
    first, second = scratch_folder(tmp_path / "s"), scratch_folder(tmp_path / "s")
    assert first != second
    code = "import sys, pathlib; from edgeattn.core.files import *; scratch_folder(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, tmp_path / "s"], check=True)
    assert len(names(tmp_path / "s")) == 3
    scratch_folder(tmp_path / "s")
    assert len(names(tmp_path / "s")) == 3


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "deep/file"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_whole(path, b"newer")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("name", ["a", "golden/main-000.npz", "a/../b", "..a", "a b/ü"])
def test_names_inside(tmp_path, name):
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "..", "link/a", "filelink", "a\0b"])
def test_names_that_leave_the_folder(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "secret").write_text("")
    (root / "link").symlink_to(tmp_path / "out")
    (root / "filelink").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError) as caught:
        inside(root, name)
    assert caught.value.exit_code == 2


@given(st.lists(st.sampled_from(["..", ".", "a", "b", "", "\0", "/"]), min_size=1, max_size=6).map("/".join))
def test_no_name_gets_out(name):
    root = Path("/nonexistent/root")
    try:
        path = inside(root, name)
    except UsageError:
        return
    assert path.resolve().is_relative_to(root)
