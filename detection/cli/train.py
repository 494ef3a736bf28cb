"""Train a detector.

$ litedet train finetune:detector --data.train.annotations FILE --data.train.images DIR
    --data.val.annotations FILE --data.val.images DIR --weights FILE --run-dir RUN
$ torchrun --nproc-per-node 8 -m detection.cli.train coco:ssdlite_mnv2_320 --data.root COCO_DIR
"""

import sys
from collections.abc import Sequence

from backbones.errors import UserError
from detection.cli.recipes import load_config
from detection.engine.loop import TrainResult, train
from detection.engine.plain import to_plain
from detection.engine.runtime import TRAINING_STOPPED, main_errors, open_runtime
from detection.training.config import DetectionConfig
from detection.training.task import DetectionTask


@main_errors(stopped=TRAINING_STOPPED)
def main(argv: Sequence[str] | None = None) -> TrainResult:
    config = load_config(sys.argv[1:] if argv is None else argv, __doc__ or "")
    if not isinstance(config, DetectionConfig):
        raise UserError(f"this recipe gives a {type(config).__name__}; tools/train_det.py needs a DetectionConfig")
    config.validate()
    with open_runtime(config.train.device, config.train.num_threads) as runtime:
        task = DetectionTask(config, runtime)
        result = train(task, config.train, config.run_dir, runtime, to_plain(config))
    if runtime.is_main:
        print(f"best AP {result.best_metric:.3f} in epoch {result.best_epoch}: {result.best_path}")
    return result


if __name__ == "__main__":  # torchrun -m
    main()
