"""The tokenizer against oracles: a naive trainer, merge-by-merge BPE, Hugging Face's fixture.

fixtures/hf_bpe.json was made once with Hugging Face tokenizers 0.23.3 (its "origin" has the call):
our own synthetic corpus, the vocab.json and merges.txt that BpeTrainer gave, and ids of texts.
"""

import gzip
import json
import os
import random
import signal
from collections import Counter
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import regex
from conftest import run
from tiktoken_ext.openai_public import r50k_pat_str

import tokenizer as bpe
from tokenizer import (
    ALPHABET,
    END_OF_TEXT,
    PATTERN,
    Tokenizer,
    count_pretokens,
    in_processes,
    load_named,
    read_records,
    read_records_backwards,
    text_files,
    train_bpe,
)

FIXTURE = json.loads((Path(__file__).parent / "fixtures/hf_bpe.json").read_text())


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.from_merges(train_bpe(bpe.count_batch(FIXTURE["corpus"]), 800))


def naive_train(counts, n_merges, min_frequency):
    """The rule as recipe and papers state it: recount everything after each merge."""
    tokens = list(ALPHABET)
    # A word has a space on each side of a symbol: " é" -> " Ġ  Ã  © ".
    words = {"".join(f" {ALPHABET[bpe.BYTES.index(b)]} " for b in piece.encode()): n
             for piece, n in counts.items()}
    for _ in range(n_merges):
        pairs = Counter()
        for word, n in words.items():
            for pair in pairwise(word.split()):
                pairs[pair] += n
        best = min(pairs, key=lambda p: (-pairs[p], *map(tokens.index, p)), default=None)
        if pairs[best] < min_frequency:
            return
        yield best
        left, right = best
        tokens.append(left + right)
        words = {word.replace(f" {left}  {right} ", f" {left}{right} "): n
                 for word, n in words.items()}


# ---------------------------------------------------------------------------------------------
# training


def test_fast_trainer_equals_naive():
    """Wrong counts: overlaps (aaaa), merges side by side (abab), ties, old heap rows."""
    for seed in range(150):
        rng = random.Random(seed)
        letters = "abcdé "[:rng.randint(1, 6)]
        counts = {"".join(rng.choices(letters, k=rng.randint(1, 14))): rng.choice([1, 1, 2, 3, 50])
                  for _ in range(20)}
        n, least = rng.randint(0, 60), rng.randint(1, 4)
        assert train_bpe(counts, 257 + n, least) == [*naive_train(counts, n, least)], seed


def test_merges_and_vocab_equal_hf(trained, tmp_path, monkeypatch):
    """Any difference to Hugging Face in pre-tokens, counts, ties, ids or files; a batch
    lost between processes; merges that hang on set or dict order."""
    vocab = FIXTURE["vocab_json"][:-1] + ',"<|endoftext|>":799}'
    expected = {"merges.txt": FIXTURE["merges_txt"].encode(), "vocab.json": vocab.encode()}
    assert trained.files() == expected
    (tmp_path / "c.txt").write_text(FIXTURE["corpus"] * 24)
    done = run("tokenizer.py", "train", "--input", tmp_path, "--vocab_size", 800, "--out",
               tmp_path / "out", env={"PYTHONHASHSEED": "1"})
    assert done.stdout.endswith("800 tokens, <|endoftext|> is 799\n")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected
    whole = count_pretokens([tmp_path])
    monkeypatch.setattr(bpe, "BATCH_CHARS", 999)  # fifty batches
    assert count_pretokens([tmp_path], 2) == whole


def test_counting_cuts_each_line_alone(tmp_path):
    """Pre-tokens over two lines, other line ends taken for "\\n", spaces lost between chunks; half
    a surrogate pair lost, or ending in a traceback."""
    rng = random.Random(0)
    parts = [*"aB \n\t\r\x0b\x1c\x85\xa0\u2009\u2028é7.中\ud800", "  ", "'s", " a7 "]
    text = "".join(rng.choices(parts, k=20000)) + ".\n"
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": 1, "text": text}))
    expected = Counter()
    for line in text.replace("\ud800", "\ufffd").split("\n")[:-1]:
        expected.update(regex.findall(PATTERN, line + "\n"))
    assert count_pretokens([tmp_path]) == expected


def test_a_long_word_is_split_once_a_merge():
    """A word cut anew at each occurrence of a pair: 200 kB of DNA would take a minute."""
    words = mock.MagicMock()
    words.__getitem__.return_value = "abab"
    assert bpe.merge_pair("ab", "c", words, [0, 0]) == {"cc": bpe.Indices([0])}
    words.__setitem__.assert_called_once_with(0, "cc")


# ---------------------------------------------------------------------------------------------
# text files


def test_records_of_a_folder(tmp_path):
    """A record lost, doubled or out of order on the way back; a deletion or blank line mistaken;
    pubmed26n1000 before pubmed26n999: an old record would replace the new one."""
    records = [(str(i), f"text {i} é\n\u2028" * i if i % 7 else None) for i in range(50)]
    content = "\n\n".join(json.dumps({"id": i, "deleted": text is None, "text": text})
                          for i, text in records)
    (tmp_path / "sub").mkdir()  # folders within the folder are not read
    for name in ("n1000.jsonl", "x.json", "n3.jsonl.1.tmp", "sub/y.jsonl"):
        (tmp_path / name).write_text(content)
    (tmp_path / "n999.jsonl.gz").write_bytes(gzip.compress(content.encode() + b"\n"))
    files = text_files(str(tmp_path))
    assert [path.name for path in files] == ["n999.jsonl.gz", "n1000.jsonl"]
    for path in files:
        assert list(read_records(path)) == records
        assert list(read_records_backwards(path)) == records[::-1]


@pytest.mark.parametrize(("end", "thousands"), [("\n\n", 4), ("\r\n", 8)])
def test_a_txt_is_cut_into_documents(tmp_path, end, thousands):
    """One document of a .txt, so that none is held out; text lost or cut inside a paragraph."""
    path = tmp_path / "a.txt"
    paragraphs = [f"{i} " + "word " * 150 + "end" for i in range(40)]
    path.write_bytes(end.join(paragraphs).encode())
    pieces = [text for _, text in read_records(path)]
    assert end.lstrip("\r").join(pieces) == end.join(paragraphs)
    assert {len(piece) // 1000 for piece in pieces[:-1]} == {thousands}
    path.write_text("ACGT" * 5000)
    ids = [ident for ident, _ in read_records_backwards(path)]
    assert len(ids) == 3 and ids[1] == ids[2] == f"{bpe.hash64('ACGT' * 2000):016x}"


@pytest.mark.parametrize("codec", ["utf-8", "utf-16-le", "utf-16-be"])
def test_marks_in_a_txt(tmp_path, codec, capsys):
    """UTF-16 read as letters with NULs between; end-of-text lines spelt inside the documents."""
    text = "\ufeffé é\n<|endoftext|>\r\nb <|endoftext|>\n\nc\n"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode(codec)))
    records = [text for _, text in read_records(tmp_path / "a.txt.gz")]
    assert records == ["é é", "b <|endoftext|>\n\nc"]
    (tmp_path / "b.txt").write_bytes(text.encode("cp1252", "replace") * 6)
    assert len(list(read_records(tmp_path / "b.txt"))) == 7
    assert "b.txt: 12 characters are U+FFFD" in capsys.readouterr().err


def test_processes_keep_order_and_take_few_tasks_ahead():
    """Results out of order; a reader that runs ahead until memory is full; Ctrl-C that each worker
    answers with a traceback."""
    taken = []
    tasks = ([taken.append(i) or i] for i in range(30))
    for n, result in enumerate(in_processes(sum, tasks, 2)):
        assert result == n and len(taken) <= n + 4
    assert n == 29
    with pytest.raises(OSError, match="--workers"):
        list(in_processes(os._exit, [3, 3, 3], 2))
    assert list(in_processes(signal.raise_signal, [signal.SIGINT] * 2, 2)) == [None, None]


# ---------------------------------------------------------------------------------------------
# encoding


def test_patterns_cut_as_gpt2s(trained):
    """A branch of the pattern lost, which a fixture's English never takes; steps of 100 through
    white space that take the next word's space, or are not taken: tiktoken panics at a million."""
    rng = random.Random(4)
    parts = [*"'sdmtA \n7½.\u0301", "re", "ve", "ll"]
    for n in range(320):
        white = "".join(rng.choices(" \n\t\xa0", k=n))
        for after in ("", "x", " x", "\n!"):
            text = "".join(rng.choices(parts, k=20)) + white + after
            pieces = regex.findall(r50k_pat_str, text)
            assert regex.findall(PATTERN, text) == pieces, repr(text)
            assert regex.findall(bpe.SAFE_PATTERN, text) == pieces, repr(text)
    text = " " * 1_200_000
    assert trained.decode(trained.encode(text)) == text


def test_fixture_and_round_trip(trained):
    """tiktoken's merge rule or pattern differing from HF's; long and odd pieces; ids in another
    order than the merges. Bytes lost or changed on the way, for any code point and any byte."""
    order = range(800)[::-1]
    other = Tokenizer({t: order[i] for t, i in trained.vocab.items()}, trained.merges)
    for text, ids in zip(FIXTURE["texts"], FIXTURE["ids"], strict=True):
        assert trained.encode(text) == ids
        assert other.encode(text) == [order[i] for i in ids]
    text = "".join(chr(p) for p in range(0, 0x110000, 97) if not 0xD800 <= p < 0xE000)
    assert trained.decode(trained.encode(text)) == text
    assert sorted(trained.decode_bytes(range(256))) == list(range(256))
    assert trained.decode([trained.vocab["Ã"]]) == "\ufffd"  # half of a character
    assert trained.encode("\ud800") == trained.encode("\ufffd")


# ---------------------------------------------------------------------------------------------
# special tokens and files


def test_special_tokens(trained, tmp_path):
    """Special strings in plain text taken as special; ids that move; an old added token that stays;
    a size taken from the count of ids that have holes, or a fingerprint that sees no merges."""
    tok = Tokenizer({**trained.vocab, END_OF_TEXT: 998}, trained.merges)
    tok.add_special_tokens(["[PAD]", "[SEP]", "[PAD]"])
    assert [tok.special[token] for token in ("[PAD]", "[SEP]")] == [999, 1000]
    tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.special == {END_OF_TEXT: 998, "[PAD]": 999, "[SEP]": 1000}
    assert (again.vocab_size, again.eot_id) == (1001, 998)
    text = "a [SEP]b<|endoftext|>"
    assert again.encode(text) == trained.encode(text)
    assert again.decode([*again.encode("a "), 1000, *again.encode("b"), 998]) == text
    with pytest.raises(ValueError, match="another tokenizer"):
        again.decode([900])
    trained.save(tmp_path)
    assert Tokenizer.load(tmp_path).special == {END_OF_TEXT: 799}
    other = Tokenizer(tok.vocab, trained.merges[::-1])
    assert len({again.fingerprint, trained.fingerprint, other.fingerprint}) == 3


def test_released_form(trained, tmp_path):
    """BioMedLM's form refused, or a merge short: merges.txt without a version line, vocab.json
    without end-of-text. Its id is an added token's, or else the next one."""
    vocab = json.loads(FIXTURE["vocab_json"]) | {"[UNK]": 805}  # ids with a hole
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text(FIXTURE["merges_txt"].strip().split("\n", 1)[1])
    tok = Tokenizer.load(tmp_path)
    assert tok.merges == trained.merges and tok.vocab[END_OF_TEXT] == tok.eot_id == 806
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 799, "<|endoftext|>": 800}')
    tok = Tokenizer.load(tmp_path)
    assert tok.vocab[END_OF_TEXT] == tok.eot_id == 800 and tok.special["[PAD]"] == 799
    with pytest.raises(ValueError, match="copy them again"):
        Tokenizer(tok.vocab, tok.merges, {"[PAD]": 5})  # another token's id


def test_other_file_formats(trained, tmp_path, monkeypatch):
    """GPT-2's file names; tokenizer.json with both spellings of merges, or of another kind, or as
    the only whole file."""
    path = tmp_path / "tokenizer.json"
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False}
    merges = trained.merges[:99] + [" ".join(pair) for pair in trained.merges[99:]]
    whole = {"normalizer": None, "added_tokens": [{"id": 799, "content": END_OF_TEXT}],
             "pre_tokenizer": gpt2,
             "model": {"vocab": json.loads(FIXTURE["vocab_json"]), "merges": merges}}
    for change in ({"normalizer": {"type": "NFC"}}, {"pre_tokenizer": None},
                   {"pre_tokenizer": gpt2 | {"add_prefix_space": True}},
                   {"pre_tokenizer": gpt2 | {"use_regex": False}}):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match="in other ways than GPT-2's: use"):
            Tokenizer.load(tmp_path)
    path.write_text(json.dumps(whole))
    trained.save(tmp_path)
    (tmp_path / "merges.txt").write_text("i n\n")
    assert Tokenizer.load(tmp_path).files() == trained.files()
    path.unlink()
    (tmp_path / "merges.txt").unlink()
    for name, content in zip(("encoder.json", "vocab.bpe"), trained.files().values()):
        (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert load_named("gpt2").fingerprint == trained.fingerprint


# ---------------------------------------------------------------------------------------------
# a user's mistakes


@pytest.mark.parametrize(("name", "pattern", "replacement"), [
    ("merges.txt", r"(?s)(.{999}.*?)\n.*", r"\1"),  # half of the lines
    ("merges.txt", "$", "\ufffd e\n"),
    ("merges.txt", "$", "t he\n"),  # a second way to one token
    ("vocab.json", '"a":64,', '"a":65,')])
def test_damaged_files_are_refused(trained, tmp_path, name, pattern, replacement):
    """A truncated or mixed-up file loading as another tokenizer without a word."""
    trained.save(tmp_path)
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(regex.sub(pattern, replacement, text, count=1))
    with pytest.raises(ValueError, match="copy them again"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("none", b"", "data.py extract"),
    ("a.txt.gz", gzip.compress(os.urandom(5000))[:2000], "a.txt.gz: damaged gzip"),
    ("a.txt.gz", gzip.compress(b"text " * 999)[:10] + b"\xff" * 40, "a.txt.gz: damaged gzip"),
    ("a.jsonl", b"\n[1]", "a.jsonl: line 2"),
    ("a.jsonl", b'{"id": 1}', "a.jsonl: line 1")])
def test_bad_input_is_named(tmp_path, name, content, message):
    """A traceback, or a damaged file or line skipped in silence."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        count_pretokens([tmp_path / name])


def test_mistakes(trained, tmp_path, monkeypatch):
    """A mistake without its mend; Ctrl-C that ends in a traceback, or as if in success; the pieces
    that show prints."""
    refused = run("tokenizer.py", "train", "--input", ".", "--out", tmp_path, "--workers", 0).stderr
    assert "0 is refused: use 1 <= number" in refused
    trained.save(tmp_path)
    shown = run("tokenizer.py", "show", "--tokenizer", tmp_path, "a é").stdout
    assert shown == "a| |\\xc3|\\xa9\n64 220 127 102\n"
    with pytest.raises(ValueError, match="257"):
        train_bpe({"ab": 5}, 256)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/none")
    with pytest.raises(FileNotFoundError, match="tokenizer.py train .* TIKTOKEN_CACHE_DIR"):
        load_named("gpt2")
    with pytest.raises(SystemExit, match="130"):
        bpe.run_command(mock.Mock(side_effect=KeyboardInterrupt))
