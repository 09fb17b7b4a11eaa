"""The ONNX target on small models, each with one trap in it."""

import os

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeattn.capture import capture, run_eager
from edgeattn.core.errors import ConversionFailed, UsageError
from edgeattn.core.numerics import TOLERANCES, compare
from edgeattn.targets.base import LowerPlan
from edgeattn.targets.onnx import OnnxTarget
from edgeattn.targets.onnx_graph import execute, fp16
from edgeattn.targets.onnx_graph import files as onnx_files

TARGET = OnnxTarget()


class Fn(nn.Module):
    """A forward out of a function, with modules and tensors that it uses."""

    def __init__(self, function, **parts) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor):
        return self.function(self, *inputs)


class RMSNorm(nn.Module):
    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Lowered:
    def __init__(self, folder, model, inputs, precision="fp32", outputs=(), samples=None) -> None:
        model.eval()
        torch.manual_seed(0)
        self.feeds = {name: value.numpy() for name, value in inputs.items()}
        self.expected = {k: v.detach().numpy() for k, v in run_eager(model, inputs, outputs).items()}
        program = capture(model, inputs, tuple(self.expected))
        folder.mkdir(exist_ok=True)
        plan = LowerPlan(precision, samples or [self.feeds], {"recipe": "r", "edgeattn": "1.2.3"})
        self.artifact = TARGET.lower(program, plan, folder)
        self.runtime = TARGET.open(self.artifact)
        self.file = folder / "model.onnx"
        self.proto = onnx.load(self.file)
        self.precision = precision

    @property
    def kept(self) -> list[dict[str, str]]:
        return self.artifact.facts["entries"]["main"]["kept_in_fp32"]

    def check(self, tolerance: float | None = None) -> None:
        """The file is valid, and runs and traces to the model's numbers."""
        onnx.checker.check_model(self.proto, full_check=True)
        tolerance = TOLERANCES[self.precision] if tolerance is None else tolerance
        outputs = self.runtime.run("main", self.feeds)
        assert list(outputs) == list(self.expected)
        for name, value in self.expected.items():
            assert outputs[name].dtype == value.dtype
            assert compare(value, outputs[name]).holds(tolerance), (name, compare(value, outputs[name]))
        traced = {item.name: item.value for item in self.runtime.trace("main", self.feeds)}
        for name in set(traced) & set(self.expected):
            assert compare(self.expected[name], traced[name]).holds(tolerance), name


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    for _ in range(3):
        model.train()(x)
    return model


X = randn(2, 8)
IMAGE = randn(1, 3, 8, 8)
TOKENS = randn(1, 6, 8)
ZERO_ROW = torch.cat([X, torch.zeros(1, 8)])
HIDDEN = torch.full((6, 6), -torch.inf).triu(1)


def attend(m, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    return torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5 + m.mask, -1) @ v


MODELS = {
    "conv_bn": lambda: (
        settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), randn(8, 3, 8, 8)),
        {"x": IMAGE},
    ),
    "layer_norm": lambda: (nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, eps=1e-12)), {"x": X}),
    "attention": lambda: (nn.MultiheadAttention(8, 2, batch_first=True), {"q": TOKENS, "k": TOKENS, "v": TOKENS}),
    "infinite_mask": lambda: (Fn(attend, qkv=nn.Linear(8, 24), mask=HIDDEN), {"x": TOKENS}),
    "smallest_mask": lambda: (Fn(attend, qkv=nn.Linear(8, 24), mask=HIDDEN.clamp(min=-3.4e38)), {"x": TOKENS}),
    "int64_input": lambda: (nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3)), {"ids": torch.arange(5)[None]}),
    "uint8_input": lambda: (Fn(lambda m, x: x.float() / 255 - 0.5), {"x": torch.arange(8, dtype=torch.uint8)}),
    "two_outputs": lambda: (Fn(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(8, 2), b=nn.Linear(8, 3)), {"x": X}),
    "output_used_inside": lambda: (Fn(lambda m, x: (y := m.a(x), (y * 3).sum(-1)), a=nn.Linear(8, 8)), {"x": X}),
    "same_output_twice": lambda: (Fn(lambda m, x: (y := m.a(x), y), a=nn.Linear(8, 8)), {"x": X}),
    "output_is_input": lambda: (nn.Identity(), {"x": X}),
    "output_is_also_input": lambda: (Fn(lambda m, x: (x, x * 2)), {"x": X}),
    "folded_output": lambda: (Fn(lambda m, x: (x + 1, m.w * 2), w=torch.ones(3)), {"x": X}),
    "only_folded_output": lambda: (Fn(lambda m, x: m.w * 2, w=torch.ones(3)), {"x": X}),
    "none_among_outputs": lambda: (Fn(lambda m, x: (x * 2, None)), {"x": X}),
    "integers_only": lambda: (Fn(lambda m, x: x + 1), {"x": torch.arange(4)}),
    "bool_output": lambda: (Fn(lambda m, x: x > 0), {"x": X}),
    "argmax": lambda: (Fn(lambda m, x: x.argmax(-1)), {"x": X}),
    "double": lambda: (Fn(lambda m, x: x * 2), {"x": X.double()}),
    "unused_input": lambda: (Fn(lambda m, x, y: x * 2), {"x": X, "y": X}),
    "scalar": lambda: (Fn(lambda m, x, y: (x * y).sum()), {"x": X, "y": torch.tensor(2.0)}),
    "resize": lambda: (Fn(lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear")), {"x": IMAGE}),
    "resize_to": lambda: (Fn(lambda m, x: F.interpolate(x, size=(5, 7), mode="nearest")), {"x": IMAGE}),
    "pooling": lambda: (Fn(lambda m, x: F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 1)), {"x": IMAGE}),
    "cond": lambda: (
        Fn(lambda m, x: torch.cond(x.sum() > 0, lambda y: y * 2 + 1, lambda y: y - 1, (m.a(x),)), a=nn.Linear(8, 8)),
        {"x": X},
    ),
    "lstm": lambda: (Fn(lambda m, x: m.a(x)[0], a=nn.LSTM(8, 4, batch_first=True)), {"x": TOKENS}),
}


#: fp16 goes through the float32 graph too; float32 alone is checked where the exporter itself has a trap.
SINGLE = ("conv_bn", "attention", "output_is_input", "only_folded_output", "integers_only", "resize", "cond")


@pytest.mark.parametrize(("name", "precision"), [*((n, "fp32") for n in SINGLE), *((n, "fp16") for n in MODELS)])
def test_numbers_hold(tmp_path, name, precision):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    lowered = Lowered(tmp_path / "a", model, inputs, precision)
    lowered.check()
    if precision == "fp16" and name not in ("smallest_mask",):
        assert lowered.kept == []


@pytest.mark.parametrize(
    ("inputs", "outputs"), [("x", ("mul",)), ("mul", ("y",)), ("add", ("mul",)), ("w", ("linear",))]
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_any_names_of_inputs_and_outputs(tmp_path, inputs, outputs, precision):
    model = Fn(lambda m, x: m.linear(x * 2 + 1) + m.w, linear=nn.Linear(8, 8), w=torch.ones(8))
    Lowered(tmp_path / "a", model, {inputs: X}, precision, outputs).check()


def test_a_mapping_with_the_key_of_an_input(tmp_path):
    Lowered(tmp_path / "a", Fn(lambda m, x: {"x": x * 2, "y": x + 1}), {"x": X}).check()


TINY = {
    "add": lambda m, x: x / (x.abs().sum(-1, keepdim=True) + 1e-12),
    "rsqrt": lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-12),
    "normalize": lambda m, x: F.normalize(x, dim=-1) * 3,
}


@pytest.mark.parametrize(
    ("how", "precision"), [("add", "fp32"), ("add", "fp16"), ("rsqrt", "fp16"), ("normalize", "fp16")]
)
def test_a_tiny_epsilon_under_a_division_keeps_a_row_of_zeros_finite(tmp_path, how, precision):
    # onnxscript's optimizer takes 1e-12 for 0 and drops the addition; float16 rounds it to 0. The sample shows neither.
    lowered = Lowered(tmp_path / "a", Fn(TINY[how]), {"x": ZERO_ROW}, precision, samples=[{"x": X[[0, 1, 1]].numpy()}])
    lowered.check()
    if precision == "fp16":
        assert {k["op"] for k in lowered.kept} <= {"Add", "Div", "Sqrt", "Reciprocal", "Mul", "Clip", "Expand", "Abs"}
        assert any("rounds it to 0" in k["why"] for k in lowered.kept)


def test_a_tiny_constant_keeps_nothing_behind_the_operation_that_joins(tmp_path):
    model = Fn(lambda m, x: m.b(torch.relu(m.a(F.normalize(x, dim=-1)))), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    lowered = Lowered(tmp_path / "a", model, {"x": X}, "fp16")
    lowered.check()
    assert {k["op"] for k in lowered.kept} == {"Clip", "Expand", "Div"}


def test_a_planted_overflow_is_kept_in_float32_with_its_module_and_nothing_else(tmp_path):
    model = Fn(
        lambda m, x: m.after(m.norm(m.before(x) * m.big)),
        before=nn.Linear(8, 8), norm=RMSNorm(), after=nn.Linear(8, 8), big=torch.full((8,), 1e5),
    )  # fmt: skip
    lowered = Lowered(tmp_path / "a", model, {"x": X}, "fp16")
    lowered.check()
    kept = {(k["module"], k["op"]) for k in lowered.kept}
    assert {("", "Mul"), ("norm", "Pow"), ("norm", "ReduceMean")} <= kept
    assert not any(module in ("before", "after") for module, _ in kept)
    assert all("65504" in k["why"] for k in lowered.kept)
    weights = {i.name: i.data_type for i in lowered.proto.graph.initializer if len(i.dims) == 2}
    assert set(weights.values()) == {onnx.TensorProto.FLOAT16}
    traced = {(t.module, t.op): t.value.dtype for t in lowered.runtime.trace("main", lowered.feeds)}
    assert traced["norm", "ReduceMean"] == np.float32
    assert traced["after", "Gemm"] == np.float16


def test_a_sum_that_overflows_inside_of_a_mean_is_kept(tmp_path):
    x = torch.full((1, 1, 40, 40), 100.0)  # the mean is 100, its sum 160000
    lowered = Lowered(tmp_path / "a", Fn(lambda m, x: x.mean((2, 3))), {"x": x}, "fp16")
    lowered.check()
    assert [k["op"] for k in lowered.kept] == ["ReduceMean"]


def test_every_sample_is_measured(tmp_path):
    samples = [{"x": X.numpy()}, {"x": X.numpy() * 1000}]
    model = Fn(lambda m, x: (x * x).sum(-1).sqrt())
    assert Lowered(tmp_path / "a", model, {"x": X}, "fp16").kept == []
    lowered = Lowered(tmp_path / "b", model, {"x": X * 1000}, "fp16", samples=samples)
    assert lowered.kept
    lowered.check()


def shifted_square(x: Tensor, shift: float) -> Tensor:
    """Each step is near in float16, and their difference far off."""
    return (x + shift).square() - shift**2


def test_every_operation_that_needs_it_is_found_and_what_it_needs_before_it(tmp_path):
    many = Fn(lambda m, x: torch.cat([shifted_square(x * 1e-3, 5 + k / 10) for k in range(12)], -1))
    lowered = Lowered(tmp_path / "a", many, {"x": X}, "fp16")
    lowered.check()
    assert {k["op"] for k in lowered.kept} == {"Sub", "Pow", "Add", "Mul"}


def test_operations_that_need_it_one_after_another_are_all_found(tmp_path):
    def chain(m, x):
        for _ in range(6):
            x = shifted_square(x * 1e-3, 5) * 100
        return x

    Lowered(tmp_path / "a", Fn(chain), {"x": X}, "fp16").check()


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_the_list_is_what_the_graph_keeps_also_when_the_search_ends_early(tmp_path, monkeypatch, rounds):
    monkeypatch.setattr(fp16, "ROUNDS", rounds)
    lowered = Lowered(tmp_path / "a", Fn(lambda m, x: shifted_square(x * 1e-3, 5)), {"x": X}, "fp16")
    assert bool(lowered.kept) == bool(rounds)
    results = {node.name: node.output[0] for node in lowered.proto.graph.node if node.op_type != "Cast"}
    traced = {item.name: item.value.dtype for item in lowered.runtime.trace("main", lowered.feeds)}
    single = {name for name, result in results.items() if traced[result] == np.float32}
    assert single == {k["node"] for k in lowered.kept}


def test_a_constant_that_loses_digits_is_kept(tmp_path):
    model = Fn(lambda m, x: x / (x.abs().sum(-1, keepdim=True) * 1e-6 + 1e-12) * 1e-6)
    lowered = Lowered(tmp_path / "a", model, {"x": X}, "fp16")
    lowered.check()
    assert {"Mul", "Add"} <= {k["op"] for k in lowered.kept if "float16 rounds it to 1.01e-06" in k["why"]}


def test_a_small_jump_is_looked_for_when_an_output_is_too_far_off(tmp_path):
    model = Fn(lambda m, x: (shifted_square(x, 40), (x + 40).square()))
    lowered = Lowered(tmp_path / "a", model, {"x": X}, "fp16")
    lowered.check()
    error = float(lowered.kept[0]["why"].split("relative L2 error ")[1].split()[0])
    assert TOLERANCES["fp16"] < error < fp16.JUMPS[0][0]


INSIDE = {
    "ReduceL2": lambda m, x: torch.linalg.vector_norm(x * 100, dim=-1) / 100,
    "ReduceLogSumExp": lambda m, x: torch.logsumexp(x * 20, -1),
    "InstanceNormalization": lambda m, x: F.instance_norm(x[None] * 100),
}


@pytest.mark.parametrize("op", INSIDE)
def test_what_would_overflow_inside_of_an_operation_is_kept(tmp_path, op):
    lowered = Lowered(tmp_path / "a", Fn(INSIDE[op]), {"x": X}, "fp16")
    lowered.check()
    assert [k["op"] for k in lowered.kept] == [op]
    small = Lowered(tmp_path / "b", Fn(lambda m, x: INSIDE[op](m, x * 0.01)), {"x": X}, "fp16")
    assert small.kept == []


def test_an_average_that_arm_has_no_float16_kernel_for_is_kept(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.AvgPool2d(2), nn.MaxPool2d(2))
    lowered = Lowered(tmp_path / "a", model, {"x": randn(1, 4, 16, 16)}, "fp16")
    lowered.check()
    assert [(k["op"], "on ARM" in k["why"]) for k in lowered.kept] == [("AveragePool", True)]


def test_a_trace_rounds_every_tensor_that_an_operation_reads(tmp_path):
    model = Fn(lambda m, x: (x + 40) * 40 - 1600)  # 1601.25 is 1601 in float16
    lowered = Lowered(
        tmp_path / "a", model, {"x": torch.tensor([1 / 32, 1.0])}, "fp16", samples=[{"x": np.ones(2, "f4")}]
    )
    traced = {item.op: item.value for item in lowered.runtime.trace("main", lowered.feeds)}
    assert lowered.kept == []
    assert traced["Sub"].tolist() == (traced["Mul"] - np.float16(1600)).tolist()


@pytest.mark.parametrize(("size", "kept"), [(100.0, ["GroupNormalization"]), (1.0, [])])
def test_sums_of_squares_are_measured_over_a_group(size, kept):
    text = """<ir_version: 9, opset_import: ["": 20]> g (float[1,4,8] x) => (float[1,4,8] y)
        <float[2] scale = {1, 1}, float[2] bias = {0, 0}> {y = GroupNormalization<num_groups = 2>(x, scale, bias)}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    _, found = fp16.to_fp16(model, [{"x": randn(1, 4, 8).numpy() * size}])
    assert [k.op for k in found] == kept


def test_every_sample_must_hold(tmp_path):
    model = Fn(lambda m, x: shifted_square(x, 5))
    near, far = {"x": X.numpy()}, {"x": X.numpy() * 1e-3}
    assert Lowered(tmp_path / "a", model, {"x": X}, "fp16").kept == []
    Lowered(tmp_path / "b", model, {"x": X * 1e-3}, "fp16", samples=[near, far]).check()


def test_fp16_stores_half_the_bytes_and_keeps_the_signature(tmp_path):
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    single, half = (Lowered(tmp_path / p, model, {"x": X}, p) for p in ("fp32", "fp16"))
    sizes = [lowered.artifact.facts["entries"]["main"]["weight_bytes"] for lowered in (single, half)]
    assert sizes == [4 * (2 * 8 * 64 + 72), 2 * (2 * 8 * 64 + 72)]
    assert single.artifact.entries["main"] == half.artifact.entries["main"]
    assert {t.dtype for t in (*half.artifact.entries["main"].inputs, *half.artifact.entries["main"].outputs)} == {
        "float32"
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["conv_bn", "cond"])
def test_the_file_says_what_it_is_and_nothing_of_this_machine(tmp_path, name, precision):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    lowered = Lowered(tmp_path / "a", model, inputs, precision)
    props = {p.key: p.value for p in lowered.proto.metadata_props}
    assert props == {
        "edgeattn.recipe": "r",
        "edgeattn.edgeattn": "1.2.3",
        "edgeattn.entry": "main",
        "edgeattn.precision": precision,
    }
    assert [(o.domain, o.version) for o in lowered.proto.opset_import] == [("", lowered.artifact.facts["opset"])]
    data = lowered.file.read_bytes()
    for path in (os.getcwd().encode(), b"/home", b"/root", b"/usr", b"/tmp", b"site-packages", b"test_onnx"):
        assert path not in data


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_two_lowerings_give_the_same_bytes(tmp_path, precision):
    torch.manual_seed(0)
    model, inputs = MODELS["conv_bn"]()
    first, second = (Lowered(tmp_path / n, model, inputs, precision).file.read_bytes() for n in "ab")
    assert first == second


def test_trace_gives_the_modules_outputs_whole_or_in_pieces(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 4)), nn.Softmax(-1))
    lowered = Lowered(tmp_path / "a", model, {"x": X})
    whole = list(lowered.runtime.trace("main", lowered.feeds))
    expected, x = {}, X
    for path, module in [("0", model[0]), ("1.0", model[1][0]), ("1.1", model[1][1]), ("2", model[2])]:
        expected[path] = x = module(x)
    assert [item.module for item in whole] == list(expected)
    for item in whole:
        assert compare(expected[item.module].detach().numpy(), item.value).holds(1e-5)
    sessions = []
    session = execute.make_session
    monkeypatch.setattr(execute, "make_session", lambda *a, **k: sessions.append(1) or session(*a, **k))
    for limit, count in [(1, 4), (200, 2)]:  # the tensors have 128, 128, 32 and 32 bytes
        sessions.clear()
        monkeypatch.setattr(execute, "TRACE_BYTES", limit)
        pieces = list(lowered.runtime.trace("main", lowered.feeds))
        assert len(sessions) == count
        assert [(p.name, p.module, p.op) for p in pieces] == [(w.name, w.module, w.op) for w in whole]
        assert all(np.array_equal(p.value, w.value) for p, w in zip(pieces, whole, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_large_weights_stand_beside_the_graph(tmp_path, monkeypatch, precision):
    monkeypatch.setattr(onnx_files, "EXTERNAL_BYTES", 100)
    torch.manual_seed(0)
    lowered = Lowered(tmp_path / "a", nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 2)), {"x": X}, precision)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["model.onnx", "model.onnx.data"]
    lowered.check()


@torch.library.custom_op("edgeattn_tests::strange", mutates_args=())
def strange(x: Tensor) -> Tensor:
    return x.clone()


@strange.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_operations_without_onnx_form_are_all_listed_with_their_modules(tmp_path):
    odd = Fn(lambda m, x: strange(x) * 2)
    eigen = Fn(lambda m, x: torch.linalg.eigh(x.T @ x)[0])
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(odd, nn.ReLU()), eigen)
    with pytest.raises(ConversionFailed) as caught:
        Lowered(tmp_path / "a", model, {"x": X})
    assert caught.value.exit_code == 4
    assert caught.value.details == [
        "aten.linalg_eigh.default in module 2",
        "edgeattn_tests.strange.default in module 1.0",
    ]
    assert not list((tmp_path / "a").iterdir())


def test_another_failure_of_the_exporter_is_one_line(tmp_path):
    """A bound of each kind is more than torch 2.13's own exporter takes."""
    with pytest.raises(ConversionFailed) as caught:
        Lowered(tmp_path / "a", Fn(lambda m, x: x.clamp(1e-9, 6)), {"x": X})
    assert caught.value.what == "the ONNX exporter failed"
    assert "\n" not in str(caught.value.why)
    assert str(caught.value.why).partition(":")[0].isidentifier()


@pytest.mark.parametrize(
    ("feeds", "word"),
    [
        ({}, "wanted are x"),
        ({"x": X.numpy(), "y": X.numpy()}, "wanted are x"),
        ({"x": X.numpy()[:1]}, r"takes \(2, 8\) float32"),
        ({"x": X.double().numpy()}, "float64"),
    ],
)
def test_wrong_feeds(tmp_path, feeds, word):
    lowered = Lowered(tmp_path / "a", nn.ReLU(), {"x": X})
    with pytest.raises(UsageError, match=word):
        lowered.runtime.run("main", feeds)
    with pytest.raises(UsageError, match="it has main"):
        lowered.runtime.run("decode", lowered.feeds)


def test_feeds_need_not_be_contiguous(tmp_path):
    lowered = Lowered(tmp_path / "a", nn.ReLU(), {"x": X})
    turned = np.asfortranarray(lowered.feeds["x"])
    assert np.array_equal(lowered.runtime.run("main", {"x": turned})["output"], lowered.expected["output"])
