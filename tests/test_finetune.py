"""finetune.py: prompts, truncation, shared prefixes, the loss, the loop, splits, the folder."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import eval as evaluate
import finetune
from data import TASKS, Question
from finetune import (
    Example,
    Row,
    TaskModel,
    build,
    collate,
    encode_all,
    labeled,
    learning_rate,
    load_finetuned,
    loss_sum,
    micro_batches,
    quality,
    read_questions,
    score_examples,
    summarise,
    train_step,
    wilson,
    write_lines,
)
from model import GPT, GPTConfig
from tokenizer import Tokenizer, train_bpe
from train import start_process

TEXT = ("A patient with fever and a stiff neck. Which drug helps? aspirin ceftriaxone heparin no "
        "yes maybe the trial of insulin in rats showed less sugar in the blood of the group ")
CPU = start_process("cpu")


def small_tokenizer():
    return Tokenizer.from_merges(train_bpe(dict.fromkeys(re.findall(" ?[A-Za-z]+", TEXT), 5), 300))


def small_gpt(vocab_size, dropout=0.0, seed=0, n_positions=64):
    torch.manual_seed(seed)
    return GPT(GPTConfig(n_layer=3, n_head=2, n_embd=32, n_positions=n_positions, dropout=dropout,
                         vocab_size=vocab_size, initializer_range=0.3))


def questions(n=7):
    """Ragged multiple-choice questions with 2 to 5 options."""
    words = TEXT.split()
    return [Question(id=str(i), question=" ".join(words[i:i + 3 + 4 * (i % 3)]),
                     options=tuple(" ".join(words[k:k + 1 + k % 3]) for k in range(2 + i % 4)),
                     answer=i % 2, target=" ".join(words[i:2 + 2 * i])) for i in range(n)]


def encode(qs, task, length=64, markers=False):
    """(examples, their tokenizer)."""
    tokenizer = small_tokenizer()
    return encode_all(qs, task, tokenizer, {"length": length, "markers": markers}), tokenizer


def task_model(kind, labels=(), **how):
    model = TaskModel(small_gpt(305, **how), kind, labels)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture
def choice():
    return task_model("choice"), encode(questions(), "medqa")[0]


def alone(examples):
    """The same questions, a row an option."""
    return [Example(e.question, [Row(row.prefix, [s]) for row in e.rows for s in row.suffixes])
            for e in examples]


def rank_of(world_size, rank, gather=lambda value: [value]):
    """A process among others, which are not there."""
    process = start_process("cpu")
    process.rank, process.world_size, process.gather = rank, world_size, gather
    return process


# ---------------------------------------------------------------------------------------------
# prompts


@pytest.mark.parametrize("task, markers, added, parts", [
    ("medqa", False, "[PAD]+[CLS]+[SEP]", "in [SEP] rats?+[SEP]/ no+[SEP]/ yes+[SEP]"),
    ("bioasq", False, "[PAD]+<|CONTEXT|>+<|QUESTION1|>+<|QUESTION2|>+<|ANSWER|>",
     "/the trial+in [SEP] rats?"),
    ("bioasq", True, "[PAD]+<|CONTEXT|>+<|QUESTION|>+<|ANSWER|>",
     "/<|CONTEXT|>+the trial+<|QUESTION|>+in [SEP] rats?+<|ANSWER|>"),
    ("text", False, "[PAD]+<|startoftext|>", "in [SEP] rats?+<|startoftext|>/less sugar+EOT")])
def test_prompts_are_the_papers(task, markers, added, parts):
    """Catches a missing or stray space, question-first order, a lost separator or end-of-text, ids
    that move, "[SEP]" read in a question."""
    q = Question(id="1", question="in [SEP] rats?", context="the trial", options=("no", "yes"),
                 answer=1, target="less sugar")
    (e,), tokenizer = encode([q], task, markers=markers)
    special = tokenizer.special | {"EOT": tokenizer.eot_id}
    prefix, *suffixes = [sum([[special[piece]] if piece in special else tokenizer.encode(piece)
                              for piece in part.split("+")], []) for part in parts.split("/")]
    assert e.rows == [Row(prefix, suffixes)]
    assert e.n_targets == (len(suffixes[0]) if task == "text" else 0)
    assert [special[name] for name in added.split("+")] == [*range(300, tokenizer.vocab_size)]


@pytest.mark.parametrize("limit", [8, 12, 20, 64])
def test_truncation_keeps_option_and_separator(limit):
    """F4: catches cutting from the row's end, which drops the answer or the final separator."""
    whole, cut = (encode(questions(), "medqa", length)[0] for length in (999, limit))
    assert [e.truncated for e in cut] == [e.length() > limit for e in alone(whole)]
    for one, other in zip(alone(whole), alone(cut)):
        for (text, (option,)), row in zip(one.rows, other.rows, strict=True):
            option = option[:-1][:limit - 2] + option[-1:]
            text = text[:-1][:limit - 1 - len(option)] + text[-1:]
            assert row == Row(text, [option])
    q = Question(id="1", question="the trial", context=TEXT, options=("no", "yes"), answer=1,
                 target=TEXT)
    for markers, end in (False, "the trial"), (True, "<|QUESTION|>the trial<|ANSWER|>"):
        (e,), tokenizer = encode([q], "bioasq", 16 + limit, markers)
        assert e.truncated and e.length() == 16 + limit
        assert tokenizer.decode(e.rows[0].suffixes[0]).endswith(end)
    (e,), _ = encode([dataclasses.replace(q, question=TEXT)], "text", limit)
    assert e.truncated and e.n_targets == limit // 2 and e.length() == limit


# ---------------------------------------------------------------------------------------------
# the model


def test_only_targets_carry_loss():
    """F1: catches a loss on prompt or padding, or one shifted by a token."""
    examples, _ = encode(questions(), "text")
    batch = collate(examples)
    assert batch.answers.tolist() == sum([e.rows[0].suffixes[0] for e in examples], [])
    assert torch.equal(batch.idx[:, 1:][batch.scored[:, :-1]], batch.answers)
    assert batch.scored.sum(1).tolist() == [e.n_targets for e in examples]


def test_shared_prefix_equals_options_alone(choice):
    """F3: catches an option that sees another one, positions that count the other options; and a
    prefix cut from the graph, when scores look right."""
    model, _ = choice
    for limit in (64, 24):  # 24: truncation leaves some questions another prefix an option
        shared, _ = encode(questions(), "medqa", limit)
        assert any(len(e.rows) == 1 for e in shared)
        assert any(len(e.rows) > 1 for e in shared) == (limit == 24)
        found = []
        for examples in (shared, alone(shared)):
            model.zero_grad()
            loss_sum(model, collate(examples)).backward()
            found.append((score_examples(model, examples, CPU),
                          [p.grad.clone() for p in model.parameters()]))
        torch.testing.assert_close(*found, atol=2e-5, rtol=1e-3)
    long, short = Row([1] * 30, [[2] * 30] * 4), Row([1] * 50, [[2], [3]])
    batch = collate([Example(examples[0].question, [row]) for row in (long, short)])
    assert batch.positions.max() == 59  # padding, too, stays within the context of 64


@pytest.mark.parametrize("task, kind, labels", [("medqa", "choice", ""),
                                                ("pubmedqa", "labels", "abc")])
def test_heads_equal_transformers(task, kind, labels):
    """Catches another prompt, position or head than the reference's (GPT2ForSequenceClassification
    with pad_token_id, and Linear(C, 1) on GPT2Model; transformers 5.23, made once by us)."""
    fixture = json.loads((Path(__file__).parent / "fixtures/hf_heads.json").read_text())
    gpt = small_gpt(304).eval()
    for i, (_, p) in enumerate(sorted(gpt.named_parameters())):  # as when the fixture was made
        wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 0.37 + i)
        p.data.copy_((0.2 * wave).view(p.shape))
    model = TaskModel(gpt, kind, labels)
    n = model.head.weight.numel()
    model.head.weight.data = torch.sin(torch.arange(n).double() * 0.37).float().view(-1, 32)
    if kind == "choice":
        model.head.bias.data.fill_(0.25)
    qs = [Question(id="", answer=0, **q) for q in fixture["questions"]]
    examples, _ = encode([dataclasses.replace(q, options=labels or q.options) for q in qs], task,
                         markers=True)
    scores = score_examples(model, examples, CPU)
    for got, expected in zip(scores, fixture[f"{kind}_scores"], strict=True):
        assert got == pytest.approx(expected[:len(got)], abs=1e-5)


def test_weights_of_a_seed(init):
    """Catches --random_init that keeps learned weights, a resize that changes learned rows or cuts
    a padded folder's, seeds that share a head, dropout lost."""
    tokenizer = Tokenizer.load(init)
    tokenizer.add_special_tokens(["[PAD]", "[SEP]"])
    settings = {"init": init, "random_init": False, "dropout": 0.3, "kind": "labels",
                "activation_checkpointing": True, "labels": ["no", "yes"]}
    one, again, two = (build(settings, tokenizer, seed) for seed in (1, 1, 2))
    fresh = build(settings | {"random_init": True}, tokenizer, 1)
    learned, wte, fresh_wte = (gpt.transformer.wte.weight for gpt in (
        GPT.from_pretrained(init), one.gpt, fresh.gpt))
    assert torch.equal(wte[:300], learned) and not torch.equal(fresh_wte[:300], learned)
    for new in (wte[300:], fresh_wte[300:], one.head.weight):
        assert new.shape == (2, 32) and 0.01 < new.std() < 0.03
    assert (one.gpt.config.vocab_size, one.gpt.config.dropout) == (302, 0.3)
    assert wte.requires_grad and one.gpt.activation_checkpointing
    assert torch.equal(one.head.weight, again.head.weight)
    assert not torch.equal(one.head.weight, two.head.weight)
    small_gpt(304).save_pretrained(init)
    assert len(build(settings, tokenizer, 1).gpt.transformer.wte.weight) == 304


# ---------------------------------------------------------------------------------------------
# training


@pytest.mark.parametrize("task, n_options", [("medqa", 5), ("pubmedqa", 2), ("text", 0)])
def test_loss_gradient_and_scores_do_not_depend_on_the_cut(task, n_options, monkeypatch):
    """F2, F6: catches a mean per micro-batch or rank, wrong once lengths differ; a wrong stride of
    ranks, a lost order; a rank without a question that adds one; a loss that isn't the scores';
    gradients that DDP exchanges too early or too often; bfloat16 that isn't used; a graph kept."""
    qs = [dataclasses.replace(q, options=q.options[:n_options]) for q in questions()]
    examples, _ = encode(qs, task)
    model = task_model(TASKS[task].kind, "ab" if task == "pubmedqa" else "")
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad = lambda **_: None
    exchanged, graphs = [], []
    model.register_forward_hook(lambda *_: exchanged.append(model.require_backward_grad_sync))
    model.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))

    def run(world_size, max_tokens):
        """What the ranks find together: loss, gradients after DDP's mean, scores."""
        monkeypatch.setattr(finetune, "micro_batches", lambda some, most=max_tokens: micro_batches(
            some, min(most, max_tokens)))
        loss, parts = 0.0, []
        model.zero_grad()
        for rank in range(world_size):
            process = rank_of(world_size, rank, lambda value: parts.append(value) or [])
            exchanged.clear()
            loss += train_step(model, examples, optimizer, process).item()
            assert exchanged == [False] * (len(exchanged) - 1) + [True]
            score_examples(model, examples, process)
        scores = score_examples(model, examples, rank_of(world_size, 0, lambda value: parts))
        assert not graphs[-1]
        return loss, [p.grad / world_size for p in model.parameters()], scores

    loss, _, scores = whole = run(1, 8192)
    for cut in (1, 1), (2, 90), (8, 90):
        torch.testing.assert_close(run(*cut), whole, atol=2e-5, rtol=1e-4)
    expected = -quality(scores, examples)
    if task != "text":
        nats = [torch.tensor(s).logsumexp(0) - s[q.answer] for q, s in zip(qs, scores)]
        expected = sum(nats).item() / len(qs)
    assert loss == pytest.approx(expected, rel=1e-4)
    low = start_process("cpu", "bfloat16")
    assert abs(train_step(model, examples, optimizer, low).item() / loss - 1) > 1e-5
    assert score_examples(model, examples, low) != scores


@pytest.mark.parametrize("factor, moved", [(1e3, 1.0), (1e-3, 0.03), (math.nan, 0.0)])
def test_gradients_are_clipped_and_must_be_finite(choice, monkeypatch, factor, moved):
    """Catches a loop without clipping, one that scales small gradients up, and NaN weights."""
    model, examples = choice
    monkeypatch.setattr(finetune, "loss_sum", lambda *given: factor * loss_sum(*given))
    weights = list(model.parameters())
    before = torch.nn.utils.parameters_to_vector(weights).detach()
    optimizer = torch.optim.SGD(weights, lr=1.0)
    try:
        train_step(model, examples, optimizer, CPU)
        assert all(p.grad is None for p in weights)  # no sum with the next step's
    except ValueError as e:
        assert math.isnan(factor) and "lower --lr" in str(e)
    after = torch.nn.utils.parameters_to_vector(weights)
    assert (after - before).norm().item() == pytest.approx(moved, abs=0.02)


def test_learning_rates():
    """Catches a warm-up of fixed length or rounded down, a decay that ends one step late."""
    assert [learning_rate(s, 8, 4.0) for s in range(8)] == [0, 1, 2, 3, 4, 3, 2, 1]
    assert [learning_rate(s, 5, 6.0) for s in range(5)] == [0, 2, 4, 6, 3]


SETTINGS = {"batch_size": 3, "epochs": 4, "lr": 0.1, "last": False}


@pytest.mark.parametrize("last, chosen", [(False, 3), (True, 4)])
def test_the_best_epochs_weights_are_kept(choice, monkeypatch, last, chosen):
    """Catches reporting the last epoch, the first of equals, or weights that went on training; a
    lost last batch; a rate, decay or mode that isn't the recipe's."""
    model, examples = choice
    steps, after, log = [], [], []

    def fake_step(model, batch, optimizer, process):
        recipe = [optimizer.defaults[name] for name in ("betas", "eps", "weight_decay")]
        assert model.training and recipe == [(0.9, 0.999), 1e-8, 0]
        steps.append((len(batch), optimizer.param_groups[0]["lr"]))
        model.head.bias.data += 1
        return torch.tensor(0.5)

    def fake_scores(model, dev_set, process):
        assert dev_set == examples[:2]
        model.eval()
        after.append(model.head.bias.item())

    monkeypatch.setattr(finetune, "train_step", fake_step)
    monkeypatch.setattr(finetune, "score_examples", fake_scores)
    monkeypatch.setattr(finetune, "quality", lambda *_: [0.2, 0.7, 0.7, 0.1][len(after) - 1])
    settings = SETTINGS | {"last": last}
    process = rank_of(1, 0)
    process.all_reduce = lambda values: [3 * values[0]]  # as if of three ranks
    score = finetune.train(model, examples, examples[:2], settings, 5, process, log)
    assert (score, model.head.bias.item()) == (0.1 if last else 0.7, after[chosen - 1])
    assert [row["loss"] for row in log] == [1.5] * 4 and log[1]["dev"] == 0.7
    assert steps == [((3, 3, 1)[i % 3], learning_rate(i, 12, 0.1)) for i in range(12)]


def test_what_ranks_and_seeds_share(choice, monkeypatch):
    """Catches dropout's masks that all ranks share, or that a seed doesn't change; an order of
    questions of a rank's own, or the same for all seeds or epochs."""
    draws, orders = [], []

    def fake_step(model, batch, *_):
        draws.append(torch.rand(1).item())
        orders.append([e.question.id for e in batch])
        return torch.zeros(())

    monkeypatch.setattr(finetune, "train_step", fake_step)
    settings = SETTINGS | {"epochs": 2, "batch_size": 7}
    for seed, rank in (1, 0), (1, 1), (2, 0), (1, 0):
        finetune.train(*choice, [], settings, seed, rank_of(1, rank), [])
    assert len(set(draws)) == 6 and draws[:2] == draws[6:]
    assert orders[:2] == orders[2:4] == orders[6:]
    assert len(set(map(tuple, orders))) == 4 and all(sorted(o) == list("0123456") for o in orders)


def test_micro_batches_hold_every_example_once_within_the_budget():
    """Catches a dropped last chunk, and a budget that ignores padding or a question's rows."""
    examples, _ = encode(questions(), "medqa", 24)
    chunks = list(micro_batches(examples * 3, max_tokens=120))
    assert sum(map(len, chunks)) == 21 > len(chunks)
    assert all(collate(chunk).idx.numel() <= 120 or len(chunk) == 1 for chunk in chunks)


# ---------------------------------------------------------------------------------------------
# questions, results and the command line


def test_summary():
    """Catches the normal interval, which leaves [0, 1] (Newcombe 1998, table I, and 0 of 20); one
    over seeds x questions; a chance or majority of something else."""
    assert wilson(81 / 263, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson(0, 20) == pytest.approx([0, 0.1611], abs=1e-4)
    options = [("a", "b"), ("a", "b", "c", "d")]
    examples = [Example(Question("", "?", options=options[i % 2], answer=i // 3), [], i < 2)
                for i in range(4)]
    row = summarise("medqa", "test", 9, examples, [0.5, 1.0])
    expected = {"ci95": wilson(0.75, 4), "accuracy": 0.75, "std": pytest.approx(0.125**0.5),
                "n": 4, "available": 9, "truncated": 2, "chance": 0.375, "majority": 0.75,
                "task": "medqa", "split": "test"}
    assert row == row | expected


def write_medqa(folder, n=12):
    folder = folder / "4_options"
    folder.mkdir(parents=True)
    options = dict(A="aspirin", B="heparin", C="insulin", D="no")
    for split, first in (("train", 0), ("dev", 5), ("test", 100)):
        rows = []
        for i in range(first, first + n):
            letter = "ABCD"[i % 4]
            rows.append(dict(question=f"Which drug helps patient {i}?", options=options,
                             answer_idx=letter, answer=options[letter], meta_info="step1"))
        write_lines(folder / f"phrases_no_exclude_{split}.jsonl", rows)


def test_questions_of_dev_and_test_leave_train(monkeypatch):
    """F7: catches a question in train that stands in dev or test, unlabeled or from another set;
    MMLU's five examples a subject as dev; another set's labels."""
    files = {("mmlu", "a", "val"): "1", ("mmlu", "a", "test"): "23", ("mmlu", "a", "dev"): "9",
             ("medmcqa", "b", "test"): "4", ("medmcqa", "b", "train"): "5123",
             ("bioasq", "c", "train"): "6"}

    def fake(task, folder, split):
        if (task, folder, split) not in files:
            raise FileNotFoundError(f"no {split} in {folder}")
        return [Question(id=split + text, question="Q?", options=("x", text),
                         answer=None if split + text == "test3" else 0)
                for text in files[task, folder, split]]

    monkeypatch.setattr(finetune, "load_qa", fake)
    sets = read_questions("mmlu", ["a", "b"])
    assert {split: [q.id for q in found] for split, found in sets.items()} == {
        "train": ["train5"], "dev": ["val1"], "test": ["test2", "test3"]}
    assert [q.id for q in labeled(sets["test"])] == ["test2"]
    assert [q.options[1] for q in labeled(fake("medmcqa", "b", "train"), 2)] == ["5", "2"]
    for task, folders in ("mmlu", ["a", "c"]), ("pubmedqa", ["c"]):
        with pytest.raises(FileNotFoundError, match="no test in c"):
            read_questions(task, folders)


@pytest.fixture
def init(tmp_path):
    small_tokenizer().save(tmp_path / "init")
    small_gpt(300, dropout=0.1).save_pretrained(tmp_path / "init")
    return tmp_path / "init"


def command(monkeypatch, script, *flags):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
    script.main()


def lines(path):
    return [json.loads(line) for line in path.open()]


@pytest.fixture
def tune(tmp_path, init, monkeypatch):
    """Runs the command on 12 questions a split; later flags override. Returns --json's result."""
    write_medqa(tmp_path / "qa")

    def run(*flags):
        command(monkeypatch, finetune, "--task", "medqa", "--data", tmp_path / "qa", "--init", init,
                "--out", tmp_path / "out", "--json", tmp_path / "a.json", *flags)
        return json.loads((tmp_path / "a.json").read_text())
    return run


@pytest.mark.parametrize("task, flags", [("medqa", []), ("bioasq", []), ("bioasq", ["--markers"])])
def test_command_trains_saves_and_eval_agrees(tmp_path, tune, monkeypatch, task, flags):
    """Catches a saved folder whose scores differ from those of the run that reported them: another
    head, tokenizer, length, or prompt; dropout in scoring; a result without its figures."""
    for split in ("train", "dev", "test"):
        (tmp_path / f"qa/{split}.tsv").write_text("".join(
            f"{split}{i}\tthe {split} {i}\t{TEXT[i:i + 20]}\t{['no', 'yes'][i % 2]}\n"
            for i in range(12)))
    given = ("--task", task, "--limit", 8)
    out = tmp_path / "out"
    row = tune(*given, "--epochs", 2, "--seeds", "1,2", "--lr", 1e-2, "--length", 16, *flags)
    assert row == lines(out / "log.jsonl")[-1]
    found = {seed["seed"]: seed["score"] for seed in row["seeds"]}
    assert row["accuracy"] == pytest.approx(sum(found.values()) / 2)
    assert [row[key] for key in ("task", "split", "n", "available")] == [task, "test", 8, 12]
    command(monkeypatch, evaluate, "qa", *given, "--data", tmp_path / "qa", "--init", out, "--json",
            tmp_path / "b.json", "--predictions", tmp_path / "p.jsonl")
    theirs = json.loads((tmp_path / "b.json").read_text())
    assert (theirs["accuracy"], theirs["truncated"]) == (found[row["saved_seed"]], row["truncated"])
    for a, b in zip(lines(out / "predictions.jsonl"), lines(tmp_path / "p.jsonl"), strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-5)
    with pytest.raises(ValueError, match="finetune.py --task pubmedqa"):
        load_finetuned(out, "pubmedqa")


@pytest.mark.parametrize("split, saved", [("test", 1), ("dev", 3)])
def test_dev_chooses_and_test_is_reported(tmp_path, tune, monkeypatch, split, saved):
    """Catches a seed or an epoch chosen on what is reported, another seed's weights or predictions
    saved, training questions of dev."""
    if split == "dev":
        (tmp_path / "qa/4_options/phrases_no_exclude_test.jsonl").unlink()

    def fake_train(model, train_set, dev_set, settings, seed, process, log):
        assert len(train_set) == 5 and len(dev_set) == (12 if split == "test" else 0)
        assert process.dtype == torch.bfloat16
        model.head.bias.data.fill_(seed)
        return {3: 0.5, 1: 0.9, 2: 0.9}[seed] if dev_set else None

    monkeypatch.setattr(finetune, "train", fake_train)
    monkeypatch.setattr(finetune, "score_examples", lambda model, examples, process: [
        [0, model.head.bias.item(), 0, 0]] * len(examples))
    result = tune("--seeds", "3,1,2", "--dtype", "bfloat16")
    assert (result["split"], result["saved_seed"]) == (split, saved)
    assert load_finetuned(tmp_path / "out", "medqa")[0].head.bias.item() == saved
    row = lines(tmp_path / "out/predictions.jsonl")[0]
    assert (row["scores"], row["prediction"]) == ([0, saved, 0, 0], 1)


def test_flags_and_defaults_reach_the_settings(init, monkeypatch):
    """Catches a flag that changes nothing, a default of another task or size, a row past the
    context."""
    def settings(flags="", task="medqa"):
        given = f"finetune.py --task {task} --data x --init {init} --out y {flags}"
        monkeypatch.setattr(sys, "argv", given.split())
        found, _ = finetune.resolve(finetune.parse_args())
        return [found[name] for name in ("lr", "epochs", "length", "dropout")]

    assert settings("--lr 1 --epochs 2 --dropout 0 --length 9") == [1, 2, 9, 0]
    assert settings()[2:] == [64, None]
    config = dataclasses.replace(GPT.config_of(init), n_positions=2048)
    monkeypatch.setattr(GPT, "config_of", lambda folder: config)
    for n_params, task, *expected in [
            (2e9, "pubmedqa", 2e-6, 20, 512), (2e9, "text", 1e-5, 3, 1022),
            (6e7, "medqa", 5e-5, 5, 512), (1e6, "medqa", 3e-4, 10, 512),
            (1e6, "bioasq", 3e-4, 20, 1024)]:
        monkeypatch.setattr(GPT, "n_params", lambda model, n=n_params: n)
        assert settings(task=task)[:3] == expected


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, init):
    """Catches a gradient averaged over ranks instead of summed over the global batch."""
    write_medqa(tmp_path / "qa", n=11)
    # 405 questions to train on: a step of more than a micro-batch, one of unequal shares.
    path = tmp_path / "qa/4_options/phrases_no_exclude_train.jsonl"
    path.write_text(path.read_text() * 81)
    rows = []
    for n in (1, 2):
        out = tmp_path / f"out{n}"
        command = (f"{sys.executable} -m torch.distributed.run --nproc_per_node={n} "
                   f"--master_port=29617 finetune.py --task medqa --data {tmp_path}/qa "
                   f"--init {init} --out {out} --epochs 2 --seeds 1 --batch_size 400 "
                   "--dropout 0")
        done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, done.stderr
        rows.append([row for row in lines(out / "log.jsonl") if "epoch" in row])
    for one, two in zip(*rows, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
