"""Run `tfds build` for our data sets.

    python -m stoa_jax.data.tfds_build msrvtt/qa --manual_dir=DIR

Takes all flags of `tfds build`. The program `tfds` of TFDS 4.9.10 starts only if apache-beam and
mlcroissant are installed, even for commands that do not need them; this one needs neither.
"""

import sys
from collections.abc import Sequence

from absl import app
from tensorflow_datasets.scripts.cli import build, cli_utils

FLAGS = ("--imports=stoa_jax.data.builders", "--file_format=array_record")


def main(argv: Sequence[str] | None = None) -> None:
    """Run TFDS's command with our builders imported."""
    parse = cli_utils.make_flags_parser(build.Args, description="tfds build for stoa_jax")
    argv = [*(sys.argv if argv is None else argv), *FLAGS]
    app.run(lambda args: args.execute(), argv=argv, flags_parser=parse)


if __name__ == "__main__":
    main()
