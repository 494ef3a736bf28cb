"""SSDLite checkpoints of mmdetection (``ssdlite_mobilenetv2-scratch_8xb24-600e_coco``), read into our network.

The names and the numbers are those of mmdetection's configuration of that detector (configs/ssd) and of the modules it is
made of (SSDNeck, SSDHead, SSDAnchorGenerator, 2.14 and later). No published file could be tried here: the table is held
by a state dict with mmdetection's names and shapes.

Letters in shapes: K classes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.errors import UserError
from backbones.layers import IMAGENET_MEAN, IMAGENET_STD
from backbones.mobilenetv2 import MobileNetV2, MobileNetV2Config
from backbones.state import check_state, load_state
from backbones.weights.layouts import PUBLIC_WIDTHS
from detection.models.anchors import AnchorConfig
from detection.models.ssdlite import SSDLite, SSDLiteConfig
from detection.postprocess import PostprocessConfig
from detection.weights.coco_classes import COCO_CLASSES
from detection.weights.info import DetectorInfo

_SIDE = 320
_MIN_SIZES = (48, 100, 150, 202, 253, 304)
_LAST_MAX_SIZE = 320
_STRIDES = (16, 32, 64, 107, 160, 320)
# A cell's anchors there: the square of the smaller size, the square between two sizes, then ratios 2, 1/2, 3, 1/3 (width
# over height); here the square between comes last.
_ANCHOR_ORDER = (0, 2, 3, 4, 5, 1)


def is_mmdetection(state: Mapping[str, Any]) -> bool:
    """Whether a state dict has the names of an mmdetection single-stage detector on its MobileNetV2."""
    return "backbone.conv1.conv.weight" in state and any(key.startswith("bbox_head.") for key in state)


def read_mmdetection(
    path: Path, state: Mapping[str, Tensor], class_names: tuple[str, ...] = ()
) -> tuple[SSDLite, DetectorInfo, list[str]]:
    """The detector of an mmdetection checkpoint.

    Args:
        path: of the file, for messages.
        state: its ``state_dict``.
        class_names: names of the classes without the background; not needed for the 80 of COCO.

    Returns:
        The detector in evaluation mode, what travels with it, and remarks on what was done.

    Raises:
        UserError: another detector; every tensor that differs is named.
    """
    outputs = state.get("bbox_head.cls_convs.0.1.bias")
    if outputs is None or outputs.dim() != 1 or len(outputs) % len(_ANCHOR_ORDER):
        expected = f"bbox_head.cls_convs.0.1.bias with a multiple of {len(_ANCHOR_ORDER)} numbers"
        found = "not there" if outputs is None else f"shape {list(outputs.shape)}"
        raise UserError(
            f"{path} is no SSDLite of mmdetection 2.14 or later ({expected}: {found}); older files go through its own "
            "tools/model_converters/upgrade_ssd_version.py first"
        )
    num_columns = len(outputs) // len(_ANCHOR_ORDER)
    names, ids, remarks = _classes(path, num_columns - 1, class_names)
    config = _config(_width(path, state))
    with torch.device("meta"):  # a file says how large its network is: it has to hold it, too, before that is built
        model = SSDLite(config, num_columns - 1)
    own, classes = model.state_dict(), model.class_tensors()
    table = mmdetection_keys(model)
    loaded = {ours: state[theirs] for ours, theirs in table.items() if theirs in state}
    loaded |= {key: torch.zeros((), dtype=torch.int64) for key in own
               if key.endswith("num_batches_tracked") and key not in loaded}  # fmt: skip
    loaded |= {theirs: tensor for theirs, tensor in state.items() if theirs not in set(table.values())}
    for key, tensor in loaded.items():
        if key in classes | model.box_tensors() and tensor.shape == own[key].shape:
            loaded[key] = _reorder(tensor, num_columns if key in classes else 4, key in classes)
    check_state(model, loaded, path)
    model = SSDLite(config, num_columns - 1)
    load_state(model, loaded, path)
    info = DetectorInfo(
        model=model.config,
        postprocess=PostprocessConfig(score_threshold=0.02, nms_threshold=0.45, max_detections=200),
        class_names=names,
        category_ids=ids,
        source=f"{path.name} (mmdetection)",
    )
    return model.eval(), info, remarks


def mmdetection_keys(model: SSDLite) -> dict[str, str]:
    """Key table ours -> mmdetection's for every tensor of a detector."""
    layers = {"backbone.stem": "backbone.conv1", "backbone.last": "backbone.conv2"}
    for stage, (expansion, _, num_blocks, _) in enumerate(model.config.backbone.settings, start=1):
        for block in range(num_blocks):
            parts = {"expand": "expand_conv", "depthwise": "depthwise_conv", "project": "linear_conv"}
            for ours, theirs in parts.items():
                if ours != "expand" or expansion > 1:
                    layers[f"backbone.stage{stage}.{block}.{ours}"] = f"backbone.layer{stage}.{block}.{theirs}"
    for index in range(len(model.extras.blocks)):
        theirs = f"neck.extra_layers.{index}"
        layers[f"extras.blocks.{index}.0"] = f"{theirs}.0"
        layers[f"extras.blocks.{index}.1"] = f"{theirs}.1.depthwise_conv"
        layers[f"extras.blocks.{index}.2"] = f"{theirs}.1.pointwise_conv"
    table = {}
    for index in range(len(model.head.box)):
        for ours, theirs in ((f"head.box.{index}", "reg_convs"), (f"head.classes.{index}", "cls_convs")):
            layers[f"{ours}.0"] = f"bbox_head.{theirs}.{index}.0"
            for name in ("weight", "bias"):
                table[f"{ours}.1.{name}"] = f"bbox_head.{theirs}.{index}.1.{name}"
    for key in model.state_dict():
        layer, _, name = key.rpartition(".")
        scope, _, part = layer.rpartition(".")
        if part in ("conv", "norm"):
            table[key] = f"{layers[scope]}.{'conv' if part == 'conv' else 'bn'}.{name}"
    return table


def _config(width: float) -> SSDLiteConfig:
    """mmdetection's configuration in our words."""
    return SSDLiteConfig(
        backbone=MobileNetV2Config(width=width, norm_eps=1e-3, norm_momentum=0.03),
        input_size=(_SIDE, _SIDE),
        features=("stage5", "last"),
        anchors=AnchorConfig(
            scales=tuple(size / _SIDE for size in (*_MIN_SIZES, _LAST_MAX_SIZE)),
            reduce_first_map=False,
            centre_steps=tuple(stride / _SIDE for stride in _STRIDES),
        ),
        score="softmax",
        norm_eps=1e-3,
        norm_momentum=0.03,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def _width(path: Path, state: Mapping[str, Tensor]) -> float:
    channels = [state[key].shape[0] if key in state and state[key].dim() else None
                for key in ("backbone.conv1.conv.weight", "backbone.layer5.0.linear_conv.conv.weight",
                            "backbone.layer7.0.linear_conv.conv.weight")]  # fmt: skip
    for width in PUBLIC_WIDTHS:
        with torch.device("meta"):
            specs = MobileNetV2(MobileNetV2Config(width=width)).feature_specs
        if [specs[name].channels for name in ("stem", "stage5", "stage7")] == channels:
            return width
    raise UserError(
        f"{path}: backbone.conv1, layer5 and layer7 have {channels} channels, which fits no MobileNetV2 of a public width; "
        "at width 1 they are [32, 96, 320]"
    )


def _classes(
    path: Path, num_classes: int, class_names: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[int, ...], list[str]]:
    if class_names and len(class_names) != num_classes:
        raise UserError(f"{path} has {num_classes} classes, {len(class_names)} names were given")
    if not class_names and num_classes == len(COCO_CLASSES):
        return tuple(COCO_CLASSES.values()), tuple(COCO_CLASSES), ["80 classes are taken for COCO's"]
    names = class_names or tuple(f"class {label + 1}" for label in range(num_classes))
    remarks = [] if class_names else [f"the file does not name its {num_classes} classes (--class-names)"]
    return names, tuple(range(1, num_classes + 1)), remarks


def _reorder(tensor: Tensor, columns: int, of_classes: bool) -> Tensor:
    """Output channels [6 * columns, ...] in our order of anchors; the background column from the last to the first."""
    by_anchor = tensor.unflatten(0, (len(_ANCHOR_ORDER), columns))[list(_ANCHOR_ORDER)]
    if of_classes:
        by_anchor = by_anchor.roll(1, dims=1)
    return by_anchor.flatten(0, 1)
