"""A chart of a benchmark's rows."""

from collections.abc import Sequence
from pathlib import Path

from detection.benchmark.timing import Comparison

LONGEST = 1.25  # longer bars end here with an arrow; the peer's have length 1
_BESIDE = 0.7  # text stands right of bars up to here and inside of longer ones


def draw_chart(comparisons: Sequence[Comparison], path: Path, caption: str = "") -> None:
    """Bars of the time (or memory) that we take of what the peer takes, whatever the ratio.

    Args:
        comparisons: a bar each, from the top.
        path: the image to write.
        caption: what the axis says beside its unit.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = comparisons[::-1]
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [1.0] * len(rows), color="#e3e3e3", label="the peer")
    axes.barh(places, [min(one.ratio, LONGEST) for one in rows], color="#2f6db3", height=0.55, label="LiteDet")
    aim = None
    for place, one in zip(places, rows, strict=True):
        if one.ratio > LONGEST:
            axes.plot(LONGEST, place, ">", color="#2f6db3", markersize=9)
        if one.bar is not None and one.bar <= LONGEST:
            (aim,) = axes.plot([one.bar] * 2, [place - 0.4, place + 0.4], color="#c0392b", linewidth=1.5)
        end = max(min(one.ratio, LONGEST), one.bar or 0)
        if end <= _BESIDE:
            axes.text(end + 0.015, place, _text(one), va="center", fontsize=8)
        else:
            axes.text(0.015, place, _text(one), va="center", fontsize=8, color="white" if one.ratio > 0.6 else "black")
    axes.set_yticks(places, [f"{one.name.strip()}\nvs {one.peer}" for one in rows], fontsize=8)
    axes.set_xlim(0, LONGEST + 0.05)
    axes.set_xlabel("share of the peer's time or memory" + (f"; {caption}" if caption else ""), fontsize=8)
    if aim is not None:
        aim.set_label("aim")
    axes.legend(loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _text(one: Comparison) -> str:
    ours, theirs = (f"{value:.0f}" if value >= 1000 else f"{value:.3g}" for value in (one.ours, one.theirs))
    return f"{ours} of {theirs} {one.unit}: {one.ratio:.2f}" if one.ratio < 100 else f"{ours} of {theirs} {one.unit}"
