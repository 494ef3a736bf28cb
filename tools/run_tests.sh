#!/usr/bin/env bash
# The gate, the same for a person and for CI: format, lint, types, import contract, tests. Options go to pytest:
#   bash tools/run_tests.sh -m "not slow"
#   bash tools/run_tests.sh --cov                                 and count what the tests run: 95 % of lines and branches at least
#   bash tools/run_tests.sh -n 0 -x --pdb tests/test_boxes.py    in one process, for a debugger
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
prepare_environment dev
export PATH="$PWD/$VENV/bin:$PATH"

step() {
    echo "== $*"
    "$@" || fail "$1 found something (see above)"
}

step ruff format --check .
step ruff check .
step mypy
step lint-imports

# A whole run makes the environments of what goes without ours, once; one with options takes those that are there. Most are made
# while the other tests run: those of LiteRT's converter and of MediaPipe (LITEDET_LITERT=0 leaves them out), and that of the oldest
# packages (LITEDET_OLDEST=0).
whole=$([ $# -gt 0 ] && [ "$*" != --cov ] || echo yes)
litert=$([ -z "$whole" ] || [ "${LITEDET_LITERT:-1}" = 0 ] || echo yes)
oldest=$([ -z "$whole" ] || [ "${LITEDET_OLDEST:-1}" = 0 ] || echo yes)
if [ -n "$whole" ]; then
    prepare_apart bundle-onnx without numpy opencv-python-headless onnxruntime
    said="$(mktemp)"
    set -m # a process group of its own, which can be ended whole
    {
        if [ -n "$litert" ]; then
            prepare_apart litert with -e '.[litert]'
            prepare_apart mediapipe without mediapipe
            prepare_apart bundle-litert without numpy opencv-python-headless ai-edge-litert
        fi
        if [ -n "$oldest" ]; then
            (unset PYTHON && prepare_oldest) || echo ".venv-oldest could not be made (see above); its tests are left out" >&2
        fi
    } >"$said" 2>&1 </dev/null &
    installing=$!
    set +m
    trap 'kill -- -$installing 2>/dev/null || true; rm -f "$said"' EXIT # the status is what it was: the group may have ended
fi

# A process for each core, up to four (each needs about 2 GB), with one thread each: more threads than cores wait for each other.
# The tests of a file stay in one process, which shares what they export and train. Where a process dies, pytest names the test
# (and would, unless told otherwise, run the file that killed it again and again).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTEST_XDIST_AUTO_NUM_WORKERS="${PYTEST_XDIST_AUTO_NUM_WORKERS:-$(python -c '
import os
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
print(min(cores, 4))')}"
step pytest -q -n auto --dist loadfile --max-worker-restart 0 "$@"

if [ -n "$whole" ]; then
    wait "$installing" || true # it says itself what could not be made
    cat "$said"
fi

# What needs LiteRT's converter, in its environment. Plugins that packages bring along for pytest stay out: anyio's, older there,
# warns as it loads, and warnings are errors.
if [ -n "$litert" ] && [ -e .venv-litert/installed ]; then
    PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 step .venv-litert/bin/python -m pytest -q -p xdist -n auto --dist loadfile \
        --max-worker-restart 0 tests/test_litert.py tests/test_chain.py
fi

# What calls the packages that have lower bounds, on these; names of files in tests/, test_NAME.py.
oldest_tests=(imports.py command.py config.py readme.py # every module, tyro, msgspec
    coco.py dataset.py checkpoint.py # numpy, opencv, pillow, safetensors, filelock
    train_det.py eval_det.py evaluation.py # torch, tensorboard, matplotlib, pycocotools, faster-coco-eval
    predictor.py video.py predict_folder.py # av, supervision, pyarrow
    backends.py) # onnx, onnxruntime, onnxscript, openvino
if [ -n "$oldest" ] && [ -e .venv-oldest/installed-dev ]; then
    step bash tools/run_oldest.sh -m "not slow or oldest" "${oldest_tests[@]/#/tests/test_}"
fi
