"""finetune.py: prompts, truncation, shared prefixes, the loss, splits."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run
from test_model import waves

import finetune
from data import Question, load_qa
from finetune import (
    KINDS,
    SPECIAL_TOKENS,
    Env,
    Example,
    Row,
    TaskModel,
    adapt,
    collate,
    correct,
    encode_all,
    epoch_order,
    learning_rate,
    loss_sum,
    micro_batches,
    quality,
    read_questions,
    score_examples,
    train_step,
    wilson,
)
from model import GPT, GPTConfig
from tokenizer import Tokenizer, train_bpe

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
    examples = encode_all(questions(), "medqa", tokenizer, 64)
    return choice_model(tokenizer), examples, tokenizer


# ---------------------------------------------------------------------------------------------
# prompts


def test_choice_prompt_is_the_papers():
    """Catches a missing space before the option, a lost separator, or ids out of order."""
    tokenizer = small_tokenizer()
    q = Question(id="1", question="Which drug helps?", options=("aspirin", "heparin"), answer=0)
    (e,) = encode_all([q], "medqa", tokenizer, 64)
    assert len(e.rows) == 1  # one row: the prefix is shared
    texts = [tokenizer.decode(e.rows[0].prefix + s) for s in e.rows[0].suffixes]
    assert texts == ["Which drug helps?[SEP] aspirin[SEP]", "Which drug helps?[SEP] heparin[SEP]"]
    assert [tokenizer.special[t] for t in SPECIAL_TOKENS["choice"]] == [300, 301, 302]
    assert e.rows[0].prefix[:-1] == tokenizer.encode("Which drug helps?")


def test_label_and_text_prompts_are_the_papers():
    """Catches question-first order, stray spaces, and a text target without its end-of-text."""
    tokenizer = small_tokenizer()
    q = Question(id="1", question="the trial", context="in rats", options=("no", "yes"), answer=1,
                 target="less sugar")
    (labels,) = encode_all([q], "bioasq", tokenizer, 64)
    ids = labels.rows[0].suffixes[0]
    assert tokenizer.decode(ids) == "<|CONTEXT|>in rats<|QUESTION|>the trial<|ANSWER|>"
    tokenizer = small_tokenizer()
    (text,) = encode_all([q], "text", tokenizer, 64)
    ids = text.rows[0].suffixes[0]
    assert tokenizer.decode(ids) == "the trial<|startoftext|>less sugar<|endoftext|>"
    assert ids[-text.n_targets:] == tokenizer.encode("less sugar") + [tokenizer.eot_id]


def test_special_strings_in_a_question_stay_text():
    """Catches a question that contains "[SEP]" and so moves its own separator."""
    tokenizer = small_tokenizer()
    q = Question(id="1", question="a [SEP] b", options=("x", "y"), answer=0)
    (e,) = encode_all([q], "medqa", tokenizer, 64)
    assert e.rows[0].prefix.count(tokenizer.special["[SEP]"]) == 1


@pytest.mark.parametrize("limit", [8, 12, 20, 64])
def test_truncation_keeps_option_and_separator(limit):
    """F4: catches cutting from the row's end, which drops the answer or the final separator."""
    tokenizer = small_tokenizer()
    cut = 0
    for e in encode_all(questions(), "medqa", tokenizer, limit):
        cut += e.truncated
        rows = [(row.prefix, s) for row in e.rows for s in row.suffixes]
        for (prefix, suffix), option in zip(rows, e.question.options, strict=True):
            whole = tokenizer.encode(" " + option)
            assert len(prefix) + len(suffix) <= limit
            assert prefix[-1] == suffix[-1] == tokenizer.special["[SEP]"]
            assert suffix[:-1] == whole[:limit - 2]
    assert (cut > 0) == (limit < 64)
    q = Question(id="1", question="the trial", context=TEXT, options=("no", "yes"), answer=1)
    (e,) = encode_all([q], "bioasq", tokenizer, 30)
    decoded = tokenizer.decode(e.rows[0].suffixes[0])
    assert e.truncated and len(e.rows[0].suffixes[0]) == 30
    assert decoded.endswith("<|QUESTION|>the trial<|ANSWER|>")


# ---------------------------------------------------------------------------------------------
# the model


def test_only_the_last_token_is_scored_and_padding_gets_no_gradient(choice):
    """F1: catches a loss on prompt tokens, or attention to padding: their gradient must be zero."""
    model, examples, tokenizer = choice
    tokenizer = small_tokenizer()
    q = Question(id="1", question="the trial in rats", target="less sugar")
    (e,) = encode_all([q], "text", tokenizer, 64)
    batch = collate([e, Example(q, [Row([], [[5] * 40])], n_targets=1)])
    ids = e.rows[0].suffixes[0]
    assert batch.targets[0].tolist() == (
        [-100] * (len(ids) - 1 - e.n_targets) + ids[-e.n_targets:] + [-100] * (39 - len(ids) + 1))
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
        shared = encode_all(questions(), "medqa", tokenizer, limit)
        alone = encode_all(questions(), "medqa", tokenizer, limit, shared=False)
        assert any(len(e.rows) == 1 for e in shared)
        assert any(len(e.rows) > 1 for e in shared) == (limit == 24)
        together = score_examples(model, shared, Env("cpu"))
        for e, scores in zip(alone, together):
            for row, score in zip(e.rows, scores, strict=True):
                with torch.no_grad():
                    ids = torch.tensor([row.prefix + row.suffixes[0]])
                    expected = model.head(model.gpt.hidden(ids)[:, -1]).item()
                assert score == pytest.approx(expected, abs=1e-5)


def test_shared_prefix_gradients_equal_options_alone(choice):
    """Catches a prefix whose keys and values are cut from the graph: forward alone looks right."""
    model, examples, tokenizer = choice
    alone = encode_all(questions(), "medqa", tokenizer, 64, shared=False)
    grads = []
    for batch in (collate(examples), collate(alone)):
        model.zero_grad()
        loss_sum(model, batch).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_batch_size_and_padding_side_change_no_score(choice):
    """F6: catches scores read at the padded end, or positions that count padding."""
    model, examples, tokenizer = choice
    env = Env("cpu")
    expected = torch.cat([torch.tensor(s) for s in score_examples(model, examples, env)])
    for max_tokens in (1, 300):
        got = score_examples(model, examples, env, max_tokens=max_tokens)
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
                              task, tokenizer, 64)
        ids = [[row.prefix + s for row in e.rows for s in row.suffixes] for e in examples]
        assert fixture[f"{kind}_ids"] == (ids if kind == "choice" else [i[0] for i in ids])
        for got, expected in zip(score_examples(model, examples, Env("cpu")),
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
    examples = encode_all(qs, task, tokenizer, 64)
    results = []
    for micro_batch in (4, 1, 3):
        model = TaskModel(adapt(small_gpt(300), tokenizer.vocab_size), KINDS[task],
                          2 if task == "pubmedqa" else 0)
        torch.manual_seed(1)
        if model.head is not None:
            torch.nn.init.normal_(model.head.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss = train_step(model, examples, optimizer, Env("cpu"), micro_batch)
        results.append((loss, [p.detach().clone() for p in model.parameters()]))
    for loss, params in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(params, results[0][1], atol=1e-6, rtol=1e-4)


def test_learning_rates():
    """Catches a warm-up of fixed length, or a decay that does not reach zero one step late."""
    assert [learning_rate(s, 8, 4.0) for s in range(8)] == [0, 1, 2, 3, 4, 3, 2, 1]
    assert learning_rate(0, 1, 4.0) == 4.0


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    """Catches an order that repeats between epochs or seeds."""
    orders = [epoch_order(50, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4


def test_micro_batches_hold_every_example_once_within_the_budget(choice):
    """Catches a dropped last chunk, and a budget that ignores padding."""
    _, examples, _ = choice
    chunks = list(micro_batches(examples * 3, max_tokens=120))
    assert sorted(e.question.id for c in chunks for e in c) == sorted(
        e.question.id for e in examples * 3)
    assert all(collate(c).idx.numel() <= 120 or len(c) == 1 for c in chunks)


def test_a_model_learns_its_questions(choice):
    """Catches a loss that goes down without the answers' scores going up."""
    model, examples, _ = choice
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(60):
        train_step(model, examples, optimizer, Env("cpu"))
    scores = score_examples(model, examples, Env("cpu"))
    assert quality(scores, examples) == 1.0 and sum(correct(scores, examples)) == 7


# ---------------------------------------------------------------------------------------------
# questions and the command line


def test_wilson_against_published_values():
    """Catches the normal interval, which leaves [0, 1]: Newcombe 1998, table I, and 0 of 20."""
    assert wilson(81 / 263, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson(0, 20) == pytest.approx([0, 0.1611], abs=1e-4)


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


def test_questions_of_dev_and_test_leave_train(tmp_path):
    """F7: catches a question that stands in train and in dev."""
    write_medqa(tmp_path)
    sets = read_questions("medqa", [tmp_path])
    assert {k: len(v) for k, v in sets.items()} == {"train": 5, "dev": 12, "test": 12}
    texts = {k: {q.question for q in v} for k, v in sets.items()}
    assert not texts["train"] & (texts["dev"] | texts["test"])


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


def test_command_trains_saves_and_eval_agrees(tmp_path, init):
    """Catches a saved folder whose scores differ from those of the run that reported them."""
    write_medqa(tmp_path / "qa")
    result = run("finetune.py", "--task", "medqa", "--data", tmp_path / "qa", "--init", init,
                 "--out", tmp_path / "out", "--epochs", "2", "--seeds", "1,2", "--lr", "1e-3,1e-2",
                 "--json", tmp_path / "a.json")
    assert result.returncode == 0, result.stderr
    row = json.loads((tmp_path / "a.json").read_text())
    assert row["task"], row["split"] == ("medqa", "test")
    assert row["n"] == row["available"] == 12 and len(row["seeds"]) == 2
    assert row["accuracy"] == pytest.approx(sum(s["accuracy"] for s in row["seeds"]) / 2)
    result = run("eval.py", "qa", "--task", "medqa", "--data", tmp_path / "qa", "--init",
                 tmp_path / "out", "--json", tmp_path / "b.json", "--predictions",
                 tmp_path / "p.jsonl")
    assert result.returncode == 0, result.stderr
    saved = next(s for s in row["seeds"] if s["seed"] == row["saved_seed"])
    assert json.loads((tmp_path / "b.json").read_text())["accuracy"] == saved["accuracy"]
    ours = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()]
    theirs = [json.loads(line) for line in (tmp_path / "p.jsonl").open()]
    assert [p["prediction"] for p in ours] == [p["prediction"] for p in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-5)


def test_mistakes_are_one_line(tmp_path, init, monkeypatch):
    """Catches an --out that would shadow a run's checkpoints, and messages without their mend."""
    write_medqa(tmp_path / "qa")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint_0000001.pt").touch()
    for more, needs in ((["--init", init], "a folder of its own"),
                        (["--init", "stanford-crfm/BioMedLM"], "data.py download"),
                        (["--init", init, "--data", tmp_path / "init"], "put the official file")):
        out = tmp_path / ("out" if needs.endswith("own") else "new")
        args = ["--task", "medqa", "--data", tmp_path / "qa", "--out", out, *more]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, args)])
        with pytest.raises((ValueError, OSError), match=needs):
            finetune.main()


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
