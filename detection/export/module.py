"""What a file computes: the network to its raw heads, and the tail that makes detections of them.

Letters in shapes: B batch, A anchors, C columns of class logits, K classes, D numbers of a box code, N detections.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detection.models.detector import Detector
from detection.models.folding import fold_norms
from detection.models.quantized import QuantizedDetector
from detection.postprocess import PostprocessConfig


class RawHeads(nn.Module):
    """A detector as a function of tensors alone, its batch norms folded.

    Args:
        model: it stays as it is.
    """

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = fold_norms(copy.deepcopy(model).cpu().eval()).requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, H, W], RGB -> box codes [B, A, D], class logits [B, A, C]."""
        raw = self.model(images)
        return raw.codes, raw.class_logits


class LearntHeads(nn.Module):
    """A detector that was fine-tuned in eight bits as a function of tensors alone, its ranges constants.

    Args:
        model: it stays as it is.
    """

    def __init__(self, model: QuantizedDetector) -> None:
        super().__init__()
        self.normalise = copy.deepcopy(model.normalise)
        self.network = model.converted()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, H, W], RGB -> box codes [B, A, D], class logits [B, A, C]."""
        codes, class_logits = self.network(self.normalise(images))
        return codes, class_logits


@dataclass(kw_only=True, slots=True)
class Network:
    """What an exporter makes a file of.

    Attributes:
        module: uint8 [B, 3, H, W], RGB -> a float32 tensor for each output; in evaluation mode, on the CPU.
        input_size: (height, width).
        outputs: names of the outputs.
        detector: whose raw heads the outputs are, for the tail behind them; None: there is none.
        learnt: the module rounds to eight bits itself, with ranges that a training has found.
    """

    module: nn.Module
    input_size: tuple[int, int]
    outputs: tuple[str, ...]
    detector: Detector | None = None
    learnt: bool = False

    @property
    def image(self) -> Tensor:
        """uint8 [1, 3, H, W], black: an input to trace with."""
        return torch.zeros(1, 3, *self.input_size, dtype=torch.uint8)


def network_of(model: Detector) -> Network:
    """The network of a detector to its raw heads."""
    outputs = ("codes", "class_logits")
    if isinstance(model, QuantizedDetector):
        module = LearntHeads(model)
        return Network(module=module, input_size=model.config.input_size, outputs=outputs, detector=model, learnt=True)
    return Network(module=RawHeads(model), input_size=model.config.input_size, outputs=outputs, detector=model)


class Scores(nn.Module):
    """Class logits [B, A, C] -> scores of the classes [B, A, K], the background's column left out."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.softmax = model.config.score == "softmax"
        self.first = int(model.config.background_column)

    def forward(self, class_logits: Tensor) -> Tensor:
        scores = class_logits.softmax(-1) if self.softmax else class_logits.sigmoid()
        return scores[..., self.first :]


@torch.library.custom_op("litedet::nms", mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, per_class: int, iou: float, threshold: float) -> Tensor:
    """Non-maximum suppression as ONNX defines it, so that the exporter can put ONNX's operator in its place.

    Args:
        boxes: [B, A, 4], xyxy.
        scores: [B, K, A].
        per_class: boxes of a class and image at most.
        iou: of two boxes that overlap more the one with the lower score goes.
        threshold: scores at or below it do not count.

    Returns:
        int64 [N, 3]: image, class, anchor of each box that stays.
    """
    from torchvision.ops import nms

    rows = [boxes.new_empty(0, 3, dtype=torch.int64)]
    for image in range(scores.shape[0]):
        for label in range(scores.shape[1]):
            anchors = (scores[image, label] > threshold).nonzero().squeeze(1)
            anchors = anchors[nms(boxes[image, anchors], scores[image, label, anchors], iou)[:per_class]]
            places = (torch.full_like(anchors, image), torch.full_like(anchors, label), anchors)
            rows.append(torch.stack(places, -1))
    return torch.cat(rows)


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, per_class: int, iou: float, threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), 3, dtype=torch.int64)


class Tail(nn.Module):
    """Raw heads -> finished detections: scores, boxes, suppression class by class, the best of all classes.

    Args:
        model: gives the coder, the anchors and the kind of score.
        postprocess: thresholds; ``candidates`` plays no part.
    """

    anchors: Tensor

    def __init__(self, model: Detector, postprocess: PostprocessConfig) -> None:
        super().__init__()
        self.coder = model.config.box_coder()
        self.scores = Scores(model)
        self.height, self.width = model.config.input_size
        self.config = postprocess
        self.register_buffer("anchors", model.anchors.detach().cpu().clone())

    def forward(self, codes: Tensor, class_logits: Tensor) -> Tensor:
        """Codes [B, A, D], class logits [B, A, C] -> [B, N, 6]: x1, y1, x2, y2 in pixels of the input, score, label.

        N is ``max_detections``, best first; rows without a detection are zeros.
        """
        scores = self.scores(class_logits).transpose(1, 2)  # [B, K, A]
        boxes = self.coder.decode(codes, self.anchors)
        B, K, A = scores.shape
        config = self.config
        count = min(config.max_detections, K * A)
        kept = torch.ops.litedet.nms(
            boxes, scores, min(count, A), config.nms_threshold, config.score_threshold
        )  # [N, 3]
        places = (kept[:, 0] * K + kept[:, 1]) * A + kept[:, 2]
        best = torch.zeros_like(scores).reshape(-1).scatter(0, places, scores.reshape(-1)[places])
        best, order = best.view(B, K * A).topk(count)
        labels, rows = order // A, order % A
        found = boxes.gather(1, rows[..., None].expand(-1, -1, 4))
        limit = torch.tensor([self.width, self.height, self.width, self.height], dtype=found.dtype)
        found = torch.minimum(found.clamp(min=0), limit)
        # Runtimes order equal scores as they like: empty rows are zeros, so that their order does not show.
        used = (best > 0).to(found.dtype)
        return torch.cat((found * used[..., None], best[..., None], (labels * used)[..., None]), -1)
