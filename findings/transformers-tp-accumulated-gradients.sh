#!/usr/bin/env bash
# transformers 5.24.0, with accelerate 1.15.0: with tensor parallelism and gradient accumulation, some gradients are
# counted several times.
#
# A model that from_pretrained cuts over two processes (DistributedConfig(tp_size=2)) should have, after any number of
# backwards, the gradients of the model that is whole. It has, after one. The norms of queries and keys, which each
# process has whole and applies to its own heads, get their gradient summed over the processes after each backward
# (the plan's style replicated_with_grad_allreduce); but what is summed is the gradient that has been accumulated, in
# which the earlier backwards are summed already. So with gradient_accumulation_steps=2 on two processes the first
# micro-batch counts twice, of three the first four times. Qwen3, Gemma 3, OLMo 2 and others have such norms.
#
# Seen: the largest error of a gradient, as a share of its largest entry:
#   1 backward:  6.3e-07
#   2 backwards: 1.2, and more than rounding in self_attn.q_norm.weight and k_norm.weight alone
#
# On account of it fastdpo sums each backward's own gradient (fastdpo/model/cut_weights.py, sum_gradients_once).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
cat > make.py <<'PYTHON'
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

transformers.set_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50, "head_dim": 8}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).save_pretrained("model")
PYTHON
cat > train.py <<'PYTHON'
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
batches = torch.randint(0, 50, (2, 4, 12), generator=torch.Generator().manual_seed(0))
for count in (1, 2):
    whole = AutoModelForCausalLM.from_pretrained("model")
    parts = AutoModelForCausalLM.from_pretrained("model", distributed_config=DistributedConfig(tp_size=2))
    for ids in batches[:count]:
        for model in (whole, parts):
            model(input_ids=ids, labels=ids).loss.backward()
    off = {}
    for name, parameter in whole.named_parameters():
        gradient = parts.get_parameter(name).grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        off[name] = float((gradient - parameter.grad).abs().max() / parameter.grad.abs().max())
    wrong = {name.split(".", 3)[-1] for name, share in off.items() if share > 1e-3}
    if dist.get_rank() == 0:
        print(f"{count} backward(s): off by {max(off.values()):.1e} at most; more than rounding: {sorted(wrong)}")
        expected = set() if count == 1 else {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
        print("as described" if wrong == expected else "not as described")
dist.destroy_process_group()
PYTHON
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
env/bin/python make.py 2> /dev/null
env/bin/torchrun --standalone --nproc-per-node 2 train.py > said 2> errors || { cat errors; exit 1; }
cat said
[ "$(grep -cx 'as described' said)" = 2 ]
