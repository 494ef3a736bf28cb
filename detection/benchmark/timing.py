"""Two sides in turn, and the row that comes of it."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

SETTLE_SECONDS = 0.01  # threads keep spinning for some milliseconds after their work; not at the other side's cost


@dataclass(kw_only=True, slots=True)
class Comparison:
    """One row of the result.

    Attributes:
        name: what was measured.
        peer: what it was measured against.
        ours, theirs: medians, in ``unit``.
        ratio: ours over theirs; below 1 we are ahead.
        bar: the ratio that the project asks for on two cores, None where it asks for none.
        spread: quartiles of the ratios of neighbouring runs.
        unit: of the medians.
        runs: of each side.
    """

    name: str
    peer: str
    ours: float
    theirs: float
    ratio: float
    bar: float | None
    spread: tuple[float, float]
    unit: str = "ms"
    runs: int = 1


def interleave(sides: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Milliseconds of each run of each side; the sides take turns, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warm_up, rounds):
        for name, run in sides.items():
            settled = time.perf_counter() + SETTLE_SECONDS
            while (start := time.perf_counter()) < settled:  # not asleep: the processor would have to wake up again
                pass
            run()
            if number >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def compare(
    name: str, peer: str, ours: Sequence[float], theirs: Sequence[float], bar: float | None, unit: str = "ms"
) -> Comparison:
    """Medians and their ratio of runs that took turns."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return Comparison(
        name=name,
        peer=peer,
        ours=statistics.median(ours),
        theirs=statistics.median(theirs),
        ratio=statistics.median(ours) / statistics.median(theirs),
        bar=bar,
        spread=(ratios[len(ratios) // 4], ratios[(3 * len(ratios) - 1) // 4]),
        unit=unit,
        runs=len(ours),
    )


def row(comparison: Comparison) -> str:
    """A comparison for people."""
    low, high = comparison.spread
    verdict = ""
    if comparison.bar is not None:
        verdict = f"  bar {comparison.bar:.2f} {'reached' if comparison.ratio <= comparison.bar else 'missed'}"
    return (
        f"{comparison.name:<28} {comparison.ours:>9.2f} {comparison.unit:<2}  {comparison.peer:<25} "
        f"{comparison.theirs:>9.2f} {comparison.unit:<2}  ratio {comparison.ratio:.3f} ({low:.3f} to {high:.3f}, "
        f"{comparison.runs} runs){verdict}"
    )
