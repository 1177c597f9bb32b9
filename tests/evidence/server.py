"""A chat endpoint on this machine, in a thread, that misbehaves as it is told."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Chat(ThreadingHTTPServer):
    """Answers `behave(number, prompt)`: a text, or a callable (handler) that sends something else.

    Attributes:
      prompts: what was asked, in order of arrival.
      headers, body: of the last request.
      most: requests that were there at the same time.
    """

    daemon_threads = True

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave, self.prompts, self.guard = behave, [], threading.Lock()
        self.now = self.most = 0
        self.headers, self.body = {}, {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that went away on purpose


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with server.guard:
            server.prompts.append(prompt)
            server.headers, server.body = dict(self.headers), body
            number = len(server.prompts)
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            answer = server.behave(number, prompt)
            answer(self) if callable(answer) else send(self, completion(answer))
        finally:
            with server.guard:
                server.now -= 1

    def log_message(self, *_):
        pass


def completion(text, end="stop", **message):
    return {"choices": [{"message": {"content": text, **message}, "finish_reason": end}]}


def send(handler, body, status=200, headers=()):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def status(code, **headers):
    pairs = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return lambda handler: send(handler, {"error": "x"}, code, pairs)


def hang(seconds):
    return lambda handler: time.sleep(seconds)


def hang_up(handler):
    handler.connection.close()


def half(handler):
    """Promise more than is sent."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.connection.close()


@contextlib.contextmanager
def serve(behave):
    """Run it; yield the server."""
    server = Chat(behave)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
