#!/usr/bin/env bash
# peft 0.21.2: a BOFT adapter that is made where its CUDA extension cannot be compiled leaves CC and CXX at gcc, for good.
#
# One would expect that a fallback which warns ("Failed to load the CUDA extension") leaves the process as it was. It does not:
# the environment is changed for the compilation by a context manager without try/finally, and the error goes past its end. What
# is compiled later in the process, or by its children, by CXX (torch.utils.cpp_extension, ninja, make) is linked by gcc, which
# leaves the C++ library out; whoever had set CXX has lost that.
#
# Seen: before, neither is set; after get_peft_model, CC and CXX are both "gcc", and the adapter works. An own value of CXX is
# replaced, too. What fastdpo does on account of it: its tests put both back (tests/trainer/test_outside_adapters.py); a library
# that had been linked so ended the process where it was loaded.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
# No toolkit, as on most machines without a GPU; and nothing that was compiled before.
env -u CUDA_HOME -u CC CXX=my-own-compiler TORCH_EXTENSIONS_DIR="$folder/extensions" PATH=/usr/bin:/bin env/bin/python -W ignore - <<'PYTHON'
import os

import peft
import torch
from peft import BOFTConfig, get_peft_model

model = torch.nn.Sequential(torch.nn.Linear(16, 16))
print("peft", peft.__version__)
print("before:", {name: os.environ.get(name) for name in ("CC", "CXX")})
adapted = get_peft_model(model, BOFTConfig(boft_block_size=4, target_modules=["0"]))
adapted(torch.randn(2, 16)).sum().backward()
after = {name: os.environ.get(name) for name in ("CC", "CXX")}
print("after: ", after, "(expected: CC unset, CXX my-own-compiler)")
assert after == {"CC": "gcc", "CXX": "gcc"}, after
PYTHON
