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

# Each file in a process of its own: compiled code and the native libraries of the backends (ONNX Runtime, OpenVINO) that one
# file loads cannot bring down the tests of another, and what ends a process is known by its file.
failed=""
for file in tests/test_*.py; do
    echo "== pytest $file $*"
    status=0
    pytest -q "$file" "$@" || status=$?
    # 5: none of the file's tests was chosen by the options
    [ "$status" = 0 ] || [ "$status" = 5 ] || failed="$failed $file (status $status)"
done
[ -z "$failed" ] || fail "tests failed in:$failed"
