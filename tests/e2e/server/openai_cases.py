"""The API through the real `openai` client."""

import json

import openai

from client_case import ClientCase
from support import Server

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three colours."}]


class OpenAi(ClientCase):
    SERVER = ("--served-model-name", "test-model", "--deterministic")

    def chat(self, **fields):
        return self.client.chat.completions.create(
            **{"model": "test-model", "messages": MESSAGES, "max_tokens": 8, **fields})

    def complete(self, **fields):
        return self.client.completions.create(
            **{"model": "test-model", "prompt": "The capital of France is", "max_tokens": 8, **fields})

    def test_models(self):
        model, = self.client.models.list().data
        self.assertEqual(model.id, "test-model")
        self.assertEqual(self.client.models.retrieve("test-model").object, "model")
        escaped = json.loads(self.server.call("GET", "/v1/models/test%2dmodel")[2])
        self.assertEqual((escaped["id"], escaped["root"]), ("test-model", "test-model"))
        with self.assertRaises(openai.NotFoundError):
            self.client.models.retrieve("another")

    def test_chat(self):
        answer = self.chat(temperature=0)
        choice, = answer.choices
        self.assertEqual(choice.message.role, "assistant")
        self.assertTrue(choice.message.content)
        self.assertIn(choice.finish_reason, ("stop", "length"))
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)
        self.assertTrue(answer.id.startswith("chatcmpl-"))
        self.assertEqual(answer.object, "chat.completion")

    def test_chat_stream(self):
        whole = self.chat(temperature=0).choices[0].message.content
        stream = list(self.chat(temperature=0, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        self.assertEqual(text, whole)
        self.assertIsNotNone(stream[-1].usage)

    def test_parts_and_roles(self):
        answer = self.chat(messages=[{"role": "developer", "content": "Be brief."},
                                     {"role": "user", "content": [{"type": "text", "text": "Hello"}]}])
        self.assertTrue(answer.usage.prompt_tokens > 3)

    def test_choices(self):
        answer = self.chat(n=3, temperature=1, seed=5)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2])
        again = self.chat(n=3, temperature=1, seed=5)
        self.assertEqual(len(again.choices), 3)

    def test_limits_of_length(self):
        answer = self.chat(max_tokens=openai.NOT_GIVEN, max_completion_tokens=3, extra_body={"ignore_eos": True})
        self.assertEqual(answer.usage.completion_tokens, 3)
        self.assertEqual(answer.choices[0].finish_reason, "length")
        answer = self.complete(max_tokens=openai.NOT_GIVEN, extra_body={"ignore_eos": True})
        self.assertEqual(answer.usage.completion_tokens, 16)
        answer = self.complete(extra_body={"min_tokens": 8})
        self.assertEqual(answer.usage.completion_tokens, 8)

    def test_stops(self):
        whole = self.complete(temperature=0, extra_body={"ignore_eos": True}).choices[0].text
        stop = whole.strip()[2:4]
        answer = self.complete(temperature=0, stop=stop, extra_body={"ignore_eos": True})
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertNotIn(stop, answer.choices[0].text)
        self.assertTrue(whole.startswith(answer.choices[0].text))
        logprobs = self.complete(temperature=0, logprobs=0, max_tokens=1).choices[0].logprobs
        self.assertEqual(len(logprobs.tokens), 1)

    def test_stop_tokens_and_bias(self):
        token = 300
        answer = self.complete(temperature=0, logit_bias={str(token): 100})
        again = self.complete(temperature=0, logit_bias={str(token): 100}, extra_body={"stop_token_ids": [token]})
        self.assertGreaterEqual(answer.usage.completion_tokens, again.usage.completion_tokens)

    def test_chat_logprobs(self):
        content = self.chat(logprobs=True, top_logprobs=3, temperature=0).choices[0].logprobs.content
        self.assertTrue(content)
        for entry in content:
            self.assertEqual(len(entry.top_logprobs), 3)
            self.assertLessEqual(entry.logprob, 0)
            self.assertEqual(entry.top_logprobs[0].token, entry.token)
            self.assertTrue(entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob)
            self.assertEqual(bytes(entry.bytes).decode(errors="replace"), entry.token)

    def test_completion_logprobs(self):
        choice, = self.complete(logprobs=2, temperature=0, extra_body={"ignore_eos": True}).choices
        logprobs = choice.logprobs
        self.assertEqual(len(logprobs.tokens), 8)
        self.assertEqual(len(logprobs.token_logprobs), 8)
        self.assertEqual(logprobs.text_offset[0], 0)
        self.assertTrue(all(len(top) in (2, 3) for top in logprobs.top_logprobs))
        self.assertEqual("".join(logprobs.tokens)[:len(choice.text)], choice.text)

    def test_prompts_of_every_shape(self):
        for prompt, prompts in [("Hi", 1), (["Hi", "Bye"], 2), ([5, 6, 7], 1), ([[5, 6], [7, 8, 9]], 2)]:
            with self.subTest(prompt=prompt):
                answer = self.complete(prompt=prompt, n=2)
                self.assertEqual([choice.index for choice in answer.choices], list(range(2 * prompts)))

    def test_equal_prompts_are_cached(self):
        prompt = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 20
        self.complete(prompt=prompt)
        self.assertGreater(self.complete(prompt=prompt).usage.prompt_tokens_details.cached_tokens, 100)

    def test_greedy_is_greedy(self):
        texts = {self.complete(temperature=0, seed=seed).choices[0].text for seed in (1, 2, 3)}
        self.assertEqual(len(texts), 1)

    def test_fusion_per_request(self):
        for fusion in ("on", "off"):
            answer = self.complete(extra_body={"kv_fusion": fusion, "kv": True})
            self.assertIn("compression", answer.kv)

    def test_output_is_json(self):
        answer = self.chat(temperature=0, max_tokens=100, response_format={"type": "json_object"})
        if answer.choices[0].finish_reason == "stop":
            self.assertIsInstance(json.loads(answer.choices[0].message.content), dict)
        self.assertTrue(answer.choices[0].message.content.startswith("{"))

    def test_output_is_of_a_schema(self):
        schema = {"type": "object", "properties": {"z": {"enum": ["red", "blue"]}, "a": {"type": "boolean"}},
                  "required": ["z", "a"], "additionalProperties": False}
        for fields in ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}},
                       {"extra_body": {"guided_json": schema}}):
            with self.subTest(fields=fields):
                # Blanks are allowed anywhere; a small model may not stop writing them.
                answer = self.chat(temperature=0, max_tokens=200, **fields)
                self.assertEqual(answer.choices[0].finish_reason, "stop")
                value = json.loads(answer.choices[0].message.content)
                self.assertEqual(list(value), ["z", "a"])
                self.assertIn(value["z"], ("red", "blue"))
                chunks = self.chat(temperature=0, max_tokens=200, stream=True, **fields)
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
                self.assertEqual(json.loads(text), value)

    def test_bad_schemas(self):
        for schema in ({"type": "nonsense"}, {"$ref": "#/nowhere"}):
            with self.assertRaises(openai.BadRequestError) as caught:
                self.chat(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})
            self.assertTrue(caught.exception.param.startswith("response_format"))

    TOOLS = [{"type": "function", "function": {
        "name": "weather", "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
                       "additionalProperties": False}}}]

    def test_tools_need_a_template_that_knows_them(self):
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            with self.subTest(choice=choice), self.assertRaises(openai.BadRequestError) as caught:
                self.chat(tools=self.TOOLS, tool_choice=choice)
            self.assertEqual(caught.exception.param, "tool_choice")

    def test_tools_that_are_not_called(self):
        answer, = self.chat(tools=self.TOOLS, tool_choice="none").choices
        self.assertIsNone(answer.message.tool_calls)

    def test_prompt_logprobs(self):
        prompt = [5, 6, 7, 300, 301]
        only, = self.complete(prompt=prompt, echo=True, logprobs=2, max_tokens=0).choices
        self.assertEqual(len(only.logprobs.tokens), 5)
        self.assertIsNone(only.logprobs.token_logprobs[0])
        self.assertIsNone(only.logprobs.top_logprobs[0])
        self.assertEqual(only.logprobs.text_offset[0], 0)
        self.assertTrue(all(logprob <= 0 for logprob in only.logprobs.token_logprobs[1:]))
        self.assertEqual(only.finish_reason, "length")
        more, = self.complete(prompt=prompt, echo=True, logprobs=2, max_tokens=1, temperature=0).choices
        self.assertEqual(len(more.logprobs.tokens), 6)
        self.assertEqual(more.logprobs.tokens[:5], only.logprobs.tokens)
        for a, b in zip(more.logprobs.token_logprobs[1:5], only.logprobs.token_logprobs[1:]):
            self.assertAlmostEqual(a, b, delta=0.1)
        several = self.complete(prompt=[prompt, prompt[:3]], echo=True, logprobs=0, max_tokens=0)
        self.assertEqual([len(choice.logprobs.tokens) for choice in several.choices], [5, 3])
        chunks = list(self.complete(prompt=prompt, echo=True, logprobs=1, max_tokens=2, stream=True,
                                    extra_body={"ignore_eos": True}))
        self.assertEqual(sum(len(chunk.choices[0].logprobs.tokens) for chunk in chunks
                             if chunk.choices and chunk.choices[0].logprobs), 7)

    def test_text_offsets(self):
        for prompt in ("Grüße aus Zürich, 日本!", [5, 6, 7, 300]):
            only, = self.complete(prompt=prompt, echo=True, logprobs=0, max_tokens=4, temperature=0).choices
            offsets, tokens = only.logprobs.text_offset, only.logprobs.tokens
            self.assertEqual(offsets, sorted(offsets))
            for offset, token in zip(offsets, tokens):
                if "\ufffd" not in token:
                    self.assertEqual(only.text[offset:offset + len(token)], token, (offsets, tokens, only.text))

    def test_usage_in_every_chunk(self):
        chunks = list(self.chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}))
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        self.assertEqual(counts, sorted(counts))
        self.assertEqual(counts[-1], counts[-2])

    def test_tokenizer_info(self):
        told = json.loads(self.server.call("GET", "/tokenizer_info")[2])
        self.assertIn("<|im_start|>", told["chat_template"])
        self.assertEqual(told["eos_token"], "<|im_end|>")
        self.assertGreater(told["vocab_size"], 1000)

    def test_long_texts_are_tokenised(self):
        text = "The harbour lies still. " * 2000  # more than is read on the I/O thread
        status, _, body = self.server.post("/tokenize", {"prompt": text, "add_special_tokens": False})
        tokens = json.loads(body)["tokens"]
        self.assertEqual((status, json.loads(body)["count"]), (200, len(tokens)))
        self.assertEqual(json.loads(self.server.post("/detokenize", {"tokens": tokens})[2])["prompt"], text)
        status, _, body = self.server.post("/tokenize", {"prompt": 5, "padding": text})
        self.assertEqual((status, json.loads(body)["error"]["param"]), (400, "prompt"))

    def test_embeddings(self):
        texts = ["A cat sat on the mat.", "A cat sat on a mat.", "Interest rates rose again."]
        answer = self.client.embeddings.create(model="test-model", input=texts)  # asks for base64
        a, b, c = (row.embedding for row in answer.data)
        plain = self.client.embeddings.create(model="test-model", input=texts[0], encoding_format="float")
        self.assertEqual(len(plain.data[0].embedding), len(a))
        for x, y in zip(plain.data[0].embedding, a):
            self.assertAlmostEqual(x, y, delta=0.05 * max(1, abs(y)))
        def cosine(x, y):
            dot = sum(p * q for p, q in zip(x, y))
            return dot / (sum(p * p for p in x) * sum(q * q for q in y)) ** 0.5
        self.assertGreater(cosine(a, b), cosine(a, c))
        self.assertGreater(answer.usage.prompt_tokens, 15)
        def lines():
            return [line for line in self.server.lines if "POST /v1/embeddings 200" in line]
        self.server.wait_until(lines, "their lines in the log")
        self.assertFalse([line for line in lines() if "ttft" in line])
        for fields, param in (({"input": []}, "input"), ({"input": "a", "dimensions": 5}, "dimensions"),
                              ({"input": "a", "extra_body": {"kv_fusion": 5}}, "kv_fusion")):
            with self.assertRaises(openai.BadRequestError) as caught:
                self.client.embeddings.create(model="test-model", **fields)
            self.assertEqual(caught.exception.param, param)

    def test_shadow_check(self):
        with_shadow = Server("--shadow-rate", "1")
        try:
            with_shadow.post("/v1/completions", {"prompt": "Hello", "max_tokens": 4, "ignore_eos": True})
            with_shadow.wait_until(lambda: with_shadow.metric("jointkv_shadow_kl_nats_count") >= 1, "a shadow run")
            # Nothing else counts it.
            for name, value in [("jointkv_shadow_runs_total", 1), ("jointkv_shadow_tokens_total", 4),
                                ("jointkv_shadow_dropped_total", 0), ("vllm:generation_tokens_total", 4),
                                ("vllm:request_prompt_tokens_count", 1), ("vllm:e2e_request_latency_seconds_count", 1)]:
                self.assertEqual(with_shadow.metric(name), value, name)
            prompt_tokens = with_shadow.metric("vllm:request_prompt_tokens_sum")
            for name in ("vllm:prompt_tokens_total", "vllm:prefix_cache_queries_total", "jointkv_prefill_tokens_total"):
                self.assertEqual(with_shadow.metric(name), prompt_tokens, name)
        finally:
            self.assertEqual(with_shadow.stop(), 0)

    def test_errors_are_the_clients_own(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            self.chat(temperature=-1)
        self.assertEqual(caught.exception.param, "temperature")
        with self.assertRaises(openai.NotFoundError) as caught:
            self.chat(model="gpt-9")
        self.assertEqual(caught.exception.code, "model_not_found")
        with self.assertRaises(openai.BadRequestError) as caught:
            self.complete(prompt=[5] * 20000)
        self.assertEqual(caught.exception.code, "context_length_exceeded")

    def test_leaving_a_stream_early(self):
        stream = self.complete(stream=True, max_tokens=2000, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
        self.server.wait_until(lambda: self.server.use()["running"] == 0, "the stream's request to end")
