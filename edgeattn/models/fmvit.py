"""FMViT-style backbones: a reconstruction from the abstract of arXiv 2311.05707 on the ladder of Next-ViT.

Official code and weights were never released. What is certain and what is a reconstruction is in docs/fmvit.md;
accuracies of the paper do not apply to this model. Parameters and MACs of the five variants, in their deploy form at
224 px, round to the paper's.

All blocks work on (B, C, H, W). Every batch norm follows a convolution, or feeds only 1x1 convolutions, linear
layers and average pools, so the deploy form has none left.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgeattn.core.errors import UsageError, unknown
from edgeattn.models.layers.conv import RESIDUAL_GAIN, ConvBN, MultiBranchConv2d, gmlp
from edgeattn.models.layers.drop import DropPath
from edgeattn.models.layers.rlmhsa import RLMHSA

STRIDE = 32
"""Total stride of the backbone: height and width of an input are multiples of it."""


@dataclass(frozen=True)
class FMViTConfig:
    """Everything that determines an FMViT.

    Args:
        widths: output channels of the CFBs in stages 1 to 4, multiples of ``group_width``.
        fmb_widths: output channels of the FMBs in stages 2 to 4 (stage 1 has none).
        low_widths: of these, the channels of the low-frequency (attention) part, multiples of ``head_dim``; the rest
            is the high-frequency (convolution) part, a multiple of ``group_width``.
        depths: blocks in each stage. Block 5, 10, ... and the last block of stages 2 to 4 are FMBs.
        stem: channels of the stem.
        ratio: hidden width of the feed-forward part over its width, rounded to a multiple of 32.
        group_width: channels in a group of the 3x3 convolutions.
        sr: side of the pooling window for keys and values in stages 2 to 4.
        head_dim: value width of an attention head.
        drop_path: stochastic depth of the last block; it rises linearly from 0.
        in_channels: channels of the input.
        num_classes: outputs of the head.

    Raises:
        UsageError: a count below 1, or a width that is not a positive multiple of what divides it.
    """

    widths: tuple[int, int, int, int]
    fmb_widths: tuple[int, int, int]
    low_widths: tuple[int, int, int]
    depths: tuple[int, int, int, int]
    stem: int
    ratio: float = 3.0
    group_width: int = 16
    sr: tuple[int, int, int] = (4, 2, 1)
    head_dim: int = 32
    drop_path: float = 0.0
    in_channels: int = 3
    num_classes: int = 1000

    def __post_init__(self) -> None:
        high_widths = [width - low for width, low in zip(self.fmb_widths, self.low_widths, strict=True)]
        rules: tuple[tuple[str, Sequence[int], int], ...] = (
            ("in_channels", [self.in_channels], 1),
            ("num_classes", [self.num_classes], 1),
            ("depths", self.depths, 1),
            ("stem", [self.stem], 1),
            ("widths", self.widths, self.group_width),
            ("low_widths", self.low_widths, self.head_dim),
            ("fmb_widths - low_widths", high_widths, self.group_width),
        )
        for name, values, step in rules:
            if any(value < step or value % step for value in values):
                raise UsageError(
                    f"FMViT cannot be built with these {name}",
                    value=list(values),
                    where=f"FMViTConfig.{name}",
                    why="these are counts"
                    if step == 1
                    else f"its convolution groups or heads are {step} channels wide",
                    fix=f"use {'positive numbers' if step == 1 else f'positive multiples of {step}'}",
                )


VARIANTS: dict[str, FMViTConfig] = {
    "t": FMViTConfig((16, 32, 80, 256), (64, 96, 320), (32, 64, 160), (2, 2, 5, 2), stem=16),
    "s": FMViTConfig((16, 64, 160, 400), (96, 224, 512), (64, 128, 256), (2, 2, 10, 2), stem=16, drop_path=0.1),
    "m": FMViTConfig((48, 112, 272, 544), (128, 352, 704), (64, 192, 352), (3, 4, 5, 3), stem=48, drop_path=0.1),
    "b": FMViTConfig((96, 128, 304, 688), (160, 416, 928), (96, 256, 480), (3, 4, 10, 3), stem=64, drop_path=0.2),
    "l": FMViTConfig((80, 160, 368, 560), (224, 480, 736), (128, 256, 416), (3, 4, 20, 3), stem=64, drop_path=0.2),
}
"""The five variants of the paper by name; the widths are a fit to its parameters and MACs."""

FMB_PERIOD = 5
"""In stages 2 to 4 every fifth block is an FMB (Next-ViT's pattern of stage 3), and so is the last one."""


def _hidden_width(width: int, ratio: float) -> int:
    """``ratio * width`` rounded to a multiple of 32, never below 90 % of it (the rule of Next-ViT)."""
    target = ratio * width
    rounded = max(32, int(target + 16) // 32 * 32)
    return rounded if rounded >= 0.9 * target else rounded + 32


def patch_embed(cin: int, cout: int, stride: int) -> nn.Module:
    """Next-ViT's change of width and resolution: (B, Ci, H, W) -> (B, Co, H / stride, W / stride).

    Stride 2: 2x2 average pool, 1x1 convolution, BN. Stride 1: 1x1 convolution and BN, or nothing if cin == cout.
    """
    if stride == 2:
        return nn.Sequential(OrderedDict(pool=nn.AvgPool2d(2), project=ConvBN(cin, cout)))
    return nn.Identity() if cin == cout else ConvBN(cin, cout)


class Stem(nn.Sequential):
    """Four 3x3 conv-BN-ReLU, the first and the last with stride 2: (B, Ci, H, W) -> (B, C, H / 4, W / 4)."""

    def __init__(self, cin: int, channels: int) -> None:
        narrow = max(16, channels // 2)
        layers: list[nn.Module] = []
        for a, b, stride in ((cin, channels, 2), (channels, narrow, 1), (narrow, channels, 1), (channels, channels, 2)):
            layers += [ConvBN(a, b, 3, stride), nn.ReLU()]
        super().__init__(*layers)


class Mixer(nn.Sequential):
    """High-frequency mixing: grouped 3x3 multi-branch convolution, ReLU, gMLP; (B, C, H, W) -> same."""

    def __init__(self, channels: int, group_width: int) -> None:
        groups = channels // group_width
        super().__init__(
            OrderedDict(
                spatial=MultiBranchConv2d(channels, channels, [(3, groups), (1, groups)], identity=True),
                act=nn.ReLU(),
                channel=gmlp(channels, channels, gain=RESIDUAL_GAIN),
            )
        )


class FeedForward(nn.Sequential):
    """BN, gMLP to the hidden width, ReLU, gMLP back; (B, C, H, W) -> same."""

    def __init__(self, channels: int, ratio: float) -> None:
        hidden = _hidden_width(channels, ratio)
        super().__init__(
            OrderedDict(
                norm=nn.BatchNorm2d(channels),
                expand=gmlp(channels, hidden, identity=False),
                act=nn.ReLU(),
                contract=gmlp(hidden, channels, identity=False, gain=RESIDUAL_GAIN),
            )
        )


class CFB(nn.Module):
    """Convolutional fusion block: (B, Ci, H, W) -> (B, C, H / stride, W / stride).

    x = PE(x); x = x + Mixer(x); x = x + FeedForward(x).
    """

    def __init__(self, cin: int, cout: int, stride: int, config: FMViTConfig, drop_path: float) -> None:
        super().__init__()
        self.embed = patch_embed(cin, cout, stride)
        self.mixer = Mixer(cout, config.group_width)
        self.ffn = FeedForward(cout, config.ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, Ci, H, W) -> (B, C, H / stride, W / stride)."""
        x = self.embed(x)
        x = x + self.drop_path(self.mixer(x))
        out: Tensor = x + self.drop_path(self.ffn(x))
        return out


class FMB(nn.Module):
    """Frequency-mixing block: (B, Ci, H, W) -> (B, low + high, H / stride, W / stride).

    Low frequencies: L = z + RLMHSA(BN(z)) with z = PE(x). High ones: H = h + Mixer(h) with h = PE(L).
    Both: y = cat[L, H]; y + FeedForward(y).
    """

    def __init__(
        self, cin: int, low: int, high: int, stride: int, sr: int, config: FMViTConfig, drop_path: float
    ) -> None:
        super().__init__()
        share = low / (low + high)
        self.embed = patch_embed(cin, low, stride)
        self.norm = nn.BatchNorm2d(low)
        self.attention = RLMHSA(low, sr, config.head_dim)
        self.low_drop = DropPath(drop_path * share)
        self.to_high = patch_embed(low, high, 1)
        self.mixer = Mixer(high, config.group_width)
        self.high_drop = DropPath(drop_path * (1.0 - share))
        self.ffn = FeedForward(low + high, config.ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, Ci, H, W) -> (B, low + high, H / stride, W / stride)."""
        z = self.embed(x)
        low = z + self.low_drop(self.attention(self.norm(z)))
        high = self.to_high(low)
        high = high + self.high_drop(self.mixer(high))
        y = torch.cat([low, high], dim=1)
        out: Tensor = y + self.drop_path(self.ffn(y))
        return out


class FMViT(nn.Module):
    """The backbone with its classification head, or with ``features=True`` without.

    (B, in_channels, H, W), H and W multiples of 32, -> logits (B, num_classes); with ``features`` a tuple of four maps
    (B, C_i, H / s, W / s) at the strides s = 4, 8, 16, 32. Weights are drawn from a truncated normal (std 0.02), as
    Next-ViT does, from torch's global generator.
    """

    def __init__(self, config: FMViTConfig, features: bool = False) -> None:
        super().__init__()
        self.config = config
        self.features = features
        self.stem = Stem(config.in_channels, config.stem)
        self.stages = nn.ModuleList(_stages(config))
        self.out_channels: tuple[int, ...] = (config.widths[0], *config.fmb_widths)
        self.head: nn.Module | None = None
        if not features:
            self.head = nn.Sequential(
                OrderedDict(
                    norm=nn.BatchNorm2d(self.out_channels[-1]),
                    pool=nn.AdaptiveAvgPool2d(1),
                    flatten=nn.Flatten(1),
                    linear=nn.Linear(self.out_channels[-1], config.num_classes),
                )
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """x (B, in_channels, H, W) -> logits (B, num_classes), or the four maps.

        Raises:
            UsageError: not a batch of images, a wrong channel count, or a size that is not a multiple of 32.
        """
        _check_input(x, self.config.in_channels)
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        if self.head is None:
            return tuple(maps)
        logits: Tensor = self.head(x)
        return logits


def _stages(config: FMViTConfig) -> Iterator[nn.Sequential]:
    """The four stages; the first block of stages 2 to 4 halves the resolution."""
    cin, index, last = config.stem, 0, max(1, sum(config.depths) - 1)
    for stage, depth in enumerate(config.depths):
        blocks: list[nn.Module] = []
        for i in range(depth):
            stride = 2 if stage > 0 and i == 0 else 1
            rate = config.drop_path * index / last
            if stage > 0 and ((i + 1) % FMB_PERIOD == 0 or i == depth - 1):
                cout, low = config.fmb_widths[stage - 1], config.low_widths[stage - 1]
                blocks.append(FMB(cin, low, cout - low, stride, config.sr[stage - 1], config, rate))
            else:
                cout = config.widths[stage]
                blocks.append(CFB(cin, cout, stride, config, rate))
            cin, index = cout, index + 1
        yield nn.Sequential(*blocks)


def _check_input(x: Tensor, channels: int) -> None:
    """Refuse what the strides or the stem cannot take, naming the nearest shape that would do."""
    shape = tuple(x.shape)
    if len(shape) != 4:
        raise UsageError(
            "FMViT takes a batch of images",
            value=shape,
            why=f"the input has {len(shape)} dimensions instead of 4",
            fix=f"give (B, {channels}, H, W)",
        )
    if shape[1] != channels:
        raise UsageError(
            f"FMViT was built for {channels} input channels",
            value=shape,
            why=f"the input has {shape[1]} channels (axis 1)",
            fix=f"give (B, {channels}, H, W), or build the model with in_channels={shape[1]}",
        )
    if any(side < STRIDE or side % STRIDE for side in shape[2:]):
        options = " x ".join(_nearest_sizes(side) for side in shape[2:])
        raise UsageError(
            f"FMViT needs a height and a width that are multiples of {STRIDE}",
            value=shape,
            why=f"the four stages divide the resolution by {STRIDE}; {shape[2]} x {shape[3]} does not divide",
            fix=f"resize or pad the image; nearest sizes: {options}",
        )


def _nearest_sizes(side: int) -> str:
    """The valid sizes on both sides of ``side`` ("192 or 224"), or the one at or above the smallest."""
    below, above = side // STRIDE * STRIDE, -(-side // STRIDE) * STRIDE
    if below == above or below == 0:
        return str(max(above, STRIDE))
    return f"{below} or {above}"


def fmvit(variant: str, num_classes: int = 1000, in_channels: int = 3, features: bool = False) -> FMViT:
    """A variant of the paper's table, with random weights.

    Args:
        variant: ``t``, ``s``, ``m``, ``b`` or ``l``.
        num_classes: outputs of the head (unused with ``features``).
        in_channels: channels of the input.
        features: no head; the forward pass returns the four stage maps, for dense tasks.

    Raises:
        UsageError: an unknown variant, or a count below 1.
    """
    if variant not in VARIANTS:
        raise unknown("FMViT variant", variant, VARIANTS, like=variant.lower().removeprefix("fmvit").strip("-_ ")[:1])
    return FMViT(replace(VARIANTS[variant], num_classes=num_classes, in_channels=in_channels), features)


def fmvit_digits() -> FMViT:
    """A small FMViT for (B, 1, 32, 32) digits in 10 classes; trained by examples/train_digits.py.

    Its pooling windows are smaller than those of the variants, since the maps of stages 2 to 4 are 4, 2 and 1 wide.
    """
    return FMViT(
        FMViTConfig(
            widths=(16, 32, 48, 64),
            fmb_widths=(64, 64, 96),
            low_widths=(32, 32, 64),
            depths=(1, 2, 2, 2),
            stem=16,
            sr=(2, 1, 1),
            in_channels=1,
            num_classes=10,
        )
    )


def fmvit_scenes() -> FMViT:
    """A small FMViT for (B, 1, 32, 64) scenes of two digits in 20 classes; trained by examples/train_scenes.py.

    Attention sees maps of 4 x 8, 2 x 4 and 1 x 2, so the pooling windows are those of ``fmvit_digits``.
    """
    return FMViT(
        FMViTConfig(
            widths=(16, 32, 48, 64),
            fmb_widths=(64, 96, 96),
            low_widths=(32, 64, 64),
            depths=(1, 2, 2, 2),
            stem=16,
            sr=(2, 1, 1),
            in_channels=1,
            num_classes=20,
        )
    )
