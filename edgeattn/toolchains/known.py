"""The toolchains that run in an environment of their own, as data."""

from __future__ import annotations

from dataclasses import dataclass

from edgeattn.core.errors import unknown

Version = tuple[int, int]


@dataclass(frozen=True)
class Toolchain:
    """What an environment is made of.

    Attributes:
        purpose: what it is for, a few words.
        requirements: what pip is asked for, ``NAME==VERSION`` each. What these need beside is pip's choice, and the
            environment's stamp has the versions that it chose.
        probe: module that must load in the finished environment.
        size_mb: what it took on the disk when it was measured (1 MB is 1e6 bytes).
        seconds: what adding it took then, with a good network and on two cores.
        python: oldest and newest Python for which the requirements have wheels.
        machines: architectures for which they have; none given stands for any.
        note: what else one should know before it is added.
    """

    name: str
    purpose: str
    requirements: tuple[str, ...]
    probe: str
    size_mb: int
    seconds: int
    python: tuple[Version, Version] = ((3, 11), (3, 14))
    machines: tuple[str, ...] = ()
    note: str = ""

    @property
    def pins(self) -> dict[str, str]:
        """Distribution -> version."""
        return dict(requirement.split("==") for requirement in self.requirements)

    @property
    def line(self) -> str:
        """The command that adds it."""
        return f"edgeattn toolchain add {self.name}"


#: Versions that were tried together.
KNOWN = {
    toolchain.name: toolchain
    for toolchain in (
        Toolchain(
            name="modelopt",
            purpose="int8 and fp8 for TensorRT, by NVIDIA ModelOpt",
            # ModelOpt's own [onnx] extra adds onnxruntime-gpu and cupy, 0.7 GB more, and cppimport. On a CPU its int8
            # and fp8 work without them; of the extra only what `modelopt.onnx.quantization` imports is here.
            requirements=(
                "nvidia-modelopt==0.47.0",
                "torch==2.13.0",
                "onnx==1.21.0",
                "onnxruntime==1.24.4",
                "onnx-graphsurgeon==0.6.1",
                "onnxconverter-common==1.16.0",
                "onnxscript==0.7.2",
                "onnxslim==0.1.98",
                "polygraphy==0.53.6",
                "lief==1.0.0",
                "ml_dtypes==0.6.0",
                "numpy==2.4.6",
            ),
            probe="modelopt.onnx.quantization",
            size_mb=1290,
            seconds=80,
            note="with the CPU build of torch; an index of pip that has only the CUDA build makes it several GB more, "
            "so let pip know PyTorch's CPU index first",
        ),
        Toolchain(
            name="polygraphy",
            purpose="ONNX graphs and TensorRT engines, looked into",
            requirements=(
                "polygraphy==0.53.6",
                "onnx-graphsurgeon==0.6.1",
                "onnx==1.23.2",
                "onnxruntime==1.32.0",
                "tensorrt-rtx==1.7.1.116",
                "numpy==2.3.5",
            ),
            probe="polygraphy.tools",
            size_mb=430,
            seconds=15,
            machines=("x86_64", "AMD64"),
        ),
    )
}


def known() -> dict[str, Toolchain]:
    """Name -> toolchain."""
    return dict(KNOWN)


def get(name: str) -> Toolchain:
    """The toolchain of that name.

    Raises:
        UsageError: there is none; says the closest.
    """
    if name not in KNOWN:
        raise unknown("toolchain", name, sorted(KNOWN))
    return KNOWN[name]
