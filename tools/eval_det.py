"""Measure a detector's COCO AP on images with a COCO json. The same as ``litedet eval``."""

from detection.cli.eval import main

if __name__ == "__main__":
    main()
