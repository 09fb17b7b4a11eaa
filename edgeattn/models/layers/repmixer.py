"""RepMixer: token mixing by a depthwise convolution that, at deploy, has neither branches nor a skip connection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeattn.models.layers.conv import MultiBranchConv2d


class RepMixer(nn.Module):
    """x + ls * (mixer(x) - norm(x)), (B, C, H, W) -> same; FastViT, arXiv 2303.14189, section 3.2.

    In eval mode all of it is linear in x and depthwise, hence equal to one depthwise convolution with bias;
    ``edgeattn.reparam.residual`` computes it. This is an own implementation of the formula; state-dict keys are not
    FastViT's.

    Args:
        channels: C.
        kernel: side of the depthwise kernel, odd.
        layer_scale: initial value of ``scale``, a factor for each channel.
    """

    def __init__(self, channels: int, kernel: int = 3, layer_scale: float = 1e-5) -> None:
        super().__init__()
        self.mixer = MultiBranchConv2d(channels, channels, [(kernel, channels), (1, channels)], identity=True)
        self.norm = nn.BatchNorm2d(channels)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        out: Tensor = x + self.scale * (self.mixer(x) - self.norm(x))
        return out
