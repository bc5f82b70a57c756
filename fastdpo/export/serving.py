"""What vLLM and llama.cpp make of an adapter as it is, told without them: what they refuse, and what they change.

Read from parts of the sources of vLLM (``vllm/lora/peft_helper.py``, the newest that could be had and earlier ones;
``lora_model.py`` at commit 0306474e; ``utils.py``, ``layers/logits_processor.py``, ``vllm/config/lora.py``), of
llama.cpp's ``convert_lora_to_gguf.py`` at commit 0b03adaa, and of its ``llama-adapter.cpp``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import AutoConfig

from fastdpo.export.live import MergeError
from fastdpo.model.adapter_vocabulary import adapter_shapes
from fastdpo.model.adapters import is_adapter

MERGE = "fastdpo merge"
# The ranks that vLLM makes room for; 16 unless it is told.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_LORA_PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_EMBEDDINGS = ("embed_tokens", "lm_head")
# Ways to begin a LoRA that take something from the base, when it is loaded as when it is made.
_TAKING_FROM_THE_BASE = ("pissa", "corda", "olora", "loftq")


@dataclass(frozen=True)
class Finding:
    """Something of an adapter that a program does not take as it is.

    Attributes:
        what: it is.
        happens: what the program does.
        help: what to do.
        is_refused: it is not loaded; else it is, and says, or may say, something else.
    """

    what: str
    happens: str
    help: str
    is_refused: bool = True


@dataclass(frozen=True)
class Facts:
    """What is known of an adapter without its base's weights.

    Attributes:
        kind: PEFT's name of it.
        config: its configuration's values.
        shapes: of its tensors, by the names that they have in the base.
        is_tied: the base's embeddings are one; None where its configuration is not there.
        vocabulary: for how many tokens the base has embeddings; None likewise.
    """

    kind: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    is_tied: bool | None = None
    vocabulary: int | None = None

    def __getitem__(self, name: str) -> Any:
        return self.config.get(name)

    @property
    def modules(self) -> set[str]:
        """The last names of the modules that have LoRA."""
        found = {name for key in self.shapes for part in _LORA_PARTS if (name := key.removesuffix(part)) != key}
        return {name.rpartition(".")[2] for name in found}

    @property
    def rank(self) -> int:
        """The highest."""
        ranks = [
            shape[0] for key, shape in self.shapes.items() if key.endswith((".lora_A.weight", ".lora_embedding_A"))
        ]
        return max(ranks, default=int(self["r"] or 0))

    @property
    def embedding_sizes(self) -> set[int]:
        """For how many tokens its LoRA on embeddings is."""
        rows = {".lora_embedding_A": 1, "lm_head.lora_B.weight": 0}
        return {shape[axis] for key, shape in self.shapes.items() for end, axis in rows.items() if key.endswith(end)}

    @property
    def others(self) -> list[str]:
        """Tensors that are no part of a LoRA."""
        return sorted(key for key in self.shapes if not key.endswith(_LORA_PARTS))


def facts_of(name: str) -> Facts:
    """Read an adapter's configuration and the header of its tensors.

    Raises:
        MergeError: ``name`` is no adapter.
    """
    if not is_adapter(name):
        if not Path(name).is_dir():
            raise MergeError(
                f"there is no folder {name}, and no adapter of that name on the Hub, or it was not reached"
            )
        raise MergeError(f"{name} is no adapter (no adapter_config.json); a whole model needs no check")
    config = PeftConfig.from_pretrained(name)
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    base = config.base_model_name_or_path
    is_tied = vocabulary = None
    if base:
        with contextlib.suppress(OSError, ValueError):
            of_base = AutoConfig.from_pretrained(base, revision=config.revision).get_text_config()
            is_tied, vocabulary = bool(of_base.tie_word_embeddings), int(of_base.vocab_size)
    return Facts(kind, vars(config), adapter_shapes(name), is_tied, vocabulary)


def check_vllm(facts: Facts, max_lora_rank: int | None = None) -> list[Finding]:
    """What vLLM does not take of an adapter.

    Args:
        facts: of it.
        max_lora_rank: what vLLM is started with; by default its own default.
    """
    found = list(_of_any(facts, "vLLM"))
    if facts.kind != "LORA":
        return found
    found += _of_vllm_patterns(facts)
    limit = 16 if max_lora_rank is None else max_lora_rank
    if facts.rank > limit:
        room = next((rank for rank in _VLLM_RANKS if rank >= facts.rank), None)
        help = MERGE if room is None else f"start vLLM with --max-lora-rank {room}"
        found.append(Finding(f"its rank is {facts.rank}", f"vLLM takes up to {limit}", help))
    if targets := sorted(facts.modules & set(_EMBEDDINGS)):
        words = " and ".join(targets)
        held = f"{words} {'are targets' if len(targets) > 1 else 'is a target'}"
        found.append(
            Finding(held, "vLLM takes that for some model classes alone (those with embedding_modules)", MERGE, False)
        )
    if any(key.endswith(".base_layer.weight") for key in facts.others):
        found.append(
            Finding(
                "it holds the base's own embedding as well",
                "vLLM passes over it: rows that were added or changed are the base's, or missing",
                f"{MERGE}, if embeddings were resized",
                False,
            )
        )
    return found


def _of_vllm_patterns(facts: Facts) -> Iterator[Finding]:
    for name in ("alpha_pattern", "rank_pattern"):
        if facts[name]:
            early = "vLLM reads it of late; releases that do not scale all modules alike"
            yield Finding(f"it has {name}", early, MERGE, False)


def check_llama_cpp(facts: Facts) -> list[Finding]:
    """What llama.cpp's conversion of adapters (``convert_lora_to_gguf.py``) does not take of one."""
    found = list(_of_any(facts, "llama.cpp"))
    if facts.kind != "LORA":
        return found
    if facts["use_rslora"]:
        factor = math.sqrt(facts.rank or 1)
        found.append(
            Finding(
                "it is an rsLoRA",
                f"the conversion does not read that: the adapter counts for 1/{factor:.3g} of what it was trained as",
                f"{MERGE}, or llama.cpp's --lora-scaled with {factor:.6g}",
                False,
            )
        )
    if facts["alpha_pattern"]:
        found.append(
            Finding("it has alpha_pattern", "the conversion does not read it, and scales all alike", MERGE, False)
        )
    if "lm_head" in facts.modules and facts.is_tied is not False:
        tied = "the base's embeddings are one" if facts.is_tied else "the base's embeddings may be one"
        found.append(Finding(f"lm_head is a target, and {tied}", "the conversion stops for such bases", MERGE))
    if any(key.endswith(".base_layer.weight") for key in facts.others):
        found.append(
            Finding(
                "it holds the base's own embedding as well",
                "the conversion passes over it: rows that were added or changed are lost",
                f"{MERGE}, if embeddings were resized",
                False,
            )
        )
    return found


def _of_any(facts: Facts, program: str) -> Iterator[Finding]:
    """What neither takes."""
    if facts.kind != "LORA":
        yield Finding(
            f"it is of the kind {facts.kind}", f"{program} takes LoRA alone", f"{MERGE}, where it can be merged"
        )
        return
    if facts["use_dora"]:
        yield Finding("it is a DoRA", f"{program} refuses its magnitudes", MERGE)
    saved = sorted(facts["modules_to_save"] or ())
    norms = [name for name in saved if "norm" in name] if program == "llama.cpp" else []
    if norms:
        passed = "the conversion writes them, and llama.cpp passes over them"
        yield Finding(f"modules_to_save holds {', '.join(norms)}", passed, MERGE, False)
    if others := [name for name in saved if name not in norms]:
        yield Finding(f"modules_to_save holds {', '.join(others)}", f"{program} refuses whole modules", MERGE)
    if facts["trainable_token_indices"]:
        yield Finding("it trains tokens by themselves", f"{program} refuses their rows", MERGE)
    if (facts["bias"] or "none") != "none":
        yield Finding(f"it trains biases (bias={facts['bias']!r})", f"{program} refuses them", MERGE)
    if facts["lora_bias"]:
        yield Finding("its matrices have biases (lora_bias)", f"{program} refuses them", "train it without lora_bias")
    if facts["layer_replication"]:
        yield Finding("it repeats layers (layer_replication)", f"{program} has the base's layers alone", MERGE)
    if facts["alora_invocation_tokens"] and program == "vLLM":
        early = "vLLM refuses it, and earlier releases have it on from the first token"
        yield Finding("it is an activated LoRA", early, "serve it by llama.cpp")
    init = facts["init_lora_weights"]
    if isinstance(init, str) and init.lower().startswith(_TAKING_FROM_THE_BASE):
        plain = {
            "vLLM": "vLLM refuses it, and earlier releases put it on the base as it is",
            "llama.cpp": "the conversion does not read that, and it is put on the base as it is",
        }
        what = f"it was begun by {init} (init_lora_weights), for which PEFT changes the base"
        yield Finding(what, plain[program], MERGE, program == "vLLM")
    for variant, name in (("use_qalora", "QALoRA"), ("use_bdlora", "BD-LoRA")):
        if facts[variant]:
            yield Finding(f"it is a {name}", f"{program} does not compute that", f"{MERGE}, where it can be merged")
    sizes = facts.embedding_sizes - {facts.vocabulary}
    if sizes and facts.vocabulary is not None:
        said = " and ".join(map(str, sorted(sizes)))
        yield Finding(
            f"it has LoRA on embeddings of {said} tokens, and the base has {facts.vocabulary}",
            f"{program} takes no more and no fewer",
            MERGE,
        )
    if facts["target_parameters"]:
        yield Finding(
            "it has LoRA on parameters of experts (target_parameters)",
            f"{program} knows the layout of few of these",
            MERGE,
        )
    known = _explained(facts)
    if left := [key for key in facts.others if key not in known]:
        more = f" and {len(left) - 2} more" if len(left) > 2 else ""
        what = f"it holds {', '.join(left[:2])}{more}, which {'are' if len(left) > 1 else 'is'} no LoRA"
        resized = any(key.endswith(tuple(f"{name}.weight" for name in _EMBEDDINGS)) for key in left)
        why = " (embeddings that were resized)" if resized else ""
        yield Finding(what + why, f"{program} refuses such tensors", MERGE)


def _explained(facts: Facts) -> set[str]:
    """Tensors beside a LoRA that another finding is about."""
    saved = tuple(facts["modules_to_save"] or ())
    found = set()
    for key in facts.others:
        path = key.rpartition(".")[0].removesuffix(".original_module").removesuffix(".modules_to_save")
        by_module = path.endswith(saved)  # as PEFT finds them
        by_bias = key.endswith(".bias") and ((facts["bias"] or "none") != "none" or bool(facts["lora_bias"]))
        by_name = any(word in key for word in (".lora_magnitude_vector", ".token_adapter.", ".base_layer.weight"))
        if by_module or by_bias or by_name:
            found.add(key)
    return found
