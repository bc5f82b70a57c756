"""Rows with images → padded batches: their pixels as the processor lays them out, in both sequences of each pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from fastdpo.data.collator import PreferenceCollator
from fastdpo.data.image_files import decode_image, digest_of_images, read_image
from fastdpo.data.images import as_images, column_images
from fastdpo.data.sequences import TokenSequence
from fastdpo.data.terms import DIGEST_COLUMN, PART_COLUMN, TEXT_COLUMN, DataError

# Of what processors return, what has an entry for each token (token_type_ids, mm_token_type_ids, moe_mm_token_type_ids)
# ends so; completions are text, which is 0 in all of these.
_PER_TOKEN = "token_type_ids"
_FROM_IDS = ("input_ids", "attention_mask")
# What has one, and is made in another way for each token.
_NOT_SUPPORTED = ("cross_attention_mask", "aspect_ratio_ids", "aspect_ratio_mask")


class VisionCollator(PreferenceCollator):
    """As :class:`PreferenceCollator`, with one more entry in the batch, ``vision``: what the model is given beside.

    That is what the processor returns for the prompts and their images. Tensors whose first dimension goes over the
    images (or their patches, or the rows with images) hold those of the pairs twice, for the chosen sequences and then
    for the rejected ones; those of tokens are [2B, T]. Prompts are never cut: :func:`fastdpo.data.prepare` drops rows
    whose prompt alone has ``max_length`` tokens.

    Args:
        processor: the one that the rows were prepared with.
        options: of ``PreferenceCollator``; ``truncation_mode`` is ``keep_start``.

    Raises:
        ValueError: as ``PreferenceCollator``; or ``keep_end`` would cut images away.
        DataError: when called: an image cannot be read any more, or is another one than when the rows were prepared.
        NotImplementedError: when called: a row is a group, or the processor returns what is not supported; the message
            names it.
    """

    def __init__(self, processor: ProcessorMixin, **options: Any) -> None:
        super().__init__(**options)
        if self.max_length is not None and self.truncation_mode == "keep_end":
            raise ValueError(
                "truncation_mode is 'keep_end', which would cut images out of prompts; with images use 'keep_start' "
                "(--truncation_mode keep_start), or max_length=None"
            )
        self.processor = processor
        # Some make this only when they are asked, and say that their models need it.
        kind = "mm_token_type_ids"
        self._asked = {f"return_{kind}": True} if kind in processor.model_input_names else {}

    def pad(self, sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
        """NotImplementedError: sequences alone do not say which images belong to them."""
        raise NotImplementedError("rows with images are pairs, which are made batches of as a whole")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if any("completion_ids" in row for row in rows):
            raise NotImplementedError("groups of answers are not supported beside rows with images; make pairs of them")
        batch: dict[str, Any] = super().__call__(rows)
        pictured = [row for row in rows if row.get(DIGEST_COLUMN)]
        if pictured:
            made = self._process(pictured, [_pictures(row) for row in pictured])
        elif any(row.get(TEXT_COLUMN) for row in rows):
            made = self._process(rows[:1], None)  # which per-token entries there are
        else:
            return batch
        vision: dict[str, Any] = {}
        for name, value in made.items():
            if name in _NOT_SUPPORTED:
                raise NotImplementedError(
                    f"{type(self.processor).__name__} returns {name}, which is not supported; the model cannot be "
                    "trained on images"
                )
            if name.endswith(_PER_TOKEN):
                vision[name] = self._per_token(name, rows, pictured, made, batch["input_ids"])
            elif name not in _FROM_IDS and pictured:
                vision[name] = torch.cat([value, value]) if isinstance(value, Tensor) else [*value, *value]
        return {**batch, "vision": vision}

    def _process(self, rows: list[dict[str, Any]], pictures: list[list[Any]] | None) -> dict[str, Any]:
        return dict(
            self.processor(
                text=[row[TEXT_COLUMN] for row in rows],
                images=pictures,
                padding=True,
                padding_side="right",
                return_tensors="pt",
                add_special_tokens=False,
                **self._asked,
            )
        )

    def _per_token(
        self, name: str, rows: list[dict[str, Any]], pictured: list[dict[str, Any]], made: dict[str, Any], ids: Tensor
    ) -> Tensor:
        """[2B, T]: the prompts' entries, and 0 on completions, padding and prompts without images."""
        out = torch.zeros_like(ids)
        places = {id(row): place for place, row in enumerate(pictured)}
        for number, row in enumerate(rows):
            if id(row) not in places:
                continue
            place, prompt = places[id(row)], torch.tensor(row["prompt_ids"])
            length = int(made["attention_mask"][place].sum())
            own = made["input_ids"][place, :length]
            front = _front(prompt, own)
            if front is None:
                raise DataError(
                    f"the processor makes other tokens of a prompt now than when the rows were prepared (it begins "
                    f"with {row[TEXT_COLUMN][:60]!r}); prepare the rows with this processor."
                )
            end = min(len(prompt), ids.shape[1])
            values = made[name][place, : end - front]
            for side in (number, number + len(rows)):
                out[side, front:end] = values
        return out


def _front(prompt: Tensor, own: Tensor) -> int | None:
    """How many tokens stand before the processor's in the prompt, which may end before these; None for no match."""
    for front in (0, 1):
        size = len(prompt) - front
        if size <= len(own) and torch.equal(prompt[front:], own[:size]):
            return front
    return None


def _pictures(row: dict[str, Any]) -> list[Any]:
    """The images of a prepared row, decoded."""
    where = f"the row that begins with {row[TEXT_COLUMN][:60]!r}"
    values = row.get(PART_COLUMN) or as_images(column_images(row, where)) or []
    data = [read_image(value, where) for value in values]
    if digest_of_images(data) != row[DIGEST_COLUMN]:
        raise DataError(f"{where}: its images are others than when it was prepared; start the run anew.")
    return [decode_image(item) for item in data]
