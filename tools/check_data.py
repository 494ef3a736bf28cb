"""Check a dataset for faults before training on it. The same as ``litedet check``."""

from detection.cli.check import main

if __name__ == "__main__":
    main()
