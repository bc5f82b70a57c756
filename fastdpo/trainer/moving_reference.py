"""TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656): a reference that follows the policy.

Every ``ref_model_sync_steps`` steps (the paper's tau) each weight of the reference becomes

    ref := alpha policy + (1 - alpha) ref,

alpha being ``ref_model_mixup_alpha``: below 1 the paper's soft update (eq. 4), at 1 its hard one (eq. 5).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraModel, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdpo.errors import InputError
from fastdpo.model.adapters import has_transformers_adapter
from fastdpo.trainer.divided_weights import parts_of_both, put_back, whole_shape, whole_weights_of
from fastdpo.trainer.manifest import name_some
from fastdpo.trainer.mixed_adapters import MixedAdapter
from fastdpo.trainer.zero import is_partitioned

REFERENCE_FILE = "reference.safetensors"
_SHARES = "shares"  # in it, of the adapters of a mixture


class MovingReference(TrainerCallback):
    """Takes the reference along, and knows what a checkpoint has to hold of it.

    Args:
        policy: what is trained.
        reference: a model of its own, whose frozen weights may be the policy's very tensors.
        alpha: above 0, at most 1.
        steps: between updates, at least 1.

    Attributes:
        held: gives reference and policy as they are held now, by whatever shards them.

    Raises:
        ValueError: their weights are not alike; or an adapter would be mixed of which no mixture can be had: see
            :class:`fastdpo.trainer.mixed_adapters.MixedAdapter`.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module, *, alpha: float, steps: int) -> None:
        is_lora = isinstance(policy, PeftModel) and isinstance(policy.base_model, LoraModel)
        if alpha < 1 and not is_lora and (isinstance(policy, PeftModel) or has_transformers_adapter(policy)):
            raise ValueError(
                f"ref_model_mixup_alpha is {alpha:g}, but model has an adapter that is not PEFT's LoRA: the mixture of "
                "two adapters is not one of their kind. Give ref_model_mixup_alpha=1, which copies the adapter, or "
                "train all weights"
            )
        self._alpha, self._steps = alpha, steps
        self.held: Callable[[], tuple[nn.Module, nn.Module]] = lambda: (reference, policy)
        ours, theirs = ({name: whole_shape(p) for name, p in m.named_parameters()} for m in (policy, reference))
        if ours != theirs:
            names = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
            raise ValueError(
                f"sync_ref_model needs a ref_model of model's own kind, and they differ in {name_some(names)}; leave "
                "ref_model out for a copy of model"
            )
        self._adapter: MixedAdapter | None = None
        if alpha < 1 and isinstance(policy, PeftModel) and isinstance(reference, PeftModel):
            self._adapter = MixedAdapter(reference, policy, alpha)
            theirs = {name: whole_shape(p) for name, p in reference.named_parameters()}
        shared = {p.data_ptr() for p in policy.parameters() if not is_partitioned(p)}
        moved = (name for name, p in reference.named_parameters() if p.data_ptr() not in shared or is_partitioned(p))
        self._moved = {name: theirs[name] for name in moved}  # of those that are not the policy's very tensors

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl | None:
        if state.global_step % self._steps == 0:
            self.update()
        return None

    @torch.no_grad()
    def update(self) -> None:
        """One update, weight by weight in at least float32. To be called by all processes."""
        mixed: set[str] = set()
        if self._adapter is not None:
            self._adapter.update()
            mixed = self._adapter.names
        for name, theirs, ours in parts_of_both(*self.held()):
            if name not in self._moved or name in mixed:
                continue
            if self._alpha == 1:
                theirs.copy_(ours)
                continue
            wide = torch.promote_types(theirs.dtype, torch.float32)
            theirs.copy_((1 - self._alpha) * theirs.to(wide) + self._alpha * ours.to(wide))

    @property
    def nbytes(self) -> int:
        """What :meth:`save` writes, where each process holds all of the model."""
        return sum(p.nbytes for name, p in self.held()[0].named_parameters() if name in self._moved)

    @torch.no_grad()
    def save(self, checkpoint: Path, *, writes: bool) -> None:
        """Write the weights that are the reference's own to a checkpoint, whole. To be called by all processes.

        Args:
            checkpoint: its folder.
            writes: this process does.
        """
        whole = {}
        for name, tensor in whole_weights_of(self.held()[0]):
            if writes and name in self._moved:
                whole[name] = tensor.detach().cpu().clone().contiguous()
        if self._adapter is not None:
            whole[_SHARES] = self._adapter.shares
        if writes:
            save_file(whole, self._file(checkpoint))

    def load(self, checkpoint: Path) -> None:
        """Take them from there. To be called by all processes.

        Raises:
            InputError: they are not there, or not those of this model.
        """
        path = self._file(checkpoint)
        if not path.is_file():
            raise InputError(
                f"{checkpoint} has no {REFERENCE_FILE}: it is of a run without sync_ref_model, whose reference stood "
                "still. Leave sync_ref_model out to go on with it"
            )
        saved = load_file(path)
        shares = saved.pop(_SHARES, None)
        shapes = {name: tensor.shape for name, tensor in saved.items()}
        wrong = [name for name in shapes.keys() | self._moved.keys() if shapes.get(name) != self._moved.get(name)]
        if wrong:
            raise InputError(f"{path} does not fit the reference: {name_some(wrong)}")
        if (shares is None) != (self._adapter is None):
            raise InputError(f"{path} is of a run with another ref_model_mixup_alpha, whose adapters it has not")
        put_back(self.held()[0], saved)
        if self._adapter is not None and shares is not None:
            self._adapter.take_up(shares)

    @staticmethod
    def _file(checkpoint: Path) -> Path:
        return checkpoint / REFERENCE_FILE
