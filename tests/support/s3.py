"""A real S3 protocol server on this machine, and a slow way to it."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import s3fs


@contextmanager
def s3_server(log: Path) -> Iterator[s3fs.S3FileSystem]:
    """Run a server, have this process and those that it starts find it, and yield the test's own way to look into it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with open(log, "w") as said:
        process = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=said, stderr=said)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
                patch.setenv(f"AWS_{name}", value)
            try:
                deadline = time.monotonic() + 60
                while True:
                    try:
                        with urllib.request.urlopen(url, timeout=5):
                            break
                    except (urllib.error.URLError, ConnectionError):
                        assert process.poll() is None, "the S3 server ended"
                        assert time.monotonic() < deadline, "the S3 server does not answer"
                        time.sleep(0.2)
                yield s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, endpoint_url=url)
            finally:
                s3fs.S3FileSystem.clear_instance_cache()
                process.terminate()
                process.wait(20)


class Road:
    """A TCP port that leads to another one at `bytes_per_s`, or, `is_closed`, nowhere."""

    def __init__(self, port: int, bytes_per_s: float) -> None:
        self._target, self.bytes_per_s, self.is_closed = port, bytes_per_s, False
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):  # wakes the thread that accepts
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            if self.is_closed:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._target))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while not self.is_closed and (data := source.recv(4096)):
                sink.sendall(data)
                time.sleep(len(data) / self.bytes_per_s)
        for end in (source, sink):
            end.close()
