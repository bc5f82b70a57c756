"""What the process that a campaign's runs are forked from has imported, so that they need not."""

from __future__ import annotations

import gc

import campaign  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

from fastdpo.commands import cache_ref, train  # noqa: F401

# Children need not look through what is there for garbage, and so need not copy it.
gc.collect()
gc.freeze()
