"""Asks a chat model over HTTP, by the protocol that OpenAI's servers, vLLM, llama.cpp, SGLang and Ollama share."""

from __future__ import annotations

import email.utils
import http.client
import json
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fastdpo.errors import InputError
from fastdpo.trainer.secrets import HIDDEN, redacted, remember_secrets

_PATH = "/chat/completions"
# Judges that think before they answer take minutes.
_TIMEOUT = 600.0
_ATTEMPTS, _FIRST_WAIT, _LONGEST_WAIT = 8, 1.0, 60.0
# What another attempt may mend: time-outs, conflicts, too many requests, and the server's own trouble.
_PASSING = frozenset((408, 409, 425, 429, *range(500, 600)))
# What may be said of one question and not of the next: it is too long, or a filter does not let it pass.
_OF_A_QUESTION = frozenset((400, 403, 413, 422, 451))
# How an answer without a text ended that would end the same way again.
_ENDS_WITHOUT_TEXT = ("content_filter", "length", "stop", "tool_calls")
_SHOWN = 300


class JudgeError(InputError):
    """A judge that cannot be asked, or does not answer; the message says what to do."""


class QuestionRefusedError(JudgeError):
    """A question that the judge does not answer, where it may answer others.

    Attributes:
        said: in the server's words.
    """

    def __init__(self, address: str, said: str) -> None:
        super().__init__(f"the judge at {address} {said}")
        self.said = said


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key is for the address that was given, and urllib would send it on to wherever that points."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass
class JudgeClient:
    """One model at one address.

    Args:
        url: such as ``http://localhost:8000/v1``, or with ``/chat/completions`` behind it.
        model: the name that the server knows it by.
        key: sent as a bearer token; None for none. It is in no message and in no file.
        temperature: of its answers; None to leave that to the server.
        sleep: waits so many seconds; by default until :meth:`stop`, at most.

    Raises:
        JudgeError: the address is none.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    temperature: float | None = 0.0
    sleep: Callable[[float], object] | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise JudgeError(
                f"--judge_url {redacted(self.url)}: needed an address such as http://localhost:8000/v1 or "
                "https://api.openai.com/v1"
            )
        if parts.username or parts.password or parts.query:
            raise JudgeError(
                f"--judge_url {redacted(self.url)}: leave user, password and query out; a key is read from the "
                "environment (--judge_key_env)"
            )
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise JudgeError("the judge's key holds characters that no HTTP header can; look for a line break in it")
        if self.key:
            remember_secrets({"token": self.key})
        address = self.url.rstrip("/")
        self._address = address if address.endswith(_PATH) else address + _PATH
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._gives_up = threading.Event()

    @property
    def identity(self) -> dict[str, Any]:
        """What an answer depends on beside the messages."""
        return {"address": self._address, "model": self.model, "temperature": self.temperature}

    def stop(self) -> None:
        """Have all that wait for another attempt give up."""
        self._gives_up.set()

    def ask(self, messages: list[dict[str, str]]) -> str:
        """What the judge answers.

        Tried again, up to eight times, after 1, 2, 4, … seconds (as long as the server asks for, up to a minute), where
        the connection fails, or the server is busy or in trouble.

        Raises:
            QuestionRefusedError: it refuses this question.
            JudgeError: it refuses all, or does not answer, or with something else than an answer.
        """
        trouble = ""
        for attempt in range(_ATTEMPTS):
            if self._gives_up.is_set():
                break
            wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt) * random.uniform(0.8, 1.2)
            try:
                return self._content(self._post(messages))
            except urllib.error.HTTPError as error:
                said = self._said_by(error)
                if error.code in _OF_A_QUESTION:
                    raise QuestionRefusedError(self._address, f"answers {error.code}: {said}") from None
                if error.code not in _PASSING:
                    raise JudgeError(f"the judge at {self._address} answers {error.code}: {said}") from None
                trouble = f"{error.code}: {said}"
                asked = _seconds(error.headers.get("Retry-After"))
                wait = wait if asked is None else min(_LONGEST_WAIT, max(wait, asked))
            except (OSError, http.client.HTTPException, _NoAnswerError) as error:
                trouble = self._hidden(str(getattr(error, "reason", None) or error or type(error).__name__))
            if attempt + 1 < _ATTEMPTS:
                (self.sleep or self._gives_up.wait)(wait)
        raise JudgeError(
            f"the judge at {self._address} has not answered in {_ATTEMPTS} attempts ({trouble}). What it has answered "
            "is kept; the same command goes on from there"
        )

    def _post(self, messages: list[dict[str, str]]) -> bytes:
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "fastdpo"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self._address, json.dumps(body).encode(), headers, method="POST")
        with self._opener.open(request, timeout=_TIMEOUT) as answer:
            read: bytes = answer.read()
            return read

    def _content(self, body: bytes) -> str:
        """The text of an answer; what a judge that refuses says instead."""
        try:
            choice = json.loads(body)["choices"][0]
            message = choice["message"]
            content = message.get("content")
            if isinstance(content, list):
                content = "".join(part["text"] for part in content if part["type"] == "text")
            reason = choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _NoAnswerError(f"no chat completion came back: {self._short(body)}") from None
        for text in (content, message.get("refusal")):
            if isinstance(text, str):
                return text
        said = f"the answer has no text; finish_reason is {reason!r}"
        if reason in _ENDS_WITHOUT_TEXT:
            raise QuestionRefusedError(self._address, f"gives none: {said}")
        raise _NoAnswerError(said)

    def _said_by(self, error: urllib.error.HTTPError) -> str:
        try:
            body = error.read()
        except (OSError, http.client.HTTPException):
            body = b""
        if 300 <= error.code < 400:
            return f"it points to {self._hidden(error.headers.get('Location') or 'another address')}; give that one"
        try:
            said = json.loads(body)["error"]
            return self._short((said["message"] if isinstance(said, dict) else said).encode())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return self._short(body) or str(error.reason)

    def _short(self, body: bytes) -> str:
        text = " ".join(self._hidden(body.decode("utf-8", "replace")).split())
        return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"

    def _hidden(self, text: str) -> str:
        """``text`` without secrets; a key that is short, and so perhaps a part of words, where it stands by itself."""
        clean = str(redacted(text))
        return re.sub(rf"(?<!\w){re.escape(self.key)}(?!\w)", HIDDEN, clean) if self.key else clean


class _NoAnswerError(Exception):
    """What came is no answer of this protocol."""


def _seconds(said: str | None) -> float | None:
    """What Retry-After says: seconds, or a date."""
    if said is None:
        return None
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
