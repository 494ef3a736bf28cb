"""Files of weights that are damaged or meant to harm: one clear line, no code run, no memory that the file does not hold."""

import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from test_convert_weights import write_tflite
from test_tensorflow_weights import tensorflow_detector, write_graph

from backbones.classifier import Classifier, ClassifierConfig
from backbones.errors import UserError
from backbones.mobilenetv2 import MobileNetV2, MobileNetV2Config
from backbones.weights.foreign import to_timm
from backbones.weights.info import WeightsInfo
from backbones.weights.native import load_backbone, load_classifier, read_model, save_weights
from backbones.weights.readers import read_metadata
from backbones.weights.tflite import read_tflite
from detection import load_detector
from detection.cli.convert_weights import main as convert_weights
from detection.cli.eval import main as eval_det
from detection.cli.train import main as train_det
from detection.cli.train_cls import main as train_cls
from detection.engine.checkpoint import load_checkpoint, save_checkpoint
from detection.models.build import build_detector
from detection.models.ssdlite import SSDLiteConfig
from detection.postprocess import PostprocessConfig
from detection.weights.info import DetectorInfo
from detection.weights.native import read_detector, read_file, save_detector
from detection.weights.recognition import convert
from detection.weights.tensorflow import read_frozen_graph

TINY = MobileNetV2Config(width=0.1, padding="tf_same", norm_eps=1e-3)
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = int(os.environ.get("LITEDET_EXAMPLES", 100))  # as in test_fuzzed_readers.py


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good file of every kind that is read, as small as the kind allows."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("good")
    detector = build_detector(SSDLiteConfig(backbone=TINY, input_size=(96, 96), extra_channels=(8, 8)), 2)
    info = DetectorInfo(
        model=detector.config, postprocess=PostprocessConfig(), class_names=("a", "b"), category_ids=(1, 2)
    )
    classifier = Classifier(ClassifierConfig(backbone=TINY), 3).eval()
    save_detector(folder / "detector.safetensors", detector, info)
    save_weights(folder / "classifier.safetensors", classifier, WeightsInfo(class_names=("a", "b", "c")))
    save_checkpoint(folder / "best.pt", {"weights": detector.state_dict(), "extra": {"detector": info.to_plain()}})
    timm = Classifier(ClassifierConfig(backbone=MobileNetV2Config(width=0.1)), 3)
    torch.save(to_timm(timm), folder / "timm.pth")
    torch.save(to_timm(timm), folder / "old.pth", _use_new_zipfile_serialization=False)
    write_graph(tensorflow_detector(2, width=0.1), folder / "graph.pb")
    write_tflite(folder / "labels.tflite", classifier, labels=("a", "b", "c"))
    write_tflite(folder / "quantised.tflite", classifier, quantised=True)
    return {path.name: path for path in folder.iterdir()}


def places_of_structure(content: bytes, name: str) -> np.ndarray:
    """Byte offsets of a file that are not numbers of weights, as far as that is easily told."""
    if name.endswith(".safetensors"):
        return np.arange(8 + int.from_bytes(content[:8], "little"))
    if name in ("best.pt", "timm.pth"):
        start = content.index(b"data.pkl")
        return np.r_[start : start + 20_000, len(content) - 20_000 : len(content)] % len(content)
    if name == "old.pth":
        return np.arange(min(len(content), 40_000))
    # Flatbuffers and protobufs: bytes with a text or a small number near by.
    array = np.frombuffer(content, np.uint8)
    near_zeros = np.convolve(array < 32, np.ones(9), "same") >= 5
    return np.flatnonzero(near_zeros) if near_zeros.any() else np.arange(len(content))


@pytest.mark.parametrize(
    "name",
    ["detector.safetensors", "classifier.safetensors", "best.pt", "timm.pth", "old.pth", "graph.pb", "labels.tflite",
     "quantised.tflite"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # numbers that are none are no news in a damaged file
def test_flipped_bytes_and_cut_files_give_an_answer(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    content = files[name].read_bytes()
    convert(files[name])
    places = places_of_structure(content, name)
    random = np.random.default_rng(0 if EXAMPLES == 100 else None)
    damaged = tmp_path / name
    answers = []
    for number in range(EXAMPLES // 8):
        changed = bytearray(content)
        for place in random.choice(places, 1 << random.integers(0, 5)):
            changed[place] = random.integers(0, 256)
        if number % 4 == 0:
            changed = changed[: random.integers(1, len(content))]
        damaged.write_bytes(changed)
        try:
            convert(damaged)
        except (UserError, OSError) as error:
            answers.append(str(error))
        except BaseException:
            print(f"what fails lies in {damaged}")
            raise
    assert answers
    for answer in answers:
        assert name in answer
        assert "weights_only" not in answer  # torch's advice to set it to False is dangerous


class Evil:
    """Pickled, it makes a file when code is run."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (os.mkdir, (str(self.ran),))


@pytest.mark.parametrize("old_format", [False, True])
def test_no_way_in_runs_code_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], old_format: bool) -> None:
    ran, path = tmp_path / "ran", tmp_path / "evil.pt"
    content = {"format": "litedet checkpoint", "version": 1, "weights": {"a": Evil(ran)}, "extra": {}}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    ways: list[Callable[[], object]] = [
        lambda: load_checkpoint(path),
        lambda: read_detector(path),
        lambda: read_file(path),
        lambda: load_detector(path),
        lambda: load_backbone(MobileNetV2(TINY), path),
        lambda: load_classifier(Classifier(ClassifierConfig(backbone=TINY), 2), path),
        lambda: read_model(path),
        lambda: convert(path),
    ]
    for way in ways:
        with pytest.raises(UserError, match=r"evil\.pt is not a .*it holds a \S*mkdir, which only code can restore"):
            way()
    images = tmp_path / "images" / "a"
    images.mkdir(parents=True)
    (images / "1.jpg").write_bytes(b"")
    annotations = tmp_path / "a.json"
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
    annotations.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "1.jpg", "width": 20, "height": 20}],
                "annotations": [box],
                "categories": [{"id": 1, "name": "a"}],
            }
        )
    )
    data = [f"--data.{split}.{what}" for split in ("train", "val") for what in ("annotations", "images")]
    values = [str(annotations), str(images)] * 2
    given = [text for pair in zip(data, values, strict=True) for text in pair]
    commands: list[Callable[[], object]] = [
        lambda: convert_weights([str(path), str(tmp_path / "o.safetensors")]),
        lambda: eval_det([str(path), "--annotations", str(annotations), "--images", str(images)]),
        lambda: train_det(
            [f"{ROOT}/configs/finetune.py:ssdlite", "--weights", str(path), "--run-dir", str(tmp_path / "r"), *given]
        ),
        lambda: train_cls(
            [f"{ROOT}/configs/finetune.py:classifier", "--weights", str(path), "--run-dir", str(tmp_path / "c"),
             "--data.train", str(images.parent), "--data.val", str(images.parent)]
        ),
    ]  # fmt: skip
    for command in commands:
        with pytest.raises(SystemExit) as stopped:
            command()
        printed = capsys.readouterr().err
        assert stopped.value.code == 2, printed
        assert "evil.pt is not a" in printed, printed
        assert "which only code can restore" in printed
        assert "weights_only" not in printed
    assert not ran.exists()


def test_a_detector_that_claims_more_than_it_holds_is_refused_before_it_is_built(
    files: dict[str, Path], tmp_path: Path
) -> None:
    state, plain = load_file(files["detector.safetensors"]), read_metadata(files["detector.safetensors"])
    record = json.loads(plain["detector"])
    for field, value, message in (
        ("input_size", [100_000, 100_000], r"input_size is .* 96 to 4096 pixels; got \(100000, 100000\)"),
        ("extra_channels", [10**8, 8], r"extra_channels are at most"),
        ("extra_channels", [4096] * 16, r"does not fit the network, nothing was loaded"),
        ("backbone", record["model"]["backbone"] | {"width": 4.0}, r"does not fit the network, nothing was loaded"),
        ("width", 1.0, r"unknown field model\.width of SSDLiteConfig"),
        ("kind", ["ssdlite"], r"detector of kind \['ssdlite'\]; this version knows"),
        ("kind", "other", r"detector of kind 'other'; this version knows"),
    ):
        detector = json.dumps(record | {"model": record["model"] | {field: value}})
        save_file(state, tmp_path / "d.safetensors", plain | {"detector": detector})
        for read in (read_detector, read_file, convert):
            with pytest.raises(UserError, match=r"d\.safetensors") as error:
                read(tmp_path / "d.safetensors")
            assert error.match(message)
    for text in ("", "[1]", "[" * 10_000, '{"model": 3}'):
        save_file(state, tmp_path / "d.safetensors", plain | {"detector": text})
        with pytest.raises(UserError, match=r"d\.safetensors"):
            read_file(tmp_path / "d.safetensors")


def test_numbers_of_classes_that_the_file_does_not_hold(files: dict[str, Path], tmp_path: Path) -> None:
    """One stored number can stand for a tensor of any shape."""
    state = torch.load(files["timm.pth"], weights_only=True)
    state["classifier.weight"] = torch.zeros(1, 1).expand(10**9, 1280)
    torch.save(state, tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"wide\.pth"):
        convert(tmp_path / "wide.pth")
    graph = GraphDef.FromString(files["graph.pb"].read_bytes())
    for node in graph.node:
        if node.name == "BoxPredictor_0/ClassPredictor/biases":
            tensor = node.attr["value"].tensor
            tensor.tensor_content = b""
            tensor.float_val.append(0.0)
            tensor.tensor_shape.dim[0].size = 3 * 15_000  # columns; three anchors a cell
    (tmp_path / "wide.pb").write_bytes(graph.SerializeToString())
    # Weights of the predictors alone: an output for each of 15,000 columns and 3 or 6 anchors from each channel.
    weights = 15_000 * (3 * 96 + 6 * (1280 + 512 + 256 + 256 + 128))
    with pytest.raises(UserError, match=r"wide\.pb claims a network of \d+ values; at most 33554432 are read") as error:
        read_frozen_graph(tmp_path / "wide.pb")
    assert weights < int(str(error.value).split()[5]) < 1.1 * weights
    tensor.tensor_shape.dim[0].size = 1 << 40
    (tmp_path / "wide.pb").write_bytes(graph.SerializeToString())
    with pytest.raises(
        UserError, match=r"wide\.pb: the constant BoxPredictor_0/Class\S+ claims the shape \[1099511627776\]"
    ):
        read_frozen_graph(tmp_path / "wide.pb")


def changed_graph(content: bytes, out: Path, change: Callable[[GraphDef, dict[str, NodeDef]], object]) -> Path:
    graph = GraphDef.FromString(content)
    change(graph, {node.name: node for node in graph.node})
    out.write_bytes(graph.SerializeToString())
    return out


def many_axes(graph: GraphDef, nodes: dict[str, NodeDef]) -> None:
    shape = nodes["Preprocessor/mul/x"].attr["value"].tensor.tensor_shape
    for _ in range(200_000):  # their product has two million digits
        shape.dim.add(size=1 << 31)


def no_size(graph: GraphDef, nodes: dict[str, NodeDef]) -> None:
    tensor = nodes["Preprocessor/map/while/ResizeImage/stack"].attr["value"].tensor
    tensor.dtype, tensor.tensor_content = 1, np.array([np.nan, 300], np.float32).tobytes()


def many_roots(graph: GraphDef, nodes: dict[str, NodeDef]) -> None:
    for number in range(65):
        graph.node.add(name=f"MultipleGridAnchorGenerator/Sqrt_{number}", op="Sqrt")


def long_way(graph: GraphDef, nodes: dict[str, NodeDef]) -> None:
    nodes["BoxPredictor_0/BoxEncodingPredictor_depthwise/depthwise"].input[0] = "way0"
    for number in range(101):
        graph.node.add(name=f"way{number}", op="Identity", input=[f"way{number + 1}"])


def no_epsilon(graph: GraphDef, nodes: dict[str, NodeDef]) -> None:
    for node in nodes.values():
        if node.op == "FusedBatchNorm":
            node.attr["epsilon"].f = np.nan


def no_scale(graph: GraphDef, nodes: dict[str, NodeDef]) -> None:
    nodes["Preprocessor/sub/y"].attr["value"].tensor.tensor_content = np.float32(1e38).tobytes()
    nodes["Preprocessor/mul/x"].attr["value"].tensor.tensor_content = np.float32(-1).tobytes()


def many_digits(graph: GraphDef, nodes: dict[str, NodeDef]) -> None:  # more than Python reads as an integer
    name = f"FeatureExtractor/MobilenetV2/layer_19_2_Conv2d_{'9' * 5000}_3x3_s2_8/weights"
    graph.node.add(name=name, op="Const")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (many_axes, "the constant Preprocessor/mul/x has 200000 dimensions, at most 8 are read"),
        (no_size, "does not resize its input to a fixed size"),
        (many_roots, "makes anchors of 65 roots; at most 64 maps are read"),
        (long_way, "more than 100 nodes before way100 change nothing"),
        (no_epsilon, "norm_eps is nan"),
        (no_scale, "model.std must be positive and finite"),
        (many_digits, "does not fit our network, nothing was read (1 differences)"),
    ],
)
def test_graphs_that_would_take_long_or_make_no_sense(
    files: dict[str, Path], tmp_path: Path, change: Callable[[GraphDef, dict[str, NodeDef]], object], message: str
) -> None:
    path = changed_graph(files["graph.pb"].read_bytes(), tmp_path / "odd.pb", change)
    with pytest.raises(UserError, match=rf"odd\.pb.*{re.escape(message)}"):
        read_frozen_graph(path)


def test_numbers_of_a_tflite_file_that_do_not_fit_each_other(files: dict[str, Path], tmp_path: Path) -> None:
    """Neither scales nor a bias are stretched over values that they are not for."""
    tflite = pytest.importorskip("tflite")
    good, path = files["quantised.tflite"].read_bytes(), tmp_path / "odd.tflite"
    graph = tflite.Model.GetRootAs(good).Subgraphs(0)
    depthwise, linear = graph.Operators(1), graph.Operators(graph.OperatorsLength() - 1)
    changed = bytearray(good)
    quantization = graph.Tensors(depthwise.Inputs(1)).Quantization()  # of weights [1, 3, 3, C]
    at = quantization._tab.Vector(quantization._tab.Offset(8)) - 4
    assert changed[at : at + 4] == (1).to_bytes(4, "little")
    changed[at] = 5
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"odd\.tflite is a damaged .* has 5 scales and 1 zero"):
        read_tflite(path)
    changed = bytearray(good)
    weight = graph.Tensors(depthwise.Inputs(1))
    at = weight._tab.Vector(weight._tab.Offset(4)) - 4
    assert changed[at : at + 4] == (4).to_bytes(4, "little")
    changed[at] = 200
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"odd\.tflite is a damaged .* has 200 dimensions"):
        read_tflite(path)
    changed = bytearray(good)
    inputs = depthwise._tab.Vector(depthwise._tab.Offset(6))
    changed[inputs + 8 : inputs + 12] = linear.Inputs(2).to_bytes(4, "little")
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"odd\.tflite: tensor\d+ has 8 outputs and a bias of shape \[3\]"):
        read_tflite(path)


def test_label_files_that_unpack_to_much_are_not_read_whole(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "bomb.tflite"
    path.write_bytes(files["quantised.tflite"].read_bytes())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.txt", b"\n" * (64 << 20))
        archive.writestr("good.txt", b"x\ny\nz\n")
    assert read_tflite(path)[1].class_names == ("x", "y", "z")
    path.write_bytes(path.read_bytes().replace(b"x\ny\nz\n", b"?").replace(b"PK\x03\x04", b"PK\x03\x05"))
    with pytest.raises(UserError, match=r"bomb\.tflite: the label files packed in it are damaged"):
        read_tflite(path)


def test_a_checkpoint_of_another_version_is_told_so(tmp_path: Path) -> None:
    torch.save({"format": "litedet checkpoint", "version": 99, "weights": {}}, tmp_path / "new.pt")
    for read in (read_detector, read_file, load_detector, convert):
        with pytest.raises(UserError, match=r"new\.pt has checkpoint format 99, this version of the project reads"):
            read(tmp_path / "new.pt")
