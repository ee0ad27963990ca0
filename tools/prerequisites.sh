#!/bin/sh
# Names what is missing before anything is built, in plain words. Usage: prerequisites.sh PYTHON [tests]
python="$1"
missing=0
say() { echo "tokenrelay: $1" >&2; missing=1; }
command -v "$python" >/dev/null 2>&1 || say "no Python found as '$python'. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3.11 ..."
if command -v "$python" >/dev/null 2>&1; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    say "$("$python" --version) is too old: Python 3.11 or newer is needed (make PYTHON=/path/to/python3.11 ...)."
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    say "this Python has no venv module. On Debian and Ubuntu: apt-get install python3-venv"
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')
  [ -f "$header" ] || say "Python's C headers are missing ($header). On Debian and Ubuntu: apt-get install python3-dev"
fi
cxx="${CXX:-c++}"
if ! command -v "$cxx" >/dev/null 2>&1; then
  say "no C++ compiler found as '$cxx'. Install g++ 12 or newer (apt-get install g++), or name one: CXX=/path/to/g++ make ..."
elif ! echo 'int main() { return []<class T>(T x) { return x; }(0); }' | "$cxx" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null; then
  say "$("$cxx" --version | head -n 1) does not compile C++20. Install g++ 12 or newer."
fi
if [ "${2:-}" = tests ]; then
  command -v spin >/dev/null 2>&1 || say "no spin found; tests/model explores the ownership of KV with it. On Debian and Ubuntu: apt-get install spin"
  browser=""
  for name in chromium-headless-shell chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" >/dev/null 2>&1 && browser="$name"
  done
  [ -n "$browser" ] || say "no Chromium found; tests/router/test_page.py opens the router's page in it. On Debian: apt-get install chromium-headless-shell"
fi
exit $missing
