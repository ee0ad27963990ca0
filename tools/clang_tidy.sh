#!/bin/sh
# Runs clang-tidy with .clang-tidy (use after move is an error) over libscheduler, or over the given files.
# Usage: clang_tidy.sh BIN BUILD_DIR [FILE...]     BIN: the virtual environment's bin; BUILD_DIR: has, or gets, compile_commands.json
set -eu
bin=$(cd "$1" && pwd)
build=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
if [ ! -f "$build/compile_commands.json" ]; then
  echo "clang-tidy: configuring $build"
  PATH="$bin:$PATH" "$bin/cmake" -S "$root" -B "$build" -G Ninja -DTOKENRELAY_TESTS=ON -DPython_EXECUTABLE="$bin/python" \
    -Dpybind11_DIR="$("$bin/python" -m pybind11 --cmakedir)" >/dev/null
fi
[ $# -gt 0 ] || set -- "$root"/libscheduler/src/*.cpp

# clang takes the newest GCC directory it finds, which need not have a C++ library: name the one that compiles the project.
compiler="${CXX:-c++}"
gcc=""
if "$compiler" -v 2>&1 | grep -q '^gcc version'; then
  gcc="--extra-arg=--gcc-install-dir=$(dirname "$("$compiler" -print-libgcc-file-name)")"
fi
# xargs answers 123 when any of its commands failed.
printf '%s\n' "$@" | tr '\n' '\0' |
  xargs -0 -n 1 -P 2 "$bin/clang-tidy" --quiet -p "$build" --config-file="$root/.clang-tidy" $gcc --extra-arg=-Wno-unknown-warning-option
