"""train.py: exact resume, equal losses however the work is shared, and faults of every kind.

Runs are forked from this process, torch already imported, one process a rank, as torchrun would
start them. A fault is injected by a function that the forked process calls before train.main().
"""

import faulthandler
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch._dynamo  # the optimiser imports it; here, before forking, it is paid for once
from conftest import ROOT, run

import data
import model as model_module
import train
from model import GPT, GPTConfig
from tokenizer import Tokenizer

SMALL = ("--n_layer 2 --n_head 2 --n_embd 16 --seq_len 16 --batch_tokens 128 --micro_batch 4 "
         "--eval_every 10 --eval_tokens 300 --save_every 5 --log_every 1 --warmup_steps 3 "
         "--total_steps 20").split()
MODES = {"one": (1, "ddp"), "ddp": (2, "ddp"), "fsdp": (2, "fsdp")}

# ---------------------------------------------------------------------------------------------
# arrays, processes, faults


def byte_characters():
    """GPT-2's 256 printable stand-ins for bytes, in the order of their ids."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    return sorted([chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))])


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """A folder of arrays over the tokenizer of bare bytes: numbers that mostly count upwards."""
    folder = tmp_path_factory.mktemp("arrays")
    vocab = {c: i for i, c in enumerate([*byte_characters(), "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer, rng = Tokenizer.load(folder), np.random.default_rng(0)
    meta = {"dtype": "uint16", "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id,
            "eot": True, "seed": 17, "tokenizer_sha256": tokenizer.fingerprint}
    for split, count in (("train", 3000), ("val", 250)):
        tokens = (np.cumsum(rng.integers(1, 4, count)) % 250).astype(np.uint16)
        tokens.tofile(folder / f"{split}.bin")
        meta[split] = {"tokens": count, "documents": 10, "bytes": count,
                       "sha256": data.sha256_file(folder / f"{split}.bin")}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_main(rank, world_size, port, argv, fault, output):
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(50)
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = ["train.py", *map(str, argv)]
    if fault:
        fault(rank)
    try:
        train.main()
    except (ValueError, OSError) as e:
        sys.exit(f"train.py: error: {e}")


def start(arrays, out, *flags, mode="one", fault=None):
    """Start a small run; returns its processes and the file of their output."""
    world_size, parallel = MODES[mode]
    argv = ["--data", arrays, "--out", out, "--parallel", parallel, *SMALL, *flags]
    output, port = f"{out}.output", free_port()
    processes = [multiprocessing.get_context("fork").Process(
        target=rank_main, args=(rank, world_size, port, argv, fault, output))
        for rank in range(world_size)]
    for p in processes:
        p.start()
    return processes, output


def go(arrays, out, *flags, mode="one", fault=None, code=0):
    """A small run to its end; returns what it printed. `code`: the exit code expected of all."""
    if os.path.exists(f"{out}.output"):
        os.remove(f"{out}.output")
    processes, output = start(arrays, out, *flags, mode=mode, fault=fault)
    for p in processes:
        p.join(60)
        p.kill()
    text = open(output).read()
    assert [p.exitcode for p in processes] == [code] * len(processes), text
    return text


def rows(out, key="loss"):
    """{step: value} of log.jsonl; a step logged twice must say the same."""
    values = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        if key in row:
            assert values.setdefault(row["step"], row[key]) == row[key]
    return values


def final(out):
    """Tensors of the newest checkpoint by name: weights, moments, step counts."""
    _, state = model_module.newest_checkpoint(out)
    moments = {f"{name}.{kind}": t for name, of in state["optimizer"]["state"].items()
               for kind, t in of.items()}
    return {**state["model"], **moments, "step": torch.tensor(state["step"])}


def assert_same(a, b, atol=None):
    """The newest checkpoints of two runs are bit-equal, or their weights differ by atol at most."""
    a, b = final(a), final(b)
    assert a.keys() == b.keys() and a["step"] == b["step"]
    for name in a:
        if atol is None:
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name], b[name], atol=atol, rtol=1e-3, msg=name)


def at_step(step, act, ranks=(0, 1)):
    """A fault: act() in the middle of the update after `step`."""
    def fault(rank):
        original = train.train_step

        def train_step(model, optimizer, batches, now, *rest):
            if now == step and rank in ranks:
                act()
            return original(model, optimizer, batches, now, *rest)

        train.train_step = train_step
    return fault


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(arrays, tmp_path_factory):
    """Folder of a whole run of one process without dropout: what the others must equal."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    go(arrays, out)
    return out


# ---------------------------------------------------------------------------------------------
# resume and sharing of work


@pytest.mark.parametrize("mode", MODES)
def test_resume_is_bit_exact(arrays, tmp_path, mode):
    """R1, R5: a resumed run repeats data, skips a step, or draws other dropout masks."""
    flags = ("--dropout", 0.1)
    go(arrays, tmp_path / "whole", *flags, mode=mode)
    text = go(arrays, tmp_path / "cut", *flags, mode=mode, fault=at_step(7, terminate, ranks=(0,)))
    assert "stopped at step 8" in text
    assert final(tmp_path / "cut")["step"] == 8
    go(arrays, tmp_path / "cut", *flags, mode=mode)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    assert rows(tmp_path / "whole", "val_loss") == rows(tmp_path / "cut", "val_loss")


@pytest.mark.parametrize(("mode", "micro_batch"), [("one", 2), ("ddp", 4), ("ddp", 2),
                                                   ("ddp", 1), ("fsdp", 2)])
def test_losses_do_not_depend_on_the_sharing(arrays, tmp_path, undisturbed, mode, micro_batch):
    """R2: gradients summed instead of averaged, or synchronised for the wrong micro-batch.

    fp32 sums in another order differ by about 1e-7 of the loss a step; 20 steps leave under 1e-5.
    """
    go(arrays, tmp_path / "run", "--micro_batch", micro_batch, mode=mode)
    for key in ("loss", "val_loss"):
        ours, theirs = rows(tmp_path / "run", key), rows(undisturbed, key)
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_resume_at_other_world_sizes_and_modes(arrays, tmp_path, undisturbed):
    """R3: a checkpoint of one world size or mode holds shards, or names that another can't read."""
    out = tmp_path / "run"
    for step, mode in ((4, "one"), (8, "ddp"), (12, "fsdp"), (16, "ddp")):
        go(arrays, out, mode=mode, fault=at_step(step - 1, terminate))
        assert final(out)["step"] == step
    text = go(arrays, out)
    assert "changed on resume: world_size 2 -> 1" in text
    assert_same(out, undisturbed, atol=1e-5)
    assert rows(out) == pytest.approx(rows(undisturbed), rel=1e-5)
