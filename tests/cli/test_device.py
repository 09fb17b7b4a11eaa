"""``edgeattn device``: a user's own devices."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from edgeattn.cli import cli
from edgeattn.profile import emulator
from tests.cli.test_help import HEAVY, probe

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def own(edgeattn_cli: Cli, tmp_path: Path) -> Cli:
    """The command line of a user who has no devices yet."""
    return lambda *words, **environ: edgeattn_cli(*words, cwd=tmp_path, EDGEATTN_HOME=str(tmp_path / "own"), **environ)


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.glob("own/devices/*"))


def test_a_device_is_added_listed_shown_and_removed(own: Cli, tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    words = (
        "--base",
        "raspberry-pi-4",
        "--identity",
        "key",
        "--folder",
        "/var/tmp",
        "--python",
        "~/edgeattn/bin/python",
    )
    done = own("device", "add", "shed", "ssh://pi@shed.local:2222", *words)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "own" / "devices" / "shed.toml") in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["next", "edgeattn", "device", "check", "shed"]
    (line,) = [line for line in own("devices").stdout.splitlines() if line.startswith("shed ")]
    assert "4 x Cortex-A72" in line
    assert line.rstrip().endswith("ssh://pi@shed.local:2222")
    shown = json.loads(own("devices", "show", "shed").stdout)
    assert (shown["cpu"], shown["base"], shown["folder"]) == ("Cortex-A72", "raspberry-pi-4", "/var/tmp")
    # The device is used from other folders too.
    assert shown["identity"] == str(tmp_path / "key")
    assert own("device", "remove", "shed").returncode == 0
    assert files(tmp_path) == []
    assert "shed" not in own("devices").stdout


def test_a_device_of_unknown_make(own: Cli) -> None:
    assert own("device", "add", "thing", "ssh://thing").returncode == 0
    shown = json.loads(own("devices", "show", "thing").stdout)
    assert (shown["kind"], shown["machine"], shown["targets"]) == ("board", "any", ["rpi", "tflite", "onnx"])
    assert shown["cpu"] is None


def test_a_second_device_of_the_name_needs_force(own: Cli) -> None:
    assert own("device", "add", "thing", "ssh://one").returncode == 0
    again = own("device", "add", "thing", "ssh://two")
    assert again.returncode == 2
    assert "there is a device of this name" in again.stderr
    assert "--force" in again.stderr
    assert json.loads(own("devices", "show", "thing").stdout)["connect"] == "ssh://one"
    assert own("device", "add", "thing", "ssh://two", "--force").returncode == 0
    assert json.loads(own("devices", "show", "thing").stdout)["connect"] == "ssh://two"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("thing", "http://host"), "must be ssh://user@host, qemu://cortex-a76 or local"),
        (("thing", "ssh://pi:s3cret@host"), "holds a password"),
        (("thing", "ssh://pi:s3c/ret@host"), "port"),
        (("thing", "qemu://cortex-a55"), "cortex-a53, cortex-a72, cortex-a76"),
        (("thing", "ssh://host", "--base", "raspbery-pi-5"), "did you mean 'raspberry-pi-5'?"),
        (("thing", "ssh://host", "--identity", "nowhere"), "does not exist"),
        (("../thing", "ssh://host"), "cannot have this name"),
        (("local", "ssh://host"), "it means this machine"),
    ],
)
def test_what_cannot_be_added(own: Cli, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = own("device", "add", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "s3c" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert files(tmp_path) == []


def test_a_shipped_device_is_not_removed(own: Cli) -> None:
    done = own("device", "remove", "raspberry-pi-5")
    assert done.returncode == 2
    assert "no such device of your own" in done.stderr
    assert "raspberry-pi-5 " in own("devices").stdout


def test_a_file_that_is_not_valid_is_listed_as_such(own: Cli, tmp_path: Path) -> None:
    (tmp_path / "own" / "devices").mkdir(parents=True)
    (tmp_path / "own" / "devices" / "bad.toml").write_text('name = "bad"\nbase = "bad"\n')
    done = own("devices")
    assert done.returncode == 0
    assert "not valid" in done.stdout
    assert "bad.toml: a device is its own base" in done.stdout


def test_the_list_fits_a_page(own: Cli) -> None:
    lines = own("devices").stdout.splitlines()
    assert max(map(len, lines)) <= 110
    # A line for each device: nothing is folded.
    assert [line.split()[0] for line in lines[1:]] == sorted({line.split()[0] for line in lines[1:]})


def test_check_this_machine(own: Cli) -> None:
    done = own("device", "check", "local")
    assert done.returncode == 0, done.stderr
    states = {
        line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if line.startswith(("numpy", "onnx"))
    }
    assert states == {"numpy": "there", "onnxruntime": "there"}
    found = {one["name"]: one for one in json.loads(own("device", "check", "host", "--json").stdout)["found"]}
    assert found["python"]["present"]
    assert found["python"]["fix"] is None


@pytest.mark.parametrize(
    ("hidden", "said"),
    [(("numpy",), "numpy"), (("onnxruntime", "ai-edge-litert", "tflite-runtime"), "onnxruntime, ai-edge-litert")],
    ids=["numpy", "runtimes"],
)
def test_check_says_how_to_get_what_is_lacking(own: Cli, tmp_path: Path, hidden: tuple[str, ...], said: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "version = m.version\n"
        "def hiding(name):\n"
        f"    if name in {hidden!r}:\n        raise m.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "m.version = hiding\n"
    )
    done = own("device", "check", "local", PYTHONPATH=str(tmp_path))
    assert done.returncode == 3
    assert said in done.stderr
    for name in hidden:
        assert f"to get {name} there:" in done.stdout
    # Whole, so that it can be copied.
    assert any(line.strip().endswith(f"pip install {hidden[0]}") for line in done.stdout.splitlines())
    as_json = own("device", "check", "local", "--json", PYTHONPATH=str(tmp_path))
    assert as_json.returncode == 3
    assert [one["name"] for one in json.loads(as_json.stdout)["found"] if one["name"] in hidden] == list(hidden)


def test_check_of_an_unknown_device(own: Cli) -> None:
    done = own("device", "check", "raspbery-pi-5")
    assert done.returncode == 2
    assert "did you mean 'raspberry-pi-5'?" in done.stderr


def test_setup_says_where_the_emulator_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(emulator, "setup", lambda say: say("fetching") or SimpleNamespace(folder=tmp_path))
    done = CliRunner().invoke(cli, ["device", "setup", "qemu"])
    assert done.exit_code == 0
    assert str(tmp_path) in done.output
    assert CliRunner().invoke(cli, ["device", "setup", "kvm"]).exit_code == 2


@pytest.mark.parametrize("name", ["add", "remove", "check", "setup"])
def test_help_is_light(name: str) -> None:
    run = probe(["device", name, "--help"])
    assert run["code"] == 0
    assert not HEAVY & set(run["modules"])
