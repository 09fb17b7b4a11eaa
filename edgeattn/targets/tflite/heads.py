"""Attention heads without transposes: projections of (B, C, H, W) maps as one matmul for each head.

LiteRT keeps images as (B, H, W, C), so that a map (B, heads * d, H, W) which is split into heads has to be transposed
to (B, heads, H * W, d) first, once each for queries, keys and values. A 1x1 convolution is a matmul; with its weights
split by heads, (heads, C, d), and the tokens broadcast over the heads, it gives that very layout with no transpose.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from edgeattn.targets.tflite.edit import Builder, shape_of

aten = torch.ops.aten

_VIEWS = (aten.reshape.default, aten.view.default)
_SWAP = aten.transpose.int


def _value(module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """The constant behind a ``get_attr`` node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = operator.attrgetter(str(node.target))(module)
    return value.detach() if isinstance(value, torch.Tensor) else None


def _pair(value: Any, wanted: int) -> bool:
    return all(n == wanted for n in (value if isinstance(value, list | tuple) else [value]))


def _is_pointwise(node: Any) -> bool:
    """A 1x1 convolution of stride 1 without padding or groups."""
    if not isinstance(node, fx.Node) or node.target is not aten.conv2d.default:
        return False
    weight = shape_of(node.args[1])
    defaults: tuple[Any, ...] = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    stride, padding, dilation, groups = (*node.args, *defaults[len(node.args) :])[3:7]
    plain = _pair(stride, 1) and _pair(padding, 0) and _pair(dilation, 1) and bool(groups == 1)
    return plain and weight is not None and weight[2:] == (1, 1)


def _is_swap(node: Any) -> bool:
    """Transposes the last two axes."""
    if not isinstance(node, fx.Node) or node.target is not _SWAP:
        return False
    rank = len(shape_of(node) or ())
    return {axis % rank for axis in node.args[1:] if isinstance(axis, int)} == {rank - 1, rank - 2}


def _project(module: fx.GraphModule, view: fx.Node) -> bool:
    """Replace a 1x1 convolution and its split into heads by one matmul a head.

    Given ``view``: (B, heads * d, H, W) -> (B, heads, d, H * W), used by matmuls, directly or with its last axes
    swapped. Result: tokens (B, heads, H * W, d), the swapped uses take them as they are, the others swap them.
    """
    conv = view.args[0]
    if not _is_pointwise(conv):
        return False
    assert isinstance(conv, fx.Node)
    source, shape, outer = conv.args[0], shape_of(view), shape_of(conv)
    if shape is None or outer is None or len(shape) != 4 or len(conv.users) > 1:
        return False
    batch, heads, width, tokens = shape
    if (batch, heads * width, tokens) != (outer[0], outer[1], outer[2] * outer[3]) or tokens == 1:
        return False
    matmuls = [use for user in view.users for use in (user.users if _is_swap(user) else [user])]
    if not matmuls or any(use.target is not aten.matmul.default for use in matmuls):
        return False
    weight = _value(module, conv.args[1])
    has_bias = len(conv.args) > 2 and conv.args[2] is not None
    bias = _value(module, conv.args[2]) if has_bias else None
    if weight is None or (has_bias and bias is None):
        return False
    add, own = Builder(module, view), Builder(module, view, conv)
    split = weight[:, :, 0, 0].reshape(heads, width, -1).transpose(1, 2).contiguous()
    last = add(aten.permute.default, source, [0, 2, 3, 1])
    flat = add(aten.reshape.default, last, [batch, 1, tokens, split.shape[1]])
    made = own(aten.matmul.default, flat, own.constant(split[None], conv))
    if bias is not None:
        made = own(aten.add.Tensor, made, own.constant(bias.reshape(1, heads, 1, width).contiguous(), conv))
    for user in list(view.users):
        if _is_swap(user):
            user.replace_all_uses_with(made)
            module.graph.erase_node(user)
    if view.users:
        view.replace_all_uses_with(add(_SWAP, made, -2, -1))
    module.graph.erase_node(view)
    if not conv.users:
        module.graph.erase_node(conv)
    return True


def _mix(module: fx.GraphModule, view: fx.Node) -> bool:
    """Let the attention's output come out with tokens first.

    Given ``view``: (B, heads, d, N) -> (B, heads * d, H, W) of matmul(swap(v), swap(w)). Result: matmul(w, v), whose
    heads and tokens are exchanged once, which is the one transpose that remains where there are several heads.
    """
    product = view.args[0]
    if not isinstance(product, fx.Node) or product.target is not aten.matmul.default or len(product.users) > 1:
        return False
    left, right = product.args
    if not (_is_swap(left) and _is_swap(right)):
        return False
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    inner, outer = shape_of(product), shape_of(view)
    if inner is None or outer is None or len(inner) != 4 or len(outer) != 4:
        return False
    batch, heads, width, tokens = inner
    if outer[:2] != (batch, heads * width) or outer[2] * outer[3] != tokens:
        return False
    add = Builder(module, view)
    mixed = _flat_matmul(add, right.args[0], left.args[0])
    mixed = add(aten.permute.default, mixed, [0, 2, 1, 3])
    mixed = add(aten.reshape.default, mixed, [batch, outer[2], outer[3], heads * width])
    view.replace_all_uses_with(add(aten.permute.default, mixed, [0, 3, 1, 2]))
    module.graph.erase_node(view)
    module.graph.erase_node(product)
    return True


def _flat_matmul(add: Builder, left: Any, right: Any, swapped: bool = False) -> fx.Node:
    """left @ right over (B, heads, ., .), or left @ swap(right), with both leading axes as one.

    In this form the converter makes the swap a flag of BATCH_MATMUL.
    """
    a, b = shape_of(left), shape_of(right)
    assert a is not None
    assert b is not None
    first = add(aten.reshape.default, left, [a[0] * a[1], a[2], a[3]])
    second = add(aten.reshape.default, right, [b[0] * b[1], b[2], b[3]])
    if swapped:
        second = add(_SWAP, second, 1, 2)
    product = add(aten.bmm.default, first, second)
    return add(aten.reshape.default, product, [a[0], a[1], a[2], b[2] if swapped else b[3]])


def _score(module: fx.GraphModule, product: fx.Node) -> bool:
    """Given matmul(q, swap(k)) over equal leading axes (B, heads). Result: the swap as a flag of the matmul."""
    left, right = product.args
    a, b = shape_of(left), shape_of(right)
    if not _is_swap(right) or a is None or b is None or len(a) != 4 or len(b) != 4 or a[:2] != b[:2]:
        return False
    assert isinstance(right, fx.Node)
    add = Builder(module, product)
    product.replace_all_uses_with(_flat_matmul(add, left, right.args[0], swapped=True))
    module.graph.erase_node(product)
    return True


def without_transposes(module: fx.GraphModule) -> int:
    """Rewrite every attention block of a captured graph, in place.

    Given: projections by 1x1 convolutions on (B, C, H, W), split into heads. Result: the same function (up to the
    order of sums), whose only change of layout is the exchange of heads and tokens after the attention.

    Returns:
        The number of projections that were rewritten; where there is none the graph is as it was.
    """
    count = sum(_project(module, node) for node in list(module.graph.nodes) if node.target in _VIEWS)
    if count:
        for node in list(module.graph.nodes):
            if node.target in _VIEWS:
                _mix(module, node)
        for node in list(module.graph.nodes):
            if node.target is aten.matmul.default:
                _score(module, node)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    return count
