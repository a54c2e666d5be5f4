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
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from model import GPT, GPTConfig, kernels_active, newest_checkpoint, write_atomically
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------
# settings: a preset gives every number, a flag replaces it

# BioMedLM: the third column is the authors' gpt-3b-biotok-300k.yaml and the paper, section 2, the
# second the paper's 125M ablations (gpt2-124m: our choice); the demo's numbers are our choice.
SETTINGS = {  # flag: (demo, gpt2-124m and biomedlm-125m, biomedlm, help)
    # the yaml and the checkpoint's name have 300,000; the paper's 300B tokens are 286,102.
    # The demo's facts sink in suddenly, between steps 500 and 900
    "total_steps": (1500, 100_000, 300_000, "optimiser steps of the whole run"),
    "batch_tokens": (1024, 512 * 1024, 1024 * 1024,
                     "tokens of one step, over all ranks and micro-batches"),
    "seq_len": (128, 1024, 1024, "tokens of one sequence"),
    "lr": (2e-3, 6e-4, 1.6e-4, "peak learning rate"),
    "warmup_steps": (100, 100, 100, "steps of linear warm-up, at most total_steps"),
    # BioMedLM: Composer's 1.6e-5, decoupled from lr; AdamW's decay is multiplied by lr: 0.1
    "weight_decay": (0.1, 0.1, 0.1, "AdamW's decay, times lr a step, on every parameter"),
    "grad_clip": (1.0, 1.0, 1.0, "largest global gradient norm"),
    "dropout": (0.0, 0.1, 0.1, "probability on embeddings, residual branches and attention"),
    "seed": (17, 17, 17, "of weights, data order and dropout"),
    "eval_every": (250, 5000, 5000, "steps between validations"),
    # our choice from here on
    "eval_tokens": (16_384, 4 * 1024 * 1024, 4 * 1024 * 1024, "validation tokens at most"),
    "log_every": (50, 10, 10, "steps between logged lines"),
    # torchrun kills 30 s after SIGTERM and a 31 GB checkpoint takes longer to write, so that the
    # periodic ones are the guarantee: 15 minutes on 128 A100s, 40 on 8 H100s
    "save_every": (500, 500, 500, "steps between checkpoints"),
    "keep": (2, 2, 2, "checkpoints kept, the newest"),
}
PRESETS = {
    preset: {**{flag: row[column] for flag, row in SETTINGS.items()},
             "parallel": parallel, "activation_checkpointing": parallel == "fsdp"}
    for preset, column, parallel in (("demo", 0, "ddp"), ("gpt2-124m", 1, "ddp"),
                                     ("biomedlm-125m", 1, "ddp"), ("biomedlm", 2, "fsdp"))}
MICRO_BATCH = 8  # BioMedLM: sequences that a GPU of 40 GB took at once
MODEL_FLAGS = ("n_layer", "n_head", "n_embd")
# On resume these must be as they were: the weights' shape and the order of the data hang on them.
FIXED = (*MODEL_FLAGS, "vocab_size", "seq_len", "batch_tokens", "seed", "ignore_eot_targets",
         "data_fingerprint", "init")


def parse_args():
    """The flags that were given, and the values of those that are merely on or off."""
    parser = argparse.ArgumentParser(
        description="Pre-train a GPT-2 as BioMedLM was. Without arguments: the offline demo.")
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="demo", help="shape and recipe (default: demo)")
    add("--data", help="folder of token arrays (default: data/demo, demo only)")
    add("--out", help="folder of the run (default: out/PRESET)")
    add("--init", help="start from the weights of a run or of a Hugging Face GPT-2 folder "
        "(default: random weights)")
    for flag in MODEL_FLAGS:
        add(f"--{flag}", type=int,
            help=f"{flag} of a model with fresh weights (default: the preset's)")
    for flag, (*_, text) in SETTINGS.items():
        defaults = ", ".join(f"{preset} {s[flag]}" for preset, s in PRESETS.items())
        add(f"--{flag}", type=type(PRESETS["demo"][flag]), help=f"{text} (default: {defaults})")
    add("--micro_batch", type=int, help="sequences in one forward pass of one rank (default: the "
        f"largest divisor of a rank's share up to {MICRO_BATCH})")
    add("--min_lr", type=float, help="learning rate at the end of the cosine (default: 0.1 * lr)")
    add("--parallel", choices=("ddp", "fsdp"), help="replicate or shard the model over the ranks "
        "of torchrun (default: biomedlm fsdp, others ddp)")
    add("--activation_checkpointing", action="store_true", default=None,
        help="recompute each block in backward (default: biomedlm on, others off)")
    add("--no_activation_checkpointing", dest="activation_checkpointing", action="store_false",
        help="turn --activation_checkpointing off")
    add("--compile", action="store_true", help="torch.compile each block (default: off)")
    add("--ignore_eot_targets", action="store_true", help="no loss where the target is "
        "end-of-text, as the authors had it: the model then never learns to stop (default: off)")
    add("--device", help="torch device (default: cuda if it is there, else cpu)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the matrix products, autocast over "
        "fp32 weights (default: bfloat16 on cuda, else float32)")
    add("--fresh", action="store_true",
        help="remove the run's checkpoints and log and start anew (default: go on)")
    add("--verify", action="store_true",
        help="check the arrays' full hashes first (default: sizes only)")
    add("--plan", action="store_true", help="print parameters, memory, FLOPs and hours of this "
        "run on several machines, then stop (default: train)")
    return {flag: value for flag, value in vars(parser.parse_args()).items() if value is not None}


def resolve(flags):
    """Settings of this run: the preset's numbers under the flags that were given."""
    s = {"data": None, "init": None, **PRESETS[flags["preset"]], **flags}
    for flag in SETTINGS:
        if s[flag] <= 0 and flag not in ("dropout", "seed", "warmup_steps", "weight_decay"):
            raise ValueError(f"--{flag} is {s[flag]}: use a positive number")
    s.setdefault("min_lr", 0.1 * s["lr"])  # BioMedLM: alpha_f 0.1
    s["warmup_steps"] = min(s["warmup_steps"], s["total_steps"])
    return s


def split_batch(s, world_size):
    """(micro_batch, accumulation): how one rank's share of a step's sequences is cut, exactly."""
    unit = world_size * s["seq_len"]
    share, rest = divmod(s["batch_tokens"], unit)
    if rest:
        raise ValueError(f"batch_tokens {s['batch_tokens']} is no multiple of {world_size} ranks x "
                         f"seq_len {s['seq_len']}: use --batch_tokens {max(1, share) * unit}")
    divisors = [d for d in range(1, share + 1) if share % d == 0]
    micro_batch = s.get("micro_batch", max(d for d in divisors if d <= MICRO_BATCH))
    if micro_batch not in divisors:
        use = " or ".join(", ".join(map(str, divisors)).rsplit(", ", 1))
        raise ValueError(f"micro_batch {micro_batch} does not divide {share} sequences per rank: "
                         f"use {use}")
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

    Returns the gradient norm, a 0-d fp32 tensor on the device, the same on all ranks: nothing here
    waits for it. The fused kernel divides gradients by grad_scale and stands still where found_inf
    is 1, so clipping costs no pass of its own.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    if hasattr(norm, "full_tensor"):  # FSDP: the shards' norm, over all ranks
        norm = norm.full_tensor()
    optimizer.grad_scale = torch.clamp(norm / grad_clip, min=1.0)
    optimizer.found_inf = 1.0 - torch.isfinite(norm).float()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    optimizer.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------------------------------------
# the run's folder: checkpoints in one format, whatever the world size and the mode


def save_checkpoint(out, model, optimizer, step, keep, must):
    """Gather the full state on rank 0 and write checkpoint_STEP.pt whole, or leave all as it was.

    Where the disk refuses it: a warning, or ValueError on every rank if the checkpoint `must` be.
    """
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = dcp.get_state_dict(model, optimizer, options=options)
    path = out / f"checkpoint_{step:07d}.pt"

    def write():
        state = {"model": weights, "optimizer": moments, "step": step}
        try:
            write_atomically(path, lambda temporary: torch.save(state, temporary))
            # a file of a later step is damaged, or the run would have gone on from it: not counted
            whole = sorted(p for p in out.glob("checkpoint_*.pt") if p <= path)
            for old in whole[:-keep]:
                old.unlink()
        except (OSError, RuntimeError) as e:  # torch's writer turns a full disk into RuntimeError
            error = f"{path} could not be written, is the disk full? ({str(e).splitlines()[0]})"
            if must:
                raise ValueError(f"{error}: make room and run the same command again, the newest "
                                 "checkpoint stands") from None
            tqdm.write(f"warning: {error}; the older ones stand, training goes on")

    on_rank_0(write)


def load_checkpoint(checkpoint, model, optimizer):
    """Spread the state that rank 0 read (None elsewhere) over the ranks."""
    options = dcp.StateDictOptions(full_state_dict=True,
                                   broadcast_from_rank0=dist.is_initialized())
    checkpoint = checkpoint or {"model": {}, "optimizer": {}}
    # not set_state_dict: it takes a rank's empty model for "optimiser only", and the ranks part
    dcp.set_model_state_dict(model, checkpoint["model"], options=options)
    dcp.set_optimizer_state_dict(model, optimizer, checkpoint["optimizer"], options=options)


def open_run(run, s, fresh):
    """On rank 0: make or check the run's folder, and write what describes it. Returns the step."""
    run.out.mkdir(parents=True, exist_ok=True)
    old = [*run.out.glob("*.tmp")]
    if fresh:
        old += [*run.out.glob("checkpoint_*.pt"), *run.out.glob("log.jsonl")]
    for path in old:
        path.unlink()
    _, run.checkpoint = newest_checkpoint(run.out)
    if run.checkpoint is None and any(run.out.glob("checkpoint_*.pt")):
        raise ValueError(f"no checkpoint in {run.out} can be read: restore one, or start --fresh")
    step, changes = 0, []
    if run.checkpoint:
        step = run.checkpoint["step"]
        try:
            record = json.loads((run.out / "run.json").read_text())
            before, changes = record["settings"], record["changes"]
        except (OSError, ValueError, KeyError):
            raise ValueError(f"{run.out}/run.json is damaged or missing, so that nothing tells how "
                             "the checkpoints beside it were made: restore it, or start --fresh"
                             ) from None
        # where the weights came from stays true of a run that goes on without --init
        s["init"] = s["init"] or before["init"]
        if step >= s["total_steps"]:
            return step
        if changed := check_same_run(before, s):
            changes.append({"step": step, **changed})
    cut_log(run.out / "log.jsonl", step, step % s["eval_every"] == 0)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(run.data / name, run.out / name)
    # by a shell: where there is no git, it prints nothing
    git = subprocess.run("git describe --always --dirty", shell=True, cwd=Path(__file__).parent,
                         capture_output=True, text=True).stdout.strip()
    record = {"settings": s, "changes": changes,
              "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                           "git": git or None}}
    for name, content in (("config.json", run.config.to_hf()), ("run.json", record)):
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(run.out / name, lambda tmp, text=text: tmp.write_text(text))
    return step


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
    """Drop the rows of log.jsonl that a killed run wrote after the checkpoint, or half-wrote.

    evaluates: the run goes on with a validation at `step`, which writes that row anew.
    """
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] + ("val_loss" in row and evaluates) <= step:
            kept.append(line)
    write_atomically(path, lambda temporary: temporary.write_text("".join(kept)))


# ---------------------------------------------------------------------------------------------
# what people see: one line and one row a logged step

# dense bf16 FLOP/s of the datasheets; MFU is printed for these only
PEAK_FLOPS = {"H200": 989.5e12, "H100 PCIe": 756e12, "H100": 989.5e12, "A100": 312e12}
SKIP_LIMIT = 10  # our choice: so many updates skipped in a row end the run


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


def say(run, text):
    """Print on rank 0, above the bar."""
    if run.rank == 0:
        tqdm.write(text)
        sys.stdout.flush()


def log(run, row, line):
    """Print the aligned line of a row and append the row to log.jsonl, on rank 0."""
    say(run, line)
    try:
        if run.rank == 0:
            with open(run.out / "log.jsonl", "a") as f:
                # written at once on closing, so that a kill leaves the row whole or absent
                f.write(json.dumps(row) + "\n")
    except OSError as e:
        say(run, f"warning: log.jsonl could not be written ({e}); training goes on")


def log_step(step, loss, grad_norm, seconds_per_step, s, run):
    """The line and the row of the last of `step` updates; loss is the mean over the ranks."""
    row = {"step": step, "tokens": step * s["batch_tokens"], "loss": loss,
           "lr": learning_rate(step - 1, s), "grad_norm": grad_norm,
           "tokens_per_s": s["batch_tokens"] / seconds_per_step}
    mfu = ""
    if peak := peak_flops(run.device):
        flops = flops_per_token(run.config, run.n_params, s["seq_len"])
        row["mfu"] = row["tokens_per_s"] * flops / (peak * run.world_size)
        mfu = f"  mfu {100 * row['mfu']:4.1f}%"
    row["memory"] = memory_gib(run.device)
    eta = timedelta(seconds=int((s["total_steps"] - step) * seconds_per_step))
    log(run, row, f"step {step:>6}/{s['total_steps']}  tokens {row['tokens'] / 1e6:9.2f}M  "
        f"loss {loss:7.4f}  lr {row['lr']:.2e}  norm {grad_norm:7.3f}  "
        f"tok/s {row['tokens_per_s']:9,.0f}{mfu}  mem {row['memory']:5.1f}G  eta {eta}")


def report_skips(losses, norms, step, in_a_row, run):
    """Tell of updates that were skipped for NaN or Inf; ValueError after SKIP_LIMIT in a row.

    losses of this rank and gradient norms: a number for each step since the last report, up to
    `step`; in_a_row: those skipped before them without a break. Returns what it is now.
    """
    skipped = [not math.isfinite(norm) for norm in norms]
    for skip in skipped:
        in_a_row = in_a_row + 1 if skip else 0
    if any(skipped):  # norms are the same on all ranks, so that all of them come to all_reduce
        at = step - skipped[::-1].index(True)
        bad_rank = 0 if all(map(math.isfinite, losses)) else run.rank + 1
        bad_rank = all_reduce([bad_rank], dist.ReduceOp.MAX, run.device)[0]
        what = f"the loss of rank {bad_rank - 1:.0f}" if bad_rank else "the gradient norm"
        text = f"{what} was not finite at step {at}: {sum(skipped)} updates skipped"
        if in_a_row >= SKIP_LIMIT:
            raise ValueError(f"{text}, {in_a_row} in a row: the weights are as before; lower --lr "
                             "or look at the data, then run again")
        say(run, f"warning: {text}, the weights are as before")
    return in_a_row


class Stop:
    """SIGTERM or SIGINT asks for a stop at the step's edge; a second one ends the process."""

    asked = False

    def __init__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def now(self):
        """True on every rank once any was asked: a rank that stopped alone would hang the rest."""
        return all_reduce([self.asked], dist.ReduceOp.MAX, "cpu")[0] > 0


# ---------------------------------------------------------------------------------------------
# the loop


def dropout_seed(seed, step, rank):
    """Dropout is all that is random in a step; seeded anew in each, a resumed run repeats it.

    A hash in 32 bits: torch's CPU generator ignores the upper half of a 64-bit seed.
    """
    return zlib.crc32(f"{seed} {step} {rank}".encode())


def train_step(model, optimizer, batches, step, s, run):
    """One update from `accumulation` micro-batches: (this rank's loss, gradient norm), 0-d.

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
    return total, update(model, optimizer, learning_rate(step, s), s["grad_clip"])


@torch.no_grad()
def evaluate(model, step, s, run, stop):
    """Log the mean loss in nats a token over at most eval_tokens tokens, unless asked to stop."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)  # of nats, of targets
    for x, y in data.val_batches(run.data, s["seq_len"], run.micro_batch, run.rank,
                                 run.world_size, s["eval_tokens"], run.device,
                                 s["ignore_eot_targets"]):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == "bfloat16"):
            _, loss = model(x, y)
        valid = (y != -100).sum().double()
        sums += torch.stack([loss * valid, valid])
        if stop.now():  # the caller stops too, and trains no more
            return
    model.train()
    nats, targets = all_reduce(sums, dist.ReduceOp.SUM, run.device)
    val_loss = nats / max(targets, 1)
    bits = val_loss / math.log(2) / run.val_bytes_per_token
    log(run, {"step": step, "val_loss": val_loss, "val_bits_per_byte": bits},
        f"step {step:>6}/{s['total_steps']}  validation loss {val_loss:.4f}, "
        f"{bits:.4f} bits a byte")


def train(model, optimizer, start, s, run):
    """Steps start..total_steps; the pass after the last step only validates and saves."""
    stop, history, in_a_row = Stop(), [], 0
    batches = data.train_batches(
        run.data, s["seq_len"], run.micro_batch, s["seed"], rank=run.rank,
        start=start * (s["batch_tokens"] // s["seq_len"]), world_size=run.world_size,
        device=run.device, ignore_eot=s["ignore_eot_targets"])
    clock, clock_step = time.perf_counter(), start
    for step in tqdm(range(start, s["total_steps"] + 1), initial=start, total=s["total_steps"],
                     unit="step", leave=False,
                     disable=None if run.rank == 0 else True):  # None: only on a terminal
        last = step == s["total_steps"]
        evaluating = step % s["eval_every"] == 0 or last
        if evaluating:
            evaluate(model, step, s, run, stop)
        stopping = stop.now()
        saving = step > start and (step % s["save_every"] == 0 or last or stopping)
        if saving:
            save_checkpoint(run.out, model, optimizer, step, s["keep"], must=last or stopping)
        if last or stopping:
            return step
        if evaluating or saving:  # tokens_per_s is of training alone
            clock, clock_step = time.perf_counter(), step
        history.append(train_step(model, optimizer, batches, step, s, run))
        done = step + 1
        if done % s["log_every"] == 0 or step == start or done == s["total_steps"]:
            # here Python waits for the device, and runs ahead of it in the steps between
            losses, norms = (torch.stack(values).tolist() for values in zip(*history))
            history.clear()
            in_a_row = report_skips(losses, norms, done, in_a_row, run)
            loss = all_reduce(losses[-1:], dist.ReduceOp.SUM, run.device)[0] / run.world_size
            seconds_per_step = (time.perf_counter() - clock) / (done - clock_step)
            log_step(done, loss, norms[-1], seconds_per_step, s, run)
            clock, clock_step = time.perf_counter(), done


# ---------------------------------------------------------------------------------------------
# the plan: what a run needs, without running it

MACHINES = (("H200", 1, 141), ("H100", 8, 80), ("A100", 128, 40))  # name, GPUs, GB each


def memory_parts(config, n_params, seq_len, gpus, parallel, checkpointing, micro_batch):
    """{"part = formula": bytes} of one GPU in a block's backward, where it peaks (fused ops).

    C width, L layers, H heads, V vocabulary, T seq_len, N parameters, t tokens of a micro-batch.
    A block saves, a token: the residual stream twice (8C in fp32), in bf16 two LayerNorm outputs
    (4C), qkv (6C), attention (2C), c_fc (8C) and its GELU (8C), and 4 statistics and H logsumexps.
    """
    sizes = {"C": config.n_embd, "L": config.n_layer, "H": config.n_head, "V": config.vocab_size,
             "T": seq_len, "N": n_params, "t": micro_batch * seq_len,
             "shards": gpus if parallel == "fsdp" else 1}
    formulas = {
        "weights, gradients, two moments in fp32": "16*N / shards",
        "bf16 copies of the blocks' weights, kept by autocast": "24*C*C*L",
        "a block's gradients in flight": "(36*C + 4*H + 16) * t",
        "embedding and head": "9*C*t + 2*V*min(t, 8192) + 10*V*C"}
    if checkpointing:
        formulas["inputs of L blocks, one block's inside"] = "6*C*L*t + (36*C + 4*H + 16) * t"
    else:
        formulas["saved activations"] = "(36*C + 4*H + 16) * L * t"
    if parallel == "fsdp":  # the block at work, the one fetched ahead, embeddings; and gradients
        formulas["gathered in fp32"] = "8 * (2*(12*C*C + 13*C) + (V + T)*C)"
    # evaluated as printed, so that no figure can stand beside another formula
    return {f"{part} = {formula}": eval(formula, sizes) for part, formula in formulas.items()}


def print_plan(s, config):
    """Parameters, FLOPs, memory by part and hours on several machines, each with its formula."""
    with torch.device("meta"):
        n = GPT(config).n_params()
    flops, tokens = flops_per_token(config, n, s["seq_len"]), s["total_steps"] * s["batch_tokens"]
    print(f"parameters N   {n:,} (the tied head counted once)")
    print(f"FLOPs a token  {flops / 1e9:.2f} G = 6N + 12*L*T*C")
    print(f"tokens         {tokens / 1e9:.1f} G = {s['total_steps']:,} steps * "
          f"{s['batch_tokens']:,}")
    print(f"FLOPs          {tokens * flops:.3g} = tokens * FLOPs a token")
    print(f"checkpoint     {12 * n / 1e9:.1f} GB = 12N (weights and two moments)")
    for name, gpus, gigabytes in MACHINES:
        machine, peak = f"{gpus} x {name}-{gigabytes}", PEAK_FLOPS[name]
        # the fastest that fits: no sharding, no recomputing, the largest micro-batch, in this order
        for mode in product(("ddp", "fsdp"), (False, True), (32, 16, 8, 4, 2, 1)):
            parallel, checkpointing, micro_batch = mode
            parts = memory_parts(config, n, s["seq_len"], gpus, *mode)
            whole = s["batch_tokens"] % (gpus * micro_batch * s["seq_len"]) == 0
            if whole and sum(parts.values()) < 0.92e9 * gigabytes:
                break  # the rest is the allocator's and NCCL's
        else:
            print(f"\n{machine}: does not fit")
            continue
        print(f"\n{machine}: --parallel {parallel} --{'no_' * (not checkpointing)}"
              f"activation_checkpointing --micro_batch {micro_batch}: "
              f"{sum(parts.values()) / 1e9:.1f} of {gigabytes} GB a GPU")
        for part, size in parts.items():
            print(f"  {size / 1e9:7.2f} GB  {part}")
        for mfu in (0.23, 0.40, 0.60):  # BioMedLM's own; a fair guess; our aim on an H200
            rate = mfu * peak * gpus / flops
            print(f"  {mfu:7.0%} MFU {tokens / rate / 3600:,.0f} hours at {rate:,.0f} tokens/s = "
                  f"MFU * {peak / 1e12:g}e12 FLOP/s * {gpus} / FLOPs a token")


# ---------------------------------------------------------------------------------------------
# the command


def choose_model(s, **vocabulary):
    """GPTConfig of --init or of the preset under the flags given, checked against the arrays.

    vocabulary: vocab_size and eot_id of the arrays, where there are any.
    """
    shape = {flag: s[flag] for flag in MODEL_FLAGS if flag in s}
    if s["init"]:
        if shape:
            raise ValueError(f"--{next(iter(shape))} can't change the model of --init: drop it")
        config = replace(GPT.config_of(s["init"]), dropout=s["dropout"])
    else:
        config = GPTConfig.preset(s["preset"], dropout=s["dropout"], **shape, **vocabulary)
    if config.vocab_size != vocabulary.get("vocab_size", config.vocab_size):
        raise ValueError(f"{s['init']} has {config.vocab_size} tokens, the arrays "
                         f"{vocabulary['vocab_size']}: tokenize with the tokenizer of --init")
    if s["seq_len"] > config.n_positions:
        raise ValueError(f"seq_len {s['seq_len']} is longer than the model's context: use "
                         f"--seq_len {config.n_positions} or less")
    return config


def prepare(s):
    """Join the other processes, check all that can be, complete s; returns what s can't hold."""
    demo = s["data"] is None
    if demo and s["preset"] != "demo":
        raise ValueError("--data is missing: make arrays with: python data.py tokenize --text DIR "
                         "--tokenizer DIR --out DIR")
    rank, world_size, device = start_processes(s.get("device"))
    folder, verify = Path(s["data"] or "data/demo"), s.pop("verify")

    def open_arrays():
        if demo and not (folder / "meta.json").exists():
            data.make_demo(folder)
        return data.load_meta(folder, verify)

    meta = on_rank_0(open_arrays)
    micro_batch, accumulation = split_batch(s, world_size)
    config = choose_model(s, vocab_size=meta["vocab_size"], eot_id=meta["eot_id"])
    dtype = s.get("dtype", "bfloat16" if device.type == "cuda" else "float32")
    out = Path(s.pop("out", f"out/{s['preset']}"))
    s.update({name: getattr(config, name) for name in (*MODEL_FLAGS, "vocab_size")},
             dtype=dtype, device=str(device), world_size=world_size, micro_batch=micro_batch,
             data=str(folder), data_fingerprint=meta["train"]["sha256"])
    return SimpleNamespace(out=out, data=folder, config=config, rank=rank, world_size=world_size,
                           device=device, dtype=dtype, micro_batch=micro_batch,
                           accumulation=accumulation, checkpoint=None,
                           val_bytes_per_token=meta["val"]["bytes"] / meta["val"]["tokens"])


def build(run, s, start):
    """Model and optimiser as the processes share them, with the weights that step `start` has."""
    if run.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    if s["init"] and start == 0:
        model = GPT.from_pretrained(s["init"], device=run.device, dropout=s["dropout"]).train()
    else:
        torch.manual_seed(s["seed"])  # the same on every rank
        model = GPT(run.config).to(run.device)
    run.n_params = model.n_params()
    model.activation_checkpointing = s["activation_checkpointing"]
    if s["compile"]:
        for block in model.transformer.h:
            block.compile()
    model = distribute(model, s["parallel"], run.device)
    return model, make_optimizer(model, s)


def print_end(run, model, s):
    """What the model writes by now, and what to run next."""
    if hasattr(model, "module"):  # DDP
        model = model.module
    eot_id = run.config.eot_id
    tokens = model.eval().generate(torch.tensor([[eot_id]], device=run.device),
                                   min(60, run.config.n_positions - 1), temperature=0.8, top_k=50,
                                   seed=0, eot_id=eot_id)
    print(f"\na sample: {Tokenizer.load(run.out).decode(tokens[0, 1:].tolist()).strip()}")
    print(f"\nnext:\n  python eval.py perplexity --init {run.out} --data {run.data}")
    if run.data == Path("data/demo"):
        tune = (f"python finetune.py --task medqa --data {run.data}/qa/medqa --init {run.out} "
                f"--out {run.out}-medqa")
        print(f"  {tune}\n  {tune}-random --random_init    # the same without pre-training")


@record
def main():
    s = resolve(parse_args())
    if s.pop("plan"):
        return print_plan(s, choose_model(s))
    fresh, run = s.pop("fresh"), prepare(s)
    start = on_rank_0(lambda: open_run(run, s, fresh))
    if start >= s["total_steps"]:
        say(run, f"{run.out} is finished: {start} steps. Raise --total_steps to go on, or start "
            "--fresh")
        return
    model, optimizer = build(run, s, start)
    if start:
        load_checkpoint(run.checkpoint, model, optimizer)
        run.checkpoint = None
    say(run, f"{run.out}: {run.n_params:,} parameters, steps {start} to {s['total_steps']} of "
        f"{s['batch_tokens']:,} tokens = {run.world_size} ranks x {run.accumulation} micro-batches "
        f"x {run.micro_batch} sequences x {s['seq_len']}; {run.device}, {run.dtype}, "
        f"ops: {kernels_active(run.device)}")
    step = train(model, optimizer, start, s, run)
    if step < s["total_steps"]:
        say(run, f"stopped at step {step}: the same command goes on from there")
    elif run.rank == 0 and not (dist.is_initialized() and s["parallel"] == "fsdp"):
        print_end(run, model, s)  # a sharded model needs all ranks to write
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:  # a user's mistake: one line with its mend, no traceback
        sys.exit(f"train.py: error: {e}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    except KeyboardInterrupt:  # before the loop, which catches the signal itself
        sys.exit(130)
