"""Write curves.png and report.html of a training into its run folder.

$ litedet report RUN

A training does so at its end; this is for one that was stopped, or that goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from detection.engine.errors import main_errors


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    run: tyro.conf.Positional[Path]
    """The folder of a run."""


@main_errors
def main(argv: Sequence[str] | None = None) -> Path:
    config = tyro.cli(ReportConfig, args=sys.argv[1:] if argv is None else argv, description=__doc__)

    from detection.training.run_report import write_run_report  # here, because torch takes seconds to load

    report, curves = write_run_report(config.run)
    print(f"written: {report} and {curves.name}")
    return report


if __name__ == "__main__":
    main()
