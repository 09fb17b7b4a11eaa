"""The FMViT reconstruction: shapes, errors, the published table, exports."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from edgeattn.core.errors import UsageError
from edgeattn.models.cost import count
from edgeattn.models.fmvit import CFB, FMB, VARIANTS, FMViTConfig, _hidden_width, fmvit, fmvit_digits
from edgeattn.models.init import randomize
from edgeattn.reparam import reparameterize

# Variant: parameters and MACs of the deploy form at 224 px, then the paper's table (millions, 1e9; arXiv 2311.05707).
TABLE = {
    "t": (2_012_904, 263_373_168, 2.0, 0.3),
    "s": (6_398_360, 831_696_256, 6.4, 0.8),
    "m": (12_792_384, 1_973_744_272, 12.8, 2.0),
    "b": (24_320_728, 4_181_853_392, 24.3, 4.2),
    "l": (35_299_000, 7_087_436_656, 35.3, 7.1),
}


@pytest.mark.parametrize("variant", TABLE)
def test_deploy_form_agrees_with_the_published_table(variant: str) -> None:
    torch.manual_seed(0)
    deploy = reparameterize(fmvit(variant).eval(), torch.randn(1, 3, 32, 32)).model
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deploy.modules())
    cost = count(deploy.to("meta"), torch.empty(1, 3, 224, 224, device="meta"))
    parameters, macs, published_parameters, published_macs = TABLE[variant]
    assert (cost.parameters, cost.macs) == (parameters, macs)
    assert round(cost.macs / 1e9, 1) == published_macs
    assert abs(cost.parameters / 1e6 - published_parameters) <= 0.04  # 0.01 away from where the rounding would change


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (160, 32), (224, 224)])
def test_logits_and_features_at_any_multiple_of_32(size: tuple[int, int]) -> None:
    h, w = size
    x = torch.empty(2, 3, h, w, device="meta")
    with torch.device("meta"):
        classifier, backbone = fmvit("t", num_classes=7).eval(), fmvit("t", features=True).eval()
    assert classifier(x).shape == (2, 7)
    maps = backbone(x)
    assert isinstance(maps, tuple)
    assert [tuple(m.shape) for m in maps] == [
        (2, c, h // s, w // s) for c, s in zip((16, 64, 96, 320), (4, 8, 16, 32), strict=True)
    ]
    assert backbone.out_channels == (16, 64, 96, 320)


def test_features_are_those_under_the_head_and_no_parameter_is_unused() -> None:
    torch.manual_seed(0)
    classifier, backbone = fmvit("t").eval(), fmvit("t", features=True).eval()
    missing = backbone.load_state_dict(classifier.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(key.startswith("head.") for key in missing.unexpected_keys)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(classifier.head(backbone(x)[-1]), classifier(x))
    sum(m.sum() for m in backbone.train()(torch.randn(2, 3, 64, 64))).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_fmb_where_the_pattern_says() -> None:
    with torch.device("meta"):
        model = fmvit("s")
    kinds = ["".join("F" if isinstance(block, FMB) else "C" for block in stage) for stage in model.stages]
    assert kinds == ["CC", "CF", "CCCCFCCCCF", "CF"]
    assert all(isinstance(block, CFB | FMB) for stage in model.stages for block in stage)
    assert model.stages[1][-1].attention.pool[0].kernel_size == 4
    assert isinstance(model.stages[3][-1].attention.pool, nn.Identity)  # no pooled batch norm without pooling


def test_hidden_width_rule() -> None:
    # round to a multiple of 32, but never below 90 % of the target (Next-ViT)
    assert [_hidden_width(c, 3.0) for c in (16, 32, 80, 112, 96)] == [64, 96, 256, 352, 288]
    assert _hidden_width(47, 1.0) == 64


@pytest.mark.parametrize(
    ("shape", "value", "advice"),
    [
        ((1, 3, 225, 224), "(1, 3, 225, 224)", "nearest sizes: 224 or 256 x 224"),
        ((1, 3, 64, 20), "(1, 3, 64, 20)", "nearest sizes: 64 x 32"),
        ((1, 3, 0, 32), "(1, 3, 0, 32)", "nearest sizes: 32 x 32"),
        ((1, 1, 64, 64), "1 channels", "in_channels=1"),
        ((3, 64, 64), "3 dimensions", "(B, 3, H, W)"),
    ],
)
def test_bad_inputs_are_refused_with_advice(shape: tuple[int, ...], value: str, advice: str) -> None:
    with torch.device("meta"):
        model = fmvit("t").eval()
    with pytest.raises(UsageError) as caught:
        model(torch.empty(shape, device="meta"))
    assert value in str(caught.value)
    assert advice in str(caught.value)


@pytest.mark.parametrize(("name", "near"), [("fmvit-s", "'s'"), ("Large", "'l'"), ("x", "choose one"), ("", "choose")])
def test_unknown_variant_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        fmvit(name)
    assert near in (caught.value.fix or "")
    assert "t, s, m, b, l" in (caught.value.why or "")


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(UsageError, match="num_classes"):
        fmvit("t", num_classes=0)
    with pytest.raises(UsageError, match="in_channels"):
        FMViTConfig((16,) * 4, (64,) * 3, (32,) * 3, (1,) * 4, stem=16, in_channels=-1)
    with pytest.raises(UsageError, match="these widths"):
        FMViTConfig((16, 24, 32, 32), (64,) * 3, (32,) * 3, (1,) * 4, stem=16)
    with pytest.raises(UsageError, match="low_widths"):
        FMViTConfig((16,) * 4, (64,) * 3, (40, 32, 32), (1,) * 4, stem=16)
    with pytest.raises(UsageError, match="fmb_widths - low_widths"):
        FMViTConfig((16,) * 4, (64,) * 3, (64, 32, 32), (1,) * 4, stem=16)


def test_drop_path_rises_to_the_configured_rate_and_acts_only_in_training() -> None:
    torch.manual_seed(0)
    model = fmvit("s")
    rates = [block.drop_path.rate for stage in model.stages for block in stage]
    assert rates[0] == 0.0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(VARIANTS["s"].drop_path)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), model(x), rtol=0, atol=0)


def test_initialisation_is_seeded_and_truncated_normal() -> None:
    torch.manual_seed(3)
    first = fmvit("t").state_dict()
    torch.manual_seed(3)
    second = fmvit("t").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["head.linear.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert not first["head.linear.bias"].any()


@pytest.mark.parametrize("features", [False, True])
def test_torch_export_gives_the_same_numbers(features: bool) -> None:
    torch.manual_seed(0)
    model = fmvit("t", features=features)
    x = torch.randn(1, 3, 64, 96)
    randomize(model, x, 0)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_onnx_export_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    model = fmvit_digits()
    x = torch.randn(2, 1, 32, 32)
    randomize(model, x, 0)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(x).numpy(), rtol=1e-3, atol=1e-4)
