#!/usr/bin/env bash
# The whole test suite on a fresh machine: environment, ruff, mypy, pytest. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh" test,plots,fast,export

ruff check .
ruff format --check .
mypy
# Two processes, one torch thread each: tests are many and small.
OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile "$@"
