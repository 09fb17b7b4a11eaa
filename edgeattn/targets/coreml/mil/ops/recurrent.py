"""Recurrent layers. x is [S, B, I]; states are [B, H], twice as wide where an LSTM runs in both directions.

The sequence of a layer that runs in reverse stands in the order in which it was computed, the last element of x
first; that of the backward half of a bidirectional LSTM stands in x's order. Source: coremltools' tests, which
compare with devices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import op


def _hard_sigmoid(x: Tensor) -> Tensor:
    return (0.2 * x + 0.5).clamp(0, 1)


#: By name; those with parameters have their defaults, with which ``scaled_tanh`` is tanh.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hard_sigmoid": _hard_sigmoid,
    "linear": lambda x: x,
    "relu": torch.relu,
    "scaled_tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sigmoid_hard": _hard_sigmoid,
    "tanh": torch.tanh,
}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name.lower() not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name}")
    return _ACTIVATIONS[name.lower()]


def _steps(x: Tensor, direction: str) -> tuple[Tensor, ...]:
    """The elements of the sequence in the order in which they are computed."""
    if direction not in ("forward", "reverse"):
        raise ValueError(f"unknown direction {direction}")
    return (x if direction == "forward" else x.flip(0)).unbind()


def _sequence(states: list[Tensor], all_of_them: bool) -> Tensor:
    return torch.stack(states if all_of_them else states[-1:])


@op("rnn")
def rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """``h = activation(weight_ih @ x + bias + weight_hh @ h)``; the states, all or the last one, and the last one."""
    act, h = _activation(activation), initial_h
    states = []
    for given in _steps(F.linear(x, weight_ih, bias), direction):
        h = act(given + F.linear(h, weight_hh))
        states.append(h)
    return _sequence(states, output_sequence), h


@op("gru")
def gru(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: bool = False,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit; its weights and biases are those of the reset, the output and the update gate in turn.

    ``reset_after`` (iOS18) resets what the hidden weights and ``bias`` give, as PyTorch does; without it the state is
    reset before them. Returns the states, all or the last one, and the last one.
    """
    gate, act, h = _activation(recurrent_activation), _activation(activation), initial_h
    hidden_r, hidden_o, hidden_z = weight_hh.chunk(3)
    zeros = weight_hh.new_zeros(weight_hh.shape[0])
    bias_r, bias_o, bias_z = (zeros if bias is None else bias).chunk(3)
    states = []
    for given in _steps(F.linear(x, weight_ih, input_bias), direction):
        given_r, given_o, given_z = given.chunk(3, dim=-1)
        r = gate(given_r + F.linear(h, hidden_r, bias_r))
        z = gate(given_z + F.linear(h, hidden_z, bias_z))
        kept = r * F.linear(h, hidden_o, bias_o) if reset_after else F.linear(r * h, hidden_o, bias_o)
        h = (1 - z) * act(given_o + kept) + z * h
        states.append(h)
    return _sequence(states, output_sequence), h


def _lstm(
    steps: tuple[Tensor, ...],
    h: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    peephole: Tensor | None,
    activations: tuple[str, str, str],
    clip: float | None,
) -> tuple[list[Tensor], Tensor]:
    """All states of one direction, and the last cell; ``steps`` are what the input weights and the bias gave."""
    gate, cell, act = (_activation(name) for name in activations)
    peep_i, peep_f, peep_o = (c.new_zeros(3 * c.shape[1]) if peephole is None else peephole).chunk(3)
    states = []
    for given in steps:
        i, f, o, z = (given + F.linear(h, weight_hh)).chunk(4, dim=-1)
        c = gate(f + peep_f * c) * c + gate(i + peep_i * c) * cell(z)
        c = c if clip is None else c.clamp(-clip, clip)
        h = gate(o + peep_o * c) * act(c)
        states.append(h)
    return states, c


@op("lstm")
def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Long short-term memory; weights and biases are those of the input, forget, output and cell gate in turn.

    ``clip`` bounds the new cell state, which the output gate and the output see, and the next step. Returns the
    states, all or the last one, the last state and the last cell.

    Raises:
        ValueError: both directions without the weights of the backward one.
    """
    activations = (recurrent_activation, cell_activation, activation)
    projected = F.linear(x, weight_ih, bias)
    if direction != "bidirectional":
        states, c = _lstm(_steps(projected, direction), initial_h, initial_c, weight_hh, peephole, activations, clip)
        return _sequence(states, output_sequence), states[-1], c
    if weight_ih_back is None or weight_hh_back is None:
        raise ValueError("a bidirectional LSTM without weights of the backward direction")
    (h, h_back), (c, c_back) = initial_h.chunk(2, dim=1), initial_c.chunk(2, dim=1)
    states, c = _lstm(_steps(projected, "forward"), h, c, weight_hh, peephole, activations, clip)
    steps = _steps(F.linear(x, weight_ih_back, bias_back), "reverse")
    back, c_back = _lstm(steps, h_back, c_back, weight_hh_back, peephole_back, activations, clip)
    last = torch.cat((states[-1], back[-1]), dim=1)
    both = torch.cat((torch.stack(states), torch.stack(back[::-1])), dim=2) if output_sequence else last.unsqueeze(0)
    return both, last, torch.cat((c, c_back), dim=1)
