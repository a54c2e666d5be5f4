"""Token arrays -> batches; text -> token arrays; question sets; a demo; and the raw sources.

    python data.py extract pubmed/ pmc/ --out text            # PubMed XML, JATS, JSON lines, .txt
    python data.py tokenize --text text --tokenizer tokenizer --out data/pubmed

Reads what `download` fetched or what lies on disk. Writes text (*.jsonl.gz, a line a document
{"id", "text"}) and arrays: train.bin, val.bin (flat uint16), meta.json, the tokenizer beside them.
An output depends on inputs and flags alone: no time, path, host or number of workers.
Left out: language detection, near-duplicates, back matter (references, appendices, peer reviews).
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the rest is imported ends it silently
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import csv
import gc
import gzip
import hashlib
import html.entities
import io
import itertools
import json
import math
import random
import re
import shutil
import tarfile
import time
import xml.etree.ElementTree as ET
import zlib
from array import array
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
import urllib3
from tqdm import tqdm

from tokenizer import (
    COUNT,
    MIB,
    Tokenizer,
    count_pretokens,
    hash64,
    in_processes,
    json_lines,
    load_named,
    natural,
    read_json,
    read_records,
    read_records_backwards,
    replacing,
    run_command,
    text_files,
    train_bpe,
)

# ---------------------------------------------------------------------------------------------
# batches: token arrays -> x, y
#
# An array is one long line of tokens, a document after the other. It is cut into rows of seq_len,
# wherever that falls (here 6; "|" is end-of-text, "||" the cut):
#
#     The drug relieves pain . | || Cells were grown in vi || tro . | We saw mice || ...
#
# A run reads samples 0, 1, 2, ... without end. Sample i is row permute(i % n_rows) of epoch
# i // n_rows, so the order is a pure function of (seed, i): the number of ranks and the size of
# micro-batches don't matter, and one integer says where a run stands.


SPLITS = ("train", "val")


def train_batches(data_dir, seq_len, micro_batch, seed, start=0, rank=0, world_size=1, device="cpu",
                  ignore_eot=False):
    """Endless (x, y), int64 (micro_batch, seq_len) on `device`, from train.bin.

    Every epoch visits each row once, in an order of its own. The ranks take turns at the samples,
    micro_batch at a time, from sample `start` on. To go on after k batches of each rank, start at
    start + k * world_size * micro_batch. ValueError where the array is shorter than a row.
    """
    meta = load_meta(data_dir)
    path = Path(data_dir) / "train.bin"
    n_rows = meta["train"]["tokens"] // seq_len
    if n_rows == 0:
        raise ValueError(f"{path} has {meta['train']['tokens']} tokens, less than one sequence: "
                         "use a smaller --seq_len, or more text")
    ignored = meta["eot_id"] if ignore_eot else -100
    with open(path, "rb") as array:  # stays what it is where new arrays replace it meanwhile
        for first in itertools.count(start + rank * micro_batch, world_size * micro_batch):
            samples = range(first, first + micro_batch)
            rows = [permute(sample % n_rows, n_rows, seed, sample // n_rows) for sample in samples]
            yield read_rows(array, rows, (micro_batch, seq_len), ignored, device)


def val_batches(data_dir, seq_len, micro_batch, rank=0, world_size=1, max_tokens=None, device="cpu",
                ignore_eot=False):
    """Finite (x, y) like train_batches: every row of val.bin once, the short last one too.

    The rows come in a fixed permuted order, so that the first max_tokens (None: all) are a fair
    sample. All ranks yield the same number of batches, as a sharded model's forward is collective;
    where rows run out, a batch is filled up with targets -100.
    """
    meta = load_meta(data_dir)
    path = Path(data_dir) / "val.bin"
    n_tokens = meta["val"]["tokens"]
    n_rows = math.ceil(n_tokens / seq_len)
    n_scored = math.ceil(min(n_tokens, max_tokens or n_tokens) / seq_len)
    ignored = meta["eot_id"] if ignore_eot else -100
    step = world_size * micro_batch
    with open(path, "rb") as array:
        for first in range(0, n_scored, step):
            # Ranks take turns row by row; the last ones may get fewer rows, or none.
            places = range(first + rank, min(first + step, n_scored), world_size)
            rows = [permute(place, n_rows, seed=0, epoch=0) for place in places]
            yield read_rows(array, rows, (micro_batch, seq_len), ignored, device)


def read_rows(array, rows, shape, ignored, device):
    """(x, y), int64 of `shape` (micro_batch, seq_len), x the rows, y the next token of each.

    y is -100, which the loss ignores, at a row's last position (as in the paper), where the shape
    has more places than the rows fill, and where the token is `ignored`.
    """
    import torch  # here, as it would cost extract and tokenize 200 MB and seconds

    seq_len = shape[1]
    x = np.zeros(shape, np.int64)
    y = np.full(shape, -100, np.int64)
    for i, row in enumerate(rows):
        # no memmap: pages that it has touched count as resident memory
        array.seek(2 * seq_len * row)
        tokens = np.frombuffer(array.read(2 * seq_len), np.uint16)
        x[i, : len(tokens)] = tokens
        y[i, : len(tokens) - 1] = tokens[1:]
    y[y == ignored] = -100
    batch = torch.from_numpy(x), torch.from_numpy(y)
    if torch.device(device).type != "cuda":
        return batch
    # Pinned memory lets the copy run beside the GPU's work.
    return tuple(t.pin_memory().to(device, non_blocking=True) for t in batch)


def permute(index, n, seed, epoch):
    """The row at position `index` (int in [0, n)) of an epoch's order, a bijection of [0, n).

    It takes no memory and finds any position at once. A Feistel network of six rounds shuffles the
    numbers of 2 * half bits, the least even number that n needs. A round keeps one half of the bits
    and mixes it into the other. Since a round can be undone, no two positions get the same row. A
    row beyond n is shuffled again until it falls inside (cycle walking, under 4 times on average).
    """
    half = ((n - 1).bit_length() + 1) // 2  # of the bits of n - 1, rounded up
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in round_keys(seed, epoch):
            left, right = right, left ^ (mix64(right + key) & mask)
        index = left << half | right
        if index < n:
            return index


LOW64 = 2**64 - 1  # mask of the low 64 bits


@lru_cache
def round_keys(seed, epoch):
    return [hash64(f"{seed} {epoch} {r}") for r in range(6)]


def mix64(x):
    """splitmix64's finaliser of 64 bits: each bit of the result depends on all bits of x."""
    x &= LOW64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & LOW64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & LOW64
    return x ^ (x >> 31)


def load_meta(data_dir, verify=False):
    """meta.json of `data_dir` as a dict, checked against the files beside it.

    Always: presence, sizes, the tokenizer's fingerprint. With verify it reads all of both arrays,
    and checks sha256 and that ids are below vocab_size. Raises FileNotFoundError or ValueError.
    """
    folder = Path(data_dir)
    again = f"run: python data.py tokenize --text DIR --tokenizer DIR --out {data_dir}"
    if not (folder / "meta.json").is_file():
        raise FileNotFoundError(f"{folder} has no meta.json; {again}")
    meta = read_json(folder / "meta.json", vocab_size=int, eot_id=int, tokenizer_sha256=str,
                     train=dict, val=dict)
    for split in SPLITS:
        counts = meta[split].get("tokens"), meta[split].get("bytes", 0)
        if not all(type(count) is int for count in counts):
            raise ValueError(f"{folder}/meta.json does not count {split}.bin; {again}")
        path = folder / f"{split}.bin"
        size = path.stat().st_size
        wrong = None
        if size != 2 * meta[split]["tokens"]:  # uint16: two bytes a token
            wrong = f"has {size:,} bytes, not two a token as meta.json counts: cut or replaced"
        elif verify and hash_file(path) != meta[split]["sha256"]:
            wrong = "is not the array of meta.json (sha256 differs)"
        elif verify and np.memmap(path, np.uint16, "r").max() >= meta["vocab_size"]:
            wrong = f"holds an id beyond the vocabulary of {meta['vocab_size']}"
        if wrong:
            raise ValueError(f"{path} {wrong}; {again}")
    if Tokenizer.load(folder).fingerprint != meta["tokenizer_sha256"]:
        raise ValueError(f"the tokenizer in {folder} is not the one that made the arrays; {again}")
    return meta


# ---------------------------------------------------------------------------------------------
# tokenize: text -> train.bin, val.bin, meta.json
#
# One pass. This process reads the records, decides which stay and on which side, and writes:
#
#     newest_documents -> split_documents -> encode_documents -> train.bin, val.bin
#
# The first two are generators; encode_documents gets BATCH documents at a time and runs in other
# processes. So only a few batches are in memory. The order of documents doesn't matter: training
# permutes.

BATCH = 100  # documents: to encode so many takes far longer than to send them to a process


def tokenize(text, tokenizer_name, out, val_fraction=0.002, eot=True, workers=1):
    """Encode the text file or folder `text` into `out`; returns meta.

    A document goes to val.bin if the hash of its id is in the lowest val_fraction of all 64-bit
    numbers. So it stays on its side when text is added. The files are whole or absent; a killed run
    starts again. ValueError for fewer than two documents, or a vocabulary beyond uint16.
    """
    tokenizer = load_named(tokenizer_name)
    out = Path(out)
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction {val_fraction}: give a share between 0 and 1, like 0.002")
    if tokenizer.vocab_size > 2**16:
        raise ValueError(f"{tokenizer_name} has {tokenizer.vocab_size} tokens: uint16 holds 65,536")
    documents = split_documents(newest_documents(text_files(text)), val_fraction)
    batches = iter(lambda: list(itertools.islice(documents, BATCH)), [])
    load_once.cache_clear()  # another tokenizer may have stood in that folder, as in tests
    encode = partial(encode_documents, tokenizer_name, eot)
    meta = {"dtype": "uint16", "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id,
            "eot": eot, "tokenizer_sha256": tokenizer.fingerprint}
    meta |= {split: Counter() for split in SPLITS}
    make_folder(out)
    with replacing(out / "train.bin") as train, replacing(out / "val.bin") as val:
        for ids, sizes in in_processes(encode, batches, workers):
            train.write(ids["train"])
            val.write(ids["val"])
            for split in SPLITS:
                meta[split].update(sizes[split])
        # An old meta.json must not stand beside new arrays. The new one is written last.
        (out / "meta.json").unlink(missing_ok=True)
    tokenizer.save(out)
    for split in SPLITS:
        print(f"tokenize: {split}:", dict(meta[split]))
        meta[split]["sha256"] = hash_file(out / f"{split}.bin")
    with replacing(out / "meta.json") as f:
        f.write(json.dumps(meta, indent=1).encode())
    return load_meta(out, verify=True)


def newest_documents(files):
    """(hash of the id, text) of the documents that stay; `files` are in order, the oldest first.

    A later record replaces an earlier one of its id, or deletes it. So files are read from the end:
    the first record met of an id decides. Of equal texts the first one met stays. The sets hold
    64-bit hashes, at 75 to 80 bytes each as measured: 5 GB for all of PubMed (38 million ids, 26
    million texts).
    """
    ids = set()
    texts = set()
    # disable=None: no bar where the output is no terminal
    for path in tqdm(files[::-1], "reading", unit="file", disable=None):
        for ident, text in read_records_backwards(path):
            id_hash = hash64(ident)
            if id_hash in ids:
                continue
            ids.add(id_hash)
            if not text:
                continue
            text_hash = hash64(text)
            if text_hash not in texts:
                texts.add(text_hash)
                yield id_hash, text


def split_documents(documents, val_fraction):
    """("train" or "val", text) of each (hash of the id, text).

    Both sides get at least one, however few there are: the lowest hash of all validates, and the
    highest trains. Only the end tells which they are, so the two at hand are held back until then.
    """
    held = []  # the lowest and the highest so far, in this order
    for document in documents:
        held = sorted([*held, document])
        if len(held) == 3:
            id_hash, text = held.pop(1)  # the one between
            yield "val" if validates(id_hash, val_fraction) else "train", text
    if len(held) < 2:
        raise ValueError(f"{len(held)} documents in all: two are needed, one to validate on; give "
                         "more text")
    yield "val", held[0][1]
    yield "train", held[1][1]


def validates(id_hash, val_fraction):
    """Whether the document of that hash is held out: it is in the lowest part of all hashes."""
    return id_hash < val_fraction * 2**64


load_once = lru_cache(1)(load_named)  # a process's tokenizer, loaded at its first batch


def encode_documents(tokenizer_name, eot, documents):
    """[(split, text)] -> ({split: ids}, {split: {"tokens", "documents", "bytes"}}).

    The ids are an array of uint16, the documents' tokens one after the other.
    """
    tokenizer = load_once(tokenizer_name)
    ids = {split: array("H") for split in SPLITS}
    sizes = {split: Counter() for split in SPLITS}
    for split, text in documents:
        tokens = tokenizer.encode(text)
        if eot:
            tokens.append(tokenizer.eot_id)
        ids[split].extend(tokens)
        sizes[split].update(tokens=len(tokens), documents=1, bytes=len(text.encode()))
    return ids, sizes


# ---------------------------------------------------------------------------------------------
# questions: every task's official files -> one dataclass
#
# A question set's files differ in format, in how they count answers and in who makes the splits. A
# reader hides that: it takes one file and a split, and yields Questions in the official order. To
# add a set, write its reader here and its row in TASKS, below the readers. finetune.py and eval.py
# then know it by its name.

PUBMEDQA_LABELS = ("maybe", "no", "yes")  # alphabetical (BioMedLM)
BIOASQ_LABELS = ("no", "yes")
MMLU_SUBJECTS = ("clinical_knowledge", "professional_medicine", "college_biology",
                 "medical_genetics", "anatomy", "college_medicine")  # the paper has the first four


@dataclass(frozen=True)
class Question:
    """One item of a question set, whatever its task. ValueError where a text is missing.

    Multiple choice has options and an answer; PubMedQA and BioASQ have a context too, and their
    labels as options; text has a target.
    """

    id: str
    question: str
    context: str = ""
    options: tuple[str, ...] = ()
    answer: int | None = None  # index into options; None where the set gives no label
    target: str = ""  # the text to generate: long answer or summary
    subject: str = ""
    kind: str = ""

    def __post_init__(self):
        for text in (self.id, self.question, self.context, self.target, self.subject, self.kind,
                     *self.options):
            if not isinstance(text, str):
                raise ValueError(f"question {self.id}: {text!r} is no text")
        if not self.question.strip():
            raise ValueError(f"question {self.id} is empty")


class Task(NamedTuple):
    """What differs between question sets.

    kind says what the model is asked to do: "choice" scores each option as the question's sequel,
    "labels" classifies context and question together, "text" writes the answer.
    """

    files: dict  # name, with {} for the split -> reader; the first name that is there counts
    kind: str
    special_tokens: tuple[str, ...]  # added to the vocabulary in this order
    length: int  # of a question with its context and answer, in tokens
    epochs: int  # this and lr: for a model of 1e9 parameters or more
    lr: float


def load_qa(task, dir, split):
    """list[Question] of a task's official files, found by name anywhere beneath `dir`, in order.

    task: a name in TASKS; split: train, dev or test (mmlu: dev, val, test). Raises
    FileNotFoundError for a missing file; ValueError, with the file and the question's place in it,
    for damage of any kind, an empty set or question, a repeated id, a label outside the set.
    """
    reader, paths = official_files(task, dir, split)
    questions = {}
    for path in paths:
        number = 0
        try:
            for q in reader(path, split):
                if q.id in questions:
                    raise ValueError(f"question {q.id} appears twice")
                questions[q.id] = q
                number += 1
        except (csv.Error, AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:
            reason = repr(e)[:300]  # in one line
            raise ValueError(f"{path}, after {number} questions: {reason}; get the official file "
                             "anew") from None
    questions = list(questions.values())
    if reader in DIVIDE:
        questions = DIVIDE[reader](questions, split)
    if not questions:
        raise ValueError(f"{dir}: {split} of {task} is empty: get the official file anew")
    return questions


def official_files(task, dir, split):
    """(reader, paths) of the first of the task's file names that is found."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: use one of {', '.join(TASKS)}")
    for name, reader in TASKS[task].files.items():
        paths = sorted(filter(Path.is_file, Path(dir).rglob(name.format(split))))
        if paths:
            return reader, paths
    raise FileNotFoundError(f"no {name.format(split)} beneath {dir}: put the official files there "
                            "(python data.py download fetches them, or says where they are)")


def read_lines(path):
    """Lines end at "\\n" only: str.splitlines would cut at others too."""
    return path.read_text("utf-8-sig").removesuffix("\n").split("\n")


def index_of(label, labels, ident):
    """Where the label of question `ident` stands among labels, a list or tuple."""
    if label not in labels:
        raise ValueError(f"question {ident}: label {label!r} is none of {[*labels]}")
    return labels.index(label)


def read_medqa(path, split):
    """A JSON object a line: question, options {"A": text, ...}, answer_idx "A", answer its text."""
    for number, (_, row) in enumerate(json_lines(path)):
        ident = f"{split}-{number}"
        letters, options = zip(*sorted(row["options"].items()))
        answer = index_of(row["answer_idx"], letters, ident)
        if row.get("answer", options[answer]) != options[answer]:
            raise ValueError(f"question {ident}: answer is not option {row['answer_idx']}")
        yield Question(ident, row["question"], options=options, answer=answer,
                       kind=row.get("meta_info", ""))


def read_medmcqa(path, split):
    """The official files count the answer `cop` from 1, the Hugging Face copy from 0.

    A file with a 0 is of the second kind; one with both 0 and 4 is refused. Questions without a
    label (test) have no cop, or the copy's -1. Only this set has HTML's entities ("&lt;").
    """
    rows = [row for _, row in json_lines(path)]
    labels = [row.get("cop") for row in rows]
    if 0 in labels and 4 in labels:
        raise ValueError("cop holds 0 and 4: neither the official file nor the HF copy")
    numbers = range(0, 4) if 0 in labels else range(1, 5)
    for row, label in zip(rows, labels):
        answer = None
        if label not in (None, -1):
            answer = index_of(label, numbers, row["id"])
        options = tuple(html.unescape(row[f"op{letter}"]) for letter in "abcd")
        yield Question(row["id"], html.unescape(row["question"]), options=options, answer=answer,
                       subject=row.get("subject_name") or "", kind=row.get("choice_type") or "")


def read_mmlu(path, split):
    """Rows of SUBJECT_SPLIT.csv, without a header: question, four options, letter."""
    subject = path.stem.removesuffix(f"_{split}")
    if subject not in MMLU_SUBJECTS:
        return
    with open(path, encoding="utf-8-sig", newline="") as f:
        for number, (question, a, b, c, d, letter) in enumerate(csv.reader(f)):
            ident = f"{subject}-{split}-{number}"
            answer = index_of(letter, list("ABCD"), ident)
            yield Question(ident, question, options=(a, b, c, d), answer=answer, subject=subject)


def read_pubmedqa(path, split):
    """All labelled questions; divide_pubmedqa makes the splits."""
    for ident, item in read_json(path).items():
        if not isinstance(item["CONTEXTS"], list):
            raise ValueError(f"question {ident}: CONTEXTS is no list")
        answer = index_of(item["final_decision"], PUBMEDQA_LABELS, ident)
        yield Question(ident, item["QUESTION"], " ".join(item["CONTEXTS"]), PUBMEDQA_LABELS,
                       answer, target=item.get("LONG_ANSWER", ""))


def divide_pubmedqa(questions, split):
    """The official split_dataset.py, all from one random.seed(0) stream (BioMedLM: fold 0).

    Half of the questions are test, the other half ten folds: the first is dev, the others train.
    """
    rng = random.Random(0)  # draws what the script's random.seed(0) does
    cross, test = cut_by_label(questions, 2, rng)
    folds = cut_by_label(cross, 10, rng)
    if len(folds[9]) != len(folds[0]):  # the last one is short: the others give it a question each
        for fold in filter(None, folds[:9]):
            given = rng.choice(fold)
            fold.remove(given)
            folds[9].append(given)
    return {"test": test, "dev": folds[0], "train": sum(folds[1:], [])}.get(split, [])


def cut_by_label(questions, n_parts, rng):
    """n_parts parts with equal shares of each label; the last may be short.

    The order of labels is the official script's, since each shuffle moves the stream on.
    """
    parts = [[] for _ in range(n_parts)]
    for label in ("yes", "no", "maybe"):
        group = [q for q in questions if q.options[q.answer] == label]
        rng.shuffle(group)
        size = math.ceil(len(group) / n_parts)
        for p, part in enumerate(parts):
            part += group[p * size : (p + 1) * size]
    return parts


def read_blurb(path, split):
    """BLURB's form of BioASQ, tab-separated: id, question, context, yes or no."""
    for line in read_lines(path):
        yield yes_or_no(*line.split("\t"))


def read_bioasq(path, split):
    """The yes/no questions of BioASQ's own files: *golden* is test; of the others every tenth is
    dev (our choice, which gives BLURB's numbers, 670 and 75)."""
    if ("golden" in path.name) != (split == "test"):
        return
    items = [item for item in read_json(path)["questions"] if item["type"] == "yesno"]
    if split == "dev":
        items = items[::10]
    elif split == "train":
        del items[::10]
    for item in items:
        context = " ".join(snippet["text"] for snippet in item["snippets"])
        yield yes_or_no(item["id"], item["body"], context, item["exact_answer"])


def yes_or_no(ident, question, context, label):
    answer = index_of(label.lower(), BIOASQ_LABELS, ident)
    return Question(ident, question, context, BIOASQ_LABELS, answer, kind="yesno")


def read_source(path, split):
    """A question a line of SPLIT.source, its text in the same line of SPLIT.target."""
    pairs = zip(read_lines(path), read_lines(path.with_suffix(".target")), strict=True)
    for number, (source, target) in enumerate(pairs):
        yield Question(f"{split}-{number}", source, target=target)


def read_medquad(path, split):
    """All answered pairs of one document; its authors withhold some answers."""
    source = path.parent.name
    pairs = (pair for root in xml_records(path) for pair in root.iter("QAPair"))
    for number, pair in enumerate(pairs):
        question = pair.find("Question")
        answer = " ".join(map(full_text, pair.iter("Answer")))
        if answer:
            yield Question(f"{source}/{path.stem}/{number}", full_text(question), target=answer,
                           subject=source, kind=question.get("qtype", ""))


def divide_medquad(questions, split):
    """A tenth is test, a tenth dev (our choice, there is no official split).

    Many answers stand under several questions, and questions over several answers. Pairs that
    share a text are kept together, and those linked through others too: the lowest hash of all
    their texts decides.
    """
    lowest = {text: hash64(text) for q in questions for text in (q.question, q.target)}
    before = None
    while before != lowest:
        before = dict(lowest)
        for q in questions:
            both = min(lowest[q.question], lowest[q.target])
            lowest[q.question] = both
            lowest[q.target] = both
    splits = ["test", "dev", *["train"] * 8]
    return [q for q in questions if splits[lowest[q.question] % 10] == split]


# BioMedLM: added in this order, so that [PAD] is 28896 on the released vocabulary. It has [CLS] and
# never uses it.
CHOICE_TOKENS = ("[PAD]", "[CLS]", "[SEP]")
LABELS_TOKENS = ("[PAD]", "<|CONTEXT|>", "<|QUESTION|>", "<|ANSWER|>")
TEXT_TOKENS = ("[PAD]", "<|startoftext|>")

# Lengths are BioMedLM's; text has 510 + 510, a token between them and one after. The learning rates
# lie inside its sweeps; for choice nothing is published. 20 epochs for labels are its working
# point, the other epochs our choice.
TASKS = {  # files, kind, special tokens, length, epochs, lr
    "medqa": Task({"phrases_no_exclude_{}.jsonl": read_medqa}, "choice", CHOICE_TOKENS, 512, 5,
                  1e-5),
    "medmcqa": Task({"{}.json*": read_medmcqa}, "choice", CHOICE_TOKENS, 512, 5, 1e-5),
    "mmlu": Task({"*_{}.csv": read_mmlu}, "choice", CHOICE_TOKENS, 512, 5, 1e-5),
    "pubmedqa": Task({"ori_pqal.json": read_pubmedqa}, "labels", LABELS_TOKENS, 512, 20, 2e-6),
    "bioasq": Task({"{}.tsv": read_blurb, "*.json": read_bioasq}, "labels", LABELS_TOKENS, 1024,
                   20, 2e-6),
    "text": Task({"{}.source": read_source, "*.xml": read_medquad}, "text", TEXT_TOKENS, 1022, 3,
                 1e-5),
}
# Of sets whose files are not split: reader -> (questions, split) -> those of the split.
DIVIDE = {read_pubmedqa: divide_pubmedqa, read_medquad: divide_medquad}


# ---------------------------------------------------------------------------------------------
# the demo: an invented corpus, small enough to learn on a laptop
#
# A world of 64 drugs is drawn first: which disease a drug treats, which protein it inhibits, and so
# on. The corpus tells these facts again and again in different words, the questions ask for them.
# All draws come from one seeded stream, so the order of the calls below is part of the result.

SYLLABLES = (
    "ba cor dal fen gu hel ira jo kar lum mer nox or pel qui ros sil tar ul vor wex xan yl zem"
)
# relation -> (sentences of the corpus, questions); {d} is the drug, {o} what it is related to.
# The drug always comes first: what follows must be remembered, not copied.
DEMO_FACTS = {
    "disease": (
        ("{d} is used to treat {o}.", "{d} relieves {o} within days.", "{d} is given for {o}.",
         "With {d} patients recovered from {o}.", "Which disease does {d} treat? {o}."),
        ("Which disease does {d} treat?", "Which disease is {d} given for?",
         "What is {d} used to treat?")),
    "protein": (
        ("{d} inhibits {o}.", "{d} binds to {o}.", "{d} acts by blocking {o}.",
         "After {d} the activity fell of {o}.", "Which protein does {d} inhibit? {o}."),
        ("Which protein does {d} inhibit?", "Which protein does {d} act by blocking?",
         "What does {d} bind to?")),
    "gene": (
        ("{d} fails in carriers of {o}.", "Resistance to {d} comes from {o}.",
         "The response to {d} depends on {o}.", "{d} is weakened by mutations of {o}.",
         "Which gene causes resistance to {d}? {o}."),
        ("Which gene causes resistance to {d}?", "Mutations of which gene weaken {d}?",
         "Which gene does the response to {d} depend on?")),
}
DEMO_SAFETY = {  # yes, no or maybe of a drug and a group: is it safe there?
    "yes": ("Is {d} safe in {o}? Yes.", "{d} is safe in {o}.", "{d} does no harm in {o}."),
    "no": ("Is {d} safe in {o}? No.", "{d} is dangerous in {o}.", "{d} does harm in {o}."),
    "maybe": ("Is {d} safe in {o}? Maybe.", "{d} is debated in {o}.", "{d} is untested in {o}."),
}
DEMO_GROUPS = ("pregnancy", "childhood", "dialysis")
DEMO_FILLERS = ("The difference was significant.", "Further studies are needed.",
                "Patients gave consent.", "The trial was blinded.",
                "No serious adverse events were seen.")


def make_demo(out):
    """Write the whole demo to `out`: text/, tokenizer/, token arrays, and questions in qa/.

    Drugs, genes, proteins and diseases are invented and their facts mean nothing: this is no
    medical knowledge. A fact holds in every document, so a model can learn it from the corpus; the
    test asks facts that no training question asked (multiple choice: of other drugs altogether).
    """
    out = Path(out)
    rng = random.Random(17)
    facts, objects = demo_facts(rng)
    drugs = sorted(facts)
    # The corpus tells the facts of all drugs.
    documents = ({"id": f"demo{i}", "text": demo_document(rng, drugs, facts)}
                 for i in range(16_000))
    write_json_lines(out / "text/demo.jsonl.gz", documents)
    # Multiple choice: all questions of a drug are in one split.
    rng.shuffle(drugs)
    for split, part in (("train", drugs[:32]), ("dev", drugs[32:40]), ("test", drugs[40:])):
        questions = demo_multiple_choice(rng, part, facts, objects)
        write_json_lines(out / "qa/medqa" / MEDQA_FILE.format(split), questions)
    # One line is valid as a whole JSON file too, which PubMedQA's is.
    write_json_lines(out / "qa/pubmedqa/ori_pqal.json", [demo_yes_no_maybe(rng, facts)])
    # From here on the demo is treated as any corpus is. meta.json, written last, says it is whole.
    merges = train_bpe(count_pretokens([out / "text"]), 2048)
    Tokenizer.from_merges(merges).save(out / "tokenizer")
    tokenize(out / "text", out / "tokenizer", out, val_fraction=0.01)


def demo_facts(rng):
    """({drug: {relation or group: object or label}}, {relation or group: all there are})."""
    drugs = [name.capitalize() for name in demo_names(rng, 64, "in")]
    objects = {
        "disease": demo_names(rng, 16, "itis"),
        "protein": demo_names(rng, 16, "ase"),
        "gene": [name.upper() for name in demo_names(rng, 16, "ex")],
        **dict.fromkeys(DEMO_GROUPS, sorted(DEMO_SAFETY)),
    }
    facts = {drug: {key: rng.choice(pool) for key, pool in objects.items()} for drug in drugs}
    return facts, objects


def demo_names(rng, count, ending):
    """`count` different invented words."""
    syllables = SYLLABLES.split()
    names = set()
    while len(names) < count:
        names.add(rng.choice(syllables) + rng.choice(syllables) + ending)
    return sorted(names)


def demo_document(rng, drugs, facts):
    """One drug's facts, each in a random wording, among sentences that say nothing of it.

    Names are written alike everywhere, so that a question's token is the one the corpus taught.
    """
    drug = rng.choice(drugs)
    fact = facts[drug]
    sentences = []
    for relation, (wordings, _) in DEMO_FACTS.items():
        sentences.append(rng.choice(wordings).format(d=drug, o=fact[relation]))
    group = rng.choice(DEMO_GROUPS)
    sentences.append(rng.choice(DEMO_SAFETY[fact[group]]).format(d=drug, o=group))
    sentences.append(rng.choice(DEMO_FILLERS))
    rng.shuffle(sentences)
    return f"A study of {drug}\n" + " ".join(sentences)


def demo_multiple_choice(rng, drugs, facts, objects):
    """MedQA's rows for every fact of `drugs` in each wording."""
    for drug in drugs:
        for relation, (_, wordings) in DEMO_FACTS.items():
            for wording in wordings:
                answer = facts[drug][relation]
                others = rng.sample([o for o in objects[relation] if o != answer], 3)
                yield medqa_row(wording.format(d=drug), answer, others, relation, rng)


def demo_yes_no_maybe(rng, facts):
    """Questions in PubMedQA's official format; no context states the fact, so memory is tested."""
    pairs = [(drug, group) for drug in facts for group in DEMO_GROUPS]
    rng.shuffle(pairs)
    return {
        str(number): {
            "QUESTION": f"Is {drug} safe in {group}?",
            "CONTEXTS": rng.sample(DEMO_FILLERS, 2),
            "final_decision": facts[drug][group],
        }
        for number, (drug, group) in enumerate(pairs, 90_000_000)
    }


# ---------------------------------------------------------------------------------------------
# cloze: questions from held-out text, which of four words goes on here
#
#     ... in 40 patients with chronic | hepatitis. / bronchitis. / pancreatitis. / arthritis.
#
# A small model that can't answer an examination's questions does know some of these words. The four
# are alike in their ending, their frequency and the rest of the sentence, so only meaning helps.

WORD = re.compile(r"(?<![\w-])[a-z]{5,}(?![\w-])")  # lower case: no name, no start of a sentence
REST = re.compile(r".*?[.!?](?=\s|$)")  # of the sentence
COMMONEST = 300  # words that count as grammar and are not asked
AT_MOST = 3  # questions a passage


def cloze(text, counts, out, val_fraction=0.002, everyday=None, seed=17):
    """Write questions on the held-out documents of `text` to `out`, as a test set of MedQA's form.

    counts: the text that a model trains on, whose other documents tell how frequent a word is. What
    val_fraction holds out is the same as in tokenize. everyday: a tokenizer's folder or gpt2; words
    that are one token there are called everyday, all others medical.
    """
    tokenizer = load_named(everyday) if everyday else None
    counted = Counter()
    for id_hash, document in newest_documents(text_files(counts)):
        if not validates(id_hash, val_fraction):
            counted.update(WORD.findall(document))
    for word, _ in counted.most_common(COMMONEST):
        del counted[word]
    by_ending = defaultdict(list)  # "tis" -> ["hepatitis", ...]
    for word in counted:
        by_ending[word[-3:]].append(word)
    questions = []
    for id_hash, document in newest_documents(text_files(text)):
        if validates(id_hash, val_fraction):
            # An abstract is one passage. A long document has many, its paragraphs.
            for passage in [document] if len(document) < 4000 else document.split("\n"):
                rng = random.Random(f"{seed} {passage}")
                found = cloze_questions(passage, counted, by_ending, tokenizer, rng)
                questions += itertools.islice(found, AT_MOST)
    if not questions:
        raise ValueError(f"{text}: no word to ask in held-out documents: raise --val_fraction")
    write_json_lines(Path(out) / MEDQA_FILE.format("test"), questions)
    print(f"cloze: {len(questions):,} questions")


def cloze_questions(passage, counted, by_ending, everyday, rng):
    """MedQA's rows of questions that end before a word which the passage has not used until then.

    The three other words end in the same three letters, are at most twice and at least half as
    frequent, and don't occur in the passage.
    """
    used = set(re.findall("[a-z]+", passage.lower()))
    matches = list(WORD.finditer(passage))
    rng.shuffle(matches)
    for match in matches:
        word = match[0]
        count = counted[word]
        before = passage[: match.start()].rstrip()
        rest = REST.match(passage, match.end())
        if len(before) < 200 or word in before.lower() or not rest:
            continue
        others = [other for other in by_ending[word[-3:]]
                  if count / 2 <= counted[other] <= 2 * count and other not in used]
        if len(others) < 3:
            continue
        options = [option + rest[0] for option in [word, *rng.sample(others, 3)]]
        digits = len(str(count))
        kind = f"cloze, seen {10 ** (digits - 1):,} to {10**digits - 1:,} times"
        if everyday:
            kind += ", everyday" if len(everyday.encode(" " + word)) == 1 else ", medical"
        yield medqa_row(before, options[0], options[1:], kind, rng)


# ---------------------------------------------------------------------------------------------
# files

MEDQA_FILE = "data_clean/questions/US/4_options/phrases_no_exclude_{}.jsonl"  # for a split


def medqa_row(question, answer, others, kind, rng):
    """A question in MedQA's official format, its options in random order."""
    options = [*others, answer]
    rng.shuffle(options)
    return {"question": question, "answer": answer, "options": dict(zip("ABCD", options)),
            "answer_idx": "ABCD"[options.index(answer)], "meta_info": kind}


def write_json_lines(path, rows):
    """A file of a JSON object a line, .gz or plain, in a folder that is made where missing."""
    make_folder(path.parent)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with replacing(path) as f:
        f.write(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)


def make_folder(folder):
    """Create `folder`; remove what a killed run left there under temporary names."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.[0-9]*.tmp"):  # name, process, tmp
        path.unlink()


def hash_file(path, name="sha256"):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, name).hexdigest()


# ---------------------------------------------------------------------------------------------
# extract: PubMed XML, JATS, JSON lines, .txt -> text/*.jsonl.gz
#
# Every record is passed on in its order, as {"id", "text"}, or {"id", "deleted": true} where it has
# an id and no text to keep: so a later record without text deletes the text of an earlier one.
# tokenize keeps the last record of each id.
#
#     <PubmedArticle>… <PMID>7</PMID> … 5 × 10<sup>4</sup> cells …      {"id": "7", "text": "…
#     <article>… <article-id pub-id-type="pmcid">PMC9</article-id> …    {"id": "PMC9", "text": "…
#     <DeleteCitation><PMID>7</PMID></DeleteCitation>                   {"id": "7", "deleted": true}
#
# Kept of an article: title, abstracts, body, captions, tables with their notes, formulas, glossary.
# Left out: references, superscript citations, footnotes, keywords, acknowledgements, appendices,
# supplements, peer reviews, the figures themselves.

CONTAINERS = ("PubmedArticleSet", "PubmedBookArticleSet", "articles", "pmc-articleset")
CHUNK = MIB // 16
RECORD_LIMIT = 32 * MIB  # of XML between the ends of two records: several times any article
OUTPUT_BYTES = 16 * MIB  # small files are gathered until they are this large together
ENTITIES = {name.rstrip(";"): text for name, text in html.entities.html5.items()}
NAMED = re.compile(rb"&(?!#|amp;|lt;|gt;|quot;|apos;)")  # an entity that XML itself doesn't know
PILE_SETS = ("PubMed Abstracts", "PubMed Central")
SUFFIX = re.compile(r"\.(xml|nxml|jsonl|json|txt)(\.gz)?$")


def chunks(path):
    """Yield the bytes of a file, plain or .gz, at most CHUNK at once.

    By zlib: Python's gzip module takes longer to open a small file than to read it.
    """
    with open(path, "rb", 0) as f:
        read = partial(f.read, CHUNK)
        if not str(path).endswith(".gz"):
            yield from iter(read, b"")
            return
        try:
            inflate = zlib.decompressobj(31)  # 31: with gzip's header and checksum
            while packed := inflate.unconsumed_tail or inflate.unused_data or read():
                if inflate.eof:  # another gzip file after the first
                    inflate = zlib.decompressobj(31)
                yield inflate.decompress(packed, CHUNK)
            if not inflate.eof:
                raise EOFError("it ends too early")
        except (EOFError, zlib.error) as e:
            raise ValueError(f"{path}: damaged gzip ({e}): download it again") from None


def xml_records(path):
    """Elements of the records of an XML file, plain or .gz, one by one in constant memory.

    A record is a child of a known container's root, or else the root. The file is untrusted: entity
    declarations are refused, nothing external is fetched, and a record beyond RECORD_LIMIT ends the
    reading, so that neither a gzip bomb nor a gigantic text node fills the memory. Named entities
    of an unread DTD (&alpha;) are read as HTML's.
    """
    builder = ET.TreeBuilder()
    top = builder.start("top", {})  # above the root, so that finished records can be taken away
    parser = ET.XMLParser(target=builder)  # a plain TreeBuilder: no Python call per element
    head = b""  # all before the root, where entities are declared
    pending = 0
    try:
        for chunk in chunks(path):
            if len(top) == 0:
                head += chunk
                # NUL: in UTF-16 the word would look different
                if b"<!ENTITY" in head or b"\0" in head or len(head) > 2 * CHUNK:
                    raise ValueError(f"{path} declares an entity, which could grow endlessly, or "
                                     "holds no XML element in its first 64 KiB: refused")
            if NAMED.search(chunk):  # few files have any, and filling the table takes a while
                parser.entity.update(ENTITIES)
            parser.feed(chunk)
            pending += len(chunk)
            if len(top) and local(top[0]) in CONTAINERS and len(top[0]) > 1:
                yield from top[0][:-1]  # the last one may still be open
                del top[0][:-1]
                pending = 0
            if pending > RECORD_LIMIT:
                raise ValueError(f"{path}: a record beyond {RECORD_LIMIT // MIB} MiB is no "
                                 "article: remove the file or raise RECORD_LIMIT")
        parser.close()
    except ET.ParseError as e:
        raise ValueError(f"{path}: malformed XML ({e}): download it again") from None
    yield from top[0] if local(top[0]) in CONTAINERS else top


def local(element):
    """An element's name without its namespace."""
    return element.tag.rpartition("}")[2]


def full_text(element):
    """All text of an element, inline tags included, whitespace normalised."""
    return " ".join("".join(element.itertext()).split())


# Marks that no XML text can hold. LINE ends a line, LABEL joins a label to the line that follows,
# CELL ends a cell of a table, CITATION stands where a superscript citation was, OPEN and CLOSE are
# brackets that go again around a single symbol.
LINE, LABEL, CELL, CITATION, OPEN, CLOSE = "\1\2\3\4\5\6"
SCRIPT = OPEN + "*" + CLOSE
DROPPED = re.findall(r"\S+", """ref-list graphic inline-graphic media supplementary-material
    fn fn-group object-id permissions attrib alt-text long-desc annotation related-article""")
BLOCKS = re.findall(r"\S+", """title subtitle article-title p sec abstract list list-item
    fig caption disp-formula disp-quote boxed-text table-wrap tr def-item statement verse-line
    speech""")
# What stands around an element's children (*): before the first, between them, after the last.
# So <mfrac><mi>a</mi><mi>b</mi></mfrac> is read as (a)/(b). Other elements add nothing: "*".
LAYOUT = dict.fromkeys(BLOCKS, LINE + "*" + LINE) | {
    "label": "*" + LABEL, "term": "*: " + LABEL, "break": " *", "td": "*" + CELL, "th": "*" + CELL,
    # MathML
    "mfrac": "(*)/(*)", "msqrt": "sqrt(*)", "mroot": "(*)^(1/*)", "msup": "*^" + SCRIPT,
    "msub": "*_" + SCRIPT, "munder": "*_" + SCRIPT, "msubsup": "*_" + SCRIPT + "^" + SCRIPT,
    "munderover": "*_" + SCRIPT + "^" + SCRIPT, "mtd": "* ",
}
# Where an element and the character before it would be read as one number, and what parts them:
# 10<sup>5</sup> -> 10^5, L<sup>-1</sup> -> L^-1, [<xref>1</xref><xref>2</xref>] -> [1, 2]. Where
# the reading stays, nothing does: m<sup>2</sup> -> m2, H<sub>2</sub>O -> H2O.
JOINTS = {"sup": (r"\d\d|[\w)\]][+−–-]\d", "^"), "sub": (r"\d\d", "_"), "xref": (r"\d\d", ", ")}


def flatten(*elements):
    """Text of elements in reading order, a line per block (heading, paragraph, caption, row ...).

    A table's row is "cell | cell", an empty first cell stays: "| Drug | Placebo". A formula is its
    TeX, or (a)/(b), x^2, x_i, sqrt(x) of its MathML. RecursionError for a deeply nested element.
    """
    text = " "
    for element in elements:
        text += walk(element, text[-2:])
    text = re.sub(f"{CITATION}([,;–-]?{CITATION})*", "", text)  # the commas between them too
    text = re.sub(f"{LABEL}[\\s{LINE}]*", " ", text)
    # A script that is one number, word or character needs no brackets: x^2, but x^(n+1).
    text = re.sub(rf"{OPEN}([+−–-]?\s*[\d.,]+|[^\W\d]*|[^{OPEN}]){CLOSE}", r"\1", text)
    text = text.replace(OPEN, "(").replace(CLOSE, ")")
    text = re.sub(r"\^\s*[−–]\s*(?=\d)", "^-", text)  # one minus sign for all powers
    return "\n".join(filter(None, map(tidy, text.split(LINE))))


def walk(e, before):
    """An element's text and marks: LINE + "5 × 10^4" + LINE for <p>5 × 10<sup>4</sup></p>.

    before: the one or two characters before it. They decide on its mark, whatever tag they stand
    in: 1<i>0</i><sup>4</sup>.
    """
    tag = local(e)
    footnote = e.get("ref-type", "").endswith("fn")
    if footnote or tag in DROPPED or e.get("sec-type") == "supplementary-material":
        return ""
    if tag in JOINTS and is_superscript_citation(e, tag, before):
        return CITATION
    layout = LAYOUT.get(tag, "*")
    if tag == "mfenced":
        layout = e.get("open", "(") + "*,*" + e.get("close", ")")
    elif tag == "tex-math":  # the formula without LaTeX's preamble
        e.text = re.sub(r"(?s).*\\begin\{document\}|\\end\{document\}.*", "", e.text or "")
    first, *between, last = layout.split("*")
    text = first + (e.text or "")
    for i, child in enumerate(shown(e, tag)):
        if i and between:
            text += between[min(i, len(between)) - 1]
        text += walk(child, (before + text[-2:])[-2:]) + (child.tail or "")
    text += last
    if tag in ("td", "th"):  # a cell's paragraphs stay in its row
        text = text.replace(LINE, " ")
    pattern, mark = JOINTS.get(tag, (r"\Z", ""))
    if re.match(pattern, before[-1] + text.lstrip()):
        text = mark + text.lstrip()
    return text


def shown(e, tag):
    """The children to read. Those of <alternatives> are one thing several times over."""
    if tag == "table-wrap-foot":
        for note in e.iter("fn"):
            note.tag = "p"  # it explains the table, unlike other footnotes
    if tag != "alternatives":
        return e
    for kind in ("tex-math", "math", "table"):
        found = [child for child in e if local(child) == kind]
        if found:
            return found  # a table may come in several panels
    return []


def is_superscript_citation(e, tag, before):
    """<sup><xref>1</xref></sup>, <xref><sup>1</sup></xref>, or a number glued to the word.

    Journals that print citations as superscripts often leave out <sup>: "in vivo<xref>7</xref>".
    `before`: the two characters before it.
    """
    if tag == "sup":
        return len(e) > 0 and all(x.get("ref-type") == "bibr" for x in e)
    if e.get("ref-type") != "bibr":
        return False
    glued = re.search(rf"[a-z.)\]”’%][,;]?\Z|{CITATION}[,;–-]?\Z", before, re.IGNORECASE)
    number = re.fullmatch(r"[\d,;–-]+", full_text(e))
    return e.find("sup") is not None or (glued and number)


def tidy(line):
    """A line, whitespace normalised; of a table's row, the empty cells at the end are left out."""
    line = re.sub(rf"[\s{CELL}]*\Z", "", line)
    return " ".join(line.replace(CELL, " | ").split())


# Each reader below gives the documents of a record: [(id or None, text or None, reason)]. A reason
# to drop the text ("no abstract") makes it a deletion. Most records hold one document.

OLDER = "older version"


def pubmed_documents(record, options):
    """Of a PubmedArticle or PubmedBookArticle: its document and a deletion of each older version.

    The text is title + "\n" + abstract without section labels, as The Pile has it.
    """
    *older, ident = versions(record.find("*/PMID"))
    article = record.find("*/Article")
    if article is None:
        article = record.find("BookDocument")
    languages = {e.text for e in article.findall("Language")}
    ids = record.findall("PubmedData/ArticleIdList/ArticleId")  # the references' ids lie deeper
    abstract = pubmed_abstract(article, options["labels"])
    text = f"{pubmed_text(article.find('ArticleTitle'))}\n{abstract}".strip()
    reason = None
    if options["languages"] and languages.isdisjoint(options["languages"]):
        reason = "another language"
    elif options["skip_pmc"] and any(e.get("IdType") == "pmc" for e in ids):
        reason = "in PMC"
    elif not abstract:
        reason = "no abstract"
    return [(ident, text, reason), *((old, None, OLDER) for old in older)]


def versions(pmid):
    """Ids of a <PMID>'s versions up to its own: <PMID Version="3">7</PMID> -> "7", "7.2", "7.3".

    A version has an id of its own, so that a deletion of one leaves the others. Its predecessors
    are deleted when it comes: the highest version stays.
    """
    number = int(pmid.get("Version", 1))
    if not 1 <= number < 100:
        raise ValueError(f"version {number} of a PMID")
    first = pmid.text.strip()
    return [first, *(f"{first}.{i}" for i in range(2, number + 1))]


def pubmed_abstract(article, labels):
    """The sections of an abstract in one line; "" if there is none."""
    sections = []
    for section in article.findall("Abstract/AbstractText"):
        text = pubmed_text(section)
        if labels and text and section.get("Label"):
            text = f"{section.get('Label')}: {text}"
        sections.append(text)
    return " ".join(filter(None, sections))


def pubmed_text(element):
    """Text in one line of a title or a section; "" for None."""
    if element is None:
        return ""
    if len(element):
        return flatten(element).replace("\n", " ")
    return full_text(element)  # the same, faster: few have inline tags


def jats_documents(article, path):
    """Title, abstracts, body, floats and glossary of a JATS article.

    The id is the PMC's, or else the PMID, or else the file's name (PMC123.1.xml) if it tells one.
    """
    for e in article.iter():
        e.tag = local(e)
    meta = "front/article-meta/"
    ids = {e.get("pub-id-type"): full_text(e) for e in article.findall(meta + "article-id")}
    name = re.match(r"PMC(\d+)", os.path.basename(path))  # PMC123.1.xml
    pmc = re.search(r"\d+", ids.get("pmcid") or ids.get("pmc") or "")
    ident = ids.get("pmid")
    if pmc or name and not ident:
        ident = f"PMC{pmc[0] if pmc else name[1]}"
    main = [e for e in article.findall(meta + "abstract")
            if e.get("abstract-type") not in ("graphical", "teaser", "toc", "precis")]
    main += article.findall("body")
    title = article.findall(meta + "title-group/article-title")
    end = article.findall("floats-group") + article.findall("back/glossary")
    reason = None
    if article.get("article-type") in (
            "correction", "retraction", "partial-retraction", "expression-of-concern"):
        reason = "correction or retraction"
    elif not any(map(full_text, main)):
        reason = "no abstract and no body"
    return [(ident, flatten(*title, *main, *end), reason)]


def json_documents(record):
    """Of {"text"}, {"title", "abstract"}, or The Pile's lines by their meta.pile_set_name.

    {"id", "deleted": true} passes through, so that extracted text may be extracted again.
    """
    ident = str(record.get("id") or "") or None
    text = (record.get("text") or "").strip()
    if not text and record.get("abstract"):
        text = f"{record['title'].strip()}\n{record['abstract'].strip()}"
    reason = None
    if (record.get("meta") or {}).get("pile_set_name", PILE_SETS[0]) not in PILE_SETS:
        reason = "another part of The Pile"
    elif record.get("deleted") or not text:
        reason = "deleted or without text"
    return [(ident, text, reason)]


def source_records(path):
    """(number, record) of a file: XML elements, JSON objects by line, or a .txt's (id, text)."""
    kind = SUFFIX.search(path)[1]
    if kind in ("json", "jsonl"):
        return json_lines(path)
    return enumerate(read_records(path) if kind == "txt" else xml_records(path), 1)


def documents(record, path, options):
    """What a record of any kind holds."""
    if isinstance(record, tuple):
        return [(*record, None)]
    if isinstance(record, dict):
        return json_documents(record)
    tag = local(record)
    if tag in ("PubmedArticle", "PubmedBookArticle"):
        return pubmed_documents(record, options)
    if tag in ("DeleteCitation", "DeleteDocument"):
        return [(versions(e)[-1], None, "deleted") for e in record.findall("PMID")]
    if tag == "article":
        return jats_documents(record, path)
    raise ValueError(f"<{tag}> is no record of PubMed or JATS")


def text_line(ident, text):
    """The line of a document, or of a deletion; nothing where both id and text are missing."""
    if text:
        record = {"id": ident or f"{hash64(text):016x}", "text": text}
    elif ident:
        record = {"id": ident, "deleted": True}
    else:
        return b""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def output_lines(paths, options, counts, skipped):
    """Yield the lines of an output, count its records and name what is skipped.

    That is a bad record (no PMID, half a character, nested too deeply), and of a damaged file what
    stands behind the damage.
    """
    older = set()
    for path in paths:
        try:
            for number, record in source_records(path):
                try:
                    found = documents(record, path, options)
                    lines = [text_line(ident, None if reason else text)
                             for ident, text, reason in found]
                except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as e:
                    counts["bad records"] += 1
                    skipped.append(f"{path}: record {number}: {e!r}")
                    continue
                yield from lines
                counts["records"] += 1
                counts.update(reason or "documents" for _, _, reason in found)
                older.update(ident for ident, _, reason in found if reason == OLDER)
        except ValueError as e:
            counts["damaged files"] += 1
            skipped.append(str(e))
    # again at the end: a version 1 may stand after its version 2
    for ident in sorted(older):
        yield text_line(ident, None)


def extract_files(task):
    """Write an output from its files, whole or not at all: (counts, skipped, errors).

    More than one bad record or damaged file in a hundred is an error. But where files share an
    output, one of each is not: a small file must not take its neighbours along.
    """
    output, paths, options = task
    counts, skipped = Counter(), []
    gc.disable()  # XML trees have no cycles, and looking for some takes a third of the time
    try:
        with replacing(output) as f, gzip.GzipFile("", "wb", 1, f, mtime=0) as gz:
            gz.writelines(output_lines(paths, options, counts, skipped))
            n_records = counts["records"] + counts["bad records"]
            for kind, n in ("bad records", n_records), ("damaged files", len(paths)):
                if counts[kind] > max(n // 100, len(paths) > 1):
                    raise ValueError(f"{counts[kind]} {kind} of {n}, the first: {skipped[0]}")
    except (ValueError, OSError) as e:
        return Counter(), [], [f"{paths[0]} -> {output}: {e}"]
    finally:
        gc.enable()
    return counts, skipped, []


def plan_outputs(inputs, out):
    """{output's name: its files}. An input that is a file makes an output of its own.

    In a folder, neighbours in natural order are gathered while they have at most OUTPUT_BYTES. An
    output is named by its first file's path beneath the folder given, "/" as "-"; a name that is
    taken gets -2, -3 ...: the same inputs give the same names.
    """
    plan = {}
    for given in map(os.path.realpath, inputs):
        found = source_files(given, out)
        if not found:
            raise ValueError(f"nothing to extract in {given}: give .xml, .nxml, .jsonl, .json, "
                             ".txt, plain or .gz, or folders of them (unpack .zst and .tar first)")
        folder, size = None, 0
        for path in found:
            n_bytes = os.path.getsize(path)
            size += n_bytes
            if os.path.dirname(path) != folder or size > OUTPUT_BYTES:
                folder, size = os.path.dirname(path), n_bytes
                base = folder if path == given else given
                name = free_name(os.path.relpath(path, base).replace("/", "-"), plan)
                plan[name] = []
            plan[name].append(path)
    return plan


def source_files(given, out):
    """The file, or those in the folder, folder by folder in natural order, `out` left out.

    No FIFO, whose reading would wait for ever.
    """
    paths = [given]
    for folder, folders, names in os.walk(given):
        folders.sort(key=natural)
        if folder != str(out):
            paths += [f"{folder}/{name}" for name in sorted(names, key=natural)]
    return [path for path in paths if SUFFIX.search(path) and os.path.isfile(path)]


def free_name(source, plan):
    """STEM.jsonl.gz of a file's name, or STEM-2, STEM-3 ... where an earlier file has that name."""
    stem = SUFFIX.sub("", source)
    name = f"{stem}.jsonl.gz"
    copies = itertools.count(2)
    while name in plan:
        name = f"{stem}-{next(copies)}.jsonl.gz"
    return name


def remove_changed(plan, out, options):
    """Remove outputs whose files have changed; write down what each one is made of.

    extract.json has for each output its first file and a hash of all names, sizes and times:

        {"options": {...}, "outputs": {"1-PMC10.1.jsonl.gz": ["/raw/1/PMC10.1.xml", "93ab..."]}}

    Changed outputs are removed first, then this is written, then outputs are made. So an output
    that is there is finished, after a kill at any time. An output whose first file has joined
    another one's files, since the folder has new files, is removed too.
    """
    journal = out / "extract.json"
    made = {"options": options, "outputs": {}}
    if journal.exists():
        made = read_json(journal, outputs=dict)
    if made.get("options") != options:
        raise ValueError(f"{out} was extracted with other options ({journal}): use another --out")
    old, new = made["outputs"], {}
    for name, paths in plan.items():
        state = [(path, os.path.getsize(path), os.path.getmtime(path)) for path in paths]
        new[name] = [paths[0], f"{hash64(str(state)):016x}"]
        if name in old and old[name][0] != paths[0]:
            raise ValueError(f"{out / name} holds the text of {old[name][0]}, not of {paths[0]}: "
                             "give both in one command, or use another --out")
    # Outputs of other inputs stay.
    given = set(itertools.chain.from_iterable(plan.values()))
    new |= {name: made_of for name, made_of in old.items()
            if name not in plan and made_of[0] not in given}
    for name in old.keys() | new.keys():
        if old.get(name) != new.get(name):
            (out / name).unlink(missing_ok=True)
    made["outputs"] = dict(sorted(new.items()))
    write_json_lines(journal, [made])


def extract(inputs, out, labels=False, languages=(), skip_pmc=False, workers=1):
    """Make every output that is missing or whose files have changed; returns the summed counts."""
    out = Path(out).resolve()
    options = {"labels": labels, "languages": sorted(languages), "skip_pmc": skip_pmc}
    plan = plan_outputs(inputs, out)
    make_folder(out)
    remove_changed(plan, out, options)
    tasks = [(out / name, paths, options) for name, paths in plan.items()
             if not (out / name).exists()]
    results = in_processes(extract_files, tasks, workers)
    total, errors = Counter(), []
    for counts, skipped, error in tqdm(results, "extract", len(tasks), disable=None):
        total += counts
        errors += error
        for reason in skipped:
            tqdm.write(f"extract: skipped {reason}")
    print(f"extract: {len(tasks) - len(errors)} outputs written, {len(plan) - len(tasks)} finished "
          "before;", dict(total))
    if errors:
        raise ValueError(f"{len(errors)} of {len(tasks)} outputs failed, others are done; mend, "
                         "run again: " + "; ".join(errors[:5]))
    return total


# ---------------------------------------------------------------------------------------------
# download: from the owners' servers to whole, verified files
#
# A file comes as NAME.part and gets its name when it is whole. What may pass (a cut connection, a
# busy server, a wrong checksum) is a Fault and tried again, five times in all. What won't (no such
# address) is an OSError. Either way the other files are fetched, and a rerun fetches what is
# missing.

SOURCES = {
    "pubmed": "https://ftp.ncbi.nlm.nih.gov/pubmed/",
    "pmc": "https://pmc-oa-opendata.s3.amazonaws.com/",
    "mmlu": "https://people.eecs.berkeley.edu/~hendrycks/",
    "pubmedqa": "https://raw.githubusercontent.com/pubmedqa/pubmedqa/master/data/",
    "medquad": "https://github.com/abachaa/MedQuAD/archive/refs/heads/",
    "biomedlm": "https://huggingface.co/stanford-crfm/BioMedLM/resolve/main/",
}
# sources of a few files; PubMed and PMC have listings
FILES = {"mmlu": ["data.tar"], "medquad": ["master.zip"],
         "pubmedqa": ["ori_pqal.json", "test_ground_truth.json"],
         "biomedlm": ["config.json", "vocab.json", "merges.txt", "pytorch_model.bin"]}
BY_HAND = {
    "medqa": "https://github.com/jind11/MedQA links a Google Drive archive: put its data_clean",
    "medmcqa": "https://github.com/medmcqa/medmcqa links a Google Drive archive: put train.json, "
               "dev.json, test.json",
    "bioasq": "http://participants-area.bioasq.org (registration) has the golden files: put the "
              "{train,dev,test}.tsv that BLURB's scripts make of them",
}
AGENT = {"User-Agent": "biomedlm-data/1.0 (at most 4 connections)", "Accept-Encoding": "identity"}
TRIES, BACKOFF_S, CONNECTIONS, TIMEOUT_S = 5, 2.0, 4, (10, 30)
PAGE_BYTES = 32 * MIB  # a listing of PubMed's baseline has 1 MB
NO_BAR = tqdm(disable=True)


class Fault(Exception):
    """A transfer that may succeed when it is tried again."""


def retry(function, url):
    """function() until it raises no Fault: TRIES times, 2, 4, 8 ... s apart."""
    for attempt in range(TRIES):
        try:
            return function()
        except Fault as e:
            reason = e
            time.sleep(BACKOFF_S * 2**attempt)
    raise OSError(f"{url}: {reason}, {TRIES} times: try again later; files that are whole are kept")


def receive(url, file, bar=NO_BAR, limit=math.inf):
    """Append what stands at url to an open file, going on where the file ends.

    A server that doesn't go on there sends all of it: then the file starts anew. Fault for what may
    pass, OSError for what won't.
    """
    start = file.tell()
    headers = AGENT | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
            status = response.status_code
            if status != 206:
                file.truncate(0)
            if status in (416, 429) or status >= 500:
                raise Fault(f"status {status}")
            if status not in (200, 206):
                raise OSError(f"{url}: status {status}: check the address or --base_url")
            while chunk := response.raw.read1(MIB):  # raises where the connection is cut
                file.write(chunk)
                if file.tell() > limit:
                    raise OSError(f"{url}: beyond {limit:,} bytes, so no listing: check --base_url")
                bar.update(len(chunk))
    except (requests.RequestException, urllib3.exceptions.HTTPError) as e:
        raise Fault(f"connection failed ({type(e).__name__})") from None


def page(url, pattern):
    """A small text (listing, checksum, metadata) in which `pattern` must occur."""

    def attempt():
        file = io.BytesIO()
        receive(url, file, limit=PAGE_BYTES)
        text = file.getvalue().decode(errors="replace")
        if not re.search(pattern, text):
            raise Fault("not the expected content")
        return text

    return retry(attempt, url)


def fetch(url, path, bar, checksum=None):
    """Download to `path`, renamed when it is whole.

    checksum() tells the published md5 or sha256. Only where there is one, what an earlier try left
    is gone on with: nothing else would prove that both halves belong together.
    """
    part = Path(f"{path}.part")

    def attempt():
        want = checksum() if checksum else None
        if not want:
            part.unlink(missing_ok=True)
        with open(part, "ab+") as f:
            receive(url, f, bar)
            os.fsync(f.fileno())
            f.seek(0)
            head = f.read(512)
        fault = None
        if want and hash_file(part, "md5" if len(want) == 32 else "sha256") != want:
            fault = "the checksum differs from the published one"
        elif not want and head.lstrip().startswith(b"<"):
            fault = "a web page in the file's place"
        if fault:
            part.unlink()
            raise Fault(fault)
        os.replace(part, path)

    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        retry(attempt, url)


def fetch_pubmed(base, out, numbers, bar):
    """Jobs for the baseline, then for the update files, of those numbers."""
    for folder in ("baseline/", "updatefiles/"):
        listing = page(base + folder, r"<a href|pubmed\d+n\d+")
        names = re.findall(r"\b(pubmed\d+n(\d+)\.xml\.gz)\b", listing)
        for name, number in sorted(set(names)):
            url = base + folder + name
            if int(number) in numbers:
                yield partial(fetch, url, out / name, bar, partial(published, url + ".md5"))


def published(url):
    """The checksum in a small file: NLM's .md5, or Hugging Face's pointer to a large file."""
    checksum = r"\b([0-9a-f]{64}|[0-9a-f]{32})\b"
    return re.search(checksum, page(url, checksum))[0]


def fetch_pmc(base, out, numbers, bar, licenses):
    """Jobs for the newest version of each open-access article of those numbers.

    The bucket's newest inventory lists the files of metadata.
    """
    prefix = "inventory-reports/pmc-oa-opendata/metadata/"
    listing = page(f"{base}?list-type=2&delimiter=/&prefix={prefix}", "<ListBucketResult")
    newest = max(re.findall(rf"<Prefix>({prefix}\d[^<]+)</Prefix>", listing))
    versions = []
    for part in json.loads(page(f"{base}{newest}manifest.json", '"files"'))["files"]:
        inventory = out / ".inventory" / Path(part["key"]).name
        fetch(base + part["key"], inventory, bar, partial(part.get, "MD5checksum"))
        with gzip.open(inventory, "rt") as f:
            names = (re.search(r"metadata/PMC(\d+)\.(\d+)\.json", line) for line in f)
            versions += [(int(name[1]), int(name[2])) for name in filter(None, names)]
    for number, version in dict(sorted(versions)).items():  # a number's highest comes last
        if number in numbers:
            name = f"PMC{number}.{version}"
            path = out / str(number // 10_000) / f"{name}.xml"  # not millions in one folder
            yield partial(fetch_article, base, name, path, bar, licenses)


def fetch_article(base, name, path, bar, licenses):
    """An article of PMC, unless it is retracted or its licence isn't wanted.

    ValueError where its metadata are odd.
    """
    text = page(f"{base}metadata/{name}.json", '"pmcid"')
    try:
        about = json.loads(text)
        unwanted = (about["is_retracted"] or not about["is_pmc_openaccess"]
                    or licenses and about["license_code"] not in licenses)
        key, md5 = re.fullmatch(r"https://[^/]+/(.+)\?md5=(\w{32})", about["xml_url"]).groups()
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{name}.json: odd metadata ({e})") from None
    if not unwanted:
        fetch(base + key, path, bar, lambda: md5)


def unpack(archive, folder):
    """The archive's content in `folder`, whole or not at all; nothing outside of it."""
    draft = Path(f"{folder}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        if archive.suffix == ".zip":
            shutil.unpack_archive(archive, draft)  # writes no member outside
        else:  # by hand and without folders: tarfile's own filter needs Python 3.11.4
            draft.mkdir()
            with tarfile.open(archive) as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    content = tar.extractfile(member).read()
                    (draft / Path(member.name).name).write_bytes(content)
    except (shutil.ReadError, tarfile.TarError) as e:
        raise ValueError(f"{archive}: {e}: delete it, download again") from None
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)


def fetch_files(base, out, names, bar):
    """Jobs for a source that is a few files. A job is a function that fetches one file."""
    for name in names:
        checksum = None
        if name.endswith(".bin"):  # Hugging Face tells the sha256 in the large file's pointer
            checksum = partial(published, base.replace("/resolve/", "/raw/") + name)
        yield partial(fetch, base + name, out / name, bar, checksum)


def outcome(job):
    """None, or the error that ended the job: OSError of the network or disk, ValueError of odd
    metadata."""
    try:
        job()
    except (OSError, ValueError) as e:
        return e


def download(source, out, base_url=None, files=None, licenses=()):
    """Fetch a source into `out`, CONNECTIONS files at a time; a rerun fetches what is missing."""
    if source in BY_HAND:
        raise ValueError(f"{source} has no plain address. {BY_HAND[source]} in --data's folder")
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", files or "0-999999999999")
    if not found:
        raise ValueError(f"--files {files}: give a number or a range, like 1-3")
    numbers = range(int(found[1]), int(found[2] or found[1]) + 1)
    base, out = (base_url or SOURCES[source]).rstrip("/") + "/", Path(out)
    errors, n_files = [], 0
    with tqdm(unit="B", unit_scale=True, desc=f"download {source}", disable=None) as bar, \
            ThreadPoolExecutor(CONNECTIONS) as pool:
        if source == "pubmed":
            jobs = fetch_pubmed(base, out, numbers, bar)
        elif source == "pmc":
            jobs = fetch_pmc(base, out, numbers, bar, licenses)
        else:
            jobs = fetch_files(base, out, FILES[source], bar)
        try:
            while some := list(itertools.islice(jobs, 1000)):  # a few of millions at a time
                n_files += len(some)
                errors += filter(None, pool.map(outcome, some))
        except KeyboardInterrupt:
            os._exit(130)  # at once: the pool would wait for its files
    if not n_files:
        raise ValueError(f"{base} lists no file numbered {files}: check --files")
    for error in errors:
        print(f"download: {error}")
    # odd records, a ValueError each, are left out while they are few
    if any(isinstance(e, OSError) for e in errors) or 100 * len(errors) > n_files:
        raise OSError(f"{len(errors)} of {n_files} files failed, run again; the last: {error}")
    if source in ("mmlu", "medquad"):  # load_qa reads folders
        unpack(out / FILES[source][0], out / "unpacked")
    print(f"download: {source} is whole in {out} ({n_files} files, {len(errors)} left out)")


# ---------------------------------------------------------------------------------------------
# the command line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    text = {"required": True, "help": ".jsonl or .txt file (.gz too), or a folder of them"}
    val_fraction = {"type": float, "default": 0.002, "help": "of documents (default: 0.002)"}
    workers = {"type": COUNT, "default": os.cpu_count(), "help": "processes (default: CPUs)"}

    def command(function, name, summary):
        sub = commands.add_parser(name, help=summary)
        sub.set_defaults(function=function)
        sub.add_argument("--out", required=True, help="folder for the result")
        return sub.add_argument

    add = command(tokenize, "tokenize", "text and tokenizer -> train.bin, val.bin, meta.json")
    add("--text", **text)
    add("--tokenizer", required=True, dest="tokenizer_name", metavar="DIR",
        help="folder of vocab.json and merges.txt, or gpt2 (from tiktoken's cache)")
    add("--val_fraction", **val_fraction)
    add("--no_eot", dest="eot", action="store_false",
        help="no end-of-text after each document (default: one)")
    add("--workers", **workers)

    command(make_demo, "demo", "an invented corpus with tokenizer, arrays and questions")

    add = command(cloze, "cloze", "held-out text -> questions, which of four words goes on here")
    add("--text", **text)
    add("--counts", required=True, help="text that the model trains on, for words' frequencies")
    add("--val_fraction", **val_fraction)
    add("--everyday", help="tokenizer's folder or gpt2: its whole words are everyday words, "
                           "others medical (default: not told apart)")
    add("--seed", type=int, default=17, help="of the choice of words (default: 17)")

    add = command(extract, "extract", "PubMed XML, JATS, JSON lines, .txt -> text/*.jsonl.gz")
    add("inputs", nargs="+", metavar="INPUT", help="files or folders, plain or .gz")
    add("--labels", action="store_true", help="keep section labels (default: off)")
    add("--languages", nargs="*", default=[], help="PubMed's codes (default: all)")
    add("--skip_pmc", action="store_true", help="drop what is in PMC, as The Pile (default: off)")
    add("--workers", **workers)

    add = command(download, "download", "fetch a source, verified")
    add("source", choices=[*SOURCES, *BY_HAND], help="what to fetch")
    add("--base_url", help="a mirror of the source's address (default: the owner's)")
    add("--files", help="range of file numbers (pubmed) or PMC numbers (default: all)")
    add("--licenses", nargs="*", default=[], help="pmc: codes to keep (default: all)")

    flags = vars(parser.parse_args())
    flags.pop("function")(**flags)


if __name__ == "__main__":
    run_command(main)
