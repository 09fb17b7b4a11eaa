"""Records for tests."""

from __future__ import annotations

from typing import Any

from edgeattn.profile.record import Latency, Place, Proof, Record, Settings, State, Subject


def a_record(model: str = "net", device: str = "pi", ms: float = 5.0, **given: Any) -> Record:
    """A measured one; ``given`` takes the place of fields."""
    blocks = tuple(tuple(tuple(ms * (1 + 0.01 * ((i + j) % 3)) for i in range(4)) for j in range(3)) for _ in range(2))
    fields: dict[str, Any] = {
        "kind": "measured",
        "created": "2026-01-02T03:04:05.678+00:00",
        "edgeattn": "0.1.0",
        "commit": "0123456789abcdef",
        "subject": Subject(
            bundle=f"{model}.onnx.fp32",
            digest="d" * 64,
            model=model,
            target="onnx",
            backend="onnx",
            precision="fp32",
            entry="main",
            weights="checkpoint",
            size_mb=1.5,
            macs=1000,
        ),
        "place": Place(device=device, cpu="CPU", machine="aarch64", runtime="onnxruntime 1.32", fingerprint="f" * 64),
        "settings": Settings(threads=1, timed="one run"),
        "latency": Latency(
            p50=ms, p90=ms, p95=ms, p99=ms, mean=ms, std=0.0, min=ms, max=1.02 * ms, low=ms, high=ms, confidence=0.95,
            runs=24, blocks=blocks, warmup=(5, 5), warm=(True, True), first_ms=(9.0, 9.0), load_ms=(20.0, 20.0),
        ),
        "states": (State(when="before", temperature_c=40.0), State(when="after", second=3.0, temperature_c=45.0)),
        "proof": Proof(worst_relative_l2=1e-6, tolerance=1e-5),
    }  # fmt: skip
    return Record(**{**fields, **given}).sealed()
