#!/usr/bin/env bash
# Sets up, then runs the test suite without its slow part: ./run_tests.sh [pytest arguments]; -m slow runs that part.
set -euo pipefail
cd "$(dirname "$0")"
./setup.sh
# environment processes and torch share the cores: waiting threads must not spin
# two files at a time: a test that starts a script waits for imports, on one core
OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -q -n 2 --dist loadgroup -m "not slow" "$@"
