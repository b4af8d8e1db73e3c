#!/usr/bin/env bash
# Sets everything up, and builds the documentation site into docs/_build/html. Warnings are errors.
# The build itself needs no network. Arguments go to sphinx-build.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup requirements-docs.txt
"$PYTHON" -m sphinx --fail-on-warning --keep-going --jobs auto "$@" docs docs/_build/html
echo "Open docs/_build/html/index.html"
