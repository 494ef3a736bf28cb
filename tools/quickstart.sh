#!/usr/bin/env bash
# From nothing to a trained detector: makes the environment, then runs tools/quickstart.py (its options may follow).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
prepare_environment
exec .venv/bin/python tools/quickstart.py "$@"
