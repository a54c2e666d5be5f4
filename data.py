"""Token arrays -> batches; text -> token arrays; question sets; a demo; and the raw sources.

    python data.py extract pubmed/ pmc/ --out text            # PubMed XML, JATS, JSON lines, .txt
    python data.py tokenize --text text --tokenizer tokenizer --out data/pubmed

Reads what `download` fetched or what lies on disk. Writes text (*.jsonl.gz, a line a document
{"id", "text"}) and arrays: train.bin, val.bin (flat uint16), meta.json, the tokenizer beside them.
An output depends on inputs and flags alone: no time, path, host or number of workers.
Left out: language detection, near-duplicates, back matter (references, appendices, peer reviews).
"""

import argparse
import csv
import gc
import gzip
import hashlib
import html.entities
import itertools
import json
import math
import os
import random
import re
import shutil
import tarfile
import tempfile
import textwrap
import time
import xml.etree.ElementTree as ET
import zipfile
from array import array
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

import numpy as np
import requests
import urllib3
from tqdm import tqdm

from tokenizer import (
    MIB,
    Tokenizer,
    count_pretokens,
    hash64,
    in_processes,
    json_lines,
    load_named,
    natural,
    open_input,
    read_json,
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
    eot_id = meta["eot_id"] if ignore_eot else None
    step = world_size * micro_batch
    mine = rank * micro_batch + np.arange(micro_batch)
    for first in itertools.count(start, 64 * step):
        # 64 steps at once, since a permutation of few rows takes as long as one of many.
        samples = first + step * np.arange(64)[:, None] + mine  # (64, micro_batch)
        rows = samples % n_rows
        epochs = samples // n_rows
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permute(rows[here], n_rows, seed, epoch)
        # Opened anew: pages that a long-lived memmap has touched count as resident memory.
        # asarray: slices of a memmap proper are slow to make.
        array = np.asarray(np.memmap(path, np.uint16, "r"))
        for rows_of_step in rows:
            yield read_rows(array, rows_of_step, (micro_batch, seq_len), eot_id, device)


def val_batches(data_dir, seq_len, micro_batch, rank=0, world_size=1, max_tokens=None, device="cpu",
                ignore_eot=False):
    """Finite (x, y) like train_batches: every row of val.bin once, the short last one too.

    The rows come in a fixed permuted order, so that the first max_tokens (None: all) are a fair
    sample. All ranks yield the same number of batches, as a sharded model's forward is collective;
    where rows run out, a batch is filled up with targets -100.
    """
    meta = load_meta(data_dir)
    n_rows = math.ceil(meta["val"]["tokens"] / seq_len)
    order = permute(np.arange(n_rows), n_rows, seed=0, epoch=0)
    if max_tokens is not None:
        order = order[: math.ceil(max_tokens / seq_len)]
    eot_id = meta["eot_id"] if ignore_eot else None
    step = world_size * micro_batch
    for first in range(0, len(order), step):
        # Ranks take turns row by row; the last ones may get fewer rows, or none.
        rows = order[first + rank : first + step : world_size]
        array = np.memmap(Path(data_dir) / "val.bin", np.uint16, "r")
        yield read_rows(array, rows, (micro_batch, seq_len), eot_id, device)


def read_rows(array, rows, shape, eot_id, device):
    """(x, y), int64 of `shape` (micro_batch, seq_len), x the rows, y the next token of each.

    y is -100, which the loss ignores, at a row's last position, as in the paper; in what the rows
    leave of the shape; and in place of eot_id, unless that is None.
    """
    import torch  # here, as it would cost extract and tokenize 200 MB and seconds

    seq_len = shape[1]
    x = np.zeros(shape, np.int64)
    y = np.full(shape, -100, np.int64)  # -100: ignored by the loss
    for i, row in enumerate(rows):
        tokens = array[row * seq_len : (row + 1) * seq_len]
        x[i, : len(tokens)] = tokens
        y[i, : len(tokens) - 1] = tokens[1:]
    if eot_id is not None:
        y[y == eot_id] = -100
    batch = torch.from_numpy(x), torch.from_numpy(y)
    if torch.device(device).type != "cuda":
        return batch
    # Pinned memory lets the copy run beside the GPU's work.
    return tuple(t.pin_memory().to(device, non_blocking=True) for t in batch)


def permute(index, n, seed, epoch):
    """The rows at positions `index` (int64, in [0, n)) of an epoch's order, a bijection of [0, n).

    It takes no memory and finds any position at once. A Feistel network of six rounds shuffles the
    numbers of 2 * half bits, the least even number that n needs. A round keeps one half of the bits
    and mixes it into the other. Since a round can be undone, no two positions get the same row. A
    row beyond n is shuffled again until it falls inside (cycle walking, under 4 times on average).
    """
    # half of the bits of n - 1, rounded up
    half = ((n - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    keys = [hash64(f"{seed} {epoch} {r}") for r in range(6)]
    out = np.array(index, np.uint64)
    beyond = np.ones(out.shape, bool)  # those still to be shuffled: at first all
    while beyond.any():
        left = out[beyond] >> half
        right = out[beyond] & mask
        for key in keys:
            left, right = right, left ^ (mix64(right + key) & mask)
        out[beyond] = left << half | right
        beyond = out >= n
    return out.astype(np.int64)


def mix64(x):
    """splitmix64's finaliser on a uint64 array: each bit of the result depends on all bits of x."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
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
    meta = json.loads((folder / "meta.json").read_text())
    for split in ("train", "val"):
        # uint16: two bytes a token
        path = folder / f"{split}.bin"
        n_bytes = 2 * meta[split]["tokens"]
        if path.stat().st_size != n_bytes:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes where meta.json says "
                             f"{n_bytes:,}: it was cut or replaced; {again}")
        if verify and hash_file(path) != meta[split]["sha256"]:
            raise ValueError(f"{path} is not the array of meta.json (sha256 differs); {again}")
        if verify and np.memmap(path, np.uint16, "r").max() >= meta["vocab_size"]:
            raise ValueError(f"{path} holds an id beyond the vocabulary of {meta['vocab_size']}; "
                             f"{again}")
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
SPLITS = ("train", "val")


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
    encode = partial(encode_documents, tokenizer_name, tokenizer.fingerprint, eot)
    meta = {"dtype": "uint16", "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id,
            "eot": eot, "tokenizer_sha256": tokenizer.fingerprint, "train": Counter(),
            "val": Counter()}
    make_folder(out, {"train.bin", "val.bin", "meta.json", "vocab.json", "merges.txt"})
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
        print(f"tokenize: {split}: {meta[split]['documents']:,} documents, "
              f"{meta[split]['tokens']:,} tokens")
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
        raise ValueError(f"{len(held)} documents in all: two are needed, one to validate on")
    yield "val", held[0][1]
    yield "train", held[1][1]


def validates(id_hash, val_fraction):
    """Whether the document of that hash is held out: it is in the lowest part of all hashes."""
    return id_hash < val_fraction * 2**64


def encode_documents(tokenizer_name, fingerprint, eot, documents):
    """[(split, text)] -> ({split: ids}, {split: {"tokens", "documents", "bytes"}}).

    The ids are an array of uint16, the documents' tokens one after the other.
    """
    tokenizer = load_once(tokenizer_name, fingerprint)
    ids = {split: array("H") for split in SPLITS}
    sizes = {split: Counter() for split in SPLITS}
    for split, text in documents:
        tokens = tokenizer.encode(text)
        if eot:
            tokens.append(tokenizer.eot_id)
        ids[split].extend(tokens)
        sizes[split].update(tokens=len(tokens), documents=1, bytes=len(text.encode()))
    return ids, sizes


@lru_cache(1)
def load_once(tokenizer_name, fingerprint):
    """A process's tokenizer, loaded at its first batch only. `fingerprint` tells one tokenizer from
    another that stood in the same folder before, as in tests."""
    return load_named(tokenizer_name)


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
            reason = textwrap.shorten(f"{type(e).__name__}: {e}", 300)
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
        paths = sorted(Path(dir).rglob(name.format(split)))
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
        letters = sorted(row["options"])
        options = tuple(row["options"][letter] for letter in letters)
        answer = index_of(row["answer_idx"], letters, ident)
        if row["answer"] != options[answer]:
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
        ident, question, context, label = line.split("\t")
        yield yes_or_no(ident, question, context, label)


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
    write_json_lines(out / "text/demo.jsonl", documents)
    # The questions of a drug are all in one split: nothing about a drug of the test is trained on.
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
    """A file of a JSON object a line, in a folder that is made where missing."""
    make_folder(path.parent, {path.name})
    with replacing(path) as f:
        f.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def make_folder(folder, names):
    """Create `folder`; remove what a killed run left there under temporary names of `names`."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.tmp"):
        if path.name.rsplit(".", 2)[0] in names:  # name, process, tmp
            path.unlink()


def hash_file(path, name="sha256"):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, name).hexdigest()


# ---------------------------------------------------------------------------------------------
# extract: PubMed XML, JATS, JSON lines, .txt -> text/*.jsonl.gz

CONTAINERS = {"PubmedArticleSet", "PubmedBookArticleSet", "articles", "pmc-articleset"}
RECORD_LIMIT = 32 * MIB  # of XML between the ends of two records: several times any article
ENTITIES = {name[:-1]: text for name, text in html.entities.html5.items() if name.endswith(";")}
PILE_SETS = ("PubMed Abstracts", "PubMed Central")
NOTICES = {"correction", "retraction", "partial-retraction", "expression-of-concern"}
SUFFIX = re.compile(r"\.(xml|nxml|jsonl|json|txt)(\.gz)?$")


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
    parser.entity.update(ENTITIES)
    pending = 0
    try:
        with open_input(path) as f:
            check_prolog(chunk := f.read(MIB), path)
            while chunk:
                parser.feed(chunk)
                pending += len(chunk)
                if len(top) and local(top[0]) in CONTAINERS and len(top[0]) > 1:
                    yield from top[0][:-1]  # the last one may still be open
                    del top[0][:-1]
                    pending = 0
                if pending > RECORD_LIMIT:
                    raise ValueError(f"{path}: a record beyond {RECORD_LIMIT // MIB} MiB is no "
                                     "article: remove the file or raise RECORD_LIMIT")
                chunk = f.read(MIB // 16)
            parser.close()
    except (ET.ParseError, expat.ExpatError) as e:
        raise ValueError(f"{path}: malformed XML ({e}): download it again") from None
    yield from top[0] if local(top[0]) in CONTAINERS else top


def check_prolog(head, path):
    """Refuse entity declarations. XML allows them in the DOCTYPE only, before the root's start."""
    roots = []

    def refuse(name, *_):
        raise ValueError(f"{path} declares an entity ({name}): refused, it could grow endlessly")

    guard = expat.ParserCreate()
    guard.EntityDeclHandler = refuse
    guard.StartElementHandler = lambda tag, _: roots or roots.append(tag)
    guard.Parse(head)
    if not roots:
        raise ValueError(f"{path}: no XML element in its first MiB: not an article file")


def local(element):
    return element.tag.rpartition("}")[2]


def full_text(element):
    """All text of an element, inline tags included, whitespace normalised; "" for None."""
    return "" if element is None else " ".join("".join(element.itertext()).split())


def pubmed_document(record, options):
    """(id, text or None, why it was dropped or None) of a PubmedArticle or PubmedBookArticle.

    The text is title + "\\n" + abstract without section labels, as The Pile has it.
    """
    citation = record.find("MedlineCitation")
    book = record.find("BookDocument")
    article = book if citation is None else citation.find("Article")
    ident = (book if citation is None else citation).findtext("PMID").strip()
    if options["languages"] and not any(e.text in options["languages"]
                                        for e in article.findall("Language")):
        return ident, None, "another language"
    # not the references' ids, which lie deeper
    ids = record.findall("PubmedData/ArticleIdList/ArticleId") if options["skip_pmc"] else ()
    if any(e.get("IdType") == "pmc" for e in ids):
        return ident, None, "in PMC"
    parts = []
    for part in article.findall("Abstract/AbstractText"):
        if body := full_text(part):
            label = part.get("Label") if options["labels"] else None
            parts.append(f"{label}: {body}" if label else body)
    if not parts:
        return ident, None, "no abstract"
    return ident, f"{full_text(article.find('ArticleTitle'))}\n{' '.join(parts)}".strip(), None


JATS_DROPPED = {"ref-list", "graphic", "inline-graphic", "media", "supplementary-material", "fn",
                "object-id", "fn-group", "table-wrap-foot", "permissions", "attrib", "alt-text",
                "long-desc", "annotation", "related-article"}
JATS_BLOCKS = {"title", "subtitle", "article-title", "p", "sec", "abstract", "list", "list-item",
               "disp-formula", "disp-quote", "boxed-text", "caption", "fig", "table-wrap", "tr",
               "def-item", "statement", "verse-line", "speech"}
AFTER = {"label": "\0", "td": " | ", "th": " | ", "term": ": ", **dict.fromkeys(JATS_BLOCKS, "\n")}


def jats_text(*elements):
    """Text in reading order, a line per block (heading, paragraph, list item, caption, table row).

    Kept: captions; tables as "cell | cell"; formulas as their TeX or the letters of their MathML.
    Dropped: references, superscript citations (those in brackets stay), footnotes, supplements.
    """
    pieces = []

    def walk(e):
        tag, children = local(e), list(e)
        if tag in JATS_DROPPED or e.get("ref-type", "").endswith("fn") or \
                e.get("sec-type") == "supplementary-material":
            return
        if tag in ("sup", "xref") and is_superscript_citation(e, tag, "".join(pieces[-6:])[-2:]):
            pieces.append("\1")
            return
        if tag == "tex-math":  # the formula without LaTeX's preamble
            text = re.sub(r"(?s).*\\begin\{document\}|\\end\{document\}.*", "", e.text or "")
            pieces.append(" ".join(text.split()))
            return
        if tag == "alternatives":  # one formula or table, several times over
            ranks = ["tex-math", "math", "table"]
            ranked = sorted((ranks.index(local(c)), i) for i, c in enumerate(e)
                            if local(c) in ranks)
            children = [e[i] for _, i in ranked[:1]]
        pieces.append("\n" if tag in JATS_BLOCKS else " " if tag == "break" else "")
        pieces.append(re.sub(r"\s+", " ", e.text or ""))
        for child in children:
            walk(child)
            pieces.append(re.sub(r"\s+", " ", child.tail or ""))
        pieces.append(AFTER.get(tag, ""))

    for element in elements:
        walk(element)
    # \1: a citation dropped, with the commas between; \0 ends a label: "Table 1" joins its caption
    text = re.sub(r"\0\s*", " ", re.sub("\1(?:[,;–-]?\1)*", "", "".join(pieces)))
    lines = (" ".join(line.split()).strip("| ") for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def is_superscript_citation(e, tag, before):
    """<sup><xref>1</xref></sup>, <xref><sup>1</sup></xref>, or a number glued to the word."""
    if tag == "sup":
        return bool(len(e)) and all(x.get("ref-type") == "bibr" for x in e)
    glued = re.search("[a-z.)\\]”’%][,;]?$|\1[,;–-]?$", before, re.IGNORECASE)
    number = re.fullmatch(r"[\d,;–-]+", full_text(e))
    return e.get("ref-type") == "bibr" and bool(e.find("sup") is not None or glued and number)


def jats_document(article, name):
    """(id or None, text or None, why it was dropped or None) of a JATS article."""
    for e in article.iter():
        e.tag = local(e)
    meta = article.find("front/article-meta")
    meta = ET.Element("article-meta") if meta is None else meta
    ids = {e.get("pub-id-type"): (e.text or "").strip() for e in meta.findall("article-id")}
    pmc = (ids.get("pmcid") or ids.get("pmc") or "").upper().removeprefix("PMC").split(".")[0]
    ident = f"PMC{pmc}" if pmc else ids.get("pmid") or name
    if article.get("article-type") in NOTICES:
        return ident, None, "correction or retraction"
    main = [a for a in meta.findall("abstract")
            if a.get("abstract-type") not in ("graphical", "teaser", "toc", "precis")]
    main += article.findall("body")
    if not any(full_text(e) for e in main):
        return ident, None, "no abstract and no body"
    title, floats = meta.findall("title-group/article-title"), article.findall("floats-group")
    return ident, jats_text(*title, *main, *floats), None


def json_document(record, where):
    """Of {"text"}, {"title", "abstract"}, or The Pile's lines by their meta.pile_set_name."""
    pile, ident = (record.get("meta") or {}).get("pile_set_name"), str(record.get("id") or "")
    if pile and pile not in PILE_SETS:
        return ident, None, "another part of The Pile"
    if record.get("deleted"):
        return ident, None, "deleted"
    text = record.get("text")
    if text is None and "title" in record:
        if not record.get("abstract"):
            return ident, None, "no abstract"
        text = f"{record['title'].strip()}\n{record['abstract'].strip()}"
    if not isinstance(text, str):
        raise ValueError(f'{where} has neither "text" nor "title" and "abstract"')
    return ident, text.strip(), None


def documents(path, options):
    """(id or None, text or None, why it was dropped, "deleted" or None) of each record of a file.

    Where an article has no id, the name of its file may tell: PMC123.1.xml.
    """
    stem, kind, *_ = SUFFIX.split(path.name)
    name = re.fullmatch(r"(PMC\d+)(\.\d+)?", stem)
    name = name and name[1]
    if kind == "txt":
        yield name, read_txt(path).strip(), None
    elif kind in ("json", "jsonl"):
        for number, record in json_lines(path):
            yield json_document(record, f"{path}: line {number}")
    else:
        for record in xml_records(path):
            tag = local(record)
            if tag == "DeleteCitation":
                yield from ((e.text.strip(), None, "deleted") for e in record.findall("PMID"))
            elif tag in ("PubmedArticle", "PubmedBookArticle"):
                yield pubmed_document(record, options)
            elif tag == "article":
                yield jats_document(record, name)
            else:
                raise ValueError(f"{path}: <{tag}> is no record of PubMed or JATS: leave it out")


def last_of_each(ids):
    """Indices of the last occurrence of each id, by rising id."""
    return len(ids) - 1 - np.unique(ids[::-1], return_index=True)[1]


def extract_file(task):
    """One input -> one output, whole or absent; its counts, or a str that says what is wrong.

    Of several records of one id the last stays, a deletion too: all go to a nameless draft first.
    """
    path, output, options = task
    counts, ids, sizes = Counter(), array("Q"), array("I")
    gc.disable()  # XML trees have no cycles, and looking for some takes a third of the time
    try:
        with tempfile.TemporaryFile(dir=output.parent) as draft:
            for ident, text, reason in documents(path, options):
                if not text and reason != "deleted":
                    counts[reason or "empty"] += 1
                    continue
                ident = ident or f"{hash64(text):016x}"
                record = {"text": text} if text else {"deleted": True}
                line = json.dumps({"id": ident, **record}, ensure_ascii=False) + "\n"
                draft.write(line.encode())
                ids.append(hash64(ident))
                sizes.append(len((text or "").encode()))
            keep = np.zeros(len(ids), bool)
            keep[last_of_each(np.frombuffer(ids, np.uint64))] = True
            draft.seek(0)
            with replacing(output) as f, gzip.GzipFile("", "wb", 1, f, mtime=0) as gz:
                gz.writelines(itertools.compress(draft, keep))
    except RecursionError:
        return f"{path}: elements nested too deeply for an article: leave the file out"
    except (ValueError, OSError, AttributeError, KeyError) as e:
        return str(e) if str(path) in str(e) else f"{path}: {e}: damaged, get it anew"
    finally:
        gc.enable()
    kept = np.frombuffer(sizes, np.uint32)[keep]
    counts["documents"] = int(np.count_nonzero(kept))
    counts["bytes"] = int(kept.sum(dtype=np.int64))
    counts["deletions"] = len(kept) - counts["documents"]
    counts["replaced in its file"] = len(keep) - len(kept)
    return counts


def name_outputs(inputs, out):
    """(input, output) pairs. An output is named by the path beneath the folder given, "/" as "-"; a
    name that an earlier input took gets -2, -3 …: none collide, the same inputs give the same."""
    pairs, taken = {}, set()
    for given in map(Path, inputs):
        if not given.exists():
            raise FileNotFoundError(f"{given} does not exist: give files or folders")
        found = [given] if given.is_file() else sorted(given.rglob("*"), key=natural)
        found = [p for p in found if p.is_file() and SUFFIX.search(p.name) and out not in p.parents]
        if not found:
            raise ValueError(f"nothing to extract in {given}: .xml, .nxml, .jsonl, .json, .txt, "
                             "plain or .gz, are read (unpack .zst and .tar first)")
        for path in found:
            name = path.name if path == given else "-".join(path.relative_to(given).parts)
            stem = name = SUFFIX.sub("", name)
            copies = itertools.count(2)
            while name in taken and path not in pairs:
                name = f"{stem}-{next(copies)}"
            taken.add(name)
            pairs.setdefault(path, out / f"{name}.jsonl.gz")
    return list(pairs.items())


def extract(inputs, out, labels=False, languages=(), skip_pmc=False, workers=1, shard=None):
    """Extract every input file that has no output newer than itself; returns the summed counts."""
    out = Path(out)
    options = {"labels": labels, "languages": sorted(languages), "skip_pmc": skip_pmc}
    pairs = sharded(name_outputs(inputs, out), shard)
    settings = out / "extract.json"
    own = {settings.name} if shard is None else set()  # another shard may be writing it
    make_folder(out, {output.name for _, output in pairs} | own)
    if settings.exists() and json.loads(settings.read_text()) != options:
        raise ValueError(f"{out} was extracted with other options ({settings}): use another --out")
    with replacing(settings) as f:
        f.write(json.dumps(options).encode())
    todo = [(path, output, options) for path, output in pairs
            if not output.exists() or output.stat().st_mtime < path.stat().st_mtime]
    results = in_processes(extract_file, todo, workers, "extract")
    errors = [r for r in results if isinstance(r, str)]
    total = sum((r for r in results if isinstance(r, Counter)), Counter())
    dropped = sorted(total.keys() - {"documents", "bytes", "deletions"})
    print(f"extract: {len(todo) - len(errors)} files written, {len(pairs) - len(todo)} finished "
          f"before; {total['documents']:,} documents, {total['bytes']:,} bytes of text, "
          f"{total['deletions']:,} deletions passed on; dropped: "
          + (", ".join(f"{reason} {total[reason]:,}" for reason in dropped) or "none"))
    if errors:
        raise ValueError(f"{len(errors)} of {len(todo)} files failed, others are done; mend, "
                         "run again: " + "; ".join(errors[:5]))
    return total


# ---------------------------------------------------------------------------------------------
# download: from the owners' servers to whole, verified files

SOURCES = {
    "pubmed": "https://ftp.ncbi.nlm.nih.gov/pubmed/",
    "pmc": "https://pmc-oa-opendata.s3.amazonaws.com/",
    "mmlu": "https://people.eecs.berkeley.edu/~hendrycks/",
    "pubmedqa": "https://raw.githubusercontent.com/pubmedqa/pubmedqa/master/data/",
    "medquad": "https://github.com/abachaa/MedQuAD/archive/refs/heads/",
    "biomedlm": "https://huggingface.co/stanford-crfm/BioMedLM/resolve/main/",
}
FILES = {"mmlu": ["data.tar"], "medquad": ["master.zip"],
         "pubmedqa": ["ori_pqal.json", "test_ground_truth.json"],
         "biomedlm": ["config.json", "vocab.json", "merges.txt", "pytorch_model.bin"]}
BY_HAND = {
    "medqa": "https://github.com/jind11/MedQA links a Google Drive archive: put its data_clean",
    "medmcqa": "https://github.com/medmcqa/medmcqa links a Google Drive archive: put train.json, "
               "dev.json, test.json",
    "bioasq": "http://participants-area.bioasq.org (registration) has the golden files, BLURB's "
              "scripts make {train,dev,test}.tsv of them: put either",
}
AGENT = {"User-Agent": "biomedlm-data/1.0 (at most 4 connections)", "Accept-Encoding": "identity"}
TRIES, BACKOFF_S, CONNECTIONS, TIMEOUT_S = 7, 1.0, 4, (10, 30)
SLOWEST_BYTES_PER_S, SLOW_AFTER_S = 1000, 30  # a slower connection is dropped, then resumed


class Fault(Exception):
    """A transfer that may succeed when tried again; args: what happened, seconds to wait."""


def retry(function, url):
    """function() until it raises no Fault: TRIES times, 1, 2, 4 … 60 s apart, or as asked."""
    for attempt in range(TRIES):
        try:
            return function()
        except Fault as e:
            reason, *asked = e.args
            if attempt < TRIES - 1:
                time.sleep(min(60, max([BACKOFF_S * 2**attempt, *asked])))
    raise OSError(f"{url}: {reason}, {TRIES} times: try again later; files that are whole are kept")


@contextmanager
def opened(url, headers=()):
    """A streamed response of status 200, 206 or 416; other 4xx raise OSError, all else Fault."""
    try:
        with requests.get(url, headers=AGENT | dict(headers), stream=True, timeout=TIMEOUT_S) as r:
            if r.status_code == 429 or r.status_code >= 500:
                after = r.headers.get("Retry-After", "")
                raise Fault(f"status {r.status_code}", float(after) if after.isdecimal() else 0)
            if r.status_code not in (200, 206, 416):
                raise OSError(f"{url}: status {r.status_code}: check the address or --base_url")
            yield r
    except (requests.RequestException, urllib3.exceptions.HTTPError) as e:
        raise Fault(f"connection failed ({type(e).__name__})") from None


def page(url, pattern):
    """A small text (listing, checksum, metadata) in which `pattern` must occur."""

    def whole():
        with opened(url) as r:
            text = r.content.decode(errors="replace")
        if not re.search(pattern, text):
            raise Fault("not the expected content")
        return text

    return retry(whole, url)


def transfer(url, part, bar):
    """One connection: bring `part` to its full length; returns the sha256 if the server tells one.

    Resumes only the very version that `part` began with: its ETag is kept beside it.
    """
    tag = Path(f"{part}.etag")
    # one byte back: a file that a killed run left whole is answered like any other, not by a 416
    have = max(0, part.stat().st_size - 1) if part.exists() and tag.exists() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": tag.read_text()} if have else {}
    with opened(url, headers) as r:
        resumed = r.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if r.status_code == 416 or r.status_code == 206 and not resumed:
            part.unlink(missing_ok=True)
            raise Fault("the partial file does not fit")
        tag.unlink(missing_ok=True)
        with open(part, "ab") as f:
            f.truncate(have if resumed else 0)
            version = r.headers.get("ETag") or r.headers.get("Last-Modified") or "W/"
            if not version.startswith("W/"):  # a weak tag may stand for other bytes
                tag.write_text(version)
            start, got = time.monotonic(), 0
            while chunk := r.raw.read1(MIB):  # raises where the connection is cut
                f.write(chunk)
                got += len(chunk)
                bar.update(len(chunk))
                seconds = time.monotonic() - start
                if seconds > SLOW_AFTER_S and got < SLOWEST_BYTES_PER_S * seconds:
                    raise Fault("too slow")
        linked = (r.history or [r])[0].headers.get("X-Linked-ETag", "").strip('"')  # Hugging Face's
        return linked if len(linked) == 64 else None


def fetch(url, path, bar, md5=lambda: None):
    """Download to `path`: resumed, verified by md5() where there is one, renamed when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")

    def attempt():
        want, sha256 = md5(), transfer(url, part, bar)
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
            head = f.read(512).lstrip().lower()
        fault = None
        if want and hash_file(part, "md5") != want:
            fault = "md5 differs from the published one"
        elif sha256 and hash_file(part) != sha256:
            fault = "sha256 differs from the published one"
        elif head.startswith((b"<!doctype html", b"<html")):
            fault = "a web page in the file's place"
        elif path.suffix == ".gz" and not head.startswith(b"\x1f\x8b"):
            fault = "not a gzip file"
        Path(f"{part}.etag").unlink(missing_ok=True)
        if fault:
            part.unlink()
            raise Fault(fault)
        os.replace(part, path)

    if not path.exists():
        retry(attempt, url)


def fetch_pubmed(base, out, first, last, bar):
    """Jobs for the baseline, then the update files, of those numbered first to last."""

    def citations(url):
        md5 = lambda: page(url + ".md5", r"\b[0-9a-f]{32}\b").split("=")[-1].strip()
        fetch(url, out / url.rsplit("/", 1)[1], bar, md5)

    for folder in ("baseline/", "updatefiles/"):
        listing = page(base + folder, r"<a href|pubmed\d+n\d+")
        for name in sorted(set(re.findall(r"\bpubmed\d+n\d+\.xml\.gz\b", listing)), key=natural):
            if first <= int(re.search(r"n(\d+)", name)[1]) <= last:
                yield partial(citations, base + folder + name)


def fetch_pmc(base, out, first, last, bar, licenses):
    """Jobs for the newest version of each open-access article numbered first to last, by the
    bucket's newest inventory of metadata files; retracted ones and other licences are left out."""
    prefix = "inventory-reports/pmc-oa-opendata/metadata/"
    listing = page(f"{base}?list-type=2&delimiter=/&prefix={prefix}", "<ListBucketResult")
    newest = max(re.findall(rf"<Prefix>{prefix}(\d[^/<]+)/</Prefix>", listing))
    versions = {}
    for part in json.loads(page(f"{base}{prefix}{newest}/manifest.json", '"files"'))["files"]:
        inventory = out / ".inventory" / Path(part["key"]).name
        fetch(base + part["key"], inventory, bar, partial(part.get, "MD5checksum"))
        with gzip.open(inventory, "rt") as f:
            for _, key, *_ in csv.reader(f):
                if match := re.fullmatch(r"metadata/PMC(\d+)\.(\d+)\.json", key):
                    number, version = map(int, match.groups())
                    versions[number] = max(version, versions.get(number, 0))

    def article(number):
        name = f"PMC{number}.{versions[number]}"
        about = json.loads(page(f"{base}metadata/{name}.json", '"pmcid"'))
        if about["is_retracted"] or not about["is_pmc_openaccess"]:
            return
        if licenses and about["license_code"] not in licenses:
            return
        # https://HOST/PMC1.1/PMC1.1.xml?md5=HEX
        key, _, md5 = about["xml_url"].split("/", 3)[3].partition("?md5=")
        path = out / str(number // 10_000) / f"{name}.xml"  # not millions of files in one folder
        fetch(base + key, path, bar, lambda: md5)

    yield from (partial(article, n) for n in sorted(versions) if first <= n <= last)


def unpack(archive, folder):
    """The archive's content in `folder`, whole or not at all."""
    draft = Path(f"{folder}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        if archive.suffix != ".tar":
            shutil.unpack_archive(archive, draft)  # zipfile writes no member outside
        else:  # unpack_archive's own filter needs Python 3.11.4, and Debian 12 has 3.11.2
            with tarfile.open(archive) as tar:
                for member in tar:
                    name = Path(member.name)
                    plain = member.isfile() or member.isdir()
                    if not plain or name.is_absolute() or ".." in name.parts:
                        raise tarfile.TarError(f"{name} is no file of its own folder")
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                tar.extractall(draft)
    except (shutil.ReadError, tarfile.TarError, zipfile.BadZipFile) as e:
        raise ValueError(f"{archive}: {e}: delete it, download again") from None
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)


def download(source, out, base_url=None, files=None, licenses=()):
    """Fetch a source into `out`, CONNECTIONS files at a time; a rerun fetches what is missing."""
    if source in BY_HAND:
        raise ValueError(f"{source} has no plain address. {BY_HAND[source]} in --data's folder")
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", files or "0-999999999999")
    if not match:
        raise ValueError(f"--files {files}: give a number or a range, like 1-3")
    numbers, out = (int(match[1]), int(match[2] or match[1])), Path(out)
    base = (base_url or SOURCES[source]).rstrip("/") + "/"
    results = []  # a job's error or None

    def guarded(job):
        try:
            job()
        except (OSError, ValueError, KeyError) as e:
            return str(e)

    with tqdm(unit="B", unit_scale=True, desc=f"download {source}", disable=None) as bar, \
            ThreadPoolExecutor(CONNECTIONS) as pool:
        jobs = fetch_pubmed(base, out, *numbers, bar) if source == "pubmed" else \
            fetch_pmc(base, out, *numbers, bar, licenses) if source == "pmc" else \
            (partial(fetch, base + name, out / name, bar) for name in FILES[source])
        try:
            while some := list(itertools.islice(jobs, 1000)):  # a few of millions at a time
                results += pool.map(guarded, some)
        except KeyboardInterrupt:
            os._exit(130)  # at once; partial files stay, to be resumed
    if errors := [error for error in results if error]:
        raise OSError(f"{len(errors)} of {len(results)} files failed, run again; the first: "
                      + errors[0])
    if not results:
        raise ValueError(f"{base} lists no file numbered {files}: check --files")
    if source in ("mmlu", "medquad"):
        unpack(out / FILES[source][0], out / "unpacked")
    print(f"download: {source} is whole in {out} ({len(results)} addresses)")


# ---------------------------------------------------------------------------------------------
# the command line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    text = {"required": True, "help": ".jsonl or .txt file (.gz too), or a folder of them"}
    val_fraction = {"type": float, "default": 0.002, "help": "of documents (default: 0.002)"}
    workers = {"type": int, "default": os.cpu_count(), "help": "processes (default: CPUs)"}

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
