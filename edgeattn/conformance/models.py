"""The kit's models: small, each with something that targets get wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgeattn.capture import Program, capture, run_eager
from edgeattn.capture.decoder import caches_of, capture_decoder
from edgeattn.core.numerics import Array
from edgeattn.core.specs import IDS, POSITION, StepShape
from edgeattn.models.plm import PLM, plm
from edgeattn.reparam import reparameterize
from edgeattn.targets.base import Target

#: Samples of each model; the first two are run, all are there to be measured on.
SAMPLES = 6
#: Multiply-accumulates of ``perceptron``.
PERCEPTRON_MACS = 2 * (64 * 96 + 96 * 64)


class Perceptron(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        """x (2, 64) -> (2, 64)."""
        out: Tensor = self.second(nn.functional.gelu(self.first(x)))
        return out


class Rectified(nn.Sequential):
    """Two linear layers with ReLU between them: the least that a target can take."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))


class Convolution(nn.Module):
    """Convolution, batch norm with statistics of its own, ReLU, pooling, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Linear(16, 10)
        with torch.no_grad():
            self.norm.running_mean.normal_()  # type: ignore[union-attr]
            self.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]

    def forward(self, image: Tensor) -> Tensor:
        """Image (1, 3, 12, 12) -> (1, 10)."""
        out: Tensor = self.head(torch.relu(self.norm(self.conv(image))).mean((2, 3)))
        return out


class Attention(nn.Module):
    """Two heads over six tokens, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """x (1, 6, 32) -> (1, 6, 32)."""
        q, k, v = (part.reshape(1, 6, 2, 16).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        weights = (q @ k.transpose(-2, -1) * 0.25).softmax(-1)
        out: Tensor = x + self.out((weights @ v).transpose(1, 2).reshape(1, 6, 32))
        return out


class Several(nn.Module):
    """Two inputs of other shapes and two outputs, of which the first is the shorter to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.short = nn.Linear(8, 4), nn.Linear(6, 4)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """(2, 8), (2, 6) -> (2, 4), (2, 4)."""
        return torch.relu(self.short(right)), torch.relu(self.long(left)) + self.short(right)


class Lookup(nn.Module):
    """An embedding: integers of 64 bits come in."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (1, 5), below 20 -> (1, 5, 4)."""
        out: Tensor = self.head(self.table(ids))
        return out


@dataclass(frozen=True)
class Case:
    """A model, captured, with samples and what PyTorch makes of them.

    Attributes:
        modules: paths of its modules; None where they are not told.
        entry: that is run.
        samples: inputs by name. references: outputs by name in float32, of each sample.
    """

    name: str
    program: Program
    modules: frozenset[str] | None
    samples: tuple[Mapping[str, Array], ...]
    references: tuple[Mapping[str, Array], ...]
    entry: str = "main"


@dataclass(frozen=True)
class _Recipe:
    make: Callable[[], nn.Module]
    inputs: Mapping[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    integers: int = 0  # the inputs are integers below it


_RECIPES = {
    "rectified": _Recipe(Rectified, {"x": (2, 64)}, ("y",)),
    "perceptron": _Recipe(Perceptron, {"x": (2, 64)}, ("y",)),
    "convolution": _Recipe(Convolution, {"image": (1, 3, 12, 12)}, ("logits",)),
    "attention": _Recipe(Attention, {"x": (1, 6, 32)}, ("y",)),
    "several": _Recipe(Several, {"left": (2, 8), "right": (2, 6)}, ("first", "second")),
    # Names that are words of a language, hold dots, or look like those that an exporter makes up.
    "names": _Recipe(Several, {"for": (2, 8), "input.1": (2, 6)}, ("output_0", "return.value")),
    "lookup": _Recipe(Lookup, {"ids": (1, 5)}, ("y",), integers=20),
}
#: Names of the models that every target is asked for.
NAMES = tuple(_RECIPES)
#: The decoder's name.
DECODER = "decoder"


@functools.cache
def case(name: str) -> Case:
    """The model of that name; made once in a process."""
    recipe, generator = _RECIPES[name], np.random.default_rng(7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = recipe.make().eval().requires_grad_(False)

    def draw(shape: tuple[int, ...]) -> Array:
        if recipe.integers:
            return generator.integers(0, recipe.integers, shape)
        return generator.standard_normal(shape).astype(np.float32)

    samples = tuple({key: draw(shape) for key, shape in recipe.inputs.items()} for _ in range(SAMPLES))
    tensors = [{key: torch.from_numpy(value.copy()) for key, value in sample.items()} for sample in samples]
    references = tuple(
        {key: value.numpy() for key, value in run_eager(model, one, recipe.outputs).items()} for one in tensors
    )
    program = capture(model, tensors[0], recipe.outputs)
    return Case(name, program, frozenset(path for path, _ in model.named_modules()), samples, references)


@functools.cache
def decoder(form: str) -> Case:
    """PLM with a cache, as a target of that ``Target.cache`` takes it; one token behind four others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = plm(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=16,
            intermediate_size=64,
            max_position_embeddings=16,
        ).eval()
    form_of = reparameterize(model, torch.zeros(1, 4, dtype=torch.int64)).model
    assert isinstance(form_of, PLM)
    steps = [StepShape("decode", 1, 16, form == "dynamic")]
    caches = caches_of(form_of, 16)
    program = capture_decoder(form_of, caches, steps)
    generator, rows = np.random.default_rng(7), 8 if form == "dynamic" else 16
    graph, samples, references = program.entries["decode"].graph.module(), [], []
    for _ in range(2):
        feeds: dict[str, Array] = {IDS: generator.integers(0, 64, (1, 1)), POSITION: np.array([4])}
        for key, width in caches.rows:
            past = np.zeros((1, rows, width), np.float32)
            past[:, :4] = generator.standard_normal((1, 4, width))
            feeds[key] = past
        with torch.no_grad():
            results = graph(*(torch.from_numpy(value.copy()) for value in feeds.values()))
        samples.append(feeds)
        outputs = program.entries["decode"].outputs
        references.append({key: value.numpy() for key, value in zip(outputs, results, strict=True)})
    return Case(DECODER, program, None, tuple(samples), tuple(references), "decode")


def cases(target: Target) -> list[Case]:
    """What a target is asked to take: every model, and a decoder where it says that it takes some."""
    return [*(case(name) for name in NAMES), *([decoder(target.cache)] if target.cache else [])]


def rectified() -> nn.Module:
    """For a whole export: the smallest model, x (2, 64)."""
    return Rectified()
