"""LiteDet: MobileNetV2, a light path aggregation network and a separable head over anchor points.

Letters in shapes: B batch, A anchors, C columns of class logits, D numbers of a box code, H W height and width of a map.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from backbones.errors import UserError
from backbones.features import FeatureSpec
from backbones.layers import ConvNormAct
from backbones.mobilenetv2 import MobileNetV2, MobileNetV2Config
from detection.models.anchors import stride_squares
from detection.models.box_coders import DistributionBoxCoder
from detection.models.detector import Detector, DetectorConfig, Triple
from detection.models.heads import names_of_parameters, per_anchor
from detection.models.necks import DepthwiseSeparable, Layer, LightPAN
from detection.structures import RawPredictions, ResizeMode

# Field, least and most: a config may come from a file that nobody checked.
_LIMITS = (
    ("neck_width", 1, 4096), ("neck_depth", 1, 16), ("head_depth", 0, 16), ("kernel_size", 1, 31), ("bins", 2, 256),
    ("first_bin", -1, 0),
)  # fmt: skip


@dataclass(kw_only=True, slots=True)
class LiteDetConfig(DetectorConfig):
    fields_of_weights: ClassVar[tuple[str, ...]] = (
        "features", "neck_width", "neck_depth", "head_depth", "kernel_size", "bins", "first_bin", "one_to_one", "score",
        "background_column", "norm_eps",
    )  # fmt: skip

    kind: Literal["litedet"] = "litedet"
    """Which detector this config describes."""
    backbone: MobileNetV2Config = field(default_factory=MobileNetV2Config)
    """The network under the neck. Its parts after the last of the features are left out."""
    input_size: tuple[int, int] = (320, 320)
    """(height, width) of the network's input in pixels, 96 to 4096 each. Need not be square."""
    resize: ResizeMode = "stretch"
    """How an image comes to the input size: sides scaled each for itself, or both alike with a border."""
    features: tuple[str, ...] = ("stage3", "stage5", "stage7")
    """Names of the backbone's maps that the neck sees, from the finest; each stride is twice the one before. The neck adds a
    map of half the last one's size."""
    neck_width: int = 96
    """Channels of all maps in the neck and the head."""
    neck_depth: int = 1
    """Depthwise separable convolutions wherever the neck mixes two maps."""
    head_depth: int = 2
    """Depthwise separable convolutions of the head, on each map, before the two output layers."""
    kernel_size: int = 5
    """Side of the depthwise kernels in the neck and the head; odd."""
    bins: int = 8
    """Distances that each side of a box has a distribution over, one stride apart."""
    first_bin: float = -0.5
    """The first of these distances, in strides. Below 0 a point just outside of an object can describe it, which an object
    smaller than the finest stride needs."""
    one_to_one: bool = False
    """Train a second head beside the first, with one anchor for each object, whose detections need no suppression."""
    predict_with: Literal["one_to_many", "one_to_one"] = "one_to_many"
    """The head that predicts. With one_to_one set postprocess.nms_threshold to 1, which suppresses nothing."""
    score: Literal["sigmoid"] = "sigmoid"
    """How class logits become scores."""
    background_column: bool = False
    """Always False: a class has no rival but itself."""
    norm_eps: float = 0.001
    """Epsilon of the batch norms in the neck and the head."""
    norm_momentum: float = 0.03
    """Momentum of those batch norms."""
    prior: float = 0.01
    """The score that an untrained head gives (RetinaNet, arXiv 1708.02002, section 4.1)."""
    mean: Triple | None = None
    """Mean of the input's channels (R, G, B, of pixel / 255). None: as the weights say, ImageNet's where they say nothing."""
    std: Triple | None = None
    """Standard deviation of the input's channels, in the same way."""

    def validate(self) -> None:
        self.validate_common()
        for name, least, most in _LIMITS:
            if not least <= getattr(self, name) <= most:
                raise UserError(f"model.{name} must be in {least}..{most}, got {getattr(self, name)}")
        if self.score != "sigmoid" or self.background_column:
            raise UserError("LiteDet has sigmoid scores and no background column; leave model.score as it is")
        if self.predict_with == "one_to_one" and not self.one_to_one:
            raise UserError("model.predict_with is one_to_one, and model.one_to_one is False: there is no such head")

    def box_coder(self) -> DistributionBoxCoder:
        return DistributionBoxCoder(self.bins, self.first_bin)


class LiteDetHead(nn.Module):
    """Box codes and class logits for every cell of every map, from features that the two share.

    Args:
        specs: the feature maps, from the finest.
        depth: depthwise separable convolutions before the outputs.
        kernel_size: of the depthwise convolutions.
        code_size: D, numbers of a box code.
        num_columns: C, columns of class logits.
        layer: makes a convolution with its batch norm.
    """

    def __init__(
        self, specs: Sequence[FeatureSpec], depth: int, kernel_size: int, code_size: int, num_columns: int, layer: Layer
    ) -> None:
        super().__init__()
        self.code_size = code_size
        self.num_columns = num_columns
        self.shared = nn.ModuleList(
            nn.Sequential(
                *(
                    DepthwiseSeparable(spec.channels, spec.channels, kernel_size, layer, shortcut=True)
                    for _ in range(depth)
                )
            )
            for spec in specs
        )
        self.box = nn.ModuleList(nn.Conv2d(spec.channels, code_size, 1) for spec in specs)
        self.classes = nn.ModuleList(nn.Conv2d(spec.channels, num_columns, 1) for spec in specs)
        self.merged: nn.ModuleList | None = None

    def class_outputs(self) -> list[nn.Conv2d]:
        """The convolution of each map that makes the class logits."""
        return [layer for layer in self.classes if isinstance(layer, nn.Conv2d)]

    @torch.no_grad()
    def merge_outputs(self) -> None:
        """Let one convolution a map make both outputs, in place: the same numbers with four operators less, for prediction.

        The two parameters of each map become one, so weights are loaded before.
        """
        pairs = [(box, classes) for box, classes in zip(self.box, self.classes, strict=True)]
        self.merged = nn.ModuleList(_one_after_the_other(box, classes) for box, classes in pairs)
        self.box, self.classes = nn.ModuleList(), nn.ModuleList()

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps [B, C_k, H_k, W_k] -> box codes [B, A, D], class logits [B, A, C]."""
        found = [shared(x) for shared, x in zip(self.shared, maps, strict=True)]
        if self.merged is not None:
            columns = self.code_size + self.num_columns
            both = torch.cat([per_anchor(m(x), columns) for m, x in zip(self.merged, found, strict=True)], 1)
            codes, class_logits = both.split((self.code_size, self.num_columns), -1)
            return codes, class_logits
        boxes = [per_anchor(layer(x), self.code_size) for layer, x in zip(self.box, found, strict=True)]
        classes = [per_anchor(layer(x), self.num_columns) for layer, x in zip(self.classes, found, strict=True)]
        return torch.cat(boxes, 1), torch.cat(classes, 1)


def _one_after_the_other(first: nn.Module, second: nn.Module) -> nn.Conv2d:
    """A 1x1 convolution whose output channels are those of one and then those of another on the same input."""
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    assert first.bias is not None
    assert second.bias is not None
    both = nn.Conv2d(first.in_channels, first.out_channels + second.out_channels, 1, device=first.weight.device)
    both.weight.copy_(torch.cat((first.weight, second.weight)))
    assert both.bias is not None
    both.bias.copy_(torch.cat((first.bias, second.bias)))
    return both


class LiteDet(Detector):
    """A one-stage detector over anchor points: the assembly of GFL (arXiv 2006.04388) and TOOD (arXiv 2108.07755) in the size
    of NanoDet-Plus and PicoDet (arXiv 2111.00902), on MobileNetV2.

    It computes convolutions, sums, ReLU6, nearest upsampling and concatenations, nothing else.

    Args:
        config: see ``LiteDetConfig``.
        num_classes: K, at least 1.

    Raises:
        UserError: a config value makes no sense, or the backbone has no map of a given name.
    """

    config: LiteDetConfig

    def __init__(self, config: LiteDetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.backbone = MobileNetV2(config.backbone, config.features, complete=False)
        layer = partial(ConvNormAct, norm_eps=config.norm_eps, norm_momentum=config.norm_momentum)
        specs = [self.backbone.feature_specs[name] for name in config.features]
        width, kernel_size = config.neck_width, config.kernel_size
        self.neck = LightPAN(specs, width, config.neck_depth, kernel_size, config.backbone.padding, layer)
        specs = self.neck.feature_specs
        code_size = config.box_coder().code_size
        heads = [
            LiteDetHead(specs, config.head_depth, kernel_size, code_size, num_classes, layer)
            for _ in range(1 + config.one_to_one)
        ]
        self.head = heads[0]
        self.one_to_one_head = heads[1] if config.one_to_one else None
        self.register_buffer("anchors", stride_squares([s.stride for s in specs], config.input_size), persistent=False)
        for part in (self.neck, *heads):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(
                        module.weight
                    )  # on fan-in: what goes into a depthwise kernel is its own cells
        prior = -math.log((1 - config.prior) / config.prior)
        for head, (outputs, bias) in itertools.product(heads, (("box", 0.0), ("classes", prior))):
            for output in getattr(head, outputs):
                assert isinstance(output, nn.Conv2d)
                assert output.bias is not None
                nn.init.normal_(output.weight, std=0.01)
                nn.init.constant_(output.bias, bias)

    def _heads(self) -> list[LiteDetHead]:
        return [self.head] if self.one_to_one_head is None else [self.head, self.one_to_one_head]

    def codes_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.neck(list(self.backbone(images).values()))
        head = self.one_to_one_head if self.config.predict_with == "one_to_one" else self.head
        assert head is not None
        codes, class_logits = head(maps)
        return codes, class_logits

    def forward(self, images: Tensor) -> RawPredictions:
        """See ``Detector``. In training, with two heads, the anchors come twice: those of the second head after the first's.

        The second head learns from the maps as they are and does not change them (YOLOv10, arXiv 2405.14458, as published).
        """
        if self.one_to_one_head is None or not self.training:
            return super().forward(images)
        maps = self.neck(list(self.backbone(self.network_input(images)).values()))
        codes, class_logits = self.head(maps)
        more_codes, more_logits = self.one_to_one_head([x.detach() for x in maps])
        return RawPredictions(
            torch.cat((codes, more_codes), 1), torch.cat((class_logits, more_logits), 1), self.anchors.repeat(2, 1)
        )

    def class_tensors(self) -> frozenset[str]:
        return names_of_parameters(self, [layer for head in self._heads() for layer in head.class_outputs()])

    def parts(self) -> Mapping[str, nn.Module]:
        parts = {**dict(self.backbone.named_children()), "neck": self.neck, "head": self.head}
        return parts if self.one_to_one_head is None else {**parts, "one-to-one head": self.one_to_one_head}
