"""Rows with images → token ids: what a processor makes of a prompt, and as many ids as it puts in an image's place.

Images stand in prompts alone. Each place is one placeholder in the rendered text, which the processor expands; the
answers are tokenised as they are without images.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from fastdpo.data.encode import Ids
from fastdpo.data.image_files import UnreadableImageError, decode_image, digest_of_images, read_image
from fastdpo.data.image_parts import count_parts, with_parts, without_payloads
from fastdpo.data.images import column_images
from fastdpo.data.rows import Row, Text, read_row
from fastdpo.data.settings import Preparation
from fastdpo.data.terms import DataError, first_line
from fastdpo.data.tokens import RowTokenizer, Tokens

logger = logging.getLogger(__name__)


@dataclass
class VisionTokens(Tokens):
    """A row's ids and fate, and its images.

    Attributes:
        part_images: the images that its messages name, not read; empty where a column has them.
        digest: of the images' bytes; "" for none.
        pictures: the images, until they have been processed.
    """

    part_images: list[Any] = field(default_factory=list)
    digest: str = ""
    pictures: list[Image.Image] = field(default_factory=list)


def tokenizer_in(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer, or that of a processor, with the processor's chat template."""
    if not isinstance(processing_class, ProcessorMixin):
        return processing_class
    template = getattr(processing_class, "chat_template", None)
    tokenizer: PreTrainedTokenizerBase = processing_class.tokenizer
    if template is not None and template != tokenizer.chat_template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def image_token_ids(processor: ProcessorMixin) -> set[int]:
    """The ids that stand for images: before they are expanded, and after."""
    known = {getattr(processor, "image_token_id", None), *getattr(processor, "image_token_ids", ())}
    return {token for token in known if isinstance(token, int)}


class VisionRowTokenizer(RowTokenizer):
    """One processor, and what was found out about its tokenizer and its template.

    Args:
        processor: as ``prepare`` takes it.
        preparation, implicit: see :class:`RowTokenizer`.
    """

    def __init__(self, processor: ProcessorMixin, preparation: Preparation, implicit: bool) -> None:
        super().__init__(tokenizer_in(processor), preparation, implicit)
        self._processor = processor
        placeholder = getattr(processor, "image_placeholder_token", None)  # of the few where it is another
        self._image_token: str | None = placeholder or getattr(processor, "image_token", None)
        self._image_ids = image_token_ids(processor)
        # What a prompt may not have yet: some processors put another token where they find the image's.
        self._expanded_ids = self._image_ids - {self._tokenizer.convert_tokens_to_ids(self._image_token or "")}

    def new_tokens(self) -> VisionTokens:
        return VisionTokens()

    def tokenize(self, rows: list[dict[str, Any]], numbers: list[int]) -> list[Tokens]:
        found = super().tokenize(rows, numbers)
        for tokens, number in zip(found, numbers, strict=True):
            assert isinstance(tokens, VisionTokens)
            if not tokens.drop:
                self._put_in_images(tokens, number)
            tokens.pictures = []
        return found

    def _read(self, tokens: Tokens, row: dict[str, Any], where: str) -> Row | str:
        assert isinstance(tokens, VisionTokens)
        in_columns = column_images(row, where)
        bare, named = dict(row), {}
        for side in ("chosen", "rejected") if self._implicit else ("prompt", "chosen", "rejected"):
            bare[side], named[side] = without_payloads(row[side])
        read = read_row(bare, self._implicit, where, images=True)
        if isinstance(read, str):
            return read
        images = in_columns
        if not isinstance(read.pair, Text):
            parts = count_parts(read.pair.prompt)
            sides = [named["prompt"]] if named.get("prompt") else [named["chosen"], named["rejected"]]
            if any(side[:parts] != sides[0][:parts] for side in sides):
                return "images_do_not_fit"  # the two conversations begin with different images
            tokens.part_images = [image for image in sides[0][:parts] if image is not None]
            if tokens.part_images and (in_columns or len(tokens.part_images) < parts):
                return "images_do_not_fit"
            images = tokens.part_images or in_columns
            if not parts and images:
                read.pair.prompt = with_parts(read.pair.prompt, len(images))
                parts = count_parts(read.pair.prompt)
            if parts != len(images):
                return "images_do_not_fit"
        try:
            data = [read_image(image, where) for image in images]
            tokens.pictures = [decode_image(item) for item in data]
        except UnreadableImageError as error:
            logger.warning("%s: an image cannot be read: %s.", where, error)
            return "image_unreadable"
        tokens.digest = digest_of_images(data)
        return read

    def _put_in_images(self, tokens: VisionTokens, number: int) -> None:
        """Expand what stands for images in the prompt."""
        count = len(tokens.pictures)
        places = tokens.text.count(self._image_token) if self._image_token is not None else count
        # Where a text holds the token itself, the model would look for an image there.
        is_free = self._image_ids.isdisjoint((*tokens.chosen, *tokens.rejected))
        if places != count or not is_free or not self._expanded_ids.isdisjoint(tokens.prompt):
            tokens.drop = "images_do_not_fit"
            return
        if not count:
            return
        try:
            out = self._processor(text=[tokens.text], images=[tokens.pictures], add_special_tokens=False)
        except (ValueError, OSError) as error:
            logger.warning("row %d: the processor refuses its images: %s.", number, first_line(str(error)))
            tokens.drop = "image_unreadable"
            return
        expanded = list(out["input_ids"][0])
        kept = len(expanded) - len(tokens.lost)
        if expanded[kept:] != tokens.lost:
            raise DataError(
                f"row {number}: the end of the prompt has other tokens once its images are put in, so where the answer "
                "begins cannot be told; end the prompt where a token ends (a chat template's special token does)."
            )
        tokens.prompt = self._front(tokens.prompt, expanded) + expanded[:kept]

    def _front(self, prompt: Ids, expanded: Ids) -> Ids:
        """The token that the tokenizer puts before every text, where it did: the processor was told not to."""
        bos = self._tokenizer.bos_token_id
        return prompt[:1] if prompt[:1] == [bos] != expanded[:1] else []
