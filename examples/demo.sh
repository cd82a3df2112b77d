#!/usr/bin/env bash
# Install streamfisher into .venv and analyse the small trained model that ships with it. Arguments go to the demo.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[plots]'
exec .venv/bin/streamfisher demo "$@"
