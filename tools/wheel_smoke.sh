#!/bin/sh
# Builds the wheel and tries it in an empty virtual environment: imports, native parts, the CLI, one answer over HTTP.
# The wheel takes what `make build` compiled (build/{wheel_tag}, where pyproject.toml has it). Usage: wheel_smoke.sh VENV_BIN
set -eu
bin="$(cd "$1" && pwd)"
root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$root"
PATH="$bin:$PATH" "$bin/python" -m build --wheel --no-isolation --outdir "$work/dist" . > "$work/build.log" 2>&1 || { tail -n 60 "$work/build.log"; exit 1; }
wheel=$(ls "$work"/dist/*.whl)
echo "built $(basename "$wheel") ($(du -k "$wheel" | cut -f1) KiB)"
"$bin/python" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check --no-compile "${TORCH:-torch==2.13.0}"
"$work/venv/bin/pip" install -q --disable-pip-version-check --no-compile "$wheel"
cd "$work"   # away from the sources: only what is in the wheel counts
"$work/venv/bin/python" "$root/tools/wheel_smoke.py" "$work/venv/bin/tokenrelay"
echo "wheel smoke test: 1 passed, 0 failed"
