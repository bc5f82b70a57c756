#!/usr/bin/env bash
# accelerate 1.15.0: under FSDP2 with mixed precision "bf16", the loss that a model computes in float32 comes out in bfloat16.
#
# transformers' models compute their loss in float32, also with weights and activations in bfloat16, and so it comes out of a model in
# bfloat16, of one under autocast, and of one under FSDP1. One would expect the same of FSDP2. The policy that accelerate makes of
# "bf16" sets output_dtype as well, which casts whatever the root module returns: loss, logits, log-probabilities. A loss of 4.1600 is
# 4.15625 then, the next lower number 4.125; what a metric or another loss adds up of such outputs has three digits.
#
# Seen, of one model and one batch:
#     weights in bfloat16:  torch.float32 4.160000
#     autocast:             torch.float32 4.160056
#     FSDP2, "bf16":        torch.bfloat16 4.156250
# What fastdpo does on account of it: keep_output_dtypes in fastdpo/trainer/fsdp2.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
env/bin/python -W ignore - <<'PYTHON'
import accelerate
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
ids = torch.randint(3, 64, (8, 40), generator=torch.Generator().manual_seed(0))


def make_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
                                        eos_token_id=2))


def loss_of(model):
    return model(input_ids=ids, labels=ids).loss.detach()


losses = {"weights in bfloat16": loss_of(make_model().to(torch.bfloat16))}
with torch.autocast("cpu", torch.bfloat16):
    losses["autocast"] = loss_of(make_model())
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
plugin.set_mixed_precision("bf16")  # which Accelerator(mixed_precision="bf16") does
losses['FSDP2, "bf16"'] = loss_of(fully_shard(make_model(), mesh=init_device_mesh("cpu", (1,)), mp_policy=plugin.mixed_precision_policy))
dist.destroy_process_group()
print("accelerate", accelerate.__version__, plugin.mixed_precision_policy)
for name, loss in losses.items():
    print(f"{name}: {loss.dtype} {loss:.6f} (expected: torch.float32)")
dtypes = [loss.dtype for loss in losses.values()]
assert dtypes == [torch.float32, torch.float32, torch.bfloat16], dtypes
PYTHON
