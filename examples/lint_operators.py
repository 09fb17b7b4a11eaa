"""Write edgeattn/lint/operators.toml, what converters do with operations: python examples/lint_operators.py

Small models, each with one operation, and the recipes that are small are converted for each target and run. An
operation of a model that came out right is ``known`` there; one that a converter stopped at, or whose file its runtime
does not load, ``fails``. Needs all toolchains, and half an hour.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeattn import targets
from edgeattn.capture import Program, capture
from edgeattn.core import tools
from edgeattn.core.errors import EdgeAttnError
from edgeattn.core.numerics import compare
from edgeattn.lint.operators import FILE, TOOLS, Operators
from edgeattn.pipeline.cache import Cache
from edgeattn.pipeline.context import Context, Result
from edgeattn.pipeline.export import make_job
from edgeattn.pipeline.run import Silent, run_plan
from edgeattn.pipeline.stages.capture import revive
from edgeattn.targets.base import LowerPlan

X, IMAGE, TOKENS = torch.randn(1, 4, 16, 8), torch.randn(1, 3, 14, 14), torch.randn(1, 8, 16)
VOLUME, IDS = torch.randn(1, 2, 6, 6, 6), torch.arange(8)[None]
RECIPES = ("fmvit-digits", "convsharevit-v1-digits", "vit-digits", "plm-tiny")


class Do(nn.Module):
    """Runs a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        """See the class."""
        return self.function(*inputs)


class First(nn.Module):
    """The first of what a module gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        first: Tensor = self.inner(x)[0]
        return first


#: A model, its input, and the operation that it is about, as it stands in the captured graph.
CASES: list[tuple[nn.Module | Callable[[Tensor], Any], Tensor, str]] = [
    (lambda x: torch.nonzero(x > 0).float(), TOKENS, "nonzero"),
    (lambda x: torch.unique(x.round()), TOKENS, "_unique2"),
    (lambda x: torch.masked_select(x, x > 0), TOKENS, "masked_select"),
    (lambda x: torch.bincount(x[0], minlength=9).float(), IDS, "bincount"),
    (nn.AdaptiveAvgPool2d(7), IMAGE, "adaptive_avg_pool2d"),
    (nn.AdaptiveMaxPool2d(4), IMAGE, "adaptive_max_pool2d"),
    (lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False), IMAGE, "grid_sampler"),
    (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), IMAGE, "upsample_bicubic2d"),
    (lambda x: F.interpolate(x, size=(20, 20), mode="bilinear"), IMAGE, "upsample_bilinear2d"),
    (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), IMAGE, "upsample_nearest2d"),
    (nn.Conv1d(8, 4, 3), TOKENS, "conv1d"),
    (nn.Conv3d(2, 4, 3), VOLUME, "conv3d"),
    (nn.ConvTranspose2d(4, 4, 3), X, "conv_transpose2d"),
    (nn.AvgPool2d(2), X, "avg_pool2d"),
    (nn.MaxPool2d(2), X, "max_pool2d"),
    (nn.AvgPool3d(2), VOLUME, "avg_pool3d"),
    (nn.MaxPool3d(2), VOLUME, "max_pool3d"),
    (First(nn.LSTM(16, 8, batch_first=True)), TOKENS, "lstm"),
    (First(nn.GRU(16, 8, batch_first=True)), TOKENS, "gru"),
    (lambda x: torch.fft.rfft(x).abs(), TOKENS, "fft_rfft"),
    (lambda x: torch.sort(x, -1).values, TOKENS, "sort"),
    (lambda x: torch.topk(x, 3, -1).values, TOKENS, "topk"),
    (lambda x: torch.argsort(x, -1).float(), TOKENS, "argsort"),
    (lambda x: torch.median(x, -1).values, TOKENS, "median"),
    (lambda x: torch.kthvalue(x, 3, -1).values, TOKENS, "kthvalue"),
    (lambda x: x.cumsum(-1), TOKENS, "cumsum"),
    (lambda x: x.cumprod(-1), TOKENS, "cumprod"),
    (lambda x: torch.cummax(x, -1).values, TOKENS, "cummax"),
    (lambda x: torch.logcumsumexp(x, -1), TOKENS, "logcumsumexp"),
    (lambda x: x.roll(2, -1), TOKENS, "roll"),
    (lambda x: torch.cdist(x, x + 1), TOKENS, "cdist"),
    (lambda x: torch.linalg.det(x[:, :, :8]), TOKENS, "linalg_det"),
    (lambda x: torch.linalg.inv(x[:, :, :8]), TOKENS, "linalg_inv"),
    (lambda x: torch.linalg.svdvals(x), TOKENS, "linalg_svdvals"),
    (lambda x: torch.linalg.qr(x)[0], TOKENS, "linalg_qr"),
    (lambda x: torch.linalg.cross(x[..., :3], x[..., 3:6]), TOKENS, "linalg_cross"),
    (lambda x: torch.erfinv(x.tanh()), TOKENS, "erfinv"),
    (lambda x: torch.lgamma(x.abs() + 1), TOKENS, "lgamma"),
    (lambda x: torch.special.i0(x), TOKENS, "special_i0"),
    (lambda x: torch.atan2(x, x + 1), TOKENS, "atan2"),
    (lambda x: torch.histc(x, 8, -4, 4), TOKENS, "histc"),
    (lambda x: torch.bucketize(x, torch.linspace(-1, 1, 5)).float(), TOKENS, "bucketize"),
    (lambda x: torch.searchsorted(torch.linspace(-1, 1, 5), x).float(), TOKENS, "searchsorted"),
    (lambda x: F.unfold(x, 3), IMAGE, "im2col"),
    (lambda x: F.fold(x, (14, 14), 3), torch.randn(1, 27, 144), "col2im"),
    (lambda x: x.unfold(2, 3, 2), IMAGE, "unfold"),
    (lambda x: torch.multinomial(x.softmax(-1)[0], 1).float(), TOKENS, "multinomial"),
    (lambda x: F.cosine_similarity(x, x + 1), TOKENS, "cosine_similarity"),
    (lambda x: torch.einsum("bchw,bcij->bhw", x, x), X, "einsum"),
    (lambda x: x.repeat_interleave(2, 1), TOKENS, "repeat_interleave"),
    (lambda x: torch.stack(x.unbind(1)), TOKENS, "stack"),
    (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), IMAGE, "pad"),
    (lambda x: torch.where(x > 0, x, x * 2), TOKENS, "where"),
    (lambda x: x.masked_fill(x > 0, 0.5), TOKENS, "masked_fill"),
    (lambda x: F.scaled_dot_product_attention(x, x, x), X, "scaled_dot_product_attention"),
    (lambda x: x.flatten(1).clamp(-1, 1).abs().sqrt(), TOKENS, "flatten"),
    (lambda x: torch.baddbmm(x[:, :, :8], x, x.transpose(1, 2)), TOKENS, "baddbmm"),
    (lambda x: torch.bmm(x, x.transpose(1, 2)).softmax(-1), TOKENS, "bmm"),
    (nn.Embedding(9, 4), IDS, "embedding"),
    (nn.GroupNorm(2, 4), X, "group_norm"),
    (nn.InstanceNorm2d(4), X, "instance_norm"),
    (nn.BatchNorm2d(4), X, "batch_norm"),
    (nn.RMSNorm(8), X, "rms_norm"),
    (nn.PixelShuffle(2), X, "pixel_shuffle"),
    *((nn.Sequential(nn.LayerNorm(16), one), TOKENS, name) for name, one in (
        ("gelu", nn.GELU()), ("silu", nn.SiLU()), ("hardswish", nn.Hardswish()), ("hardsigmoid", nn.Hardsigmoid()),
        ("relu6", nn.ReLU6()), ("elu", nn.ELU()), ("leaky_relu", nn.LeakyReLU()), ("mish", nn.Mish()),
        ("softplus", nn.Softplus()), ("prelu", nn.PReLU()), ("log_softmax", nn.LogSoftmax(-1)), ("glu", nn.GLU()),
    )),
]  # fmt: skip


def overloads(program: Program) -> set[str]:
    """Operations of a program, with their overloads."""
    nodes = [node for entry in program.entries.values() for node in entry.graph.graph.nodes]
    return {str(node.target) for node in nodes if isinstance(node.target, torch._ops.OpOverload)}


def converted(program: Program, target: str, x: Tensor, reference: Tensor) -> bool:
    """Whether a program is converted, and gives the right numbers where the target's runtime is one of this machine."""
    chosen, feed = targets.get(target), x.numpy()
    plan = LowerPlan("fp32", [{"x": feed}], {}, options=chosen.settle({}, None, "fp32"))
    with tempfile.TemporaryDirectory() as folder:
        artifact = chosen.lower(program, plan, Path(folder))
        if target == "tensorrt":
            return True
        (tensor,) = artifact.entries["main"].inputs
        (given,) = chosen.open(artifact).run("main", {"x": feed.astype(tensor.dtype)}).values()
    numbers = compare(reference.numpy().astype(np.float64), np.asarray(given, np.float64).reshape(reference.shape))
    return numbers.relative_l2 < 1e-3


def programs() -> Iterator[tuple[str, Program, Tensor, Tensor]]:
    """Every case, captured: its operation, input and output."""
    for part, x, name in CASES:
        model = (part if isinstance(part, nn.Module) else Do(part)).eval()
        with torch.no_grad():
            reference = model(x.clone())
        yield name, capture(model, {"x": x}, ("y",)), x, reference


def of_recipes(target: str) -> set[str]:
    """Operations of the recipes that are converted for a target."""
    found: set[str] = set()
    for name in RECIPES:
        try:
            precision = "fp16" if target == "coreml" else "fp32"
            job = make_job(name, target=target, precision=precision)
            done = run_plan(job, Cache.default(), Silent(), upto="lower")
        except EdgeAttnError as error:
            print(f"{target}: {name}: {error.what}", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            results = {stage: Result(record.folder, record.facts) for stage, record in done.records.items()}
            found |= overloads(revive(Context(job, Path(folder), results)))
    return found


def main() -> None:
    """See the head."""
    torch.manual_seed(0)
    cases = list(programs())
    known: dict[str, set[str]] = {}
    fails: dict[str, list[str]] = {}
    for target in TOOLS:
        known[target], fails[target] = of_recipes(target), []
        for name, program, x, reference in cases:
            held = False
            with contextlib.suppress(Exception):
                held = converted(program, target, x, reference)
            if held:
                known[target] |= overloads(program)
            else:
                fails[target].append(name)
            print(f"{target}: {name}: {'held' if held else 'failed'}", file=sys.stderr, flush=True)
    Operators.load().write(FILE, {t: tools.versions(names) for t, names in TOOLS.items()}, known, fails)
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
