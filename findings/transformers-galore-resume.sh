#!/usr/bin/env bash
# transformers 5.24.0 with galore-torch 1.0 and apollo-torch 1.0.3: Trainer cannot resume from the checkpoints that it wrote.
#
# One would expect a run with optim="galore_adamw" or "apollo_adamw", which wrote its checkpoint without a complaint, to be resumed from
# it. Both optimisers keep an object beside their tensors (the projection, with its matrix), which torch.save pickles into
# optimizer.pt; Trainer reads that file with weights_only=True, and has not named the classes. A run that was killed after a day
# is found to be lost when it is wanted again, unless one names the class to torch by hand; with it, the resumed run is the unbroken
# one to the bit.
#
# Seen:
#     adamw_torch:  resumed to the unbroken run's losses
#     galore_adamw: UnpicklingError; resumed to the unbroken run's losses with the class named
#     apollo_adamw: UnpicklingError; resumed to the unbroken run's losses with the class named
# What fastdpo does on account of it: state_classes in fastdpo/trainer/optimizers.py names them where such a run is resumed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 \
  galore-torch==1.0 apollo-torch==1.0.3
cd "$folder"
env/bin/python -W ignore - 2>/dev/null <<'PYTHON'
from pickle import UnpicklingError

import torch
import transformers
from apollo_torch.random_projector import GradientProjector
from galore_torch.galore_projector import GaLoreProjector
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.set_num_threads(1)
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (32, 12), generator=torch.Generator().manual_seed(0))]
CLASSES = {"adamw_torch": [], "galore_adamw": [GaLoreProjector], "apollo_adamw": [GradientProjector]}


def losses(folder, optim, resume=None):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
                                         eos_token_id=2))
    options = {}
    if optim != "adamw_torch":
        options = {"optim_target_modules": ["mlp", "self_attn"], "optim_args": "rank=4,update_proj_gap=3"}
    args = TrainingArguments(folder, max_steps=6, save_steps=4, learning_rate=1e-2, optim=optim, report_to="none",
                             lr_scheduler_type="constant", per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True,
                             logging_steps=1, log_level="error", **options)
    trainer = Trainer(model, args, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


print("transformers", transformers.__version__)
for optim, classes in CLASSES.items():
    unbroken, checkpoint = losses(optim, optim), f"{optim}/checkpoint-4"
    try:
        plain = losses(f"{optim}-resumed", optim, checkpoint)
    except UnpicklingError as error:
        plain = type(error).__name__
    with torch.serialization.safe_globals(classes):
        named = losses(f"{optim}-named", optim, checkpoint)
    print(f"{optim}: resumed {plain if isinstance(plain, str) else plain == unbroken}, with the class named {named == unbroken}")
    assert named == unbroken
    assert plain == (unbroken if optim == "adamw_torch" else "UnpicklingError")
PYTHON
