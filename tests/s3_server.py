"""An S3 server for tests: moto's re-implementation of S3, which honours conditional puts, over HTTP on 127.0.0.1.

And a proxy to stand in front of it, which loses, delays and refuses requests as it is told.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

STATUS = {"refuse": 503, "throttle": 429, "break": 500, "forbid": 403, "conflict": 409}
Fault = Literal[
    "refuse",
    "throttle",
    "break",
    "forbid",
    "conflict",
    "lose the request",
    "lose the answer",
    "cut the answer",
    "stall",
]
"""The status above; a connection reset before, or after, the request was carried out; half of an answer; none."""
Policy = Callable[[str, str], Fault | None]
"""What is to go wrong with a request, by its method and path."""


class _QuietHandler(MotoRequestHandler):
    def log_request(self, *_: Any) -> None:
        pass


class S3Server:
    """One bucket. Requests are carried out one at a time: moto looks at a condition and stores without a lock."""

    bucket = "bucket"

    def __init__(self) -> None:
        app = DomainDispatcherApplication(create_backend_app)
        turn = threading.Lock()

        def one_at_a_time(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            with turn, contextlib.closing(app(environ, start_response)) as answer:
                return list(answer)

        self._server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=_QuietHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.port = int(self._server.server_address[1])
        self.endpoint = f"http://127.0.0.1:{self.port}"
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{self.bucket}", method="PUT")).close()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def environment(endpoint: str) -> dict[str, str]:
    """What a process needs to use that server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "not a secret",
    }


class FaultyProxy:
    """Passes requests on to a server, except for what the policy says."""

    def __init__(self, port: int, policy: Policy, *, stall_s: float = 5.0) -> None:
        self.policy = policy
        self.seen: list[tuple[str, str, Fault | None]] = []
        self._released = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                proxy._pass_on(self, port, stall_s)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass  # the client gave up

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def _pass_on(self, client: BaseHTTPRequestHandler, port: int, stall_s: float) -> None:
        fault = self.policy(client.command, client.path)
        self.seen.append((client.command, client.path, fault))
        body = client.rfile.read(int(client.headers.get("Content-Length", 0)))
        if fault == "stall":
            self._released.wait(stall_s)
        if fault in ("lose the request", "stall"):
            return _reset(client)
        if fault in STATUS:
            client.send_response_only(STATUS[fault])
            client.send_header("Content-Length", "0")
            client.end_headers()
            return None
        upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(upstream):
            upstream.request(client.command, client.path, body, dict(client.headers))
            answer = upstream.getresponse()
            content = answer.read()
        if fault == "lose the answer":
            return _reset(client)
        client.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                client.send_header(name, value)
        length = answer.getheader("Content-Length") if client.command == "HEAD" else str(len(content))
        client.send_header("Content-Length", length or "0")
        client.end_headers()
        client.wfile.write(content[: len(content) // 2] if fault == "cut the answer" else content)
        client.wfile.flush()
        if fault == "cut the answer":
            _reset(client)
        return None

    def close(self) -> None:
        self._released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _reset(client: BaseHTTPRequestHandler) -> None:
    """Closes the connection so that the other side gets a reset rather than an end."""
    time.sleep(0.01)  # what was sent before gets through
    client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close_connection = True
