"""What is particular to a format: Core ML's structure, compiled packages, int8 of ExecuTorch, LiteDet with suppression inside."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_export import check_layouts, images_of, made, needs, scene  # noqa: F401  a fixture
from test_litedet import small_litedet
from test_predictor import small_detector

from backbones.errors import UserError
from detection import load_detector
from detection.cli.export import main
from detection.export.coreml import NOT_RUN, put_folder
from detection.export.run import ExportJob, export
from detection.inference.exported import beside, open_exported
from detection.inference.predictor import Predictor
from detection.inference.runners import build_runner
from detection.weights.native import save_detector


def test_thresholds_of_each_class_travel(scene: Path, tmp_path: Path) -> None:  # noqa: F811
    model, info = small_detector()
    save_detector(tmp_path / "d.safetensors", model, replace(info, thresholds=(0.4, 0.6)))
    job = ExportJob(checkpoint=tmp_path / "d.safetensors", to="torch", out=tmp_path / "d.pt2", images=scene / "images")
    export(job, say=lambda line: None)
    detector = load_detector(tmp_path / "d.pt2")
    assert detector.info.thresholds == (0.4, 0.6)
    for found in detector(images_of(scene)):
        limits = torch.tensor(detector.info.thresholds)[found.labels]
        assert (found.scores >= limits).all()


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for name, text in (("new", "2"), ("model", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(text)
    put_folder(tmp_path / "new", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "a").read_text() == "2"


@pytest.mark.parametrize(("to", "other"), [("openvino", ".param"), ("ncnn", ".xml")])
def test_weights_of_another_format_are_not_written_over(to: str, other: str, tmp_path: Path) -> None:
    (tmp_path / f"d{other}").touch()
    out = tmp_path / ("d.xml" if to == "openvino" else "d.param")
    job = ExportJob(checkpoint="d", to=to, out=out, images=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"has its weights in d\.bin, too"):
        job.validate()


@pytest.mark.slow
def test_core_ml_is_checked_and_not_run(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    needs("coreml")
    import coremltools

    out = scene / "coreml.mlpackage"
    arguments = [str(scene / "d.safetensors"), "--to", "coreml", "--images", str(scene / "images"), "--out", str(out)]
    for _ in range(2):  # the second replaces the first
        main(arguments)
        printed = capsys.readouterr().out
        assert NOT_RUN in printed
        assert "structure checked: RGB 96x128 in" in printed
    model = coremltools.models.MLModel(str(out), skip_model_load=True)
    assert json.loads(model.user_defined_metadata["litedet"])["names"] == ["cat", "dog"]
    with pytest.raises(UserError, match="runs on Apple's systems alone"):
        load_detector(out)


@pytest.mark.slow
def test_a_compiled_package_says_the_same(scene: Path) -> None:  # noqa: F811
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("needs a C++ compiler")
    out = scene / "compiled.pt2"
    job = ExportJob(checkpoint=scene / "d.safetensors", to="torch", out=out, images=scene / "images", compiled=True)
    result = export(job, say=lambda line: None)
    assert beside(out).name == "compiled.pt2.json"
    assert result.chosen.difference is not None
    check_layouts(load_detector(out).runner)
    beside(out).unlink()
    with pytest.raises(UserError, match="no record of LiteDet"):
        open_exported(out)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["executorch", "onnx", "openvino"])
def test_eight_bits_are_close(to: str, scene: Path) -> None:  # noqa: F811
    needs(to)  # type: ignore[arg-type]
    suffix = {"executorch": ".pte", "onnx": ".onnx", "openvino": ".xml"}[to]
    job = ExportJob(
        checkpoint=scene / "d.safetensors",
        to=to,  # type: ignore[arg-type]
        out=scene / f"{to}8{suffix}",
        images=scene / "images",
        raw=True,
        int8=True,
        calibration=scene / "images",
        keep_float=("model.backbone.stem.conv",),
    )
    result = export(job, say=lambda line: None)
    assert result.record.kept_float == ("model.backbone.stem.conv",)
    assert open_exported(job.out).record.precision == "int8"
    assert made(scene, to, True).chosen.size > 2 * result.chosen.size  # type: ignore[arg-type]
    if to == "onnx":
        onnx = pytest.importorskip("onnx")
        graph = onnx.load(job.out).graph
        made_by = {output: node.op_type for node in graph.node for output in node.output}
        stems = [node for node in graph.node if node.op_type == "Conv"]
        rounded = [made_by.get(node.input[1]) == "DequantizeLinear" for node in stems]
        assert rounded == [False] + [True] * (len(stems) - 1)


@pytest.mark.slow
def test_litedet_suppresses_in_onnx(scene: Path, tmp_path: Path) -> None:  # noqa: F811
    needs("onnx")
    model, info = small_litedet()
    save_detector(tmp_path / "d.safetensors", model, info)
    out = tmp_path / "d.onnx"
    export(
        ExportJob(checkpoint=tmp_path / "d.safetensors", to="onnx", out=out, images=scene / "images"),
        say=lambda line: None,
    )
    ours = Predictor(build_runner(model), replace(info, postprocess=replace(info.postprocess, score_threshold=0.3)))
    found = load_detector(out, score_threshold=0.3)(images_of(scene))
    expected = ours(images_of(scene))
    assert sum(map(len, expected)) > 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.boxes, other.boxes[:100], atol=0.05, rtol=0)
        assert torch.equal(one.labels, other.labels[:100])
