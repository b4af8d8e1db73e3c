"""`stoa report WORKDIR`: write one HTML file about a run."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def register(subparsers: Any) -> None:
    """Add the command `report`."""
    parser = subparsers.add_parser(
        "report",
        help="write one HTML file with a run's curves, results, examples, matches and cost",
        description="Write one self-contained HTML file about a run: curves, results beside their "
        "baselines, good and bad examples, matches of trajectories and actions, and cost.",
    )
    parser.add_argument("workdir", type=Path, help="work directory of a run")
    parser.add_argument("--output", type=Path, help="output file (default: WORKDIR/report.html)")
    parser.add_argument(
        "--clips", type=int, default=6, help="clips shown with their matches (default: 6)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the report and print its path."""
    from stoa_jax.report import write_report

    path, notes = write_report(arguments.workdir, arguments.output, clips=arguments.clips)
    if arguments.json:
        print(json.dumps({"report": str(path), "notes": notes}, ensure_ascii=False))
        return 0
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(path)
    return 0
