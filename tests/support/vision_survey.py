"""What a user of fastdpo gets with each class of transformers' image-text-to-text mapping, found by running it tiny."""

from __future__ import annotations

from dataclasses import dataclass

from family_resume import resume_vision
from tiny_vision_families import NOT_MADE
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from vision_processors import REFUSED, has_processor

# Why some families were not run with images, where no rule tells.
_WITHOUT_IMAGES = {
    "mistral3": "its processor needs torchvision",
    "mistral_large4": "its processor needs torchvision",
    "mllama": "refused: its processor returns cross_attention_mask",
    "smolvlm": "its processor needs the package num2words",
}


@dataclass(frozen=True)
class VisionFamily:
    """A row of the second table in docs/models.md; each field is a cell.

    Attributes:
        model_type: as configurations have it.
        name: the class.
        images: whether it was trained on pairs about images, or why not.
        resume: of :func:`family_resume.resume_vision`.
    """

    model_type: str
    name: str
    images: str
    resume: str


def survey_vision(model_type: str) -> VisionFamily:
    found = resume_vision(model_type)
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    return VisionFamily(model_type, name, _images(model_type, found), found)


def _images(model_type: str, resume: str) -> str:
    if model_type in NOT_MADE:
        return f"not tried: {NOT_MADE[model_type]}"
    if resume.startswith("refused"):
        return "no"
    if has_processor(model_type):
        return "yes"
    if model_type in REFUSED:
        return f"refused: {REFUSED[model_type]}"
    why = _WITHOUT_IMAGES.get(model_type)
    if why is None and model_type not in PROCESSOR_MAPPING_NAMES:
        why = "transformers names no processor for it"
    if why is None and not IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type):
        why = "transformers names no image processor for it"
    if why is None and "pil" not in IMAGE_PROCESSOR_MAPPING_NAMES[model_type]:
        why = "its processor needs torchvision"
    why = why or "no processor was made for it"
    return why if why.startswith("refused") else f"not tried: {why}"
