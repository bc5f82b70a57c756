#!/usr/bin/env bash
# transformers 5.24.0: some models with a state take sequences packed into one row, and carry the state from one into the next.
#
# One would expect that a model which is told where the sequences of a row begin, as DataCollatorWithFlattening tells it
# (position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k), keeps them apart or says that it cannot.
# Bamba and Qwen3-Next say so where the packages of their kernels are missing ("can't keep packed sequences apart"). Mamba,
# Mamba 2, Jamba, MiniMax and RecurrentGemma do not: logits of the second sequence depend on the first one's tokens. Kimi Linear
# says so of its convolutions alone: without seq_idx, which the collator leaves out unless asked, it mixes sequences, too, because
# its linear attention is called with cu_seq_lens_q, where the kernel's argument is cu_seqlens.
#
# Seen: the second sequence's logits move by 1.8 to 4.1 where the first one's tokens change, in all of these. What fastdpo
# does on account of it: fastdpo/model/packing_check.py looks at made-up rows before a run, and fastdpo/model/recurrent.py gives
# Kimi Linear the kernel's own name.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
env/bin/python - <<'PYTHON'
import torch
import transformers
from transformers import AutoModelForCausalLM, CONFIG_MAPPING
from transformers import DataCollatorWithFlattening

transformers.logging.set_verbosity_error()
SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ATTENTION = dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=4)
OWN = {
    "bamba": ATTENTION | dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, attn_layer_indices=[1]),
    "qwen3_next": ATTENTION | dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
                                   linear_value_head_dim=8, num_experts=4, moe_intermediate_size=16,
                                   shared_expert_intermediate_size=16,
                                   layer_types=["linear_attention", "full_attention"]),
    "mamba": dict(state_size=8),
    "mamba2": dict(state_size=8, num_heads=4, head_dim=16, n_groups=1),
    "jamba": ATTENTION | dict(attn_layer_period=2, attn_layer_offset=1, num_experts=1, use_mamba_kernels=False),
    "minimax": ATTENTION | dict(num_local_experts=2, layer_types=["linear_attention", "full_attention"]),
    "recurrent_gemma": dict(intermediate_size=48, num_attention_heads=4, lru_width=32, head_dim=8, num_hidden_layers=3),
    "kimi_linear": ATTENTION | dict(linear_num_heads=4, linear_head_dim=8, num_experts=4, num_experts_per_tok=2,
                                    moe_intermediate_size=16, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
                                    qk_rope_head_dim=8, v_head_dim=8,
                                    n_group=1, topk_group=1, layer_types=["linear_attention", "full_attention"]),
}
CALM = {"bamba", "qwen3_next"}  # say that they cannot


def moved(model, collate):
    """By how much the second sequence's logits move when the first one's tokens change."""
    logits = []
    for first in ([5, 6, 7, 8], [9, 10, 11, 12]):
        row = collate([{"input_ids": first}, {"input_ids": [20, 21, 22, 23, 24]}])
        row.pop("labels")
        with torch.no_grad():
            logits.append(model(**row, use_cache=False).logits[:, 4:])
    return float((logits[0] - logits[1]).abs().max())


print("transformers", transformers.__version__)
for kind, options in OWN.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(SIZES | options))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=kind != "kimi_linear")
    try:
        got = moved(model, collate)
    except ValueError as error:
        assert kind in CALM and "can't keep packed sequences apart" in str(error), (kind, error)
        print(f"{kind}: {error}")
    else:
        print(f"{kind}: the second sequence's logits moved by {got:.2g} (expected: 0, or an error)")
        assert kind not in CALM and got > 1e-4, (kind, got)
PYTHON
