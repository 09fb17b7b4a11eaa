"""ConvShareViT: a vision transformer whose learned linear maps are convolutions shared by all tokens, for 4f optics.

Only the abstract and summaries of the paper (arXiv 2504.11517; IEEE TNNLS 2026) could be read: sizes, wiring and the
three variants are a reconstruction, and its accuracies do not apply here. docs/convsharevit.md says what is certain.

A token is a square map: the stream is (B, T, M, M), and D = M * M is the width of the ViT that it stands for.

    v1   kernels as large as the map, valid padding: each gives one number. Exactly a ViT (``to_v1``, ``to_dense``).
    v2   smaller kernels, valid padding, one a head; transposed convolutions lead back to M x M.
    v3   odd kernels, same padding, one a head; the maps keep their size throughout.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from edgeattn.core.errors import UsageError, unknown
from edgeattn.models.layers.shared_conv import SharedConv2d, SharedConvTranspose2d, counted
from edgeattn.models.layers.vit import Attention, Block, Mlp, Shape, patchify

EXACT = 1e-5
"""Largest relative L2 between the logits of a ViT and of its converted form, in float32."""


@dataclass(frozen=True)
class ConvShareViTConfig:
    """Everything that determines a ConvShareViT.

    Args:
        variant: ``v1``, ``v2`` or ``v3``.
        image: side of the square input in pixels. patch: P, side of a patch; it divides ``image``.
        in_channels: C of the input.
        embed_kernel: side of the kernels of the embedding; with ``valid`` that of the patch.
        depth: blocks. heads: h. ratio: hidden maps of the MLP; in v1 the hidden width is ratio * D.
        kernel: N, side of the blocks' kernels: M in v1, below M in v2, odd in v3.
        num_classes: outputs of the head.
        embedding: ``transposed``, one kernel a channel spreads the patch to M = P + embed_kernel - 1; or ``valid``, D
            kernels of the patch's size whose numbers are laid out as M x M: a ViT's linear projection.
        classifier: ``map``, the token maps are the channels of one convolution to a square of at least ``num_classes``
            numbers, of which the first are taken; or ``valid``, the mean of the tokens (the class token, if there is
            one) meets a kernel of its own size for every class: a linear head.
        class_token: a learned token in front of the patches.
        map_side: M with the embedding ``valid``, where it does not follow from the kernels.
        qkv_bias: whether queries, keys and values have a bias.
        eps: of the layer norms.

    Raises:
        UsageError: a count below 1, an unknown name, or sizes that do not fit together.
    """

    variant: str
    image: int
    patch: int
    in_channels: int
    embed_kernel: int
    depth: int
    heads: int
    ratio: int
    kernel: int
    num_classes: int
    embedding: str = "transposed"
    classifier: str = "map"
    class_token: bool = False
    map_side: int | None = None
    qkv_bias: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        names = ["image", "patch", "in_channels", "embed_kernel", "depth", "heads", "ratio", "kernel", "num_classes"]
        counted("ConvShareViTConfig", {name: getattr(self, name) for name in names})
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known, where=f"ConvShareViTConfig.{name}")
        if self.image % self.patch:
            raise _bad("patch", self.patch, f"patches of {self.patch} do not tile {self.image} pixels", "use a divisor")
        self._check_embedding()
        side, n = self.side, self.kernel
        if self.variant == "v1" and n != side:
            raise _bad("kernel", n, f"kernels of v1 are as large as a token, {side} x {side}", f"use {side}, or v2")
        if self.variant == "v1" and self.width % self.heads:
            raise _bad("heads", self.heads, f"{self.width} kernels do not divide into these heads", "use a divisor")
        if self.variant == "v2" and n >= side:
            raise _bad(
                "kernel", n, f"kernels of v2 are smaller than a token, {side} x {side}", "make it smaller, or v1"
            )
        if self.variant == "v3" and n % 2 == 0:
            raise _bad("kernel", n, "same padding needs an odd kernel", f"use {n + 1}")
        if self.classifier == "map" and self.class_side > side:
            why = f"{self.num_classes} classes need a map of {self.class_side} x {self.class_side}, a token has {side}"
            raise _bad("classifier", "map", why, "use the classifier valid, or larger token maps")

    def _check_embedding(self) -> None:
        if self.embedding == "transposed":
            grown = self.patch + self.embed_kernel - 1
            if self.map_side not in (None, grown):
                raise _bad("map_side", self.map_side, f"a transposed embedding makes {grown}", "leave it out")
        elif self.map_side is None or self.map_side < 1:
            raise _bad(
                "map_side", self.map_side, "the embedding valid has map_side² kernels", "give the side of a token"
            )
        elif self.embed_kernel != self.patch:
            why = "kernels of the embedding valid are as large as a patch"
            raise _bad("embed_kernel", self.embed_kernel, why, f"use {self.patch}")

    @property
    def side(self) -> int:
        """M: side of a token's map."""
        return self.map_side or self.patch + self.embed_kernel - 1

    @property
    def width(self) -> int:
        """D = M * M: numbers of a token."""
        return self.side * self.side

    @property
    def tokens(self) -> int:
        """T: tokens of an image, the class token included."""
        return (self.image // self.patch) ** 2 + self.class_token

    @property
    def head_maps(self) -> tuple[int, int]:
        """Maps of one head and their side d: its queries, keys and values have maps * d * d numbers."""
        if self.variant == "v1":
            return self.width // self.heads, 1
        return 1, self.side - self.kernel + 1 if self.variant == "v2" else self.side

    @property
    def class_side(self) -> int:
        """Side of the smallest square that holds the classes."""
        return math.isqrt(self.num_classes - 1) + 1


_CHOICES = {"variant": ("v1", "v2", "v3"), "embedding": ("transposed", "valid"), "classifier": ("map", "valid")}


def _bad(name: str, value: object, why: str, fix: str) -> UsageError:
    return UsageError(
        f"ConvShareViT cannot be built with this {name}",
        value=value,
        where=f"ConvShareViTConfig.{name}",
        why=why,
        fix=fix,
    )


class _Encoder(nn.Module):
    """What ConvShareViT and DenseViT share: (B, C, H, W) -> logits (B, num_classes). Names are those of timm's ViT."""

    def __init__(self, config: ConvShareViTConfig, token: Shape, block: Callable[[], tuple[Attention, Mlp]]) -> None:
        super().__init__()
        self.config, self.token = config, token
        self.cls_token = nn.Parameter(torch.empty(1, 1, *token)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.tokens, *token))
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        self.patch_embed = nn.Sequential(OrderedDict(proj=self._projection()))
        self.blocks = nn.Sequential(*(Block(token, *block(), config.eps) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(token, config.eps)
        self.head = self._classifier()

    def _projection(self) -> nn.Module:
        c = self.config
        if c.embedding == "transposed":
            return SharedConvTranspose2d(c.in_channels, 1, c.embed_kernel)
        return SharedConv2d(c.in_channels, c.width, c.patch)

    def _classifier(self) -> nn.Module:
        c = self.config
        if c.classifier == "map":  # the tokens are the maps of one convolution, summed over
            return SharedConv2d(c.tokens, 1, c.side - c.class_side + 1)
        return SharedConv2d(1, c.num_classes, c.side)

    def _project(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> a token for every patch, (B, T, *token)."""
        patches = patchify(x, self.config.patch)
        tokens: Tensor = self.patch_embed(patches).reshape(*patches.shape[:2], *self.token)
        return tokens

    def _embed(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, T, *token), with positions."""
        _check_image(x, self.config)
        tokens = self._project(x)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(x.shape[0], *self.cls_token.shape[1:]), tokens], dim=1)
        return tokens + self.pos_embed

    def _classify(self, x: Tensor) -> Tensor:
        """x (B, T, *token) -> (B, num_classes)."""
        c = self.config
        if c.classifier == "map":
            maps = self.head(x.reshape(x.shape[0], 1, c.tokens, c.side, c.side))
            flat: Tensor = maps.flatten(1)[:, : c.num_classes]
            return flat
        pooled = x[:, 0] if c.class_token else x.mean(dim=1)
        shape = (x.shape[0], -1) if isinstance(self.head, nn.Linear) else (x.shape[0], 1, 1, c.side, c.side)
        logits: Tensor = self.head(pooled.reshape(shape)).flatten(1)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, image, image) -> logits (B, num_classes).

        Raises:
            UsageError: another shape.
        """
        return self._classify(self.norm(self.blocks(self._embed(x))))

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """x (B, in_channels, image, image) -> A of every block, (B, h, T, T); each row is a distribution over tokens.

        Raises:
            UsageError: another shape.
        """
        found = []
        x = self._embed(x)
        for block in self.blocks:
            assert isinstance(block, Block)
            found.append(block.attn.maps(block.norm1(x)))
            x = block(x)
        return found


class ConvShareViT(_Encoder):
    """(B, in_channels, image, image) -> logits (B, num_classes), with shared convolutions for every linear layer.

    Weights are random, from torch's global generator: kernels truncated normal with a variance of 1 over the weights
    behind an output, positions with a standard deviation of 0.02.
    """

    def __init__(self, config: ConvShareViTConfig) -> None:
        c, m, r = config, config.side, config.ratio
        maps, d = config.head_maps
        one: Shape = (1, m, m)
        padding = "same" if c.variant == "v3" else "valid"

        def forth(kernels: int, bias: bool = True) -> SharedConv2d:
            return SharedConv2d(1, kernels, c.kernel, padding, bias)

        def back(of: int) -> nn.Module:
            if c.variant == "v1":
                return SharedConv2d(of, c.width, m)
            return (
                SharedConvTranspose2d(of, 1, c.kernel) if c.variant == "v2" else SharedConv2d(of, 1, c.kernel, "same")
            )

        def block() -> tuple[Attention, Mlp]:
            full = c.variant == "v1"  # the numbers of v1 are laid out as whole maps again
            joined, hidden = (one, (r, m, m)) if full else ((c.heads, d, d), (r, d, d))
            qkv = forth(3 * c.heads * maps, c.qkv_bias)
            attn = Attention(qkv, back(joined[0]), c.heads, maps * d * d, one, joined)
            return attn, Mlp(forth(r * c.width if full else r), back(r), one, hidden)

        super().__init__(config, (m, m), block)


class DenseViT(_Encoder):
    """The control: the same network with plain linear layers, under timm's names of modules and parameters.

    With the embedding and the classifier ``valid`` it is a ViT throughout; with the others these two are
    ConvShareViT's, so that only the linear maps of the blocks differ. Initialised as ConvShareViT is.

    Args:
        config: of v1, whose sizes it has.

    Raises:
        UsageError: a configuration of another variant.
    """

    def __init__(self, config: ConvShareViTConfig) -> None:
        if config.variant != "v1":
            raise _bad("variant", config.variant, "a dense ViT has the sizes of v1 alone", "give a configuration of v1")
        d, hidden = config.width, config.ratio * config.width

        def block() -> tuple[Attention, Mlp]:
            qkv = nn.Linear(d, 3 * d, bias=config.qkv_bias)
            attn = Attention(qkv, nn.Linear(d, d), config.heads, d // config.heads, (d,), (d,))
            return attn, Mlp(nn.Linear(d, hidden), nn.Linear(hidden, d), (d,), (hidden,))

        super().__init__(config, (d,), block)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _projection(self) -> nn.Module:
        c = self.config
        if c.embedding == "valid":
            return nn.Conv2d(c.in_channels, c.width, c.patch, stride=c.patch)
        return super()._projection()

    def _project(self, x: Tensor) -> Tensor:
        if self.config.embedding == "valid":
            tokens: Tensor = self.patch_embed(x).flatten(2).transpose(1, 2)
            return tokens
        return super()._project(x)

    def _classifier(self) -> nn.Module:
        c = self.config
        return nn.Linear(c.width, c.num_classes) if c.classifier == "valid" else super()._classifier()


Model = TypeVar("Model", bound=_Encoder)


def _check_image(x: Tensor, config: ConvShareViTConfig) -> None:
    expected = (config.in_channels, config.image, config.image)
    if x.ndim != 4 or tuple(x.shape[1:]) != expected:
        raise UsageError(
            "this ViT takes a batch of images of one size",
            value=tuple(x.shape),
            why=f"it was built for (B, {', '.join(map(str, expected))}): each patch has a position of its own",
            fix="resize the images, or build the model for this size",
        )


def to_dense(model: ConvShareViT) -> DenseViT:
    """The dense ViT that a v1 is: the same numbers, kernels (K, F, M, M) as the rows of matrices (K, F * M * M).

    Raises:
        UsageError: another variant.
    """
    dense = DenseViT(model.config)
    return _with_state(dense, model)


def to_v1(vit: nn.Module) -> ConvShareViT:
    """The ConvShareViT v1 that a ViT is, with the rows of its matrices as kernels; ``to_dense`` leads back bit for bit.

    Args:
        vit: a DenseViT, or what looks like timm's VisionTransformer: D a square, hidden width a multiple of D, learned
            positions, the class token or (without a class token, with the final norm in front) the mean as pooling.
            float32 or float64; it is not changed.

    Returns:
        A model in eval mode with copies of the weights. Its logits on a random image were compared with those of
        ``vit`` (relative L2 at most 1e-5), so that a ViT that computes otherwise than it looks is refused as well.

    Raises:
        UsageError: what v1 cannot express: another width, layer scale, norms of queries and keys, other pooling ...
    """
    try:
        config = vit.config if isinstance(vit, DenseViT) else _config_of(vit)
    except AttributeError as error:
        raise _refused("model", type(vit).__name__, f"it lacks what timm's VisionTransformer has: {error}") from error
    made = _with_state(ConvShareViT(config), vit)
    example = next(vit.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, config.in_channels, config.image, config.image, generator=generator).to(example)
    training = [module for module in vit.modules() if module.training]
    try:
        with torch.no_grad():
            expected, got = vit.eval()(image), made(image)
    finally:
        for module in training:
            module.training = True
    apart = float((got - expected).norm() / expected.norm()) if got.shape == expected.shape else math.inf
    if not apart <= EXACT:
        raise _refused("forward", f"relative L2 {apart:.1e}", "it does not compute what its layers look like")
    return made


def _refused(where: str, value: object, why: str) -> UsageError:
    fix = "convert a plain ViT: D a square, GELU, pre-norm, no layer scale, no norms of queries and keys, no registers"
    return UsageError("this ViT cannot become a ConvShareViT v1", value=value, where=where, why=why, fix=fix)


def _config_of(vit: Any) -> ConvShareViTConfig:
    """The configuration of v1 that fits timm's VisionTransformer; only its attributes are read."""
    embed, proj, blocks = vit.patch_embed, vit.patch_embed.proj, list(vit.blocks)
    width, hidden, heads = proj.out_channels, blocks[0].mlp.fc1.out_features, blocks[0].attn.num_heads
    (rows, columns), (patch, other) = embed.grid_size, proj.kernel_size
    if rows != columns or patch != other or tuple(proj.stride) != (patch, patch):
        raise _refused(
            "patch_embed", f"{rows} x {columns} patches of {patch} x {other}", "image and patches are squares"
        )
    if math.isqrt(width) ** 2 != width:
        raise _refused("embed_dim", width, "a token of v1 is a square map, so its width is a square number")
    if hidden % width:
        raise _refused("blocks.0.mlp.fc1", hidden, f"the hidden width of v1 is a multiple of {width}: whole maps")
    if vit.global_pool != ("token" if vit.cls_token is not None else "avg"):
        raise _refused("global_pool", vit.global_pool, "v1 takes the class token, or without one the mean")
    for i, block in enumerate(blocks):
        if type(block.mlp.act) is not nn.GELU or block.mlp.act.approximate != "none":
            raise _refused(f"blocks.{i}.mlp.act", block.mlp.act, "v1 has the exact GELU")
    return ConvShareViTConfig(
        variant="v1",
        image=rows * patch,
        patch=patch,
        in_channels=proj.in_channels,
        embed_kernel=patch,
        depth=len(blocks),
        heads=heads,
        ratio=hidden // width,
        kernel=math.isqrt(width),
        num_classes=vit.head.out_features,
        embedding="valid",
        classifier="valid",
        class_token=vit.cls_token is not None,
        map_side=math.isqrt(width),
        qkv_bias=blocks[0].attn.qkv.bias is not None,
        eps=blocks[0].norm1.eps,
    )


def _with_state(model: Model, source: nn.Module) -> Model:
    """The weights of ``source`` in the shapes of ``model``; both have the same names."""
    state, shapes = source.state_dict(), {name: value.shape for name, value in model.state_dict().items()}
    extra, missing = [name for name in state if name not in shapes], [name for name in shapes if name not in state]
    if extra or missing:
        raise _refused((extra + missing)[0], f"{len(extra)} unknown, {len(missing)} missing", "v1 has other parameters")
    for name, value in state.items():
        if value.numel() != shapes[name].numel() or value.dtype not in (torch.float32, torch.float64):
            what = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            raise _refused(name, what, f"v1 has {tuple(shapes[name])} here, in float32 or float64")
    model.to(next(iter(state.values())))
    model.load_state_dict({name: value.reshape(shapes[name]) for name, value in state.items()})
    return model.eval()


SIZES: dict[str, ConvShareViTConfig] = {
    "v1": ConvShareViTConfig("v1", 32, 4, 3, 5, 6, 4, 2, kernel=8, num_classes=100, classifier="valid"),
    "v2": ConvShareViTConfig("v2", 32, 4, 3, 13, 6, 8, 4, kernel=9, num_classes=100),
    "v3": ConvShareViTConfig("v3", 32, 4, 3, 13, 6, 8, 4, kernel=3, num_classes=100),
}
"""Our choice of sizes for 32 x 32 images, 64 tokens; the paper's are unknown. An 8 x 8 token of v1 is too small for a
map of 100 classes, so its classifier is ``valid``."""

_DIGITS = ConvShareViTConfig("v1", 32, 4, 1, 5, 4, 4, 2, kernel=8, num_classes=10)
DIGITS: dict[str, ConvShareViTConfig] = {
    "v1": _DIGITS,
    "v2": replace(_DIGITS, variant="v2", kernel=5, ratio=4),
    "v3": replace(_DIGITS, variant="v3", kernel=3, ratio=4),
}
"""Sizes for (B, 1, 32, 32) digits: 64 tokens of 8 x 8, embedding and classifier the same in all."""


def _known(variant: str, sizes: dict[str, ConvShareViTConfig]) -> ConvShareViTConfig:
    if variant not in sizes:
        raise unknown("ConvShareViT variant", variant, sizes, like=variant.lower()[-2:])
    return sizes[variant]


def convsharevit(variant: str, num_classes: int = 100, in_channels: int = 3) -> ConvShareViT:
    """A ConvShareViT for (B, in_channels, 32, 32), with random weights; the sizes are ours, not the paper's.

    Args:
        variant: ``v1``, ``v2`` or ``v3``.
        num_classes: outputs of the head.
        in_channels: channels of the input.

    Raises:
        UsageError: an unknown variant, a count below 1, or more classes than the classifier's map can hold.
    """
    return ConvShareViT(replace(_known(variant, SIZES), num_classes=num_classes, in_channels=in_channels))


def convsharevit_digits(variant: str) -> ConvShareViT:
    """A small ConvShareViT for (B, 1, 32, 32) digits in 10 classes; trained by examples/train_convsharevit.py.

    Args:
        variant: ``v1``, ``v2`` or ``v3``.

    Raises:
        UsageError: an unknown variant.
    """
    return ConvShareViT(_known(variant, DIGITS))


def vit_digits() -> DenseViT:
    """The control of ``convsharevit_digits``: dense linear layers in the blocks, all else the same."""
    return DenseViT(_DIGITS)
