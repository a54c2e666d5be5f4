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
from conftest import ROOT, run
from test_model import waves

import finetune
from data import TASKS, Question, load_qa
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

CPU = start_process("cpu")
TEXT = ("A patient with fever and a stiff neck. Which drug helps? aspirin ceftriaxone heparin no "
        "yes maybe the trial of insulin in rats showed less sugar in the blood of the group ")


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


def choice_model(tokenizer, **how):
    model = TaskModel(adapt(small_gpt(300, **how), tokenizer.vocab_size), "choice")
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.fixture
def choice():
    tokenizer = small_tokenizer()
    examples = encode_all(questions(), "medqa", tokenizer, {"length": 64})
    return choice_model(tokenizer), examples, tokenizer


def alone(examples):
    """The same questions, a row an option."""
    return [Example(e.question, [Row(row.prefix, [s]) for row in e.rows for s in row.suffixes])
            for e in examples]


def rank_of(world_size, rank, gather=None):
    """A process among others, which are not there."""
    process = start_process("cpu")
    process.rank, process.world_size = rank, world_size
    process.gather = gather or (lambda value: [value])
    return process


# ---------------------------------------------------------------------------------------------
# prompts


def test_choice_prompt_is_the_papers():
    """Catches a missing space before the option, a lost separator, or ids out of order."""
    tokenizer = small_tokenizer()
    q = Question(id="1", question="Which drug helps?", options=("aspirin", "heparin"), answer=0)
    (e,) = encode_all([q], "medqa", tokenizer, {"length": 64})
    assert len(e.rows) == 1  # one row: the prefix is shared
    texts = [tokenizer.decode(e.rows[0].prefix + s) for s in e.rows[0].suffixes]
    assert texts == ["Which drug helps?[SEP] aspirin[SEP]", "Which drug helps?[SEP] heparin[SEP]"]
    assert [tokenizer.special[t] for t in ("[PAD]", "[CLS]", "[SEP]")] == [300, 301, 302]
    assert e.rows[0].prefix[:-1] == tokenizer.encode("Which drug helps?")


def test_label_and_text_prompts_are_the_papers():
    """Catches question-first order, stray spaces, ids that move, a target without end-of-text."""
    q = Question(id="1", question="the trial", context="in rats", options=("no", "yes"), answer=1,
                 target="less sugar")
    for markers, text, names in (
            (False, "in ratsthe trial", "CONTEXT QUESTION1 QUESTION2 ANSWER"),
            (True, "<|CONTEXT|>in rats<|QUESTION|>the trial<|ANSWER|>", "CONTEXT QUESTION ANSWER")):
        tokenizer = small_tokenizer()
        (e,) = encode_all([q], "bioasq", tokenizer, {"length": 64, "markers": markers})
        assert tokenizer.decode(e.rows[0].suffixes[0]) == text and e.rows[0].prefix == []
        added = ["[PAD]", *(f"<|{name}|>" for name in names.split())]
        assert [tokenizer.special[name] for name in added] == [*range(300, tokenizer.vocab_size)]
    assert encode_all([q], "bioasq", small_tokenizer(), {"length": 64, "markers": False}
                      )[0].rows[0].suffixes == [
        small_tokenizer().encode("in rats") + small_tokenizer().encode("the trial")]
    tokenizer = small_tokenizer()
    (e,) = encode_all([q], "text", tokenizer, {"length": 64})
    assert tokenizer.decode(e.rows[0].prefix) == "the trial<|startoftext|>"
    assert e.rows[0].suffixes == [tokenizer.encode("less sugar") + [tokenizer.eot_id]]
    assert e.n_targets == len(e.rows[0].suffixes[0])


def test_special_strings_in_a_question_stay_text():
    """Catches a question that contains "[SEP]" and so moves its own separator."""
    tokenizer = small_tokenizer()
    q = Question(id="1", question="a [SEP] b", options=("x", "y"), answer=0)
    (e,) = encode_all([q], "medqa", tokenizer, {"length": 64})
    assert e.rows[0].prefix.count(tokenizer.special["[SEP]"]) == 1


@pytest.mark.parametrize("limit", [8, 12, 20, 64])
def test_truncation_keeps_option_and_separator(limit):
    """F4: catches cutting from the row's end, which drops the answer or the final separator."""
    tokenizer = small_tokenizer()
    cut = 0
    for e in encode_all(questions(), "medqa", tokenizer, {"length": limit}):
        cut += e.truncated
        rows = [(row.prefix, s) for row in e.rows for s in row.suffixes]
        for (prefix, suffix), option in zip(rows, e.question.options, strict=True):
            whole = tokenizer.encode(" " + option)
            assert len(prefix) + len(suffix) <= limit
            assert prefix[-1] == suffix[-1] == tokenizer.special["[SEP]"]
            assert suffix[:-1] == whole[:limit - 2]
    assert (cut > 0) == (limit < 64)
    q = Question(id="1", question="the trial", context=TEXT, options=("no", "yes"), answer=1)
    for markers, end in (False, "the trial"), (True, "<|QUESTION|>the trial<|ANSWER|>"):
        (e,) = encode_all([q], "bioasq", tokenizer, {"length": 30, "markers": markers})
        assert e.truncated and len(e.rows[0].suffixes[0]) == 30
        assert tokenizer.decode(e.rows[0].suffixes[0]).endswith(end)
    q = Question(id="1", question=TEXT, target=TEXT)
    (e,) = encode_all([q], "text", tokenizer, {"length": 30})
    assert e.truncated and e.n_targets == 15 and e.rows[0].length() == 30


# ---------------------------------------------------------------------------------------------
# the model


def test_only_the_last_token_is_scored_and_padding_gets_no_gradient(choice):
    """F1: catches a loss on prompt tokens, or attention to padding: their gradient must be zero."""
    model, examples, tokenizer = choice
    tokenizer = small_tokenizer()
    q = Question(id="1", question="the trial in rats", target="less sugar")
    (e,) = encode_all([q], "text", tokenizer, {"length": 64})
    batch = collate([e, Example(q, [Row([5] * 39, [[5]])], n_targets=1)])
    source, (target,) = e.rows[0]
    padding = [-100] * (39 - len(source) + 1 - len(target))
    assert batch.targets[0].tolist() == [-100] * (len(source) - 1) + target + padding
    assert batch.idx[0, :len(source)].tolist() == source
    text = TaskModel(adapt(small_gpt(300), tokenizer.vocab_size), "text")
    hidden = []
    text.gpt.hidden = lambda *a, _h=text.gpt.hidden, **k: hidden.append(_h(*a, **k)) or hidden[0]
    loss = loss_sum(text, batch)
    (gradient,) = torch.autograd.grad(loss, hidden[0])
    assert ((gradient.abs().sum(-1) > 0) == (batch.targets != -100)).all()
    model.train()
    batch = collate(examples)
    embedded = []
    model.gpt.transformer.wte.register_forward_hook(
        lambda module, args, out: embedded.append(out) or out.retain_grad())
    loss_sum(model, batch).backward()
    n_real = [row.length() for x in examples for row in x.rows]
    for row, n in zip(embedded[0].grad.abs().sum(-1), n_real):
        assert (row[:n] > 0).all() and (row[n:] == 0).all()


def test_shared_prefix_scores_equal_options_alone(choice):
    """F3: catches an option that sees another one, or positions that count the other options."""
    model, _, tokenizer = choice
    for limit in (64, 24):  # 24: truncation leaves some questions another prefix an option
        shared = encode_all(questions(), "medqa", tokenizer, {"length": limit})
        assert any(len(e.rows) == 1 for e in shared)
        assert any(len(e.rows) > 1 for e in shared) == (limit == 24)
        together = score_examples(model, shared, CPU)
        for e, scores in zip(alone(shared), together, strict=True):
            for row, score in zip(e.rows, scores, strict=True):
                with torch.no_grad():
                    ids = torch.tensor([row.prefix + row.suffixes[0]])
                    expected = model.head(model.gpt.hidden(ids)[:, -1]).item()
                assert score == pytest.approx(expected, abs=1e-5)


def test_shared_prefix_gradients_equal_options_alone(choice):
    """Catches a prefix whose keys and values are cut from the graph: forward alone looks right."""
    model, examples, tokenizer = choice
    grads = []
    for batch in (collate(examples), collate(alone(examples))):
        model.zero_grad()
        loss_sum(model, batch).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_batch_size_and_padding_side_change_no_score(choice):
    """F6: catches scores read at the padded end, or positions that count padding."""
    model, examples, tokenizer = choice
    expected = torch.cat([torch.tensor(s) for s in score_examples(model, examples, CPU)])
    for max_tokens in (1, 300):
        got = score_examples(model, examples, CPU, max_tokens=max_tokens)
        torch.testing.assert_close(torch.cat([torch.tensor(s) for s in got]), expected,
                                   atol=1e-5, rtol=1e-5)
    row = collate(examples[:1]).idx[0][:12]
    left = torch.cat([torch.full((5,), 7), row])[None]
    real = torch.arange(17) >= 5
    mask = (real[None, :] | torch.eye(17, dtype=torch.bool)).tril()
    with torch.no_grad():
        padded = model.gpt.hidden(left, positions=(torch.arange(17) - 5).clamp(min=0)[None],
                                  mask=mask)[:, 5:]
        torch.testing.assert_close(padded, model.gpt.hidden(row[None]), atol=1e-5, rtol=1e-5)


def test_added_rows_leave_old_logits(choice):
    """Catches a resize that reinitialises learned rows, or an end-of-text id that moves."""
    gpt = small_gpt(300)
    before = gpt.transformer.wte.weight.detach().clone()
    adapt(gpt, 304)
    assert torch.equal(gpt.transformer.wte.weight[:300], before)
    assert gpt.config.vocab_size == 304 and gpt.config.eot_id == 299
    assert 0.01 < gpt.transformer.wte.weight[300:].std() < 0.03


def test_heads_equal_transformers():
    """Catches another prompt, position or head than the reference's (GPT2ForSequenceClassification
    with pad_token_id, and Linear(C, 1) on GPT2Model; transformers 5.23, made once by us)."""
    fixture = json.loads((Path(__file__).parent / "fixtures/hf_heads.json").read_text())
    for task, kind, n_labels in ("medqa", "choice", 0), ("pubmedqa", "labels", 3):
        tokenizer = small_tokenizer()
        config = GPTConfig(n_layer=3, n_head=2, n_embd=32, n_positions=64, vocab_size=304,
                           dropout=0.0, eot_id=299)
        model = TaskModel(waves(GPT(config)), kind, n_labels)
        n = model.head.weight.numel()
        model.head.weight.data = torch.sin(torch.arange(n).double() * 0.37).float().view(-1, 32)
        if kind == "choice":
            model.head.bias.data.fill_(0.25)
        examples = encode_all([Question(id="", answer=0, **q) for q in fixture["questions"]],
                              task, tokenizer, {"length": 64, "markers": True})
        ids = [[row.prefix + s for row in e.rows for s in row.suffixes] for e in examples]
        assert fixture[f"{kind}_ids"] == (ids if kind == "choice" else [i[0] for i in ids])
        for got, expected in zip(score_examples(model, examples, CPU),
                                 fixture[f"{kind}_scores"], strict=True):
            assert got == pytest.approx(expected[:len(got)], abs=1e-5)


# ---------------------------------------------------------------------------------------------
# training


@pytest.mark.parametrize("task", ["medqa", "pubmedqa", "text"])
def test_loss_and_gradient_do_not_depend_on_the_micro_batch(task):
    """F2: catches a mean per micro-batch, wrong once lengths or numbers of targets differ."""
    tokenizer = small_tokenizer()
    qs = [dataclasses.replace(q, target=" ".join(q.options), options=q.options[:2]
                              if task == "pubmedqa" else q.options) for q in questions(4)]
    examples = encode_all(qs, task, tokenizer, {"length": 64, "markers": False})
    results = []
    for micro_batch in (4, 1, 3):
        model = TaskModel(adapt(small_gpt(300), tokenizer.vocab_size), TASKS[task].kind,
                          2 if task == "pubmedqa" else 0)
        torch.manual_seed(1)
        if model.head is not None:
            torch.nn.init.normal_(model.head.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss = train_step(model, examples, optimizer, CPU, micro_batch)
        results.append((loss, [p.detach().clone() for p in model.parameters()]))
    for loss, params in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(params, results[0][1], atol=1e-6, rtol=1e-4)


def test_learning_rates():
    """Catches a warm-up of fixed length or rounded down, a decay that ends one step late."""
    assert [learning_rate(s, 8, 4.0) for s in range(8)] == [0, 1, 2, 3, 4, 3, 2, 1]
    assert [learning_rate(s, 5, 6.0) for s in range(5)] == [0, 2, 4, 6, 3]


def test_gradients_are_clipped_and_must_be_finite(choice):
    """Catches a loop without clipping, one that scales small gradients up, and NaN weights."""
    model, examples, _ = choice
    for factor in (1e3, 1e-3, math.nan):
        scaled = choice_model(choice[2])
        scaled.head.register_full_backward_hook(lambda m, grads, out, f=factor: (grads[0] * f,))
        before = [p.detach().clone() for p in scaled.parameters()]
        optimizer = torch.optim.SGD(scaled.gpt.parameters(), lr=1.0)
        scaled.head.requires_grad_(False)
        if math.isnan(factor):
            with pytest.raises(ValueError, match="lower --lr"):
                train_step(scaled, examples, optimizer, CPU)
            assert all(map(torch.equal, before, scaled.parameters()))
            continue
        train_step(scaled, examples, optimizer, CPU)
        moved = torch.cat([(a - b).detach().flatten() for a, b in zip(before, scaled.parameters())])
        assert (moved.norm().item() == pytest.approx(1.0, rel=1e-4)) == (factor > 1)


def test_ranks_add_up_to_one_process(choice, monkeypatch):
    """Catches a mean over ranks in place of the batch's, a rank stride, a lost order."""
    model, examples, _ = choice
    found = {}
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))
    for world_size in (1, 2, 8):  # 8: a rank without a question
        losses, grads = [], 0
        for rank in range(world_size):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            optimizer.step = lambda: None
            optimizer.zero_grad = lambda **_: None
            model.zero_grad()
            losses.append(train_step(model, examples, optimizer, rank_of(world_size, rank), 2))
            # DDP's mean over ranks
            grads = grads + torch.cat([p.grad.flatten() for p in model.parameters()]) / world_size
        parts = []
        for rank in range(world_size):
            score_examples(model, examples, rank_of(world_size, rank, lambda value: parts.append(
                value) or []))
        scores = score_examples(model, examples, rank_of(world_size, 0, lambda value: parts))
        found[world_size] = sum(losses), grads, torch.cat([torch.tensor(s) for s in scores])
    for world_size in (2, 8):
        torch.testing.assert_close(found[world_size], found[1], atol=1e-5, rtol=1e-4)


SETTINGS = {"batch_size": 3, "epochs": 4, "lr": 0.1, "micro_batch": None, "last": False}


@pytest.mark.parametrize("last, chosen", [(False, 3), (True, 4)])
def test_the_best_epochs_weights_are_kept(choice, monkeypatch, last, chosen):
    """Catches reporting the last epoch, the first of equals, or weights that went on training; a
    lost last batch; an order, rate or mode that isn't the recipe's."""
    model, examples, _ = choice
    steps, after, log = [], [], []

    def fake_step(model, batch, optimizer, process, micro_batch):
        assert model.training and optimizer.defaults["weight_decay"] == 0
        steps.append(([e.question.id for e in batch], optimizer.param_groups[0]["lr"]))
        with torch.no_grad():
            model.head.bias += 1
        return torch.tensor(0.5)

    def fake_scores(model, dev_set, process):
        assert dev_set == examples[:2]
        model.eval()
        after.append(model.head.bias.item())
        return [[0.0]]

    monkeypatch.setattr(finetune, "train_step", fake_step)
    monkeypatch.setattr(finetune, "score_examples", fake_scores)
    monkeypatch.setattr(finetune, "quality", lambda *_: [0.2, 0.7, 0.7, 0.1][len(after) - 1])
    settings = SETTINGS | {"last": last}
    score = finetune.train(model, examples, examples[:2], settings, 5, CPU, log)
    assert score == (0.1 if last else 0.7) and model.head.bias.item() == after[chosen - 1]
    assert [row["loss"] for row in log] == [0.5] * 4 and log[1]["dev"] == 0.7
    ids, rates = zip(*steps)
    assert [len(batch) for batch in ids] == [3, 3, 1] * 4
    assert list(rates) == [learning_rate(i, 12, 0.1) for i in range(12)]
    epochs = [sum(ids[i:i + 3], []) for i in range(0, 12, 3)]
    orders = [[examples[i].question.id for i in epoch_order(7, 5, epoch)] for epoch in range(4)]
    assert epochs == orders and all(sorted(epoch) == list("0123456") for epoch in epochs)
    assert len({tuple(epoch_order(50, s, e).tolist()) for s in (1, 2) for e in (0, 1)}) == 4


def test_dropout_differs_between_ranks_and_seeds(choice, monkeypatch):
    """Catches masks that all ranks share, or that a seed doesn't change."""
    model, examples, _ = choice
    drawn = []
    monkeypatch.setattr(finetune, "train_step", lambda *_: drawn.append(torch.rand(1).item())
                        or torch.zeros(()))
    for seed, rank in (1, 0), (1, 1), (2, 0), (1, 0):
        process = rank_of(1, rank)
        finetune.train(model, examples, [], SETTINGS | {"epochs": 1}, seed, process, [])
    assert len(set(drawn[::3])) == 3 and drawn[0] == drawn[9]


def test_training_learns_its_questions_and_scores_without_dropout(choice):
    """Catches a loss that goes down without the answers' scores going up; dropout in scoring."""
    _, examples, tokenizer = choice
    model = choice_model(tokenizer, dropout=0.1)
    settings = SETTINGS | {"batch_size": 7, "epochs": 60, "lr": 3e-3}
    assert finetune.train(model, examples, examples, settings, 1, CPU, []) == 1.0
    model.train()
    scores = score_examples(model, examples, CPU)
    assert scores == score_examples(model, examples, CPU) and quality(scores, examples) == 1.0


def test_weights_of_a_seed(init):
    """Catches --random_init that keeps learned weights, seeds that share a head, dropout lost."""
    tokenizer = Tokenizer.load(init)
    tokenizer.add_special_tokens(["[PAD]"])
    settings = {"init": init, "random_init": False, "dropout": 0.3, "kind": "labels",
                "activation_checkpointing": False, "labels": ["no", "yes"]}
    one, two = build(settings, tokenizer, 1), build(settings, tokenizer, 2)
    fresh = build(settings | {"random_init": True}, tokenizer, 1)
    learned = GPT.from_pretrained(init).state_dict()
    for name in ("transformer.h.0.mlp.c_fc.weight", "transformer.wpe.weight"):
        assert torch.equal(one.gpt.state_dict()[name], learned[name])
        assert not torch.equal(fresh.gpt.state_dict()[name], learned[name])
    assert not torch.equal(one.head.weight, two.head.weight)
    assert one.head.weight.shape == (2, 32) and one.head.bias is None
    assert 0.01 < one.head.weight.std() < 0.03
    assert {m.gpt.config.dropout for m in (one, fresh)} == {0.3}
    assert {m.gpt.config.vocab_size for m in (one, fresh)} == {301}


def test_micro_batches_hold_every_example_once_within_the_budget(choice):
    """Catches a dropped last chunk, and a budget that ignores padding."""
    _, examples, _ = choice
    chunks = list(micro_batches(examples * 3, max_tokens=120))
    assert sorted(e.question.id for c in chunks for e in c) == sorted(
        e.question.id for e in examples * 3)
    assert all(collate(c).idx.numel() <= 120 or len(c) == 1 for c in chunks)


# ---------------------------------------------------------------------------------------------
# questions and the command line


def test_wilson_against_published_values():
    """Catches the normal interval, which leaves [0, 1]: Newcombe 1998, table I, and 0 of 20."""
    assert wilson(81 / 263, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson(0, 20) == pytest.approx([0, 0.1611], abs=1e-4)


def test_summary():
    """Catches an interval over seeds x questions, and a chance or majority of something else."""
    options = [("a", "b", "c", "d"), ("a", "b")]
    examples = [Example(Question(id=str(i), question="?", options=options[i % 2], answer=i // 3),
                        [], truncated=i < 2) for i in range(4)]
    row = summarise("medqa", "test", 9, examples, [0.5, 1.0])
    assert row["ci95"] == wilson(0.75, 4) and row["accuracy"] == 0.75
    assert (row["n"], row["available"], row["truncated"]) == (4, 9, 2)
    assert (row["chance"], row["majority"]) == (0.375, 0.75)
    text = [Example(None, [], n_targets=n) for n in (1, 3)]
    assert quality([[2.0], [4.0]], text) == -1.5
    assert summarise("text", "dev", 2, text, [-1.5])["loss"] == 1.5


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
    MMLU's five examples a subject as dev; a set of labels that takes another's questions."""
    def q(text, answer=0):
        return Question(id=text, question=text, options=("x", "y"), answer=answer)

    files = {("mmlu", "a", "val"): [q("1")], ("mmlu", "a", "test"): [q("2"), q("3", None)],
             ("mmlu", "a", "dev"): [q("five")], ("medmcqa", "b", "test"): [q("4")],
             ("medmcqa", "b", "train"): [q("5"), q("1"), q("2"), q("3", 1)],
             ("bioasq", "c", "train"): [q("6")]}

    def fake(task, folder, split):
        if (task, folder, split) not in files:
            raise FileNotFoundError(f"no {split} in {folder}")
        return files[task, folder, split]

    monkeypatch.setattr(finetune, "load_qa", fake)
    sets = read_questions("mmlu", ["a", "b"])
    assert {split: [q.id for q in found] for split, found in sets.items()} == {
        "train": ["5"], "dev": ["1"], "test": ["2", "3"]}
    for task, folders in ("mmlu", ["a", "c"]), ("pubmedqa", ["c"]):
        with pytest.raises(FileNotFoundError, match="no test in c"):
            read_questions(task, folders)
    assert [q.id for q in labeled(sets["test"])] == ["2"]
    assert [q.id for q in labeled([q(str(i)) for i in range(10)], 3)] == ["0", "3", "6"]


def test_official_files(shared):
    """F5, F7: catches another shuffle of PubMedQA, or readers that lose questions."""
    qa = shared / "qa"
    sets = {s: load_qa("pubmedqa", qa / "pubmedqa", s) for s in ("train", "dev", "test")}
    assert [len(v) for v in sets.values()] == [450, 50, 500]
    truth = json.loads((qa / "pubmedqa/test_ground_truth.json").read_text())
    assert [q.id for q in sets["test"]] == list(truth)
    ids = {s: {q.id for q in v} for s, v in sets.items()}
    assert not ids["train"] & (ids["dev"] | ids["test"]) and not ids["dev"] & ids["test"]
    sets = read_questions("medqa", [qa / "medqa"])
    assert [len(v) for v in sets.values()] == [1030, 1272, 0]


@pytest.fixture
def init(tmp_path):
    small_tokenizer().save(tmp_path / "init")
    small_gpt(300).save_pretrained(tmp_path / "init")
    return tmp_path / "init"


def finetune_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, flags)])
    finetune.main()


def test_command_trains_saves_and_eval_agrees(tmp_path, init, monkeypatch):
    """Catches a saved folder whose scores differ from those of the run that reported them."""
    write_medqa(tmp_path / "qa")
    finetune_main(monkeypatch, "--task", "medqa", "--data", tmp_path / "qa", "--init", init,
                  "--out", tmp_path / "out", "--epochs", 2, "--seeds", "1,2", "--lr", 1e-2,
                  "--json", tmp_path / "a.json")
    row = json.loads((tmp_path / "a.json").read_text())
    assert (row["task"], row["split"], row["n"], row["available"]) == ("medqa", "test", 12, 12)
    assert row["accuracy"] == pytest.approx(sum(s["score"] for s in row["seeds"]) / 2)
    result = run("eval.py", "qa", "--task", "medqa", "--data", tmp_path / "qa", "--init",
                 tmp_path / "out", "--json", tmp_path / "b.json", "--predictions",
                 tmp_path / "p.jsonl")
    assert result.returncode == 0, result.stderr
    saved = next(s for s in row["seeds"] if s["seed"] == row["saved_seed"])
    assert json.loads((tmp_path / "b.json").read_text())["accuracy"] == saved["score"]
    ours = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()]
    theirs = [json.loads(line) for line in (tmp_path / "p.jsonl").open()]
    assert [p["prediction"] for p in ours] == [p["prediction"] for p in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-5)


@pytest.mark.parametrize("flags", [[], ["--markers"]])
def test_a_saved_head_reads_the_form_it_was_trained_on(tmp_path, init, monkeypatch, flags):
    """Catches --markers that reaches training but not what loads the folder, or the reverse."""
    sets = {split: [Question(id=f"{split}{i}", question="the trial", context=TEXT[i:i + 20],
                             options=("no", "yes"), answer=i % 2) for i in range(first, first + 4)]
            for split, first in (("train", 0), ("dev", 10), ("test", 20))}
    monkeypatch.setattr(finetune, "load_qa", lambda task, folder, split: sets[split])
    out = tmp_path / "out"
    finetune_main(monkeypatch, "--task", "bioasq", "--data", tmp_path, "--init", init, "--out", out,
                  "--epochs", 2, "--seeds", 1, "--length", 60, *flags)
    model, tokenizer, settings = load_finetuned(out, "bioasq")
    assert ("<|QUESTION1|>" in tokenizer.special) == (not flags)
    examples = encode_all(sets["test"], "bioasq", tokenizer, settings)
    rows = [json.loads(line) for line in (out / "predictions.jsonl").open()]
    for row, scores in zip(rows, score_examples(model, examples, CPU), strict=True):
        assert row["scores"] == pytest.approx(scores, abs=1e-5)
    for task in ("pubmedqa", "medqa"):
        with pytest.raises(ValueError, match="finetune.py --task"):
            load_finetuned(out, task)


@pytest.mark.parametrize("test_labels", [True, False])
def test_dev_chooses_and_test_is_reported(tmp_path, init, monkeypatch, test_labels):
    """Catches a seed or an epoch chosen on what is reported, the saved seed's mix-up, another
    seed's predictions, defaults that aren't the task's."""
    write_medqa(tmp_path / "qa")
    if not test_labels:
        (tmp_path / "qa/4_options/phrases_no_exclude_test.jsonl").unlink()

    calls = []

    def fake_train(model, train_set, dev_set, settings, seed, process, log):
        calls.append([len(train_set), [e.question.question for e in dev_set]])
        assert settings["lr"] == 3e-4 and settings["epochs"] == 10 and settings["length"] == 64
        torch.nn.init.constant_(model.head.bias, seed)
        return {3: 0.5, 1: 0.9, 2: 0.9}[seed] if dev_set else None

    monkeypatch.setattr(finetune, "train", fake_train)
    finetune_main(monkeypatch, "--task", "medqa", "--data", tmp_path / "qa", "--init", init,
                  "--out", tmp_path / "out", "--seeds", "3,1,2", "--json", tmp_path / "a.json")
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["split"] == ("test" if test_labels else "dev")
    saved = 1 if test_labels else 3
    assert result["saved_seed"] == saved
    model, tokenizer, settings = load_finetuned(tmp_path / "out", "medqa")
    assert model.head.bias.item() == saved
    qs = load_qa("medqa", tmp_path / "qa", result["split"])
    expected = score_examples(model, encode_all(qs, "medqa", tokenizer, settings), CPU)
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()]
    for row, scores in zip(rows, expected, strict=True):
        assert row["scores"] == pytest.approx(scores, abs=1e-5)
    dev = [q.question for q in load_qa("medqa", tmp_path / "qa", "dev")] if test_labels else []
    assert calls == [[5, dev]] * 3


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
            finetune_main(monkeypatch, "--task", "medqa", "--data", tmp_path / "qa", "--out", out,
                          *more)


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
                   "--batch_size", "4"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        rows.append([json.loads(line) for line in (out / "log.jsonl").open()])
    for one, two in zip(*rows, strict=True):
        for key in one:
            if key != "questions_per_s":
                assert two[key] == pytest.approx(one[key], rel=1e-4), key
