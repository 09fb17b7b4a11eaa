"""Complex numbers in a captured graph, as rotary embeddings have them, written as pairs of real ones.

No target has complex tensors. What is only multiplied, added and brought into shape needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_ATEN: Any = torch.ops.aten
#: (real part, imaginary part) as nodes.
_Pair = tuple[fx.Node, fx.Node]

#: Done to both parts alike. A negative axis counts from the end, and a part has as many axes as the whole.
_SHAPES = frozenset(
    {
        _ATEN.unsqueeze.default,
        _ATEN.squeeze.dim,
        _ATEN.squeeze.dims,
        _ATEN.view.default,
        _ATEN.reshape.default,
        _ATEN.transpose.int,
        _ATEN.permute.default,
        _ATEN.expand.default,
        _ATEN.slice.Tensor,
        _ATEN.select.int,
        _ATEN.index_select.default,
        _ATEN.clone.default,
        _ATEN.contiguous.default,
        _ATEN.flatten.using_ints,
    }
)
#: Nothing for a tensor that is complex already.
_SAME = frozenset(
    {
        _ATEN.to.dtype_layout,
        _ATEN.to.dtype,
        _ATEN._to_copy.default,
        _ATEN.to.device,
        _ATEN.resolve_conj.default,
        _ATEN.alias.default,
    }
)
_CHECK = _ATEN._assert_tensor_metadata.default


def _complex(value: object) -> bool:
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(found, torch.Tensor) and found.is_complex()


class _Rewriter:
    """Rewrites one graph; nodes that are added belong to the module of the node that they stand for."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._pairs: dict[fx.Node, _Pair] = {}
        self._node: fx.Node | None = None

    def _emit(self, target: Any, *args: Any) -> fx.Node:
        assert self._node is not None
        made = self._graph.call_function(target, args)
        made.meta = {k: v for k, v in self._node.meta.items() if k in ("nn_module_stack", "source_fn_stack")}
        values = torch.utils._pytree.tree_map(lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, args)
        made.meta["val"] = target(*values)
        return made

    def _pair(self, value: Any) -> tuple[Any, Any]:
        """Both parts; of a real tensor or number the second is None."""
        return self._pairs[value] if isinstance(value, fx.Node) and value in self._pairs else (value, None)

    def _product(self, a: Any, b: Any) -> _Pair:
        (a_re, a_im), (b_re, b_im) = self._pair(a), self._pair(b)
        multiply: Callable[..., fx.Node] = lambda x, y: self._emit(_ATEN.mul.Tensor, x, y)  # noqa: E731
        if b_im is None:
            return multiply(a_re, b_re), multiply(a_im, b_re)
        if a_im is None:
            return multiply(b_re, a_re), multiply(b_im, a_re)
        real = self._emit(_ATEN.sub.Tensor, multiply(a_re, b_re), multiply(a_im, b_im))
        return real, self._emit(_ATEN.add.Tensor, multiply(a_re, b_im), multiply(a_im, b_re))

    def _made(self, node: fx.Node) -> _Pair:
        """What a node that gives complex numbers becomes.

        Raises:
            KeyError: it is none of those that are known.
        """
        target, args = node.target, node.args
        if target is _ATEN.polar.default:
            size, angle = args
            parts = [self._emit(turn, angle) for turn in (_ATEN.cos.default, _ATEN.sin.default)]
            real, imaginary = (self._emit(_ATEN.mul.Tensor, size, part) for part in parts)
            return real, imaginary
        if target in (_ATEN.view_as_complex.default, _ATEN.complex.default):
            if target is _ATEN.complex.default:
                return args[0], args[1]  # type: ignore[return-value]
            last = args[0].meta["val"].ndim - 1  # type: ignore[union-attr]
            return self._emit(_ATEN.select.int, args[0], last, 0), self._emit(_ATEN.select.int, args[0], last, 1)
        if target is _ATEN.mul.Tensor:
            return self._product(*args)
        if target in (_ATEN.add.Tensor, _ATEN.sub.Tensor) and all(map(_complex, args)) and not node.kwargs:
            (a_re, a_im), (b_re, b_im) = map(self._pair, args)
            return self._emit(target, a_re, b_re), self._emit(target, a_im, b_im)
        if target in (_ATEN.conj.default, _ATEN._conj.default):
            real, imaginary = self._pair(args[0])
            return real, self._emit(_ATEN.neg.default, imaginary)
        if target in _SAME and _complex(args[0]):
            return self._pair(args[0])
        if target in _SHAPES:
            real, imaginary = (self._emit(target, part, *args[1:]) for part in self._pair(args[0]))
            return real, imaginary
        raise KeyError(str(target))

    def _read(self, node: fx.Node) -> fx.Node:
        """What a node that makes real numbers of complex ones becomes.

        Raises:
            KeyError: it is none of those that are known.
        """
        real, imaginary = self._pair(node.args[0])
        if node.target is _ATEN.view_as_real.default:
            return self._emit(_ATEN.stack.default, [real, imaginary], -1)
        if node.target in (_ATEN.real.default, _ATEN.imag.default):
            part: fx.Node = real if node.target is _ATEN.real.default else imaginary
            return part
        if node.target is _ATEN.abs.default:
            squares = [self._emit(_ATEN.mul.Tensor, part, part) for part in (real, imaginary)]
            return self._emit(_ATEN.sqrt.default, self._emit(_ATEN.add.Tensor, *squares))
        raise KeyError(str(node.target))

    def run(self) -> None:
        """Rewrite.

        Raises:
            KeyError: an operation is not known; the graph is half done then.
        """
        for node in list(self._graph.nodes):
            self._node = node
            gives, takes = _complex(node), any(map(_complex, node.all_input_nodes))
            if not (gives or takes):
                continue
            with self._graph.inserting_before(node):
                if gives:
                    self._pairs[node] = self._made(node)
                elif node.target is not _CHECK:
                    node.replace_all_uses_with(self._read(node))
        for node in reversed(list(self._graph.nodes)):
            if _complex(node) or (any(map(_complex, node.all_input_nodes)) and not node.users):
                self._graph.erase_node(node)


def without_complex(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with its complex numbers as pairs of real ones; as it is where they are more than carried along."""
    if not any(map(_complex, program.graph.nodes)):
        return program
    before = program.graph
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(before, copied)
    graph.output(output)
    graph.output_node().meta = dict(before.output_node().meta)
    for old, new in copied.items():
        new.name = old.name
    graph._codegen = before._codegen
    try:
        _Rewriter(graph).run()
    except (KeyError, IndexError, AttributeError):
        return program
    graph.lint()
    program.graph_module.graph = graph
    program.graph_module.recompile()
    return program
