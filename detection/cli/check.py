"""Check a dataset for faults before training on it.

$ litedet check TRAIN.json VAL.json --images DIR --report REPORT.html
$ litedet check Annotations --images JPEGImages --list trainval.txt test.txt
$ litedet check labels --images images --names data.yaml --fix CLEAN.json
$ litedet check TRAIN.json --images DIR --recipe finetune:detector --suggest
$ litedet check VAL.json --images DIR --checkpoint RUN/best.pt --report REPORT.html

Exit status: 0 without errors (warnings do not count), 1 with errors, 2 where the check itself could not be made.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from backbones.errors import UserError
from detection.cli.outputs import refuse_overwrites
from detection.engine.errors import main_errors

if TYPE_CHECKING:
    from detection.checks.check import Checked
    from detection.inference.predictor import Predictor
    from detection.models.detector import DetectorConfig
    from detection.pages import Html


@dataclass(kw_only=True, slots=True)
class CheckConfig:
    data: tyro.conf.Positional[tuple[Path, ...]]
    """The datasets, the training split first: COCO json files, or folders of Pascal VOC's XML files or YOLO's text files.
    Several are checked for images that they share, too."""
    images: tuple[Path, ...] = ()
    """The folder of the images of each, or one for all. None given: the records of COCO files are checked alone."""
    names: Path | None = None
    """YOLO and VOC: the class names, a text file with one a line or a data.yaml."""
    list: tuple[Path, ...] = ()
    """VOC: for each split a text file with the names of its images (VOC's ImageSets/Main/*.txt). Several lists of one folder
    are as many splits."""
    pixels: bool = True
    """Open and decode every image. --no-pixels looks at the records alone, and whether the files are there."""
    json: Path | None = None
    """Write every finding here, for programs."""
    report: Path | None = None
    """Write an HTML page with images of the faults here; of a folder, index.html in it."""
    fix: tuple[Path, ...] = ()
    """Write a clean COCO json here, one for each split, and say what was changed."""
    recipe: str | None = None
    """Tell how the detector of this recipe fits the objects of the first split: FILE:FUNCTION, as finetune:detector."""
    suggest: bool = False
    """Look for settings of the recipe (finetune:detector if none is given) that fit better, and print them as litedet train
    takes them."""
    checkpoint: str | None = None
    """Look for suspected label errors with this detector: a training's best.pt, a .safetensors, or a published name."""
    device: str = "auto"
    """Where that detector runs: auto, cpu, cuda, cuda:N or mps."""
    fail_on: Literal["error", "warning", "never"] = "error"
    """What makes the exit status 1."""
    workers: int | None = None
    """Processes that read images; 0 reads them in this one. None: one for each core."""

    def validate(self) -> None:
        """Raises UserError for values that make no sense, alone or together."""
        if not self.data:
            raise UserError("nothing to check: give a COCO json, or a folder of VOC's or YOLO's files")
        num_splits = max(len(self.data), len(self.list))
        if self.fix and len(self.fix) != num_splits:
            raise UserError(f"--fix has {len(self.fix)} files for {num_splits} splits; give one for each")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"--workers must not be negative, got {self.workers}")

    @property
    def page(self) -> Path | None:
        """The file of the report."""
        if self.report is None or self.report.suffix.lower() in (".html", ".htm"):
            return self.report
        return self.report / "index.html"


@main_errors
def main(argv: Sequence[str] | None = None) -> Checked:
    config = tyro.cli(CheckConfig, args=sys.argv[1:] if argv is None else argv, description=__doc__)
    config.validate()
    inputs: dict[str, str | Path | None] = {f"the dataset {path}": path for path in config.data}
    inputs |= {f"--images {path}": path for path in config.images} | {f"--list {path}": path for path in config.list}
    outputs: dict[str, Path | None] = {"--json": config.json, "--report": config.page}
    refuse_overwrites(inputs | {"--names": config.names}, outputs | {f"--fix {path}": path for path in config.fix})

    from detection.checks.check import check_splits  # here, because they load torch
    from detection.checks.mend import write_mended
    from detection.checks.report import report_page
    from detection.checks.sources import read_splits

    splits = read_splits(config.data, config.images, names=config.names, lists=config.list)
    if config.checkpoint is not None and splits[0].image_dir is None:
        raise UserError("--images is missing: the folder of the images that the detector of --checkpoint is to see")
    fit = _Fitting(config)
    checked = check_splits(splits, pixels=config.pixels, workers=config.workers)
    sections = fit(checked)
    print(checked)
    if fit.text:
        print(fit.text)
    if config.json is not None:
        _write_json(config.json, checked.to_plain())
        print(f"findings written to {config.json}")
    if config.page is not None:
        _write(config.page, report_page(checked, sections).encode())
        print(f"report written to {config.page}")
    for split, out in zip(splits, config.fix, strict=False):
        lines = write_mended(checked, split, out)
        print(f"clean copy of {split.name} written to {out}: {'; '.join(lines) or 'nothing changed'}")
    faults = {"error": checked.num_errors, "warning": len(checked.findings), "never": 0}[config.fail_on]
    if faults:
        raise SystemExit(1)
    return checked


class _Fitting:
    """What a check does with a detector; it is read before images are, so that a mistake in its name shows at once."""

    def __init__(self, config: CheckConfig) -> None:
        self.text = ""
        self.model: DetectorConfig | None = None
        self.detector: Predictor | None = None
        self.threshold, self.suggest, self.command = 0.5, config.suggest, ""
        if config.recipe is not None or config.suggest:
            from detection.cli.recipes import read_recipe
            from detection.training.config import DetectionConfig

            name = config.recipe or "finetune:detector"
            recipe = read_recipe(name)()
            if not isinstance(recipe, DetectionConfig):
                raise UserError(f"--recipe {name} gives a {type(recipe).__name__}; a detector's is needed")
            self.model, self.command = recipe.model, f"litedet train {name}"
            matcher = getattr(recipe.loss, "matcher", None)
            self.threshold = 0.5 if matcher is None else matcher.iou_threshold
        if config.checkpoint is not None:
            from detection.checks.labels import load_for_labels

            self.detector = load_for_labels(config.checkpoint, config.device)
            self.model = self.model or self.detector.info.model

    def __call__(self, checked: Checked) -> list[Html]:
        """Adds suspected label errors to the findings; the sections of the page on the fit."""
        if self.detector is not None:
            from detection.checks.labels import find_label_errors

            for split in checked.splits:
                checked.add(find_label_errors(checked, split, self.detector))
        if self.model is None:
            return []
        from detection.checks.fit import fit_detector, suggest
        from detection.checks.fit_report import fit_section, fit_text

        split = checked.splits[0]
        fit = fit_detector(split, self.model, self.threshold)
        suggestion = suggest(split, self.model, self.threshold) if self.suggest else None
        self.text = fit_text(fit, suggestion, self.command)
        return [fit_section(checked, split, fit, suggestion, self.command)]


def _write_json(path: Path, content: object) -> None:
    import msgspec

    _write(path, msgspec.json.format(msgspec.json.encode(content), indent=1))


def _write(path: Path, content: bytes) -> None:
    from backbones.state import write_whole

    write_whole(path, content)


if __name__ == "__main__":
    main()
