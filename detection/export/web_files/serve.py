"""Serve this folder, with the headers that let the page compute with several threads.

python serve.py                      # http://localhost:8000, for this machine
python serve.py --bind 0.0.0.0       # for the network
python serve.py --bind 0.0.0.0 --certificate ../cert.pem --key ../key.pem

The last is for a telephone, which lends its camera to https alone. A certificate of one's own, which it warns about once:
openssl req -x509 -newkey rsa:2048 -nodes -days 90 -subj /CN=litedet -keyout ../key.pem -out ../cert.pem

A plain "python -m http.server" does too; the page then computes with one thread.
"""

import argparse
import contextlib
import http.server
import ssl
from functools import partial
from pathlib import Path


class Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012  as the class above has it
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        # Not what the system says: a browser runs scripts and WebAssembly under these names alone.
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self):
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")  # asks again whether a file is still the same
        super().end_headers()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--bind", default="127.0.0.1", help="address to listen at; 0.0.0.0: all of this machine")
    parser.add_argument("--certificate", help="with --key: serve https")
    parser.add_argument("--key")
    arguments = parser.parse_args()
    if bool(arguments.certificate) != bool(arguments.key):
        parser.error("--certificate and --key go together")
    handler = partial(Handler, directory=Path(__file__).resolve().parent)
    server = http.server.ThreadingHTTPServer((arguments.bind, arguments.port), handler)
    scheme = "http"
    if arguments.certificate:
        scheme = "https"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(arguments.certificate, arguments.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    host = "localhost" if arguments.bind in ("127.0.0.1", "0.0.0.0") else arguments.bind
    print(f"{scheme}://{host}:{server.server_port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
