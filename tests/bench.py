"""Measure, never assert.

    python tests/bench.py gpu --minutes 8 --out FILE     # a new GPU: proves and measures all it can
    python tests/bench.py cpu --out FILE                 # what we claim of a CPU, in some 5 minutes
    python tests/bench.py plan --gpus 8 --gb 80          # memory and hours by formula

The other parts are what these two are made of, and run alone too. Every comparison is interleaved
(A B A B ...) and reported as medians and ratios, since machines are shared and noisy. A ratio
"x_..." says how many times as fast ours is. Rows print as they come; --json (or --out) keeps them.
"""

import argparse
import gzip
import importlib.util
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from contextlib import suppress
from functools import partial
from itertools import groupby, product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared/data"  # real samples, beside the checkout
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import finetune  # noqa: E402
import model as gpt_model  # noqa: E402
import train  # noqa: E402
from eval import quantized  # noqa: E402
from model import GPT, GPTConfig, add_layer_norm, attention, bias_gelu, cross_entropy  # noqa: E402
from tokenizer import Tokenizer, count_batch, train_bpe  # noqa: E402

SECONDS = partial(timeit.timeit, number=1)
ROWS = []  # all that was shown
FILES = []  # --json's file, if there is one


def show(row):
    """Print a row as "key value  key value" and keep it, at once: a part may be stopped."""
    ROWS.append(row)
    print("  ".join(f"{key} {in_short(value)}" for key, value in row.items()), flush=True)
    for file in FILES:
        file.write_text(json.dumps(ROWS, indent=1))


def in_short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def interleave(variants, rounds, measure=SECONDS):
    """{name: medians of the figures, one or several, that measure(variant) returns}. The variants
    are measured in turns, so that drift hits all alike."""
    figures = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            figures[name].append(measure(variant))
    return {name: np.median(values, axis=0) for name, values in figures.items()}


# ---------------------------------------------------------------------------------------------
# gpu, cpu: many commands in order of worth, each with a time limit; tables for RESULTS.md

STEP = "tests/bench.py train --dropout 0.1 --shape"
GPU_PARTS = (  # seconds at most, command
    (30, "tests/bench.py products"),
    (100, "-m pytest -v -m gpu -k 'not nccl' tests"),
    (70, "-m pytest -v -m gpu -k nccl tests"),
    (110, f"{STEP} biomedlm --accumulation 16 --micro_batch 8 --rounds 3"),
    (140, f"{STEP} biomedlm --accumulation 16 --micro_batch 16 --rounds 2"),
    (40, f"{STEP} biomedlm --micro_batch 8 --profile"),
    (90, "tests/bench.py kernels"),
    (30, f"{STEP} biomedlm-125m --accumulation 4 --micro_batch 8"),
    (30, f"{STEP} biomedlm-125m --micro_batch 32"),
    (50, "tests/bench.py generate --prompts 1 16"),
    (80, "train.py --fresh --out out/demo-bench"))
CPU_PARTS = (
    (150, "tests/bench.py train --shape demo --rounds 20"),
    (400, "tests/bench.py tokenizer --megabytes 45"),
    (150, "tests/bench.py data"),
    (150, "tests/bench.py generate --n_layer 8"))


def bench_gpu(args):
    """All that needs a GPU: first what is right, then what is fast."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU on this machine: python tests/bench.py cpu")
    run_parts(GPU_PARTS, args.minutes)


def bench_cpu(args):
    """The ratios that README and RESULTS.md claim of a CPU."""
    run_parts(CPU_PARTS, args.minutes)


def run_parts(parts, minutes):
    """Run each part while there is time. One that fails or is too slow is told and passed over."""
    last = time.monotonic() + 60 * minutes
    show({"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
          "cpu": subprocess.getoutput("grep -m1 'model name' /proc/cpuinfo").split(": ")[-1],
          "load": os.getloadavg()[0],
          "python": platform.python_version(), "torch": torch.__version__,
          "triton": getattr(gpt_model.triton, "__version__", None),
          "commit": subprocess.getoutput(f"git -C {ROOT} describe --always --dirty"),
          "date": time.strftime("%Y-%m-%d")})
    for limit, command in parts:
        print(f"\n{command}", flush=True)
        begun = time.monotonic()
        limit = min(limit, last - begun)  # at 0 a part is stopped before it starts
        result = run_part(command, limit)
        seconds = time.monotonic() - begun
        if seconds > limit:
            result = f"stopped; {result}"
        show({"part": command, "result": result, "seconds": seconds})
    print_tables()


def print_tables():
    """All rows in Markdown, neighbours of the same keys in one table; where ours lost."""
    for keys, rows in groupby(ROWS, key=list):
        print("\n| " + " | ".join(keys) + " |\n|" + "---|" * len(keys))
        for row in rows:
            cells = [in_short(value) + (" (lost)" if key.startswith("x_") and value < 1 else "")
                     for key, value in row.items()]
            print("| " + " | ".join(cells) + " |")


def run_part(command, limit):
    """Run one part, show its lines as they come, add its rows to ours. Returns how it ended."""
    with tempfile.NamedTemporaryFile("r") as rows:
        flags = ["--json", rows.name] if "bench.py" in command else []
        child = subprocess.Popen([sys.executable, *shlex.split(command), *flags], cwd=ROOT,
                                 text=True, start_new_session=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        timer = threading.Timer(limit, end_group, [child])
        timer.start()
        told = ""
        try:
            for line in child.stdout:
                print(line, end="", flush=True)
                if re.search(r" in [\d.]+s|answers \d", line):  # of pytest, of the demo
                    told = line.strip()
            child.wait()
        finally:
            timer.cancel()
            end_group(child)  # what is left of it
        ROWS.extend(json.loads(rows.read() or "[]"))
    return told or f"exit code {child.returncode}"


def end_group(child):
    """End a part and what it has started. torchrun takes its ranks along if it is asked gently."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(child.pid, number)
            child.wait(5)


# ---------------------------------------------------------------------------------------------
# plan: what a run needs, without running it
#
# N parameters, of a block B = 12*C*C + 13*C, outside of blocks R = (V + T + 2)*C; C width,
# L layers, H heads, V vocabulary, T seq_len. A step on a GPU is n micro-batches of t tokens.
# S shards: FSDP cuts a weight among the GPUs of a node; with DDP S is 1.

MACHINES = (  # GPUs, 8 a node; name, GB of each; bytes/s of its memory by the datasheet
    (1, "H200", 141, 4.8e12),
    (8, "H100", 80, 3.35e12),
    (128, "H100", 80, 3.35e12),
    (128, "A100", 40, 1.555e12))
COPY_RATE = 5e9  # a guess: bytes/s at which the full state reaches rank 0's CPU; training waits


def bench_plan(args):
    """Parameters, FLOPs, memory and step time by part, and hours, each with its formula."""
    recipe = train.recipe(args.preset)
    config = GPTConfig.preset(args.preset)
    n_params = gpt_model.without_memory(config).n_params()
    flops = train.flops_per_token(config, n_params, recipe["seq_len"])
    stall = 12 * n_params / COPY_RATE
    share = stall / (60 * recipe["save_minutes"] + stall)
    show({"parameters N": n_params, "FLOPs a token = 6*N + 12*L*T*C": flops,
          "checkpoint, GB = 12*N": 12 * n_params / 1e9,
          "training waits for it, s": stall})
    C, L, V, r, t = config.n_embd, config.n_layer, config.vocab_size, 16, 4096
    lora = 24 * C * C * L + 12 * V * C + 256 * C * L * r + (6 * L + 60) * C * t
    show({f"fine-tuning with --lora {r}, {t} tokens at once, GB = 24*C*C*L + 12*V*C + 256*C*L*r + "
          "(6*L + 60)*C*t": lora / 1e9})
    hours = recipe["total_steps"] / (1 - share) / 3600  # of a step of one second
    for machine in [(args.gpus, "H100", args.gb, 3.35e12)] if args.gpus else MACHINES:
        plan_machine(args, config, n_params, recipe, machine, hours, flops)


def plan_machine(args, config, n_params, recipe, machine, hours, flops):
    """Print the fastest way that fits a machine, with its memory, step and hours."""
    gpus, name, gigabytes, bandwidth = machine
    title = f"{gpus} x {name}-{gigabytes:g}"
    ideal = flops * recipe["batch_tokens"] / gpus / train.PEAK_FLOPS[name]  # s a step at the peak
    sequences = recipe["batch_tokens"] // recipe["seq_len"] // gpus  # of a GPU, a step
    found = {}
    for parallel, recomputes, micro_batch in product(args.parallel, (False, True),
                                                     args.micro_batch or [4, 8, 16, 32]):
        fsdp = parallel == "fsdp"
        S = min(gpus, 8) if fsdp else 1
        t = micro_batch * recipe["seq_len"]
        n = sequences // micro_batch
        way = (config, n_params, fsdp, recomputes, S, n, t)
        memory = memory_parts(*way)
        seconds = step_parts(*way, ideal, bandwidth)
        # The rest is NCCL's, and what the allocator holds for later: more under FSDP.
        usable = (0.85e9 if fsdp else 0.92e9) * gigabytes
        divides = 0 < sequences == n * micro_batch
        if divides and sum(memory.values()) < usable:
            flags = (f"--parallel {parallel} --{'' if recomputes else 'no_'}"
                     f"activation_checkpointing --micro_batch {micro_batch}")
            found[sum(seconds.values())] = flags, memory, seconds
    if not found:
        return print(f"\n{title}: nothing fits: more GPUs or GB, or a smaller --micro_batch")
    step_s = min(found)
    flags, memory, seconds = found[step_s]
    print()
    for formula, size in memory.items():
        print(f"  {size / 1e9:7.2f} GB  {formula}")
    for formula, part in seconds.items():
        print(f"  {part:7.3f} s   {formula}")
    show({"machine": title, "flags": flags, "gb": sum(memory.values()) / 1e9, "step_s": step_s,
          "mfu": ideal / step_s, "hours": hours * step_s,
          # BioMedLM's own MFU; a fair guess; our aim on an H200
          **{f"hours at {mfu:.0%}": hours * ideal / mfu for mfu in (0.23, 0.40, 0.60)}})


def memory_parts(config, n_params, fsdp, recomputes, S, n, t):
    """{"part = formula": bytes} of one GPU in a block's backward, where it peaks (fused ops).

    A block saves, a token: the residual stream twice (8C in fp32), in bf16 two LayerNorm outputs
    (4C), qkv (6C), attention (2C), c_fc (8C) and its GELU (8C), and 4 statistics and H logsumexps.
    """
    C, L, V = config.n_embd, config.n_layer, config.vocab_size
    B = 12 * C * C + 13 * C
    activations = (36 * C + 4 * config.n_head + 16) * t  # of a block
    parts = {
        "weights and two moments in fp32 = 12*N / S": 12 * n_params / S,
        "gradients of the block at work = (36*C + 4*H + 16) * t": activations,
        "gradients of the embedding, hidden states = 4*V*C + 2*C*t": 4 * V * C + 2 * C * t}
    if recomputes:
        parts["inputs of L blocks, one block's inside = 6*C*L*t + (36*C + 4*H + 16) * t"] = \
            6 * C * L * t + activations
    else:
        parts["saved activations = (36*C + 4*H + 16) * L * t"] = activations * L
    if fsdp and n == 1:  # reduced block by block; else whole until the last micro-batch
        parts["gradients of two blocks = 8*B"] = 8 * B
    else:
        parts["gradients = 4*N"] = 4 * n_params
    if fsdp and recomputes:  # of the block at work and the next; and what is no block's
        parts["gathered weights, also in bf16 = 4*(R + 2*B) + 24*C*C"] = \
            4 * (n_params - (L - 2) * B) + 24 * C * C
    else:
        parts["blocks' weights in bf16 = 24*C*C*L"] = 24 * C * C * L
        parts["gathered weights, under FSDP = 4*N"] = 4 * n_params if fsdp else 0
    return parts


def step_parts(config, n_params, fsdp, recomputes, S, n, t, ideal, bandwidth):
    """{"part = formula": seconds} of a step on one GPU; ideal: its seconds at the peak FLOP/s.

    The numbers are from an H100's step of BioMedLM, taken apart: 264-271 ms a micro-batch of 8,192
    tokens. Another machine's are scaled by its datasheet. Traffic between GPUs runs beside backward
    and isn't counted.
    """
    runs = 4 / 3 if recomputes else 1  # a third forward, two backward
    casts = 1  # of all weights; under FSDP in each forward, since nothing whole lasts a step
    if fsdp:
        casts = (1 + recomputes) * n
    n_bytes = {
        "LayerNorm, GELU and the rest = 173*L*C bytes a token":
            runs * 173 * config.n_layer * config.n_embd * n * t,
        "gradients added = 8*N bytes a micro-batch": n * 8 * n_params,
        f"weights to bf16 = 6*N bytes, {casts} times": casts * 6 * n_params,
        "gradient norm and AdamW = 44*N / S bytes": 44 * n_params / S}
    seconds = {formula: size / bandwidth for formula, size in n_bytes.items()}
    return {"matrix products and attention = FLOPs / (67% of the peak)": runs * ideal / 0.67,
            **seconds}


# ---------------------------------------------------------------------------------------------
# kernels without a GPU: compile them for chips that are not here, read what they need

SHAPES = (2560, 20), (768, 12)  # width and heads of the large presets
# KB of shared memory that a program may take: CUDA's programming guide, "compute capabilities".
SHARED_KB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}


def recorded_launches(arch, C=2560, n_head=20):
    """Every kernel launch of a forward and backward through all ops in bf16, recorded, not run:
    [(kernel, {argument or option: value})]. So the table holds what really launches, as it does."""
    from triton.runtime.jit import JITFunction

    launches = []

    def record(kernel, *args, grid=None, warmup=False, **kwargs):
        launches.append((kernel, dict(zip(kernel.arg_names, args)) | kwargs))

    with (mock.patch.object(JITFunction, "run", record),
          mock.patch.multiple(gpt_model, runs_kernel=lambda x: True, gpu=lambda: arch,
                              compute_dtype=lambda x: x.dtype)):  # autocast knows no "meta"
        for p in 0.0, 0.1:
            for tensors, ours, *_ in kernel_cases(128, C, n_head, p, T=128, device="meta").values():
                outputs = tree_leaves(ours(*tensors))
                torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    return launches


def needs(kernel, arguments, target):
    """What one recorded launch needs on another machine's chip; a spilled register shows as stack.

    Triton compiles as it would before this launch, on a machine whose driver names that chip.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    driver = mock.Mock()
    driver.get_current_device.return_value = 0
    driver.get_current_target.return_value = GPUTarget("cuda", int(target[3:]), 32)
    kernel.device_caches.clear()  # they know the last target
    with mock.patch.object(triton.runtime.driver, "_active", driver):
        compiled = kernel.warmup(grid=(1,), **arguments)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        text = subprocess.check_output([tool, "--dump-resource-usage", f.name], text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"kernel": kernel.__name__, "target": target, "dropout": arguments.get("DROPOUT"),
            "registers": int(registers), "stack": int(stack),
            "shared_kb": compiled.metadata.shared / 1024,
            "wgmma": "wgmma.mma_async" in compiled.asm["ptx"]}


# ---------------------------------------------------------------------------------------------
# kernels on a GPU: the matrix products around them, then each op beside eager and torch.compile


def bench_products(args):
    """BioMedLM's matrix products, and does it pay to add dW in place? The device's copy rate."""
    for n_out, n_in in (7680, 2560), (2560, 2560), (10240, 2560), (2560, 10240), (28896, 2560):
        measure_products(n_out, n_in)
    a = torch.zeros(2**30, dtype=torch.bfloat16, device="cuda")
    ms = gpu_milliseconds({"copy": a.clone})["copy"]
    show({"copy_TB_per_s": 4 * len(a) / ms / 1e9})  # 2 bytes a number, read and written


def measure_products(n_out, n_in, N=8192):
    """Show one linear layer's, for the tokens of a micro-batch."""
    rand = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    x = rand(N, n_in)
    w = rand(n_out, n_in)
    dy = rand(N, n_out)
    total = torch.zeros(n_out, n_in, device="cuda")
    ms = gpu_milliseconds({
        "forward": lambda: F.linear(x, w),
        "dx": lambda: dy @ w,
        "dW bf16": lambda: dy.t() @ x,
        "dW fp32": lambda: gpt_model.add_product(None, dy.t(), x),
        "dW in place": lambda: gpt_model.add_product(total, dy.t(), x),
        "dW cast, added": lambda: total.add_((dy.t() @ x).float()),
        "db": lambda: dy.sum(0, dtype=torch.float32)})
    show({"out": n_out, "in": n_in, **ms, "TFLOP_per_s": 2e-9 * N * n_out * n_in / ms["forward"],
          "x_in_place": ms["dW cast, added"] / ms["dW in place"]})


def bench_kernels(args):
    """Each op against eager torch and torch.compile; without a GPU: what its kernels need."""
    if not torch.cuda.is_available():
        for target, (C, n_head) in product(SHARED_KB, SHAPES):
            for launch in recorded_launches(target, C, n_head):
                show({"C": C, **needs(*launch, target)})
        return
    torch._functorch.config.donated_buffer = False  # backward runs again and again on one graph
    for (C, n_head), p in product(SHAPES, (0.0, 0.1)):
        for op, case in kernel_cases(16384, C, n_head, p).items():
            time_op({"op": op, "C": C, "dropout": p}, *case)


def kernel_cases(rows, C, n_head, p, T=1024, device="cuda"):
    """{op: (tensors, ours, plain, {direction: bytes or FLOPs})} in bf16, as autocast gives them:
    parameters and residual stream fp32. Each input is counted once, each output once. Plain is
    what one would write in torch, to run under autocast."""
    V = 28896

    def rand(*shape, dtype=torch.bfloat16, std=1.0):
        return (std * torch.randn(shape, device=device)).to(dtype).requires_grad_()

    def plain_add_layer_norm(x, r, w, b):
        new = r + F.dropout(x, p)
        # autocast's norm is fp32; the cast that the next linear layer makes belongs to it
        return F.layer_norm(new, (C,), w, b).to(x.dtype), new

    fp32 = partial(rand, dtype=torch.float32)
    cases = {
        "add_layer_norm": (
            (rand(rows, C), fp32(rows, C), fp32(C), fp32(C)),
            lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-5, p, 1),
            plain_add_layer_norm,
            {"forward": (12 * C + 8) * rows, "backward": (16 * C + 8) * rows}),
        "attention": (
            (rand(rows // T, T, 3 * C),),
            lambda qkv: attention(qkv, n_head, (C // n_head) ** -0.5, p, 1),
            lambda qkv: plain_attention(qkv, n_head, p),
            {"forward": 2 * T * C * rows, "backward": 5 * T * C * rows})}
    if p == 0:  # these know no dropout
        cases["bias_gelu"] = (
            (rand(rows, 4 * C), fp32(4 * C)),
            bias_gelu,
            lambda x, b: F.gelu(x + b.to(x.dtype), approximate="tanh"),
            {"forward": 16 * C * rows, "backward": 24 * C * rows})
        cases["cross_entropy"] = (
            (rand(rows, C), fp32(V, C, std=0.02), torch.randint(V, (rows,), device=device)),
            cross_entropy,
            lambda h, w, t: F.cross_entropy(F.linear(h, w), t),  # bf16 product, fp32 loss
            {"both": 6 * rows * C * V})
    return cases


def time_op(where, tensors, ours, plain, work):
    """Show one op at one shape: milliseconds, bytes or FLOPs a second, ratios."""
    torch._dynamo.reset()
    variants = {"ours": ours, "eager": plain, "compile": torch.compile(plain)}
    ready = {name: directions(fn, tensors) for name, fn in variants.items()}
    for direction, amount in work.items():
        ms = gpu_milliseconds({name: fns[direction] for name, fns in ready.items()})
        show({**where, "direction": direction, **ms,
              "per_s": amount / ms["ours"] * 1e3, "x_eager": ms["eager"] / ms["ours"],
              "x_compile": ms["compile"] / ms["ours"]})


def directions(fn, tensors):
    """{direction: callable} for fn on these leaves as in training: forward under bf16 autocast and
    recorded for backward, the output gradients made once."""
    leaves = [t for t in tensors if t.requires_grad]

    def forward():
        with torch.autocast("cuda", torch.bfloat16):
            return tree_leaves(fn(*tensors))

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


# ---------------------------------------------------------------------------------------------
# train: a whole step of train.py beside a plain GPT's, on the same weights and optimiser


def bench_train(args):
    """tokens/s, MFU and peak memory of a full step, ours and plain in turns on the same weights."""
    torch.set_float32_matmul_precision("high")
    process = train.start_process()
    for dropout, micro_batch in product(args.dropout, args.micro_batch or [8]):
        measure_train(args, dropout, micro_batch, process)


def measure_train(args, dropout, micro_batch, process):
    """Show the median step of each variant."""
    settings = SimpleNamespace(**train.recipe(args.shape) | {
        "lr": 1e-5, "min_lr": 1e-5, "micro_batch": micro_batch, "accumulation": 1})
    config = GPTConfig.preset(args.shape, dropout=dropout)
    torch.manual_seed(0)
    with process.device:
        model = GPT(config)
    optimizer = train.make_optimizer(model, settings)
    x = torch.randint(config.vocab_size, (micro_batch, settings.seq_len),
                      device=process.device)
    # The blocks share one graph, so that compiling takes seconds.
    plain = [torch.compile(fn, dynamic=False) if x.is_cuda else fn
             for fn in (plain_block, plain_head)]
    train.speed_up(model, False, process)
    layers = train.linear_layers(model)
    in_place = layers[0].accumulates

    def ours(accumulates=in_place, cast_weights=train.cast_weights):
        for layer in layers:
            layer.accumulates = accumulates
        with mock.patch.object(train, "cast_weights", cast_weights):
            train.train_step(model, optimizer, iter(lambda: (x, x), None), 200, settings, process)

    variants = {"ours": ours}
    if not args.profile:
        variants["plain"] = lambda: plain_step(model, optimizer, x, settings, process, plain)
        if x.is_cuda:  # what only a GPU has
            variants["no gradients in place"] = partial(ours, False)
            variants["no lasting copies"] = partial(ours, cast_weights=lambda *_: None)
    measure = partial(timed_step, model)
    interleave(variants, 2, measure)  # compiles, fills the allocator's cache
    settings.accumulation = args.accumulation
    if args.profile:
        return profile(ours)
    medians = interleave(variants, args.rounds, measure)
    tokens = args.accumulation * x.numel()
    flops = tokens * train.flops_per_token(config, model.n_params(), settings.seq_len)
    peak = train.peak_flops(process.device)
    for name, (step_s, gb) in medians.items():
        show({"shape": args.shape, "micro_batch": micro_batch,
              "accumulation": args.accumulation, "dropout": dropout, "variant": name,
              "tokens_per_s": tokens / step_s, "mfu": flops / step_s / peak if peak else None,
              "gb": gb, "x_ours": step_s / medians["ours"][0]})


def timed_step(model, step):
    """(seconds, peak GB of the GPU) of one step. Copies of the step before aren't its memory."""
    for module in model.modules():
        module.working = None
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9


def profile(step):
    """Where one step's time goes: the longest kernels, and the GPU's pauses over 20 µs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    averages = sorted(profiler.key_averages(), key=lambda e: -e.device_time_total)
    for e in averages[:15]:
        show({"kernel": e.key[:60], "launches": e.count, "ms": e.device_time_total / 1e3})
    times = sorted((e.time_range.start, e.time_range.end) for e in profiler.events()
                   if e.device_type == torch.autograd.DeviceType.CUDA)
    # One stream: no kernel runs beside another.
    pauses = [start - end for (_, end), (start, _) in zip(times, times[1:]) if start - end > 20]
    show({"kernels": len(times), "pauses": len(pauses), "pauses_ms": sum(pauses) / 1e3})


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


def plain_step(model, optimizer, x, settings, process, compiled):
    """One step as nanoGPT takes it, on our model's parameters."""
    block, head = compiled
    t = model.transformer
    p = model.config.dropout
    for _ in range(settings.accumulation):
        with process.autocast():
            residual = F.dropout(t.wte(x) + t.wpe.weight[: x.size(1)], p)
            branch = None
            for layer in t.h:
                residual, branch = block(residual, branch, p, model.config.n_head,
                                         *layer.parameters())
            loss = head(residual, branch, x, p, t.ln_f.weight, t.ln_f.bias, t.wte.weight)
        (loss / settings.accumulation).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------
# the tokenizer: training and encoding beside Hugging Face's

START = """
import os, resource, sys, time
part, folder, threads = sys.argv[1:]
os.environ["RAYON_NUM_THREADS"] = threads
os.environ["TOKENIZERS_PARALLELISM"] = "true" if int(threads) > 1 else "false"
size = os.path.getsize(folder + "/all.txt")
if part == "encode":
    lines = open(folder + "/all.txt", newline="\\n", encoding="utf-8").readlines()
    lines = lines[:len(lines) // 5]
    texts = ["".join(lines[i:i + 40]) for i in range(0, len(lines), 40)]
    size = len("".join(lines).encode())
"""
HF = """
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
if part == "train":
    byte_level = pre_tokenizers.ByteLevel
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=28895, min_frequency=2, show_progress=False,
                                  initial_alphabet=byte_level.alphabet())
    start = time.perf_counter()
    tok.train([folder + "/all.txt"], trainer)
    end = time.perf_counter()
    tok.save(folder + "/hf.json")
else:
    tok = Tokenizer.from_file(folder + "/hf.json")
    start = time.perf_counter()
    rows = tok.encode_batch_fast(texts, add_special_tokens=False)
    end = time.perf_counter()
"""
OURS = """
from tokenizer import Tokenizer, count_pretokens, train_bpe
if part == "train":
    start = time.perf_counter()
    counts = count_pretokens([folder + "/all.txt"], workers=int(threads))
    merges = train_bpe(counts, 28896)
    end = time.perf_counter()
    Tokenizer.from_merges(merges).save(folder)
else:
    tok = Tokenizer.load(folder)
    start = time.perf_counter()
    rows = [tok.encode(text) for text in texts]
    end = time.perf_counter()
"""
END = """
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
peak += int(threads) * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(end - start, size / 1e6 / (end - start), peak / 1024)
"""


def bench_tokenizer(args):
    """Training 28,896 tokens and encoding, beside `tokenizers` if it is installed."""
    variants = {"ours": OURS}
    if importlib.util.find_spec("tokenizers"):
        variants["hf"] = HF
    else:
        print("ours alone; beside Hugging Face's after: pip install tokenizers")
    with tempfile.TemporaryDirectory() as folder:
        write_text(f"{folder}/all.txt", args.megabytes)
        for part, threads in ("train", 1), ("train", 2), ("encode", 1):
            medians = interleave(variants, 3, partial(run_child, part, folder, threads))
            for who, (seconds, mb_per_s, peak_mb) in medians.items():
                show({"part": part, "threads": threads, "who": who, "seconds": seconds,
                      "MB_per_s": mb_per_s, "peak_MB": peak_mb,
                      "x_ours": seconds / medians["ours"][0]})


def run_child(part, folder, threads, code):
    """(seconds, MB/s, peak MB) of one part in a process of its own."""
    command = [sys.executable, "-c", START + code + END, part, folder, str(threads)]
    return list(map(float, subprocess.check_output(command, cwd=ROOT, text=True).split()))


def write_text(path, megabytes):
    """Write so much of abstracts.jsonl.gz (title, newline, abstract) and pmc_fulltext.jsonl.gz."""
    with open(path, "w", newline="\n") as f:
        for name in ("abstracts.jsonl.gz", "pmc_fulltext.jsonl.gz"):
            with gzip.open(SHARED / name) as lines:
                for record in map(json.loads, lines):
                    text = (record["text"] if "text" in record else
                            f"{record['title']}\n{record['abstract']}")
                    f.write(text.removesuffix("\n") + "\n")
                    if f.tell() > megabytes * 1e6:
                        return


# ---------------------------------------------------------------------------------------------
# data: extraction, tokenizing, the loader


def bench_data(args):
    """MB/s of extraction, tokenizing with 1 and 2 workers, all included; the loader."""
    xml = [SHARED / "pubmed_xml", SHARED / "pmc_nxml"]
    xml_mb = sum(len(gzip.decompress(file.read_bytes()))
                 for folder in xml for file in folder.glob("*.gz")) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        write_text(f"{folder}/all.txt", 60)
        seconds = SECONDS(lambda: run("data.py extract --workers 1 --out", f"{folder}/text", *xml))
        show({"part": "extract", "MB": xml_mb, "MB_per_s": xml_mb / seconds})
        run("tokenizer.py train --vocab_size 8192 --input", f"{folder}/text", "--out", folder)
        command = f"data.py tokenize --text {folder}/all.txt --tokenizer {folder} --workers"
        seconds = interleave({n: partial(run, command, n, "--out", f"{folder}/arrays")
                              for n in (1, 2)}, 3)
        show({"part": "tokenize", "MB_per_s": 60 / seconds[1],
              "x_second_worker": seconds[1] / seconds[2]})
        batches = data.train_batches(f"{folder}/arrays", 1024, 8, seed=0)
        next(batches)
        seconds = timeit.timeit(lambda: next(batches), number=2000)
    show({"part": "loader", "M_tokens_per_s": 2000 * 8 * 1024 / seconds / 1e6})


def run(command, *more):
    """Run a command of the repository, silently."""
    subprocess.run([sys.executable, *command.split(), *map(str, more)], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)


# ---------------------------------------------------------------------------------------------
# finetune: a question's shared prefix once, against one option at a time


def bench_finetune(args):
    """Questions a second on MedQA dev, forward and backward, fp32."""
    questions = data.load_qa("medqa", SHARED / "qa/medqa", "dev")
    text = "\n".join(f"{q.question} {' '.join(q.options)}" for q in questions)
    tokenizer = Tokenizer.from_merges(train_bpe(count_batch(text), 8192))
    shared = finetune.encode_all(questions[:32], "medqa", tokenizer, {"length": 512})
    # the same questions, each option in a row of its own with the prefix before it
    alone = [e._replace(rows=[finetune.Row(row.prefix, [suffix])
                              for row in e.rows for suffix in row.suffixes]) for e in shared]
    config = GPTConfig(n_layer=4, n_head=4, n_embd=256, dropout=0.0,
                       vocab_size=tokenizer.vocab_size)
    model = finetune.TaskModel(GPT(config), "choice")
    ways = {"shared": list(finetune.micro_batches(shared)),  # of like length
            "alone": [alone[i : i + 4] for i in range(0, len(alone), 4)]}  # padded

    def step(chunks):
        for chunk in chunks:
            nats, _ = model(finetune.collate(chunk))
            nats.backward()

    seconds = interleave({how: partial(step, chunks) for how, chunks in ways.items()}, 3)
    show({"part": "finetune", "questions_per_s": len(shared) / seconds["shared"],
          "x_one_by_one": seconds["alone"] / seconds["shared"]})


# ---------------------------------------------------------------------------------------------
# generate: one's own machine, bf16 and int8, beside the floor and transformers


def bench_generate(args):
    """Greedy tokens a second of random weights, against their bytes over the memory's read rate."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = random_model(args.n_layer, device)
    models = {"bf16": bf16, "int8": quantized(random_model(args.n_layer, device))}
    n_read = bf16.n_params() - bf16.transformer.wpe.weight.numel()  # wte whole, as the head
    block = torch.ones(2**27, dtype=torch.int64, device=device)  # 2**30 bytes
    for prompts in args.prompts:
        idx = torch.ones(prompts, 1, dtype=torch.int64, device=device)
        variants = {name: partial(model.generate, idx, 16, temperature=0)
                    for name, model in models.items()}
        if device == "cuda":
            variants["bf16, cuDNN"] = partial(with_cudnn, variants["bf16"])
        variants["read"] = lambda: block.sum().item()
        seconds = interleave(variants, 7)
        gib_s = seconds.pop("read")
        for name, all_s in seconds.items():
            floor_s = n_read * (1 if name == "int8" else 2) / 2**30 * gib_s  # of one token
            show({"weights": name, "prompts": prompts, "tokens_per_s": 16 * prompts / all_s,
                  "of_floor": 16 * floor_s / all_s})


def with_cudnn(generate):
    """The model turns cuDNN's attention off, which plans anew for each length. Keep it on."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    with mock.patch("torch.backends.cuda.enable_cudnn_sdp"):
        generate()


def random_model(n_layer, device):
    """BioMedLM's shape in bf16."""
    model = gpt_model.without_memory(GPTConfig(n_layer=n_layer)).to(torch.bfloat16)
    for weight in model.to_empty(device=device).parameters():
        weight.data.copy_(torch.randn(weight.size(-1)) / 50)  # the same row again: 2.59B take long
    return model.eval()


# ---------------------------------------------------------------------------------------------
# the command line

PARTS = {"gpu": bench_gpu, "cpu": bench_cpu, "plan": bench_plan, "products": bench_products,
         "train": bench_train, "kernels": bench_kernels,
         "generate": bench_generate, "tokenizer": bench_tokenizer,
         "data": bench_data, "finetune": bench_finetune}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", nargs="?", choices=PARTS, default="plan", help="what to measure (default: plan)")
    add("--json", "--out", type=Path, metavar="FILE",
        help="also write the rows here, as they come (default: none)")
    add("--minutes", type=float, default=12, help="gpu, cpu: of all parts (default: 12)")
    add("--preset", default="biomedlm", choices=gpt_model.PRESETS,
        help="plan: shape and recipe (default: biomedlm)")
    add("--micro_batch", type=int, nargs="+", help="sequences a forward pass; plan: the best of "
        "these (default: 4 8 16 32), train: each of these (default: 8)")
    add("--parallel", choices=("ddp", "fsdp"), nargs="+", default=["ddp", "fsdp"],
        help="plan: replicate or shard, the better of these (default: ddp fsdp)")
    add("--gpus", type=int,
        help="plan: of your machine, as fast as H100s (default: README's machines)")
    add("--gb", type=float, default=80, help="plan: memory of each of --gpus, in GB (default: 80)")
    add("--shape", default="demo", choices=gpt_model.PRESETS,
        help="train: preset of train.py (default: demo)")
    add("--dropout", type=float, nargs="+", default=[0.0, 0.1],
        help="train: rates to measure (default: 0 0.1)")
    add("--accumulation", type=int, default=1,
        help="train: micro-batches a step (default: 1; a real run has 16 or more)")
    add("--rounds", type=int, default=20, help="train: steps of each variant (default: 20)")
    add("--profile", action="store_true",
        help="train: instead, what one step of ours does on a GPU (default: off)")
    add("--megabytes", type=float, default=90,
        help="tokenizer: of text to train on (default: 90, all)")
    add("--n_layer", type=int, default=32, help="generate: of BioMedLM's shape (default: 32)")
    add("--prompts", type=int, nargs="+", default=[1], help="generate: at once (default: 1)")
    args = parser.parse_args()
    if args.json:
        FILES.append(args.json)
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
