"""A model server that is started for a piece of work and ends with it, such as vLLM on an actor's GPU."""

import os
import signal
import socket
import subprocess
import time
from types import TracebackType

from pipelines.errors import RunError
from pipelines.labels.llm.settings import ServeConfig
from pipelines.labels.llm.transport import TransportError, request

_POLL_S = 0.2


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
            self._process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
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
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, how)
                self._process.wait(10.0)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self._process.poll()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
