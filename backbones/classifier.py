"""An image classifier: backbone, global average pooling, dropout, linear layer.

Letters in shapes: B batch, H W height and width, K classes.
"""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.errors import UserError
from backbones.mobilenetv2 import MobileNetV2, MobileNetV2Config


@dataclass(kw_only=True, slots=True)
class ClassifierConfig:
    """What can be chosen about a classifier."""

    backbone: MobileNetV2Config = field(default_factory=MobileNetV2Config)
    """The network under it."""
    dropout: float = 0.2
    """Share of the pooled features that a training step sets to zero."""

    def validate(self) -> None:
        """Raise UserError, with the value and what is allowed, where a value makes no sense."""
        self.backbone.validate()
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; it can be 0 up to, but not including, 1")


class Classifier(nn.Module):
    """MobileNetV2 with a linear layer over its pooled last map (arXiv 1801.04381, table 2); any input size.

    The linear layer begins at a normal distribution of standard deviation 0.01 (Krizhevsky et al. 2012, section 5).

    Args:
        config: the backbone and the dropout.
        num_classes: K. It comes from the data and not from the config.

    Raises:
        UserError: for a number of classes below 1, or a config that makes no sense.
    """

    def __init__(self, config: ClassifierConfig, num_classes: int) -> None:
        super().__init__()
        config.validate()
        if num_classes < 1:
            raise UserError(f"num_classes is {num_classes}; at least 1 is needed")
        self.num_classes = num_classes
        self.backbone = MobileNetV2(config.backbone, ("last",))
        self.dropout = nn.Dropout(config.dropout)
        self.linear = nn.Linear(self.backbone.feature_specs["last"].channels, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def parts(self) -> dict[str, nn.Module]:
        """The parts in the order of the computation."""
        own = {name: part for name, part in self.named_children() if name != "backbone"}
        return {**dict(self.backbone.named_children()), **own}

    def forward(self, images: Tensor) -> Tensor:
        """Float images [B, 3, H, W], already normalised -> class logits [B, K]."""
        pooled = F.adaptive_avg_pool2d(self.backbone(images)["last"], 1).flatten(1)
        return self.linear(self.dropout(pooled))
