"""A small feature extractor for 32 x 32 shape images: what Inception is for photographs.

It is trained to read everything that varies in a scene, not the class alone: the features must notice a generator
that has lost colours, sizes or places as well as one that draws the wrong shape.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .errors import AGDError
from .shapes import IMAGE_SIZE, SHAPES
from .storage import read_tensors, sha256

AnyModel = TypeVar("AnyModel", bound=ModelMixin)


class ExtractorOutput(NamedTuple):
    """What :class:`ShapesExtractor` says of a batch of B images."""

    features: Tensor
    """(B, feature_dim): the features that the Frechet distance, precision and recall are computed on."""
    logits: Tensor
    """(B, num_classes): class scores."""
    attributes: Tensor
    """(B, 9): shape colour (RGB in [-1, 1]), mean background colour (same), x, y and radius (shares of the side)."""


def conv_stages(width: int) -> nn.ModuleList:
    """The convolutions of a small image reader: (B, 3, 32, 32) -> (B, 4 * width, 4, 4) in six stages."""
    channels = [3, width, width, 2 * width, 2 * width, 4 * width, 4 * width]
    strides = [1, 2, 1, 2, 1, 2]
    return nn.ModuleList(
        nn.Sequential(
            nn.Conv2d(channels[i], channels[i + 1], 3, stride=strides[i], padding=1, bias=False),
            nn.GroupNorm(8, channels[i + 1]),
            nn.SiLU(),
        )
        for i in range(len(strides))
    )


def checked_pixels(images: Tensor) -> Tensor:
    """Images (B, 3, 32, 32), float in [-1, 1] or uint8 in 0..255, as floats in [-1, 1].

    Raises:
        ValueError: if the images have another shape.
    """
    if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"got images of shape {tuple(images.shape)}, expected (batch, 3, {IMAGE_SIZE}, {IMAGE_SIZE}): "
            "this extractor knows this library's procedural images alone"
        )
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


_WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_local(kind: type[AnyModel], folder: str | Path, device: str | torch.device = "cpu") -> AnyModel:
    """A model that was saved to a folder, in eval mode; from the hub, or from pickled weights, nothing is ever loaded.

    Raises:
        ValueError: if the folder is not there, or holds no safetensors of such a model.
        AGDError: if its weights are damaged, or a pickle under another name, which diffusers would try to open.
    """
    folder = Path(folder)
    missing = [name for name in ("config.json", _WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"got the folder {str(folder)!r}, which has no {' and no '.join(missing)}: expected one that a "
            f"{kind.__name__} was saved to"
        )
    read_tensors(folder / _WEIGHTS, AGDError, f"weights of the {kind.__name__}")
    model: AnyModel = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return model.eval().to(device)


def weights_hash(folder: str | Path) -> str:
    """Eight digits that tell the weights of a model in a folder from others'."""
    return sha256(Path(folder) / _WEIGHTS)[:8]


class ShapesExtractor(ModelMixin, ConfigMixin):
    """A convolutional network with one feature vector and two heads (class, attributes).

    Args:
        num_classes: number of shape classes.
        feature_dim: length of the feature vector.
        width: channels of the first stage; doubled twice.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_classes: int = len(SHAPES), feature_dim: int = 64, width: int = 32) -> None:
        super().__init__()
        self.stages = conv_stages(width)
        self.to_features = nn.Linear(4 * width * (IMAGE_SIZE // 8) ** 2, feature_dim)
        self.norm = nn.LayerNorm(feature_dim)
        self.class_head = nn.Linear(feature_dim, num_classes)
        self.attribute_head = nn.Linear(feature_dim, 9)

    def forward(self, images: Tensor) -> ExtractorOutput:
        """
        Args:
            images: (B, 3, 32, 32), float in [-1, 1] or uint8 in 0..255.
        """
        x = checked_pixels(images)
        for stage in self.stages:
            x = stage(x)
        features = self.norm(self.to_features(x.flatten(1)))
        hidden = F.silu(features)
        return ExtractorOutput(features, self.class_head(hidden), self.attribute_head(hidden))
