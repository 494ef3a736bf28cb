"""Time LiteDet and its peers in turn, stage by stage: ours, theirs, ours, theirs, ...

$ litedet benchmark                       every stage, with drawn images; some ten minutes on two cores
$ litedet benchmark --stages predict train --rounds 9
$ litedet benchmark --images DIR --annotations FILE --weights RUN/best.pt
$ litedet benchmark --count               parameters, multiply-adds and activations by part
$ litedet benchmark --scale               what the size of a dataset does to the cost of an image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import cv2
import tyro

from detection.benchmark.config import BenchmarkConfig
from detection.engine.errors import main_errors

if TYPE_CHECKING:
    from detection.benchmark.timing import Comparison


@dataclass(kw_only=True, slots=True)
class BenchmarkResult:
    """What ``benchmark.json`` holds."""

    environment: dict[str, str]
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@main_errors
def main(argv: Sequence[str] | None = None) -> BenchmarkResult:
    config = tyro.cli(BenchmarkConfig, args=argv, description=__doc__)
    config.validate()

    import torch  # here, because it takes seconds to load

    from detection.benchmark import scale
    from detection.benchmark.count import print_counts
    from detection.benchmark.environment import environment
    from detection.benchmark.inputs import find_images

    torch.set_num_threads(config.threads)
    cv2.setNumThreads(config.threads)
    result = BenchmarkResult(environment=environment(config.threads))
    print("\n".join(f"{name}: {value}" for name, value in result.environment.items()), end="\n\n", flush=True)
    if config.count:
        print_counts()
    elif config.scale:
        print(scale.table(scale.measure_scale(config.cache, find_images(config)[0], config.scale_sizes)))
    else:
        _run_stages(config, result)
    return result


def _run_stages(config: BenchmarkConfig, result: BenchmarkResult) -> None:
    from detection.benchmark.chart import draw_chart
    from detection.benchmark.inputs import open_inputs
    from detection.benchmark.stages import STAGES
    from detection.benchmark.timing import row
    from detection.evaluation.table import write_json

    inputs = open_inputs(config)
    result.notes = inputs.notes
    for stage in config.stages:
        for comparison in STAGES[stage](inputs):
            result.comparisons.append(comparison)
            print(row(comparison), flush=True)
        write_json(config.out / "benchmark.json", asdict(result))  # after each: the stages are long
    print("\n".join(result.notes))
    caption = f"cores: {result.environment['cores'].partition(' (')[0]}"
    draw_chart(result.comparisons, config.out / "benchmark.png", caption)
    print(f"\nwritten: {config.out / 'benchmark.json'}, {config.out / 'benchmark.png'}")


if __name__ == "__main__":
    main()
