"""Byte-level BPE as GPT-2 and BioMedLM have it: training, encoding, Hugging Face's files.

    python tokenizer.py train --input data/pubmed/text --vocab_size 28896 --out data/pubmed/tok

Reads text (.jsonl with a document {"id", "text"} a line, or .txt; plain or .gz; files or folders),
writes vocab.json + merges.txt, to the last line those of Hugging Face's BpeTrainer. Encodes through
tiktoken. Bytes that are no UTF-8, and half surrogate pairs, are read as U+FFFD. Left out:
normalisers, prefix spaces, dropout, and special tokens in plain text (only when asked for).
"""

import argparse
import gzip
import hashlib
import heapq
import json
import os
import re
import signal
import sys
import tempfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache
from operator import add
from pathlib import Path

import regex
import tiktoken
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# the byte alphabet and GPT-2's pattern

END_OF_TEXT = "<|endoftext|>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same for many lines, each cut as if it stood alone with its "\n": so HF's trainer reads.
LINE_PATTERN = regex.compile(PATTERN.replace(r"\s+(?!\S)|\s+", r"[^\S\n]*\n|[^\S\n]+(?!\S)|\s"))
# The same pieces, long white space in steps of 100: tiktoken 0.14 panics after a million steps.
SAFE_PATTERN = PATTERN.replace(r"\s+(?!\S)", r"(?:\s{100}(?=\s\s))*+\s+(?!\S)")

# GPT-2 writes a byte as a visible character: itself, or one of chr(256), ...; " " becomes "Ġ".
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = sorted(set(range(256)) - set(VISIBLE))
BYTE_CHAR = {byte: chr(byte) for byte in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
CHAR_BYTE = {ord(char): byte for byte, char in BYTE_CHAR.items()}
ALPHABET = sorted(BYTE_CHAR.values())  # the ids 0-255: "!" is 0, "Ġ" is 220
BYTE_ID = bytes(ALPHABET.index(BYTE_CHAR[byte]) for byte in range(256))  # for bytes.translate


def token_bytes(token):
    """From byte characters: "Ġcell" -> b" cell"."""
    return token.translate(CHAR_BYTE).encode("latin-1")


# ---------------------------------------------------------------------------------------------
# counting pre-tokens: streamed in bounded memory, over processes

BLOCK_BYTES = 1 << 22
SPACE = re.compile(r" (?=\S)")  # a space before anything visible always starts a pre-token


def input_files(inputs):
    """The files among inputs; of a folder, the text files directly in it, in name order."""
    files = []
    for path in map(Path, inputs):
        inside = path.iterdir() if path.is_dir() else [path]
        found = sorted(f for f in inside if re.search(r"\.(jsonl|txt)(\.gz)?$", f.name))
        if not found or not path.exists():
            raise FileNotFoundError(f"{path}: no .jsonl or .txt (.gz): run python data.py extract")
        files += found
    return files


def read_blocks(files, progress=False):
    """Yield (file name, bytes): whole lines, ended by "\\n" alone, about BLOCK_BYTES of them."""
    total, done = sum(path.stat().st_size for path in files), 0
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=not progress)
    for path in files:
        with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as stream:
            try:
                while lines := stream.readlines(BLOCK_BYTES):
                    bar.update(done + raw.tell() - bar.n)
                    yield path.name, b"".join(lines)
            except (EOFError, zlib.error, gzip.BadGzipFile) as e:
                raise ValueError(f"{path} is truncated or damaged ({e}): fetch it again") from e
        done += path.stat().st_size
    bar.close()


def block_text(name, block):
    """A block's text: as it is, or the documents in its JSON lines; a last line gets its "\\n"."""
    text, documents = block.decode("utf-8", "replace"), []
    if ".jsonl" not in name:
        return text.removesuffix("\n") + "\n"
    for line in filter(str.strip, text.split("\n")):
        try:
            record = json.loads(line)
            if not record.get("deleted"):
                documents.append(record["text"].removesuffix("\n") + "\n")
        except (ValueError, KeyError, AttributeError) as e:
            raise ValueError(f'{name}: {line[:60]!r} is no document {{"id", "text"}}: '
                             "python data.py extract makes them") from e
    # JSON can spell half a surrogate pair, which is no character: U+FFFD, as tiktoken has it.
    return "".join(documents).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@lru_cache(maxsize=1 << 18)
def cut_chunk(chunk):
    return LINE_PATTERN.findall(" " + chunk)


def count_block(named_block):
    """Counter of pre-tokens. Text is cut at spaces first, which is cheap; GPT-2's pattern, which is
    not, then runs once on each distinct chunk: "(myocardium)," comes often and is cut once."""
    first, *chunks = SPACE.split(block_text(*named_block))
    counts = Counter(LINE_PATTERN.findall(first))
    for chunk, count in Counter(chunks).items():
        for piece in cut_chunk(chunk):
            counts[piece] += count
    return counts


def count_pretokens(inputs, workers=1, progress=False):
    """Counter of the pre-tokens in files or folders, the same for every number of processes. This
    process reads and unpacks, the workers count; about two blocks each are in memory."""
    counts, blocks, running = Counter(), read_blocks(input_files(inputs), progress), deque()
    if workers == 1:
        for block in blocks:
            counts.update(count_block(block))
        return counts
    no_ctrl_c = (signal.SIGINT, signal.SIG_IGN)  # the parent answers it
    try:
        with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=no_ctrl_c) as pool:
            for block in blocks:
                running.append(pool.submit(count_block, block))
                if len(running) > 2 * workers:
                    counts.update(running.popleft().result())
            for future in running:
                counts.update(future.result())
    except BrokenExecutor as e:
        raise OSError("a counting process was killed (memory?): use fewer --workers") from e
    return counts


# ---------------------------------------------------------------------------------------------
# merging


def train_bpe(counts, vocab_size, min_frequency=2, progress=False):
    """Merges [("t", "h"), ("Ġ", "th"), ...] in byte characters from {pre-token: count}: vocab_size
    - 257 of them (256 bytes, end-of-text), fewer when no pair is left with min_frequency.

    HF's rule: the pair with the highest count wins, a tie goes to the smaller (id, id); it is
    merged left to right. A word is a str with a character chr(id) for each symbol: str.split finds
    a pair, str.join writes its merge, and pairs, two-character strs, sort as (id, id) does.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size {vocab_size} is below 257 (256 bytes, end-of-text): use more")
    if min_frequency < 1:
        raise ValueError(f"min_frequency {min_frequency} is below 1: BioMedLM's is 2")
    words = [piece.encode().translate(BYTE_ID).decode("latin-1") for piece in counts]
    freqs = list(counts.values())
    where = defaultdict(list)  # pair -> indices of words, one per occurrence, maybe outdated
    for i, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            where[pair].append(i)
    pair_counts = {pair: sum(map(freqs.__getitem__, found)) for pair, found in where.items()}
    heap = [(-count, pair) for pair, count in pair_counts.items() if count >= min_frequency]
    heapq.heapify(heap)
    tokens, merges = list(ALPHABET), []
    bar = tqdm(total=vocab_size - 257, desc="merging", unit="merge", disable=not progress)
    while heap and len(merges) < vocab_size - 257:
        count, pair = heapq.heappop(heap)
        now = pair_counts[pair]
        if now != -count:  # counts only fall: an outdated entry goes back with its true count
            if now >= min_frequency:
                heapq.heappush(heap, (-now, pair))
            continue
        del pair_counts[pair]
        merges.append((tokens[ord(pair[0])], tokens[ord(pair[1])]))
        merged = chr(len(tokens))
        tokens.append("".join(merges[-1]))
        for new, old, found in merge_pair(pair, merged, words, where.pop(pair)):
            count = sum(map(freqs.__getitem__, found))
            if old in pair_counts:
                pair_counts[old] -= count
            if count >= min_frequency:  # a rarer pair can only get rarer: forget it
                pair_counts[new], where[new] = count, found
                heapq.heappush(heap, (-count, new))
        bar.update()
    bar.close()
    return merges


def merge_pair(pair, merged, words, indices):
    """Merge pair in words[i] for i in indices. Yields (new pair, old pair it replaces, indices of
    words, one per occurrence): merging "he" to "X" in "then", "tX" for "th" and "Xn" for "en"."""
    lefts, rights, doubles = defaultdict(list), defaultdict(list), []
    for i in indices:
        before, *others = parts = words[i].split(pair)
        if not others:
            continue  # done at the word's first occurrence, or taken apart by an earlier merge
        words[i] = merged.join(parts)
        doubles += [i] * parts[1:-1].count("")  # two side by side: "hehe" -> "XX"
        for after in others:
            if before:
                lefts[before[-1]].append(i)
            if after:
                rights[after[0]].append(i)
            before = after
    yield merged + merged, pair[1] + pair[0], doubles
    for char, found in lefts.items():
        yield char + merged, char + pair[0], found
    for char, found in rights.items():
        yield merged + char, pair[1] + char, found


# ---------------------------------------------------------------------------------------------
# the tokenizer


def usable_ranks(vocab, merges):
    """tiktoken's {bytes: rank} that gives HF's tokens, and the set of all tokens that merges make.

    tiktoken joins any neighbours whose bytes together are a token, HF only the pairs of merges.txt.
    In trained merges this is the same: wherever no merge crosses the ends of a token's bytes, they
    go through the same merges and arrive at the same pair. In other files a token may be out of
    reach ("a b", "b c", "a bc": "abc" stops at "ab" + "c"): HF never gives it, so it gets no rank.
    """
    symbol = {token: chr(i) for i, token in enumerate(vocab)}
    rules, made = {}, set(ALPHABET)  # pair of symbols -> (rank, pair, the symbol it becomes)
    for rank, parts in enumerate(merges, len(ALPHABET)):
        pair, token = "".join([symbol.get(part, "") for part in parts]), "".join(parts)
        if len(parts) != 2 or not made.issuperset(parts) or token not in vocab or pair in rules:
            raise ValueError(f"merge {rank - 255}, {' '.join(parts)!r}, is no pair, is there twice "
                             "or holds an unknown token: copy the vocabulary and the merges again")
        rules[pair] = rank, pair, symbol[token]
        made.add(token)
    ranks = {token_bytes(char): rank for rank, char in enumerate(ALPHABET)}
    for rank, token in enumerate(map("".join, merges), len(ALPHABET)):
        word = "".join([symbol[char] for char in token])
        while found := [rules[pair] for pair in map(add, word, word[1:]) if pair in rules]:
            last, pair, merged = min(found)
            word = word.replace(pair, merged)
        if len(word) == 1 and last == rank:  # of several pairs that spell a token, one is reached
            ranks[token_bytes(token)] = rank
    return ranks, made


class Tokenizer:
    """vocab: {token in byte characters, or special string: id}; merges: pairs in order; added:
    {special string: id} beyond vocab. ValueError where these do not fit each other."""

    def __init__(self, vocab, merges, added=()):
        if not vocab.keys() >= set(ALPHABET):
            raise ValueError("the vocabulary lacks some of the 256 bytes: not byte-level BPE")
        ranks, made = usable_ranks(vocab, merges)
        self._bpe = tiktoken.Encoding("bpe", pat_str=SAFE_PATTERN, mergeable_ranks=ranks,
                                      special_tokens={})
        ids = [vocab[token] for token in (*ALPHABET, *map("".join, merges))]
        self._id_of_rank = None if ids == list(range(len(ids))) else ids  # None: they are the same
        self.vocab, self.merges = vocab, merges
        self.special = {token: i for token, i in vocab.items() if token not in made} | dict(added)
        for token in self.special:
            if not re.fullmatch(r"<.*>|\[.*\]", token) and token not in added:
                raise ValueError(f"no merge makes {token!r}: the merges are cut short, copy them")
        if END_OF_TEXT not in self.special:
            raise ValueError(f"there is no {END_OF_TEXT}: not GPT-2's or BioMedLM's kind")
        self.eot_id = self.special[END_OF_TEXT]
        self._bytes = {vocab[token]: token_bytes(token) for token in made}
        self._bytes |= {i: token.encode() for token, i in self.special.items()}
        if len(self._bytes) < len(made) + len(self.special):
            raise ValueError("two tokens share an id: copy the vocabulary again")

    @classmethod
    def from_merges(cls, merges):
        """The vocabulary of merges learned by train_bpe, end-of-text last."""
        tokens = [*ALPHABET, *map("".join, merges), END_OF_TEXT]
        return cls({token: i for i, token in enumerate(tokens)}, merges)

    @property
    def vocab_size(self):
        """The highest id + 1, added special tokens included."""
        return max(self._bytes) + 1

    def add_special_tokens(self, tokens):
        """Ids of special strings; those that are new get the ids from vocab_size up."""
        for token in tokens:
            if token not in self.special:
                self.special[token] = self.vocab_size
                self._bytes[self.vocab_size] = token.encode()
        return [self.special[token] for token in tokens]

    def encode(self, text, allow_special=False):
        """Ids (list of int) of text. Special strings in it are plain text unless allow_special."""
        if not allow_special:
            return self._encode(text)
        longest_first = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        ids = []
        for n, part in enumerate(re.split(f"({longest_first})", text)):  # plain, special, ...
            ids += [self.special[part]] if n % 2 else self._encode(part)
        return ids

    def encode_batch(self, texts, num_threads=None):
        """Ids of each text, on num_threads threads (None: all cores)."""
        with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
            return list(pool.map(self._encode, texts))

    def _encode(self, text):
        ranks = self._bpe.encode_ordinary(text)
        return [self._id_of_rank[rank] for rank in ranks] if self._id_of_rank else ranks

    def decode_bytes(self, ids):
        try:
            return b"".join([self._bytes[i] for i in ids])
        except KeyError as e:
            raise ValueError(f"id {e} is none of this vocabulary's {self.vocab_size:,}: the ids "
                             "come from another tokenizer") from None

    def decode(self, ids):
        """Text of ids (ints); bytes that are no UTF-8, as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def files(self):
        """{file name: bytes} as saved, byte for byte as HF saves them."""
        by_id = dict(sorted(self.vocab.items(), key=lambda item: item[1]))
        vocab = json.dumps(by_id, ensure_ascii=False, separators=(",", ":"))
        merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in self.merges)
        return {"vocab.json": vocab.encode(), "merges.txt": merges.encode()}

    @property
    def fingerprint(self):
        """sha256 (hex) over vocab.json and merges.txt as saved; added tokens don't count."""
        return hashlib.sha256(b"".join(self.files().values())).hexdigest()

    def save(self, folder):
        """Write vocab.json, merges.txt and, if tokens were added, added_tokens.json; each whole."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        files = self.files()
        if added := {token: i for token, i in self.special.items() if token not in self.vocab}:
            files["added_tokens.json"] = json.dumps(added).encode()
        for name, content in files.items():
            part = Path(folder, f"{name}.part")
            try:
                with open(part, "wb") as f:
                    f.write(content)
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(part, Path(folder, name))
            finally:
                part.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder):
        """From vocab.json + merges.txt, GPT-2's encoder.json + vocab.bpe, or a tokenizer.json."""
        folder = Path(folder)
        try:
            for vocab, merges in FILE_NAMES:
                if (folder / vocab).is_file():
                    return cls(*read_files(folder / vocab, folder / merges))
            if (folder / "tokenizer.json").is_file():
                return cls(*read_tokenizer_json(folder / "tokenizer.json"))
        except ValueError as e:
            raise ValueError(f"{folder}: {e}") from e
        raise FileNotFoundError(f"{folder} has no vocab.json + merges.txt: make them with python "
                                f"tokenizer.py train --input TEXT --out {folder}; for gpt2, set "
                                "TIKTOKEN_CACHE_DIR to the folder where tiktoken keeps its files")


# ---------------------------------------------------------------------------------------------
# Hugging Face's and GPT-2's files

FILE_NAMES = [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"),
              # GPT-2's in tiktoken's cache, which names a file by the sha1 of its address
              ("6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
               "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")]


def read_json(path):
    try:
        return json.loads(path.read_bytes())
    except ValueError as e:
        raise ValueError(f"{path.name} is not JSON, perhaps cut short ({e}): copy it again") from e


def read_files(vocab, merges):
    """Arguments of Tokenizer from a JSON of ids, a merge a line, and added_tokens.json if any."""
    lines = merges.read_text("utf-8", "replace").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    added = vocab.with_name("added_tokens.json")
    return read_json(vocab), pairs, read_json(added) if added.is_file() else {}


def read_tokenizer_json(path):
    top = read_json(path)
    model, pre = top.get("model", {}), top.get("pre_tokenizer") or {}
    plain = pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space")
    plain = plain and pre.get("use_regex", True) and not top.get("normalizer")
    if not plain or "merges" not in model:
        raise ValueError("tokenizer.json is not GPT-2's kind: BPE, ByteLevel, no prefix space, "
                         "normalizer")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return model["vocab"], merges, {t["content"]: t["id"] for t in top.get("added_tokens", [])}


def load_named(name):
    """A tokenizer's folder, or "gpt2" from the files that tiktoken caches."""
    if name == "gpt2":
        name = os.environ.get("TIKTOKEN_CACHE_DIR", f"{tempfile.gettempdir()}/data-gym-cache")
    return Tokenizer.load(name)


# ---------------------------------------------------------------------------------------------
# the command line


def show(name, text):
    """Print the pieces of text, coloured in turns on a terminal, and their ids."""
    tokenizer = load_named(name)
    ids = tokenizer.encode(text)
    pieces = [tokenizer.decode_bytes([i]).decode("utf-8", "backslashreplace") for i in ids]
    print(f"{name}: {len(ids)} tokens, {len(text.encode()) / max(1, len(ids)):.2f} bytes a token")
    if sys.stdout.isatty():
        print("".join(f"\033[30;{42 + n % 5}m{piece}\033[0m" for n, piece in enumerate(pieces)))
    else:
        print("|".join(pieces))
    print(*ids)


def train(args):
    counts = count_pretokens(args.input, args.workers or os.cpu_count(), progress=True)
    if not counts:
        raise ValueError("the input holds no text: give --input a folder with documents")
    tokenizer = Tokenizer.from_merges(train_bpe(counts, args.vocab_size, progress=True))
    tokenizer.save(args.out)
    if tokenizer.vocab_size < args.vocab_size:
        print(f"no pair is left that occurs twice: the vocabulary ends before {args.vocab_size:,}; "
              "more text would fill it")
    print(f"{args.out}: {tokenizer.vocab_size:,} tokens, {END_OF_TEXT} is {tokenizer.eot_id}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("train", help="learn a vocabulary from text")
    sub.add_argument("--input", nargs="+", required=True, metavar="PATH",
                     help="folders or files of text: .jsonl or .txt, plain or .gz (required)")
    sub.add_argument("--vocab_size", type=int, default=28896,
                     help="tokens, the 256 bytes and end-of-text included (default: 28896)")
    sub.add_argument("--out", required=True, help="folder for the files written (required)")
    sub.add_argument("--workers", type=int, help="counting processes (default: all cores)")
    sub = commands.add_parser("show", help="print the pieces and ids of a text")
    sub.add_argument("text", help="the text to cut")
    sub.add_argument("--tokenizer", required=True, help="folder of a tokenizer, or gpt2 (required)")
    sub.add_argument("--against", help="folder of a second one, or gpt2 (default: none)")
    args = parser.parse_args()
    if args.command == "train":
        return train(args)
    for name in filter(None, (args.tokenizer, args.against)):
        show(name, args.text)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:  # a user's mistake: one line with its mend, no traceback
        sys.exit(f"tokenizer.py: error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
