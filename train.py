"""Pre-train a GPT-2 as BioMedLM was (arXiv 2403.18421): torchrun, DDP or FSDP, bf16, exact resume.

    python train.py                                   # the offline demo, under 3 minutes on 2 cores
    torchrun --standalone --nproc_per_node=8 train.py --preset biomedlm --data DIR --out out/RUN

Reads DIR/{train.bin,val.bin,meta.json,vocab.json,merges.txt} (data.py tokenize). Writes to out/RUN:
run.json, config.json, the tokenizer, log.jsonl and checkpoint_STEP.pt. The same command goes on
from the newest checkpoint, at any number of processes. Leaves out tensor and pipeline parallelism.
"""

import argparse
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from model import GPT, GPTConfig, kernels_active, newest_checkpoint, write_atomically
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------
# settings: a preset gives every number, a flag replaces it

BIOMEDLM = {  # BioMedLM: the authors' gpt-3b-biotok-300k.yaml and the paper, section 2
    "total_steps": 300_000,  # BioMedLM: yaml and checkpoint name; the paper's 300B tokens: 286,102
    "batch_tokens": 1024 * 1024, "micro_batch": 8, "seq_len": 1024, "lr": 1.6e-4,
    "warmup_steps": 100, "grad_clip": 1.0, "dropout": 0.1, "seed": 17, "eval_every": 5000,
    # BioMedLM: Composer's 1.6e-5, decoupled from lr; AdamW's decay is multiplied by lr: 0.1
    "weight_decay": 0.1,
    "parallel": "fsdp", "activation_checkpointing": True,
    # our choice: torchrun kills 30 s after SIGTERM and a 31 GB checkpoint takes longer to write,
    # so that the periodic ones are the guarantee: 15 minutes on 128 A100s, 40 on 8 H100s
    "save_every": 500,
    "log_every": 10, "eval_tokens": 4 * 1024 * 1024, "keep": 2,  # our choice
}
SIBLING_125M = {**BIOMEDLM, "lr": 6e-4, "batch_tokens": 512 * 1024, "total_steps": 100_000,
                "parallel": "ddp", "activation_checkpointing": False}  # BioMedLM: its ablations
PRESETS = {
    "demo": {  # our choice: its facts sink in suddenly, between steps 500 and 900
        **BIOMEDLM, "total_steps": 1500, "batch_tokens": 1024, "micro_batch": 8, "seq_len": 128,
        "lr": 2e-3, "dropout": 0.0, "eval_every": 250, "save_every": 500, "log_every": 50,
        "eval_tokens": 16_384, "parallel": "ddp", "activation_checkpointing": False},
    "gpt2-124m": SIBLING_125M,  # our choice: GPT-2's shape under the same recipe
    "biomedlm-125m": SIBLING_125M,
    "biomedlm": BIOMEDLM,
}
FLAGS = {  # those that a preset sets
    "total_steps": (int, "optimiser steps of the whole run"),
    "batch_tokens": (int, "tokens of one step, over all ranks and micro-batches"),
    "micro_batch": (int, "sequences in one forward pass of one rank"),
    "seq_len": (int, "tokens of one sequence"),
    "lr": (float, "peak learning rate"),
    "warmup_steps": (int, "steps of linear warm-up, at most total_steps"),
    "weight_decay": (float, "AdamW's decay, times lr a step, on every parameter"),
    "grad_clip": (float, "largest global gradient norm"),
    "dropout": (float, "probability on embeddings, residual branches and attention"),
    "seed": (int, "of weights, data order and dropout"),
    "log_every": (int, "steps between logged lines"),
    "eval_every": (int, "steps between validations"),
    "eval_tokens": (int, "validation tokens at most"),
    "save_every": (int, "steps between checkpoints"),
    "keep": (int, "checkpoints kept, the newest"),
}
MODEL_FLAGS = ("n_layer", "n_head", "n_embd")
# On resume these must be as they were: the weights' shape and the order of the data hang on them.
FIXED = ("n_layer", "n_head", "n_embd", "vocab_size", "seq_len", "batch_tokens", "seed",
         "ignore_eot_targets", "data_fingerprint", "init")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Pre-train a GPT-2 as BioMedLM was. Without arguments: the offline demo.")
    parser.add_argument("--preset", choices=PRESETS, default="demo",
                        help="shape and recipe (default: demo)")
    parser.add_argument("--data", help="folder of token arrays (default: data/demo, demo only)")
    parser.add_argument("--out", help="folder of the run (default: out/PRESET)")
    parser.add_argument("--init", help="start from the weights of a run or of a Hugging Face GPT-2 "
                        "folder (default: random weights)")
    for name in MODEL_FLAGS:
        parser.add_argument(f"--{name}", type=int, help=f"{name} of a model with fresh weights "
                            "(default: the preset's)")
    for name, (kind, text) in FLAGS.items():
        values = ", ".join(f"{p} {s[name]:g}" for p, s in PRESETS.items())
        parser.add_argument(f"--{name}", type=kind, help=f"{text} (default: {values})")
    parser.add_argument("--min_lr", type=float,
                        help="learning rate at the end of the cosine (default: 0.1 * lr)")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), help="replicate or shard the model "
                        "over the ranks of torchrun (default: biomedlm fsdp, others ddp)")
    for name, text, default in (
            ("activation_checkpointing", "recompute each block in backward", "biomedlm on"),
            ("compile", "torch.compile each block", "off"),
            ("ignore_eot_targets", "no loss where the target is end-of-text, as the authors had "
             "it: the model then never learns to stop", "off")):
        parser.add_argument(f"--{name}", action="store_true", default=None,
                            help=f"{text} (default: {default})")
        parser.add_argument(f"--no_{name}", dest=name, action="store_false",
                            help=f"turn --{name} off")
    parser.add_argument("--device", help="torch device (default: cuda if it is there, else cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the matrix products, "
                        "autocast over fp32 weights (default: bfloat16 on cuda, else float32)")
    parser.add_argument("--fresh", action="store_true",
                        help="remove the run's checkpoints and log and start anew (default: go on)")
    parser.add_argument("--verify", action="store_true",
                        help="check the arrays' full hashes first (default: sizes only)")
    parser.add_argument("--plan", action="store_true", help="print parameters, memory, FLOPs and "
                        "hours of this run on several machines, then stop (default: train)")
    return parser.parse_args(argv)


def given(args, names):
    """Those of the flags that the command line holds."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def resolve(args):
    """Settings of this run: the preset's numbers under the flags that were given."""
    s = {**PRESETS[args.preset], "min_lr": None, "compile": False, "ignore_eot_targets": False}
    s.update(given(args, s))
    for name in FLAGS:
        if s[name] <= 0 and name not in ("dropout", "seed", "warmup_steps", "weight_decay"):
            raise ValueError(f"--{name} is {s[name]}: use a positive number")
    if s["min_lr"] is None:
        s["min_lr"] = 0.1 * s["lr"]  # BioMedLM: alpha_f 0.1
    s["warmup_steps"] = min(s["warmup_steps"], s["total_steps"])
    return s


def split_batch(s, world_size, micro_batch_given):
    """(micro_batch, accumulation): how one rank's share of a step's sequences is cut, exactly."""
    if s["batch_tokens"] % s["seq_len"]:
        nearest = max(1, s["batch_tokens"] // s["seq_len"]) * s["seq_len"]
        raise ValueError(f"seq_len {s['seq_len']} does not divide batch_tokens "
                         f"{s['batch_tokens']}: use --batch_tokens {nearest}")
    sequences = s["batch_tokens"] // s["seq_len"]
    if sequences % world_size:
        nearest = max(1, sequences // world_size) * world_size * s["seq_len"]
        raise ValueError(f"{sequences} sequences a step do not divide among {world_size} ranks: "
                         f"use --batch_tokens {nearest}")
    share = sequences // world_size
    divisors = [d for d in range(1, share + 1) if share % d == 0]
    micro_batch = s["micro_batch"]
    if not micro_batch_given:
        micro_batch = max(d for d in divisors if d <= micro_batch)
    if micro_batch not in divisors:
        raise ValueError(f"micro_batch {micro_batch} does not divide {share} sequences per rank: "
                         f"use {', '.join(map(str, divisors[:-1]))}{' or ' * (share > 1)}{share}")
    return micro_batch, share // micro_batch


# ---------------------------------------------------------------------------------------------
# where it runs: one process, or torchrun's


def start_processes(device):
    """(rank, world_size, device): joins torchrun's group, if this is one of its processes."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # torch says "not compiled with CUDA" by assertion
        raise ValueError(f"--device {device} is not to be had here: {e}".split("\n")[0]) from None
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # gloo beside NCCL: agreeing on a signal each step is then no work for the GPU
    # an hour: the others wait while rank 0 writes a checkpoint, or makes the demo
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(hours=1))
    return dist.get_rank(), dist.get_world_size(), device


def distribute(model, parallel, device):
    """The model as the processes share it: itself, a DDP replica, or FSDP2 shards of each block."""
    if not dist.is_initialized():
        return model
    if parallel == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    # of the blocks' outputs, which nothing here changes in place
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.transformer.h:  # fp32 shards and fp32 reduction, bf16 by autocast alone
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def all_reduce(values, op, device):
    """A list of numbers or 0-d tensors reduced over the ranks, as Python floats."""
    values = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])
    if dist.is_initialized():
        dist.all_reduce(values, op)
    return values.tolist()


# ---------------------------------------------------------------------------------------------
# optimiser


def learning_rate(step, s):
    """Of the update after `step` updates: 0 at first, linear to lr, then cosine to min_lr."""
    if step < s["warmup_steps"]:
        return s["lr"] * step / s["warmup_steps"]
    done = (step - s["warmup_steps"]) / max(1, s["total_steps"] - s["warmup_steps"])
    return s["min_lr"] + 0.5 * (s["lr"] - s["min_lr"]) * (1 + math.cos(math.pi * min(done, 1)))


def make_optimizer(model, s):
    """One group: decay falls on every parameter, biases and LayerNorms too (BioMedLM: Composer).

    DecoupledAdamW shrinks a weight by 1 - (lr_t / lr_0) * 1.6e-5 a step, torch by
    1 - lr_t * weight_decay: with lr_0 = 1.6e-4 the same at weight_decay 0.1.
    """
    return torch.optim.AdamW(model.parameters(), lr=s["lr"], betas=(0.9, 0.95), eps=1e-8,
                             weight_decay=s["weight_decay"], fused=True)


def update(model, optimizer, lr, grad_clip):
    """One clipped AdamW step, skipped on every rank if the gradient is not finite anywhere.

    Returns (gradient norm, 1.0 where skipped) as 0-d fp32 tensors on the device: nothing here waits
    for it. The fused kernel divides gradients by grad_scale and stands still where found_inf is 1,
    so clipping costs no pass of its own.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    if hasattr(norm, "full_tensor"):  # FSDP: the shards' norm, over all ranks
        norm = norm.full_tensor()
    skipped = 1.0 - torch.isfinite(norm).float()
    optimizer.grad_scale = torch.clamp(norm / grad_clip, min=1.0)
    optimizer.found_inf = skipped
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


# ---------------------------------------------------------------------------------------------
# checkpoints: one format, whatever the world size and the mode

def save_checkpoint(out, model, optimizer, step, keep):
    """Gather the full state on rank 0 and write checkpoint_STEP.pt whole, or leave all as it was.

    Returns the error's text where the disk refused it (training may go on), else None.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    error = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        path = out / f"checkpoint_{step:07d}.pt"
        state = {"model": weights, "optimizer": moments, "step": step}
        try:
            write_atomically(path, lambda temporary: torch.save(state, temporary))
            # a file of a later step is damaged, or the run would have gone on from it: not counted
            whole = sorted(p for p in out.glob("checkpoint_*.pt") if p.name <= path.name)
            for old in whole[:-keep]:
                old.unlink()
        except (OSError, RuntimeError) as e:  # torch's writer turns a full disk into RuntimeError
            error[0] = f"{path} could not be written, is the disk full? ({str(e).splitlines()[0]})"
    if dist.is_initialized():
        dist.broadcast_object_list(error, src=0)
    return error[0]


def load_checkpoint(checkpoint, model, optimizer):
    """Spread the state that rank 0 read (None elsewhere) over the ranks."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    checkpoint = checkpoint or {"model": {}, "optimizer": {}}
    # not set_state_dict: it takes a rank's empty model for "optimiser only", and the ranks part
    set_model_state_dict(model, checkpoint["model"], options=options)
    set_optimizer_state_dict(model, optimizer, checkpoint["optimizer"], options=options)


def check_same_run(old, new):
    """Refuse settings the checkpoint can't go on with; print and return {name: [old, new]}."""
    changed = {name: [old.get(name), new[name]] for name in sorted(new)
               if old.get(name) != new[name]}
    for name, (was, now) in changed.items():
        if name in FIXED:
            raise ValueError(f"the run was made with {name} {was}, now it is {now}: keep it, give "
                             "another --out, or start --fresh")
        print(f"changed on resume: {name} {was} -> {now}")
    return changed


def cut_log(path, step, evaluates):
    """Drop the rows of log.jsonl that a killed run wrote after the checkpoint, or half-wrote."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] < step or (row["step"] == step and not ("val_loss" in row and evaluates)):
            kept.append(line + "\n")
    write_atomically(path, lambda temporary: temporary.write_text("".join(kept)))


# ---------------------------------------------------------------------------------------------
# what people see: one line and one row a logged step

# dense bf16 FLOP/s of the datasheets; MFU is printed for these only
PEAK_FLOPS = {"H200": 989.5e12, "H100 PCIe": 756e12, "H100": 989.5e12, "A100": 312e12}


def peak_flops(device):
    """Datasheet bf16 FLOP/s of a CUDA device, None where the table lacks it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def flops_per_token(config, n_params, seq_len):
    """Forward and backward: 6N + 12*L*T*C (PaLM, appendix B), as nanoGPT and MosaicML count."""
    return 6 * n_params + 12 * config.n_layer * seq_len * config.n_embd


def memory_gib(device):
    """Peak memory of this process since it began: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss: bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def describe(row, total_steps, seconds_per_step):
    """The aligned line of a row of log.jsonl."""
    head = f"step {row['step']:>6}/{total_steps}"
    if "val_loss" in row:
        return f"{head}  validation loss {row['val_loss']:.4f}"
    mfu = f"  mfu {100 * row['mfu']:4.1f}%" if "mfu" in row else ""
    eta = timedelta(seconds=int((total_steps - row["step"]) * seconds_per_step))
    return (f"{head}  tokens {row['tokens'] / 1e6:9.2f}M  loss {row['loss']:7.4f}  "
            f"lr {row['lr']:.2e}  norm {row['grad_norm']:7.3f}  tok/s {row['tokens_per_s']:9,.0f}"
            f"{mfu}  mem {row['memory']:5.1f}G  eta {eta}")


class Log:
    """log.jsonl, the printed lines and, on a terminal, a bar; silent on every rank but 0."""

    def __init__(self, run, start, total_steps):
        # unbuffered: a row is one write, so that a kill leaves it whole or absent
        self.file = open(run.out / "log.jsonl", "ab", 0) if run.rank == 0 else None  # noqa: SIM115
        self.total_steps = total_steps
        self.bar = tqdm(initial=start, total=total_steps, unit="step", leave=False,
                        disable=None if run.rank == 0 else True)  # None: only on a terminal

    def say(self, text):
        if self.file:
            tqdm.write(text)  # above the bar
            sys.stdout.flush()

    def write(self, row, seconds_per_step=0.0):
        self.say(describe(row, self.total_steps, seconds_per_step))
        try:
            if self.file:
                self.file.write((json.dumps(row) + "\n").encode())
        except OSError as e:
            self.say(f"warning: log.jsonl could not be written ({e}); training goes on")


class Stop:
    """SIGTERM or SIGINT asks for a stop at the step's edge; a second one ends the process."""

    def __init__(self):
        self.name, self.agreed = None, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def now(self):
        """True on every rank once any was asked: a rank that stopped alone would hang the rest."""
        self.agreed = self.agreed or all_reduce([self.name is not None], dist.ReduceOp.MAX,
                                                "cpu")[0] > 0
        return self.agreed


class Skips:
    """Updates skipped for NaN or Inf: counted on the device, read only when a line is logged."""

    LIMIT = 10  # our choice: so many in a row end the run

    def __init__(self, run):
        self.run = run
        self.new, self.in_a_row, self.step, self.rank = torch.zeros(4, device=run.device)

    def add(self, step, loss, skipped):
        self.new += skipped
        self.in_a_row.add_(skipped).mul_(skipped)
        self.step += skipped * (step - self.step)
        self.rank.masked_fill_(~torch.isfinite(loss), self.run.rank + 1)

    def report(self, log):
        """Say what was skipped since the last line; ValueError after LIMIT in a row."""
        new, in_a_row, step, rank = all_reduce(
            [self.new, self.in_a_row, self.step, self.rank], dist.ReduceOp.MAX, self.run.device)
        self.new.zero_()
        self.rank.zero_()
        if new:
            what = f"the loss of rank {rank - 1:.0f}" if rank else "the gradient norm"
            text = f"{what} was not finite at step {step:.0f}: {new:.0f} updates skipped"
            if in_a_row >= self.LIMIT:
                raise ValueError(f"{text}, {in_a_row:.0f} in a row: the weights are as before; "
                                 "lower --lr or look at the data, then run again")
            log.say(f"warning: {text}, the weights are as before")


# ---------------------------------------------------------------------------------------------
# the loop


def dropout_seed(seed, step, rank):
    """Dropout is all that is random in a step; seeded anew in each, a resumed run repeats it.

    A hash in 32 bits: torch's CPU generator ignores the upper half of a 64-bit seed.
    """
    return zlib.crc32(f"{seed} {step} {rank}".encode())


def train_step(model, optimizer, batches, step, s, run):
    """One update from `accumulation` micro-batches: (loss, gradient norm, skipped), 0-d tensors.

    The loss is divided by the step's positions, not by its valid targets, so that ignored targets
    weigh the same however the batch is cut among ranks and micro-batches.
    """
    torch.manual_seed(dropout_seed(s["seed"], step, run.rank))
    positions = run.accumulation * run.micro_batch * (s["seq_len"] - 1)
    total = torch.zeros((), device=run.device)
    for micro in range(run.accumulation):
        if isinstance(model, DistributedDataParallel):
            # must be set before forward, and only the last micro-batch pays for the all-reduce
            model.require_backward_grad_sync = micro == run.accumulation - 1
        x, y = next(batches)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == "bfloat16"):
            _, loss = model(x, y)
        loss = loss * ((y != -100).sum() / positions)
        loss.backward()
        total += loss.detach()
    return total, *update(model, optimizer, learning_rate(step, s), s["grad_clip"])


@torch.no_grad()
def evaluate(model, s, run, stop):
    """Mean loss in nats a token over at most eval_tokens validation tokens; None if stopped."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    count = torch.zeros((), dtype=torch.float64, device=run.device)
    for x, y in data.val_batches(run.data, s["seq_len"], run.micro_batch, run.rank,
                                 run.world_size, s["eval_tokens"], run.device,
                                 s["ignore_eot_targets"]):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == "bfloat16"):
            _, loss = model(x, y)
        valid = (y != -100).sum()
        total += torch.where(valid > 0, loss, 0).double() * valid
        count += valid
        if stop.now():
            break
    model.train()
    total, count = all_reduce([total, count], dist.ReduceOp.SUM, run.device)
    return None if stop.agreed else total / max(count, 1)


def train(model, optimizer, start, s, run):
    """Steps start..total_steps; the pass after the last step only validates and saves."""
    stop, log, skips = Stop(), Log(run, start, s["total_steps"]), Skips(run)
    flops = flops_per_token(run.config, run.n_params, s["seq_len"])
    batches = data.train_batches(
        run.data, s["seq_len"], run.micro_batch, s["seed"], rank=run.rank,
        start=start * (s["batch_tokens"] // s["seq_len"]), world_size=run.world_size,
        device=run.device, ignore_eot=s["ignore_eot_targets"])
    clock, clock_step = time.perf_counter(), start
    for step in range(start, s["total_steps"] + 1):
        last = step == s["total_steps"]
        evaluating = step % s["eval_every"] == 0 or last
        if evaluating:
            val_loss = evaluate(model, s, run, stop)
            if val_loss is not None:
                log.write({"step": step, "val_loss": val_loss})
        stopping = stop.now()
        saving = step > start and (step % s["save_every"] == 0 or last or stopping)
        if saving:
            error = save_checkpoint(run.out, model, optimizer, step, s["keep"])
            if error and (last or stopping):
                raise ValueError(f"{error}: make room and run the same command again, the newest "
                                 "checkpoint stands")
            if error:
                log.say(f"warning: {error}; the older ones stand, training goes on")
        if last or stopping:
            break
        if evaluating or saving:  # tokens_per_s is of training alone
            clock, clock_step = time.perf_counter(), step
        loss, norm, skipped = train_step(model, optimizer, batches, step, s, run)
        skips.add(step + 1, loss, skipped)
        log.bar.update()
        if (step + 1) % s["log_every"] == 0 or step == start or step + 1 == s["total_steps"]:
            skips.report(log)
            loss = all_reduce([loss], dist.ReduceOp.SUM, run.device)[0] / run.world_size
            seconds = (time.perf_counter() - clock) / (step + 1 - clock_step)
            row = {"step": step + 1, "tokens": (step + 1) * s["batch_tokens"], "loss": loss,
                   "lr": learning_rate(step, s), "grad_norm": norm.item(),
                   "tokens_per_s": s["batch_tokens"] / seconds}
            if run.peak:
                row["mfu"] = row["tokens_per_s"] * flops / (run.peak * run.world_size)
            row["memory"] = memory_gib(run.device)
            log.write(row, seconds)
            clock, clock_step = time.perf_counter(), step + 1
    log.bar.close()
    return step


# ---------------------------------------------------------------------------------------------
# the plan: what a run needs, without running it

MACHINES = (("1 x H200", 1, 141, 989.5e12), ("8 x H100", 8, 80, 989.5e12),
            ("128 x A100-40", 128, 40, 312e12))  # name, GPUs, GB each, dense bf16 FLOP/s


def memory_parts(config, n_params, s, gpus, parallel, checkpointing, micro_batch):
    """{formula: bytes} of one GPU with the fused ops, in a block's backward, where it peaks.

    C width, L layers, H heads, V vocabulary, T seq_len, N parameters, t = micro_batch * T tokens.
    A block saves, a token: the residual stream twice (8C in fp32), in bf16 two LayerNorm outputs
    (4C), qkv (6C), attention (2C), c_fc (8C) and its GELU (8C), and 4 statistics and H logsumexps.
    """
    C, L, V, t = config.n_embd, config.n_layer, config.vocab_size, micro_batch * s["seq_len"]
    shards = gpus if parallel == "fsdp" else 1
    block, saved = 12 * C * C + 13 * C, (36 * C + 4 * config.n_head + 16) * t
    parts = {
        "weights, gradients, two moments in fp32 = 16N / shards": 16 * n_params / shards,
        "bf16 copies of the blocks' weights, kept by autocast = 24*C*C*L": 24 * C * C * L,
        "a block's gradients in flight = (36C + 4H + 16) * t": saved,
        "embedding and head = 9C*t + 2V*min(t, 8192) + 10*V*C":
            9 * C * t + 2 * V * min(t, 8192) + 10 * V * C,
    }
    if checkpointing:
        parts["inputs of L blocks, one block's inside = 6C*L*t + (36C + 4H + 16) * t"] = (
            6 * C * L * t + saved)
    else:
        parts["saved activations = (36C + 4H + 16) * L * t"] = saved * L
    if shards > 1:  # the block at work and the one fetched ahead, the embeddings; and gradients
        parts["gathered in fp32 = 8 * (2*(12*C*C + 13*C) + (V + T)*C)"] = (
            8 * (2 * block + (V + config.n_positions) * C))
    return parts


def print_plan(args):
    """Parameters, FLOPs, memory by part and hours on several machines, each with its formula."""
    s = resolve(args)
    config = GPTConfig.preset(args.preset, **given(args, MODEL_FLAGS))
    with torch.device("meta"):
        n = GPT(config).n_params()
    flops, tokens = flops_per_token(config, n, s["seq_len"]), s["total_steps"] * s["batch_tokens"]
    for name, value in (
            ("parameters N", f"{n:,} (the tied head counted once)"),
            ("FLOPs a token", f"{flops / 1e9:.2f} G = 6N + 12*L*T*C"),
            ("tokens", f"{tokens / 1e9:.1f} G = {s['total_steps']:,} steps * "
             f"{s['batch_tokens']:,}"),
            ("FLOPs", f"{tokens * flops:.3g} = tokens * FLOPs a token"),
            ("checkpoint", f"{12 * n / 1e9:.1f} GB = 12N (weights and two moments)")):
        print(f"{name:14} {value}")
    for machine, gpus, gigabytes, peak in MACHINES:
        # the fastest that fits: no sharding, no recomputing, the largest micro-batch, in that order
        choices = [(parallel, checkpointing, micro_batch)
                   for parallel in ("ddp", "fsdp")[:1 + (gpus > 1)]
                   for checkpointing in (False, True) for micro_batch in (32, 16, 8, 4, 2, 1)
                   if s["batch_tokens"] % (gpus * micro_batch * s["seq_len"]) == 0]
        for choice in choices:
            parts = memory_parts(config, n, s, gpus, *choice)
            if sum(parts.values()) < 0.92e9 * gigabytes:  # the rest is the allocator's and NCCL's
                break
        else:
            print(f"\n{machine}: does not fit")
            continue
        print(f"\n{machine}: --parallel {choice[0]} --{'no_' * (not choice[1])}"
              f"activation_checkpointing --micro_batch {choice[2]}: "
              f"{sum(parts.values()) / 1e9:.1f} of {gigabytes} GB a GPU")
        for part, size in parts.items():
            print(f"  {size / 1e9:7.2f} GB  {part}")
        for mfu in (0.23, 0.40, 0.60):  # BioMedLM's own; a fair guess; our aim on an H200
            rate = mfu * peak * gpus / flops
            print(f"  {mfu:7.0%} MFU {tokens / rate / 3600:,.0f} hours at {rate:,.0f} tokens/s = "
                  f"MFU * {peak / 1e12:g}e12 FLOP/s * {gpus} / FLOPs a token")


# ---------------------------------------------------------------------------------------------
# the command


def on_rank_0(fn):
    """fn() of rank 0; its result, or its user's error, reaches every rank, so that none hangs."""
    outcome = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome[0] = fn()
        except (ValueError, OSError) as e:
            outcome[1] = str(e)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1]:
        raise ValueError(outcome[1])
    return outcome[0]


def open_run(run, settings, fresh):
    """On rank 0: make or check the run's folder, and write what describes it. Returns the step."""
    run.out.mkdir(parents=True, exist_ok=True)
    for stale in run.out.glob("*.tmp"):
        stale.unlink()
    if fresh:
        for old in (*run.out.glob("checkpoint_*.pt"), run.out / "log.jsonl"):
            old.unlink(missing_ok=True)
    _, run.checkpoint = newest_checkpoint(run.out)
    if run.checkpoint is None and any(run.out.glob("checkpoint_*.pt")):
        raise ValueError(f"no checkpoint in {run.out} can be read: restore one, or start --fresh")
    step = run.checkpoint["step"] if run.checkpoint else 0
    changes = []
    if run.checkpoint:
        try:
            record = json.loads((run.out / "run.json").read_text())
            record["settings"].items(), record["changes"].copy()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{run.out}/run.json is damaged or missing, so that nothing tells how "
                             "the checkpoints beside it were made: restore it, or start --fresh"
                             ) from None
        # where the weights came from stays true of a run that goes on without --init
        settings["init"] = settings["init"] or record["settings"].get("init")
        if step >= settings["total_steps"]:
            return step
        changed = check_same_run(record["settings"], settings)
        changes = record["changes"] + ([{"step": step, **changed}] if changed else [])
    cut_log(run.out / "log.jsonl", step, step % settings["eval_every"] == 0)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(run.data / name, run.out / name)
    git = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"],
                         capture_output=True, text=True).stdout.strip()
    record = {"settings": settings, "changes": changes,
              "versions": {"python": platform.python_version(), "torch": torch.__version__,
                           "git": git or None}}
    for name, content in (("config.json", run.config.to_hf()), ("run.json", record)):
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(run.out / name, lambda tmp, text=text: tmp.write_text(text))
    return step


def choose_model(args, s, meta):
    """GPTConfig of --init or of the preset under the flags given, checked against the arrays."""
    shape = given(args, MODEL_FLAGS)
    if args.init:
        config = replace(GPT.config_of(args.init), dropout=s["dropout"])
        if shape:
            raise ValueError(f"--{next(iter(shape))} can't change the model of --init: drop it")
        if config.vocab_size != meta["vocab_size"]:
            raise ValueError(f"{args.init} has {config.vocab_size} tokens, the arrays "
                             f"{meta['vocab_size']}: tokenize with the tokenizer of --init")
    else:
        config = GPTConfig.preset(args.preset, vocab_size=meta["vocab_size"],
                                  eot_id=meta["eot_id"], dropout=s["dropout"], **shape)
    if s["seq_len"] > config.n_positions:
        raise ValueError(f"seq_len {s['seq_len']} is longer than the model's context: use "
                         f"--seq_len {config.n_positions} or less")
    return config


def prepare(args):
    """(run, settings): everything that is checked and resolved before the model is built."""
    s = resolve(args)
    rank, world_size, device = start_processes(args.device)
    folder = Path(args.data or "data/demo")
    if args.data is None and args.preset != "demo":
        raise ValueError("--data is missing: make arrays with: python data.py tokenize --text DIR "
                         "--tokenizer DIR --out DIR")
    if args.data is None and not (folder / "meta.json").exists():
        on_rank_0(lambda: data.make_demo(folder))
    meta = on_rank_0(lambda: data.load_meta(folder, verify=args.verify))
    micro_batch, accumulation = split_batch(s, world_size, args.micro_batch is not None)
    config = choose_model(args, s, meta)
    with torch.device("meta"):
        n_params = GPT(config).n_params()
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    run = SimpleNamespace(
        out=Path(args.out or f"out/{args.preset}"), data=folder, config=config, rank=rank,
        world_size=world_size, device=device, dtype=dtype, micro_batch=micro_batch,
        accumulation=accumulation, n_params=n_params, peak=peak_flops(device), checkpoint=None)
    settings = {**s, "preset": args.preset, "init": args.init, "dtype": dtype,
                "device": str(device), "world_size": world_size, "micro_batch": micro_batch,
                **{name: getattr(config, name) for name in (*MODEL_FLAGS, "vocab_size")},
                "data": str(folder), "data_fingerprint": meta["train"]["sha256"]}
    return run, settings


def build(run, s, init):
    """Model and optimiser as the processes share them; fresh weights are the same on every rank."""
    if run.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    if init:
        model = GPT.from_pretrained(init, device=run.device, dropout=s["dropout"]).train()
    else:
        torch.manual_seed(s["seed"])
        model = GPT(run.config).to(run.device)
    model.activation_checkpointing = s["activation_checkpointing"]
    if s["compile"]:
        for block in model.transformer.h:
            block.compile()
    model = distribute(model, s["parallel"], run.device)
    return model, make_optimizer(model, s)


def print_end(run, model, args):
    """What the model writes by now, and what to run next."""
    if hasattr(model, "module"):  # DDP
        model = model.module
    eot_id = run.config.eot_id
    tokens = model.eval().generate(torch.tensor([[eot_id]], device=run.device),
                                   min(60, run.config.n_positions - 1), temperature=0.8, top_k=50,
                                   seed=0, eot_id=eot_id)
    print(f"\na sample: {Tokenizer.load(run.out).decode(tokens[0, 1:].tolist()).strip()}")
    print(f"\nnext:\n  python eval.py perplexity --init {run.out} --data {run.data}")
    if args.preset == "demo" and args.data is None:
        tune = (f"python finetune.py --task medqa --data {run.data}/qa/medqa --init {run.out} "
                f"--out {run.out}-medqa")
        print(f"  {tune}\n  {tune}-random --random_init    # the same without pre-training")


@record
def main():
    args = parse_args()
    if args.plan:
        return print_plan(args)
    run, s = prepare(args)
    start = on_rank_0(lambda: open_run(run, s, args.fresh))
    say = print if run.rank == 0 else lambda *_: None
    if start >= s["total_steps"]:
        say(f"{run.out} is finished: {start} steps. Raise --total_steps to go on, or start --fresh")
        return
    model, optimizer = build(run, s, args.init if start == 0 else None)
    if start:
        load_checkpoint(run.checkpoint, model, optimizer)
        run.checkpoint = None
    say(f"{run.out}: {run.n_params:,} parameters, steps {start} to {s['total_steps']} of "
        f"{s['batch_tokens']:,} tokens = {run.world_size} ranks x {run.accumulation} micro-batches "
        f"x {run.micro_batch} sequences x {s['seq_len']}; {run.device}, {run.dtype}, "
        f"ops: {kernels_active(run.device)}")
    step = train(model, optimizer, start, s, run)
    if step < s["total_steps"]:
        say(f"stopped at step {step}: the same command goes on from there")
    elif run.rank == 0 and not (dist.is_initialized() and s["parallel"] == "fsdp"):
        print_end(run, model, args)  # a sharded model needs all ranks to write
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:  # a user's mistake: one line with its mend, no traceback
        sys.exit(f"train.py: error: {e}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
