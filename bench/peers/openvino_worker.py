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


class Engine:
    def __init__(self, model, threads, seed):
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = KV_CACHE_GIB
        scheduler.max_num_seqs = 256
        # Room for every prompt of a case in one step: no decode step shares its time with a prompt.
        scheduler.max_num_batched_tokens = 1 << 16
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})
        self.random = random.Random(seed)
        # Ids below the size of the smallest supported vocabulary; special tokens sit at its start.
        self.ids = range(1000, 30000)
        self.next_request = 0

    def run(self, batch, context, tokens):
        """Seconds of the step that prefills, and of each decode step after it."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens + 1
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
            if done != tokens + 1:
                raise RuntimeError(f"a sequence generated {done} tokens instead of {tokens + 1}")
        if len(seconds) != tokens + 1:
            raise RuntimeError(f"{tokens + 1} tokens took {len(seconds)} steps: prompts and decoding were mixed")
        return seconds[0], seconds[1:]


def main():
    task = json.loads(sys.argv[1])
    engine = Engine(task["model"], task["threads"], task["seed"])
    results = {}
    for case in task["cases"]:
        batch, context = case["batch"], case["context"]
        if case["kind"] == "prefill":
            engine.run(batch, context, 0)  # compiles kernels for this shape
            prefill_s, _ = engine.run(batch, context, 0)
            results[case["name"]] = batch * context / prefill_s
        else:
            # Short prompts compile the decode kernels too, at a fraction of the time.
            engine.run(batch, min(context, 16), WARMUP_STEPS)
            _, step_s = engine.run(batch, context, case["tokens"])
            results[case["name"]] = batch * len(step_s) / sum(step_s)
    print(json.dumps(results))


main()
