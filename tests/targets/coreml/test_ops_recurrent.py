"""rnn, gru and lstm against PyTorch's layers where those exist, and against their equations in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from edgeattn.targets.coreml.mil.registry import OPS
from tests.targets.coreml.harness import interpret, mb
from tests.targets.coreml.judging import agree, judgeable, numbers

FAMILY = ("gru", "lstm", "rnn")
#: coremltools infers no values of recurrent layers.
JUDGED: list[str] = []

STEPS, BATCH, WIDTH, HIDDEN = 4, 2, 3, 5
TYPES = [("float32", 15), ("float32", 18), ("float16", 17)]
ACTIVATIONS = {
    "tanh": np.tanh,
    "scaled_tanh": np.tanh,
    "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
    "hard_sigmoid": lambda v: np.clip(0.2 * v + 0.5, 0, 1),
    "sigmoid_hard": lambda v: np.clip(0.2 * v + 0.5, 0, 1),
    "relu": lambda v: np.maximum(v, 0),
    "linear": lambda v: v,
}
# Directions, whether the whole sequence is asked for, whether there is a bias.
FORMS = [("forward", True, True), ("forward", False, False), ("reverse", True, False), ("reverse", False, True)]


def weights(gates: int, dtype: str, seed: int = 0) -> dict[str, Array]:
    """Feeds and weights of a layer with so many gates."""
    shapes = {
        "x": (STEPS, BATCH, WIDTH),
        "initial_h": (BATCH, HIDDEN),
        "weight_ih": (gates * HIDDEN, WIDTH),
        "weight_hh": (gates * HIDDEN, HIDDEN),
        "bias": (gates * HIDDEN,),
    }
    return {name: numbers(seed + i, shape, dtype) for i, (name, shape) in enumerate(shapes.items())}


def run(name: str, given: dict[str, Array], parameters: dict[str, Any], dtype: str, opset: int) -> list[Array]:
    """The layer with its sequence and states as feeds, all else constant."""
    feeds = {key: value for key, value in given.items() if key == "x" or key.startswith("initial")}
    fixed = {key: value for key, value in given.items() if key not in feeds}
    return interpret(lambda **moving: getattr(mb, name)(**moving, **fixed, **parameters), feeds, opset)


def torchs(layer: torch.nn.RNNBase, given: dict[str, Array], order: list[int], extra: Array | None) -> torch.nn.RNNBase:
    """A layer of PyTorch with these weights; ``order`` are MIL's gates in PyTorch's order."""

    def moved(value: Array) -> torch.Tensor:
        parts = np.split(value.astype(np.float32), len(order))
        return torch.from_numpy(np.concatenate([parts[i] for i in order]))

    zeros = np.zeros(len(order) * HIDDEN, np.float32)
    layer.load_state_dict(
        {
            "weight_ih_l0": moved(given["weight_ih"]),
            "weight_hh_l0": moved(given["weight_hh"]),
            "bias_ih_l0": moved(zeros if extra is None else extra),
            "bias_hh_l0": moved(given.get("bias", zeros)),
        }
    )
    return layer.eval()


def taken(given: dict[str, Array], direction: str) -> torch.Tensor:
    """The sequence as PyTorch, which only goes forward, must see it."""
    x = torch.from_numpy(given["x"].astype(np.float32))
    return x.flip(0) if direction == "reverse" else x


@pytest.mark.parametrize(("dtype", "opset"), TYPES)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize(("direction", "whole", "biased"), FORMS)
def test_rnn_is_pytorchs(direction: str, whole: bool, biased: bool, activation: str, dtype: str, opset: int) -> None:
    given = weights(1, dtype)
    if not biased:
        del given["bias"]
    parameters = {"direction": direction, "output_sequence": whole, "activation": activation}
    layer = torchs(torch.nn.RNN(WIDTH, HIDDEN, nonlinearity=activation), given, [0], None)
    with torch.no_grad():
        states, last = layer(taken(given, direction), torch.from_numpy(given["initial_h"]).float()[None])
    expected = [(states if whole else states[-1:]).numpy(), last[0].numpy()]
    agree(run("rnn", given, parameters, dtype, opset), expected, dtype, 4)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_rnn_with_each_activation(activation: str) -> None:
    given = weights(1, "float32")
    h, states = given["initial_h"].astype(np.float64), []
    for x in given["x"].astype(np.float64):
        h = ACTIVATIONS[activation](x @ given["weight_ih"].T + h @ given["weight_hh"].T + given["bias"])
        states.append(h)
    found = run("rnn", given, {"output_sequence": True, "activation": activation}, "float32", 15)
    agree(found, [np.stack(states), h], "float32", 4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("direction", "whole", "biased"), FORMS)
def test_gru_that_resets_after_is_pytorchs(direction: str, whole: bool, biased: bool, dtype: str) -> None:
    given = weights(3, dtype)
    given["input_bias"] = numbers(9, given["bias"].shape, dtype)
    if not biased:
        del given["bias"], given["input_bias"]
    parameters = {"direction": direction, "output_sequence": whole, "reset_after": True}
    layer = torchs(torch.nn.GRU(WIDTH, HIDDEN), given, [0, 2, 1], given.get("input_bias"))
    with torch.no_grad():
        states, last = layer(taken(given, direction), torch.from_numpy(given["initial_h"]).float()[None])
    expected = [(states if whole else states[-1:]).numpy(), last[0].numpy()]
    agree(run("gru", given, parameters, dtype, 18), expected, dtype, 4)


@pytest.mark.parametrize(("dtype", "opset"), TYPES)
@pytest.mark.parametrize(("gate", "act"), [("sigmoid", "tanh"), ("hard_sigmoid", "relu"), ("tanh", "sigmoid")])
@pytest.mark.parametrize(("direction", "whole", "biased"), FORMS)
def test_gru(direction: str, whole: bool, biased: bool, gate: str, act: str, dtype: str, opset: int) -> None:
    given = weights(3, dtype)
    if not biased:
        del given["bias"]
    extra = {"input_bias": numbers(9, (3 * HIDDEN,), dtype)} if opset == 18 else {}
    in_r, in_o, in_z = np.split(given["weight_ih"].astype(np.float64), 3)
    hid_r, hid_o, hid_z = np.split(given["weight_hh"].astype(np.float64), 3)
    total = np.zeros(3 * HIDDEN) + given.get("bias", 0) + extra.get("input_bias", 0)
    b_r, b_o, b_z = np.split(total, 3)
    h, states = given["initial_h"].astype(np.float64), []
    for x in given["x"].astype(np.float64)[:: -1 if direction == "reverse" else 1]:
        z = ACTIVATIONS[gate](x @ in_z.T + h @ hid_z.T + b_z)
        r = ACTIVATIONS[gate](x @ in_r.T + h @ hid_r.T + b_r)
        o = ACTIVATIONS[act](x @ in_o.T + (r * h) @ hid_o.T + b_o)
        h = (1 - z) * o + z * h
        states.append(h)
    parameters = {
        "direction": direction,
        "output_sequence": whole,
        "recurrent_activation": gate,
        "activation": act,
    }
    found = run("gru", {**given, **extra}, parameters, dtype, opset)
    agree(found, [np.stack(states if whole else states[-1:]), h], dtype, 8)


@pytest.mark.parametrize(("dtype", "opset"), TYPES)
@pytest.mark.parametrize(("direction", "whole", "biased"), FORMS)
def test_lstm_is_pytorchs(direction: str, whole: bool, biased: bool, dtype: str, opset: int) -> None:
    given = weights(4, dtype)
    if not biased:
        del given["bias"]
    given["initial_c"] = numbers(9, (BATCH, HIDDEN), dtype)
    layer = torchs(torch.nn.LSTM(WIDTH, HIDDEN), given, [0, 1, 3, 2], None)
    start = tuple(torch.from_numpy(given[name]).float()[None] for name in ("initial_h", "initial_c"))
    with torch.no_grad():
        states, (h, c) = layer(taken(given, direction), start)
    expected = [(states if whole else states[-1:]).numpy(), h[0].numpy(), c[0].numpy()]
    found = run("lstm", given, {"direction": direction, "output_sequence": whole}, dtype, opset)
    agree(found, expected, dtype, 4)


@pytest.mark.parametrize(("dtype", "opset"), TYPES)
@pytest.mark.parametrize(("whole", "biased"), [(True, True), (True, False), (False, True)])
def test_lstm_in_both_directions_is_pytorchs(whole: bool, biased: bool, dtype: str, opset: int) -> None:
    given, back = weights(4, dtype), weights(4, dtype, seed=20)
    start_c = numbers(9, (2, BATCH, HIDDEN), dtype)
    start_h = numbers(10, (2, BATCH, HIDDEN), dtype)
    if not biased:
        del given["bias"], back["bias"]
    layer = torch.nn.LSTM(WIDTH, HIDDEN, bidirectional=True)
    halves = [torchs(torch.nn.LSTM(WIDTH, HIDDEN), half, [0, 1, 3, 2], None).state_dict() for half in (given, back)]
    layer.load_state_dict({**halves[0], **{f"{name}_reverse": value for name, value in halves[1].items()}})
    with torch.no_grad():
        states, (h, c) = layer(taken(given, "forward"), tuple(torch.from_numpy(s).float() for s in (start_h, start_c)))
    given |= {f"{name}_back": back[name] for name in ("weight_ih", "weight_hh", "bias") if name in back}
    given |= {"initial_h": np.concatenate(start_h, 1), "initial_c": np.concatenate(start_c, 1)}
    last_h, last_c = torch.cat((*h,), 1).numpy(), torch.cat((*c,), 1).numpy()
    found = run("lstm", given, {"direction": "bidirectional", "output_sequence": whole}, dtype, opset)
    agree(found, [states.numpy() if whole else last_h[None], last_h, last_c], dtype, 4)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("peepholes", [False, True])
@pytest.mark.parametrize(
    ("gate", "cell", "act", "clip"),
    [
        ("sigmoid", "tanh", "tanh", 0.2),
        ("hard_sigmoid", "linear", "relu", None),
        ("sigmoid", "relu", "linear", 0.5),
        ("tanh", "scaled_tanh", "hard_sigmoid", 0.01),
        ("Sigmoid", "TANH", "scaled_tanh", None),
    ],
)
def test_lstm_with_peepholes_clipping_and_activations(
    gate: str, cell: str, act: str, clip: float | None, peepholes: bool, direction: str
) -> None:
    given, back = weights(4, "float32"), weights(4, "float32", seed=20)
    given["initial_c"], back["initial_c"] = numbers(9, (BATCH, HIDDEN)), numbers(10, (BATCH, HIDDEN))
    if peepholes:
        given["peephole"], back["peephole"] = numbers(11, (3 * HIDDEN,)), numbers(12, (3 * HIDDEN,))

    def half(own: dict[str, Array], sequence: Array) -> tuple[Array, Array]:
        act_g, act_c, act_h = (ACTIVATIONS[name.lower()] for name in (gate, cell, act))
        p_i, p_f, p_o = np.split(own.get("peephole", np.zeros(3 * HIDDEN)), 3)
        h, c, states = own["initial_h"].astype(np.float64), own["initial_c"].astype(np.float64), []
        for x in sequence.astype(np.float64):
            i, f, o, z = np.split(x @ own["weight_ih"].T + h @ own["weight_hh"].T + own["bias"], 4, axis=1)
            i, f = act_g(i + p_i * c), act_g(f + p_f * c)
            c = f * c + i * act_c(z)
            c = c if clip is None else np.clip(c, -np.float32(clip), np.float32(clip))
            h = act_g(o + p_o * c) * act_h(c)
            states.append(h)
        return np.stack(states), c

    states, c = half(given, given["x"])
    expected, fed = [states, states[-1], c], given
    if direction == "bidirectional":
        behind, c_back = half(back, given["x"][::-1])
        last = np.concatenate((states[-1], behind[-1]), 1)
        expected = [np.concatenate((states, behind[::-1]), 2), last, np.concatenate((c, c_back), 1)]
        fed = {**given, **{f"{n}_back": back[n] for n in back if n.startswith(("weight", "bias", "peephole"))}}
        fed |= {name: np.concatenate((given[name], back[name]), 1) for name in ("initial_h", "initial_c")}
    parameters: dict[str, Any] = {"direction": direction, "output_sequence": True, "activation": act}
    parameters |= {"recurrent_activation": gate, "cell_activation": cell}
    parameters |= {} if clip is None else {"clip": np.float32(clip)}
    agree(run("lstm", fed, parameters, "float32", 15), expected, "float32", 8)


def test_what_has_no_meaning_is_refused() -> None:
    given = {name: torch.from_numpy(value) for name, value in weights(1, "float32").items()}
    with pytest.raises(ValueError, match="unknown activation softplus"):
        OPS["rnn"].function(**given, activation="softplus")
    with pytest.raises(ValueError, match="unknown direction backward"):
        OPS["rnn"].function(**given, direction="backward")
    four = {name: torch.from_numpy(value) for name, value in weights(4, "float32").items()}
    with pytest.raises(ValueError, match="backward direction"):
        OPS["lstm"].function(**four, initial_c=four["initial_h"], direction="bidirectional")


def test_an_activation_that_only_the_device_knows_fails_the_check() -> None:
    with pytest.raises(CheckFailed, match="unknown activation softsign"):
        run("rnn", weights(1, "float32"), {"activation": "softsign"}, "float32", 15)


def test_all_that_coremltools_infers_is_judged() -> None:
    assert judgeable(FAMILY) == set(JUDGED)
