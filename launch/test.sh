#!/usr/bin/env bash
# Runs the tests on two cores, setting everything up first. Arguments go to pytest.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup requirements-dev.txt
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
