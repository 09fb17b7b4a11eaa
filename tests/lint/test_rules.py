"""Every rule of every target: a model that it is met by, and one that it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeattn import device, targets
from edgeattn.capture import Program, capture
from edgeattn.core.schema import folders
from edgeattn.lint import Finding
from edgeattn.lint.books import every, shared
from edgeattn.lint.engine import by_pattern
from edgeattn.lint.operators import RULE, TOOLS, unsupported
from edgeattn.targets.coreml import lint as coreml
from edgeattn.targets.onnx_graph.lint import unknown
from edgeattn.targets.optical import lint as optical
from edgeattn.targets.tflite import lint as tflite
from tests.targets.coreml.test_lint import MET, MISSED, OF_INPUTS, Do

X, TOKENS, IDS = torch.randn(1, 4, 16, 8), torch.randn(1, 8, 16), torch.arange(8)[None]
VOLUME = torch.randn(1, 2, 6, 6, 6)

#: A model and its inputs.
Case = tuple[nn.Module, tuple[Tensor, ...]]


class Uses(nn.Module):
    """A part, and a function of it and of the input."""

    def __init__(self, part: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.part = part
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.part, x)


def program(case: Case, **exporting: Any) -> Program:
    part, inputs = case
    named = {f"in{i}": value for i, value in enumerate(inputs)}
    return capture(part.eval(), named, (), lambda *a: torch.export.export(*a, **exporting))


def do(function: Callable[..., Any], *inputs: Tensor) -> Case:
    return Do(function), inputs or (TOKENS,)


def native(x: Tensor) -> Tensor:
    wide, out = torch.ones(48, 16), torch.ones(16, 16)
    many = (wide, torch.ones(48), out, torch.ones(16))
    return torch._native_multi_head_attention(x, x, x, 16, 2, *many, need_weights=False)[0]


def written_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)


def over_channels(x: Tensor) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)


ATTENTION = nn.MultiheadAttention(16, 2, batch_first=True)
SIN = do(torch.sin)

#: Of the shared rules, and of optics and TFLite before the conversion, by ``key``.
CASES: dict[str, tuple[Case, Case]] = {
    "data-dependent-shape": (do(lambda x: x[x > 0].sum()), do(lambda x: torch.where(x > 0, x, 0.0).sum())),
    "data-dependent-output": (do(lambda x: torch.nonzero(x > 0)), do(lambda x: torch.nonzero(x > 0).sum())),
    "mha-fast-path": (do(native), (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (TOKENS,))),
    "packed-projection": (
        (Uses(ATTENTION, lambda a, x: a(x, x, x, need_weights=False)[0]), (TOKENS,)),
        (Uses(nn.Linear(16, 48), lambda a, x: sum(a(x).chunk(3, -1))), (TOKENS,)),
    ),
    "norm-over-channels": (do(written_norm, X), do(over_channels, X)),
    "squares-averaged": (do(lambda x: (x * x).mean(-1)), do(lambda x: (x * 2.0).mean(-1))),
    "cube-overflow": (do(lambda x: x**3), do(lambda x: x**2)),
    "mask-kept-wide": (
        do(lambda x: x.masked_fill(x > 0, -1e9).softmax(-1)),
        do(lambda x: x.masked_fill(x > 0, float("-inf")).softmax(-1)),
    ),
    "antialias": (
        do(lambda x: F.interpolate(x, (8, 4), mode="bilinear", antialias=True), X),
        do(lambda x: F.interpolate(x, (8, 4), mode="bilinear"), X),
    ),
    "fourier": (do(lambda x: torch.fft.rfft(x).abs()), SIN),
    "parser-refuses": (
        do(lambda x: F.fold(x, (14, 14), 3), torch.randn(1, 27, 144)),
        do(lambda x: F.unfold(x, 3), X),
    ),
    "pool-indices": (
        do(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), X),
        do(lambda x: F.max_pool2d(x, 2), X),
    ),
    "grid-sample-3d": (
        do(lambda x: F.grid_sample(x, x[:, :1].permute(0, 2, 3, 4, 1).expand(-1, -1, -1, -1, 3)), VOLUME),
        do(lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1)), X),
    ),
    "branch": (
        do(lambda x: torch.cond(x.sum() > 0, lambda a: a * 2, lambda a: a - 1, (x,))),
        do(lambda x: torch.where(x.sum() > 0, x * 2, x - 1)),
    ),
    "random-numbers": (do(lambda x: x + torch.rand_like(x)), SIN),
    "optical:nothing-optical": (do(lambda x: x @ x.transpose(1, 2)), (nn.Linear(16, 4), (TOKENS,))),
    "optical:kernel-over-plane": (
        (nn.Conv2d(1, 1, (1, 300), dilation=(1, 8)), (torch.randn(1, 1, 1, 2400),)),
        (nn.Conv2d(1, 1, (1, 300)), (torch.randn(1, 1, 1, 2400),)),
    ),
    "optical:electronic-product": (
        do(lambda x: F.scaled_dot_product_attention(x, x, x)),
        (Uses(nn.Linear(16, 4, bias=False), lambda a, x: x @ a.weight.T), (TOKENS,)),
    ),
    "optical:electronic-volume": ((nn.Conv3d(2, 4, 3), (VOLUME,)), (nn.Conv2d(4, 4, 3), (X,))),
    "optical:computed-kernel": (
        do(lambda x: F.conv2d(x, x[0, :, :3, :3].reshape(1, 4, 3, 3)), X),
        (nn.Conv2d(4, 4, 3), (X,)),
    ),
    "optical:strided-light": ((nn.Conv2d(4, 4, 3, stride=2), (X,)), (nn.Conv2d(4, 4, 3), (X,))),
    "optical:dilated-kernel": ((nn.Conv2d(4, 4, 3, dilation=2), (X,)), (nn.Conv2d(4, 4, 3), (X,))),
    "optical:own-kernels": ((nn.Conv2d(4, 4, 3, groups=2), (X,)), (nn.Conv2d(4, 4, 3), (X,))),
    "tflite:average-pool": (
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (X,)),
        (nn.AvgPool2d(2), (X,)),
    ),
    "tflite:int64-input": (do(lambda i: i * 1.0, IDS), do(lambda i: i * 1.0, IDS.int())),
    "tflite:batch-norm-left": ((nn.BatchNorm2d(4), (X,)), (nn.Conv2d(4, 4, 1), (X,))),
    "tflite:reduce-window": ((nn.MaxPool2d(2, dilation=2), (X,)), (nn.MaxPool2d(2), (X,))),
    "tflite:sort": (do(lambda x: x.topk(3, -1).values), do(lambda x: x.amax(-1))),
    "tflite:float64": (do(lambda x: x.double().sum(-1).float()), do(lambda x: x.sum(-1))),
}
#: Found in a flatbuffer: what of one makes the finding.
IN_FLATBUFFER = {"tflite:operator-too-new", "tflite:off-xnnpack", "tflite:transpose"}


def key(name: str, held: tuple[str, ...]) -> str:
    """Rules of a target's own file bear its name: two targets may call theirs alike."""
    return name if name in shared().rules else f"{held[0]}:{name}"


RULES = [(key(name, held), held, rule) for _, name, held, rule in every(targets.names())]


def found(name: str, target: str, made: Program) -> Iterable[Finding]:
    """Findings of the rule's own book."""
    if name == RULE:
        return unsupported(made, target, unknown)
    if name in shared().rules:
        return by_pattern(made, shared(), target)
    if target == "coreml":
        return coreml.lint(made, None)
    if target == "tflite":
        return tflite.lint(made, None)
    return optical.lint(made, device.resolve("optical-4f-4k-2mhz"))


def pair(name: str) -> tuple[Program, Program]:
    """What a rule is met by, and what it is not."""
    if name == "coreml:dynamic-shape":
        rows = {"inputs": ({1: torch.export.Dim("rows", min=2, max=64)},)}
        return program(SIN, dynamic_shapes=rows), program(SIN)
    if name == RULE:
        return program(do(lambda x: torch.median(x, -1).values)), program(SIN)
    if name == "coreml:int64-input":
        return tuple(map(program, CASES["tflite:int64-input"]))  # type: ignore[return-value]
    if name.startswith("coreml:"):
        own = name.partition(":")[2]
        cases = [next((part, inputs) for rule, part, inputs in every_ if rule == own) for every_ in (MET, MISSED)]
        return tuple(map(program, cases))  # type: ignore[return-value]
    return tuple(map(program, CASES[name]))  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "held"), [pytest.param(k, h, id=k) for k, h, _ in RULES if k not in IN_FLATBUFFER])
def test_a_rule_is_met_by_one_model_and_not_by_another(name: str, held: tuple[str, ...]) -> None:
    trips, passes = pair(name)
    for target in ("onnx",) if name == RULE else held:
        rule = name.rpartition(":")[2]
        met = [finding for finding in found(name, target, trips) if finding.rule == rule]
        assert met, f"{rule} was not found for {target}"
        assert all(f.what and f.detail and f.mend and f.evidence for f in met)
        assert rule not in {finding.rule for finding in found(name, target, passes)}


@pytest.mark.parametrize(
    ("rule", "target", "case", "met"),
    [
        ("data-dependent-shape", "tflite", do(lambda x: (x[0] > 0)[torch.arange(4)]), False),
        ("data-dependent-shape", "tensorrt", do(lambda x: (x[0] > 0)[torch.arange(4)]), False),
        ("mask-kept-wide", "onnx", do(lambda x: torch.where(x > 0, -1e9, x)), True),
        ("mask-kept-wide", "onnx", do(lambda x: x + (x > 0).float() * -1e9), True),
        ("mask-kept-wide", "onnx", do(lambda x: x - 1e9), True),
        ("norm-over-channels", "onnx", do(lambda x: (x - 0.5).pow(2).mean(1, keepdim=True), X), False),
        ("square-overflow", "coreml", do(lambda x: F.normalize(x, dim=-1)), True),
        ("mask-overflow", "coreml", do(lambda x: x + ((x > 0).float() - 1.0) * 1e9), True),
        ("mask-overflow", "coreml", do(lambda x: x + ((x > 0).float() - 1.0) * 1e4), False),
    ],
)
def test_other_ways_to_write_it(rule: str, target: str, case: Case, met: bool) -> None:
    name = rule if rule in shared().rules else f"{target}:{rule}"
    assert (rule in {finding.rule for finding in found(name, target, program(case))}) == met


def test_lint_leaves_the_program_as_it_was() -> None:
    """Also where a converter is asked, whose decompositions write into what they are given."""
    made = program(do(lambda x: torch.median(x.view(8, 16), -1).values.sigmoid()))
    before = {name: entry.graph.graph_module.code for name, entry in made.entries.items()}
    for name in ("onnx", "tflite", "coreml", "tensorrt", "optical"):
        targets.get(name).lint(made, None)
        assert {n: entry.graph.graph_module.code for n, entry in made.entries.items()} == before, name


def test_what_is_found_in_a_flatbuffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real files that these are found in are among the tests of the target."""
    outside, new = [("m", "SIN")], [("m", "ERF v1")]
    for name, facts, falls, news in (
        ("transpose", {"transposes": [{"module": "m", "of": "graph"}], "nodes": {}}, [], []),
        ("off-xnnpack", {"transposes": [], "nodes": {}}, outside, []),
        ("operator-too-new", {"transposes": [], "nodes": {}}, [], new),
    ):
        monkeypatch.setattr("edgeattn.targets.tflite.xnnpack.falls_off", lambda *_, falls=falls: falls)
        monkeypatch.setattr("edgeattn.targets.tflite.versions.too_new", lambda *_, news=news: news)
        met = tflite.lint_flatbuffer(SimpleNamespace(), "main", facts, b"")
        assert [(f.rule, f.module) for f in met] == [(name, "m")]


def test_there_are_rules_for_five_targets_and_each_says_why() -> None:
    assert len({name for _, name, _, _ in every(targets.names())}) >= 30
    assert {target for _, held, _ in RULES for target in held} >= {"coreml", "tflite", "tensorrt", "onnx", "optical"}
    for name, held, rule in RULES:
        assert "https://" in rule.evidence or "measured: " in rule.evidence or name in IN_FLATBUFFER, name
        assert set(held) <= set(targets.names()), name
    assert set(CASES) | IN_FLATBUFFER | {RULE} <= {name for name, *_ in RULES}, "a case of no rule"
    assert set(TOOLS) == set(shared().rules[RULE].targets)
    assert set(coreml._book().rules) > OF_INPUTS


def test_a_user_folder_has_a_place() -> None:
    assert folders("lint")[0].name == "lint"
