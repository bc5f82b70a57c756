#!/usr/bin/env bash
# transformers 5.24.0 with grokadamw 0.1.2 (optim="grokadamw"): a resumed run begins with an empty optimiser, without a word.
#
# One would expect 4 steps, a checkpoint and 2 resumed steps to be 6 steps, as they are with AdamW. The optimiser keeps its
# averages in its parameter groups, by the parameter, and not in Optimizer.state. They are in optimizer.pt, but a loaded group is
# keyed by the tensors of the file, among which no parameter of the live model finds itself: moments and step counts start anew,
# at the scheduler's rate of the middle of the run.
#
# Seen: the losses of steps 5 and 6 with adamw_torch are those of the unbroken run. With grokadamw step 5's is the same, and
# step 6's is 5.1583 in the place of 4.4284.
# What fastdpo does on account of it: check_optimizer in fastdpo/trainer/optimizers.py takes it for runs that keep no optimiser.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 \
  grokadamw==0.1.2
cd "$folder"
env/bin/python -W ignore - <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.set_num_threads(1)
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (32, 12), generator=torch.Generator().manual_seed(0))]


def losses(folder, optim, resume=None):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
                                         eos_token_id=2))
    args = TrainingArguments(folder, max_steps=6, save_steps=4, learning_rate=1e-2, optim=optim, report_to="none",
                             lr_scheduler_type="constant", per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True,
                             logging_steps=1, log_level="error")
    trainer = Trainer(model, args, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-2:]


print("transformers", transformers.__version__)
for optim in ("adamw_torch", "grokadamw"):
    unbroken = losses(optim, optim)
    resumed = losses(f"{optim}-resumed", optim, f"{optim}/checkpoint-4")
    print(f"{optim}: steps 5 and 6 unbroken {unbroken}, resumed {resumed}")
    assert resumed[0] == unbroken[0]
    assert (resumed[1] == unbroken[1]) == (optim == "adamw_torch")
PYTHON
