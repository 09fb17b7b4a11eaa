"""linear, matmul, einsum and attention against sums in float64 or integers, and coremltools' own inference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgeattn.core.numerics import Array
from edgeattn.targets.coreml.mil.registry import OPS
from tests.targets.coreml.harness import inferred, interpret, mb
from tests.targets.coreml.judging import agree, judgeable, numbers

FAMILY = ("einsum", "linear", "matmul", "scaled_dot_product_attention")

LINEAR = [((5,), 4), ((3, 5), 4), ((2, 3, 5), 1), ((2, 1, 3, 5), 4)]
# Shapes of x and y, and what is transposed.
MATMUL: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, bool]]] = [
    ((3, 4), (4, 5), {}),
    ((4, 3), (4, 5), {"transpose_x": True}),
    ((2, 3, 4), (2, 5, 4), {"transpose_y": True}),
    ((2, 4, 3), (2, 5, 4), {"transpose_x": True, "transpose_y": True}),
    ((10, 4, 3), (2, 10, 3, 2), {}),
    ((2, 1, 4, 3), (5, 3, 2), {}),
    ((4,), (4, 5), {}),
    ((4,), (3, 5, 4), {"transpose_y": True}),
]
EINSUM = [
    ("nchw,nwhu->nchu", (2, 3, 4, 5), (2, 5, 4, 6)),
    ("nchw,nwhu->nchu", (1, 3, 4, 5), (2, 5, 1, 6)),
    ("abcd,adce->abce", (2, 3, 1, 5), (1, 5, 4, 2)),
    ("chw,whr->chr", (3, 4, 5), (5, 4, 2)),
    ("chw,whr->chr", (3, 1, 5), (5, 4, 2)),
]
# Shapes of query, key and value, and of the mask.
ATTENTION: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]] = [
    ((2, 3, 4), (2, 5, 4), (2, 5, 6), None),
    ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), None),
    ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 3, 5)),
    ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), (3, 5)),
    ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6), (2, 1, 1, 5)),
    ((2, 3, 4), (2, 5, 4), (2, 5, 4), (5,)),
    ((1, 2, 2, 3, 4), (1, 2, 2, 5, 4), (1, 2, 2, 5, 4), (2, 1, 3, 5)),
]
#: Cases whose results coremltools infers too.
JUDGED: list[tuple[str, Any]] = [
    *(("linear", case) for case in LINEAR),
    *(("matmul", case) for case in MATMUL),
    *(("einsum", case) for case in EINSUM),
    *(("scaled_dot_product_attention", case) for case in ATTENTION),
]
TYPES = [("float32", 15), ("float16", 18), ("int32", 15), ("int32", 18)]


def judge(build: Any, feeds: dict[str, Array], opset: int, found: list[Array], dtype: str) -> None:
    judged = inferred(build, feeds, opset)
    assert judged is not None
    agree(found, judged, dtype, 4)


@pytest.mark.parametrize(("dtype", "opset"), TYPES)
@pytest.mark.parametrize("case", LINEAR)
@pytest.mark.parametrize("biased", [False, True])
def test_linear(case: Any, biased: bool, dtype: str, opset: int) -> None:
    shape, width = case
    x, weight, bias = (numbers(i, s, dtype) for i, s in enumerate((shape, (width, shape[-1]), (width,))))

    def build(x: Any) -> Any:
        return mb.linear(x=x, weight=weight, bias=bias if biased else None)

    rows = x.reshape(-1, shape[-1]).astype(np.float64)
    expected = np.array([[(row * w).sum() for w in weight.astype(np.float64)] for row in rows])
    expected = expected.reshape(*shape[:-1], width) + (bias.astype(np.float64) if biased else 0)
    found = interpret(build, {"x": x}, opset)
    agree(found, [expected], dtype)
    judge(build, {"x": x}, opset, found, dtype)


@pytest.mark.parametrize("mode", ["fp32acc", "native"])
@pytest.mark.parametrize(
    ("dtype", "other"), [("float16", "float32"), ("float32", "float16"), ("int32", "float32"), ("float32", "int32")]
)
def test_a_constant_operand_has_another_type_from_ios17_on(dtype: str, other: str, mode: str) -> None:
    x, weight = numbers(1, (3, 5), dtype), numbers(2, (4, 5), other)
    bias = numbers(3, (4,), other)
    found = interpret(
        lambda x: [
            mb.linear(x=x, weight=weight, bias=bias),
            mb.matmul(x=x, y=weight, transpose_y=True),
            mb.matmul(x=weight, y=x, transpose_y=True),
        ],
        {"x": x},
        17,
        mode,
    )
    product = x.astype(np.float64) @ weight.T.astype(np.float64)
    exact = [product + bias, product, product.T]
    assert [str(item.dtype) for item in found] == [dtype] * 3
    agree(found, [np.trunc(item) for item in exact] if dtype == "int32" else exact, dtype, 2)


@pytest.mark.parametrize(("dtype", "opset"), TYPES)
@pytest.mark.parametrize("case", MATMUL)
def test_matmul(case: Any, dtype: str, opset: int) -> None:
    x_shape, y_shape, parameters = case
    feeds = {"x": numbers(1, x_shape, dtype), "y": numbers(2, y_shape, dtype)}

    def build(x: Any, y: Any) -> Any:
        return mb.matmul(x=x, y=y, **parameters)

    left = "i" if len(x_shape) == 1 else "...ik" if parameters.get("transpose_x") else "...ki"
    right = "...ji" if parameters.get("transpose_y") else "...ij"
    expected = np.einsum(
        f"{left},{right}->...{'' if len(x_shape) == 1 else 'k'}j", *(f.astype(np.float64) for f in feeds.values())
    )
    found = interpret(build, feeds, opset)
    agree(found, [expected], dtype)
    judge(build, feeds, opset, found, dtype)


def test_matmul_with_a_vector_after() -> None:
    # coremltools' builder fails on these; the text of MIL has them.
    x, y = torch.randn(2, 3, 4, generator=torch.manual_seed(1)), torch.arange(4.0)
    matmul = OPS["matmul"].function
    agree([matmul(x, y).numpy()], [(x * y).sum(-1).numpy()], "float32")
    agree([matmul(y, y, True, True).numpy()], [np.float32(14)], "float32")


@pytest.mark.parametrize(("dtype", "opset"), [("float32", 15), ("float16", 17)])
@pytest.mark.parametrize("case", EINSUM)
def test_einsum(case: Any, dtype: str, opset: int) -> None:
    equation, x_shape, y_shape = case
    feeds = {"x": numbers(1, x_shape, dtype), "y": numbers(2, y_shape, dtype)}

    def build(x: Any, y: Any) -> Any:
        return mb.einsum(values=(x, y), equation=equation)

    x, y = (f.astype(np.float64) for f in feeds.values())
    # [*, C, H, W1] and [*, W1, H, W2]: products of matrices, H being a batch.
    expected = np.moveaxis(np.moveaxis(x, -2, -3) @ np.moveaxis(y, -2, -3), -3, -2)
    found = interpret(build, feeds, opset)
    agree(found, [expected], dtype)
    judge(build, feeds, opset, found, dtype)


def attended(query: Array, key: Array, value: Array, added: Array | float) -> Array:
    """The formula in MIL's text, in float64."""
    q, k, v = (item.astype(np.float64) for item in (query, key, value))
    with np.errstate(invalid="ignore"):
        scores = np.einsum("...le,...se->...ls", q, k) / np.sqrt(q.shape[-1]) + added
        weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("...ls,...sv->...lv", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("index", range(len(ATTENTION)))
def test_attention(index: int, kind: str, dtype: str) -> None:
    *shapes, mask_shape = ATTENTION[index]
    names = ("query", "key", "value")
    feeds = {n: numbers(i + index, s, dtype) for i, (n, s) in enumerate(zip(names, shapes, strict=True)) if s}
    added: Array | float = 0.0
    if mask_shape is not None:
        mask = numbers(index + 9, mask_shape, dtype)
        feeds["attn_mask"] = mask > -0.5 if kind == "bool" else mask
        feeds["attn_mask"][..., 2] = kind == "bool"
        added = np.where(feeds["attn_mask"], 0.0, -np.inf) if kind == "bool" else feeds["attn_mask"].astype(np.float64)

    def build(query: Any, key: Any, value: Any, attn_mask: Any = None) -> Any:
        return mb.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=attn_mask)

    found = interpret(build, feeds)
    agree(found, [attended(feeds["query"], feeds["key"], feeds["value"], added)], dtype, 2)
    judge(build, feeds, 18, found, dtype)


@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_a_row_that_attends_to_nothing_is_nan_other_than_in_pytorch(kind: str) -> None:
    query, key, value = (numbers(i, (1, 2, s, 4)) for i, s in enumerate((3, 5, 5)))
    allowed = np.ones((3, 5), bool)
    allowed[1], allowed[2, :4] = False, False
    mask = allowed if kind == "bool" else np.where(allowed, 0, -np.inf).astype(np.float32)

    def build(query: Any, key: Any, value: Any) -> Any:
        return mb.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=mask)

    feeds = {"query": query, "key": key, "value": value}
    found = interpret(build, feeds)
    expected = attended(query, key, value, np.where(allowed, 0, -np.inf))
    assert np.isnan(expected[:, :, 1]).all()
    assert np.isfinite(np.delete(expected, 1, 2)).all()
    agree(found, [expected], "float32", 2)
    judge(build, feeds, 18, found, "float32")
    torchs = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(item) for item in (query, key, value, mask))
    )
    assert not torchs[:, :, 1].any()


@pytest.mark.parametrize("mode", ["fp32acc", "native"])
def test_a_mask_has_another_float_type(mode: str) -> None:
    feeds = {n: numbers(i, (1, 2, 3, 4), "float16") for i, n in enumerate(("query", "key", "value"))}
    mask = numbers(9, (3, 3))
    found = interpret(
        lambda query, key, value: mb.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=mask),
        feeds,
        18,
        mode,
    )
    agree(found, [attended(feeds["query"], feeds["key"], feeds["value"], mask.astype(np.float64))], "float16", 4)


def test_all_that_coremltools_infers_is_judged() -> None:
    assert judgeable(FAMILY) == {name for name, _ in JUDGED}
