"""Records that no machine measured, as realistic as a report needs them."""

from __future__ import annotations

import math
import random
from typing import Any

from edgeattn.core.hashing import sha256_data
from edgeattn.profile.record import (
    Breakdown,
    Latency,
    Memory,
    Operation,
    Place,
    Proof,
    Record,
    Roofline,
    Settings,
    State,
    Subject,
)

Blocks = tuple[tuple[tuple[float, ...], ...], ...]


def blocks(median: float, seed: int = 0, processes: int = 3, count: int = 4, runs: int = 25) -> Blocks:
    """Latencies in ms that scatter to the right of ``median``."""
    draw = random.Random(seed)

    def run() -> float:
        tail = 1.35 if draw.random() < 0.03 else 1.0
        return round(median * math.exp(draw.gauss(0, 0.02)) * tail, 5)

    return tuple(tuple(tuple(run() for _ in range(runs)) for _ in range(count)) for _ in range(processes))


def latency(median: float, seed: int = 0, **sizes: int) -> Latency:
    made = blocks(median, seed, **sizes)
    runs = sorted(run for process in made for block in process for run in block)

    def at(share: float) -> float:
        return runs[min(len(runs) - 1, int(share * len(runs)))]

    mean = sum(runs) / len(runs)
    return Latency(
        p50=at(0.5),
        p90=at(0.9),
        p95=at(0.95),
        p99=at(0.99),
        mean=mean,
        std=math.sqrt(sum((run - mean) ** 2 for run in runs) / len(runs)),
        min=runs[0],
        max=runs[-1],
        low=at(0.5) * 0.995,
        high=at(0.5) * 1.006,
        confidence=0.95,
        runs=len(runs),
        blocks=made,
        warmup=(20,) * len(made),
        warm=(True,) * len(made),
        first_ms=tuple(median * (3 + i * 0.1) for i in range(len(made))),
        load_ms=tuple(median * (12 + i) for i in range(len(made))),
    )


def operations(total: float, unit: str = "cpu", layers: int = 4, timed: bool = True) -> tuple[Operation, ...]:
    """Operations of a small vision transformer whose times sum up to ``total`` ms."""
    kinds = [
        ("stem.0", "Conv", 3.0),
        ("stem.1", "Relu", 0.4),
        *(
            (f"stages.{i // 2}.{i % 2}.{path}", op, weight)
            for i in range(layers)
            for path, op, weight in (
                ("token_mixer.qkv", "MatMul", 2.4),
                ("token_mixer.attn", "MatMul", 1.6),
                ("token_mixer.attn", "Softmax", 1.1),
                ("token_mixer.proj", "MatMul", 0.8),
                ("ffn.fc1", "Conv", 2.2),
                ("ffn.act", "Relu", 0.3),
                ("ffn.fc2", "Conv", 2.1),
                ("norm", "LayerNormalization", 0.5),
            )
        ),
        ("head", "Gemm", 0.2),
        ("", "Transpose", 0.3),
    ]
    whole = sum(weight for *_, weight in kinds)
    made = []
    for i, (module, op, weight) in enumerate(kinds):
        heavy = op in ("Conv", "MatMul", "Gemm")
        ms = total * weight / whole * (1 + 0.15 * math.sin(i))
        made.append(
            Operation(
                name=f"/{module.replace('.', '/')}/{op}_{i}",
                module=module,
                op=op,
                unit="cpu" if op == "Softmax" else unit,
                ms=ms if timed else None,
                share=weight / whole,
                macs=int(weight * 1.1e6 * (1 + i % 4)) if heavy else None,
                bytes=int(weight * (9e5 if i % 3 else 6e4)),
                estimate_ms=ms * (0.3 + 0.1 * (i % 4)),
                bound="compute" if heavy else "memory" if i % 3 else "call",
            )
        )
    return tuple(made)


def record(median: float | None = 5.0, seed: int = 0, **given: Any) -> Record:
    """A sealed record; an estimated one without a median.

    Args:
        given: fields of its parts, as ``model=``, ``device=``, ``threads=``, and whole parts, as ``breakdown=``.
    """
    model, target, precision = (
        given.pop(k, d) for k, d in (("model", "fmvit-s"), ("target", "onnx"), ("precision", "fp32"))
    )
    subject: dict[str, Any] = {
        "bundle": f"{model}.{target}.{precision}",
        "digest": sha256_data([model, target, precision]),
        "model": model,
        "target": target,
        "backend": target,
        "precision": precision,
        "entry": "main",
        "weights": "checkpoint",
        "size_mb": {"fp32": 24.7, "fp16": 12.4}.get(precision, 6.4),
        "parameters": 6_100_000,
        "macs": 720_000_000,
    }
    created = given.pop("created", "2026-11-25T09:30:00Z")  # of the record: a bundle has one, too
    device = given.pop("device", "raspberry-pi-5")
    place: dict[str, Any] = {
        "device": device,
        "machine": "aarch64",
        "cpu": "Cortex-A76",
        "cores": 4,
        "system": "Debian 12, Linux 6.6",
        "python": "3.11.2",
        "runtime": f"{target} 1.22",
        "fingerprint": f"fp-{device}" if median else "",
    }
    proof: dict[str, Any] = {
        "worst_relative_l2": 3.1e-6,
        "tolerance": 1e-5,
        "device_relative_l2": 4.2e-6,
        "metric": "top-1 accuracy",
        "accuracy": 0.9694,
        "reference_accuracy": 0.9694,
        "samples": 360,
        "fused": 22,
        "reparam_error": 4e-15,
        "reparam_model_error": 2e-6,
        "ptq_risk": 3,
        "numerics": {
            "sample 0": {"logits": {"relative_l2": 3.1e-6, "sqnr_db": 110.2, "max_abs": 1e-5, "cosine": 0.99999}}
        },
        "versions": {"torch": "2.9.1", target: "1.22.0"},
        "recipe_sha256": "ab" * 32,
        "created": "2026-11-20T10:00:00Z",
    }
    settings: dict[str, Any] = {"unit": "cpu", "threads": 4, "timed": "the runtime's own call"}
    for part, fields in ((subject, Subject), (place, Place), (proof, Proof), (settings, Settings)):
        for name in set(given) & set(fields.model_fields):
            part[name] = given.pop(name)
    given.setdefault("kind", "measured" if median else "estimated")
    given.setdefault("memory", Memory(peak_rss_mb=80 + subject["size_mb"] * 2.2) if median else Memory())
    found = Record(
        created=created,
        edgeattn="0.1.0",
        commit="72a6113",
        subject=Subject(**subject),
        place=Place(**place),
        settings=Settings(**settings),
        latency=latency(median, seed) if median else None,
        proof=Proof(**proof),
        **given,
    )
    return found.sealed()


def states(hot: bool = False) -> tuple[State, ...]:
    return tuple(
        State(
            when="before" if i == 0 else "after" if i == 9 else "during",
            second=i * 4.0,
            temperature_c=48 + (4.0 if hot else 1.0) * i,
            clock_mhz=1500 if hot and i > 6 else 2400,
            clock_max_mhz=2400,
            throttled=("soft temperature limit",) if hot and i > 6 else (),
            load=1.0,
        )
        for i in range(10)
    )


def _breakdown(total: float, unit: str, timed: bool = True, **more: Any) -> Breakdown:
    roof = Roofline(tflops=0.152 if unit == "cpu" else 15.8, gb_s=17.0 if unit == "cpu" else 60.0, source="documented")
    ops = operations(total, unit, timed=timed)
    estimate = sum(op.estimate_ms or 0.0 for op in ops)
    source = "the runtime's profiler" if timed else ""
    overhead = 1.08 if timed else None
    return Breakdown(operations=ops, source=source, overhead=overhead, estimate_ms=estimate, roofline=roof, **more)


#: What an export's lint says.
LINT = (
    {
        "rule": "attention-rank",
        "severity": "warning",
        "where": "stages.3.0.token_mixer",
        "text": "attention of rank 3 is run on the CPU",
    },
    {
        "rule": "layout",
        "severity": "info",
        "where": "",
        "text": "12 transposes that a channels-last model would not need",
    },
)


def realistic() -> list[Record]:
    """Three models, three targets, two devices and an estimate on a third."""
    pi, phone = "raspberry-pi-5", "iphone-15-pro"
    quantized = tuple(
        {"module": f"stages.{i // 3}.{i % 3}.ffn.fc{1 + i % 2}", "bits": 8 if i % 4 else 4, "error": 0.002 * 1.4**i}
        for i in range(12)
    )
    made = []
    for i, (model, accuracy, ms) in enumerate(
        (("fmvit-t", 0.9472, 6.1), ("fmvit-s", 0.9694, 11.8), ("convsharevit-v2", 0.9778, 24.0))
    ):
        base: dict[str, Any] = {"model": model, "reference_accuracy": accuracy, "lint": LINT if i else (), "device": pi}
        scale = (0.6, 1.0, 2.1)[i]
        sizes = {"fp32": 24.7 * scale, "fp16": 12.4 * scale, "w8a8": 6.4 * scale}
        made.append(
            record(
                ms,
                i,
                **base,
                accuracy=accuracy,
                size_mb=sizes["fp32"],
                breakdown=_breakdown(ms, "cpu"),
                states=states(),
            )
        )
        made.append(
            record(
                ms * 0.46,
                10 + i,
                **base,
                target="tflite",
                precision="w8a8",
                accuracy=accuracy - 0.0083,
                size_mb=sizes["w8a8"],
                worst_relative_l2=0.11 if i < 2 else 0.24,
                tolerance=0.2,
                quantized=quantized,
                breakdown=_breakdown(ms * 0.46, "cpu"),
                states=states(hot=i == 2),
                flags=("throttled: soft temperature limit", "clock fell from 2400 to 1500 MHz") if i == 2 else (),
            )
        )
        ne = base | {
            "device": phone,
            "cpu": "A17 Pro",
            "cores": 6,
            "system": "iOS 18.2",
            "unit": "cpu_and_ne",
            "threads": 0,
        }
        made.append(
            record(
                ms * 0.11,
                20 + i,
                **ne,
                target="coreml",
                precision="fp16",
                accuracy=accuracy,
                size_mb=sizes["fp16"],
                worst_relative_l2=9e-4,
                tolerance=5e-3,
                unproven="numbers on the neural engine: proven with our interpreter on the CPU",
                memory=Memory(peak_rss_mb=44, device_mb=21 * scale),
                breakdown=_breakdown(ms * 0.11, "ne", wanted="ne", fallback={"cpu": {"ops": 11.0, "time": 4.0 + i}}),
                weights="random" if i == 1 else "checkpoint",
                partial="the device slept after 2 of 3 processes" if i == 0 else "",
            )
        )
    made.append(
        record(
            None,
            model="fmvit-s",
            device="jetson-orin-nano",
            target="tensorrt",
            precision="fp16",
            accuracy=0.9694,
            size_mb=13.0,
            unit="gpu",
            threads=0,
            cpu="",
            system="",
            python="",
            runtime="",
            breakdown=_breakdown(0.9, "gpu", timed=False),
            unproven="the engine is built on the device: its numbers were not seen",
        )
    )
    return made


def many(count: int) -> list[Record]:
    """Records of one model on many devices, each with 200 operations."""
    made = []
    for i in range(count):
        breakdown = Breakdown(operations=operations(5.0, layers=25), source="the runtime's profiler")
        made.append(record(3.0 + i * 0.05, i, device=f"device-{i:03}", breakdown=breakdown, states=states()))
    return made


def odd() -> list[Record]:
    """What a chart could stumble over: nothing, one of all, zeros, long names, two records that look alike."""
    flat = Latency(
        **dict.fromkeys(("p50", "p90", "p95", "p99", "mean", "min", "max", "low", "high"), 0.0),
        std=0.0,
        confidence=0.95,
        runs=2,
        blocks=(((0.0, 0.0),),),
    )
    zero = Operation(name="", module="a..b", op="", ms=0.0, macs=0, bytes=0)
    single = Operation(name="n" * 300, module=".".join("m" * 40 for _ in range(12)), op="Conv", ms=1.0, macs=5, bytes=1)
    one = latency(5.0, processes=1, count=1, runs=1)
    return [
        record(1.0, breakdown=Breakdown(operations=(zero,)), accuracy=0.0, reference_accuracy=0.0)
        .model_copy(update={"latency": flat})
        .sealed(),
        record(
            5.0,
            breakdown=Breakdown(operations=(single, zero), roofline=Roofline(tflops=0.0, gb_s=0.0)),
            device="d" * 200,
        )
        .model_copy(update={"latency": one, "states": states()[:1]})
        .sealed(),
        record(5.0, breakdown=Breakdown(operations=(single,), roofline=Roofline(tflops=1e-9, gb_s=1e6))),
        record(5.0, 1, metric="perplexity", accuracy=12.0, reference_accuracy=11.0),
        record(5.0, 2, metric="perplexity", accuracy=12.0, reference_accuracy=11.0, created="2026-11-26T00:00:00Z"),
        record(None, breakdown=Breakdown(), accuracy=None),
    ]
