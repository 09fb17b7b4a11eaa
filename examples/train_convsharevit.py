"""Train small ConvShareViTs and their dense control on digits, and compare their attention.

    python examples/train_convsharevit.py                   # minutes a model on one CPU core
    python examples/train_convsharevit.py --compare-only    # table and picture from the checkpoints, in seconds

Four models on scikit-learn's handwritten digits, the images and the split of examples/train_digits.py:

    vit    the control: dense linear layers in the blocks, all else as in the others
    v1     kernels as large as a token, valid padding; by construction a dense ViT, trained from its own initialisation
    v2     smaller kernels, valid padding          v3     small kernels, same padding

Writes checkpoints/vit-digits.safetensors and checkpoints/convsharevit-{v1,v2,v3}-digits.safetensors under --out
(default: recipes/), prints the comparison, and draws it.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from train_digits import MEAN, RECIPES, STD, augment, load_images, normalize, write_checkpoint

from edgeattn.models.convsharevit import ConvShareViT, DenseViT, convsharevit_digits, vit_digits

Model = ConvShareViT | DenseViT

PICTURE = RECIPES.parent / "docs" / "convsharevit-attention.svg"

SHOWN = 7
"""The held-out image of the picture."""

SCORED = 120
"""Held-out images, the first, whose attention is scored."""


@dataclass(frozen=True)
class Kind:
    """One of the four: its name in the table, the factory that builds it, and the recipe that takes its checkpoint."""

    name: str
    factory: str
    recipe: str
    build: Callable[[], Model]
    colour: str


KINDS: dict[str, Kind] = {
    "vit": Kind("dense ViT", "vit_digits", "vit-digits", vit_digits, "#222222"),
    **{
        v: Kind(
            f"{v} ({words})",
            f"convsharevit_digits(variant={v!r})",
            f"convsharevit-{v}-digits",
            lambda v=v: convsharevit_digits(v),  # type: ignore[misc]
            colour,
        )
        for v, words, colour in (
            ("v1", "valid, N = M", "#1f77b4"),
            ("v2", "valid, N < M", "#009e73"),
            ("v3", "same", "#d95f02"),
        )
    },
}
"""By the name that ``--models`` takes; the colours can be told apart by those who see fewer, too."""


# --- training -----------------------------------------------------------------------------------------------------


def train(model: Model, images: Tensor, labels: Tensor, args: argparse.Namespace, generator: torch.Generator) -> None:
    """Minimize the cross entropy with label smoothing 0.05, in place: AdamW with a one-cycle learning rate.

    Weight decay is on kernels and matrices alone. By their names: a layer norm over maps has two axes as well.
    """
    steps = len(images) // args.batch  # the last, short batch is dropped
    named = dict(model.named_parameters())
    decayed = [p for name, p in named.items() if name.endswith("weight") and "norm" not in name]
    rest = [p for name, p in named.items() if not (name.endswith("weight") and "norm" not in name)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate)
    total_steps = args.epochs * steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=total_steps, pct_start=0.15)
    start = time.monotonic()
    model.train()
    for epoch in range(args.epochs):
        order, total = torch.randperm(len(images), generator=generator), 0.0
        for step in range(steps):
            chosen = order[step * args.batch : (step + 1) * args.batch]
            logits = model(augment(normalize(images[chosen]), generator))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        if (epoch + 1) % 5 == 0 or epoch + 1 == args.epochs:
            spent = time.monotonic() - start
            print(f"epoch {epoch + 1:3d}/{args.epochs}  loss {total / steps:.4f}  {spent:5.0f} s", flush=True)


@torch.no_grad()
def accuracy(model: Model, x: Tensor, y: Tensor) -> float:
    """Share of right top-1 answers in eval mode; x normalized."""
    return float((model.eval()(x).argmax(1) == y).float().mean())


def train_all(args: argparse.Namespace) -> None:
    """Train the chosen models and write their checkpoints."""
    x_train, y_train, x_test, y_test = load_images(0)
    for index, key in enumerate(KINDS):
        if key not in args.models:
            continue
        kind, seed = KINDS[key], args.seed + index
        torch.manual_seed(seed)
        model = kind.build()
        print(f"{kind.name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
        train(model, x_train, y_train, args, torch.Generator().manual_seed(args.seed))
        score = accuracy(model, normalize(x_test), y_test)
        print(f"{kind.name}: held-out accuracy {score:.4f} ({round(score * len(y_test))} of {len(y_test)})")
        facts = {
            "model": f"edgeattn.models.convsharevit:{kind.factory}",
            "data": "sklearn.datasets.load_digits, 8x8 upsampled bilinear to 32x32 uint8, 80/20 stratified split",
            "preprocessing": "(x / 255 - mean) / std",
            "mean": str(MEAN),
            "std": str(STD),
            "seed": str(seed),
            "epochs": str(args.epochs),
            "batch": str(args.batch),
            "learning_rate": str(args.rate),
            "test_accuracy": f"{score:.4f}",
            "test_images": str(len(y_test)),
        }
        write_checkpoint(args.out / "checkpoints" / f"{kind.recipe}.safetensors", model, facts)


# --- attention scores ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """What the attention of a model is like on some images; the paper's own definition of its scores is unknown to us.

    Those of A (rows sum to 1, T keys each) are means over images, heads, queries and blocks.

    Attributes:
        accuracy: share of right answers.
        levelled: the same if every A is replaced by 1 / T: what is left if no token looks anywhere in particular.
        entropy: of a row in nats, a number a block; ln T if every key gets the same.
        relative: the mean of ``entropy`` over ln T: 1 is no choice at all.
        untrained: the same of the model as it was initialised.
        distance: how far from its query the weight lies, in patches.
        diagonal: weight of a token on itself; 1 / T if every key gets the same.
        varies: share of A's variance about 1 / T that is between images: 0 is a fixed pattern, as of a convolution.
        cosine: of A, averaged over heads, with that of the dense ViT in the same block and image.
        correlation: the same with the mean, 1 / T, subtracted: two flat maps are not alike by being flat.
    """

    accuracy: float
    levelled: float
    entropy: list[float]
    relative: float
    untrained: float
    distance: float
    diagonal: float
    varies: float
    cosine: float
    correlation: float


def entropies(maps: Sequence[Tensor]) -> list[float]:
    """Mean row entropy in nats, a number a block, of A (B, h, T, T)."""
    return [float(-(a * a.clamp_min(1e-30).log()).sum(-1).mean()) for a in maps]


def distances(side: int) -> Tensor:
    """(T, T): how far the patches of a ``side`` x ``side`` grid are from one another."""
    places = torch.cartesian_prod(torch.arange(float(side)), torch.arange(float(side)))
    return torch.cdist(places, places)


def likeness(maps: Sequence[Tensor], others: Sequence[Tensor], mean: float) -> float:
    """Mean cosine over images and blocks between head averages less ``mean``."""

    def flat(a: Tensor) -> Tensor:
        return a.mean(1).flatten(1) - mean

    found = [F.cosine_similarity(flat(a), flat(b)).mean() for a, b in zip(maps, others, strict=True)]
    return float(torch.stack(found).mean())


def levelled(model: Model) -> Model:
    """A copy whose tokens look at all tokens alike."""
    model = copy.deepcopy(model)
    for block in model.blocks:

        def weights(
            x: Tensor, of: Callable[[Tensor], tuple[Tensor, Tensor]] = block.attn._weights
        ) -> tuple[Tensor, Tensor]:
            a, v = of(x)
            return torch.full_like(a, 1.0 / a.shape[-1]), v

        block.attn._weights = weights
    return model


@torch.no_grad()
def score(model: Model, x: Tensor, y: Tensor, untrained: Model, dense: Sequence[Tensor]) -> Scores:
    """The scores of a trained model.

    Args:
        x: (B, 1, 32, 32), normalized. y: (B,) labels.
        untrained: the same model with fresh weights.
        dense: the maps of the dense ViT on the first SCORED of x.
    """
    some = x[:SCORED]
    maps = model.eval().attention_maps(some)
    tokens = maps[0].shape[-1]
    far, top = distances(math.isqrt(tokens)), math.log(tokens)
    entropy = entropies(maps)
    between, whole = 0.0, 0.0
    for a in maps:
        between += float((a - a.mean(0)).square().mean())
        whole += float((a - 1.0 / tokens).square().mean())
    return Scores(
        accuracy=accuracy(model, x, y),
        levelled=accuracy(levelled(model), x, y),
        entropy=entropy,
        relative=float(np.mean(entropy)) / top,
        untrained=float(np.mean(entropies(untrained.eval().attention_maps(some)))) / top,
        distance=float(np.mean([float((a * far).sum(-1).mean()) for a in maps])),
        diagonal=float(np.mean([float(a.diagonal(dim1=-2, dim2=-1).mean()) for a in maps])),
        varies=between / whole,
        cosine=likeness(maps, dense, 0.0),
        correlation=likeness(maps, dense, 1.0 / tokens),
    )


def heldout() -> tuple[Tensor, Tensor]:
    """The held-out digits, normalized, and their labels."""
    with np.load(RECIPES / "data" / "digits-heldout.npz") as file:
        return normalize(torch.from_numpy(file["x"])), torch.from_numpy(file["y"])


def trained(key: str, folder: Path) -> Model:
    """A model with the weights of its checkpoint under ``folder``, in eval mode."""
    model = KINDS[key].build()
    model.load_state_dict(load_file(folder / "checkpoints" / f"{KINDS[key].recipe}.safetensors"), strict=True)
    return model.eval()


@torch.no_grad()
def compare(folder: Path) -> dict[str, Scores]:
    """The scores of all four: accuracy on all held-out images, attention on the first of them."""
    x, y = heldout()
    dense = trained("vit", folder).attention_maps(x[:SCORED])
    found = {}
    for index, key in enumerate(KINDS):
        torch.manual_seed(index)
        found[key] = score(trained(key, folder), x, y, KINDS[key].build(), dense)
    return found


def table(found: Mapping[str, Scores]) -> str:
    """Markdown, a row a model."""
    uniform = float(distances(8).mean())
    heads = ["Model", "Accuracy", "With A = 1 / T", "Row entropy (nats), by block", "/ ln T (untrained)"]
    heads += ["Distance", "Diagonal", "Varies", "Cosine", "Correlation"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for key, s in found.items():
        blocks = ", ".join(f"{value:.2f}" for value in s.entropy)
        cells = [
            KINDS[key].name,
            f"{s.accuracy:.2%}",
            f"{s.levelled:.2%}",
            f"{np.mean(s.entropy):.2f} ({blocks})",
            f"{s.relative:.3f} ({s.untrained:.3f})",
            f"{s.distance:.2f}",
            f"{s.diagonal:.3f}",
            f"{s.varies:.2f}",
            f"{s.cosine:.2f}",
            f"{s.correlation:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    flat = f"| *A = 1 / T* | | | {math.log(64):.2f} | 1.000 | {uniform:.2f} | {1 / 64:.3f} | | | |"
    return "\n".join([*lines, flat])


# --- the picture --------------------------------------------------------------------------------------------------

_CELL = 5.0  # pixels of a patch in a heat map
_LEVELS = 16
_DARKEST = 2.0  # an A of 1/4 has the full shade


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{escape(text)}</text>'


def _cells(values: Tensor, x: float, y: float, cell: float, ink: tuple[int, int, int]) -> str:
    """A heat map, values 0 to 1 (H, W) in 16 levels from white to ``ink``: one path a level."""
    levels = (values.clamp(0, 1) * (_LEVELS - 1)).round().int().tolist()
    side = f"{cell:g}"
    found: dict[int, list[str]] = {}
    for row, line in enumerate(levels):
        for column, level in enumerate(line):
            if level:
                found.setdefault(level, []).append(f"M{x + column * cell:g} {y + row * cell:g}h{side}v{side}h-{side}z")
    parts = []
    for level, places in sorted(found.items()):
        shade = [round(255 + (end - 255) * level / (_LEVELS - 1)) for end in ink]
        parts.append(f'<path fill="#{bytes(shade).hex()}" d="{"".join(places)}"/>')
    width = cell * len(levels[0])
    return f'{"".join(parts)}<path d="M{x:g} {y:g}h{width:g}v{cell * len(levels):g}h-{width:g}z" {_FRAME}/>'


_FRAME = 'fill="none" stroke="#bbb" stroke-width="0.5"'


@torch.no_grad()
def picture(found: Mapping[str, Scores], folder: Path) -> str:
    """SVG: row entropy by block, and where one patch of one image looks, in every head of every model."""
    x, _ = heldout()
    image = x[SHOWN : SHOWN + 1]
    pixels = (image[0, 0] * STD + MEAN).clamp(0, 1)
    ink = F.avg_pool2d(pixels[None, None], 4)[0, 0]
    query = int(ink.flatten().argmax())  # the patch with the most ink
    blocks, heads = len(found["vit"].entropy), 4
    step, left, top = 8 * _CELL + 6, 130.0, 290.0
    block_width = heads * step + 14
    width, height = left + blocks * block_width + 10, top + len(found) * (step + 12) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
        _text(20, 24, "Mean entropy of a row of A over ln T, by block (held-out digits)", 'font-weight="600"'),
    ]
    parts += _chart(found, blocks)
    side = 32 * 4.5
    corner = (width - side - 40, 60.0)
    parts.append(_text(corner[0], 50, "Image, looking patch"))
    parts.append(_cells(pixels, *corner, 4.5, (20, 20, 20)))
    row, column = divmod(query, 8)
    mark = 'fill="none" stroke="#d1006c" stroke-width="2"'
    place = (corner[0] + column * 18, corner[1] + row * 18)
    parts.append(f'<rect x="{place[0]:g}" y="{place[1]:g}" width="18" height="18" {mark}/>')
    parts.append(
        _text(20, top - 34, "What it looks at: a map of 8 x 8 patches for every head; shade = √A", 'font-weight="600"')
    )
    for block in range(blocks):
        parts.append(_text(left + block * block_width, top - 10, f"block {block + 1}"))
    for line, key in enumerate(found):
        y = top + line * (step + 12)
        parts.append(_text(20, y + 4 * _CELL + 4, KINDS[key].name))
        for block, a in enumerate(trained(key, folder).attention_maps(image)):
            for head in range(heads):
                seen = a[0, head, query].reshape(8, 8)
                at = left + block * block_width + head * step
                parts.append(f"<g><title>largest {float(seen.max()):.3f}</title>")
                parts.append(_cells(_DARKEST * seen.sqrt(), at, y, _CELL, (8, 48, 107)))
                parts.append("</g>")
    y = height - 44
    parts.append(_text(20, y + 16, "A ="))
    for index, (value, words) in enumerate(((1 / 64, "1/64 (all alike)"), (1 / 16, "1/16"), (1 / 4, "1/4 or more"))):
        at = 50.0 + index * 150
        parts.append(_cells(_DARKEST * torch.full((1, 1), value).sqrt(), at, y, 20, (8, 48, 107)))
        parts.append(_text(at + 26, y + 15, words))
    return "\n".join([*parts, "</svg>", ""])


def _chart(found: Mapping[str, Scores], blocks: int) -> list[str]:
    """Lines of relative entropy by block, with a legend."""
    x0, y0, w, h = 60.0, 40.0, 300.0, 160.0
    low, top = 0.7, math.log(64)

    def height(share: float) -> float:
        return y0 + h * (1 - (share - low) / (1 - low))

    parts = []
    for share in (0.7, 0.8, 0.9, 1.0):
        y = height(share)
        parts.append(f'<line x1="{x0}" x2="{x0 + w}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(x0 - 8, y + 4, f"{share:.1f}", 'text-anchor="end" fill="#555"'))
    parts.append(_text(x0 + w + 8, y0 + 4, "all keys alike", 'fill="#555"'))
    for block in range(blocks):
        at = x0 + w * (block + 0.5) / blocks
        parts.append(_text(at, y0 + h + 18, f"block {block + 1}", 'text-anchor="middle" fill="#555"'))
    dashes = ("", "8 3", "4 3", "1 3")
    for line, (key, scores) in enumerate(found.items()):
        points = [(x0 + w * (i + 0.5) / blocks, height(value / top)) for i, value in enumerate(scores.entropy)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        stroke = f'stroke="{KINDS[key].colour}" stroke-width="2.5" stroke-dasharray="{dashes[line]}" fill="none"'
        parts.append(f'<polyline points="{path}" {stroke}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{KINDS[key].colour}"/>' for x, y in points]
        y = 84 + 24 * line
        parts.append(f'<path d="M390 {y - 4:.0f}h30" {stroke}/>')
        parts.append(_text(428, y, KINDS[key].name))
    return parts


def main() -> None:
    """Train, then compare; or compare alone."""
    parser = argparse.ArgumentParser(description="Train ConvShareViTs on scikit-learn's digits and compare them.")
    parser.add_argument("--models", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compare-only", action="store_true", help="table and picture from the checkpoints")
    parser.add_argument("--out", type=Path, default=RECIPES, help="folder of checkpoints/ (default: recipes/)")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where the picture goes (default: docs/)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    if not args.compare_only:
        train_all(args)
    if args.models != list(KINDS):
        return
    found = compare(args.out)
    print(table(found))
    args.picture.write_text(picture(found, args.out), encoding="utf-8")
    print(f"wrote {args.picture} ({args.picture.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
