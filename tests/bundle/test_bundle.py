import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeattn.bundle import Bundle
from edgeattn.bundle.manifest import SCHEMA_VERSION, Manifest, read_manifest
from edgeattn.core.errors import CheckFailed, UsageError
from edgeattn.core.hashing import sha256_data

relaxed = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def check(path) -> None:
    """What ``verify`` does before it computes anything."""
    bundle = Bundle.open(path)
    bundle.check_files()
    bundle.artifact()


def test_a_bundle_verifies(tiny):
    bundle = Bundle.open(str(tiny.path))
    verified = bundle.verify()
    assert verified.files == 8
    assert sorted(bundle.manifest.files) == [
        "README.md", "golden/main-000.npz", "golden/main-001.npz", "model.onnx", "run.py", "run_inputs.py",
        "run_profile.py", "run_state.py",
    ]  # fmt: skip
    assert verified.worst.relative_l2 == 0.0
    assert sorted(verified.numerics) == ["golden/main-000.npz", "golden/main-001.npz"]
    outputs = bundle.run({"x": np.full((2, 2), 3, np.float32), "ids": np.array([4, 5])})
    assert outputs["y"].tolist() == [[6, 6], [6, 6]]
    assert outputs["n"].tolist() == [5, 6]


def test_the_manifest_reads_back(tiny):
    assert read_manifest(tiny.path / "manifest.json") == tiny.manifest
    data = json.loads((tiny.path / "manifest.json").read_text(encoding="utf-8"))
    assert data.pop("digest") == sha256_data(data)
    assert tiny.manifest.sealed() == tiny.manifest


@relaxed
@given(st.data())
def test_one_changed_byte_anywhere_is_detected(tiny, copy, data):
    path = copy / data.draw(st.sampled_from([*sorted(tiny.manifest.files), *["manifest.json"] * 5]))
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[position] ^= data.draw(st.integers(1, 255) | st.sampled_from([1 << i for i in range(8)]))
    path.write_bytes(changed)
    try:
        with pytest.raises((CheckFailed, UsageError)):
            check(copy)
    finally:
        path.write_bytes(whole)


@relaxed
@given(st.data())
def test_a_cut_or_longer_file_is_detected(tiny, copy, data):
    path = copy / data.draw(st.sampled_from([*sorted(tiny.manifest.files), "manifest.json"]))
    whole = path.read_bytes()
    path.write_bytes(data.draw(st.sampled_from([whole[: data.draw(st.integers(0, len(whole) - 1))], whole + b"\n"])))
    try:
        with pytest.raises((CheckFailed, UsageError)):
            check(copy)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"tolerance": 1e-05', '"tolerance": 1e905'), ('"tolerance": 1e-05', '"tolerance": NaN'), ('"ü"', '"\\ud800"')],
)
def test_what_json_reads_but_no_manifest_holds(copy, old, new):
    text = (copy / "manifest.json").read_text(encoding="utf-8")
    assert old in text
    (copy / "manifest.json").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(CheckFailed):
        check(copy)


def test_every_missing_and_changed_file_is_listed(copy):
    (copy / "run.py").unlink()
    (copy / "README.md").write_text("other")
    with pytest.raises(CheckFailed) as caught:
        Bundle.open(copy).verify()
    assert caught.value.exit_code == 1
    assert [line.split(":")[0] for line in caught.value.details] == ["README.md", "run.py"]


def reseal(path, **changes) -> None:
    """What somebody does who changes a manifest and knows how it is sealed."""
    data = json.loads((path / "manifest.json").read_text(encoding="utf-8")) | changes
    data["digest"] = sha256_data({k: v for k, v in data.items() if k != "digest"})
    (path / "manifest.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def test_a_newer_schema_is_a_usage_error(copy):
    reseal(copy, schema_version=SCHEMA_VERSION + 1, unheard_of=1)
    with pytest.raises(UsageError, match="newer EdgeAttn") as caught:
        Bundle.open(copy)
    assert caught.value.exit_code == 2
    assert "upgrade" in str(caught.value.fix)


@pytest.mark.parametrize("changes", [{"unheard_of": 1}, {"tolerance": "big"}, {"files": []}, {"schema_version": "1"}])
def test_a_manifest_of_another_form(copy, changes):
    reseal(copy, **changes)
    with pytest.raises(CheckFailed):
        Bundle.open(copy)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "golden/../../outside", "link", "golden/../../copy2/x"]
)
@pytest.mark.parametrize("place", ["files", "entries"])
def test_names_that_leave_the_bundle(copy, tiny, name, place):
    (copy.parent / "outside").write_text("secret")
    (copy / "link").symlink_to(copy.parent / "outside")
    data = tiny.manifest.model_dump(mode="json")
    if place == "files":
        data["files"][name] = data["files"]["run.py"]
    else:
        data["entries"]["main"]["file"] = name
    reseal(copy, **{place: data[place]})
    with pytest.raises(UsageError, match="leaves its folder"):
        Bundle.open(copy).verify()


@pytest.mark.parametrize("content", ["", "[]", "7", "null", "{}", '{"schema_version": null}', "{", "\x00"])
def test_a_file_that_is_no_manifest(copy, content):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(CheckFailed, match="damaged"):
        Bundle.open(copy)


def test_what_is_no_bundle(tmp_path, copy):
    for path, word in [
        (tmp_path / "none", "no such folder"),
        (copy / "golden", "no manifest.json"),
        (tmp_path, "did you mean"),
    ]:
        with pytest.raises(UsageError) as caught:
            Bundle.open(path)
        assert word in str(caught.value)


def test_numbers_that_do_not_hold(tmp_path, make_bundle):
    bundle = make_bundle(tmp_path, off=0.1)
    with pytest.raises(CheckFailed, match="numbers do not hold") as caught:
        bundle.verify()
    assert len(caught.value.details) == 2
    assert all(" y: relative L2" in line for line in caught.value.details)


def test_no_golden_samples_prove_nothing(copy, tiny):
    shutil.rmtree(copy / "golden")
    reseal(copy, files={k: v.model_dump() for k, v in tiny.manifest.files.items() if "golden" not in k})
    with pytest.raises(CheckFailed, match="no golden"):
        Bundle.open(copy).verify()


def test_a_pickle_among_the_golden_files_is_not_loaded(copy, tiny):
    import hashlib

    np.savez(copy / "golden/main-000.npz", **{"in.x": np.array([{}], dtype=object)})
    files = {k: v.model_dump() for k, v in tiny.manifest.files.items()}
    data = (copy / "golden/main-000.npz").read_bytes()
    files["golden/main-000.npz"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    reseal(copy, files=files)
    with pytest.raises(CheckFailed, match="cannot be read"):
        Bundle.open(copy).verify()


def test_an_export_that_fails_half_way_leaves_no_bundle(tmp_path, make_bundle, monkeypatch):
    monkeypatch.setattr(Manifest, "text", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_bundle(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["work"]
