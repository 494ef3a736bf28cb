"""What is particular to a format: Core ML's structure, compiled packages, int8 of ExecuTorch, LiteDet with suppression inside."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from test_export import check_layouts, images_of, made, needs, scene  # noqa: F401  a fixture
from test_litedet import small_litedet
from test_predictor import small_detector

from backbones.errors import UserError
from detection import load_detector
from detection.benchmark.config import BenchmarkConfig
from detection.benchmark.inputs import open_inputs
from detection.benchmark.stages.exports import exports
from detection.cli.eval import main as eval_det
from detection.cli.export import main
from detection.cli.predict import main as predict
from detection.cli.video import main as watch
from detection.export import table
from detection.export.coreml import NOT_RUN, put_folder
from detection.export.run import ExportJob, export
from detection.inference.exported import SUFFIXES, Format, beside, open_exported
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


@pytest.fixture(scope="module")
def annotated(scene: Path) -> Path:  # noqa: F811
    """A COCO json of the scene's images, an object in each."""
    files = images_of(scene)
    path = scene / "annotations.json"
    content = {
        "images": [{"id": k, "file_name": file.name, "width": 200, "height": 150} for k, file in enumerate(files, 1)],
        "annotations": [
            {"id": k, "image_id": k, "category_id": 1, "bbox": [10, 10, 80, 60], "area": 4800, "iscrowd": 0}
            for k in range(1, len(files) + 1)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    path.write_text(json.dumps(content))
    return path


# Every format that runs is a file like any other to the commands; which library runs it is tested elsewhere.
@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch", "onnx", "ncnn"])
def test_commands_take_an_exported_file(to: Format, scene: Path, annotated: Path, tmp_path: Path) -> None:  # noqa: F811
    needs(to)
    file = str(made(scene, to, True).path)
    data = ("--annotations", str(annotated), "--images", str(scene / "images"))
    ours, torchs = (eval_det([path, *data, "--workers", "0"]) for path in (file, str(scene / "d.safetensors")))
    assert ours.num_detections > 0
    assert ours.figures == pytest.approx(torchs.figures, abs=1e-3)
    watch([file, "--source", str(scene / "images"), "--json", str(tmp_path / "v.jsonl"), "--score", "0.1"])
    frames = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert len(frames) == 4
    if importlib.util.find_spec("pyarrow") is not None:
        shards = tmp_path / "shards"
        predict([file, "--source", str(scene / "images"), "--out", str(shards), "--workers", "0"])
        assert list(shards.glob("*.parquet"))
    config = BenchmarkConfig(exported=(Path(file),), rounds=2, cache=tmp_path / "cache")
    (row,) = exports(open_inputs(config))
    assert row.name == f"predict, {Path(file).name}"
    assert row.peer == "torchvision, float"
    assert row.bar is None


def _stop() -> NoReturn:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_the_table_has_every_format(
    scene: Path,  # noqa: F811
    annotated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table, "SUFFIXES", {".pt2": "torch", ".tflite": "litert"})
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    out = tmp_path / "all"
    arguments = [str(scene / "d.safetensors"), "--to", "all", "--images", str(scene / "images"), "--out", str(out)]
    job_of_table: dict[str, Any] = {
        "checkpoint": scene / "d.safetensors",
        "to": "torch",
        "out": out / "x.pt2",
        "images": scene / "images",
    }
    row_of = table._row
    main([*arguments, "--annotations", str(annotated)])
    rows = json.loads((out / "exports.json").read_text())["rows"]
    assert [row["format"] for row in rows] == ["torch (checkpoint)", "torch", "litert"]
    assert rows[1]["file"] == "torch_float32.pt2"
    assert rows[1]["drop"] == pytest.approx(0, abs=1e-3)
    assert "pip install 'litedet[litert]'" in rows[2]["note"]
    # Another environment made it; this one keeps what stands there.
    content = json.loads((out / "exports.json").read_text())
    content["rows"][2].update(file="litert_float32.tflite", note="", milliseconds=1.5)
    (out / "exports.json").write_text(json.dumps(content))
    (out / "litert_float32.tflite").touch()
    main([*arguments, "--annotations", str(annotated)])
    assert "| litert | float32 |  | 1.5 |" in (out / "exports.md").read_text()
    # A run that is stopped before it comes to that row loses it no more than one that ends.
    with monkeypatch.context() as stopped:
        stopped.setattr(table, "_row", lambda job, say: _stop() if job.to == "litert" else row_of(job, say))
        with pytest.raises(KeyboardInterrupt):
            table.export_all(ExportJob(**job_of_table, annotations=annotated), out, say=lambda line: None)
    assert "| litert | float32 |  | 1.5 |" in (out / "exports.md").read_text()
    (out / "litert_float32.tflite").unlink()
    main([*arguments, "--annotations", str(annotated)])
    assert "not made: --to litert needs the package litert_torch" in (out / "exports.md").read_text()


@pytest.mark.slow
def test_core_ml_is_checked_and_not_run(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    needs("coreml")
    out = scene / "coreml.mlpackage"
    arguments = [str(scene / "d.safetensors"), "--to", "coreml", "--images", str(scene / "images"), "--out", str(out)]
    for _ in range(2):  # the second replaces the first
        main(arguments)
        printed = capsys.readouterr().out
        assert NOT_RUN in printed
        assert "structure checked: RGB 96x128 in" in printed
    import coremltools  # warns at its first import, which the export hushed

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
    suffix = {kind: ending for ending, kind in SUFFIXES.items()}[to]  # type: ignore[index]
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
    in_float = 4 * sum(parameter.numel() for parameter in small_detector()[0].parameters())
    assert in_float > 1.6 * result.chosen.size  # OpenVINO's file holds its graph as text
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
    ours = Predictor(build_runner(model), replace(info, postprocess=replace(info.postprocess, score_threshold=0.02)))
    found = load_detector(out, score_threshold=0.02)(images_of(scene))
    expected = ours(images_of(scene))
    assert sum(map(len, expected)) > 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.boxes, other.boxes[:100], atol=0.05, rtol=0)
        assert torch.equal(one.labels, other.labels[:100])
