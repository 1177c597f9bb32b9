#!/usr/bin/env bash
# Sourced by launch/run.sh and tests/run.sh: a .venv in the checkout with what pyproject.toml asks for.
# Usage: source launch/setup.sh [EXTRA]     EXTRA: "" or "test"
# MEDVLP_ACCELERATOR=cuda13|tpu picks the wheels of an accelerator, PYTHON another interpreter.
# MEDVLP_VENV names another folder than .venv; MEDVLP_VENV=none takes the python on PATH as it is, as in a container image.

if [ "${MEDVLP_VENV:-}" = none ]; then return 0; fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extras="$(printf '%s,%s' "${1:-}" "${MEDVLP_ACCELERATOR:-}" | sed 's/^,*//; s/,*$//')"
venv="${MEDVLP_VENV:-$root/.venv}"

find_python() {
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"; return
    fi
  done
  echo "medvlp: needs Python 3.11 or newer; set PYTHON to one." >&2
  return 2
}

case "${MEDVLP_ACCELERATOR:-}" in
  "" | cuda13 | tpu) ;;
  *) echo "medvlp: MEDVLP_ACCELERATOR must be cuda13 or tpu, got '$MEDVLP_ACCELERATOR'." >&2; exit 2 ;;
esac

# The stamp names what was installed; the second start compares it and goes on within a second.
stamp="$venv/.medvlp-${extras:-base}"
wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
installed() { for s in "$@"; do [ "$(cat "$s" 2>/dev/null)" = "$wanted" ] && return 0; done; return 1; }
# Whatever was installed with the test extra serves a run as well.
if ! installed "$stamp" "$venv/.medvlp-test${MEDVLP_ACCELERATOR:+,$MEDVLP_ACCELERATOR}"; then
  python="$(find_python)" || exit 2
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  echo "medvlp: installing into ${venv#"$PWD"/} (once; a few minutes) ..." >&2
  # The constraints were resolved on Python 3.11 for the CPU; elsewhere the ranges of pyproject.toml decide.
  constraints=()
  if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
      && [ -z "${MEDVLP_ACCELERATOR:-}" ]; then
    constraints=(--constraint "$root/constraints.txt")
  fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    ${constraints[@]+"${constraints[@]}"} --editable "$root${extras:+[$extras]}" >&2 || {
    echo "medvlp: the installation failed; nothing else was done." >&2; exit 2; }
  echo "$wanted" > "$stamp"
fi
export PATH="$venv/bin:$PATH"
