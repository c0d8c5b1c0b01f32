"""A stand-in for a server with the OpenAI API (text and chat completions), that fails in every way it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Completions:
    """Answers with answer(body): (text, finish_reason). `failing`: what goes wrong next, one word a request."""

    def __init__(self, answer: Callable[[dict[str, Any]], tuple[str, str]]) -> None:
        self.answer, self.failing, self.requests = answer, list[str](), list[dict[str, Any]]()
        self.takes_tokens, self.most_at_once, self.at_once, self.lock = True, 0, 0, threading.Lock()
        self.url = ""

    def reply(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            self.requests.append(body)
            how = self.failing.pop(0) if self.failing else ""
            number = len(self.requests)
        if not self.takes_tokens and not isinstance(body.get("prompt", ""), str):
            return 400, {"error": {"message": "prompt must be a string."}}
        if how in ("500", "429", "404"):
            return int(how), {"error": {"message": "not now"}}
        if how == "slow":
            time.sleep(1.5)
        text, reason = self.answer(body)
        found = {"id": f"cmpl-{number}", "object": "text_completion", "created": 1, "model": body["model"],
                 "choices": [{"index": 0, "text": text, "finish_reason": reason, "logprobs": None}]}
        if "messages" in body:
            found["object"] = "chat.completion"
            del found["choices"][0]["text"]
            found["choices"][0]["message"] = {"role": "assistant", "content": text}
        if how == "two":
            found["choices"] *= 2
        if how == "none":
            found["choices"] = []
        if how == "no text":
            found["choices"][0]["text"] = None
        if how == "same id":
            found["id"] = "cmpl-1"
        if how == "other model":
            found["model"] = "gpt-2"
        if how == "revision":
            found["model"] += "@main"
        return (-1, found) if how == "half" else (200, "<html>hello</html>" if how == "html" else found)


@contextmanager
def serving(answer: Callable[[dict[str, Any]], tuple[str, str]]) -> Iterator[Completions]:
    completions = Completions(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {"object": "list", "data": []})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with completions.lock:
                completions.at_once += 1
                completions.most_at_once = max(completions.most_at_once, completions.at_once)
            status, found = completions.reply(body)
            with completions.lock:
                completions.at_once -= 1
            self.answer(status, found)

        def answer(self, status: int, found: Any) -> None:
            data = json.dumps(found).encode()
            self.send_response(abs(status) if status > 0 else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if status < 0 else data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a client that did not wait
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    completions.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield completions
    finally:
        server.shutdown()
        server.server_close()
