"""What is measured: heads of known models, the batch, and the tensors of one DPO step."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from loss_layer.truth import sequence_logps
from torch import Tensor

BETA = 0.1
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Case:
    """One setting: B pairs, 2B rows of T tokens, a head of V x H."""

    name: str
    hidden_size: int
    vocab_size: int
    softcap: float | None
    pairs: int
    length: int
    prompt_share: float
    dtype: str
    frozen: bool
    cached: bool
    device: str

    @property
    def tokens(self) -> int:
        return 2 * self.pairs * self.length

    @property
    def prompt_lengths(self) -> list[int]:
        """Per pair, the leading positions without a target: around prompt_share of the row, and not all the same."""
        spread = min(self.prompt_share, 1 - self.prompt_share) / 2
        steps = [2 * i / (self.pairs - 1) - 1 if self.pairs > 1 else 0 for i in range(self.pairs)]
        return [min(round(self.length * (self.prompt_share + spread * step)), self.length - 1) for step in steps]

    @property
    def scored_tokens(self) -> int:
        return self.tokens - 2 * sum(self.prompt_lengths)

    @property
    def products(self) -> int:
        """Matrix products a token needs: policy logits, reference logits, gradient of hidden, gradient of weight."""
        return 4 - self.frozen - self.cached

    @property
    def flops(self) -> float:
        return 2.0 * self.products * self.scored_tokens * self.hidden_size * self.vocab_size


# name -> hidden size, vocabulary, final-logit softcap
HEADS: dict[str, tuple[int, int, float | None]] = {
    "tiny": (128, 4_096, None),
    "small": (512, 32_000, None),
    "qwen2.5-0.5b": (896, 151_936, None),
    "llama-3.2-1b": (2_048, 128_256, None),
    "llama-3.1-8b": (4_096, 128_256, None),
    "gemma-2-2b": (2_304, 256_000, 30.0),
}

# name -> pairs, length; on CUDA every model has 8 pairs of 512 tokens, 8,192 tokens in all.
_CPU_BATCHES = {
    "tiny": (2, 64),
    "small": (4, 256),
    "qwen2.5-0.5b": (2, 512),
    "llama-3.2-1b": (1, 256),
    "llama-3.1-8b": (1, 128),
    "gemma-2-2b": (1, 128),
}


def is_large(name: str) -> bool:
    return name not in ("tiny", "small")


def named_case(name: str, device: str, **changes: object) -> Case:
    """The case of that name with its defaults on the device; changes that are None leave the default."""
    hidden_size, vocab_size, softcap = HEADS[name]
    pairs, length = (8, 512) if device == "cuda" and is_large(name) else _CPU_BATCHES[name]
    case = Case(
        name=name,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        softcap=softcap,
        pairs=pairs,
        length=length,
        prompt_share=0.25 if name == "tiny" else 0.0,
        dtype="bfloat16" if device == "cuda" or is_large(name) else "float32",
        frozen=False,
        cached=False,
        device=device,
    )
    return dataclasses.replace(case, **{key: value for key, value in changes.items() if value is not None})


@dataclass
class Problem:
    """The tensors of one step, on the device, and what whoever made the batch knows about it."""

    case: Case
    hidden: Tensor  # [2B, T, H], chosen first; needs a gradient
    weight: Tensor  # [V, H]; needs one unless frozen
    targets: Tensor  # [2B, T]
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_logps: Tensor | None  # [2B], cached
    rows: Tensor | None  # [scored] positions in [2B * T] that have a target; None where all have

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def scored(self, values: Tensor) -> Tensor:
        """[2B, T, ...] to [scored, ...]."""
        flat = values.flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def sum_sequences(self, values: Tensor) -> Tensor:
        """[scored] to [2B]."""
        if self.rows is not None:
            values = values.new_zeros(self.targets.numel()).index_copy(0, self.rows, values)
        return values.view(self.targets.shape).sum(-1)


def make_tensors(case: Case) -> dict[str, Tensor | None]:
    """Inputs of a trained model's kind, seeded: half of the targets are more likely than all else together, half are
    spread down to one in V; the reference is the policy a little moved, so that the loss is near ln 2 and not at it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dtype = getattr(torch, case.dtype)
    batch = (2 * case.pairs, case.length)
    weight = normal(case.vocab_size, case.hidden_size).div_(math.sqrt(case.hidden_size))
    targets = torch.randint(0, case.vocab_size, batch, generator=generator)
    lean = torch.rand(*batch, 1, generator=generator) * 2 * math.log(case.vocab_size)
    hidden = normal(*batch, case.hidden_size) + lean * weight[targets]
    for row, prompt in enumerate(case.prompt_lengths * 2):
        targets[row, :prompt] = IGNORE_INDEX
    tensors = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets}
    ref_hidden = (hidden + 0.05 * normal(*hidden.shape)).to(dtype)
    ref_weight = weight.add_(normal(*weight.shape).mul_(0.05 / math.sqrt(case.hidden_size))).to(dtype)
    return tensors | {"ref_hidden": ref_hidden, "ref_weight": ref_weight}


def make_problem(case: Case) -> Problem:
    """The tensors on the case's device. A cached reference is computed here, in float64."""
    tensors = {name: tensor.to(case.device) for name, tensor in make_tensors(case).items()}
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_(not case.frozen)
    flat = tensors["targets"].flatten() != IGNORE_INDEX
    problem = Problem(
        case=case,
        hidden=hidden,
        weight=weight,
        targets=tensors["targets"],
        ref_hidden=tensors["ref_hidden"],
        ref_weight=tensors["ref_weight"],
        ref_logps=None,
        rows=None if flat.all() else flat.nonzero().squeeze(-1),
    )
    if case.cached:
        problem.ref_logps = sequence_logps(problem, problem.ref_hidden, problem.ref_weight).float()
        problem.ref_hidden = problem.ref_weight = None
    return problem


def save_problem(problem: Problem, file: Path) -> None:
    fields = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    fields = {name: value.detach() if isinstance(value, Tensor) else value for name, value in fields.items()}
    torch.save(fields | {"case": dataclasses.asdict(problem.case)}, file)


def load_problem(file: Path, device: str) -> Problem:
    fields = torch.load(file, map_location=device)
    problem = Problem(**fields | {"case": Case(**fields["case"])})
    problem.hidden.requires_grad_()
    problem.weight.requires_grad_(not problem.case.frozen)
    return problem
