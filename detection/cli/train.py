"""Train a detector.

$ litedet train finetune:detector --data.train.annotations FILE --data.train.images DIR
    --data.val.annotations FILE --data.val.images DIR --weights FILE --run-dir RUN
$ torchrun --nproc-per-node 8 -m detection.cli.train coco:ssdlite_mnv2_320 --data.root COCO_DIR
$ litedet train RUN

The last one goes on with the run in that folder, with the settings that it was started with.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from detection.cli.recipes import ask_for_recipe, load_config
from detection.engine.errors import TRAINING_STOPPED, main_errors

if TYPE_CHECKING:
    from detection.engine.loop import TrainResult


@main_errors(stopped=TRAINING_STOPPED)
def main(argv: Sequence[str] | None = None) -> TrainResult:
    arguments = sys.argv[1:] if argv is None else argv
    ask_for_recipe(arguments, __doc__ or "", runs=True)

    from detection.engine.files import open_run  # here, because torch takes seconds to load
    from detection.engine.loop import train
    from detection.engine.runtime import open_runtime
    from detection.training.config import DetectionConfig
    from detection.training.task import DetectionTask

    config: DetectionConfig = load_config(arguments, __doc__ or "", DetectionConfig, DetectionConfig.from_plain)
    config.validate()
    with (
        open_runtime(config.train.device, config.train.num_threads) as runtime,
        open_run(config, runtime, DetectionConfig.from_plain) as run,
    ):
        task = DetectionTask(config, runtime, run.adopted)
        result = train(task, config.train, run, runtime)
    if runtime.is_main:
        print(f"best AP {result.best_metric:.3f} in epoch {result.best_epoch}: {result.best_path}")
    return result


if __name__ == "__main__":  # torchrun -m
    main()
