"""Write curves.png and report.html of a training into its run folder. The same as ``litedet report``."""

from detection.cli.report import main

if __name__ == "__main__":
    main()
