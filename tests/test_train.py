"""train.py: exact resume, equal losses however the work is shared, and faults of every kind.

Runs are forked from this process, torch already imported, one process a rank, as torchrun would
start them. A fault is injected by a function that the forked process calls before train.main().
"""

import collections
import copy
import faulthandler
import functools
import hashlib
import io
import itertools
import json
import math
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
from unittest import mock

import numpy as np
import pytest
import torch
import torch._dynamo  # the optimiser imports it; here, before forking, it is paid for once
import torch.nn.functional as F
from conftest import ROOT, run
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import data
import model as model_module
import train
from model import GPT
from tokenizer import ALPHABET, Tokenizer, run_command

SHAPE = ("--n_layer", 2, "--n_head", 2, "--n_embd", 16)
SMALL = ("--seq_len", 16, "--batch_tokens", 128, "--micro_batch", 4, "--eval_every", 10,
         "--eval_tokens", 300, "--save_every", 5, "--log_every", 1, "--warmup_steps", 3,
         "--total_steps", 20)
# processes, of them on a node, and how they share: grid is two nodes of two GPUs
MODES = {"one": (1, 1, "ddp"), "ddp": (2, 2, "ddp"), "fsdp": (2, 2, "fsdp"),
         "grid": (4, 2, "fsdp")}

# ---------------------------------------------------------------------------------------------
# arrays, processes, faults


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """A folder of arrays over the tokenizer of bare bytes: numbers that mostly count upwards."""
    folder = tmp_path_factory.mktemp("arrays")
    tokenizer = Tokenizer({c: i for i, c in enumerate(["<|endoftext|>", *ALPHABET])}, [])
    tokenizer.save(folder)
    rng = np.random.default_rng(0)
    meta = {"dtype": "uint16", "vocab_size": 257, "eot_id": 0, "eot": True, "seed": 17,
            "tokenizer_sha256": tokenizer.fingerprint}
    for split, count, n_bytes in (("train", 3000, 6000), ("val", 250, 750)):
        tokens = (np.cumsum(rng.integers(1, 4, count)) % 250).astype(np.uint16)
        tokens[::7] = 0
        tokens.tofile(folder / f"{split}.bin")
        meta[split] = {"tokens": count, "documents": 10, "bytes": n_bytes,
                       "sha256": hashlib.sha256(tokens).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def rank_main(rank, world_size, node_size, port, argv, fault, output):
    sys.stdout = sys.stderr = open(output, "a", 1)  # noqa: SIM115
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
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
    run_command(train.main)


def start(arrays, out, *flags, mode="one", fault=None, shape=SHAPE):
    """Start a small run; returns its processes and the file of their output."""
    world_size, node_size, parallel = MODES[mode]
    argv = ["--data", arrays, "--out", out, "--parallel", parallel, *shape, *SMALL, *flags]
    output, port = Path(f"{out}.output"), free_port()
    output.unlink(missing_ok=True)
    context = torch.multiprocessing.start_processes(
        rank_main, (world_size, node_size, port, argv, fault, output), world_size, join=False,
        start_method="fork")
    return context.processes, output


def go(*args, code=0, **how):
    """A small run to its end; returns what it printed. `code`: the exit code expected of all."""
    processes, output = start(*args, **how)
    for p in processes:
        p.join(60)
        p.kill()
    text = output.read_text()
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
    """The newest checkpoint: weights, the optimiser's state of each, and the step."""
    _, contents = model_module.newest_checkpoint(out)
    return contents | {"optimizer": contents["optimizer"]["state"]}


def assert_same(a, b, atol=0.0):
    """The newest checkpoints of two runs are bit-equal, or their numbers differ by atol at most."""
    torch.testing.assert_close(final(a), final(b), atol=atol, rtol=100 * atol)


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


terminate = functools.partial(signal.raise_signal, signal.SIGTERM)
die = functools.partial(signal.raise_signal, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(arrays, tmp_path_factory):
    """Folder of a whole run of one process without dropout: what the others must equal."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    go(arrays, out)
    return out


# ---------------------------------------------------------------------------------------------
# resume and sharing of work


def in_validation(rank):
    """A fault: SIGTERM on rank 0 at the first validation."""
    evaluate = train.evaluate

    def interrupted(*args):
        if rank == 0:
            terminate()
        return evaluate(*args)

    train.evaluate = interrupted


@pytest.mark.parametrize("mode", ["one", "ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_resume_is_bit_exact(arrays, tmp_path, undisturbed, mode):
    """R1, R5: a resumed run repeats data, skips a step, or draws other dropout masks; SIGTERM in a
    validation is lost, hangs a rank, or logs a part's loss as the whole's."""
    whole, out, flags = tmp_path / "whole", tmp_path / "cut", ("--dropout", 0.1)
    go(arrays, whole, *flags, mode=mode)
    for step, fault in ((8, at_step(7, terminate, ranks=(0,))), (10, in_validation)):
        text = go(arrays, out, *flags, mode=mode, fault=fault)
        assert f"stopped at step {step}" in text and final(out)["step"] == step
    assert list(rows(out, "val_loss")) == [0]
    go(arrays, out, *flags, mode=mode)
    assert_same(whole, out)
    for key in ("loss", "val_loss"):
        assert rows(whole, key) == rows(out, key)
    # before the first step dropout makes no difference: none in a validation
    assert rows(out, "val_loss")[0] == pytest.approx(rows(undisturbed, "val_loss")[0], rel=1e-6)


@pytest.mark.parametrize(("mode", "flags"), [
    ("one", "--micro_batch 2"), ("ddp", "--micro_batch 4"), ("ddp", "--micro_batch 1"),
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
    argv = [f"--{name}={value}" for name, value in flags.items()]
    go(arrays, out, *argv, "--ignore_eot_targets")
    which = {"data_dir": arrays, "seq_len": 16, "micro_batch": 8, "ignore_eot": True}
    torch.manual_seed(3)
    config = model_module.GPTConfig.preset("demo", n_layer=2, n_head=2, n_embd=16, vocab_size=257,
                                           eot_id=0)
    assert GPT.config_of(out) == config
    model, batches = GPT(config), data.train_batches(**which, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=4)
    cosine = [0.002 + 0.009 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
    expected = {}
    for step, lr in enumerate([0, 0.01, *cosine]):
        if step % 3 == 0:
            x, y = map(torch.cat, zip(*data.val_batches(**which, max_tokens=100)))
            nats = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).item()
            expected[step, "val_loss"] = nats
            expected[step, "val_bits_per_byte"] = nats * math.log2(math.e) / 3
        x, y = next(batches)
        loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten(), reduction="sum") / (8 * 15)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3).item()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        row = {"loss": loss.item(), "grad_norm": norm, "lr": lr, "tokens": 128 * (step + 1)}
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
    for preset, *expected in (("biomedlm", 1.6e-4, 1.6e-5, 2**20, 1024, 0.1, "fsdp"),
                              ("biomedlm-125m", 6e-4, 6e-5, 2**19, 1024, 0.1, "ddp"),
                              ("demo", 2e-3, 2e-4, 1024, 128, 0.0, "ddp")):
        argv = ["train.py", "--preset", preset, "--data", "x", "--total_steps", "40"]
        monkeypatch.setattr(sys, "argv", argv)
        settings = train.read_settings()
        names = ("lr", "min_lr", "batch_tokens", "seq_len", "dropout", "parallel")
        assert [settings[name] for name in names] == pytest.approx(expected)
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
    """A fault: note before each update in how many storages the gradients lie, what else these
    hold, how many reductions were sent, and all addresses. DDP's buckets are small here."""
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
            more = sum(held.values()) - sum(g.nbytes for g in gradients)
            with open(folder / f"rank{rank}", "a") as f:
                print([len(held), more, len(sent), [g.data_ptr() for g in gradients]], file=f)
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
    first, *others = map(json.loads, (tmp_path / "rank1").read_text().splitlines())
    buckets, more, _, addresses = first
    assert 1 < buckets < 10 and more == 0  # many gradients a storage, and nothing else
    # one reduction a step, not one a micro-batch; no address changes from step to step
    assert others == [[buckets, 0, buckets, addresses]] * 9


COLLECTIVES = {  # what FSDP calls, in torch 2.13 and before
    "all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor",
    "all_reduce"}


def count_collectives(path):
    """A fault: write what rank 0 sends in the last step as lines: what, micro-batch, to whom."""
    def fault(rank):
        sent, update, dist = [], train.update, torch.distributed
        train.announce = mock.Mock(wraps=train.announce)  # called before each micro-batch

        def count(name):
            original = getattr(dist, name)

            def counted(*args, **kwargs):
                if "group" in kwargs:  # FSDP names it, train.py doesn't
                    sent.append(f"{name[:10]} {train.announce.call_count} "
                                f"{dist.get_process_group_ranks(kwargs['group'])}")
                return original(*args, **kwargs)

            setattr(dist, name, counted)

        def counted_update(*args):
            if rank == 0:
                path.write_text("\n".join(sent))
            sent.clear()
            train.announce.reset_mock()
            return update(*args)

        for name in COLLECTIVES & set(dir(dist)):
            count(name)
        train.update = counted_update
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
    expected = {"reduce_sca 4 [0, 1]": 3, "all_reduce 4 [0, 2]": 3, "all_gather 1 [0, 1]": 3}
    if checkpointing:  # the blocks' weights are dropped and gathered again
        expected |= {f"all_gather {i} [0, 1]": 3 + 2 for i in (1, 2, 3, 4)}
    assert collections.Counter((tmp_path / "sent").read_text().splitlines()) == expected


def test_dropout_differs_between_ranks_and_seeds():
    """Seeds packed in 64 bits: the CPU's generator reads 32, so that all ranks drop alike."""
    draws = set()

    def model(x, y):
        draws.add(torch.rand(1).item())
        raise StopIteration

    settings = {"accumulation": 1, "micro_batch": 1, "seq_len": 16}
    for rank, seed, step in ((0, 17, 3), (1, 17, 3), (0, 18, 3), (0, 17, 4)):
        process = train.Process(torch.device("cpu"), torch.float32, rank, 2)
        with pytest.raises(StopIteration):
            train.train_step(model, None, iter([(0, 0)]), step, settings | {"seed": seed}, process)
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
        assert f"the run was made with {name}" in go(arrays, out, *flags, code=1)
    text = go(arrays, out, "--lr", 0.01, "--micro_batch", 2, "--keep", 1)
    for change in ("lr 0.002 -> 0.01", "micro_batch 4 -> 2", "keep 2 -> 1"):
        assert f"changed on resume: {change}" in text
    assert "is finished: 20 steps" in go(arrays, out, "--lr", 0.5)
    assert json.loads((out / "run.json").read_text())["settings"]["lr"] == 0.01
    assert "steps 20 to 22" in go(arrays, out, "--lr", 0.01, "--total_steps", 22)
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
    text = go(arrays, out, "--init", undisturbed, shape=(), code=1)
    assert "the run was made with init" in text
    assert "steps 7 to 20" in go(arrays, out)  # without --init it goes on
    assert json.loads((out / "run.json").read_text())["settings"]["init"] == str(folder)


# ---------------------------------------------------------------------------------------------
# faults


def spoil_loss(steps, bad_rank):
    """A fault: the loss of one rank is NaN in these steps."""
    def fault(rank):
        train_step, loss_of = train.train_step, model_module.cross_entropy

        def spoilt(*args):
            return loss_of(*args) * math.nan

        def spoiling(model, optimizer, batches, step, *rest):
            bad = step in steps and rank == bad_rank
            model_module.cross_entropy = spoilt if bad else loss_of
            return train_step(model, optimizer, batches, step, *rest)

        train.train_step = spoiling
    return fault


@pytest.mark.parametrize("mode", ["one", "ddp", "fsdp"])
def test_not_a_number(arrays, tmp_path, mode):
    """R6: NaN on one rank reaches weights, moments or step counts, or a checkpoint; a run whose
    every update is skipped goes on for weeks."""
    out, bad_rank = tmp_path / "run", MODES[mode][0] - 1
    fault = spoil_loss((2, 3, *range(8, 20)), bad_rank)
    text = go(arrays, out, "--log_every", 4, mode=mode, fault=fault, code=1)
    for step, in_a_row in ((3, 1), (4, 2), (18, 10)):
        assert f"loss of rank {bad_rank} was not finite at step {step}: " in text
        assert f"{in_a_row} in a row" in text
    assert "step 19" not in text
    state = final(out)
    assert state["step"] == 15 and state["optimizer"]["transformer.wte.weight"]["step"] == 6
    assert all(t.isfinite().all() for t in state["model"].values())


def kill_in_save(stage, out):
    """A fault: SIGKILL at one stage of writing checkpoint 10."""
    module, name = {"half written": (torch, "save"), "before rename": (os, "replace"),
                    "after rename": (train.Path, "unlink")}[stage]

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


@pytest.mark.parametrize("stage", ["half written", "before rename", "after rename"])
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
    assert_same(tmp_path / "run", undisturbed)
    late, prompt = (model_module.load_tensors(out / "checkpoint_0000015.pt")["model"]
                    for out in (tmp_path / "run", undisturbed))
    torch.testing.assert_close(late, prompt, rtol=0, atol=0)


def test_saves_by_the_clock(arrays, tmp_path):
    """No save within --save_minutes, or one on the rank alone whose clock says so: a hang."""
    out = tmp_path / "run"

    def fault(rank):
        for step, minutes in ((3, 40), (7, 60)):  # on the clock of rank 1
            at_step(step, functools.partial(later, minutes), ranks=(1,))(rank)

    def later(minutes):
        now = time.monotonic
        time.monotonic = lambda: now() + 60 * minutes

    go(arrays, out, "--save_every", 0, "--save_minutes", 50, "--keep", 3, mode="ddp", fault=fault)
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
    """R4, R8: a truncated newest file ends the run, or counts as kept."""
    out = tmp_path / "run"
    go(arrays, out, fault=at_step(11, terminate))
    whole = out / "checkpoint_0000012.pt"
    (out / "checkpoint_0000019.pt").write_bytes(whole.read_bytes()[:-3000])
    text = go(arrays, out, "--keep", 1, fault=at_step(15, terminate))
    assert "steps 12 to 20" in text
    assert f"warning: skipping {out}/checkpoint_0000019.pt" in text
    assert final(out)["step"] == 16  # 19 is damaged: it must not push 16 out
    go(arrays, out)
    assert_same(out, undisturbed)
    for path in out.glob("checkpoint_*.pt"):
        os.truncate(path, 100)
    assert "restore one, or" in go(arrays, out, code=1)
    assert len(rows(out)) == 20  # the log of a run that may yet be rescued


def test_full_disk(arrays, tmp_path, undisturbed):
    """R12: a save that fails ends the run, spoils the checkpoint before it, or goes unsaid."""
    out = tmp_path / "run"

    def fill(step, limit):
        return at_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))

    text = go(arrays, out, fault=fill(6, 50_000), code=1)
    for step in (10, 20):
        assert f"checkpoint_{step:07d}.pt could not be written" in text
    assert "warning:" in text and "make room" in text
    assert [p.name for p in sorted(out.glob("checkpoint*"))] == ["checkpoint_0000005.pt"]
    go(arrays, out)
    assert_same(out, undisturbed)

# ---------------------------------------------------------------------------------------------
# parts


@pytest.mark.parametrize("make", [
    lambda model: train.make_optimizer(model, {"lr": 0.5, "weight_decay": 0.1}),
    lambda model: torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)], ids=["adamw", "sgd"])
def test_update_of_any_optimiser(make):
    """A step with NaN changes weights or state of an optimiser other than AdamW, or isn't clipped.

    The oracle takes the norm by hand, and gives its optimiser gradients that are clipped by hand.
    """
    torch.manual_seed(0)
    ours = torch.nn.Linear(7, 5, bias=False)
    theirs = copy.deepcopy(ours)
    optimizer, plain = make(ours), make(theirs)
    plain.param_groups[0]["lr"] = 0.01
    for scale in (0.01, math.nan, 100.0, math.inf, 1.0):  # below and above the clipping norm
        gradient = torch.randn(5, 7)
        ours.weight.grad = scale * gradient
        norm = train.update(ours, optimizer, 0.01, 1.0)
        assert ours.weight.grad is None
        assert math.isfinite(norm) == math.isfinite(scale)
        if math.isfinite(scale):
            by_hand = scale * math.sqrt(gradient.square().sum())
            assert norm == pytest.approx(by_hand, rel=1e-5)
            theirs.weight.grad = gradient * (scale / max(1, by_hand))
            plain.step()
        torch.testing.assert_close([ours.weight, dict(optimizer.state[ours.weight])],
                                   [theirs.weight, dict(plain.state[theirs.weight])])


@pytest.mark.parametrize(("args", "mend"), [
    ("--batch_tokens 1000", "use --batch_tokens 896"),
    ("--micro_batch 3", "use one of 1, 2, 4, 8"),
    ("--device cuda:99", "is not available on this machine"),
    ("--device meta", "is not available on this machine"),
    ("--seq_len 256 --batch_tokens 2048", "use --seq_len 128"),
    ("--min_lr 5", "use at most --lr"),
    ("--preset biomedlm", "python data.py tokenize"),
    *[(args, f"{args.split()[1]} is refused: use a number from") for args in (
        "--lr -1", "--lr inf", "--lr nan", "--min_lr -1", "--min_lr nan", "--grad_clip nan",
        "--warmup_steps -5", "--seq_len 1", "--keep 0", "--dropout 1", "--n_layer 0",
        "--weight_decay inf")]])
@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # torch, under capsys
def test_mistakes_name_their_mend(arrays, monkeypatch, capsys, args, mend):
    """A wrong flag ends in a traceback, or in a message that leaves the user to guess; a number
    that no run can use is taken."""
    folder = [] if "biomedlm" in args else ["--data", str(arrays)]
    monkeypatch.setattr(sys, "argv", ["train.py", *folder, *args.split()])
    with pytest.raises(SystemExit) as ended:
        run_command(train.main)
    assert mend in f"{ended.value}{capsys.readouterr().err}"


# ---------------------------------------------------------------------------------------------
# slow tier

def kill_later(seconds):
    """A fault: SIGKILL so much later; a checkpoint takes 0.4 s to write."""
    def fault(rank):
        save = torch.save

        def slow(contents, f):
            whole = io.BytesIO()
            save(contents, whole)
            size = len(whole.getvalue()) // 40 + 1
            whole.seek(0)
            while part := whole.read(size):
                f.write(part)
                time.sleep(0.01)

        torch.save = slow
        threading.Timer(seconds, die).start()
    return fault


@pytest.mark.slow
def test_twenty_random_kills(arrays, tmp_path):
    """R4: one of twenty kill -9 at any moment, most of them while the thread writes, costs a file,
    a row or the checkpoint before, or changes the weights."""
    flags = ("--total_steps", 300, "--save_every", 7, "--dropout", 0.1)
    rng, out, whole, halves = random.Random(0), tmp_path / "run", tmp_path / "whole", 0
    go(arrays, whole, *flags)
    for _ in range(20):
        go(arrays, out, *flags, fault=kill_later(rng.uniform(0.1, 2.5)), code=-signal.SIGKILL)
        halves += any(out.glob("*.tmp"))
    assert halves >= 5
    go(arrays, out, *flags)
    assert_same(whole, out)
    for key in ("loss", "val_loss"):
        assert rows(whole, key) == rows(out, key)
    names = [sorted(p.name for p in folder.iterdir()) for folder in (out, whole)]
    assert names[0] == names[1]


def torchrun(script, *flags):
    # a fresh store for each round: in the agent's own, a restarted rank may find the dead one's
    # address under the same key, and gloo then gives up
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
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
