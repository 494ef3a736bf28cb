"""The whole chain: one's own images in a VOC folder, a training, an int8 .tflite, and MediaPipe Tasks finds the same objects.

Runs where LiteRT's converter is (see test_litert.py); MediaPipe is in an environment of its own, .venv-mediapipe.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from apart import LITERT_MARKS, python_of, run_python
from torchvision.ops import box_iou

from detection import load_detector
from detection.cli.convert import main as convert
from detection.cli.export import main as export
from detection.cli.train import main as train

pytestmark = LITERT_MARKS

SIDE = 120
# What docs/chain.md shows, with the threshold and json for a test.
MEDIAPIPE = """
import json, sys
import mediapipe as mp
from mediapipe.tasks import python
from mediapipe.tasks.python import vision

options = vision.ObjectDetectorOptions(
    base_options=python.BaseOptions(model_asset_path=sys.argv[1]), score_threshold=0.3, max_results=100
)
with vision.ObjectDetector.create_from_options(options) as detector:
    for path in sys.argv[2:]:
        found = []
        for one in detector.detect(mp.Image.create_from_file(path)).detections:
            box, category = one.bounding_box, one.categories[0]
            corners = [box.origin_x, box.origin_y, box.origin_x + box.width, box.origin_y + box.height]
            found.append([category.category_name, category.score, corners])
        print("found", json.dumps(found))
"""


def draw_voc(folder: Path, count: int, seed: int) -> None:
    """``images/*.jpg`` with red discs and blue squares on a noisy ground, and ``xml/*.xml`` as Pascal VOC has them."""
    generator = np.random.default_rng(seed)
    for part in ("images", "xml"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        image = generator.integers(90, 170, (SIDE, SIDE, 3), dtype=np.uint8)
        objects = ""
        for column in range(2):
            if number % 8 == 7 and column:
                continue  # some images have one object
            radius = int(generator.integers(14, 26))
            x, y = 30 + 60 * column + int(generator.integers(-3, 4)), int(generator.integers(28, SIDE - 28))
            disc = bool(generator.integers(2))
            if disc:
                cv2.circle(image, (x, y), radius, (40, 40, 220), cv2.FILLED)
            else:
                cv2.rectangle(image, (x - radius, y - radius), (x + radius, y + radius), (220, 60, 30), cv2.FILLED)
            corners = {"xmin": x - radius + 1, "ymin": y - radius + 1, "xmax": x + radius + 1, "ymax": y + radius + 1}
            box = "".join(f"<{name}>{value}</{name}>" for name, value in corners.items())
            objects += f"<object><name>{'disc' if disc else 'square'}</name><bndbox>{box}</bndbox></object>"
        cv2.imwrite(str(folder / "images" / f"{number:03d}.jpg"), image)
        size = f"<size><width>{SIDE}</width><height>{SIDE}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{number:03d}.jpg</filename>{size}{objects}</annotation>"
        (folder / "xml" / f"{number:03d}.xml").write_text(text)


def test_from_a_voc_folder_to_mediapipe(tmp_path: Path) -> None:
    python_of("mediapipe")  # skips at once where it is not there
    for name, count in (("train", 192), ("val", 16)):
        folder = tmp_path / name
        draw_voc(folder, count, seed=count)
        convert(["voc", "--annotations", f"{folder}/xml", "--images", f"{folder}/images", "--out", f"{folder}.json"])
    run = tmp_path / "run"
    train(
        [
            "quickstart:detector",
            *(f"--data.train.annotations={tmp_path}/train.json", f"--data.train.images={tmp_path}/train/images"),
            *(f"--data.val.annotations={tmp_path}/val.json", f"--data.val.images={tmp_path}/val/images"),
            *("--model.input-size", "96", "96", "--model.backbone.frozen-stages", "0", "--run-dir", str(run)),
            *("--data.workers", "0", "--train.epochs", "12", "--train.eval-every", "12", "--train.device", "cpu"),
        ]
    )
    file = tmp_path / "detector.tflite"
    result = export(
        [
            *(str(run / "best.pt"), "--to", "litert", "--int8", "--calibration", f"{tmp_path}/train/images"),
            *("--annotations", f"{tmp_path}/val.json", "--images", f"{tmp_path}/val/images", "--out", str(file)),
        ]
    )
    assert result.figure_torch is not None
    assert result.figure_torch > 0.5
    assert result.drop is not None
    assert result.drop < 0.05

    images = sorted((tmp_path / "val" / "images").iterdir())
    done = run_python("mediapipe", "-c", MEDIAPIPE, file, *images)
    assert done.returncode == 0, done.stderr
    answers = [
        json.loads(line.removeprefix("found ")) for line in done.stdout.splitlines() if line.startswith("found ")
    ]
    assert len(answers) == len(images)
    wanted = matched = 0
    for ours, theirs in zip(load_detector(file, score_threshold=0.4)(images), answers, strict=True):
        wanted += len(ours)
        if not theirs:
            continue
        ious = box_iou(ours.boxes, torch.tensor([box for *_, box in theirs], dtype=torch.float32))
        same = torch.tensor([[name == other for other, *_ in theirs] for name in ours.names()]).reshape(ious.shape)
        matched += int(((ious >= 0.8) & same).any(1).sum())
    assert wanted > 20  # of 30 objects
    assert matched >= 0.95 * wanted
    # And no others.
    assert sum(score > 0.5 for answer in answers for _, score, _ in answer) <= wanted
