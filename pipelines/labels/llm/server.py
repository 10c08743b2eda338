"""A model server that is started for a piece of work and ends with it, such as vLLM on an actor's GPU."""

import os
import signal
import socket
import subprocess
import sys
import time
from types import TracebackType

from pipelines.errors import RunError
from pipelines.labels.llm.settings import ServeConfig
from pipelines.labels.llm.transport import TransportError, request

_POLL_S = 0.2
_GRACE_S = 10.0
_WATCH = f"""
import os, signal, subprocess, sys, threading, time
try:
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
except OSError as error:
    sys.exit(f"{{sys.argv[1]}}: {{error.strerror}}")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def end():
    while os.read(0, 1024):
        pass
    os.killpg(0, signal.SIGTERM)
    server.wait({_GRACE_S})
def watch():
    try:
        end()
    finally:
        os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
code = server.wait()
os._exit(code if code >= 0 else 128 - code)
"""
"""Runs the server and ends it, with all that it started, when our end of the pipe closes: also when we are killed."""


class Server:
    """Starts the command and waits until `/v1/models` answers. Context manager; the server ends with the block.

    Raises:
        RunError: it ends by itself, or does not answer in time.
    """

    def __init__(self, config: ServeConfig) -> None:
        port = _free_port()
        self.base_url = f"http://127.0.0.1:{port}/v1"
        command = [part.replace("{port}", str(port)) for part in config.command]
        try:
            # A process group of its own: vLLM starts further processes, which are to end as well.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WATCH, *command], start_new_session=True, stdin=subprocess.PIPE
            )
        except OSError as error:
            raise RunError(f"label.llm.serve: {command[0]} cannot be started: {error}") from error
        try:
            self._wait(command, config.startup_s)
        except BaseException:
            self.close()
            raise

    def _wait(self, command: list[str], startup_s: float) -> None:
        deadline = time.monotonic() + startup_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RunError(
                    f"label.llm.serve: `{' '.join(command)}` ended with exit code {self._process.returncode} before it "
                    "answered; its messages are above"
                )
            try:
                if request("GET", f"{self.base_url}/models", {}, timeout_s=5.0).status < 500:
                    return
            except TransportError:
                pass
            time.sleep(_POLL_S)
        raise RunError(
            f"label.llm.serve: `{' '.join(command)}` does not answer at {self.base_url} after {startup_s:.0f} s: raise "
            "startup_s"
        )

    def close(self) -> None:
        """End the server and what it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_GRACE_S + 5.0)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
