"""Batches with images: scored as each row is by itself, by the model's own logits, and looked at before they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vision import VISION_FAMILIES, make_image, make_processor, make_vision_model, vision_rows
from transformers import LlavaForConditionalGeneration
from vision_processors import PROCESSED, with_processor

from fastdpo.data import prepare
from fastdpo.data.collator import PreferenceCollator
from fastdpo.data.vision_collator import VisionCollator
from fastdpo.model.head import FusedHead
from fastdpo.model.row_collator import RowCollator
from fastdpo.model.scoring import Scorer
from fastdpo.model.vision_check import check_images

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

# A sum of some 60 log-probabilities of about -6, in float32, in another order.
TOLERANCE = 60 * 6 * 4 * torch.finfo(torch.float32).eps
CPU = torch.device("cpu")
MESSAGE = {"role": Value("string"), "content": Value("string")}
ALL_FAMILIES = [
    *VISION_FAMILIES,
    *(pytest.param(name, marks=pytest.mark.slow) for name in PROCESSED if name not in VISION_FAMILIES),
]
MESSAGES = {side: List(MESSAGE) for side in ("prompt", "chosen", "rejected")}


def prepared(family: str) -> tuple[Any, Dataset]:
    """Rows with one image, with none, with two, of different sizes, in no order of length."""
    processor, rows = with_processor(family)[0], vision_rows(6)
    for i in (1, 4):
        rows[i]["images"] = []
    rows[2]["images"] = [*rows[2]["images"], make_image(50, (32, 12))]
    return processor, prepare(Dataset.from_list(rows), processor, max_length=None)[0]


def model_of(family: str) -> Any:
    """Whose images matter to what it says."""
    model = with_processor(family)[1]()
    if family not in VISION_FAMILIES:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)
            model.get_output_embeddings().weight.normal_(std=0.3)
    return model


def scorer_of(model: Any) -> Scorer:
    return Scorer(model, model, FusedHead(model))


def sums(scorer: Scorer, batch: dict[str, Any]) -> torch.Tensor:
    """[2, B]: of the chosen and the rejected sequences."""
    with torch.no_grad():
        found = scorer.score(batch)
    return found.sums[found.pairs.t()].squeeze(-1)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_rows_do_not_depend_on_their_batch(family: str) -> None:
    processor, rows = prepared(family)
    scorer, collator = scorer_of(model_of(family)), VisionCollator(processor, pad_token_id=0)
    whole = sums(scorer, collator([rows[i] for i in range(6)]))
    # One after another: what a model keeps of a batch must not reach the next.
    alone = torch.cat([sums(scorer, collator([rows[i]])) for i in range(6)], dim=1)
    parts = RowCollator("padded", collator, max_tokens=300)([rows[i] for i in range(6)])
    assert len(parts["micro_batches"]) > 1
    assert whole == pytest.approx(alone, abs=TOLERANCE)
    assert sums(scorer, parts) == pytest.approx(alone, abs=TOLERANCE)
    # Images matter, each to its own row alone.
    swapped = {**rows[0], "images": rows[3]["images"], "images_digest": rows[3]["images_digest"]}
    if len(rows[0]["prompt_ids"]) == len(rows[3]["prompt_ids"]):
        other = sums(scorer, collator([swapped, *(rows[i] for i in range(1, 6))]))
        assert (other - whole)[:, 0].abs().min() > 100 * TOLERANCE
        assert other[:, 1:] == pytest.approx(whole[:, 1:], abs=TOLERANCE)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_log_probabilities_are_those_of_the_models_logits(family: str) -> None:
    """Of the class's own: Gemma 3's for images has no softcap, whatever its configuration says."""
    processor, rows = prepared(family)
    softcap = {"final_logit_softcapping": 3.0} if family == "gemma3" else {}
    model = make_vision_model(family, **softcap) if softcap else model_of(family)
    batch = VisionCollator(processor, pad_token_id=0)([rows[i] for i in range(3)])
    ids, mask = batch["input_ids"], batch["completion_mask"].bool()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"], **batch["vision"]).logits
        head = FusedHead(model)
        out = head(model, ids, batch["attention_mask"], ids.masked_fill(~mask, -100), **batch["vision"])
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert out.mask.equal(mask[:, 1:])
    assert out.logps[out.mask] == pytest.approx(expected[out.mask], abs=1e-5)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_images_whose_tokens_see_each_other_are_no_fault(family: str) -> None:
    processor, rows = prepared(family)
    batch = VisionCollator(processor, pad_token_id=0)([rows[2]])
    check_images(scorer_of(model_of(family)), batch, CPU, torch.float32)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        # Columns of the text are no columns of what comes out.
        ("git", r"GitForCausalLM .* gives its output embedding a tensor of shape \(2, \d+, 32\)"),
        # It counts images over the whole batch.
        ("hunyuan_vl", r"HunYuanVLForConditionalGeneration .* depend on the images of others in its batch"),
    ],
)
def test_what_images_make_wrong_is_refused(family: str, why: str) -> None:
    processor, rows = prepared(family)
    batch = VisionCollator(processor, pad_token_id=0)([rows[0]])
    with pytest.raises(NotImplementedError, match=why):
        check_images(scorer_of(model_of(family)), batch, CPU, torch.float32)


def test_text_that_sees_the_future_is_refused() -> None:
    """Gemma 3, were what follows the image a part of it."""
    processor, rows = prepared("gemma3")
    batch = VisionCollator(processor, pad_token_id=0)([rows[0]])
    batch["vision"]["token_type_ids"] = torch.ones_like(batch["input_ids"])
    with pytest.raises(
        NotImplementedError, match=r"Gemma3ForConditionalGeneration .* sees the future where images are"
    ):
        check_images(scorer_of(make_vision_model("gemma3")), batch, CPU, torch.float32)


MODELS: dict[str, tuple[Scorer, Any]] = {}


def made(family: str) -> tuple[Scorer, Any]:
    if family not in MODELS:
        MODELS[family] = scorer_of(make_vision_model(family)), make_processor(family)
    return MODELS[family]


sizes = st.tuples(st.integers(8, 40), st.integers(8, 40))
# The sizes of each row's images, and how many words it has.
batches = st.lists(st.tuples(st.lists(sizes, max_size=3), st.integers(1, 12)), min_size=1, max_size=4)


@settings(max_examples=30)
@given(st.sampled_from(VISION_FAMILIES), batches, st.integers(0, 3))
def test_any_rows_do_not_depend_on_their_batch(family: str, batch: list[Any], seed: int) -> None:
    scorer, processor = made(family)
    rows = [
        {
            "images": [make_image(10 * seed + place, size) for place, size in enumerate(row_sizes)],
            "prompt": [{"role": "user", "content": "word " * words}],
            "chosen": [{"role": "assistant", "content": f"{'yes ' * words}{number}"}],
            "rejected": [{"role": "assistant", "content": f"no {number}"}],
        }
        for number, (row_sizes, words) in enumerate(batch)
    ]
    kinds = {"bytes": Value("binary"), "path": Value("string")}
    table = {name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")}
    table["images"] = [[Image().encode_example(image) for image in row["images"]] for row in rows]
    dataset = Dataset.from_dict(table, features=Features({**MESSAGES, "images": List(kinds)}))
    found, summary = prepare(dataset, processor, max_length=None)
    assert not summary.dropped and summary.with_images == sum(bool(row["images"]) for row in rows)
    collator = VisionCollator(processor, pad_token_id=0) if summary.with_images else PreferenceCollator(0)
    alone = torch.cat([sums(scorer, collator([row])) for row in found], dim=1)
    assert sums(scorer, collator(list(found))) == pytest.approx(alone, abs=TOLERANCE)


class Blind(LlavaForConditionalGeneration):
    """Takes what it is given, and does not look at it."""

    def forward(self, *args: Any, pixel_values: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_model_that_does_not_look_is_refused() -> None:
    processor, rows = prepared("llava")
    model = make_vision_model("llava")
    model.__class__ = Blind
    batch = VisionCollator(processor, pad_token_id=0)([rows[0]])
    with pytest.raises(NotImplementedError, match=r"Blind .* does not look at images"):
        check_images(scorer_of(model), batch, CPU, torch.float32)


def test_a_black_image_is_looked_at() -> None:
    """Where pixels are not normalised, its negative is the same image."""
    processor, rows = prepared("llava")
    batch = VisionCollator(processor, pad_token_id=0)([rows[0]])
    batch["vision"]["pixel_values"].zero_()
    check_images(scorer_of(make_vision_model("llava")), batch, CPU, torch.float32)
