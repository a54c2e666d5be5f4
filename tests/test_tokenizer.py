"""The tokenizer against oracles: a naive trainer, merge-by-merge BPE, Hugging Face's fixture.

fixtures/hf_bpe.json was made once with Hugging Face tokenizers 0.23.3 (its "origin" has the call):
our own synthetic corpus, the vocab.json and merges.txt that BpeTrainer gave, and ids of texts.
"""

import gzip
import json
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
import regex
from conftest import run
from tiktoken_ext.openai_public import r50k_pat_str

import tokenizer as bpe
from tokenizer import ALPHABET, PATTERN, Tokenizer, count_pretokens, train_bpe

BYTE_CHAR = dict(zip(bpe.BYTES, ALPHABET))
FIXTURE = json.loads((Path(__file__).parent / "fixtures/hf_bpe.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_bytes(FIXTURE["corpus"].encode())
    return Tokenizer.from_merges(train_bpe(count_pretokens([path]), 800))


def spell(piece):
    return [BYTE_CHAR[b] for b in piece.encode()]


def join(symbols, pair):
    out, i = [], 0
    while i < len(symbols):
        hit = tuple(symbols[i:i + 2]) == pair
        out.append("".join(pair) if hit else symbols[i])
        i += 1 + hit
    return out


def naive_train(counts, n_merges, min_frequency):
    """The rule as recipe and papers state it: recount everything after each merge."""
    ids = {char: i for i, char in enumerate(ALPHABET)}
    words, merges = [(spell(piece), n) for piece, n in counts.items()], []
    for _ in range(n_merges):
        pairs = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = min(pairs, key=lambda p: (-pairs[p], ids[p[0]], ids[p[1]]), default=None)
        if best is None or pairs[best] < min_frequency:
            break
        merges.append(best)
        ids["".join(best)] = len(ids)
        words = [(join(word, best), n) for word, n in words]
    return merges


def naive_encode(text, vocab, merges):
    """HF's rule: in each piece, the pair that comes first in the merges, until none is left."""
    rank, ids = {pair: i for i, pair in enumerate(merges)}, []
    for piece in regex.findall(PATTERN, text):
        word = spell(piece)
        while pairs := [p for p in zip(word, word[1:]) if p in rank]:
            word = join(word, min(pairs, key=rank.get))
        ids += [vocab[token] for token in word]
    return ids


# ---------------------------------------------------------------------------------------------
# training


def test_fast_trainer_equals_naive():
    """T2. Wrong counts: overlaps (aaaa), merges side by side (abab), ties, old heap rows."""
    for seed in range(300):
        rng = random.Random(seed)
        letters = "abcdé "[:rng.randint(1, 6)]
        counts = {"".join(rng.choices(letters, k=rng.randint(1, 14))): rng.choice([1, 1, 2, 3, 50])
                  for _ in range(rng.randint(1, 30))}
        n, least = rng.randint(0, 60), rng.randint(1, 4)
        assert train_bpe(counts, 257 + n, least) == naive_train(counts, n, least), f"seed {seed}"


def test_merges_and_vocab_equal_hf(trained):
    """T3. Any difference to Hugging Face in pre-tokens, counts, ties, ids or the files' bytes."""
    files = trained.files()
    assert files["merges.txt"].decode() == FIXTURE["merges_txt"]
    assert files["vocab.json"].decode() == FIXTURE["vocab_json"][:-1] + ',"<|endoftext|>":799}'


def test_counting_cuts_each_line_alone(tmp_path):
    """Pre-tokens over two lines, other line ends taken for "\\n", spaces lost between chunks."""
    rng = random.Random(0)
    parts = ["a", "B", " ", "  ", "\n", "\t", "\r", "\x0b", "\x1c", "\x85", "\xa0", "\u2009", "é"]
    text = "".join(rng.choices([*parts, "\u2028", "'s", "7", ".", "中", "😀"], k=20000)) + ".\n"
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "1", "text": text}))
    expected = Counter()
    for line in text.split("\n")[:-1]:
        expected.update(regex.findall(PATTERN, line + "\n"))
    assert count_pretokens([tmp_path / "t.jsonl"]) == expected


def test_workers_and_hash_seed_change_nothing(tmp_path, monkeypatch):
    """T7. A block lost or doubled between processes; merges that hang on set or dict order."""
    (tmp_path / "c.txt").write_bytes(FIXTURE["corpus"].encode())
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as f:
        for i, line in enumerate(FIXTURE["corpus"].split("\n")):
            print(json.dumps({"id": str(i), "text": line}), file=f)
    monkeypatch.setattr(bpe, "BATCH_DOCUMENTS", 3)
    one = count_pretokens([tmp_path])
    assert one == count_pretokens([tmp_path], workers=3)
    characters = sum(len(piece.strip()) * n for piece, n in one.items())
    assert characters == 2 * len("".join(FIXTURE["corpus"].split()))
    written = set()
    for seed, workers in (("0", 1), ("1", 2)):
        out = tmp_path / seed
        done = run("tokenizer.py", "train", "--input", tmp_path, "--vocab_size", 600, "--out", out,
                   "--workers", workers, env={"PYTHONHASHSEED": seed})
        assert done.returncode == 0, done.stderr
        written.add((out / "merges.txt").read_bytes() + (out / "vocab.json").read_bytes())
    assert len(written) == 1


def test_half_characters(tmp_path):
    """Half a surrogate pair or a byte that is not UTF-8 ending in a traceback or lost."""
    (tmp_path / "a.jsonl").write_text('{"id": 3, "text": "one \\ud800x"}\n')
    (tmp_path / "b.txt").write_bytes(b"ab \xff cd")
    expected = {"one": 1, " \ufffd": 2, "x": 1, "ab": 1, " cd": 1, "\n": 2}
    assert count_pretokens([tmp_path]) == expected


def test_a_long_word_takes_linear_time():
    """A word cut anew at each occurrence of a pair: this one takes a minute then, not 0.1 s."""
    word = "".join(random.Random(0).choices("ACGT", k=200_000))
    started = time.process_time()
    assert len(train_bpe({word: 1}, 257 + 200)) == 200
    assert time.process_time() - started < 5


# ---------------------------------------------------------------------------------------------
# text files


def test_records_backwards(tmp_path):
    """A record lost, doubled or out of order on the way back; a deletion or blank line mistaken."""
    records = [(str(i), None if i % 7 == 0 else f"text {i} é\n\u2028" * i) for i in range(50)]
    lines = [json.dumps({"id": i, "deleted": text is None} | ({"text": text} if text else {}))
             for i, text in records]
    content = "\n\n".join(lines)
    (tmp_path / "a.jsonl").write_text(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content.encode() + b"\n"))
    for path in bpe.text_files(tmp_path):
        assert list(bpe.read_records(path)) == records
        assert list(bpe.read_records_backwards(path)) == records[::-1]
    assert len(list(bpe.read_documents(tmp_path))) == 2 * 42


def test_a_txt_is_cut_into_documents(tmp_path):
    """One document of a .txt, so that none is held out; text lost or cut inside a paragraph."""
    paragraphs = [f"{i} " + "word " * 150 + "end." for i in range(40)]
    (tmp_path / "a.txt").write_text("\ufeff" + "\n\n".join(paragraphs))
    pieces = [text for _, text in bpe.read_records(tmp_path / "a.txt")]
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs)
    assert all(piece.endswith("end.") for piece in pieces)
    assert {len(piece) // 1000 for piece in pieces[:-1]} == {4}
    (tmp_path / "crlf.txt").write_bytes(b"one\r\ntwo\rthree\r\n")
    assert [text for _, text in bpe.read_records(tmp_path / "crlf.txt")] == ["one\r\ntwo\rthree\r"]
    (tmp_path / "lines.txt").write_text("\n".join(paragraphs))
    assert "\n".join(text for _, text in bpe.read_records(tmp_path / "lines.txt")) \
        == "\n".join(paragraphs)
    (tmp_path / "dna.txt").write_text("ACGT" * 5000)
    ids = [ident for ident, _ in bpe.read_records_backwards(tmp_path / "dna.txt")]
    assert len(ids) == 3 and ids[1] == ids[2] == f"{bpe.hash64('ACGT' * 2000):016x}"


def test_natural_order(tmp_path):
    """pubmed26n1000 before pubmed26n999: an old record would replace the new one."""
    for name in ("n1000.jsonl", "n999.jsonl.gz", "n20.txt", "x.json", "n3.jsonl.1.tmp"):
        (tmp_path / name).write_text("")
    names = [path.name for path in bpe.text_files(str(tmp_path))]
    assert names == ["n20.txt", "n999.jsonl.gz", "n1000.jsonl"]


@pytest.mark.parametrize("line", ["[1]", '{"id": "1", "text"', '{"a": "\\x"}'])
def test_a_bad_line_is_named(tmp_path, line):
    """A traceback, or a damaged line skipped in silence."""
    (tmp_path / "a.jsonl").write_text('{"id": "1", "text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2"):
        list(bpe.json_lines(tmp_path / "a.jsonl"))


def test_replacing_is_whole_or_absent(tmp_path):
    """A half-written file under the final name, or a temporary one left behind."""
    with pytest.raises(KeyError), bpe.replacing(tmp_path / "a") as f:
        f.write(b"half")
        raise KeyError
    assert not list(tmp_path.iterdir())
    with bpe.replacing(tmp_path / "a") as f:
        f.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_processes_keep_order_and_take_few_tasks_ahead():
    """Results out of order; a reader that runs ahead until memory is full."""
    taken = []

    def tasks():
        for i in range(30):
            taken.append(i)
            yield [i]

    for n, result in enumerate(bpe.in_processes(sum, tasks(), 2)):
        assert result == n and len(taken) <= n + 6
    with pytest.raises(OSError, match="--workers"):
        list(bpe.in_processes(os._exit, [3, 3, 3], 2))


# ---------------------------------------------------------------------------------------------
# encoding

def test_pattern_is_gpt2s():
    """A branch of the pattern lost, which a fixture's English never takes."""
    rng = random.Random(4)
    parts = ["'", "s", "d", "m", "re", "ve", "ll", "t", "A", " ", "\n", "7", "½", "e\u0301", "."]
    for _ in range(500):
        text = "".join(rng.choices(parts, k=30))
        assert regex.findall(PATTERN, text) == regex.findall(r50k_pat_str, text), repr(text)


def test_hard_strings_equal_hf_and_naive(trained):
    """T4. tiktoken's merge rule or pattern differing from HF's; long and odd pieces."""
    for text, ids in zip(FIXTURE["texts"], FIXTURE["ids"]):
        assert trained.encode(text) == ids, repr(text)
        assert naive_encode(text, trained.vocab, trained.merges) == ids, repr(text)


def test_random_merges_equal_naive():
    """T4. Vocabularies where a token can be spelt by a pair that no merge has, or never be reached,
    and ids in another order than the merges: tiktoken alone gives other ids than HF there."""
    differs = 0
    for seed in range(200):
        rng = random.Random(seed)
        tokens, merges = list("abc"), []
        while len(merges) < 12:
            pair = rng.choice(tokens), rng.choice(tokens)
            if pair not in merges and len("".join(pair)) < 9:
                merges.append(pair)
                tokens.append("".join(pair))
        every = list(dict.fromkeys([*ALPHABET, *tokens, bpe.END_OF_TEXT]))
        rng.shuffle(every)
        tok = Tokenizer({token: i for i, token in enumerate(every)}, merges)
        differs += len(bpe.usable_ranks([*ALPHABET, *tokens[3:]], merges)) < 256 + len(merges)
        for _ in range(40):
            text = "".join(rng.choices("abc", k=rng.randint(1, 25)))
            assert tok.encode(text) == naive_encode(text, tok.vocab, merges), (seed, text)
    assert differs > 50  # the test does meet tokens that are out of reach


@pytest.mark.parametrize("filler", [" ", "\n", "\u2009", "a", "!"])
def test_a_million_characters(trained, filler):
    """T4. tiktoken 0.14 panics on a million spaces; a run that is cut gives other ids than HF."""
    for after in ("", "x", " x"):
        text = "x" + filler * 1_200_000 + after
        ids = trained.encode(text)
        assert trained.decode(ids) == text
    long, short = (trained.encode(filler * n + "x") for n in (200_001, 2_001))
    assert long[-2:] == short[-2:] and set(long) <= set(short) | set(trained.encode(filler * 999))


def test_long_white_space_is_cut_as_short(trained):
    """T4. The steps of 100 through white space taking the space that belongs to the next word."""
    rng = random.Random(1)
    sizes = [n for around in (3, 100, 200, 300) for n in range(around - 2, around + 4)]
    for text in ("x" + "".join(rng.choices(" \n\t\xa0", k=n)) + after
                 for n in sizes for after in ("", "x", " x", "\n!")):
        assert regex.findall(bpe.SAFE_PATTERN, text) == regex.findall(PATTERN, text), repr(text)
        assert trained.encode(text) == naive_encode(text, trained.vocab, trained.merges)


def test_round_trip(trained):
    """T5. Bytes lost or changed on the way, for any code point and any byte."""
    rng = random.Random(2)
    for _ in range(300):
        top = rng.choice([128, 0x3000, 0x110000])
        points = [rng.randrange(top) for _ in range(rng.randint(0, 60))]
        text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        assert trained.decode(trained.encode(text)) == text
    every_byte = bytes(trained.decode_bytes([i])[0] for i in range(256))
    assert sorted(every_byte) == list(range(256))
    assert trained.decode([trained.vocab["Ã"]]) == "\ufffd"  # half of a character
    assert trained.encode("\ud800") == trained.encode("\ufffd")


# ---------------------------------------------------------------------------------------------
# special tokens and files


def test_special_tokens(trained, tmp_path):
    """T6, T8. Special strings in plain text taken as special; ids that move; save and load."""
    trained.save(tmp_path / "plain")
    tok = Tokenizer.load(tmp_path / "plain")
    assert (tok.vocab_size, tok.eot_id, tok.fingerprint) == (800, 799, trained.fingerprint)
    assert tok.add_special_tokens(["[PAD]", "[SEP]", "[PAD]"]) == [800, 801, 800]
    text = "a [SEP]b<|endoftext|>[PAD]"
    assert max(tok.encode(text)) < 799 and tok.encode(text) == trained.encode(text)
    tok.save(tmp_path / "more")
    again = Tokenizer.load(tmp_path / "more")
    assert (again.vocab_size, again.special, again.fingerprint) \
        == (802, {bpe.END_OF_TEXT: 799, "[PAD]": 800, "[SEP]": 801}, trained.fingerprint)
    assert again.decode([*again.encode("a "), 801, *again.encode("b"), 799, 800]) == text


def test_ids_with_holes(trained):
    """A vocabulary's size taken from its count, or a fingerprint that sees no merges."""
    tok = Tokenizer({**trained.vocab, bpe.END_OF_TEXT: 2000}, trained.merges)
    assert tok.vocab_size == 2001 and tok.add_special_tokens(["[PAD]"]) == [2001]
    with pytest.raises(ValueError, match="another tokenizer"):
        tok.decode([1500])
    other = Tokenizer(trained.vocab, trained.merges[::-1])
    assert len({tok.fingerprint, trained.fingerprint, other.fingerprint}) == 3


def test_other_file_formats(trained, tmp_path):
    """GPT-2's file names, tokenizer.json with both spellings of merges, ids in another order."""
    for name, content in zip(("encoder.json", "vocab.bpe"), trained.files().values()):
        (tmp_path / name).write_bytes(content)
    assert Tokenizer.load(tmp_path).fingerprint == trained.fingerprint
    vocab = {bpe.END_OF_TEXT: 0} | {t: i + 1 for t, i in trained.vocab.items() if i < 799}
    for merges in (trained.merges, [" ".join(pair) for pair in trained.merges]):
        whole = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "normalizer": None,
                 "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
                 "added_tokens": [{"id": 0, "content": bpe.END_OF_TEXT, "special": True}]}
        (tmp_path / "j").mkdir(exist_ok=True)
        (tmp_path / "j/tokenizer.json").write_text(json.dumps(whole))
        tok = Tokenizer.load(tmp_path / "j")
        assert tok.eot_id == 0
        for text, ids in zip(FIXTURE["texts"], FIXTURE["ids"]):
            assert tok.encode(text) == [i + 1 for i in ids] and tok.decode(tok.encode(text)) == text
    for other in ({"normalizer": {"type": "NFC"}},
                  {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}):
        (tmp_path / "j/tokenizer.json").write_text(json.dumps(whole | other))
        with pytest.raises(ValueError, match="in other ways than GPT-2"):
            Tokenizer.load(tmp_path / "j")


def test_gpt2(shared, monkeypatch):
    """The released GPT-2 files read wrongly: other pieces than table 3's and tiktoken's."""
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken_cache"))
    tok, own = bpe.load_named("gpt2"), tiktoken.get_encoding("gpt2")
    assert (tok.vocab_size, tok.eot_id) == (50257, 50256)
    assert [tok.decode([i]) for i in tok.encode(" myocardium")] == [" my", "ocard", "ium"]
    for text in FIXTURE["texts"]:
        assert tok.encode(text) == own.encode_ordinary(text)


# ---------------------------------------------------------------------------------------------
# a user's mistakes


@pytest.mark.parametrize("name, change", [
    ("merges.txt", lambda s: s[:len(s) // 2].rsplit("\n", 1)[0]),
    ("merges.txt", lambda s: s.rsplit(" ", 1)[0]),
    ("merges.txt", lambda s: s + "q zz\n"),
    ("vocab.json", lambda s: s[:-20]),
    ("vocab.json", lambda s: s.replace(',"<|endoftext|>":799', "")),
    ("vocab.json", lambda s: s.replace('"a":64,', "")),
])
def test_damaged_files_are_refused(trained, tmp_path, name, change):
    """A truncated or mixed-up file loading as another tokenizer without a word."""
    trained.save(tmp_path)
    (tmp_path / name).write_text(change((tmp_path / name).read_text()))
    with pytest.raises(ValueError, match="copy them again"):
        Tokenizer.load(tmp_path)


def test_interrupted():
    """Ctrl-C that ends in a traceback, or with the exit code of success."""
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        bpe.run_command(interrupt)
    assert ended.value.code == 130


def test_bad_input(trained, tmp_path):
    """Tracebacks, silence or half-written files on a user's mistakes."""
    with pytest.raises(ValueError, match="257"):
        train_bpe({"ab": 5}, 256)
    with pytest.raises(ValueError, match="another tokenizer"):
        trained.decode([800])
    with pytest.raises(FileNotFoundError, match="tokenizer.py train"):
        Tokenizer.load(tmp_path)
    (tmp_path / "raw.jsonl").write_text('{"id": 1, "title": "no text"}\n')
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(5000))[:2000])
    for name, message in (("missing", "data.py extract"), ("raw.jsonl", "data.py extract"),
                          ("cut.txt.gz", "damaged gzip")):
        out = tmp_path / "out"
        done = run("tokenizer.py", "train", "--input", tmp_path / name, "--out", out)
        assert done.returncode == 1 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not out.exists()


def test_small_corpus_and_show(tmp_path):
    """A vocabulary that ends early without a word; show's pieces."""
    (tmp_path / "c.txt").write_text("abab abab\n")
    done = run("tokenizer.py", "train", "--input", tmp_path / "c.txt", "--vocab_size", 5000,
               "--out", tmp_path / "t")
    assert done.returncode == 0 and "no pair is left" in done.stdout
    tok = Tokenizer.load(tmp_path / "t")
    assert tok.eot_id == tok.vocab_size - 1 == 256 + len(tok.merges)
    done = run("tokenizer.py", "show", "--tokenizer", tmp_path / "t", "ab é")
    assert done.returncode == 0 and "ab| |\\xc3|\\xa9" in done.stdout
    done = run("tokenizer.py", "show", "--tokenizer", "gpt2", "ab",
               env={"TIKTOKEN_CACHE_DIR": "/none"})
    assert done.returncode == 1 and "TIKTOKEN_CACHE_DIR" in done.stderr
