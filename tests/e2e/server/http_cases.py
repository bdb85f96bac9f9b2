"""The API on bare sockets: each field wrong in each way, and clients that are hostile or clumsy."""

import datetime
import email.utils
import json
import unittest

from support import Server, answers, events, request

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ORIGIN = "https://a.example"
BASE = {CHAT: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
        COMPLETION: {"prompt": "Hello", "max_tokens": 2}}

# (field, value): each must give a 400 that names the field.
BAD_BOTH = [
    *[("temperature", v) for v in (-0.1, 101, "1", True, [], {}, 1e39)],
    *[("top_p", v) for v in (0, -1, 1.01, "x", False, [0.5])],
    *[("top_k", v) for v in (-2, 1.5, "5", True, 2**40, {})],
    *[("min_p", v) for v in (-0.1, 1.1, "0", [])],
    *[("repetition_penalty", v) for v in (0, -1, 11, "1", [])],
    *[("presence_penalty", v) for v in (-2.1, 2.1, "0", [])],
    *[("frequency_penalty", v) for v in (-2.1, 2.1, "0", {})],
    *[("n", v) for v in (0, -1, 1.5, "2", 1000, 2**40)],
    *[("max_tokens", v) for v in (0, -1, 1.5, "5", True, 2**40, 2**64, [], {})],
    *[("max_completion_tokens", v) for v in (0, -1, 2.5, "5")],
    *[("min_tokens", v) for v in (-1, 3, 0.5, "1")],
    *[("seed", v) for v in (1.5, "7", True, [], 2**64, -2**63 - 1)],
    *[("stop", v) for v in (5, "", [""], ["a", 5], ["x"] * 17, "y" * 257, {})],
    *[("stop_token_ids", v) for v in (5, "5", [1.5], ["5"], [-1], [10**7], [1] * 200)],
    *[("logit_bias", v) for v in ([], 5, {"x": 1}, {"5": "a"}, {"5": 101}, {"5": -101}, {"-1": 1}, {"10000000": 1})],
    *[("ignore_eos", v) for v in (1, "true", [])],
    *[("stream", v) for v in (1, "true", {})],
    *[("stream_options", v) for v in (5, [], {"include_usage": True})],
    *[("kv_fusion", v) for v in ("maybe", 1, {})],
    *[("kv", v) for v in ("yes", 1)],
    *[("model", v) for v in (5, [], {})],
    *[(field, "x") for field in ("guided_regex", "guided_choice", "guided_grammar", "prompt_logprobs")],
    ("use_beam_search", True),
]
BAD_CHAT = [
    *[("messages", v) for v in (None, [], "Hello", {}, 5, [5], [{}], [{"role": "user"}], [{"content": "x"}],
                                [{"role": 5, "content": "x"}], [{"role": "user", "content": 5}],
                                [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}],
                                [{"role": "user", "content": [{"type": "text", "text": 5}]}],
                                [{"role": "user", "content": [{"type": "text"}]}], [{"role": "robot", "content": "x"}],
                                [{"role": "tool", "content": "x"}],
                                [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"arguments": "{}"}}]}])],
    *[("logprobs", v) for v in (1, "true", [])],
    *[("top_logprobs", v) for v in (1, -1, 21, "1", 1.5)],
]
BAD_COMPLETION = [
    *[("prompt", v) for v in (None, [], 5, {}, [5.5], [True], [[]], ["a", 5], [[1], "a", {}], [-1], [10**7], [[10**7]],
                              "", ["x"] * 1000)],
    *[("logprobs", v) for v in (True, -1, 21, "1", 1.5)],
    *[("echo", v) for v in (1, "yes")],
    *[("suffix", v) for v in ("end", 5)],
    *[("best_of", v) for v in (2, "1")],
]


class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server("--max-body-bytes", "64K", "--max-header-bytes", "4K", "--header-timeout-s", 2,
                            "--body-timeout-s", 2, "--idle-timeout-s", 2, "--deterministic", "--cors-origin", ORIGIN)

    @classmethod
    def tearDownClass(cls):
        assert cls.server.process.poll() is None, "\n".join(cls.server.lines[-20:])
        assert cls.server.stop() == 0, "\n".join(cls.server.lines[-20:])

    def assert_error(self, answer, status, param=..., code=...):
        got, headers, body = answer
        self.assertEqual(got, status, body)
        self.assertEqual(headers["content-type"], "application/json")
        error = json.loads(body)["error"]
        self.assertEqual(set(error), {"message", "type", "param", "code"})
        self.assertTrue(error["message"])
        if param is not ...:
            self.assertTrue(error["param"] is not None and error["param"].split("[")[0].split(".")[0] == param, error)
            self.assertIn(param, error["message"])
        if code is not ...:
            self.assertEqual(error["code"], code)
        return headers


class Fields(Case):
    def check(self, path, cases):
        for field, value in cases:
            with self.subTest(path=path, field=field, value=repr(value)[:60]):
                body = {**BASE[path], field: value}
                answer = self.server.post(path, body)
                self.assert_error(answer, 400, field)

    def test_chat(self):
        self.check(CHAT, BAD_BOTH + BAD_CHAT)

    def test_completion(self):
        self.check(COMPLETION, BAD_BOTH + BAD_COMPLETION)

    def test_over_long_contexts(self):
        for path, body in [(COMPLETION, {"prompt": [5] * 9000}), (COMPLETION, {"prompt": "Hi", "max_tokens": 9000}),
                           (CHAT, {**BASE[CHAT], "max_tokens": 9000}), (COMPLETION, {"prompt": "word " * 9500})]:
            with self.subTest(body=str(body)[:40]):
                self.assert_error(self.server.post(path, body), 400, code="context_length_exceeded")
        body = {"messages": BASE[CHAT]["messages"], "max_completion_tokens": 9000}
        self.assert_error(self.server.post(CHAT, body), 400, "max_completion_tokens", "context_length_exceeded")

    def test_unknown_models(self):
        for path in BASE:
            self.assert_error(self.server.post(path, {**BASE[path], "model": "gpt-9"}), 404, "model", "model_not_found")
        self.assert_error(self.server.call("GET", "/v1/models/gpt-9"), 404, "model", "model_not_found")

    def test_unknown_and_null_fields_are_ignored(self):
        for path in BASE:
            body = {**BASE[path], "frobnicate": {"a": [1]}, "user": "u", "metadata": {"k": "v"}, "temperature": None,
                    "stop": None, "n": None, "logprobs": None, "store": False}
            status, _, body = self.server.post(path, body)
            self.assertEqual(status, 200, body)

    def test_large_answers_must_be_streamed(self):
        body = {"prompt": "Hi", "max_tokens": 2000, "n": 32, "logprobs": 20}
        self.assert_error(self.server.post(COMPLETION, body), 400, "max_tokens")

    def test_bodies_that_are_no_json(self):
        for body in (b"", b"{", b"nonsense", b"[1]", b'"x"', b"null", b"5", b"\xff\xfe", b'{"a": NaN}', b"{'a': 1}",
                     b'{"messages": [}', b"[" * 60000, b'{"a":' * 9000, b'{"prompt": "\xff"}', b"\x00" * 100):
            with self.subTest(body=body[:20]):
                self.assert_error(self.server.post(CHAT, body), 400, code="invalid_json")

    def test_tokenize_and_detokenize(self):
        tokenized = json.loads(self.server.post("/tokenize", {"prompt": "Hello world", "return_token_strs": True})[2])
        self.assertEqual(tokenized["count"], len(tokenized["tokens"]))
        self.assertEqual(len(tokenized["token_strs"]), tokenized["count"])
        back = json.loads(self.server.post("/detokenize", {"tokens": tokenized["tokens"]})[2])
        self.assertIn("Hello world", back["prompt"])
        chat = json.loads(self.server.post("/tokenize", BASE[CHAT])[2])
        self.assertGreater(chat["count"], 3)
        for path, body, field in [("/tokenize", {}, "messages"), ("/tokenize", {"prompt": 5}, "prompt"),
                                  ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
                                  ("/detokenize", {}, "tokens"), ("/detokenize", {"tokens": "a"}, "tokens"),
                                  ("/detokenize", {"tokens": [10**7]}, "tokens"),
                                  ("/detokenize", {"tokens": [-1]}, "tokens")]:
            with self.subTest(path=path, body=body):
                self.assert_error(self.server.post(path, body), 400, field)


class Protocol(Case):
    def test_paths_and_methods(self):
        for method, path, status in [
                ("GET", "/nowhere", 404), ("POST", "/", 405), ("GET", CHAT, 405), ("PUT", CHAT, 405),
                ("DELETE", "/v1/models", 405), ("POST", "/health", 405), ("GET", "/v1/models/", 404),
                ("GET", "/v1", 404), ("GET", "/../etc/passwd", 404), ("GET", "/%2e%2e/x", 404), ("BREW", "/health", 405),
                ("GET", "/health?x=1", 200), ("GET", "/ready", 200), ("GET", "/version", 200), ("GET", "/v1/models", 200),
                ("GET", "http://localhost/health", 200), ("GET", "HTTP://elsewhere:99/v1/models?x=/y", 200),
                ("GET", "http://localhost", 200), ("GET", "https://localhost/nowhere", 404), ("GET", "ftp://a/health", 404),
                ("GET", "/metrics", 200), ("HEAD", "/health", 200), ("OPTIONS", CHAT, 204), ("OPTIONS", "/nowhere", 404)]:
            with self.subTest(method=method, path=path):
                with self.server.connect() as client:
                    client.sendall(request(method, path, headers=[("Connection", "close")]))
                    if method == "HEAD":
                        head = b""
                        while data := client.recv(4096):
                            head += data
                        self.assertTrue(head.startswith(b"HTTP/1.1 200") and head.endswith(b"\r\n\r\n"))
                        continue
                    (got, headers, _), = answers(client)
                    self.assertEqual(got, status)
                    if status in (204, 405):
                        self.assertIn("OPTIONS", headers["allow"])

    def test_content_types(self):
        for kind, status in [("application/json", 200), ("application/json; charset=utf-8", 200),
                             ("Application/JSON", 200), ("text/plain", 415), ("application/x-www-form-urlencoded", 415),
                             ("multipart/form-data", 415), ("", 415), (None, 415)]:
            with self.subTest(kind=kind):
                answer = self.server.post(COMPLETION, BASE[COMPLETION], [("Content-Type", kind)])
                self.assertEqual(answer[0], status, answer)

    def test_request_ids(self):
        for sent, kept in [("abc-1.2:3_X", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("<x>", False)]:
            _, headers, _ = self.server.call("GET", "/health", headers=[("X-Request-Id", sent)])
            self.assertEqual(headers["x-request-id"] == sent, kept)

    def test_malformed_requests(self):
        for data, status in [
                (b"nonsense\r\n\r\n", 400), (b"GET\r\n\r\n", 400), (b"GET / HTTP/9.9\r\n\r\n", 400),
                (b"\x16\x03\x01\x02\x00\x01\x00", 400), (b"GET /health HTTP/1.1\r\n\r\n", 400),
                (b"GET /health HTTP/1.1\r\nHost: a\r\nbad header\r\n\r\n", 400),
                (b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 5000 + b"\r\n\r\n", 431),
                (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
                (b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 2000 + b"\r\n", 431),
                (request("POST", CHAT, b"{}", [("Content-Length", "-1")]), 400),
                (request("POST", CHAT, b"{}", [("Content-Length", "2x")]), 400),
                (request("POST", CHAT, b"{}", [("Content-Length", str(2**70))]), 400),
                (request("POST", CHAT, b"{}", [("Content-Length", "100000")]), 413),
                (request("POST", CHAT, b"{}", [("Content-Length", str(2**40))]), 413),
                (request("POST", CHAT, b"x" * 70000), 413),
                (request("POST", CHAT, b"zz\r\n", [("Transfer-Encoding", "chunked")]), 400),
                (request("POST", CHAT, b"11170\r\n" + b"x" * 70000 + b"\r\n0\r\n\r\n",
                         [("Transfer-Encoding", "chunked")]), 413)]:
            with self.subTest(data=data[:60]):
                got = self.server.raw(data)
                self.assertEqual([answer[0] for answer in got], [status])
                self.assert_error(got[0], status)
                self.assertEqual(got[0][1]["connection"], "close")

    def test_refusals_are_answers_like_others(self):
        def sent(name, *headers, body=b"{}"):
            return request("POST", CHAT, body, [("X-Request-Id", name), ("Origin", ORIGIN), *headers])

        for name, data, status in [
                ("no-host", b"POST /v1/chat/completions HTTP/1.1\r\nX-Request-Id: no-host\r\nOrigin: %b\r\n\r\n" %
                 ORIGIN.encode(), 400),
                ("long", sent("long", ("Content-Length", "100000")), 413),
                ("chunks", sent("chunks", ("Transfer-Encoding", "chunked"), body=b"zz\r\n"), 400),
                ("slow", sent("slow", ("Content-Length", "100")), 408)]:
            with self.subTest(name=name):
                (got, headers, _), = self.server.raw(data)
                self.assertEqual(got, status)
                self.assertEqual(headers["x-request-id"], name)
                self.assertEqual(headers["access-control-allow-origin"], ORIGIN)
                self.server.wait_until(lambda: any(f" {name} - POST {CHAT} {status} " in line for line in self.server.lines),
                                       "its line in the log")
        # Of which nothing is known.
        (status, headers, _), = self.server.raw(b"nonsense\r\n\r\n")
        self.assertTrue(headers["x-request-id"].startswith("req-"))
        self.server.wait_until(lambda: any(f" {headers['x-request-id']} - - - 400 " in line for line in self.server.lines),
                               "its line in the log")

    def test_dates(self):
        for data in (request("GET", "/health", headers=[("Connection", "close")]), b"nonsense\r\n\r\n",
                     request("POST", CHAT, {**BASE[CHAT], "stream": True}, [("Connection", "close")])):
            (_, headers, _), = self.server.raw(data)
            date = email.utils.parsedate_to_datetime(headers["date"])
            now = datetime.datetime.now(datetime.timezone.utc)
            self.assertLess(abs((now - date).total_seconds()), 60)

    def test_empty_lines_before_a_request(self):
        data = b"\r\n" + request("GET", "/health") + b"\r\n\r\n" + request("GET", "/version") + b"\n" + \
            request("GET", "/health", headers=[("Connection", "close")])
        self.assertEqual([answer[0] for answer in self.server.raw(data)], [200, 200, 200])
        with self.server.connect() as client:
            for byte in b"\r\n\r\n" + request("GET", "/health", headers=[("Connection", "close")]):
                client.sendall(bytes([byte]))
            self.assertEqual(next(answers(client))[0], 200)
        self.assertEqual(self.server.raw(b"\r\n"), [])  # idle: closed without a word

    def test_smuggling_is_refused(self):
        both = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        twice = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345"
        for data in (both, twice):
            self.assertEqual([answer[0] for answer in self.server.raw(data)], [400])

    def test_chunked_bodies_and_100_continue(self):
        body = json.dumps(BASE[COMPLETION]).encode()
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(body[i:i + 7]), body[i:i + 7]) for i in range(0, len(body), 7))
        data = request("POST", COMPLETION, chunks + b"0\r\n\r\n",
                       [("Transfer-Encoding", "chunked"), ("Connection", "close")])
        self.assertEqual(self.server.raw(data)[0][0], 200)
        with self.server.connect() as client:
            client.sendall(request("POST", COMPLETION, b"", [("Expect", "100-continue"), ("Connection", "close"),
                                                              ("Content-Length", str(len(body)))]))
            self.assertTrue(client.recv(100).startswith(b"HTTP/1.1 100 "))
            client.sendall(body)
            self.assertEqual(next(answers(client))[0], 200)

    def test_one_byte_at_a_time(self):
        with self.server.connect() as client:
            for byte in request("GET", "/health", headers=[("Connection", "close")]):
                client.sendall(bytes([byte]))
            self.assertEqual(next(answers(client))[0], 200)

    def test_keep_alive_and_pipelining(self):
        data = request("GET", "/health") + request("POST", COMPLETION, BASE[COMPLETION]) + \
            request("POST", CHAT, {**BASE[CHAT], "stream": True}) + request("GET", "/version", headers=[("Connection", "close")])
        self.assertEqual([answer[0] for answer in self.server.raw(data)], [200, 200, 200, 200])

    def test_half_close(self):
        got = self.server.raw(request("GET", "/health"), half_close=True)
        self.assertEqual([answer[0] for answer in got], [200])

    def test_http_1_0(self):
        got = self.server.raw(b"GET /health HTTP/1.0\r\n\r\n")
        self.assertEqual([answer[0] for answer in got], [200])
        body = json.dumps({**BASE[COMPLETION], "stream": True}).encode()
        data = b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        (status, headers, body), = self.server.raw(data + body)
        self.assertEqual(status, 200)
        self.assertNotIn("transfer-encoding", headers)
        self.assertEqual(events(body)[-1], "[DONE]")

    def test_slow_requests_are_cut(self):
        for data in (b"GET /health HT", request("POST", CHAT, b"{", [("Content-Length", "100")])):
            got = self.server.raw(data)
            self.assertEqual([answer[0] for answer in got], [408])
        self.assertEqual(self.server.raw(b""), [])  # idle: closed without a word
        self.assertEqual([answer[0] for answer in self.server.raw(request("GET", "/health"))], [200])


class Streams(Case):
    def stream(self, path, body):
        status, headers, data = self.server.post(path, {**BASE[path], **body, "stream": True})
        self.assertEqual(status, 200, data)
        self.assertTrue(headers["content-type"].startswith("text/event-stream"))
        data = events(data)
        self.assertEqual(data[-1], "[DONE]")
        return [json.loads(event) for event in data[:-1]]

    def test_a_stream_says_what_the_whole_answer_says(self):
        for path in BASE:
            for extra in ({}, {"n": 2}, {"stop": "e"}, {"logprobs": True if path == CHAT else 2}):
                with self.subTest(path=path, extra=extra):
                    body = {"temperature": 0, "max_tokens": 12, **extra}
                    whole = json.loads(self.server.post(path, {**BASE[path], **body})[2])
                    chunks = self.stream(path, body)
                    self.assertEqual(len({chunk["id"] for chunk in chunks}), 1)
                    for choice in whole["choices"]:
                        mine = [chunk["choices"][0] for chunk in chunks
                                if chunk["choices"][0]["index"] == choice["index"]]
                        self.assertEqual([part["finish_reason"] for part in mine][-1], choice["finish_reason"])
                        self.assertTrue(all(part["finish_reason"] is None for part in mine[:-1]))
                        if path == CHAT:
                            self.assertEqual(mine[0]["delta"], {"role": "assistant", "content": ""})
                            text = "".join(part["delta"].get("content", "") for part in mine)
                            self.assertEqual(text, choice["message"]["content"])
                            if "logprobs" in extra:
                                entries = [entry for part in mine[1:] for entry in part["logprobs"]["content"]]
                                self.assertEqual([entry["token"] for entry in entries],
                                                 [entry["token"] for entry in choice["logprobs"]["content"]])
                        else:
                            self.assertEqual("".join(part["text"] for part in mine), choice["text"])

    def test_usage(self):
        chunks = self.stream(CHAT, {"stream_options": {"include_usage": True}, "kv": True})
        self.assertTrue(all(chunk["usage"] is None for chunk in chunks[:-1]))
        self.assertEqual(chunks[-1]["choices"], [])
        usage = chunks[-1]["usage"]
        self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"])
        self.assertIn("cached_tokens", usage["prompt_tokens_details"])
        self.assertIn("kv", chunks[-1])
        self.assertTrue(all("usage" not in chunk for chunk in self.stream(CHAT, {})))

    def test_characters_are_never_split(self):
        for seed in range(6):
            body = {"prompt": "emoji: \U0001f600 \u4f60\u597d \u00fc", "seed": seed, "temperature": 1.5, "max_tokens": 40,
                    "ignore_eos": True}
            text = "".join(chunk["choices"][0]["text"] for chunk in self.stream(COMPLETION, body))
            whole = json.loads(self.server.post(COMPLETION, body)[2])["choices"][0]["text"]
            self.assertEqual(text, whole)

    def test_echo(self):
        for prompt in ("Hello", ["Hello", "Bye"]):
            whole = json.loads(self.server.post(COMPLETION, {"prompt": prompt, "max_tokens": 2, "echo": True})[2])
            texts = [choice["text"] for choice in whole["choices"]]
            for text, begin in zip(texts, [prompt] if isinstance(prompt, str) else prompt, strict=True):
                self.assertTrue(text.startswith(begin))
        chunks = self.stream(COMPLETION, {"prompt": "Hello", "echo": True})
        self.assertEqual(chunks[0]["choices"][0]["text"], "Hello")

    def test_kv_report(self):
        body = json.loads(self.server.post(COMPLETION, {"prompt": "Hello", "max_tokens": 4, "ignore_eos": True, "kv": True})[2])
        self.assertEqual(set(body["kv"]), {"compression", "logical_bytes", "physical_bytes", "fused_share"})
        self.assertGreater(body["kv"]["physical_bytes"], 0)
