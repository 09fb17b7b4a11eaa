"""The dataflow record: who made a tensor, who reads it, and that the model is left as it was."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from edgeattn.core.errors import UsageError
from edgeattn.reparam.trace import Record, capture, duplicate, leaf_tensors, trace


class Net(nn.Module):
    """A convolution, and whatever the test does with its output."""

    def __init__(self, rest) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.rest = rest

    def forward(self, x: Tensor):
        return self.rest(self, self.conv(x))


X = torch.randn(1, 3, 4, 4)


def of_conv(rest) -> tuple[Record, list[str], bool]:
    net = Net(rest).eval()
    record = trace(net, (X,))
    (call,) = record.calls_of(net.conv)
    (value,) = call.outputs
    return record, [op.name for op in record.readers(value)], record.leaves(value)


def test_readers_and_producer() -> None:
    record, readers, leaves = of_conv(lambda net, y: y + y.exp())
    assert readers == ["aten.exp", "aten.add"]
    assert not leaves
    (call,) = [call for call in record.calls if call.path == "conv"]
    assert record.producer(call.outputs[0]).name == "aten.convolution"


@pytest.mark.parametrize("rest", [lambda net, y: {"a": [y], "b": y.sum()}, lambda net, y: (y.exp(), y)])
def test_a_returned_tensor_leaves(rest) -> None:
    assert of_conv(rest)[2]


def test_a_tensor_kept_in_an_attribute_leaves() -> None:
    def rest(net: Net, y: Tensor) -> Tensor:
        net.feature = y
        return y.exp()

    assert of_conv(rest)[2]


def test_a_dataclass_output_leaves() -> None:
    @dataclass
    class Output:
        logits: Tensor

    assert of_conv(lambda net, y: Output(y))[2]
    assert len(leaf_tensors(Output(torch.ones(1)))) == 1


def test_writes_are_seen_through_views() -> None:
    def rest(net: Net, y: Tensor) -> Tensor:
        y.flatten(2).relu_()
        return y.exp()

    record, _, _ = of_conv(rest)
    (call,) = [call for call in record.calls if call.path == "conv"]
    assert [op.name for op in record.writers(call.outputs[0])] == ["aten.relu_"]


def test_an_in_place_result_is_a_new_value() -> None:
    record, readers, _ = of_conv(lambda net, y: torch.relu_(y).exp())
    assert readers == ["aten.relu_"]
    exp = record.ops[-1]
    assert exp.name == "aten.exp"
    assert record.producer(exp.inputs[0]).name == "aten.relu_"


def test_many_short_lived_tensors_get_distinct_values() -> None:
    def rest(net: Net, y: Tensor) -> Tensor:
        for _ in range(300):  # ids and addresses are reused all the time here
            y = y * 1.0
        return y

    record, readers, _ = of_conv(rest)
    made = [op.outputs[0].id for op in record.ops if op.name == "aten.mul"]
    assert len(set(made)) == 300
    assert readers == ["aten.mul"]


def test_activations_are_not_kept_alive() -> None:
    net = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(5)]).eval()
    record = trace(net, (X,))
    alive = [op.outputs[0] for op in record.ops if op.name == "aten.convolution" and record.leaves(op.outputs[0])]
    assert len(alive) == 1  # the output


def test_several_calls_and_weights_read_elsewhere() -> None:
    net = Net(
        lambda net, y: nn.functional.conv2d(
            net.conv(torch.zeros_like(X)), net.conv.weight.flatten(0, 1)[:4, None].expand(4, 4, 1, 1)
        )
    )
    record = trace(net.eval(), (X,))
    assert len(record.calls_of(net.conv)) == 2
    weight = record.constant(net.conv.weight)
    assert any(op.call.path == "" for op in record.readers(weight))


def test_model_is_left_without_hooks_and_with_its_buffers() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))
            self.register_buffer("cache", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.cache = torch.cat([self.cache, self.count])
            return x + self.count

    net = Counter().eval()
    state = torch.random.get_rng_state()
    trace(net, (X,))
    capture(net, (X,), {net: lambda args, kwargs: args})
    assert net.count.item() == 0
    assert net.cache.shape == (2,)
    assert not net._forward_hooks
    assert not net._forward_pre_hooks
    assert torch.equal(torch.random.get_rng_state(), state)


def test_hooks_go_even_if_the_model_raises() -> None:
    net = Net(lambda net, y: 1 / 0).eval()
    with pytest.raises(ZeroDivisionError):
        trace(net, (X,))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_capture_keeps_the_first_call_only() -> None:
    net = Net(lambda net, y: net.conv(torch.zeros_like(X))).eval()
    kept = capture(net, (X,), {net.conv: lambda args, kwargs: args[0].clone(), nn.ReLU(): lambda args, kwargs: 1})
    assert list(kept) == [net.conv]
    assert torch.equal(kept[net.conv], X)


def test_a_model_with_computed_tensors_can_be_copied() -> None:
    net = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(2, 2)))
    net.cache = {"bias": net[0].weight * 2}
    twin = duplicate(net)
    assert torch.equal(twin.cache["bias"], net.cache["bias"])
    assert twin[0].weight_g is not net[0].weight_g


def test_a_model_that_cannot_be_copied_is_said() -> None:
    net = nn.Linear(2, 2)
    net.lock = __import__("threading").Lock()
    with pytest.raises(UsageError, match="cannot be copied"):
        duplicate(net)


def test_scripted_children_are_traced_through() -> None:
    net = Net(lambda net, y: net.scripted(y))
    net.scripted = torch.jit.script(nn.Sequential(nn.ReLU()))
    record = trace(net.eval(), (X,))
    assert "aten.relu" in [op.name for op in record.ops]
