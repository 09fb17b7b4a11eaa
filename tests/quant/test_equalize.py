"""Cross-layer equalization: what it finds, that it changes no output, and what it cures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from edgeattn.capture import Entry, Program, capture
from edgeattn.core.numerics import compare
from edgeattn.quant import channels
from edgeattn.quant.equalize import equalize
from edgeattn.quant.plan import QuantPlan
from edgeattn.quant.simulate import Simulation
from edgeattn.quant.weighted import run

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers a, b and c of 8 channels, and what a test does between them."""

    def __init__(self, between: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.between = between
        self.a = layers.pop("a", nn.Conv2d(3, 8, 3, padding=1))
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, self.a(x))


def spread(layer: nn.Module, *, rows: bool = True, seed: int = 0) -> None:
    """Make the output channels of a layer differ by up to 2 ** 8."""
    factor = torch.exp2(torch.randint(-4, 5, (layer.weight.shape[0 if rows else 1],), generator=_seeded(seed)).float())
    with torch.no_grad():
        layer.weight *= factor.view(-1, *[1] * (layer.weight.ndim - 1)) if rows else factor.view(1, -1, 1, 1)
        if layer.bias is not None:
            layer.bias *= factor


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def captured(model: nn.Module, x: Tensor = IMAGE) -> Program:
    return capture(model.eval(), {"x": x}, ("y",))


def outputs(program: Program, x: Tensor = IMAGE) -> Tensor:
    return run(program.entries["main"], {"x": x.numpy()})["y"]


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.fused = nn.Linear(8, 24), nn.Linear(8, 8), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(2, 5, 8))


def gate(net: Net, y: Tensor) -> Tensor:
    y = F.relu(y)
    return net.c(y * torch.sigmoid(net.b(y.mean((2, 3), keepdim=True))))


PASSES: dict[str, tuple[Net, dict[str, set[str]]]] = {
    "relu": (Net(lambda n, y: n.b(F.relu(y)), b=nn.Conv2d(8, 4, 3)), {"a": {"b"}}),
    "in place": (Net(lambda n, y: n.b(F.relu(y, inplace=True)), b=nn.Conv2d(8, 4, 1)), {"a": {"b"}}),
    "nothing": (Net(lambda n, y: n.b(y), b=nn.Conv2d(8, 4, 3, groups=4)), {"a": {"b"}}),
    "depthwise": (
        Net(lambda n, y: n.c(F.relu(n.b(F.relu(y)))), b=nn.Conv2d(8, 16, 3, groups=8), c=nn.Conv2d(16, 4, 1)),
        {"a": {"b"}, "b": {"c"}},
    ),
    "pools": (
        Net(lambda n, y: n.b(F.avg_pool2d(F.max_pool2d(y, 2), 2, padding=1)), b=nn.Conv2d(8, 4, 1)),
        {"a": {"b"}},
    ),
    "flatten": (Net(lambda n, y: n.b(F.relu(y).flatten(1)), b=nn.Linear(8 * 64, 5)), {"a": {"b"}}),
    "mean": (Net(lambda n, y: n.b(F.leaky_relu(y).mean((2, 3))), b=nn.Linear(8, 5)), {"a": {"b"}}),
    "head": (
        Net(lambda n, y: n.b(F.dropout(F.adaptive_avg_pool2d(y, 1).flatten(1), 0.5, n.training)), b=nn.Linear(8, 5)),
        {"a": {"b"}},
    ),
    "tokens": (Net(lambda n, y: n.b(F.relu(y).flatten(2).transpose(1, 2)), b=nn.Linear(8, 5)), {"a": {"b"}}),
    "squared": (Net(lambda n, y: n.b(F.relu(y).square()), b=nn.Conv2d(8, 4, 1)), {"a": {"b"}}),
    "power": (Net(lambda n, y: n.b(F.relu(y) ** 2), b=nn.Conv2d(8, 4, 1)), {"a": {"b"}}),
    "two readers": (
        Net(lambda n, y: n.b(F.relu(y)) + n.c(F.relu(y)), b=nn.Conv2d(8, 4, 1), c=nn.Conv2d(8, 4, 1)),
        {"a": {"b", "c"}},
    ),
    "gate": (Net(gate, b=nn.Conv2d(8, 8, 1), c=nn.Conv2d(8, 4, 1)), {"a": {"b", "c"}}),
    "transposed": (
        Net(lambda n, y: n.c(F.relu(n.b(y))), b=nn.ConvTranspose2d(8, 6, 2, 2, groups=2), c=nn.Conv2d(6, 4, 1)),
        {"a": {"b"}, "b": {"c"}},
    ),
}

BLOCKS: dict[str, Net] = {
    "gelu": Net(lambda n, y: n.b(F.gelu(y)), b=nn.Conv2d(8, 4, 1)),
    "relu6": Net(lambda n, y: n.b(F.relu6(y)), b=nn.Conv2d(8, 4, 1)),
    "skip": Net(lambda n, y: y.mean(1, keepdim=True) + n.b(F.relu(y)), b=nn.Conv2d(8, 4, 1)),
    "sum": Net(lambda n, y: n.b(F.relu(y + 1)), b=nn.Conv2d(8, 4, 1)),
    "mixed": Net(lambda n, y: n.b(y.amax(1, keepdim=True).expand(-1, 8, -1, -1)), b=nn.Conv2d(8, 4, 1)),
    "rounded": Net(lambda n, y: n.b(torch.div(y, 3, rounding_mode="floor")), b=nn.Conv2d(8, 4, 1)),
    "shared": Net(lambda n, y: n.b(F.gelu(n.b(F.relu(y)))), b=nn.Conv2d(8, 8, 1)),
    "cubed": Net(lambda n, y: n.b(y**3), b=nn.Conv2d(8, 4, 1)),
}


@pytest.mark.parametrize("name", PASSES)
def test_pairs_are_found_and_no_bit_of_the_outputs_changes(name: str) -> None:
    net, wanted = PASSES[name]
    spread(net.a)
    program = captured(net)
    before = {key: value.clone() for key, value in program.entries["main"].graph.state_dict.items()}
    even, facts = equalize(program, [{"x": IMAGE.numpy()}])
    assert {pair["from"]: set(pair["to"]) for pair in facts["pairs"]} == wanted
    assert facts["held"]
    assert facts["pairs"][0]["scaled"]
    after = even.entries["main"].graph.state_dict
    assert not torch.equal(after["a.weight"], before["a.weight"])
    assert torch.equal(outputs(program), outputs(even))
    assert torch.equal(even.entries["main"].graph.module()(IMAGE)[0], program.entries["main"].graph.module()(IMAGE)[0])
    for key, value in program.entries["main"].graph.state_dict.items():  # the given program is as it was
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", BLOCKS)
def test_what_takes_no_factor_keeps_a_layer_as_it_is(name: str) -> None:
    spread(BLOCKS[name].a)
    program = captured(BLOCKS[name])
    even, facts = equalize(program, [{"x": IMAGE.numpy()}])
    assert facts["pairs"] == []
    assert even is program
    assert facts["words"]


@pytest.mark.parametrize("fused", [True, False])
def test_of_a_packed_attention_only_values_are_scaled(fused: bool) -> None:
    net, x = Attention(fused), torch.randn(2, 5, 8, generator=_seeded(1))
    spread(net.qkv)
    program = captured(net, x)
    even, facts = equalize(program, [{"x": x.numpy()}])
    assert {pair["from"]: pair["to"] for pair in facts["pairs"]} == {"qkv": ["proj"]}
    old, new = (p.entries["main"].graph.state_dict["qkv.weight"] for p in (program, even))
    assert torch.equal(old[:16], new[:16])
    assert not torch.equal(old[16:], new[16:])
    assert torch.equal(outputs(program, x), outputs(even, x))


def test_a_matrix_of_weights() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x @ self.first) @ self.second.t()

    torch.manual_seed(0)
    net, x = Products(), torch.randn(5, 6)
    with torch.no_grad():
        net.first[:, 2] *= 1024
    program = captured(net, x)
    even, facts = equalize(program, [{"x": x.numpy()}])
    assert facts["pairs"][0]["scaled"] == 1
    state = even.entries["main"].graph.state_dict
    assert state["first"][:, 2].abs().max() < net.first[:, 2].abs().max() / 8
    assert state["second"][:, 2].abs().max() > net.second[:, 2].abs().max() * 8
    assert torch.equal(outputs(program, x), outputs(even, x))


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    exponents=st.lists(st.integers(-9, 9), min_size=9, max_size=9),
    dead=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_chain_keeps_its_outputs_and_gets_no_wider(
    widths: list[int], exponents: list[int], dead: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    steps: list[nn.Module] = []
    for cin, cout in zip([3, *widths], [*widths, 2], strict=True):
        steps += [nn.Conv2d(cin, cout, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*steps)
    with torch.no_grad():
        factor = torch.exp2(torch.tensor(exponents[: widths[0]]).float())
        net[0].weight *= factor.view(-1, 1, 1, 1)
        if dead:
            net[0].weight[0] = 0
            net[2].weight[:, -1] = 0
    program = captured(net)
    even, facts = equalize(program, [{"x": IMAGE.numpy()}])
    assert facts["held"]
    assert torch.equal(outputs(program), outputs(even))
    assert all(value.isfinite().all() for value in even.entries["main"].graph.state_dict.values())
    for pair in facts["pairs"]:
        ends = {
            when: [some for reader in pair["to"] for some in pair[when][reader].values()]
            for when in ("before", "after")
        }
        wide = {
            when: max(high / low for low, high in some if low) for when, some in ends.items() if any(map(any, some))
        }
        assert not pair["scaled"] or wide["after"] <= 64 * wide["before"]


def test_a_channel_a_thousand_times_the_others_is_cured() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1)).eval()
    with torch.no_grad():
        net[0].weight[5] *= 1000
        net[0].bias[5] *= 1000
        net[2].weight[:, 5] /= 1000
    feeds = [{"x": x.numpy()} for x in torch.randn(4, 2, 3, 8, 8, generator=_seeded(2))]
    even, facts = equalize(captured(net), feeds)
    assert facts["pairs"][0]["scaled"] == 1
    wanted = net(IMAGE).detach().numpy()

    def error() -> float:
        simulation = Simulation(net, QuantPlan("w8a8"), feeds)
        with torch.no_grad(), simulation.rounded(simulation.sites):
            return compare(wanted, net(IMAGE).numpy()).relative_l2

    before = error()
    net.load_state_dict(dict(even.entries["main"].graph.state_dict))
    after = error()
    assert before > 0.5
    assert after < 0.02


def test_a_channel_that_lives_by_its_bias_does_not_become_loud() -> None:
    """As behind a batch norm that switched it off; by the ranges of weights it would become 4096 times as loud."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1)).eval()
    with torch.no_grad():
        net[0].weight[::4] *= 1e-7
        net[0].bias[::4] = 0.5
    even, facts = equalize(captured(net), [{"x": IMAGE.numpy()}])
    state = even.entries["main"].graph.state_dict
    assert torch.equal(state["0.bias"][::4], net[0].bias[::4])
    assert facts["held"]


def test_data_are_evened_out_against_what_they_are_multiplied_with() -> None:
    """A channel that is as loud as its weights are large gets half of the factor."""
    net = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False)).eval()
    x = torch.ones(1, 4, 2, 2)
    with torch.no_grad():
        net[0].weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 1.0, 256.0]))[..., None, None])
        net[2].weight.fill_(1.0)
    even, facts = equalize(captured(net, x), [{"x": x.numpy()}])
    state = even.entries["main"].graph.state_dict
    assert state["0.weight"].flatten().max() == 16
    assert state["2.weight"][:, 3].flatten().tolist() == [16.0] * 4
    assert facts["pairs"][0]["before"]["2"] == {"data": [1.0, 256.0], "weights": [1.0, 1.0]}
    assert facts["pairs"][0]["after"]["2"] == {"data": [1.0, 16.0], "weights": [1.0, 16.0]}


def test_a_rule_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(channels._RULES, torch.ops.aten.gelu, channels._same)
    spread(BLOCKS["gelu"].a)
    program = captured(BLOCKS["gelu"])
    even, facts = equalize(program, [{"x": IMAGE.numpy()}])
    assert even is program
    assert not facts["held"]
    assert "undone" in facts["words"][0]


def test_without_a_sample_nothing_is_changed() -> None:
    net = PASSES["relu"][0]
    spread(net.a)
    program = captured(net)
    even, facts = equalize(program, [{"other": np.zeros(1)}])
    assert even is program
    assert "main did not run" in facts["words"][0]


class Entries(nn.Module):
    """Two ways to use the same layers: ``kept`` is read by both, but in the second way by something else too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(F.relu(self.b(F.relu(self.a(x)))))
        return out


class Other(nn.Module):
    def __init__(self, net: Entries) -> None:
        super().__init__()
        self.a, self.b, self.c = net.a, net.b, net.c

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(F.gelu(self.b(F.relu(self.a(x)))))
        return out


def test_entries_share_their_weights_and_must_agree(tmp_path) -> None:
    net = Entries().eval()
    spread(net.a)
    spread(net.b)
    x = torch.randn(3, 6)
    first, second = captured(net, x).entries["main"], captured(Other(net), x).entries["main"]
    program = Program({"one": first, "two": Entry(second.graph, second.inputs, second.outputs)})
    even, facts = equalize(program, [{"x": x.numpy()}])
    assert [(pair["from"], pair["to"]) for pair in facts["pairs"]] == [("a", ["b"])]
    assert set(facts["relative_l2"]) == {"one.y", "two.y"}
    one, two = (even.entries[name].graph.state_dict for name in ("one", "two"))
    assert one["a.weight"].data_ptr() == two["a.weight"].data_ptr()
    assert one["c.weight"] is first.graph.state_dict["c.weight"]
    again = Program.load(tmp_path, even.save(tmp_path))
    for name in ("one", "two"):
        feeds = {"x": x.numpy()}
        assert torch.equal(run(again.entries[name], feeds)["y"], run(program.entries[name], feeds)["y"])
