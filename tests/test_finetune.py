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
from test_model import waves

import eval as evaluate
import finetune
from data import TASKS, Question
from finetune import (
    Example,
    Row,
    TaskModel,
    adapt,
    build,
    collate,
    encode_all,
    epoch_order,
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
    config = GPTConfig(n_layer=3, n_head=2, n_embd=32, n_positions=n_positions, dropout=dropout,
                       vocab_size=vocab_size, initializer_range=0.3)
    return GPT(config)


def questions(n=7):
    """Ragged multiple-choice questions with 2 to 5 options."""
    words = TEXT.split()
    return [Question(id=str(i), question=" ".join(words[i:i + 3 + 4 * (i % 3)]),
                     options=tuple(" ".join(words[k:k + 1 + k % 3]) for k in range(2 + i % 4)),
                     answer=i % 2) for i in range(n)]


def encode(qs, task, length=64, markers=False):
    """(examples, their tokenizer)."""
    tokenizer = small_tokenizer()
    return encode_all(qs, task, tokenizer, {"length": length, "markers": markers}), tokenizer


def task_model(kind, n_labels=0, **how):
    model = TaskModel(adapt(small_gpt(300, **how), 305), kind, n_labels)
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


def test_choice_prompt_is_the_papers():
    """Catches a missing space, a lost separator, ids out of order, "[SEP]" read in a question."""
    q = Question(id="1", question="Which [SEP] helps?", options=("aspirin", "heparin"), answer=0)
    (e,), tokenizer = encode([q], "medqa")
    assert [tokenizer.special[t] for t in ("[PAD]", "[CLS]", "[SEP]")] == [300, 301, 302]
    options = [tokenizer.encode(text) + [302] for text in (" aspirin", " heparin")]
    assert e.rows == [Row(tokenizer.encode(q.question) + [302], options)]


def test_label_and_text_prompts_are_the_papers():
    """Catches question-first order, stray spaces, ids that move, a target without end-of-text."""
    q = Question(id="1", question="the trial", context="in rats", options=("no", "yes"), answer=1,
                 target="less sugar")
    parts = [small_tokenizer().encode(text) for text in (q.context, q.question, q.target)]
    for markers, names, ids in (
            (False, "CONTEXT QUESTION1 QUESTION2 ANSWER", parts[0] + parts[1]),
            (True, "CONTEXT QUESTION ANSWER", [301, *parts[0], 302, *parts[1], 303])):
        (e,), tokenizer = encode([q], "bioasq", markers=markers)
        assert e.rows == [Row([], [ids])]
        added = ["[PAD]", *(f"<|{name}|>" for name in names.split())]
        assert [tokenizer.special[name] for name in added] == [*range(300, tokenizer.vocab_size)]
    (e,), tokenizer = encode([q], "text")
    assert e.rows == [Row(parts[1] + [301], [parts[2] + [tokenizer.eot_id]])]
    assert e.n_targets == len(parts[2]) + 1


@pytest.mark.parametrize("limit", [8, 12, 20, 64])
def test_truncation_keeps_option_and_separator(limit):
    """F4: catches cutting from the row's end, which drops the answer or the final separator."""
    examples, tokenizer = encode(questions(), "medqa", limit)
    for e in examples:
        rows = [(row.prefix, s) for row in e.rows for s in row.suffixes]
        for (prefix, suffix), option in zip(rows, e.question.options, strict=True):
            assert len(prefix) + len(suffix) <= limit
            assert prefix[-1] == suffix[-1] == tokenizer.special["[SEP]"]
            assert suffix[:-1] == tokenizer.encode(" " + option)[:limit - 2]
        whole = [len(tokenizer.encode(e.question.question) + tokenizer.encode(" " + option)) + 2
                 for option in e.question.options]
        assert e.truncated == (max(whole) > limit)
    q = Question(id="1", question="the trial", context=TEXT, options=("no", "yes"), answer=1)
    for markers, end in (False, "the trial"), (True, "<|QUESTION|>the trial<|ANSWER|>"):
        (e,), tokenizer = encode([q], "bioasq", 16 + limit, markers)
        assert e.truncated and e.length() == 16 + limit
        assert tokenizer.decode(e.rows[0].suffixes[0]).endswith(end)
    (e,), _ = encode([Question(id="1", question=TEXT, target=TEXT)], "text", limit)
    assert e.truncated and e.n_targets == limit // 2 and e.length() == limit


# ---------------------------------------------------------------------------------------------
# the model


def test_only_targets_carry_loss():
    """F1: catches a loss on prompt or padding, or one shifted by a token."""
    q = Question(id="1", question="the trial in rats", target="less sugar")
    (e,), _ = encode([q], "text")
    source, (target,) = e.rows[0]
    batch = collate([e, Example(q, [Row([5] * 39, [[5]])], n_targets=1)])
    padding = [-100] * (40 - len(source) - len(target))
    assert batch.targets[0].tolist() == [-100] * (len(source) - 1) + target + padding
    assert batch.idx[0, :len(source)].tolist() == source
    assert batch.targets[1].tolist() == [-100] * 38 + [5]


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
            scores = [torch.tensor(s) for s in score_examples(model, examples, CPU)]
            found.append((scores, [p.grad.clone() for p in model.parameters()]))
        torch.testing.assert_close(*found, atol=2e-5, rtol=1e-3)
    long, short = Row([1] * 30, [[2] * 30] * 4), Row([1] * 50, [[2], [3]])
    batch = collate([Example(examples[0].question, [row]) for row in (long, short)])
    assert batch.positions.max() == 59  # padding, too, stays within the context of 64


def test_heads_equal_transformers():
    """Catches another prompt, position or head than the reference's (GPT2ForSequenceClassification
    with pad_token_id, and Linear(C, 1) on GPT2Model; transformers 5.23, made once by us)."""
    fixture = json.loads((Path(__file__).parent / "fixtures/hf_heads.json").read_text())
    for task, kind, n_labels in ("medqa", "choice", 0), ("pubmedqa", "labels", 3):
        config = GPTConfig(n_layer=3, n_head=2, n_embd=32, n_positions=64, vocab_size=304,
                           dropout=0.0, eot_id=299)
        model = TaskModel(waves(GPT(config)), kind, n_labels)
        n = model.head.weight.numel()
        model.head.weight.data = torch.sin(torch.arange(n).double() * 0.37).float().view(-1, 32)
        if kind == "choice":
            model.head.bias.data.fill_(0.25)
        qs = [Question(id="", answer=0, **q) for q in fixture["questions"]]
        examples, _ = encode(qs, task, markers=True)
        ids = [[row.prefix + s for row in e.rows for s in row.suffixes] for e in examples]
        assert fixture[f"{kind}_ids"] == (ids if kind == "choice" else [i[0] for i in ids])
        scores = score_examples(model, examples, CPU)
        for got, expected in zip(scores, fixture[f"{kind}_scores"], strict=True):
            assert got == pytest.approx(expected[:len(got)], abs=1e-5)


def test_weights_of_a_seed(init):
    """Catches --random_init that keeps learned weights, a resize that changes learned rows, seeds
    that share a head, dropout lost."""
    tokenizer = Tokenizer.load(init)
    tokenizer.add_special_tokens(["[PAD]", "[SEP]"])
    settings = {"init": init, "random_init": False, "dropout": 0.3, "kind": "labels",
                "activation_checkpointing": True, "labels": ["no", "yes"]}
    one, two = build(settings, tokenizer, 1), build(settings, tokenizer, 2)
    fresh = build(settings | {"random_init": True}, tokenizer, 1)
    learned = GPT.from_pretrained(init).transformer
    for model in (one, fresh):
        wte, config = model.gpt.transformer.wte.weight, model.gpt.config
        assert torch.equal(wte[:300], learned.wte.weight) == (model is one)
        assert torch.equal(model.gpt.transformer.wpe.weight, learned.wpe.weight) == (model is one)
        assert 0.01 < wte[300:].std() < 0.03 and model.gpt.activation_checkpointing
        assert (config.vocab_size, config.eot_id, config.dropout) == (302, 299, 0.3)
    assert not torch.equal(one.head.weight, two.head.weight)
    assert torch.equal(one.head.weight, build(settings, tokenizer, 1).head.weight)
    assert one.head.weight.shape == (2, 32) and 0.01 < one.head.weight.std() < 0.03


# ---------------------------------------------------------------------------------------------
# training


@pytest.mark.parametrize("task", ["medqa", "pubmedqa", "text"])
def test_loss_gradient_and_scores_do_not_depend_on_the_cut(task, monkeypatch):
    """F2, F6: catches a mean per micro-batch or rank, wrong once lengths differ; a wrong stride of
    ranks, a lost order; a rank without a question that adds one."""
    qs = [dataclasses.replace(q, target=" ".join(q.options), options={
        "medqa": q.options, "pubmedqa": q.options[:2], "text": ()}[task]) for q in questions()]
    examples, _ = encode(qs, task)
    model = task_model(TASKS[task].kind, 2)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad = lambda **_: None
    found = []
    for world_size, micro_batch, max_tokens in (1, None, 8192), (1, 3, 1), (2, 2, 90), (8, 1, 90):
        loss, parts = 0.0, []
        model.zero_grad()
        for rank in range(world_size):
            process = rank_of(world_size, rank, lambda value: parts.append(value) or [])  # noqa: B023
            loss += train_step(model, examples, optimizer, process, micro_batch)
            score_examples(model, examples, process, max_tokens)
        everyone = rank_of(world_size, 0, lambda value: parts)  # noqa: B023
        scores = score_examples(model, examples, everyone, max_tokens)
        grads = [p.grad / world_size for p in model.parameters()]  # DDP's mean
        found.append((loss, grads, [torch.tensor(s) for s in scores]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2e-5, rtol=1e-4)
    if task == "text":
        assert loss.item() == pytest.approx(-quality(scores, examples), rel=1e-4)


@pytest.mark.parametrize("factor", [1e3, 1e-3, math.nan])
def test_gradients_are_clipped_and_must_be_finite(choice, factor):
    """Catches a loop without clipping, one that scales small gradients up, and NaN weights."""
    model, examples = choice
    model.head.register_full_backward_hook(lambda module, grads, out: (grads[0] * factor,))
    model.head.requires_grad_(False)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if math.isnan(factor):
        with pytest.raises(ValueError, match="lower --lr"):
            train_step(model, examples, optimizer, CPU)
    else:
        train_step(model, examples, optimizer, CPU)
        assert all(p.grad is None for p in model.parameters())  # no sum with the next step's
    moved = (torch.nn.utils.parameters_to_vector(model.parameters()) - before).norm().item()
    if factor > 1:
        assert moved == pytest.approx(1.0, rel=1e-3)
    else:
        assert moved < 0.9


def test_learning_rates():
    """Catches a warm-up of fixed length or rounded down, a decay that ends one step late."""
    assert [learning_rate(s, 8, 4.0) for s in range(8)] == [0, 1, 2, 3, 4, 3, 2, 1]
    assert [learning_rate(s, 5, 6.0) for s in range(5)] == [0, 2, 4, 6, 3]


SETTINGS = {"batch_size": 3, "epochs": 4, "lr": 0.1, "micro_batch": None, "last": False}


@pytest.mark.parametrize("last, chosen", [(False, 3), (True, 4)])
def test_the_best_epochs_weights_are_kept(choice, monkeypatch, last, chosen):
    """Catches reporting the last epoch, the first of equals, or weights that went on training; a
    lost last batch; an order, rate, decay or mode that isn't the recipe's."""
    model, examples = choice
    batches, rates, after, log = [], [], [], []

    def fake_step(model, batch, optimizer, process, micro_batch):
        assert model.training and optimizer.defaults["weight_decay"] == 0
        batches.append([e.question.id for e in batch])
        rates.append(optimizer.param_groups[0]["lr"])
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
    score = finetune.train(model, examples, examples[:2], settings, 5, CPU, log)
    assert (score, model.head.bias.item()) == (0.1 if last else 0.7, after[chosen - 1])
    assert [row["loss"] for row in log] == [0.5] * 4 and log[1]["dev"] == 0.7
    assert rates == [learning_rate(i, 12, 0.1) for i in range(12)]
    assert [len(batch) for batch in batches] == [3, 3, 1] * 4
    orders = [[str(i) for i in epoch_order(7, 5, epoch).tolist()] for epoch in range(4)]
    assert [sum(batches[i:i + 3], []) for i in range(0, 12, 3)] == orders
    assert all(sorted(order) == list("0123456") for order in orders)
    assert len({tuple(epoch_order(50, s, e).tolist()) for s in (1, 2) for e in (0, 1)}) == 4


def test_dropout_differs_between_ranks_and_seeds(choice, monkeypatch):
    """Catches masks that all ranks share, or that a seed doesn't change."""
    drawn = []
    monkeypatch.setattr(finetune, "train_step", lambda *_: drawn.append(torch.rand(1).item())
                        or torch.zeros(()))
    for seed, rank in (1, 0), (1, 1), (2, 0), (1, 0):
        finetune.train(*choice, [], SETTINGS | {"epochs": 1}, seed, rank_of(1, rank), [])
    assert len(set(drawn[::3])) == 3 and drawn[0] == drawn[9]


def test_training_learns_its_questions_and_scores_without_dropout(choice):
    """Catches a loss that goes down without the answers' scores going up; dropout in scoring."""
    _, examples = choice
    model = task_model("choice", dropout=0.1)
    settings = SETTINGS | {"batch_size": 7, "epochs": 40, "lr": 5e-3}
    assert finetune.train(model, examples, examples, settings, 1, CPU, []) == 1.0
    model.train()
    scores = score_examples(model, examples, CPU)
    assert scores == score_examples(model, examples, CPU) and quality(scores, examples) == 1.0


def test_micro_batches_hold_every_example_once_within_the_budget():
    """Catches a dropped last chunk, and a budget that ignores padding or a question's rows."""
    examples, _ = encode(questions(), "medqa", 24)
    chunks = list(micro_batches(examples * 3, max_tokens=120))
    assert sum(map(len, chunks)) == 21 > len(chunks)
    assert all(collate(chunk).idx.numel() <= 120 or len(chunk) == 1 for chunk in chunks)


# ---------------------------------------------------------------------------------------------
# questions, results and the command line


def test_wilson_against_published_values():
    """Catches the normal interval, which leaves [0, 1]: Newcombe 1998, table I, and 0 of 20."""
    assert wilson(81 / 263, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson(0, 20) == pytest.approx([0, 0.1611], abs=1e-4)


def test_summary():
    """Catches an interval over seeds x questions, and a chance or majority of something else."""
    options = [("a", "b"), ("a", "b", "c", "d")]
    examples = [Example(Question("", "?", options=options[i % 2], answer=i // 3), [], i < 2)
                for i in range(4)]
    row = summarise("medqa", "test", 9, examples, [0.5, 1.0])
    assert row["ci95"] == wilson(0.75, 4)
    assert [row[key] for key in ("accuracy", "n", "available", "truncated", "chance", "majority")
            ] == [0.75, 4, 9, 2, 0.375, 0.75]


def write_medqa(folder, n=12):
    folder = folder / "4_options"
    folder.mkdir(parents=True)
    for split, first in (("train", 0), ("dev", 5), ("test", 100)):
        rows = [dict(question=f"Which drug helps patient {i}?", options=dict(zip("ABCD", (
            "aspirin", "heparin", "insulin", "no"))), answer_idx="ABCD"[i % 4],
            answer=("aspirin", "heparin", "insulin", "no")[i % 4], meta_info="step1")
            for i in range(first, first + n)]
        path = folder / f"phrases_no_exclude_{split}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_questions_of_dev_and_test_leave_train(monkeypatch):
    """F7: catches a question in train that stands in dev or test, unlabeled or from another set;
    MMLU's five examples a subject as dev; another set's labels."""
    files = {("mmlu", "a", "val"): "1", ("mmlu", "a", "test"): "23", ("mmlu", "a", "dev"): "9",
             ("medmcqa", "b", "test"): "4", ("medmcqa", "b", "train"): "5123",
             ("bioasq", "c", "train"): "6"}

    def fake(*key):
        if key not in files:
            raise FileNotFoundError(f"no {key[2]} in {key[1]}")
        return [Question(id=text, question=text, options=("x", "y"), answer=None if key == (
            "mmlu", "a", "test") and text == "3" else 0) for text in files[key]]

    monkeypatch.setattr(finetune, "load_qa", fake)
    sets = read_questions("mmlu", ["a", "b"])
    assert {split: "".join(q.id for q in found) for split, found in sets.items()} == {
        "train": "5", "dev": "1", "test": "23"}
    assert [q.id for q in labeled(sets["test"])] == ["2"]
    assert [q.id for q in labeled(fake("medmcqa", "b", "train"), 2)] == ["5", "2"]
    for task, folders in ("mmlu", ["a", "c"]), ("pubmedqa", ["c"]):
        with pytest.raises(FileNotFoundError, match="no test in c"):
            read_questions(task, folders)


@pytest.fixture
def init(tmp_path):
    small_tokenizer().save(tmp_path / "init")
    small_gpt(300).save_pretrained(tmp_path / "init")
    return tmp_path / "init"


def command(monkeypatch, script, *flags):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
    script.main()


def lines(path):
    return [json.loads(line) for line in path.open()]


@pytest.mark.parametrize("task, flags", [("medqa", []), ("bioasq", []), ("bioasq", ["--markers"])])
def test_command_trains_saves_and_eval_agrees(tmp_path, init, monkeypatch, task, flags):
    """Catches a saved folder whose scores differ from those of the run that reported them: another
    head, tokenizer, length, or prompt."""
    write_medqa(tmp_path / "qa")
    for split in ("train", "dev", "test"):
        rows = [f"{split}{i}\tthe {split} {i}\t{TEXT[i:i + 20]}\t{['no', 'yes'][i % 2]}\n"
                for i in range(12)]
        (tmp_path / f"qa/{split}.tsv").write_text("".join(rows))
    given = ("--task", task, "--data", tmp_path / "qa", "--limit", 8)
    command(monkeypatch, finetune, *given, "--init", init, "--out", tmp_path / "out", "--epochs", 2,
            "--seeds", "1,2", "--lr", 1e-2, "--length", 16, "--json", tmp_path / "a.json", *flags)
    row = json.loads((tmp_path / "a.json").read_text())
    assert row["accuracy"] == pytest.approx(sum(s["score"] for s in row["seeds"]) / 2)
    assert (row["n"], row["available"]) == (8, 12)
    command(monkeypatch, evaluate, "qa", *given, "--init", tmp_path / "out", "--json",
            tmp_path / "b.json", "--predictions", tmp_path / "p.jsonl")
    saved = next(s for s in row["seeds"] if s["seed"] == row["saved_seed"])
    assert json.loads((tmp_path / "b.json").read_text())["accuracy"] == saved["score"]
    ours, theirs = lines(tmp_path / "out/predictions.jsonl"), lines(tmp_path / "p.jsonl")
    for a, b in zip(ours, theirs, strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-5)
    with pytest.raises(ValueError, match="finetune.py --task pubmedqa"):
        load_finetuned(tmp_path / "out", "pubmedqa")


@pytest.mark.parametrize("split, saved", [("test", 1), ("dev", 3)])
def test_dev_chooses_and_test_is_reported(tmp_path, init, monkeypatch, split, saved):
    """Catches a seed or an epoch chosen on what is reported, another seed's weights or predictions
    saved, training questions of dev."""
    write_medqa(tmp_path / "qa")
    if split == "dev":
        (tmp_path / "qa/4_options/phrases_no_exclude_test.jsonl").unlink()

    def fake_train(model, train_set, dev_set, settings, seed, process, log):
        assert len(train_set) == 5 and len(dev_set) == (12 if split == "test" else 0)
        model.head.bias.data.fill_(seed)
        return {3: 0.5, 1: 0.9, 2: 0.9}[seed] if dev_set else None

    monkeypatch.setattr(finetune, "train", fake_train)
    monkeypatch.setattr(finetune, "score_examples", lambda model, examples, process: [
        [0, model.head.bias.item(), 0, 0]] * len(examples))
    command(monkeypatch, finetune, "--task", "medqa", "--data", tmp_path / "qa", "--init", init,
            "--out", tmp_path / "out", "--seeds", "3,1,2", "--json", tmp_path / "a.json")
    result = json.loads((tmp_path / "a.json").read_text())
    assert (result["split"], result["saved_seed"]) == (split, saved)
    assert load_finetuned(tmp_path / "out", "medqa")[0].head.bias.item() == saved
    assert lines(tmp_path / "out/predictions.jsonl")[0]["scores"][1] == saved


def test_flags_and_defaults_reach_the_settings(init, monkeypatch):
    """Catches a flag that changes nothing, a default of another size, a row past the context."""
    def settings(*flags):
        monkeypatch.setattr(sys, "argv", ["finetune.py", "--task", "medqa", "--data", "x", "--init",
                                          str(init), "--out", "y", *flags])
        found, _ = finetune.resolve(finetune.parse_args())
        return [found[name] for name in ("lr", "epochs", "dropout", "length")]

    given = settings("--lr", "1", "--epochs", "2", "--dropout", "0.5", "--length", "9")
    assert given == [1, 2, 0.5, 9]
    for n_params, expected in (2e9, [1e-5, 5]), (6e7, [5e-5, 5]), (1e6, [3e-4, 10]):
        monkeypatch.setattr(GPT, "n_params", lambda model, n=n_params: n)
        assert settings() == [*expected, 0.0, 64]


def test_mistakes_are_one_line(tmp_path, init, monkeypatch):
    """Catches an --out that would shadow a run's checkpoints, and messages without their mend."""
    write_medqa(tmp_path / "qa")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint_0000001.pt").touch()
    for more, needs in ((["--init", init], "a folder of its own"),
                        (["--init", "stanford-crfm/BioMedLM"], "data.py download"),
                        (["--init", init, "--data", tmp_path / "init"], "put the official file")):
        out = tmp_path / ("out" if needs.endswith("own") else "new")
        with pytest.raises((ValueError, OSError), match=needs):
            command(monkeypatch, finetune, "--task", "medqa", "--data", tmp_path / "qa", "--out",
                    out, *more)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, init):
    """Catches a gradient averaged over ranks instead of summed over the global batch."""
    write_medqa(tmp_path / "qa", n=11)  # the last batch leaves the ranks unequal shares
    rows = []
    for n in (1, 2):
        out = tmp_path / f"out{n}"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}",
                   "--master_port=29617", ROOT / "finetune.py", "--task", "medqa", "--data",
                   tmp_path / "qa", "--init", init, "--out", out, "--epochs", "2", "--seeds", "1",
                   "--batch_size", "4", "--micro_batch", "1"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        rows.append([row for row in lines(out / "log.jsonl") if "epoch" in row])
    for one, two in zip(*rows, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
