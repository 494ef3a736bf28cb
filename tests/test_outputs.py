"""No command writes over what it reads. Run: pytest tests/test_outputs.py"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from backbones.errors import UserError
from detection.cli import convert, convert_weights
from detection.cli import eval as eval_command
from detection.cli import video as video_command
from detection.cli.outputs import refuse_overwrites


def test_other_names_of_a_file(tmp_path: Path) -> None:
    read = tmp_path / "a.json"
    read.write_text("a")
    (tmp_path / "folder").mkdir()
    hard, soft, ahead = tmp_path / "hard.json", tmp_path / "soft.json", tmp_path / "ahead.json"
    os.link(read, hard)
    soft.symlink_to(read)
    ahead.symlink_to(tmp_path / "not there yet.json")
    for path in (read, hard, soft, tmp_path / "folder" / ".." / "a.json"):
        with pytest.raises(UserError, match=r"--json .* is the file of --annotations; it would be overwritten"):
            refuse_overwrites({"--annotations": str(read)}, {"--json": path})
    with pytest.raises(UserError, match=r"--out and --json are the same file"):
        refuse_overwrites({}, {"--out": ahead, "--json": tmp_path / "not there yet.json"})
    with pytest.raises(UserError, match=r"--json .* is a folder"):
        refuse_overwrites({}, {"--json": tmp_path})
    refuse_overwrites(
        {"--source": "0", "the checkpoint": "ssdlite", "--annotations": read, "none": None},
        {"--json": tmp_path / "b.json", "--out": None, "--predictions": ahead},
    )


def test_files_of_a_folder(tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    image = images / "sub" / "a.jpg"
    image.write_bytes(b"a")
    (images / "figures.json").write_text("of the run before")
    hard, soft = tmp_path / "hard.json", tmp_path / "soft.json"
    os.link(image, hard)
    soft.symlink_to(image)
    for path in (image, hard, soft):
        with pytest.raises(UserError, match=r"is the file .*sub/a\.jpg of --images"):
            refuse_overwrites({"--images": images}, {"--json": path})
    refuse_overwrites({"--images": images}, {"--json": images / "figures.json", "--out": images / "new.jpg"})


def _eval(folder: Path, image: Path) -> list[tuple[list[str], Path]]:
    checkpoint, annotations = folder / "best.pt", folder / "annotations.json"
    common = [str(checkpoint), "--annotations", str(annotations), "--images", str(image.parent)]
    return [
        ([*common, option, str(path)], path)
        for option in ("--json", "--predictions")
        for path in (checkpoint, annotations, image)
    ]


def _video(folder: Path, image: Path) -> list[tuple[list[str], Path]]:
    checkpoint = folder / "best.pt"
    common = [str(checkpoint), "--source", str(image)]
    return [([*common, "--json", str(path)], path) for path in (checkpoint, image)]


def _voc(folder: Path, image: Path) -> list[tuple[list[str], Path]]:
    names, xml = folder / "names.txt", folder / "xml" / "a.xml"
    common = ["voc", "--annotations", str(xml.parent), "--images", str(image.parent), "--list", str(names)]
    return [([*common, "--out", str(path)], path) for path in (names, xml, image)]


def _yolo(folder: Path, image: Path) -> list[tuple[list[str], Path]]:
    names, label = folder / "names.txt", folder / "labels" / "a.txt"
    common = ["yolo", "--labels", str(label.parent), "--images", str(image.parent), "--names", str(names)]
    return [([*common, "--out", str(path)], path) for path in (names, label, image)]


def _weights(folder: Path, image: Path) -> list[tuple[list[str], Path]]:
    path = folder / "w.safetensors"
    return [([str(path), str(path)], path)]


@pytest.mark.parametrize(
    ("main", "cases"),
    [
        (eval_command.main, _eval),
        (video_command.main, _video),
        (convert.main, _voc),
        (convert.main, _yolo),
        (convert_weights.main, _weights),
    ],
    ids=["eval", "video", "voc", "yolo", "weights"],
)
def test_every_command(
    main: Callable[[list[str]], object],
    cases: Callable[[Path, Path], list[tuple[list[str], Path]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = tmp_path / "images" / "a.jpg"
    for argv, path in cases(tmp_path, image):
        path.parent.mkdir(exist_ok=True)
        image.parent.mkdir(exist_ok=True)
        path.write_text("precious")
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2
        assert "it would be overwritten" in capsys.readouterr().err
        assert path.read_text() == "precious"


def test_two_outputs_of_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = str(tmp_path / "same.json")
    (tmp_path / "a.json").write_text(json.dumps({}))
    with pytest.raises(SystemExit):
        eval_command.main(
            ["b.pt", "--annotations", str(tmp_path / "a.json"), "--images", ".", "--json", same, "--predictions", same]
        )
    assert "--json and --predictions are the same file" in capsys.readouterr().err
