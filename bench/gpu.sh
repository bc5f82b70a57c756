#!/usr/bin/env bash
# Checks, benchmarks and profiles fastdpo on a machine with an NVIDIA GPU; a table comes last.
#
#   bench/gpu.sh                     everything
#   bench/gpu.sh check               the tests of the CUDA ops, and compute-sanitizer on small cases
#   bench/gpu.sh bench               run.py on the loss layer's cases
#   bench/gpu.sh profile             Nsight Compute on the ops' kernels and the library's products
#   bench/gpu.sh blocks              cuda_blocks.py: other cuts into token blocks and vocabulary chunks than the chosen one
#   bench/gpu.sh train               train.py: pairs per second beside TRL's trainer
#
# Needs a python with a CUDA torch, and no network. fastdpo is built in this folder, with g++ and nvcc, if what lies here
# does not load. What may be set:
#
#   OUT=bench/results     where results go; their names begin with the GPU's
#   ARCHIVE=FILE.tgz      all of them in one file, made anew after every step
#   LEVELS="0 1"          of csrc/cuda/level.h; one that was not built counts as a failure
#   CASES="qwen llama"    of the bench stage: tiny qwen llama llama-frozen-cached llama-long
#   BENCH_FLAGS="--rounds 2 --peers floor,fastdpo,liger"       for run.py
#   TRAIN_FLAGS="--data pairs.jsonl --arms trl,fastdpo"        for train.py, which makes pairs up without --data
#   STEP_SECONDS=1800     after which a step is killed
#   PYTHON=python3
#   FASTDPO_COMMIT=...    what results name where this is no git checkout
#
# A step that fails does not stop the next; the exit status is the number of steps that failed. A tool that is missing
# is said to be missing, and counts as a failure.
set -uo pipefail
cd "$(dirname "$0")/.."
case " $* " in
  *" -h "* | *" --help "*)
    sed -n '2,/^set/s/^# \{0,1\}//p' bench/gpu.sh
    exit 0
    ;;
esac
out=${OUT:-bench/results}
python=${PYTHON:-python3}
levels=${LEVELS:-0 1}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0
mkdir -p "$out"

fail() {  # what is wrong
  echo "== $*"
  failed=$((failed + 1))
}

step() {  # name, command...: runs it, keeps its output in name.txt
  local file=$out/$device-$1.txt status
  echo "== $1: ${*:2}"
  timeout --kill-after 10 "${STEP_SECONDS:-1800}" "${@:2}" >"$file" 2>&1
  status=$?
  if [ "$status" = 0 ]; then
    echo "   passed; $(tail -n 1 "$file")"
  else
    fail "$1 FAILED with $status (124: it took too long); the end of $file:"
    tail -n 30 "$file"
  fi
  [ -z "${ARCHIVE:-}" ] || tar -czf "$ARCHIVE" -C "$out" --exclude '*.tgz' .
  return "$status"
}

have() {  # tool: says if it is not here
  command -v "$1" >/dev/null && return 0
  fail "$1 is missing: the steps that need it are not run"
  return 1
}

fact() {  # key: of build_info()
  "$python" -c "import sys, fastdpo; print(fastdpo.build_info()[sys.argv[1]])" "$1" 2>/dev/null
}

prepare() {
  device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | sed 's/^NVIDIA //' |
    tr '[:upper:] ' '[:lower:]-')
  if [ -z "$device" ] || ! "$python" -c "import torch; assert torch.cuda.is_available()"; then
    echo "bench/gpu.sh: nvidia-smi names no GPU, or the torch of $python sees none" >&2
    exit 1
  fi
  # The version that fastdpo tells is looked up in a package's facts, which a bare checkout lacks.
  "$python" -c "import importlib.metadata as m; m.version('fastdpo')" 2>/dev/null || "$python" setup.py -q egg_info
  [ "$(fact cuda_library)" = loaded ] ||
    step build env MAX_JOBS="${MAX_JOBS:-8}" "$python" setup.py build_ext --inplace
  step machine bash -c "nvidia-smi; nvcc --version; '$python' -m torch.utils.collect_env"
  step build_info "$python" -c "import fastdpo, json; print(json.dumps(fastdpo.build_info(), indent=1))"
  if [ "$(fact cuda_library)" != loaded ]; then
    fail "the CUDA library does not load: nothing else is run"
    exit "$failed"
  fi
  if [[ " $levels " = *" 1 "* && $(fact cuda_level1) != built ]]; then
    fail "Level 1 was $(fact cuda_level1)"
    levels=${levels//1/}
  fi
}

check() {
  step self_check "$python" -m fastdpo info --check
  # Level by level: what is illegal in one leaves the process's device unusable for the other. The oracle's float64 on
  # the CPU takes most of the time, and some GB.
  local level which
  for level in $levels; do
    [ "$level" = 0 ] && which="not level1" || which=level1
    step "test_cuda-level$level" "$python" -m pytest -q -n 3 tests/cuda/test_device.py -k "$which"
  done
  step test_cuda_limits "$python" -m pytest -q tests/cuda/test_limits.py
  step test_cuda_library "$python" -m pytest -q tests/cuda/test_library.py
  have compute-sanitizer || return
  # One case of every kernel: several dtypes, retained and recomputed rows, raised exponents.
  local plain="test_plain_cases and 1000 or test_plain_improbable_targets"
  local all="test_matches_the_oracle and 1000 or test_improbable_targets or $plain" ours=()
  # The library's products are its makers' to check, and take long.
  compute-sanitizer --help | grep -q -- --kernel-name && ours=(--kernel-name kernel_substring=fastdpo)
  for level in $levels; do
    [ "$level" = 0 ] && which="($all) and not level1" || which="($plain) and level1"
    # PyTorch's allocator would hand out parts of one block, inside which nothing is out of bounds.
    step "memcheck-level$level" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
      --report-api-errors no --error-exitcode 1 "$python" -m pytest -q tests/cuda/test_device.py -k "$which"
    step "racecheck-level$level" compute-sanitizer --tool racecheck "${ours[@]}" --error-exitcode 1 \
      "$python" -m pytest -q tests/cuda/test_device.py -k "$which"
  done
}

measure() {  # name, flags of run.py...: at every level; peers with the first alone
  [[ " ${CASES:-$1} " = *" $1 "* ]] || return
  local level last=()
  for level in $levels; do
    # shellcheck disable=SC2086  # several flags
    step "bench-$1-level$level" env FASTDPO_CUDA_LEVEL="$level" "$python" bench/run.py --device cuda --rounds 3 \
      --timeout 120 --json "$out/$device-bench-$1-level$level.json" ${BENCH_FLAGS:-} "${@:2}" "${last[@]}"
    last=(--peers floor,fastdpo,fastdpo-most-memory)
  done
}

bench() {
  # Peers that are not installed are named in the tables; the benchmark fails if fastdpo or the floor does.
  measure tiny --case tiny
  measure qwen --case qwen2.5-0.5b
  measure llama --case llama-3.1-8b
  measure llama-frozen-cached --case llama-3.1-8b --frozen --cached
  measure llama-long --case llama-3.1-8b --pairs 64 --frozen --cached --errors off --peers floor,fastdpo
}

profile() {
  have ncu || return
  local level name
  for level in $levels; do
    # Every pass once, with the floor's products. The clocks are left as they are: others share the machine.
    name=profile-level$level
    step "$name" ncu --clock-control none --set basic --print-summary per-kernel --kernel-name-base demangled \
      --kernel-name 'regex:row_kernel|settle_rows|ExponentialTile|nvjet|gemm' \
      "$python" bench/cuda_blocks.py --case llama-3.1-8b --tokens 2048 --level "$level" --rounds 1 --chosen
    [ "$level" = 0 ] && local kernel=row_kernel || local kernel=ExponentialTile
    grep -q "$kernel" "$out/$device-$name.txt" || fail "$name has no $kernel"
  done
}

blocks() {
  local level
  for level in $levels; do
    step "blocks-level$level" "$python" bench/cuda_blocks.py --level "$level" \
      --json "$out/$device-blocks-level$level.json"
  done
}

train() {
  # shellcheck disable=SC2086  # several flags
  step train "$python" bench/train.py --device cuda --case llama-1b --json "$out/$device-train.json" \
    --plot "$out/$device-train.png" ${TRAIN_FLAGS:-}
}

tables() {
  local file
  for file in "$out/$device"-bench-*.txt "$out/$device-train.txt"; do
    [ -f "$file" ] || continue
    echo "-- ${file##*/}"
    grep -E "^ +ms |^(floor|fastdpo|trl|liger|cut-|quack|full|torch)|pairs:" "$file"
  done
  for file in "$out/$device"-blocks-*.txt; do
    [ -f "$file" ] && grep -E "ms \(over|floor|as chosen|\*" "$file"  # a star is at a pass's fastest cut
  done
}

stages=${*:-check bench profile blocks train}
for stage in $stages; do
  case $stage in
    check | bench | profile | blocks | train) ;;
    *)
      echo "bench/gpu.sh: $stage is none of check, bench, profile, blocks, train" >&2
      exit 2
      ;;
  esac
done
prepare
for stage in $stages; do "$stage"; done
tables

echo "== $failed steps failed; outputs in $out"
exit "$failed"
