"""A server of the chat completions protocol on this machine, for the tests of judges."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PARTS = re.compile(
    r"\[The prompt\]\n(.*?)\n\[End of the prompt\]\n\n\[Answer A\]\n(.*?)\n\[End of answer A\]\n\n"
    r"\[Answer B\]\n(.*?)\n\[End of answer B\]",
    re.DOTALL,
)


@dataclass
class JudgeServer:
    """What it was asked, and how it answers.

    Attributes:
        verdict: (prompt, answer A, answer B) -> the reply; or (status, body), for a question that is refused.
        failures: what the next questions get in the place of an answer: (status, headers, body), or None for a
            connection that is cut.
        url: of the server, as ``--judge_url`` takes it.
        bodies, headers: of all questions, failed ones among them.
    """

    verdict: Callable[[str, str, str], str | tuple[int, str]]
    failures: list[tuple[int, dict[str, str], str] | None] = field(default_factory=list)
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def reply(self, body: dict[str, Any]) -> str | tuple[int, str]:
        (asked,) = (message["content"] for message in body["messages"] if message["role"] == "user")
        match = _PARTS.search(asked)
        assert match is not None
        return self.verdict(*match.groups())


@contextmanager
def judging(verdict: Callable[[str, str, str], str | tuple[int, str]]) -> Iterator[JudgeServer]:
    """A server in this process, until the block ends."""
    server = JudgeServer(verdict)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.bodies.append(body | {"path": self.path})
                server.headers.append(dict(self.headers))
                failure = server.failures.pop(0) if server.failures else ()
            if failure is None:
                self.close_connection = True
                return
            status, headers, text = failure or (200, {}, "")
            if not failure:
                reply = server.reply(body)
                if isinstance(reply, tuple):
                    status, text = reply
                else:
                    text = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http_server.server_address[1]}/v1"
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http_server.shutdown()
        thread.join()
        http_server.server_close()
