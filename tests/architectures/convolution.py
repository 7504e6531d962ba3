"""Convolutional networks. They have no heads; what lies between two pointwise products of a ConvNeXt block is its FFN."""

from __future__ import annotations

from typing import Any, NamedTuple

from onnxprune.export.signature import BATCH, Input
from tests.architectures.entry import Architecture

IMAGE = 32
PIXELS = Input("pixel_values", "pixels", (BATCH, 3, IMAGE, IMAGE))
_LOGITS = {"logits": {0: BATCH}}
_CONVNEXT = ((1, 16), (2, 24))
"""Blocks and width of each stage."""


def _hf(kind: str, config: str, **settings: Any) -> Any:
    import transformers

    return getattr(transformers, kind)(getattr(transformers, config)(num_labels=5, **settings))


def _resnet(_: str) -> Any:
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [2, 1]}
    return _hf("ResNetForImageClassification", "ResNetConfig", **sizes, layer_type="basic")


def _resnet_bottleneck(_: str) -> Any:
    sizes = {"embedding_size": 8, "hidden_sizes": [32, 48], "depths": [2, 1]}
    return _hf("ResNetForImageClassification", "ResNetConfig", **sizes, layer_type="bottleneck")


def _mobilenet_v1(_: str) -> Any:
    return _hf("MobileNetV1ForImageClassification", "MobileNetV1Config", image_size=IMAGE, depth_multiplier=0.25)


def _mobilenet_v2(_: str) -> Any:
    return _hf("MobileNetV2ForImageClassification", "MobileNetV2Config", image_size=IMAGE, depth_multiplier=0.25)


def _convnext(_: str) -> Any:
    sizes = {"depths": [depth for depth, _ in _CONVNEXT], "hidden_sizes": [width for _, width in _CONVNEXT], "num_stages": len(_CONVNEXT)}
    return _hf("ConvNextForImageClassification", "ConvNextConfig", **sizes, image_size=IMAGE, layer_scale_init_value=0.1)


class Maps(NamedTuple):
    """What the U-Net gives."""

    maps: Any


def _unet(_: str) -> Any:
    import torch
    from torch import nn

    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    class UNet(nn.Module):
        """Two levels; the upper one is read again beside what comes up from the lower one."""

        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Sequential(block(3, 8), block(8, 12))
            self.bottom = nn.Sequential(block(12, 16), block(16, 20))
            self.rise = nn.ConvTranspose2d(20, 12, 2, stride=2)
            self.up = nn.Sequential(block(24, 10), block(10, 8))
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, pixel_values: torch.Tensor) -> Maps:
            fine = self.down(pixel_values)
            coarse = self.rise(self.bottom(nn.functional.max_pool2d(fine, 2)))
            return Maps(self.head(self.up(torch.cat([fine, coarse], 1))))

    return UNet()


_BLOCKS = {"ffn": tuple(4 * width for depth, width in _CONVNEXT for _ in range(depth))}
_ONE = ("eager",)

ENTRIES = (
    Architecture("resnet-basic", "convolution", _resnet, (PIXELS,), _LOGITS, {}, forms=_ONE),
    Architecture("resnet-bottleneck", "convolution", _resnet_bottleneck, (PIXELS,), _LOGITS, {}, forms=_ONE),
    Architecture("mobilenet-v1", "convolution", _mobilenet_v1, (PIXELS,), _LOGITS, {}, forms=_ONE),
    Architecture("mobilenet-v2", "convolution", _mobilenet_v2, (PIXELS,), _LOGITS, {}, forms=_ONE),
    Architecture("convnext", "convolution", _convnext, (PIXELS,), _LOGITS, _BLOCKS, forms=_ONE),
    Architecture("unet", "convolution", _unet, (PIXELS,), {"maps": {0: BATCH}}, {}, forms=_ONE),
)
