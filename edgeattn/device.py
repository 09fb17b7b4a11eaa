"""Devices: where a model runs. One TOML file each, with the source of every figure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator, model_validator

from edgeattn.core import schema
from edgeattn.core.errors import UsageError, unknown
from edgeattn.core.files import write_whole

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

#: CPUs that the emulator stands for.
EMULATED = ("cortex-a53", "cortex-a72", "cortex-a76")
#: Names that mean this machine wherever a device is named.
_TAKEN = ("host", "local")
_OS_BITS = {"armv7l": 32, "aarch64": 64, "arm64": 64}
#: What a Core ML package can be made for. A model for one of them does not load on an older system.
Deployment = Literal[
    "iOS15", "iOS16", "iOS17", "iOS18", "iOS26", "macOS12", "macOS13", "macOS14", "macOS15", "macOS26"
]  # fmt: skip
#: Precisions that a device's peak is stated for.
PEAKS = ("fp32", "fp16", "fp8", "w8a8")

#: How a camera, which sees intensity alone, is made to tell the sign of a field: parts of the input and of the kernel
#: that are shown on their own, by scheme. ``field`` is no camera: the field itself, with its sign.
SIGNS: dict[str, tuple[int, int]] = {
    "field": (1, 1),
    "reference": (1, 1),
    "offset": (1, 2),
    "kernel_split": (1, 2),
    "full_split": (2, 2),
}


class Effects(schema.Strict):
    """What a 4f correlator does to numbers, beside convolving them. Every switch is off until it is given.

    Attributes:
        sign: see ``SIGNS``. ``reference`` adds a coherent field as strong as the largest output; ``offset`` lifts the
            input above zero; ``kernel_split`` shows positive and negative kernels one after the other, and the input's
            parts too where it has a sign; ``full_split`` always shows both parts of both.
        input_amplitude_bits, mask_amplitude_bits, mask_phase_bits: levels of the two modulators. input_phase_bits: the
            input needs phases of 0 and pi alone; with these levels it also evens out its own pixels, to half a level.
        mask: what of the complex mask the modulator can show. mask_norm: whether the mask is scaled by its own largest
            amplitude (``peak``), or by the sum of the kernels' amplitudes, which it can never exceed (``sum``).
        input_fill_factor, mask_fill_factor: share of a pixel's area that modulates; 1 has the envelope of a full pixel.
        full_well_e: electrons of a saturated pixel, which bring the noise of their number. read_noise_e: standard
            deviation in electrons. adc_bits: of the camera. exposure: the brightest wanted pixel, as a share of full
            scale; above 1 it saturates.
        mask_shift_px: of the mask, down and right, in mask pixels. camera_shift_px: of the camera, in its pixels.
            rotation_deg: of the camera about the axis. defocus_waves: quadratic phase at the edge of the mask.
        laser_drift: standard deviation of the power from frame to frame, as a share of it.
        seed: of all that is random.
    """

    sign: Literal["field", "reference", "offset", "kernel_split", "full_split"] = "field"
    input_amplitude_bits: int | None = Field(default=None, ge=1, le=16)
    input_phase_bits: int | None = Field(default=None, ge=1, le=16)
    mask_amplitude_bits: int | None = Field(default=None, ge=1, le=16)
    mask_phase_bits: int | None = Field(default=None, ge=1, le=16)
    mask: Literal["complex", "phase", "amplitude"] = "complex"
    mask_norm: Literal["peak", "sum"] = "peak"
    input_fill_factor: float | None = Field(default=None, gt=0, le=1)
    mask_fill_factor: float | None = Field(default=None, gt=0, le=1)
    full_well_e: float | None = Field(default=None, ge=1, le=1e9)
    read_noise_e: float | None = Field(default=None, ge=0, le=1e9)
    adc_bits: int | None = Field(default=None, ge=1, le=16)
    exposure: float = Field(default=1.0, gt=0, le=100)
    mask_shift_px: tuple[float, float] | None = None
    camera_shift_px: tuple[float, float] | None = None
    rotation_deg: float | None = Field(default=None, ge=-180, le=180)
    defocus_waves: float | None = Field(default=None, ge=-100, le=100)
    laser_drift: float | None = Field(default=None, ge=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("mask_shift_px", "camera_shift_px", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("mask_shift_px", "camera_shift_px")
    @classmethod
    def _finite(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not all(abs(shift) <= 1e5 for shift in value):
            raise ValueError("must be two numbers of pixels, down and right")
        return value

    @model_validator(mode="after")
    def _camera(self) -> Effects:
        if self.sign == "field" and (self.detects or self.exposure != 1.0):
            known = ", ".join(name for name in SIGNS if name != "field")
            raise ValueError(f"a camera sees no sign: give sign, one of {known}")
        if self.read_noise_e is not None and self.full_well_e is None:
            raise ValueError("read_noise_e is in electrons, of which full_well_e says how many there are")
        return self

    @property
    def detects(self) -> bool:
        """Whether a camera with limits of its own is modelled."""
        return not (self.full_well_e is None and self.adc_bits is None and self.laser_drift is None)

    @property
    def of_field(self) -> bool:
        """Whether the field itself is another one, before any camera."""
        return self.of_plane or self.input_amplitude_bits is not None or self.input_phase_bits is not None

    @property
    def of_plane(self) -> bool:
        """Whether numbers depend on where on the planes they are shown, so that whole planes have to be computed."""
        given = (self.mask_amplitude_bits, self.mask_phase_bits, self.input_fill_factor, self.mask_fill_factor)
        moved = (self.mask_shift_px, self.camera_shift_px, self.rotation_deg, self.defocus_waves)
        return self.mask != "complex" or any(value is not None for value in (*given, *moved))


class Optics(schema.Strict):
    """A 4f correlator: its planes, its rates and energies, and its effects.

    Attributes:
        rows, cols: pixels of the input plane, of the mask and of the camera.
        wavelength_nm, pitch_um: of the light, and of the pixels of both modulators; they give the focal length.
        frame_rate_hz: frames a second: an input is shown, and the camera exposed. mask_rate_hz: masks a second, where
            they are not written while a frame is shown anyway. readout_px_s: pixels a second that leave the camera.
        electronics_ops_s: multiply-accumulates, or elementwise operations, of what is not optical.
        repeats: frames that one pass takes, for figures that count more than one.
        static_w: power of laser, modulators and camera while they run. input_pj_px, mask_pj_px, readout_pj_px: energy
            of a pixel that is written or read. electronics_pj_op: of an electronic operation.
        effects: see ``Effects``.
    """

    rows: int = Field(ge=2, le=16384)
    cols: int = Field(ge=2, le=16384)
    wavelength_nm: float | None = Field(default=None, gt=0, le=1e5)
    pitch_um: float | None = Field(default=None, gt=0, le=1e4)
    frame_rate_hz: float = Field(gt=0, le=1e12)
    mask_rate_hz: float | None = Field(default=None, gt=0, le=1e12)
    readout_px_s: float | None = Field(default=None, gt=0, le=1e18)
    electronics_ops_s: float | None = Field(default=None, gt=0, le=1e18)
    repeats: int = Field(default=1, ge=1, le=1000)
    static_w: float | None = Field(default=None, ge=0, le=1e6)
    input_pj_px: float | None = Field(default=None, ge=0, le=1e9)
    mask_pj_px: float | None = Field(default=None, ge=0, le=1e9)
    readout_pj_px: float | None = Field(default=None, ge=0, le=1e9)
    electronics_pj_op: float | None = Field(default=None, ge=0, le=1e9)
    effects: Effects = Field(default_factory=Effects)

    @property
    def focal_mm(self) -> float | None:
        """Focal length at which a pixel of the mask is a frequency of the input: columns * pitch^2 / wavelength."""
        if self.wavelength_nm is None or self.pitch_um is None:
            return None
        return self.cols * self.pitch_um**2 / self.wavelength_nm


def check_url(url: str) -> None:
    """Look at an address of a device.

    Raises:
        ValueError: another scheme than ssh and qemu, a password inside, no host. Never repeats the address.
    """
    if url == "local":
        return
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        # What follows a colon may be a password with a '/' or '#' in it.
        raise ValueError("has a port that is no number from 1 to 65535, or a host that is none") from None
    if parts.scheme not in ("ssh", "qemu"):
        raise ValueError("must be ssh://user@host, qemu://cortex-a76 or local")
    if parts.scheme == "qemu":
        if url.removeprefix("qemu://") not in EMULATED:
            raise ValueError(f"must be qemu:// and one of {', '.join(EMULATED)}")
        return
    if parts.password is not None:
        raise ValueError("holds a password, which files and histories keep; use a key, or EDGEATTN_SSH_PASSWORD")
    clean = not (parts.path.strip("/") or parts.query or parts.fragment)
    if not parts.hostname or parts.hostname.startswith("-") or port == 0 or not clean or re.search(r"\s", url):
        raise ValueError("must be ssh://user@host:port, with nothing after it")


class Device(schema.Strict):
    """A device and what is documented of it.

    Attributes:
        base: another device, whose fields are this one's where it has none of its own. A list or table takes the
            place of the base's, as a 32-bit system lacks runtimes that the board has otherwise; sources are added.
        kind: what sort of machine it is.
        machine: instruction set that its programs are built for, as ``platform.machine()`` names it; "any" if unknown.
        os_bits: whether its system is a 32-bit or a 64-bit one, whatever its kernel.
        targets: which targets can run there, best first.
        chip: the system on a chip, where what a target can do depends on more of it than its CPU.
        cpu: the cores' name. cores: their number. clock_ghz: their highest clock. memory_gb: RAM; for a
            kind "gpu" the GPU's own.
        bandwidth_gb_s: of that memory. bandwidth_kind: whether that is documented, measured, or computed from the
            memory's data rate and width.
        extensions: instruction set extensions that the kernels can use.
        sources: where the figures come from.
        runtimes: the distribution that runs a target there, by target.
        wheels: versions of distributions that are known to exist for it.
        deployment_target: the system that Core ML packages are made for, where nothing else is asked for.
        int8_activations: whether Core ML computes faster there where weights and activations are int8 ones.
        compute_capability: what NVIDIA calls the features of the GPU, such as "8.6".
        flavour: which TensorRT runs there: "rtx" is TensorRT for RTX, whose engines are built on any x86-64 Linux,
            no GPU needed; "full" is TensorRT 10 or 11 of JetPack and of servers, whose engines are built on the device.
        peak: the most arithmetic of ``peak_unit``, by precision (fp32, fp16, fp8, w8a8), in TFLOPS, for w8a8 in TOPS;
            a multiply-accumulate is two. Dense, and of a GPU with the fastest accumulation, fp32 without TF32, and
            without accelerators beside it. A bound that no model reaches, and not whether a target can use it.
        peak_unit: what computes so much: the CPU's cores, of a phone the big ones alone; the GPU; or a neural engine.
        peak_kind: whether that is documented, or computed: cores times clock times operations a clock, which a document
            or somebody's benchmark tells.
        optics: of a 4f correlator, see ``Optics``.
        connect: its address. emulate: the emulated CPU that can stand for it in verifying numbers.
        identity, known_hosts: files for ssh, where they are not the usual ones.
        folder: where bundles are put on it while they run. python: its Python, where that is not ``python3``.
    """

    name: str
    base: str | None = None
    description: str
    kind: Literal["host", "board", "phone", "tablet", "laptop", "server", "gpu", "optical"]
    machine: str
    os_bits: Literal[32, 64] | None = None
    targets: tuple[str, ...] = Field(min_length=1)
    chip: str | None = None
    cpu: str | None = None
    cores: int | None = Field(default=None, ge=1)
    clock_ghz: float | None = Field(default=None, gt=0)
    memory_gb: float | None = Field(default=None, gt=0)
    bandwidth_gb_s: float | None = Field(default=None, gt=0)
    bandwidth_kind: Literal["documented", "measured", "computed"] | None = Field(default=None, validate_default=True)
    extensions: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    runtimes: dict[str, str] = Field(default_factory=dict)
    wheels: dict[str, str] = Field(default_factory=dict)
    deployment_target: Deployment | None = None
    int8_activations: bool | None = None
    compute_capability: str | None = None
    flavour: Literal["rtx", "full"] | None = Field(default=None, validate_default=True)
    peak: dict[str, float] = Field(default_factory=dict)
    peak_unit: Literal["cpu", "gpu", "npu"] | None = Field(default=None, validate_default=True)
    peak_kind: Literal["documented", "computed"] | None = Field(default=None, validate_default=True)
    optics: Optics | None = Field(default=None, validate_default=True)
    connect: str | None = None
    emulate: Literal["", "cortex-a53", "cortex-a72", "cortex-a76"] = ""
    identity: str | None = None
    known_hosts: str | None = None
    folder: str | None = None
    python: str | None = None

    @field_validator("os_bits")
    @classmethod
    def _fits_machine(cls, value: int | None, info: ValidationInfo) -> int | None:
        machine = info.data.get("machine", "")
        if value != _OS_BITS.get(machine, value):
            raise ValueError(f"programs for {machine} are {_OS_BITS[machine]}-bit ones")
        return value

    @field_validator("bandwidth_kind")
    @classmethod
    def _with_bandwidth(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (value is None) != (info.data.get("bandwidth_gb_s") is None):
            raise ValueError("bandwidth_gb_s and bandwidth_kind go together")
        return value

    @field_validator("deployment_target", "int8_activations")
    @classmethod
    def _of_coreml(cls, value: str | bool | None, info: ValidationInfo) -> str | bool | None:
        targets = info.data.get("targets", ("coreml",))
        if value is not None and "coreml" not in targets:
            raise ValueError(f"is of target coreml, which is not among the targets, {', '.join(targets)}")
        handheld = info.data.get("kind") in ("phone", "tablet")
        if isinstance(value, str) and value.startswith("macOS") == handheld:
            raise ValueError(f"a {info.data.get('kind')} does not run it")
        return value

    @field_validator("compute_capability", "flavour")
    @classmethod
    def _of_tensorrt(cls, value: str | None, info: ValidationInfo) -> str | None:
        targets = info.data.get("targets", ("tensorrt",))
        if value and "tensorrt" not in targets:
            raise ValueError(f"is of target tensorrt, which is not among the targets, {', '.join(targets)}")
        return value

    @field_validator("compute_capability")
    @classmethod
    def _two_numbers(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[0-9]+\.[0-9]", value):
            raise ValueError("must be two numbers with a point between, such as 8.6 or 12.0")
        return value

    @field_validator("flavour")
    @classmethod
    def _with_capability(cls, value: str | None, info: ValidationInfo) -> str | None:
        # One that is not valid is not in the data, and has an error of its own.
        if (value is None) != (info.data.get("compute_capability", value) is None):
            raise ValueError("compute_capability and flavour go together")
        return value

    @field_validator("peak")
    @classmethod
    def _of_precisions(cls, value: dict[str, float]) -> dict[str, float]:
        if other := [name for name in value if name not in PEAKS]:
            raise ValueError(f"{', '.join(other)} is not a precision of peaks, which are {', '.join(PEAKS)}")
        if wrong := [name for name, peak in value.items() if not 0 < peak < math.inf]:
            raise ValueError(f"{', '.join(wrong)} must be a number above 0")
        return value

    @field_validator("peak_unit", "peak_kind")
    @classmethod
    def _with_peak(cls, value: str | None, info: ValidationInfo) -> str | None:
        peak = info.data.get("peak")
        if value is not None and not peak:
            raise ValueError("there is no peak that it is of")
        if value is None and peak and "tensorrt" not in info.data.get("targets", ("tensorrt",)):
            raise ValueError("a peak needs peak_unit and peak_kind, unless it is the GPU's of target tensorrt")
        return value

    @field_validator("optics")
    @classmethod
    def _of_optical(cls, value: Optics | None, info: ValidationInfo) -> Optics | None:
        targets = info.data.get("targets")  # absent where it is wrong itself
        if targets is not None and value is not None and "optical" not in targets:
            raise ValueError(f"is of target optical, which is not among the targets, {', '.join(targets)}")
        if targets is not None and value is None and "optical" in targets:
            raise ValueError("target optical needs a table [optics] with rows, cols and frame_rate_hz")
        return value

    @field_validator("runtimes")
    @classmethod
    def _of_targets(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        targets = info.data.get("targets", tuple(value))
        if other := [name for name in value if name not in targets]:
            raise ValueError(f"{', '.join(other)} is not among the targets, {', '.join(targets)}")
        return value


def _device(data: Mapping[str, Any], source: str, seen: tuple[str, ...]) -> Device:
    """``data`` over the fields of its base.

    Args:
        source: where ``data`` is from, for errors.
        seen: the names that led here, the device's own first.
    """
    base = data.get("base")
    if isinstance(base, str):
        known = schema.find("devices")
        where = f"{source}, base"
        if base in seen:
            chain = " -> ".join((*seen, base))
            raise UsageError("a device is its own base", value=chain, where=where, fix="choose another base or name")
        if base not in known:
            raise unknown("device", base, known, where=where)
        below = _device(schema.read_toml(known[base]), str(known[base]), (*seen, base))
        data = {**below.model_dump(exclude_unset=True, exclude={"name"}), **data}
        if isinstance(data.get("sources"), list):
            data["sources"] = [*below.sources, *data["sources"]]
    if isinstance(url := data.get("connect"), str):
        try:
            check_url(url)
        except ValueError as error:
            # Here and not in the schema, whose errors repeat the value: it may hold a password.
            raise UsageError("an address cannot be used", where=f"{source}, connect", why=f"it {error}") from None
    return schema.validate(Device, data, source)


def load(path: Path) -> Device:
    """Read a device file and its bases.

    Raises:
        UsageError: not readable, not TOML, not a valid device, or a base that is unknown or its own.
    """
    return _device(schema.read_toml(path), str(path), (path.stem,))


def resolve(text: str) -> Device:
    """The device of that name, or in that .toml file.

    Raises:
        UsageError: unknown, with the closest name.
    """
    if text.endswith(".toml"):
        return load(Path(text))
    known = schema.find("devices")
    if text not in known:
        raise unknown("device", text, known)
    return load(known[text])


def _toml(value: Any) -> str:
    """A text, a number, a list or a table as a TOML value."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    # A JSON text or number is one of TOML too, but for the one control character that JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def store(name: str, fields: Mapping[str, Any], *, force: bool = False) -> Path:
    """Write a device of the user's; returns its file.

    Args:
        fields: of a ``Device``, without ``name``; None is left out.
        force: replace one of that name.

    Raises:
        UsageError: the name cannot be a file's, there is one already, or the fields are not a device's.
    """
    if not _NAME.fullmatch(name) or name.endswith(".toml") or name in _TAKEN:
        why = "it means this machine" if name in _TAKEN else "use letters, digits, '.', '_' and '-', and no .toml"
        raise UsageError("a device cannot have this name", value=repr(name), why=why, fix="choose another name")
    path = schema.folders("devices")[0] / f"{name}.toml"
    if path.exists() and not force:
        raise UsageError("there is a device of this name", value=name, where=str(path), fix="--force replaces it")
    given = {"name": name, **{key: value for key, value in fields.items() if value is not None}}
    _device(given, f"device {name}", (name,))
    try:
        text = "".join(f"{key} = {_toml(value)}\n" for key, value in given.items()).encode()
    except UnicodeEncodeError as error:  # bytes of a command line that are not text
        raise UsageError("a device's fields must be text", value=repr(error.object), where=f"device {name}") from error
    write_whole(path, text)
    return path


def forget(name: str) -> Path:
    """Remove a device of the user's; returns the file that it was in.

    Raises:
        UsageError: the user has none of that name; shipped ones stay.
    """
    folder = schema.folders("devices")[0]
    own = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    if name not in own:
        why = f"yours are {', '.join(own)}" if own else "you have none"
        raise UsageError("there is no such device of your own", value=name, where=str(folder), why=why)
    own[name].unlink()
    return own[name]
