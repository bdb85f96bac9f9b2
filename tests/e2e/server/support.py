"""A server under test, and a client on bare sockets."""

import contextlib
import json
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import tempfile
import threading
import time

PROGRAM = os.environ.get("JOINTKV_PROGRAM", "")
KV = ["--kv-bytes", "128M"]
SLOW = float(os.environ.get("JOINTKV_TEST_PATIENCE", "1"))  # factor on every time that a test waits: sanitizers
START_S = 120 * SLOW
WAIT_S = 60 * SLOW


def model_path():
    cache = os.environ.get("JOINTKV_CACHE") or pathlib.Path.home() / ".cache" / "jointkv"
    return pathlib.Path(os.environ.get("JOINTKV_MODEL") or
                        pathlib.Path(cache) / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")


class Server:
    """`jointkv serve` on a free port. Ends with the process that made it."""

    def __init__(self, *arguments, env=None, address=("--port", "0"), ready=True, files_max=None):
        self.lines = []
        self.address = None
        self.ready = threading.Event()
        self.listening = threading.Event()
        self.process = subprocess.Popen(
            [PROGRAM, "serve", *map(str, address), *KV, *map(str, arguments)], stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, encoding="utf-8", errors="replace",
            env=None if env is None else {**os.environ, **env},
            preexec_fn=files_max and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files_max, files_max))))
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.wait(self.listening)
        if ready:
            self.wait(self.ready)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if found := re.search(r"listening on (\S+),", line):
                self.address = found[1].replace("\\/", "/")
                self.listening.set()
            if "ready: " in line:
                self.ready.set()
        self.listening.set()
        self.ready.set()

    def wait(self, event):
        if not event.wait(START_S) or self.process.poll() is not None:
            raise AssertionError("the server did not start: " + "\n".join(self.lines[-20:]))

    @property
    def port(self):
        return int(self.address.rsplit(":", 1)[1])

    @property
    def pid(self):
        return self.process.pid

    def connect(self, timeout_s=WAIT_S):
        return socket.create_connection(("127.0.0.1", self.port), timeout_s)

    def raw(self, data, timeout_s=WAIT_S, half_close=False):
        """Sends bytes, returns (status, headers, body) of each answer until the server closes or `timeout_s`."""
        with self.connect(timeout_s) as client:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(data)
            if half_close:
                client.shutdown(socket.SHUT_WR)
            return list(answers(client))

    def call(self, method, path, body=None, headers=(), timeout_s=WAIT_S):
        return self.raw(request(method, path, body, [*headers, ("Connection", "close")]), timeout_s)[0]

    def post(self, path, body, headers=()):
        return self.call("POST", path, body, headers)

    def first_event_s(self, path, body, headers=()):
        """From the first byte sent to the first event of a stream received; waits for the stream's end."""
        data = request("POST", path, {**body, "stream": True}, [*headers, ("Connection", "close")])
        start = time.perf_counter()
        with self.connect() as client:
            client.sendall(data)
            received = b""
            while b"data: " not in received:
                part = client.recv(65536)
                assert part, f"no event: {received[:500]}"
                received += part
            end = time.perf_counter()
            while client.recv(65536):
                pass
        return end - start

    def metrics(self, headers=()):
        return self.call("GET", "/metrics", headers=headers)[2].decode()

    def metric(self, name, headers=()):
        values = [float(line.rsplit(" ", 1)[1]) for line in self.metrics(headers).splitlines()
                  if line.startswith(name)]
        assert values, name
        return sum(values)

    def use(self):
        """(running KV bytes, running and waiting requests, open files, threads)"""
        text = self.metrics()
        def value(name, label=""):
            return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
                       if line.startswith(name) and label in line)
        proc = pathlib.Path("/proc") / str(self.pid)
        return {"kv": value("jointkv_kv_bytes", 'kind="running"'), "running": value("vllm:num_requests_running"),
                "waiting": value("vllm:num_requests_waiting"), "files": len(list((proc / "fd").iterdir())),
                "threads": len(list((proc / "task").iterdir()))}

    def wait_until(self, condition, what):
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            if condition():
                return
            time.sleep(0.05)
        raise AssertionError(f"waited in vain: {what}")

    def exit_code(self):
        """Of a server that has been told to stop."""
        try:
            return self.process.wait(WAIT_S)
        finally:
            self.stop(signal.SIGKILL)

    def stop(self, number=signal.SIGTERM, timeout_s=WAIT_S):
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(timeout_s)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.reader.join(5)
            self.process.stderr.close()
        return code


def request(method, path, body=None, headers=(), host="Host: localhost\r\n"):
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.lower() for name, _ in headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers if value is not None)
    if body is not None:
        if "content-type" not in names:
            lines += "Content-Type: application/json\r\n"
        if "content-length" not in names and "transfer-encoding" not in names:
            lines += f"Content-Length: {len(data)}\r\n"
    return f"{method} {path} HTTP/1.1\r\n{host}{lines}\r\n".encode() + data


def answers(client):
    """Parses answers strictly: a malformed one fails the test."""
    stream = client.makefile("rb")
    while True:
        try:
            line = stream.readline()
        except (ConnectionResetError, TimeoutError):
            return
        if not line:
            return
        version, status, _ = line.decode().split(" ", 2)
        assert version in ("HTTP/1.1", "HTTP/1.0"), line
        if status == "100":
            stream.readline()
            continue
        headers = {}
        while (line := stream.readline()) not in (b"\r\n", b""):
            name, value = line.decode().rstrip("\r\n").split(": ", 1)
            headers[name.lower()] = value
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while (size := int(stream.readline(), 16)) > 0:
                body += stream.read(size)
                assert stream.read(2) == b"\r\n"
            assert stream.readline() == b"\r\n"
        elif "content-length" in headers:
            body = stream.read(int(headers["content-length"]))
        elif status == "204":
            body = b""
        else:
            body = stream.read()
        yield int(status), headers, body


def events(body):
    """The data of server-sent events; comments are left out."""
    out = []
    for part in body.decode().split("\n\n"):
        if part.startswith("data: "):
            out.append(part[6:])
        else:
            assert part == "" or part.startswith(":"), part
    return out


@contextlib.contextmanager
def scratch():
    with tempfile.TemporaryDirectory() as path:
        yield pathlib.Path(path)
