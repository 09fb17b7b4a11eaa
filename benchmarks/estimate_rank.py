"""Whether the uncalibrated estimate ranks models as ONNX Runtime's times on this machine do.

python benchmarks/estimate_rank.py [--work FOLDER] [--rounds 15] [--operations] [--held-out] [NAME ...]

Every model is exported to ONNX in float32 in its deploy form, kept in --work for the next time, and runs on one thread;
rounds over all models are interleaved, a model's time is the median over rounds. No number of the estimate is fitted,
but its rules were chosen with the default models at hand: --held-out takes architectures that were not. Weights are
random, but for the checkpoints that EdgeAttn ships. --operations profiles every model, and ranks its operations too: an
operation that the runtime made part of another counts to that one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from scipy.stats import spearmanr

import edgeattn
from edgeattn import device
from edgeattn.bundle import Bundle
from edgeattn.capture import capture, run_eager
from edgeattn.models.build import build
from edgeattn.pipeline.export import make_job
from edgeattn.profile.roofline import Estimate, Roof, estimate, roof_of
from edgeattn.reparam import reparameterize
from edgeattn.targets.base import Artifact, LowerPlan, OpCost
from edgeattn.targets.onnx import OnnxTarget

#: A decoder, whose step of one token behind a full cache is what runs.
DECODER = "plm-tiny"
MODELS = (
    *(f"fmvit-{size}" for size in "tsmbl"),
    "fmvit-digits",
    *(f"convsharevit-{variant}{kind}" for variant in ("v1", "v2", "v3") for kind in ("", "-digits")),
    DECODER,
    *(
        f"timm:{name}"
        for name in (
            *("resnet18", "mobilenetv3_small_100", "efficientnet_b0", "vit_tiny_patch16_224", "convnext_atto"),
            *("fastvit_t8", "repvit_m0_9", "levit_128s", "mobilenetv4_conv_small", "regnetx_002"),
            *("deit_tiny_patch16_224", "ghostnet_100"),
        )
    ),
)
#: Architectures that were first measured when the estimate's rules stood.
HELD_OUT = tuple(
    f"timm:{name}"
    for name in (
        *("mobilenetv2_100", "seresnet50", "densenet121", "vgg11_bn", "repvgg_a0", "poolformer_s12", "mobileone_s0"),
        *("edgenext_xx_small", "mobilevit_s", "mobilevitv2_050", "efficientformer_l1", "swin_tiny_patch4_window7_224"),
        *("mnasnet_small", "regnety_004", "inception_next_atto", "mixer_s32_224", "pvt_v2_b0", "visformer_tiny"),
        *("resmlp_12_224", "xcit_nano_12_p16_224"),
    )
)
#: The shortest time that is measured at once, in seconds: a model that is quicker runs several times.
LEAST = 0.02

Feeds = Mapping[str, np.ndarray]


@dataclass
class Model:
    """An exported model: its file and feeds, its operations, and their uncalibrated estimates."""

    name: str
    file: Path
    feeds: Feeds
    operations: list[OpCost]
    estimates: list[Estimate]

    @property
    def estimate_ms(self) -> float:
        """Of the whole model."""
        return sum(one.ms for one in self.estimates)


def exported(name: str, work: Path) -> tuple[Artifact, str]:
    """The model's artifact and the entry that runs, made if it is not in the folder yet."""
    if name == DECODER:
        found = list(work.glob(f"{DECODER}.onnx.fp32"))
        bundle = Bundle.open(found[0]) if found else edgeattn.export(name, target="onnx", output=work)
        return bundle.artifact(), "decode"
    folder = work / f"{name.replace(':', '-')}.deploy"
    if not (folder / "model.onnx").exists():
        folder.mkdir(parents=True, exist_ok=True)
        built = build(make_job(name, target="onnx").resolved)
        inputs = built.random_inputs(0)
        deploy = reparameterize(built.model, tuple(inputs.values())).model
        program = capture(deploy, inputs, tuple(run_eager(deploy, inputs, ())))
        OnnxTarget().lower(program, LowerPlan("fp32", [], {"recipe": name}), folder)
    artifact = OnnxTarget().adopt(folder / "model.onnx")
    assert artifact is not None
    return artifact, "main"


def load(name: str, work: Path, roof: Roof) -> Model:
    """Export a model, and estimate it."""
    artifact, entry = exported(name, work)
    spec, random = artifact.entries[entry], np.random.default_rng(0)
    feeds = {
        t.name: random.standard_normal(t.shape).astype(t.dtype) if t.dtype.startswith("float") else np.zeros(
            t.shape, t.dtype
        )
        for t in spec.inputs
    }  # fmt: skip
    if entry != "main":
        feeds["position"] += next(t.shape[1] for t in spec.inputs if t.name.startswith("latent")) - 1
    operations = OnnxTarget().operations(artifact, entry)
    return Model(name, artifact.folder / spec.file, feeds, operations, estimate(operations, roof))


def session(file: Path, profile: str = "") -> ort.InferenceSession:
    """On one thread; with a prefix for the profile's file if there shall be one."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def measured(models: Sequence[Model], rounds: int) -> list[float]:
    """Median of each model's time in ms over interleaved rounds."""
    sessions = [session(model.file) for model in models]
    repeats, taken = [], [[] for _ in models]
    for model, opened in zip(models, sessions, strict=True):
        opened.run(None, model.feeds)
        begun = time.perf_counter()
        opened.run(None, model.feeds)
        repeats.append(max(1, math.ceil(LEAST / (time.perf_counter() - begun))))
    for _ in range(rounds):
        for model, opened, count, times in zip(models, sessions, repeats, taken, strict=True):
            opened.run(None, model.feeds)  # the caches hold another model's numbers
            begun = time.perf_counter()
            for _ in range(count):
                opened.run(None, model.feeds)
            times.append((time.perf_counter() - begun) / count * 1e3)
    return [statistics.median(times) for times in taken]


def rank(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rank correlation, and a 95 % bootstrap interval over the models."""
    pairs, random = np.array([ours, theirs]), np.random.default_rng(seed)
    draws = []
    for _ in range(2000):
        drawn = pairs[:, random.integers(0, pairs.shape[1], pairs.shape[1])]
        if len(set(drawn[0])) > 1:
            draws.append(float(spearmanr(*drawn).statistic))
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(spearmanr(*pairs).statistic), float(low), float(high)


def node_times(model: Model, runs: int = 10) -> dict[str, float]:
    """Median time in ms of each node of the graph as ONNX Runtime rewrote it, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        opened = session(model.file, f"{folder}/profile")
        for _ in range(runs + 2):
            opened.run(None, model.feeds)
        events: list[dict[str, Any]] = json.loads(Path(opened.end_profiling()).read_text())
    times: dict[str, list[float]] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name != event["name"]:
            times.setdefault(name, []).append(event["dur"] / 1e3)
    return {name: statistics.median(each[-runs:]) for name, each in times.items()}


def by_operation(model: Model) -> tuple[int, float, float]:
    """Operations whose time is known, the share of the time that they have, and the rank correlation of theirs."""
    times = node_times(model)
    names: dict[str, int] = {}
    for index, operation in enumerate(model.operations):
        # A convolution in blocks of channels is named after its last output, what was fused after where it began.
        names |= {operation.name: index, **{f"{out}_nchwc": index for out in operation.outputs}}
    at: dict[int, float] = {}
    for name, ms in times.items():
        place = names.get(name, names.get(name.split("/")[0].removeprefix("fused "), -1))
        if place >= 0:
            at[place] = at.get(place, 0.0) + ms
    readers: dict[str, int] = {}
    owner: dict[int, int] = {}
    sums = dict.fromkeys(at, 0.0)
    for index in reversed(range(len(model.operations))):
        operation = model.operations[index]
        following = [owner[readers[out]] for out in operation.outputs if out in readers]
        owner[index] = index if index in at else following[0] if following else -1
        if owner[index] in sums:
            sums[owner[index]] += model.estimates[index].ms
        readers |= dict.fromkeys(operation.inputs, index)
    places = [place for place in at if sums[place] > 0]
    ours, theirs = [sums[place] for place in places], [at[place] for place in places]
    return len(places), sum(theirs) / sum(times.values()), float(spearmanr(ours, theirs).statistic)


def main() -> None:
    """Export, measure, estimate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models; the usual ones by default")
    parser.add_argument("--held-out", action="store_true", help="architectures that no rule was chosen with")
    parser.add_argument("--work", type=Path, help="folder of the exported models; a temporary one by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--operations", action="store_true", help="rank the operations inside of each model, too")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        roof = roof_of(device.resolve("host"), "fp32", threads=1)
        print(f"roof: {roof.tflops['fp32'] * 1e3:.1f} GFLOPS, {roof.gb_s:.1f} GB/s ({roof.source}), one thread")
        models = []
        for name in arguments.names or (HELD_OUT if arguments.held_out else MODELS):
            print(f"  {name}", flush=True)
            models.append(load(name, work, roof))
        times = measured(models, arguments.rounds)
        print(f"\n{'model':34} {'MMACs':>8} {'measured ms':>12} {'estimate ms':>12} {'ratio':>6}")
        for model, ms in sorted(zip(models, times, strict=True), key=lambda pair: pair[1]):
            macs = sum(operation.macs for operation in model.operations) / 1e6
            print(f"{model.name:34} {macs:8.1f} {ms:12.3f} {model.estimate_ms:12.3f} {model.estimate_ms / ms:6.2f}")
        estimates = [model.estimate_ms for model in models]
        rho, low, high = rank(estimates, times)
        ratios = sorted(ours / ms for ours, ms in zip(estimates, times, strict=True))
        print(f"\nSpearman {rho:.4f} [95 % {low:.4f}-{high:.4f}] of {len(models)} models, {arguments.rounds} rounds")
        print(f"estimate / measured: median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")
        macs = [float(sum(operation.macs for operation in model.operations)) for model in models]
        print(f"Spearman of the MACs alone, for comparison: {rank(macs, times)[0]:.4f}")
        if arguments.operations:
            print(f"\n{'operations of':34} {'joined':>7} {'time':>6} {'Spearman':>9}")
            for model in models:
                count, share, rho_inside = by_operation(model)
                print(f"{model.name:34} {count:7d} {share:6.0%} {rho_inside:9.3f}", flush=True)
        if arguments.json:
            rows = [
                {"model": model.name, "measured_ms": ms, "estimate_ms": model.estimate_ms}
                for model, ms in zip(models, times, strict=True)
            ]
            arguments.json.write_text(json.dumps({"spearman": [rho, low, high], "models": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
