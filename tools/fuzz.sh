#!/bin/sh
# Fuzzes the scheduler with libFuzzer (Debian: apt-get install clang, llvm for the coverage), with AddressSanitizer, UBSan
# and all invariants on. New inputs go to BUILD_DIR/corpus; one that breaks something is kept as BUILD_DIR/crash-*, and
# `scheduler_fuzz_replay --transcript FILE` (in the native build) writes it as a transcript.
# Usage: fuzz.sh BUILD_DIR SECONDS
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=$1
seconds=$2
clang=""
for name in ${CLANGXX:-clang++ clang++-19 clang++-18 clang++-17 clang++-16 clang++-15 clang++-14}; do
  if command -v "$name" >/dev/null 2>&1; then clang=$name; break; fi
done
if [ -z "$clang" ]; then
  echo "fuzz: no clang++ found (Debian: apt-get install clang llvm); without it: scheduler_fuzz_replay --seconds $seconds" >&2
  exit 1
fi
mkdir -p "$build/corpus"
sources="$root/libscheduler/src/*.cpp $root/libscheduler/fuzz/target.cpp"
flags="-std=c++20 -g1 -I$root/libscheduler/include -I$root/libscheduler/src -I$root/libscheduler/tests -I$root/libscheduler/fuzz"

echo "fuzz: building with $clang"
# shellcheck disable=SC2086
"$clang" $flags -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all $sources -o "$build/fuzz"
"$build/fuzz" "$build/corpus" "$root/libscheduler/fuzz/corpus" -len_control=0 -max_len=1600 -timeout=60 \
  -max_total_time="$seconds" -print_final_stats=1 -artifact_prefix="$build/crash-" 2>"$build/fuzz.log" ||
  { tail -n 60 "$build/fuzz.log" >&2; exit 1; }
grep -E '^(Done|stat::)' "$build/fuzz.log"

# Which lines of the scheduler the corpus runs.
version=$("$clang" -dumpversion | cut -d. -f1)
for suffix in "" "-$version"; do
  command -v "llvm-cov$suffix" >/dev/null 2>&1 && command -v "llvm-profdata$suffix" >/dev/null 2>&1 || continue
  # shellcheck disable=SC2086
  "$clang" $flags -O1 -fprofile-instr-generate -fcoverage-mapping $sources "$root/libscheduler/fuzz/replay.cpp" -o "$build/coverage"
  LLVM_PROFILE_FILE="$build/profile" "$build/coverage" "$build/corpus" "$root/libscheduler/fuzz/corpus"
  "llvm-profdata$suffix" merge -o "$build/profile.merged" "$build/profile"
  "llvm-cov$suffix" report "$build/coverage" -instr-profile="$build/profile.merged" \
    -ignore-filename-regex='(fuzz|tests)/' | cut -c1-200
  break
done
