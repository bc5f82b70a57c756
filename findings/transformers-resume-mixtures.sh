#!/usr/bin/env bash
# transformers 5.24.0: a Trainer that resumes a mixture of experts keeps the experts' first weights, and says so in a warning.
#
# One would expect two steps, a checkpoint and two resumed steps to be four steps, as they are for a Llama. But the checkpoint
# has the names of the Hub (one tensor an expert), the live model others (one tensor for all experts of a layer), and Trainer
# loads the file into the live model with strict=False: what has another name there stays what it was at the start. The same
# holds of the experts of most mixtures, of GPT-NeoX's head and of Gemma 3 with vision; the best model that
# load_best_model_at_end brings back is loaded in the same way. from_pretrained converts the names, and is right.
#
# Seen: after the resume 0 of 4 expert tensors are those of the checkpoint, and from_pretrained of the same folder has 4 of 4;
# a Llama's come back by both. What fastdpo does on account of it: fastdpo/trainer/weights.py loads checkpoints as
# from_pretrained does, and fastdpo/trainer/resumable.py compares every weight with its digest.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
env/bin/python - <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers import Trainer, TrainerCallback, TrainingArguments

SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (16, 12), generator=torch.Generator().manual_seed(0))]


def make_trainer(kind, steps):
    torch.manual_seed(0)
    config = {"llama": LlamaConfig, "mixtral": MixtralConfig}[kind]
    model = {"llama": LlamaForCausalLM, "mixtral": MixtralForCausalLM}[kind](
        config(**SIZES, **({"num_local_experts": 4} if kind == "mixtral" else {})))
    args = TrainingArguments(kind, max_steps=steps, save_steps=2, learning_rate=1e-2, use_cpu=True, report_to="none",
                             per_device_train_batch_size=2, disable_tqdm=True)
    return Trainer(model, args, train_dataset=ROWS)


class AtTheStart(TrainerCallback):
    """What a resumed run begins with."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def came_back(state, saved):
    names = [name for name in saved if ".mlp." in name and "gate.weight" not in name]
    return f"{sum(torch.equal(state[name], saved[name]) for name in names)} of {len(names)}"


print("transformers", transformers.__version__)
for kind, expected in (("llama", "6 of 6"), ("mixtral", "0 of 4")):
    first = make_trainer(kind, 2)
    first.train()
    saved = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
    resumed, start = make_trainer(kind, 3), AtTheStart()
    resumed.add_callback(start)
    resumed.train(resume_from_checkpoint=f"{kind}/checkpoint-2")
    loaded = type(first.model).from_pretrained(f"{kind}/checkpoint-2")
    got, by_name = came_back(start.state, saved), came_back(loaded.state_dict(), saved)
    print(f"{kind}: Trainer brings back {got} tensors of the MLPs (expected: all), from_pretrained {by_name}")
    assert (got, by_name) == (expected, expected.replace("0 of", "4 of"))
PYTHON
