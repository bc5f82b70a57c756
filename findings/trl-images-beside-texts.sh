#!/usr/bin/env bash
# TRL 1.16.0: DPOTrainer leaves the end-of-sequence token out of answers that are plain texts, where rows have images.
#
# One would expect pairs of plain texts to be trained with the token that ends an answer, as they are without images: there
# it is appended. With a column of images the rows are not prepared, and the collator for images appends nothing, so the
# model is trained on answers that do not end, and learns nothing of where to stop. Lists of messages are not affected,
# for a chat template ends its turns itself.
#
# Seen: the chosen answer ends with the end-of-sequence token without images, and with its last word's token with them.
# What fastdpo does: fastdpo/data/vision.py tokenises answers as it does without images.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 datasets==5.2.0 \
    accelerate==1.15.0 trl==1.16.0 pillow
cd "$folder"
env/bin/python - <<'PYTHON'
import copy

import tokenizers
import trl
from datasets import Dataset
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

core = tokenizers.Tokenizer(tokenizers.models.WordLevel(
    {word: i for i, word in enumerate("<pad> <s> </s> <unk> <image> What is it ? A cat dog".split())}, unk_token="<unk>"))
core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                    unk_token="<unk>", additional_special_tokens=["<image>"])
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(
    "llava", text_config=dict(model_type="llama", vocab_size=16, **sizes), image_token_index=4,
    vision_config=dict(model_type="clip_vision_model", image_size=16, patch_size=8, **sizes)))
processor = LlavaProcessor(CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
                           tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)


def last_token(row):
    """Of the chosen answer, as it would be trained on."""
    args = trl.DPOConfig("out", use_cpu=True, bf16=False, report_to=[])
    trainer = trl.DPOTrainer(model, copy.deepcopy(model), args, train_dataset=Dataset.from_list([row]), processing_class=processor)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    ids = batch["input_ids"][0][batch["completion_mask"][0].bool()]
    return tokenizer.convert_ids_to_tokens(ids.tolist())[-1]


text = {"chosen": " A cat", "rejected": " A dog"}
without = last_token({"prompt": "What is it ?", **text})
with_images = last_token({"prompt": "<image> What is it ?", "images": [Image.new("RGB", (16, 16))], **text})
print(f"trl {trl.__version__}: without images the answer ends with {without}, with images with {with_images}")
assert (without, with_images) == ("</s>", "cat"), "this has changed"
PYTHON
