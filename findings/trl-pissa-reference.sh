#!/usr/bin/env bash
# TRL 1.16.0 with PEFT 0.21.2: with an adapter that begins as PiSSA or OLoRA, DPO's reference is not the model that is trained, but what
# is left of it.
#
# With a new adapter and no ref_model, TRL takes the model with its adapter off for the reference. One would expect the policy to be
# its own reference before the first step: rewards of 0 and a loss of ln 2 = 0.6931, as with plain LoRA. PiSSA and OLoRA take the largest
# parts of each weight out of the base and put them into the adapter; with the adapter off, the model lacks them, and neither
# TRL nor PEFT says so. DPO then pulls the policy towards a broken model.
#
# Seen, loss and margin of the first step at beta 0.5 (weights of a deviation of 0.2):
#     init_lora_weights=True:     loss 0.6931, margin 0.0000
#     init_lora_weights="pissa":  loss 0.7109, margin 0.3906
#     init_lora_weights="olora":  loss 0.9882, margin 0.2190
# What fastdpo does on account of it: adapters_are_neutral in fastdpo/model/adapters.py, after which the reference is a copy.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 \
  trl==1.16.0 datasets==5.2.0 peft==0.21.2
cd "$folder"
env/bin/python -W ignore - 2>/dev/null <<'PYTHON'
import peft
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

torch.set_num_threads(1)
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
ROWS = Dataset.from_list([{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w{i + 3}", "rejected": f" w{i + 5} w{i + 7}"}
                          for i in range(16)])
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                    unk_token="<unk>")


def first_step(init):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
                                         eos_token_id=2, initializer_range=0.2))
    args = DPOConfig("out", max_steps=1, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, bf16=False,
                     per_device_train_batch_size=8, save_strategy="no", beta=0.5)
    adapter = LoraConfig(init_lora_weights=init, r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(model, args=args, train_dataset=ROWS, processing_class=tokenizer, peft_config=adapter)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return entry["loss"], entry["rewards/margins"]


print("trl", trl.__version__, "peft", peft.__version__)
for init in (True, "pissa", "olora"):
    loss, margin = first_step(init)
    print(f"init_lora_weights={init!r}: loss {loss:.4f}, margin {margin:.4f} (expected: 0.6931, 0.0000)")
    assert (abs(loss - 0.6931) < 0.0002) == (init is True) == (abs(margin) < 1e-4)
PYTHON
