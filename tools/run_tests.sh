#!/usr/bin/env bash
# The gate, the same for a person and for CI: format, lint, types, import contract, tests. Options go to pytest:
#   bash tools/run_tests.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
prepare_environment dev
export PATH="$PWD/.venv/bin:$PATH"

step() {
    echo "== $*"
    "$@" || fail "$1 found something (see above)"
}

step ruff format --check .
step ruff check .
step mypy
step lint-imports
step pytest "$@"
