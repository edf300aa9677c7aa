# SPDX-License-Identifier: Apache-2.0
"""An S3 server on the loopback (moto's), in a process of its own, that can be made to fail.

``python -m tests.object_server`` serves until its standard input ends: it cannot outlive its owner. A second
port takes what is to fail, from ranks as well, and also while the first one is down.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

KEYS = {"access_key": "tests", "secret_key": "tests"}
STATUSES = {"403": "Forbidden", "429": "Too Many Requests", "500": "Internal Error", "503": "Slow Down"}
CODES = {"403": "AccessDenied", "429": "TooManyRequests", "500": "InternalError", "503": "SlowDown"}
_START_S = 60.0


@dataclass
class Fault:
    """What becomes of some requests.

    Attributes:
        kind: a status to answer; or "reset" (the connection is closed), "truncate" (closed in the middle of
            the body), "delay" (answered after ``seconds``), "hang" (until the faults are cleared).
        pattern: of the requests, "PUT bucket/key"; searched for.
        times: how many of them.
        seconds: see ``kind``.
    """

    kind: str
    pattern: str
    times: int = 1_000_000
    seconds: float = 0.0


@dataclass(frozen=True)
class ObjectServer:
    """A running server, as any process sees it.

    Attributes:
        port: of S3.
        control: the other port.
    """

    port: int
    control: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, *faults: Fault) -> None:
        """Let requests fail from now on; of several that fit, the first is taken."""
        self._ask("fail", [asdict(fault) for fault in faults])

    def clear(self) -> None:
        """Let nothing fail any more, let what hangs go on, and forget the requests; wait until it is up."""
        self._ask("clear", None)

    def go_down(self, seconds: float) -> None:
        """Refuse connections for some time, and cut those that there are. The objects stay."""
        self._ask("down", seconds)

    def make_bucket(self, name: str) -> None:
        """Create an empty bucket; one of this name goes first."""
        self._ask("bucket", name)

    def objects(self, bucket: str) -> dict[str, int]:
        """Key to size of every object, looked up without S3."""
        return dict(self._ask("objects", bucket))

    def requests(self) -> list[str]:
        """All requests since the last ``clear``, as ``Fault.pattern`` sees them."""
        return list(self._ask("requests", None))

    def hanging(self) -> int:
        """How many requests hang."""
        return int(self._ask("hanging", None))

    def profile(self, bucket: str, retries: bool = False, **options: Any) -> dict[str, Any]:
        """Return a profile of multi-storage-client.

        Args:
            bucket: holds its objects.
            retries: let the client and boto3 repeat requests, as they do by default.
            options: more of its storage provider.
        """
        quick = {} if retries else {"retries": {"mode": "standard", "total_max_attempts": 1}}
        found: dict[str, Any] = {
            "storage_provider": {
                "type": "s3",
                "options": {
                    "base_path": bucket,
                    "endpoint_url": self.endpoint,
                    "region_name": "us-east-1",
                    **quick,
                    **options,
                },
            },
            "credentials_provider": {"type": "S3Credentials", "options": KEYS},
        }
        return found if retries else {**found, "retry": {"attempts": 1}}

    def _ask(self, what: str, argument: Any) -> Any:
        body = json.dumps([what, argument]).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.control}/", body, timeout=30) as answer:
            return json.load(answer)


def write_config(path: Path, profiles: dict[str, dict[str, Any]]) -> str:
    """Write a configuration of multi-storage-client; return its path, for MSC_CONFIG."""
    path.write_text(yaml.safe_dump({"profiles": profiles}))
    return str(path)


@contextlib.contextmanager
def running() -> Iterator[ObjectServer]:
    """Start a server, and end it with the block or with this process."""
    root = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.object_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        line = process.stdout.readline()  # empty if it has ended
        assert line, "the server did not start"
        yield ObjectServer(**json.loads(line))
    finally:
        process.stdin.close()
        try:
            process.wait(_START_S)
        finally:
            process.kill()
            process.wait()


# --- In the server's process ------------------------------------------------------------------------------


class _Server:
    """moto behind ``faults``."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._requests: list[str] = []
        self._hanging = 0
        self._cleared, self._is_up = threading.Event(), threading.Event()
        self._open: set[Any] = set()
        self._http: Any = None
        self.port = self._listen(0)

    def _listen(self, port: int) -> int:
        from werkzeug.serving import WSGIRequestHandler, make_server

        connections = self._open

        class Handler(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def log(self, *_: Any) -> None:
                pass

            def setup(self) -> None:
                super().setup()
                connections.add(self.connection)

            def finish(self) -> None:
                connections.discard(self.connection)
                with contextlib.suppress(OSError, ValueError):
                    super().finish()

            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError):
                    super().handle()

        self._http = make_server("127.0.0.1", port, self, threaded=True, request_handler=Handler)
        self._is_up.set()
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return int(self._http.server_port)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO'].lstrip('/')}"
        fault = self._fault_of(request)
        if fault is None:
            return self._app(environ, start)
        if fault.kind in STATUSES:
            _read(environ, int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{fault.kind} {STATUSES[fault.kind]}", [("Content-Type", "application/xml")])
            code = CODES[fault.kind]
            return [f"<Error><Code>{code}</Code><Message>as the test wants it</Message></Error>".encode()]
        if fault.kind == "delay":
            time.sleep(fault.seconds)
            return self._app(environ, start)
        if fault.kind == "hang":
            with self._lock:
                self._hanging += 1
            self._cleared.wait()
            return self._app(environ, start)
        if fault.kind == "truncate":
            _read(environ, int(environ.get("CONTENT_LENGTH") or 0) // 2)
        _cut(environ["werkzeug.socket"])
        start("500 Nobody Reads This", [])
        return []

    def _fault_of(self, request: str) -> Fault | None:
        with self._lock:
            self._requests.append(request)
            for fault in self._faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def do(self, what: str, argument: Any) -> Any:
        """Answer a request to the control port."""
        from moto.s3.models import s3_backends

        s3 = s3_backends["123456789012"]["aws"]
        if what == "fail":
            with self._lock:
                self._faults = [Fault(**each) for each in argument]
            self._cleared.clear()
        elif what == "clear":
            with self._lock:
                self._faults, self._requests, self._hanging = [], [], 0
            self._cleared.set()
            self._is_up.wait()
        elif what == "down":
            self._go_down(argument)
        elif what == "hanging":
            return self._hanging
        elif what == "bucket":
            s3.buckets.pop(argument, None)
            s3.create_bucket(argument, "us-east-1")
        elif what == "objects":
            return [(name, key.size) for name, key in s3.buckets[argument].keys.items()]
        elif what == "requests":
            with self._lock:
                return list(self._requests)
        return None

    def _go_down(self, seconds: float) -> None:
        self._is_up.clear()
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._open):
            _cut(connection)
        threading.Timer(seconds, self._listen, [self.port]).start()


def _read(environ: dict[str, Any], nbytes: int) -> None:
    while nbytes > 0 and (part := environ["wsgi.input"].read(min(nbytes, 1 << 20))):
        nbytes -= len(part)


def _cut(connection: Any) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(2)


def main() -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    logging.disable()
    server = _Server()

    class Control(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            what, argument = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps(server.do(what, argument)).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    control = ThreadingHTTPServer(("127.0.0.1", 0), Control)
    threading.Thread(target=control.serve_forever, daemon=True).start()
    sys.stdout.write(json.dumps({"port": server.port, "control": control.server_port}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
