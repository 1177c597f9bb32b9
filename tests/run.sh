#!/usr/bin/env bash
# Install with the test extra (once) and run the tests.
#
#   bash tests/run.sh                 what every change must pass, some 20 minutes on two cores
#   bash tests/run.sh --slow          also what takes longer: kill and resume, real data end to end
#   bash tests/run.sh tests/losses    pytest arguments go through
#
# MEDVLP_TEST_DATA names the folder with small real data; tests that need it skip where it is unset.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh test

markers="not slow and not gpu and not network"
arguments=()
for argument in "$@"; do
  case "$argument" in
    --slow) markers="not gpu and not network" ;;
    --gpu) markers="gpu"; export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}" JAX_DISABLE_MOST_OPTIMIZATIONS=0 ;;
    *) arguments+=("$argument") ;;
  esac
done
# Files stay whole, so that what a file trains once serves all its tests.
exec python -m pytest -m "$markers" -n "${MEDVLP_TEST_WORKERS:-2}" --dist loadfile ${arguments[@]+"${arguments[@]}"}
