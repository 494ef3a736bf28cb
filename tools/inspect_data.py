"""Look at the images of a training as its network gets them. The same as ``litedet inspect``."""

from detection.cli.inspect import main

if __name__ == "__main__":
    main()
