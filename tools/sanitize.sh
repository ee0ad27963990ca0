#!/bin/sh
# Builds the C++ test programs with sanitizers and runs them: AddressSanitizer and UndefinedBehaviorSanitizer over all, the
# fuzz target over its corpus and random changes included; ThreadSanitizer over what has threads.
# Usage: sanitize.sh BIN BUILD_DIR     BIN: the virtual environment's bin; below BUILD_DIR each sanitizer has a folder
set -eu
bin=$(cd "$1" && pwd)
build=$2
root=$(cd "$(dirname "$0")/.." && pwd)
PATH="$bin:$PATH"

# run NAME SANITIZERS TARGETS TESTS
run() {
  cmake -S "$root" -B "$build/$1" -G Ninja -DCMAKE_BUILD_TYPE=None -DTOKENRELAY_TESTS=ON -DTOKENRELAY_SANITIZE="$2" \
    -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" -DPython_EXECUTABLE="$bin/python" >"$build.$1.log" ||
    { cat "$build.$1.log"; exit 1; }
  # shellcheck disable=SC2086
  cmake --build "$build/$1" --target $3
  ctest --test-dir "$build/$1" -j 2 -R "$4" --no-tests=error --output-on-failure
}

mkdir -p "$build"
# The pool of threads keeps its workers for the life of the process: that is no leak.
export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=second_deadlock_stack=1
run address address,undefined test_programs '^(scheduler|kernels)\.(test_|random_driver|fuzz_replay)'
run thread thread 'scheduler_test_threads kernels_test_pool' '^(scheduler\.test_threads|kernels\.test_pool)$'
