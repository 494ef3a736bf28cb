"""Make a file of a detector that phones, boards, recorders and servers run. The same as ``litedet export``."""

from detection.cli.export import main

if __name__ == "__main__":
    main()
