#!/usr/bin/env bash
# From nothing to a trained and evaluated model, a table and a page, on two CPU cores.
# Arguments are passed to `python -m stoa_jax.demo`; --help lists them.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup requirements.txt
exec "$PYTHON" -m stoa_jax.demo "$@"
