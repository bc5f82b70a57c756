"""fastdpo.evaluation.judge_client: what is asked again, what is not, and that a key goes to one address alone."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Iterator

import pytest
from judge_server import JudgeServer, judging

from fastdpo.evaluation.judge import question
from fastdpo.evaluation.judge_client import JudgeClient, JudgeError, QuestionRefusedError

KEY = "not-a-form-that-is-known-42"
ASKED = question("p", "a", "b")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judging(lambda prompt, a, b: f"Verdict: {a}{b}") as server:
        yield server


def client(server: JudgeServer, waits: list[float] | None = None, **options: object) -> JudgeClient:
    return JudgeClient(server.url, "m", sleep=[].append if waits is None else waits.append, **options)


def test_what_is_sent(server: JudgeServer) -> None:
    assert client(server, key=KEY).ask(ASKED) == "Verdict: ab"
    assert server.bodies == [{"model": "m", "messages": ASKED, "temperature": 0.0, "path": "/v1/chat/completions"}]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    other = JudgeClient(f"{server.url}/chat/completions/", "m", temperature=None)
    assert other.ask(ASKED) == "Verdict: ab"
    assert "temperature" not in server.bodies[1] and server.bodies[1]["path"] == "/v1/chat/completions"
    assert "Authorization" not in server.headers[1]


def test_trouble_that_passes_is_waited_for(server: JudgeServer) -> None:
    date = email.utils.formatdate(time.time() + 40, usegmt=True)
    server.failures += [
        (503, {}, "overloaded"),
        None,
        (429, {"Retry-After": "17"}, "{}"),
        (429, {"Retry-After": date}, "{}"),
        (200, {}, "<html>not an answer</html>"),
        (429, {"Retry-After": "9999"}, "{}"),
    ]
    waits: list[float] = []
    assert client(server, waits).ask(ASKED) == "Verdict: ab"
    assert len(waits) == 6 and waits[2] == 17 and 35 < waits[3] <= 40 and waits[5] == 60
    assert 0.8 <= waits[0] <= 1.2 and 1.6 <= waits[1] <= 2.4 and 12.8 <= waits[4] <= 19.2


@pytest.mark.parametrize(
    ("message", "reply"),
    [
        ({"content": None, "refusal": "I cannot judge this."}, "I cannot judge this."),
        ({"content": [{"type": "thinking", "text": "Hm"}, {"type": "text", "text": "Verdict: B"}]}, "Verdict: B"),
        ({"content": ""}, ""),
    ],
)
def test_answers_of_other_forms(server: JudgeServer, message: dict[str, object], reply: str) -> None:
    """A judge that refuses one prompt has answered: it is left out, and the others are judged."""
    server.failures.append((200, {}, json.dumps({"choices": [{"message": message}]})))
    assert client(server).ask(ASKED) == reply and len(server.bodies) == 1


def test_an_answer_without_text_says_why(server: JudgeServer) -> None:
    body = json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "length"}]})
    server.failures += [(200, {}, body)]
    with pytest.raises(QuestionRefusedError, match=r"the answer has no text; finish_reason is 'length'"):
        client(server).ask(ASKED)
    assert len(server.bodies) == 1, "it would end the same way again"
    server.failures += [(200, {}, json.dumps({"choices": [{"message": {"content": None}}]}))]
    assert client(server).ask(ASKED) == "Verdict: ab", "of which nothing is known, and which passed"


def test_it_gives_up(server: JudgeServer) -> None:
    server.failures += [(500, {}, '{"error": {"message": "out of order"}}')] * 9
    waits: list[float] = []
    with pytest.raises(
        JudgeError, match=r"has not answered in 8 attempts \(500: out of order\)\. What it has answered is"
    ):
        client(server, waits).ask(ASKED)
    assert len(server.bodies) == 8 and len(waits) == 7


@pytest.mark.parametrize(
    ("status", "headers", "body", "message"),
    [
        (401, {}, '{"error": {"message": "wrong key"}}', "answers 401: wrong key"),
        (404, {}, '{"error": "no model m"}', "answers 404: no model m"),
        (400, {}, "x" * 999, "answers 400: x{300}…"),
        (307, {"Location": "http://elsewhere.invalid/v1"}, "", "points to http://elsewhere.invalid/v1; give that one"),
    ],
)
def test_what_will_not_pass_is_said_at_once(
    server: JudgeServer, status: int, headers: dict[str, str], body: str, message: str
) -> None:
    server.failures.append((status, headers, body))
    with pytest.raises(JudgeError, match=message):
        client(server, key=KEY).ask(ASKED)
    assert len(server.bodies) == 1


def test_a_key_that_comes_back_is_hidden(server: JudgeServer) -> None:
    server.failures.append((401, {}, f'{{"error": {{"message": "{KEY} is wrong"}}}}'))
    asking = client(server, key=KEY)
    with pytest.raises(JudgeError) as caught:
        asking.ask(ASKED)
    assert KEY not in str(caught.value) and "(hidden) is wrong" in str(caught.value) and KEY not in repr(asking)
    assert KEY not in str(asking.identity)


def test_a_short_key_is_hidden_where_it_stands_by_itself(server: JudgeServer) -> None:
    server.failures += [(401, {}, "'k3y' is wrong: no k3ys here"), (400, {}, '{"error": {"message": "k3y"}}')]
    for status, told in ((401, "'(hidden)' is wrong: no k3ys here"), (400, "(hidden)")):
        with pytest.raises(JudgeError) as caught:
            client(server, key="k3y").ask(ASKED)
        assert str(caught.value).endswith(f"answers {status}: {told}")


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(JudgeError, match="has not answered in 8 attempts"):
        JudgeClient("http://127.0.0.1:9/v1", "m", sleep=lambda _: None).ask(ASKED)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "file:///etc/passwd", "http://", "http:///v1"])
def test_addresses_are_looked_at(url: str) -> None:
    with pytest.raises(JudgeError, match="needed an address such as"):
        JudgeClient(url, "m")


@pytest.mark.parametrize("url", ["https://user:hunter2hunter2@x/v1", "https://x/v1?api-key=hunter2hunter2"])
def test_secrets_in_addresses_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(JudgeError, match="leave user, password and query out") as caught:
        JudgeClient(url, "m")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["with\nline", "mit-ü"])
def test_keys_that_no_header_holds(key: str) -> None:
    with pytest.raises(JudgeError, match="no HTTP header can") as caught:
        JudgeClient("http://x/v1", "m", key)
    assert key not in str(caught.value)


def test_who_stops_does_not_wait(server: JudgeServer) -> None:
    server.failures += [(500, {}, "")] * 9
    asking = JudgeClient(server.url, "m")
    asking.stop()
    with pytest.raises(JudgeError):
        asking.ask(ASKED)
    assert server.bodies == []
