"""TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656): a reference that follows the policy.

Every ``ref_model_sync_steps`` steps (the paper's tau) each weight of the reference becomes

    ref := alpha policy + (1 - alpha) ref,

alpha being ``ref_model_mixup_alpha``: below 1 the paper's soft update (eq. 4), at 1 its hard one (eq. 5).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdpo.errors import InputError
from fastdpo.model.adapters import has_transformers_adapter
from fastdpo.trainer.manifest import name_some

REFERENCE_FILE = "reference.safetensors"


class MovingReference(TrainerCallback):
    """Takes the reference along, and knows what a checkpoint has to hold of it.

    Args:
        policy: what is trained.
        reference: a model of its own, whose frozen weights may be the policy's very tensors.
        alpha: above 0, at most 1.
        steps: between updates, at least 1.

    Raises:
        ValueError: their weights are not alike; or an adapter would be mixed, of which only a whole copy is the mixture
            that is meant: that of factors is not that of their products.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module, *, alpha: float, steps: int) -> None:
        if alpha < 1 and (isinstance(policy, PeftModel) or has_transformers_adapter(policy)):
            raise ValueError(
                f"ref_model_mixup_alpha is {alpha:g}, but model has an adapter: a mixture of two adapters' factors is "
                "not the mixture of their weights. Give ref_model_mixup_alpha=1, which copies the adapter, or train "
                "all weights"
            )
        self._policy, self._reference, self._alpha, self._steps = policy, reference, alpha, steps
        ours, theirs = ({name: p.shape for name, p in m.named_parameters()} for m in (policy, reference))
        if ours != theirs:
            names = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
            raise ValueError(
                f"sync_ref_model needs a ref_model of model's own kind, and they differ in {name_some(names)}; leave "
                "ref_model out for a copy of model"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl | None:
        if state.global_step % self._steps == 0:
            self.update()
        return None

    @torch.no_grad()
    def update(self) -> None:
        """One update, weight by weight in at least float32."""
        policy = dict(self._policy.named_parameters())
        for name, theirs in self._moved():
            if self._alpha == 1:
                theirs.copy_(policy[name])
                continue
            wide = torch.promote_types(theirs.dtype, torch.float32)
            theirs.copy_((1 - self._alpha) * theirs.to(wide) + self._alpha * policy[name].to(wide))

    @property
    def nbytes(self) -> int:
        """What :meth:`save` writes."""
        return sum(tensor.nbytes for _, tensor in self._moved())

    def save(self, checkpoint: Path) -> None:
        """Write the weights that are the reference's own to a checkpoint."""
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self._moved()}, self._file(checkpoint))

    def load(self, checkpoint: Path) -> None:
        """Take them from there.

        Raises:
            InputError: they are not there, or not those of this model.
        """
        path = self._file(checkpoint)
        if not path.is_file():
            raise InputError(
                f"{checkpoint} has no {REFERENCE_FILE}: it is of a run without sync_ref_model, whose reference stood "
                "still. Leave sync_ref_model out to go on with it"
            )
        saved, moved = load_file(path), dict(self._moved())
        wrong = [name for name in saved.keys() | moved.keys() if not _is_like(saved.get(name), moved.get(name))]
        if wrong:
            raise InputError(f"{path} does not fit the reference: {name_some(wrong)}")
        with torch.no_grad():
            for name, tensor in moved.items():
                tensor.copy_(saved[name])

    def _moved(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of the reference that are not the policy's very tensors."""
        ours = {parameter.data_ptr() for parameter in self._policy.parameters()}
        return ((name, p) for name, p in self._reference.named_parameters() if p.data_ptr() not in ours)

    @staticmethod
    def _file(checkpoint: Path) -> Path:
        return checkpoint / REFERENCE_FILE


def _is_like(saved: Tensor | None, live: Tensor | None) -> bool:
    return saved is not None and live is not None and saved.shape == live.shape and saved.dtype == live.dtype
