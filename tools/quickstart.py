"""Draw a dataset, train a detector on it, measure it, and watch it on a video. The same as ``litedet quickstart``."""

from detection.cli.quickstart import main

if __name__ == "__main__":
    main()
