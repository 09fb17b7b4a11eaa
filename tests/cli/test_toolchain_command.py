"""``edgeattn toolchain`` and what ``doctor`` says of toolchains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeattn import doctor, toolchains
from edgeattn.cli import main
from edgeattn.toolchains import KNOWN
from tests.cli.test_help import HEAVY, probe
from tests.toolchains import tiny


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tiny.prepare(tmp_path, monkeypatch, note="it does nothing")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command line."""
    code = 0
    try:
        main(list(arguments))
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def test_the_life_of_a_toolchain(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "own" / "toolchains" / "tiny"
    code, out, _ = run(capsys, "toolchain", "list")
    assert code == 0
    for words in ("modelopt", "polygraphy", "not added", "about 1 MB", "\n  edgeattn toolchain add tiny\n"):
        assert words in out

    code, out, _ = run(capsys, "toolchain", "add", "tiny")
    assert code == 0
    for words in ("edgeattn-tiny==1.0", "about 1 MB", "it does nothing", f"ready   {place}"):
        assert words in out

    code, out, _ = run(capsys, "toolchain", "add", "tiny")
    assert (code, out) == (0, f"there  tiny in {place}\n")

    code, out, _ = run(capsys, "toolchain", "list", "--json")
    row = next(row for row in json.loads(out) if row["name"] == "tiny")
    assert row["state"] == "installed"
    assert row["versions"] == {"edgeattn-tiny": "1.0"}
    assert row["folder"] == str(place)
    assert row["bytes"] > 1000
    out = run(capsys, "toolchain", "list")[1]
    assert "edgeattn-tiny 1.0" in out
    assert "toolchain add tiny" not in out

    assert run(capsys, "toolchain", "remove", "tiny")[:2] == (0, f"removed  {place}\n")
    assert not place.exists()
    assert run(capsys, "toolchain", "remove", "tiny")[:2] == (0, "nothing to remove: tiny is not added\n")


@pytest.mark.parametrize("verb", ["add", "remove"])
def test_an_unknown_name_is_a_usage_error(wheels: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, _, err = run(capsys, "toolchain", verb, "modelop")
    assert code == 2
    assert "did you mean 'modelopt'?" in err


def test_a_failing_pip_is_a_missing_toolchain(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(KNOWN, "tiny", tiny.toolchain(requirements=("edgeattn-tiny==9.9",)))
    code, _, err = run(capsys, "toolchain", "add", "tiny")
    assert code == 3
    assert "No matching distribution found for edgeattn-tiny==9.9" in err
    assert "nothing of it was kept" in err
    assert not (tmp_path / "own" / "toolchains" / "tiny").exists()


def test_what_a_killed_add_left_is_said(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own" / "toolchains" / "tiny").mkdir(parents=True)
    out = run(capsys, "toolchain", "list")[1]
    assert "tiny: an add of it was cut off; to make it anew:\n  edgeattn toolchain add tiny\n" in out
    code, out, _ = run(capsys, "toolchain", "add", "tiny")
    assert code == 0
    assert "anew    an add of it was cut off" in out


def found() -> doctor.Finding:
    return next(one for one in doctor.examine() if one.name == "toolchain tiny")


def test_doctor_shows_toolchains(wheels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found() == doctor.Finding("toolchain tiny", "tests", False, "not added", "edgeattn toolchain add tiny")
    toolchains.add("tiny", lambda text: None)
    assert found() == doctor.Finding("toolchain tiny", "tests", True, "edgeattn-tiny 1.0")
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "edgeattn toolchain add polygraphy" in out  # whole, on one line


def test_doctor_bears_an_environment_that_cannot_be_read(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> toolchains.State:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(toolchains, "installed", refuse)
    assert not found().found
    assert "Permission denied" in found().detail


def test_listing_imports_nothing_heavy() -> None:
    used = probe(["toolchain", "list"])
    assert used["code"] == 0
    assert not (HEAVY - {"pydantic", "rich"}) & set(used["modules"])
