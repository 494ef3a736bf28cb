"""Curves as PNG, drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from backbones.state import write_whole


def figure_png(
    draws: Sequence[Callable[[Any], None]], columns: int = 3, size: tuple[float, float] = (5.33, 3.6)
) -> bytes:
    """A PNG with a panel for each function, which is given matplotlib's axes. No display is needed.

    Args:
        draws: a function for each panel.
        columns: panels in a row.
        size: (width, height) of a panel in units of 110 pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, because it takes half a second
    from matplotlib.figure import Figure

    columns = min(columns, len(draws))
    rows = -(-len(draws) // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, draw in enumerate(draws, 1):
        draw(figure.add_subplot(rows, columns, number))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def save_figure(path: Path, draws: Sequence[Callable[[Any], None]], columns: int = 3) -> None:
    """``figure_png`` in a file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, figure_png(draws, columns))
