"""eval.py: sums of losses, likelihoods, batched generation, the audit's verdicts, tables."""

import contextlib
import io
import json
import math
import shlex
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from test_finetune import (
    TEXT,
    call,
    init,  # noqa: F401 (a fixture)
    lines,
    nats_of,
    small_gpt,
    small_tokenizer,
    write_medqa,
)

import eval as evaluate
import finetune
import train
from data import Question, load_qa, tokenize
from finetune import Example, wilson, write_lines
from model import GPT
from tokenizer import Tokenizer, run_command, train_bpe
from train import start_process, write_json

CPU = start_process("cpu")
DOCUMENTS = ["A patient", TEXT, "é 漢字 µg", TEXT[:90] + "naïve"] * 3


def write_documents():
    write_lines("a.jsonl", [dict(id=f"{i}", text=text) for i, text in enumerate(DOCUMENTS)])


@pytest.fixture
def parts():
    return small_gpt(300).eval(), small_tokenizer()


@pytest.fixture
def ask(init):  # noqa: F811
    """Runs a command beside init, qa and text, a.jsonl; returns what --json holds."""
    write_documents()
    return lambda command: call(evaluate, command)


def as_after_finetuning(tokenizer):
    """Add <|startoftext|> to init; returns its id."""
    tokenizer.add_special_tokens(["<|startoftext|>"])
    tokenizer.save("init")
    small_gpt(301).save_pretrained("init")
    return 300


# ---------------------------------------------------------------------------------------------
# perplexity


def test_perplexity(parts, ask, monkeypatch):
    """Catches a mean of documents' means, characters taken for bytes, bits for nats, a window's
    edge that is skipped or scored twice; in arrays targets counted where there are none, bits a
    byte without a row's first token, another tokenizer."""
    gpt, tokenizer = parts
    documents = [[tokenizer.eot_id, *tokenizer.encode(text)] for text in DOCUMENTS]
    windows = [ids[at:at + 49] for ids in documents for at in range(0, len(ids) - 1, 48)]
    tokenize("a.jsonl", "init", "arrays", val_fraction=0.6)
    ids = np.fromfile("arrays/val.bin", np.uint16).tolist()
    rows = [ids[at:at + 48] for at in range(0, len(ids), 48)]
    held_out = tokenizer.decode([i for i in ids if i != tokenizer.eot_id])
    load = Mock(wraps=GPT.from_pretrained)
    monkeypatch.setattr(GPT, "from_pretrained", load)
    for data, cut, n_bytes, n_tokens in (
            ("a.jsonl", windows, len("".join(DOCUMENTS).encode()), None),
            ("arrays", rows, len(held_out.encode()), len(ids))):
        n_scored = sum(map(len, cut)) - len(cut)
        loss = sum(nats_of(gpt, row).item() for row in cut) / n_scored
        bits = loss / math.log(2) * (n_tokens or n_scored) / n_bytes
        found = ask(f"perplexity --init init --data {data}")
        assert list(found.values()) == pytest.approx([loss, bits, n_scored, n_bytes], rel=1e-5)
        low = ask(f"perplexity --init init --data {data} --dtype bfloat16")
        assert low["loss"] != found["loss"] and load.call_args.args[1] == torch.float32
    Tokenizer.from_merges([]).save("init")
    with pytest.raises(ValueError, match="another tokenizer"):
        ask("perplexity --init init --data arrays")


# ---------------------------------------------------------------------------------------------
# question answering


def test_likelihood_of_options_equals_plain_logits(parts):
    """Catches an option scored from the wrong place, without its space, or with a prompt cut at the
    wrong end; options that see each other; equal options that differ by rounding; a context behind
    its question, and a cloze text with "Question:" and "Answer:"."""
    gpt, tokenizer = parts
    asked = [Question("", TEXT[:n], context="Rats." * (n % 2), options=("no", "maybe", "no"),
                      answer=0) for n in range(10, 60)]  # at some lengths a prompt just fits
    asked.append(Question("", "Which?", options=("no", TEXT), answer=0))  # longer than the context
    asked.append(Question("", "Which?", kind="cloze, seen 1 to 9 times", options=("fever", "a"),
                          answer=0))
    examples, scores = evaluate.zero_shot(gpt, tokenizer, asked, CPU)
    assert {e.truncated for e in examples[:50]} == {False, True}
    for q, e, found in zip(asked, examples, scores, strict=True):
        prompt = q.question if q.kind else f"Question: {q.question}\nAnswer:"
        if q.context:
            prompt = f"Rats.\n{prompt}"
        options = [tokenizer.encode(" " + option)[:47] for option in q.options]
        ids = tokenizer.encode(prompt)
        kept = ids[max(0, len(ids) + max(map(len, options)) - 48):]
        assert e.truncated == (len(kept) < len(ids))
        expected = [-nats_of(gpt, kept + ids, len(kept)).item() for ids in options]
        assert found == pytest.approx(expected, abs=2e-4)
        assert found[-1] == found[0] or len(set(q.options)) == len(q.options)


def test_acc_norm_counts_characters():
    """Catches no division, one by bytes, or by the characters with the space before them."""
    examples = [Example(Question("", "?", options=options, answer=1), [])
                for options in (("éé", "abc"), ("a", "bcd"))]
    # A character costs 2.0 and 1.4, 2.0 and 1.9: the second wins. The first would by bytes, or
    # with the space.
    assert evaluate.acc_norm([[-4.0, -4.2], [-2.0, -5.7]], examples) == 1.0


def test_breakdown():
    """Catches a group's hits that are another's, and a group without a name."""
    asked = [Question("1", "a b c", kind="x", subject="s"), Question("2", "a b", kind="x")]
    rows = evaluate.breakdown(asked, [1, 0])
    assert [(row["group"], row["n"], row["accuracy"]) for row in rows] == [
        ("kind x", 2, 0.5), ("subject s", 1, 1.0)]
    assert rows[1]["ci95"] == wilson(1.0, 1)


def test_qa_command(ask, monkeypatch):
    """Catches a split, limit or dtype that is ignored, figures that are not the predictions', a
    test split without answers, or without a file, that doesn't give way to dev; a checkpoint that a
    training is writing removed by --predictions in its folder."""
    command = "qa --zero_shot --task medqa --data qa --init init --limit 5 --predictions p "
    for flag, split in ("", "test"), ("--split dev", "dev"):
        row = ask(command + flag)
        asked = [load_qa("medqa", "qa", split)[i] for i in (0, 2, 4, 7, 9)]
        found = lines("p")
        assert [line["id"] for line in found] == [q.id for q in asked]
        right = [line["scores"][q.answer] == max(line["scores"])
                 for line, q in zip(found, asked)]
        assert [row[key] for key in ("accuracy", "split", "available", "n")] == [
            sum(right) / 5, split, 12, 5]
    Path("x.1.tmp").touch()  # what a training writes in this folder
    ask(command + "--split dev --dtype bfloat16")
    assert Path("x.1.tmp").exists()
    assert lines("p") != found
    Path("qa/4_options/phrases_no_exclude_test.jsonl").unlink()
    assert ask(command)["split"] == "dev"
    for module in finetune, evaluate:
        monkeypatch.setattr(module, "load_qa", lambda task, data, split: [
            replace(q, answer=None) if split == "test" else q for q in asked])
    assert ask(command)["split"] == "dev"
    with pytest.raises(ValueError, match="give another --split"):
        ask(command + "--split test")


# ---------------------------------------------------------------------------------------------
# generation


def test_flags_of_generate_reach_the_model(ask, parts, monkeypatch):
    """Catches a flag without effect, text after end-of-text, a prompt without its last token."""
    tokenizer = parts[1]
    eot_id = tokenizer.eot_id
    calls = []

    def generate(self, idx, max_new_tokens, **decoding):
        calls.append((idx.tolist(), max_new_tokens, self.transformer.wte.weight.dtype, decoding))
        return torch.cat([idx, torch.tensor([[65, 66, eot_id, 67, eot_id]])], dim=1)

    monkeypatch.setattr(GPT, "generate", generate)
    result = ask("generate --init init --prompt '' 'A drug' --dtype bfloat16 --temperature 0.5 "
                  "--top_k 7 --seed 3 --num_beams 2 --max_new_tokens 9")
    assert result["texts"] == [tokenizer.decode([65, 66])] * 2
    ids = tokenizer.encode("A drug")
    given = dict(eot_id=eot_id, temperature=0.5, top_k=7, seed=3, num_beams=2)
    assert calls == [([prompt], 9, torch.bfloat16, given) for prompt in ([eot_id], ids)]

    start = as_after_finetuning(tokenizer)
    ask("generate --init init --prompt 'A drug' --paper")
    paper = dict(eot_id=eot_id, num_beams=5, no_repeat_ngram_size=6, length_penalty=-0.5)
    assert calls[2] == ([[*ids, start]], 64, torch.float32, paper)


@pytest.mark.parametrize("n_in", [24, 64])  # torch's int8 product takes multiples of 16 only
@pytest.mark.parametrize("n_rows", [1, 5, 70])
def test_int8_product_is_as_exact_as_its_scales(n_in, n_rows):
    """Catches scales of columns or of the whole matrix, their rounding to bf16 left out of Q, whole
    numbers that overflow, a row of zeros that becomes NaN, a bias that is lost or added twice."""
    torch.manual_seed(0)
    weight = torch.randn(9, n_in, dtype=torch.float64) * torch.logspace(-3, 3, 9)[:, None]
    weight[4] = 0
    bias = torch.randn(9).bfloat16()
    x = torch.randn(n_rows, 1, n_in)
    x[:5, 0] = torch.eye(n_in)[:min(5, n_rows)]  # one weight alone, whose error has the bound
    x = x.bfloat16()
    layer = evaluate.Int8Linear(weight, bias)
    assert (layer.scale > 0).all()
    exact = x.double() @ weight.T
    bound = weight.abs().amax(1) / 127 / 2 * x.double().abs().sum(-1, keepdim=True)
    for with_bias in False, True:
        expected = exact + with_bias * bias.double()
        rounding = 2**-7 * (exact.abs() + bias.abs())  # of results to bf16
        assert ((layer(x, with_bias) - expected).abs() <= 1.01 * bound + rounding).all()


def test_int8_model(parts, init):  # noqa: F811
    """Catches a head or a matrix that stays bf16, memory of the folder that another reads after it
    was let go of, and --dtype int8 that is ignored."""
    gpt, tokenizer = parts
    args = Namespace(init=init, device="cpu", dtype="int8")
    low, _, _ = evaluate.load_model(args, to_generate=True)
    assert sum(isinstance(m, evaluate.Int8Linear) for m in low.modules()) == 4 * 3 + 1
    idx = torch.tensor([tokenizer.encode(TEXT)[:40]])
    exact = gpt(idx)[0]
    assert torch.equal(low(idx)[0], low.head(low.hidden(idx)))
    error = (low(idx)[0] - exact).abs().mean() / exact.abs().mean()
    assert 0.001 < error < 0.05


# ---------------------------------------------------------------------------------------------
# numbers


def test_numbers_and_their_verdicts():
    """Catches units lost at a plural, 1,500 read as two numbers, the 6 of IL-6, a power read as two
    numbers or without its factor, and a unit that doesn't matter."""
    found = evaluate.numbers_in("1,500 mg for 2 years, 5.5% of IL-6 in 10 patients; p53, 20mcg.")
    assert found == [(1500, "mg"), (2, "year"), (5.5, "%"), (10, "patient"), (20, "µg")]
    for text in ("10^5", "10(5)", "1 × 10^5", "1x10(5)", "0.1 × 10^6", "100,000"):
        assert evaluate.numbers_in(text) == [(1e5, "")], text
    assert evaluate.numbers_in("3 × 10^−6 g, 110(5)") == [(3e-6, "g"), (110, ""), (5, "")]
    known = evaluate.numbers_in("1500 mg for 3 years in 40 rats")
    verdicts = [evaluate.verdict(number, known) for number in evaluate.numbers_in(
        "1500 mg, 1500, 40 kg; 1500 years, 2 years; 7 kg, 7")]
    assert verdicts == ["supported"] * 3 + ["contradicted"] * 2 + ["unsupported"] * 2


def test_audit_and_its_controls(ask, monkeypatch):
    """Catches an answer judged by another's source, a control that is the question's own reference;
    a flag without effect."""
    asked = [Question("1", "Of 5 rats?", target="It took 11 days."),
             Question("2", "How long?", context="22 days, 9 sites.", target="It took 22 days."),
             Question("3", "How?", target="None at all."),
             Question("4", "Without an answer?")]
    monkeypatch.setattr(finetune, "load_qa", lambda *_: asked)
    answer = Mock(return_value=["5 of 11 days", "9 or 11 days, 22 kg", "7 kg"])
    monkeypatch.setattr(evaluate, "continue_prompts", answer)
    result = ask("numbers --init init --data qa --max_new_tokens 40")
    _, tokenizer, prompts, max_new_tokens = answer.call_args.args
    assert prompts[0] == tokenizer.encode("Question: Of 5 rats?\nAnswer:")[-7:]
    assert (max_new_tokens, answer.call_args.kwargs) == (40, dict(temperature=0.0))
    assert [list(row.values())[1:] for row in result["numbers"]] == [
        [3, 3, 6, 1 / 2, 1 / 6, 1 / 3],  # 5, 11 days, 9 | 11 days | 22 kg, 7 kg
        [3, 2, 2, 0.0, 1 / 2, 1 / 2]]  # 22 days to question 1, 11 days to question 3
    as_after_finetuning(tokenizer)
    ask("numbers --init init --data qa --limit 1 --paper --max_new_tokens 9")
    assert answer.call_args.args[2:] == ([tokenizer.encode("Of 5 rats?")], 9)
    assert answer.call_args.kwargs == evaluate.PAPER_DECODING


# ---------------------------------------------------------------------------------------------
# tokenizer, curves, mistakes


def test_tokenizer_tables(ask):
    """Catches a space counted as a piece, and a specialty that is left out of the ten."""
    one = Tokenizer.from_merges(train_bpe({" no": 2, " ne": 2}, 300))  # merges " n", " no", " ne"
    row, = evaluate.fragmentation({"group": ["no", "xx", "thrombin"]}, {"one": one})
    assert list(row.values()) == ["group", 3, "33%, 67%, 3.67"]  # 1, 2 and 8 pieces
    one.save("one")
    table, groups = ask("tokenizer --tokenizer init --against one")
    assert table[-1] == dict(word="thrombin", init="t/h/r/o/m/b/in", one="t/h/r/o/m/b/i/n")
    assert groups[-1]["terms"] == 210


def test_curves(ask, monkeypatch):
    """Catches validation rows taken for training rows, epochs for steps."""
    pytest.importorskip("matplotlib")  # an optional package
    write_lines("init/log.jsonl", [dict(step=1, loss=5), dict(step=3, lr=6)])
    write_lines("log.jsonl", [dict(epoch=7, loss=1), dict(n=3)])
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.extend(
        line.get_xydata().tolist() for ax in figure.axes for line in ax.lines))
    ask("curves init .")
    assert drawn == [[[1, 5]], [[7, 1]], [[3, 6]]]


# ---------------------------------------------------------------------------------------------
# damage: folders that a disk, a person or another program has spoiled; and mistakes in a command

COMMANDS = {
    "train": ("train --data arrays --out pretrained --total_steps 4 --save_every 2 --seq_len 16 "
              "--batch_tokens 64 --eval_tokens 64 --n_layer 1 --n_head 2 --n_embd 16"),
    "tune": "finetune --task medqa --data qa --init pretrained --out tuned --epochs 1 --seeds 1",
    "qa": "eval qa --task medqa --data qa --init tuned",
    "perplexity": "eval perplexity --data a.jsonl --init pretrained",
    "generate": "eval generate --init pretrained --prompt A",
    "curves": "eval curves qa",
    "export": "model export --init pretrained --out exported",
}
BYTES = {"empty": b"", "page": b"<html>404</html>", "list": b"[1]", "utf16": b"\xff\xfe{}",
         "zip": b"PK\5\6" + bytes(18)}
DAMAGE = [  # file, the commands that read it, ways to spoil it
    ("pretrained/config.json", "train, perplexity", "empty half utf16 n_layer=2"),
    ("pretrained/config.json", "export",
     'n_head=3 n_inner=8 scale_attn_weights=false activation_function="gelu_fast" model_type=null'),
    ("pretrained/run.json", "train --total_steps 5", "empty half list utf16"),
    ("pretrained/checkpoint_0000004.pt", "train", "empty half zip"),
    ("pretrained/vocab.json", "perplexity", "empty half list utf16"),
    ("qa/4_options/phrases_no_exclude_dev.jsonl", "tune", "half"),
    ("tuned/added_tokens.json", "qa", "empty half list utf16 [PAD]=99999"),
    ("tuned/head.pt", "qa", "empty page half nan"),
    ("tuned/run.json", "qa", "empty half list utf16"),
    ("arrays/meta.json", "train", "empty half list utf16"),
]


def told(command):
    """What a command says of an error, in one line, or of a warning. It may end in more flags."""
    name, _, flags = command.partition(" ")
    argv = shlex.split(f"{COMMANDS[name]} {flags}")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", argv)
        patch.setattr(train, "catch_signals", lambda: [])  # pytest's own stay
        try:
            run_command(sys.modules[argv[0]].main)
        except SystemExit as e:
            assert "\n" not in str(e.code)
            print(e.code, file=said)
    return said.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with arrays, questions, a run of train.py and a fine-tuned model."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small_tokenizer().save("tok")
        write_documents()
        tokenize("a.jsonl", "tok", "arrays", val_fraction=0.6)
        write_medqa("qa")
        assert told("train") + told("tune") == ""
        assert '"pad_token": "[PAD]"' in Path("tuned/tokenizer_config.json").read_text()
    return folder


def spoil(path, way):
    """way: a name in BYTES, half of the bytes, a tensor of NaN, or what JSON then has: length=0."""
    old = path.read_bytes()
    name, _, value = way.partition("=")
    if value:
        write_json(path, json.loads(old) | {name: json.loads(value)})
    elif way == "nan":
        torch.save(torch.load(path) | {"weight": torch.full((1, 16), torch.nan)}, path)
    else:
        path.write_bytes(BYTES.get(way, old[:len(old) // 2]))


@pytest.mark.parametrize("file, commands, ways", DAMAGE, ids=lambda value: value.split(" ")[0])
def test_damage_is_told(whole, monkeypatch, file, commands, ways):
    """Catches a traceback, a message that names no file, and a wrong number without a word."""
    monkeypatch.chdir(whole)
    path = Path(file)
    good = path.read_bytes()
    for way in ways.split():
        for name in commands.split(", "):
            spoil(path, way)
            try:
                said = told(name)
            finally:
                path.write_bytes(good)
            assert path.name in said or str(path.parent) in said, (way, name, said)


@pytest.mark.parametrize("command, mend", [
    ("tune --out pretrained", "a folder of its own"),
    ("tune --init tuned --out pretrained", "a folder of its own"),
    ("tune --init tuned --out tuned", "a folder of its own"),
    ("tune --data arrays", "put the official file"),
    ("tune --length 7", "refused"),
    ("tune --lr nan", "refused"),
    ("tune --seeds 1,0", "refused"),
    ("tune --lora 8 --random_init", "leave out"),
    ("tune --dtype int8", "invalid choice"),
    ("qa --init pretrained", "--zero_shot"),
    ("qa --data arrays", "put the official file"),
    (f"generate --prompt '{TEXT}'", "context"),
    ("generate --top_k 0", "refused"),
    ("generate --temperature -1", "refused"),
    ("curves", "log.jsonl")])
def test_mistakes(whole, monkeypatch, command, mend):
    """Catches tracebacks for a user's mistakes, messages without a mend, and checks too late."""
    monkeypatch.chdir(whole)
    assert mend in told(command)
