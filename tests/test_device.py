"""Device files: the schema, devices based on others, and a user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeattn import device
from edgeattn.core import schema
from edgeattn.core.errors import UsageError
from edgeattn.device import Device

PHONE = 'name = "p"\ndescription = "a phone"\nkind = "phone"\nmachine = "arm64"\ntargets = ["coreml"]\n'
GOOD = 'name = "d"\ndescription = "a device"\nkind = "board"\nmachine = "aarch64"\ntargets = ["onnx"]\n'
GPU = GOOD.replace('["onnx"]', '["tensorrt", "onnx"]')
BOARD = {"description": "mine", "kind": "board", "machine": "any", "targets": ["tflite", "onnx"]}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a user who has no devices yet."""
    monkeypatch.setenv("EDGEATTN_HOME", str(tmp_path / "own"))
    (tmp_path / "own" / "devices").mkdir(parents=True)
    return tmp_path / "own" / "devices"


def load(tmp_path: Path, text: str) -> Device:
    (tmp_path / "d.toml").write_text(text)
    return device.resolve(str(tmp_path / "d.toml"))


def test_a_file(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD + "cores = 4\nclock_ghz = 2\n")
    assert (found.cores, found.clock_ghz, found.targets, found.memory_gb) == (4, 2.0, ("onnx",), None)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (GOOD + "core = 4", "core: unknown key; did you mean 'cores'?"),
        (GOOD + "cores = 0", "cores: given 0;"),
        (GOOD + "clock_ghz = -1.0", "clock_ghz: given -1.0;"),
        (GOOD.replace('"board"', '"bord"'), "kind: given 'bord';"),
        (GOOD.replace('["onnx"]', "[]"), "targets: given"),
        (GOOD.replace('machine = "aarch64"\n', ""), "machine: missing"),
        (GOOD + "os_bits = 32", "os_bits: given 32; programs for aarch64 are 64-bit ones"),
        (GOOD + "bandwidth_gb_s = 5.0", "bandwidth_gb_s and bandwidth_kind go together"),
        (GOOD + 'bandwidth_kind = "measured"', "bandwidth_gb_s and bandwidth_kind go together"),
        (GOOD + 'bandwidth_gb_s = 5.0\nbandwidth_kind = "guessed"', "bandwidth_kind: given 'guessed';"),
        (GOOD + 'emulate = "cortex-a55"', "emulate: given 'cortex-a55';"),
        (GOOD + '[runtimes]\ntflite = "ai-edge-litert"', "tflite is not among the targets, onnx"),
        (GOOD + 'base = ["host"]', "base: given ['host'];"),
        (GOOD.replace("aarch64", "arm64") + "os_bits = 32", "os_bits: given 32; programs for arm64 are 64-bit ones"),
        (GOOD + 'deployment_target = "iOS18"', "is of target coreml, which is not among the targets, onnx"),
        (GOOD + "int8_activations = false", "is of target coreml, which is not among the targets, onnx"),
        (PHONE + 'deployment_target = "iOS14"', "deployment_target: given 'iOS14';"),
        (PHONE + 'deployment_target = "macOS15"', "deployment_target: given 'macOS15'; a phone does not run it"),
        (PHONE.replace("phone", "laptop") + 'deployment_target = "iOS18"', "given 'iOS18'; a laptop does not run it"),
        (PHONE + 'int8_activations = "yes"', "int8_activations: given 'yes';"),
        (GOOD + 'compute_capability = "8.6"', "is of target tensorrt, which is not among the targets, onnx"),
        (GOOD + 'flavour = "rtx"', "flavour: given 'rtx'; is of target tensorrt, which is not among the targets, onnx"),
        (GOOD + "peak = {fp32 = 1.0}", "a peak needs peak_unit and peak_kind"),
        (GPU + 'compute_capability = "8.6"', "compute_capability and flavour go together"),
        (GPU + 'flavour = "rtx"', "flavour: given 'rtx'; compute_capability and flavour go together"),
        (GPU + 'flavour = "lite"', "flavour: given 'lite';"),
        (GPU + "peak = {int8 = 1.0}", "int8 is not a precision of peaks, which are fp32, fp16, fp8, w8a8"),
        (GPU + "peak = {fp32 = 1.0, fp16 = 0}", "fp16 must be a number above 0"),
        (GPU + "peak = {fp8 = -1.0}", "fp8 must be a number above 0"),
        (GPU + "peak = {w8a8 = inf}", "w8a8 must be a number above 0"),
        (GPU + "peak = {w8a8 = nan}", "w8a8 must be a number above 0"),
        (GPU + 'peak = {fp16 = "65"}', "peak.fp16: given '65';"),
        (GPU + "peak = 65.0", "peak: given 65.0;"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text)
    assert word in str(caught.value)
    assert caught.value.where == str(tmp_path / "d.toml")


@pytest.mark.parametrize("url", ["local", "ssh://host", "ssh://pi@10.0.0.2:2222", "ssh://pi@[fe80::1]:22/"])
def test_addresses(url: str) -> None:
    device.check_url(url)


@pytest.mark.parametrize("cpu", device.EMULATED)
def test_every_emulated_cpu_is_an_address_and_a_stand_in(tmp_path: Path, cpu: str) -> None:
    device.check_url(f"qemu://{cpu}")
    assert load(tmp_path, GOOD + f'emulate = "{cpu}"').emulate == cpu


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("http://host", "must be ssh://"),
        ("host", "must be ssh://"),
        ("", "must be ssh://"),
        ("ssh://", "must be ssh://user@host"),
        ("ssh://-oProxyCommand=x", "must be ssh://user@host"),
        ("ssh://host/folder", "nothing after it"),
        ("ssh://host?x=1", "nothing after it"),
        ("ssh://ho st", "must be ssh://user@host"),
        ("ssh://host:99999", "port"),
        ("ssh://host:0", "must be ssh://user@host"),
        ("ssh://[host", "a host that is none"),
        ("qemu://cortex-a55", "cortex-a53, cortex-a72, cortex-a76"),
        ("qemu://pi@cortex-a76", "cortex-a53, cortex-a72, cortex-a76"),
        ("ssh://pi:s3cret@host", "holds a password"),
        ("ssh://pi:@host", "holds a password"),
        ("ssh://pi:s3c/ret@host", "port"),
        ("ssh://pi:s3c#ret@host", "port"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_and_not_repeated(tmp_path: Path, url: str, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, GOOD + f'connect = "{url}"')
    assert word in str(caught.value.why)
    assert caught.value.where == f"{tmp_path / 'd.toml'}, connect"
    assert "s3c" not in str(caught.value)


@pytest.mark.parametrize(("kind", "system"), [("phone", "iOS15"), ("tablet", "iOS26"), ("laptop", "macOS12")])
def test_a_system_that_packages_are_made_for(tmp_path: Path, kind: str, system: str) -> None:
    text = PHONE.replace('"phone"', f'"{kind}"')
    found = load(tmp_path, text + f'deployment_target = "{system}"\nint8_activations = true\nchip = "Apple A17 Pro"\n')
    assert (found.deployment_target, found.int8_activations, found.chip) == (system, True, "Apple A17 Pro")
    assert load(tmp_path, text).int8_activations is load(tmp_path, text).deployment_target is None


@pytest.mark.parametrize("flavour", ["rtx", "full"])
def test_a_gpu_of_tensorrt(tmp_path: Path, flavour: str) -> None:
    text = GPU + f'compute_capability = "12.0"\nflavour = "{flavour}"\n'
    found = load(tmp_path, text + "[peak]\nfp32 = 1\nfp16 = 2.5\nfp8 = 5.0\nw8a8 = 5.0\n")
    assert (found.compute_capability, found.flavour) == ("12.0", flavour)
    assert found.peak == {"fp32": 1.0, "fp16": 2.5, "fp8": 5.0, "w8a8": 5.0}
    assert load(tmp_path, text).peak == {}
    assert load(tmp_path, GPU).compute_capability is load(tmp_path, GPU).flavour is None


@pytest.mark.parametrize("capability", ["8", "8.", ".6", "8.67", "sm_86", "86", "8.6 ", "8,6", "\u0668.\u0666", ""])
def test_a_compute_capability_is_two_numbers(tmp_path: Path, capability: str) -> None:
    with pytest.raises(UsageError, match="must be two numbers with a point between") as caught:
        load(tmp_path, GPU + f'compute_capability = "{capability}"\nflavour = "rtx"\n')
    assert not caught.value.details, "one mistake is one error"


def test_an_unknown_name_gives_the_closest() -> None:
    with pytest.raises(UsageError, match="did you mean 'host'"):
        device.resolve("hots")


def test_a_base_gives_what_a_device_does_not_say(own: Path) -> None:
    (own / "low.toml").write_text(
        GOOD.replace('"d"', '"low"').replace('["onnx"]', '["onnx", "tflite"]')
        + 'cores = 4\nextensions = ["asimd"]\nsources = ["cores: a book"]\nemulate = "cortex-a72"\n'
        '[runtimes]\nonnx = "onnxruntime"\ntflite = "ai-edge-litert"\n'
    )
    (own / "mid.toml").write_text('name = "mid"\nbase = "low"\ncores = 2\nsources = ["cores: another"]\n')
    (own / "top.toml").write_text(
        'name = "top"\nbase = "mid"\ntargets = ["tflite"]\nemulate = ""\n[runtimes]\ntflite = "tflite-runtime"\n'
    )
    top = device.resolve("top")
    assert (top.name, top.base, top.cores, top.extensions, top.emulate) == ("top", "mid", 2, ("asimd",), "")
    assert top.runtimes == {"tflite": "tflite-runtime"}
    assert top.sources == ("cores: a book", "cores: another")


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"d": "raspbery-pi-5"}, "did you mean 'raspberry-pi-5'?"),
        ({"d": "d"}, "d -> d"),
        ({"d": "e", "e": "d"}, "d -> e -> d"),
        ({"d": "e", "e": "f", "f": "e"}, "d -> e -> f -> e"),
    ],
)
def test_a_base_that_cannot_be(own: Path, files: dict[str, str], word: str) -> None:
    for name, base in files.items():
        (own / f"{name}.toml").write_text(f'name = "{name}"\nbase = "{base}"\n')
    with pytest.raises(UsageError) as caught:
        device.resolve("d")
    assert word in str(caught.value)
    assert str(caught.value.where).endswith(".toml, base")


def test_a_mistake_in_a_base_names_the_bases_file(own: Path) -> None:
    (own / "low.toml").write_text(GOOD + "cores = 0")
    (own / "d.toml").write_text('name = "d"\nbase = "low"\n')
    with pytest.raises(UsageError) as caught:
        device.resolve("d")
    assert caught.value.where == str(own / "low.toml")


def test_a_name_is_never_inherited(own: Path) -> None:
    (own / "d.toml").write_text('base = "raspberry-pi-5"\n')
    with pytest.raises(UsageError, match="name: missing"):
        device.resolve("d")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SMALL = st.floats(min_value=1e-9, max_value=1e20)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "chip": TEXT,
    "cpu": TEXT,
    "cores": st.integers(1, 10**6),
    "clock_ghz": SMALL,
    "memory_gb": SMALL,
    "extensions": st.lists(TEXT, max_size=4),
    "sources": st.lists(TEXT, max_size=4),
    "runtimes": st.dictionaries(st.sampled_from(["onnx", "tflite"]), TEXT),
    "wheels": st.dictionaries(TEXT, TEXT, max_size=4),
    "connect": st.sampled_from(["local", "ssh://pi@host:22", "qemu://cortex-a53"]),
    "folder": TEXT,
    "identity": TEXT,
}
OWN_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def loose(value: object) -> object:
    """A tuple as the list that it is in a file."""
    return list(value) if isinstance(value, tuple) else value


@OWN_FOLDER
@given(fields=st.fixed_dictionaries({}, optional=FIELDS))
def test_what_is_stored_is_what_is_loaded(own: Path, fields: dict[str, Any]) -> None:
    path = device.store("mine", {**BOARD, **fields}, force=True)
    assert path == own / "mine.toml"
    found = device.resolve("mine").model_dump(exclude_unset=True)
    assert {key: loose(value) for key, value in found.items()} == {"name": "mine", **BOARD, **fields}


@OWN_FOLDER
@given(low=st.fixed_dictionaries({}, optional=FIELDS), high=st.fixed_dictionaries({}, optional=FIELDS))
def test_own_fields_win_and_the_base_fills_in(own: Path, low: dict[str, Any], high: dict[str, Any]) -> None:
    device.store("low", {**BOARD, **low}, force=True)
    device.store("high", {"base": "low", **high}, force=True)
    found = device.resolve("high").model_dump(exclude_unset=True)
    wanted = {**BOARD, **low, **high, "name": "high", "base": "low"}
    if "sources" in wanted:
        wanted["sources"] = [*low.get("sources", []), *high.get("sources", [])]
    assert {key: loose(value) for key, value in found.items()} == wanted


def test_a_peak_is_stored_and_comes_from_the_base(own: Path) -> None:
    fields = {**BOARD, "targets": ["tensorrt"], "compute_capability": "8.7", "flavour": "full", "peak": {"fp16": 17.0}}
    device.store("low", fields)
    device.store("mine", {"base": "low", "peak": {"w8a8": 33.0}})
    found = device.resolve("mine")
    assert device.resolve("low").peak == {"fp16": 17.0}
    assert (found.compute_capability, found.flavour, found.peak) == ("8.7", "full", {"w8a8": 33.0})


def test_a_device_is_not_replaced_unless_forced(own: Path) -> None:
    device.store("mine", BOARD)
    before = (own / "mine.toml").read_bytes()
    with pytest.raises(UsageError, match="there is a device of this name"):
        device.store("mine", {**BOARD, "cores": 2})
    assert (own / "mine.toml").read_bytes() == before
    device.store("mine", {**BOARD, "cores": 2}, force=True)
    assert device.resolve("mine").cores == 2


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a b", "x.toml", "host", "local", "ü", "a\n"])
def test_names_that_cannot_be(own: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot have this name"):
        device.store(name, BOARD)
    assert list(own.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({**BOARD, "cores": 0}, "cores: given 0"),
        ({**BOARD, "connect": "ssh://pi:s3cret@host"}, "holds a password"),
        ({"base": "raspbery-pi-5"}, "did you mean 'raspberry-pi-5'?"),
        ({"base": "mine"}, "mine -> mine"),
        ({**BOARD, "folder": "\udcff"}, "must be text"),
    ],
)
def test_nothing_is_stored_of_a_device_that_is_not_valid(own: Path, fields: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError) as caught:
        device.store("mine", fields)
    assert word in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert list(own.iterdir()) == []


def test_a_device_of_ones_own_is_forgotten_and_a_shipped_one_stays(own: Path) -> None:
    with pytest.raises(UsageError, match="you have none"):
        device.forget("raspberry-pi-5")
    device.store("mine", BOARD)
    with pytest.raises(UsageError, match="yours are mine"):
        device.forget("../devices/mine")
    device.forget("mine")
    assert "mine" not in schema.find("devices")
    assert "raspberry-pi-5" in schema.find("devices")
