"""Convert a dataset to COCO json. The same as ``litedet convert``."""

from detection.cli.convert import main

if __name__ == "__main__":
    main()
