"""Runs in a process of its own, started by bench/plan.py: trains made-up models, and says what memory each took.

The peak is of the process's resident memory while it trains, beyond what it held before the model was made; that of the
looks at the models, which come before the first step, is told apart. Each run is a fork of the process that has
imported everything, for what one run has freed may be kept for the next; a run of a small model goes first in it, so
that what libraries load and set up for themselves is there already.

Where tensors' memory is taken from, a job says: ``"ours"``, as `fastdpo train` has it on a CPU; ``"torch"``, whose
allocator cannot use much of what is freed again; or a number of bytes, which is torch's with glibc's malloc handing
each block of so many back to the system at once, as ``MALLOC_MMAP_THRESHOLD_`` has it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common.jobs import Job, serve
from common.memory import CPUMemory
from datasets import Dataset
from end_to_end.measure import Clock
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.logps.cpu_memory import use_tensor_memory
from fastdpo.model.quantization import make_quantization_config
from fastdpo.plan.batches import Row, made_up_rows
from fastdpo.plan.setup import Setup

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h

_LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 16_000,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-9m": _LLAMA,
    "llama-small": _LLAMA
    | {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 1_024},
    "qwen2-16m": _LLAMA
    | {"model_type": "qwen2", "intermediate_size": 1_408, "num_key_value_heads": 1, "vocab_size": 32_000},
    "gpt2-10m": {"model_type": "gpt2", "n_embd": 256, "n_layer": 6, "n_head": 4, "vocab_size": 20_000},
    "mixture-12m": _LLAMA
    | {"model_type": "qwen3_moe", "hidden_size": 192, "num_hidden_layers": 4, "head_dim": 64, "intermediate_size": 512}
    | {"moe_intermediate_size": 192, "num_experts": 16, "num_experts_per_tok": 4},
}


@dataclass(frozen=True)
class PlanCase:
    """A run of ``pairs`` pairs a step, each a prompt with two completions of so many tokens.

    Attributes:
        model: of ``MODELS``.
        layout: of the batches.
        dtype: of the weights.
        autocast: layers compute in bfloat16.
        method: ``full``, ``lora``, or ``qlora``.
        max_tokens: of a micro-batch; None for one of all pairs.
    """

    model: str
    layout: str = "shared"
    checkpointing: bool = True
    dtype: str = "float32"
    autocast: bool = False
    method: str = "full"
    optim: str = "adamw_torch_fused"
    cached: bool = False
    pairs: int = 4
    prompt: int = 120
    completion: int = 100
    max_tokens: int | None = None
    steps: int = 2

    @property
    def name(self) -> str:
        words = [self.model, self.method, self.layout, "checkpointing" if self.checkpointing else "kept"]
        words.append("bf16 over float32" if self.autocast else self.dtype)
        words += [self.optim] if self.optim != "adamw_torch_fused" else []
        words += ["cached reference"] if self.cached else []
        words += [f"parts of {self.max_tokens}"] if self.max_tokens else []
        return ", ".join(words)

    @property
    def config(self) -> PreTrainedConfig:
        values = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | MODELS[self.model]
        return AutoConfig.for_model(**values | {"max_position_embeddings": 2_048})

    @property
    def rows(self) -> list[Row]:
        return made_up_rows(self.prompt, self.completion, self.steps * self.pairs, 1_000)

    @property
    def peft_config(self) -> LoraConfig | None:
        return None if self.method == "full" else LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")

    def setup(self) -> Setup:
        """The run as :mod:`fastdpo.plan` takes it."""
        reference = "cache" if self.cached else "adapter" if self.method != "full" else "model"
        return Setup(
            self.config,
            dtype=getattr(torch, self.dtype),
            autocast=torch.bfloat16 if self.autocast else None,
            peft_config=self.peft_config,
            bits=4 if self.method == "qlora" else None,
            checkpointing=self.checkpointing,
            reference=reference,
            optim=self.optim,
        )


def make_model(case: PlanCase, folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(case.config, dtype=getattr(torch, case.dtype))
    if case.method != "qlora":
        return model
    model.save_pretrained(folder)
    quantization = make_quantization_config(4)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map={"": "cpu"}, dtype=getattr(torch, case.dtype)
    )


def train(case: PlanCase) -> tuple[dict[str, list[float]], int]:
    """The seconds of each step but the first, by the wall clock and of all cores, and the losses; and the peak before
    the first step, from which it counts anew."""
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            folder,
            per_device_train_batch_size=case.pairs,
            max_steps=case.steps,
            optim=case.optim,
            packing=case.layout,
            gradient_checkpointing=case.checkpointing,
            bf16=case.autocast,
            max_tokens_per_batch=case.max_tokens,
            precompute_ref_log_probs=case.cached,
            precompute_ref_batch_size=1 if case.cached else None,
            use_cpu=True,
            max_length=None,
            train_sampling_strategy="sequential",
            router_aux_loss_coef=0.0 if "mixture" in case.model else None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = make_model(case, Path(folder) / "base")
        dataset = Dataset.from_list(case.rows)
        clock = Clock("cpu")
        trainer = DPOTrainer(model, args=args, train_dataset=dataset, peft_config=case.peft_config, callbacks=[clock])
        # What was looked at beforehand is over; it has a peak of its own, of short rows.
        before = CPUMemory.peak()
        CPUMemory.mark()
        trainer.train()
    seconds = {
        name: [b - a for a, b in pairwise(ends)]
        for name, ends in (("seconds", clock.ends), ("cpu_seconds", clock.cpu_ends))
    }
    return seconds | {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}, before


def take_memory(memory: str | int) -> None:
    """Has tensors' memory taken from there, from now on."""
    if memory == "ours" and not use_tensor_memory():
        raise OSError("fastdpo's memory of CPU tensors is not to be had here")
    if isinstance(memory, int) and ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, memory) != 1:
        raise OSError("this system's malloc has no threshold to set")


def work(job: Job) -> dict[str, Any]:
    cases = [PlanCase(**case) for case in job["cases"]]
    take_memory(job["memory"])
    forking = multiprocessing.get_context("fork")
    results: list[dict[str, Any]] = []
    for case in cases:
        receiver, sender = forking.Pipe(duplex=False)
        process = forking.Process(target=_send_measured, args=(case, sender))
        process.start()
        sender.close()
        try:
            results.append(receiver.recv())
        except EOFError:  # it was killed
            results.append({"failed": "the process ended"})
        process.join()
    return {"results": results}


def _send_measured(case: PlanCase, sender: Connection) -> None:
    try:
        train(replace(case, model="llama-small", prompt=20, completion=20, max_tokens=None, steps=2))
        held = CPUMemory.mark()
        told, before = train(case)
    except Exception as error:  # of one; the others are measured
        sender.send({"failed": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"})
        return
    peak = None if held is None else CPUMemory.peak() - held
    looks = None if held is None else before - held
    sender.send({"peak_bytes": peak, "looks_bytes": looks, **told})


def job_of(cases: Sequence[PlanCase], folder: Path, threads: int, memory: str | int = "ours") -> Job:
    """The job to measure ``cases``, with tensors' memory taken from there."""
    job = {"cases": [asdict(case) for case in cases], "folder": str(folder), "threads": threads}
    return job | {"memory": memory}


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    serve(work, __doc__)
