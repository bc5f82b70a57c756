#!/usr/bin/env bash
# TRL 1.16.0 with transformers 5.24.0 and DeepSpeed 0.19.8: precomputed log-probabilities of the reference are rounded to 8 bits, that
# is to whole numbers and worse, when DeepSpeed trains in bfloat16.
#
# With precompute_ref_log_probs the reference's log-probabilities (sums over a completion, some hundreds) are a float32 column of
# the data. One would expect them in the loss as they are, as without DeepSpeed. Trainer casts every floating-point tensor of a
# batch to DeepSpeed's dtype, which is meant for images and the like: -212.31 becomes -212, -251.76 -252, and of a completion of 600
# tokens the sum may be off by 8. beta times that difference is noise in every pair's reward, the same in every epoch.
#
# Seen, before anything has been learned, where policy and reference are one model and every reward should be 0 (8 pairs):
#     bf16:                 columns torch.float32, reference of a pair -212.307 and -251.753, loss 0.6931
#     bf16 with DeepSpeed:  columns torch.bfloat16, reference of a pair -212.000 and -252.000, loss 0.7007
# What fastdpo does on account of it: PairBatches._prepare_input in fastdpo/trainer/batches.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 trl==1.16.0 datasets==5.2.0 setuptools wheel ninja
DS_BUILD_OPS=0 pip --no-build-isolation deepspeed==0.19.8
cd "$folder"
cat > train.py <<'PYTHON'
import os
import sys

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

torch.set_num_threads(1)
torch.manual_seed(0)
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
ROWS = Dataset.from_list([
    {"prompt": f"w{i} w{i + 1}", "chosen": " ".join(f"w{(i + j) % 60}" for j in range(50)),
     "rejected": " ".join(f"w{(i + 3 * j) % 60}" for j in range(60))} for i in range(8)])
DEEPSPEED = {"train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
             "zero_allow_untested_optimizer": True}


class Looking(DPOTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return super().compute_loss(model, inputs, *args, **kwargs)


words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                    unk_token="<unk>")
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2))
with_deepspeed = sys.argv[1] == "deepspeed"
args = DPOConfig("out", max_steps=1, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, bf16=True,
                 per_device_train_batch_size=8, save_strategy="no", precompute_ref_log_probs=True,
                 deepspeed=DEEPSPEED if with_deepspeed else None)
trainer = Looking(model, args=args, train_dataset=ROWS, processing_class=tokenizer)
trainer.train()
chosen, rejected = trainer.seen
loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
# The pair of the first row, wherever the batch has it.
row = trainer.train_dataset[0]
at = (chosen.float() - row["ref_chosen_logps"]).abs().add((rejected.float() - row["ref_rejected_logps"]).abs()).argmin()
print(f"trl {trl.__version__}, transformers {transformers.__version__}, DeepSpeed {with_deepspeed}: columns {chosen.dtype}, "
      f"data {row['ref_chosen_logps']:.3f} and {row['ref_rejected_logps']:.3f}, reference of a pair {chosen[at]:.3f} and "
      f"{rejected[at]:.3f}, loss {loss:.4f} (expected: 0.6931)")
whole = bool((chosen == chosen.round()).all() and (rejected == rejected.round()).all())
if with_deepspeed:
    assert chosen.dtype == torch.bfloat16 and whole and abs(loss - 0.6931) > 0.002
else:
    assert chosen.dtype == torch.float32 and not whole and abs(loss - 0.6931) < 0.0005
os._exit(0)
PYTHON
port=$(env/bin/python -c "import socket; s = socket.socket(); s.bind(('localhost', 0)); print(s.getsockname()[1])")
export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=$port DS_ACCELERATOR=cpu
for how in plain deepspeed; do
  env/bin/python -W ignore train.py $how 2>&1 | grep -E "^trl|Error"
done
