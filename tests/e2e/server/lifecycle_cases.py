"""Clients that leave, do not read or are too many; tenants; drain; sockets of other kinds."""

import contextlib
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import threading
import time
import unittest

from support import KV, PROGRAM, SLOW, Server, answers, events, model_path, request, scratch

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
CANCELS = int(os.environ.get("JOINTKV_TEST_CANCELS", "300"))
CLIENTS = int(os.environ.get("JOINTKV_TEST_CLIENTS", "32"))
LONG = {"prompt": "Hello", "max_tokens": 4000, "ignore_eos": True}


def stop(server):
    code = server.stop()
    assert code == 0, f"exit code {code}: " + "\n".join(server.lines[-20:])


class Leaving(unittest.TestCase):
    def setUp(self):
        self.server = Server("--max-queued-requests", 4096)
        self.addCleanup(stop, self.server)

    def leave_at_random(self, count, seed):
        """Connects, perhaps sends, perhaps reads, and leaves."""
        draw = random.Random(seed)
        for _ in range(count):
            with self.server.connect() as client:
                phase = draw.randrange(7)
                if phase == 0:
                    continue
                body = {**LONG, "prompt": "word " * draw.choice((1, 50, 600)), "stream": draw.random() < 0.6,
                        "n": draw.choice((1, 1, 3)), "max_tokens": draw.choice((3, 300))}
                if phase == 3:
                    body["max_tokens"] = 3
                data = request("POST", draw.choice((COMPLETION, CHAT)) if phase == 5 else COMPLETION, body)
                if phase == 1:
                    client.sendall(data[:draw.randrange(1, len(data))])
                    continue
                client.sendall(data)
                if phase == 2:
                    time.sleep(draw.random() * 0.1)
                elif phase == 3:
                    client.recv(draw.choice((1, 5000)))
                elif phase == 6:  # gives up
                    client.settimeout(draw.choice((0.1, 2)))
                    with contextlib.suppress(TimeoutError):
                        client.recv(draw.choice((1, 5000)))
                elif phase == 4:
                    client.shutdown(socket.SHUT_WR)
                    time.sleep(draw.random() * 0.02)
                elif phase == 5:  # a reset instead of an end
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    time.sleep(draw.random() * 0.05)

    def test_all_is_given_back(self):
        self.leave_at_random(20, 0)  # whatever is made once is made now
        before = self.settled()
        failed = []

        def client(number):
            try:
                self.leave_at_random(CANCELS // CLIENTS + 1, 1 + number)
            except Exception as error:  # noqa: BLE001
                failed.append(error)

        threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failed, [])
        self.server.wait_until(lambda: self.server.use() == before, f"{before}, not {self.server.use()}")
        self.assertEqual(before["kv"], 0)
        self.assertEqual(self.server.post(COMPLETION, {"prompt": "Hi", "max_tokens": 2})[0], 200)

    def settled(self):
        def quiet():
            use = self.server.use()
            return use["running"] == use["waiting"] == use["kv"] == 0
        self.server.wait_until(quiet, "all requests to end")
        time.sleep(3)  # connections that were reset are closed
        return self.server.use()

    def test_an_answer_that_is_not_streamed_is_cancelled_too(self):
        with self.server.connect() as client:
            client.sendall(request("POST", CHAT, {"messages": [{"role": "user", "content": "Hello"}],
                                                  "ignore_eos": True}))
            self.server.wait_until(lambda: self.server.use()["running"] == 1, "the request to run")
        self.server.wait_until(lambda: self.server.use()["running"] == 0, "the request to end")

    def test_a_client_that_has_sent_more_is_seen_leaving(self):
        def running(count):
            return lambda: self.server.use()["running"] == count

        ahead = request("POST", COMPLETION, b"x" * 60_000)  # less than a connection reads ahead
        for abrupt in (False, True):
            with self.server.connect() as client:
                client.sendall(request("POST", COMPLETION, {**LONG, "stream": not abrupt}) + ahead)
                self.server.wait_until(running(1), "the request to run")
                if abrupt:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.server.wait_until(running(0), "the request to end")

    def test_a_client_that_sends_far_ahead_is_cut(self):
        with self.server.connect() as client:
            client.sendall(request("POST", COMPLETION, {**LONG, "stream": True}))
            self.server.wait_until(lambda: self.server.use()["running"] == 1, "the request to run")
            with contextlib.suppress(ConnectionError):
                client.sendall(request("POST", COMPLETION, b"x" * 400_000))
            self.server.wait_until(lambda: self.server.use()["running"] == 0, "the client to be cut")
        self.server.wait_until(lambda: any(" 499 " in line for line in self.server.lines), "its line in the log")

    def test_queued_requests_are_cancelled_too(self):
        with contextlib.ExitStack() as stack:
            for _ in range(80):  # more than run at once
                client = stack.enter_context(self.server.connect())
                client.sendall(request("POST", COMPLETION, {**LONG, "max_tokens": 1000}))
            self.server.wait_until(lambda: self.server.use()["waiting"] > 0, "requests to wait")
        self.server.wait_until(lambda: self.server.use()["running"] + self.server.use()["waiting"] == 0, "them to end")


class SlowClients(unittest.TestCase):
    def test_a_client_that_never_reads_is_cut(self):
        server = Server()
        self.addCleanup(stop, server)
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        with client:
            client.sendall(request("POST", COMPLETION, {**LONG, "stream": True, "logprobs": 20}))
            server.wait_until(lambda: server.use()["running"] == 1, "the request to run")
            server.wait_until(lambda: server.use()["running"] == 0, "the client to be cut")
            # What the kernel's buffers hold. With --max-output-bytes (64K) that is less than 256 KiB.
            sent = 0
            with contextlib.suppress(ConnectionResetError):
                while data := client.recv(65536):
                    sent += len(data)
            self.assertLess(sent, 192 << 10)

    def test_a_reader_is_not_cut_for_large_steps(self):
        server = Server("--max-output-bytes", "1K")
        self.addCleanup(stop, server)
        (status, _, body), = server.raw(request("POST", COMPLETION, {
            **LONG, "max_tokens": 12, "n": 24, "logprobs": 20, "stream": True}, [("Connection", "close")]))
        self.assertEqual(status, 200)
        self.assertEqual(events(body)[-1], "[DONE]")

    def test_slow_readers_get_all(self):
        server = Server()
        self.addCleanup(stop, server)
        body = {"prompt": "Hello", "max_tokens": 60, "ignore_eos": True, "stream": True}
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(server.connect()) for _ in range(20)]
            for client in clients:
                client.sendall(request("POST", COMPLETION, body, [("Connection", "close")]))
            for client in clients:
                data = b""
                while part := client.recv(997):
                    data += part
                self.assertTrue(data.endswith(b"0\r\n\r\n"))
                self.assertIn(b"[DONE]", data)

    def test_quiet_streams_get_comments(self):
        server = Server("--ping-s", "0.3", "--max-running", 1)
        self.addCleanup(stop, server)
        with server.connect() as first, server.connect() as second:
            first.sendall(request("POST", COMPLETION, {**LONG, "max_tokens": 500}))
            server.wait_until(lambda: server.use()["running"] == 1, "the first to run")
            second.sendall(request("POST", COMPLETION, {"prompt": "Hi", "max_tokens": 2, "stream": True},
                                   [("Connection", "close")]))
            (status, _, body), = answers(second)
            self.assertEqual(status, 200)
            self.assertIn(b": ping\n\n", body)
            self.assertEqual(events(body)[-1], "[DONE]")


class Crowds(unittest.TestCase):
    def test_bodies_have_a_common_limit(self):
        server = Server("--max-body-bytes", "1M", "--max-held-bytes", "100K")
        self.addCleanup(stop, server)
        body = request("POST", COMPLETION, {"prompt": "word " * 18000, "max_tokens": 1}, [("Connection", "close")])
        with server.connect() as first:
            first.sendall(body[:-10])
            time.sleep(0.5 * SLOW)  # until it is read: of two at once, either may be refused
            status, headers, answer = server.raw(body)[0]
            self.assertEqual((status, json.loads(answer)["error"]["code"]), (503, "server_busy"))
            self.assertIn("retry-after", headers)
            self.assertEqual(server.post(COMPLETION, {"prompt": "a", "max_tokens": 1})[0], 200)
        # Too long for the context, but read.
        server.wait_until(lambda: server.raw(body)[0][0] == 400, "room for it")

    def test_fewer_files_than_connections(self):
        server = Server(files_max=128)
        self.addCleanup(stop, server)
        self.assertTrue(any("fewer than --max-connections" in line for line in server.lines), server.lines)
        with contextlib.ExitStack() as stack:
            for _ in range(60):
                stack.enter_context(server.connect())
            self.assertEqual(server.raw(request("GET", "/health"))[0][0], 503)
        server.wait_until(lambda: server.raw(request("GET", "/health", headers=[("Connection", "close")]))[0][0] == 200,
                          "room")

    def test_connections_are_limited(self):
        server = Server("--max-connections", 8)
        self.addCleanup(stop, server)
        with contextlib.ExitStack() as stack:
            for _ in range(8):
                stack.enter_context(server.connect())
            server.wait_until(lambda: server.raw(request("GET", "/health"))[0][0] == 503, "a refusal")
            status, headers, body = server.raw(request("GET", "/health"))[0]
            self.assertEqual((status, headers["retry-after"]), (503, "2"))
            self.assertEqual(json.loads(body)["error"]["code"], "too_many_connections")
        server.wait_until(lambda: server.raw(request("GET", "/health", headers=[("Connection", "close")]))[0][0] == 200,
                          "room")

    def test_what_is_being_prepared_counts_as_queued(self):
        server = Server("--max-queued-requests", 2, "--max-body-bytes", "4M")
        self.addCleanup(stop, server)
        # Takes long to read, and is too long for the context.
        data = request("POST", COMPLETION, {"prompt": [5] * 1_000_000, "max_tokens": 1}, [("Connection", "close")])
        self.assertEqual(server.raw(data)[0][0], 400)
        got = []
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(server.connect()) for _ in range(12)]
            for client in clients:
                client.sendall(data[:-1])
            time.sleep(0.5 * SLOW)
            for client in clients:
                client.sendall(data[-1:])
            for client in clients:
                (status, headers, body), = answers(client)
                got.append((status, json.loads(body)["error"]["code"]))
                self.assertEqual("retry-after" in headers, status == 503)
        self.assertEqual(set(got), {(400, "context_length_exceeded"), (503, "overloaded")}, got)
        self.assertGreaterEqual(got.count((400, "context_length_exceeded")), 1)
        self.assertEqual(server.post(COMPLETION, {"prompt": "a", "max_tokens": 1})[0], 200)

    def test_the_queue_is_limited(self):
        server = Server("--max-queued-requests", 2, "--max-queued-tokens", 1000, "--max-running", 1)
        self.addCleanup(stop, server)
        status, _, body = server.post(COMPLETION, {"prompt": ["a", "b", "c"], "max_tokens": 1})
        self.assertEqual((status, json.loads(body)["error"]["code"]), (400, "limit_exceeded"))
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                client = stack.enter_context(server.connect())
                client.sendall(request("POST", COMPLETION, LONG))
                time.sleep(0.3 * SLOW)
            status, headers, body = server.post(COMPLETION, {"prompt": "a", "max_tokens": 1})
            self.assertEqual((status, json.loads(body)["error"]["code"]), (503, "overloaded"))
            self.assertIn("retry-after", headers)


class TenantsCase(unittest.TestCase):
    def setUp(self):
        scratch_path = self.enterContext(scratch())
        keys = scratch_path / "keys.json"
        keys.write_text(json.dumps([
            {"key": "alpha-key-1", "tenant": "alpha", "max_requests": 1},
            {"key": "beta-key-1", "tenant": "beta", "max_kv_bytes": 50_000_000, "max_queued_tokens": 500},
            {"key": "admin-key-1", "tenant": "ops", "admin": True}]))
        self.server = Server("--api-keys", keys)
        self.addCleanup(stop, self.server)

    @staticmethod
    def key(name):
        return [("Authorization", f"Bearer {name}-key-1")]

    def test_keys(self):
        for headers, path, status in [
                ([], "/v1/models", 401), (self.key("gamma"), "/v1/models", 401), (self.key("alpha"), "/v1/models", 200),
                ([("Authorization", "alpha-key-1")], "/v1/models", 401), ([], "/health", 200), ([], "/version", 200),
                ([("Authorization", "Bearer " + "x" * 3000)], "/v1/models", 401),
                ([], "/metrics", 401), (self.key("alpha"), "/metrics", 403), (self.key("admin"), "/metrics", 200)]:
            with self.subTest(headers=headers, path=path):
                got, answer_headers, body = self.server.call("GET", path, headers=headers)
                self.assertEqual(got, status)
                if status == 401:
                    self.assertEqual(json.loads(body)["error"]["code"], "invalid_api_key")
                    self.assertEqual(answer_headers["www-authenticate"], "Bearer")

    def test_requests_at_once(self):
        with self.server.connect() as client:
            client.sendall(request("POST", COMPLETION, LONG, self.key("alpha")))
            time.sleep(0.5 * SLOW)
            status, headers, body = self.server.post(COMPLETION, {"prompt": "a"}, self.key("alpha"))
            self.assertEqual((status, json.loads(body)["error"]["code"]), (429, "rate_limit_exceeded"))
            self.assertEqual(headers["retry-after"], "1")
            self.assertEqual(self.server.post(COMPLETION, {"prompt": "a"}, self.key("beta"))[0], 200)

    def test_kv_bytes_and_tokens(self):
        status, _, body = self.server.post(COMPLETION, {"prompt": "a", "max_tokens": 3000}, self.key("beta"))
        self.assertEqual((status, json.loads(body)["error"]["code"]), (400, "limit_exceeded"))
        status, _, body = self.server.post(COMPLETION, {"prompt": [5] * 600, "max_tokens": 1}, self.key("beta"))
        self.assertEqual((status, json.loads(body)["error"]["code"]), (400, "limit_exceeded"))

    def test_nothing_is_shared_between_tenants(self):
        prompt = {"prompt": "one two three four five six seven eight nine ten " * 20, "max_tokens": 2}
        for name, cached in [("alpha", False), ("beta", False), ("alpha", True)]:
            body = json.loads(self.server.post(COMPLETION, prompt, self.key(name))[2])
            self.assertEqual(body["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, cached, name)


class TwoTenants(unittest.TestCase):
    """The same prompts from two tenants: nothing of one shows in what the other gets."""

    WORDS = "one two three four five six seven eight nine ten. " * 30

    def test_bytes_hits_and_tokens(self):
        with scratch() as path:
            (path / "keys.json").write_text(json.dumps(
                [{"key": f"{name}-key-1", "tenant": name, "admin": name == "ops"} for name in ("alpha", "beta", "ops")]))
            server = Server("--api-keys", path / "keys.json", "--deterministic")
            self.addCleanup(stop, server)
            ops = TenantsCase.key("ops")
            prompts = [f"Request {i}. {self.WORDS}" for i in range(3)]

            def ask(name, index):
                body = {"prompt": prompts[index], "max_tokens": 24, "temperature": 0.8, "seed": index, "logprobs": 1}
                return json.loads(server.post(COMPLETION, body, TenantsCase.key(name))[2])

            def told(answer):
                return answer["choices"][0]["text"], answer["choices"][0]["logprobs"]["token_logprobs"]

            def hits():
                return server.metric("vllm:prefix_cache_hits_total", ops)

            alone = [ask("alpha", i) for i in range(3)]
            before = hits()
            first = ask("beta", 0)
            self.assertEqual(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0)
            self.assertEqual(hits(), before)
            self.assertEqual(told(first), told(alone[0]))
            # Beside the other's load, which asks for the same.
            stopping = threading.Event()
            loads = []

            def load():
                while not stopping.is_set():
                    for i in range(3):
                        loads.append(told(ask("beta", i)) == told(alone[i]))

            threads = [threading.Thread(target=load) for _ in range(2)]
            for thread in threads:
                thread.start()
            beside = [ask("alpha", i) for i in range(3)]
            stopping.set()
            for thread in threads:
                thread.join()
            self.assertEqual([told(answer) for answer in beside], [told(answer) for answer in alone])
            self.assertGreater(len(loads), 2)
            self.assertTrue(all(loads))

            def running(names):
                """KV bytes while these tenants run the same prompt."""
                with contextlib.ExitStack() as stack:
                    for name in names:
                        client = stack.enter_context(server.connect())
                        client.sendall(request("POST", COMPLETION, {"prompt": prompts[0], "max_tokens": 2000, "stream": True,
                                                                    "ignore_eos": True}, TenantsCase.key(name)))
                    server.wait_until(lambda: server.metric("vllm:num_requests_running", ops) == len(names), "them to run")
                    used = [line for line in server.metrics(ops).splitlines()
                            if line.startswith("jointkv_kv_bytes{") and 'kind="running"' in line]
                server.wait_until(lambda: server.metric("vllm:num_requests_running", ops) == 0, "them to end")
                return float(used[0].rsplit(" ", 1)[1])

            both, one = running(["alpha", "beta"]), running(["alpha"])
            self.assertGreater(both, 1.8 * one)
            self.assertLess(running(["alpha", "alpha"]), 1.5 * one)


class Ends(unittest.TestCase):
    def test_drain_lets_answers_finish(self):
        server = Server()
        with server.connect() as client, server.connect() as idle:
            client.sendall(request("POST", COMPLETION, {**LONG, "max_tokens": 150, "stream": True}))
            server.wait_until(lambda: server.use()["running"] == 1, "the request to run")
            server.process.send_signal(signal.SIGTERM)
            server.wait_until(lambda: server.call("GET", "/ready")[0] == 503, "the drain")
            status, headers, body = server.post(COMPLETION, {"prompt": "a"})
            self.assertEqual((status, json.loads(body)["error"]["code"]), (503, "draining"))
            self.assertIn("retry-after", headers)
            self.assertEqual(idle.recv(10), b"")
            (status, _, body), = answers(client)
            self.assertEqual(events(body)[-1], "[DONE]")
            self.assertEqual(json.loads(events(body)[-2])["choices"][0]["finish_reason"], "length")
        self.assertEqual(server.exit_code(), 0)

    def test_drain_has_an_end(self):
        server = Server("--drain-timeout-s", "0.5")
        with server.connect() as stream, server.connect() as whole:
            stream.sendall(request("POST", COMPLETION, {**LONG, "stream": True}))
            whole.sendall(request("POST", COMPLETION, LONG))
            server.wait_until(lambda: server.use()["running"] == 2, "the requests to run")
            server.process.send_signal(signal.SIGTERM)
            (status, _, body), = answers(stream)
            self.assertEqual(json.loads(events(body)[-2])["error"]["code"], "draining")
            (status, _, body), = answers(whole)
            self.assertEqual((status, json.loads(body)["error"]["code"]), (503, "draining"))
        self.assertEqual(server.exit_code(), 0)

    def test_a_second_signal_ends_at_once(self):
        server = Server()
        with server.connect() as client:
            client.sendall(request("POST", COMPLETION, {**LONG, "stream": True}))
            server.wait_until(lambda: server.use()["running"] == 1, "the request to run")
            server.process.send_signal(signal.SIGINT)
            server.wait_until(lambda: any("shutting down" in line for line in server.lines), "the drain")
            self.assertEqual(server.stop(signal.SIGINT), 128 + signal.SIGINT)

    def test_it_answers_while_loading(self):
        server = Server(ready=False)
        self.addCleanup(stop, server)
        self.assertEqual(server.call("GET", "/health")[0], 200)
        status, headers, body = server.post(COMPLETION, {"prompt": "a"})
        if not server.ready.is_set():
            self.assertEqual((status, json.loads(body)["error"]["code"]), (503, "loading"))
            self.assertIn("retry-after", headers)
            self.assertEqual(server.call("GET", "/jointkv/status")[0], 503)
        server.wait(server.ready)
        self.assertEqual(server.call("GET", "/ready")[0], 200)

    def test_it_says_why_it_does_not_start(self):
        with scratch() as path, socket.create_server(("127.0.0.1", 0)) as taken:
            (path / "keys.json").write_text("[]")
            (path / "file").write_text("x")
            for arguments, message in [
                    (["--port", taken.getsockname()[1]], "cannot listen on"), (["--host", "no.such.host.invalid"], "cannot listen"),
                    (["--unix-socket", path / "file"], "is no socket"), (["--tls-cert", path / "file"], "belong together"),
                    (["--tls-cert", path / "file", "--tls-key", path / "file"], "--tls-cert"),
                    (["--api-keys", path / "keys.json"], "no key"), (["--api-keys", path / "none"], "cannot be read"),
                    (["--port", "70000"], "--port"), (["--max-body-bytes", "5"], "--max-body-bytes"),
                    (["-m", path / "none.gguf"], "no model file"), (["-m", path / "file"], "file")]:
                with self.subTest(arguments=arguments):
                    port = [] if "--port" in arguments else ["--port", "0"]
                    done = subprocess.run([PROGRAM, "serve", *port, *KV, *map(str, arguments)], capture_output=True,
                                          encoding="utf-8", timeout=60 * SLOW)
                    self.assertIn(done.returncode, (1, 2))
                    self.assertIn(message, done.stderr)


class Sockets(unittest.TestCase):
    def test_unix_socket(self):
        with scratch() as path:
            place = path / "server.sock"
            for _ in range(2):  # what is left behind is replaced
                server = Server(address=("--unix-socket", place))
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(place))
                    client.sendall(request("POST", COMPLETION, {"prompt": "Hello", "max_tokens": 2}, [("Connection", "close")]))
                    (status, _, _), = answers(client)
                    self.assertEqual(status, 200)
                server.process.kill()
                server.stop()
                self.assertTrue(place.exists())
            server = Server(address=("--unix-socket", place))
            done = subprocess.run([PROGRAM, "serve", "--unix-socket", str(place), *KV], capture_output=True, encoding="utf-8",
                                  timeout=60 * SLOW)
            self.assertEqual(done.returncode, 1)
            self.assertIn("another server listens there", done.stderr)
            self.assertTrue(place.exists())
            stop(server)
            self.assertFalse(place.exists())

    def test_no_socket_file_stays_behind(self):
        with scratch() as path:
            place = path / "server.sock"
            (path / "file").write_text("x")
            # The model does not load.
            done = subprocess.run([PROGRAM, "serve", "--unix-socket", str(place), *KV, "-m", str(path / "file")],
                                  capture_output=True, encoding="utf-8", timeout=60 * SLOW)
            self.assertEqual(done.returncode, 1)
            self.assertIn("listening on", done.stderr)
            self.assertFalse(place.exists())
            # A signal while it loads, or shortly after.
            server = Server(address=("--unix-socket", place), ready=False)
            self.assertTrue(place.exists())
            stop(server)
            self.assertFalse(place.exists())
            # A second signal.
            server = Server(address=("--unix-socket", place))
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(place))
                client.sendall(request("POST", COMPLETION, {**LONG, "stream": True}))
                self.assertTrue(client.recv(100))
                server.process.send_signal(signal.SIGTERM)
                server.wait_until(lambda: any("shutting down" in line for line in server.lines), "the drain")
                self.assertEqual(server.stop(signal.SIGTERM), 128 + signal.SIGTERM)
            self.assertFalse(place.exists())

    def test_tls(self):
        with scratch() as path:
            made = subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                                   "-keyout", path / "key.pem", "-out", path / "cert.pem", "-days", "2", "-subj",
                                   "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"], capture_output=True)
            if made.returncode != 0:
                self.skipTest("no openssl program")
            server = Server("--tls-cert", path / "cert.pem", "--tls-key", path / "key.pem", "--max-connections", 8)
            self.addCleanup(stop, server)
            self.assertTrue(server.address.startswith("https://"))
            context = ssl.create_default_context(cafile=str(path / "cert.pem"))

            def get(target):
                with context.wrap_socket(server.connect(), server_hostname="localhost") as client:
                    client.sendall(request("GET", target, headers=[("Connection", "close")]))
                    return next(answers(client))

            for stream in (False, True):
                with context.wrap_socket(server.connect(), server_hostname="localhost") as client:
                    client.sendall(request("POST", COMPLETION, {"prompt": "Hello", "max_tokens": 20, "stream": stream},
                                           [("Connection", "close")]))
                    (status, _, body), = answers(client)
                    self.assertEqual(status, 200)
            with context.wrap_socket(server.connect(), server_hostname="localhost") as client:
                client.sendall(request("POST", COMPLETION, {**LONG, "stream": True}))
                self.assertTrue(client.recv(100))
            server.raw(request("GET", "/health"))  # no TLS: closed
            self.assertEqual(get("/metrics")[0], 200)
            with contextlib.ExitStack() as stack:
                for _ in range(8):
                    stack.enter_context(server.connect())
                server.wait_until(lambda: get("/health")[0] == 503, "a refusal")
                self.assertEqual(json.loads(get("/health")[2])["error"]["code"], "too_many_connections")
            server.wait_until(lambda: get("/health")[0] == 200, "room")

    def test_cors(self):
        server = Server("--cors-origin", "https://a.example", "--cors-origin", "https://b.example")
        self.addCleanup(stop, server)
        for origin, allowed in [("https://a.example", True), ("https://b.example", True), ("https://c.example", False)]:
            for method in ("OPTIONS", "POST"):
                body = {"prompt": "a", "max_tokens": 1, "stream": True} if method == "POST" else None
                _, headers, _ = server.call(method, COMPLETION, body, [("Origin", origin)])
                self.assertEqual(headers.get("access-control-allow-origin"), origin if allowed else None)
                self.assertEqual(headers["vary"], "Origin")
        wanted = "authorization,x-stainless-os"
        _, headers, _ = server.call("OPTIONS", COMPLETION, None, [("Origin", "https://a.example"),
                                                                  ("Access-Control-Request-Method", "POST"),
                                                                  ("Access-Control-Request-Headers", wanted)])
        self.assertEqual(headers["access-control-allow-headers"], wanted)
        server = Server(env={"JOINTKV_SERVE_CORS_ORIGIN": "https://a.example https://b.example"})
        self.addCleanup(stop, server)
        _, headers, _ = server.call("GET", "/health", None, [("Origin", "https://b.example")])
        self.assertEqual(headers["access-control-allow-origin"], "https://b.example")

    def test_options_from_file_and_environment(self):
        with scratch() as path:
            (path / "serve.conf").write_text('served-model-name = "from-file"\nmax-body-bytes = "2K"\nlog-format = "json"\n')
            with open(path / "serve.conf", "a") as conf:
                conf.write('model = "/no/such/file.gguf"\n')
            server = Server("--config", path / "serve.conf", "-m", model_path(), env={"JOINTKV_SERVE_MAX_PROMPTS": "2"})
            self.addCleanup(stop, server)
            model, = json.loads(server.call("GET", "/v1/models")[2])["data"]
            self.assertEqual(model["id"], "from-file")
            self.assertEqual(server.post(COMPLETION, b"x" * 3000)[0], 413)
            self.assertEqual(server.post(COMPLETION, {"prompt": ["a", "b", "c"]})[0], 400)
            status, headers, _ = server.post(COMPLETION, {"prompt": "secret words", "max_tokens": 2}, [("X-Request-Id", "me")])
            self.assertEqual(status, 200)
            server.wait_until(lambda: any('"me"' in line for line in server.lines), "the log")
            row = json.loads(next(line for line in server.lines if '"me"' in line))
            self.assertEqual((row["request_id"], row["status"], row["tenant"], row["output_tokens"]), ("me", 200, "local", 2))
            self.assertFalse(any("secret" in line for line in server.lines))
            self.assertGreater(row["ttft_ms"], 0)
            self.assertEqual(server.post("/v1/embeddings", {"input": "Hello"}, [("X-Request-Id", "vector")])[0], 200)
            server.wait_until(lambda: any('"vector"' in line for line in server.lines), "the log")
            self.assertIsNone(json.loads(next(line for line in server.lines if '"vector"' in line))["ttft_ms"])
