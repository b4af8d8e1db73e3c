#!/usr/bin/env bash
# Sets everything up and runs the tests on two cores. Arguments are passed to pytest.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup requirements-dev.txt
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
