#!/usr/bin/env bash
# Install streamfisher with everything its tests need into .venv-test, and run the tests.
# Arguments go to pytest. With CI=true, or --all as the first argument, the slow tests run too. Files of tests are shared
# among as many processes as there are processors (4 at most; `-n 0`: none), each of one thread.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv-test/bin/python ] || "$python" -m venv .venv-test
.venv-test/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
marks=()
if [ "${1:-}" = "--all" ]; then
    shift
    marks=(-m "slow or not slow")
elif [ "${CI:-}" = "true" ]; then
    marks=(-m "slow or not slow")
fi
.venv-test/bin/ruff check .
.venv-test/bin/ruff format --check .
.venv-test/bin/lint-imports --no-logo --no-cache
.venv-test/bin/mypy
export OMP_NUM_THREADS=1
exec .venv-test/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "${marks[@]}" "$@"
