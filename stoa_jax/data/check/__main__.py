"""Check that an experiment's data is complete and comparable with published results.

    python -m stoa_jax.data.check --config=configs/retrieval.py:msrvtt [--data-dir=DIR]
        [--manual-dir=DIR [--detections=PATH]] [--trained-on=SET:SPLIT,…] [--out=DIR]

For the configuration's sets and splits, it reports published and found counts, missing videos and
detections, unreadable files, evaluation clips that are also in the training list, statistics of
captions and objects, and a contact sheet as PNG. With --manual-dir it also checks the published
files, before or after a build. --trained-on names sets of an earlier stage.

Exit code 0: metrics on this data are comparable. 1: they are not, and the reason is printed.
2: nothing could be checked.
"""

import argparse
import sys
from collections.abc import Sequence

from absl import flags

from stoa_jax import command_line, config_flags
from stoa_jax.data.check.report import show
from stoa_jax.data.check.run import PROBE, SAMPLE, check
from stoa_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m stoa_jax.data.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data-dir", help="directory of built data sets (default: the configuration's)"
    )
    parser.add_argument("--manual-dir", help="directory of published files, to check them too")
    parser.add_argument("--detections", help="with --manual-dir: file or directory of detections")
    parser.add_argument("--trained-on", default="", metavar="SET:SPLIT,…")
    parser.add_argument("--sample", type=int, default=SAMPLE, help="clips per split for statistics")
    parser.add_argument("--probe", type=int, default=PROBE, help="videos to open, 0 for none")
    parser.add_argument(
        "--out", help="directory for sheets and check.json (default: DATA_DIR/check)"
    )
    known, rest = parser.parse_known_args(argv)

    def run() -> int:
        c, unknown = config_flags.parse(flags.FlagValues(), ["check", *rest])
        if unknown:
            raise UserError(f"{unknown[0]!r} is not a flag; --help lists the flags")
        report = check(
            c,
            data_dir=known.data_dir,
            manual_dir=known.manual_dir,
            detections=known.detections,
            trained_on=[t for t in known.trained_on.split(",") if t],
            sample=max(1, known.sample),
            probe=max(0, known.probe),
            out=known.out,
        )
        print(show(report))
        return command_line.FAILED if report.problems else command_line.DONE

    return command_line.run(run, expected=(UserError, OSError))


if __name__ == "__main__":
    sys.exit(main())
