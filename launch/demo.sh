#!/usr/bin/env bash
# Runs the shipped model on fresh clips, then trains a small one from scratch, and writes a page and
# a table. Two CPU cores are enough. Arguments go to `python -m stoa_jax.demo`; --help lists them.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup requirements.txt
exec "$PYTHON" -m stoa_jax.demo "$@"
