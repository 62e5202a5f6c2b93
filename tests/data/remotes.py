"""An S3 server and what can go wrong in front of it."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

_VARIABLES = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_CONFIG_FILE": os.devnull,
    # boto3 tries again by itself; what is tested here is what comes after that.
    "AWS_MAX_ATTEMPTS": "1",
}
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


@dataclass(frozen=True)
class S3:
    port: int
    client: Any
    """Of boto3."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def upload(self, folder: Path, prefix: str) -> str:
        """The URL of a copy of the folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.client.upload_file(str(path), "bucket", f"{prefix}/{path.relative_to(folder).as_posix()}")
        return f"s3://bucket/{prefix}"


@contextmanager
def moto_server(log: Path) -> Iterator[S3]:
    """moto's S3 server in a process of its own, with a bucket `bucket`."""
    import boto3
    from botocore.config import Config

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
            config=Config(proxies={}, retries={"max_attempts": 0}),
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                client.create_bucket(Bucket="bucket")
                break
            except Exception:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"moto did not start: {log.read_text()}") from None
                time.sleep(0.1)
        yield S3(port, client)
    finally:
        server.kill()
        server.wait()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Let s3:// URLs lead to the server at `endpoint`, with credentials that mean nothing and no way around it."""
    for name, value in (_VARIABLES | {"S3_ENDPOINT_URL": endpoint}).items():
        monkeypatch.setenv(name, value)
    for name in (*_PROXIES, *map(str.upper, _PROXIES), "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def endpoint_variables() -> dict[str, str]:
    """What `use_endpoint` has set, for child processes whose environment is of an earlier time."""
    names = (*_VARIABLES, "S3_ENDPOINT_URL")
    return {name: os.environ[name] for name in names} | dict.fromkeys((*_PROXIES, *map(str.upper, _PROXIES)), "")


@dataclass
class Fault:
    """What happens to the first `times` GET requests (or, for `error` and `hang`, requests) whose path matches."""

    path: str
    kind: str
    """`error` answers 500, `missing` 404, `denied` 403, `hang` nothing for a while, `truncate` half of the content,
    `flip` another bit in it, without the checksums of S3."""
    times: int = 1 << 30


@dataclass
class FaultyProxy:
    url: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """METHOD /bucket/key of every request."""

    def count(self, path: str, method: str = "GET") -> int:
        return sum(bool(re.fullmatch(rf"{method} \S*{path}\S*", request)) for request in self.requests)


@contextmanager
def faulty_proxy(upstream_port: int, hang_s: float = 3.0) -> Iterator[FaultyProxy]:
    """A real HTTP server that passes requests on to 127.0.0.1:upstream_port, except for its faults."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            kind = self._fault()
            if kind == "hang":
                time.sleep(hang_s)
                self.close_connection = True
                return
            if kind in ("error", "missing", "denied"):
                self.send_response({"error": 500, "missing": 404, "denied": 403}[kind])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            upstream = http.client.HTTPConnection("127.0.0.1", upstream_port, timeout=30)
            upstream.request(self.command, self.path, headers=dict(self.headers))
            response = upstream.getresponse()
            body = response.read()
            upstream.close()
            if kind == "flip" and body:
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
            self.send_response(response.status)
            for name, value in response.getheaders():
                if kind == "flip" and name.lower().startswith("x-amz-checksum"):
                    continue
                if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                    self.send_header(name, value)
            self.end_headers()
            if kind == "truncate":
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            else:
                self.wfile.write(body)

        def _fault(self) -> str | None:
            with lock:
                proxy.requests.append(f"{self.command} {self.path}")
                for fault in proxy.faults:
                    on_body = fault.kind in ("truncate", "flip")
                    if (
                        fault.times > 0
                        and re.search(fault.path, self.path)
                        and not (on_body and self.command == "HEAD")
                    ):
                        fault.times -= 1
                        return fault.kind
            return None

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients that are killed or impatient are what the tests are about."""
            if not isinstance(sys.exc_info()[1], ConnectionError):
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    proxy = FaultyProxy(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
