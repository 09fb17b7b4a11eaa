"""Models of timm, where it can be imported: as they come, with their own fuse methods and batch norm subclasses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from edgeattn.models.init import randomize
from edgeattn.reparam import reparameterize


@pytest.fixture(scope="module")
def timm() -> Any:
    # torchvision's compiled operators do not load beside a CPU build of torch; timm needs only their names.
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        return pytest.importorskip("timm")
    except (RuntimeError, OSError) as error:
        pytest.skip(f"timm cannot be imported: {error}")


@pytest.mark.parametrize(
    ("name", "size", "rules", "left"),
    [
        ("repvit_m0_9", 96, {"guest"}, 0),
        ("fastvit_t8", 64, {"guest", "conv_bn"}, 0),
        ("mobileone_s1", 64, {"guest"}, 0),
        ("repvgg_a0", 64, {"guest"}, 0),
        ("levit_128s", 224, {"guest"}, 0),
        ("resnet18", 64, {"conv_bn"}, 0),
        ("mobilenetv3_small_050", 64, {"conv_bn"}, 0),
        ("efficientformerv2_s0", 224, {"conv_bn", "pre_bn", "softmax_scale"}, 0),
        ("mobilenetv4_hybrid_medium", 128, {"conv_bn", "pre_bn"}, 4),  # four batch norms before a padded convolution
    ],
)
def test_timm(timm: Any, name: str, size: int, rules: set[str], left: int) -> None:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name)
    x = torch.randn(1, 3, size, size)
    randomize(model, x, 0)
    proof = reparameterize(model.eval(), x).proof
    assert proof.holds
    assert {block.rule for block in proof.fused} == rules
    assert proof.after.batch_norms == left


def test_vit_that_leaves_its_scale_to_the_fused_kernel_is_rolled_back(timm: Any) -> None:
    model = timm.create_model("vit_tiny_patch16_224").eval()
    proof = reparameterize(model, torch.randn(1, 3, 224, 224)).proof
    assert proof.fused == []
    assert len(proof.not_fused) == 12
