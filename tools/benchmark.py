"""Time LiteDet and its peers in turn. The same as ``litedet benchmark``."""

from detection.cli.benchmark import main

if __name__ == "__main__":
    main()
