from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeattn.core.errors import UsageError
from edgeattn.quant.plan import QuantPlan
from edgeattn.quant.sensitivity import Error, Journal, Row, fewest, measure, rank, sensitivity
from edgeattn.quant.simulate import Simulation, Style
from edgeattn.recipe import Keep

STYLES = [Style(), Style(zero_point=True, outputs=True)]


def feeds(shape: tuple[int, ...] = (4, 3, 8, 8), count: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
    ).eval()


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, list[dict[str, np.ndarray]]]:
    """The deploy form of the trained digits model, and held-out samples."""
    from edgeattn.models.build import build
    from edgeattn.pipeline.stages.reference import heldout_samples
    from edgeattn.recipe import resolve
    from edgeattn.reparam import reparameterize

    resolved = resolve("fmvit-digits")
    x, _ = heldout_samples(resolved, (1, 1, 32, 32))
    model = reparameterize(build(resolved).model, (torch.from_numpy(x[:1]),)).model
    return model, [{"x": x[:16]}, {"x": x[16:32]}]


def plant(model: nn.Module, maker: str, reader: str) -> None:
    """A channel 1000 times as loud: the model in floats computes the same."""
    loud, quiet = model.get_submodule(maker), model.get_submodule(reader)
    assert isinstance(loud, nn.Conv2d)
    assert isinstance(quiet, nn.Conv2d)
    assert loud.bias is not None
    with torch.no_grad():
        loud.weight[1] *= 1000
        loud.bias[1] *= 1000
        quiet.weight[:, 1] /= 1000


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("maker", "reader"),
    [
        ("stages.0.0.mixer.spatial", "stages.0.0.mixer.channel"),
        ("stages.1.1.ffn.expand", "stages.1.1.ffn.contract"),
        ("stages.3.1.mixer.spatial", "stages.3.1.mixer.channel"),
    ],
)
def test_a_planted_killer_comes_first_and_holds_once_it_is_kept(
    digits: tuple[nn.Module, list[dict[str, np.ndarray]]], maker: str, reader: str, style: Style
) -> None:
    model, samples = copy.deepcopy(digits[0]), digits[1]
    plant(model, maker, reader)
    simulation = Simulation(model, QuantPlan("w8a8"), samples, style)
    rows = sensitivity(simulation, samples[:1])
    assert rows[0].name == maker
    kept = fewest(simulation, rows, lambda error: error.finite and error.relative_l2 <= 0.1, samples)
    assert [step.count for step in kept] == [0, 1]
    assert kept[0].error.relative_l2 > 0.14
    assert kept[1].error.relative_l2 < 0.1
    planned = Simulation(model, QuantPlan("w8a8", keep=(Keep(modules=(maker,)),)), samples, style)
    assert planned.sites == simulation.without([maker])
    # Keeping the module that reads the tensor frees it as well.
    (other,) = measure(simulation, [simulation.without([reader])], samples)
    assert other.relative_l2 < 0.05


def test_one_loud_channel_of_a_model_that_is_not_mended_comes_first_too() -> None:
    model, samples = small(), feeds()
    with torch.no_grad():
        model[0].weight[0] *= 1000
        model[2].weight[:, 0] *= 1e-5  # it is loud, and says little
    simulation = Simulation(model, QuantPlan("w8a8"), samples)
    rows = sensitivity(simulation, samples)
    assert rows[0].name == "0"
    (everything,) = measure(simulation, [simulation.sites], samples)
    assert rows[0].without.relative_l2 < 0.3 * everything.relative_l2


def test_errors_are_those_of_all_outputs_at_once() -> None:
    model, samples = small(), feeds()
    labels = [np.array([0, 1, 2, 3])] * 3
    simulation = Simulation(model, QuantPlan("w4"), samples)
    (error,) = measure(simulation, [simulation.sites], samples, labels)
    x = torch.from_numpy(np.concatenate([sample["x"] for sample in samples]))
    with torch.no_grad():
        exact = model(x)
        with simulation.rounded(simulation.sites):
            off = model(x)
    assert error.relative_l2 == pytest.approx(float((off - exact).norm() / exact.norm()), rel=1e-4)
    assert error.sqnr_db == pytest.approx(-20 * math.log10(error.relative_l2))
    classes = np.concatenate(labels)
    assert error.samples == 12
    assert error.agree == int((off.argmax(1) == exact.argmax(1)).sum())
    assert error.correct == int((off.argmax(1).numpy() == classes).sum())
    assert error.reference_correct == int((exact.argmax(1).numpy() == classes).sum())
    expected = nn.functional.kl_div(off.log_softmax(1), exact.log_softmax(1), log_target=True, reduction="batchmean")
    assert error.kl == pytest.approx(float(expected), rel=1e-3)
    (nothing,) = measure(simulation, [frozenset()], samples, labels)
    assert nothing.relative_l2 == 0
    assert nothing.sqnr_db == math.inf
    assert nothing.agree == 12


def test_the_worst_output_counts() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return 1e6 * x, self.a(x)

    samples = feeds((4, 6))
    simulation = Simulation(Two().eval(), QuantPlan("w4"), samples)
    (error,) = measure(simulation, [simulation.sites], samples)
    assert error.relative_l2 > 0.01


def test_ranked_by_the_error_alone() -> None:
    good = Error(0.0)
    rows = [
        Row("a", "Conv2d", 1, Error(0.1), good),
        Row("b", "Conv2d", 1, Error(0.5), good),
        Row("c", "Conv2d", 1, Error(0.1), good),
        Row("d", "Conv2d", 1, Error(0.0, nonfinite=3), good),
        Row("e", "Conv2d", 1, Error(math.inf), good),
    ]
    assert [row.name for row in rank(rows)] == ["d", "e", "b", "a", "c"]
    assert all(Row.from_dict(json.loads(json.dumps(row.as_dict(), allow_nan=False))) == row for row in rows)


def test_what_is_not_finite_comes_first() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x - 0.017)  # what rounding makes a little smaller has no logarithm

    model = nn.Sequential(nn.Linear(2, 2, bias=False), Log(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.018], [0.018, 1.0]]))
    samples = [{"x": np.array([[1.0, 0.0]], np.float32)}]
    rows = sensitivity(Simulation(model, QuantPlan("w8"), samples), samples)
    assert rows[0].name == "0"
    assert rows[0].alone.nonfinite > 0
    assert rows[1].alone.finite


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    samples, path = feeds(), tmp_path / "sub" / "rows.jsonl"
    model = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(9)]).eval()
    simulation = Simulation(model, QuantPlan("w8"), samples)
    whole = sensitivity(simulation, samples)

    def stop(text: str) -> None:
        if text.startswith("8 of 9"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity(simulation, samples, journal=Journal(path), progress=stop)
    with path.open("ab") as handle:
        handle.write(b'\n{"key": "8", "val')  # cut off as it was written
    said: list[str] = []
    assert len(Journal(path).known) == 8
    again = sensitivity(simulation, samples, journal=Journal(path), progress=said.append)
    assert again == whole
    assert said == ["8 of 9 measured; 8"]
    assert sensitivity(simulation, samples, journal=Journal(path), progress=said.append) == whole
    assert len(said) == 1


@pytest.mark.parametrize("needed", [0, 1, 2, 3, 5, 6, 9])
def test_the_fewest_to_keep_are_found(needed: int) -> None:
    samples = feeds()
    model = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(9)]).eval()
    simulation = Simulation(model, QuantPlan("w8"), samples)
    rows = sensitivity(simulation, samples)
    left = {}
    for count in range(10):
        (error,) = measure(simulation, [simulation.without([row.name for row in rows[:count]])], samples)
        left[count] = error
    found = fewest(simulation, rows, lambda error: error in [left[c] for c in range(needed, 10)], samples)
    assert found[-1].count == needed
    assert all(step.error == left[step.count] for step in found)
    assert len(found) <= 8


def test_samples_are_needed() -> None:
    simulation = Simulation(small(), QuantPlan("w8"), [])
    with pytest.raises(UsageError, match="no samples"):
        sensitivity(simulation, [])
