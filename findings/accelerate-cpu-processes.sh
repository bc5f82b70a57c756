#!/usr/bin/env bash
# accelerate 1.15.0: `accelerate launch --cpu --num_processes 2` starts one process.
#
# --num_processes is "the total number of processes to be launched in parallel", and --cpu "whether or not to force the
# training on the CPU"; so two processes are expected, each with half of the batches. There is one, which has all of
# them: without mpirun (--mpirun_hostfile) nothing starts a second, and nothing says so. Whoever tries a run of two
# processes on a CPU tries a run of one. With --multi_gpu in the place of --cpu there are two, on a machine without GPUs
# as well. With fewer than two GPUs and no --cpu it is one process, too.
#
# Seen:
#   --cpu --num_processes 2:       process 0 of 1
#   --num_processes 2:             process 0 of 1
#   --multi_gpu --num_processes 2: process 0 of 2, process 1 of 2
#
# On account of it `fastdpo train --num_processes N` adds --multi_gpu (fastdpo/commands/launch_flags.py).

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0
export HF_HOME="$folder/home" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
cat > which.py <<'PYTHON'
import sys

from accelerate import PartialState

state = PartialState(cpu=True)
print(f"process {state.process_index} of {state.num_processes}", file=sys.stderr)
PYTHON

free_port() {
    env/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
failed=0
look() {  # what is expected to be seen, then the flags
    seen=$(env/bin/python -m accelerate.commands.launch "${@:2}" --num_processes 2 which.py 2>&1 |
        grep -o 'process [0-9] of [0-9]' | sort | paste -sd, | sed 's/,/, /g')
    echo "${*:2} --num_processes 2: $seen"
    [ "$seen" = "$1" ] || failed=1
}
echo "Expected: process 0 of 2, process 1 of 2, of all three. Got:"
look "process 0 of 1" --cpu
look "process 0 of 1" --main_process_port "$(free_port)"
look "process 0 of 2, process 1 of 2" --multi_gpu --main_process_port "$(free_port)"
exit $failed
