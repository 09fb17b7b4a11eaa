"""Tables of operations: hand-computed on small graphs, and equal to the model's own count on whole ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeattn
from edgeattn import targets
from edgeattn.bundle import Bundle
from edgeattn.capture import capture
from edgeattn.capture.decoder import caches_of, capture_decoder
from edgeattn.core.errors import UsageError
from edgeattn.core.specs import StepShape
from edgeattn.models.build import build
from edgeattn.models.cost import count
from edgeattn.pipeline.export import make_job
from edgeattn.reparam import reparameterize
from edgeattn.targets.base import Artifact, LowerPlan, OpCost
from edgeattn.targets.onnx_graph.operations import operations_of

FLOAT = 4


def rows(text: str, **inputs: tuple[int, ...]) -> dict[str, OpCost]:
    """The table of a graph in ONNX's own text, by the first output; what is declared beside it are weights, zeros."""
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n' + text)
    for value in proto.graph.value_info:
        kind, shape = value.type.tensor_type.elem_type, [d.dim_value for d in value.type.tensor_type.shape.dim]
        size = math.prod(shape) if kind != onnx.TensorProto.INT4 else math.prod(shape) // 2
        wide = onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
        proto.graph.initializer.append(onnx.helper.make_tensor(value.name, kind, shape, bytes(size * wide), raw=True))
    del proto.graph.value_info[:]
    return {row.outputs[0]: row for row in operations_of(ir.serde.deserialize_model(proto), inputs)}


def moved(row: OpCost) -> tuple[int, int, int]:
    return row.bytes_in, row.bytes_weights, row.bytes_out


def test_convolutions_by_hand() -> None:
    table = rows(
        """g (float[1,8,10,10] x) => (float[1,6,20,20] z)
        <float[16,8,3,3] w, float[16] b, float[16,1,3,3] d, float[16,6,2,2] t> {
            a = Conv<pads=[1,1,1,1]>(x, w, b)
            c = Conv<group=16, pads=[1,1,1,1]>(a, d)
            z = ConvTranspose<strides=[2,2]>(c, t)
        }"""
    )
    assert (table["a"].macs, table["a"].channels, table["a"].fan) == (16 * 100 * 8 * 9, 8, 16)
    assert moved(table["a"]) == (8 * 100 * FLOAT, (16 * 8 * 9 + 16) * FLOAT, 16 * 100 * FLOAT)
    assert (table["c"].macs, table["c"].channels, table["c"].fan) == (16 * 100 * 9, 1, 1)
    assert (table["z"].macs, table["z"].channels, table["z"].fan) == (16 * 100 * 6 * 4, 16, 6)
    assert {row.dtype for row in table.values()} == {"fp32"}
    assert [row.inputs for row in table.values()] == [("x",), ("a",), ("c",)]


def test_products_by_hand() -> None:
    table = rows(
        """g (float[5,7] x, float[2,3,4,7] q, float[3,7,6] k) => (float[5,9] y, float[2,3,4,6] s, float[2,3,4,6] e)
        <float[7,9] w> {
            y = Gemm(x, w)
            s = MatMul(q, k)
            e = Einsum<equation="abij,bjk->abik">(q, k)
        }"""
    )
    assert (table["y"].macs, table["y"].channels) == (5 * 7 * 9, 7)
    assert moved(table["y"]) == (35 * FLOAT, 63 * FLOAT, 45 * FLOAT)
    assert table["s"].macs == table["e"].macs == 2 * 3 * 4 * 7 * 6
    assert moved(table["s"]) == ((168 + 126) * FLOAT, 0, 144 * FLOAT)


def test_views_constants_and_lookups_move_what_they_touch() -> None:
    table = rows(
        """g (float[4,6] x, int64[3] i) => (float[24] v, float[3,8] r, float[4,6] y)
        <float[100,8] t, int64[1] n, float[6] w> {
            v = Reshape(x, n)
            r = Gather(t, i)
            c = Mul(w, w)
            y = Add(x, c)
        }"""
    )
    assert table["v"].bytes == table["c"].bytes == 0  # the second one is known before anything runs
    assert moved(table["r"]) == (0, 3 * 8 * FLOAT, 3 * 8 * FLOAT)
    assert moved(table["y"]) == (24 * FLOAT, 6 * FLOAT, 24 * FLOAT)
    assert {row.macs for row in table.values()} == {0}


def test_a_pair_around_an_operation_is_free_and_makes_it_an_integer_one() -> None:
    table = rows(
        """g (float[2,8] x) => (float[2,4] y)
        <int8[8,4] w, float[1] s, uint8[1] z, int8[1] o> {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            f = DequantizeLinear(w, s, o)
            m = MatMul(d, f)
            a = Relu(m)
            p = QuantizeLinear(a, s, z)
            y = DequantizeLinear(p, s, z)
        }"""
    )
    assert [table[name].bytes for name in "qdfpy"] == [0] * 5
    assert (table["m"].dtype, table["m"].macs) == ("w8a8", 2 * 8 * 4)
    assert moved(table["m"]) == (16, 32 + FLOAT + 1, 8)  # a scale and a zero point are stored, too
    assert table["a"].bytes_out == 8


def test_small_weights_alone_are_small_and_computed_in_floats() -> None:
    table = rows(
        """g (float[2,8] x) => (float[2,4] y)
        <int4[8,4] w, float[1] s> {
            f = DequantizeLinear(w, s)
            y = MatMul(x, f)
        }"""
    )
    assert (table["y"].dtype, table["y"].bytes_weights, table["f"].bytes) == ("fp32", 16 + FLOAT, 0)
    blocks = rows(
        """g (float[1,3,64] x) => (float[1,3,16] y)
        <uint8[16,2,16] w, float[32] s> {
            y = com.microsoft.MatMulNBits<K=64, N=16, bits=4, block_size=32, accuracy_level=4>(x, w, s)
        }"""
    )["y"]
    assert (blocks.macs, blocks.dtype, blocks.bytes_weights) == (3 * 64 * 16, "w8a8", 16 * 32 + 32 * FLOAT)


def test_dimensions_that_vary_are_the_entry_s() -> None:
    text = """g (float[1,n,8] x, float[1,s,8] k) => (float[1,n,s] y) {
        t = Transpose<perm=[0,2,1]>(k)
        y = MatMul(x, t)
    }"""
    assert rows(text, x=(1, 3, 8), k=(1, 50, 8))["y"].macs == 3 * 50 * 8
    assert rows(text, x=(1, 1, 8), k=(1, 50, 8))["y"].macs == 50 * 8


def test_attention_has_two_products() -> None:
    table = rows(
        """g (float[1,2,5,8] q, float[1,2,7,8] k, float[1,2,7,6] v) => (float[1,2,5,6] y) {
            y = Attention(q, k, v)
        }"""
    )
    assert table["y"].macs == 2 * 5 * 7 * (8 + 6)


class Mixed(nn.Module):
    """A bit of all: convolutions of every kind, a product of data, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.key = nn.Linear(4, 5)
        self.head = nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.wide(self.depth(F.relu(self.first(x)))))
        tokens = x.flatten(2).transpose(1, 2)
        keys = self.key(tokens)
        scores: Tensor = (torch.sigmoid(keys) @ keys.transpose(1, 2)).softmax(-1)
        return self.head((scores @ keys).mean(1))


TARGETS = ("onnx", "tflite", "coreml")


def lower(target: str, program: Any, folder: Path, precision: str = "fp32") -> Artifact:
    found = targets.get(target)
    folder.mkdir(exist_ok=True)
    settled = found.settle({}, None, precision)
    if program.decoder is not None:
        settled = found.settle_decoder(settled, {}, None, precision)
    metadata = {"recipe": "test", "edgeattn": "0", "recipe_sha256": "0" * 64, "weights": "random"}
    return found.lower(program, LowerPlan(precision, [], metadata, options=settled), folder)


@pytest.mark.parametrize("target", TARGETS)
def test_a_small_model_by_hand(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(1, 3, 6, 6)
    artifact = lower(target, capture(model, {"x": x}, ("y",)), tmp_path)
    table = targets.get(target).operations(artifact, "main")
    by_macs = sorted((row.macs, row.channels, row.fan, row.taps) for row in table if row.macs)
    expected = [(8 * 36 * 9, 1, 1, 9), (8 * 36 * 27, 3, 8, 9), (36 * 8 * 4 * 4, 8, 4, 4), (144 * 4 * 5, 4, 5, 1)]
    expected += [(5 * 10, 5, 10, 1), (144 * 144 * 5, 5, 144, 1), (144 * 144 * 5, 144, 5, 1)]
    assert by_macs == sorted(expected)
    assert sum(row.macs for row in table) == count(model, x).macs
    weights = {row.macs: row.bytes_weights for row in table if row.macs in (50, 8 * 36 * 9)}
    assert weights[50] == (50 + 10) * FLOAT
    assert weights[8 * 36 * 9] == (8 * 9 + 8) * FLOAT
    modules = {row.module for row in table if row.macs}
    assert {"first", "depth", "wide", "head"} <= modules
    assert len({row.name for row in table}) == len(table)
    with pytest.raises(UsageError, match="no such entry"):
        targets.get(target).operations(artifact, "other")


def test_litert_s_names(tmp_path: Path) -> None:
    artifact = lower("tflite", capture(nn.Linear(4, 3).eval(), {"x": torch.randn(2, 4)}, ("y",)), tmp_path)
    (row,) = targets.get("tflite").operations(artifact, "main")
    assert (row.name, row.op, row.macs) == ("[y]:0", "FULLY_CONNECTED", 24)


@pytest.mark.parametrize("target", TARGETS)
def test_the_digits_model_has_its_own_macs(target: str, home: Path, request: pytest.FixtureRequest) -> None:
    built = build(make_job("fmvit-digits").resolved)
    inputs = tuple(built.random_inputs(0).values())
    if target == "coreml":
        bundle = edgeattn.export("fmvit-digits", target=target, output=home / "bundles")
    else:
        bundle = request.getfixturevalue({"onnx": "digits", "tflite": "digits_tflite"}[target])
    table = targets.get(target).operations(bundle.artifact(), "main")
    assert sum(row.macs for row in table) == count(reparameterize(built.model, inputs).model, inputs).macs
    assert sum(row.bytes_weights for row in table) >= count(built.model, inputs).parameters


class Held(nn.Module):
    """An exported module, which knows no eval mode, in one that does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.held = [module]

    def forward(self, *inputs: Tensor) -> Any:
        return self.held[0](*inputs)


@pytest.mark.parametrize("target", TARGETS)
def test_a_decoder_s_step_has_its_own_macs(target: str, tmp_path: Path) -> None:
    built = build(make_job("plm-tiny").resolved)
    deploy = reparameterize(built.model, tuple(built.random_inputs(0).values())).model
    shape = StepShape("decode", 1, 64, dynamic=target == "onnx")
    caches = caches_of(deploy, 64)
    program = capture_decoder(deploy, caches, [shape])
    entry = program.entries["decode"]
    nodes = {n.name: n.meta["val"] for n in entry.graph.graph.nodes if n.op == "placeholder"}
    widths = dict(caches.rows)
    feeds = [
        torch.zeros(1, 64, widths[name]) if name in widths else torch.zeros(tuple(value.shape), dtype=value.dtype)
        for name, user in zip(entry.inputs, entry.graph.graph_signature.user_inputs, strict=True)
        for value in [nodes[str(user)]]
    ]
    artifact = lower(target, program, tmp_path, "fp16" if target == "coreml" else "fp32")
    table = targets.get(target).operations(artifact, "decode")
    assert sum(row.macs for row in table) == count(Held(entry.graph.module()), feeds).macs
    assert all(math.isfinite(row.bytes) and row.bytes >= 0 for row in table)


def test_int8_of_a_bundle_is_small(home: Path, digits: Bundle) -> None:
    small = edgeattn.export("fmvit-digits", precision="w8a8", output=home / "bundles")
    onnx_target = targets.get("onnx")
    table, wide = (onnx_target.operations(bundle.artifact(), "main") for bundle in (small, digits))
    assert sum(row.macs for row in table) == sum(row.macs for row in wide)
    assert sum(row.bytes_weights for row in table) < 0.3 * sum(row.bytes_weights for row in wide)
    convolutions = [row for row in table if row.op == "Conv"]
    assert {row.dtype for row in convolutions} == {"w8a8"}


def test_targets_without_a_graph_say_nothing(tmp_path: Path) -> None:
    artifact = lower("null", capture(nn.Linear(4, 3).eval(), {"x": torch.randn(2, 4)}, ("y",)), tmp_path)
    assert targets.get("null").operations(artifact, "main") == []


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    for target, name in (("onnx", "model.onnx"), ("tflite", "model.tflite")):
        module = nn.Linear(4, 3).eval()
        artifact = lower(target, capture(module, {"x": torch.randn(2, 4)}, ("y",)), tmp_path / target)
        (tmp_path / target / name).write_bytes(b"\x20\x00\x00\x00TFL3 not a model")
        with pytest.raises(UsageError, match=r"cannot be read|damaged"):
            targets.get(target).operations(artifact, "main")
