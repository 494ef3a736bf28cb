"""Train a detector.

$ litedet train finetune:detector --data.train.annotations FILE --data.train.images DIR
    --data.val.annotations FILE --data.val.images DIR --weights FILE --run-dir RUN
$ torchrun --nproc-per-node 8 -m detection.cli.train coco:ssdlite_mnv2_320 --data.root COCO_DIR
$ litedet train RECIPE ... --find-lr
$ litedet train RUN

--find-lr trains 150 steps with a growing learning rate, writes lr_finder.png and lr_finder.json into the run folder and
suggests a rate; no training begins.
The last one goes on with the run in that folder, with the settings that it was started with.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from backbones.errors import UserError
from detection.cli.recipes import ask_for_recipe, load_config
from detection.engine.errors import TRAINING_STOPPED, main_errors

if TYPE_CHECKING:
    from detection.engine.loop import TrainResult


@main_errors(stopped=TRAINING_STOPPED)
def main(argv: Sequence[str] | None = None) -> TrainResult:
    arguments = list(sys.argv[1:] if argv is None else argv)
    finds_lr = "--find-lr" in arguments
    arguments = [argument for argument in arguments if argument != "--find-lr"]
    ask_for_recipe(arguments, __doc__ or "", runs=True)

    from detection.engine.files import open_run  # here, because torch takes seconds to load
    from detection.engine.loop import train
    from detection.engine.runtime import open_runtime
    from detection.training.config import DetectionConfig
    from detection.training.run_report import try_run_report
    from detection.training.task import DetectionTask

    config: DetectionConfig = load_config(arguments, __doc__ or "", DetectionConfig, DetectionConfig.from_plain)
    config.validate()
    if finds_lr:
        _find_lr(config)
        raise SystemExit(0)
    with (
        open_runtime(config.train.device, config.train.num_threads) as runtime,
        open_run(config, runtime, DetectionConfig.from_plain) as run,
    ):
        task = DetectionTask(config, runtime, run.adopted)
        result = train(task, config.train, run, runtime)
    if runtime.is_main:
        try_run_report(config.run_dir)
        print(f"best AP {result.best_metric:.3f} in epoch {result.best_epoch}: {result.best_path}")
    return result


def _find_lr(config: Any) -> None:
    from detection.engine.lr_range import find_lr
    from detection.engine.runtime import open_runtime
    from detection.training.task import DetectionTask

    if config.train.resume:
        raise UserError("--find-lr is for a training that has not begun: give a recipe, not the folder of a run")
    with open_runtime(config.train.device, config.train.num_threads) as runtime:
        found = find_lr(DetectionTask(config, runtime), config.train, runtime)
    data, picture = found.write(config.run_dir)
    end = "where the loss blew up" if found.diverged else "and the loss did not blow up: take the suggestion with care"
    print(f"{len(found.losses)} steps, learning rates from {found.rates[0]:.2g} to {found.rates[-1]:.2g}, {end}")
    print(f"suggestion: --train.optim.lr {found.suggestion:.2g} (the recipe has {config.train.optim.lr:g})")
    print(f"written: {picture} and {data.name}")


if __name__ == "__main__":  # torchrun -m
    main()
