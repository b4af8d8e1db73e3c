"""Is the data what the experiment's figures will claim to be measured on?

    python -m stoa_jax.data.check --config=configs/retrieval.py:msrvtt [--data-dir=DIR]
        [--manual-dir=DIR [--detections=PATH]] [--trained-on=SET:SPLIT,…] [--out=DIR]

For the configuration's sets and splits: published and found counts, missing videos and detections,
unreadable files, clips of the evaluation that also stand in the training list, statistics of
captions and objects, and a contact sheet as PNG. With --manual-dir the published files are looked
at too, before or after a build. --trained-on names sets of an earlier stage.

Exit code 0: figures on this data are comparable. 1: they are not, and the reason is printed.
2: nothing could be checked.
"""

import argparse
import sys
from collections.abc import Sequence

from stoa_jax.data.check.report import show
from stoa_jax.data.check.run import PROBE, SAMPLE, check
from stoa_jax.errors import UserError


def _load_config(argv: list[str]):
    """The configuration of --config and --config.KEY=VALUE."""
    from absl import flags
    from ml_collections import config_flags

    # ml_collections looks for --config.KEY=VALUE in sys.argv, whatever is parsed.
    before, sys.argv = sys.argv, ["check", *argv]
    known = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, "The experiment.", flag_values=known)
    try:
        known(sys.argv)
        if holder.value is None:
            raise UserError("--config is missing; for example --config=configs/retrieval.py:msrvtt")
        return holder.value
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise UserError(f"{' '.join(argv)}: {' '.join(str(error).split())[:300]}") from None
    finally:
        sys.argv = before


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stoa_jax.data.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", help="where the built sets are; else the configuration's")
    parser.add_argument("--manual-dir", help="the published files, to be checked too")
    parser.add_argument("--detections", help="with --manual-dir: the file or directory of objects")
    parser.add_argument("--trained-on", default="", metavar="SET:SPLIT,…")
    parser.add_argument("--sample", type=int, default=SAMPLE, help="clips a split for statistics")
    parser.add_argument("--probe", type=int, default=PROBE, help="videos to open; 0: none")
    parser.add_argument("--out", help="for the sheets and check.json; else DATA_DIR/check")
    argv = list(sys.argv[1:] if argv is None else argv)
    known, rest = parser.parse_known_args(argv)
    try:
        report = check(
            _load_config(rest),
            data_dir=known.data_dir,
            manual_dir=known.manual_dir,
            detections=known.detections,
            trained_on=[t for t in known.trained_on.split(",") if t],
            sample=max(1, known.sample),
            probe=max(0, known.probe),
            out=known.out,
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(show(report))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
