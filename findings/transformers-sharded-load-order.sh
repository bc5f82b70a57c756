#!/usr/bin/env bash
# transformers 5.24.0, with accelerate 1.15.0: a model that from_pretrained shards over processes can have its weights
# in another order.
#
# from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=2)) is documented to shard the model as it is
# loaded, each process reading its part; so the parts together should be what from_pretrained loads without it. They are
# not where a weight is joined from several tensors of the checkpoint along its first dimension (the convolutions of
# queries, keys and values in OLMo Hybrid, Kimi Linear and Bailing's hybrid): each process takes its part of each of the
# tensors, and joins these, so that the whole is q0 k0 v0 q1 k1 v1 and not q k v. Nothing says so; the model computes
# something else from its first forward on. With tp_size=2, whose plan leaves these weights whole, they are right.
#
# Seen:
#   tp_size=2:   all weights are the checkpoint's
#   fsdp_size=2: other weights: model.layers.0.linear_attn.conv1d.weight
#
# On account of it fastdpo refuses such a model by name (fastdpo/model/cut_weights.py, check_read_in_parts).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
cat > make.py <<'PYTHON'
import transformers
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

transformers.set_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50, "pad_token_id": 0}
heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 4}
heads |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
layers = ["linear_attention", "full_attention"]
OlmoHybridForCausalLM(OlmoHybridConfig(layer_types=layers, **sizes, **heads)).save_pretrained("model")
PYTHON
cat > load.py <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
size = sys.argv[1]
whole = AutoModelForCausalLM.from_pretrained("model")
parts = AutoModelForCausalLM.from_pretrained("model", distributed_config=DistributedConfig(**{size: 2}))
other = []
for name, parameter in parts.named_parameters():
    together = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    if not torch.equal(together, whole.get_parameter(name)):
        other.append(name)
if dist.get_rank() == 0:
    print(f"{size}=2:", f"other weights: {', '.join(other)}" if other else "all weights are the checkpoint's")
    expected = {"tp_size": [], "fsdp_size": ["model.layers.0.linear_attn.conv1d.weight"]}
    print("as described" if other == expected[size] else "not as described")
dist.destroy_process_group()
PYTHON
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
env/bin/python make.py 2> /dev/null
failed=0
for size in tp_size fsdp_size; do
    env/bin/torchrun --standalone --nproc-per-node 2 load.py "$size" > said 2> errors || { cat errors; failed=1; }
    cat said
    grep -qx "as described" said || failed=1
done
exit $failed
