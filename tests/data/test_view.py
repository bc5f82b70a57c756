"""What check-data shows: the rows that matter, in the colours of the mask, and what a step costs."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import rich.console
from datasets import Dataset
from families import family_template, tokenizer_with
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from toy_data import assistant, make_tokenizer, text_rows, user

from fastdpo.data import PreferenceCollator, examine
from fastdpo.data.truncation import cut
from fastdpo.data.view import CHOSEN, CUT, PROMPT, REJECTED, show_row, worst_rows
from fastdpo.data.work import estimate_work

TOKENIZER = make_tokenizer()


@pytest.fixture(autouse=True)
def quiet_and_uncached(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def shown(rows: list[dict], row: int, **options: object) -> tuple[str, dict[str, str]]:
    """The text of a row as it is shown, and the text in each of its colours."""
    tokenised, _, summary = examine(Dataset.from_list(rows), TOKENIZER, **options)
    group = show_row(row, rows[row], tokenised[row], TOKENIZER, summary)
    styles: dict[str, str] = {}
    for text in group.renderables[1].columns[1].cells if isinstance(group.renderables[1], Table) else ():
        for span in text.spans:
            styles[span.style] = styles.get(span.style, "") + text.plain[span.start : span.end]
    console = rich.console.Console(width=500)
    with console.capture() as capture:
        console.print(group)
    return capture.get(), styles


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("limit", [None, 30])
def test_colours_are_those_of_the_mask(mode: str, limit: int | None) -> None:
    rows = text_rows(3)
    tokenised, _, _ = examine(Dataset.from_list(rows), TOKENIZER, max_length=limit, truncation_mode=mode)
    for i in range(3):
        if len(tokenised[i]["prompt_ids"]) >= (limit or 1000) and mode == "keep_start":
            continue
        batch = PreferenceCollator(0, max_length=limit, truncation_mode=mode)([tokenised[i]])
        _, styles = shown(rows, i, max_length=limit, truncation_mode=mode)
        parts = {(side, m): ids[(mask == m) & (present == 1)] for side, ids, mask, present in zip(
            (CHOSEN, REJECTED), batch["input_ids"], batch["completion_mask"], batch["attention_mask"], strict=True
        ) for m in (0, 1)}  # fmt: skip
        assert styles[CHOSEN] == TOKENIZER.decode(parts[CHOSEN, 1])
        assert styles[REJECTED] == TOKENIZER.decode(parts[REJECTED, 1])
        assert styles.get(PROMPT, "") == TOKENIZER.decode(parts[CHOSEN, 0]) + TOKENIZER.decode(parts[REJECTED, 0])
        cut_off = styles.get(CUT, "")
        whole = 2 * len(rows[i]["prompt"]) + len(rows[i]["chosen"]) + len(rows[i]["rejected"]) + 2 * len("</s>")
        assert sum(map(len, styles.values())) == whole
        assert bool(cut_off) == (limit is not None)


def test_rows_that_never_came_to_tokens_are_shown_as_they_were_read() -> None:
    rows = text_rows(3)
    rows[1]["chosen"] = None
    text, _ = shown(rows, 1)
    assert "row 1" in text and "dropped: a field is null or absent" in text and "chosen: null" in text


def test_messages_stand_as_written_beside_what_is_rendered() -> None:
    tokenizer = tokenizer_with(family_template("chatml"))
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    asked = assistant("Wait.") | {"tool_calls": [{"function": call}], "name": None}
    rows = [{"prompt": [user("Why?")], "chosen": [asked], "rejected": [assistant("No."), user("Eh?"), assistant("So")]}]
    tokenised, _, summary = examine(Dataset.from_list(rows), tokenizer)
    group = show_row(0, rows[0], tokenised[0], tokenizer, summary)
    (written, rendered) = (list(column.cells) for column in group.renderables[1].columns)
    assert "dropped: the chat template leaves out what chosen or rejected says" in group.renderables[0].plain
    assert written[0].plain == 'user: Why?\nassistant: Wait.\n  tool_calls: [{"function": ' + (
        '{"name": "weather", "arguments": {"city": "Oslo"}}}]'
    )
    assert "Wait." in rendered[0].plain and "weather" not in rendered[0].plain
    rows[0]["chosen"] = [assistant("Yes.")]
    tokenised, _, summary = examine(Dataset.from_list(rows), tokenizer)
    table = show_row(0, rows[0], tokenised[0], tokenizer, summary).renderables[1]
    sides = list(table.columns[1].cells)
    colours = [(sides[1].plain[span.start : span.end], span.style) for span in sides[1].spans]
    assert [style for _, style in colours] == [PROMPT, REJECTED, PROMPT, REJECTED]
    assert colours[1][0] == "No.<|im_end|>\n" and colours[3][0] == "So<|im_end|>\n"


def test_long_texts_are_shortened_in_the_middle_and_control_characters_shown() -> None:
    rows = [{"prompt": "begin" + " word" * 500 + " end", "chosen": " a\x00\x1b[31m" + "b" * 900, "rejected": " c"}]
    text, styles = shown(rows, 0, max_length=None)
    assert "\\x00\\x1b[31m" in text and "\x1b" not in styles[CHOSEN] and "\x00" not in text
    assert "begin word" in text and "word end" in text and "characters …" in text
    assert len(text) < 6000


def test_rows_of_every_reason_come_first_in_turn() -> None:
    rows = text_rows(8)
    rows[1]["chosen"] = rows[2]["chosen"] = rows[3]["chosen"] = ""
    rows[4]["rejected"] = rows[4]["chosen"]
    _, _, summary = examine(Dataset.from_list(rows), TOKENIZER)
    assert worst_rows(summary, 10) == [1, 4, 2, 3]
    assert worst_rows(summary, 2) == [1, 4]
    assert worst_rows(examine(Dataset.from_list(text_rows(2)), TOKENIZER)[2], 3) == []


lengths = st.lists(
    st.tuples(st.integers(0, 20), st.integers(2, 20), st.integers(2, 20)), min_size=1, max_size=12
)  # fmt: skip


@given(
    rows=lengths,
    limit=st.none() | st.integers(21, 45),
    mode=st.sampled_from(["keep_start", "keep_end"]),
    size=st.integers(1, 6),
)
def test_work_is_what_batches_hold(rows: list[tuple[int, int, int]], limit: int | None, mode: str, size: int) -> None:
    prompt, chosen, rejected = (np.array(column) for column in zip(*rows, strict=True))
    work = estimate_work(prompt, chosen, rejected, max_length=limit, truncation_mode=mode, batch_size=size)
    body = head = 0
    widths = []
    for p, c, r in rows:
        sides = [cut([1] * p, [2] * n, limit, mode)[1] for n in (c, r)]
        prompts = [mask.count(0) for mask in sides]
        body += sum(map(sum, sides)) + (prompts[0] if prompts[0] == prompts[1] else sum(prompts))
        head += sum(sum(mask[1:]) for mask in sides)
        widths.append(max(map(len, sides)))
    assert work.batch_size == min(size, len(rows))
    assert work.packed_body == pytest.approx(work.batch_size * body / len(rows))
    assert work.packed_head == pytest.approx(work.batch_size * head / len(rows))
    # A batch is as wide as one of its rows.
    assert 2 * work.batch_size * min(widths) <= work.padded <= 2 * work.batch_size * max(widths)
    if size == 1:
        assert work.padded == pytest.approx(2 * np.mean(widths))
    if size >= len(rows):
        assert work.padded == 2 * len(rows) * max(widths)
