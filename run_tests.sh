#!/usr/bin/env bash
# Sets up, then runs the test suite without its slow part: ./run_tests.sh [pytest arguments]
#   ./run_tests.sh -m slow     runs the slow part
set -euo pipefail
cd "$(dirname "$0")"
./setup.sh
# Env processes and torch share the cores, so waiting threads must not spin.
# Two files run at a time, because a test that starts a script waits for imports on one core.
OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -q -n 2 --dist loadgroup -m "not slow" "$@"
