"""Detections of very many images, as Parquet shards. The same as ``litedet predict``."""

from detection.cli.predict import main

if __name__ == "__main__":
    main()
