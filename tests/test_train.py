"""train.py: exact resume, equal losses however the work is shared, and faults of every kind.

Habits. `arrays` is a tiny corpus, `out` the folder of the run under test, `undisturbed` that of a
whole run, which others must equal. go(out, flags, ...) runs train.main() to its end and returns
what it printed. Its processes, one a rank, are forked from this one, which has imported torch.
A fault is a function of the rank that a forked process calls first. It replaces a part of train.py,
kills, sends a signal or spoils a loss there. This process stays as it was.
"""

import collections
import faulthandler
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._dynamo  # the optimiser imports it; here, before forking, it is paid for once
import torch.nn.functional as F
from conftest import ROOT, run
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import model as model_module
import train
from model import GPT, config_of
from tokenizer import ALPHABET, Tokenizer, run_command

SHAPE = "--n_layer 2 --n_head 2 --n_embd 16"
SMALL = ("--seq_len 16 --batch_tokens 128 --micro_batch 4 --eval_every 10 --eval_tokens 300 "
         "--save_every 5 --log_every 1 --warmup_steps 3 --total_steps 20")
# processes, of them on a node, and how they share: grid is two nodes of two GPUs
MODES = {"one": (1, 1, "ddp"), "ddp": (2, 2, "ddp"), "fsdp": (2, 2, "fsdp"),
         "grid": (4, 2, "fsdp")}

# ---------------------------------------------------------------------------------------------
# arrays, processes, faults


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """A folder of arrays: short documents, over the tokenizer of bare bytes. End-of-text is 0."""
    folder = tmp_path_factory.mktemp("arrays")
    rng = random.Random(0)
    data.write_lines(folder / "text.jsonl", [
        {"id": i, "text": f"{rng.random()}\u03b2 {rng.random()}"} for i in range(100)])
    Tokenizer({c: i for i, c in enumerate(["<|endoftext|>", *ALPHABET])}, []).save(folder)
    data.tokenize(folder / "text.jsonl", folder, folder, val_fraction=0.08)
    return folder


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def rank_main(rank, world_size, node_size, port, argv, fault, output):
    sys.stdout = sys.stderr = open(output, "a", 1)  # noqa: SIM115
    train.tqdm.set_lock(threading.RLock())  # forks share its own: one killed while writing keeps it
    faulthandler.dump_traceback_later(50)
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % node_size),
                          WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(node_size),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = ["train.py", *argv]
    if fault:
        fault(rank)
    run_command(train.main)


def start(arrays, out, flags="", mode="one", fault=None, shape=SHAPE):
    """Start a small run; returns its processes and the file of their output."""
    world_size, node_size, parallel = MODES[mode]
    flags = f"--data {arrays} --out {out} --parallel {parallel} {shape} {SMALL} {flags}"
    output = Path(f"{out}.output")
    output.unlink(missing_ok=True)
    context = torch.multiprocessing.start_processes(
        rank_main, (world_size, node_size, free_port(), flags.split(), fault, output), world_size,
        join=False, start_method="fork")
    return context.processes, output


@pytest.fixture(scope="module")
def go(arrays):
    """A small run to its end; returns what it printed. `code`: the exit code expected of all."""
    def go(out, flags="", code=0, **how):
        processes, output = start(arrays, out, flags, **how)
        for p in processes:
            p.join(60)
            p.kill()
        text = output.read_text()
        assert [p.exitcode for p in processes] == [code] * len(processes), text
        return text
    return go


@pytest.fixture
def out(tmp_path):
    """The folder of the run that is tested."""
    return tmp_path / "run"


def rows(out, key="loss"):
    """{step: value} of log.jsonl, where no step may stand twice."""
    values = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        if key in row:
            assert row["step"] not in values
            values[row["step"]] = row[key]
    return values


def final(out):
    """The newest checkpoint: weights, the optimiser's state of each, and the step."""
    contents = model_module.newest_checkpoint(out)
    return contents | {"optimizer": contents["optimizer"]["state"]}


def assert_same(a, b, atol=0.0):
    """The newest checkpoints and logs of two runs are bit-equal, or nearly so. A NaN in the log
    equals another, one in a checkpoint nothing."""
    torch.testing.assert_close(final(a), final(b), atol=atol, rtol=100 * atol)
    for key in ("loss", "val_loss", "grad_norm"):
        expected = pytest.approx(rows(b, key), rel=10 * atol, abs=0, nan_ok=True)
        assert rows(a, key) == expected


def printed(text):
    """The lists that a fault printed as lines of JSON."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("[")]


def before(owner, name, act):
    """From now on each call of owner.name(...) calls act(...) first."""
    original = getattr(owner, name)

    def both(*args, **options):
        act(*args, **options)
        return original(*args, **options)

    setattr(owner, name, both)


def at_step(step, act, ranks=range(4)):
    """A fault: act() in the middle of the update after `step`."""
    def fault(rank):
        def check(*args):
            if args[3] == step and rank in ranks:
                act()

        before(train, "train_step", check)
    return fault


terminate = partial(signal.raise_signal, signal.SIGTERM)
die = partial(signal.raise_signal, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(go, tmp_path_factory):
    """Folder of a whole run of one process without dropout: what the others must equal."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    go(out)
    return out


# ---------------------------------------------------------------------------------------------
# resume and sharing of work


def in_validation(rank):
    """A fault: SIGTERM on rank 0 at the first validation."""
    if rank == 0:
        before(train, "evaluate", lambda *_: terminate())


@pytest.mark.parametrize("mode", ["one", "ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_resume_is_bit_exact(go, out, tmp_path, undisturbed, mode):
    """A resumed run repeats data, skips a step, or draws other dropout masks; SIGTERM in a
    validation is lost, hangs a rank, or logs a part's loss as the whole's."""
    whole, flags = tmp_path / "whole", "--dropout 0.1"
    go(whole, flags, mode=mode)
    for step, fault in ((8, at_step(7, terminate, ranks=(0,))), (10, in_validation)):
        text = go(out, flags, mode=mode, fault=fault)
        assert f"stopped at step {step}" in text and final(out)["step"] == step
    go(out, flags, mode=mode)
    assert_same(whole, out)
    # before the first step dropout makes no difference: none in a validation
    assert rows(out, "val_loss")[0] == pytest.approx(rows(undisturbed, "val_loss")[0], rel=1e-6)


def unlike_ranks(stop):
    """A fault: each rank draws other weights, prints how many it then holds, and ends at `stop`."""
    def tell(model, process):
        parts = [getattr(p, "to_local", p.detach)() for p in model.parameters()]
        print(json.dumps([sum(part.numel() for part in parts)]))

    def fault(rank):
        before(train, "distribute", lambda gpt, *_: gpt.transformer.wte.weight.data.add_(rank))
        before(train, "settle_gradients", tell)
        at_step(stop - 1, terminate)(rank)
    return fault


def test_losses_do_not_depend_on_the_sharing_by_ddp_or_fsdp(go, out, undisturbed):
    """Gradients summed instead of averaged, or synchronised for the wrong micro-batch; ranks that
    go on with unlike weights; FSDP where every rank holds the whole model; a checkpoint of one
    world size or mode that holds shards, or names that another can't read.

    fp32 sums in another order differ by about 1e-7 of the loss a step; 20 steps leave under 1e-5.
    """
    flags = "--micro_batch 1 --activation_checkpointing"
    whole = 12_752  # parameters
    for step, mode, held in ((3, "fsdp", whole / 2), (6, "ddp", whole), (9, "fsdp", whole / 2),
                             (12, "grid", whole / 2), (15, "ddp", whole)):
        for (n,) in printed(go(out, flags, mode=mode, fault=unlike_ranks(step))):
            assert n == pytest.approx(held, rel=0.01)
        assert final(out)["step"] == step
    assert "changed on resume: world_size 2 -> 1" in go(out)
    assert_same(out, undisturbed, atol=1e-6)


def slower_and_slower(rank):
    """A fault: a clock on which step 1 takes a second, step 2 five, step 3 nine."""
    calls = itertools.count()
    time.perf_counter = lambda: next(calls) ** 2


def test_run_equals_a_plain_loop(arrays, go, out):
    """A flag that reaches nothing, or one of two places; a loss, mean, rate or unit that is off.

    Every flag differs from its default. The oracle is a loop without accumulation or clock.
    """
    flags = ("--seed 3 --grad_clip 1.5 --weight_decay 4 --lr 0.02 --warmup_steps 2 --total_steps 6 "
             "--micro_batch 2 --eval_every 3 --eval_tokens 100 --ignore_eot_targets")
    go(out, flags, fault=slower_and_slower)
    which = {"data_dir": arrays, "seq_len": 16, "micro_batch": 8, "ignore_eot": True}
    torch.manual_seed(3)
    config = model_module.GPTConfig.preset("demo", n_layer=2, n_head=2, n_embd=16, vocab_size=257,
                                           eot_id=0)
    assert config_of(out) == config
    model, batches = GPT(config), data.train_batches(**which, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=4)
    val = data.load_meta(arrays)["val"]
    cosine = [0.002 + 0.009 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
    expected = []
    for step, lr in enumerate([0, 0.01, *cosine]):
        if step % 3 == 0:
            x, y = map(torch.cat, zip(*data.val_batches(**which, max_tokens=100)))
            nats = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).item()
            bits = nats / math.log(2) * val["tokens"] / val["bytes"]
            expected.append({"step": step, "val_loss": nats, "val_bits_per_byte": bits})
        if step == 6:
            break
        x, y = next(batches)
        loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten(), reduction="sum") / (8 * 15)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.5).item()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        expected.append({"step": step + 1, "tokens": 128 * (step + 1), "loss": loss.item(),
                         "lr": lr, "grad_norm": norm, "tokens_per_s": 128 / (4 * step + 1)})
    norms = rows(out, "grad_norm").values()
    assert min(norms) < 1.5 < max(norms)  # AdamW would not see that all are scaled alike
    for line, row in zip((out / "log.jsonl").read_text().splitlines(), expected, strict=True):
        logged = json.loads(line)
        assert {key: logged[key] for key in row} == pytest.approx(row, rel=1e-4)


def test_presets(monkeypatch):
    """A preset with another one's numbers, or a default that no longer follows its flag."""
    flags = "train.py --preset biomedlm --data x --total_steps 40"
    monkeypatch.setattr(sys, "argv", flags.split())
    settings = train.read_settings()
    assert (settings.lr, settings.dropout, settings.warmup_steps) == (1.6e-4, 0.1, 40)
    assert (settings.batch_tokens, settings.parallel) == (2**20, "fsdp")
    assert settings.min_lr == pytest.approx(1.6e-5)


def watch_gradients(rank):
    """A fault: rank 1 prints before each step how many reductions it sent since the one before, and
    where the gradients' storages lie."""
    sent = []

    def count(state, bucket):
        sent.append(1)
        return allreduce_hook(None, bucket)

    def watch(model, *_):
        held = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
        print(json.dumps([len(sent), sorted(held)]))
        sent.clear()

    if rank == 1:
        before(train, "settle_gradients", lambda model, _: model.register_comm_hook(None, count))
        before(train, "train_step", watch)


def test_ddp_holds_gradients_once(go, out):
    """Gradients lie beside DDP's buckets, from the start or later: 10.4 GB more for BioMedLM."""
    go(out, "--micro_batch 1", mode="ddp", fault=at_step(9, terminate))
    (_, held), *others = printed(go(out, "--micro_batch 1", mode="ddp", fault=watch_gradients))
    # one reduction a bucket and step, not one a micro-batch; the storages are the buckets and stay
    assert others == [[len(held), held]] * 9


def count_collectives(rank):
    """A fault: rank 0 prints what it sent in each step: what, in which micro-batch, to whom."""
    sent, dist = [], torch.distributed
    train.sync_gradients = mock.Mock(wraps=train.sync_gradients)  # before each micro-batch

    def note(name, *_, group=None, **options):
        if group:  # FSDP names it, train.py doesn't
            sent.append(f"{name[:10]} {train.sync_gradients.call_count} "
                        f"{dist.get_process_group_ranks(group)}")

    def end_step(*_):
        print(json.dumps(sent))
        sent.clear()
        train.sync_gradients.reset_mock()

    if rank == 0:
        for name in dir(dist):  # *_single in torch 2.13, before it *_tensor
            if name.startswith(("all_gather_", "reduce_scatter_", "all_reduce")):
                before(dist, name, partial(note, name))
        before(torch.optim.AdamW, "step", end_step)


def spoil_loss(bad, ranks=range(4)):
    """A fault: the loss is NaN in these micro-batches of the run."""
    def fault(rank):
        loss_of, calls = model_module.cross_entropy, itertools.count()

        def begin(*_, **__):
            factor = math.nan if next(calls) in bad and rank in ranks else 1
            model_module.cross_entropy = lambda *args, **how: factor * loss_of(*args, **how)

        before(train, "sync_gradients", begin)  # it is called before each micro-batch
    return fault


def one_bad_micro_batch_and_sgd(rank):
    """A fault: another optimiser, and a NaN within a step, in a rank's 14th micro-batch. On a CPU
    autograd makes each micro-batch's weight gradients and adds them up itself."""
    train.make_optimizer = lambda model, settings: torch.optim.SGD(model.parameters(), momentum=0.9)
    spoil_loss([13])(rank)


def add_up_in_place(model, *_):
    """What train.speed_up does on a GPU."""
    for layer in train.linear_layers(model):
        layer.accumulates = True


def the_same_in_place(rank):
    """A fault: weight gradients add up as on a GPU."""
    one_bad_micro_batch_and_sgd(rank)
    train.speed_up = add_up_in_place


@pytest.mark.parametrize("flag", [
    "--no_activation_checkpointing",
    pytest.param("--activation_checkpointing", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["one", "ddp", "fsdp"])
def test_gradients_that_add_up_in_place(go, out, tmp_path, mode, flag):
    """The same bits as plain autograd's: losses, norms, weights and moments of 5 steps; or a NaN
    reaches the weights of an optimiser other than AdamW."""
    plain = tmp_path / "plain"
    flags = f"--batch_tokens 256 --micro_batch 2 --total_steps 5 --dropout 0.1 {flag}"
    go(out, flags, mode=mode, fault=the_same_in_place)
    go(plain, flags, mode=mode, fault=one_bad_micro_batch_and_sgd)
    assert_same(out, plain)


def without_moments(rank):
    """A fault: an optimiser that remembers nothing."""
    train.make_optimizer = lambda model, settings: torch.optim.SGD(model.parameters())


def test_an_optimiser_without_moments(go, out):
    """Checkpoints that must hold AdamW's moments: such a run can't go on."""
    for end in (2, 3):
        go(out, f"--total_steps {end}", mode="ddp", fault=without_moments)
    assert final(out)["step"] == 3


@pytest.mark.slow
def test_compiled_blocks(arrays, out, undisturbed):
    """A block that torch.compile can't follow."""
    flags = f"--data {arrays} --out {out} {SHAPE} {SMALL} --compile --total_steps 2 --device cpu"
    done = run(ROOT / "train.py", *flags.split())
    assert done.returncode == 0, done.stderr
    assert rows(out)[1] == pytest.approx(rows(undisturbed)[1], rel=1e-6)


class NoFloat64(TorchDispatchMode):
    """Fails where an operation makes 64-bit floats: Apple's GPUs have none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for value in tree_leaves(result):
            assert getattr(value, "dtype", None) != torch.float64, function
        return result


def without_float64(rank):
    """A fault: what runs on the device, from the first weight to the sample, is in 32 bits."""
    train.Process.all_reduce = lambda self, values: [float(value) for value in values]  # on the CPU
    NoFloat64().__enter__()


def test_no_float64_reaches_the_device(go, out):
    """A 64-bit float in a step, a validation, dropout or generation: train.py ends on a Mac."""
    go(out, "--dropout 0.1 --total_steps 2 --ignore_eot_targets", fault=without_float64)


def copies_must_be_fresh(rank):
    """A fault: a step with bf16 copies of older weights fails."""
    train.speed_up = add_up_in_place

    def check(self, *_):
        if self.training:
            for layer in train.linear_layers(self):
                assert torch.equal(layer.working, layer.weight.bfloat16())

    before(GPT, "forward", check)


def test_bfloat16_weights_cast_once_a_step(go, out, undisturbed):
    """--dtype without effect in training or validation; copies of the weights that lag behind the
    update."""
    go(out, "--dtype bfloat16 --total_steps 3 --warmup_steps 0", fault=copies_must_be_fresh)
    for key, step in (("loss", 1), ("val_loss", 0)):
        ours, fp32 = rows(out, key)[step], rows(undisturbed, key)[step]
        assert 0 < abs(ours / fp32 - 1) < 1e-2


@pytest.mark.parametrize("checkpointing", ["", "--activation_checkpointing"])
def test_grid_sends_gradients_once_a_step(go, out, checkpointing):
    """A reduction in each micro-batch, or weights that travel between nodes."""
    flags = "--batch_tokens 256 --micro_batch 1 --total_steps 4"
    text = go(out, f"{flags} {checkpointing}", mode="grid", fault=count_collectives)
    # Three groups of parameters, the two blocks and the rest; [0, 1] is rank 0's node.
    expected = {"reduce_sca 4 [0, 1]": 3, "all_reduce 4 [0, 2]": 3, "all_gather 1 [0, 1]": 3}
    if checkpointing:  # the blocks' weights are dropped and gathered again
        expected |= {f"all_gather {i} [0, 1]": 3 + 2 for i in (1, 2, 3, 4)}
    assert collections.Counter(printed(text)[-1]) == expected


def test_dropout_differs_between_ranks_and_seeds(monkeypatch):
    """Seeds packed in 64 bits: the CPU's generator reads 32, so that all ranks drop alike."""
    manual_seed = mock.Mock(side_effect=StopIteration)
    monkeypatch.setattr(torch, "manual_seed", manual_seed)
    for rank, seed, step in itertools.product((0, 1), (17, 18), (3, 4)):
        with pytest.raises(StopIteration):
            train.train_step(None, None, None, step, Namespace(seed=seed),
                             train.Process("", "", rank))
    assert len({call.args[0] % 2**32 for call in manual_seed.call_args_list}) == 8


def test_changed_settings(arrays, go, out, tmp_path):
    """A run goes on with another data order unnoticed, or refuses a harmless change."""
    other = tmp_path / "other"
    shutil.copytree(arrays, other)
    meta = data.load_meta(arrays)
    meta["train"]["sha256"] = "0" * 64
    (other / "meta.json").write_text(json.dumps(meta))
    text = go(out, f"--data {other} --verify", mode="ddp", code=1)
    assert text.count("its size or sha256") == 2  # rank 1 hears of it, too
    go(out, fault=at_step(6, terminate))
    for flags, name in (("--seed 1", "seed 17"), ("--n_embd 32", "n_embd 16"),
                        ("--batch_tokens 256", "batch_tokens 128"),
                        ("--ignore_eot_targets", "ignore_eot_targets False"),
                        (f"--data {other}", "data_fingerprint")):
        assert f"the run was made with {name}" in go(out, flags, code=1)
    assert "changed on resume: lr 0.002 -> 0.01" in go(out, "--lr 0.01")
    assert "is finished: 20 steps" in go(out)
    assert "steps 20 to 22" in go(out, "--total_steps 22")
    assert "steps 0 to 20" in go(out, "--fresh")
    assert list(rows(out, "val_loss")) == [0, 10, 20]  # the old run's are gone


def test_start_from_weights(go, out, tmp_path, undisturbed):
    """--init ignored, or read again over the weights of a resumed run, which goes on as another
    model; --fresh that deletes the model to start from."""
    folder = tmp_path / "hf"
    GPT.from_pretrained(undisturbed).save_pretrained(folder)
    go(out, f"--init {folder} --dropout 0.5", shape="", fault=at_step(2, terminate))
    assert rows(out, "val_loss")[0] == pytest.approx(rows(undisturbed, "val_loss")[20], rel=1e-5)
    assert rows(out)[1] > 1.001 * rows(undisturbed)[20]  # dropout is the flag's
    assert "steps 3 to 20" in go(out, f"--init {folder}/ --dropout 0.5", shape="")
    assert rows(out)[20] < rows(out)[1] and config_of(out).dropout == 0.5
    assert "made with init" in go(out, f"--init {undisturbed} --total_steps 22", shape="", code=1)
    assert "is the run's own folder" in go(out, f"--init {out} --fresh", shape="", code=1)
    assert (out / "checkpoint_0000020.pt").exists()


# ---------------------------------------------------------------------------------------------
# faults


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_not_a_number(go, out, mode):
    """NaN on one rank reaches weights, moments or step counts, or a checkpoint; a run whose
    every update is skipped goes on for weeks."""
    fault = spoil_loss((2, 3, *range(8, 20)), ranks=(1,))  # each step is one micro-batch
    text = go(out, "--log_every 4", mode=mode, fault=fault, code=1)
    for step, in_a_row in ((4, 2), (18, 10)):
        assert (f"the loss of rank 1 was not finite at step {step}: update skipped, {in_a_row} in "
                "a row") in text
    state = final(out)
    # a checkpoint with NaN would be skipped
    assert state["step"] == 15 and state["optimizer"]["transformer.wte.weight"]["step"] == 6


@pytest.mark.parametrize(("module", "name", "stands"), [
    (os, "replace", 5), (train.Path, "unlink", 10)])
def test_killed_in_a_save(go, out, undisturbed, module, name, stands):
    """A kill while saving costs the run, or leaves what is taken for a checkpoint."""

    def kill(*_, **__):
        if any(out.glob("checkpoint_0000010*")):
            die()

    go(out, "--keep 1", fault=lambda _: before(module, name, kill), code=-signal.SIGKILL)
    assert final(out)["step"] == stands
    with open(out / "log.jsonl", "a") as f:  # as a full disk leaves it
        f.write('{"step": 9, "lo{"step": 9, "loss": 1}\n{"step": 9, "loss')
    go(out, "--keep 1")
    assert_same(out, undisturbed)
    assert [p.name for p in out.glob("checkpoint*")] == ["checkpoint_0000020.pt"]


def test_training_goes_on_while_a_checkpoint_is_written(go, out, undisturbed):
    """The loop waits for the disk, or a later step changes the weights that are being written."""
    stepped = threading.Event()

    def wait(contents, f):
        if contents["step"] == 15:
            assert stepped.wait(20)

    def fault(rank):
        at_step(18, stepped.set)(rank)
        before(torch, "save", wait)

    go(out, fault=fault)
    late, prompt = (model_module.load_tensors(out / "checkpoint_0000015.pt")["model"]
                    for out in (out, undisturbed))
    torch.testing.assert_close(late, prompt, rtol=0, atol=0)


def test_saves_by_the_clock(go, out):
    """No save within --save_minutes, or one on the rank alone whose clock says so: a hang."""
    def fault(rank):
        now, calls = time.monotonic, itertools.count()
        if rank == 1:  # its clock goes on by a minute whenever it is read
            time.monotonic = lambda: now() + 60 * next(calls)

    go(out, "--save_every 0 --save_minutes 7.5 --keep 9", mode="ddp", fault=fault)
    assert sorted(int(p.stem[-7:]) for p in out.glob("*.pt")) == [7, 15, 20]


def test_one_owner(arrays, go, out):
    """Two trainings share a folder, or a training that was killed keeps the next one out."""
    (first,), _ = start(arrays, out, fault=at_step(7, lambda: time.sleep(60)))
    while not (out / "checkpoint_0000005.pt").exists():
        time.sleep(0.1)
    assert f"another training owns {out}" in go(out, "--fresh", code=1)
    first.kill()
    first.join()
    assert "steps 5 to 20" in go(out)


def test_damaged_checkpoints_are_skipped(go, out):
    """A truncated newest file ends the run, or counts as kept."""
    go(out, fault=at_step(11, terminate))
    whole = out / "checkpoint_0000012.pt"
    (out / "checkpoint_0000019.pt").write_bytes(whole.read_bytes()[:-3000])
    text = go(out, "--keep 1", fault=at_step(15, terminate))
    assert f"warning: skipping {out}/checkpoint_0000019.pt" in text
    assert final(out)["step"] == 16  # 19 is damaged: it must not push 16 out


def test_full_disk(go, out):
    """A save that fails ends the run, spoils the checkpoint before it, or goes unsaid."""
    def fill():
        while not list(out.glob("checkpoint*.pt")):  # a thread still writes the first one
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # bytes of a file

    text = go(out, fault=at_step(6, fill), code=1)
    assert text.count("could not be written") == 3  # steps 10, 15 and 20
    assert "the last checkpoint is not written: make room" in text
    assert final(out)["step"] == 5


# ---------------------------------------------------------------------------------------------
# parts


@pytest.mark.parametrize(("args", "mend"), [
    ("--batch_tokens 1000", "use --batch_tokens 896, or for a run that goes on fewer processes"),
    ("--batch_tokens 100", "use --batch_tokens 128"),
    ("--micro_batch 3", "use one of 1, 2, 4, 8"),
    ("--device cuda:99", "is not available on this machine"),
    ("--device meta", "is not available on this machine"),
    ("--device mps", "is not available on this machine: Could not run 'aten::empty.memory_format'"
     " with arguments from the 'MPS' backend\n"),
    ("--compile", "needs a C++ compiler, and there is no g++-0: install it"),
    ("--seq_len 256 --batch_tokens 2048", "more than the context of 128"),
    ("--preset biomedlm --data none", "python data.py tokenize"),
    *[(args, f"{args.split()[1]} is refused: use") for args in (
        "--lr inf", "--min_lr -1", "--grad_clip nan", "--keep 0", "--warmup_steps -5",
        "--seq_len 1", "--dropout 1")]])
def test_mistakes_name_their_mend(arrays, monkeypatch, tmp_path, capsys, args, mend):
    """A wrong flag ends in a traceback, or in a message that leaves the user to guess; a number
    that no run can use is taken."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(arrays), *args.split()])
    monkeypatch.setenv("CXX", "g++-0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_command(train.main)
    assert mend in f"{ended.value}\n{capsys.readouterr().err}"


def test_devices(monkeypatch):
    """--device cuda:1 leaves Triton on GPU 0: an illegal access. A T4 computes in bfloat16, which
    it has not. Ranks share a GPU, or take that of a Mac, whose tensors gloo can't reduce."""
    replace = monkeypatch.setattr
    replace(torch, "zeros", lambda *_, device: mock.Mock(device=torch.device(device)))
    replace(torch.backends.mps, "is_available", lambda: True)
    replace(torch.cuda, "is_available", lambda: False)
    replace(torch.cuda, "get_device_capability", lambda device: (7 + device.index, 5))
    replace(torch.cuda, "set_device", mock.Mock())
    replace(train, "dist", mock.Mock())
    second = train.start_process("cuda:1")
    torch.cuda.set_device.assert_called_once_with(second.device)
    assert second.dtype == torch.bfloat16
    assert train.start_process("cuda:0").dtype == torch.float32
    assert train.start_process().device.type == "mps"
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train.start_process("cuda:0").device.index == 1
    assert train.start_process().device.type == "cpu"


def test_mfu(tmp_path, monkeypatch):
    """The peak of another chip that has a part of the name, or of one GPU where two take part."""
    settings = Namespace(batch_tokens=1000, total_steps=9, lr=1, warmup_steps=9)
    process = train.Process(torch.device("cuda"), torch.bfloat16, world_size=2)
    for step, name in enumerate(("H100 NVL", "H100 80GB HBM3", "RTX 4090", "RTX 4090 Laptop GPU")):
        monkeypatch.setattr(torch.cuda, "get_device_name", mock.Mock(return_value=name))
        train.log_step(tmp_path, step, 1.0, 1.0, 4.0, 8e6, settings, process)
    # half of 1000 tokens / 4 s * 8e6 FLOP
    peaks = 835.5e12, 989.5e12, 165.2e12
    assert rows(tmp_path, "mfu") == pytest.approx({i: 1e9 / peak for i, peak in enumerate(peaks)})


def test_embeddings_padded_beyond_the_tokenizer(monkeypatch):
    """A model whose embedding was padded to a multiple of 64 is refused, or one that can't hold
    the arrays' ids, or that ends texts with another token, is taken."""
    settings = Namespace(init="padded", out="out", dropout=0.1, **dict.fromkeys(train.SHAPE))
    config = model_module.GPTConfig(vocab_size=2048, eot_id=0)
    monkeypatch.setattr(train, "config_of", lambda folder: config)
    assert train.choose_config(settings, {"vocab_size": 2000, "eot_id": 0}) == config
    for meta in ({"vocab_size": 2049, "eot_id": 0}, {"vocab_size": 2000, "eot_id": 5}):
        with pytest.raises(ValueError, match="tokenizer of --init"):
            train.choose_config(settings, meta)


BARE = """
import importlib, signal, sys
for module in ("fcntl", "resource", "triton"):
    sys.modules[module] = None
del signal.pthread_sigmask
for command in sys.argv[1:]:
    sys.argv = command.split()
    importlib.import_module(sys.argv[0]).main()
"""


def test_native_windows(arrays, tmp_path):
    """A module or call that Windows lacks, in the first steps, two workers or an evaluation."""
    scripts = [
        f"train --data {arrays} --out run {SHAPE} {SMALL} --total_steps 2 --device cpu",
        f"tokenizer train --input {arrays} --vocab_size 300 --out t --workers 2",
        f"eval perplexity --init run --data {arrays}"]
    done = run("-c", BARE, *scripts, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "can't be locked" in done.stdout and "bits a byte" in done.stdout


# ---------------------------------------------------------------------------------------------
# slow tier

@pytest.mark.slow
def test_twenty_random_kills(go, out, tmp_path):
    """One of twenty kill -9 at any moment costs a file, a row or the checkpoint before, or changes
    the weights."""
    flags = "--total_steps 300 --save_every 3 --dropout 0.1"
    random.seed(0)
    go(tmp_path / "whole", flags)
    for _ in range(20):
        timer = threading.Timer(random.uniform(0.1, 1.5), die)
        go(out, flags, fault=lambda _: timer.start(), code=-signal.SIGKILL)  # noqa: B023
    go(out, flags)
    assert_same(tmp_path / "whole", out)


def torchrun(how, arrays, out, flags=""):
    """A run under torchrun to its end; returns what it printed. how: its flags and the script."""
    command = f"-m torch.distributed.run {how} --data {arrays} --out {out} {SHAPE} {SMALL} {flags}"
    # A fresh store for each round: in the agent's own, a restarted rank may find the dead one's
    # address under the same key, and gloo then gives up.
    env = {"PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = run(*command.split(), env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_nodes(arrays, out, undisturbed, parallel):
    """A node's ranks take the other's GPUs or data, or both write the run."""
    how = ("--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id two "
           f"--rdzv_endpoint 127.0.0.1:{free_port()} --local_addr 127.0.0.1 -m train")
    with ThreadPoolExecutor() as pool:
        nodes = [pool.submit(torchrun, how, arrays, out, f"--parallel {parallel}") for _ in "ab"]
    assert sorted("validation loss" in node.result() for node in nodes) == [False, True]
    assert_same(out, undisturbed, atol=1e-6)


@pytest.mark.slow
def test_restart_after_a_rank_dies(arrays, out, tmp_path, undisturbed):
    """torchrun --max-restarts starts over, or the restarted ranks disagree on the step."""
    script = tmp_path / "dying.py"
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
    text = torchrun(f"--standalone --nproc_per_node 2 --max_restarts 1 {script}", arrays, out)
    assert (tmp_path / "died").exists() and "steps 5 to 20" in text
    assert_same(out, undisturbed, atol=1e-6)


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
def test_planned_activations():
    """A block saves other tensors for backward, or wider ones, than `bench.py plan` counts."""
    done = run("-c", SAVED_BYTES, env={"TRITON_INTERPRET": "1"})
    C, H = 64, 2  # bytes a token that one more block saves, whole and checkpointed
    assert done.stdout.split() == [f"{36 * C + 4 * H + 16:.1f}", f"{6 * C:.1f}"], done.stderr


# ---------------------------------------------------------------------------------------------
# on a GPU


def gpu_run(arrays, out, flags="", launcher=""):
    """Losses of a run of five steps, with dropout, on the GPU."""
    flags = f"{SHAPE} {SMALL} --n_embd 64 --dropout 0.1 --total_steps 5 --save_every 3 {flags}"
    done = run(*launcher.split(), ROOT / "train.py", "--data", arrays, "--out", out, *flags.split())
    assert done.returncode == 0, done.stderr
    return rows(out)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_gpu_runs_repeat_bit_for_bit(arrays, out, tmp_path):
    """Sums in an order of the moment, or dropout that a seed doesn't fix."""
    gpu_run(arrays, out)
    gpu_run(arrays, tmp_path / "again")
    assert_same(out, tmp_path / "again")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("flags", ["ddp", "fsdp", "fsdp --activation_checkpointing"])
def test_nccl_of_one_process(arrays, out, tmp_path, flags):
    """What only NCCL or CUDA refuses in DDP and FSDP, stopped and resumed; other losses than one
    process without them."""
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 1"
    expected = gpu_run(arrays, tmp_path / "alone")
    assert gpu_run(arrays, out, f"--parallel {flags}", torchrun) == pytest.approx(expected, 1e-3)
    (out / "checkpoint_0000005.pt").unlink()
    assert gpu_run(arrays, out, f"--parallel {flags}", torchrun) == pytest.approx(expected, 1e-3)
