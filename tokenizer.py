"""Byte-level BPE as GPT-2 and BioMedLM have it: training, encoding, Hugging Face's files.

    python tokenizer.py train --input data/pubmed/text --vocab_size 28896 --out data/pubmed/tok
    python tokenizer.py show --tokenizer data/pubmed/tok "acute myocardial infarction"

Reads text: .jsonl with a document {"id", "text"} a line, or .txt; plain or .gz; files or folders.
Writes vocab.json and merges.txt, the same bytes as Hugging Face's BpeTrainer. Encodes with
tiktoken. Invalid bytes become U+FFFD. A special token's string in a text is plain text. Left out:
normalisers, prefix spaces, dropout.
The second half of the file reads text files, writes files, starts processes and commands. It stands
here because this file imports nothing of the project: the other scripts import it.
"""

import argparse
import bisect
import gzip
import hashlib
import heapq
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
import zlib
from array import array
from collections import Counter, defaultdict, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# the byte alphabet and GPT-2's pattern
#
# A text is cut into pre-tokens, a word with the space before it, a number, a run of signs: "12 mg
# of aspirin." -> "12", " mg", " of", " aspirin", ".". No token crosses their ends. A pre-token
# becomes its UTF-8 bytes, 256 symbols that any text can be written in.

END_OF_TEXT = "<|endoftext|>"
# English endings, letters, digits, signs; then white space, without its last character where a
# word follows: "a   b" -> "a", "  ", " b".
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# For training: white space ends at each "\n", as Hugging Face's trainer reads line by line.
# Nothing else differs.
LINE_PATTERN = regex.compile(PATTERN.replace(r"\s+(?!\S)|\s+", r"[^\S\n]*\n|[^\S\n]+(?!\S)|\s"))
# For encoding: the same pieces as PATTERN's, but long white space is matched in steps of 100.
# Else tiktoken 0.14 panics after a million steps. Two white characters stay after each step: one
# for the \s+ behind, one for the word after it.
SAFE_PATTERN = PATTERN.replace(r"\s+(?!\S)", r"(?:\s{100}(?=\s\s))*+\s+(?!\S)")

# GPT-2 writes a byte as a visible character. 188 bytes are visible in Latin-1 and stand for
# themselves; the other 68 become chr(256), chr(257), ... in turn. So " " is "Ġ", "\n" is "Ċ", and
# the two bytes of "é" are "Ã©". A byte's id is its place here: "!" has 0, "Ġ" has 220.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = sorted(range(256), key=lambda byte: byte not in VISIBLE)
ALPHABET = [*map(chr, [*VISIBLE, *range(256, 324)])]
ID_OF_BYTE = bytes(map(BYTES.index, range(256)))  # for bytes.translate
BYTE_OF_CHAR = dict(zip(ALPHABET, BYTES))

# ---------------------------------------------------------------------------------------------
# training: the commonest pair of neighbours becomes a token, again and again
#
#     hug 10 times, pug 5, hugs 5     the pre-tokens, each symbol still a byte
#     u+g 20 times                    the commonest pair -> "ug":   h ug, p ug, h ug s
#     h+ug 15 times                   now the commonest  -> "hug":  hug, p ug, hug s
#     p+ug and hug+s 5 times each     a tie: the smaller ids win, and p is a byte -> "pug"
#
# Counting all pairs anew after each merge would take days. But a merge changes only the pairs that
# touch it. So each pair keeps a list of its words. The pairs that a merge makes all hold its new
# token, and are counted once, when they appear. Each takes the place of an old pair, which becomes
# rarer. After h e -> X:
#
#     word    new    old
#     then    t X    t h
#     then    X n    e n
#     hehe    X X    e h
#
# So no count ever exceeds that of the pair merged last, and the search for the commonest pair only
# goes down: from count to count, and within a count from the smallest pair to the largest.


Indices = partial(array, "I")  # numbers of four bytes


def train_bpe(counts, vocab_size, min_frequency=2):
    """Learn merges from {pre-token: count}: pairs in byte characters, [("t", "h"), ("Ġ", "th")].

    There are vocab_size - 257 of them (256 bytes, end-of-text), or fewer when no pair is left that
    occurs min_frequency times. The rule is HF's: the pair with the highest count wins, a tie goes
    to the smaller (id, id), and a word is merged from left to right.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size {vocab_size} is below 257 (256 bytes, end-of-text): use more")
    # A word is a str with a character chr(id) for each symbol, a pair a str of two. So str.split
    # finds a pair, str.join writes its merge, and pairs sort as (id, id) does.
    words = [piece.encode().translate(ID_OF_BYTE).decode("latin-1") for piece in counts]
    count_of_word = list(counts.values()).__getitem__  # by the word's index
    where = defaultdict(Indices)  # pair -> indices of words; some no longer have it
    for i, word in enumerate(words):
        for pair in map("".join, pairwise(word)):
            where[pair].append(i)
    pair_counts = {pair: sum(map(count_of_word, indices)) for pair, indices in where.items()}
    waiting = defaultdict(list)  # count -> a heap of pairs; some have become rarer since
    levels = [0]  # the counts that have a heap, in order

    def wait(pair):
        """Put a pair into the heap of its count."""
        count = pair_counts[pair]
        if count not in waiting:
            bisect.insort(levels, count)
        heapq.heappush(waiting[count], pair)

    def commonest_pairs():
        """Yield the commonest pair, again and again. One that has become rarer waits once more."""
        while (count := levels[-1]) >= min_frequency:
            while waiting[count]:
                pair = heapq.heappop(waiting[count])
                if pair_counts[pair] == count:
                    yield pair
                else:
                    wait(pair)
            del waiting[levels.pop()]

    for pair in pair_counts:
        wait(pair)
    tokens = list(ALPHABET)
    merges = []
    new_ids = tqdm(range(256, vocab_size - 1), "merging", disable=None)
    for new_id, pair in zip(new_ids, commonest_pairs()):
        left, right = pair
        merges.append((tokens[ord(left)], tokens[ord(right)]))
        tokens.append("".join(merges[-1]))
        merged = chr(new_id)
        for new, indices in merge_pair(pair, merged, words, where.pop(pair)).items():
            count = sum(map(count_of_word, indices))
            first, second = new  # replaces `old`: see the table above
            old = (right if first == merged else first) + (left if second == merged else second)
            if old in pair_counts:
                pair_counts[old] -= count
            if count >= min_frequency:  # a rarer pair will never be a token
                pair_counts[new] = count
                where[new] = indices
                wait(new)
    return merges


def merge_pair(pair, merged, words, indices):
    """Write `merged` for `pair` in words[i] of all indices.

    Returns {new pair: indices of words, one an occurrence}. In "then", "he" becomes X: the new
    pairs are "tX" and "Xn". In "hehe" it is "XX".
    """
    new_pairs = defaultdict(Indices)
    for i in dict.fromkeys(indices):  # a word once, however often it has the pair
        parts = words[i].split(pair)  # "hehe" -> "", "", ""; one part if the pair is gone
        words[i] = merged.join(parts)
        for before, after in pairwise(parts):
            if before:
                new_pairs[before[-1] + merged].append(i)
            if after:
                new_pairs[merged + after[0]].append(i)
        if len(parts) > 2:  # the word has the pair twice: "hehe"
            for between in parts[1:-1]:
                if not between:
                    new_pairs[merged + merged].append(i)
    return new_pairs


# ---------------------------------------------------------------------------------------------
# the tokenizer


class Tokenizer:
    """Encodes text to ids and decodes ids, as Hugging Face's GPT2TokenizerFast does.

    vocab: {token in byte characters, or special string: id}; merges: pairs in order; added:
    {special string: id} beyond vocab. ValueError where these do not fit each other.

    tiktoken joins any neighbours whose bytes together are a token, HF only the pairs of merges.txt.
    For merges that training gives, both come to the same ids. Others aren't meant to be used here.
    """

    def __init__(self, vocab, merges, added=()):
        self.vocab = vocab
        self.merges = merges
        tokens = [*ALPHABET, *map("".join, merges)]
        ids = [*map(vocab.get, tokens)]
        others = vocab.keys() - set(tokens)  # neither byte nor merge: special tokens
        self.special = {token: vocab[token] for token in others} | dict(added)
        missing = set(tokens) - vocab.keys()
        # These must look special, or else the merges were cut short.
        plain = [token for token in others if token[0] not in "<["]
        different = len({*ids, *self.special.values()}) == len(ids) + len(self.special)
        if missing or plain or not different:
            raise ValueError("its vocabulary and merges are damaged, or do not belong together "
                             f"{[*missing, *plain][:3]}: copy them again")
        self.eot_id = self.special[END_OF_TEXT]
        # tiktoken gives ranks: bytes first, then merges in their order.
        ranks = {bytes(map(BYTE_OF_CHAR.get, token)): rank for rank, token in enumerate(tokens)}
        self._bpe = tiktoken.Encoding("bpe", pat_str=SAFE_PATTERN, special_tokens={},
                                      mergeable_ranks=ranks)
        self._ids = None if ids == [*range(len(ids))] else ids
        self._bytes = dict(zip(ids, ranks))
        self._bytes |= {i: token.encode() for token, i in self.special.items()}

    @classmethod
    def from_merges(cls, merges):
        """The tokenizer of merges learned by train_bpe, end-of-text last."""
        tokens = [*ALPHABET, *map("".join, merges), END_OF_TEXT]
        return cls({token: i for i, token in enumerate(tokens)}, merges)

    @property
    def vocab_size(self):
        """The highest id + 1, added special tokens included."""
        return max(self._bytes) + 1

    def add_special_tokens(self, tokens):
        """Give the special strings that are new ids from vocab_size up; `special` has them then."""
        for token in tokens:
            self._bytes[self.special.setdefault(token, self.vocab_size)] = token.encode()

    def encode(self, text):
        """Ids (list of int) of text. Special strings in it are plain text."""
        ranks = self._bpe.encode_ordinary(text)
        return [self._ids[rank] for rank in ranks] if self._ids else ranks

    def decode_bytes(self, ids):
        """Bytes of ids (ints); ValueError for an id that is not in the vocabulary."""
        try:
            return b"".join([self._bytes[i] for i in ids])
        except KeyError as e:
            raise ValueError(f"id {e} is none of this vocabulary's {self.vocab_size:,}: the ids "
                             "come from another tokenizer") from None

    def decode(self, ids):
        """Text of ids (ints); bytes that are not UTF-8, as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def files(self):
        """{file name: bytes} of vocab.json and merges.txt, byte for byte as HF saves them."""
        vocab = json.dumps(self.vocab, ensure_ascii=False, separators=(",", ":"))
        merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in self.merges)
        return {"vocab.json": vocab.encode(), "merges.txt": merges.encode()}

    @property
    def fingerprint(self):
        """sha256 (hex) over vocab.json and merges.txt as saved; added tokens do not count."""
        return hashlib.sha256(b"".join(self.files().values())).hexdigest()

    def save(self, folder):
        """Write vocab.json, merges.txt and, if tokens were added, added_tokens.json; each whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            with replacing(folder / name) as f:
                f.write(content)
        added = {token: i for token, i in self.special.items() if token not in self.vocab}
        if added:
            write_json(folder / "added_tokens.json", added)
        else:
            (folder / "added_tokens.json").unlink(missing_ok=True)

    @classmethod
    def load(cls, folder):
        """From vocab.json + merges.txt, GPT-2's encoder.json + vocab.bpe, or a tokenizer.json."""
        error = None
        for names in MERGES_OF.items():
            vocab, merges = map(Path(folder).joinpath, names)
            if vocab.is_file() and merges.is_file():
                try:
                    return cls(*read_files(vocab, merges))
                except ValueError as e:  # a whole tokenizer.json may stand there, too
                    error = error or ValueError(f"{folder}: {e}")
        raise error or FileNotFoundError(
            f"{folder} has no vocab.json + merges.txt: make them with python tokenizer.py train "
            f"--input TEXT --out {folder}; for gpt2, set TIKTOKEN_CACHE_DIR to the folder where "
            "tiktoken keeps its files")


# ---------------------------------------------------------------------------------------------
# counting pre-tokens: the text is streamed, in several processes

BATCH_CHARS = 2**21  # in a larger batch more chunks repeat, and each is cut once
# A pre-token starts at every space that something visible follows.
SPACE = re.compile(r" (?=\S)")


def count_pretokens(inputs, workers=1):
    """Counter of the pre-tokens in files or folders, the same for every number of processes.

    This process reads, the workers count; some two batches a worker are in memory.
    The Counter grows with the text: abstracts of 21 MB have 68,000 pre-tokens, of 86 MB 176,000. At
    that rate all of PubMed, 30 GB, has some 9 million. Training takes 480 bytes for each: 4 GB.
    """
    counts = Counter()
    results = in_processes(count_batch, read_batches(inputs), workers)
    for counted in tqdm(results, "counting", disable=None):
        counts.update(counted)
    return counts


def read_batches(inputs):
    """Yield strings of a little more than BATCH_CHARS: documents, each with "\n" after it."""
    batch = io.StringIO()
    for _, text in read_documents(*inputs):
        batch.write(text.removesuffix("\n") + "\n")
        if batch.tell() > BATCH_CHARS:
            yield batch.getvalue()
            batch = io.StringIO()
    yield batch.getvalue()


def count_batch(text):
    """Counter of the pre-tokens of a text.

    GPT-2's pattern is slow. So the text is cut at spaces first, and the pattern runs once on each
    distinct chunk: " (myocardium)," comes often and is cut once. One of letters alone is a piece.
    """
    head, *chunks = SPACE.split(text)
    counts = Counter(LINE_PATTERN.findall(head))
    for chunk, count in Counter(chunks).items():
        chunk = " " + chunk
        for piece in [chunk] if chunk[1:].isalpha() else LINE_PATTERN.findall(chunk):
            counts[piece] += count
    return counts


# ---------------------------------------------------------------------------------------------
# Hugging Face's and GPT-2's files

MERGES_OF = {  # file of ids -> file of merges
    "vocab.json": "merges.txt",
    "encoder.json": "vocab.bpe",
    # GPT-2's in tiktoken's cache, which names a file by the sha1 of its address
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "tokenizer.json": "tokenizer.json"}  # one file holds both


def load_named(name):
    """A tokenizer's folder, or "gpt2" from the files that tiktoken caches."""
    if name == "gpt2":
        name = os.environ.get("TIKTOKEN_CACHE_DIR", f"{tempfile.gettempdir()}/data-gym-cache")
    return Tokenizer.load(name)


def read_files(path, merges_path):
    """vocab, merges and added tokens of vocab.json (path), merges.txt and added_tokens.json, or of
    tokenizer.json alone."""
    vocab = read_json(path)
    if path.name == "tokenizer.json":
        vocab, merges, added = from_tokenizer_json(vocab)
    else:
        lines = merges_path.read_text("utf-8", "replace").rstrip("\n").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
        added = path.with_name("added_tokens.json")
        added = read_json(added) if added.is_file() else {}
    # BioMedLM's vocab.json has no end-of-text. Its id is the next one then, as in transformers.
    eot = added.pop(END_OF_TEXT, max(vocab.values()) + 1)
    vocab.setdefault(END_OF_TEXT, eot)
    return vocab, merges, added


def read_json(path):
    """The object in a JSON file, as a dict."""
    try:
        return {} | json.loads(path.read_bytes())
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path} is damaged, perhaps cut short ({e!r}): get it again") from None


def from_tokenizer_json(content):
    """vocab, merges and added tokens of a parsed tokenizer.json. ValueError where it changes the
    text, or cuts it in other ways than GPT-2."""
    cut = {"use_regex": True} | (content["pre_tokenizer"] or {})
    gpt2 = {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}
    model = content["model"]
    if content["normalizer"] or not gpt2.items() <= cut.items():
        raise ValueError("tokenizer.json changes the text (normalizer) or cuts it (pre_tokenizer) "
                         "in other ways than GPT-2's: use a tokenizer of GPT-2's kind")
    # a merge is "t h" in older files and ["t", "h"] in newer ones
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    return model["vocab"], merges, {token["content"]: token["id"]
                                    for token in content["added_tokens"]}


# ---------------------------------------------------------------------------------------------
# text files


def natural(path):
    """Sort key of a file's name: pubmed26n999 comes before pubmed26n1000."""
    return re.sub(r"\d+", lambda number: number[0].zfill(20), Path(path).name), str(path)


def text_files(path):
    """The .jsonl and .txt files, plain or .gz: `path` itself or those in the folder `path`.

    In natural order. FileNotFoundError where there is none.
    """
    files = [file for file in [Path(path), *Path(path).glob("*")]
             if re.search(r"\.(jsonl|txt)(\.gz)?$", file.name) and file.is_file()]
    if not files:
        raise FileNotFoundError(f"{path}: no .jsonl or .txt (.gz): run python data.py extract")
    return sorted(files, key=natural)


@contextmanager
def open_input(path):
    """A binary file, plain or .gz; what gzip raises on damage becomes one clear ValueError."""
    try:
        opener = gzip.open if str(path).endswith(".gz") else open
        with opener(path, "rb") as f:
            yield f
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f"{path}: damaged gzip ({e}): download or make it again") from None


def json_lines(path):
    """Yield (line number, object) of a file whose lines end at "\\n" only."""
    with open_input(path) as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                value = {} | json.loads(line)  # TypeError where it is no object
            except (ValueError, TypeError):
                raise ValueError(f"{path}: line {number} is no JSON object: get the file "
                                 "anew") from None
            yield number, value


def read_documents(*paths):
    """Yield (id, text) of every document in text files or folders; deletions are left out."""
    for path in paths:
        for file in text_files(path):
            for ident, text in read_records(file):
                if text is not None:
                    yield ident, text


def read_records(path):
    """Yield (id, text) of a text file in its order; text is None where the id is deleted.

    A .txt is cut into documents, so that a split has some to hold out. Their ids are hashes of
    their texts.
    """
    if str(path).endswith((".txt", ".txt.gz")):
        for piece in cut_txt(path):
            if text := piece.strip("\n"):
                yield f"{hash64(text):016x}", text
        return
    for number, value in json_lines(path):
        try:
            ident = str(value["id"])
            text = None
            if not value.get("deleted"):
                # JSON can spell half a surrogate pair: U+FFFD, as tiktoken has it
                text = value["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        except (KeyError, AttributeError):
            raise ValueError(f'{path}: line {number} lacks "id" or "text": run python data.py '
                             "extract") from None
        yield ident, text


def read_records_backwards(path):
    """Yield the records of read_records, the last one first.

    They go through a temporary file (in $TMPDIR, as large as the text): memory holds one record.
    """
    starts = []
    with tempfile.TemporaryFile() as copy:
        for record in read_records(path):
            starts.append(copy.tell())
            pickle.dump(record, copy)
        for start in reversed(starts):
            copy.seek(start)
            yield pickle.load(copy)


def cut_txt(path):
    """Yield the text of a .txt in pieces: UTF-8, or UTF-16 that opens with a byte-order mark.

    A piece ends at a line that is <|endoftext|> alone, which belongs to no piece. Long ones end at
    the first blank line after 4,000 characters, or at the first line's end after 8,000. A line that
    is longer itself is cut.
    """
    piece = ""
    unreadable = 0
    with open_input(path) as f:
        marks = b"\xff\xfe", b"\xfe\xff"
        encoding = "utf-16" if f.peek(2)[:2] in marks else "utf-8-sig"
        lines = io.TextIOWrapper(f, encoding, "replace", newline="\n")
        for line in iter(lambda: lines.readline(8000), ""):
            unreadable += line.count("\ufffd")
            limit = 8000 if line.strip() else 4000  # a blank line ends a paragraph
            if line.strip() == END_OF_TEXT:
                line, limit = "", 0
            piece += line
            if len(piece) >= limit:
                yield piece
                piece = ""
    yield piece
    if unreadable > 10:
        print(f"{path}: {unreadable:,} characters are U+FFFD, most likely bytes that are not "
              "UTF-8: convert the file, as with iconv -f CP1252 -t UTF-8", file=sys.stderr)


def hash64(text):
    """64-bit hash of a str. Among 40 million documents a clash has a probability of 4e-5."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


# ---------------------------------------------------------------------------------------------
# writing, processes, commands


@contextmanager
def replacing(path):
    """A binary file that appears under `path` whole and on disk, or not at all."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, contents):
    """Write a small JSON file, whole or not at all."""
    with replacing(path) as f:
        f.write((json.dumps(contents, indent=2) + "\n").encode())


def in_processes(function, tasks, workers):
    """Yield function(task) for tasks, any iterable, in its order, from `workers` processes.

    At most 2 * workers tasks and results are in memory. One worker: this process does the work.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    # spawn: a fork would copy locks that the caller's threads (torch's, tqdm's) may hold
    context = multiprocessing.get_context("spawn")
    running = deque()
    with ProcessPoolExecutor(workers, context, start_worker) as pool:
        try:
            for task in tasks:
                running.append(pool.submit(function, task))
                if len(running) == 2 * workers:
                    yield running.popleft().result()
            for future in running:
                yield future.result()
        except BrokenExecutor:
            raise OSError("a worker process was killed, by lack of memory perhaps: use fewer "
                          "--workers") from None


def start_worker():
    """Ignore Ctrl-C, which the parent handles. A thread ends this worker when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def run_command(main):
    """Run a script's main: a user's mistake ends in one line with its mend, without a traceback."""
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)


def numbers(kind, low, high=math.inf):
    """argparse's type for numbers from `low` to below `high`, never nan. kind: int or float."""
    def number(text):
        value = kind(text)
        if not low <= value < high:  # false for nan, too
            raise argparse.ArgumentTypeError(f"{text} is refused: use {low} <= number < {high}")
        return value
    return number


COUNT = numbers(int, 1)


# ---------------------------------------------------------------------------------------------
# the command line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("train", help="learn a vocabulary from text")
    sub.add_argument("--input", nargs="+", required=True, metavar="PATH",
                     help="folders or files of text: .jsonl or .txt, plain or .gz (required)")
    sub.add_argument("--vocab_size", type=int, default=28896,
                     help="tokens, the 256 bytes and end-of-text included (default: 28896)")
    sub.add_argument("--out", required=True, help="folder for the files written (required)")
    sub.add_argument("--workers", type=COUNT, default=os.cpu_count(),
                     help="counting processes (default: all cores)")
    sub.set_defaults(function=train)
    sub = commands.add_parser("show", help="print the pieces and ids of a text")
    sub.add_argument("text", help="the text to cut")
    sub.add_argument("--tokenizer", required=True, help="folder of a tokenizer, or gpt2 (required)")
    sub.set_defaults(function=show)
    args = parser.parse_args()
    args.function(args)


def train(args):
    counts = count_pretokens(args.input, args.workers)
    if not counts:
        raise ValueError("the input holds no text: give --input a folder with documents")
    tokenizer = Tokenizer.from_merges(train_bpe(counts, args.vocab_size))
    tokenizer.save(args.out)
    print(f"{args.out}: {tokenizer.vocab_size:,} tokens, {END_OF_TEXT} is {tokenizer.eot_id}")


def show(args):
    """Print the pieces of a text and their ids."""
    tokenizer = load_named(args.tokenizer)
    ids = tokenizer.encode(args.text)
    print("|".join(tokenizer.decode_bytes([i]).decode("utf-8", "backslashreplace") for i in ids))
    print(*ids)


if __name__ == "__main__":
    run_command(main)
