"""The link from a run's report to the evaluation of what it made, which comes later."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from fastdpo.trainer.whole_files import write_text_whole

EVALUATION_FILE = "evaluation.html"
_BEGIN, _END = "<!-- evaluation -->", "<!-- end of evaluation -->"


def evaluation_link(folder: Path) -> Markup:
    """What a report in ``folder`` says of the evaluation: where it is, or how to make one."""
    if (folder / EVALUATION_FILE).exists():
        # Of what was here before the run that this report is of, as a rule: nobody looks before a run is over.
        return _linked(EVALUATION_FILE, "An evaluation from before this report was written, maybe of another model")
    words = Markup(
        '<p class="soft">Is it better, and how sure is that? <code>fastdpo eval --model {} --dataset_name …</code> '
        "says so of held-out pairs, and links its page here.</p>"
    ).format(_readable(folder))
    return _between(words)


def link_report(report: Path, page: Path) -> bool:
    """Have the report of a run link to the page of an evaluation.

    Args:
        report: ``report.html``.
        page: where the evaluation is.

    Returns:
        Whether it does now; not where there is no report, or one of a version that knows of no evaluations.
    """
    try:
        text = report.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    target = os.path.relpath(page.resolve(), report.resolve().parent).replace(os.sep, "/")
    place = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    linked, count = place.subn(lambda _: str(_linked(target, "Evaluated")), text, count=1)
    if count and linked != text:
        write_text_whole(report, linked)
    return bool(count)


def _linked(target: str, words: str) -> Markup:
    link = Markup('<p>{}: <a href="{}">{}</a></p>').format(
        words, quote(target, errors="surrogateescape"), _readable(Path(target))
    )
    return _between(link)


def _readable(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _between(words: Markup) -> Markup:
    return Markup(_BEGIN) + words + Markup(_END)
