"""Servers on a loopback address."""

import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(command: list[str], log: Path) -> Iterator[str]:
    """Runs a server by a command, to which host and port are added, until it says that it is well; gives its address."""
    port = free_port()
    with log.open("w") as file:
        command = [*command, "--host", "127.0.0.1", "--port", str(port)]
        with subprocess.Popen(command, stdout=file, stderr=file) as process:
            try:
                _wait(f"http://127.0.0.1:{port}/health", process, log)
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()


def _wait(url: str, process: subprocess.Popen, log: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url)
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.5)
