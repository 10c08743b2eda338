"""One HTTP request with a deadline for all of it. The other side is not trusted.

A reply is read up to a limit of bytes; a redirect is not followed, since it would carry the key elsewhere; proxies come
from the environment (HTTPS_PROXY, NO_PROXY), as for other programs.
"""

import http.client
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

MAX_REPLY_BYTES = 8 * 2**20
_PIECE = 2**16


class Reply(NamedTuple):
    """What came back."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


class TransportError(Exception):
    """No whole reply came back.

    `sent` tells whether the request had left, so that the other side may have worked on it; `reason` is "timeout" or
    "unreachable".
    """

    def __init__(self, reason: str, detail: str, *, sent: bool) -> None:
        super().__init__(detail)
        self.reason, self.sent = reason, sent


def request(
    method: str, url: str, headers: Mapping[str, str], body: Any = None, *, timeout_s: float, connect_s: float = 10.0
) -> Reply:
    """Send `body` as JSON and return the reply, whatever its status.

    Args:
        timeout_s: for all of it, from connecting to the last byte.
        connect_s: for connecting, if that is less.
    Raises:
        TransportError: no connection, no whole reply in time, or one that is no HTTP or too long.
    """
    began, sent = time.monotonic(), False
    connection, target = _connection(url, min(connect_s, timeout_s))
    # A socket's own timeout starts anew with every byte, so a clock of our own cuts the connection at the deadline.
    expired = threading.Event()
    clock = threading.Timer(timeout_s, _cut, (connection, expired))
    clock.daemon = True
    clock.start()
    try:
        connection.connect()
        if connection.sock is not None:
            connection.sock.settimeout(timeout_s)
        sent = True
        content = None if body is None else json.dumps(body).encode()
        connection.request(method, target, content, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, _read(response))
    except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
        # AttributeError: http.client reads from a socket that the clock has just taken away.
        if isinstance(error, AttributeError | ValueError) and not expired.is_set():
            raise
        took = time.monotonic() - began
        if expired.is_set() or isinstance(error, TimeoutError):
            raise TransportError("timeout", f"no whole reply within {took:.1f} s", sent=sent) from error
        raise TransportError("unreachable", _said(error), sent=sent) from error
    finally:
        clock.cancel()
        connection.close()


def _connection(url: str, connect_s: float) -> tuple[http.client.HTTPConnection, str]:
    parts = urlsplit(url)
    host, port, path = parts.hostname or "", parts.port, parts.path or "/"
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(parts.scheme)
    if not proxy:
        return kind(host, port, timeout=connect_s), path
    via = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    connection = kind(via.hostname or "", via.port, timeout=connect_s)
    if parts.scheme == "https":
        connection.set_tunnel(host, port or 443)
        return connection, path
    return connection, url


def _cut(connection: http.client.HTTPConnection, expired: threading.Event) -> None:
    expired.set()
    if connection.sock is not None:
        try:
            connection.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            connection.close()  # not connected yet, or no longer


def _read(response: http.client.HTTPResponse) -> bytes:
    pieces, size = [], 0
    while piece := response.read1(_PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_REPLY_BYTES:
            raise http.client.HTTPException(f"the reply is longer than {MAX_REPLY_BYTES} bytes")
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(pieces)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
