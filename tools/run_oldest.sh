#!/usr/bin/env bash
# The tests on the oldest packages that setup.cfg allows, in an environment of its own (.venv-oldest). Options go to pytest:
#   bash tools/run_oldest.sh -m "not slow"
# The gate runs a part of them (run_tests.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
prepare_oldest
export PATH="$PWD/$VENV/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A deprecated call inside of an old package is no news: warnings are errors on the newest set alone.
exec pytest -q -n "${PYTEST_XDIST_AUTO_NUM_WORKERS:-2}" --dist loadfile --max-worker-restart 0 -W default "$@"
