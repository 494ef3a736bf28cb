"""Watch a detector on a video, a camera, a stream or a folder of images. The same as ``litedet video``."""

from detection.cli.predict import main

if __name__ == "__main__":
    main()
