"""What a classifier minimises: one module from images and labels to the loss.

Letters in shapes: B batch, H W height and width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.classifier import Classifier
from backbones.layers import Normalise


class ClassificationStep(nn.Module):
    """Images and labels to the loss: cross entropy with smoothed labels (Szegedy et al. 2016, arXiv 1512.00567, section 7).

    Args:
        model: the classifier.
        normalise: what is done to the images first.
        label_smoothing: share of the target that is spread evenly over all classes.
    """

    def __init__(self, model: Classifier, normalise: Normalise, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.normalise = normalise
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Uint8 [B, 3, H, W] and int64 [B] -> {"loss": float32 []}."""
        logits = self.model(self.normalise(images))
        return {"loss": F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)}
