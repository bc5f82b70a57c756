#!/usr/bin/env bash
# transformers 5.24.0 with schedulefree 1.4.1: a checkpoint has other weights than those whose loss was reported, unless an
# evaluation came just before it.
#
# A schedule-free optimiser trains at one point (y) and means another to be used (x, an average); optimizer.eval() and
# optimizer.train() put one or the other into the model. One would expect Trainer to save x, which is what it evaluates. It
# calls eval() in evaluations alone, so a checkpoint is x where a step was evaluated before it was saved, and y where it was not:
# with evaluations less often than checkpoints, or none, or after them, the weights on disk are not the optimiser's result.
#
# Seen: trained in the same way for 6 steps at a rate of 0.1, the checkpoint gives on the 8 rows the loss of the average where
# the last step was evaluated first, and another one, of other weights, where it was not:
#     saved after an evaluation:    loss 3.6914, that of the average: True
#     saved without an evaluation:  loss 3.7075, that of the average: False
# What fastdpo does on account of it: settle_weights in fastdpo/trainer/optimizers.py, before anything is saved.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 \
  schedulefree==1.4.1
cd "$folder"
env/bin/python - <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.set_num_threads(1)
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(0))]


def make_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
                                        eos_token_id=2))


def loss_of(model):
    ids = torch.stack([row["input_ids"] for row in ROWS])
    with torch.no_grad():
        return model.eval()(input_ids=ids, labels=ids).loss.item()


def run(folder, **options):
    args = TrainingArguments(folder, max_steps=6, save_steps=6, learning_rate=0.1, optim="schedule_free_adamw", report_to="none",
                             lr_scheduler_type="constant", per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
                             **options)
    trainer = Trainer(make_model(), args, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    saved = LlamaForCausalLM.from_pretrained(f"{folder}/checkpoint-6")
    trainer.optimizer.eval()  # the average, in trainer.model from here on
    average = trainer.model.state_dict()
    same = all(torch.equal(value, average[name]) for name, value in saved.state_dict().items())
    return loss_of(saved), loss_of(trainer.model), same


print("transformers", transformers.__version__)
after, expected, is_average = run("evaluated", eval_strategy="steps", eval_steps=6)
print(f"saved after an evaluation:    loss {after:.4f}, that of the average: {is_average}")
without, also_expected, is_average_too = run("plain")
print(f"saved without an evaluation:  loss {without:.4f}, that of the average: {is_average_too} (expected: {expected:.4f})")
assert is_average and after == expected == also_expected
assert not is_average_too and without != expected
PYTHON
