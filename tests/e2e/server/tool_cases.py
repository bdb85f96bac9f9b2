"""Tools end to end: a template that knows them, and a small model that is held to their schemas."""

import json
import pathlib

import openai

from client_case import ClientCase

TEMPLATE = pathlib.Path(__file__).with_name("hermes.jinja")


def tool(name, **properties):
    return {"type": "function", "function": {
        "name": name, "description": f"Tells the {name}.",
        "parameters": {"type": "object", "properties": properties, "required": list(properties),
                       "additionalProperties": False}}}


CITY = {"type": "string", "enum": ["Paris", "Rome", "Bern"]}
TOOLS = [tool("weather", city=CITY, days={"type": "integer", "minimum": 1, "maximum": 9}), tool("time", city=CITY)]
QUESTION = [{"role": "user", "content": "What is the weather in Bern?"}]


class Tools(ClientCase):
    SERVER = ("--chat-template", TEMPLATE)

    def chat(self, **fields):
        return self.client.chat.completions.create(
            **{"model": "", "messages": QUESTION, "max_tokens": 400, "tools": TOOLS, "seed": 1, **fields})

    def complete_calls(self, choice):
        """At least one call. A small model may make call after call until its tokens end, in the midst of the last."""
        calls = choice.message.tool_calls
        if choice.finish_reason == "length":
            calls = calls[:-1]
        else:
            self.assertEqual(choice.finish_reason, "tool_calls")
        self.assertTrue(calls)
        return calls

    def check(self, call, name=None):
        function = call.function
        self.assertIn(function.name, [name] if name else ["weather", "time"])
        arguments = json.loads(function.arguments)
        self.assertIn(arguments["city"], CITY["enum"])
        self.assertEqual(set(arguments), {"city", "days"} if function.name == "weather" else {"city"})
        self.assertIn(arguments.get("days", 1), range(1, 10))

    def test_a_required_call_follows_its_schema(self):
        for seed in range(4):
            with self.subTest(seed=seed):
                parallel = seed % 2 == 0
                choice, = self.chat(tool_choice="required", seed=seed, parallel_tool_calls=parallel).choices
                if not parallel:
                    self.assertEqual(choice.finish_reason, "tool_calls")
                self.assertFalse(choice.message.content)
                for call in self.complete_calls(choice):
                    self.assertTrue(call.id)
                    self.check(call)

    def test_a_named_function(self):
        for name in ("weather", "time"):
            with self.subTest(name=name):
                choice, = self.chat(parallel_tool_calls=False,
                                    tool_choice={"type": "function", "function": {"name": name}}).choices
                self.assertEqual(choice.finish_reason, "tool_calls")
                call, = choice.message.tool_calls
                self.check(call, name)

    def test_one_call_when_not_parallel(self):
        for seed in range(4):
            with self.subTest(seed=seed):
                choice, = self.chat(tool_choice="required", parallel_tool_calls=False, seed=seed).choices
                self.assertEqual(len(choice.message.tool_calls), 1)

    def test_streamed_calls_add_up(self):
        names, arguments, reason = {}, {}, None
        for chunk in self.chat(tool_choice="required", parallel_tool_calls=False, stream=True):
            delta = chunk.choices[0].delta
            reason = chunk.choices[0].finish_reason or reason
            for call in delta.tool_calls or []:
                if call.id:
                    self.assertNotIn(call.index, names)
                    names[call.index] = call.function.name
                arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
        self.assertEqual(reason, "tool_calls")
        self.assertTrue(names)
        for index, name in names.items():
            self.assertIn(name, ["weather", "time"])
            self.assertIn(json.loads(arguments[index])["city"], CITY["enum"])

    def test_auto_and_none(self):
        for choice in ("auto", "none"):
            with self.subTest(choice=choice):
                answer, = self.chat(tool_choice=choice, max_tokens=30).choices
                if choice == "none" or not answer.message.tool_calls:
                    self.assertIsNotNone(answer.message.content)

    def test_results_go_back(self):
        first, = self.chat(tool_choice="required", parallel_tool_calls=False).choices
        call, = first.message.tool_calls
        answer, = self.chat(messages=[*QUESTION, first.message,
                                      {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 20 degrees."}],
                            max_tokens=20, tool_choice="none").choices
        self.assertTrue(answer.message.content)

    def test_a_call_that_was_cut_off_goes_back(self):
        def cut(max_tokens):
            choice, = self.chat(tool_choice="required", parallel_tool_calls=False, max_tokens=max_tokens).choices
            return choice.finish_reason == "length" and choice.message.tool_calls and choice.message

        message = next(filter(None, map(cut, range(8, 60, 4))))
        call, = message.tool_calls
        with self.assertRaises(ValueError):
            json.loads(call.function.arguments)
        for arguments in (call.function.arguments, '{"city": "Be', "nonsense", "{", '{"a": "\\'):
            call.function.arguments = arguments
            with self.subTest(arguments=arguments):
                answer, = self.chat(messages=[*QUESTION, message, {"role": "user", "content": "Go on."}], max_tokens=5,
                                    tool_choice="none").choices
                self.assertIsNotNone(answer.message.content)

    def test_tokenize_counts_what_a_chat_has(self):
        for fields in ({}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "time"}}},
                       {"tools": TOOLS, "messages": [*QUESTION, {"role": "assistant", "tool_calls": [
                           {"id": "a", "type": "function", "function": {"name": "time", "arguments": '{"city": "Bern"}'}}]},
                           {"role": "tool", "tool_call_id": "a", "content": "Noon."}]},
                       {"chat_template_kwargs": {"enable_thinking": False}}):
            with self.subTest(fields=fields):
                body = {"messages": QUESTION, "max_tokens": 1, **fields}
                usage = json.loads(self.server.post("/v1/chat/completions", body)[2])["usage"]
                status, _, tokenized = self.server.post("/tokenize", body)
                self.assertEqual((status, json.loads(tokenized).get("count")), (200, usage["prompt_tokens"]), tokenized)
        status, _, body = self.server.post("/tokenize", {"messages": QUESTION, "tools": [{"type": "function"}]})
        self.assertEqual((status, json.loads(body)["error"]["param"]), (400, "tools[0].function"))

    def test_tools_that_are_shown_are_not_called_ignored(self):
        _, headers, _ = self.server.post("/v1/chat/completions", {"messages": QUESTION, "tools": TOOLS, "max_tokens": 1})
        self.assertNotIn("x-jointkv-ignored", headers)

    def test_a_schema_that_cannot_be_is_refused(self):
        for schema in ({"type": "nonsense"}, {"$ref": "#/nowhere"}):
            bad = {"type": "function", "function": {"name": "bad", "parameters": schema}}
            with self.subTest(schema=schema), self.assertRaises(openai.BadRequestError) as caught:
                self.chat(tools=[bad], tool_choice="required")
            self.assertEqual(caught.exception.param, "tools")


class ToolsUnseen(ClientCase):
    """The model file's own template, which knows no tools."""

    def test_it_is_said(self):
        self.assertTrue(any("shows the model no tools" in line for line in self.server.lines), self.server.lines)
        for choice, stream in [("auto", False), ("auto", True), ("none", False)]:
            body = {"messages": QUESTION, "tools": TOOLS, "tool_choice": choice, "max_tokens": 4, "stream": stream}
            status, headers, _ = self.server.post("/v1/chat/completions", body)
            self.assertEqual((status, headers.get("x-jointkv-ignored")), (200, "tools"))
        status, headers, _ = self.server.post("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 4})
        self.assertEqual((status, headers.get("x-jointkv-ignored")), (200, None))
        status, headers, body = self.server.post("/v1/chat/completions", {
            "messages": QUESTION, "tools": TOOLS, "tool_choice": "required", "max_tokens": 4})
        self.assertEqual((status, json.loads(body)["error"]["param"]), (400, "tool_choice"))
