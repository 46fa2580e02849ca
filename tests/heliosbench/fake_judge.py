"""A server with OpenAI's interface that answers as it is told, and keeps the requests."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FakeJudge:
    """`replies` are texts or HTTP codes, taken in turn; the last one is repeated."""

    replies: list[str | int]
    requests: list[dict] = field(default_factory=list)
    url: str = ""

    def reply(self, request: dict) -> tuple[int, dict]:
        reply = self.replies[min(len(self.requests), len(self.replies) - 1)]
        self.requests.append(request)
        if isinstance(reply, int):
            return reply, {"error": {"message": f"refused with {reply}", "type": "test", "code": None}}
        message = {"role": "assistant", "content": reply}
        return 200, {
            "id": "1", "object": "chat.completion", "created": 0, "model": request["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101},
        }  # fmt: skip

    @property
    def pictures(self) -> list[int]:
        """The number of pictures of each request."""
        contents = [request["messages"][0]["content"] for request in self.requests]
        return [sum(part["type"] == "image_url" for part in content) for content in contents]


@contextmanager
def serve(*replies: str | int) -> Iterator[FakeJudge]:
    """The server on a free port of this machine."""
    judge, lock = FakeJudge(list(replies)), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            with lock:
                code, answer = judge.reply(request)
            body = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("retry-after-ms", "10")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
