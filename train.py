"""Pre-train a GPT-2 as BioMedLM was (arXiv 2403.18421): torchrun, DDP or FSDP, bf16, exact resume.

    python train.py                                   # the offline demo, under 3 minutes on 2 cores
    torchrun --standalone --nproc_per_node=8 train.py --preset biomedlm --data DIR --out out/RUN

Reads DIR/{train.bin,val.bin,meta.json,vocab.json,merges.txt} (data.py tokenize). Writes to out/RUN:
run.json, config.json, the tokenizer, log.jsonl and checkpoint_STEP.pt. The same command goes on
from the newest checkpoint, on any number of processes that can share a step evenly. Leaves out
tensor and pipeline parallelism.

Words: a step is one update of the weights, from batch_tokens tokens, which are cut into sequences
of seq_len. world_size processes share a step's sequences; each has a rank, and a GPU of its own. A
rank takes its share in micro-batches, and adds up their gradients.
"""

import argparse
import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from model import GPT, GPTConfig, Linear, config_of, kernels_active, newest_checkpoint
from tokenizer import COUNT, Tokenizer, numbers, read_json, replacing, run_command, write_json

# ---------------------------------------------------------------------------------------------
# the run, from the first line to the last


@record  # torchrun then shows the error of the rank that failed first
def main():
    # Settings: a value for each flag, the preset's where none was given.
    settings = read_settings()
    run = Path(settings.out)
    total_steps = settings.total_steps

    # Processes: this one alone, or one of torchrun's.
    process = start_process(settings.device, settings.dtype)

    # Data: token arrays on disk, and meta, which says what they hold. A step's sequences are cut
    # among the ranks and their micro-batches.
    meta = process.on_rank_0(lambda: open_arrays(settings.data, settings.verify))
    settings.micro_batch, settings.accumulation = split_batch(settings, process.world_size)
    config = choose_config(settings, meta)

    # The run's folder: a new one, or one with a checkpoint to go on from. Rank 0 locks it and reads
    # the checkpoint.
    checkpoint = {}  # filled on rank 0 alone
    first_step = process.on_rank_0(lambda: open_run(run, settings.fresh, checkpoint))
    if first_step >= total_steps:
        process.print(f"{run} is finished: {first_step} steps. Raise --total_steps to go on, or "
                      "start --fresh")
        return process.close()
    facts = {"data_fingerprint": meta["train"]["sha256"], "world_size": process.world_size,
             "device": str(process.device), "dtype": str(process.dtype)}
    process.on_rank_0(lambda: describe_run(run, first_step, settings, config, facts))

    # Model: the weights of --init, or fresh ones. Every rank draws the same from the seed, on its
    # own device, so that a node's memory needs no room for them.
    if process.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    if settings.init and first_step == 0:
        gpt = GPT.from_pretrained(settings.init, device=process.device,
                                  dropout=settings.dropout).train()
    else:
        torch.manual_seed(settings.seed)
        with process.device:
            gpt = GPT(config)
    n_params = gpt.n_params()
    gpt.activation_checkpointing = settings.activation_checkpointing

    # Optimiser: made after the model is shared, since a rank keeps the moments of its part only.
    model = distribute(gpt, settings.parallel, process)
    optimizer = make_optimizer(model, settings)
    if first_step > 0:
        load_checkpoint(checkpoint, model, optimizer, process)
    settle_gradients(model, process)
    speed_up(gpt, settings.compile, process)
    process.print(f"{run}: {n_params:,} parameters, steps {first_step} to {total_steps} of "
                  f"{settings.batch_tokens:,} tokens = {process.world_size} ranks x "
                  f"{settings.accumulation} micro-batches x {settings.micro_batch} sequences x "
                  f"{settings.seq_len}; {process.device}, {process.dtype}, "
                  f"ops: {kernels_active(process.device)}")

    # Batches: their order depends on the seed alone. So a resumed run only needs to know how many
    # sequences were seen.
    batch_args = {"data_dir": settings.data, "seq_len": settings.seq_len,
                  "micro_batch": settings.micro_batch, "rank": process.rank,
                  "world_size": process.world_size, "device": process.device,
                  "ignore_eot": settings.ignore_eot_targets}
    seen = first_step * settings.batch_tokens // settings.seq_len
    batches = data.train_batches(**batch_args, seed=settings.seed, start=seen)

    # The loop. `step` counts the updates done. It goes round N + 1 times: the last time it only
    # validates and saves, so that the end is no special case.
    flops = flops_per_token(config, n_params, settings.seq_len)
    signals = catch_signals()
    saved_at = time.monotonic()
    writing = None  # rank 0: the checkpoint that a thread writes
    seconds = []  # of each step since the last logged line, without validations and checkpoints
    skipped = 0  # updates in a row whose gradient was not finite
    for step in tqdm(range(first_step, total_steps + 1), initial=first_step, total=total_steps,
                     leave=False, disable=process.rank > 0 or None):  # None: only on a terminal
        # Once in a while, and at the end: the loss on validation text. All ranks take part. A run
        # that goes on has this step's loss from before: a checkpoint is made after a validation.
        last = step == total_steps
        if last or step % settings.eval_every == 0 and (step == 0 or step > first_step):
            val_batches = data.val_batches(**batch_args, max_tokens=settings.eval_tokens)
            nats, targets = evaluate(model, val_batches, process)
            val_loss = nats / max(targets, 1)
            # A nat is 1 / ln 2 bits. Bits a byte compare models with different tokenizers.
            bits = val_loss / math.log(2) * meta["val"]["tokens"] / meta["val"]["bytes"]
            log(run, {"step": step, "val_loss": val_loss, "val_bits_per_byte": bits},
                f"step {step:>6}  validation loss {val_loss:.4f}, {bits:.4f} bits a byte", process)

        # Once in a while, at the end, and where a signal asked for a stop: a checkpoint. Only the
        # last one is waited for.
        if settings.save_every:
            is_due = step % settings.save_every == 0
        else:
            is_due = time.monotonic() - saved_at > 60 * settings.save_minutes
        n_stopping, n_due = process.all_reduce([bool(signals), is_due])
        ending = last or n_stopping > 0
        if step > first_step and (ending or n_due > 0):
            writing = save_checkpoint(run, model, optimizer, step, settings.keep, process,
                                      writing, wait=ending)
            saved_at = time.monotonic()
        if ending:
            break

        # One step: forward and backward for each micro-batch, then one update.
        began = time.perf_counter()
        loss, grad_norm = train_step(model, optimizer, batches, step, settings, process)
        seconds.append(time.perf_counter() - began)
        done = step + 1
        skipped = 0 if math.isfinite(grad_norm) else skipped + 1
        if skipped:
            report_skip(loss, done, skipped, process)

        # Once in a while: a line for people, and a row of log.jsonl.
        if done % settings.log_every == 0 or done in (first_step + 1, total_steps):
            mean_loss = process.all_reduce([loss])[0] / process.world_size
            seconds_per_step = sum(seconds) / len(seconds)
            log_step(run, done, mean_loss, grad_norm, seconds_per_step, flops, settings, process)
            seconds.clear()

    # The end: a sample of what the model writes. A sharded model would need all ranks for it.
    if not last:
        process.print(f"stopped at step {step}: the same command goes on from there")
    elif process.rank == 0 and not isinstance(model, FSDPModule):
        print_end(run, gpt, settings)
    process.close()


# ---------------------------------------------------------------------------------------------
# settings: presets, flags, and what must fit together
#
# A new setting is a line of read_settings, and is then settings.name everywhere. Its default is
# a line of RECIPE.


SHAPE = ("n_layer", "n_head", "n_embd")
COUNT_OR_0 = numbers(int, 0, 2**32)
POSITIVE = numbers(float, 1e-12)
POSITIVE_OR_0 = numbers(float, 0)
PROBABILITY = numbers(float, 0, 1)

# Defaults of the flags. RECIPE has those of the paper's 125M ablations, PRESETS what each preset
# sets instead.
RECIPE = {
    "total_steps": 100_000, "batch_tokens": 512 * 1024, "seq_len": 1024, "lr": 6e-4,
    "warmup_steps": 100, "grad_clip": 1.0, "dropout": 0.1, "seed": 17, "eval_every": 5000,
    # Composer's 1.6e-5, decoupled from lr. AdamW's decay is multiplied by lr: 0.1.
    "weight_decay": 0.1,
    # Our choice from here on. A micro-batch has most_sequences where --micro_batch gives no number.
    # A GPU has done 8 of these sequences sooner than Python has started their kernels.
    "most_sequences": 32, "parallel": "ddp", "activation_checkpointing": False,
    "eval_tokens": 4 * 1024**2, "log_every": 10, "keep": 2,
    # torchrun kills 30 s after SIGTERM, and a 31 GB checkpoint takes longer to write. So the
    # periodic ones are the guarantee. By the clock they cost the same share on any machine.
    "save_minutes": 30.0, "save_every": 0}
PRESETS = {
    # Our choice. Its facts sink in suddenly, between steps 300 and 600.
    "demo": {
        "total_steps": 1500, "batch_tokens": 1024, "seq_len": 128, "lr": 2e-3, "dropout": 0.0,
        "eval_every": 250, "eval_tokens": 16_384, "log_every": 50, "most_sequences": 8},
    "gpt2-124m": {},  # our choice
    "biomedlm-125m": {},
    # The authors' gpt-3b-biotok-300k.yaml and the paper, section 2. The yaml and the checkpoint's
    # name have 300,000 steps; the paper's 300B tokens are 286,102.
    "biomedlm": {
        "total_steps": 300_000, "batch_tokens": 1024 * 1024, "lr": 1.6e-4, "most_sequences": 8,
        "parallel": "fsdp", "activation_checkpointing": True}}
DEMO_DATA = "data/demo"

# On resume these must be as before: else one run would mix two models, data orders or losses.
FIXED = {"seq_len", "batch_tokens", "seed", "ignore_eot_targets", "data_fingerprint", "init",
         *(field.name for field in fields(GPTConfig) if field.name != "dropout")}


def recipe(preset):
    """{flag: value} of a preset."""
    return RECIPE | PRESETS[preset]


def read_settings():
    """A value for each flag: the command line's, or else the preset's."""
    # --preset is read first: it gives the defaults that --help shows.
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="demo",
                       help="shape and recipe; gives the defaults (default: demo)")
    preset = first.parse_known_args()[0].preset
    defaults = recipe(preset)
    parser = argparse.ArgumentParser(
        parents=[first],
        description="Pre-train a GPT-2 as BioMedLM was. Without arguments: the offline demo.")
    add = parser.add_argument

    def number(flag, kind, sentence):
        add(f"--{flag}", type=kind, help=f"{sentence} (default: %(default)s)")

    add("--data", type=os.path.normpath, default=DEMO_DATA, required=preset != "demo",
        help="folder of token arrays, made by data.py tokenize (default: data/demo, demo only)")
    add("--out", default=f"out/{preset}", help="folder of the run (default: %(default)s)")
    add("--init", type=os.path.normpath, help="start from the weights of a run or of a Hugging "
        "Face GPT-2 folder (default: random weights)")
    for flag in SHAPE:
        add(f"--{flag}", type=COUNT,
            help=f"{flag} of a model with fresh weights (default: the preset's)")
    number("total_steps", COUNT, "optimiser steps of the whole run")
    number("batch_tokens", COUNT, "tokens of one step, over all ranks and micro-batches")
    add("--micro_batch", type=COUNT, help="sequences in one forward pass of one rank (default: "
        f"the largest divisor of a rank's share up to {defaults['most_sequences']})")
    number("seq_len", numbers(int, 2), "tokens of one sequence; the last is only a target")
    number("lr", POSITIVE, "peak learning rate")
    add("--min_lr", type=POSITIVE_OR_0,
        help="learning rate at the end of the cosine (default: 0.1 * lr)")
    number("warmup_steps", COUNT_OR_0, "steps of linear warm-up, at most total_steps")
    number("weight_decay", POSITIVE_OR_0, "AdamW's decay, times lr a step, on every parameter")
    number("grad_clip", POSITIVE, "largest global gradient norm")
    number("dropout", PROBABILITY, "probability on embeddings, residual branches and attention")
    number("seed", COUNT_OR_0, "of weights, data order and dropout")
    number("eval_every", COUNT, "steps between validations")
    number("eval_tokens", COUNT, "validation tokens at most")
    number("log_every", COUNT, "steps between logged lines")
    number("save_minutes", POSITIVE, "minutes between checkpoints")
    number("save_every", COUNT_OR_0, "steps between checkpoints; 0 goes by --save_minutes")
    number("keep", COUNT, "checkpoints kept, the newest")
    add("--parallel", choices=("ddp", "fsdp"),
        help="replicate or shard the model over the ranks of torchrun (default: %(default)s)")
    add("--activation_checkpointing", action="store_true",
        help="recompute each block in backward (default: %(default)s)")
    add("--no_activation_checkpointing", dest="activation_checkpointing", action="store_false",
        help="turn --activation_checkpointing off")
    add("--compile", action="store_true", help="torch.compile each block (default: off)")
    add("--ignore_eot_targets", action="store_true", help="no loss where the target is "
        "end-of-text, as the authors had it: the model then never learns to stop (default: off)")
    add("--device", help="torch device (default: cuda or mps if it is there, else cpu)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the matrix products, autocast over "
        "fp32 weights (default: bfloat16 on cuda, else float32)")
    add("--fresh", action="store_true",
        help="remove the run's checkpoints and log and start anew (default: go on)")
    add("--verify", action="store_true",
        help="check the arrays' full hashes first (default: sizes and tokenizer)")
    parser.set_defaults(**defaults)
    settings = parser.parse_args()
    if settings.min_lr is None:
        settings.min_lr = 0.1 * settings.lr  # BioMedLM: alpha_f 0.1
    settings.warmup_steps = min(settings.warmup_steps, settings.total_steps)
    return settings


def open_arrays(folder, verify):
    """meta.json of the arrays in `folder`. The demo's are made where they are missing."""
    if folder == DEMO_DATA and not Path(folder, "meta.json").exists():
        data.make_demo(folder)
    return data.load_meta(folder, verify)


def split_batch(settings, world_size):
    """(micro_batch, accumulation): how a rank's share of a step's sequences is cut, exactly.

    A rank takes `accumulation` micro-batches, one after the other, of micro_batch sequences each:
    1,048,576 tokens = 128 ranks x 1 micro-batch x 8 sequences x 1024 (BioMedLM), or on one machine
    8 ranks x 16 micro-batches x 8 sequences x 1024: the same step, 16 times as slow.
    """
    unit = world_size * settings.seq_len
    share = settings.batch_tokens // unit  # sequences of a rank
    if share * unit != settings.batch_tokens:
        raise ValueError(f"{world_size} processes can't share batch_tokens {settings.batch_tokens} "
                         f"in sequences of {settings.seq_len}: use --batch_tokens "
                         f"{max(1, share) * unit}, or for a run that goes on fewer processes")
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    largest = max(n for n in divisors if n <= settings.most_sequences)
    micro_batch = settings.micro_batch or largest
    if micro_batch not in divisors:
        raise ValueError(f"micro_batch {micro_batch} does not divide {share} sequences per rank: "
                         f"use one of {', '.join(map(str, divisors))}")
    return micro_batch, share // micro_batch


def choose_config(settings, meta):
    """GPTConfig of --init, or of the preset under the flags given, checked against the arrays.

    The arrays, not the preset, say how large the vocabulary is.
    """
    shape = {flag: value for flag in SHAPE if (value := getattr(settings, flag))}
    if settings.init is None:
        config = GPTConfig.preset(settings.preset, dropout=settings.dropout,
                                  vocab_size=meta["vocab_size"], eot_id=meta["eot_id"], **shape)
    elif Path(settings.init).resolve() == Path(settings.out).resolve():
        raise ValueError(f"--init is the run's own folder {settings.out}: drop --init to go on, or "
                         "give another --out")
    elif shape:
        raise ValueError(f"--{next(iter(shape))} can't change the model of --init: drop it")
    else:
        config = replace(config_of(settings.init), dropout=settings.dropout)
    # An embedding may be padded to a multiple of 64 rows. No target is beyond the tokenizer.
    if meta["vocab_size"] > config.vocab_size or meta["eot_id"] != config.eot_id:
        raise ValueError(f"{settings.init} has {config.vocab_size} tokens and end-of-text "
                         f"{config.eot_id}, the arrays {meta['vocab_size']} and {meta['eot_id']}: "
                         "tokenize with the tokenizer of --init")
    return config


# ---------------------------------------------------------------------------------------------
# processes: one, or torchrun's; finetune.py and eval.py start here too


def start_process(device=None, dtype=None):
    """This process, as a Process; it joins the others if torchrun started it.

    device: a torch device's name, None for cuda if it is there, else mps (a Mac's GPU), else cpu.
    dtype: "float32" or "bfloat16", None for bfloat16 on cuda from capability 8.0, else float32.
    """
    in_group = "RANK" in os.environ  # torchrun sets it
    if device is None:
        # A Mac's GPU serves one process alone: gloo can't reduce its tensors.
        mps = torch.backends.mps.is_available() and not in_group
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if in_group and device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # each rank its own
    try:
        probe = torch.zeros(1, device=device)
        probe.item()
    except (RuntimeError, AssertionError) as e:  # torch says "not compiled with CUDA" by assertion
        reason = str(e).splitlines()[0].partition(". ")[0]
        raise ValueError(f"--device {device} is not available on this machine: {reason}") from None
    device = probe.device  # with its number
    cuda = device.type == "cuda"
    old = cuda and torch.cuda.get_device_capability(device) < (8, 0)
    if dtype is None:
        dtype = "bfloat16" if cuda and not old else "float32"
    if cuda:
        torch.cuda.set_device(device)  # Triton launches on the current device
    process = Process(device, getattr(torch, dtype))
    if in_group:
        # gloo beside NCCL: agreeing on Python's values is then no work for the GPU.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        # A GPU that hangs ends the run in 15 minutes. What is agreed on by the CPUs has a group of
        # its own: there the others wait while rank 0 makes the demo or writes a checkpoint.
        dist.init_process_group(backend, timeout=timedelta(minutes=15))
        process.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
        process.rank = dist.get_rank()
        process.world_size = dist.get_world_size()
    if old and dtype == "float32":
        process.print("float32: this GPU is too old for bfloat16")
    return process


@dataclass
class Process:
    """One of world_size processes: where and in what it computes, how it speaks with the others."""
    device: torch.device
    dtype: torch.dtype  # of the matrix products
    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None  # gloo, for Python's values

    def autocast(self):
        """Matrix products in dtype, over fp32 weights."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def print(self, text):
        """Print on rank 0, above the bar."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def all_reduce(self, values):
        """Numbers or 0-d tensors, summed over the ranks on the CPU, as Python floats."""
        values = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(values, dist.ReduceOp.SUM, self.group)
        return values.tolist()

    def gather(self, value):
        """The values of all ranks, in a list. A value is anything that can be pickled."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, self.group)
        return values

    def on_rank_0(self, fn):
        """fn() of rank 0, for every rank. A user's error there reaches every rank: so none hangs.
        """
        result = error = None
        if self.rank == 0:
            try:
                result = fn()
            except (ValueError, OSError) as e:
                error = e
        error, result = self.gather((error, result))[0]
        if error:
            raise error
        return result

    def close(self):
        """Leave the group at the end of a run that went well."""
        if dist.is_initialized():
            dist.destroy_process_group()


def distribute(model, parallel, process):
    """The model as torchrun's processes share it; a process without torchrun has it for itself.

    ddp: each rank has the whole model, and gradients are averaged over the ranks in backward.
    fsdp: each rank keeps its part of every weight, gradient and moment. A block's weights are
    gathered just before they are used: less memory, more traffic. They are dropped after use where
    memory is scarce, as --activation_checkpointing says, and else at the step's end.
    """
    if not dist.is_initialized():
        return model
    if parallel == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    # DDP sends rank 0's weights to all. Here a rank's part comes from its own. So send them first:
    # equal seeds give equal weights on equal GPUs only.
    for p in model.parameters():
        dist.broadcast(p.data, 0)
    # It warns of the blocks' outputs, which nothing here changes in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    # A node's ranks share one copy of the model: weights are gathered over its fast links alone.
    # Between nodes only gradients travel, once a step. Nodes of one GPU share one copy together.
    shards = int(os.environ["LOCAL_WORLD_SIZE"])
    if shards == 1:
        shards = process.world_size
    mesh = dist.device_mesh.init_device_mesh(
        process.device.type, (process.world_size // shards, shards),
        mesh_dim_names=("copies", "shards"))
    for block in model.transformer.h:  # fp32 shards and fp32 reduction, bf16 by autocast alone
        fully_shard(block, mesh=mesh, reshard_after_forward=model.activation_checkpointing)
    return fully_shard(model, mesh=mesh)


def sync_gradients(model, last):
    """Before forward: let DDP or FSDP synchronise the gradients in the last micro-batch only.

    Its backward sums them over the ranks. Until then each rank adds up its own, with FSDP whole
    ones. FSDP also keeps the gathered weights until then, unless memory is scarce.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or model.activation_checkpointing)
    else:
        model.require_backward_grad_sync = last  # only DDP looks at this


def settle_gradients(model, process):
    """DDP: avoid a second copy of the gradients, 10.4 GB a GPU for BioMedLM.

    DDP sums gradients in buckets. A gradient may lie in its bucket for good, but only one that is
    made after the buckets are final, and they are made anew at the second forward. So two passes
    over two tokens come first. From then on gradients are zeroed and never dropped.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    x = torch.zeros(1, 2, dtype=torch.int64, device=process.device)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with process.autocast():
            _, loss = model(x, x)
        loss.backward()
    model.zero_grad(set_to_none=False)


def speed_up(model, compiled, process):
    """Let weight gradients add up in place where that is faster; if asked, compile each block."""
    in_place = kernels_active(process.device) == "triton" and process.dtype == torch.bfloat16
    for layer in linear_layers(model):
        layer.accumulates = in_place
    if compiled:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise ValueError(f"--compile needs a C++ compiler, and there is no {compiler}: install "
                             "it, name yours in CXX, or drop --compile")
        torch._dynamo.config.optimize_ddp = False  # it would cut a block at DDP's buckets
        for block in model.transformer.h:
            block.compile()


def linear_layers(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def catch_signals():
    """SIGTERM or SIGINT now asks for a stop at the step's edge; a second one ends the process.

    Returns a list, which a signal fills. The ranks tell each other and stop together: one that
    stopped alone would hang the rest.
    """
    asked = []

    def catch(number, frame):
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, catch)
    return asked


# ---------------------------------------------------------------------------------------------
# one step: learning rate, gradient, update; and validation


def learning_rate(step, settings):
    """Learning rate of update `step`: linear warm-up, then cosine to min_lr.

    BioMedLM: 0 at step 0, 1.6e-6 at 1, 1.6e-4 at 100, 8.8e-5 half-way, 1.6e-5 at 300,000.
    """
    warmup_steps = settings.warmup_steps
    if step < warmup_steps:
        return settings.lr * step / warmup_steps
    done = (step - warmup_steps) / (settings.total_steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return settings.min_lr + (settings.lr - settings.min_lr) * cosine


def make_optimizer(model, settings):
    """AdamW. Any other torch.optim.Optimizer may stand here: nothing else knows which one it is.
    With FSDP its update must work on sharded tensors. train_step sets one rate for all its groups.

    One group: decay falls on every parameter, biases and LayerNorms too (BioMedLM: Composer).
    DecoupledAdamW shrinks a weight by 1 - (lr_t / lr_0) * 1.6e-5 a step, torch by
    1 - lr_t * weight_decay: with lr_0 = 1.6e-4 the same at weight_decay 0.1.
    """
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8,
                             weight_decay=settings.weight_decay, fused=True)


def cast_weights(model, dtype):
    """Give the linear layers their weights in bf16, once a step and not in each micro-batch.

    With FSDP a rank has no whole weight to cast before a block gathers it.
    """
    if isinstance(model, FSDPModule):
        return
    for layer in linear_layers(model):
        if layer.accumulates:
            layer.working = layer.weight.detach().to(dtype)


def train_step(model, optimizer, batches, step, settings, process):
    """Update `step`: (this rank's loss as a 0-d tensor, gradient norm before clipping as a float).

    The loss is divided by this rank's positions in the step, not by its valid targets, so that
    ignored targets weigh the same however the batch is cut. DDP and FSDP take the mean over ranks.
    """
    # Dropout is all that is random in a step. Seeded anew in each, a resumed run repeats it. A hash
    # in 32 bits, since torch's CPU generator ignores the upper half of a 64-bit seed.
    torch.manual_seed(zlib.crc32(f"{settings.seed} {step} {process.rank}".encode()))
    cast_weights(model, process.dtype)
    positions = settings.accumulation * settings.micro_batch * (settings.seq_len - 1)
    total = 0.0
    for i in range(settings.accumulation):
        sync_gradients(model, last=i == settings.accumulation - 1)
        x, y = next(batches)
        with process.autocast():
            _, loss = model(x, y)
        loss = loss * ((y != -100).sum() / positions)
        loss.backward()
        total += loss.detach()

    # Scales all gradients by grad_clip / norm where the norm is larger than grad_clip.
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
    if hasattr(norm, "full_tensor"):  # FSDP: this shard's part -> the norm over all ranks
        norm = norm.full_tensor()
    norm = norm.item()  # to read it, Python waits for the device: 0.2% of a step
    # A gradient that isn't finite changes nothing. The norm is the same on all ranks, so that all
    # of them skip the update or none.
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()
    # DDP's gradients stay where they are: views of its buckets.
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))
    return total, norm


@torch.no_grad()
def evaluate(model, batches, process):
    """(nats, targets): the loss and the tokens that count, summed over the batches of all ranks."""
    was_training = model.training
    model.eval()
    nats = targets = 0
    for x, y in batches:
        with process.autocast():
            _, loss = model(x, y)
        count = (y != -100).sum().item()
        nats += loss.item() * count  # the mean over this batch's targets -> their sum
        targets += count
    model.train(was_training)
    return process.all_reduce([nats, targets])


# ---------------------------------------------------------------------------------------------
# the run's folder
#
# run.json, config.json, vocab.json, merges.txt   written at each start: what the run is
# log.jsonl                                       a row a logged step, and a row a validation
# lock                                            locked by the training that owns the folder
# checkpoint_0001000.pt                           weights, optimiser state and step number
#
# A checkpoint is the whole state, gathered on rank 0: the same file at any world size, with DDP or
# FSDP. So a run can go on with another number of GPUs, and eval.py reads its model.


def open_run(run, fresh, checkpoint):
    """Make the run's folder this process's own. Called on rank 0.

    Returns the step to go on from, 0 for a new run. Fills the dict `checkpoint` with the contents
    of the newest checkpoint, memory-mapped.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock(run)
    data.make_folder(run)
    if fresh:
        for path in run.glob("checkpoint_*.pt"):
            path.unlink()
    checkpoint |= newest_checkpoint(run) or {"step": 0}
    return checkpoint["step"]


def describe_run(run, first_step, settings, config, facts):
    """Check that the run may go on from step `first_step`, and write what describes it."""
    now = vars(settings) | vars(config) | facts
    if first_step > 0:
        check_same_run(run, now)
    cut_log(run / "log.jsonl", first_step)
    Tokenizer.load(settings.data).save(run)
    # The code's revision, with "-dirty" where files were changed since; or why there is none.
    git = subprocess.getoutput(f'git -C "{Path(__file__).parent}" describe --always --dirty')
    write_json(run / "config.json", config.to_hf())
    versions = {"torch": torch.__version__, "git": git}
    write_json(run / "run.json", {"settings": now, "versions": versions})


def lock(run):
    """Keep other trainings out of the folder until this process ends, however it ends.

    A POSIX record lock: the kernel drops it with its process, after kill -9 too, and children don't
    inherit it. Other nodes see it where the file system carries locks: NFSv4, GPFS, Lustre mounted
    with flock. When a node dies, NFSv4 drops it after a lease, 90 s by default.
    """
    try:
        import fcntl  # not on Windows
        # never closed: that would unlock
        fcntl.lockf(os.open(run / "lock", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of them depends on the system
        raise ValueError(f"another training owns {run}: wait for its end, stop it, or give another "
                         "--out") from None
    except (ImportError, OSError) as e:  # a system or a file system without locks
        print(f"warning: {run} can't be locked ({e}): start no second training there")


def check_same_run(run, now):
    """Refuse settings that the run's checkpoints can't go on with; print the other changes."""
    before = read_json(run / "run.json")["settings"]
    for name, value in now.items():
        was = before.get(name)
        if was == value:
            continue
        if name in FIXED:
            raise ValueError(f"the run was made with {name} {was}, now it is {value}: keep it, "
                             "give another --out, or start --fresh")
        print(f"changed on resume: {name} {was} -> {value}")


def cut_log(path, step):
    """Keep the rows of log.jsonl up to `step`, for a new run none. A killed run wrote more."""
    path.touch()
    rows = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):  # half a row
            rows.append(json.loads(line))
    kept = [row for row in rows if row["step"] <= step] if step else []
    data.write_lines(path, kept)


def save_checkpoint(run, model, optimizer, step, keep, process, writing, wait):
    """Copy the full state to rank 0's CPU and let a thread write it while training goes on.

    writing: what this returned for the checkpoint before: on rank 0 a Future. wait: for the file,
    and ValueError on every rank where it could not be written. The copy and the file have 12 bytes
    a parameter, 31 GB for BioMedLM.
    """
    # One copy at a time. The others wait with the CPUs' group: no GPU times out meanwhile.
    process.on_rank_0(lambda: writing and writing.result())
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = dcp.get_state_dict(model, optimizer, options=options)
    if process.device.type == "cpu":  # no copy yet, and the next step would change them
        weights, moments = copy.deepcopy((weights, moments))
    contents = {"model": weights, "optimizer": moments, "step": step}
    if process.rank == 0:
        writing = ThreadPoolExecutor(1).submit(write_checkpoint, run, contents, keep)
    if wait and not process.on_rank_0(lambda: writing.result()):
        raise ValueError("the last checkpoint is not written: make room and run again")
    return writing


def write_checkpoint(run, contents, keep):
    """Write checkpoint_STEP.pt whole and remove old ones. Where it fails, warn and return False."""
    path = run / f"checkpoint_{contents['step']:07d}.pt"
    try:
        with replacing(path) as f:
            torch.save(contents, f)
        # A later step's file is damaged, or the run would have gone on from it: not counted.
        whole = sorted(p for p in run.glob("checkpoint_*.pt") if p <= path)
        for old in whole[:-keep]:
            old.unlink()
        return True
    except (OSError, RuntimeError) as e:  # torch's writer turns a full disk into RuntimeError
        tqdm.write(f"warning: {path} could not be written, is the disk full? ({e!r:.200}): make "
                   "room; the newest checkpoint stands")
        return False


def load_checkpoint(checkpoint, model, optimizer, process):
    """Give every rank its part of a checkpoint: the contents on rank 0, {} on the others.

    It is emptied on the way, to free memory.
    """
    options = dcp.StateDictOptions(full_state_dict=True,
                                   broadcast_from_rank0=process.world_size > 1)
    # Not set_state_dict: a rank with an empty model would load the optimiser only, and wait for
    # others than rank 0 does.
    # Each part goes through the GPU and is let go of before the next: 10.4 GB less for BioMedLM.
    dcp.set_model_state_dict(model, checkpoint.pop("model", {}), options=options)
    moments = checkpoint.pop("optimizer", {})
    if process.gather(bool(moments.get("state")))[0]:  # plain SGD has none
        dcp.set_optimizer_state_dict(model, optimizer, moments, options=options)
    torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------
# what people see: one line and one row a logged step

# Dense bf16 FLOP/s, accumulated in fp32, by NVIDIA's datasheets (of the RTX cards by the Ada,
# Blackwell and Ampere whitepapers), by regular expression: the first that fits a GPU's name counts.
# "$" keeps laptops' slower chips out, " " the GB200. MFU is printed for these only.
PEAK_FLOPS = {
    " B200": 2250e12, "H[12]00 NVL": 835.5e12, "H200": 989.5e12, "H100 PCIe": 756e12,
    "H100": 989.5e12, "A100": 312e12, "L40S": 362e12, "RTX A6000": 154.8e12,
    "RTX 4090$": 165.2e12, "RTX 5090$": 209.5e12}
SKIP_LIMIT = 10  # our choice: so many updates skipped in a row end the run


def peak_flops(device):
    """Datasheet bf16 FLOP/s of a CUDA device, None where the table lacks it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(key, name)), None)


def flops_per_token(config, n_params, seq_len):
    """Forward and backward: 6N + 12*L*T*C (PaLM, appendix B), as nanoGPT and MosaicML count."""
    return 6 * n_params + 12 * config.n_layer * seq_len * config.n_embd


def memory_gib(device):
    """Peak memory of this process since it began: of the GPU, or resident on a CPU, or None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss: bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def log(run, row, line, process):
    """Print the line of a row and append the row to log.jsonl, on rank 0."""
    process.print(line)
    if process.rank > 0:
        return
    try:
        with open(run / "log.jsonl", "a") as f:
            # Written at once on closing, so that a kill leaves the row whole or absent.
            f.write(json.dumps(row) + "\n")
    except OSError as e:
        process.print(f"warning: log.jsonl could not be written ({e}); training goes on")


def log_step(run, step, loss, grad_norm, seconds_per_step, flops, settings, process):
    """Print and log the step that just ended.

    loss: mean over the ranks. flops: of one token. MFU: flops · tokens/s over the GPUs' peak.
    """
    tokens_per_s = settings.batch_tokens / seconds_per_step
    row = {"step": step, "tokens": step * settings.batch_tokens, "loss": loss,
           "lr": learning_rate(step - 1, settings), "grad_norm": grad_norm,
           "tokens_per_s": tokens_per_s, "memory": memory_gib(process.device)}
    mfu = ""
    peak = peak_flops(process.device)
    if peak is not None:
        row["mfu"] = tokens_per_s * flops / (peak * process.world_size)
        mfu = f"  mfu {100 * row['mfu']:4.1f}%"
    eta = timedelta(seconds=int((settings.total_steps - step) * seconds_per_step))
    log(run, row, f"step {step:>6}/{settings.total_steps}  "
        f"tokens {row['tokens'] / 1e6:9.2f}M  loss {loss:7.4f}  lr {row['lr']:.2e}  "
        f"norm {grad_norm:7.3f}  tok/s {tokens_per_s:9,.0f}{mfu}  "
        f"mem {row['memory'] or math.nan:5.1f}G  eta {eta}", process)


def report_skip(loss, step, in_a_row, process):
    """Warn of an update that was skipped for NaN or Inf; ValueError after SKIP_LIMIT in a row."""
    finite = process.gather(math.isfinite(loss))  # the loss of each rank
    culprit = "the gradient norm" if all(finite) else f"the loss of rank {finite.index(False)}"
    text = f"{culprit} was not finite at step {step}: update skipped, {in_a_row} in a row"
    if in_a_row == SKIP_LIMIT:
        raise ValueError(f"{text}: the weights are as before; lower --lr or look at the data, then "
                         "run again")
    process.print(f"warning: {text}, the weights are as before")


def print_end(run, gpt, settings):
    """What the model writes, how many of the demo's questions it answers, what to run next."""
    tokenizer = Tokenizer.load(run)
    eot_id = gpt.config.eot_id
    device = gpt.transformer.wte.weight.device
    prompt = torch.tensor([[eot_id]], device=device)
    tokens = gpt.eval().generate(prompt, min(60, gpt.config.n_positions - 1), temperature=0.8,
                                 top_k=50, seed=0, eot_id=eot_id)
    sample = tokenizer.decode(tokens[0, 1:].tolist()).removesuffix("<|endoftext|>")
    print(f"\na sample: {sample}")
    next_command = f"eval.py perplexity --init {run} --data {settings.data}"
    if settings.data == DEMO_DATA:
        questions = data.load_qa("medqa", DEMO_DATA, "test")
        torch.manual_seed(settings.seed)
        with device:  # with the weights that a run without --init begins with
            untrained = GPT(gpt.config).eval()
        print(f"\nanswers {count_right(gpt, tokenizer, questions)} of {len(questions)} questions "
              f"about what it read (random weights {count_right(untrained, tokenizer, questions)})")
        next_command = f"finetune.py --task pubmedqa --data {DEMO_DATA} --init {run} --out {run}-pm"
    print(f"\nnext:\n  python {next_command}")


@torch.no_grad()
def count_right(gpt, tokenizer, questions):
    """How many questions have the true option as the likeliest, as eval.py qa --zero_shot asks.

    The demo's options are one token each, so that one forward pass tells.
    """
    right = 0
    for q in questions:
        prompt = torch.tensor([tokenizer.encode(data.zero_shot_prompt(q))])
        logits = gpt(prompt.to(gpt.transformer.wte.weight.device))[0][0, -1]
        options = [tokenizer.encode(" " + option)[0] for option in q.options]
        right += logits[options].argmax().item() == q.answer
    return right


if __name__ == "__main__":
    run_command(main)
