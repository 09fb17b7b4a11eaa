"""ConvShareViT: shapes, errors, v1 as the dense ViT that it is, exports."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from edgeattn.core.errors import UsageError
from edgeattn.models.build import import_timm
from edgeattn.models.convsharevit import (
    DIGITS,
    SIZES,
    ConvShareViT,
    ConvShareViTConfig,
    DenseViT,
    convsharevit,
    convsharevit_digits,
    to_dense,
    to_v1,
    vit_digits,
)
from edgeattn.models.layers.shared_conv import SharedConv2d, SharedConvTranspose2d
from edgeattn.models.layers.vit import patchify
from edgeattn.reparam import reparameterize

VARIANTS = ("v1", "v2", "v3")

# Of the sizes that we chose; docs/convsharevit.md has them.
PARAMETERS = {"v1": 211_632, "v2": 46_305, "v3": 29_025}
PARAMETERS_DIGITS = {"v1": 139_739, "v2": 9_347, "v3": 7_811}

VIT = ConvShareViTConfig("v1", 16, 4, 3, 4, 2, 4, 2, 6, 7, "valid", "valid", map_side=6)


def apart(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).norm() / expected.norm())


def vision_transformer(**options: Any) -> nn.Module:
    """A small ViT of timm whose width is a square, with random weights throughout."""
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
    vit: nn.Module = VisionTransformer(**{**sizes, **options}).eval()
    for parameter in vit.parameters():  # zeros and ones hide mistakes
        nn.init.normal_(parameter, std=0.1)
    return vit


# --- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_parameters_of_the_sizes(variant: str) -> None:
    with torch.device("meta"):
        model, digits = convsharevit(variant).eval(), convsharevit_digits(variant).eval()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 100)
        assert digits(torch.empty(2, 1, 32, 32)).shape == (2, 10)
        assert convsharevit(variant, num_classes=7, in_channels=2)(torch.empty(1, 2, 32, 32)).shape == (1, 7)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[variant]
    assert sum(p.numel() for p in digits.parameters()) == PARAMETERS_DIGITS[variant]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("embedding", ["transposed", "valid"])
@pytest.mark.parametrize("classifier", ["map", "valid"])
@pytest.mark.parametrize("class_token", [False, True])
def test_every_combination_runs_and_learns(variant: str, embedding: str, classifier: str, class_token: bool) -> None:
    torch.manual_seed(0)
    config = ConvShareViTConfig(
        variant=variant,
        image=12,
        patch=4,
        in_channels=2,
        embed_kernel=3 if embedding == "transposed" else 4,
        depth=2,
        heads=3,
        ratio=2,
        kernel={"v1": 6, "v2": 4, "v3": 3}[variant],
        num_classes=5,
        embedding=embedding,
        classifier=classifier,
        class_token=class_token,
        map_side=None if embedding == "transposed" else 6,
        qkv_bias=class_token,
    )
    assert (config.side, config.width, config.tokens, config.class_side) == (6, 36, 9 + class_token, 3)
    model = ConvShareViT(config)
    x = torch.randn(2, 2, 12, 12)
    y = model(x)
    assert y.shape == (2, 5)
    # A number that softmax cannot see (a shift of all scores of a row) has no gradient but rounding; all others have.
    y.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1 and "cls" not in name}
    used = {name for name, p in weights.items() if p.grad is not None and p.grad.abs().max() > 1e-9}
    assert used == set(weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_shared_convolutions_and_norms_hold_weights(variant: str) -> None:
    with torch.device("meta"):
        model = convsharevit(variant)
    kinds = {type(module) for module in model.modules() if next(module.parameters(recurse=False), None) is not None}
    assert kinds <= {SharedConv2d, SharedConvTranspose2d, nn.LayerNorm, ConvShareViT}
    paddings = {m.padding for block in model.blocks for m in block.modules() if isinstance(m, SharedConv2d)}
    assert paddings == {"same" if variant == "v3" else "valid"}


def test_kernels_of_a_block() -> None:
    """The sheet's table: 4 D + 2 r D kernels in v1; 3 h, h, and 2 r in the others."""
    with torch.device("meta"):
        blocks = {v: convsharevit(v).blocks[0] for v in VARIANTS}
    counts = {v: {name: tuple(m.weight.shape) for name, m in _shared(block)} for v, block in blocks.items()}
    assert counts["v1"] == {
        "attn.qkv": (192, 1, 8, 8),
        "attn.proj": (64, 1, 8, 8),
        "mlp.fc1": (128, 1, 8, 8),
        "mlp.fc2": (64, 2, 8, 8),
    }
    assert counts["v2"] == {
        "attn.qkv": (24, 1, 9, 9),
        "attn.proj": (8, 1, 9, 9),
        "mlp.fc1": (4, 1, 9, 9),
        "mlp.fc2": (4, 1, 9, 9),
    }
    assert counts["v3"] == {
        "attn.qkv": (24, 1, 3, 3),
        "attn.proj": (1, 8, 3, 3),
        "mlp.fc1": (4, 1, 3, 3),
        "mlp.fc2": (1, 4, 3, 3),
    }


def _shared(block: nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in block.named_modules() if isinstance(m, SharedConv2d | SharedConvTranspose2d)]


@pytest.mark.parametrize("build", [vit_digits, *(lambda v=v: convsharevit_digits(v) for v in VARIANTS)])
@torch.no_grad()
def test_attention_maps_are_distributions_over_tokens(build: Callable[[], ConvShareViT | DenseViT]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    maps = model.attention_maps(torch.randn(2, 1, 32, 32))
    assert [tuple(a.shape) for a in maps] == [(2, 4, 64, 64)] * 4
    for a in maps:
        assert (a >= 0).all()
        torch.testing.assert_close(a.sum(-1), torch.ones(2, 4, 64))


@torch.no_grad()
def test_attention_of_a_token_does_not_depend_on_where_it_is_but_for_its_position() -> None:
    """Without positions, an image whose patches change places has its tokens change places: kernels are shared."""
    torch.manual_seed(0)
    model = convsharevit_digits("v2").eval()
    model.pos_embed.zero_()
    patches = torch.randn(1, 1, 8, 4, 8, 4)
    moved = patches.flip(2)
    first, second = (model.attention_maps(p.reshape(1, 1, 32, 32))[-1] for p in (patches, moved))
    order = torch.arange(64).reshape(8, 8).flip(0).flatten()
    torch.testing.assert_close(second, first[:, :, order][:, :, :, order], rtol=1e-4, atol=1e-5)


def test_patches_are_in_rows() -> None:
    image = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    patches = patchify(image, 2)
    assert patches.shape == (2, 6, 3, 2, 2)
    assert torch.equal(patches[1, 4, 2], image[1, 2, 2:4, 2:4])  # second row, second column


def test_the_embedding_is_one_full_convolution_of_every_patch() -> None:
    torch.manual_seed(0)
    model = convsharevit_digits("v1").eval()
    with torch.no_grad():
        model.pos_embed.zero_()
        x = torch.zeros(1, 1, 32, 32)
        x[0, 0, 4, 8] = 1.0  # first pixel of the patch in the second row and the third column
        tokens = model._embed(x)
    kernel = model.patch_embed.proj.weight[0, 0]
    assert torch.equal(tokens[0, 10, :5, :5], kernel)
    assert tokens.count_nonzero() == 25


# --- v1 is a ViT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        VIT,
        replace(VIT, class_token=True),
        replace(VIT, qkv_bias=False, ratio=3),
        DIGITS["v1"],
        replace(DIGITS["v1"], class_token=True, classifier="valid"),
    ],
)
@torch.no_grad()
def test_v1_is_the_dense_vit_and_back(config: ConvShareViTConfig) -> None:
    torch.manual_seed(0)
    dense = DenseViT(config)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.1)
    v1 = to_v1(dense)
    x = torch.randn(3, config.in_channels, config.image, config.image)
    assert apart(v1(x), dense(x)) <= 1e-5
    for a, b in zip(v1.attention_maps(x), dense.attention_maps(x), strict=True):
        assert apart(a, b) <= 1e-5
    again = to_dense(v1)
    assert list(again.state_dict()) == list(dense.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), dense.state_dict().values(), strict=True))
    assert not v1.training
    assert dense.training  # as it was


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mlp_ratio": 2.0, "qkv_bias": False},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"dynamic_img_size": True, "drop_rate": 0.1, "drop_path_rate": 0.1},
        {"in_chans": 1, "patch_size": 4, "embed_dim": 36, "num_heads": 3},
    ],
)
@torch.no_grad()
def test_a_vit_of_timm_and_back(options: dict[str, Any]) -> None:
    vit = vision_transformer(**options)
    v1 = to_v1(vit)
    x = torch.randn(2, v1.config.in_channels, 32, 32)
    assert apart(v1(x), vit(x)) <= 1e-5
    dense = to_dense(v1)
    assert apart(dense(x), vit(x)) <= 1e-5
    state = vit.state_dict()
    assert {name: value.shape for name, value in dense.state_dict().items()} == {n: v.shape for n, v in state.items()}
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"embed_dim": 48}, "48"),
        ({"mlp_ratio": 2.5}, "fc1"),
        ({"init_values": 0.1}, "ls1"),
        ({"qk_norm": True}, "q_norm"),
        ({"scale_attn_norm": True}, "attn.norm"),
        ({"reg_tokens": 2}, "reg_token"),
        ({"pre_norm": True}, "norm_pre"),
        ({"no_embed_class": True}, "pos_embed"),
        ({"pos_embed": "none"}, "pos_embed"),
        ({"global_pool": "avg"}, "global_pool"),
        ({"global_pool": "map", "class_token": False}, "global_pool"),
        ({"class_token": False, "global_pool": "avg"}, "fc_norm"),
        ({"num_classes": 0}, "out_features"),
        ({"img_size": (32, 16)}, "patch_embed"),
        ({"act_layer": nn.SiLU}, "mlp.act"),
        ({"act_layer": lambda: nn.GELU("tanh")}, "mlp.act"),
    ],
)
def test_what_v1_cannot_express_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        to_v1(vision_transformer(**options))
    assert said in str(caught.value)


def test_a_vit_that_computes_otherwise_than_it_looks_is_refused() -> None:
    vit = vision_transformer()
    vit.blocks[1].attn.scale, vit.blocks[1].attn.fused_attn = 1.0, False  # the fused form reads no scale
    with pytest.raises(UsageError, match="cannot become") as caught:
        to_v1(vit)
    assert "relative L2" in str(caught.value)


def test_other_models_and_dtypes_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot become") as caught:
        to_v1(nn.Linear(3, 3))
    assert "patch_embed" in str(caught.value)
    with pytest.raises(UsageError, match="cannot become") as half:
        to_v1(DenseViT(VIT).half())
    assert "float16" in str(half.value)
    with pytest.raises(UsageError, match="variant"):
        to_dense(convsharevit_digits("v2"))


def test_float64_stays_float64() -> None:
    dense = DenseViT(VIT).double().eval()
    with torch.no_grad():
        x = torch.randn(1, 3, 16, 16).double()
        torch.testing.assert_close(to_v1(dense)(x), dense(x), rtol=1e-12, atol=1e-12)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "change", "said"),
    [
        ("v1", {"patch": 5}, "do not tile"),
        ("v1", {"kernel": 7}, "use 8, or v2"),
        ("v1", {"heads": 3}, "64 kernels"),
        ("v2", {"kernel": 8}, "make it smaller"),
        ("v3", {"kernel": 4}, "use 5"),
        ("v2", {"num_classes": 65}, "9 x 9"),
        ("v1", {"map_side": 9}, "makes 8"),
        ("v1", {"embedding": "valid"}, "map_side"),
        ("v1", {"embedding": "valid", "map_side": 8}, "use 4"),
        ("v1", {"depth": 0}, "depth must be at least 1"),
        ("v1", {"variant": "v4"}, "known are v1, v2, v3"),
        ("v1", {"classifier": "maps"}, "'map'"),
    ],
)
def test_bad_configurations_are_refused(variant: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        replace(DIGITS[variant], **change)
    assert said in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (1, 3, 32, 32), (1, 32, 32)])
def test_other_images_are_refused(shape: tuple[int, ...]) -> None:
    for model in (convsharevit_digits("v3"), vit_digits()):
        with pytest.raises(UsageError, match="one size") as caught:
            model(torch.zeros(shape))
        assert str(shape) in str(caught.value)
        assert "(B, 1, 32, 32)" in str(caught.value)


@pytest.mark.parametrize(("name", "near"), [("V2", "'v2'"), ("convsharevit-v3", "'v3'"), ("x", "choose one")])
def test_unknown_variant_names_the_nearest(name: str, near: str) -> None:
    for build in (convsharevit, convsharevit_digits):
        with pytest.raises(UsageError) as caught:
            build(name)
        assert near in (caught.value.fix or "")


def test_a_dense_vit_has_the_sizes_of_v1_alone() -> None:
    with pytest.raises(UsageError, match="variant"):
        DenseViT(DIGITS["v2"])


# --- initialisation and exports -----------------------------------------------------------------------------------


def test_initialisation_is_seeded_and_the_same_rule_in_all() -> None:
    torch.manual_seed(3)
    first = convsharevit("v2").state_dict()
    torch.manual_seed(3)
    second = convsharevit("v2").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for model in (vit_digits(), convsharevit_digits("v1")):
        weight = model.blocks[0].mlp.fc2.weight
        assert weight.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.05)
        assert not model.blocks[0].attn.qkv.bias.any()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_torch_export_gives_the_same_numbers(variant: str) -> None:
    torch.manual_seed(0)
    model = convsharevit_digits(variant).eval()
    x = torch.randn(2, 1, 32, 32)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    ranks = {
        value.ndim for node in program.graph.nodes for value in [node.meta.get("val")] if isinstance(value, Tensor)
    }
    assert max(ranks) <= 5  # Core ML takes no more


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_batch_may_vary(variant: str) -> None:
    torch.manual_seed(0)
    model = convsharevit_digits(variant).eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (torch.randn(2, 1, 32, 32),), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(5, 1, 32, 32)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("variant", "fused"), [("v1", True), ("v2", False)])
def test_onnx_export_gives_the_same_numbers(variant: str, fused: bool) -> None:
    torch.manual_seed(0)
    model = ConvShareViT(replace(DIGITS[variant], depth=1)).eval()
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        expected = model(x).numpy()
    program = torch.onnx.export(reparameterize(model, x).model if fused else model, (x,), dynamo=True, verbose=False)
    assert program is not None
    proto = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_the_sizes_are_those_of_the_table() -> None:
    assert {v: (c.side, c.kernel, c.heads, c.ratio, c.tokens) for v, c in SIZES.items()} == {
        "v1": (8, 8, 4, 2, 64),
        "v2": (16, 9, 8, 4, 64),
        "v3": (16, 3, 8, 4, 64),
    }
