#!/usr/bin/env bash
# Builds the documentation site into docs/_build/html, setting everything up first. Warnings are
# errors; no network is needed after the set-up. Arguments go to sphinx-build.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup requirements-docs.txt
"$PYTHON" -m sphinx --fail-on-warning --keep-going --jobs auto "$@" docs docs/_build/html
echo "Open docs/_build/html/index.html"
