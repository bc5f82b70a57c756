#!/usr/bin/env bash
# bitsandbytes 0.50.2: an override of one optimiser's parameter holds for another parameter of the next optimiser.
#
# GlobalOptimManager.register_module_override has a module's weight kept in 32 bits by an optimiser of 8 bits (transformers' Trainer
# does so for embeddings). One would expect it to hold for that module. The manager, of which there is one in a process,
# notes it by the parameter's place (number of the group, number in the group) once the optimiser has stepped, and looks places up
# for every optimiser: whatever stands at that place in the next one's parameters is kept in 32 bits as well, with four times
# the memory. A notebook or sweep that trains a second model has other states than a fresh process.
#
# Seen, of a model whose first parameter is 64 x 128, after a step:
#     alone:                                torch.uint8
#     after another model with an override: torch.float32
# What fastdpo does on account of it: tests/plan/test_optimizers.py begins with a fresh manager; a training from the command line has
# a process of its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 bitsandbytes==0.50.2
cd "$folder"
env/bin/python -W ignore - <<'PYTHON'
import bitsandbytes
import torch
from bitsandbytes.optim import AdamW, GlobalOptimManager
from torch import nn


def state_dtype(model, override=None):
    """What the first parameter's state is kept in, after a step in 8 bits."""
    if override is not None:
        GlobalOptimManager.get_instance().register_module_override(override, "weight", {"optim_bits": 32})
    optimizer = AdamW(model.parameters(), optim_bits=8)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state[next(model.parameters())]["state1"].dtype


print("bitsandbytes", bitsandbytes.__version__)
alone = state_dtype(nn.Linear(128, 64, bias=False))
embedding = nn.Embedding(64, 128)
overridden = state_dtype(nn.Sequential(embedding), embedding)
after = state_dtype(nn.Linear(128, 64, bias=False))
print(f"alone: {alone}; the one that was overridden: {overridden}; the next model, without an override: {after} (expected: {alone})")
assert (alone, overridden, after) == (torch.uint8, torch.float32, torch.float32)
PYTHON
