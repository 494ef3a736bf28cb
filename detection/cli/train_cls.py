"""Train a classifier; its backbone is what a detector's training takes as --weights.

$ litedet train-cls finetune:classifier --data.train DIR --data.val DIR --weights FILE --run-dir RUN
$ torchrun --nproc-per-node 8 -m detection.cli.train_cls imagenet:mobilenetv2 --data.train DIR --data.val DIR
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from detection.cli.recipes import ask_for_recipe, load_config
from detection.engine.errors import TRAINING_STOPPED, main_errors

if TYPE_CHECKING:
    from detection.engine.loop import TrainResult


@main_errors(stopped=TRAINING_STOPPED)
def main(argv: Sequence[str] | None = None) -> TrainResult:
    arguments = sys.argv[1:] if argv is None else argv
    ask_for_recipe(arguments, __doc__ or "", runs=True)

    from detection.classification.config import ClassificationConfig  # here, because torch takes seconds to load
    from detection.classification.task import ClassificationTask
    from detection.engine.files import open_run
    from detection.engine.loop import train
    from detection.engine.plain import from_plain
    from detection.engine.runtime import open_runtime

    def read(plain: Mapping[str, Any]) -> ClassificationConfig:
        return from_plain(plain, ClassificationConfig)

    config: ClassificationConfig = load_config(arguments, __doc__ or "", ClassificationConfig, read)
    config.validate()
    with (
        open_runtime(
            config.train.device, config.train.num_threads, deterministic=config.train.deterministic
        ) as runtime,
        open_run(config, runtime, read) as run,
    ):
        task = ClassificationTask(config, runtime, run.extra)
        result = train(task, config.train, run, runtime)
        if runtime.is_main:
            weights_path = config.run_dir / "backbone.safetensors"
            last = result.metrics
            best = task.save_best(result.best_path, weights_path)
            summary = {"best": best, "last": last, "seconds": result.seconds, "weights": str(weights_path)}
            (config.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            print(f"best epoch {best['epoch']}: top-1 {best['top1']:.4f}, top-5 {best['top5']:.4f}: {weights_path}")
            print(f"last epoch {config.train.epochs}: top-1 {last['top1']:.4f}, top-5 {last['top5']:.4f}")
    return result


if __name__ == "__main__":  # torchrun -m
    main()
