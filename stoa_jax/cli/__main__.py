"""`python -m stoa_jax.cli` is `stoa`."""

import sys

from stoa_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
