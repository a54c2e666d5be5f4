"""Byte-level BPE as GPT-2 and BioMedLM have it: training from scratch, encoding, Hugging Face's files.

    python tokenizer.py train --input data/pubmed/text --vocab_size 28896 --out data/pubmed/tokenizer
    python tokenizer.py show --tokenizer data/pubmed/tokenizer "myocardium" --against gpt2

Training reads text (*.jsonl.gz with a document {"id", "text"} a line, .jsonl, .txt; plain or .gz) and writes
vocab.json + merges.txt, equal to the last line to those of Hugging Face's BpeTrainer on the same text.
Encoding runs through tiktoken. Text that is not UTF-8 is read with U+FFFD in place of each bad byte
sequence, and a lone surrogate in a str counts as U+FFFD. Left out: normalisers, prefix spaces, dropout, byte
fallback, and special tokens found in plain text (they are only when asked for).
"""

import argparse
import gzip
import hashlib
import heapq
import itertools
import json
import multiprocessing
import os
import queue
import re
import signal
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import regex
import tiktoken
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# the byte alphabet and GPT-2's pattern

END_OF_TEXT = "<|endoftext|>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same cut for text of many lines, each pre-tokenised alone with its "\n", as HF's trainer reads files.
LINE_PATTERN = regex.compile(PATTERN.replace(r"|\s+(?!\S)|\s+", r"|[^\S\n]*\n|[^\S\n]+(?!\S)|\s"))


def byte_characters():
    """GPT-2's printable stand-in of each byte: itself where it is visible, else 256, 257, ...; " " is "Ġ"."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = sorted(set(range(256)) - set(visible))
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


BYTE_CHAR = byte_characters()
ALPHABET = sorted(BYTE_CHAR.values())  # ids 0-255 of a trained vocabulary: "!" is 0, "Ġ" is 220
CHAR_BYTE = {ord(char): byte for byte, char in BYTE_CHAR.items()}
BYTE_ID = bytes(ALPHABET.index(BYTE_CHAR[b]) for b in range(256))  # for bytes.translate


def token_bytes(token):
    """"Ġcell" -> b" cell"; None for a string that byte characters cannot spell, such as "[A B]"."""
    if not all(ord(char) in CHAR_BYTE for char in token):
        return None
    return token.translate(CHAR_BYTE).encode("latin-1")


# ---------------------------------------------------------------------------------------------
# counting pre-tokens: streamed, in bounded memory, over processes

BLOCK_BYTES = 1 << 20
CHUNKS_IN_MEMORY = 500_000
SPACE = re.compile(r" (?=\S)")  # a space before anything but white space always starts a pre-token
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")


def input_files(inputs):
    """Files as given; of a folder, those directly in it that hold text, in name order."""
    files = []
    for path in map(Path, inputs):
        found = sorted(f for f in path.iterdir() if f.name.endswith(SUFFIXES)) if path.is_dir() else [path]
        if not found:
            raise FileNotFoundError(f"{path} holds no {', '.join(SUFFIXES)}: run data.py extract --out {path}")
        files += found
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: give --input a folder or files of text")
    return files


def read_blocks(files, progress=False):
    """Yield (file name, about BLOCK_BYTES of whole lines); a last line without "\\n" gets one."""
    total = sum(os.path.getsize(path) for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="counting", disable=not progress) as bar:
        for path in files:
            with open(path, "rb") as raw:
                stream = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
                rest, seen = [], 0
                try:
                    while data := stream.read(BLOCK_BYTES):
                        bar.update(raw.tell() - seen)
                        seen = raw.tell()
                        cut = data.rfind(b"\n") + 1
                        if cut:
                            yield path.name, b"".join((*rest, data[:cut]))
                            rest = []
                        rest.append(data[cut:])
                except (EOFError, zlib.error) as e:
                    raise ValueError(f"{path} is truncated or damaged ({e}): fetch it again") from e
                if any(rest):
                    yield path.name, b"".join((*rest, b"\n"))


def block_text(name, block):
    """The text of a block: as it is, or the "text" of each JSON line; every document ends in "\\n"."""
    if not name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return block.decode("utf-8", "replace")
    documents = []
    for line in block.decode("utf-8", "replace").split("\n"):
        record = parse_record(name, line) if line.strip() else {"deleted": True}
        if not record.get("deleted"):
            documents.append(record["text"] if record["text"].endswith("\n") else record["text"] + "\n")
    text = "".join(documents)
    if b"\\ud" in block or b"\\uD" in block:  # JSON can spell half a surrogate pair
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def parse_record(name, line):
    try:
        record = json.loads(line)
    except json.JSONDecodeError as e:
        raise ValueError(f"{name}: not JSON ({e}): {line[:60]!r}") from e
    if not isinstance(record, dict) or not (record.get("deleted") or isinstance(record.get("text"), str)):
        raise ValueError(f'{name}: a record without "text": run data.py extract on it first: {line[:60]!r}')
    return record


def count_blocks(blocks):
    """Counter of pre-tokens. Text is cut at spaces first, which is cheap; GPT-2's pattern, which is not,
    then runs once on each distinct chunk: "(myocardium)," occurs often and is cut once."""
    chunks, pieces = Counter(), Counter()

    def resolve():
        for chunk, count in chunks.items():
            for piece in LINE_PATTERN.findall(" " + chunk):
                pieces[piece] += count
        chunks.clear()

    for name, block in blocks:
        first, *rest = SPACE.split(block_text(name, block))
        pieces.update(LINE_PATTERN.findall(first))
        chunks.update(rest)
        if len(chunks) > CHUNKS_IN_MEMORY:
            resolve()
    resolve()
    return pieces


def count_worker(blocks, result):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer: it ends the team
    try:
        result.send(count_blocks(iter(blocks.get, None)))
    except ValueError as e:
        result.send(e)
        sys.exit(1)


def count_pretokens(inputs, workers=1, progress=False):
    """Counter of the pre-tokens in files or folders, the same for every number of worker processes. This
    process reads and unpacks, the workers count, and about two blocks a worker are in flight."""
    blocks = read_blocks(input_files(inputs), progress)
    if workers == 1:
        return count_blocks(blocks)
    waiting, team = multiprocessing.Queue(maxsize=2 * workers), []
    waiting.cancel_join_thread()  # after an error nobody reads the rest: don't wait for that at exit
    try:
        for _ in range(workers):
            receive, send = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.Process(target=count_worker, args=(waiting, send), daemon=True)
            process.start()
            send.close()  # the worker holds the only writing end: should it die, recv raises EOFError
            team.append((process, receive))
        for block in itertools.chain(blocks, [None] * workers):
            put_block(waiting, block, team)
        counts = Counter()
        for _, receive in team:
            counts.update(receive_counts(receive))
    finally:
        for process, _ in team:
            process.terminate()
    return counts


def put_block(waiting, block, team):
    while True:
        try:
            return waiting.put(block, timeout=1)
        except queue.Full:
            for process, receive in team:
                if process.exitcode:  # non-zero: refused its block, or killed
                    receive_counts(receive)


def receive_counts(receive):
    try:
        result = receive.recv()
    except EOFError as e:
        raise OSError("a counting process was killed (memory?): use fewer --workers") from e
    if isinstance(result, ValueError):
        raise result
    return result


# ---------------------------------------------------------------------------------------------
# merging


def train_bpe(counts, vocab_size, min_frequency=2, progress=False):
    """Merges [("t", "h"), ("Ġ", "th"), ...] in byte characters from {pre-token: count}: vocab_size - 257 of
    them (256 bytes, end-of-text), fewer when no pair is left with min_frequency.

    HF's rule: the pair with the highest count wins, a tie goes to the smaller (id, id); it is merged from
    left to right. A word is a str whose characters are its symbols, chr(id): then str.split finds a pair,
    str.join writes its merge, and pairs, as two-character strs, sort as (id, id) does.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size {vocab_size} is below 257 (256 bytes and end-of-text): use more")
    words = [piece.encode().translate(BYTE_ID).decode("latin-1") for piece in counts]
    freqs = list(counts.values())
    where = defaultdict(list)  # pair -> indices of its words, once per occurrence; some may be outdated
    for i, word in enumerate(words):
        for pair in map(str.__add__, word, word[1:]):
            where[pair].append(i)
    pair_counts = {pair: sum(map(freqs.__getitem__, indices)) for pair, indices in where.items()}
    heap = [(-count, pair) for pair, count in pair_counts.items() if count >= min_frequency]
    heapq.heapify(heap)
    tokens, merges = list(ALPHABET), []
    bar = tqdm(total=vocab_size - 257, desc="merging", unit="merge", disable=not progress)
    while heap and len(merges) < vocab_size - 257:
        count, pair = heapq.heappop(heap)
        now = pair_counts[pair]
        if now != -count:  # a pair's count only falls, so the heap corrects itself lazily
            if now >= min_frequency:
                heapq.heappush(heap, (-now, pair))
            continue
        merges.append((tokens[ord(pair[0])], tokens[ord(pair[1])]))
        del pair_counts[pair]
        merged = chr(len(tokens))
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        for new, old, indices in merge_pair(pair, merged, words, where.pop(pair)):
            count = sum(map(freqs.__getitem__, indices))
            if old in pair_counts:
                pair_counts[old] -= count
            if count >= min_frequency:  # it can only fall: a rarer pair is never needed again
                pair_counts[new], where[new] = count, indices
                heapq.heappush(heap, (-count, new))
        bar.update()
    bar.close()
    return merges


def merge_pair(pair, merged, words, indices):
    """Merge in the words at indices, in place; yields (new pair, old pair it replaces, indices of words,
    once per occurrence). E.g. "h"+"e" in "then": "tX" replaces "th", "Xn" replaces "en"."""
    lefts, rights, doubles = defaultdict(list), defaultdict(list), []
    for i in indices:
        parts = words[i].split(pair)
        if len(parts) == 1:
            continue  # merged at its first occurrence, or taken apart by an earlier merge
        words[i] = merged.join(parts)
        before = parts[0]
        for j in range(1, len(parts)):
            after = parts[j]
            if before:
                lefts[before[-1]].append(i)
            elif j > 1:
                doubles.append(i)  # two merges side by side, "hehe" -> "XX"
            if after:
                rights[after[0]].append(i)
            before = after
    for char, found in lefts.items():
        yield char + merged, char + pair[0], found
    for char, found in rights.items():
        yield merged + char, pair[1] + char, found
    if doubles:
        yield merged + merged, pair[1] + pair[0], doubles


# ---------------------------------------------------------------------------------------------
# what tiktoken may merge


def usable_ranks(vocab, merges):
    """tiktoken's {bytes: rank} that gives HF's tokens, and the set of all that merges make.

    tiktoken joins any two neighbours whose bytes together are a token, HF only the pairs of merges.txt. In
    trained merges this is the same: a token's bytes, wherever no merge crosses their ends, go through the same
    merges, so that they always arrive at the same pair. In hand-made files a token may have no way to come
    about ("a b", "b c", "a bc": "abc" is stopped at "ab" + "c"); HF never gives it, so tiktoken must not know it.
    """
    missing = sum(char not in vocab for char in ALPHABET)
    if missing:
        raise ValueError(f"the vocabulary lacks {missing} of the 256 byte characters: not byte-level BPE")
    rank_of = {pair: rank for rank, pair in enumerate(merges)}
    ranks = {bytes([CHAR_BYTE[ord(char)]]): rank for rank, char in enumerate(ALPHABET)}
    tree = {char: (None, None, -1) for char in ALPHABET}  # token -> its two parts and its rank
    known = set(ALPHABET)
    for rank, (a, b) in enumerate(merges):
        if a not in known or b not in known or rank_of[a, b] != rank or a + b not in vocab:
            raise ValueError(f"merge {rank + 1}, {a!r} {b!r}, repeats one, or uses or makes a token that is not "
                             "there: merges and vocabulary don't fit; copy both files again")
        known.add(a + b)
        if a in tree and b in tree and a + b not in tree and not crossed(a, b, rank, rank_of, tree):
            tree[a + b] = a, b, rank
            ranks[token_bytes(a + b)] = 256 + rank
    return ranks, known


def crossed(a, b, rank, rank_of, tree):
    """Whether a merge before `rank` joins the end of a with the beginning of b while they are being built."""

    def edge(token, side):  # the pieces at the border, from a byte up to the token itself, and their ends
        found = [(token, rank)]
        while tree[token][2] >= 0:
            found.append((tree[token][side], tree[token][2]))
            token = tree[token][side]
        return found[::-1]

    left, right = edge(a, 1), edge(b, 0)
    i = j = 0
    while i < len(left) and j < len(right):
        (x, x_ends), (y, y_ends) = left[i], right[j]
        joined = rank_of.get((x, y), rank)
        if joined < x_ends and joined <= y_ends and joined < rank:
            return True  # of two equal merges that overlap, the left one is made: hence <, then <=
        i, j = i + (x_ends <= y_ends), j + (y_ends <= x_ends)
    return False


# ---------------------------------------------------------------------------------------------
# the tokenizer

LONG_TEXT = 100_000  # tiktoken 0.14 panics where \s+(?!\S) must back out of a run near a million


class Tokenizer:
    """Byte-level BPE over tiktoken. vocab: {token in byte characters, or special string: id}; merges: pairs
    in order; added: {special string: id} beyond vocab. ValueError where they do not fit each other."""

    def __init__(self, vocab, merges, added=None):
        self.vocab, self.merges, self.added = vocab, merges, {}
        ranks, made = usable_ranks(vocab, merges)
        self.special = {t: i for t, i in vocab.items() if t not in made}
        lost = [t for t in self.special if not re.fullmatch(r"<.*>|\[.*\]", t) and t not in (added or {})]
        if lost:
            raise ValueError(f"no merge makes {lost[0]!r} ({len(lost)} such tokens): the merges are cut short "
                             "or belong to another vocabulary; copy both files again")
        self._bytes = {i: token_bytes(t) for t, i in vocab.items() if t in made}
        self._bytes |= {i: t.encode() for t, i in self.special.items()}
        if len(self._bytes) != len(vocab):
            raise ValueError("two tokens of the vocabulary share an id: copy the file again")
        for text, i in sorted((added or {}).items(), key=lambda item: item[1]):
            self._add(text, i)
        if END_OF_TEXT not in self.special:
            raise ValueError(f"the vocabulary has no {END_OF_TEXT}: not a GPT-2 or BioMedLM tokenizer")
        self.eot_id = self.special[END_OF_TEXT]
        ids = [vocab[t] for t in ALPHABET] + [vocab[a + b] for a, b in merges]
        self._ids = None if ids == list(range(len(ids))) else ids  # tiktoken's ranks -> ids; None: equal
        self._ranks = ranks
        self._bpe = tiktoken.Encoding("bpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        self._one_piece = None

    @classmethod
    def from_merges(cls, merges):
        """The vocabulary that merges learned by train_bpe make, end-of-text last."""
        tokens = [*ALPHABET, *(a + b for a, b in merges), END_OF_TEXT]
        return cls({token: i for i, token in enumerate(tokens)}, merges)

    @property
    def vocab_size(self):
        """The highest id + 1, added special tokens included."""
        return max(self._bytes) + 1

    def _add(self, text, i):
        if text not in self.special:
            if i in self._bytes or text in self.vocab:
                raise ValueError(f"special token {text!r} (id {i}) is in the vocabulary already")
            self._bytes[i] = text.encode()
            self.special[text] = self.added[text] = i
        return self.special[text]

    def add_special_tokens(self, texts):
        """Ids of special strings; those not there yet get the ids from vocab_size up."""
        return [self._add(text, self.vocab_size) for text in texts]

    def encode(self, text, allow_special=False):
        """Ids (list of int) of text. Special strings in it are plain text unless allow_special."""
        if not allow_special:
            return self.encode_batch([text], num_threads=1)[0]
        longest_first = sorted(self.special, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        plain = self.encode_batch(parts[::2], num_threads=1)  # re.split: plain, special, plain, ...
        ids = plain[0]
        for special, more in zip(parts[1::2], plain[1:]):
            ids += [self.special[special], *more]
        return ids

    def encode_batch(self, texts, num_threads=None):
        """Ids of each text, on num_threads threads (None: all cores)."""
        work = self._encode_long if any(len(t) > LONG_TEXT for t in texts) else self._bpe.encode_ordinary
        threads = num_threads or os.cpu_count()
        if threads == 1 or len(texts) == 1:
            ranks = [work(text) for text in texts]
        else:
            with ThreadPoolExecutor(threads) as pool:
                ranks = list(pool.map(work, texts))
        return ranks if self._ids is None else [[self._ids[r] for r in row] for row in ranks]

    def _encode_long(self, text):
        """As HF cuts it, a run of white space before a word is one piece but for its last character; such a
        piece is encoded apart when it is very long."""
        if self._one_piece is None:
            self._one_piece = tiktoken.Encoding("one piece", pat_str=r"(?s).+", mergeable_ranks=self._ranks,
                                                special_tokens={})
        ranks, start = [], 0
        for run in re.finditer(r"\s{%d,}" % LONG_TEXT, text):
            end = run.end() - (run.end() < len(text))
            ranks += self._bpe.encode_ordinary(text[start:run.start()])
            ranks += self._one_piece.encode_ordinary(text[run.start():end])
            start = end
        return ranks + self._bpe.encode_ordinary(text[start:])

    def decode_bytes(self, ids):
        try:
            return b"".join([self._bytes[i] for i in ids])
        except KeyError as e:
            raise ValueError(f"id {e} is not one of the vocabulary's {self.vocab_size:,}: the ids come from "
                             "another tokenizer") from None

    def decode(self, ids):
        """Text of ids (ints); bytes that are not UTF-8, as of a character cut in two, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def files(self):
        """{file name: content} as saved, and as HF saves them."""
        by_id = dict(sorted(self.vocab.items(), key=lambda item: item[1]))
        files = {"vocab.json": json.dumps(by_id, ensure_ascii=False, separators=(",", ":")),
                 "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in self.merges)}
        if self.added:
            files["added_tokens.json"] = json.dumps(self.added, ensure_ascii=False, indent=1)
        return {name: content.encode() for name, content in files.items()}

    @property
    def fingerprint(self):
        """sha256 (hex) of vocab.json and merges.txt as saved; added tokens don't count."""
        files = self.files()
        return hashlib.sha256(files["vocab.json"] + files["merges.txt"]).hexdigest()

    def save(self, folder):
        """Write vocab.json, merges.txt (and added_tokens.json) to folder, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not self.added:
            (folder / "added_tokens.json").unlink(missing_ok=True)
        for name, content in self.files().items():
            part = folder / f"{name}.part"
            try:
                with open(part, "wb") as f:
                    f.write(content)
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(part, folder / name)
            finally:
                part.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder):
        """From a folder with vocab.json + merges.txt, GPT-2's encoder.json + vocab.bpe, or tokenizer.json."""
        folder = Path(folder)
        for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
            if (folder / vocab).is_file():
                added = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
                return from_files(cls, folder / vocab, folder / merges, added)
        if (folder / "tokenizer.json").is_file():
            return from_tokenizer_json(cls, folder / "tokenizer.json")
        raise FileNotFoundError(f"{folder} has no vocab.json + merges.txt: make them with python tokenizer.py "
                                f"train --input TEXT --vocab_size 28896 --out {folder}")


# ---------------------------------------------------------------------------------------------
# Hugging Face's and GPT-2's files


def read_json(path):
    try:
        return json.loads(path.read_bytes())
    except ValueError as e:
        raise ValueError(f"{path} is not JSON, perhaps cut short ({e}): copy it again") from e


def from_files(cls, vocab_path, merges_path, added):
    merges = []
    for number, line in enumerate(merges_path.read_bytes().decode("utf-8", "replace").split("\n"), 1):
        if line and not line.startswith("#version"):  # "\n" alone ends a line: splitlines knows ten more
            pair = tuple(line.removesuffix("\r").split(" "))
            if len(pair) != 2 or not all(pair):
                raise ValueError(f"{merges_path}, line {number}: {line!r} is not two tokens: copy it again")
            merges.append(pair)
    try:
        return cls(read_json(vocab_path), merges, added)
    except ValueError as e:
        raise ValueError(f"{vocab_path}, {merges_path.name}: {e}") from e


def from_tokenizer_json(cls, path):
    top = read_json(path)
    model, pre = top.get("model", {}), top.get("pre_tokenizer") or {}
    plain = pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space") and pre.get("use_regex", True)
    if model.get("type") != "BPE" or not plain or top.get("normalizer") or model.get("ignore_merges"):
        raise ValueError(f"{path} is not GPT-2's kind: BPE, ByteLevel without prefix space, no normalizer")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return cls(model["vocab"], merges, {t["content"]: t["id"] for t in top.get("added_tokens", [])})


def load_other(name):
    """A tokenizer to compare with: a folder, or "gpt2" by the files that tiktoken caches."""
    if name != "gpt2":
        return Tokenizer.load(name)
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or Path(tempfile.gettempdir()) / "data-gym-cache")
    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    paths = [cache / hashlib.sha1((base + f).encode()).hexdigest() for f in ("encoder.json", "vocab.bpe")]
    if not all(path.is_file() for path in paths):
        raise FileNotFoundError(f"GPT-2's files are not in {cache}: point TIKTOKEN_CACHE_DIR to tiktoken's cache, "
                                "or give --against a folder with encoder.json and vocab.bpe")
    return from_files(Tokenizer, *paths, {})


# ---------------------------------------------------------------------------------------------
# the command line


def show(tokenizer, text, name, colour):
    """Print the pieces of text and their ids; on a terminal the pieces are coloured in turns."""
    ids = tokenizer.encode(text)
    print(f"{name}: {len(ids)} tokens, {len(text.encode()) / max(1, len(ids)):.2f} bytes a token")
    pieces = [tokenizer.decode_bytes([i]).decode("utf-8", "backslashreplace") for i in ids]
    if colour:
        print("".join(f"\033[30;{(42, 43, 45, 46)[n % 4]}m{p}\033[0m" for n, p in enumerate(pieces)))
    else:
        print("|".join(pieces))
    print(" ".join(map(str, ids)))


def train(args):
    counts = count_pretokens(args.input, args.workers or os.cpu_count(), progress=True)
    if not counts:
        raise ValueError("the input holds no text: give --input a folder with documents")
    merges = train_bpe(counts, args.vocab_size, args.min_frequency, progress=True)
    tokenizer = Tokenizer.from_merges(merges)
    tokenizer.save(args.out)
    if tokenizer.vocab_size < args.vocab_size:
        print(f"no pair is left that occurs {args.min_frequency} times: the vocabulary ends at "
              f"{tokenizer.vocab_size:,} of {args.vocab_size:,}; more text gives more")
    print(f"{args.out}: {tokenizer.vocab_size:,} tokens = 256 bytes + {len(merges):,} merges + {END_OF_TEXT} "
          f"(id {tokenizer.eot_id})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("train", help="learn a vocabulary from text")
    sub.add_argument("--input", nargs="+", required=True, metavar="PATH",
                     help="folders or files of text: .jsonl or .txt, plain or .gz (required)")
    sub.add_argument("--vocab_size", type=int, default=28896,
                     help="tokens, the 256 bytes and end-of-text included (default: 28896, BioMedLM's)")
    sub.add_argument("--min_frequency", type=int, default=2,
                     help="merge no pair that occurs fewer times (default: 2)")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder for vocab.json, merges.txt (required)")
    sub.add_argument("--workers", type=int, help="counting processes (default: all cores)")
    sub = commands.add_parser("show", help="print the pieces and ids of a text")
    sub.add_argument("text", help="the text to cut")
    sub.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with a tokenizer (required)")
    sub.add_argument("--against", metavar="gpt2|DIR", help="a second tokenizer to compare (default: none)")
    args = parser.parse_args()
    if args.command == "train":
        return train(args)
    for name in filter(None, [args.tokenizer, args.against]):
        show(load_other(name), args.text, name, colour=sys.stdout.isatty())


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:  # a user's mistake: one line with its mend, no traceback
        sys.exit(f"tokenizer.py: error: {e}")
