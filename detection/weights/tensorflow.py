"""SSDLite detectors of the TensorFlow Object Detection API (``frozen_inference_graph.pb``), read into our network.

The graph is read with the protobufs that tensorboard ships; no TensorFlow. Beside the weights it holds everything else
that makes the detector: input size and normalisation, padding, epsilon, taps, anchors, box code, score, suppression. What
the graph says is taken, and what our network cannot be is refused.

Letters in shapes: I O channels in and out.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backbones.errors import UserError
from backbones.features import FeatureSpec
from backbones.layers import ConvNormAct
from backbones.mobilenetv2 import PAPER_SETTINGS, MobileNetV2, MobileNetV2Config
from backbones.state import existing_file, load_state
from backbones.weights.layouts import PUBLIC_WIDTHS
from detection.models.anchors import AnchorConfig, AnchorGenerator
from detection.models.heads import Extras
from detection.models.ssdlite import SSDLite, SSDLiteConfig
from detection.postprocess import PostprocessConfig
from detection.weights.coco_classes import COCO_CLASSES
from detection.weights.info import DetectorInfo

_SCOPE = "FeatureExtractor/MobilenetV2/"
_SPARSE_COCO = 90  # outputs of a detector whose classes are COCO's ids
_NEXT = ("Identity", "CheckNumerics")
_MAX_VALUES = 1 << 25  # of a constant, and of a network: one number in the file may stand for all of them
_MAX_SETTINGS = 1 << 16  # of a constant that is a list of numbers
_MAX_AXES = 8  # of a constant
_MAX_ANCHOR_MAPS = 64
_MAX_PASSED = 100  # nodes that change nothing, one after the other


@dataclass(slots=True)
class Graph:
    """The nodes of a GraphDef by name."""

    path: Path
    nodes: Mapping[str, Any]

    def constant(self, name: str, at_most: int = _MAX_VALUES) -> NDArray[Any] | None:
        """The value of a constant, None where there is no such node.

        Args:
            name: of the node.
            at_most: values that are read; a few bytes can claim many.
        """
        node = self.nodes.get(name)
        if node is None or node.op != "Const" or "value" not in node.attr:
            return None
        try:
            return tensor_value(node.attr["value"].tensor, at_most)
        except UserError as error:
            raise UserError(f"{self.path}: the constant {name} {error}") from error

    def numbers(self, name: str) -> NDArray[Any] | None:
        """The value of a constant that is a list of numbers, None where there is no such node."""
        value = self.constant(name, _MAX_SETTINGS)
        if value is not None and value.ndim != 1:
            raise UserError(f"{self.path}: the constant {name} has the shape {list(value.shape)}, a list was expected")
        return value

    def number(self, name: str) -> float | None:
        """The value of a constant that is one number, None where there is no such node."""
        value = self.constant(name, _MAX_SETTINGS)
        if value is None:
            return None
        if value.size != 1 or not np.isfinite(value).all():
            raise UserError(f"{self.path}: the constant {name} is no single number (shape {list(value.shape)})")
        return float(value.item())

    def constant_ending(self, scope: str, end: str) -> NDArray[Any] | None:
        """The first constant by name within a scope whose name ends so; None where there is none."""
        names = sorted(name for name in self.nodes if name.startswith(scope) and name.endswith(end))
        return next((value for name in names if (value := self.constant(name, _MAX_SETTINGS)) is not None), None)

    def source(self, name: str) -> str:
        """The name of the node that gives an input, past nodes that change nothing.

        Raises:
            UserError: such nodes that lead nowhere, in a circle or on and on.
        """
        name = name.lstrip("^").split(":")[0]
        passed: set[str] = set()
        while name in self.nodes and self.nodes[name].op in _NEXT:
            if name in passed or not self.nodes[name].input:
                raise UserError(f"{self.path}: the node {name} has no input but itself")
            if len(passed) == _MAX_PASSED:
                raise UserError(f"{self.path}: more than {_MAX_PASSED} nodes before {name} change nothing")
            passed.add(name)
            name = self.nodes[name].input[0].split(":")[0]
        return name


def is_frozen_graph(path: Path) -> bool:
    """Whether a file parses as a GraphDef with nodes."""
    with path.open("rb") as file:
        if file.read(1) != b"\n":  # field 1 of a GraphDef: a node
            return False
    try:
        return bool(_read_graph(path).nodes)
    except ValueError:
        return False


def read_frozen_graph(path: Path, class_names: tuple[str, ...] = ()) -> tuple[SSDLite, DetectorInfo, list[str]]:
    """The detector of a frozen graph.

    The graph does not name its classes. 90 are taken for COCO's ids; the ten that COCO has no class for are dropped where
    scores are sigmoids, which do not depend on each other.

    Args:
        path: a ``frozen_inference_graph.pb`` of ``ssdlite_mobilenet_v2_*``.
        class_names: names of the classes without the background, in the order of the graph.

    Returns:
        The detector in evaluation mode, what travels with it, and remarks on what was done.

    Raises:
        UserError: another kind of graph, or one that our network cannot be; everything that differs is named.
    """
    graph = _read_graph(path)
    try:
        return _detector(graph, class_names)
    except UserError as error:  # what the configs say does not name the file
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error


def _detector(graph: Graph, class_names: tuple[str, ...]) -> tuple[SSDLite, DetectorInfo, list[str]]:
    path = graph.path
    convolutions = {
        name.rpartition("/")[0]
        for name in graph.nodes
        if name.endswith(("/weights", "/depthwise_weights")) and graph.nodes[name].op == "Const"
    }
    if f"{_SCOPE}Conv" not in convolutions or "BoxPredictor_0/BoxEncodingPredictor" not in convolutions:
        raise UserError(
            f"{path} is a TensorFlow graph of {len(graph.nodes)} nodes, but not of ssdlite_mobilenet_v2: expected are "
            f"{_SCOPE}Conv/weights and BoxPredictor_0/BoxEncodingPredictor/weights; it has "
            f"{', '.join(sorted(convolutions)[:4]) or 'no weights'}"
        )
    columns = _columns(graph)
    names, ids, keep, remarks = _classes(graph, columns - 1, class_names)
    config = _config(graph, convolutions)
    with torch.device("meta"):  # a graph says how large its network is: it has to hold it, too, before that is built
        network = SSDLite(config, columns - 1)
    num_values = sum(tensor.numel() for tensor in network.state_dict().values())
    if num_values > _MAX_VALUES:
        raise UserError(f"{path} claims a network of {num_values} values; at most {_MAX_VALUES} are read")
    state = _state(graph, network, convolutions)
    if len(keep) < columns - 1:
        state = _drop_columns(state, network.class_tensors(), [0, *(label + 1 for label in keep)], columns)
    model = SSDLite(config, len(keep))
    load_state(model, state, path)
    info = DetectorInfo(
        model=model.config,
        postprocess=_postprocess(graph),
        class_names=names,
        category_ids=ids,
        source=f"{path.name} (TensorFlow Object Detection API)",
    )
    return model.eval(), info, remarks


def tensor_value(tensor: Any, at_most: int = _MAX_VALUES) -> NDArray[Any]:
    """A TensorProto as an array.

    Args:
        tensor: the TensorProto.
        at_most: values that its shape may have.

    Returns:
        The numbers in the tensor's shape, read-only. Where one number stands for all, they share its memory.

    Raises:
        UserError: a type that no detector's weights and settings have, more values than those of a small network, or other
            than fill its shape; the message goes on after the constant's name.
    """
    dtypes = {1: (np.float32, "float_val"), 3: (np.int32, "int_val"), 9: (np.int64, "int64_val"), 19: (np.float16, "")}
    if tensor.dtype not in dtypes:
        raise UserError(f"is of TensorFlow's type {tensor.dtype}; float32, float16, int32 and int64 are read")
    dtype, name = dtypes[tensor.dtype]
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    if len(shape) > _MAX_AXES:  # before their product, which has as many digits as they have together
        raise UserError(f"has {len(shape)} dimensions, at most {_MAX_AXES} are read")
    size = math.prod(shape)
    if min(shape, default=0) < 0 or size > at_most:
        raise UserError(f"claims the shape {shape}; at most {at_most} values are read")
    if tensor.tensor_content:
        if len(tensor.tensor_content) != size * np.dtype(dtype).itemsize:
            raise UserError(f"has {len(tensor.tensor_content)} bytes, which do not fill its shape {shape}")
        return np.frombuffer(tensor.tensor_content, dtype).reshape(shape)
    values = np.array(getattr(tensor, name, []), dtype) if name else np.array([], dtype)
    if values.size > size:
        raise UserError(f"has {values.size} values, too many for its shape {shape}")
    # The last value stands for all that are left, and none for zeros: so TensorFlow writes constants that are the same
    # everywhere (tensorflow/python/framework/tensor_util.py, MakeNdarray).
    if values.size < 2 and size > 1:
        return np.broadcast_to(values if values.size else np.zeros(1, dtype), shape)
    return np.pad(values, (0, size - values.size), "edge" if values.size else "constant").reshape(shape)


def _read_graph(path: Path) -> Graph:
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    content = existing_file(path).read_bytes()
    try:
        graph = GraphDef.FromString(content)
    except DecodeError as error:
        raise UserError(f"{path} is not a TensorFlow graph: {error}") from error
    return Graph(path, {node.name: node for node in graph.node})


def _columns(graph: Graph) -> int:
    """Columns of class logits an anchor, the background among them."""
    boxes = graph.numbers("BoxPredictor_0/BoxEncodingPredictor/biases")
    classes = graph.numbers("BoxPredictor_0/ClassPredictor/biases")
    if boxes is None or classes is None or len(boxes) < 4 or len(classes) % (len(boxes) // 4):
        raise UserError(f"{graph.path}: BoxPredictor_0 has no biases of boxes and classes that fit together")
    return len(classes) // (len(boxes) // 4)


def _classes(
    graph: Graph, num_classes: int, class_names: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[int, ...], list[int], list[str]]:
    """Names, ids in annotation files, the labels that are kept, remarks."""
    if class_names:
        if len(class_names) != num_classes:
            raise UserError(f"{graph.path} has {num_classes} classes, {len(class_names)} names were given")
        return class_names, tuple(range(1, num_classes + 1)), list(range(num_classes)), []
    if num_classes != _SPARSE_COCO:
        names = tuple(f"class {label + 1}" for label in range(num_classes))
        remark = (
            f"the graph does not name its {num_classes} classes; they are called {names[0]!r}, ... here (--class-names)"
        )
        return names, tuple(range(1, num_classes + 1)), list(range(num_classes)), [remark]
    if _score(graph) == "softmax":
        names = tuple(COCO_CLASSES.get(number, f"unused {number}") for number in range(1, 91))
        return names, tuple(range(1, 91)), list(range(90)), ["90 classes are taken for COCO's ids"]
    remark = "90 classes are taken for COCO's ids; the ten ids that COCO has no class for are dropped"
    return tuple(COCO_CLASSES.values()), tuple(COCO_CLASSES), [number - 1 for number in COCO_CLASSES], [remark]


def _config(graph: Graph, convolutions: set[str]) -> SSDLiteConfig:
    backbone = MobileNetV2Config(
        width=_width(graph), padding="tf_same", norm_eps=_epsilon(graph, f"{_SCOPE}Conv"), norm_momentum=0.03
    )
    extras = sorted(
        (int(found[1]), name)
        for name in convolutions
        if (found := re.fullmatch(rf"{_SCOPE}layer_\d+_2_Conv2d_(\d{{1,9}})_3x3_s2_\d+", name))
    )
    size = graph.constant_ending("Preprocessor/", "ResizeImage/stack")
    if size is None or size.shape != (2,) or not np.isfinite(size).all():
        raise UserError(
            f"{graph.path} does not resize its input to a fixed size (Preprocessor/.../ResizeImage/stack is missing); "
            "graphs with a fixed_shape_resizer are read"
        )
    multiplier, subtracted = graph.number("Preprocessor/mul/x"), graph.number("Preprocessor/sub/y")
    mean, std = 0.5, 0.5
    if multiplier and subtracted is not None:  # pixel * multiplier - subtracted
        std = round(1 / (255 * multiplier), 6)
        mean = round(subtracted * std, 6)
    config = SSDLiteConfig(
        backbone=backbone,
        input_size=(int(size[0]), int(size[1])),
        resize="stretch_tensorflow",
        features=_taps(graph),
        extra_channels=tuple(len(_required(graph, f"{name}/BatchNorm/beta")) for _, name in extras),
        score=_score(graph),
        background_column=True,
        norm_eps=_epsilon(graph, "BoxPredictor_0/BoxEncodingPredictor_depthwise"),
        mean=(mean, mean, mean),
        std=(std, std, std),
    )
    config.validate()
    config.anchors = _anchors(graph, config)
    coder = [value for name in ("truediv/y", "truediv_1/y", "truediv_2/y", "truediv_3/y")
             if (value := graph.number(f"Postprocessor/Decode/{name}")) is not None]  # fmt: skip
    if coder and coder != [10.0, 10.0, 5.0, 5.0]:
        raise UserError(f"{graph.path}: the scales of its box code are {coder}, ours are 10, 10, 5, 5")
    return config


def _width(graph: Graph) -> float:
    channels = [len(_required(graph, f"{_SCOPE}{name}/BatchNorm/beta"))
                for name in ("Conv", "expanded_conv/project", "expanded_conv_16/project")]  # fmt: skip
    for width in PUBLIC_WIDTHS:
        with torch.device("meta"):
            specs = MobileNetV2(MobileNetV2Config(width=width)).feature_specs
        if [specs[name].channels for name in ("stem", "stage1", "stage7")] == channels:
            return width
    raise UserError(
        f"{graph.path}: stem, first and last block have {channels} channels, which fits none of the widths "
        f"{', '.join(map(str, PUBLIC_WIDTHS))}; at width 1 they are [32, 16, 320]"
    )


def _taps(graph: Graph) -> tuple[str, ...]:
    """Names of the backbone's maps that the first two predictors see, read off the graph's edges."""
    stride16 = sum(n for _, _, n, _ in PAPER_SETTINGS[:5])  # blocks before the first at stride 32, counted from 0
    known = {
        f"{_SCOPE}expanded_conv_{stride16}/expand/Relu6": "stride16_expansion",
        f"{_SCOPE}expanded_conv_{stride16 - 1}/depthwise/Relu6": "stride16_depthwise",
        f"{_SCOPE}Conv_1/Relu6": "last",
    }
    taps = []
    for k in range(2):
        node = graph.nodes.get(f"BoxPredictor_{k}/BoxEncodingPredictor_depthwise/depthwise")
        source = graph.source(node.input[0]) if node is not None and node.input else "nothing"
        if source not in known:
            raise UserError(
                f"{graph.path}: BoxPredictor_{k} sees {source}; known are {', '.join(known)} (SSDLite's, with separable "
                "convolutions)"
            )
        taps.append(known[source])
    return tuple(taps)


def _score(graph: Graph) -> Literal["softmax", "sigmoid"]:
    ops = {node.op for name, node in graph.nodes.items() if name.startswith("Postprocessor/")}
    if "Softmax" in ops:
        return "softmax"
    if "Sigmoid" in ops:
        return "sigmoid"
    raise UserError(f"{graph.path}: no Sigmoid or Softmax makes scores of its logits (Postprocessor/convert_scores)")


def _anchors(graph: Graph, config: SSDLiteConfig) -> AnchorConfig:
    """The anchors, from the constants of the graph's own generator where it still has them.

    For map k it computes scales / sqrt(ratios) and scales * sqrt(ratios): each Sqrt node has the ratios before it and the
    scales beside it.
    """
    scope = "MultipleGridAnchorGenerator/"
    roots = [name for name, node in graph.nodes.items() if name.startswith(scope) and node.op == "Sqrt"]
    roots.sort(key=lambda name: int(number[1]) if (number := re.search(r"_(\d{1,9})$", name)) else 0)
    if len(roots) > _MAX_ANCHOR_MAPS:
        raise UserError(f"{graph.path} makes anchors of {len(roots)} roots; at most {_MAX_ANCHOR_MAPS} maps are read")
    found: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    for node in graph.nodes.values():
        sources = [graph.source(name) for name in node.input] if roots and node.op == "Mul" else []
        for root in set(roots).intersection(sources).difference(found):
            inputs = graph.nodes[root].input
            ratios = graph.constant(graph.source(inputs[0]), _MAX_SETTINGS) if inputs else None
            scales = graph.constant(next((name for name in sources if name != root), ""), _MAX_SETTINGS)
            if ratios is not None and scales is not None:
                found[root] = ratios, scales
    shapes = [found[root] for root in roots if root in found]
    # TensorFlow's third ratio is written 0.3333, which moves an anchor's edge by 0.02 pixels against 1 / 3.
    usual = AnchorConfig(ratios=(1.0, 2.0, 0.5, 3.0, 0.3333))
    if not shapes:
        return usual
    for ratios_of_map, scales in shapes:
        if ratios_of_map.ndim != 1 or ratios_of_map.shape != scales.shape or len(scales) < 2 or not (
            np.isfinite([ratios_of_map, scales]).all() and min(ratios_of_map.min(), scales.min()) > 0
        ):  # fmt: skip
            raise UserError(
                f"{graph.path}: the ratios and scales of its anchors are no lists of positive numbers that fit"
            )
    reduced = len(shapes[0][0]) == 3
    own = [float(scales[1 if k == 0 and reduced else 0]) for k, (_, scales) in enumerate(shapes)]
    last = float(shapes[-1][1][-1]) ** 2 / own[-1]  # the square anchor between two scales is their geometric mean
    own_ratios = tuple(round(float(ratio), 6) for ratio in shapes[-1][0][:-1])
    anchors = AnchorConfig(
        scales=tuple(round(scale, 4) for scale in [*own, last]), ratios=own_ratios, reduce_first_map=reduced
    )
    specs = _specs(config)
    if len(specs) != len(shapes):
        raise UserError(f"{graph.path} has anchors for {len(shapes)} maps and {len(specs)} maps")
    for k, ((ratios_of_map, scales), ours) in enumerate(
        zip(shapes, AnchorGenerator(anchors, specs).shapes, strict=True)
    ):
        theirs = np.stack([scales * np.sqrt(ratios_of_map), scales / np.sqrt(ratios_of_map)], 1)
        if theirs.shape != np.shape(ours) or not np.allclose(theirs, ours, atol=1e-3):
            raise UserError(
                f"{graph.path}: the anchors of map {k} are (width, height) {theirs.round(3).tolist()}, as shares of the "
                f"input; ours can be {np.round(ours, 3).tolist()}"
            )
    usual_scales = AnchorGenerator(usual, specs).shapes
    same = own_ratios == usual.ratios and all(
        np.allclose(a, b, atol=1e-4) for a, b in zip(usual_scales, AnchorGenerator(anchors, specs).shapes, strict=True)
    )
    return usual if same and reduced else anchors


def _specs(config: SSDLiteConfig) -> list[FeatureSpec]:
    with torch.device("meta"):
        backbone = MobileNetV2(config.backbone, config.features)
        specs = [backbone.feature_specs[name] for name in config.features]
        return specs + Extras(specs[-1], config.extra_channels, "tf_same", ConvNormAct).feature_specs


def _postprocess(graph: Graph) -> PostprocessConfig:
    config = PostprocessConfig(nms_threshold=0.6, max_detections=100)
    threshold = graph.constant_ending("Postprocessor/", "non_max_suppression/iou_threshold")
    if threshold is not None:
        config.nms_threshold = round(_single(graph, threshold), 6)
    limit = graph.constant_ending("Postprocessor/", "MultiClassNonMaxSuppression/Minimum/x")
    if limit is not None:
        config.max_detections = int(_single(graph, limit))
    config.validate()
    return config


def _single(graph: Graph, value: NDArray[Any]) -> float:
    if value.size != 1 or not np.isfinite(value).all():
        raise UserError(f"{graph.path}: a setting of its non-maximum suppression has the shape {list(value.shape)}")
    return float(value.item())


def _state(graph: Graph, model: SSDLite, convolutions: set[str]) -> dict[str, Tensor]:
    """The model's state dict from the graph; every tensor that is missing, unused or of another shape is named."""
    table = _layers(model, convolutions)
    own, boxes = model.state_dict(), model.box_tensors()
    problems, state = [], {}
    for ours, theirs in table.items():
        for key, tensor in own.items():
            if key.rpartition(".")[0] not in (ours, f"{ours}.conv", f"{ours}.norm"):
                continue
            if key.endswith("num_batches_tracked"):
                state[key] = torch.zeros((), dtype=torch.int64)
                continue
            name, value = _tensor(graph, theirs, key)
            if value is None:
                problems.append(f"  missing: {name} (our {key} {list(tensor.shape)})")
                continue
            if value.size != tensor.numel():
                problems.append(f"  shape: {name} gives {list(value.shape)}, our {key} is {list(tensor.shape)}")
                continue
            ours_of_theirs = _to_torch(value, name, key in boxes)
            if ours_of_theirs.shape != tensor.shape:
                problems.append(
                    f"  shape: {name} gives {list(ours_of_theirs.shape)}, our {key} is {list(tensor.shape)}"
                )
                continue
            state[key] = ours_of_theirs
        eps = model.config.backbone.norm_eps if ours.startswith("backbone.") else model.config.norm_eps
        problems += _check_operators(graph, theirs, eps)
    problems += [f"  not expected: {name}" for name in sorted(convolutions - set(table.values()))]
    problems += [f"  missing: {key} {list(own[key].shape)}" for key in own if key not in state and not problems]
    if problems:
        raise UserError(
            "\n".join(
                [f"{graph.path} does not fit our network, nothing was read ({len(problems)} differences):", *problems]
            )
        )
    return state


def _layers(model: SSDLite, convolutions: set[str]) -> dict[str, str]:
    """Our layers -> scopes of the graph."""
    table = {"backbone.stem": f"{_SCOPE}Conv", "backbone.last": f"{_SCOPE}Conv_1"}
    number = 0
    for stage, (expansion, _, num_blocks, _) in enumerate(PAPER_SETTINGS, start=1):
        for block in range(num_blocks):
            scope = f"{_SCOPE}expanded_conv" + (f"_{number}" if number else "")
            number += 1
            for part in ("expand", "depthwise", "project") if expansion > 1 else ("depthwise", "project"):
                table[f"backbone.stage{stage}.{block}.{part}"] = f"{scope}/{part}"
    names = {}  # "2_1x1" -> scope; the numbers of channels and layers in their names are not needed
    for name in convolutions:
        found = re.fullmatch(rf"{_SCOPE}layer_\d+_[12]_Conv2d_(\d{{1,9}})_(1x1|3x3_s2)_\d+(_depthwise)?", name)
        if found:
            names[found[1], found[2] + (found[3] or "")] = name
    numbers = sorted({number for number, _ in names}, key=int)
    for index, layer in enumerate(numbers[: len(model.extras.blocks)]):
        for place, part in enumerate(("1x1", "3x3_s2_depthwise", "3x3_s2")):
            table[f"extras.blocks.{index}.{place}"] = names.get((layer, part), f"{_SCOPE}layer_*_Conv2d_{layer}_{part}")
    for index in range(len(model.head.box)):
        for ours, theirs in (("box", "BoxEncodingPredictor"), ("classes", "ClassPredictor")):
            table[f"head.{ours}.{index}.0"] = f"BoxPredictor_{index}/{theirs}_depthwise"
            table[f"head.{ours}.{index}.1"] = f"BoxPredictor_{index}/{theirs}"
    return table


def _tensor(graph: Graph, scope: str, key: str) -> tuple[str, NDArray[Any] | None]:
    """The graph's name and value of one of our tensors in a layer."""
    norms = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    last = key.rpartition(".")[2]
    if ".norm." in key:
        name = f"{scope}/BatchNorm/{norms[last]}"
    elif last == "bias":
        name = f"{scope}/biases"
    else:
        name = f"{scope}/weights" if f"{scope}/weights" in graph.nodes else f"{scope}/depthwise_weights"
    return name, graph.constant(name)


def _to_torch(value: NDArray[Any], name: str, of_boxes: bool) -> Tensor:
    """A tensor of the graph in torch's order of axes and our order of box numbers."""
    tensor = torch.from_numpy(np.array(value, np.float32))
    if tensor.dim() == 4:
        # [h, w, I, O] -> [O, I, h, w]; depthwise [h, w, C, 1] -> [C, 1, h, w]
        tensor = tensor.permute((2, 3, 0, 1) if name.endswith("depthwise_weights") else (3, 2, 0, 1))
    if of_boxes:  # y, x, h, w an anchor -> x, y, w, h
        tensor = tensor.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten(0, 1)
    return tensor.contiguous()


def _check_operators(graph: Graph, scope: str, eps: float) -> list[str]:
    """What the layer's operators do otherwise than ours: padding, epsilon of the norm."""
    problems = []
    for kind in ("Conv2D", "depthwise"):
        node = graph.nodes.get(f"{scope}/{kind}")
        if node is not None and node.attr["padding"].s not in (b"", b"SAME"):
            problems.append(
                f"  {scope}/{kind}: padding {node.attr['padding'].s.decode(errors='replace')}, ours is SAME"
            )
    if f"{scope}/BatchNorm/beta" in graph.nodes and abs(_epsilon(graph, scope) - eps) > 1e-9:
        problems.append(f"  {scope}/BatchNorm: epsilon {_epsilon(graph, scope):g}, expected {eps:g} as in the others")
    return problems


def _epsilon(graph: Graph, scope: str) -> float:
    """Epsilon of the layer's batch norm; 0.001, the API's default, where its operator is not there."""
    for name in ("FusedBatchNorm", "FusedBatchNormV3"):
        node = graph.nodes.get(f"{scope}/BatchNorm/{name}")
        if node is not None and "epsilon" in node.attr:
            return round(float(node.attr["epsilon"].f), 9)
    return 1e-3


def _required(graph: Graph, name: str) -> NDArray[Any]:
    """A list of numbers that has to be there."""
    value = graph.numbers(name)
    if value is None:
        raise UserError(f"{graph.path}: the constant {name} is missing")
    return value


def _drop_columns(
    state: dict[str, Tensor], class_tensors: frozenset[str], keep: list[int], columns: int
) -> dict[str, Tensor]:
    """Leave only some columns of class logits."""
    return {
        key: tensor.unflatten(0, (-1, columns))[:, keep].flatten(0, 1) if key in class_tensors else tensor
        for key, tensor in state.items()
    }
