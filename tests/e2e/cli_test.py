#!/usr/bin/env python3
"""The program from outside, on the real default model: python3 tests/e2e/cli_test.py build/jointkv VERSION

Exits with 77 when there is no model file (JOINTKV_MODEL, or the one that `make setup` fetches).
"""

import json
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import xml.etree.ElementTree

from fake_openai import FakeServer

TIMEOUT_S = 300
SKIPPED = 77
KV = ["--kv-bytes", "256M"]

PROMPTS = [
    {"prompt": "The capital of France is"},
    {"prompt": "Water boils at a temperature of", "kv_fusion": "off"},
    {"prompt": "def fibonacci(n):\n", "stop": ["\n\n"]},
    {"prompt": "Once upon a time, in a village by the sea,", "temperature": 0.8, "seed": 1},
    {"messages": [{"role": "user", "content": "Name three colours."}]},
    {"messages": [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Is ice cold?"}],
     "id": "ice", "logprobs": True, "top_logprobs": 2},
    {"messages": [{"role": "user", "content": "Write a line about rain."}], "n": 2, "seed": 7},
    {"tokens": [504, 3575, 282, 4649, 314]},
]


def model_path():
    cache = os.environ.get("JOINTKV_CACHE") or pathlib.Path.home() / ".cache" / "jointkv"
    return pathlib.Path(os.environ.get("JOINTKV_MODEL") or
                        pathlib.Path(cache) / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")


def run(*arguments, text=None, env=None):
    return subprocess.run([PROGRAM, *map(str, arguments)], input=text, capture_output=True, encoding="utf-8",
                          timeout=TIMEOUT_S, env=None if env is None else {**os.environ, **env})


class Case(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.scratch = pathlib.Path(scratch.name)

    def write_rows(self, rows):
        path = self.scratch / "prompts.jsonl"
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return path

    def read_rows(self, path):
        return [json.loads(line) for line in path.read_text().splitlines()]

    def assert_usage(self, message, *arguments, env=None):
        done = run(*arguments, env=env)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertTrue(done.stderr.startswith("jointkv: "), done.stderr)
        self.assertIn(message, done.stderr)
        self.assertEqual(done.stdout, "")

    def wait_for(self, terminal, text, more=0):
        seen, deadline = "", time.monotonic() + 180
        while text not in seen or len(seen) - seen.index(text) - len(text) < more:
            self.assertLess(time.monotonic(), deadline, f"no {text!r} in {seen!r}")
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096).decode("utf-8", "replace")


class Generate(Case):
    def test_many_prompts(self):
        output, summary = self.scratch / "out.jsonl", self.scratch / "summary.json"
        done = run("generate", "--prompts", self.write_rows(PROMPTS), "--max-tokens", 16, "--temperature", 0,
                   "--json", output, "--summary", summary, *KV)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("time to first token", done.stderr)

        rows = {(row["index"], row["choice"]): row for row in self.read_rows(output)}
        self.assertEqual(len(rows), 9)
        self.assertIn("Paris", rows[0, 0]["text"])
        for row in rows.values():
            self.assertIn(row["finish_reason"], ("stop", "length"))
            usage = row["usage"]
            self.assertEqual(usage["output_tokens"], len(row["tokens"]))
            self.assertTrue(1 <= usage["output_tokens"] <= 16)
            self.assertGreater(row["timings"]["ttft_ms"], 0)
            self.assertEqual(set(row["timings"]), {"queue_ms", "ttft_ms", "tpot_ms"})
        self.assertNotIn("\n\n", rows[2, 0]["text"])
        self.assertEqual(rows[5, 0]["id"], "ice")
        self.assertEqual(len(rows[5, 0]["logprobs"]), len(rows[5, 0]["tokens"]))
        for entry in rows[5, 0]["logprobs"]:
            self.assertEqual(len(entry["top"]), 2)
            self.assertLessEqual(entry["logprob"], 0)
        self.assertEqual(rows[7, 0]["usage"]["prompt_tokens"], 5)

        told = json.loads(summary.read_text())
        self.assertEqual(list(told), [
            "requests", "prompt_tokens", "output_tokens", "wall_s", "req_s", "prefill_tok_s", "decode_tok_s",
            "ttft_ms", "tpot_ms", "kv_bytes_peak", "kv_bytes_logical_peak", "running_peak", "preemptions",
            "prefix_cached_tokens"])
        self.assertEqual(told["requests"], 8)
        self.assertEqual(told["output_tokens"], sum(row["usage"]["output_tokens"] for row in rows.values()))
        self.assertEqual(told["prompt_tokens"], sum(row["usage"]["prompt_tokens"] for row in rows.values()
                                                    if row["choice"] == 0))
        self.assertEqual(told["running_peak"], 9)
        self.assertEqual(told["preemptions"], 0)
        self.assertLessEqual(told["ttft_ms"]["p50"], told["ttft_ms"]["p95"])
        for name in ("wall_s", "req_s", "prefill_tok_s", "decode_tok_s", "kv_bytes_peak", "kv_bytes_logical_peak"):
            self.assertGreater(told[name], 0, name)

    def test_outputs_are_no_inputs(self):
        path = self.write_rows(PROMPTS[:1])
        before = path.read_bytes()
        link, template, model = (self.scratch / name for name in ("link", "template.jinja", "model.gguf"))
        link.symlink_to(path.name)
        template.write_text("{{ messages }}")
        model.write_text("GGUF")
        both = self.scratch / "both"
        inputs = ["generate", "--prompts", path, "--chat-template", template, "-m", model]
        for flag in ("--json", "--summary"):
            for output, owner in [(path, "--prompts"), (link, "--prompts"), (template, "--chat-template"),
                                  (model, "--model")]:
                self.assert_usage(f"{flag} '{output}': is the file of {owner}", *inputs, flag, output)
            self.assert_usage(f"{flag} '{self.scratch}': is a directory", *inputs, flag, self.scratch)
            self.assert_usage("there is no directory", *inputs, flag, self.scratch / "none" / "out")
        self.assert_usage("is where --json writes to", *inputs, "--json", both, "--summary", both)
        self.assert_usage("is where --json writes to", *inputs, "--json", "-", "--summary", "-")
        self.assertEqual((path.read_bytes(), both.exists()), (before, False))

    def test_one_prompt_streams_to_stdout(self):
        done = run("generate", "--prompt", "The capital of France is", "--max-tokens", 4, "--temperature", 0, "--deterministic", *KV)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertTrue(done.stdout.startswith(" Paris"), done.stdout)
        self.assertIn("decode", done.stderr)

    def test_quiet(self):
        done = run("generate", "--prompt", "2 + 2 =", "--max-tokens", 4, "--chat", "--quiet", *KV)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_bad_rows_are_named_and_the_others_run(self):
        output = self.scratch / "out.jsonl"
        path = self.write_rows([
            {"prompt": "Hello", "max_tokens": 2}, "nonsense\n", {"prompt": 5}, {"prompt": "a", "max_token": 3},
            {"prompt": "a", "temperature": -1}, {"tokens": [10000000]}, {"prompt": ""}, {"prompt": "Bye", "max_tokens": 2}])
        done = run("generate", "--prompts", path, "--json", output, *KV)
        self.assertEqual(done.returncode, 1, done.stderr)
        for line, message in [(2, "not JSON"), (3, "prompt: expected a string"), (4, "'max_token': unknown field"),
                              (5, "temperature"), (6, "10000000"), (7, "prompt")]:
            self.assertRegex(done.stderr, f"jointkv: .*prompts.jsonl:{line}: .*{message}")
        rows = {row["index"]: row for row in self.read_rows(output)}
        self.assertEqual(sorted(rows), list(range(8)))
        self.assertEqual([index for index, row in rows.items() if "error" not in row and len(row["tokens"]) == 2], [0, 7])

    def test_a_request_that_can_never_fit_is_refused(self):
        path = self.write_rows([{"prompt": "Hello", "max_tokens": 8000}, {"prompt": "Hello", "max_tokens": 2}])
        done = run("generate", "--prompts", path, "--kv-bytes", "32M")
        self.assertEqual(done.returncode, 1)
        self.assertIn("prompts.jsonl:1: ", done.stderr)
        self.assertIn("== 1 (length)", done.stdout)

    def test_interrupt(self):
        summary = self.scratch / "summary.json"
        rows = [{"prompt": "Hello", "max_tokens": 2}] + [
            {"prompt": f"Story {i}:", "max_tokens": 4000, "ignore_eos": True} for i in range(4)]
        with subprocess.Popen([PROGRAM, "generate", "--prompts", self.write_rows(rows), "--json", "-", "--summary",
                               summary, "--kv-bytes", "1G"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              encoding="utf-8") as child:
            self.addCleanup(child.kill)
            first = child.stdout.readline()
            self.assertEqual(json.loads(first)["finish_reason"], "length")
            child.send_signal(signal.SIGINT)
            rest, errors = child.communicate(timeout=180)
        self.assertEqual(child.returncode, 130, errors)
        self.assertEqual([json.loads(line)["finish_reason"] for line in rest.splitlines()], ["cancelled"] * 4)
        self.assertEqual(json.loads(summary.read_text())["requests"], 1)
        self.assertIn("requests", errors)

    def test_usage_errors(self):
        self.assert_usage("--prompt", "generate")
        for seed in (-1, "1.5", "x", 2**64):
            self.assert_usage(f"--seed: '{seed}'", "generate", "--prompt", "a", "--seed", seed)
        self.assert_usage("--prompt", "generate", "--prompt", "a", "--prompts", "b")
        self.assert_usage("--chat-template", "generate", "--prompt", "a", "--chat-template", self.scratch / "none")
        (self.scratch / "broken.jinja").write_text("{% if %}")
        done = run("generate", "--prompt", "a", "--chat-template", self.scratch / "broken.jinja", *KV)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("chat template", done.stderr)
        self.assert_usage("--no-such-flag", "generate", "--prompt", "a", "--no-such-flag")
        self.assert_usage("12Q", "generate", "--prompt", "a", "--kv-bytes", "12Q")
        self.assert_usage("--threads", "generate", "--prompt", "a", "--threads", "-3")
        self.assert_usage("--kv-type", "generate", "--prompt", "a", "--kv-type", "q5")
        self.assert_usage("--logit-bias", "generate", "--prompt", "a", "--logit-bias", "5")
        self.assert_usage("temperature", "generate", "--prompt", "a", "--temperature", "-1")
        self.assert_usage("make setup", "generate", "--prompt", "a", "-m", "/nonexistent.gguf")
        self.assert_usage("is a directory", "generate", "--prompt", "a", "-m", self.scratch)
        self.assert_usage("/nonexistent.jsonl", "generate", "--prompts", "/nonexistent.jsonl")
        self.assert_usage("Is a directory", "generate", "--prompts", self.scratch)
        self.assert_usage("has no prompts", "generate", "--prompts", self.write_rows(["\n", " \n"]))
        self.assert_usage("no command 'nonsense'", "nonsense")
        self.assert_usage("required")
        self.assert_usage("--compute int8", "generate", "--prompt", "a", "--compute", "int8", env={"JOINTKV_TARGET": "sse4"})
        self.assert_usage("--compute bf16", "generate", "--prompt", "a", "--compute", "bf16", env={"JOINTKV_TARGET": "avx2"})
        self.assert_usage("no-such-target", "--version", env={"JOINTKV_TARGET": "no-such-target"})

    def test_a_file_that_is_no_model(self):
        path = self.scratch / "model.gguf"
        path.write_text("nonsense")
        done = run("generate", "--prompt", "a", "-m", path)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, "^jointkv: ")


class Chat(Case):
    def test_pipe(self):
        done = run("chat", "--temperature", 0, "--deterministic", "--compute", "f32", "--max-tokens", 12, *KV,
                   text="What is the capital of France?\n\nAnd of Italy?\n/stats\n/exit\nnever read\n")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("Paris", done.stdout)
        self.assertNotIn("> ", done.stdout)
        self.assertRegex(done.stdout, r"requests +2 in")
        # The second turn begins with the first.
        self.assertRegex(done.stdout, r"prompt tokens +\d+, [1-9]\d* from the prefix cache")

    def test_lines_with_a_slash(self):
        done = run("chat", "--max-tokens", 2, *KV,
                   text="/etc/hosts is a file.\n//exit is a word.\n/\n/nonsense\n/Exit now\n/stats\n/quit\nnever read\n")
        self.assertRegex(done.stdout, r"requests +3 in")
        self.assertEqual(done.returncode, 1)
        lines = done.stderr.splitlines()
        self.assertEqual(len(lines), 2, done.stderr)
        for line, command in zip(lines, ("/nonsense", "/Exit")):
            self.assertTrue(line.startswith(f"jointkv: unknown command {command}: "), line)
            for known in ("/system", "/reset", "/stats", "/help", "/exit", "/quit", f"/{command} sends it"):
                self.assertIn(known, line)
        self.assertIn("//TEXT", run("chat", "--help").stdout)

    def test_terminal(self):
        child, terminal = pty.fork()
        if child == 0:
            os.execv(PROGRAM, [PROGRAM, "chat", "--ignore-eos", "--max-tokens", "4000", *KV])
        try:
            self.wait_for(terminal, "\n> ")
            os.write(terminal, b"Tell me a story.\n")
            self.wait_for(terminal, "story.\r\n", more=20)
            os.write(terminal, b"\x03")
            self.wait_for(terminal, "(stopped)\r\n\r\n> ")
            os.write(terminal, b"\x03")
            self.wait_for(terminal, "leaves)\r\n> ")
            os.write(terminal, b"\x04")
            self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 0)
            child = None
        finally:
            if child is not None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            os.close(terminal)


class Eval(Case):
    SMALL = ["--requests", 3, "--documents", 3, "--pool", 4, "--seeds", 1, "--continuation", 8]
    FIELDS = ["workload", "model", "policy", "budget", "similarity", "residuals", "threshold", "cosine_scope",
              "kv_type", "requests", "tokens", "prompt_tokens", "seeds", "compression", "compression_spread",
              "exact_factor", "fusion_factor", "codec_factor", "bytes_held", "metadata_bytes", "logical_bytes",
              "all_resident", "kl_mean", "kl_mean_spread", "kl_p99", "top1", "ppl_ratio", "equal_token_share",
              "worst_nmse", "blocks_offered", "blocks_fused", "blocks_residual", "blocks_rejected", "fusion_s",
              "fusion_share", "prefill_tok_s", "decode_tok_s", "preemptions"]

    def test_settings_against_the_exact_cache(self):
        output, plot = self.scratch / "out.json", self.scratch / "out.svg"
        done = run("eval", *self.SMALL, "--policy", "off,bounded", "--kv-budget", "0.02,0.2", "--kv-type", "bf16,q4",
                   "--json", output, "--plot", plot, *KV)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertRegex(done.stdout, r"(?m)^bounded 0.2 +bf16")
        told = json.loads(output.read_text())
        results = told["results"]
        self.assertEqual([(r["policy"], r["budget"], r["kv_type"]) for r in results],
                         [("off", None, "bf16"), ("bounded", 0.02, "bf16"), ("bounded", 0.2, "bf16"),
                          ("off", None, "q4"), ("bounded", 0.02, "q4"), ("bounded", 0.2, "q4")])
        for result in results:
            self.assertEqual(list(result), self.FIELDS)
            self.assertEqual((result["tokens"], result["requests"], result["seeds"]), (24, 3, [1]))
            self.assertTrue(result["all_resident"])
            self.assertAlmostEqual(result["compression"], result["exact_factor"] * result["fusion_factor"] *
                                   result["codec_factor"])
            self.assertLessEqual(result["worst_nmse"], (result["budget"] or 0) * 1.0001)
        # The exact cache against itself.
        self.assertLess(results[0]["kl_mean"], 1e-3)
        self.assertAlmostEqual(results[0]["fusion_factor"], 1, delta=0.01)
        self.assertGreater(results[3]["codec_factor"], 3)
        self.assertGreater(results[3]["kl_mean"], results[0]["kl_mean"])
        self.assertEqual(xml.etree.ElementTree.parse(plot).getroot().tag, "{http://www.w3.org/2000/svg}svg")

    def test_differences(self):
        done = run("eval", *self.SMALL[2:], "--requests", 5, "--policy", "bounded", "--kv-budget", "0.02",
                   "--kv-residuals", "on", "--json", "-", *KV)
        self.assertEqual(done.returncode, 0, done.stderr)
        result, = json.loads(done.stdout)["results"]
        self.assertTrue(result["residuals"])
        self.assertGreater(result["blocks_residual"], 0)
        self.assertLessEqual(result["worst_nmse"], 0.02 * 1.0001)

    def test_workloads(self):
        for workload in ("unique", "few-shot", "system-prompt", "wiki", "samples"):
            done = run("eval", "--workload", workload, *self.SMALL, "--policy", "off", "--json", "-", *KV)
            self.assertEqual(done.returncode, 0, done.stderr)
            result = json.loads(done.stdout)["results"][0]
            self.assertEqual((result["workload"], result["tokens"]), (workload, 24))

    def test_task(self):
        for task in ("gsm8k", "nq"):
            done = run("eval", "--task", task, "--requests", 3, "--documents", 2, "--pool", 3, "--seeds", 2,
                       "--max-tokens", 4, "--policy", "off", "--json", "-", *KV)
            self.assertEqual(done.returncode, 0, done.stderr)
            result = json.loads(done.stdout)["results"][0]
            self.assertEqual((result["task"], result["questions"]), (task, 6))
            self.assertEqual(result["accuracy"], result["right"] / 6)

    def test_analyze(self):
        output, plot = self.scratch / "out.json", self.scratch / "out.svg"
        done = run("analyze", "--requests", 3, "--documents", 3, "--pool", 4, "--pairs", 20, "--json", output, "--plot",
                   plot, *KV)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("NMSE of K", done.stdout)
        told = json.loads(output.read_text())
        self.assertGreater(told["equal_pairs"], 0)
        layers = json.loads(run("inspect", "--json", MODEL).stdout)["hyperparameters"]["n_layers"]
        self.assertEqual([(r["layer"], r["kind"]) for r in told["results"]],
                         [(layer, kind) for layer in range(layers) for kind in "KV"])
        first, last = told["results"][0], told["results"][-2]
        self.assertLess(first["nmse"]["equal"]["p95"], 0.01)
        self.assertGreater(last["nmse"]["random"]["p50"], last["nmse"]["equal"]["p95"])
        self.assertEqual(xml.etree.ElementTree.parse(plot).getroot().tag, "{http://www.w3.org/2000/svg}svg")

    def test_interrupt(self):
        with subprocess.Popen([PROGRAM, "eval", "--requests", "16", "--seeds", "50", "--kv-bytes", "1G"],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as child:
            self.addCleanup(child.kill)
            time.sleep(5)
            child.send_signal(signal.SIGINT)
            output, errors = child.communicate(timeout=180)
        self.assertEqual((child.returncode, output), (130, ""), errors)
        self.assertIn("interrupted", errors)

    def test_interrupt_keeps_what_is_done(self):
        output = self.scratch / "out.json"
        terminal, end = pty.openpty()
        self.addCleanup(os.close, terminal)
        with subprocess.Popen([PROGRAM, "eval", *map(str, self.SMALL[:-4]), "--continuation", "8", "--seeds", "500",
                               "--json", output, *KV], stdout=subprocess.PIPE, stderr=end, encoding="utf-8") as child:
            self.addCleanup(child.kill)
            os.close(end)
            self.wait_for(terminal, "draw 3/500")
            child.send_signal(signal.SIGINT)
            table = child.communicate(timeout=180)[0]
            self.wait_for(terminal, "interrupted")
        self.assertEqual(child.returncode, 130)
        self.assertRegex(table, r"(?m)^bounded 0.06 +bf16")
        draws = json.loads(output.read_text())["results"][0]["seeds"]
        self.assertTrue(2 <= len(draws) < 500, draws)

    def test_usage_errors(self):
        self.assert_usage("--workload", "eval", "--workload", "nonsense")
        self.assert_usage("--policy", "eval", "--policy", "off,nonsense")
        self.assert_usage("--kv-budget", "eval", "--kv-budget", "0.1,2")
        self.assert_usage("--kv-budget: --policy has no bounded", "eval", "--policy", "off", "--kv-budget", "0.1")
        self.assert_usage("--kv-threshold: --policy has no cosine", "eval", "--kv-threshold", "0.8")
        self.assert_usage("--kv-type", "eval", "--kv-type", "q5")
        self.assert_usage("--cosine-scope", "eval", "--cosine-scope", "all")
        self.assert_usage("documents 8: more than the pool of 2", "eval", "--pool", 2)
        self.assert_usage("/nonexistent.jsonl", "eval", "--docs", "/nonexistent.jsonl")
        self.assert_usage("gsm8k asks with few-shot", "eval", "--task", "gsm8k", "--workload", "wiki")
        self.assert_usage("--max-tokens: only with --task", "eval", "--max-tokens", 5)
        self.assert_usage("--plot: not with --task", "eval", "--task", "nq", "--plot", "x.svg")
        self.assert_usage("--deterministic: only with --policy off", "eval", "--deterministic")
        self.assert_usage("make setup", "eval", "-m", "/nonexistent.gguf")
        self.assert_usage("make setup", "analyze", "-m", "/nonexistent.gguf")
        self.assert_usage("/nonexistent.jsonl", "analyze", "--docs", "/nonexistent.jsonl")
        self.assert_usage("--kv-fusion", "generate", "--prompt", "a", "--kv-fusion", "perhaps")
        self.assert_usage("--kv-budget", "generate", "--prompt", "a", "--kv-budget", "0")
        for command in (["generate", "--prompt", "a"], ["chat"], ["demo"], ["bench", "engine"], ["bench", "capacity"]):
            for policy in ("bounded", "cosine"):
                self.assert_usage("--deterministic: only with --kv-fusion off", *command, "--deterministic",
                                  "--kv-fusion", policy)


class BenchServe(Case):
    def bench(self, server, *arguments, scheme="http", host="127.0.0.1", env=None):
        return run("bench", "serve", "--base-url", f"{scheme}://{host}:{server.port}", "--dataset-name", "rag-pool",
                   "--save-result", "--result-filename", self.scratch / "r.json", *arguments, env=env)

    def result(self, done):
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads((self.scratch / "r.json").read_text())

    def test_fields_are_those_of_vllm(self):
        with FakeServer() as server:
            told = self.result(self.bench(server, "--num-prompts", 6, "--backend", "vllm", "--request-id-prefix", "x-",
                                          "--header", "A=b", "--percentile-metrics", "ttft,e2el", "--save-detailed",
                                          "--goodput", "e2el:60000", "--num-warmups", 1))
        self.assertEqual(list(told), [
            "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "dataset_name", "num_prompts",
            "request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens",
            "total_cached_tokens", "total_output_tokens", "request_throughput", "request_goodput", "output_throughput",
            "total_token_throughput", "input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times",
            "queue_times", "generated_texts", "errors", "max_output_tokens_per_s", "max_concurrent_requests", "rtfx",
            "mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p99_ttft_ms",
            "mean_e2el_ms", "median_e2el_ms", "std_e2el_ms", "p99_e2el_ms"])
        self.assertEqual((told["backend"], told["model_id"], told["rtfx"]), ("vllm", "fake", 0))
        self.assertEqual((told["total_input_tokens"], told["total_output_tokens"]), (30, 24))
        self.assertEqual(told["generated_texts"], ["aaaa"] * 6)
        self.assertEqual({path for path, _, _ in server.requests}, {"/v1/completions"})
        self.assertEqual(sorted(headers.get("X-Request-Id", "") for _, headers, _ in server.requests),
                         [""] + [f"x-{i}" for i in range(6)])
        self.assertEqual({headers["A"] for _, headers, _ in server.requests}, {"b"})

    def test_embeddings(self):
        with FakeServer() as server:
            told = self.result(self.bench(server, "--num-prompts", 4, "--backend", "openai-embeddings"))
        self.assertEqual([(path, list(body)) for path, _, body in server.requests],
                         [("/v1/embeddings", ["model", "input"])] * 4)
        self.assertEqual((told["completed"], told["total_input_tokens"], told["total_input_sequences"]), (4, 12, 4))
        self.assertIn("mean_e2el_ms", told)
        self.assertNotIn("mean_ttft_ms", told)

    def test_ramp_up(self):
        with FakeServer() as server:
            told = self.result(self.bench(server, "--num-prompts", 12, "--ramp-up-strategy", "linear", "--burstiness",
                                          "inf", "--ramp-up-start-rps", 10, "--ramp-up-end-rps", 20, "--save-detailed"))
        self.assertEqual((told["ramp_up_strategy"], told["ramp_up_start_rps"], told["ramp_up_end_rps"]),
                         ("linear", 10, 20))
        self.assertEqual([event["rps"] for event in told["rps_change_events"]], list(range(10, 21)))
        starts = told["start_times"]
        self.assertGreater(starts[0], 0.09)
        self.assertGreater(starts[1] - starts[0], starts[11] - starts[10] - 0.02)
        self.assertAlmostEqual(starts[11], sum(1 / (10 + i * 10 / 11) for i in range(12)), delta=0.5)

    def certificate(self, name):
        folder = self.scratch / name
        folder.mkdir()
        made = subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
                               "-nodes", "-keyout", folder / "key.pem", "-out", folder / "cert.pem", "-days", "2",
                               "-subj", "/CN=test", "-addext", f"subjectAltName={name}"], capture_output=True)
        if made.returncode != 0:
            self.skipTest("no openssl program")
        return folder

    def test_https(self):
        for name, host in (("DNS:localhost", "localhost"), ("IP:127.0.0.1", "127.0.0.1")):
            folder = self.certificate(name)
            other = {"localhost": "127.0.0.1", "127.0.0.1": "localhost"}[host]
            trust = {"SSL_CERT_FILE": str(folder / "cert.pem")}
            with FakeServer(folder) as server:
                bench = ["--num-prompts", 8, "--max-concurrency", 2]
                told = self.result(self.bench(server, *bench, scheme="https", host=host, env=trust))
                self.assertEqual(told["completed"], 8)
                self.assertEqual(server.requests[0][1]["Host"], f"{host}:{server.port}")
                for arguments, message in [({"host": host}, "self-signed certificate"),
                                           ({"host": other, "env": trust}, "mismatch")]:
                    done = self.bench(server, *bench, scheme="https", **arguments)
                    self.assertEqual((done.returncode, done.stdout), (1, ""), done.stderr)
                    self.assertIn("the certificate is refused: ", done.stderr)
                    self.assertIn(message, done.stderr)
                self.assertEqual(self.result(self.bench(server, *bench, "--insecure", scheme="https", host=other))
                                 ["completed"], 8)
                done = self.bench(server, *bench)
                self.assertEqual((done.returncode, done.stdout), (1, ""))

    def test_interrupt(self):
        with FakeServer(pause_s=0.05) as server:
            child = subprocess.Popen([PROGRAM, "bench", "serve", "--port", str(server.port), "--dataset-name", "unique",
                                      "--num-prompts", "400", "--max-concurrency", "2", "--save-result",
                                      "--result-filename", self.scratch / "r.json"],
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
            with child:
                self.addCleanup(child.kill)
                deadline = time.monotonic() + 60
                while len(server.requests) < 5 and time.monotonic() < deadline:
                    time.sleep(0.05)
                child.send_signal(signal.SIGINT)
                output, errors = child.communicate(timeout=60)
        self.assertEqual(child.returncode, 130, errors)
        self.assertIn("Successful requests:", output)
        told = json.loads((self.scratch / "r.json").read_text())
        self.assertTrue(told["interrupted"])
        self.assertTrue(0 < told["completed"] < 400)

    def test_usage_errors(self):
        serve = ["bench", "serve", "--dataset-name", "rag-pool"]
        self.assert_usage("--backend", *serve, "--backend", "openai-audio")
        self.assert_usage("--request-rate: not with --ramp-up", *serve, "--request-rate", 1, "--ramp-up-strategy", "linear")
        self.assert_usage("expected http", *serve, "--base-url", "localhost:80")
        self.assert_usage("there is no directory", *serve, "--save-result", "--result-filename", "/nonexistent/r.json")
        rows = self.write_rows([{"prompt": "a"}])
        self.assert_usage("is the file of --dataset-path", "bench", "serve", "--dataset-name", "custom",
                          "--dataset-path", rows, "--append-result", "--result-filename", rows)
        self.assert_usage("is the file of --dataset-path", "bench", "serve", "--dataset-name", "custom",
                          "--dataset-path", rows, "--save-dataset", rows)
        self.assert_usage("/nonexistent.jsonl", "bench", "serve", "--dataset-name", "custom", "--dataset-path",
                          "/nonexistent.jsonl")


class Others(Case):
    def test_version(self):
        done = run("--version")
        self.assertEqual(done.returncode, 0)
        lines = done.stdout.splitlines()
        self.assertEqual(lines[0], f"jointkv {VERSION}")
        for name in ("build", "CPU", "llama.cpp", "Highway", "xxHash", "spdlog", "fmt", "CLI11", "Boost", "OpenSSL",
                     "nlohmann"):
            self.assertRegex(done.stdout, rf"(?m)^{name} +\S")

    def test_help(self):
        for command in (["--help"], ["generate", "--help"], ["chat", "--help"], ["inspect", "--help"],
                        ["bench", "engine", "--help"], ["bench", "serve", "--help"],
                        ["bench", "capacity", "--help"], ["demo", "--help"], ["eval", "--help"], ["analyze", "--help"]):
            done = run(*command)
            self.assertEqual((done.returncode, done.stderr), (0, ""), command)
            self.assertIn("Usage: jointkv", done.stdout)

    def test_help_begins_with_what_is_needed(self):
        lines = run("generate", "--help").stdout.splitlines()
        options = [line.split()[0] for line in lines if line.startswith("  -")]
        self.assertEqual(options[:3], ["--prompt", "--prompts", "--chat"])
        self.assertEqual(options[-1], "-h,--help")

    def test_options_without_effect_are_not_there(self):
        for flag in ("--no-prefix-cache", "--max-running"):
            self.assertNotIn(flag, run("bench", "engine", "--help").stdout)
            self.assert_usage(flag, "bench", "engine", flag)
        self.assert_usage("--max-running 2: all 5 requests run at once", "eval", "--requests", 5, "--max-running", 2)

    def test_outputs_are_looked_at_first(self):
        none = self.scratch / "none" / "out"
        for command in (["bench", "engine", "--json"], ["bench", "capacity", "--json"], ["demo", "--summary"],
                        ["eval", "--json"], ["eval", "--plot"], ["analyze", "--json"], ["analyze", "--plot"]):
            self.assert_usage(f"{command[-1]} '{none}': there is no directory", *command, none)
            self.assert_usage("is a directory", *command, self.scratch)
            model = self.scratch / "model.gguf"
            model.write_text("GGUF")
            self.assert_usage(f"{command[-1]} '{model}': is the file of --model", *command, model, "-m", model)
            if command[:2] == ["bench", "engine"]:
                continue
            docs = self.write_rows([{"title": "a", "text": "b", "question": "c", "answers": ["d"]}])
            self.assert_usage("is the file of --docs", *command, docs, "--docs", docs)
        for command in ("eval", "analyze"):
            self.assert_usage("--plot '-': is where --json writes to", command, "--json", "-", "--plot", "-")

    def test_inspect(self):
        done = run("inspect", "--json", MODEL)
        self.assertEqual(done.returncode, 0, done.stderr)
        told = json.loads(done.stdout)
        self.assertEqual(told["file_bytes"], MODEL.stat().st_size)
        self.assertEqual(sum(tensor["bytes"] for tensor in told["tensors"]),
                         sum(kind["bytes"] for kind in told["types"].values()))
        hp = told["hyperparameters"]
        token_bytes = 2 * 2 * hp["n_layers"] * hp["n_kv_heads"] * hp["head_dim"]
        self.assertEqual(told["kv"]["bf16"]["bytes_per_token"], token_bytes)
        self.assertEqual(told["kv"]["f16"]["bytes_per_token"], token_bytes)
        self.assertEqual(told["kv"]["f32"]["bytes_per_token"], 2 * token_bytes)
        self.assertGreater(told["memory"]["packed_bytes"], told["memory"]["lean_bytes"])
        self.assertIn("token_embd.weight", run("inspect").stdout)

    def test_bench_prints_nothing_but_json(self):
        done = run("bench", "engine", "--prompt-lengths", 32, "--batches", "1,3", "--context", 16,
                   "--decode-tokens", 4, "--repeat", 2, "--json", "-", *KV)
        self.assertEqual(done.returncode, 0, done.stderr)
        results = json.loads(done.stdout)["results"]
        self.assertEqual([(r["kind"], r["batch"], r["context"]) for r in results],
                         [("prefill", 1, 32), ("decode", 1, 16), ("decode", 3, 16)])
        for result in results:
            self.assertTrue(0 < result["tok_s_min"] <= result["tok_s"] <= result["tok_s_max"])

    def test_bench_keeps_what_it_measured(self):
        done = run("bench", "engine", "--prompt-lengths", "32,100000", "--batches", 1, "--context", 16, "--repeat", 1,
                   "--json", "-", *KV)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertEqual([result["context"] for result in json.loads(done.stdout)["results"]], [32])

    def test_demo(self):
        done = run("demo", "--requests", 2, "--documents", 2, "--pool", 3, "--output-tokens", 4, "--summary",
                   self.scratch / "summary.json", *KV)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"(?m)^fusion of KV blocks +off +bounded$")
        for name in ("KV memory, fullest", "running at once, peak", "KL against off, mean"):
            self.assertIn(name, done.stdout)
        summary = json.loads((self.scratch / "summary.json").read_text())
        self.assertEqual((summary["requests"], summary["output_tokens"]), (2, 8))
        for name in ("off", "bounded"):
            self.assertEqual((summary[name]["requests"], summary[name]["output_tokens"]), (2, 8))
            self.assertGreater(summary[name]["compression"], 0.5)
        self.assertEqual(summary["bounded"]["kl_tokens"], 8)
        self.assertNotIn("kl_mean", summary["off"])
        self.assertEqual(summary["running_peak"], summary["bounded"]["running_peak"])

    def test_demo_without_fusion(self):
        small = ["demo", "--requests", 2, "--documents", 2, "--pool", 3, "--output-tokens", 2, *KV]
        for off in (["--kv-fusion", "off"], ["--deterministic"], ["--deterministic", "--kv-fusion", "off"]):
            done = run(*small, *off)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertRegex(done.stdout, r"(?m)^fusion of KV blocks +off$")
            self.assertNotIn("KL", done.stdout)

    def test_bench_capacity(self):
        done = run("bench", "capacity", "--requests", 6, "--documents", 4, "--pool", 5, "--output-tokens", 8,
                   "--kv-bytes", "48M", "--json", "-")
        self.assertEqual(done.returncode, 0, done.stderr)
        off, bounded = json.loads(done.stdout)["results"]
        self.assertEqual((off["policy"], bounded["policy"]), ("off", "bounded"))
        self.assertEqual((off["held_ratio"], off["decode_ratio"]), (1, 1))
        self.assertTrue(1 <= off["held"] < 6)
        self.assertGreaterEqual(bounded["held"], off["held"])
        for result in (off, bounded):
            self.assertEqual(result["summary"]["requests"], 6)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    PROGRAM, VERSION = str(pathlib.Path(sys.argv[1]).resolve()), sys.argv[2]
    del sys.argv[1:3]
    MODEL = model_path()
    if not MODEL.is_file():
        print(f"skipped: there is no model file {MODEL}; `make setup` fetches it")
        sys.exit(SKIPPED)
    unittest.main(verbosity=2)
