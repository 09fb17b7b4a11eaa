"""The shipped device files: what they claim has a source."""

from __future__ import annotations

import re

import pytest

from edgeattn import device
from edgeattn.core import schema
from edgeattn.core.errors import UsageError
from edgeattn.pipeline.export import make_job

SHIPPED = sorted(path.stem for path in schema.folders("devices")[-1].glob("*.toml"))
BOARDS = [name for name in SHIPPED if name.startswith("raspberry-pi-")]
#: Chip, and whether its Neural Engine is faster with int8 activations.
APPLE = {
    "iphone-12-pro": ("Apple A14 Bionic", False),
    "iphone-13": ("Apple A15 Bionic", False),
    "iphone-15-pro": ("Apple A17 Pro", True),
    "iphone-16-pro": ("Apple A18 Pro", True),
    "ipad-m4": ("Apple M4", True),
    "macbook-m1": ("Apple M1", False),
    "macbook-m3": ("Apple M3", False),
}
#: Trillion operations a second of the Neural Engine, as Apple says.
NEURAL = {
    "iphone-12-pro": 11.0,
    "iphone-13": 15.8,
    "iphone-15-pro": 35.0,
    "iphone-16-pro": 35.0,
    "ipad-m4": 38.0,
    "macbook-m1": 11.0,
    "macbook-m3": 18.0,
}
#: Phones that run TFLite: number, clock in GHz and fp32 operations a clock of each kind of big core.
PHONES = {
    "pixel-8": ((1, 2.914, 32), (4, 2.367, 16)),
    "galaxy-s24-ultra": ((1, 3.39, 32), (3, 3.15, 16), (2, 2.96, 16)),
}
#: Machines of no maker, each with the figures of a named one: its instruction set.
GENERIC = {"x86-64-avx2": "x86_64", "x86-64-avx512": "x86_64", "aarch64-neoverse-n1": "aarch64"}
#: Operations that a core does a clock, by precision.
OPERATIONS = {
    "Cortex-A53": {"fp32": 8},
    "Cortex-A72": {"fp32": 8},
    "Cortex-A76": {"fp32": 16, "fp16": 32, "w8a8": 64},
    "Neoverse N1": {"fp32": 16, "fp16": 32, "w8a8": 64},
    "Ryzen 7 5700X": {"fp32": 32},
    "Xeon 8275CL": {"fp32": 64, "w8a8": 256},
}
#: Compute capability, flavour of TensorRT, memory.
NVIDIA = {
    "jetson-orin-nano": ("8.7", "full", 8),
    "jetson-orin-nx": ("8.7", "full", 16),
    "jetson-agx-orin": ("8.7", "full", 64),
    "t4": ("7.5", "rtx", 16),
    "a10": ("8.6", "rtx", 24),
    "l4": ("8.9", "rtx", 24),
    "rtx-4090": ("8.9", "rtx", 24),
    "rtx-5090": ("12.0", "rtx", 32),
    "h200": ("9.0", "rtx", 141),
}
#: Frames a second, rows and columns of the planes.
OPTICAL = {
    "optical-4f-4k-2mhz": (2e6, 2160, 2160),
    "optical-4f-lcos-60hz": (60, 2160, 2160),
    "optical-4f-lcos-1khz": (1000, 1024, 1024),
    "optical-4f-dmd-20khz": (20000, 768, 1024),
}
#: Peaks that NVIDIA prints with sparsity: the first number is theirs.
SPARSE = {
    ("jetson-orin-nano", "w8a8"): 67,
    ("jetson-agx-orin", "fp16"): 85,
    ("jetson-agx-orin", "w8a8"): 170,
    ("l4", "fp16"): 242,
    ("l4", "fp8"): 485,
    ("l4", "w8a8"): 485,
    ("h200", "fp16"): 1979,
    ("h200", "fp8"): 3958,
    ("h200", "w8a8"): 3958,
}
#: What a file says of the hardware; each needs a source that names it.
FIGURES = ("chip", "cpu", "cores", "clock_ghz", "memory_gb", "bandwidth_gb_s", "extensions", "peak", "optics")
#: And of the system.
SYSTEM = ("deployment_target", "int8_activations")
#: And of TensorRT.
TENSORRT = ("compute_capability", "flavour")


def test_the_boards_of_the_raspberry_pi_and_the_other_devices_are_there() -> None:
    models = [f"raspberry-pi-{model}" for model in ("zero-2w", "3b", "4", "5")]
    assert {*models, *(f"{model}-32bit" for model in models)} == set(BOARDS)
    assert {*BOARDS, *APPLE, *PHONES, *GENERIC, *NVIDIA, *OPTICAL, "host"} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_file_is_valid_under_its_name(name: str) -> None:
    assert device.resolve(name).name == name


@pytest.mark.parametrize("name", [*BOARDS, *APPLE, *PHONES, *GENERIC, *NVIDIA, *OPTICAL])
def test_every_figure_has_a_source(name: str) -> None:
    found = device.resolve(name)
    named: set[str] = set()
    for source in found.sources:
        match = re.fullmatch(r"(?P<figures>[a-z0-9_, ]+?)(?P<when> under a 32-bit system)?: https://\S+: .+", source)
        assert match, source
        named |= {figure + (match["when"] or "") for figure in match["figures"].split(", ")}
    under = " under a 32-bit system" if found.os_bits == 32 else ""
    stated = {figure for figure in FIGURES if getattr(found, figure)}
    stated |= {figure for figure in (*SYSTEM, *TENSORRT) if getattr(found, figure) is not None}
    wanted = {figure + (under if figure == "extensions" else "") for figure in stated}
    assert wanted <= named <= wanted | {"extensions"}, "a source for each figure, a figure for each source"
    least = {"cpu", "cores", "clock_ghz", "bandwidth_gb_s"}
    if name in BOARDS:
        least |= {"memory_gb", "peak"}
    elif name in APPLE:
        least = {"chip", "cores", "memory_gb", "peak", *SYSTEM}
    elif name in PHONES:
        least = {"chip", "cpu", "cores", "clock_ghz", "memory_gb", "peak"}
    elif name in GENERIC:
        least |= {"extensions", "peak"}
    elif name in NVIDIA:
        least = {"chip", "bandwidth_gb_s", "memory_gb", "peak", *TENSORRT} | (least if found.kind == "board" else set())
    assert ({"optics"} if name in OPTICAL else least) <= stated


@pytest.mark.parametrize("name", sorted({*SHIPPED} - {*OPTICAL, "host"}))
def test_a_device_has_what_a_roofline_needs_or_says_what_was_not_found(name: str) -> None:
    found = device.resolve(name)
    assert found.peak
    assert None not in (found.peak_unit, found.peak_kind)
    text = (schema.folders("devices")[-1] / f"{name}.toml").read_text(encoding="utf-8")
    assert ("\n# No bandwidth_gb_s: " in text) == (found.bandwidth_gb_s is None)


@pytest.mark.parametrize("name", [*BOARDS, *GENERIC])
def test_the_peak_of_a_cpu_is_cores_times_clock_times_operations(name: str) -> None:
    found = device.resolve(name)
    assert (found.peak_unit, found.peak_kind) == ("cpu", "computed")
    every = (found.cores or 0) * (found.clock_ghz or 0) / 1000
    assert found.peak == pytest.approx({key: every * ops for key, ops in OPERATIONS[str(found.cpu)].items()}, rel=1e-4)


@pytest.mark.parametrize("name", PHONES)
def test_the_peak_of_a_phone_is_that_of_its_big_cores(name: str) -> None:
    found = device.resolve(name)
    assert (found.peak_unit, found.peak_kind) == ("cpu", "computed")
    single = sum(cores * clock * ops for cores, clock, ops in PHONES[name]) / 1000
    # No w8a8: what the biggest core does there was not found.
    assert found.peak == pytest.approx({"fp32": single, "fp16": 2 * single}, rel=3e-4)
    assert found.clock_ghz == max(clock for _, clock, _ in PHONES[name])
    assert (found.cores or 0) > sum(cores for cores, _, _ in PHONES[name]), "the little cores are not counted"


@pytest.mark.parametrize("name", APPLE)
def test_the_peak_of_an_apple_device_is_its_neural_engines(name: str) -> None:
    found = device.resolve(name)
    assert (found.peak_unit, found.peak_kind) == ("npu", "documented")
    assert found.peak == {"fp16": NEURAL[name]}


@pytest.mark.parametrize("name", PHONES)
def test_another_phone_runs_tflite_alone(name: str) -> None:
    found = device.resolve(name)
    assert (found.kind, found.machine, found.os_bits, found.targets) == ("phone", "aarch64", 64, ("tflite",))
    assert make_job("fmvit-digits", device=name, check_tools=False).target == "tflite"


@pytest.mark.parametrize("name", GENERIC)
def test_a_generic_machine_names_the_one_its_figures_are_of_and_is_not_this_one(name: str) -> None:
    found = device.resolve(name)
    assert found.kind != "host"
    assert (found.machine, found.os_bits, found.targets) == (GENERIC[name], 64, ("onnx", "tflite"))
    assert "figures of a" in found.description.lower()
    assert ("avx512_vnni" in found.extensions) == (name == "x86-64-avx512")
    assert make_job("fmvit-digits", device=name, check_tools=False).target == "onnx"


@pytest.mark.parametrize("name", [name for name in BOARDS if not name.endswith("-32bit")])
def test_a_64_bit_system_runs_both_and_is_emulated(name: str) -> None:
    found = device.resolve(name)
    assert (found.machine, found.os_bits, found.targets) == ("aarch64", 64, ("rpi", "tflite", "onnx"))
    assert found.runtimes == {"onnx": "onnxruntime", "tflite": "ai-edge-litert"}
    assert set(found.runtimes.values()) <= set(found.wheels)
    assert found.emulate == str(found.cpu).lower()
    assert "asimd" in found.extensions


def test_only_the_raspberry_pi_5_has_dot_product_and_half_precision() -> None:
    for extension in ("asimddp", "asimdhp", "fphp"):
        assert [name for name in BOARDS if extension in device.resolve(name).extensions] == ["raspberry-pi-5"]


@pytest.mark.parametrize("name", [name for name in BOARDS if name.endswith("-32bit")])
def test_a_32_bit_system_has_tflite_runtime_and_nothing_else(name: str) -> None:
    found, board = device.resolve(name), device.resolve(name.removesuffix("-32bit"))
    assert (found.machine, found.os_bits, found.targets) == ("armv7l", 32, ("tflite",))
    assert found.runtimes == {"tflite": "tflite-runtime"}
    assert not {"onnxruntime", "ai-edge-litert"} & set(found.wheels)
    assert found.emulate == ""
    figures = ("cpu", "cores", "clock_ghz", "memory_gb", "bandwidth_gb_s", "peak")
    same = (*figures, "bandwidth_kind", "peak_unit", "peak_kind")
    assert [getattr(found, key) for key in same] == [getattr(board, key) for key in same]


@pytest.mark.parametrize("name", APPLE)
def test_an_apple_device_runs_core_ml_alone(name: str) -> None:
    found = device.resolve(name)
    assert (found.machine, found.os_bits, found.targets) == ("arm64", 64, ("coreml",))
    assert found.runtimes == {"coreml": "coremltools"}
    assert (found.chip, found.int8_activations) == APPLE[name]
    assert found.kind == {"iphone": "phone", "ipad": "tablet", "macbook": "laptop"}[name.partition("-")[0]]
    assert found.deployment_target == ("macOS15" if found.kind == "laptop" else "iOS18")
    assert make_job("fmvit-digits", device=name, check_tools=False).target == "coreml"


@pytest.mark.parametrize("name", NVIDIA)
def test_an_nvidia_device_says_what_tensorrt_needs_to_know(name: str) -> None:
    found = device.resolve(name)
    assert (found.compute_capability, found.flavour, found.memory_gb) == NVIDIA[name]
    assert found.targets == ("tensorrt", "onnx")
    jetson = name.startswith("jetson-")
    # TensorRT for RTX is for x86-64 alone.
    assert (found.kind, found.machine) == (("board", "aarch64") if jetson else ("gpu", "x86_64"))
    assert (found.flavour == "full") == jetson
    assert found.bandwidth_kind in ("documented", "computed"), "nothing was measured"
    assert found.emulate == ""


@pytest.mark.parametrize("name", NVIDIA)
def test_peaks_are_dense_and_grow_as_numbers_shrink(name: str) -> None:
    found = device.resolve(name)
    # FP8 is in the Tensor Cores from 8.9 on.
    eight = tuple(map(int, str(found.compute_capability).split("."))) >= (8, 9)
    assert set(found.peak) == {"fp32", "fp16", "w8a8", *(["fp8"] if eight else [])}
    assert found.peak["fp32"] < found.peak["fp16"] < found.peak["w8a8"] == found.peak.get("fp8", found.peak["w8a8"])
    # Tensor Cores do twice as many operations on half as many bits; NVIDIA rounds.
    assert found.peak["w8a8"] == pytest.approx(2 * found.peak["fp16"], rel=0.04)
    for (which, precision), sparse in SPARSE.items():
        if which == name:
            assert found.peak[precision] == pytest.approx(sparse / 2, rel=0.02)


@pytest.mark.parametrize("name", OPTICAL)
def test_an_optical_device_says_its_rate_and_planes_and_how_it_tells_signs(name: str) -> None:
    found = device.resolve(name)
    assert found.optics is not None
    assert (found.optics.frame_rate_hz, found.optics.rows, found.optics.cols) == OPTICAL[name]
    assert (found.kind, found.targets) == ("optical", ("optical",))
    assert found.optics.effects.sign != "field", "a camera sees no sign"
    literature = name == "optical-4f-4k-2mhz"
    assert found.optics.effects.detects != literature
    assert ("literature assumes" in found.description) == literature


@pytest.mark.parametrize("target", ["onnx", "rpi"])
def test_a_32_bit_system_refuses_what_it_cannot_run(target: str) -> None:
    with pytest.raises(UsageError, match="does not run this target") as caught:
        make_job("fmvit-digits", target=target, device="raspberry-pi-5-32bit")
    assert caught.value.why == "it runs tflite"
