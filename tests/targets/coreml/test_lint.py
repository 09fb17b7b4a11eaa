"""Core ML's lint: each rule met by small models and missed by others beside them; coremltools judges both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeattn import device
from edgeattn.capture import Program, capture
from edgeattn.core.quiet import quiet
from edgeattn.lint import Finding
from edgeattn.models.fmvit import fmvit_digits
from edgeattn.reparam import reparameterize
from edgeattn.targets.coreml.lint import _book, lint

X = torch.randn(1, 4, 16, 8)
TOKENS = torch.randn(1, 8, 16)
MASK = torch.rand(1, 1, 16, 16).round()
IDS = torch.arange(8)[None]


class Do(nn.Module):
    """Runs a function; a module of its own, so that it has a path."""

    def __init__(self, function: Callable[..., Any], **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.buffers())


class Around(nn.Module):
    """The part that is looked at is ``body.part``; what stands around it is met by no rule."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"part": part})

    def forward(self, *inputs: Tensor) -> Any:
        return self.body["part"](*inputs)


def program(part: nn.Module, *inputs: Tensor, **exporting: Any) -> Program:
    named = {f"in{i}": value for i, value in enumerate(inputs)}
    return capture(Around(part).eval(), named, (), lambda *a: torch.export.export(*a, **exporting))


def met(part: nn.Module, *inputs: Tensor, place: str | None = None) -> dict[str, Finding]:
    """Findings in ``body.part`` by rule; there are none elsewhere but of inputs."""
    found = lint(program(part, *inputs), device.resolve(place) if place else None)
    assert all("input in" in f.detail for f in found if f.module == "")
    inside = [f for f in found if f.module]
    assert {f.module for f in inside} <= {"body.part"}
    assert len({f.rule for f in inside}) == len(inside), "one finding for each rule and module"
    return {f.rule: f for f in inside}


def qkv(x: Tensor) -> Tensor:
    q, k, v = x.reshape(1, 8, 2, 2, 4).permute(2, 0, 3, 1, 4).repeat(2, 1, 1, 1, 1)[:3].unbind(0)
    return q + k + v


def explicit(a: Tensor, b: Tensor) -> Tensor:
    return torch.softmax((a @ a.transpose(-2, -1)) * 0.3 + b, -1) @ a


def swin(a: Tensor, b: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", a, a)
    masked = (scores.view(1, 4, 16, 16) + b).view(4, 16, 16)
    return torch.bmm(F.dropout(masked.softmax(-1), 0.1, False), a[0])


def torch_mha(a: Tensor, b: Tensor) -> Tensor:
    weights = torch.softmax(torch.baddbmm(b[0], a[0], a[0].transpose(1, 2)), -1)
    return (a[0].transpose(1, 2) @ weights.transpose(1, 2)).transpose(1, 2)


def rotated(x: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.reshape(1, 4, 16, 4, 2)[0]) * torch.polar(torch.ones(4), torch.arange(4.0))
    return torch.view_as_real(turned).flatten(-2)


def rotated_real(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = torch.cos(torch.arange(4.0)), torch.sin(torch.arange(4.0))
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def window(x: Tensor) -> Tensor:
    return x.view(1, 4, 4, 4, 2, 4).permute(0, 1, 2, 4, 3, 5).contiguous().view(-1, 4, 4)


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def l2_norm(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()


def safe_norm(x: Tensor) -> Tensor:
    s = x.abs().amax(-1, keepdim=True).clamp(min=1.0)
    y = x / s
    return y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6 / s**2)


def write(x: Tensor, state: Tensor) -> Tensor:
    state[:, :8, :16] = x
    return state[:, :8, :16] * 1.0


def causal(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def grouped(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True)


Case = tuple[str, nn.Module, tuple[Tensor, ...]]
MET: list[Case] = [
    ("rank-5", Do(qkv), (TOKENS,)),
    ("rank-5", Do(lambda x: x[:, :, None].expand(1, 4, 2, 16, 8).reshape(1, 8, 16, 8)), (X,)),
    ("rank-5", nn.Conv3d(4, 4, 1), (torch.randn(1, 4, 2, 8, 8),)),
    ("rank-6", Do(lambda x: x.view(1, 4, 4, 4, 2, 4).permute(0, 1, 2, 4, 3, 5).relu().reshape(32, 4, 4)), (X,)),
    ("rank-6", Do(lambda x: x.unsqueeze(2).unsqueeze(2).repeat(1, 1, 2, 1, 1, 1).flatten(1, 3)), (X,)),
    ("rank-6", Do(window), (X,)),
    ("complex", Do(lambda x: torch.fft.rfft(x).abs()), (X,)),
    ("state-32", Do(write, state=torch.zeros(1, 40, 64)), (TOKENS,)),
    ("state-32", Do(write, state=torch.zeros(1, 64, 40)), (TOKENS,)),
    ("state-32", Do(lambda x, s: (s.add_(1.0), x * 2.0)[1], step=torch.zeros(1)), (X,)),
    ("integer", nn.Embedding(9, 4), (IDS,)),
    ("integer", Do(lambda x: x[:, torch.tensor([2, 0, 1])]), (X,)),
    ("integer", Do(lambda x: x.argmax(-1)), (X,)),
    ("integer", Do(lambda x: (x + 1).float()), (IDS,)),
    ("too-wide", Do(lambda x: x * 2.0), (torch.randn(1, 2, 16385),)),
    ("too-wide", Do(lambda x: x.flatten(2)), (torch.randn(1, 2, 128, 129),)),
    ("linear-layout", nn.Linear(16, 4), (TOKENS,)),
    ("attention-not-fused", Do(explicit), (X, MASK)),
    ("attention-not-fused", Do(swin), (X, MASK)),
    ("attention-not-fused", Do(torch_mha), (X, MASK)),
    ("attention-not-fused", Do(lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.2)), (X,)),
    ("attention-not-fused", Do(lambda x: F.scaled_dot_product_attention(x, x, x, scale=8**-0.5)), (X,)),
    ("rms-norm", nn.RMSNorm(8), (X,)),
    ("rms-norm", Do(lambda x: F.rms_norm(x, (8,))), (X,)),
    ("square-overflow", Do(l2_norm), (X,)),
    ("square-overflow", Do(lambda x: (x * x).flatten(1).sum(-1)), (X,)),
    ("square-overflow", Do(lambda x: torch.square(x.float()).mean()), (X,)),
    ("mask-overflow", Do(lambda a: a.masked_fill(a > 0, -1e9)), (X,)),
    ("mask-overflow", Do(lambda a: a + (1.0 - a.sigmoid()) * -1e9), (X,)),
    ("mask-overflow", Do(lambda a: a - 65505.0), (X,)),
    ("mask-overflow", Do(lambda a: torch.where(a > 0, a, torch.tensor(torch.finfo(torch.float32).min))), (X,)),
    ("mask-overflow", Do(lambda a: torch.where(a > 0, a, torch.full_like(a, -1e9))), (X,)),
    ("mask-overflow", Do(lambda a, m: a + m, mask=torch.full((16, 8), -1e9).triu(1)), (X,)),
    ("gqa", Do(grouped), (X,)),
    ("circular-pad", Do(lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")), (X,)),
    ("antialias-dropped", Do(lambda x: F.interpolate(x, (8, 4), mode="bilinear", antialias=True)), (X,)),
    ("ceil-pool", nn.AvgPool2d(3, 2, ceil_mode=True), (X,)),
]
#: A rule, and what stands beside it: met by no rule at all.
MISSED: list[Case] = [
    ("rank-5", Do(lambda x: sum(part.view(1, 8, 2, 4).transpose(1, 2) for part in x.chunk(2, -1))), (TOKENS,)),
    ("rank-6", Do(lambda x: x.view(4, 4, 4, 8).transpose(1, 2).reshape(16, 4, 8)), (X,)),
    ("complex", Do(rotated_real), (X,)),
    ("complex", Do(lambda x: torch.view_as_real(torch.complex(x[0], x[0]) + torch.complex(x[0], x[0]))), (X,)),
    ("state-32", Do(write, state=torch.zeros(1, 64, 32)), (TOKENS,)),
    ("state-32", Do(lambda x, s: x + s[:, :8], table=torch.zeros(1, 40, 16)), (TOKENS,)),
    ("integer", Do(lambda x, t: x + t[torch.arange(8)], table=torch.randn(9, 16)), (TOKENS,)),
    ("integer", Do(lambda x: x + torch.arange(8).add(1).float()[:, None]), (TOKENS,)),
    ("too-wide", Do(lambda x: x * 2.0), (torch.randn(1, 2, 16384),)),
    ("too-wide", nn.Conv2d(20000, 1, 1), (torch.randn(1, 20000, 1, 4),)),
    ("too-wide", Do(lambda x, t: x + t[..., :8], table=torch.randn(1, 2, 17000)), (torch.randn(1, 2, 8),)),
    ("linear-layout", nn.Linear(16, 4), (TOKENS[0],)),
    ("linear-layout", nn.Conv2d(4, 8, 1), (X,)),
    ("attention-not-fused", Do(causal), (X,)),
    ("attention-not-fused", Do(lambda a, b: torch.softmax(a @ a.transpose(-2, -1), -1) + b), (X, MASK)),
    ("attention-not-fused", Do(lambda a, w: torch.softmax(a @ w, -1) @ a.transpose(-2, -1), w=torch.ones(8, 8)), (X,)),
    ("attention-not-fused", Do(lambda a: torch.softmax(a.sin(), -1) @ a.transpose(-2, -1)), (X,)),
    ("rms-norm", nn.LayerNorm(8), (X,)),
    ("square-overflow", Do(norm), (X,)),
    ("square-overflow", Do(safe_norm), (X,)),
    ("square-overflow", Do(lambda x: x.sigmoid().pow(2).mean(-1)), (X,)),
    ("square-overflow", Do(lambda x: x.clamp(-100, 100).pow(2).mean(-1)), (X,)),
    ("square-overflow", Do(lambda x: (x * x.roll(1, -1)).mean(-1)), (X,)),
    ("square-overflow", Do(lambda x: x.relu().pow(2) * 0.5), (X,)),
    ("square-overflow", Do(lambda x: x.pow(0.5).mean()), (X.abs(),)),
    ("mask-overflow", Do(lambda a: a.masked_fill(a > 0, -3e4)), (X,)),
    ("mask-overflow", Do(lambda a: a.masked_fill(a > 0, float("-inf"))), (X,)),
    ("mask-overflow", Do(lambda a: a.masked_fill(a > 0, -65504.0)), (X,)),
    ("mask-overflow", Do(lambda a: a.masked_fill(a > -1e9, 0.0)), (X,)),
    ("mask-overflow", Do(lambda a, m: a + m, mask=torch.full((16, 8), float("-inf")).triu(1)), (X,)),
    ("gqa", Do(lambda x: F.scaled_dot_product_attention(x, x[:, :2].repeat(1, 2, 1, 1), x)), (X,)),
    ("circular-pad", Do(lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")), (X,)),
    ("antialias-dropped", Do(lambda x: F.interpolate(x, (8, 4), mode="bilinear")), (X,)),
    ("ceil-pool", nn.AvgPool2d(3, 2), (X,)),
]
#: Rules about inputs have tests of their own.
OF_INPUTS = {"int64-input", "dynamic-shape"}


def ids(cases: list[Case]) -> list[str]:
    return [f"{rule}-{i}" for i, (rule, *_) in enumerate(cases)]


@pytest.mark.parametrize(("rule", "part", "inputs"), MET, ids=ids(MET))
def test_a_pattern_is_found_in_its_module(rule: str, part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert set(met(part, *inputs)) - {rule} <= {"rank-5"}, "one case shows one rule"
    assert rule in met(part, *inputs)


@pytest.mark.parametrize(("rule", "part", "inputs"), MISSED, ids=ids(MISSED))
def test_what_stands_beside_a_pattern_is_not_found(rule: str, part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert met(part, *inputs) == {}


def test_a_rotation_by_complex_numbers_is_captured_as_real_ones() -> None:
    assert set(met(Do(rotated), X)) == {"rank-5"}
    assert operations(Do(rotated), X)


def test_every_rule_is_met_and_missed() -> None:
    assert {rule for rule, *_ in MET} == {rule for rule, *_ in MISSED} == set(_book().rules) - OF_INPUTS


def test_integers_of_64_bits_as_inputs() -> None:
    found = lint(program(Do(lambda i, j: (i * 1.0, j * 1.0)), IDS, IDS.int()), None)
    assert [(f.module, f.detail) for f in found if f.rule == "int64-input"] == [("", "input in0 of entry main")]


def test_inputs_have_too_many_dimensions_themselves() -> None:
    for shape, rule in (((1, 2, 2, 2, 2), "rank-5"), ((1, 2, 2, 2, 2, 2), "rank-6")):
        found = lint(program(Do(lambda x: x.sum((2, 3, 4))), torch.randn(shape)), None)
        assert [(f.rule, f.module) for f in found] == [(rule, "")]


def test_a_dynamic_shape() -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    part = Do(lambda x: (x.reshape(x.shape[0], -1) * x.shape[0]).mean(-1))
    found = lint(program(part, torch.randn(3, 4, 8), dynamic_shapes={"inputs": ({0: rows},)}), None)
    assert [(f.rule, f.module) for f in found] == [("dynamic-shape", "")]
    assert "input in0 of entry main" in found[0].detail
    assert lint(program(part, torch.randn(3, 4, 8)), None) == []


@pytest.mark.parametrize(
    ("place", "widest"),
    [(None, 16384), ("iphone-13", 16384), ("macbook-m3", 16384), ("iphone-15-pro", 65536), ("ipad-m4", 65536)],
)
def test_the_chip_decides_how_wide_a_tensor_may_be(place: str | None, widest: int) -> None:
    part = Do(lambda x: x * 2.0)
    assert met(part, torch.randn(1, 1, widest), place=place) == {}
    assert f"more than {widest}" in met(part, torch.randn(1, 1, widest + 1), place=place)["too-wide"].detail


def test_a_branch_of_a_condition_is_looked_into() -> None:
    part = Do(lambda x: torch.cond(x.sum() > 0, lambda a: a.pow(2).mean(-1), lambda a: a.mean(-1), (x,)))
    assert met(part, X)["square-overflow"].module == "body.part"


def test_one_finding_for_each_module_with_what_was_found_how_often() -> None:
    two = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    found = [f for f in lint(program(two, TOKENS), None) if f.rule == "linear-layout"]
    assert [f.module for f in found] == ["body.part.0", "body.part.2"]
    thrice = met(Do(lambda x: x.masked_fill(x > 0, -1e9).masked_fill(x > 1, -1e9) - 1e6), X)["mask-overflow"]
    assert thrice.detail == "2 x masked_fill -1e+09; sub -1e+06"


def test_a_saved_program_has_the_same_findings(tmp_path: Path) -> None:
    made = program(Do(write, state=torch.zeros(1, 40, 64)), TOKENS)
    again = Program.load(tmp_path, made.save(tmp_path))
    assert lint(again, None) == lint(made, None) != []


def test_fmvit_has_no_fifth_dimension_and_no_integers() -> None:
    x = torch.randn(1, 1, 32, 32)
    deploy = reparameterize(fmvit_digits().eval(), (x,)).model
    found = lint(capture(deploy, {"x": x}, ("logits",)), None)
    assert {f.rule for f in found} == {"attention-not-fused"}
    assert all(f.module.endswith(".attention") for f in found)


def operations(part: nn.Module, *inputs: Tensor) -> list[Any]:
    """Of the fp16 program that coremltools itself makes of the graph, without any of our mends."""
    with quiet():
        import coremltools as ct

        graph = program(part, *inputs).entries["main"].graph.run_decompositions({})
        made = ct.convert(graph, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    return list(made._mil_program.functions["main"].operations)


JUDGED = [
    case for case in MET + MISSED if case[0] in ("complex", "rank-6", "attention-not-fused", "gqa", "circular-pad")
]


@pytest.mark.parametrize(("rule", "part", "inputs"), JUDGED, ids=ids(JUDGED))
def test_coremltools_agrees(rule: str, part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """What is an error it cannot convert, and what is none it can; its attention is fused where nothing was found."""
    found = met(part, *inputs)
    if "gqa" in found or any(f.severity == "error" for f in found.values()):
        with pytest.raises((ValueError, NotImplementedError)):
            operations(part, *inputs)
        return
    made = operations(part, *inputs)
    assert max(len(value.shape) for op in made for value in op.outputs) <= 5
    calls = [str(node.target) for node in program(part, *inputs).entries["main"].graph.graph.nodes]
    fused = "scaled_dot_product_attention" in {op.op_type for op in made}
    assert fused == ("aten.scaled_dot_product_attention.default" in calls and "attention-not-fused" not in found)


LOW = [case for case in MET + MISSED if case[0] == "mask-overflow"]


@pytest.mark.parametrize(("rule", "part", "inputs"), LOW, ids=ids(LOW))
def test_coremltools_keeps_float32_or_makes_minus_infinity_of_a_low_constant(
    rule: str, part: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    made = operations(part, *inputs)
    wide = {op.op_type for op in made if op.outputs[0].dtype.__name__ == "fp32"} - {"const", "cast"}
    constants = [op.outputs[0].val for op in made if op.op_type == "const" and op.outputs[0].dtype.__name__ == "fp16"]
    infinite = any((value == -torch.inf).any() for value in constants)
    if rule in met(part, *inputs):
        assert wide or infinite
    else:
        assert not wide


def test_every_rule_says_why_and_what_to_do() -> None:
    for name, rule in _book().rules.items():
        assert "https://" in rule.evidence or "measured: " in rule.evidence, name
        assert rule.mend, name
