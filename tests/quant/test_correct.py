"""Bias correction: exact on average, nothing but biases changes, and it must gain something."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeattn.capture import Program, capture
from edgeattn.quant.correct import correct, rounded_weights
from edgeattn.quant.plan import QuantPlan
from edgeattn.quant.weighted import run, with_weights
from edgeattn.recipe import Keep


def captured(model: nn.Module, x: torch.Tensor) -> Program:
    return capture(model.eval(), {"x": x}, ("y",))


def feeds_of(x: torch.Tensor) -> list[dict[str, np.ndarray]]:
    return [{"x": part.numpy()} for part in x]


LAYERS = {
    "padded": nn.Conv2d(4, 6, 3, padding=1),
    "grouped": nn.Conv2d(4, 6, 3, stride=2, groups=2),
    "transposed": nn.ConvTranspose2d(4, 6, 3, 2),
    "linear": nn.Linear(7, 6),
}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(LAYERS)), st.sampled_from(["w8", "w4", "w8a8"]), st.floats(0.1, 3.0))
def test_the_mean_error_of_every_channel_goes(name: str, precision: str, mean: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2, 4, 7, 7) + mean
    program = captured(nn.Sequential(LAYERS[name]), x[0])
    plan = QuantPlan(precision)
    # Each twice, for every other one is only measured on.
    better, facts = correct(program, plan, [feeds for feeds in feeds_of(x) for _ in range(2)])
    assert facts["held"]
    assert facts["corrected"] == ["0"]
    rounded = with_weights(better, rounded_weights(program, plan)).entries["main"]
    axes = (0, 1, 2) if name == "linear" else (0, 2, 3)
    exact, errors = program.entries["main"], []
    for feeds in feeds_of(x):
        errors.append((run(rounded, feeds)["y"] - run(exact, feeds)["y"]).double().mean(axes))
    assert torch.stack(errors).mean(0).abs().max() < 1e-5


def small() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 4, 1))


def test_nothing_but_biases_changes() -> None:
    x = torch.rand(6, 1, 3, 8, 8)
    program = captured(small(), x[0])
    before = {key: value.clone() for key, value in program.entries["main"].graph.state_dict.items()}
    better, facts = correct(program, QuantPlan("w4"), feeds_of(x))
    old, new = (p.entries["main"].graph.state_dict for p in (program, better))
    assert facts["corrected"] == ["0", "3"]
    assert facts["without_bias"] == ["2"]
    assert {key for key in new if new[key] is not old[key]} == {"0.bias", "3.bias"}
    assert all(torch.equal(value, before[key]) for key, value in old.items())
    assert facts["relative_l2"]["after"] < facts["relative_l2"]["before"]
    assert "biases of 2 modules" in facts["words"][0]


def test_modules_that_the_plan_keeps_stay() -> None:
    x = torch.rand(6, 1, 3, 8, 8)
    torch.manual_seed(1)
    program = captured(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), x[0])
    _, facts = correct(program, QuantPlan("w4", keep=(Keep(modules=("0",)),)), feeds_of(x))
    assert facts["corrected"] == ["2"]
    _, facts = correct(program, QuantPlan("w4", keep=(Keep(modules=("*",)),)), feeds_of(x))
    assert (facts["corrected"], facts["words"]) == ([], ["no bias to correct"])


@pytest.mark.parametrize(
    ("feeds", "said"), [([{"x": np.zeros((1, 3, 8, 8))}], "undone"), ([{"z": np.zeros(1)}], "no sample")]
)
def test_what_gains_nothing_is_undone(feeds, said: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    program = captured(net, torch.rand(1, 3, 8, 8))
    better, facts = correct(program, QuantPlan("w4"), feeds)
    assert better is program
    assert not facts["held"]
    assert said in facts["words"][0]


def test_what_does_not_hold_on_other_samples_is_undone() -> None:
    program = captured(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.rand(1, 3, 8, 8))
    x = torch.rand(8, 1, 3, 8, 8) * torch.tensor([1.0, -1.0]).repeat(4).view(-1, 1, 1, 1, 1)
    better, facts = correct(program, QuantPlan("w4"), feeds_of(x))
    assert better is program
    assert facts["relative_l2"]["after"] > facts["relative_l2"]["before"]
    assert facts["corrected"] == []


def test_only_some_of_many_samples_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeattn.quant.correct.USED", 2)
    x = torch.rand(20, 1, 3, 8, 8)
    feeds = [{"x": part.numpy()} for part in x]
    feeds[1] = {"x": np.full((1, 3, 8, 8), np.nan, np.float32)}  # would spoil the means
    _, facts = correct(captured(small(), x[0]), QuantPlan("w4"), feeds)
    assert np.isfinite(facts["relative_l2"]["after"])


def test_four_bits_on_digits_lose_less() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] / 16
    y = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 1),
        nn.ReLU(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(150):
        at = torch.randint(0, 1200, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[at]), y[at]).backward()
        optimizer.step()
    program = captured(net, x[:32])
    plan = QuantPlan("w4")
    better, facts = correct(program, plan, [{"x": x[i : i + 32].numpy()} for i in range(0, 256, 32)])
    assert facts["held"]
    rounded = rounded_weights(program, plan)

    def error(of: Program) -> float:  # on samples that were not corrected on
        feeds = {"x": x[1200:1232].numpy()}
        made = run(with_weights(of, rounded).entries["main"], feeds)["y"]
        wanted = run(program.entries["main"], feeds)["y"]
        return float((made - wanted).norm() / wanted.norm())

    assert error(better) < error(program)
