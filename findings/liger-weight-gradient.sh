#!/usr/bin/env bash
# Liger 0.8.5: the gradient of the output embedding loses digits with every pair of the batch, in bfloat16.
#
# LigerFusedLinearDPOLoss goes through a batch in chunks of pairs (chunk_size=1 by default), and adds each chunk's gradient of the
# weight to a sum. One would expect a gradient as near to the exact one as bfloat16 allows, whatever the batch, as the gradient of
# the hidden states is. But the sum has the weight's own type: every addition rounds it to 8 bits, what a chunk adds below that
# is lost, and the error grows with the square root of the number of chunks. One chunk for all pairs, which needs the memory that
# the chunks are there to save, does not have it.
#
# Seen, relative error (norm of the difference to the same call in float64, over its norm):
#     pairs   of weight's, chunks of 1   of weight's, one chunk   of hidden's
#         1                    0.0032                   0.0032        0.0030
#        16                    0.0055                   0.0027        0.0026
#       256                    0.0180                   0.0025        0.0025
# What fastdpo does on account of it: gradients of the weight are summed in float32 (fastdpo/integrations/liger.py has Liger's
# interface without this).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
"$folder/env/bin/pip" install --quiet --disable-pip-version-check --no-deps liger-kernel==0.8.5
cd "$folder"
env/bin/python -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

torch.set_num_threads(1)
TOKENS, HIDDEN, VOCABULARY = 16, 32, 256


def errors(pairs, chunk):
    """Of the gradients of weight and hidden in bfloat16, beside those of the same numbers in float64."""
    chance = torch.Generator().manual_seed(0)
    hidden, ref_hidden = torch.randn(2, 2 * pairs, TOKENS, HIDDEN, generator=chance).to(torch.bfloat16)
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=chance) * 0.2).to(torch.bfloat16)
    targets = torch.randint(0, VOCABULARY, (2 * pairs, TOKENS), generator=chance)
    loss_of = LigerFusedLinearDPOLoss(beta=0.1, compiled=False, use_ref_model=True, chunk_size=chunk)
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        w, h = (tensor.detach().clone().to(dtype).requires_grad_() for tensor in (weight, hidden))
        loss_of(w, h, targets, ref_input=ref_hidden.to(dtype), ref_weight=weight.to(dtype))[0].backward()
        gradients.append((w.grad.double(), h.grad.double()))
    return [((got - exact).norm() / exact.norm()).item() for got, exact in zip(*gradients)]


print("liger-kernel", version("liger-kernel"))
found = {}
for pairs in (1, 16, 256):
    found[pairs] = (of_weight, of_hidden), (in_one, _) = errors(pairs, 1), errors(pairs, pairs)
    print(f"{pairs} pairs: weight {of_weight:.4f} in chunks of 1, {in_one:.4f} in one chunk; hidden {of_hidden:.4f} "
          "(expected: the same for any number of pairs)")
(first, _), _ = found[1]
(last, hidden), (in_one, _) = found[256]
assert last > 5 * first and in_one < 1.5 * first and hidden < 1.5 * first
PYTHON
