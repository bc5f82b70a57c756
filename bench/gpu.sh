#!/usr/bin/env bash
# Builds, checks, benchmarks and profiles fastdpo on a machine with an NVIDIA GPU; a table comes last.
#
#   bench/gpu.sh                     everything
#   bench/gpu.sh check               the tests of the CUDA op, and compute-sanitizer on small cases
#   bench/gpu.sh bench profile       run.py on the loss layer's cases; Nsight Compute on the row kernel and the products
#   bench/gpu.sh blocks              cuda_blocks.py: other cuts into token blocks and vocabulary chunks than the chosen one
#   bench/gpu.sh train               train.py: pairs per second beside TRL's trainer
#
# Needs python with a CUDA torch, g++, nvcc and no network; results go to ${OUT:-bench/results}. A build that is there
# already, and loads, is used as it is.
#
# A step that fails does not stop the next; the exit status is the number of steps that failed. A tool that is missing
# is said to be missing, and counts as a failure.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
mkdir -p "$out"
python=${PYTHON:-python3}
failed=0

step() {  # name, command...: runs it, keeps its output in $out/name.txt
  local name=$1
  shift
  echo "== $name: $*"
  if "$@" >"$out/$name.txt" 2>&1; then
    echo "   passed; $(tail -n 1 "$out/$name.txt")"
  else
    echo "   FAILED; the end of $out/$name.txt:"
    tail -n 30 "$out/$name.txt"
    failed=$((failed + 1))
  fi
}

need() {  # tool: says whether it is here
  command -v "$1" >/dev/null && return 0
  echo "== $1 is missing: the steps that need it are not run"
  failed=$((failed + 1))
  return 1
}

build_fact() {  # key: of build_info()
  "$python" -c "import sys, fastdpo; print(fastdpo.build_info()[sys.argv[1]])" "$1" 2>/dev/null
}

build() {
  if [ "$(build_fact cuda_library)" != loaded ]; then
    local venv=${VENV:-build/gpu-venv}
    [ -x "$venv/bin/python" ] || "$python" -m venv --system-site-packages "$venv" || exit 1
    python=$venv/bin/python
    step build env MAX_JOBS="${MAX_JOBS:-8}" "$python" -m pip install --no-build-isolation --no-deps -e .
  fi
  step machine bash -c "nvidia-smi; nvcc --version; '$python' -m torch.utils.collect_env"
  step build_info "$python" -c "import fastdpo, json; print(json.dumps(fastdpo.build_info(), indent=1))"
  levels=0
  [ "$(build_fact cuda_level1)" = built ] && levels="0 1" || echo "== Level 1 was $(build_fact cuda_level1)"
}

check() {
  # The kernels, once on the host and once on the device.
  step test_cuda_library "$python" -m pytest -q tests/test_cuda_library.py
  step test_cuda_host "$python" -m pytest -q tests/test_cuda_host.py tests/test_cuda_level1.py tests/test_cuda_blocks.py
  step test_cuda "$python" -m pytest -q tests/test_cuda.py
  step test_cuda_limits "$python" -m pytest -q tests/test_cuda_limits.py
  need compute-sanitizer || return
  # One case of every kernel: several dtypes, retained and recomputed rows, raised exponents.
  local small="test_matches_the_oracle and 1000 or test_improbable_targets or test_plain_cases and 1000"
  # PyTorch's allocator would hand out parts of one block, inside which nothing is out of bounds.
  step memcheck env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
    "$python" -m pytest -q tests/test_cuda.py -k "$small"
  step racecheck compute-sanitizer --tool racecheck --error-exitcode 1 \
    "$python" -m pytest -q tests/test_cuda.py -k "test_improbable_targets or test_plain_cases and 1000"
}

measure() {  # name, flags of run.py...: at every level that was built; peers with Level 0 alone
  local name=$1 level
  shift
  for level in $levels; do
    local flags=("$@")
    [ "$level" = 0 ] || flags+=(--peers floor,fastdpo)
    step "bench-$name-level$level" env FASTDPO_CUDA_LEVEL="$level" "$python" bench/run.py --device cuda \
      --rounds "${ROUNDS:-3}" --json "$out/bench-$name-level$level.json" "${flags[@]}"
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
  need ncu || return
  local level
  for level in $levels; do
    # Three of each: the row kernel, or Level 1's product and the kernel that adds up its tiles; and cuBLAS's products.
    step "profile-level$level" env FASTDPO_CUDA_LEVEL="$level" ncu --target-processes all --set basic \
      --kernel-name-base demangled --kernel-name 'regex:row_kernel|settle_rows|ExponentialTile|nvjet|gemm' \
      --launch-skip 30 --launch-count 12 \
      "$python" bench/run.py --device cuda --case llama-3.1-8b --peers fastdpo --rounds 1 --errors off --tune off
  done
}

blocks() {
  local level
  for level in $levels; do
    step "blocks-level$level" "$python" bench/cuda_blocks.py --level "$level" --json "$out/blocks-level$level.json"
  done
}

train() {
  step train "$python" bench/train.py --device cuda --case llama-1b --json "$out/train.json" --plot "$out/train.png"
}

tables() {
  local file
  for file in "$out"/bench-*.txt "$out"/train.txt; do
    [ -f "$file" ] || continue
    echo "-- ${file##*/}"
    grep -E "^ +ms |^(floor|fastdpo|trl|liger|cut-|quack|full|torch)" "$file"
  done
  for file in "$out"/blocks-*.txt; do
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
build
for stage in $stages; do "$stage"; done
tables

echo "== $failed steps failed; outputs in $out"
exit "$failed"
