"""What became of a training, from the files in its run folder: ``curves.png`` and ``report.html``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from backbones.errors import UserError
from backbones.state import write_whole
from detection import pages
from detection.engine.chart import figure_png
from detection.engine.log import read_record

_log = logging.getLogger(__name__)

_BEST = "\N{NO-BREAK SPACE}(best)"
_NOT_LOSSES = ("positives", "positives_per_object")


def write_run_report(folder: Path) -> tuple[Path, Path]:
    """Write ``curves.png`` and ``report.html`` of a run, finished, stopped or still going on.

    Args:
        folder: of the run, with the ``metrics.jsonl`` of a training of whatever kind.

    Returns:
        Both paths, the page first.

    Raises:
        UserError: no run, or one without a whole epoch.
        OSError: a file cannot be written.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} holds no run: there is no {path.name}; give the folder of a training (--run-dir)")
    records = [record for record in map(read_record, path.read_text().splitlines()) if record is not None]
    if not records:
        raise UserError(f"{folder}: no epoch of this run is done yet; there is nothing to report")
    panels = _panels(records)
    page = pages.page(f"Training {folder.name}", *_sections(folder, records, panels)).encode()
    report, curves = folder / "report.html", folder / "curves.png"
    write_whole(curves, figure_png([*panels.values()]))
    write_whole(report, page)
    return report, curves


def try_run_report(folder: Path) -> None:
    """``write_run_report`` at the end of a training, which is not lost if its report fails: that is a warning."""
    try:
        report, _ = write_run_report(folder)
    except (UserError, OSError, ImportError) as error:
        _log.warning("no report of this run: %s", error)
    else:
        _log.info("curves and report: %s", report)


def _panels(records: Sequence[Mapping[str, Any]]) -> dict[str, Callable[[Any], None]]:
    """What draws each curve, by its title."""
    losses = [name for name in records[0]["losses"] if name not in _NOT_LOSSES]
    metrics = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    shown = [name for name in metrics if not name.startswith("AR")]
    curves: dict[str, Mapping[str, Sequence[tuple[int, float]]]] = {
        "losses": {name: _points(records, "losses", name) for name in losses},
        "validation": {name: _points(records, "metrics", name) for name in shown},
        "learning rate": {name: _points(records, "lr", name) for name in records[0]["lr"]},
    }
    for name in _NOT_LOSSES:
        if any(name in record["losses"] for record in records):
            curves[name.replace("_", " ")] = {name: _points(records, "losses", name)}
    norms = [(record["epoch"], record["gradient_norm"]) for record in records if "gradient_norm" in record]
    if norms:
        curves["gradient norm before clipping"] = {"norm": norms}
    waits = [(record["epoch"], record["data_wait_share"]) for record in records]
    curves["share of time waiting for data"] = {"wait": waits}
    return {title: _panel(title, lines) for title, lines in curves.items()}


def _points(records: Sequence[Mapping[str, Any]], part: str, name: str) -> list[tuple[int, float]]:
    """(epoch, value) where there is one; -1 stands for a COCO figure that cannot be taken."""
    return [(r["epoch"], r[part][name]) for r in records if name in r[part] and r[part][name] != -1]


def _panel(title: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for name, points in curves.items():
            if points:
                marker = "o" if len(points) < 30 else None
                axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=3)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        if len(curves) > 1 and any(curves.values()):
            axes.legend(fontsize=8)

    return draw


def _sections(
    folder: Path, records: Sequence[Mapping[str, Any]], panels: Mapping[str, Callable[[Any], None]]
) -> list[pages.Html]:
    best = next((record for record in reversed(records) if record["best"]), None)
    seconds = sum(record["seconds"] for record in records)
    cards = [(f"{records[-1]['epoch']}", "epochs"), (f"{records[-1]['step']:,}", "steps"), (_clock(seconds), "time")]
    if best is not None:
        name = next(iter(best["metrics"]))
        cards += [(f"{best['metrics'][name]:.3f}", f"best {name}"), (f"{best['epoch']}", "its epoch")]
    names = list(records[-1]["losses"])
    metrics = list(dict.fromkeys(name for record in records for name in record["metrics"]))[:3]
    rows = [
        [
            f"{record['epoch']}{_BEST if record['best'] else ''}",
            *(record["losses"].get(name) for name in names),
            *(record["metrics"].get(name) for name in metrics),
            f"{record['images_per_second']:.1f}",
            f"{100 * record['data_wait_share']:.0f} %",
        ]
        for record in reversed(records)
    ]
    sections = [
        pages.tiles(cards),
        pages.section(
            "Curves",
            pages.paragraph("Means over each epoch; those of each step are in TensorBoard.", class_="dim"),
            # One image for each, so that they stand below each other, and can be read, on a telephone.
            pages.gallery(
                pages.png_figure(figure_png([draw], size=(3.9, 3.0)), f"{title} over the epochs")
                for title, draw in panels.items()
            ),
        ),
        pages.section("Epochs, the last first", pages.table(["epoch", *names, *metrics, "images/s", "waiting"], rows)),
    ]
    config = folder / "config.json"
    if config.is_file():
        settings = pages.fold("config.json, as adopted", pages.code(_indented(config), block=True))
        sections.append(pages.section("Settings", settings))
    return sections


def _indented(path: Path) -> str:
    try:
        return json.dumps(json.loads(path.read_text()), indent=2)
    except ValueError:
        return path.read_text(errors="replace")


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{seconds / 60:.1f} min"
