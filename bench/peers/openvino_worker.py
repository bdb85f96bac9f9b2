"""One round of OpenVINO GenAI for bench/peers/engine; runs in the peer's own virtual environment.

Takes a JSON object as its argument: model, threads, seed, and cases, each with name, kind ("prefill" or "decode"),
batch, context (prompt tokens per sequence) and tokens (decode steps). Prints one JSON object of tokens per second by
case name as its last line.

Every prompt is fresh random token ids and prefix caching is off, so nothing is computed from a cache. The pipeline is
driven step by step: a step that every sequence decodes in is timed by itself, so prefill never counts as decoding.
"""

import json
import random
import sys
import time

import numpy
import openvino
import openvino_genai

KV_CACHE_GIB = 2
WARMUP_STEPS = 8
# Prompt tokens per step. Decoding needs room for every prompt of a case in one step, so that no decode step shares its
# time with a prompt; prefill counts with the better of that and the default.
WHOLE_PROMPTS = 1 << 16
DEFAULT_CHUNK = 256


class Engine:
    def __init__(self, model, threads, seed, tokens_per_step):
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = KV_CACHE_GIB
        scheduler.max_num_seqs = 256
        scheduler.max_num_batched_tokens = tokens_per_step
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})
        self.random = random.Random(seed)
        # Ids below the size of the smallest supported vocabulary; special tokens sit at its start.
        self.ids = range(1000, 30000)
        self.next_request = 0

    def steps(self, batch, context, tokens):
        """Seconds of each step until every sequence has `tokens` output tokens."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        handles = []  # a request whose handle is gone counts as dropped
        for _ in range(batch):
            prompt = numpy.array([self.random.choices(self.ids, k=context)], dtype=numpy.int64)
            handles.append(self.pipeline.add_request(self.next_request, openvino.Tensor(prompt), config))
            self.next_request += 1
        seconds = []
        while self.pipeline.has_non_finished_requests():
            start = time.perf_counter()
            self.pipeline.step()
            seconds.append(time.perf_counter() - start)
        for handle in handles:
            done = sum(len(output.generated_ids) for output in handle.read_all())
            if done != tokens:
                raise RuntimeError(f"a sequence generated {done} tokens instead of {tokens}")
        return seconds

    def prefill_tok_s(self, case):
        self.steps(case["batch"], case["context"], 1)  # compiles kernels for this shape
        return case["batch"] * case["context"] / sum(self.steps(case["batch"], case["context"], 1))

    def decode_tok_s(self, case):
        # Short prompts compile the decode kernels too, at a fraction of the time.
        self.steps(case["batch"], min(case["context"], 16), WARMUP_STEPS)
        seconds = self.steps(case["batch"], case["context"], case["tokens"] + 1)
        if len(seconds) != case["tokens"] + 1:
            raise RuntimeError(f"{case['tokens'] + 1} tokens took {len(seconds)} steps: prompts and decoding were mixed")
        return case["batch"] * case["tokens"] / sum(seconds[1:])


def main():
    task = json.loads(sys.argv[1])
    results = {}
    for tokens_per_step in (DEFAULT_CHUNK, WHOLE_PROMPTS):
        engine = Engine(task["model"], task["threads"], task["seed"], tokens_per_step)
        for case in task["cases"]:
            if case["kind"] == "prefill":
                results[case["name"]] = max(results.get(case["name"], 0), engine.prefill_tok_s(case))
            elif tokens_per_step == WHOLE_PROMPTS:
                results[case["name"]] = engine.decode_tok_s(case)
        del engine
    print(json.dumps(results))


main()
