"""Look at the images of a training as its network gets them, with the anchors that answer for each object.

$ litedet inspect finetune:detector --data.train.annotations FILE --data.train.images DIR --out DIR
$ litedet inspect RUN --out DIR
$ litedet inspect RUN/best.pt --out DIR

It takes what litedet train takes, and writes DIR/augmented.jpg and DIR/assignment.jpg. Of a run, its best weights (or those of
the checkpoint that is named) decide where predictions matter. Besides: --out DIR (where to write; "inspect" by default),
--num-images N (16), --epoch N (0, whose changes of the images are drawn).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from backbones.errors import UserError
from detection.cli.recipes import ask_for_recipe, load_config
from detection.engine.errors import main_errors


@main_errors
def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    ask_for_recipe(arguments, __doc__ or "", runs=True)
    parser = argparse.ArgumentParser(prog=Path(sys.argv[0]).name, add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("inspect"))
    parser.add_argument("--num-images", type=int, default=16)
    parser.add_argument("--epoch", type=int, default=0)
    own, rest = parser.parse_known_args(arguments)
    if own.num_images < 1 or own.epoch < 0:
        raise UserError(f"--num-images is at least 1 and --epoch at least 0, got {own.num_images} and {own.epoch}")
    if own.out.is_file():
        raise UserError(f"--out {own.out} is a file; give a folder")

    from detection.checks.sheets import assign, assignment_sheet, augmented_sheet, describe_assignment, training_batch
    from detection.data.coco import CocoIndex
    from detection.training.config import DetectionConfig
    from detection.training.task import build_model
    from detection.weights.native import read_detector

    config: DetectionConfig = load_config(
        rest, __doc__ or "", DetectionConfig, DetectionConfig.from_plain, goes_on=False
    )
    config.validate()
    index = CocoIndex.read(config.data.split("train")[0])
    if config.train.resume:
        run = Path(rest[0])
        model, info = read_detector(run / "best.pt" if run.is_dir() else run)
        index = index.with_categories(np.array(info.category_ids), info.class_names)
    else:
        config, model = build_model(config, index.class_names, None)
    config.model = model.config
    batch = training_batch(index, config, own.num_images, own.epoch)
    if not len(batch):
        raise UserError(f"not one image can be read; the first: {batch.skipped[0]}")
    assigned = assign(batch, model, config)
    print(describe_assignment(batch, assigned))
    for name, sheet in (
        ("augmented.jpg", augmented_sheet(batch, index.class_names)),
        ("assignment.jpg", assignment_sheet(batch, assigned)),
    ):
        _write_jpeg(own.out / name, sheet)
        print(f"written to {own.out / name}")


def _write_jpeg(path: Path, image: NDArray[np.uint8]) -> None:
    from backbones.state import write_whole

    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])
    write_whole(path, encoded.tobytes())


if __name__ == "__main__":
    main()
