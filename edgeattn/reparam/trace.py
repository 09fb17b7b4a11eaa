"""The dataflow record: one eager forward that notes which module call made each tensor, and who reads it.

Works on any ``nn.Module`` without torch.fx or torch.export, and costs about one forward: forward hooks note the module
calls, a dispatch mode notes every ATen operation below them (functional code, TorchScript and nested modules alike).
Tensors are known by weak reference, so no activation is kept alive and a reused ``id`` cannot mislead.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from edgeattn.core.errors import UsageError

Inputs = tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class Value:
    """One version of one tensor: an operation that writes into a tensor makes a new value of it.

    Attributes:
        id: unique within the record.
        storage: values with the same number share memory (views and in-place versions).
        shape: of the tensor.
    """

    id: int
    storage: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One ATen operation; tensors in ``args`` and ``kwargs`` are replaced by their ``Value``."""

    index: int
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    writes: tuple[Value, ...]
    call: Call | None

    @property
    def name(self) -> str:
        """The operation's name without overload, such as ``aten.avg_pool2d``."""
        return str(self.func.overloadpacket)


@dataclass(eq=False)
class Call:
    """One call of one module; ``parent`` is the call it happened in."""

    path: str
    module: nn.Module
    parent: Call | None
    first_op: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...] = ()

    def within(self, other: Call) -> bool:
        """True for ``other`` itself and every call made inside it."""
        call: Call | None = self
        while call is not None and call is not other:
            call = call.parent
        return call is other


@dataclass
class Record:
    """What one forward did.

    Attributes:
        ops: every ATen operation, in order.
        calls: every module call, in order of entry.
        outputs: what the model returned, as it returned it.
    """

    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    outputs: Any = None
    kept: set[int] = field(default_factory=set)
    _readers: dict[int, list[Op]] = field(default_factory=lambda: defaultdict(list))
    _writers: dict[int, list[Op]] = field(default_factory=lambda: defaultdict(list))
    _producer: dict[int, Op] = field(default_factory=dict)
    _of_module: dict[int, list[Call]] = field(default_factory=lambda: defaultdict(list))
    _constants: dict[int, Value] = field(default_factory=dict)

    def calls_of(self, module: nn.Module) -> list[Call]:
        """The calls of ``module``, in order; empty if the forward did not reach it."""
        return self._of_module[id(module)]

    def readers(self, value: Value) -> list[Op]:
        """The operations that read (or write into) exactly this value."""
        return self._readers[value.id]

    def writers(self, value: Value) -> list[Op]:
        """The operations that write into the memory of this value, through whatever view."""
        return self._writers[value.storage]

    def producer(self, value: Value) -> Op | None:
        """The operation that made the value; None for an input, a parameter or a buffer."""
        return self._producer.get(value.id)

    def constant(self, tensor: Tensor) -> Value | None:
        """The value of a parameter or buffer of the model; None if the model does not own it."""
        return self._constants.get(id(tensor))

    def leaves(self, value: Value) -> bool:
        """True if the tensor outlives the forward: returned by the model, or kept by it in some attribute."""
        return value.id in self.kept


def leaf_tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples, dicts, dataclasses and pytrees, in order."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, (type, Mapping)):
        tree = [getattr(tree, entry.name) for entry in dataclasses.fields(tree)]
    found: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found.extend(leaf_tensors(leaf))
    return found


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers the tensors and fills the record."""

    def __init__(self, record: Record, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record
        self.stack: list[Call] = []
        self.values: Any = WeakTensorKeyDictionary()
        self.count = 0
        for tensor in [*model.parameters(), *model.buffers()]:
            record._constants[id(tensor)] = self.value(tensor)

    def new(self, tensor: Tensor, storage: int | None = None) -> Value:
        self.count += 1
        value = Value(self.count, self.count if storage is None else storage, tuple(tensor.shape))
        self.values[tensor] = value
        return value

    def value(self, tensor: Tensor) -> Value:
        known: Value | None = self.values.get(tensor)
        return self.new(tensor) if known is None else known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sources = leaf_tensors((args, kwargs))
        inputs = tuple(self.value(t) for t in sources)
        templates = tree_map(lambda leaf: self.value(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        result = func(*args, **kwargs)

        written: list[Tensor] = []
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[position] if position < len(args) else kwargs.get(argument.name)
                written.extend(leaf_tensors(given))
        writes = tuple(self.value(t) for t in written)
        # A view or an in-place result shares its memory with an input, which is alive now: comparing addresses is safe.
        memory = {_memory(t): value.storage for t, value in zip(sources, inputs, strict=True)}
        for tensor, old in zip(written, writes, strict=True):
            self.new(tensor, old.storage)
        outputs = []
        for tensor in leaf_tensors(result):
            known = self.values.get(tensor)
            outputs.append(self.new(tensor, memory.get(_memory(tensor))) if known is None else known)

        call = self.stack[-1] if self.stack else None
        op = Op(len(self.record.ops), func, templates[0], templates[1], inputs, tuple(outputs), writes, call)
        self.record.ops.append(op)
        for value in dict.fromkeys(inputs):
            self.record._readers[value.id].append(op)
        for value in dict.fromkeys(writes):
            self.record._writers[value.storage].append(op)
        for value in outputs:
            self.record._producer.setdefault(value.id, op)
        return result

    def enter(self, path: str, module: nn.Module, given: Any) -> None:
        inputs = tuple(self.value(t) for t in leaf_tensors(given))
        call = Call(path, module, self.stack[-1] if self.stack else None, len(self.record.ops), inputs)
        self.stack.append(call)
        self.record.calls.append(call)
        self.record._of_module[id(module)].append(call)

    def leave(self, output: Any) -> None:
        self.stack.pop().outputs = tuple(self.value(t) for t in leaf_tensors(output))


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have no storage: never an alias here
        return -id(tensor)


def trace(model: nn.Module, inputs: Inputs, seed: int = 0) -> Record:
    """Run ``model`` once on ``inputs`` and record its dataflow; the model is left without hooks, its buffers as before.

    Raises: whatever the model's forward raises.
    """
    record = Record()
    recorder = _Recorder(record, model)
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks from Python; its operations are recorded all the same

        def enter(m: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            recorder.enter(path, m, (args, kwargs))

        def leave(m: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            recorder.leave(output)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        with recorder:
            record.outputs = run(model, inputs, seed)
    finally:
        for handle in handles:
            handle.remove()
    # Whatever is still alive was returned or kept: somebody outside the recorded operations can read it.
    record.kept = {value.id for value in recorder.values.values()}
    return record


def run(model: nn.Module, inputs: Inputs, seed: int = 0) -> Any:
    """One forward without gradients; the random state, the model's buffers and the inputs are left as they were."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.no_grad(), preserved(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        own: Any = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
        return model(**own) if isinstance(own, Mapping) else model(*own)


#: What every nn.Module has in its ``__dict__``: no place for a computed tensor.
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"_buffers"}


def duplicate(model: nn.Module, *, shared: bool = False) -> nn.Module:
    """A deep copy, also of models that keep computed tensors (a cached attention bias, an old-style weight norm).

    Args:
        shared: the copy has the same parameters, for a large model's would not fit in memory twice.

    Raises:
        UsageError: an attribute cannot be copied.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()} if shared else {}
    for module in model.modules():
        own = [value for name, value in vars(module).items() if name not in _BOOKKEEPING]
        for tensor in leaf_tensors(own) if own else ():
            if not tensor.is_leaf:  # torch refuses to copy these; the copy needs only their content
                memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise UsageError(
            f"a {type(model).__name__} cannot be copied, and reparameterization never changes the model it is given",
            why=str(error),
            fix="keep what cannot be copied (locks, files, compiled code) out of the module's attributes",
        ) from error


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Give every buffer its old tensor and content back on exit (a forward may count or cache)."""
    # The buffers of TorchScript modules are not in a dict that could be put back; their contents are.
    plain = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    owned = [(module, dict(module._buffers)) for module in plain]
    contents = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, buffers in owned:
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, content in contents:
                if buffer.shape != content.shape or not torch.equal(buffer, content):
                    buffer.set_(content)  # type: ignore[call-overload]


@contextmanager
def watched(modules: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """Note which of the modules are called in the body, also those that are not part of the model that runs."""
    called: set[nn.Module] = set()

    def note(module: nn.Module, args: Any) -> None:
        called.add(module)

    hookable = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    handles = [module.register_forward_pre_hook(note) for module in hookable]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def capture(
    model: nn.Module, inputs: Inputs, wanted: Mapping[nn.Module, Callable[[Any, Any], Any]], seed: int = 0
) -> dict[nn.Module, Any]:
    """Run ``model`` once more and keep ``wanted[module](args, kwargs)`` of the first call of each wanted module.

    Returns a dict without the modules that were not called. The model is left without hooks.
    """
    kept: dict[nn.Module, Any] = {}
    handles = []
    for module, keep in wanted.items():

        def hook(m: nn.Module, args: Any, kwargs: Any, keep: Callable[[Any, Any], Any] = keep) -> None:
            if m not in kept:
                kept[m] = keep(args, kwargs)

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        run(model, inputs, seed)
    finally:
        for handle in handles:
            handle.remove()
    return kept
