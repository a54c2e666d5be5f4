"""Raw sources -> text -> token arrays -> batches; and the question sets, as their owners publish them.

    python data.py extract pubmed/ --out text                              # XML, JATS, JSON lines, .txt
    python data.py tokenize --text text --tokenizer tokenizer --out data/pubmed

Reads what `download` fetches or what already lies on disk; writes text as *.jsonl.gz (a document a line,
{"id", "text"}) and arrays as train.bin, val.bin (flat uint16) with meta.json and the tokenizer beside them.
Every output depends on its inputs and flags alone: no time, path, host or worker count.
Left out: language detection, near-duplicates, tables of references.
"""

import argparse
import csv
import gzip
import hashlib
import html
import json
import math
import os
import random
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------
# files and documents


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


def hash64(text):
    """64-bit hash of a str: ids and texts are settled on it (4e7 documents: 4e-5 risk of one clash)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def natural(path):
    """Sort key by which pubmed26n1275 follows pubmed26n999: the last record of an id wins."""
    parts = re.split(r"(\d+)", Path(path).name)
    return [int(p) if p.isdecimal() else p for p in parts], str(path)


def read_lines(path, limit=64 * 2**20):
    """(line number, text) of a UTF-8 file, plain or .gz, whose lines end at "\\n" only."""
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as f:
        number = 0
        while line := f.readline(limit + 1):
            number += 1
            if len(line) > limit:
                raise ValueError(f"{path}: line {number} is longer than {limit >> 20} MiB: not JSON lines")
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")


def read_records(path):
    """Records {"id", "text"} or {"id", "deleted"} of one text file; a .txt is one document."""
    if re.search(r"\.txt(\.gz)?$", str(path)):
        text = "".join(line for _, line in read_lines(path))
        yield {"id": f"{hash64(text):016x}", "text": text}
        return
    for number, line in read_lines(path):
        if line.strip():
            try:
                record = json.loads(line)
                assert isinstance(record["id"], str) and (record.get("deleted") or record["text"])
            except (ValueError, KeyError, TypeError, AssertionError):
                raise ValueError(f'{path}: line {number} is not {{"id": …, "text": …}}: run data.py '
                                 "extract on the raw files first") from None
            yield record


def text_files(paths):
    """The text files among `paths` and directly inside folders, in natural order of their names."""
    files = []
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: give a folder that data.py extract wrote")
        inside = [path] if path.is_file() else path.iterdir()
        files += [p for p in inside if re.search(r"\.(jsonl|txt)(\.gz)?$", p.name)]
    if not files:
        raise FileNotFoundError(f"{paths}: no *.jsonl.gz, .jsonl or .txt: run data.py extract first")
    return sorted(files, key=natural)


def read_documents(paths):
    """(id, text) of every document of text files or folders of them; deletions are left out."""
    for path in text_files(paths):
        for record in read_records(path):
            if not record.get("deleted"):
                yield record["id"], record["text"]


# ---------------------------------------------------------------------------------------------
# tokenize: text -> train.bin, val.bin, meta.json


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def tokenize(text, tokenizer_dir, out, val_fraction=0.002, eot=True, seed=17, workers=1):
    """SIMPLE VERSION, in memory: to be replaced."""
    out = Path(out)
    tokenizer = Tokenizer.load(tokenizer_dir)
    docs = {}
    for ident, body in read_documents(text):
        docs[ident] = body
    if len(docs) < 2:
        raise ValueError(f"{text} holds {len(docs)} documents: at least 2 are needed")
    order = sorted(docs, key=hash64)
    n_val = max(1, int(val_fraction * len(order)))
    splits = {"val": order[:n_val], "train": order[n_val:]}
    out.mkdir(parents=True, exist_ok=True)
    meta = dict(dtype="uint16", vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id, eot=eot,
                seed=seed, tokenizer_sha256=tokenizer.fingerprint)
    for split, ids in splits.items():
        tokens, n_bytes = [], 0
        for ident in sorted(ids, key=lambda i: hash64(f"{seed} {i}")):
            tokens += tokenizer.encode(docs[ident]) + [tokenizer.eot_id] * eot
            n_bytes += len(docs[ident].encode())
        with replacing(out / f"{split}.bin") as f:
            f.write(np.array(tokens, np.uint16).tobytes())
        meta[split] = dict(tokens=len(tokens), documents=len(ids), bytes=n_bytes,
                           sha256=sha256_file(out / f"{split}.bin"))
    tokenizer.save(out)
    with replacing(out / "meta.json") as f:
        f.write(json.dumps(meta, indent=1).encode())
    return meta


# ---------------------------------------------------------------------------------------------
# batches: the order of rows is a pure function of (seed, epoch, global sample index)


def load_meta(data_dir, verify=False):
    """meta.json of `data_dir`, checked against the files beside it.

    Always: presence, sizes, the tokenizer's fingerprint. verify=True: every array's sha256 and that every
    id is below vocab_size (reads it all). Raises FileNotFoundError or ValueError with the mend.
    """
    folder = Path(data_dir)
    again = f"run: python data.py tokenize --text DIR --tokenizer DIR --out {data_dir}"
    for name in ("meta.json", "train.bin", "val.bin", "vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; {again}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        counts = {split: meta[split]["tokens"] for split in ("train", "val")}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'meta.json'} is damaged; {again}") from None
    for split, tokens in counts.items():
        path = folder / f"{split}.bin"
        if path.stat().st_size != 2 * tokens:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes where meta.json says "
                             f"{2 * tokens:,}: it was cut or replaced; {again}")
        if verify and sha256_file(path) != meta[split]["sha256"]:
            raise ValueError(f"{path} is not the array meta.json describes (sha256 differs); {again}")
        if verify and (top := max_id(path, tokens)) >= meta["vocab_size"]:
            raise ValueError(f"{path} holds id {top}, beyond the vocabulary of {meta['vocab_size']}; {again}")
    if Tokenizer.load(folder).fingerprint != meta["tokenizer_sha256"]:
        raise ValueError(f"the tokenizer in {folder} is not the one that made the arrays; {again}")
    return meta


def max_id(path, tokens, step=2**25):
    return max(int(np.memmap(path, np.uint16, "r")[i : i + step].max()) for i in range(0, tokens, step))


def permute(index, n, seed, epoch):
    """Row numbers of positions `index` (int64 array, each in [0, n)) in the epoch's order: a bijection of [0, n).

    A Feistel network of six rounds shuffles the smallest even-bit square that holds n; a result beyond n is
    shuffled again until it falls inside (cycle walking, under four times on average). So the order of any
    epoch costs no memory and any position is found at once, whatever n is.
    """
    half = max(1, math.ceil(math.log2(max(n, 2)) / 2))
    mask = np.uint64((1 << half) - 1)
    keys = [hash64(f"{seed} {epoch} {r}") for r in range(6)]
    out = np.asarray(index, np.uint64).copy()
    todo = np.ones(out.shape, bool)
    while todo.any():
        left, right = out[todo] >> np.uint64(half), out[todo] & mask
        for key in keys:
            left, right = right, left ^ (mix64(right + np.uint64(key)) & mask)
        out[todo] = (left << np.uint64(half)) | right
        todo = out >= n
    return out.astype(np.int64)


def mix64(x):
    """splitmix64's finaliser on a uint64 array: a bijection in which every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def read_rows(path, rows, seq_len, eot_id=None):
    """(x, y) int64 (len(rows), seq_len): y is x shifted by one, its last target -100, as in the paper.

    Row -1, and what lies beyond the array's end, is padding: targets -100. eot_id: such targets are -100 too.
    """
    # Opened anew each time: the pages a long-lived memmap has touched count as resident memory.
    array = np.memmap(path, np.uint16, "r")
    x = np.zeros((len(rows), seq_len), np.int64)
    y = np.full((len(rows), seq_len), -100, np.int64)
    for i, row in enumerate(rows):
        if row >= 0:
            tokens = array[row * seq_len : (row + 1) * seq_len]
            x[i, : len(tokens)] = tokens
            y[i, : len(tokens) - 1] = tokens[1:]
    if eot_id is not None:
        y[y == eot_id] = -100
    return torch.from_numpy(x), torch.from_numpy(y)


def to_device(batch, device):
    if torch.device(device).type != "cuda":
        return batch
    return tuple(t.pin_memory().to(device, non_blocking=True) for t in batch)


def train_batches(data_dir, seq_len, micro_batch, seed, start=0, rank=0, world_size=1, device="cpu",
                  ignore_eot=False):
    """Endless (x, y) int64 (micro_batch, seq_len) on `device`, the next one already on its way there.

    Micro step k of a rank takes the global samples start + k*world_size*micro_batch + rank*micro_batch + [0,
    micro_batch). Global sample i is row permute(i % n_rows) of epoch i // n_rows. `start` counts sequences
    and is the whole state: k steps further, a new loader with start + k*world_size*micro_batch goes on.
    """
    meta = load_meta(data_dir)
    path, n_rows = Path(data_dir) / "train.bin", meta["train"]["tokens"] // seq_len
    if n_rows == 0:
        raise ValueError(f"{path} has {meta['train']['tokens']} tokens, less than one sequence: use "
                         f"--seq_len {max(2, meta['train']['tokens'])} or less, or more text")
    eot_id = meta["eot_id"] if ignore_eot else None

    def batches():
        first, ahead = start + rank * micro_batch, None
        while True:
            samples = np.arange(first, first + micro_batch)
            rows = np.concatenate([permute(samples[samples // n_rows == e] % n_rows, n_rows, seed, int(e))
                                   for e in np.unique(samples // n_rows)])
            batch = to_device(read_rows(path, rows, seq_len, eot_id), device)
            if ahead is not None:
                yield ahead
            ahead, first = batch, first + world_size * micro_batch

    return batches()


def val_batches(data_dir, seq_len, micro_batch, rank=0, world_size=1, max_tokens=None, device="cpu",
                ignore_eot=False):
    """Finite (x, y) like train_batches, rows in file order dealt round-robin to the ranks.

    The short last row is padded with targets -100. Every rank yields the same number of full batches (a sharded
    model's forward is collective); where rows run out, whole rows are padding. max_tokens: the first rows only.
    """
    meta = load_meta(data_dir)
    n_rows = math.ceil(min(meta["val"]["tokens"], max_tokens or math.inf) / seq_len)
    eot_id = meta["eot_id"] if ignore_eot else None

    def batches():
        for first in range(0, n_rows, world_size * micro_batch):
            rows = first + rank + world_size * np.arange(micro_batch)
            rows = np.where(rows < n_rows, rows, -1)
            yield to_device(read_rows(Path(data_dir) / "val.bin", rows, seq_len, eot_id), device)

    return batches()


# ---------------------------------------------------------------------------------------------
# questions: every task's official files -> one dataclass


@dataclass(frozen=True)
class Question:
    """One item of a question set, whatever its task."""

    id: str
    question: str
    context: str = ""
    options: tuple[str, ...] = ()
    answer: int | None = None  # index into options; None where the set gives no label
    target: str = ""  # the text to generate: long answer or summary
    subject: str = ""
    kind: str = ""


PUBMEDQA_LABELS, BIOASQ_LABELS = ("maybe", "no", "yes"), ("no", "yes")  # alphabetical, as the paper has them
MMLU_SUBJECTS = ("clinical_knowledge", "professional_medicine", "college_biology", "medical_genetics",
                 "anatomy", "college_medicine")  # the six of recipe: BioMedLM reports the first four


def load_qa(task, dir, split):
    """list[Question] of a task's official files, found by their names anywhere beneath `dir`, in official order.

    task: medqa, medmcqa, mmlu, pubmedqa, bioasq or text. Raises FileNotFoundError where the file is missing, ValueError
    for an unknown split, an HTML page in the data's place, an empty file, a repeated id, or a label outside the set.
    """
    readers = {"medqa": (load_medqa, "train dev test"), "pubmedqa": (load_pubmedqa, "train dev test")}
    if task not in readers:
        raise ValueError(f"unknown task {task!r}: use one of {', '.join(readers)}")
    reader, splits = readers[task]
    if split not in splits.split():
        raise ValueError(f"{task} has no split {split!r}: use one of {', '.join(splits.split())}")
    if not Path(dir).is_dir():
        raise FileNotFoundError(f"{dir} is not a folder: give the one that holds {task}'s official files")
    questions, seen = reader(Path(dir), split), set()
    if not questions:
        raise ValueError(f"{dir}: the {split} split of {task} is empty: download it again")
    for q in questions:
        if q.id in seen:
            raise ValueError(f"{dir}: id {q.id} appears twice in {task}'s {split} split: remove the copy")
        if not q.question.strip():
            raise ValueError(f"{dir}: question {q.id} of {task} is empty: remove it or download the file again")
        seen.add(q.id)
    return questions


def find_file(folder, *names):
    """The one file beneath `folder` with one of the names (fnmatch patterns)."""
    found = sorted({p for name in names for p in folder.rglob(name) if p.is_file()})
    if not found:
        raise FileNotFoundError(f"no {' or '.join(names)} beneath {folder}: put the official file there")
    if len(found) > 1:
        raise ValueError(f"{folder} holds several files where one is expected ({found[0]}, {found[1]}): "
                         "give the folder of one of them")
    return found[0]


def read_official(path):
    """Text of a published file; HTML entities resolved, a saved web page refused."""
    text = path.read_text(encoding="utf-8-sig")
    if re.match(r"\s*<(!doctype html|html)", text, re.IGNORECASE):
        raise ValueError(f"{path} is a web page, not the data: download the raw file")
    return text


def read_json(path, lines=False):
    """Parsed JSON, or with lines=True one object a line; repeated keys of one object are refused."""

    def unique(pairs):
        if len(pairs) != len(dict(pairs)):
            keys = [k for k, _ in pairs]
            twice = next(k for k in keys if keys.count(k) > 1)
            raise ValueError(f"key {twice} appears twice: remove the copy")
        return {k: html.unescape(v) if isinstance(v, str) else v for k, v in pairs}

    number, text = 1, read_official(path)
    try:
        if not lines:
            return json.loads(text, object_pairs_hook=unique)
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append(json.loads(line, object_pairs_hook=unique))
        return rows
    except ValueError as e:
        raise ValueError(f"{path}, line {number}: {e}: download the file again") from None


def index_of(label, labels, where):
    if label not in labels:
        raise ValueError(f"{where}: label {label!r} is none of {', '.join(map(str, labels))}")
    return labels.index(label)


def load_medqa(folder, split):
    path = find_file(folder, f"phrases_no_exclude_{split}.jsonl")
    questions = []
    for i, row in enumerate(read_json(path, lines=True)):
        letters = sorted(row["options"])
        questions.append(Question(
            f"{split}-{i}", row["question"], options=tuple(row["options"][k] for k in letters),
            answer=index_of(row["answer_idx"], letters, f"{path}, question {i}"), kind=row.get("meta_info", "")))
    return questions


def load_pubmedqa(folder, split):
    """The official split_dataset.py, all of it from one random.seed(0) stream (recipe: BioMedLM uses fold 0)."""
    path = find_file(folder, "ori_pqal.json")
    data, rng = read_json(path), random.Random(0)

    def cut(ids, k):
        groups = {label: [i for i in ids if data[i]["final_decision"] == label] for label in ("yes", "no", "maybe")}
        for group in groups.values():
            rng.shuffle(group)
        slices = [(g, math.ceil(len(g) / k)) for g in groups.values()]
        return [[i for g, n in slices for i in g[p * n : (p + 1) * n if p < k - 1 else None]] for p in range(k)]

    for ident, item in data.items():
        index_of(item.get("final_decision"), PUBMEDQA_LABELS, f"{path}, {ident}")
    cross, test = cut(data, 2)
    folds = cut(cross, 10)
    if len(folds[9]) != len(folds[0]):  # the last fold is short: every other one gives it an item
        for fold in folds[:9]:
            if fold:
                folds[9].append(fold.pop(fold.index(rng.choice(fold))))
    ids = {"test": test, "dev": folds[0], "train": sum(folds[1:], [])}[split]
    return [Question(i, data[i]["QUESTION"], context=" ".join(data[i]["CONTEXTS"]), options=PUBMEDQA_LABELS,
                     answer=PUBMEDQA_LABELS.index(data[i]["final_decision"]),
                     target=data[i].get("LONG_ANSWER", "")) for i in ids]


# ---------------------------------------------------------------------------------------------
# the command line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    acts = parser.add_subparsers(dest="act", required=True)
    p = acts.add_parser("tokenize", help="text and tokenizer -> train.bin, val.bin, meta.json")
    p.add_argument("--text", required=True, help="folder of *.jsonl.gz, .jsonl or .txt")
    p.add_argument("--tokenizer", required=True, help="folder of vocab.json and merges.txt")
    p.add_argument("--out", required=True, help="folder for the arrays")
    p.add_argument("--val_fraction", type=float, default=0.002, help="share of documents (default 0.002)")
    p.add_argument("--no_eot", action="store_true", help="no end-of-text after documents (default: written)")
    p.add_argument("--seed", type=int, default=17, help="of the document order (default 17, BioMedLM's)")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: CPU count)")
    args = parser.parse_args()
    if args.act == "tokenize":
        tokenize(args.text, args.tokenizer, args.out, args.val_fraction, not args.no_eot, args.seed, args.workers)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:  # a user's mistake: one line with its mend, no traceback
        sys.exit(f"data.py: error: {e}")
