#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0: load_fsdp_optimizer reads no state from shards into a new optimizer under FSDP1.
#
# With fsdp_version 1 and SHARDED_STATE_DICT, accelerate's default, a checkpoint is read by a process that has just made
# its optimizer. load_fsdp_optimizer asks FSDP.optim_state_dict for what there is to be read: of an optimizer that made
# no step that is nothing, so nothing is read, and nothing says so. Adam's moments and its step begin at 0 again, with a
# learning rate from the middle of the run. With FULL_STATE_DICT all of it comes back. (For FSDP2 torch makes the state
# first: get_optimizer_state_dict.)
#
# Seen, in the first of two processes, which has a part of one layer's weight:
#   FULL_STATE_DICT:    saved 1 state, loaded 1
#   SHARDED_STATE_DICT: saved 1 state, loaded 0
#
# On account of it fastdpo makes the state before a resume (make_state in fastdpo/trainer/fsdp1_loading.py).

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0
export HF_HOME="$folder/home" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
cat > shards.py <<'PYTHON'
import logging
import sys
import warnings

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import load_fsdp_optimizer, save_fsdp_optimizer
from torch.distributed.fsdp import FullyShardedDataParallel

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
kind = sys.argv[1]
accelerator = Accelerator(cpu=True)
plugin = FullyShardedDataParallelPlugin(fsdp_version=1, state_dict_type=kind)
model = FullyShardedDataParallel(torch.nn.Linear(8, 8), device_id=torch.device("cpu"), use_orig_params=True)


def new():
    return torch.optim.AdamW(model.parameters(), lr=0.1)


trained = new()
model(torch.ones(2, 8)).sum().backward()
trained.step()
trained.zero_grad()
save_fsdp_optimizer(plugin, accelerator, trained, model, kind)
resumed = new()
load_fsdp_optimizer(plugin, accelerator, resumed, model, kind)
if accelerator.is_main_process:
    print(f"{kind}: saved {len(trained.state)} state, loaded {len(resumed.state)}")
PYTHON

failed=0
look() {
    seen=$(env/bin/python -m torch.distributed.run --standalone --nproc_per_node 2 shards.py "$1" 2> errors |
        grep saved || { cat errors >&2; true; })
    echo "$seen"
    [ "$seen" = "$1: saved 1 state, loaded $2" ] || failed=1
}
echo "Expected: as many loaded as saved. Got:"
look FULL_STATE_DICT 1
look SHARDED_STATE_DICT 0
exit $failed
