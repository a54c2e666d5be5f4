"""Measure, never assert.

    python tests/bench.py {kernels,train,tokenizer,data,finetune,generate,plan} [--json FILE]

Every comparison is interleaved (A B A B ...) and reported as medians and ratios, since machines
are shared and noisy. Rows print as they come; --json also writes them to FILE. `plan` measures
nothing: it computes the memory, the step's time and the hours of a preset by formula.
"""

import argparse
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
from functools import partial
from itertools import count, cycle, islice, product
from pathlib import Path
from unittest import mock
from xml.sax.saxutils import escape

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared/data"  # real samples, beside the checkout
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import finetune  # noqa: E402
import model as gpt_model  # noqa: E402
import train  # noqa: E402
from model import GPT, GPTConfig, add_layer_norm, attention, bias_gelu, cross_entropy  # noqa: E402
from tokenizer import Tokenizer, count_batch, read_documents, train_bpe  # noqa: E402

SECONDS = partial(timeit.timeit, number=1)
ROWS = []  # all that was shown, for --json


def show(row):
    """Print a row as "key value  key value", and keep it."""
    ROWS.append(row)
    cells = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
             for key, value in row.items()]
    print("  ".join(cells), flush=True)


def interleave(variants, rounds, measure=SECONDS):
    """{name: medians of the figures, one or several, that measure(variant) returns}. The variants
    are measured in turns, so that drift hits all alike."""
    figures = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            figures[name].append(measure(variant))
    return {name: np.median(values, axis=0) for name, values in figures.items()}


# ---------------------------------------------------------------------------------------------
# plan: what a run needs, without running it
#
# N parameters, of a block B = 12*C*C + 13*C, outside of blocks R = (V + T + 2)*C; C width,
# L layers, H heads, V vocabulary, T seq_len, t tokens of a micro-batch. S shards: FSDP cuts a
# weight among the GPUs of a node; with DDP S is 1.

MACHINES = (  # name, GPUs, 8 a node; GB of each, bytes/s of its memory by the datasheet
    ("H200", 1, 141, 4.8e12),
    ("H100", 8, 80, 3.35e12),
    ("H100", 128, 80, 3.35e12),
    ("A100", 128, 40, 1.555e12))
COPY_RATE = 5e9  # a guess: bytes/s at which the full state reaches rank 0's CPU; training waits


def bench_plan(parser, rest):
    """Parameters, FLOPs, memory and step time by part, and hours, each with its formula."""
    parser.add_argument("--preset", default="biomedlm", choices=gpt_model.PRESETS,
                        help="shape and recipe (default: biomedlm)")
    preset = parser.parse_args(rest).preset
    settings = train.recipe(preset)
    config = GPTConfig.preset(preset)
    n_params = gpt_model.without_memory(config).n_params()
    flops = train.flops_per_token(config, n_params, settings["seq_len"])
    tokens = settings["total_steps"] * settings["batch_tokens"]
    minutes = settings["save_minutes"]
    stall = 12 * n_params / COPY_RATE
    share = stall / (60 * minutes + stall)
    print(f"parameters N   {n_params:,} (the tied head counted once)")
    print(f"FLOPs a token  {flops / 1e9:.2f} G = 6*N + 12*L*T*C")
    print(f"tokens         {tokens / 1e9:.1f} G = {settings['total_steps']:,} steps * "
          f"{settings['batch_tokens']:,}")
    print(f"checkpoint     {12 * n_params / 1e9:.1f} GB = 12*N; training waits {stall:.1f} s = "
          f"12*N / {COPY_RATE / 1e9:g} GB/s (a guess) every {minutes:g} minutes: {share:.2%}")
    flops *= settings["batch_tokens"]  # a step's
    for machine in MACHINES:
        plan_machine(config, n_params, settings, flops, share, *machine)


def plan_machine(config, n_params, settings, flops, share, name, gpus, gigabytes, bandwidth):
    """Print the fastest way that fits a machine, with its memory, step and hours."""
    machine = f"{gpus} x {name}-{gigabytes}"
    ideal = flops / gpus / train.PEAK_FLOPS[name]  # seconds a step at the peak
    found = {}
    for way in ways(settings, gpus):
        memory = memory_parts(config, n_params, way)
        seconds = step_parts(config, n_params, way, ideal, bandwidth)
        if sum(memory.values()) < 0.92e9 * gigabytes:  # the rest is the allocator's and NCCL's
            found.setdefault(sum(seconds.values()), (way, memory, seconds))
    step_s = min(found)  # fails where none fits
    way, memory, seconds = found[step_s]
    print(f"\n{machine}: --parallel {way['parallel']}, activation checkpointing "
          f"{way['activation_checkpointing']}, --micro_batch {way['micro_batch']}")
    for formula, size in memory.items():
        print(f"  {size / 1e9:7.2f} GB  {formula}")
    for formula, part in seconds.items():
        print(f"  {part:7.3f} s   {formula}")
    hours = settings["total_steps"] / 3600
    row = {"machine": machine, "gb": sum(memory.values()) / 1e9, "step_s": step_s,
           "mfu": ideal / step_s, "hours": hours * step_s / (1 - share)}
    for mfu in (0.23, 0.40, 0.60):  # BioMedLM's own; a fair guess; our aim on an H200
        row[f"hours at {mfu:.0%}"] = hours * ideal / mfu
    show(row)


def ways(settings, gpus):
    """Yield each way to take a step on so many GPUs: settings of train.py, and "shards"."""
    sequences = settings["batch_tokens"] // settings["seq_len"] // gpus  # a GPU's, a step
    for parallel, checkpointing, micro_batch in product(
            ("ddp", "fsdp"), (False, True), (1, 2, 4, 8, 16, 32)):
        if sequences % micro_batch == 0:
            yield settings | {
                "parallel": parallel,
                "activation_checkpointing": checkpointing,
                "micro_batch": micro_batch,
                "accumulation": sequences // micro_batch,
                "shards": min(gpus, 8) if parallel == "fsdp" else 1}


def memory_parts(config, n_params, way):
    """{"part = formula": bytes} of one GPU in a block's backward, where it peaks (fused ops).

    A block saves, a token: the residual stream twice (8C in fp32), in bf16 two LayerNorm outputs
    (4C), qkv (6C), attention (2C), c_fc (8C) and its GELU (8C), and 4 statistics and H logsumexps.
    """
    C, L, H, V = config.n_embd, config.n_layer, config.n_head, config.vocab_size
    t = way["micro_batch"] * way["seq_len"]
    rows = gpt_model.CROSS_ENTROPY_CHUNK
    block = (36 * C + 4 * H + 16) * t
    parts = {
        "weights, gradients, two moments in fp32 = 16*N / S": 16 * n_params / way["shards"],
        "a block's gradients in flight = (36*C + 4*H + 16) * t": block,
        f"embedding and head = 9*C*t + 2*V*min(t, {rows}) + 10*V*C":
            9 * C * t + 2 * V * min(t, rows) + 10 * V * C}
    copies = "bf16 copies of the blocks' weights = 24*C*C*L, recomputed under FSDP 24*C*C"
    parts[copies] = 24 * C * C * L
    if way["activation_checkpointing"]:
        parts["inputs of L blocks, one block's inside = 6*C*L*t + (36*C + 4*H + 16) * t"] = \
            6 * C * L * t + block
    else:
        parts["saved activations = (36*C + 4*H + 16) * L * t"] = block * L
    if way["parallel"] == "fsdp":
        # Of all blocks, or of the block at work, the one fetched ahead and what is outside.
        if way["activation_checkpointing"]:
            parts[copies] /= L
        whole = 4 * n_params
        some = 4 * ((V + config.n_positions + 2) * C + 2 * (12 * C * C + 13 * C))
        parts["gathered weights = 4*N, with activation checkpointing 4*(R + 2*B)"] = \
            some if way["activation_checkpointing"] else whole
        parts["gradients to be reduced = 4*N, without accumulation 4*(R + 2*B)"] = \
            whole if way["accumulation"] > 1 else some
    return parts


def step_parts(config, n_params, way, ideal, bandwidth):
    """{"part = formula": seconds} of a step on one GPU; ideal: its seconds at the peak FLOP/s.

    The numbers are from an H100's step of BioMedLM, taken apart: 264-271 ms a micro-batch of 8,192
    tokens. Another machine's are scaled by its datasheet. Traffic between GPUs runs beside backward
    and isn't counted.
    """
    runs = 4 / 3 if way["activation_checkpointing"] else 1  # a third forward, two backward
    accumulation = way["accumulation"]
    tokens = accumulation * way["micro_batch"] * way["seq_len"]
    n_bytes = 173 * config.n_layer * config.n_embd * tokens
    return {
        "matrix products and attention = FLOPs / (67% of the peak)": runs * ideal / 0.67,
        "LayerNorm, GELU and the rest = 173*L*C bytes a token": runs * n_bytes / bandwidth,
        "weights to bf16, gradients to fp32, added = 24*N bytes a micro-batch":
            accumulation * 24 * n_params / bandwidth,
        "gradient norm and AdamW = 44*N / S bytes": 44 * n_params / way["shards"] / bandwidth}


# ---------------------------------------------------------------------------------------------
# kernels without a GPU: compile them for chips that are not here, read what they need

TARGETS = {"sm_80": 80, "sm_90": 90}


def recorded_launches(arch, C=2560, n_head=20):
    """Every kernel launch of a forward and backward through all ops in bf16, recorded, not run:
    [(kernel, {argument: value}, options)]. So the table holds what really launches, as it does."""
    from triton.runtime.jit import JITFunction

    launches = []

    def record(kernel, *args, grid=None, warmup=False, **kwargs):
        options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages") if key in kwargs}
        launches.append((kernel, dict(zip(kernel.arg_names, args)) | kwargs, options))

    def parameter(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    bf16 = torch.bfloat16
    x = parameter(16, C, dtype=bf16)
    weight = parameter(C)
    bias = parameter(C)
    residual = parameter(16, C)
    qkv = parameter(1, 1024, 3 * C, dtype=bf16)
    wte = parameter(28896, C, dtype=bf16)
    targets = torch.zeros(16, dtype=torch.int64)
    with (mock.patch.object(JITFunction, "run", record),
          mock.patch.multiple(gpt_model, runs_kernel=lambda x: True, gpu=lambda: arch)):
        outputs = [
            *add_layer_norm(x, residual, weight, bias, 1e-5, 0.1, 1),
            *add_layer_norm(x, residual, weight, bias),
            bias_gelu(parameter(16, 4 * C, dtype=bf16), parameter(4 * C)),
            attention(qkv, n_head, 0.1),
            attention(qkv, n_head, 0.1, 0.1, 1),
            cross_entropy(x, wte, targets)]
        torch.autograd.backward(outputs, [torch.zeros_like(o) for o in outputs])
    return launches


def cross_compile(kernel, arguments, options, target):
    """Compile one recorded launch for another machine's chip; returns triton's CompiledKernel.

    Triton does all as it would before this launch, on a machine whose driver names that chip.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    driver = mock.Mock()
    driver.get_current_device.return_value = 0
    driver.get_current_target.return_value = GPUTarget("cuda", TARGETS[target], 32)
    kernel.device_caches.clear()  # they know the last target
    with mock.patch.object(triton.runtime.driver, "_active", driver):
        return kernel.warmup(grid=(1,), **arguments, **options)


def resources(compiled):
    """(registers, stack bytes) of a compiled CUDA kernel; a spilled register shows as stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        text = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True,
                              text=True, check=True).stdout
    return tuple(int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "STACK"))


def static_table():
    """Registers, spills and shared memory of every kernel on every target."""
    for target in TARGETS:
        for kernel, arguments, options in recorded_launches(target):
            compiled = cross_compile(kernel, arguments, options, target)
            registers, stack = resources(compiled)
            show({
                "kernel": kernel.__name__, "target": target,
                "dropout": arguments.get("DROPOUT"), "warps": compiled.metadata.num_warps,
                "registers": registers, "stack": stack,
                "shared_kb": compiled.metadata.shared / 1024})


# ---------------------------------------------------------------------------------------------
# kernels on a GPU: each op against eager torch and torch.compile


def bench_kernels(parser, rest):
    """Each op against eager torch and torch.compile, on a GPU; --static needs none."""
    parser.add_argument("--static", action="store_true",
                        help="cross-compile and print resources (default: off with a GPU)")
    parser.add_argument("--quick", action="store_true",
                        help="16k rows only (default: 8k, 16k and 64k)")
    args = parser.parse_args(rest)
    if args.static or not torch.cuda.is_available():
        static_table()
        return
    torch._functorch.config.donated_buffer = False  # backward runs again and again on one graph
    ceilings = measured_ceilings()
    all_rows = [16384] if args.quick else [8192, 16384, 65536]
    for (C, n_head), rows, p in product(((2560, 20), (768, 12)), all_rows, (0.0, 0.1)):
        for op, case in kernel_cases(rows, C, n_head, p).items():
            if p == 0 or op in ("add_layer_norm", "attention"):
                where = {"op": op, "C": C, "rows": rows, "dropout": p}
                time_op(where, ceilings, *case)


def kernel_cases(rows, C, n_head, p, V=28896, T=1024):
    """{op: (tensors, ours, plain, its ceiling, {direction: bytes or FLOPs})} in bf16, as autocast
    gives them: parameters and residual stream fp32. Each input is counted once, each output once.
    Plain is what one would write in torch, to run under autocast."""

    def rand(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, device="cuda").to(dtype).requires_grad_()

    def plain_add_layer_norm(x, r, w, b):
        new = r + F.dropout(x, p)
        # autocast's norm is fp32; the cast that the next linear layer makes belongs to it
        return F.layer_norm(new, (C,), w, b).to(x.dtype), new

    fp32 = torch.float32
    wte = (torch.randn(V, C, device="cuda") / 50).requires_grad_()
    targets = torch.randint(0, V, (rows,), device="cuda")
    return {
        "add_layer_norm": (
            (rand(rows, C), rand(rows, C, dtype=fp32), rand(C, dtype=fp32), rand(C, dtype=fp32)),
            lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-5, p, 1),
            plain_add_layer_norm,
            "copy",
            {"forward": (12 * C + 8) * rows, "backward": (16 * C + 8) * rows}),
        "bias_gelu": (
            (rand(rows, 4 * C), rand(4 * C, dtype=fp32)),
            bias_gelu,
            lambda x, b: F.gelu(x + b.to(x.dtype), approximate="tanh"),
            "copy",
            {"forward": 16 * C * rows, "backward": 24 * C * rows}),
        "attention": (
            (rand(rows // T, T, 3 * C),),
            lambda qkv: attention(qkv, n_head, (C // n_head) ** -0.5, p, 1),
            lambda qkv: plain_attention(qkv, n_head, p),
            "matmul",
            {"forward": 2 * T * C * rows, "backward": 5 * T * C * rows}),
        "cross_entropy": (
            (rand(rows, C), wte, targets),
            cross_entropy,
            lambda h, w, t: F.cross_entropy(F.linear(h, w), t),  # bf16 product, fp32 loss
            "matmul",
            {"both": 6 * rows * C * V}),
    }


def time_op(where, ceilings, tensors, ours, plain, ceiling, work):
    """Show one op at one shape: milliseconds, share of the device's ceiling, ratios."""
    torch._dynamo.reset()
    variants = {"ours": ours, "eager": plain, "compile": torch.compile(plain)}
    ready = {name: directions(fn, tensors) for name, fn in variants.items()}
    for direction, amount in work.items():
        ms = gpu_milliseconds({name: fns[direction] for name, fns in ready.items()})
        rate = amount / ms["ours"] * 1e3
        show({**where, "direction": direction, **ms, "per_s": rate,
              "share_of_peak": rate / ceilings[ceiling], "x_eager": ms["eager"] / ms["ours"],
              "x_compile": ms["compile"] / ms["ours"]})


def directions(fn, tensors):
    """{direction: callable} for fn on these leaves as in training: forward under bf16 autocast and
    recorded for backward, the output gradients made once."""
    leaves = [t for t in tensors if t.requires_grad]

    def forward():
        with torch.autocast("cuda", torch.bfloat16):
            out = fn(*tensors)
        return out if isinstance(out, tuple) else (out,)

    outputs = forward()
    grads = [torch.randn_like(o) for o in outputs]
    return {"forward": forward, "both": lambda: torch.autograd.grad(forward(), leaves, grads),
            "backward": lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)}


def gpu_milliseconds(variants):
    """Median device milliseconds of each named callable, in turns. A sleeping kernel goes first,
    for longer than Python needs to queue the launches behind it, so that Python's own time stays
    out of the figure."""
    def measure(fn):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(40_000_000)  # cycles: 20 ms
        begin.record()
        for _ in range(4):
            fn()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 4

    interleave(variants, 1, measure)  # compiles
    return interleave(variants, 9, measure)


def measured_ceilings():
    """{"copy": bytes/s read + written, "matmul": bf16 FLOP/s} of this device, now."""
    a = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    other = torch.empty_like(a)
    b = torch.randn(8192, 8192).cuda().bfloat16()
    ms = gpu_milliseconds({"copy": lambda: other.copy_(a), "matmul": lambda: b @ b})
    ceilings = {"copy": 2**32 / ms["copy"] * 1e3,  # 2**30 numbers of 2 bytes, read and written
                "matmul": 2**40 / ms["matmul"] * 1e3}  # 2 * 8192**3
    show({"device": torch.cuda.get_device_name(), **ceilings})
    return ceilings


# ---------------------------------------------------------------------------------------------
# train: a whole step of train.py beside a plain GPT's, on the same weights and optimiser


def bench_train(parser, rest):
    """tokens/s, MFU and peak memory of a full step, ours and plain in turns on the same weights."""
    parser.add_argument("--shape", default="demo", choices=gpt_model.PRESETS,
                        help="preset of train.py (default: demo)")
    parser.add_argument("--micro_batch", type=int, default=8,
                        help="sequences a forward pass (default: 8)")
    parser.add_argument("--accumulation", type=int, default=1,
                        help="micro-batches a step (default: 1; a real run has 16 or more)")
    parser.add_argument("--seconds", type=float, default=30,
                        help="hot seconds of each variant (default: 30)")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1],
                        help="rates to measure (default: 0 0.1)")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile our blocks too (default: off)")
    args = parser.parse_args(rest)
    settings = train.recipe(args.shape) | {
        "lr": 1e-5, "min_lr": 1e-5, "micro_batch": args.micro_batch,
        "accumulation": args.accumulation}
    torch.set_float32_matmul_precision("high")
    process = train.start_process()
    for dropout in args.dropout:
        measure_train(args, process, settings | {"dropout": dropout})


def measure_train(args, process, settings):
    """Show one dropout rate: medians over six interleaved segments of each variant."""
    torch.manual_seed(0)
    config = GPTConfig.preset(args.shape, dropout=settings["dropout"])
    with process.device:
        model = GPT(config)
    optimizer = train.make_optimizer(model, settings)
    x = torch.randint(config.vocab_size, (settings["micro_batch"], settings["seq_len"]),
                      device=process.device)
    plain = [plain_block, plain_head]
    if process.device.type == "cuda":  # the blocks share one graph, so that compiling takes seconds
        plain = [torch.compile(fn, dynamic=False) for fn in plain]
    train.speed_up(model, args.compile)
    batches = iter(lambda: (x, x), None)
    steps = {
        "ours": lambda: train.train_step(model, optimizer, batches, 200, settings, process),
        "plain": lambda: plain_step(model, optimizer, x, settings["accumulation"], process, plain)}
    timed = partial(timed_segment, process=process, seconds=args.seconds / 6)
    for rounds in (1, 6):  # the first one compiles, and fills the cache
        medians = interleave(steps, rounds, timed)
    flops = train.flops_per_token(config, model.n_params(), settings["seq_len"])
    peak = train.peak_flops(process.device)
    speeds = {}
    for name, (steps_per_s, memory_gib) in medians.items():
        speeds[name] = steps_per_s * settings["accumulation"] * x.numel()
        show({"variant": name, "dropout": settings["dropout"], "tokens_per_s": speeds[name],
              "mfu": speeds[name] * flops / peak if peak else None, "memory_gib": memory_gib})
    show({"variant": "ours / plain", "ratio": speeds["ours"] / speeds["plain"]})


def timed_segment(step, process, seconds):
    """(steps per second, peak GiB) of running `step` for so many seconds, hot."""
    cuda = process.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for n_steps in count(1):
        step()
        if cuda:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        if elapsed > seconds:
            return n_steps / elapsed, train.memory_gib(process.device)


def plain_block(residual, branch, dropout, n_head, ln_1w, ln_1b, qkv_w, qkv_b, proj_w, proj_b,
                ln_2w, ln_2b, fc_w, fc_b, out_w, out_b):
    """nanoGPT's block from torch's own ops; cut where ours is, so that compile fuses as much."""
    if branch is not None:
        residual = residual + F.dropout(branch, dropout)
    x = F.layer_norm(residual, ln_1w.shape, ln_1w, ln_1b)
    y = plain_attention(F.linear(x, qkv_w, qkv_b), n_head, dropout)
    residual = residual + F.dropout(F.linear(y, proj_w, proj_b), dropout)
    x = F.layer_norm(residual, ln_2w.shape, ln_2w, ln_2b)
    x = F.gelu(F.linear(x, fc_w, fc_b), approximate="tanh")
    return residual, F.linear(x, out_w, out_b)


def plain_attention(qkv, n_head, dropout):
    """(B, T, 3C) -> (B, T, C)."""
    q, k, v = gpt_model.split_heads(qkv, n_head)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    return o.transpose(1, 2).flatten(2)


def plain_head(residual, branch, targets, dropout, ln_w, ln_b, wte):
    """Final LayerNorm, all logits at once, F.cross_entropy."""
    x = F.layer_norm(residual + F.dropout(branch, dropout), ln_w.shape, ln_w, ln_b)
    logits = F.linear(x, wte)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def plain_step(model, optimizer, x, accumulation, process, compiled):
    """One step as nanoGPT takes it, on our model's parameters."""
    block, head = compiled
    t = model.transformer
    p = model.config.dropout
    for _ in range(accumulation):
        with process.autocast():
            residual = F.dropout(t.wte(x) + t.wpe.weight[: x.size(1)], p)
            branch = None
            for layer in t.h:
                residual, branch = block(residual, branch, p, model.config.n_head,
                                         *layer.parameters())
            loss = head(residual, branch, x, p, t.ln_f.weight, t.ln_f.bias, t.wte.weight)
        (loss / accumulation).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------
# the tokenizer: training and encoding beside Hugging Face's, which runs in its own environment

HF_CHILD = """
import os, resource, sys, time
clock = lambda: (time.perf_counter(), sum(os.times()[:4]))
part, text, threads, folder = sys.argv[1:]
os.environ["RAYON_NUM_THREADS"] = threads
os.environ["TOKENIZERS_PARALLELISM"] = "true" if int(threads) > 1 else "false"
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
if part == "train":
    byte_level = pre_tokenizers.ByteLevel
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=28895, min_frequency=2, show_progress=False,
                                  initial_alphabet=byte_level.alphabet())
    start = clock()
    tok.train([text + ".txt"], trainer)
    end = clock()
    os.makedirs(folder, exist_ok=True)
    tok.model.save(folder)
    tok.save(folder + "/tokenizer.json")
    result = open(folder + "/merges.txt").read()
else:
    tok = Tokenizer.from_file(folder + "/tokenizer.json")
    lines = open(text + ".txt", newline="\\n", encoding="utf-8").readlines()
    texts = ["".join(lines[i:i + 40]) for i in range(0, len(lines), 40)]
    start = clock()
    rows = tok.encode_batch_fast(texts, add_special_tokens=False)
    end = clock()
    result = repr([list(row.ids) for row in rows])
import hashlib
print(hashlib.sha256(result.encode()).hexdigest())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(*(b - a for a, b in zip(start, end)), peak / 1024)
"""

OUR_CHILD = """
import os, resource, sys, time
clock = lambda: (time.perf_counter(), sum(os.times()[:4]))
part, text, threads, folder = sys.argv[1:]
from tokenizer import Tokenizer, count_pretokens, train_bpe
if part == "train":
    start = clock()
    counts = count_pretokens([text + ".jsonl"], workers=int(threads))
    merges = train_bpe(counts, 28896)
    end = clock()
    Tokenizer.from_merges(merges).save(folder)
    result = open(folder + "/merges.txt").read()
else:
    tok = Tokenizer.load(folder)
    lines = open(text + ".txt", newline="\\n", encoding="utf-8").readlines()
    texts = ["".join(lines[i:i + 40]) for i in range(0, len(lines), 40)]
    start = clock()
    rows = [tok.encode(text) for text in texts]
    end = clock()
    result = repr(rows)
import hashlib
print(hashlib.sha256(result.encode()).hexdigest())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak += int(threads) * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(*(b - a for a, b in zip(start, end)), peak / 1024)
"""


def bench_tokenizer(parser, rest):
    """Seconds, MB/s and peak memory of training 28,896 tokens and of encoding."""
    parser.add_argument("--hf_python", help="a python that has tokenizers (default: ours alone)")
    args = parser.parse_args(rest)
    children = {"ours": ("ours", sys.executable, OUR_CHILD)}
    if args.hf_python:
        children["hf"] = ("hf", args.hf_python, HF_CHILD)
    with tempfile.TemporaryDirectory() as folder:
        megabytes = all_text(f"{folder}/all") / 1e6
        for part, threads in (("train", 1), ("train", 2), ("encode", 1)):
            digests = set()
            measure = partial(run_child, digests, folder, part, str(threads))
            for name, (seconds, cpu, peak) in interleave(children, 3, measure).items():
                show({"part": part, "threads": threads, "who": name, "seconds": seconds,
                      "cpu_s": cpu, "MB_per_s": megabytes / seconds, "peak_MB": peak,
                      "all_equal": len(digests) == 1})


def run_child(digests, folder, part, threads, child):
    """(seconds, CPU seconds, peak MB) of one part in a child; the result's sha256 joins digests."""
    who, python, code = child
    command = [python, "-c", code, part, f"{folder}/all", threads, f"{folder}/{who}"]
    digest, *figures = subprocess.check_output(command, cwd=ROOT, text=True).split()
    digests.add(digest)
    return list(map(float, figures))


def all_text(stem):
    """Write abstracts.jsonl.gz (title, newline, abstract) and pmc_fulltext.jsonl.gz as STEM.jsonl,
    and as STEM.txt for Hugging Face's; returns the bytes of text."""
    with open(f"{stem}.jsonl", "w") as ours, open(f"{stem}.txt", "w", newline="\n") as theirs:
        for name in ("abstracts.jsonl.gz", "pmc_fulltext.jsonl.gz"):
            with gzip.open(SHARED / name) as lines:
                for record in map(json.loads, lines):
                    abstract = f"{record.get('title')}\n{record.get('abstract')}"
                    text = record.get("text", abstract)
                    ours.write(json.dumps({"id": str(record["id"]), "text": text}) + "\n")
                    theirs.write(text.removesuffix("\n") + "\n")
    return os.path.getsize(f"{stem}.txt")


# ---------------------------------------------------------------------------------------------
# data: extraction, tokenizing, the loader


def bench_data(parser, rest):
    """Extraction, tokenizing at 1 and 2 workers, the loader, small files, and hours in all."""
    parser.add_argument("--citations", type=int, default=30_000,
                        help="of the large file, and small files of one each (default: 30000)")
    n = parser.parse_args(rest).citations
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        extract, xml_mb = measure_extract(folder, n)
        tokenize, text_mb = measure_tokenize(folder)
        measure_loader(folder / "arrays1")
        measure_small_files(folder, n)
    # 1,300 files like this one; 100 GB of PMC's XML, half of it text; without disks
    extract *= 60 * 64
    tokenize *= 60 * 64
    show({"what": "minutes on 64 cores", "baseline, extract": 1300 * xml_mb / extract,
          "baseline, tokenize": 1300 * text_mb / tokenize,
          "100 GB of PMC, both": 1e5 / extract + 5e4 / tokenize})


def citations(n):
    """Yield n citations of PubMed: real titles and abstracts in the frames of NLM's sample."""
    abstracts = re.compile(r"(?s)<(Abstract|OtherAbstract)\b.*?</\1>")
    title = re.compile(r"(?s)<ArticleTitle/>|<ArticleTitle>.*?</ArticleTitle>")
    bad = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # XML allows none of them
    with gzip.open(SHARED / "pubmed_xml/pubmedsample18n0001.xml.gz", "rt") as f:
        frames = re.findall(r"(?s)<PubmedArticle>.*?</PubmedArticle>", abstracts.sub("", f.read()))
    with gzip.open(SHARED / "abstracts.jsonl.gz", "rt") as f:
        records = [json.loads(line) for line in f]
    for i, frame, record in zip(range(1, n + 1), cycle(frames), cycle(records)):
        text = (f"<ArticleTitle>{escape(record['title'])}</ArticleTitle><Abstract><AbstractText>"
                f"{escape(record['abstract'])} {i}</AbstractText></Abstract>")
        before, after = title.split(frame, 1)
        citation = before + bad.sub("", text) + after
        yield re.sub(r"(<PMID [^>]*>)\d+", rf"\g<1>{i}", citation, count=1)


def write_citations(path, found):
    """A file like PubMed's baseline."""
    with gzip.open(path, "wt", compresslevel=6) as f:
        f.write('<?xml version="1.0" encoding="utf-8"?>\n<PubmedArticleSet>\n')
        f.writelines(f"{citation}\n" for citation in found)
        f.write("</PubmedArticleSet>\n")


def usage(*args):
    """(CPU seconds, peak resident MiB) of a command in a process of its own."""
    code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
            "r = resource.getrusage(resource.RUSAGE_CHILDREN);"
            "print(r.ru_utime + r.ru_stime, r.ru_maxrss)")
    *_, seconds, kib = subprocess.check_output(
        [sys.executable, "-c", code, sys.executable, *map(str, args)], cwd=ROOT, text=True).split()
    return float(seconds), int(kib) / 1024


def usage_of_extract(source, out, workers=1):
    """The same of `data.py extract`, from the start."""
    shutil.rmtree(out, ignore_errors=True)
    return usage("data.py", "extract", source, "--out", out, "--workers", workers)


ITERPARSE = """import gzip, sys, xml.etree.ElementTree as ET
context = ET.iterparse(gzip.open(sys.argv[1]), ("start", "end"))
_, root = next(context)
for event, e in context:
    if event == "end" and e.tag == "PubmedArticle":
        root.clear()"""


def measure_extract(folder, n):
    """CPU MB/s beside the XML parser's own, and peak memory. Returns (MB/s, MB of XML)."""
    large = folder / "large.xml.gz"
    small = folder / "small.xml.gz"
    write_citations(large, citations(n))
    write_citations(small, citations(n // 10))
    with gzip.open(large) as f:
        xml_mb = f.seek(0, os.SEEK_END) / 1e6
    _, small_peak = usage_of_extract(small, folder / "text")
    variants = {"alone": partial(usage, "-c", ITERPARSE, large),
                "ours": partial(usage_of_extract, large, folder / "text")}
    (alone, _), (ours, peak) = interleave(variants, 2, lambda fn: fn()).values()
    rate = xml_mb / ours
    show({"what": "extract", "citations": n, "MB_per_s": rate,
          "gunzip + iterparse alone": xml_mb / alone, "peak_MiB": peak,
          f"peak_MiB at {n // 10}": small_peak})
    return rate, xml_mb


def measure_tokenize(folder):
    """MB/s of that text on 1 and 2 workers, all included. Returns (MB/s of one, MB of text)."""
    tokenizer = folder / "tokenizer"
    train_flags = f"--input {folder}/text --vocab_size 8192 --out {tokenizer}"
    usage("tokenizer.py", "train", *train_flags.split())
    text_mb = sum(len(text.encode()) for _, text in read_documents(folder / "text")) / 1e6

    def tokenize(workers):
        flags = (f"--text {folder}/text --tokenizer {tokenizer} --out {folder}/arrays{workers} "
                 f"--workers {workers}")
        usage("data.py", "tokenize", *flags.split())

    seconds = interleave({workers: partial(tokenize, workers) for workers in (1, 2)}, 2)
    rate = text_mb / seconds[1]
    show({"what": "tokenize", "MB_per_s": rate, "with 2 workers": text_mb / seconds[2]})
    return rate, text_mb


def measure_loader(arrays):
    """Million tokens a second of one process, batches of 8 x 1024."""
    batches = data.train_batches(arrays, 1024, 8, seed=0)
    next(batches)
    seconds = timeit.timeit(lambda: next(batches), number=5000)
    show({"what": "loader", "M_tokens_per_s": 5000 * 8 * 1024 / seconds / 1e6})


def measure_small_files(folder, n):
    """Seconds to extract n files of a citation each, and the same text in 30, on 2 workers."""
    for name, size in ("many", 1), ("few", n // 30):
        (folder / name).mkdir()
        stream = citations(n)
        for i in range(n // size):
            write_citations(folder / name / f"{i}.xml.gz", islice(stream, size))
    extract = partial(usage_of_extract, out=folder / "text", workers=2)
    seconds = interleave({name: partial(extract, folder / name) for name in ("many", "few")}, 3)
    show({"what": "extract, 2 workers", f"{n} files, s": seconds["many"],
          "30 files, s": seconds["few"], "many over few": seconds["many"] / seconds["few"]})


# ---------------------------------------------------------------------------------------------
# finetune: a question's shared prefix once, against one option at a time


def bench_finetune(parser, rest):
    """Questions a second on MedQA dev: train step (forward, backward) and scoring, fp32."""
    parser.parse_args(rest)  # no flags
    questions = data.load_qa("medqa", SHARED / "qa/medqa", "dev")
    texts = [(q.id, f"{q.question} {' '.join(q.options)}") for q in questions]
    tokenizer = Tokenizer.from_merges(train_bpe(count_batch(texts), 8192))
    shared = finetune.encode_all(questions[:32], "medqa", tokenizer, {"length": 512})
    alone = [split_options(example) for example in shared]
    config = GPTConfig(n_layer=4, n_head=4, n_embd=256, dropout=0.0,
                       vocab_size=tokenizer.vocab_size)
    model = finetune.TaskModel(GPT(config), "choice")
    variants = {"shared prefix, by length": list(finetune.micro_batches(shared)),
                "one option at a time, padded": [alone[i : i + 4]
                                                 for i in range(0, len(alone), 4)]}

    def loss(chunk):
        return finetune.loss_sum(model, finetune.collate(chunk))

    def score(chunks):
        with torch.no_grad():
            return sum(map(loss, chunks))

    def step(chunks):
        for chunk in chunks:
            loss(chunk).backward()
        model.zero_grad()

    for what, run in ("scoring", score), ("train step", step):
        seconds = interleave({name: partial(run, chunks) for name, chunks in variants.items()}, 3)
        for name, chunks in variants.items():
            saved_mb = max(saved_bytes(partial(loss, chunk)) for chunk in chunks) / 1e6
            show({"what": what, "how": name, "saved_mb": saved_mb,
                  "questions_per_s": len(shared) / seconds[name]})


def split_options(example):
    """The same question, each option in a row of its own with the prefix before it."""
    rows = [finetune.Row(row.prefix, [suffix]) for row in example.rows for suffix in row.suffixes]
    return example._replace(rows=rows)


def saved_bytes(forward):
    """Bytes of the distinct tensors that autograd keeps for the backward of forward()."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward()
    del loss  # the graph lived: no address was used twice
    return sum(kept.values())


# ---------------------------------------------------------------------------------------------
# generate: one's own machine, the full shape in bf16, beside the floor and transformers

GENERATE_CHILD = """
import re, sys, time
start = time.perf_counter()
import torch
who, folder, n = sys.argv[1], sys.argv[2], 16
idx = torch.tensor([[1]])
if who == "ours":
    from model import GPT
    model = GPT.from_pretrained(folder, dtype=torch.bfloat16)
    run = lambda: model.generate(idx, n, temperature=0)
else:
    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    run = lambda: model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n,
                                 do_sample=False, pad_token_id=0)
print(time.perf_counter() - start, flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    assert run().shape == (1, 1 + n)
    seconds = time.perf_counter() - start
    status = open("/proc/self/status").read()  # ru_maxrss would be the parent's, at the fork
    print(seconds, int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024 / 1e9, flush=True)
"""


def bench_generate(parser, rest):
    """Greedy tokens a second for one prompt, against weights' bytes over the memory's read rate."""
    parser.add_argument("--shape", default="biomedlm",
                        help="preset of model.py (default: biomedlm)")
    parser.add_argument("--hf_python", help="a python that has transformers (default: ours alone)")
    args = parser.parse_args(rest)
    pythons = {"ours": sys.executable}
    if args.hf_python:
        pythons["hf"] = args.hf_python
    children, loads = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        n_bytes = random_folder(args.shape, folder)
        for who, python in pythons.items():  # one after the other: each load has the machine
            children[who] = subprocess.Popen(
                [python, "-c", GENERATE_CHILD, who, folder], cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            loads[who] = float(children[who].stdout.readline())
        for rounds in (1, 5):  # the first one touches the mapped file
            medians = interleave(children, rounds, ask)
        for child in children.values():
            child.communicate()
    floor = medians["ours"][2] / n_bytes
    show({"who": "floor", "tokens_per_s": floor, "weights_gb": n_bytes / 1e9,
          "read_gb_per_s": floor * n_bytes / 1e9})
    for who, (speed, peak_gb, _) in medians.items():
        show({"who": who, "load_s": loads[who], "peak_gb": peak_gb, "tokens_per_s": speed,
              "of_floor": speed / floor})


def ask(child):
    """(tokens a second, peak GB) of one answer of a child, and the memory's read rate now."""
    print("go", file=child.stdin, flush=True)
    seconds, peak_gb = map(float, child.stdout.readline().split())
    return 16 / seconds, peak_gb, read_rate()


def random_folder(shape, folder):
    """A Hugging Face GPT-2 folder of random bf16 weights; returns the bytes a token must read."""
    model = gpt_model.without_memory(GPTConfig.preset(shape)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.normal_(0.0, 0.02)
    model.save_pretrained(folder)
    wpe = model.transformer.wpe.weight.numel()  # one row of it is read; wte whole, as the head
    return 2 * (model.n_params() - wpe)


def read_rate():
    """Bytes a second that torch reads from memory, on all its threads."""
    block = torch.ones(2**27, dtype=torch.int64)
    return 2**30 / interleave({"sum": block.sum}, 5)["sum"]


# ---------------------------------------------------------------------------------------------
# the command line

PARTS = {"kernels": bench_kernels, "train": bench_train, "tokenizer": bench_tokenizer,
         "data": bench_data, "finetune": bench_finetune, "generate": bench_generate,
         "plan": bench_plan}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS, help="what to measure")
    parser.add_argument("--json", metavar="FILE", help="also write the rows here (default: none)")
    args, rest = parser.parse_known_args()
    PARTS[args.part](argparse.ArgumentParser(prog=f"bench.py {args.part}"), rest)
    if args.json:
        Path(args.json).write_text(json.dumps(ROWS, indent=1))


if __name__ == "__main__":
    main()
