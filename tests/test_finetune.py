"""finetune.py: prompts, truncation, shared prefixes, the loss, the loop, splits, the folder."""

import dataclasses
import json
import math
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run

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
    load_finetuned,
    micro_batches,
    quality,
    read_questions,
    score_examples,
    summarise,
    train_step,
    wilson,
    write_lines,
)
from model import GPT, GPTConfig, config_of
from tokenizer import Tokenizer, train_bpe
from train import start_process

TEXT = ("A patient with fever and a stiff neck. Which drug helps? aspirin ceftriaxone heparin no "
        "yes maybe the trial of insulin in rats showed less sugar in the blood of the group ")
CPU = start_process("cpu")


def small_tokenizer():
    return Tokenizer.from_merges(train_bpe(dict.fromkeys(re.findall(" ?[A-Za-z]+", TEXT), 5), 300))


def small_gpt(vocab_size, dropout=0.0, n_positions=48):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=32, n_positions=n_positions, dropout=dropout,
                        vocab_size=vocab_size, initializer_range=0.3))
    for p in gpt.parameters():
        if p.dim() == 1:  # biases that are 0 would hide mistakes
            p.data += 0.1 * torch.randn_like(p)
    return gpt


WORDS = TEXT.split()
QUESTIONS = [  # ragged, of 2 to 5 options
    Question(id=str(i),
             question=" ".join(WORDS[i:i + 3 + 4 * (i % 3)]),
             options=tuple(" ".join(WORDS[k:k + 1 + k % 3]) for k in range(2 + i % 4)),
             answer=i % 2,
             target=" ".join(WORDS[i:2 + 2 * i])) for i in range(7)]


def encode(qs, task, length=48, markers=False):
    """(examples, their tokenizer)."""
    tokenizer = small_tokenizer()
    return encode_all(qs, task, tokenizer, {"length": length, "markers": markers}), tokenizer


def task_model(kind, labels=(), **how):
    model = TaskModel(small_gpt(305, **how), kind, labels)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


BUILD = {"init": "init", "random_init": False, "lora": None, "dropout": 0.3, "kind": "choice",
         "activation_checkpointing": True, "labels": ()}


def alone(examples):
    """The same examples, a row an option."""
    return [e._replace(rows=[Row(row.prefix, [s]) for row in e.rows for s in row.suffixes])
            for e in examples]


def nats_of(gpt, ids, first=1):
    """Summed loss of ids[first:], each given all before, by plain logits."""
    logits = gpt(torch.tensor([ids[:-1]]))[0]
    return F.cross_entropy(logits[0, first - 1:], torch.tensor(ids[first:]), reduction="sum")


# ---------------------------------------------------------------------------------------------
# prompts


# Each letter and bracket of the texts is a token. "|" stands between prefix and suffix.
@pytest.mark.parametrize("task, markers, added, rows_by_length", [
    ("medqa", False, "[PAD] [CLS] [SEP]", {
        64: ["[SEP][SEP]| YYYYY[SEP]", "[SEP][SEP]| X[SEP]"],
        9: ["[[SEP]| YYYYY[SEP]", "[SEP][SEP]| X[SEP]"],
        7: ["[SEP]| YYYY[SEP]", "[SE[SEP]| X[SEP]"]}),
    ("bioasq", False, "[PAD]", {64: ["|CCC[SEP]"], 7: ["|CC[SEP]"], 4: ["|[SEP"]}),
    ("bioasq", True, "[PAD] <|CONTEXT|> <|QUESTION|> <|ANSWER|>", {
        64: ["|<|CONTEXT|>CCC<|QUESTION|>[SEP]<|ANSWER|>"],
        9: ["|<|CONTEXT|>C<|QUESTION|>[SEP]<|ANSWER|>"]}),
    ("text", False, "[PAD] <|startoftext|>", {
        64: ["[SEP]<|startoftext|>|TT<|endoftext|>"],
        10: ["[SEP<|startoftext|>|TT<|endoftext|>"],
        4: ["[<|startoftext|>|T<|endoftext|>"]})])
def test_prompts_are_the_papers(task, markers, added, rows_by_length):
    """Catches a missing or stray space, question-first order, ids that move, "[SEP]" read in a
    question; cutting from a row's end, which drops the answer, a separator or end-of-text, or from
    a text's start."""
    question = Question("", "[SEP]", context="CCC", options=("YYYYY", "X"), target="TT")
    for length, expected in rows_by_length.items():
        examples, tokenizer = encode([question], task, length, markers)
        assert list(tokenizer.special) == ["<|endoftext|>", *added.split()]
        e, = alone(examples)
        assert [f"{tokenizer.decode(row.prefix)}|{tokenizer.decode(row.suffixes[0])}"
                for row in e.rows] == expected
        assert e.truncated == (length < 64)
        assert e.n_targets == (len(e.rows[0].suffixes[0]) if task == "text" else 0)


# ---------------------------------------------------------------------------------------------
# the model


def wave(p, i=0, size=1.0):
    angles = torch.arange(p.numel(), dtype=torch.float64) * 0.37 + i
    p.data.copy_((size * angles.sin()).view(p.shape))


@pytest.mark.parametrize("task, labels", [("medqa", ""), ("pubmedqa", "abc")])
def test_heads_equal_transformers(task, labels):
    """Catches another prompt, position or head than the reference's (GPT2ForSequenceClassification
    with pad_token_id, and Linear(C, 1) on GPT2Model; transformers 5.23, made once by us)."""
    fixture = json.loads((Path(__file__).parent / "fixtures/hf_heads.json").read_text())
    gpt = small_gpt(304).eval()
    kind = TASKS[task].kind
    model = TaskModel(gpt, kind, labels)
    for i, (_, p) in enumerate(sorted(gpt.named_parameters())):  # as when the fixture was made
        wave(p, i, 0.2)
    wave(model.head.weight)
    if kind == "choice":
        model.head.bias.data.fill_(0.25)
    qs = [Question(id="", answer=0, **q | {"options": labels or q["options"]})
          for q in fixture["questions"]]
    examples, _ = encode(qs, task, markers=True)
    for got, expected in zip(score_examples(model, examples, CPU), fixture[f"{kind}_scores"],
                             strict=True):
        assert got == pytest.approx(expected[:len(got)], abs=1e-5)


def test_weights_of_a_seed(init):
    """Catches --random_init that keeps learned weights, a resize that changes learned rows or cuts
    a padded folder's, seeds that share a head, dropout lost."""
    _, tokenizer = encode(QUESTIONS, "medqa")  # three tokens are added
    one, again, two = (build(BUILD, tokenizer, seed) for seed in (1, 1, 2))
    fresh = build(BUILD | {"random_init": True}, tokenizer, 1)
    learned, wte, fresh_wte = (gpt.transformer.wte.weight for gpt in (
        GPT.from_pretrained(init), one.gpt, fresh.gpt))
    assert torch.equal(wte[:300], learned) and not torch.equal(fresh_wte[:300], learned)
    for new in (wte[300:], fresh_wte[300:], one.head.weight):
        assert 0.01 < new.std() < 0.03
    assert (one.gpt.config.vocab_size, one.gpt.config.dropout) == (303, 0.3)
    assert one.gpt.activation_checkpointing
    low = build(BUILD, tokenizer, 1, torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.float32}  # LoRA alone has lower ones
    assert torch.equal(one.head.weight, again.head.weight)
    assert not torch.equal(one.head.weight, two.head.weight)
    small_gpt(304).save_pretrained(init)
    assert len(build(BUILD, tokenizer, 1).gpt.transformer.wte.weight) == 304


def test_lora_trains_little_and_merges(init):
    """Catches a first step whose output isn't the base's, learned rows, biases or matrices that
    train, added rows that don't; another scale in the merged weights than in training; a folder
    that isn't an ordinary GPT-2."""
    examples, tokenizer = encode(QUESTIONS, "medqa")
    settings = BUILD | {"lora": 4, "dropout": 0.0, "task": "medqa", "length": 48, "markers": False}
    full = score_examples(build(BUILD, tokenizer, 1), examples, CPU)
    model = build(settings, tokenizer, 1)
    torch.testing.assert_close(score_examples(model, examples, CPU), full)
    idx = torch.arange(290, 303)[None]
    model.gpt(idx, idx)[1].backward()
    gradient = model.gpt.transformer.wte.weight.grad
    assert gradient.any(1).nonzero().flatten().tolist() == [300, 301, 302]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0)
    for _ in range(2):  # B first: A's gradient is 0 while B is
        train_step(model.train(), examples, optimizer, CPU)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".A." in name or ".B." in name} | {
        "gpt.transformer.wte.weight", "head.weight", "head.bias"}
    kept = (model.gpt.transformer.wte.weight == before["gpt.transformer.wte.weight"]).all(1)
    assert kept[:300].all() and not kept[302]  # [SEP]
    tuned = score_examples(model, examples, CPU)
    finetune.save(Path("merged"), model, tokenizer, settings, [])
    merged = score_examples(load_finetuned("merged", "medqa")[0], examples, CPU)
    torch.testing.assert_close(merged, tuned, rtol=1e-5, atol=1e-5)
    assert tuned[0] != pytest.approx(full[0], abs=0.01)

    low = build(settings, tokenizer, 1, torch.bfloat16)
    assert {p.dtype for p in low.parameters() if p.requires_grad or p.dim() == 1} == {torch.float32}
    score_examples(low, examples, start_process("cpu", "bfloat16"))
    finetune.save(Path("low"), low, tokenizer, settings, [])
    saved = GPT.from_pretrained("low", None).state_dict()  # as it lies in the file
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------
# training


def naive(model, examples):
    """(loss, gradients, scores) from each option alone, by the plain model."""
    model.zero_grad()
    total = 0
    scores = []
    for e in alone(examples):
        if model.kind == "text":
            nats = nats_of(model.gpt, e.rows[0].ids(), len(e.rows[0].prefix))
            out = nats.view(1)
        else:
            out = torch.cat([model.head(model.gpt.hidden(torch.tensor([row.ids()]))[0, -1])
                             for row in e.rows])
            nats = F.cross_entropy(out, torch.tensor(e.question.answer))
        total += nats
        scores.append(out.tolist())
    loss = total / (sum(e.n_targets for e in examples) or len(examples))
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()], scores


@pytest.mark.parametrize("task, n_options, length", [
    ("medqa", 5, 64),
    ("medqa", 5, 24),
    ("pubmedqa", 2, 64),
    ("text", 0, 64)])
def test_loss_gradient_and_scores_equal_each_option_alone(task, n_options, length, monkeypatch):
    """Catches a loss on prompt or padding, or shifted by a token; an option that
    sees another one, positions that count other options or leave the context in padding; a mean per
    micro-batch or rank, wrong once lengths differ; a wrong stride of ranks, a lost order; a rank
    without a question that adds one; gradients that DDP exchanges too early or too often; bfloat16
    that isn't used; a graph kept; a budget without padding, or without a question's rows."""
    qs = [dataclasses.replace(q, options=q.options[:n_options]) for q in QUESTIONS]
    examples, _ = encode(qs, task, length)
    # At 24 truncation leaves some questions another prefix an option.
    assert {len(e.rows) > 1 for e in examples} == {False, length == 24}
    model = task_model(TASKS[task].kind, "ab" if task == "pubmedqa" else "",
                       n_positions=max(e.length() for e in alone(examples)))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))
    passes = []
    model.register_forward_hook(lambda *_: passes.append(
        torch.is_grad_enabled() and model.require_backward_grad_sync))

    def run(world_size, max_tokens):
        """What the ranks find together: loss, gradients after DDP's mean, scores."""
        def cut(some, most=max_tokens):
            chunks = micro_batches(some, min(most, max_tokens))
            assert all(collate(c).idx.numel() <= max_tokens or len(c) == 1 for c in chunks)
            return chunks

        monkeypatch.setattr(finetune, "micro_batches", cut)
        loss = 0.0
        parts = []
        model.zero_grad()
        for rank in range(world_size):
            process = dataclasses.replace(CPU, rank=rank, world_size=world_size)
            process.gather = lambda value: parts.append(value) or parts
            passes.clear()
            loss += train_step(model, examples, Mock(), process).item()
            assert passes == [False] * (len(passes) - 1) + [True]
            scores = score_examples(model, examples, process)
            assert sum(passes) == 1
        return loss, [p.grad / world_size for p in model.parameters()], scores

    loss, _, scores = expected = naive(model, examples)
    if task == "text":
        assert quality(scores, examples) == pytest.approx(-loss)
    for world_size, max_tokens in (1, 8192), (1, 1), (2, 120), (8, 120):
        torch.testing.assert_close(run(world_size, max_tokens), expected, atol=2e-5, rtol=1e-3)
    low = start_process("cpu", "bfloat16")
    assert abs(train_step(model, examples, Mock(), low).item() / loss - 1) > 1e-5
    assert score_examples(model, examples, low) != score_examples(model, examples, CPU)


@pytest.mark.parametrize("factor, expected", [(1e3, [1.0]), (1e-3, [0.03]), (math.nan, [])])
def test_gradients_are_clipped_and_must_be_finite(factor, expected):
    """Catches a loop without clipping, one that scales small gradients up, and NaN weights."""
    model = task_model("choice")
    model.register_forward_hook(lambda model, inputs, result: (factor * result[0], None))
    norms = []
    optimizer = Mock(step=lambda: norms.append(
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()))
    with suppress(ValueError):  # where they aren't finite
        train_step(model, encode(QUESTIONS, "medqa")[0], optimizer, CPU)
        optimizer.zero_grad.assert_called_once()
    assert norms == pytest.approx(expected, abs=0.02)


def loop(monkeypatch, seed, rank, last=False):
    """Runs the training loop with steps and scores that are faked; returns what it did."""
    model = torch.nn.Linear(1, 1)
    steps = []
    after = []
    log = []

    def fake_step(model, batch, optimizer, process):
        recipe = [optimizer.defaults[name] for name in ("betas", "weight_decay")]
        assert model.training and recipe == [(0.9, 0.999), 0]
        steps.append((optimizer.param_groups[0]["lr"], batch, torch.rand(1).item()))
        model.bias.data += 1
        return torch.tensor(0.5)

    def fake_scores(model, dev_set, process):
        assert dev_set == "dev"
        model.eval()
        after.append(model.bias.item())

    monkeypatch.setattr(finetune, "train_step", fake_step)
    monkeypatch.setattr(finetune, "score_examples", fake_scores)
    monkeypatch.setattr(finetune, "quality", lambda *_: [2, 7, 7, 1, 1][len(after) - 1])
    process = dataclasses.replace(CPU, rank=rank)
    process.all_reduce = lambda values: [3 * values[0]]  # as if of three ranks
    settings = {"batch_size": 3, "epochs": 5, "lr": 56.0, "last": last}
    score = finetune.train_epochs(model, range(7), "dev", settings, seed, process, log)
    return score, after.index(model.bias.item()), log, *zip(*steps)


def test_the_best_epochs_weights_are_kept(monkeypatch):
    """Catches reporting the last epoch, the first of equals, or weights that went on training; a
    lost last batch; a rate, decay or mode that isn't the recipe's; a warm-up rounded down."""
    score, kept, log, rates, batches, _ = loop(monkeypatch, 5, 0)
    assert (score, kept) == (7, 2) and loop(monkeypatch, 5, 0, last=True)[:2] == (1, 4)
    assert [(row["loss"], row["dev"]) for row in log] == [(1.5, n) for n in (2, 7, 7, 1, 1)]
    assert rates == pytest.approx([*range(0, 56, 7), *range(56, 0, -8)])
    assert [len(batch) for batch in batches] == [3, 3, 1] * 5


def test_what_ranks_and_seeds_share(monkeypatch):
    """Catches dropout's masks that all ranks share, or that a seed doesn't change; an order of
    questions of a rank's own, or the same for all seeds or epochs."""
    (one, masks), (other_rank, other_masks), (two, masks_of_two), again = [
        loop(monkeypatch, seed, rank)[4:] for seed, rank in ((1, 0), (1, 1), (2, 0), (1, 0))]
    assert one == other_rank != two and again == (one, masks)
    assert one[:3] != one[3:6] and sorted(sum(one[:3], [])) == [*range(7)]
    assert len({*masks, *other_masks, *masks_of_two}) == 45


# ---------------------------------------------------------------------------------------------
# questions, results and the command line


def test_summary():
    """Catches the normal interval, which leaves [0, 1] (Newcombe 1998, table I: 81 of 263); one
    over seeds x questions; a chance or majority of something else."""
    assert wilson(81 / 263, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    examples = [Example(Question("", "?", options=options, answer=i > 0), [], i < 2)
                for i, options in enumerate(["ab", "abcd"] * 2)]
    row = summarise("medqa", "test", 9, examples, [0.5, 1.0])
    # the last six: accuracy, ci95, truncated, std, chance, majority
    assert list(row.values()) == [
        "medqa", "test", 9, 4,
        0.75, wilson(0.75, 4), 2, pytest.approx(0.125**0.5), 0.375, 0.75]


def write_medqa(folder):
    options = dict(zip("ABCD", ["aspirin", "heparin", "insulin", "no"]))
    Path(folder, "4_options").mkdir(parents=True)
    for split, first in ("train", 0), ("dev", 5), ("test", 100):
        write_lines(Path(folder, f"4_options/phrases_no_exclude_{split}.jsonl"), [
            dict(question=f"Which drug helps patient {i}?", options=options,
                 answer_idx="ABCD"[i % 4])
            for i in range(first, first + 12)])


def test_questions_of_dev_and_test_leave_train(monkeypatch):
    """Catches a question in train that stands in dev or test, unlabeled or from another set;
    MMLU's five examples a subject as dev; another set's labels."""
    files = {"mmlu a val": "1",
             "mmlu a test": "23",
             "mmlu a dev": "9",
             "medmcqa b test": "4",
             "medmcqa b train": "5123",
             "bioasq c train": "6"}

    def fake(task, folder, split):
        name = f"{task} {folder} {split}"
        if name not in files:
            raise FileNotFoundError(f"no {name}")
        return [Question(id=split + text, question="Q?", options=("x", text),
                         answer=None if split + text == "test3" else 0) for text in files[name]]

    monkeypatch.setattr(finetune, "load_qa", fake)
    sets = read_questions("mmlu", ["a", "b"])
    assert {split: [q.id for q in found] for split, found in sets.items()} == {
        "train": ["train5"], "dev": ["val1"], "test": ["test2", "test3"]}
    assert [q.id for q in labeled(sets["test"])] == ["test2"]
    for task, folders in ("mmlu", ["a", "c"]), ("pubmedqa", ["c"]):
        with pytest.raises(FileNotFoundError, match=f"no {task} c test"):
            read_questions(task, folders)


@pytest.fixture
def init(tmp_path, monkeypatch):
    """A folder of its own, with a model, init, and 12 questions a split, qa."""
    monkeypatch.chdir(tmp_path)
    small_tokenizer().save("init")
    small_gpt(300, dropout=0.1).save_pretrained("init")
    write_medqa("qa")
    return "init"


def call(script, line):
    """Runs a script; returns what --json holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x.py", *shlex.split(line), "--json", "r.json"])
        script.main()
    return json.loads(Path("r.json").read_text())


def tune(flags):
    """Runs finetune.py in a folder with init and qa; later flags override."""
    return call(finetune, f"--task medqa --data qa --init init --out out {flags}")


def lines(path):
    return [json.loads(line) for line in Path(path).open()]


@pytest.mark.parametrize("task, flags", [("medqa", ""), ("bioasq", ""), ("bioasq", "--markers")])
def test_command_trains_saves_and_eval_agrees(init, task, flags):
    """Catches a saved folder whose scores differ from those of the run that reported them: another
    head, tokenizer, length, or prompt; dropout in scoring; a result without its figures."""
    for split in "train", "dev", "test":
        Path(f"qa/{split}.tsv").write_text("".join(
            f"{split}{i}\tthe {split} {i}\t{TEXT[i:i + 20]}\t{['no', 'yes'][i % 2]}\n"
            for i in range(12)))
    given = f"--task {task} --limit 8"
    row = tune(f"{given} --epochs 2 --seeds 1 --lr 1e-2 --length 16 {flags}")
    assert row == lines("out/log.jsonl")[-1]
    assert [row[key] for key in ("task", "split", "n", "available")] == [task, "test", 8, 12]
    theirs = call(evaluate, f"qa {given} --data qa --init out --predictions p")
    assert (theirs["accuracy"], theirs["truncated"]) == (row["accuracy"], row["truncated"])
    for a, b in zip(lines("out/predictions.jsonl"), lines("p"), strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-5)
    with pytest.raises(ValueError, match="finetune.py --task pubmedqa"):
        load_finetuned("out", "pubmedqa")


@pytest.mark.parametrize("split, saved, mean", [("test", 1, 1 / 3), ("dev", 3, 1 / 6)])
def test_dev_chooses_and_test_is_reported(init, monkeypatch, split, saved, mean):
    """Catches a seed or an epoch chosen on what is reported, another seed's weights or predictions
    saved, training questions of dev, the best seed's score reported as all seeds'."""
    if split == "dev":
        Path("qa/4_options/phrases_no_exclude_test.jsonl").unlink()

    def fake_train(model, train_set, dev_set, settings, seed, process, log):
        assert len(train_set) == 5 and len(dev_set) == (6 if split == "test" else 0)
        assert process.dtype == torch.bfloat16  # LoRA's default
        model.head.bias.data.fill_(seed)
        return {3: 0.5, 1: 0.9, 2: 0.9}[seed] if dev_set else None

    monkeypatch.setattr(finetune, "train_epochs", fake_train)
    monkeypatch.setattr(finetune, "score_examples", lambda model, examples, process: [
        [model.head.bias.item(), 2, 0, 0]] * len(examples))
    result = tune("--seeds 3,1,2 --lora 4 --limit 6")
    assert (result["split"], result["saved_seed"]) == (split, saved)
    assert result["accuracy"] == pytest.approx(mean)
    assert load_finetuned("out", "medqa")[0].head.bias.item() == saved
    assert lines("out/predictions.jsonl")[0]["scores"] == [saved, 2, 0, 0]


def test_flags_and_defaults_reach_the_settings(init, monkeypatch):
    """Catches a flag that changes nothing, a default of another task or size, a row past the
    context."""
    def settings(flags):
        given = f"finetune.py --data x --init init --out y --task {flags}"
        monkeypatch.setattr(sys, "argv", given.split())
        found, _ = finetune.resolve(finetune.parse_args())
        return tuple(found[name] for name in ("lr", "epochs", "length", "dropout"))

    assert settings("text --lr 1 --epochs 2 --dropout 0 --length 9") == (1, 2, 9, 0)
    assert settings("medqa")[2:] == (48, None)
    assert settings("text --lora 8")[0] == pytest.approx(9e-4)
    config = dataclasses.replace(config_of(init), n_positions=2048)
    monkeypatch.setattr(finetune, "config_of", lambda folder: config)
    for n_params, task, *expected in [
            (2e9, "pubmedqa", 2e-6, 20, 512),
            (6e7, "medqa", 5e-5, 5, 512),
            (1e6, "medqa", 3e-4, 10, 512),
            (1e6, "bioasq", 3e-4, 20, 1024)]:
        monkeypatch.setattr(GPT, "n_params", lambda model, n=n_params: n)
        assert settings(task) == (*expected, None)


@pytest.mark.slow
def test_two_processes_equal_one(init):
    """Catches a gradient averaged over ranks instead of summed over the global batch."""
    # 405 questions to train on: a step of more than a micro-batch, one of unequal shares.
    path = Path("qa/4_options/phrases_no_exclude_train.jsonl")
    write_lines(path, lines(path) * 81)
    flags = "--task medqa --data qa --init init --epochs 2 --seeds 1 --batch_size 400 --dropout 0"
    for n in "12":
        done = run("-m", "torch.distributed.run", "--master_port=29617", f"--nproc_per_node={n}",
                   ROOT / "finetune.py", *flags.split(), "--out", n, cwd=".")
        assert done.returncode == 0, done.stderr
    for one, two in zip(lines("1/log.jsonl")[:-1], lines("2/log.jsonl")[:-1], strict=True):
        assert two == pytest.approx(one, rel=1e-4)
