"""The ssh transport against a real OpenSSH server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgeattn
from edgeattn import device
from edgeattn.bundle import Bundle
from edgeattn.core.errors import CheckFailed, DeviceUnreachable, ToolchainMissing, UsageError
from edgeattn.profile.transports import ssh
from edgeattn.profile.transports.ssh import Ssh
from tests.profile.sshd import Proxy, Sshd, free_port


def transport(server: Sshd, port: int | None = None, **options: str) -> Ssh:
    return Ssh(server.url.replace(str(server.port), str(port or server.port)), python=sys.executable, **options)


def test_a_bundle_travels_and_comes_back_with_a_profile(server: Sshd, digits: Bundle) -> None:
    said: list[str] = []
    answer = transport(server).run(digits.path, ["--verify"], said.append)
    assert answer["holds"]
    assert answer["worst_relative_l2"] <= 1e-5
    assert any("model.onnx" in line for line in said)
    answer = transport(server).run(digits.path, ["--profile", "--runs", "5"])
    assert answer["runs"] == len(answer["latencies"]) == 5
    assert 0 < answer["min"] <= answer["p50"] <= answer["p99"]
    assert server.left() == []


def test_the_command_line_goes_there(server: Sshd, digits: Bundle, edgeattn_cli) -> None:  # type: ignore[no-untyped-def]
    made = edgeattn_cli(
        "device", "add", "bench", server.url, "--python", sys.executable, EDGEATTN_HOME=str(server.folder)
    )
    assert made.returncode == 0, made.stderr
    words = {"EDGEATTN_HOME": str(server.folder)}
    done = edgeattn_cli("verify", digits.path, "--device", "bench", **words)
    assert done.returncode == 0, done.stderr
    assert "held" in done.stdout
    assert server.url in done.stdout
    checked = edgeattn_cli("device", "check", "bench", **words)
    assert checked.returncode == 0, checked.stderr
    assert "onnxruntime" in checked.stdout
    profiled = edgeattn_cli("profile", digits.path, "--device", "bench", "--runs", "3", **words)
    assert profiled.returncode == 0, profiled.stderr
    server.stop()
    gone = edgeattn_cli("verify", digits.path, "--device", "bench", **words)
    assert gone.returncode == 5
    assert "Traceback" not in gone.stderr


def test_an_export_for_a_device_puts_the_faster_in_front_there(
    server: Sshd, digits_tflite: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proxy = Proxy(server.port, [])
    server.trust(proxy.port)
    monkeypatch.setenv("EDGEATTN_HOME", str(tmp_path / "own"))
    url = server.url.replace(str(server.port), str(proxy.port))
    device.store("bench", {"base": "raspberry-pi-5", "connect": url, "description": "x", "python": sys.executable})
    bundle = edgeattn.export("fmvit-digits", device="bench", output=tmp_path)
    choice = bundle.manifest.choice
    assert choice is not None
    assert not choice["expected"]
    assert choice["measured_on"] == url
    assert {name: len(values) for name, values in choice["median_ms"].items()} == {"onnx": 3, "tflite": 3}
    medians = {name: sorted(values)[1] for name, values in choice["median_ms"].items()}
    assert bundle.manifest.backend == min(medians, key=lambda name: medians[name])
    # Six measurements, but the bundle travelled once.
    size = sum(p.stat().st_size for p in bundle.path.rglob("*") if p.is_file())
    assert size < sum(proxy.sent) < 1.5 * size
    assert server.left() == []
    server.stop()
    proxy.close()
    unasked = edgeattn.export("fmvit-digits", device="bench", output=tmp_path, force=True).manifest.choice
    assert unasked is not None
    assert unasked["expected"]
    assert "bench could not be asked" in unasked["why"]


@pytest.mark.parametrize("known", ["", None], ids=["empty file", "no file"])
def test_an_unknown_host_key(server: Sshd, digits: Bundle, known: str | None) -> None:
    (server.home / ".ssh" / "known_hosts").unlink()
    if known is not None:
        (server.home / ".ssh" / "known_hosts").write_text(known)
    with pytest.raises(DeviceUnreachable, match="not known") as caught:
        transport(server).run(digits.path, ["--verify"])
    assert "fingerprint" in str(caught.value.fix)
    assert server.left() == []


def test_a_changed_host_key(server: Sshd, digits: Bundle) -> None:
    other = Sshd(server.folder / "other")
    other.make()
    kind, key, *_ = (other.folder / "host.pub").read_text().split()
    (server.home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {kind} {key}\n")
    with pytest.raises(DeviceUnreachable, match="another host key"):
        transport(server).run(digits.path, ["--verify"])
    assert server.left() == []


def test_a_wrong_password(server: Sshd, digits: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    (server.folder / "authorized").write_text("")
    monkeypatch.setenv("EDGEATTN_SSH_PASSWORD", "wrong")
    with pytest.raises(DeviceUnreachable, match="does not let us in") as caught:
        transport(server).run(digits.path, ["--verify"])
    assert "password" in str(caught.value.why)
    assert "wrong" not in str(caught.value)
    assert server.left() == []


def test_nobody_listens_and_nobody_is_there(digits: Bundle) -> None:
    for host in (f"127.0.0.1:{free_port()}", "no-such-host.invalid"):
        with pytest.raises(DeviceUnreachable):
            Ssh(f"ssh://{host}").run(digits.path, ["--verify"])


def test_a_password_in_the_address_is_refused_and_not_shown() -> None:
    with pytest.raises(UsageError) as caught:
        Ssh("ssh://pi:secret@127.0.0.1")
    assert "secret" not in str(caught.value)


def test_a_cut_transfer_goes_on_where_it_was(server: Sshd, digits: Bundle) -> None:
    proxy = Proxy(server.port, [600_000])
    server.trust(proxy.port)
    answer = transport(server, proxy.port).run(digits.path, ["--verify"])
    assert answer["holds"]
    size = sum(p.stat().st_size for p in digits.path.rglob("*") if p.is_file())
    # Two links; the second one did not send again what the first one had brought.
    assert len(proxy.sent) == 3
    assert proxy.sent[1] > 500_000
    assert proxy.sent[2] < size - 300_000
    proxy.close()


def test_a_link_that_stays_dead_is_said_and_the_next_command_goes_on(server: Sshd, digits: Bundle) -> None:
    proxy = Proxy(server.port, [600_000, 0, 0, 0, 0])
    server.trust(proxy.port)
    with pytest.raises(DeviceUnreachable, match="cut"):
        transport(server, proxy.port).run(digits.path, ["--verify"])
    assert any(name.endswith("model.onnx") for name in server.left())  # to go on from, for some seconds
    again = Proxy(server.port, [])
    server.trust(again.port)
    assert transport(server, again.port).run(digits.path, ["--verify"])["holds"]
    assert again.sent[1] < proxy.sent[1] + 600_000
    assert server.left() == []
    for one in (proxy, again):
        one.close()


def clean_by_itself(server: Sshd) -> bool:
    """Whether the far side comes to hold nothing, with nobody asking."""
    deadline = time.monotonic() + 15
    while server.left() and time.monotonic() < deadline:
        time.sleep(0.1)
    return server.left() == []


def test_a_host_that_dies_half_way_leaves_nothing(
    server: Sshd, digits: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "GRACE_S", 1.0)

    def die(line: str) -> None:
        if "0.5 of" in line and server.process is not None:
            assert any(name.endswith("model.onnx") for name in server.left())
            server.stop()

    with pytest.raises(DeviceUnreachable, match="cut") as caught:
        transport(server).run(digits.path, ["--verify"], die)
    assert caught.value.exit_code == 5
    assert clean_by_itself(server)


def test_a_near_side_that_is_killed_leaves_nothing(
    server: Sshd, digits: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys, os\nfrom pathlib import Path\nfrom edgeattn.profile.transports import ssh\nssh.GRACE_S = 1.0\n"
        "ssh.Ssh(sys.argv[1], python=sys.executable).run(Path(sys.argv[2]), ['--verify'],"
        " lambda line: os.kill(os.getpid(), 9) if '0.5 of' in line else None)"
    )
    done = subprocess.run([sys.executable, "-c", code, server.url, str(digits.path)], capture_output=True, check=False)
    assert done.returncode == -9
    assert clean_by_itself(server)


def test_two_at_once_do_not_take_each_other_s_files(server: Sshd, digits: Bundle) -> None:
    answers: list[dict[str, object]] = []
    copying = threading.Event()

    def work() -> None:
        answers.append(transport(server).run(digits.path, ["--profile", "--runs", "20"], lambda line: copying.set()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    threads[0].start()
    assert copying.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert [answer["holds"] for answer in answers] == [True, True]
    assert clean_by_itself(server)


def test_a_login_script_that_greets_does_no_harm(server: Sshd, digits: Bundle, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "Welcome to the shed"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    far = Ssh(server.url, python=str(python))
    assert far.run(digits.path, ["--verify"])["holds"]
    assert far.check()
    assert server.left() == []


def test_the_far_side_cleans_up_when_the_host_dies_while_it_runs(server: Sshd, digits: Bundle) -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            transport(server).run(digits.path, ["--profile", "--runs", "100000000"])
        except DeviceUnreachable as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 30
    while not _runners(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    server.stop()
    thread.join(30)
    assert [type(error) for error in caught] == [DeviceUnreachable]
    deadline = time.monotonic() + 15
    while (_staged(server) or _runners(server)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _staged(server) == []
    assert _runners(server) == []


def _staged(server: Sshd) -> list[str]:
    return [name for name in server.left() if "run.py" in name or "model" in name]


def _runners(server: Sshd) -> list[str]:
    """Command lines of this server's far side; other tests may run beside."""
    shown = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return re.findall(rf"{re.escape(str(server.far))}\S*/run\.py --profile.*", shown)


@pytest.fixture
def small_disk(server: Sshd) -> Iterator[Path]:
    """A disk of 1 MB on the far side."""
    place = server.folder / "disk"
    place.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=False).returncode == 0
    )
    if not mounted:
        if os.environ.get("CI"):
            pytest.fail("no small disk can be mounted")
        pytest.skip("no small disk can be mounted here (not root)")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_seen_before_anything_is_sent(server: Sshd, small_disk: Path, digits: Bundle) -> None:
    with pytest.raises(UsageError, match="does not fit") as caught:
        transport(server, folder=str(small_disk)).run(digits.path, ["--verify"])
    assert "MB are needed" in str(caught.value)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_half_way(
    server: Sshd, small_disk: Path, digits: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = Ssh._free, []

    async def free(sftp: object, folder: str) -> int:
        asked.append(folder)
        return 1 << 40 if len(asked) == 1 else await real(sftp, folder)  # type: ignore[arg-type]

    monkeypatch.setattr(Ssh, "_free", staticmethod(free))
    with pytest.raises(UsageError, match="cannot be stored") as caught:
        transport(server, folder=str(small_disk)).run(digits.path, ["--verify"])
    assert "full" in str(caught.value.why)
    assert list(small_disk.iterdir()) == []


def test_a_far_side_without_numpy(server: Sshd, digits: Bundle) -> None:
    bare = server.folder / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    with pytest.raises(ToolchainMissing) as caught:
        Ssh(server.url, python=str(bare / "bin" / "python")).run(digits.path, ["--verify"])
    assert "numpy" in str(caught.value.fix)
    assert "venv" in str(caught.value.fix)
    assert server.left() == []


def test_a_far_side_without_python(server: Sshd, digits: Bundle) -> None:
    with pytest.raises(ToolchainMissing, match="no Python"):
        Ssh(server.url, python="/no/such/python").run(digits.path, ["--verify"])
    assert server.left() == []


def test_a_damaged_bundle_does_not_hold_there(server: Sshd, digits: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(digits.path, tmp_path / "copy"))
    (copy / "model.onnx").write_bytes(b"0" + (copy / "model.onnx").read_bytes()[1:])
    with pytest.raises(CheckFailed, match=r"model\.onnx was changed"):
        transport(server).run(copy, ["--verify"])
    assert server.left() == []


def test_check_says_what_is_there(server: Sshd) -> None:
    found = {one.name: one for one in transport(server).check()}
    assert found["python"].present
    assert found["numpy"].present
    assert found["disk"].present
    assert not found["tflite-runtime"].present
    assert "pip install" in str(found["tflite-runtime"].fix)
