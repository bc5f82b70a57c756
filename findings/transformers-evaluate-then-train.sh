#!/usr/bin/env bash
# transformers 5.24.0 with accelerate 1.15.0: evaluated before it trains, a model is trained by each process on its own.
#
# One would expect trainer.evaluate(); trainer.train() on two processes to train as trainer.train() does: one model, by
# the mean of the processes' gradients. Instead accelerate marks the model that it prepares for the evaluation
# (prepare_model(..., evaluation_mode=True) wraps nothing), and gives it back as it is when the training prepares it: it
# is not wrapped for the processes, their gradients are not averaged, and each goes on with weights of its own. Nothing
# says so.
#
# Seen: after one step the two processes' weights are the same without the evaluation, and differ with it. fastdpo takes
# the mark away on account of it (fastdpo/trainer/measured.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
cat > run.py <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

transformers.set_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 50, (8, 6)).tolist()]
args = TrainingArguments(
    "out", use_cpu=True, max_steps=1, per_device_train_batch_size=2, save_strategy="no", report_to=[], disable_tqdm=True
)
trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
if sys.argv[1] == "evaluate":
    trainer.evaluate()
trainer.train()
own = torch.cat([p.detach().flatten() for p in model.parameters()])
both = [torch.empty_like(own) for _ in range(2)]
dist.all_gather(both, own)
if trainer.is_world_process_zero():
    print(sys.argv[1], "largest difference between the processes' weights:", float((both[0] - both[1]).abs().max()))
    assert torch.equal(*both) == (sys.argv[1] == "train")
dist.destroy_process_group()
PYTHON
for what in train evaluate; do
    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/env/bin/torchrun" --standalone --nproc-per-node 2 run.py "$what" 2>&1 |
        grep largest
done
