#!/usr/bin/env bash
# torch 2.13.0 on a CPU: scatter_ on a 16-bit tensor, in place, first copies all of the tensor in float32.
#
# One would expect an operation in place that sets one number a row to need memory for those numbers, as it does in
# float32, and as index_put_ does in any dtype. Instead bfloat16 and float16 take twice the tensor's own size more, and the
# time to copy it there and back: a row of 128,256 logits or probabilities is copied to set one of them.
#
# Seen: 256 MB more for a tensor of 128 MB in bfloat16 and in float16, 0 MB in float32, 0 MB by index_put_. What fastdpo
# does on account of it: fastdpo/logps/portable.py sets what it keeps by index_put_.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch.profiler import ProfilerActivity, profile


def most_allocated(work):
    """MB that the largest allocation of an operation takes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    return round(max((event.cpu_memory_usage for event in seen.events()), default=0) / 2**20)


print("torch", torch.__version__)
rows, columns = 4096, 16384
row, column = torch.arange(rows), torch.arange(rows)
for dtype, expected in ((torch.float32, 0), (torch.bfloat16, 256), (torch.float16, 256)):
    table, values = torch.zeros(rows, columns, dtype=dtype), torch.ones(rows, dtype=dtype)
    in_place = most_allocated(lambda: table.scatter_(1, column.unsqueeze(1), values.unsqueeze(1)))
    by_index = most_allocated(lambda: table.index_put_((row, column), values))
    print(f"{dtype}, {table.nbytes >> 20} MB: scatter_ allocates {in_place} MB (expected: 0), index_put_ {by_index} MB")
    assert (in_place, by_index) == (expected, 0)
PYTHON
