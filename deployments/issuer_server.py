"""Serves the dev issuer's discovery document and key set: `python -m deployments.issuer_server DIR PORT ISSUER`.

The standard library's server, because it takes a tenth of the memory of a web framework and does two GETs. The
key set is read at each request, so a new key shows at once; private keys are never opened.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HOST = "127.0.0.1"
JWKS_PATH = "/.well-known/jwks.json"
DISCOVERY_PATH = "/.well-known/openid-configuration"
_MAX_AGE_SECONDS = 60


def discovery(issuer: str, base_url: str) -> dict[str, object]:
    """The part of OpenID discovery a resource server reads."""
    return {
        "issuer": issuer,
        "jwks_uri": base_url + JWKS_PATH,
        "id_token_signing_alg_values_supported": ["ES256"],
        "response_types_supported": ["none"],
        "subject_types_supported": ["public"],
    }


def make_server(directory: Path, port: int, issuer: str) -> ThreadingHTTPServer:
    """A bound server; port 0 picks a free one. `serve_forever` runs it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version = "engram-dev-issuer"
        sys_version = ""
        timeout = 15  # seconds; a silent connection gives its thread back

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            status, body = self._resource()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            cache = f"public, max-age={_MAX_AGE_SECONDS}" if status is HTTPStatus.OK else "no-store"
            self.send_header("Cache-Control", cache)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def _resource(self) -> tuple[HTTPStatus, bytes]:
            path = self.path.partition("?")[0]
            if path == DISCOVERY_PATH:
                base_url = f"http://{HOST}:{self.connection.getsockname()[1]}"
                return HTTPStatus.OK, json.dumps(discovery(issuer, base_url)).encode()
            if path == JWKS_PATH:
                try:
                    return HTTPStatus.OK, (directory / "jwks.json").read_bytes()
                except OSError:
                    return HTTPStatus.SERVICE_UNAVAILABLE, b'{"error": "no key set"}'
            return HTTPStatus.NOT_FOUND, b'{"error": "not found"}'

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    return Server((HOST, port), Handler)


def main() -> None:
    directory, port, issuer = sys.argv[1:4]
    server = make_server(Path(directory), int(port), issuer)
    # shutdown() waits for serve_forever, which this thread is running: ask from another one
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever()


if __name__ == "__main__":
    main()
