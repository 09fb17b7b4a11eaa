from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeattn.quant.plan import QuantPlan
from edgeattn.quant.rounding import rounded
from edgeattn.quant.simulate import Operations, Simulation, Site, Style, rounded_weight
from edgeattn.recipe import Keep


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 4)
    ).eval()


class Reused(nn.Module):
    """A layer that is called twice, one with the same weight, and a sum that reads a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return self.b(10 * self.a(x))


def feeds(shape: tuple[int, ...] = (2, 3, 8, 8), count: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def data(y: Tensor, peak: float) -> Tensor:
    """Symmetric int8."""
    return (y / (peak / 127)).round().clamp(-127, 127) * (peak / 127)


def state(model: nn.Module) -> tuple[object, ...]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return hooks, [id(p) for p in model.parameters()], [p.detach().numpy().tobytes() for p in model.parameters()]


@pytest.mark.parametrize("style", [Style(), Style(zero_point=True, outputs=True)])
@pytest.mark.parametrize("precision", ["w8a8", "w8", "w4"])
@pytest.mark.parametrize(("make", "shape"), [(chain, (2, 3, 8, 8)), (Reused, (4, 6))])
def test_it_rounds_and_leaves_the_model_exactly_as_it_was(
    make: type[nn.Module], shape: tuple[int, ...], precision: str, style: Style
) -> None:
    model, samples = make(), feeds(shape)
    before, x = state(model), torch.from_numpy(samples[0]["x"])
    with torch.no_grad():
        exact = model(x)
        simulation = Simulation(model, QuantPlan(precision), samples, style)
        with simulation.rounded(simulation.sites):
            near = model(x)
        with pytest.raises(ZeroDivisionError), simulation.rounded(simulation.sites):
            raise ZeroDivisionError
        assert 0 < float((near - exact).norm() / exact.norm()) < (0.03 if precision != "w4" else 0.3)
        assert torch.equal(model(x), exact)
    assert state(model) == before


def test_a_forward_by_hand_gives_the_same() -> None:
    model, samples = chain(), feeds()
    x = torch.from_numpy(samples[0]["x"])
    simulation = Simulation(model, QuantPlan("w8a8", observer="minmax"), samples)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        peaks = []
        for first in (0, 2, 5):
            every = [by_hand[:first](torch.from_numpy(f["x"])) for f in samples]
            peaks.append(max(float(y.abs().max()) for y in every))
        for i in (0, 2, 5):
            own = by_hand[i].weight
            own.copy_(torch.from_numpy(rounded(own.flatten(1).numpy(), 8)).reshape(own.shape))
        y = by_hand[:2](data(x, peaks[0]))
        y = by_hand[2:5](data(y, peaks[1]))
        expected = by_hand[5](data(y, peaks[2]))
        with simulation.rounded(simulation.sites):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_a_tensor_belongs_to_its_maker_and_is_free_where_either_end_is_kept() -> None:
    simulation = Simulation(chain(), QuantPlan("w8a8"), feeds())
    between = Site("reads", "2", 0, "0")
    own = {unit.name: unit.alone for unit in simulation.units}
    assert own["0"] == {Site("weights", "0"), Site("reads", "0"), between}
    assert own["2"] == {Site("weights", "2")}
    assert own["5"] == {Site("weights", "5"), Site("reads", "5")}  # a pool makes what it reads
    assert frozenset().union(*own.values()) == simulation.sites
    assert between not in simulation.without(["0"])
    assert between not in simulation.without(["2"])
    assert between in simulation.without(["5"])


def test_what_the_plan_keeps_is_not_rounded() -> None:
    plan = QuantPlan("w8a8", keep=(Keep(modules=("0",)), Keep(modules=("5",), at="w8")))
    simulation = Simulation(chain(), plan, feeds())
    assert simulation.sites == {Site("weights", "2"), Site("weights", "5")}


def test_outputs_are_rounded_where_others_than_weighted_modules_read_them() -> None:
    makes = {
        site.module
        for site in Simulation(chain(), QuantPlan("w8a8"), feeds(), Style(outputs=True)).sites
        if site.what == "makes"
    }
    assert makes == {"2"}  # the pool reads it; 0 is read by 2 alone, and 5 is the model's output
    reused = Simulation(Reused().eval(), QuantPlan("w8a8"), feeds((4, 6)), Style(outputs=True))
    assert {s.call for s in reused.sites if s.what == "makes" and s.module == "a"} == {0, 1}


def test_each_call_of_a_module_has_a_range_of_its_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)
            nn.init.eye_(self.a.weight)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.a(1000 * x)

    model = Twice().eval()
    simulation = Simulation(model, QuantPlan("w8a8", observer="minmax"), [{"x": np.array([[1.0, 0.3]], np.float32)}])
    with torch.no_grad(), simulation.rounded(simulation.sites):
        small, large = model(torch.tensor([[1.0, 0.3]]))
    torch.testing.assert_close(small, torch.tensor([[1.0, 38 / 127]]))
    torch.testing.assert_close(large, torch.tensor([[1000.0, 38000 / 127]]))


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_have_a_scale_for_each_output_channel(groups: int) -> None:
    torch.manual_seed(0)
    module = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    with torch.no_grad():
        module.weight[:, 0] *= 1000
        other = module.weight[:, 1:].clone()
        error = (rounded_weight(module, 8)[:, 1:] - other).abs().amax()
    assert 0 < float(error) <= float(other.abs().max()) / 127 / 2 * 1.001


def test_embeddings_have_weights_and_read_no_data() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)).eval()
    simulation = Simulation(model, QuantPlan("w8a8"), [{"x": np.array([[0, 4]])}])
    assert simulation.sites == {Site("weights", "0"), Site("weights", "1"), Site("reads", "1", 0, "0")}


def test_operations_are_reached_by_module_and_kind() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x @ x.transpose(-2, -1), dim=-1) @ x

    model = nn.Sequential(Attention(), nn.LayerNorm(4), nn.ReLU()).eval()
    samples = feeds((2, 5, 4))
    found = Operations(model, QuantPlan("w8a8", observer="minmax"), samples)
    names = [unit.name for unit in found.units]
    assert names[:4] == ["0 matmul operands", "0 softmax", "1 norm", "2 activation"]
    softmax = next(unit for unit in found.units if unit.name == "every softmax")
    assert softmax.alone == {Site("operation", "0", 0, operation="softmax")}
    assert found.without(["every softmax"]) == found.sites - softmax.alone
    before = state(model)

    def weights(x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(-2, -1), dim=-1)

    with torch.no_grad():
        every = [torch.from_numpy(sample["x"]) for sample in samples]
        peak = max(float(weights(x).max()) for x in every)
        with found.rounded(softmax.alone):
            first, again = model(every[0]), model(every[0])
        expected = model[1:](data(weights(every[0]), peak) @ every[0])
        torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(first, again)
        assert not torch.equal(first, model(every[0]))
    assert state(model) == before


def test_errors_of_weights_by_module() -> None:
    from edgeattn.quant.plan import QuantPlan
    from edgeattn.quant.simulate import weight_errors

    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[127.0, 1.4], [127.0, 3.0]]))  # a scale of 1 a row: 1.4 becomes 1
        net[2].weight.copy_(torch.tensor([[0.0, 0.0]]))
    (only,) = weight_errors(net, QuantPlan("w8"))  # of zeros there is no relative error
    assert (only["module"], only["bits"]) == ("0", 8)
    assert only["error"] == pytest.approx(0.4 / (127**2 * 2 + 1.4**2 + 3**2) ** 0.5, rel=1e-4)
    assert weight_errors(net, QuantPlan("fp32")) == []
