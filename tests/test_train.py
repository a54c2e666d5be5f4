"""train.py: exact resume, equal losses however the work is shared, and faults of every kind.

Runs are forked from this process, torch already imported, one process a rank, as torchrun would
start them. A fault is injected by a function that the forked process calls before train.main().
"""

import collections
import faulthandler
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # the optimiser imports it; here, before forking, it is paid for once
from conftest import ROOT, run
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import data
import model as model_module
import train
from model import GPT
from tokenizer import Tokenizer

SHAPE = ("--n_layer", 2, "--n_head", 2, "--n_embd", 16)
SMALL = ("--seq_len", 16, "--batch_tokens", 128, "--micro_batch", 4, "--eval_every", 10,
         "--eval_tokens", 300, "--save_every", 5, "--log_every", 1, "--warmup_steps", 3,
         "--total_steps", 20)
# processes, of them on a node, and how they share: grid is two nodes of two GPUs
MODES = {"one": (1, 1, "ddp"), "ddp": (2, 2, "ddp"), "fsdp": (2, 2, "fsdp"),
         "grid": (4, 2, "fsdp")}

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
    vocab = {c: i for i, c in enumerate(["<|endoftext|>", *byte_characters()])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer, rng = Tokenizer.load(folder), np.random.default_rng(0)
    meta = {"dtype": "uint16", "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id,
            "eot": True, "seed": 17, "tokenizer_sha256": tokenizer.fingerprint}
    for split, count in (("train", 3000), ("val", 250)):
        tokens = (np.cumsum(rng.integers(1, 4, count)) % 250).astype(np.uint16)
        tokens[::7] = tokenizer.eot_id
        tokens.tofile(folder / f"{split}.bin")
        meta[split] = {"tokens": count, "documents": 10, "bytes": (2 + (split == "val")) * count,
                       "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_main(rank, world_size, node_size, port, argv, fault, output):
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    torch.set_num_threads(1)
    train.tqdm.set_lock(threading.RLock())  # forks share its own: one killed while writing keeps it
    faulthandler.dump_traceback_later(50)
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % node_size),
                          WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(node_size),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = ["train.py", *map(str, argv)]
    if fault:
        fault(rank)
    try:
        train.main()
    except (ValueError, OSError) as e:
        sys.exit(f"train.py: error: {e}")


def start(arrays, out, *flags, mode="one", fault=None, shape=SHAPE):
    """Start a small run; returns its processes and the file of their output."""
    world_size, node_size, parallel = MODES[mode]
    argv = ["--data", arrays, "--out", out, "--parallel", parallel, *shape, *SMALL, *flags]
    output, port = f"{out}.output", free_port()
    processes = [multiprocessing.get_context("fork").Process(
        target=rank_main, args=(rank, world_size, node_size, port, argv, fault, output))
        for rank in range(world_size)]
    for p in processes:
        p.start()
    return processes, output


def go(arrays, out, *flags, mode="one", fault=None, shape=SHAPE, code=0):
    """A small run to its end; returns what it printed. `code`: the exit code expected of all."""
    if os.path.exists(f"{out}.output"):
        os.remove(f"{out}.output")
    processes, output = start(arrays, out, *flags, mode=mode, fault=fault, shape=shape)
    for p in processes:
        p.join(60)
        p.kill()
    text = Path(output).read_text()
    assert [p.exitcode for p in processes] == [code] * len(processes), text
    return text


def rows(out, key="loss"):
    """{step: value} of log.jsonl; a step logged twice must say the same."""
    values = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        row = json.loads(line, parse_constant=str)  # NaN equals NaN
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


def at_step(step, act, ranks=range(4)):
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


@pytest.mark.parametrize("mode", ["one", "ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_resume_is_bit_exact(arrays, tmp_path, undisturbed, mode):
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
    # before the first step dropout makes no difference: none in a validation
    first = [rows(out, "val_loss")[0] for out in (tmp_path / "whole", undisturbed)]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


@pytest.mark.parametrize(("mode", "flags"), [
    ("one", "--micro_batch 2"), ("ddp", "--micro_batch 4"), ("ddp", "--micro_batch 2"),
    ("ddp", "--micro_batch 1"), ("fsdp", "--micro_batch 1"),
    ("fsdp", "--micro_batch 2 --activation_checkpointing")])
def test_losses_do_not_depend_on_the_sharing(arrays, tmp_path, undisturbed, mode, flags):
    """R2: gradients summed instead of averaged, or synchronised for the wrong micro-batch.

    fp32 sums in another order differ by about 1e-7 of the loss a step; 20 steps leave under 1e-5.
    """
    go(arrays, tmp_path / "run", *flags.split(), mode=mode)
    for key in ("loss", "val_loss", "grad_norm"):
        ours, theirs = rows(tmp_path / "run", key), rows(undisturbed, key)
        assert ours == pytest.approx(theirs, rel=1e-4 if key == "grad_norm" else 1e-5)


def test_run_equals_a_plain_loop(arrays, tmp_path):
    """A flag that reaches nothing, or one of two places; a loss, mean, rate or unit that is off.

    Every flag differs from its default. The oracle is a loop without accumulation or clock.
    """
    flags = {"seed": 3, "grad_clip": 0.3, "weight_decay": 4, "lr": 0.02, "warmup_steps": 2,
             "total_steps": 6, "micro_batch": 2, "eval_every": 3, "eval_tokens": 100}
    out = tmp_path / "run"
    argv = [text for name, value in flags.items() for text in (f"--{name}", value)]
    go(arrays, out, *argv, "--ignore_eot_targets")
    which = {"data_dir": arrays, "seq_len": 16, "micro_batch": 8, "ignore_eot": True}
    torch.manual_seed(3)
    config = model_module.GPTConfig.preset("demo", n_layer=2, n_head=2, n_embd=16, vocab_size=257,
                                           eot_id=0)
    assert GPT.config_of(out) == config
    model, batches = GPT(config), data.train_batches(**which, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=4)
    expected = {}
    for step in range(7):
        if step % 3 == 0:
            pairs = [model(x)[0][y >= 0].log_softmax(-1).gather(1, y[y >= 0][:, None])
                     for x, y in data.val_batches(**which, max_tokens=100)]
            nats = -torch.cat(pairs).mean().item()
            expected[step, "val_loss"] = nats
            expected[step, "val_bits_per_byte"] = nats * math.log2(math.e) / 3
        x, y = next(batches)
        log_probs = model(x)[0].log_softmax(-1).gather(2, y.clamp(min=0)[..., None])[..., 0]
        loss = -(log_probs * (y >= 0)).sum() / (8 * 15)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        cosine = [0.002 + 0.009 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
        lr = [0, 0.01, *cosine]
        for p in model.parameters():
            p.grad *= min(1, 0.3 / norm)
        for group in optimizer.param_groups:
            group["lr"] = lr[step]
        optimizer.step()
        row = {"loss": loss.item(), "grad_norm": norm, "lr": lr[step], "tokens": 128 * (step + 1)}
        expected |= {(step + 1, key): value for key, value in row.items() if step < 6}
    assert expected[1, "grad_norm"] > 0.3
    logged = {(step, key): value for key in {key for _, key in expected}
              for step, value in rows(out, key).items()}
    assert logged == pytest.approx(expected, rel=1e-4)


def test_bfloat16_reaches_training_and_validation(arrays, tmp_path, undisturbed):
    """--dtype without effect in one of the two."""
    go(arrays, tmp_path / "run", "--dtype", "bfloat16", "--total_steps", 1)
    for key, step in (("loss", 1), ("val_loss", 0)):
        ours, theirs = rows(tmp_path / "run", key)[step], rows(undisturbed, key)[step]
        assert ours != pytest.approx(theirs, rel=1e-6) and ours == pytest.approx(theirs, rel=1e-2)


def test_presets(monkeypatch):
    """A preset that takes another one's column, or a default that no longer follows its flag."""
    expected = {"biomedlm": (1.6e-4, 1.6e-5, 2**20, 1024, 0.1, "fsdp", True),
                "biomedlm-125m": (6e-4, 6e-5, 2**19, 1024, 0.1, "ddp", False),
                "gpt2-124m": (6e-4, 6e-5, 2**19, 1024, 0.1, "ddp", False),
                "demo": (2e-3, 2e-4, 1024, 128, 0.0, "ddp", False)}
    names = ("lr", "min_lr", "batch_tokens", "seq_len", "dropout", "parallel",
             "activation_checkpointing")
    for preset, values in expected.items():
        argv = ["train.py", "--preset", preset, "--data", "x", "--total_steps", "40"]
        monkeypatch.setattr(sys, "argv", argv)
        settings = train.read_settings()
        assert [settings[name] for name in names] == pytest.approx(values)
        assert settings["warmup_steps"] == 40


def test_resume_at_other_world_sizes_and_modes(arrays, tmp_path, undisturbed):
    """R3: a checkpoint of one world size or mode holds shards, or names that another can't read."""
    out = tmp_path / "run"
    for step, mode in ((3, "one"), (6, "ddp"), (9, "fsdp"), (12, "grid"), (15, "ddp")):
        go(arrays, out, "--micro_batch", 2, mode=mode, fault=at_step(step - 1, terminate))
        assert final(out)["step"] == step
    text = go(arrays, out)
    assert "changed on resume: world_size 2 -> 1" in text
    assert_same(out, undisturbed, atol=1e-5)
    assert rows(out) == pytest.approx(rows(undisturbed), rel=1e-5)


def watch_gradients(folder):
    """A fault: note before each update where the gradients lie, and how many reductions were sent.
    DDP's buckets are small here."""
    def fault(rank):
        update, init, sent = train.update, train.DistributedDataParallel.__init__, []

        def count(state, bucket):
            sent.append(1)
            return allreduce_hook(None, bucket)

        def small(ddp, *args, **options):
            init(ddp, *args, **options, bucket_cap_mb=0.02)
            ddp.register_comm_hook(None, count)

        def watched(model, *rest):
            gradients = [p.grad for p in model.parameters()]
            held = {g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in gradients}
            with open(folder / f"rank{rank}", "a") as f:
                print(len(held), sum(held.values()) - sum(g.nbytes for g in gradients),
                      [g.data_ptr() for g in gradients], file=f)
            with open(folder / f"sent{rank}", "a") as f:
                print(len(sent), file=f)
            sent.clear()
            return update(model, *rest)

        train.update = watched
        train.DistributedDataParallel.__init__ = small
    return fault


def test_ddp_holds_gradients_once(arrays, tmp_path):
    """Gradients lie beside DDP's buckets, from the start or later: 10.4 GB more for BioMedLM."""
    out = tmp_path / "run"
    go(arrays, out, "--micro_batch", 1, mode="ddp", fault=at_step(9, terminate))
    go(arrays, out, "--micro_batch", 1, mode="ddp", fault=watch_gradients(tmp_path))
    for rank in (0, 1):
        lines = (tmp_path / f"rank{rank}").read_text().splitlines()
        buckets, outside = map(int, lines[0].split()[:2])
        assert len(lines) == 10 and len(set(lines)) == 1  # no address changes from step to step
        assert 1 < buckets < 10 and outside == 0  # many gradients a storage, and nothing else
        sent = list(map(int, (tmp_path / f"sent{rank}").read_text().split()))
        assert sent[1:] == [buckets] * 9  # once a step, not once a micro-batch


COLLECTIVES = {  # what FSDP calls, in torch 2.13 and before
    "all_gather_single": "gather", "all_gather_into_tensor": "gather",
    "reduce_scatter_single": "scatter", "reduce_scatter_tensor": "scatter", "all_reduce": "reduce"}


def count_collectives(path):
    """A fault: write what rank 0 sends in the last step as lines: what, micro-batch, to whom."""
    def fault(rank):
        sent, micro_batches = [], []
        update, announce, dist = train.update, train.announce, torch.distributed

        def count(name):
            original = getattr(dist, name)

            def counted(*args, **kwargs):
                if "group" in kwargs:  # FSDP names it, train.py doesn't
                    sent.append(f"{COLLECTIVES[name]} {len(micro_batches)} "
                                f"{dist.get_process_group_ranks(kwargs['group'])}")
                return original(*args, **kwargs)

            setattr(dist, name, counted)

        def counted_update(*args):
            path.write_text("\n".join(sent))
            sent.clear()
            micro_batches.clear()
            return update(*args)

        def counted_announce(*args, **kwargs):
            micro_batches.append(1)
            announce(*args, **kwargs)

        if rank == 0:
            for name in COLLECTIVES.keys() & set(dir(dist)):
                count(name)
            train.update, train.announce = counted_update, counted_announce
    return fault


def one_bad_micro_batch_and_sgd(rank):
    """A fault: another optimiser, and a NaN in the second of a rank's 4 micro-batches in step 3."""
    train.make_optimizer = lambda model, settings: torch.optim.SGD(
        model.parameters(), lr=settings["lr"], momentum=0.9)
    forward, calls = GPT.forward, itertools.count()

    def spoiled(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        spoils = len(idx) > 1 and self.training and next(calls) == 3 * 4 + 1
        return logits, loss * (math.nan if spoils else 1)

    GPT.forward = spoiled


def the_same_by_plain_autograd(rank):
    """A fault: autograd makes each micro-batch's weight gradients and adds them up itself."""
    one_bad_micro_batch_and_sgd(rank)
    train.linear_layers = lambda model: []


@pytest.mark.parametrize("mode, checkpointing", [
    ("one", "--no_activation_checkpointing"), ("ddp", "--activation_checkpointing"),
    ("fsdp", "--no_activation_checkpointing"), *(pytest.param(*case, marks=pytest.mark.slow)
    for case in (("one", "--activation_checkpointing"), ("ddp", "--no_activation_checkpointing"),
                 ("fsdp", "--activation_checkpointing")))])
def test_gradients_that_add_up_in_place(arrays, tmp_path, mode, checkpointing):
    """The same bits as plain autograd's: losses, norms, weights and moments of 5 steps."""
    flags = ("--batch_tokens", 128 if mode == "one" else 256, "--micro_batch", 2,
             "--total_steps", 5, "--dropout", 0.1, checkpointing)
    go(arrays, tmp_path / "in_place", *flags, mode=mode, fault=one_bad_micro_batch_and_sgd)
    go(arrays, tmp_path / "plain", *flags, mode=mode, fault=the_same_by_plain_autograd)
    assert_same(tmp_path / "in_place", tmp_path / "plain")
    for key in ("loss", "grad_norm"):
        assert rows(tmp_path / "in_place", key) == rows(tmp_path / "plain", key)


def copies_must_be_fresh(rank):
    """A fault: a step with bf16 copies of older weights fails."""
    forward = GPT.forward

    def checked(self, *args):
        if self.training:
            for layer in train.linear_layers(self):
                assert torch.equal(layer.working, layer.weight.bfloat16())
        return forward(self, *args)

    GPT.forward = checked


def test_weights_cast_once_a_step(arrays, tmp_path):
    """bf16 copies of the weights that lag behind the update, or change a loss by a bit."""
    flags = ("--dtype", "bfloat16", "--total_steps", 3, "--warmup_steps", 0)
    go(arrays, tmp_path / "copies", *flags, fault=copies_must_be_fresh)
    go(arrays, tmp_path / "plain", *flags, fault=the_same_by_plain_autograd)
    assert rows(tmp_path / "copies")[1] == rows(tmp_path / "plain")[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_grid_sends_gradients_once_a_step(arrays, tmp_path, checkpointing):
    """A reduction in each micro-batch, weights that travel between nodes, or a wrong average."""
    flags = ("--batch_tokens", 256, "--micro_batch", 1, "--total_steps", 4)
    how = ("--activation_checkpointing",) if checkpointing else ()
    count = count_collectives(tmp_path / "sent")
    go(arrays, tmp_path / "one", *flags)
    go(arrays, tmp_path / "grid", *flags, *how, mode="grid", fault=count)
    assert rows(tmp_path / "grid") == pytest.approx(rows(tmp_path / "one"), rel=1e-6)
    # Three groups of parameters, the two blocks and the rest; [0, 1] is rank 0's node.
    expected = {"scatter 4 [0, 1]": 3, "reduce 4 [0, 2]": 3, "gather 1 [0, 1]": 3}
    if checkpointing:  # the blocks' weights are dropped and gathered again
        expected |= {f"gather {i} [0, 1]": 3 + 2 for i in (1, 2, 3, 4)}
    assert collections.Counter((tmp_path / "sent").read_text().splitlines()) == expected


def test_dropout_differs_between_ranks_and_seeds():
    """Seeds packed in 64 bits: the CPU's generator reads 32, so that all ranks drop alike."""
    draws = set()

    def model(x, y):
        draws.add(tuple(torch.rand(4).tolist()))
        raise StopIteration

    for rank, seed, step in ((0, 17, 3), (1, 17, 3), (0, 18, 3), (0, 17, 4)):
        process = train.Process(torch.device("cpu"), torch.float32, rank, 2)
        settings = {"seed": seed, "accumulation": 1, "micro_batch": 1, "seq_len": 16}
        with pytest.raises(StopIteration):
            train.train_step(model, None, iter([(0, 0)]), step, settings, process)
    assert len(draws) == 4


def test_changed_settings(arrays, tmp_path):
    """R9: a run goes on with another data order unnoticed, or refuses a harmless change."""
    out, other = tmp_path / "run", shutil.copytree(arrays, tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    meta["train"]["sha256"] = "0" * 64
    (other / "meta.json").write_text(json.dumps(meta))
    assert "sha256 differs" in go(other, out, "--verify", code=1)
    go(arrays, out, fault=at_step(6, terminate))
    for flags, name in ((("--seed", 1), "seed 17"), (("--n_embd", 32), "n_embd 16"),
                        (("--batch_tokens", 256), "batch_tokens 128"),
                        (("--seq_len", 8), "seq_len 16"),
                        (("--ignore_eot_targets",), "ignore_eot_targets False"),
                        (("--data", other), "data_fingerprint")):
        text = go(arrays, out, *flags, code=1)
        assert f"the run was made with {name}" in text
        assert "--fresh" in text
    text = go(arrays, out, "--lr", 0.01, "--micro_batch", 2, "--keep", 1)
    for change in ("lr 0.002 -> 0.01", "micro_batch 4 -> 2", "keep 2 -> 1"):
        assert f"changed on resume: {change}" in text
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["lr"] == 0.01
    text = go(arrays, out, "--lr", 0.5)
    assert "is finished: 20 steps" in text
    assert json.loads((out / "run.json").read_text()) == record
    assert "steps 20 to 22" in go(arrays, out, "--lr", 0.01, "--total_steps", 22)
    assert final(out)["step"] == 22
    (out / "run.json").write_text('{"settings": ')
    assert "run.json is damaged" in go(arrays, out, "--total_steps", 24, code=1)
    assert "steps 0 to 20" in go(arrays, out, "--fresh")


def test_start_from_weights(arrays, tmp_path, undisturbed):
    """--init ignored, or read again over the weights of a resumed run, or forgotten by run.json."""
    folder, out = tmp_path / "hf", tmp_path / "run"
    GPT.from_pretrained(undisturbed).save_pretrained(folder)
    flags = {"shape": (), "fault": at_step(6, terminate)}
    go(arrays, out, "--init", folder, **flags)
    assert rows(out, "val_loss")[0] == pytest.approx(rows(undisturbed, "val_loss")[20], rel=1e-5)
    dropped = tmp_path / "dropped"
    go(arrays, dropped, "--init", folder, "--dropout", 0.5, "--total_steps", 1, shape=())
    assert rows(dropped, "val_loss")[0] == rows(out, "val_loss")[0]
    assert rows(dropped)[1] > 1.001 * rows(out)[1]
    text = go(arrays, out, "--init", tmp_path, shape=(), code=1)
    assert "no config.json" in text
    text = go(arrays, out, "--init", undisturbed, shape=(), code=1)
    assert "the run was made with init" in text
    text = go(arrays, out)  # without --init it goes on, and still says where the weights came from
    assert "steps 7 to 20" in text
    assert json.loads((out / "run.json").read_text())["settings"]["init"] == str(folder)
    assert max(rows(out).values()) < rows(undisturbed)[10]


# ---------------------------------------------------------------------------------------------
# faults


def in_batch(split, number, act, ranks=(0, 1)):
    """A fault: act() before the first batch of the number-th iterator over a split's batches."""
    def fault(rank):
        name, calls = f"{split}_batches", []
        original = getattr(data, name)

        def batches(**which):
            calls.append(1)
            for batch in original(**which):
                if len(calls) == number and rank in ranks:
                    act()
                yield batch

        setattr(data, name, batches)
    return fault


@pytest.mark.parametrize("mode", ["one", "ddp"])
def test_signal_while_validating(arrays, tmp_path, undisturbed, mode):
    """R5: SIGTERM in a validation is lost, hangs a rank, or logs a part's loss as the whole's."""
    out = tmp_path / "run"
    text = go(arrays, out, mode=mode, fault=in_batch("val", 2, terminate, ranks=(0,)))
    assert "stopped at step 10" in text
    assert list(rows(out, "val_loss")) == [0]
    go(arrays, out, mode=mode)
    assert_same(out, undisturbed, atol=None if mode == "one" else 1e-5)
    assert rows(out, "val_loss") == pytest.approx(rows(undisturbed, "val_loss"), rel=1e-5)


def spoil_loss(steps, bad_rank):
    """A fault: the loss of one rank is NaN in these steps; no weight may change in them."""
    def fault(rank):
        step, update, loss_of = [0], train.update, model_module.cross_entropy

        def cross_entropy(*args):
            bad = step[0] in steps and rank == bad_rank and torch.is_grad_enabled()
            return loss_of(*args) * (math.nan if bad else 1)

        def checked_update(model, optimizer, *args):
            values = [*model.parameters(), *(t for of in optimizer.state.values()
                                             for t in of.values())]
            before = [t.detach().clone() for t in values]
            result = update(model, optimizer, *args)
            if step[0] in steps:
                for a, b in zip(before, values):
                    assert torch.equal(*(getattr(t, "_local_tensor", t) for t in (a, b)))
            step[0] += 1
            return result

        model_module.cross_entropy, train.update = cross_entropy, checked_update
    return fault


@pytest.mark.parametrize("mode", ["one", "ddp", "fsdp"])
def test_not_a_number(arrays, tmp_path, mode):
    """R6: NaN on one rank reaches weights, moments or step counts, or a checkpoint."""
    bad_rank = MODES[mode][0] - 1
    text = go(arrays, tmp_path / "run", "--log_every", 4, mode=mode,
              fault=spoil_loss((5, 6), bad_rank))
    for step, in_a_row in ((6, 1), (7, 2)):
        assert (f"loss of rank {bad_rank} was not finite at step {step}: update skipped, "
                f"{in_a_row} in a row") in text
    state = final(tmp_path / "run")
    assert state["step"] == 20 and state["transformer.wte.weight.step"] == 18
    assert all(t.isfinite().all() for t in state.values())


def test_not_a_number_in_a_row(arrays, tmp_path):
    """R6: a run whose every update is skipped goes on for weeks."""
    text = go(arrays, tmp_path / "run", fault=spoil_loss(range(8, 20), 0), code=1)
    assert "step 18: " in text and "10 in a row" in text
    assert final(tmp_path / "run")["step"] == 15
    assert all(t.isfinite().all() for t in final(tmp_path / "run").values())


def kill_in_save(stage, out):
    """A fault: SIGKILL at one stage of writing checkpoint 10."""
    module, name = {"half written": (torch, "save"), "before fsync": (os, "fsync"),
                    "before rename": (os, "replace"), "after rename": (train.Path, "unlink")}[stage]

    def fault(rank):
        original = getattr(module, name)

        def killing(*args, **kwargs):
            if any(out.glob("checkpoint_0000010*")):
                if stage == "half written":
                    original(*args, **kwargs)
                    args[-1].truncate(args[-1].tell() // 2)
                die()
            return original(*args, **kwargs)

        setattr(module, name, killing)
    return fault


@pytest.mark.parametrize("stage", ["half written", "before fsync", "before rename", "after rename"])
def test_killed_in_a_save(arrays, tmp_path, undisturbed, stage):
    """R4, R8: a kill while saving costs the run, or leaves what is taken for a checkpoint."""
    out = tmp_path / "run"
    go(arrays, out, "--keep", 1, fault=kill_in_save(stage, out), code=-signal.SIGKILL)
    assert final(out)["step"] == (10 if stage == "after rename" else 5)
    go(arrays, out, "--keep", 1)
    assert_same(out, undisturbed)
    assert rows(out) == rows(undisturbed)
    names = ["checkpoint_0000020.pt", "config.json", "lock", "log.jsonl", "merges.txt",
             "run.json", "vocab.json"]
    assert sorted(p.name for p in out.iterdir()) == names


def test_training_goes_on_while_a_checkpoint_is_written(arrays, tmp_path, undisturbed):
    """The loop waits for the disk, or a later step changes the weights that are being written."""
    stepped = threading.Event()

    def fault(rank):
        at_step(18, stepped.set)(rank)
        save = torch.save

        def late(contents, f):
            if contents["step"] == 15:
                assert stepped.wait(20)
            save(contents, f)

        torch.save = late

    go(arrays, tmp_path / "run", fault=fault)
    name = "checkpoint_0000015.pt"
    assert_same(tmp_path / "run", undisturbed)
    for out in (tmp_path / "run", undisturbed):
        (tmp_path / f"{out.name}15").mkdir()
        for file in (name, "config.json"):
            shutil.copy(out / file, tmp_path / f"{out.name}15")
    assert_same(tmp_path / "run15", tmp_path / "undisturbed15")


def test_saves_by_the_clock(arrays, tmp_path):
    """No save within --save_minutes, or one on the rank alone whose clock says so: a hang."""
    out = tmp_path / "run"

    def fault(rank):
        for step, minutes in ((3, 40), (7, 60)):  # on the clock of rank 1
            at_step(step, functools.partial(later, minutes), ranks=(1,))(rank)

    def later(minutes):
        now = time.monotonic
        time.monotonic = lambda: now() + 60 * minutes

    flags = ("--save_every", 0, "--save_minutes", 50, "--keep", 3)
    go(arrays, out, *flags, mode="ddp", fault=fault)
    assert [p.name for p in sorted(out.glob("*.pt"))] == [
        "checkpoint_0000008.pt", "checkpoint_0000020.pt"]


def test_one_owner(arrays, tmp_path, undisturbed):
    """Two trainings share a folder, or a training that was killed keeps the next one out."""
    out = tmp_path / "run"
    (first,), _ = start(arrays, out, fault=at_step(7, lambda: time.sleep(60)))
    while not (out / "checkpoint_0000005.pt").exists():
        time.sleep(0.1)
    text = go(arrays, out, "--fresh", code=1)
    assert f"another training owns {out}: process {first.pid} on {socket.gethostname()}" in text
    first.kill()
    first.join()
    assert "steps 5 to 20" in go(arrays, out)
    assert_same(out, undisturbed)


def test_damaged_checkpoints_are_skipped(arrays, tmp_path, undisturbed):
    """R4, R8, R10: a truncated newest file ends the run, counts as kept, or runs its pickle."""
    out = tmp_path / "run"
    go(arrays, out, fault=at_step(11, terminate))
    whole = out / "checkpoint_0000012.pt"
    (out / "checkpoint_0000013.pt").write_bytes(whole.read_bytes()[:-3000])
    torch.save(Spy(out / "ran"), out / "checkpoint_0000014.pt")
    (out / "checkpoint_0000019.pt").write_bytes(b"")
    text = go(arrays, out, "--keep", 1, fault=at_step(15, terminate))
    assert "steps 12 to 20" in text and not (out / "ran").exists()
    for step in (13, 14, 19):
        assert f"warning: skipping {out}/checkpoint_{step:07d}.pt" in text
    assert final(out)["step"] == 16  # 19 is damaged: it must not push 16 out
    go(arrays, out)
    assert_same(out, undisturbed)
    for path in out.glob("checkpoint_*.pt"):
        os.truncate(path, 100)
    assert "restore one, or" in go(arrays, out, code=1)
    assert len(rows(out)) == 20  # the log of a run that may yet be rescued


class Spy:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_full_disk(arrays, tmp_path, undisturbed):
    """R12: a save that fails ends the run, spoils the checkpoint before it, or goes unsaid."""
    out = tmp_path / "run"

    def fill(step, limit):
        return at_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))

    text = go(arrays, out, fault=fill(6, 50_000), code=1)
    assert "warning:" in text and "checkpoint_0000010.pt could not be written" in text
    assert "checkpoint_0000020.pt could not be written" in text
    assert "make room" in text
    assert [p.name for p in sorted(out.glob("checkpoint*"))] == ["checkpoint_0000005.pt"]
    go(arrays, out)
    assert_same(out, undisturbed)
    go(arrays, out, "--fresh", code=1, fault=fill(6, 800))  # not even room for a row of the log
    assert rows(out).keys() < rows(undisturbed).keys()


# ---------------------------------------------------------------------------------------------
# parts


def test_learning_rate():
    """R7: warm-up that starts at lr / n, a cosine that ends at 0 or is counted from step 0."""
    s = {"lr": 1.6e-4, "min_lr": 1.6e-5, "warmup_steps": 100, "total_steps": 300_000}
    middle = (300_000 + 100) // 2
    expected = {0: 0.0, 1: 1.6e-6, 50: 8e-5, 100: 1.6e-4, middle: 8.8e-5, 300_000: 1.6e-5,
                400_000: 1.6e-5, 100 + 299_900 // 3: 1.6e-5 + 1.44e-4 * 0.75}
    for step, lr in expected.items():
        assert train.learning_rate(step, s) == pytest.approx(lr, rel=1e-4 if step > 200 else 1e-12)


OPTIMIZERS = {
    "adamw": lambda model: train.make_optimizer(model, {"lr": 0.5, "weight_decay": 0.1}),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_update_of_any_optimiser(make, bad):
    """A step with NaN changes weights or state of an optimiser other than AdamW, or isn't clipped.

    The oracle takes the norm by hand, and gives its optimiser gradients that are clipped by hand.
    """
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(7, 5), torch.nn.Linear(7, 5)
    theirs.load_state_dict(ours.state_dict())
    optimizer, plain = make(ours), make(theirs)
    for group in plain.param_groups:
        group["lr"] = 0.01
    for scale in (0.01, bad, 100.0, bad, 1.0):  # below and above the clipping norm
        gradients = [torch.randn_like(p) for p in ours.parameters()]
        for p, gradient in zip(ours.parameters(), gradients):
            p.grad = scale * gradient
        norm = train.update(ours, optimizer, 0.01, 1.0)
        assert all(p.grad is None for p in ours.parameters())
        if scale is bad:
            assert not math.isfinite(norm)
        else:
            by_hand = scale * math.sqrt(sum(g.square().sum().item() for g in gradients))
            assert norm == pytest.approx(by_hand, rel=1e-5)
            for p, gradient in zip(theirs.parameters(), gradients):
                p.grad = gradient * (scale / max(1, by_hand))
            plain.step()
        for a, b in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
            assert optimizer.state[a].keys() == plain.state[b].keys()
            for name, value in plain.state[b].items():
                torch.testing.assert_close(optimizer.state[a][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("args", "mend"), [
    ("--batch_tokens 1000", "use --batch_tokens 896"),
    ("--micro_batch 3", "use one of 1, 2, 4, 8"),
    ("--device cuda:99", "is not available on this machine"),
    ("--device meta", "is not available on this machine"),
    ("--seq_len 256 --batch_tokens 2048", "use --seq_len 128"),
    ("--min_lr 5", "use at most --lr"),
    ("--preset biomedlm", "python data.py tokenize"),
])
def test_mistakes_name_their_mend(arrays, monkeypatch, args, mend):
    """A wrong flag ends in a traceback, or in a message that leaves the user to guess."""
    folder = [] if "biomedlm" in args else ["--data", str(arrays)]
    monkeypatch.setattr(sys, "argv", ["train.py", *folder, *args.split()])
    with pytest.raises(ValueError, match=mend):
        train.main()


@pytest.mark.parametrize("args", [
    "--lr -1", "--lr inf", "--lr nan", "--min_lr -1", "--min_lr nan", "--grad_clip nan",
    "--warmup_steps -5", "--seq_len 1", "--keep 0", "--dropout 1", "--n_layer 0",
    "--weight_decay inf"])
@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # torch, under capsys
def test_numbers_are_refused(monkeypatch, capsys, args):
    """A number that no run can use is taken: training crashes later, or spoils its weights."""
    monkeypatch.setattr(sys, "argv", ["train.py", *args.split()])
    with pytest.raises(SystemExit):
        train.main()
    assert f"{args.split()[1]} is refused: use a number from" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# slow tier

DEMO = ("--total_steps", 150, "--batch_tokens", 512, "--micro_batch", 4, "--save_every", 10,
        "--eval_every", 40, "--log_every", 5, "--warmup_steps", 10, "--seq_len", 64)


@pytest.mark.slow
def test_command_line_error(tmp_path):
    """A user's mistake ends in a traceback or in exit code 0."""
    done = run("train.py", "--data", tmp_path / "none")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("train.py: error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_twenty_random_kills(arrays, tmp_path):
    """R4: among twenty kill -9 at any moment one costs a file, a row, or changes the weights."""
    go(arrays, tmp_path / "whole", *DEMO, shape=())
    rng, out = random.Random(0), tmp_path / "run"
    for _ in range(20):
        processes, _ = start(arrays, out, *DEMO, shape=())
        time.sleep(rng.uniform(0.1, 2.5))
        processes[0].kill()
        processes[0].join()
    assert final(out)["step"] > 0
    go(arrays, out, *DEMO, shape=())
    assert_same(out, tmp_path / "whole")
    for key in ("loss", "val_loss"):  # a session's first step is logged too
        whole, cut = rows(tmp_path / "whole", key), rows(out, key)
        assert whole == {step: cut[step] for step in whole}
    names = [sorted(p.name for p in folder.iterdir()) for folder in (out, tmp_path / "whole")]
    assert names[0] == names[1]


def kill_while_writing(after):
    """A fault: a checkpoint takes 0.4 s to write; SIGKILL `after` seconds of the first one."""
    def fault(rank):
        save = torch.save

        def slow(contents, f):
            threading.Timer(after, die).start()
            whole = io.BytesIO()
            save(contents, whole)
            for part in range(40):
                size = len(whole.getvalue()) // 40 + 1
                f.write(whole.getvalue()[part * size:(part + 1) * size])
                time.sleep(0.01)

        torch.save = slow
    return fault


@pytest.mark.slow
def test_twenty_kills_while_a_checkpoint_is_written(arrays, tmp_path):
    """A kill while the thread writes costs the checkpoint before, or a resume is not exact."""
    flags = ("--total_steps", 300, "--save_every", 7, "--dropout", 0.1)
    go(arrays, tmp_path / "whole", *flags)
    rng, out, halves = random.Random(0), tmp_path / "run", 0
    for _ in range(20):
        fault = kill_while_writing(rng.uniform(0, 0.8))
        go(arrays, out, *flags, fault=fault, code=-signal.SIGKILL)
        halves += any(out.glob("*.tmp"))
    print(halves, "of 20 kills left half a file;", "newest", max(out.glob("*.pt")))
    assert halves >= 5
    go(arrays, out, *flags)
    assert_same(tmp_path / "whole", out)
    assert rows(tmp_path / "whole") == rows(out)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "micro_batch"), [("ddp", 4), ("fsdp", 2)])
def test_fifty_steps(arrays, tmp_path, mode, micro_batch):
    """R2 at the demo's shape over 50 steps: an error too small for 20 steps of a tiny model.

    Sums in another order part by about 1e-7 of the loss, and AdamW's division by sqrt(v) near 0
    makes more of it: 50 steps leave 1e-5; a wrong factor anywhere would leave 1e-2.
    """
    flags = (*DEMO, "--total_steps", 50, "--log_every", 1)
    go(arrays, tmp_path / "one", *flags, shape=())
    go(arrays, tmp_path / "two", *flags, "--micro_batch", micro_batch, mode=mode, shape=())
    ours, theirs = rows(tmp_path / "two"), rows(tmp_path / "one")
    print(mode, max(abs(ours[i] / theirs[i] - 1) for i in theirs))
    assert len(ours) == 50 and ours == pytest.approx(theirs, rel=1e-4)


def torchrun(script, *flags):
    # a fresh store for each round: in the agent's own, a restarted rank may find the dead one's
    # address under the same key, and gloo then gives up
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
           "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, flags[:-1]), str(script),
         *map(str, flags[-1])],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_nodes(arrays, tmp_path, undisturbed, parallel):
    """A node's ranks take the other's GPUs or data, or both write the run."""
    out, port = tmp_path / "run", free_port()
    argv = ("--data", arrays, "--out", out, "--parallel", parallel, *SHAPE, *SMALL)
    nodes = [torchrun(ROOT / "train.py", "--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend",
                      "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "two",
                      "--local_addr", "127.0.0.1", argv) for _ in range(2)]
    texts = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert sorted("validation loss" in text for text in texts) == [False, True]
    assert rows(out) == pytest.approx(rows(undisturbed), rel=1e-5)


@pytest.mark.slow
def test_restart_after_a_rank_dies(arrays, tmp_path, undisturbed):
    """R11: torchrun --max-restarts starts over, or the restarted ranks disagree on the step."""
    script, out = tmp_path / "dying.py", tmp_path / "run"
    script.write_text(f"""
import os, train
original, mark = train.train_step, {str(tmp_path / "died")!r}
def train_step(model, optimizer, batches, step, *rest):
    if step == 7 and os.environ["RANK"] == "1" and not os.path.exists(mark):
        open(mark, "w").close()
        os._exit(9)
    return original(model, optimizer, batches, step, *rest)
train.train_step = train_step
train.main()
""")
    argv = ("--data", arrays, "--out", out, *SHAPE, *SMALL)
    agent = torchrun(script, "--standalone", "--nproc_per_node", 2, "--max_restarts", 1, argv)
    text = agent.communicate(timeout=120)[0]
    assert agent.returncode == 0, text
    assert (tmp_path / "died").exists() and "steps 5 to 20" in text
    assert rows(out) == pytest.approx(rows(undisturbed), rel=1e-5)


SAVED_BYTES = """
import torch
import model as model_module
from model import GPT, GPTConfig

model_module.gpu = lambda: "sm_80"  # launch settings for bf16, which a CPU has not

def saved(n_layer, T, checkpointing):
    model = GPT(GPTConfig(n_layer=n_layer, n_head=2, n_embd=64, n_positions=64, vocab_size=128))
    model.train().activation_checkpointing = checkpointing
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}
    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return t
    x = torch.zeros(1, T, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16):
            model(x, x)
    return sum(storage.nbytes() for storage in kept.values())

for checkpointing in (False, True):
    more = [saved(n, 32, checkpointing) - saved(n, 16, checkpointing) for n in (2, 3)]
    print((more[1] - more[0]) / 16)
"""


@pytest.mark.slow
def test_planned_activations(tmp_path):
    """A block saves other tensors for backward, or wider ones, than `bench.py plan` counts."""
    script = tmp_path / "saved.py"
    script.write_text(SAVED_BYTES)
    done = run(script, env={"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)})
    C, H = 64, 2  # bytes a token that one more block saves, whole and checkpointed
    assert done.stdout.split() == [f"{36 * C + 4 * H + 16:.1f}", f"{6 * C:.1f}"], done.stderr
