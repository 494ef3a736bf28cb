"""Train a detector.

$ litedet train finetune:detector --data.train.annotations FILE --data.train.images DIR
    --data.val.annotations FILE --data.val.images DIR --weights FILE --run-dir RUN
$ torchrun --nproc-per-node 8 -m detection.cli.train coco:ssdlite_mnv2_320 --data.root COCO_DIR
$ litedet train RUN

The last one goes on with the run in that folder, with the settings that it was started with.
"""

import sys
from collections.abc import Sequence

from detection.cli.recipes import load_config
from detection.engine.files import open_run
from detection.engine.loop import TrainResult, train
from detection.engine.runtime import TRAINING_STOPPED, main_errors, open_runtime
from detection.training.config import DetectionConfig
from detection.training.task import DetectionTask


@main_errors(stopped=TRAINING_STOPPED)
def main(argv: Sequence[str] | None = None) -> TrainResult:
    config: DetectionConfig = load_config(
        sys.argv[1:] if argv is None else argv, __doc__ or "", DetectionConfig, DetectionConfig.from_plain
    )
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
