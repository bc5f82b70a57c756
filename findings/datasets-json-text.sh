#!/usr/bin/env bash
# datasets 5.2.0: load_dataset("json") changes what valid JSON lines say.
#
# One would expect each value back as it is written, or an error where a column holds values of several types. Instead:
#
# - In a column that mixes lists with strings, strings that are JSON are decoded: '"To be."' loses its quotation marks,
#   '["p", "q"]' becomes a list, '42' a number.
# - Floats lose digits beyond the tenth in every column of such a file: -123.45678901234567 → -123.4567890123,
#   1e-12 → 0.0.
# - Strings that are ISO dates become datetimes, also inside objects.
#
# Seen: the three pairs of lists that this prints. fastdpo reads JSON by itself on account of it (fastdpo/data/reading).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0
cd "$folder"
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 "$folder/env/bin/python" - <<'PYTHON'
import datetime
import json
from pathlib import Path

import datasets

datasets.disable_progress_bars()


def load(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(datasets.load_dataset("json", data_files=name, split="train"))


print("datasets", datasets.__version__)
strings = [{"a": ["x"]}, {"a": '"To be."'}, {"a": '["p", "q"]'}, {"a": "42"}]
found = load("strings.jsonl", strings)
print(strings, "->", found)
assert found == [{"a": ["x"]}, {"a": "To be."}, {"a": ["p", "q"]}, {"a": 42}]

digits = [{"a": [1], "n": -123.45678901234567}, {"a": "x", "n": 1e-12}]
found = load("digits.jsonl", digits)
print(digits, "->", found)
assert [row["n"] for row in found] == [-123.4567890123, 0.0]

dates = [{"a": {"date": "2024-05-01"}}]
found = load("dates.jsonl", dates)
print(dates, "->", found)
assert found == [{"a": {"date": datetime.datetime(2024, 5, 1)}}]
PYTHON
