"""An OpenAI server without a model: it notes what it is asked and answers at once, streamed or not, with TLS or not."""

import http.server
import json
import ssl
import threading
import time


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(200, {"data": [{"id": "fake"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        if self.path.endswith("/embeddings"):
            self.answer(200, {"data": [{"embedding": [0.5, 0.5]}], "usage": {"prompt_tokens": 3}})
        elif not body.get("stream"):
            self.answer(400, {"error": {"message": "not streamed"}})
        else:
            self.stream("chat" in self.path)

    def answer(self, status, body):
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, chat):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        text = {"delta": {"content": "a"}} if chat else {"text": "a"}
        events = [{"choices": [text]}] * 3 + [{"choices": [{**text, "finish_reason": "length"}]},
                  {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}}]
        try:
            for data in [json.dumps(event) for event in events] + ["[DONE]"]:
                time.sleep(self.server.pause_s)
                event = f"data: {data}\n\n".encode()
                self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True  # the client has left


class FakeServer:
    """Use with `with`. `requests` are (path, headers, body) in the order they came."""

    def __init__(self, certificate=None, pause_s=0.0):
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.requests = self.requests = []
        self.server.pause_s = pause_s
        self.server.handle_error = lambda *_: None  # a client that refuses the certificate
        self.port = self.server.server_port
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
