"""Train a detector. The same as ``litedet train``."""

from detection.cli.train import main

if __name__ == "__main__":
    main()
