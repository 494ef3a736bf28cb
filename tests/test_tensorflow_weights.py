"""Detectors of TensorFlow and mmdetection as ours, and training from them. Run: pytest tests/test_tensorflow_weights.py"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shared_data import SHARED, needs_shared
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from torch import Tensor, nn

from backbones.errors import UserError
from backbones.layers import ConvNormAct
from backbones.mobilenetv2 import MobileNetV2Config
from backbones.weights.info import WeightsInfo
from backbones.weights.native import save_weights
from configs.finetune import ssdlite as detector_recipe
from detection.cli.convert_weights import main as convert_weights
from detection.cli.eval import main as eval_det
from detection.data.drawn import DetectionSet, draw_detection_set
from detection.engine.runtime import Runtime
from detection.images.place import place, resize_as_tensorflow
from detection.models.anchors import AnchorConfig, AnchorGenerator
from detection.models.ssdlite import SSDLite, SSDLiteConfig
from detection.postprocess import build_postprocess
from detection.training.task import DetectionTask
from detection.weights.coco_classes import COCO_CLASSES
from detection.weights.info import DetectorInfo
from detection.weights.mmdetection import mmdetection_keys, read_mmdetection
from detection.weights.native import read_detector
from detection.weights.recognition import convert
from detection.weights.start import adopt_network, start_from
from detection.weights.tensorflow import is_frozen_graph, read_frozen_graph, tensor_value

PERSON_GRAPH = SHARED / "weights" / "ssdlite_mobilenet_v2_person_frozen_graph.pb"
SCOPE = "FeatureExtractor/MobilenetV2"


def randomise(network: nn.Module) -> None:
    torch.manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    network.eval()


def predictions(model: SSDLite) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    images = torch.randint(0, 256, (1, 3, *model.config.input_size), dtype=torch.uint8)
    with torch.no_grad():
        raw = model(images)
    return raw.codes, raw.class_logits


# ------------------------------------------------------------------------------------------- a graph as TensorFlow has it


def tensorflow_detector(num_classes: int, score: str = "sigmoid", width: float = 0.35) -> SSDLite:
    model = SSDLite(
        SSDLiteConfig(
            backbone=MobileNetV2Config(width=width, padding="tf_same", norm_eps=1e-3),
            input_size=(300, 300),
            anchors=AnchorConfig(ratios=(1.0, 2.0, 0.5, 3.0, 0.3333)),
            score=score,  # type: ignore[arg-type]
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        num_classes,
    )
    randomise(model)
    return model


def write_graph(model: SSDLite, path: Path, *, eps: float = 1e-3, tap: str = "expanded_conv_13/expand") -> None:
    """A detector under the names and in the order of axes of a frozen graph of the Object Detection API."""
    graph = GraphDef()

    def constant(name: str, values: np.ndarray) -> None:
        node = graph.node.add(name=name, op="Const")
        proto = node.attr["value"].tensor
        proto.dtype = {"float32": 1, "int32": 3}[str(values.dtype)]
        proto.tensor_shape.CopyFrom(TensorShapeProto(dim=[TensorShapeProto.Dim(size=n) for n in values.shape]))
        proto.tensor_content = np.ascontiguousarray(values).tobytes()

    def layer(module: ConvNormAct, scope: str, inputs: str = "") -> None:
        depthwise = module.conv.groups > 1
        weight = module.conv.weight.detach().permute((2, 3, 0, 1) if depthwise else (2, 3, 1, 0)).numpy()
        constant(f"{scope}/{'depthwise_weights' if depthwise else 'weights'}", weight)
        norm = module.norm
        for name, tensor in (("gamma", norm.weight), ("beta", norm.bias), ("moving_mean", norm.running_mean),
                             ("moving_variance", norm.running_var)):  # fmt: skip
            assert tensor is not None
            constant(f"{scope}/BatchNorm/{name}", tensor.detach().numpy())
        node = graph.node.add(name=f"{scope}/{'depthwise' if depthwise else 'Conv2D'}", op="Conv2D", input=[inputs])
        node.attr["padding"].s = b"SAME"
        graph.node.add(name=f"{scope}/BatchNorm/FusedBatchNorm", op="FusedBatchNorm").attr["epsilon"].f = eps

    backbone = model.backbone
    layer(backbone.stem, f"{SCOPE}/Conv")
    number = 0
    for stage in range(1, 8):
        for block in getattr(backbone, f"stage{stage}"):
            scope = f"{SCOPE}/expanded_conv" + (f"_{number}" if number else "")
            number += 1
            for part in ("expand", "depthwise", "project"):
                if isinstance(getattr(block, part), ConvNormAct):
                    layer(getattr(block, part), f"{scope}/{part}")
    layer(backbone.last, f"{SCOPE}/Conv_1")
    for index, extra in enumerate(model.extras.blocks):
        channels = extra[2].conv.out_channels
        layer(extra[0], f"{SCOPE}/layer_19_1_Conv2d_{index + 2}_1x1_{channels // 2}")
        layer(extra[1], f"{SCOPE}/layer_19_2_Conv2d_{index + 2}_3x3_s2_{channels}_depthwise")
        layer(extra[2], f"{SCOPE}/layer_19_2_Conv2d_{index + 2}_3x3_s2_{channels}")
    taps = [f"{SCOPE}/{tap}/Relu6", f"{SCOPE}/Conv_1/Relu6"]
    columns = model.head.num_columns
    for k, (box, classes) in enumerate(zip(model.head.box, model.head.classes, strict=True)):
        for branch, name, per_anchor in ((box, "BoxEncodingPredictor", 4), (classes, "ClassPredictor", columns)):
            layer(branch[0], f"BoxPredictor_{k}/{name}_depthwise", taps[k] if k < 2 else "")
            weight, bias = branch[1].weight.detach().clone(), branch[1].bias.detach().clone()
            if per_anchor == 4:  # x, y, w, h -> y, x, h, w
                weight, bias = (t.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten(0, 1) for t in (weight, bias))
            constant(f"BoxPredictor_{k}/{name}/weights", weight.permute(2, 3, 1, 0).numpy())
            constant(f"BoxPredictor_{k}/{name}/biases", bias.numpy())
    constant("Preprocessor/map/while/ResizeImage/stack", np.array(model.config.input_size, np.int32))
    constant("Preprocessor/mul/x", np.array(2 / 255, np.float32))
    constant("Preprocessor/sub/y", np.array(1.0, np.float32))
    graph.node.add(name="Postprocessor/convert_scores", op=model.config.score.capitalize())
    path.write_bytes(graph.SerializeToString())


@pytest.fixture(scope="module")
def coco_graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[SSDLite, Path]:
    model = tensorflow_detector(90)
    path = tmp_path_factory.mktemp("graph") / "frozen_inference_graph.pb"
    write_graph(model, path)
    return model, path


def test_a_graph_of_90_classes_is_a_coco_detector(coco_graph: tuple[SSDLite, Path]) -> None:
    theirs, path = coco_graph
    assert is_frozen_graph(path)
    ours, info, remarks = read_frozen_graph(path)
    assert "the ten ids that COCO has no class for are dropped" in remarks[0]
    assert info.class_names == tuple(COCO_CLASSES.values())
    assert info.category_ids == tuple(COCO_CLASSES)
    assert (info.class_names[0], info.class_names[-1], len(info.class_names)) == ("person", "toothbrush", 80)
    assert (info.model.input_size, info.model.resize, info.model.mean) == (
        (300, 300),
        "stretch_tensorflow",
        (0.5,) * 3,
    )
    assert info.model.features == ("stride16_expansion", "last")
    assert (info.model.backbone.padding, info.model.backbone.norm_eps, info.model.norm_eps) == ("tf_same", 1e-3, 1e-3)
    assert (info.model.score, info.model.background_column) == ("sigmoid", True)
    boxes, logits = predictions(ours)
    their_boxes, their_logits = predictions(theirs)
    assert torch.equal(boxes, their_boxes)
    assert torch.equal(logits, their_logits[..., [0, *COCO_CLASSES]])
    assert torch.equal(ours.anchors, theirs.anchors)


def test_a_softmax_graph_keeps_every_column(tmp_path: Path) -> None:
    theirs = tensorflow_detector(90, "softmax")
    write_graph(theirs, tmp_path / "g.pb")
    ours, info, _ = read_frozen_graph(tmp_path / "g.pb")
    assert (info.model.score, info.class_names[11], len(info.class_names)) == ("softmax", "unused 12", 90)
    assert torch.equal(predictions(ours)[1], predictions(theirs)[1])


def test_own_names(tmp_path: Path) -> None:
    write_graph(tensorflow_detector(2), tmp_path / "g.pb")
    assert read_frozen_graph(tmp_path / "g.pb", ("cat", "dog"))[1].class_names == ("cat", "dog")
    _, info, remarks = read_frozen_graph(tmp_path / "g.pb")
    assert info.class_names == ("class 1", "class 2")
    assert "does not name its 2 classes" in remarks[0]
    with pytest.raises(ValueError, match=r"g.pb has 2 classes, 3 names were given"):
        read_frozen_graph(tmp_path / "g.pb", ("cat", "dog", "owl"))


def change(path: Path, out: Path, *, drop: str) -> Path:
    graph = GraphDef.FromString(path.read_bytes())
    kept = [node for node in graph.node if not node.name.startswith(drop)]
    out.write_bytes(GraphDef(node=kept).SerializeToString())
    return out


def test_what_does_not_fit_is_named(
    coco_graph: tuple[SSDLite, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = coco_graph
    graph = GraphDef.FromString(path.read_bytes())
    scope = f"{SCOPE}/expanded_conv_3"
    del_name = f"{scope}/depthwise/BatchNorm/moving_mean"
    nodes = [node for node in graph.node if node.name != del_name]
    for node in nodes:
        if node.name == f"{scope}/expand/weights":
            node.name = f"{SCOPE}/other/weights"
        if node.name == f"{scope}/project/BatchNorm/FusedBatchNorm":
            node.attr["epsilon"].f = 1e-5
        if node.name == f"{scope}/depthwise/depthwise":
            node.attr["padding"].s = b"VALID"
        if node.name == f"{scope}/project/BatchNorm/beta":
            node.attr["value"].tensor.tensor_shape.dim[0].size = 4
            node.attr["value"].tensor.tensor_content = bytes(16)
    (tmp_path / "odd.pb").write_bytes(GraphDef(node=nodes).SerializeToString())
    with pytest.raises(SystemExit):
        convert_weights([str(tmp_path / "odd.pb"), str(tmp_path / "o.safetensors")])
    message = capsys.readouterr().err
    assert "odd.pb does not fit our network, nothing was read (6 differences)" in message
    assert f"missing: {scope}/expand/depthwise_weights (our backbone.stage3.0.expand.conv.weight" in message
    assert f"missing: {del_name} (our backbone.stage3.0.depthwise.norm.running_mean [48])" in message
    assert (
        f"shape: {scope}/project/BatchNorm/beta gives [4], our backbone.stage3.0.project.norm.bias is [16]" in message
    )
    assert f"{scope}/project/BatchNorm: epsilon 1e-05, expected 0.001" in message
    assert f"{scope}/depthwise/depthwise: padding VALID, ours is SAME" in message
    assert f"not expected: {SCOPE}/other" in message
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (f"{SCOPE}/Conv/", r"not of ssdlite_mobilenet_v2: expected are FeatureExtractor/MobilenetV2/Conv/weights"),
        ("Preprocessor/map", r"does not resize its input to a fixed size"),
        ("Postprocessor", r"no Sigmoid or Softmax makes scores"),
        ("BoxPredictor_0/ClassPredictor/biases", r"BoxPredictor_0 has no biases of boxes and classes"),
        (f"{SCOPE}/expanded_conv_16/project/BatchNorm/beta", r"the constant .*expanded_conv_16.* is missing"),
    ],
)
def test_other_graphs_are_refused(coco_graph: tuple[SSDLite, Path], tmp_path: Path, drop: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_frozen_graph(change(coco_graph[1], tmp_path / "odd.pb", drop=drop))


def test_another_tap_is_refused(tmp_path: Path) -> None:
    """576 channels at stride 16 come twice: what the predictor sees is read off the graph, not off a shape."""
    write_graph(tensorflow_detector(1), tmp_path / "g.pb", tap="expanded_conv_12/depthwise")
    assert read_frozen_graph(tmp_path / "g.pb")[1].model.features[0] == "stride16_depthwise"
    write_graph(tensorflow_detector(1), tmp_path / "h.pb", tap="expanded_conv_12/project")
    with pytest.raises(ValueError, match=r"BoxPredictor_0 sees .*expanded_conv_12/project/Relu6; known are"):
        read_frozen_graph(tmp_path / "h.pb")


def test_constants_in_their_short_form() -> None:
    graph = GraphDef()
    tensor = graph.node.add(name="a", op="Const").attr["value"].tensor
    tensor.dtype = 1
    tensor.tensor_shape.CopyFrom(TensorShapeProto(dim=[TensorShapeProto.Dim(size=2), TensorShapeProto.Dim(size=3)]))
    tensor.float_val.append(0.25)
    assert tensor_value(tensor).tolist() == [[0.25] * 3] * 2
    tensor.float_val.extend([1.0, 2.0, 3.0, 4.0, 5.0])
    assert tensor_value(tensor).tolist() == [[0.25, 1.0, 2.0], [3.0, 4.0, 5.0]]
    del tensor.float_val[3:]  # the last one stands for those that are left
    assert tensor_value(tensor).tolist() == [[0.25, 1.0, 2.0], [2.0, 2.0, 2.0]]
    del tensor.float_val[:]
    assert tensor_value(tensor).tolist() == [[0.0] * 3] * 2
    tensor.dtype = 7
    with pytest.raises(UserError, match="is of TensorFlow's type 7; float32, float16, int32 and int64 are read"):
        tensor_value(tensor)
    tensor.dtype, tensor.tensor_content = 1, bytes(8)
    with pytest.raises(UserError, match=r"has 8 bytes, which do not fill its shape \[2, 3\]"):
        tensor_value(tensor)


def test_nodes_in_a_circle_end(tmp_path: Path) -> None:
    write_graph(tensorflow_detector(1), tmp_path / "g.pb")
    graph = GraphDef.FromString((tmp_path / "g.pb").read_bytes())
    for node in graph.node:
        if node.name == "BoxPredictor_0/BoxEncodingPredictor_depthwise/depthwise":
            node.input[0] = "circle"
    graph.node.add(name="circle", op="Identity", input=["circle"])
    (tmp_path / "g.pb").write_bytes(graph.SerializeToString())
    with pytest.raises(UserError, match=r"g\.pb: the node circle has no input but itself"):
        read_frozen_graph(tmp_path / "g.pb")


def test_pixels_of_tensorflow() -> None:
    # Of 4 pixels, 2 are left: 0 and 2 themselves, nothing averaged; 3 of 2: 0, 2/3 of the way, past the end the last.
    row = np.array([0, 90, 30, 240], np.uint8)
    image = np.broadcast_to(row[None, :, None], (4, 4, 3)).copy()
    assert resize_as_tensorflow(image, (4, 2))[0, :, 0].tolist() == [0, 30]
    # OpenCV 4 rounds the way to 1/32.
    assert resize_as_tensorflow(image[:, :2], (4, 3))[0, :, 0].tolist() in ([0, 60, 90], [0, 59, 90])
    assert resize_as_tensorflow(image, (4, 4)) is image
    placed, placement = place(image, (2, 2), "stretch_tensorflow", (0, 0, 0))
    assert (placed.shape, placement[:2]) == ((2, 2, 3), (0.5, 0.5))


# ----------------------------------------------------------------------------------------------------- the real detector


@needs_shared("weights/ssdlite_mobilenet_v2_person_frozen_graph.pb", "weights/ssdlite_mobilenet_v2_person_expected.npz")
def test_the_person_detector_computes_what_tensorflow_computes() -> None:
    expected = np.load(SHARED / "weights" / "ssdlite_mobilenet_v2_person_expected.npz")
    model, info, _ = read_frozen_graph(PERSON_GRAPH, ("person",))
    assert info.model.anchors == AnchorConfig(ratios=(1.0, 2.0, 0.5, 3.0, 0.3333)), "read off the graph's own generator"
    assert (info.postprocess.nms_threshold, info.postprocess.max_detections) == (0.6, 100)
    boxes = torch.from_numpy(expected["raw_box_encodings"])[:, :, 0, [1, 0, 3, 2]]
    logits = torch.from_numpy(expected["raw_class_logits"])
    images = torch.from_numpy(expected["images"]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        raw = model(images)
    assert logits.abs().max() > 28
    torch.testing.assert_close(raw.codes, boxes, rtol=0, atol=2e-3)
    torch.testing.assert_close(raw.class_logits, logits, rtol=0, atol=2e-3)
    sizes = torch.tensor([[300, 300]] * len(images))
    found = build_postprocess(info.model, info.postprocess)(
        raw, torch.tensor([[1.0, 1.0, 0.0, 0.0]] * len(images)), sizes
    )
    for index, detections in enumerate(found):
        scores = torch.from_numpy(expected["detection_scores"][index])
        sure = scores >= 0.3
        theirs = torch.from_numpy(expected["detection_boxes"][index])[sure][:, [1, 0, 3, 2]] * 300
        ours = detections.above(0.3)
        assert len(ours.scores) == int(sure.sum()) > 0
        torch.testing.assert_close(ours.boxes, theirs, rtol=0, atol=1)
        torch.testing.assert_close(ours.scores, scores[sure], rtol=0, atol=1e-3)

    # The same numbers with the padding of torch are another network: why padding belongs to the weights.
    symmetric = replace(info.model, backbone=replace(info.model.backbone, padding="symmetric"))
    collapsed = SSDLite(symmetric, 1).eval()
    collapsed.load_state_dict(model.state_dict())
    with torch.inference_mode():
        raw = collapsed(images)
    assert (raw.class_logits - logits).abs().max() > 5
    assert (raw.codes - boxes).abs().max() > 5


@pytest.mark.slow
@needs_shared("weights/ssdlite_mobilenet_v2_person_frozen_graph.pb", "data/coco_val2017_mix")
def test_the_person_detector_has_tensorflows_ap(tmp_path: Path) -> None:
    """TensorFlow itself: AP 0.173, AP50 0.341, AP75 0.143. With symmetric padding it collapses."""
    data = SHARED / "data" / "coco_val2017_mix"
    converted = convert(PERSON_GRAPH, ("person",))
    converted.save(tmp_path / "person.safetensors")
    more = ["--annotations", str(data / "instances.json"), "--images", str(data / "images"), "--classes", "person",
            "--workers", "0", "--device", "cpu"]  # fmt: skip
    figures = eval_det([str(tmp_path / "person.safetensors"), *more]).figures
    assert figures["AP"] == pytest.approx(0.173, abs=0.005)
    assert figures["AP50"] == pytest.approx(0.341, abs=0.01)
    assert isinstance(converted.info, DetectorInfo)
    config = converted.info.model
    converted.info.model = replace(config, backbone=replace(config.backbone, padding="symmetric"))
    converted.save(tmp_path / "symmetric.safetensors")
    # A quarter of the images is enough to see it.
    content = json.loads((data / "instances.json").read_text())
    content["images"] = content["images"][::4]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
    (tmp_path / "quarter.json").write_text(json.dumps(content))
    more[1] = str(tmp_path / "quarter.json")
    collapsed = eval_det([str(tmp_path / "symmetric.safetensors"), *more]).figures
    print(f"AP {figures['AP']:.3f}, with symmetric padding {collapsed['AP']:.3f}")
    assert collapsed["AP"] < 0.05


# -------------------------------------------------------------------------------------------------- training from weights


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> DetectionSet:
    return draw_detection_set(tmp_path_factory.mktemp("drawn"), 4, 2, (96, 96), 0)


def task(drawn: DetectionSet, weights: Path, part: str = "all") -> DetectionTask:
    config = detector_recipe()
    config.weights, config.weights_part = str(weights), part  # type: ignore[assignment]
    config.model.input_size = (128, 128)
    config.model.backbone.frozen_stages = 2
    config.data.train.annotations, config.data.train.images = drawn.train_annotations, drawn.train_images
    config.data.val.annotations, config.data.val.images = drawn.val_annotations, drawn.val_images
    config.data.workers, config.train.batch_size = 0, 2
    config.validate()
    return DetectionTask(config, Runtime(device=torch.device("cpu")))


@pytest.fixture(scope="module")
def converted_file(coco_graph: tuple[SSDLite, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "coco.safetensors"
    convert(coco_graph[1]).save(path)
    return path


def test_training_starts_from_a_whole_foreign_detector(
    drawn: DetectionSet, converted_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        begun = task(drawn, converted_file)
    model = begun.model.config
    assert (model.backbone.width, model.backbone.padding, model.backbone.frozen_stages) == (0.35, "tf_same", 2)
    assert (model.score, model.background_column, model.anchors.ratios[-1]) == ("sigmoid", True, 0.3333)
    assert (model.mean, model.input_size, model.resize) == ((0.5,) * 3, (128, 128), "stretch")
    assert begun.config.loss.classification == "focal"
    assert "the network is built as" in caplog.text
    assert "backbone.padding tf_same" in caplog.text
    assert "loss.classification is focal now, which trains sigmoid scores" in caplog.text
    assert "the layers that predict classes are new" in caplog.text
    start, _ = read_detector(converted_file)
    own = begun.model.state_dict()
    for key, tensor in start.state_dict().items():
        if not (key.startswith("head.classes.") and key.split(".")[3] == "1"):
            assert torch.equal(own[key], tensor), key
    batch = next(iter(begun.train_loader()))
    assert torch.isfinite(begun.step(*batch.inputs())["loss"])


def test_training_starts_from_its_backbone_alone(
    drawn: DetectionSet, converted_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        begun = task(drawn, converted_file, "backbone")
    model = begun.model.config
    assert (model.backbone.padding, model.score, model.mean) == ("tf_same", "softmax", (0.5,) * 3)
    assert model.anchors == detector_recipe().model.anchors, "as the recipe has them"
    assert "backbone of the detector from" in caplog.text
    start, _ = read_detector(converted_file)
    own, theirs = begun.model.state_dict(), start.state_dict()
    assert all(torch.equal(own[key], theirs[key]) for key in theirs if key.startswith("backbone."))
    assert not torch.equal(own["head.box.0.1.weight"], theirs["head.box.0.1.weight"])


def test_a_backbones_file_sets_the_backbone(drawn: DetectionSet, converted_file: Path, tmp_path: Path) -> None:
    start, _ = read_detector(converted_file)
    half = (0.5, 0.5, 0.5)
    save_weights(tmp_path / "b.safetensors", start.backbone, WeightsInfo(mean=half, std=half))
    begun = task(drawn, tmp_path / "b.safetensors")
    model = begun.model
    assert (model.config.backbone.padding, model.config.backbone.width, model.config.mean) == ("tf_same", 0.35, half)
    assert model.normalise.mean.flatten().tolist() == pytest.approx([127.5] * 3)
    assert torch.equal(model.backbone.stem.conv.weight, start.backbone.stem.conv.weight)


def test_what_was_asked_for_is_not_touched(converted_file: Path) -> None:
    asked = SSDLiteConfig(mean=(0.1, 0.2, 0.3))
    adopted, remark = adopt_network(asked, converted_file)
    assert asked == SSDLiteConfig(mean=(0.1, 0.2, 0.3))
    assert adopted.mean == (0.1, 0.2, 0.3), "said by the user"
    assert "score sigmoid" in remark
    assert "mean" not in remark
    again, remark = adopt_network(adopted, converted_file)
    assert (again, remark) == (adopted, "")
    with pytest.raises(ValueError, match=r"made with another network[\s\S]*backbone.padding: the weights have tf_same"):
        start_from(SSDLite(SSDLiteConfig(), 2), converted_file, ("a", "b"), "backbone")


# ----------------------------------------------------------------------------------------------------------- mmdetection


def mmdetection_state(num_classes: int) -> dict[str, Tensor]:
    """A state dict with the names and shapes of ssdlite_mobilenetv2-scratch_8xb24-600e_coco, written out here on its own."""
    torch.manual_seed(9)
    state: dict[str, Tensor] = {}

    def conv_module(name: str, inputs: int, outputs: int, kernel: int, groups: int = 1) -> None:
        state[f"{name}.conv.weight"] = torch.randn(outputs, inputs // groups, kernel, kernel) * 0.1
        state[f"{name}.bn.weight"] = torch.rand(outputs) + 0.5
        state[f"{name}.bn.bias"] = torch.randn(outputs) * 0.1
        state[f"{name}.bn.running_mean"] = torch.randn(outputs) * 0.1
        state[f"{name}.bn.running_var"] = torch.rand(outputs) + 0.5
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)

    conv_module("backbone.conv1", 3, 32, 3)
    channels = 32
    rows = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    for layer, (expansion, outputs, blocks) in enumerate(rows, start=1):
        for block in range(blocks):
            name, hidden = f"backbone.layer{layer}.{block}", channels * expansion
            if expansion > 1:
                conv_module(f"{name}.expand_conv", channels, hidden, 1)
            conv_module(f"{name}.depthwise_conv", hidden, hidden, 3, hidden)
            conv_module(f"{name}.linear_conv", hidden, outputs, 1)
            channels = outputs
    conv_module("backbone.conv2", 320, 1280, 1)
    channels = 1280
    for index, outputs in enumerate((512, 256, 256, 128)):
        name, middle = f"neck.extra_layers.{index}", outputs // 2
        conv_module(f"{name}.0", channels, middle, 1)
        conv_module(f"{name}.1.depthwise_conv", middle, middle, 3, middle)
        conv_module(f"{name}.1.pointwise_conv", middle, outputs, 1)
        channels = outputs
    for index, inputs in enumerate((96, 1280, 512, 256, 256, 128)):
        for branch, columns in (("cls_convs", num_classes + 1), ("reg_convs", 4)):
            conv_module(f"bbox_head.{branch}.{index}.0", inputs, inputs, 3, inputs)
            state[f"bbox_head.{branch}.{index}.1.weight"] = torch.randn(6 * columns, inputs, 1, 1) * 0.1
            state[f"bbox_head.{branch}.{index}.1.bias"] = torch.randn(6 * columns)
    return state


@pytest.fixture(scope="module")
def mmdetections(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    state = mmdetection_state(80)
    path = tmp_path_factory.mktemp("mmdetection") / "ssdlite.pth"
    torch.save({"meta": {"epoch": 120, "CLASSES": ("person",), "config": "text"}, "state_dict": state}, path)
    return state, path


def test_mmdetection_file_becomes_a_detector(mmdetections: tuple[dict[str, Tensor], Path], tmp_path: Path) -> None:
    state, path = mmdetections
    converted = convert(path)
    assert converted.layout == "mmdetection SSDLite checkpoint"
    model, info = converted.model, converted.info
    assert isinstance(model, SSDLite)
    assert isinstance(info, DetectorInfo)
    assert info.class_names == tuple(COCO_CLASSES.values())
    assert set(mmdetection_keys(model).values()) == set(state)
    config = info.model
    assert (config.features, config.score, config.backbone.padding) == (("stage5", "last"), "softmax", "symmetric")
    assert (config.backbone.norm_eps, config.norm_eps) == (1e-3, 1e-3)
    assert len(model.anchors) == 3234
    own = model.state_dict()
    assert torch.equal(own["backbone.stage5.0.expand.conv.weight"], state["backbone.layer5.0.expand_conv.conv.weight"])
    assert torch.equal(own["extras.blocks.1.2.norm.bias"], state["neck.extra_layers.1.1.pointwise_conv.bn.bias"])
    assert torch.equal(own["head.box.3.0.conv.weight"], state["bbox_head.reg_convs.3.0.conv.weight"])
    # A cell's anchors there: square, square between the scales, then ratios; the background is the last of 81 columns.
    theirs = state["bbox_head.cls_convs.0.1.bias"].view(6, 81)
    ours = own["head.classes.0.1.bias"].view(6, 81)
    assert torch.equal(ours[0], torch.cat((theirs[0, 80:], theirs[0, :80])))
    assert torch.equal(ours[5], torch.cat((theirs[1, 80:], theirs[1, :80])))
    assert torch.equal(ours[1, 1:], theirs[2, :80])
    assert torch.equal(own["head.box.2.1.bias"].view(6, 4)[5], state["bbox_head.reg_convs.2.1.bias"].view(6, 4)[1])
    converted.save(tmp_path / "mm.safetensors")
    again, _ = read_detector(tmp_path / "mm.safetensors")
    assert torch.equal(predictions(again)[1], predictions(model)[1])


def test_anchors_of_mmdetection(mmdetections: tuple[dict[str, Tensor], Path]) -> None:
    """SSDAnchorGenerator's numbers: centres at (i + 0.5) * stride, sizes of the configuration, worked out by hand."""
    state, path = mmdetections
    model, _, _ = read_mmdetection(path, state)
    first, second = model.anchors[0], model.anchors[5]
    assert first.tolist() == pytest.approx([8 - 24, 8 - 24, 8 + 24, 8 + 24])
    half = (48 * 100) ** 0.5 / 2
    assert second.tolist() == pytest.approx([8 - half, 8 - half, 8 + half, 8 + half], abs=1e-4)
    wide = model.anchors[1]  # ratio 2: width over height
    assert (wide[2:] - wide[:2]).tolist() == pytest.approx([48 * 2**0.5, 48 / 2**0.5], abs=1e-4)
    start = 6 * (400 + 100 + 25)
    last_of_3x3 = model.anchors[start + 6 * 8]
    assert ((last_of_3x3[0] + last_of_3x3[2]) / 2).item() == pytest.approx(2.5 * 107, abs=1e-4)
    assert ((model.anchors[-1, 2] - model.anchors[-1, 0]) / 2).item() == pytest.approx((304 * 320) ** 0.5 / 2, abs=1e-3)


def test_centre_steps_need_one_a_map() -> None:
    config = SSDLiteConfig()
    specs = [SSDLite(config, 1).backbone.feature_specs["last"]]
    with pytest.raises(ValueError, match=r"1 feature maps need 1 centre_steps, got \(0.1, 0.2\)"):
        AnchorGenerator(AnchorConfig(scales=(0.2, 0.4), centre_steps=(0.1, 0.2)), specs)


def test_other_mmdetection_files_are_refused(mmdetections: tuple[dict[str, Tensor], Path], tmp_path: Path) -> None:
    state, _ = mmdetections
    path = tmp_path / "odd.pth"
    odd = {key: tensor for key, tensor in state.items() if key != "neck.extra_layers.0.1.depthwise_conv.bn.weight"}
    odd["bbox_head.reg_convs.0.1.weight"] = torch.zeros(24, 64, 1, 1)
    odd["neck.l2_norm.weight"] = torch.zeros(512)
    torch.save({"state_dict": odd}, path)
    with pytest.raises(ValueError, match=r"odd.pth does not fit the network, nothing was loaded .3 of") as caught:
        convert(path)
    message = str(caught.value)
    assert "missing: extras.blocks.0.1.norm.weight [256]" in message
    assert "not expected: neck.l2_norm.weight" in message
    assert "head.box.0.1.weight: expected shape [24, 96, 1, 1], given [24, 64, 1, 1]" in message
    with pytest.raises(SystemExit) as stop:
        convert_weights([str(path), str(tmp_path / "out.safetensors")])
    assert stop.value.code == 2
    assert [file.name for file in tmp_path.iterdir()] == ["odd.pth"], "nothing is written"
    old = {"backbone.conv1.conv.weight": torch.zeros(32, 3, 3, 3), "bbox_head.reg_convs.0.0.weight": torch.zeros(1)}
    torch.save(old, path)
    with pytest.raises(ValueError, match=r"no SSDLite of mmdetection 2.14 or later.*upgrade_ssd_version"):
        convert(path)
    wide = {**state, "backbone.conv1.conv.weight": torch.zeros(40, 3, 3, 3)}
    with pytest.raises(ValueError, match=r"have \[40, 96, 320\] channels, which fits no MobileNetV2 of a public width"):
        read_mmdetection(path, wide)
    with pytest.raises(ValueError, match=r"has 80 classes, 1 names were given"):
        read_mmdetection(path, state, ("person",))


def test_a_file_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return (Path.touch, (Path(tmp_path / "ran"),))  # type: ignore[return-value]

    torch.save({"state_dict": {"backbone.conv1.conv.weight": Evil()}}, tmp_path / "evil.pth")
    with pytest.raises(
        ValueError,
        match=r"evil.pth is not a weights file that can be read: it holds a \S+, which only code can restore",
    ):
        convert(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_metadata_of_a_converted_detector(converted_file: Path) -> None:
    from safetensors import safe_open

    with safe_open(converted_file, framework="pt") as file:
        info = json.loads(file.metadata()["detector"])
    assert info["source"].startswith("frozen_inference_graph.pb (TensorFlow Object Detection API), sha256 ")
    assert (info["model"]["backbone"]["padding"], info["model"]["mean"]) == ("tf_same", [0.5, 0.5, 0.5])
