"""Rows with images through ``prepare``: their images, their prompts' ids, and rows that do not fit."""

from __future__ import annotations

import base64
import copy
import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_vision import VISION_FAMILIES, make_image, make_processor, vision_rows
from tokenizers.processors import TemplateProcessing
from toy_data import assistant, text_rows, user, write_jsonl

from fastdpo.data import load_preferences, prepare
from fastdpo.data.columns import may_have_images
from fastdpo.data.files import DataError
from fastdpo.data.row_digests import row_digests
from fastdpo.data.terms import DIGEST_COLUMN, TEXT_COLUMN
from fastdpo.data.vision import tokenizer_in
from fastdpo.data.vision_collator import VisionCollator

pytestmark = pytest.mark.usefixtures("quiet_and_uncached")


@pytest.fixture(scope="module")
def llava() -> Any:
    return make_processor("llava")


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def row(**others: Any) -> dict[str, Any]:
    return {
        "prompt": [user("What is it?")],
        "chosen": [assistant("A cat.")],
        "rejected": [assistant("A dog.")],
    } | others


def dataset_of(rows: list[dict[str, Any]]) -> Dataset:
    """Rows as a dataset, with contents that are all lists of parts where one is: a column of Arrow has one type."""

    def has_parts(value: Any) -> bool:
        return isinstance(value, list) and any(
            isinstance(item, dict) and isinstance(item.get("content"), list) for item in value
        )

    def in_parts(message: dict[str, Any]) -> dict[str, Any]:
        content = message["content"]
        return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}

    mixed = {name for row in rows for name, value in row.items() if has_parts(value)}
    return Dataset.from_list(
        [{name: [*map(in_parts, value)] if name in mixed else value for name, value in row.items()} for row in rows]
    )


def prepared(rows: list[dict[str, Any]], processor: Any, **options: Any) -> Dataset:
    return prepare(dataset_of(rows), processor, max_length=None, **options)[0]


def dropped(rows: list[dict[str, Any]], processor: Any) -> dict[str, int]:
    """Why rows are dropped, beside one that is not."""
    found, summary = prepare(dataset_of([row(images=[make_image(0)]), *rows]), processor, max_length=None)
    assert len(found) == 1 + len(rows) - sum(summary.dropped.values())
    return summary.dropped


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_prompts_have_the_processors_ids(family: str) -> None:
    processor = make_processor(family)
    rows = vision_rows(4)
    rows[1]["images"] = [make_image(7, (20, 20)), make_image(8, (16, 40))]
    rows[2]["images"] = []
    found = prepared(rows, processor)
    for given, got in zip(rows, found, strict=True):
        parts = [{"type": "image"}] * len(given["images"]) + [{"type": "text", "text": given["prompt"][0]["content"]}]
        text = processor.apply_chat_template([user(parts)], add_generation_prompt=True)  # type: ignore[arg-type]
        expected = processor(text=[text], images=[given["images"]] if given["images"] else None)["input_ids"][0]
        assert got["prompt_ids"] == list(expected)
        assert got[TEXT_COLUMN] == text
        answer = f"{given['chosen'][0]['content']}<|end|>"
        assert got["chosen_ids"] == processor.tokenizer.encode(answer, add_special_tokens=False)
    assert [bool(digest) for digest in found[DIGEST_COLUMN]] == [True, True, False, True]


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_batches_hold_what_the_processor_makes(family: str) -> None:
    processor = make_processor(family)
    rows = vision_rows(4)
    rows[1]["images"] = [make_image(7, (20, 20)), make_image(8, (16, 40))]
    rows[3]["images"] = []
    found = prepared(rows, processor)
    batch = VisionCollator(processor, pad_token_id=0)([found[i] for i in range(4)])
    pictured = [0, 1, 2]
    expected = processor(
        text=[found[i][TEXT_COLUMN] for i in pictured],
        images=[rows[i]["images"] for i in pictured],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    tokens = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    assert batch["vision"].keys() == expected.keys() - {"input_ids", "attention_mask"}
    for name, value in expected.items():
        if name not in tokens:
            assert torch.equal(batch["vision"][name], torch.cat([value, value]))
    for name in {"token_type_ids", "mm_token_type_ids"} & batch["vision"].keys():
        ids = torch.tensor(sorted(processor.image_token_ids))
        assert torch.equal(batch["vision"][name] == 1, torch.isin(batch["input_ids"], ids))
    # What stands for an image is in the prompt, and not scored.
    scored = batch["input_ids"][batch["completion_mask"].bool()]
    assert not torch.isin(scored, torch.tensor(sorted(processor.image_token_ids))).any()


def test_whatever_processors_say_of_tokens_is_laid_out_as_tokens_are() -> None:
    processor = make_processor("qwen2_5_vl")
    found = [*prepared(vision_rows(2), processor)]
    expected = VisionCollator(processor, pad_token_id=0)(found)["vision"]["mm_token_type_ids"]

    class Another(type(processor)):  # type: ignore[misc]
        """Says more of each token, and says what is usual only when asked, as those of some models do."""

        def __call__(self, *args: Any, return_mm_token_type_ids: bool = False, **options: Any) -> Any:
            out = super().__call__(*args, **options)
            out["moe_mm_token_type_ids"] = 2 * out["mm_token_type_ids"]
            if not return_mm_token_type_ids:
                del out["mm_token_type_ids"]
            return out

    processor.__class__ = Another
    vision = VisionCollator(processor, pad_token_id=0)(found)["vision"]
    assert expected.any()
    assert torch.equal(vision["mm_token_type_ids"], expected)
    assert torch.equal(vision["moe_mm_token_type_ids"], 2 * expected)


def test_a_place_may_have_another_name_than_the_images_token(llava: Any) -> None:
    processor = copy.copy(llava)
    processor.chat_template = llava.chat_template.replace("<image>", "<<picture>>")

    def call(self: Any, text: list[str], **options: Any) -> Any:
        return llava(text=[one.replace("<<picture>>", "<image>") for one in text], **options)

    processor.__class__ = type("Another", (type(llava),), {"__call__": call, "image_placeholder_token": "<<picture>>"})
    assert [*prepared(vision_rows(3), processor)["prompt_ids"]] == [*prepared(vision_rows(3), llava)["prompt_ids"]]


def forms(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """One image, given in every way."""
    image = make_image(3)
    path = tmp_path / "a.png"
    path.write_bytes(png(image))
    inline = f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"

    def parts(**which: Any) -> dict[str, Any]:
        return row(prompt=[user([{"type": "image", **which}, {"type": "text", "text": "What is it?"}])])

    return {
        "list": row(images=[image]),
        "one": row(image=image),
        "path": row(images=[str(path)]),
        "path of one": row(image=str(path)),
        "bytes": row(images=[{"bytes": png(image), "path": None}]),
        "path in a struct": row(images=[{"bytes": None, "path": str(path)}]),
        "place in the prompt": row(images=[image], prompt=parts()["prompt"]),
        "mark in the prompt": row(images=[image], prompt=[user("<image>What is it?")]),
        "part": parts(image=str(path)),
        "part with a path": parts(path=str(path)),
        "part with a data URL": parts(url=inline),
        "OpenAI's part": row(
            prompt=[
                user([{"type": "image_url", "image_url": {"url": inline}}, {"type": "text", "text": "What is it?"}])
            ]
        ),
        "beginning of both": {
            side: [*parts(image=str(path))["prompt"], *row()[side]] for side in ("chosen", "rejected")
        },
    }


def test_images_may_be_given_in_many_ways(tmp_path: Path, llava: Any) -> None:
    made = {name: prepared([given], llava)[0] for name, given in forms(tmp_path).items()}
    collator = VisionCollator(llava, pad_token_id=0)
    batches = {name: collator([found]) for name, found in made.items()}
    expected = batches["list"]
    assert expected["vision"]["pixel_values"].shape == (2, 3, 16, 16)
    for name, batch in batches.items():
        assert torch.equal(batch["input_ids"], expected["input_ids"]), name
        assert torch.equal(batch["vision"]["pixel_values"], expected["vision"]["pixel_values"]), name


def test_paths_in_files_are_beside_the_file(tmp_path: Path, llava: Any) -> None:
    """Equal files beside other images are other pairs."""
    lines = [row(images=["pictures/a.png"]), row(prompt=[user([{"type": "image", "path": "pictures/a.png"}])])]
    pixels = []
    for number, name in enumerate(("one", "two")):
        (tmp_path / name / "pictures").mkdir(parents=True)
        (tmp_path / name / "pictures" / "a.png").write_bytes(png(make_image(number)))
        found = prepare(load_preferences(str(write_jsonl(tmp_path / name / "p.jsonl", lines))), llava)[0]
        batch = VisionCollator(llava, pad_token_id=0)([found[0], found[1]])
        pixels.append(batch["vision"]["pixel_values"])
        assert torch.equal(pixels[-1][0], pixels[-1][1])
    assert not torch.equal(pixels[0], pixels[1])


def test_parquet_of_the_hub_keeps_its_bytes(tmp_path: Path, llava: Any) -> None:
    rows = vision_rows(3)
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "train.parquet")
    loaded = load_preferences(str(tmp_path / "train.parquet"))
    expected, got = prepared(rows, llava), prepare(loaded, llava, max_length=None)[0]
    for column in ("prompt_ids", "chosen_ids", DIGEST_COLUMN):
        assert got[column] == expected[column], column


def test_a_changed_image_is_another_row(llava: Any) -> None:
    first, second = ([row(images=[make_image(seed)]), row(images=[make_image(9)])] for seed in (1, 2))
    one, other = prepared(first, llava), prepared(second, llava)
    assert one["prompt_ids"] == other["prompt_ids"]
    assert (row_digests(one) == row_digests(other)).all(1).tolist() == [False, True]


def test_the_same_question_about_other_images_is_no_repetition(llava: Any) -> None:
    image = make_image(1)
    rows = [row(images=[image]), row(images=[make_image(2)]), row(images=[image])]
    _, summary = prepare(Dataset.from_list(rows), llava, max_length=None)
    assert summary.first_rows["duplicate"] == [2]
    assert summary.warned["duplicate"] == 1


@pytest.mark.parametrize(
    "given",
    {
        "more images": row(images=[make_image(0), make_image(1)], prompt=[user([{"type": "image"}])]),
        "fewer images": row(images=[make_image(0)], prompt=[user([{"type": "image"}] * 2)]),
        "no image": row(images=[], prompt=[user([{"type": "image"}])]),
        "nobody asks": row(images=[make_image(0)], prompt=[{"role": "system", "content": "Look."}]),
        "mark without an image": row(images=[], prompt=[user("What is <image>?")]),
        "mark in the answer": row(images=[make_image(0)], chosen=[assistant("It is <image>.")]),
        "no mark in a text": row(images=[make_image(0)], prompt="What is it?", chosen=" A cat.", rejected=" A dog."),
    }.items(),
    ids=lambda item: item[0],
)
def test_images_without_a_place_and_places_without_an_image_are_dropped(
    given: tuple[str, dict[str, Any]], llava: Any
) -> None:
    rows = [given[1]]
    if isinstance(rows[0]["prompt"], str):
        found, summary = prepare(
            Dataset.from_list([{**rows[0], "prompt": "<image>Which?"}, *rows]), llava, max_length=None
        )
        assert (len(found), summary.dropped) == (1, {"images_do_not_fit": 1})
    else:
        assert dropped(rows, llava) == {"images_do_not_fit": 1}


def test_images_that_cannot_be_read_are_dropped_with_a_word(
    tmp_path: Path, llava: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good.png").write_bytes(png(make_image(0)))
    (tmp_path / "torn.png").write_bytes(png(make_image(1, (200, 200)))[:-40])
    (tmp_path / "text.png").write_text("no image")
    names = ("good.png", "torn.png", "text.png", "lost.png")
    rows = [row(images=[str(tmp_path / name)]) for name in names]
    rows.insert(3, row(images=["data:image/png;base64,\u00e9"]))
    found, summary = prepare(Dataset.from_list(rows), llava, max_length=None)
    assert len(found) == 1
    assert summary.dropped == {"image_unreadable": 4}
    assert summary.first_rows["image_unreadable"] == [1, 2, 3]
    assert "row 4: an image cannot be read" in caplog.text and "lost.png" in caplog.text


@pytest.mark.parametrize(
    ("values", "form", "is_cut"),
    [
        (np.linspace(0, 65535, 64).astype(np.uint16), "PNG", True),
        (np.linspace(0, 65535, 64).astype(np.int32), "TIFF", True),
        (np.linspace(-300, 255, 64).astype(np.int32), "TIFF", True),
        (np.linspace(0, 1, 64).astype(np.float32), "TIFF", True),
        (np.linspace(0, 255, 64).astype(np.uint16), "PNG", False),
        (np.linspace(0, 255, 64).astype(np.uint8), "PNG", False),
    ],
)
def test_values_that_would_be_cut_to_white_or_black_are_no_image(
    values: Any, form: str, is_cut: bool, llava: Any, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(values.reshape(8, 8)).save(buffer, format=form)
    one = row(images=[{"bytes": buffer.getvalue(), "path": None}])
    assert dropped([one], llava) == ({"image_unreadable": 1} if is_cut else {})
    assert ("save it with 8 bits a value" in caplog.text) == is_cut


def test_an_image_in_an_answer_is_dropped(llava: Any) -> None:
    answer = [assistant([{"type": "image"}, {"type": "text", "text": "This."}])]  # type: ignore[arg-type]
    assert dropped([row(images=[make_image(0)], chosen=answer)], llava) == {"not_text": 1}


def test_urls_are_refused(llava: Any) -> None:
    with pytest.raises(DataError, match=r"row 0: the image https://x\.org/a\.png would have to be fetched"):
        prepared([row(images=["https://x.org/a.png"])], llava)


def test_two_columns_of_images_are_refused(llava: Any) -> None:
    with pytest.raises(DataError, match="row 0: both of the columns 'images' and 'image' hold images"):
        prepared([row(images=[make_image(0)], image=make_image(1))], llava)


def test_a_tokenizer_takes_no_images(llava: Any) -> None:
    with pytest.raises(DataError, match="column 'images' holds something, but this model is given with a tokenizer"):
        prepared([row(images=[make_image(0)])], llava.tokenizer)


def test_a_processor_takes_text(llava: Any) -> None:
    """Rows without images come to what the tokenizer makes of them, and to no more columns."""
    rows = text_rows(4)
    assert prepared(rows, llava).to_list() == prepared(rows, llava.tokenizer).to_list()


def test_prompts_with_images_are_not_cut(llava: Any) -> None:
    rows = [row(images=[make_image(0)] * count) for count in (1, 3)]
    lengths = [len(found["prompt_ids"]) for found in prepared(rows, llava)]
    found, summary = prepare(Dataset.from_list(rows), llava, max_length=lengths[1])
    assert len(found) == 1 and summary.dropped == {"prompt_too_long": 1}
    with pytest.raises(ValueError, match="keep_end', which would cut images out of prompts"):
        VisionCollator(llava, pad_token_id=0, max_length=50, truncation_mode="keep_end")


@pytest.mark.parametrize("in_parts", [False, True])
def test_an_image_that_changed_since_is_refused(tmp_path: Path, llava: Any, in_parts: bool) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(make_image(0)))
    parts = [{"type": "image", "path": str(path)}, {"type": "text", "text": "What is it?"}]
    rows = [row(prompt=[user(parts)])] if in_parts else [row(images=[str(path)])]  # type: ignore[arg-type]
    found = prepared(rows, llava)
    path.write_bytes(png(make_image(1)))
    with pytest.raises(DataError, match="its images are others than when it was prepared"):
        VisionCollator(llava, pad_token_id=0)([found[0]])
    # Prepared anew, it is that image.
    again = prepared(rows, llava)
    assert again[DIGEST_COLUMN] != found[DIGEST_COLUMN]
    VisionCollator(llava, pad_token_id=0)([again[0]])


def test_another_processor_is_refused(llava: Any) -> None:
    found = prepared([row(images=[make_image(0)])], make_processor("gemma3"))
    other = make_processor("gemma3")
    other.full_image_sequence += "!"
    with pytest.raises(DataError, match="makes other tokens of a prompt now"):
        VisionCollator(other, pad_token_id=0)([found[0]])


def test_saved_rows_are_as_good(tmp_path: Path, llava: Any) -> None:
    found = prepared(vision_rows(3), llava)
    found.save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(tmp_path / "saved")
    collator = VisionCollator(llava, pad_token_id=0)
    one, other = (collator([rows[i] for i in range(3)]) for rows in (found, loaded))
    assert torch.equal(one["vision"]["pixel_values"], other["vision"]["pixel_values"])


def test_json_text_of_rows_is_not_needed_for_bytes(tmp_path: Path, llava: Any) -> None:
    """A format that is converted keeps its images."""
    given = {
        "messages": [user("What is it?"), assistant("A cat.")],
        "rejected_response": "A dog.",
        "images": ["a.png"],
    }
    (tmp_path / "a.png").write_bytes(png(make_image(0)))
    (tmp_path / "p.jsonl").write_text(json.dumps(given) + "\n")
    loaded = load_preferences(str(tmp_path / "p.jsonl"))
    assert prepare(loaded, llava)[0][DIGEST_COLUMN] == prepared([row(images=[make_image(0)])], llava)[DIGEST_COLUMN]


def test_empty_columns_are_no_images(llava: Any) -> None:
    rows = [row(images=[]), row(images=[], prompt=[user("Why?")])]
    assert not may_have_images(Dataset.from_list(rows))
    assert prepared(rows, tokenizer_in(llava)).to_list() == prepared(rows, llava).to_list()
    assert may_have_images(Dataset.from_list([*rows, row(images=["a.png"])]))
    parts = [user([{"type": "image"}])]  # type: ignore[arg-type]
    assert may_have_images(Dataset.from_list([row(prompt=parts)]))


@pytest.mark.parametrize("kept_as", ["json", "structs"])
def test_images_of_late_rows_are_known(tmp_path: Path, llava: Any, kept_as: str) -> None:
    """However many rows come before the first one with an image, a file that changed is read anew."""
    texts = [row(prompt=[user([{"type": "text", "text": f"Why {i}?"}])]) for i in range(130)]  # type: ignore[arg-type]
    parts = [{"type": "image", "path": str(tmp_path / "a.png")}, {"type": "text", "text": "What is it?"}]
    rows = [*texts, row(prompt=[user(parts)])]  # type: ignore[arg-type]
    digests = []
    for seed in (0, 1):
        (tmp_path / "a.png").write_bytes(png(make_image(seed, (16, 16 + seed))))
        if kept_as == "json":
            dataset = load_preferences(str(write_jsonl(tmp_path / "p.jsonl", rows)))
        else:
            dataset = dataset_of(rows)
        assert may_have_images(dataset)
        assert not may_have_images(dataset.select(range(130)))
        digests.append(prepare(dataset, llava)[0][DIGEST_COLUMN][-1])
    assert digests[0] != digests[1]


def test_paths_of_every_spelling_are_beside_the_file(tmp_path: Path, llava: Any) -> None:
    """``image_url`` too, as a string or an object; and a name that begins like a home that nobody has."""
    (tmp_path / "~a.png").write_bytes(png(make_image(0)))
    which: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": "~a.png"}},
        {"type": "image_url", "image_url": "~a.png"},
        {"type": "input_image", "image_url": "~a.png"},
        {"type": "image", "image": {"url": "~a.png"}},
        {"type": "image", "image": {"path": "~a.png"}},
    ]
    rows = [row(prompt=[user([part, {"type": "text", "text": "What?"}])]) for part in which]  # type: ignore[arg-type]
    path = write_jsonl(tmp_path / "p.jsonl", [row(images=["~a.png"]), *rows])
    found, summary = prepare(load_preferences(str(path)), llava)
    assert (len(found), summary.dropped) == (6, {})
    assert len(set(found[DIGEST_COLUMN])) == 1


def test_marks_have_a_place_in_parts_of_text_too() -> None:
    """As often as there are images: there the images stand; otherwise it is not known where."""
    qwen = make_processor("qwen2_5_vl")  # to which the mark is text
    texts = ["A <image> and", "<image>?"]
    in_parts = [user([{"type": "text", "text": text} for text in texts])]  # type: ignore[arg-type]
    images = [make_image(0), make_image(1)]
    expected = prepared([row(images=images, prompt=[user("".join(texts))])], qwen)[0]
    found, summary = prepare(
        dataset_of([row(images=images, prompt=in_parts), row(images=images[:1], prompt=in_parts)]),
        qwen,
        max_length=None,
    )
    assert found[TEXT_COLUMN] == [expected[TEXT_COLUMN]] and "<image>" not in expected[TEXT_COLUMN]
    assert expected[TEXT_COLUMN].count("<|image_pad|>") == 2
    assert summary.dropped == {"images_do_not_fit": 1}


def test_a_text_with_the_token_of_an_expanded_image_is_dropped() -> None:
    gemma = make_processor("gemma3")  # whose images begin as another token
    written = [user("What is <image_soft_token>?")]
    for images in ([], [make_image(0)]):
        assert dropped([row(images=images, prompt=written)], gemma) == {"images_do_not_fit": 1}


def test_images_are_upright(llava: Any) -> None:
    image, exif = make_image(2, (16, 32)), Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    found = prepared([row(images=[{"bytes": buffer.getvalue(), "path": None}])], llava)[0]
    upright = prepared([row(images=[image.transpose(Image.Transpose.ROTATE_270)])], llava)[0]
    one, other = (VisionCollator(llava, pad_token_id=0)([rows])["vision"]["pixel_values"] for rows in (found, upright))
    assert torch.equal(one, other)


def test_the_tokenizers_first_token_stays_in_front_of_images() -> None:
    gemma = make_processor("gemma3")
    first = [("<s>", gemma.tokenizer.bos_token_id)]
    gemma.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=first)
    given = row(images=[make_image(0)], prompt="<start_of_image>Which?", chosen=" A cat.", rejected=" A dog.")
    found = prepared([given], gemma)[0]
    own = gemma(text=[given["prompt"]], images=[given["images"]], add_special_tokens=False)["input_ids"][0]
    assert found["prompt_ids"] == [gemma.tokenizer.bos_token_id, *own]
    batch = VisionCollator(gemma, pad_token_id=0)([found])
    ids = torch.tensor(gemma.image_token_ids)
    assert torch.equal(batch["vision"]["token_type_ids"] == 1, torch.isin(batch["input_ids"], ids))
