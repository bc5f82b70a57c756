#!/usr/bin/env bash
# transformers 5.24.0 with galore-torch 1.0 and apollo-torch 1.0.3: weight_decay has no effect, with GaLore neither have
# adam_beta1, adam_beta2 and adam_epsilon, and with the layerwise ones neither have the schedule of learning rates, warmup and
# max_grad_norm, though the log shows the rates that the schedule would have given.
#
# One would expect the arguments of TrainingArguments to hold for every optimiser that has them (GaLoreAdamW and APOLLO take
# weight_decay and eps, GaLoreAdamW takes betas), or an error. Trainer makes the parameter groups of these optimisers without a
# weight decay, and hands GaLore none of Adam's arguments. A layerwise one steps in a hook of backward with the rate that it was
# made with, before gradients are clipped; schedule and clipping see a dummy.
#
# Seen, of 4 steps with and without each argument (1 where a weight changed by it, 0 where all are the same to the bit):
#                              weight_decay  adam_beta1  adam_epsilon  linear schedule  max_grad_norm
#     adamw_torch                         1           1             1                1              1
#     galore_adamw                        0           0             0                1              1
#     galore_adamw_layerwise              0           0             0                0              0
#     apollo_adamw                        0           1             1                1              1
#     apollo_adamw_layerwise              0           1             1                0              0
# What fastdpo does on account of it: check_optimizer in fastdpo/trainer/optimizers.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 \
  galore-torch==1.0 apollo-torch==1.0.3
cd "$folder"
env/bin/python -W ignore - 2>/dev/null <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.set_num_threads(1)
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (32, 12), generator=torch.Generator().manual_seed(0))]
CHANGES = {"weight_decay": {"weight_decay": 0.5}, "adam_beta1": {"adam_beta1": 0.5}, "adam_epsilon": {"adam_epsilon": 1e-2},
           "linear schedule": {"lr_scheduler_type": "linear"}, "max_grad_norm": {"max_grad_norm": 1e-3}}
EXPECTED = {"adamw_torch": [1, 1, 1, 1, 1], "galore_adamw": [0, 0, 0, 1, 1], "galore_adamw_layerwise": [0, 0, 0, 0, 0],
            "apollo_adamw": [0, 1, 1, 1, 1], "apollo_adamw_layerwise": [0, 1, 1, 0, 0]}


def trained(optim, **changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
                                         eos_token_id=2))
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, **changes}
    if optim != "adamw_torch":
        options |= {"optim_target_modules": ["mlp", "self_attn"], "optim_args": "rank=4,update_proj_gap=3"}
    args = TrainingArguments("out", max_steps=4, save_strategy="no", learning_rate=1e-2, optim=optim, report_to="none",
                             per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, log_level="error",
                             logging_strategy="no", **options)
    trainer = Trainer(model, args, train_dataset=ROWS)
    trainer.train()
    return trainer.model.state_dict()


print("transformers", transformers.__version__)
print(f"{'':25}", "  ".join(CHANGES))
for optim, expected in EXPECTED.items():
    plain = trained(optim)
    got = []
    for changes in CHANGES.values():
        other = trained(optim, **changes)
        got.append(int(any(not torch.equal(plain[name], other[name]) for name in plain)))
    print(f"{optim:25}", "  ".join(f"{value:{len(name)}}" for name, value in zip(CHANGES, got)))
    assert got == expected, (optim, got, expected)
PYTHON
