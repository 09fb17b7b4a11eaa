"""``edgeattn gate``: what it prints, and its exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.planted import slower
from edgeattn.bundle import Bundle
from edgeattn.cli import main
from edgeattn.profile.record import Record, read, to_json
from tests.profile.test_gate_judge import measured

Printed = pytest.CaptureFixture[str]


def called(*words: str | Path) -> int:
    """The command line in this process; its exit code."""
    try:
        main(["gate", *map(str, words)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def file_of(path: Path, *records: Record) -> Path:
    path.write_text(to_json(records))
    return path


def test_records_of_one_file(tmp_path: Path, capsys: Printed) -> None:
    base, again, same, slow = (measured(ms, seed) for seed, ms in enumerate((5.0, 5.0, 5.0, 5.6)))
    assert called(file_of(tmp_path / "same.json", base, again, same)) == 0
    out = capsys.readouterr().out
    assert "pass" in out
    assert "self-check, base / base" in out
    assert "MACs" in out
    assert called(file_of(tmp_path / "slow.json", base, again, slow)) == 1
    assert "regress" in capsys.readouterr().out
    assert called(tmp_path / "slow.json", "--margin", "0.3", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["verdict"], data["margin"]) == ("pass", 0.3)
    assert data["ratio"]["rounds"] == 12


def test_records_of_two_files_and_of_other_sessions(tmp_path: Path, capsys: Printed) -> None:
    base, head = file_of(tmp_path / "a.json", measured()), file_of(tmp_path / "b.json", measured(5.01, 2))
    assert called(base, head) == 0
    assert "no self-check" in capsys.readouterr().out
    other = file_of(tmp_path / "c.json", measured(5.0, 2, session="s2", fingerprint="another", cpu="[red]M4"))
    assert called(base, other, "--inconclusive", "pass") == 1
    out = capsys.readouterr().out
    assert "refused" in out
    assert "different machines" in out
    assert "[red]M4" in out


def test_inconclusive_has_a_policy_of_its_own(tmp_path: Path, capsys: Printed) -> None:
    file = file_of(tmp_path / "r.json", measured(), measured(5.0, 1), measured(5.25, 2))
    words = (file, "--margin", "0.05")
    assert called(*words) == 0
    shown = capsys.readouterr()
    assert "inconclusive" in shown.out
    assert "measure again" in shown.out
    assert "warning: inconclusive" in shown.err
    assert called(*words, "--inconclusive", "fail") == 1


def test_what_cannot_be_told_apart_is_a_usage_error(tmp_path: Path, digits: Bundle, capsys: Printed) -> None:
    base = measured()
    one = file_of(tmp_path / "one.json", base)
    assert called(one) == 2
    assert "one record" in capsys.readouterr().err
    several = file_of(tmp_path / "several.json", base, measured(4.0, 1, threads=2), measured(5.0, 2))
    assert called(several) == 2
    assert "BASE BASE HEAD" in capsys.readouterr().err
    assert called(one, several) == 2
    assert called(digits.path, one) == 2
    assert called(digits.path) == 2
    assert called(tmp_path / "nothing", digits.path) == 2
    assert called(several, "--margin", "0") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_bundles_are_measured(digits: Bundle, tmp_path: Path, capsys: Printed) -> None:
    copy = Path(shutil.copytree(digits.path, tmp_path / "copy" / digits.path.name))
    assert called(digits.path, copy) == 0
    assert "same bytes" in capsys.readouterr().out
    other, file = slower(digits.path, tmp_path, 1.0), tmp_path / "records.json"
    code = called(digits.path, other, "--rounds", "2", "--json", "--output", file)
    data = json.loads(capsys.readouterr().out)
    assert data["verdict"] in ("regress", "inconclusive")  # of two rounds
    assert code == (data["verdict"] == "regress")
    assert data["ratio"]["value"] > 1.5
    assert "instructions" in data["proxies"]
    assert [r.subject.digest for r in read(file)] == [data[name]["digest"] for name in ("base", "again", "head")]
    assert called(file, "--json") == code
    again = json.loads(capsys.readouterr().out)
    assert (again["ratio"], again["verdict"]) == (data["ratio"], data["verdict"])
    (copy / "run.py").write_text("")
    assert called(digits.path, copy) == 1
    assert "refused" in capsys.readouterr().out
