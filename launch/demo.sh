#!/usr/bin/env bash
# The shipped model on fresh clips, then a small one trained from scratch; a page and a table.
# On two CPU cores. Arguments go to `python -m stoa_jax.demo`; --help lists them.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup requirements.txt
exec "$PYTHON" -m stoa_jax.demo "$@"
