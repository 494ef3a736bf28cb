#!/usr/bin/env bash
# The tests on the oldest packages that setup.cfg allows, in an environment of its own (.venv-oldest). Options go to pytest:
#   bash tools/run_oldest.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
VENV=.venv-oldest CONSTRAINTS=.venv-oldest.txt
"$(find_python)" tools/constraints.py oldest >"$CONSTRAINTS" || fail "the lower bounds of setup.cfg cannot be read"
prepare_environment dev
export PATH="$PWD/$VENV/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A deprecated call inside of an old package is no news: warnings are errors on the newest set alone.
exec pytest -q -n "${PYTEST_XDIST_AUTO_NUM_WORKERS:-2}" --dist loadfile --max-worker-restart 0 -W default "$@"
