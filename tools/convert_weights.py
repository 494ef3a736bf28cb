"""Convert weights of other libraries to ours, and classifiers to theirs. The same as ``litedet convert-weights``."""

from detection.cli.convert_weights import main

if __name__ == "__main__":
    main()
