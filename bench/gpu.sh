#!/usr/bin/env bash
# Builds and checks fastdpo on a machine with an NVIDIA GPU: tests, compute-sanitizer on small cases, the benchmark.
#
#   bench/gpu.sh            needs python with a CUDA torch, g++, nvcc and no network; results go to ${OUT:-bench/results}
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

venv=${VENV:-build/gpu-venv}
if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv --system-site-packages "$venv" || exit 1
fi
python=$venv/bin/python

step machine bash -c "nvidia-smi; nvcc --version; '$python' -m torch.utils.collect_env"
step build env MAX_JOBS="${MAX_JOBS:-8}" "$python" -m pip install --no-build-isolation --no-deps -e .
step build_info "$python" -c "import fastdpo, json; print(json.dumps(fastdpo.build_info(), indent=1))"

# The kernels, once on the host and once on the device.
step test_cuda_library "$python" -m pytest -q tests/test_cuda_library.py
step test_cuda_host "$python" -m pytest -q tests/test_cuda_host.py tests/test_cuda_level1.py
step test_cuda "$python" -m pytest -q tests/test_cuda.py

if need compute-sanitizer; then
  # One case of every kernel: several dtypes, retained and recomputed rows, raised exponents.
  small="test_matches_the_oracle and 1000 or test_improbable_targets or test_plain_cases and 1000"
  # PyTorch's allocator would hand out parts of one block, inside which nothing is out of bounds.
  step memcheck env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
    "$python" -m pytest -q tests/test_cuda.py -k "$small"
  step racecheck compute-sanitizer --tool racecheck --error-exitcode 1 \
    "$python" -m pytest -q tests/test_cuda.py -k "test_improbable_targets or test_plain_cases and 1000"
fi

# Peers that are not installed are named in the tables; the benchmark fails if fastdpo or the floor does.
for case in tiny qwen2.5-0.5b llama-3.1-8b; do
  step "bench-$case" "$python" bench/run.py --device cuda --case "$case" --rounds "${ROUNDS:-3}" --json "$out/bench-$case.json"
done

level1=$("$python" -c 'import fastdpo; print(fastdpo.build_info()["cuda_level1"])')
if [ "$level1" = built ]; then
  for case in tiny qwen2.5-0.5b llama-3.1-8b; do
    step "bench-level1-$case" env FASTDPO_CUDA_LEVEL=1 "$python" bench/run.py --device cuda --case "$case" \
      --peers floor,fastdpo --rounds "${ROUNDS:-3}" --json "$out/bench-level1-$case.json"
  done
else
  echo "== Level 1 was $level1"
fi

echo "== $failed steps failed; outputs in $out"
exit "$failed"
