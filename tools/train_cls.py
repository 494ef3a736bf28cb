"""Train a classifier; its backbone is what train_det.py --weights takes. The same as ``litedet train-cls``."""

from detection.cli.train_cls import main

if __name__ == "__main__":
    main()
