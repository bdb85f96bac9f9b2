#!/usr/bin/env python3
"""Makes GGUF files for tests.

  make_gguf.py random --arch qwen3 --out tiny.gguf    a small model with random weights, the same ones for the same seed
  make_gguf.py to-f32 model.gguf model-f32.gguf       a copy with every tensor as 32-bit floats

Needs numpy, PyYAML and the `gguf` module: from PyPI, or PYTHONPATH=<llama.cpp>/gguf-py.
"""

import argparse
import os
import sys
from pathlib import Path

try:
    import gguf
    import numpy as np
except ImportError as error:
    sys.exit(f"make_gguf.py: {error}; install numpy, pyyaml and gguf, or set PYTHONPATH to llama.cpp's gguf-py")

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
TENSOR_TYPES = ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


class Output:
    """A GGUF file that appears under its name only when complete."""

    def __init__(self, path, arch):
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        self.writer = gguf.GGUFWriter(self.part, arch)

    def write(self, infos, arrays):
        """infos: (name, shape, dtype, bytes, type or None) of all tensors; arrays: their data, in the same order."""
        for info in infos:
            self.writer.add_tensor_info(*info)
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        for array in arrays:
            self.writer.write_tensor_data(array)
        self.writer.close()
        os.replace(self.part, self.path)


def copy_fields(reader, writer, keep):
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture" or not keep(field.name):
            continue
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        value = field.contents()
        if is_array and not value:
            continue
        writer.add_key_value(field.name, value, field.types[0], sub_type=field.types[-1] if is_array else None)


def to_f32(args):
    reader = gguf.GGUFReader(args.input)
    output = Output(args.output, reader.fields["general.architecture"].contents())
    copy_fields(reader, output.writer, lambda name: name != "general.file_type")
    output.writer.add_file_type(gguf.LlamaFileType.ALL_F32)

    def info(tensor):
        shape = [int(n) for n in reversed(tensor.shape)]
        return tensor.name, shape, np.dtype(np.float32), int(tensor.n_elements) * 4, None

    def data(tensor):
        return np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)

    output.write([info(t) for t in reader.tensors], (data(t) for t in reader.tensors))


def random_tensors(args, n_vocab):
    """Name -> array, contiguous dimension last. The scales keep activations near 1 and the logits' deviation at 2."""
    rng = np.random.default_rng(args.seed)
    d, d_q, d_kv = args.d_model, args.heads * args.head_dim, args.kv_heads * args.head_dim
    tensors = {}

    def matrix(name, rows, columns, scale):
        tensors[name] = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale / columns**0.5)

    def vector(name, size, mean, deviation):
        tensors[name] = np.float32(mean) + np.float32(deviation) * rng.standard_normal(size, dtype=np.float32)

    matrix("token_embd.weight", n_vocab, d, 2.0)
    vector("output_norm.weight", d, 1.0, 0.1)
    if not args.tied:
        matrix("output.weight", n_vocab, d, 2.0)
    if args.rope_scaling == "freq-factors":
        # As in Llama 3.1: high frequencies untouched, low ones slowed down by the full factor.
        ramp = np.linspace(-0.5, 1.5, args.head_dim // 2).clip(0, 1)
        tensors["rope_freqs.weight"] = (1 + ramp * (args.rope_factor - 1)).astype(np.float32)

    has_qk_norm = args.arch in ("qwen3", "gemma3")
    for i in range(args.layers):
        prefix = f"blk.{i}."
        vector(prefix + "attn_norm.weight", d, 1.0, 0.1)
        # 1.5 makes attention pick some keys over others, so that a wrong position shows.
        matrix(prefix + "attn_q.weight", d_q, d, 1.5)
        matrix(prefix + "attn_k.weight", d_kv, d, 1.5)
        matrix(prefix + "attn_v.weight", d_kv, d, 1.0)
        matrix(prefix + "attn_output.weight", d, d_q, 1.0)
        if has_qk_norm:
            vector(prefix + "attn_q_norm.weight", args.head_dim, 1.5, 0.1)
            vector(prefix + "attn_k_norm.weight", args.head_dim, 1.5, 0.1)
        if args.arch == "gemma3":
            vector(prefix + "post_attention_norm.weight", d, 1.0, 0.1)
            vector(prefix + "post_ffw_norm.weight", d, 1.0, 0.1)
        vector(prefix + "ffn_norm.weight", d, 1.0, 0.1)
        matrix(prefix + "ffn_gate.weight", args.ff, d, 1.0)
        matrix(prefix + "ffn_up.weight", args.ff, d, 1.0)
        matrix(prefix + "ffn_down.weight", d, args.ff, 1.0)
        if args.biases or args.arch == "qwen2":
            vector(prefix + "attn_q.bias", d_q, 0.0, 0.2)
            vector(prefix + "attn_k.bias", d_kv, 0.0, 0.2)
            vector(prefix + "attn_v.bias", d_kv, 0.0, 0.2)
        if args.biases and args.arch == "llama":
            vector(prefix + "attn_output.bias", d, 0.0, 0.2)
            vector(prefix + "ffn_gate.bias", args.ff, 0.0, 0.2)
            vector(prefix + "ffn_up.bias", args.ff, 0.0, 0.2)
            vector(prefix + "ffn_down.bias", d, 0.0, 0.2)
    return tensors


def add_hyperparameters(args, writer, n_vocab):
    writer.add_name(f"random {args.arch}")
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if args.type == "f32" else f"MOSTLY_{args.type.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(args.layers)
    writer.add_context_length(args.context)
    writer.add_embedding_length(args.d_model)
    writer.add_feed_forward_length(args.ff)
    writer.add_head_count(args.heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_key_length(args.head_dim)
    writer.add_value_length(args.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(n_vocab)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.freq_base)
    if args.rope_scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(args.rope_scaling))
        writer.add_rope_scaling_factor(args.rope_factor)
    if args.rope_scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(max(1, int(args.context / args.rope_factor)))
    if args.arch == "gemma3":
        writer.add_sliding_window(args.sliding_window)
        if args.sliding_pattern:
            writer.add_uint32("gemma3.attention.sliding_window_pattern", args.sliding_pattern)
        if args.final_softcap:
            writer.add_final_logit_softcapping(args.final_softcap)


def random_model(args):
    output = Output(args.out, args.arch)
    if args.vocab_size:
        n_vocab = args.vocab_size
        output.writer.add_tokenizer_model("none")
    else:
        reader = gguf.GGUFReader(args.donor)
        n_vocab = len(reader.fields["tokenizer.ggml.tokens"].data)
        copy_fields(reader, output.writer, lambda name: name.startswith("tokenizer."))
    add_hyperparameters(args, output.writer, n_vocab)

    infos, arrays = [], []
    wanted = gguf.GGMLQuantizationType[args.type.upper()]
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    for name, array in random_tensors(args, n_vocab).items():
        kind = wanted if array.ndim == 2 and array.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F32
        data = np.ascontiguousarray(gguf.quants.quantize(array, kind))
        infos.append((name, data.shape, data.dtype, data.nbytes, kind))
        arrays.append(data)
    output.write(infos, arrays)


def check_random(args, parser):
    if args.head_dim is None:
        if args.d_model % args.heads:
            parser.error(f"--d-model {args.d_model} is not a multiple of --heads {args.heads}; give --head-dim")
        args.head_dim = args.d_model // args.heads
    if args.head_dim % 2:
        parser.error(f"head dimension {args.head_dim} is odd")
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")
    if args.arch == "qwen2" and args.heads * args.head_dim != args.d_model:
        parser.error(f"qwen2 needs heads x head-dim = d-model, got {args.heads} x {args.head_dim} and {args.d_model}")
    if args.rope_scaling == "freq-factors" and args.arch != "llama":
        parser.error(f"--rope-scaling freq-factors is read for llama only, not {args.arch}")
    if (args.sliding_window or args.sliding_pattern or args.final_softcap) and args.arch != "gemma3":
        parser.error(f"sliding windows and the final soft cap are read for gemma3 only, not {args.arch}")
    if args.tied is None:
        args.tied = args.arch == "gemma3"


def default_donor():
    cache = Path(os.environ.get("JOINTKV_CACHE") or Path.home() / ".cache/jointkv")
    return os.environ.get("JOINTKV_MODEL") or str(cache / "models/SmolLM2-135M-Instruct.Q4_1.gguf")


def positive(text):
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    r = commands.add_parser(
        "random", help="a small model with random weights", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    r.add_argument("--arch", choices=ARCHITECTURES, required=True)
    r.add_argument("--out", required=True)
    r.add_argument("--donor", default=default_donor(), help="GGUF file whose tokenizer and vocabulary are taken")
    r.add_argument("--vocab-size", type=positive, help="this many tokens without texts, and no donor")
    r.add_argument("--seed", type=int, default=1)
    r.add_argument("--layers", type=positive, default=2)
    r.add_argument("--d-model", type=positive, default=64)
    r.add_argument("--heads", type=positive, default=4)
    r.add_argument("--kv-heads", type=positive, default=2)
    r.add_argument("--head-dim", type=positive, help="d-model / heads if not given")
    r.add_argument("--ff", type=positive, default=128)
    r.add_argument("--context", type=positive, default=8192)
    r.add_argument("--freq-base", type=float, default=10000.0)
    r.add_argument("--rope-scaling", choices=("none", "linear", "yarn", "freq-factors"), default="none")
    r.add_argument("--rope-factor", type=float, default=4.0)
    tied = r.add_mutually_exclusive_group()
    tied.add_argument("--tied", action="store_true", default=None, help="output matrix = embedding; default for gemma3")
    tied.add_argument(
        "--untied", dest="tied", action="store_false", default=None, help="own output matrix; default for the others"
    )
    r.add_argument("--biases", action="store_true", help="on Q, K, V (qwen2 always has them), for llama on every layer")
    r.add_argument("--sliding-window", type=int, default=0, help="tokens; gemma3")
    r.add_argument("--sliding-pattern", type=int, default=0, help="every N-th layer sees everything; gemma3, 6 when 0")
    r.add_argument("--final-softcap", type=float, default=0.0, help="gemma3")
    r.add_argument("--type", choices=TENSOR_TYPES, default="f32", help="of the matrices")

    f = commands.add_parser("to-f32", help="a copy with every tensor as 32-bit floats")
    f.add_argument("input")
    f.add_argument("output")

    args = parser.parse_args()
    try:
        if args.command == "random":
            check_random(args, parser)
            random_model(args)
        else:
            to_f32(args)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"make_gguf.py: {error}")


if __name__ == "__main__":
    main()
