"""One round of OpenVINO GenAI for bench/peers/serve; runs in the peer's own virtual environment.

Takes a JSON object as its argument: model, threads, clients, kv_bytes, dataset (a file, each line with messages and
output_tokens), warm_up (such a line as an object) and warm_ups. Prints one JSON object as its last line: duration,
start_times, ttfts, latencies (seconds), input_lens, output_lens, rss_bytes and kv_bytes.

The continuous batching pipeline is driven step by step. The next request goes in when one has ended, so that `clients`
are under way; a token counts as received at the end of its step. Prefix caching is on, as it is in the servers that
this is compared with.
"""

import json
import pathlib
import sys
import time

import openvino_genai

PROBE_BLOCKS = 8


def make_pipeline(task, blocks):
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = blocks
    scheduler.max_num_seqs = max(task["clients"], 1)
    scheduler.enable_prefix_caching = True
    return openvino_genai.ContinuousBatchingPipeline(
        task["model"], scheduler, "CPU", {"INFERENCE_NUM_THREADS": task["threads"]})


def tokens_of(pipeline, messages):
    tokenizer = pipeline.get_tokenizer()
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return tokenizer.encode(prompt, add_special_tokens=False).input_ids


class Request:
    def __init__(self, pipeline, number, tokens, output_tokens):
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        self.input_tokens = tokens.shape[1]
        self.output_tokens = 0
        self.start = time.perf_counter()
        self.first = self.last = None
        self.handle = pipeline.add_request(number, tokens, config)

    def collect(self, now):
        """Takes what came by now. Whether the request has ended."""
        while self.handle.can_read():
            for output in self.handle.read().values():
                self.output_tokens += len(output.generated_ids)
                self.first = self.first or now
                self.last = now
        return self.handle.get_status() != openvino_genai.py_openvino_genai.GenerationStatus.RUNNING


def run(pipeline, rows, clients, first_number):
    """Answers the rows with `clients` at once: the requests in the order of the rows, how long it took, when it began."""
    waiting = list(enumerate(rows))
    waiting.reverse()
    done, running = {}, {}
    begin = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < clients:
            index, (tokens, output_tokens) = waiting.pop()
            running[index] = Request(pipeline, first_number + index, tokens, output_tokens)
        pipeline.step()
        now = time.perf_counter()
        for index in [index for index, request in running.items() if request.collect(now)]:
            done[index] = running.pop(index)
    return [done[index] for index in range(len(rows))], time.perf_counter() - begin, begin


def block_bytes(task):
    """Bytes of one block of the cache, which the pipeline tells once it has made some."""
    pipeline = make_pipeline(task, PROBE_BLOCKS)
    run(pipeline, [(tokens_of(pipeline, [{"role": "user", "content": "Hi"}]), 1)], 1, 0)
    return pipeline.get_metrics().kv_cache_size_in_bytes / PROBE_BLOCKS


def peak_rss_bytes():
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def forget_peak_rss():
    """Peak RSS from here on: what the probe took is no part of it. Needs write access to /proc, else it stays in."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def main():
    task = json.loads(sys.argv[1])
    blocks = int(task["kv_bytes"] // block_bytes(task))
    forget_peak_rss()
    pipeline = make_pipeline(task, blocks)
    rows = [json.loads(line) for line in pathlib.Path(task["dataset"]).read_text().splitlines()]
    warm_up = task["warm_up"]
    warm_up_tokens = tokens_of(pipeline, warm_up["messages"])
    for number in range(task["warm_ups"]):
        run(pipeline, [(warm_up_tokens, warm_up["output_tokens"])], 1, number)
    # HTTP servers encode when a request arrives; here it is done beforehand, which is some milliseconds in favour.
    encoded = [(tokens_of(pipeline, row["messages"]), row["output_tokens"]) for row in rows]
    requests, duration, begin = run(pipeline, encoded, task["clients"], task["warm_ups"])
    print(json.dumps({
        "duration": duration,
        "start_times": [request.start - begin for request in requests],
        "ttfts": [request.first - request.start for request in requests],
        "latencies": [request.last - request.start for request in requests],
        "input_lens": [request.input_tokens for request in requests],
        "output_lens": [request.output_tokens for request in requests],
        "rss_bytes": peak_rss_bytes(),
        "kv_bytes": pipeline.get_metrics().kv_cache_size_in_bytes,
    }))


main()
