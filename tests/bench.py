"""Measure, never assert.

    python tests/bench.py {kernels,train,tokenizer,data,finetune,generate} [--json FILE]

Every comparison is interleaved in one process (A B A B ...) and reported as medians and ratios,
since machines are shared and noisy. Rows print as they come; --json also writes them to FILE.
"""

import argparse
import gc
import gzip
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def interleave(variants, rounds):
    """Median seconds of each named callable, run in turns so that drift hits all alike."""
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, fn in variants.items():
            start = time.perf_counter()
            fn()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


# ---------------------------------------------------------------------------------------------
# kernels: static figures without a GPU (--static), times on one, and launch settings (--tune)

HBM_BYTES_PER_S = 4.3e12  # an H200's measured device copy, read + written
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
# Compulsory bytes a row under autocast (bf16 activations, fp32 residual stream), from width C,
# H heads and V vocabulary; each input counted once, each output once
ROW_BYTES = {
    "norm_forward_kernel": lambda C, H, V: 2 * C + 4 * C + 4 * C + 2 * C + 8,
    "norm_backward_kernel": lambda C, H, V: 2 * C + 4 * C + 4 * C + 2 * C + 4 * C + 8,
    "gelu_forward_kernel": lambda C, H, V: 4 * C * 2 * 2,
    "gelu_backward_kernel": lambda C, H, V: 4 * C * 2 * 3,
    "attention_forward_kernel": lambda C, H, V: 6 * C + 2 * C + 4 * H,
    "attention_dkv_kernel": lambda C, H, V: 6 * C + 2 * C + 4 * C + 8 * H,
    "attention_dq_kernel": lambda C, H, V: 6 * C + 4 * C + 2 * C + 8 * H,
    "cross_entropy_kernel": lambda C, H, V: 2 * V + 2 * V + 12,
}


def recorded_launches(arch, C=2560, n_head=20, V=28896, dropout_p=0.1):
    """Every kernel launch of a forward and backward through all ops in bf16, recorded, not run:
    [(kernel, {argument: value}, options)]. So the table holds what really launches, as it does."""
    import torch
    from triton.runtime.jit import JITFunction

    import model
    launches, saved = [], (JITFunction.run, model.fused, model.gpu)

    def record(kernel, *args, grid=None, warmup=False, **kwargs):
        options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages") if key in kwargs}
        launches.append((kernel, {**dict(zip(kernel.arg_names, args)), **kwargs}, options))

    def parameter(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    JITFunction.run, model.fused, model.gpu = record, lambda x: True, lambda: arch
    try:
        x, bf16 = parameter(16, C, dtype=torch.bfloat16), torch.bfloat16
        w, b = parameter(C), parameter(C)
        outputs = [*model.add_layer_norm(x, parameter(16, C), w, b, 1e-5, dropout_p, 1),
                   model.layer_norm(x, w, b),
                   model.bias_gelu(parameter(16, 4 * C, dtype=bf16), parameter(4 * C))]
        for p in sorted({0.0, dropout_p}):
            qkv = parameter(1, 1024, 3 * C, dtype=bf16)
            outputs.append(model.attention(qkv, n_head, 0.1, p, 1))
        targets = torch.zeros(16, dtype=torch.int64)
        outputs.append(model.cross_entropy(x, parameter(V, C, dtype=bf16), targets))
        torch.autograd.backward(outputs, [torch.zeros_like(o) for o in outputs])
    finally:
        JITFunction.run, model.fused, model.gpu = saved
    return launches


def cross_compile(kernel, arguments, options, target):
    """Compile one recorded launch for another machine's chip; returns triton's CompiledKernel."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params)):
        value = arguments[name]
        if parameter.is_constexpr:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = types[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def resources(compiled):
    """(registers, stack bytes) of a compiled CUDA kernel; a spilled register shows as stack."""
    import tempfile

    import triton
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        text = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True,
                              text=True, check=True).stdout
    return tuple(int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "STACK"))


def static_table(C=2560, n_head=20, V=28896):
    """Registers, spills, shared memory of every kernel and target; the floor its bytes imply."""
    rows, seen = [], set()
    print(f"{'kernel':<26}{'target':>8}{'dropout':>8}{'warps':>6}{'regs':>6}{'stack':>6}"
          f"{'shared KB':>10}{'wgmma':>6}{'bytes/row':>10}{'floor ns/row':>13}")
    for target in TARGETS:
        for kernel, arguments, options in recorded_launches(target, C, n_head, V):
            key = (target, kernel.__name__, arguments.get("DROPOUT"))
            if key in seen or arguments.get("ADD") is False:
                continue
            seen.add(key)
            compiled = cross_compile(kernel, arguments, options, target)
            registers, stack = resources(compiled) if "cubin" in compiled.asm else (None, None)
            n_bytes = ROW_BYTES[kernel.__name__](C, n_head, V)
            row = {"kernel": kernel.__name__, "target": target,
                   "dropout": bool(arguments.get("DROPOUT")),
                   "warps": compiled.metadata.num_warps, "registers": registers, "stack": stack,
                   "shared_kb": compiled.metadata.shared / 1024, "bytes_per_row": n_bytes,
                   "wgmma": "wgmma.mma_async" in compiled.asm.get("ptx", ""),
                   "floor_ns_per_row": n_bytes / HBM_BYTES_PER_S * 1e9}
            rows.append(row)
            print(f"{row['kernel']:<26}{target:>8}{row['dropout']!s:>8}{row['warps']:>6}"
                  f"{registers!s:>6}{stack!s:>6}{row['shared_kb']:>10.1f}{row['wgmma']!s:>6}"
                  f"{n_bytes:>10}{row['floor_ns_per_row']:>13.2f}", flush=True)
    return rows


def gpu_milliseconds(variants, rounds=9, reps=4):
    """Median device milliseconds of each named callable, in turns. A sleeping kernel goes first,
    for longer than Python needs to queue the launches behind it, so that Python's own time stays
    out of the figure. A variant that fails is printed and left out."""
    import torch
    times, alive, cycles = {name: [] for name in variants}, dict(variants), {}
    for name, fn in variants.items():
        try:
            for _ in range(3):
                fn()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(reps):
                fn()
            cycles[name] = int(4e6 + 2 * 2e9 * (time.perf_counter() - start))  # at 2 GHz, twice
            torch.cuda.synchronize()
        except Exception as e:  # a setting that does not fit this chip must not end the sweep
            print(f"  {name}: {type(e).__name__} {(str(e) or '-').splitlines()[0][:90]}",
                  flush=True)
            del alive[name], times[name]
    for _ in range(rounds):
        for name, fn in alive.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles[name])
            begin.record()
            for _ in range(reps):
                fn()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) / reps)
    return {name: statistics.median(values) for name, values in times.items()}


def measured_ceilings():
    """(copy bytes/s counting read + written, bf16 matrix FLOP/s) of this device, now."""
    import torch
    a = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    b, other = torch.randn(8192, 8192).cuda().bfloat16(), torch.empty_like(a)
    times = gpu_milliseconds({"copy": lambda: other.copy_(a), "matmul": lambda: b @ b})
    copy, matmul = 2 * 2 * 2**30 / times["copy"] * 1e3, 2 * 8192**3 / times["matmul"] * 1e3
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s, "
          f"bf16 matmul {matmul / 1e12:.0f} TFLOP/s")
    return copy, matmul


def plain_ops(p, n_head):
    """The ops as one would write them in plain torch, to run under autocast: {name: function}."""
    import torch.nn.functional as F

    import model

    def add_layer_norm(x, r, w, b):
        new = r + F.dropout(x, p)
        # autocast's norm is fp32; the cast that the next linear layer makes belongs to it
        return F.layer_norm(new, (x.shape[-1],), w, b).to(x.dtype), new

    def bias_gelu(x, b):
        return F.gelu(x + b.to(x.dtype), approximate="tanh")

    def cross_entropy(h, w, t):
        return F.cross_entropy(F.linear(h, w), t)  # bf16 product, fp32 loss

    def attention(qkv):
        q, k, v = model.split_heads(qkv, n_head)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        return o.transpose(1, 2).flatten(2)

    return {"add_layer_norm": add_layer_norm, "bias_gelu": bias_gelu, "attention": attention,
            "cross_entropy": cross_entropy}


def kernel_cases(rows, C, n_head, p, V=28896):
    """{op: (tensors, ours, {direction: (bytes, FLOPs)})} in bf16, parameters and residual fp32."""
    import torch

    import model

    def rand(*shape, dtype=torch.float32):
        return torch.randn(shape, device="cuda").to(dtype).requires_grad_()

    bf16, T = torch.bfloat16, 1024
    moved = {name: rows * fn(C, n_head, V) for name, fn in ROW_BYTES.items()}
    scale = (C // n_head) ** -0.5
    return {
        "add_layer_norm": ((rand(rows, C, dtype=bf16), rand(rows, C), rand(C), rand(C)),
                           lambda x, r, w, b: model.add_layer_norm(x, r, w, b, 1e-5, p, 1),
                           {"forward": (moved["norm_forward_kernel"], 0),
                            "backward": (moved["norm_backward_kernel"], 0)}),
        "bias_gelu": ((rand(rows, 4 * C, dtype=bf16), rand(4 * C)), model.bias_gelu,
                      {"forward": (moved["gelu_forward_kernel"], 0),
                       "backward": (moved["gelu_backward_kernel"], 0)}),
        "attention": ((rand(rows // T, T, 3 * C, dtype=bf16),),
                      lambda qkv: model.attention(qkv, n_head, scale, p, 1),
                      {"forward": (0, 2 * T * C * rows), "backward": (0, 5 * T * C * rows)}),
        "cross_entropy": ((rand(rows, C, dtype=bf16), (rand(V, C) / 50).detach().requires_grad_(),
                           torch.randint(0, V, (rows,), device="cuda")), model.cross_entropy,
                          {"both": (0, 6 * rows * C * V)}),
    }


def directions(fn, tensors):
    """{direction: callable} for fn on these leaves as in training: forward under bf16 autocast and
    recorded for backward, the output gradients made once."""
    import torch
    leaves = [t for t in tensors if t.requires_grad]

    def forward():
        with torch.autocast("cuda", torch.bfloat16):
            out = fn(*tensors)
        return out if isinstance(out, tuple) else (out,)

    outputs = forward()
    grads = [torch.randn_like(o) for o in outputs]
    return {"forward": forward, "both": lambda: torch.autograd.grad(forward(), leaves, grads),
            "backward": lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)}


def time_kernels(quick):
    """Every op and direction: ours against eager torch and torch.compile; one row a shape."""
    import torch

    torch._functorch.config.donated_buffer = False  # backward runs again and again on one graph
    copy, matmul = measured_ceilings()
    rows_out = []
    print(f"{'op':<16}{'C':>5}{'rows':>7}{'drop':>5} {'direction':<9}{'ms':>8}{'rate':>13}"
          f"{'% of peak':>10}{'x eager':>8}{'x compile':>10}  all (ms)")
    for C, n_head in ((2560, 20), (768, 12)):
        for rows in (16384,) if quick else (8192, 16384, 65536):
            for p in (0.0, 0.1):
                for op, (tensors, ours, work) in kernel_cases(rows, C, n_head, p).items():
                    if p and op in ("bias_gelu", "cross_entropy"):
                        continue
                    torch._dynamo.reset()
                    plain = plain_ops(p, n_head)[op]
                    variants = {"ours": ours, "eager": plain, "compile": torch.compile(plain)}
                    if op == "attention":
                        variants |= attention_variants(plain)
                    rows_out += time_op(op, C, rows, p, variants, tensors, work, (copy, matmul))
    return rows_out


def attention_variants(plain):
    """Attention through torch's own backends: cuDNN and FlashAttention-2."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def through(backend):
        def fn(qkv):
            with sdpa_kernel(backend):
                return plain(qkv)
        return fn

    return {"sdpa cudnn": through(SDPBackend.CUDNN_ATTENTION),
            "flash2": through(SDPBackend.FLASH_ATTENTION)}


def time_op(op, C, rows, p, variants, tensors, work, ceilings):
    """Rows of one op at one shape, printed as they come."""
    ready, out = {}, []
    for name, fn in variants.items():
        try:
            ready[name] = directions(fn, tensors)
        except Exception as e:  # a backend that refuses this shape
            print(f"  {op} {name}: {type(e).__name__} {str(e).splitlines()[0][:90]}", flush=True)
    for direction, (n_bytes, flops) in work.items():
        times = gpu_milliseconds({name: fns[direction] for name, fns in ready.items()})
        if "ours" not in times:
            continue
        rate = (n_bytes or flops) / times["ours"] * 1e3
        share = rate / ceilings[0 if n_bytes else 1]
        row = {"op": op, "C": C, "rows": rows, "dropout": p, "direction": direction, "ms": times,
               "rate": rate, "share_of_peak": share}
        out.append(row)
        ratios = [f"{times.get(name, float('nan')) / times['ours']:.2f}"
                  for name in ("eager", "compile")]
        unit = f"{rate / 1e9:.0f} GB/s" if n_bytes else f"{rate / 1e12:.0f} TFLOP/s"
        print(f"{op:<16}{C:>5}{rows:>7}{p:>5} {direction:<9}{times['ours']:>8.3f}{unit:>13}"
              f"{share:>10.1%}{ratios[0]:>8}{ratios[1]:>10}  "
              + " ".join(f"{name} {ms:.3f}" for name, ms in times.items()), flush=True)
    return out


def sweep(title, fn, settings, apply):
    """Time fn under every setting (apply(setting) puts it in force); prints all, best first."""
    def under(setting):
        def call():
            apply(setting)
            return fn()
        return call

    times = gpu_milliseconds({str(setting): under(setting) for setting in settings}, rounds=5)
    best = sorted(times.items(), key=lambda item: item[1])
    print(f"{title}: " + "; ".join(f"{name} {ms:.3f}" for name, ms in best), flush=True)
    return {"sweep": title, "ms": dict(best)}


def tune_kernels(rows=16384):
    """Sweep the launch settings at both widths; what wins goes into model.LAUNCH by hand."""
    import torch

    import model
    copy, _ = measured_ceilings()
    out, norm, loss = [], model.LAUNCH["norm"], model.LAUNCH["cross_entropy"]
    for C, n_head in ((2560, 20), (768, 12)):
        pieces = {2560: [(512, 5), (1024, 3), (4096, 1)], 768: [(256, 3), (128, 6), (1024, 1)]}[C]
        for p in (0.0, 0.1):
            cases = kernel_cases(rows, C, n_head, p)
            run = {op: directions(ours, tensors) for op, (tensors, ours, _) in cases.items()
                   if op != "cross_entropy"}

            def norm_launch(setting, C=C):
                model.norm_launch = lambda _: (*setting[0], setting[1])
                norm["columns_per_sm"] = setting[2] * C

            saved = model.norm_launch, dict(norm)
            out.append(sweep(f"norm forward C={C} p={p} (piece, warps, -)",
                             run["add_layer_norm"]["forward"],
                             [(piece, w, 4) for piece in pieces for w in (1, 2, 4, 8)
                              if p == 0 or w in (2, 4)], norm_launch))
            out.append(sweep(f"norm backward C={C} p={p} (piece, warps, programs/SM)",
                             run["add_layer_norm"]["backward"],
                             [(piece, w, n) for piece in pieces[:2] for w in (2, 4, 8)
                              for n in (2, 3, 4, 8) if p == 0 or (w == 4 and piece == pieces[0])],
                             norm_launch))
            model.norm_launch = saved[0]
            norm.update(saved[1])
            if p == 0:
                out += tune_gelu(C, run["bias_gelu"])
            out += tune_attention(C, n_head, p, cases["attention"][0][0])
            del cases, run
            torch.cuda.empty_cache()
    z = torch.randn(8192, 28896, device="cuda").bfloat16()
    targets = torch.randint(0, 28896, (8192,), device="cuda")
    losses = torch.empty(8192, device="cuda")
    count = torch.full((), 8192, device="cuda")
    saved = dict(loss)

    def softmax_kernel():
        model.cross_entropy_kernel[(8192,)](z, targets, losses, count, -100, 28896, loss["block"],
                                            True, num_warps=loss["warps"])

    settings = [(b, w) for b in (2048, 4096, 8192, 16384) for w in (4, 8, 16)
                if 256 <= b // w <= 2048]
    out.append(sweep("cross-entropy kernel, 8192 rows (block, warps); floor "
                     f"{8192 * 28896 * 4 / copy * 1e3:.3f} ms", softmax_kernel, settings,
                     lambda setting: loss.update(block=setting[0], warps=setting[1])))
    loss.update(saved)
    tensors, ours, _ = kernel_cases(rows, 2560, 20, 0.0)["cross_entropy"]
    out.append(sweep("cross-entropy whole (chunk rows)", directions(ours, tensors)["both"],
                     [2048, 4096, 8192, 16384], lambda setting: loss.update(chunk_rows=setting)))
    loss.update(saved)
    return out


def tune_gelu(C, run):
    """The two GELU kernels' tiles."""
    import model
    forward, backward = model.LAUNCH["gelu"], model.LAUNCH["gelu_backward"]
    saved, tiles = (dict(forward), dict(backward)), [(1, 1024, 4), (2, 1024, 4), (4, 1024, 4),
                                                     (8, 1024, 8), (4, 512, 4), (8, 512, 4)]
    out = [sweep(f"gelu forward C={4 * C} (rows, cols, warps)", run["forward"], tiles,
                 lambda s: forward.update(rows=s[0], cols=s[1], warps=s[2])),
           sweep(f"gelu backward C={4 * C} (rows, cols, warps, programs/SM)", run["backward"],
                 [(*tile, n) for tile in ((4, 512, 4), (8, 512, 8), (2, 512, 4), (4, 256, 4),
                                          (8, 256, 4), (2, 1024, 4)) for n in (4, 8, 16)],
                 lambda s: backward.update(rows=s[0], cols=s[1], warps=s[2], programs_per_sm=s[3]))]
    forward.update(saved[0])
    backward.update(saved[1])
    return out


def tune_attention(C, n_head, p, qkv):
    """The three attention kernels' tiles (BM, BN, warps, stages)."""
    import torch

    import model
    scale, launch = (C // n_head) ** -0.5, model.LAUNCH[model.gpu()]
    o, lse = model.attention_forward(qkv, n_head, scale, p, 1)
    do, saved, out = torch.randn_like(o), dict(launch), []
    runs = {"forward": lambda: model.attention_forward(qkv, n_head, scale, p, 1)}
    backward = lambda: model.attention_backward(do, qkv, o, lse, n_head, scale, p, 1)
    runs["dkv"] = runs["dq"] = backward
    settings = {
        "forward": [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3),
                    (64, 128, 4, 2)],
        "dkv": [(32, 128, 8, 2), (32, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (64, 64, 4, 2)],
        "dq": [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (128, 32, 8, 3)]}
    for kernel, choices in settings.items():
        key = kernel + "_dropout" if p and kernel + "_dropout" in launch else kernel
        timed = kernel if kernel == "forward" else f"{kernel}, timing the whole backward,"
        out.append(sweep(f"attention {timed} C={C} p={p} (BM, BN, warps, stages)", runs[kernel],
                         choices, lambda setting, key=key: launch.update({key: setting})))
        launch.update(saved)
    return out


def bench_kernels(rest):
    """Each op against eager torch and torch.compile, on a GPU; --static needs none."""
    parser = argparse.ArgumentParser(prog="bench.py kernels")
    parser.add_argument("--static", action="store_true",
                        help="cross-compile and print resources (default: off)")
    parser.add_argument("--quick", action="store_true",
                        help="16k rows only (default: 8k, 16k and 64k)")
    parser.add_argument("--tune", action="store_true", help="sweep launch settings (default: off)")
    args = parser.parse_args(rest)
    if args.static:
        return static_table()
    import torch
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here: run `python tests/bench.py kernels --static`")
    return tune_kernels() if args.tune else time_kernels(args.quick)


# ---------------------------------------------------------------------------------------------
# train: a whole step of train.py beside a plain GPT's, on the same weights and optimiser


def plain_block(residual, branch, dropout, n_head, ln_1w, ln_1b, qkv_w, qkv_b, proj_w, proj_b,
                ln_2w, ln_2b, fc_w, fc_b, out_w, out_b):
    """nanoGPT's block from torch's own ops; cut where ours is, so that compile fuses as much."""
    import torch.nn.functional as F

    if branch is not None:
        residual = residual + F.dropout(branch, dropout)
    B, T, C = residual.shape
    x = F.layer_norm(residual, (C,), ln_1w, ln_1b)
    q, k, v = F.linear(x, qkv_w, qkv_b).split(C, dim=2)
    q, k, v = (t.view(B, T, n_head, C // n_head).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    y = F.linear(y.transpose(1, 2).reshape(B, T, C), proj_w, proj_b)
    residual = residual + F.dropout(y, dropout)
    x = F.layer_norm(residual, (C,), ln_2w, ln_2b)
    x = F.gelu(F.linear(x, fc_w, fc_b), approximate="tanh")
    return residual, F.linear(x, out_w, out_b)


def plain_head(residual, branch, targets, dropout, ln_w, ln_b, wte):
    """Final LayerNorm, all logits at once, F.cross_entropy."""
    import torch.nn.functional as F

    x = F.layer_norm(residual + F.dropout(branch, dropout), ln_w.shape, ln_w, ln_b)
    logits = F.linear(x, wte)
    return F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.view(-1))


def plain_step(model, optimizer, batches, accumulation, autocast, compiled):
    """One step as nanoGPT takes it, on our model's parameters."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    block, head = compiled
    t, p = model.transformer, model.config.dropout
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    for _ in range(accumulation):
        x, y = next(batches)
        with autocast(), sdpa_kernel(backends, set_priority=True):
            residual = F.dropout(t.wte(x) + t.wpe.weight[:x.size(1)], p)
            branch = None
            for layer in t.h:
                residual, branch = block(residual, branch, p, model.config.n_head,
                                         *layer.parameters())
            loss = head(residual, branch, y, p, t.ln_f.weight, t.ln_f.bias, t.wte.weight)
        (loss / accumulation).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def train_variants(args, device, dropout, micro_batch):
    """({name: a whole step}, the model): ours as train.py takes it, and the plain one."""
    from functools import partial
    from types import SimpleNamespace

    import torch

    import train
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    config = GPTConfig.preset(args.shape, dropout=dropout)
    with torch.device(device):
        model = GPT(config)
    s = train.PRESETS[args.shape] | {"lr": 1e-5, "min_lr": 1e-5}
    run = SimpleNamespace(device=device, rank=0, accumulation=args.accumulation,
                          dtype="bfloat16" if device.type == "cuda" else "float32",
                          micro_batch=micro_batch)
    optimizer = train.make_optimizer(model, s)
    x = torch.randint(config.vocab_size, (micro_batch, s["seq_len"]), device=device)
    batches = iter(lambda: (x, x), None)
    plain = plain_block, plain_head
    if device.type == "cuda":  # the blocks share one graph, so that compiling takes seconds
        plain = tuple(torch.compile(f, dynamic=False) for f in plain)
    if args.compile:
        for block in model.transformer.h:
            block.compile()
    autocast = partial(torch.autocast, device.type, torch.bfloat16,
                       enabled=run.dtype == "bfloat16")
    return {"ours": lambda: train.train_step(model, optimizer, batches, 200, s, run)[0],
            "plain": lambda: plain_step(model, optimizer, batches, args.accumulation, autocast,
                                        plain)}, model


def timed_segment(step, device, seconds):
    """(steps per second, peak GB) of running `step` for so many seconds, hot."""
    import torch

    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()  # the cache is filled again outside the clock
        torch.cuda.synchronize()
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        step()
        count += 1
        if cuda:
            torch.cuda.synchronize()
    return count / elapsed, torch.cuda.max_memory_allocated() / 1e9 if cuda else None


def measure_train(args, device, dropout, micro_batch):
    """Rows of one dropout rate: medians over `rounds` interleaved segments of each variant."""
    import train

    steps, model = train_variants(args, device, dropout, micro_batch)
    for name, step in steps.items():
        start = time.perf_counter()
        loss = [step() for _ in range(3)][-1].item()
        print(f"{name}: first 3 steps {time.perf_counter() - start:.0f} s, loss {loss:.4f}",
              flush=True)
    segments = {name: [] for name in steps}
    for i in range(args.rounds):
        for name in sorted(steps, reverse=i % 2 == 1):
            segments[name].append(timed_segment(steps[name], device, args.seconds / args.rounds))
    seq_len = train.PRESETS[args.shape]["seq_len"]
    flops = train.flops_per_token(model.config, model.n_params(), seq_len)
    peak, rows = train.peak_flops(device), []
    for name, measured in segments.items():
        rates = [rate * args.accumulation * micro_batch * seq_len for rate, _ in measured]
        rows.append({
            "variant": name + "+compile" * (name == "ours" and args.compile), "shape": args.shape,
            "dropout": dropout, "micro_batch": micro_batch, "accumulation": args.accumulation,
            "tokens_per_s": statistics.median(rates), "lowest": min(rates), "highest": max(rates),
            "mfu": peak and statistics.median(rates) * flops / peak, "memory_gb": measured[-1][1],
            "seconds": args.seconds})
    ratios = [a / b for (a, _), (b, _) in zip(segments["ours"], segments["plain"])]
    rows[0]["ratio"] = statistics.median(ratios)
    for row in rows:
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in row.items()), flush=True)
    return rows


def bench_train(rest):
    """tokens/s, MFU and peak memory of a full step, ours and plain in turns on the same weights."""
    import torch

    parser = argparse.ArgumentParser(prog="bench.py train")
    parser.add_argument("--shape", default="demo", choices=("demo", "gpt2-124m", "biomedlm"),
                        help="preset of train.py (default: demo)")
    parser.add_argument("--micro_batch", type=int, help="sequences a forward pass (default: demo "
                        "16, gpt2-124m 32, biomedlm 16 over 100 GB else 8; halved until it fits)")
    parser.add_argument("--accumulation", type=int, help="micro-batches a step (default: demo 1, "
                        "others 8, where a real run has 32 or more)")
    parser.add_argument("--seconds", type=float, help="hot seconds of each variant (default: 60 on "
                        "CUDA, 15 on a CPU)")
    parser.add_argument("--rounds", type=int, default=6, help="turns taken (default: 6)")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1],
                        help="rates to measure (default: 0 0.1)")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile our blocks too (default: off)")
    args = parser.parse_args(rest)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    args.seconds = args.seconds or (60 if cuda else 15)
    args.accumulation = args.accumulation or (1 if args.shape == "demo" else 8)
    roomy = cuda and torch.cuda.get_device_properties(device).total_memory > 100e9
    micro_batch = args.micro_batch or {"demo": 16, "gpt2-124m": 32,
                                       "biomedlm": 16 if roomy else 8}[args.shape]
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}")
    rows = []
    for dropout in args.dropout:
        while True:
            try:
                rows += measure_train(args, device, dropout, micro_batch)
                break
            except torch.OutOfMemoryError:
                micro_batch //= 2
                print(f"out of memory: micro_batch {micro_batch}", flush=True)
                if not micro_batch:
                    raise
            finally:  # this round's model goes before the next is built
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
    return rows


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
    tok.train([text], trainer)
    end = clock()
    tok.model.save(folder)
    tok.save(folder + "/tokenizer.json")
else:
    tok = Tokenizer.from_file(folder + "/tokenizer.json")
    lines = open(text, newline="\\n", encoding="utf-8").readlines()
    texts = ["".join(lines[i:i + 40]) for i in range(0, len(lines), 40)]
    start = clock()
    rows = tok.encode_batch_fast(texts, add_special_tokens=False)
    end = clock()
    import array, hashlib
    print(hashlib.sha256(b"".join(array.array("I", r.ids).tobytes() for r in rows)).hexdigest())
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
    counts = count_pretokens([text], workers=int(threads))
    merges = train_bpe(counts, 28896)
    end = clock()
    Tokenizer.from_merges(merges).save(folder)
else:
    tok = Tokenizer.load(folder)
    lines = open(text, newline="\\n", encoding="utf-8").readlines()
    texts = ["".join(lines[i:i + 40]) for i in range(0, len(lines), 40)]
    start = clock()
    rows = tok.encode_batch(texts, num_threads=int(threads))
    end = clock()
    import array, hashlib
    print(hashlib.sha256(b"".join(array.array("I", r).tobytes() for r in rows)).hexdigest())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak += int(threads) * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(*(b - a for a, b in zip(start, end)), peak / 1024)
"""


def all_text(folder, path):
    """One text file of abstracts.jsonl.gz (title, newline, abstract) and pmc_fulltext.jsonl.gz."""
    with open(path, "w", newline="\n", encoding="utf-8") as out:
        for name in ("abstracts.jsonl.gz", "pmc_fulltext.jsonl.gz"):
            with gzip.open(Path(folder) / name, "rb") as lines:
                for record in map(json.loads, lines):
                    text = record.get("text")
                    if text is None:
                        text = f"{record['title'] or ''}\n{record['abstract'] or ''}"
                    out.write(text.removesuffix("\n") + "\n")


def bench_tokenizer(argv):
    parser = argparse.ArgumentParser(prog="bench.py tokenizer")
    parser.add_argument("--data", default=ROOT.parent / "shared/data",
                        help="a .txt, or a folder with abstracts.jsonl.gz, pmc_fulltext.jsonl.gz "
                        "(default: ../shared/data)")
    parser.add_argument("--hf_python", help="a python that has tokenizers (default: ours alone)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: 3)")
    args = parser.parse_args(argv)
    children = {"ours": (sys.executable, OUR_CHILD)}
    if args.hf_python:
        children["hf"] = (args.hf_python, HF_CHILD)
    rows, seen = [], {}
    with tempfile.TemporaryDirectory() as tmp:
        text = str(args.data)
        if not text.endswith(".txt"):
            text = f"{tmp}/all.txt"
            all_text(args.data, text)
        megabytes = os.path.getsize(text) / 1e6
        for part, threads in (("train", 1), ("train", 2), ("encode", 1)):
            found = {name: [] for name in children}
            for _ in range(args.rounds):
                for name, (python, code) in children.items():
                    folder = Path(tmp, name)
                    folder.mkdir(exist_ok=True)
                    command = [python, "-c", code, part, text, str(threads), str(folder)]
                    done = subprocess.run(command, cwd=ROOT, check=True, text=True,
                                          stdout=subprocess.PIPE)
                    *digest, last = done.stdout.strip().split("\n")
                    found[name].append([float(x) for x in last.split()])
                    seen[part, name] = digest or (folder / "merges.txt").read_bytes()
            for name, runs in found.items():
                wall, cpu, peak = (statistics.median(column) for column in zip(*runs))
                rows.append({"part": part, "threads": threads, "who": name, "seconds": wall,
                             "cpu_s": cpu, "MB_per_s": megabytes / wall, "peak_MB": peak})
                print(f"{part:6} {threads} thread(s) {name:5}{wall:8.2f} s {cpu:8.2f} s of CPU "
                      f"{megabytes / wall:6.2f} MB/s  peak {peak:5.0f} MB", flush=True)
            if args.hf_python:
                ours, hf = rows[-2:]
                ratios = {f"{k}_ours_over_hf": ours[k] / hf[k] for k in ("seconds", "cpu_s")}
                same = seen[part, "ours"] == seen[part, "hf"]
                rows.append({"part": part, "threads": threads, "equal": same, **ratios})
                print("       ours / hf: {:.2f} wall, {:.2f} CPU; ".format(*ratios.values())
                      + f"{'merges' if part == 'train' else 'ids'} equal: {same}", flush=True)
    return rows


# ---------------------------------------------------------------------------------------------
# data: extraction, tokenizing, the loader


def citations_file(shared, path, n):
    """A baseline-like file: real titles and abstracts in the frames of NLM's sample citations."""
    with gzip.open(shared / "pubmed_xml/pubmedsample18n0001.xml.gz", "rt") as f:
        frames = re.findall(r"(?s)<PubmedArticle>.*?</PubmedArticle>", f.read())
    abstracts = re.compile(r"(?s)<Abstract>.*?</Abstract>|<OtherAbstract.*</OtherAbstract>")
    frames = [abstracts.sub("", x) for x in frames]
    with gzip.open(shared / "abstracts.jsonl.gz", "rt") as f:
        bad = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # XML allows none of them
        records = [{k: bad.sub("", v) for k, v in json.loads(line).items()} for line in f]
    with gzip.open(path, "wt", compresslevel=6) as f:
        f.write('<?xml version="1.0" encoding="utf-8"?>\n<PubmedArticleSet>\n')
        for i in range(n):
            r, frame = records[i % len(records)], frames[i % len(frames)]
            text = (f"<ArticleTitle>{escape(r['title'])}</ArticleTitle><Abstract><AbstractText>"
                    f"{escape(r['abstract'])} {i}</AbstractText></Abstract>")
            frame = re.sub(r"(?s)<ArticleTitle>.*?</ArticleTitle>", lambda _, t=text: t, frame,
                           count=1)
            f.write(re.sub(r"(<PMID [^>]*>)\d+", rf"\g<1>{i + 1}", frame, count=1) + "\n")
        f.write("</PubmedArticleSet>\n")


def peak_mib(*args):
    """(CPU seconds, peak resident MiB) of a command in a process of its own."""
    code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
            "r = resource.getrusage(resource.RUSAGE_CHILDREN);"
            "print(r.ru_utime + r.ru_stime, r.ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code, sys.executable, *map(str, args)],
                          capture_output=True, text=True, check=True)
    seconds, kib = done.stdout.split()[-2:]
    return float(seconds), int(kib) / 1024


ITERPARSE = """import gzip, sys, xml.etree.ElementTree as ET
context = ET.iterparse(gzip.open(sys.argv[1]), ("start", "end"))
_, root = next(context)
for event, e in context:
    if event == "end" and e.tag == "PubmedArticle":
        root.clear()
print(0)"""


def measure_extract(shared, folder):
    """({name: figure}, MB of XML): CPU MB/s beside the XML parser's own, and peak memory."""
    files = {n: folder / f"{n}.xml.gz" for n in (30_000, 3_000)}
    for n, path in files.items():
        citations_file(shared, path, n)
    with gzip.open(files[30_000]) as f:
        xml_mb = sum(len(chunk) for chunk in iter(lambda: f.read(2**20), b"")) / 1e6
    reference = folder / "reference.py"
    reference.write_text(ITERPARSE)
    runs, alone = {n: [] for n in files}, []
    for turn in range(2):
        for n, path in files.items():
            runs[n].append(peak_mib(ROOT / "data.py", "extract", path, "--out",
                                    folder / f"text{n}-{turn}", "--workers", 1))
        alone.append(peak_mib(reference, files[30_000])[0])
    seconds = [s for s, _ in runs[30_000]]
    return {"extract, MB/s of XML": xml_mb / statistics.median(seconds),
            "extract, better of two turns, MB/s": xml_mb / min(seconds),
            "gunzip + iterparse alone, same file, MB/s": xml_mb / statistics.median(alone),
            **{f"extract, peak MiB at {n:,} citations": max(peak for _, peak in runs[n])
               for n in files}}, xml_mb


def measure_tokenize(folder, tokenizer):
    """({name: figure}, MB of text): MB/s of 8 files on 1 and 2 workers, everything included."""
    import data
    documents = list(data.read_documents(folder / "text30000-0"))
    (folder / "texts").mkdir()
    for i in range(8):
        with gzip.open(folder / f"texts/{i}.jsonl.gz", "wt", compresslevel=3) as f:
            f.writelines(json.dumps({"id": d, "text": t}) + "\n" for d, t in documents[i::8])
    text_mb = sum(len(t.encode()) for _, t in documents) / 1e6
    if tokenizer is None:
        tokenizer = folder / "tokenizer"
        subprocess.run([sys.executable, ROOT / "tokenizer.py", "train", "--input",
                        folder / "text3000-0", "--vocab_size", "8192", "--out", tokenizer],
                       check=True, capture_output=True)
    cpu_seconds = []

    def tokenize(workers):
        out = folder / f"arrays{workers}"
        shutil.rmtree(out, ignore_errors=True)
        cpu_seconds.append(peak_mib(ROOT / "data.py", "tokenize", "--text", folder / "texts",
                                    "--tokenizer", tokenizer, "--out", out,
                                    "--workers", workers)[0])

    took = interleave({n: lambda n=n: tokenize(n) for n in (1, 2)}, 2)
    return {"tokenize, MB/s of text a CPU second": text_mb / statistics.median(cpu_seconds),
            "tokenize, 1 worker, MB/s": text_mb / took[1],
            "tokenize, 2 workers, MB/s": text_mb / took[2],
            "tokenize, 2 workers over 1": took[1] / took[2]}, text_mb


def measure_loader(arrays, n_batches=5000):
    """Million tokens a second of one process, batches of 8 x 1024."""
    import data
    batches = data.train_batches(arrays, 1024, 8, seed=0)
    next(batches)
    start = time.perf_counter()
    for _ in range(n_batches):
        next(batches)
    return n_batches * 8 * 1024 / (time.perf_counter() - start) / 1e6


def bench_data(rest):
    """Extraction of 30,000 citations, tokenizing at 1 and 2 workers, the loader, hours in all."""
    parser = argparse.ArgumentParser(prog="bench.py data")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared/data",
                        help="folder of the real samples (default: beside the checkout)")
    parser.add_argument("--tokenizer", type=Path, help="folder (default: learned here)")
    args = parser.parse_args(rest)
    with tempfile.TemporaryDirectory() as folder:
        figures, xml_mb = measure_extract(args.shared, Path(folder))
        more, text_mb = measure_tokenize(Path(folder), args.tokenizer)
        figures |= more | {"loader, M tokens/s": measure_loader(Path(folder, "arrays1"))}
    extract, tokenize = (figures[k] for k in ("extract, MB/s of XML",
                                              "tokenize, MB/s of text a CPU second"))
    # 1,300 files like this one; 100 GB of PMC's XML, half of it text; without disks and the join
    figures |= {"baseline, extract, minutes on 64 cores": 1300 * xml_mb / extract / 60 / 64,
                "baseline, tokenize, minutes on 64 cores": 1300 * text_mb / tokenize / 60 / 64,
                "100 GB of PMC, both, minutes on 64 cores": (1e5 / extract + 5e4 / tokenize)
                / 60 / 64}
    for name, value in figures.items():
        print(f"{name:44}{value:10,.2f}")
    return [dict(name=name, value=value) for name, value in figures.items()]


# ---------------------------------------------------------------------------------------------
# finetune: a question's shared prefix once, against one option at a time


def medqa_examples(data, length):
    """(shared, option by option) examples of MedQA dev, size of a vocabulary learned on it."""
    import tempfile

    import finetune
    import tokenizer as bpe
    from data import load_qa
    questions = load_qa("medqa", data, "dev")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "questions.txt"
        path.write_text("\n".join(" ".join((q.question, *q.options)) for q in questions))
        tokenizer = bpe.Tokenizer.from_merges(bpe.train_bpe(bpe.count_pretokens([path]), 8192))
    both = [finetune.encode_all(questions, "medqa", tokenizer, length, shared=shared)
            for shared in (True, False)]
    return *both, tokenizer.vocab_size


def saved_bytes(step):
    """Bytes of the distinct tensors that autograd keeps for backward while step() runs."""
    import torch
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = step()  # the graph lives: no address is used twice
    del loss
    return sum(kept.values())


def bench_finetune(rest):
    """Questions a second on MedQA dev: train step (forward, backward) and scoring, fp32."""
    import torch

    import finetune
    from model import GPT, GPTConfig
    p = argparse.ArgumentParser()
    p.add_argument("--data", default=ROOT.parent / "shared/data/qa/medqa", help="MedQA's folder")
    p.add_argument("--questions", type=int, default=32, help="of dev, in official order")
    p.add_argument("--n_embd", type=int, default=256, help="width (4 layers)")
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args(rest)
    shared, alone, vocab_size = medqa_examples(args.data, 512)
    model = finetune.TaskModel(GPT(GPTConfig(n_layer=4, n_head=4, n_embd=args.n_embd, dropout=0.0,
                                             vocab_size=vocab_size)), "choice")
    variants = {"shared prefix, by length": list(finetune.micro_batches(shared[:args.questions])),
                "one option at a time, padded": [alone[i:i + 4]
                                                 for i in range(0, args.questions, 4)]}

    def score(chunks):
        with torch.no_grad():
            return sum(finetune.loss_sum(model, finetune.collate(c)) for c in chunks).item()

    def step(chunks):
        for chunk in chunks:
            finetune.loss_sum(model, finetune.collate(chunk)).backward()
        model.zero_grad()

    rows = []
    for what, run in ("scoring", score), ("train step", step):
        seconds = interleave({k: lambda run=run, v=v: run(v) for k, v in variants.items()},
                             args.rounds)
        for name, chunks in variants.items():
            grids = [finetune.collate(c).idx.numel() for c in chunks]
            largest = max(chunks, key=lambda c: finetune.collate(c).idx.numel())
            rows.append(dict(what=what, how=name, questions_per_s=args.questions / seconds[name],
                             tokens=sum(grids), largest_batch_tokens=max(grids),
                             saved_mb=saved_bytes(lambda c=largest: finetune.loss_sum(
                                 model, finetune.collate(c))) / 1e6))
            print(rows[-1])
        ratio = seconds["one option at a time, padded"] / seconds["shared prefix, by length"]
        rows.append(dict(what=what, how="ratio", speedup=ratio))
        print(f"{what}: {ratio:.2f}x questions/s")


# ---------------------------------------------------------------------------------------------
# generate: one's own machine, the full shape in bf16, beside the floor and transformers

GENERATE_CHILD = """
import re, sys, time
start = time.perf_counter()
import torch
who, folder, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
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


def random_folder(shape, folder):
    """A Hugging Face GPT-2 folder of random bf16 weights; returns the bytes a token must read."""
    import torch

    from model import GPT, GPTConfig
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(shape)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for name, t in model.named_parameters():
        t.data.normal_(0.0, 0.02) if t.dim() > 1 else t.data.fill_("ln" in name)
    model.save_pretrained(folder)
    wpe = model.transformer.wpe.weight.numel()  # one row of it is read; wte whole, as the head
    return 2 * (model.n_params() - wpe)


def read_rate(n_bytes=2**30):
    """Bytes a second that torch reads from memory, on all its threads."""
    import torch
    data = torch.ones(n_bytes // 8, dtype=torch.int64)
    return n_bytes / interleave({"sum": data.sum}, 5)["sum"]


def bench_generate(rest):
    """Greedy tokens a second for one prompt, against weights' bytes over the memory's read rate."""
    p = argparse.ArgumentParser(prog="bench.py generate")
    p.add_argument("--shape", default="biomedlm", help="preset of model.py (default: biomedlm)")
    p.add_argument("--hf_python", help="a python that has transformers (default: ours alone)")
    p.add_argument("--tokens", type=int, default=16, help="tokens a turn (default: 16)")
    p.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    args = p.parse_args(rest)
    pythons = {"ours": sys.executable} | ({"hf": args.hf_python} if args.hf_python else {})
    with tempfile.TemporaryDirectory() as folder:
        n_bytes, rates, children = random_folder(args.shape, folder), [], {}
        turns, peaks = {who: [] for who in pythons}, {}
        for who, python in pythons.items():  # one after the other: each load has the machine
            command = [python, "-c", GENERATE_CHILD, who, folder, str(args.tokens)]
            child = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE)
            children[who] = child, float(child.stdout.readline())
        for turn in range(args.rounds + 1):
            rates.append(read_rate())
            for who, (child, _) in children.items():
                print("go", file=child.stdin, flush=True)
                seconds, peaks[who] = map(float, child.stdout.readline().split())
                if turn:  # the first one touches the mapped file
                    turns[who].append(args.tokens / seconds)
        for child, _ in children.values():
            child.communicate()
    rate = statistics.median(rates)
    rows = [dict(who="floor", tokens_per_s=rate / n_bytes, weights_gb=n_bytes / 1e9,
                 read_gb_per_s=rate / 1e9)]
    for who, (_, load_s) in children.items():
        speed = statistics.median(turns[who])
        rows.append(dict(who=who, tokens_per_s=speed, of_floor=speed * n_bytes / rate,
                         load_s=load_s, peak_gb=peaks[who]))
    if args.hf_python:
        rows.append(dict(who="ours / hf", ratio=statistics.median(
            a / b for a, b in zip(turns["ours"], turns["hf"]))))
    for row in rows:
        print(row)
    return rows


# ---------------------------------------------------------------------------------------------
# the command line


def main():
    parts = {name.removeprefix("bench_"): fn for name, fn in globals().items()
             if name.startswith("bench_")}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=sorted(parts), help="what to measure")
    parser.add_argument("--json", metavar="FILE", help="also write the rows here (default: none)")
    args, rest = parser.parse_known_args()
    rows = parts[args.part](rest)
    if args.json:
        machine = {"python": platform.python_version(), "machine": platform.processor()}
        Path(args.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
