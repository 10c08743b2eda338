"""An endpoint that misbehaves in every way that a client must survive: real HTTP on 127.0.0.1, scripted per request."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = str | tuple[Any, ...]


def completion(text: str | None, **more: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    choice = {"index": 0, "message": message, "finish_reason": more.pop("finish", "stop")}
    return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}, **more}


def obey(body: dict[str, Any]) -> str:
    """A right answer in form: a label for an explainer, as many zeros and ones as asked for a judge."""
    system, user = (message["content"] for message in body["messages"])
    passages = json.loads(user)["passages"]
    if '"label"' in system:
        return json.dumps({"found": True, "label": f"label for {passages[0][:40]}"})
    return json.dumps({"answers": [i % 2 for i in range(len(passages))]})


class HostileServer:
    """Behaves as `behave(body, number)` says for each request; `seen` has the bodies, `headers` their headers."""

    def __init__(self, behave: Callable[[dict[str, Any], int], Behaviour]) -> None:
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at: list[float] = []
        self.counts: Counter[str] = Counter()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    number = len(server.seen)
                    server.seen.append(body)
                    server.headers.append(dict(self.headers.items()))
                    server.at.append(time.monotonic())
                how = behave(body, number)
                name, *details = (how,) if isinstance(how, str) else how
                server.counts[name] += 1
                try:
                    getattr(self, name)(body, *details)
                except OSError:
                    self.close_connection = True

            def obey(self, body: dict[str, Any]) -> None:
                self.reply(200, completion(obey(body)))

            def say(self, _: Any, text: str, finish: str = "stop") -> None:
                self.reply(200, completion(text, finish=finish))

            def uncounted(self, body: dict[str, Any]) -> None:
                self.reply(200, {k: v for k, v in completion(obey(body)).items() if k != "usage"})

            def refuse(self, _: Any) -> None:
                self.reply(200, completion(None, message={"refusal": "I cannot help with that."}))

            def filtered(self, _: Any) -> None:
                self.reply(200, completion("", finish="content_filter"))

            def status(self, _: Any, code: int, text: str = "no", headers: tuple[tuple[str, str], ...] = ()) -> None:
                self.reply(code, {"error": {"message": text}}, headers)

            def page(self, _: Any) -> None:
                self.raw(200, b"<html>Gateway</html>")

            def hang(self, _: Any, seconds: float) -> None:
                time.sleep(seconds)
                self.close_connection = True

            def trickle(self, _: Any, seconds: float) -> None:
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.02)
                self.close_connection = True

            def cut(self, body: dict[str, Any]) -> None:
                content = json.dumps(completion(obey(body))).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True

            def vanish(self, _: Any) -> None:
                self.close_connection = True

            def endless(self, _: Any) -> None:
                self.send_response(200)
                self.end_headers()
                self.close_connection = True
                for _piece in range(1000):
                    self.wfile.write(b"x" * 65536)

            def reply(self, code: int, body: Any, headers: tuple[tuple[str, str], ...] = ()) -> None:
                self.raw(code, json.dumps(body).encode(), headers)

            def raw(self, code: int, content: bytes, headers: tuple[tuple[str, str], ...] = ()) -> None:
                self.send_response(code)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
