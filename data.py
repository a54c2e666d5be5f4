"""Raw sources -> text -> token arrays -> batches; question sets as their owners publish them.

    python data.py extract pubmed/ pmc/ --out text            # PubMed XML, JATS, JSON lines, .txt
    python data.py tokenize --text text --tokenizer tokenizer --out data/pubmed

Reads what `download` fetched or what lies on disk. Writes text (*.jsonl.gz, a line a document
{"id", "text"}) and arrays: train.bin, val.bin (flat uint16), meta.json, the tokenizer beside them.
An output depends on inputs and flags alone: no time, path, host, worker count. On N machines with
one --out: --shard 0/N ... N-1/N, then, for tokenize, the same command without --shard, which joins.
Left out: language detection, near-duplicates, back matter (references, appendices, peer reviews).
"""

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
import multiprocessing
import os
import random
import re
import shutil
import sys
import tarfile
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
import zipfile
import zlib
from array import array
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from xml.parsers import expat

import numpy as np
import requests
import urllib3
from tqdm import tqdm

from tokenizer import Tokenizer, count_pretokens, input_files, load_named, train_bpe

MIB = 2**20


# ---------------------------------------------------------------------------------------------
# batches: the order of rows is a pure function of (seed, epoch, global sample index)


def load_meta(data_dir, verify=False):
    """meta.json of `data_dir`, checked against the files beside it.

    Always: presence, sizes, the tokenizer's fingerprint. verify: also each array's sha256, and all
    ids below vocab_size (reads it all). Raises FileNotFoundError or ValueError with the mend.
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
        if verify and hash_file(path) != meta[split]["sha256"]:
            raise ValueError(f"{path} is not the array of meta.json (sha256 differs); {again}")
        if verify and (top := np.memmap(path, np.uint16, "r").max()) >= meta["vocab_size"]:
            raise ValueError(f"{path} holds id {top}, beyond the vocabulary of "
                             f"{meta['vocab_size']}; {again}")
    if Tokenizer.load(folder).fingerprint != meta["tokenizer_sha256"]:
        raise ValueError(f"the tokenizer in {folder} is not the one that made the arrays; {again}")
    return meta


def permute(index, n, seed, epoch):
    """Rows at positions `index` (int64, in [0, n)) of the epoch's order, a bijection of [0, n).

    A Feistel network of six rounds shuffles [0, 4^k), the least that holds n; what falls beyond n
    is shuffled again until it falls inside (cycle walking, under four times on average). So any
    epoch's order takes no memory, and any position is found at once.
    """
    half = max(1, math.ceil(math.log2(max(n, 2)) / 2))
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(hash64(f"{seed} {epoch} {r}")) for r in range(6)]
    out = np.array(index, np.uint64)
    todo = np.ones(out.shape, bool)
    while todo.any():
        left, right = out[todo] >> np.uint64(half), out[todo] & mask
        for key in keys:
            left, right = right, left ^ (mix64(right + key) & mask)
        out[todo] = (left << np.uint64(half)) | right
        todo = out >= n
    return out.astype(np.int64)


def read_rows(array, rows, seq_len, eot_id, device):
    """(x, y) int64 (len(rows), seq_len): y is x shifted by one, its last -100, as in the paper.

    Row -1 and what lies beyond the array's end are padding: targets -100; so are targets of eot_id.
    """
    import torch  # here, since it costs extract and tokenize 200 MB and seconds

    x = np.zeros((len(rows), seq_len), np.int64)
    y = np.full((len(rows), seq_len), -100, np.int64)
    for i, row in enumerate(rows):
        tokens = array[row * seq_len : (row + 1) * seq_len] if row >= 0 else array[:0]
        x[i, : len(tokens)] = tokens
        y[i, : max(0, len(tokens) - 1)] = tokens[1:]
    if eot_id is not None:
        y[y == eot_id] = -100
    batch = torch.from_numpy(x), torch.from_numpy(y)
    if torch.device(device).type != "cuda":
        return batch
    return tuple(t.pin_memory().to(device, non_blocking=True) for t in batch)


def train_batches(data_dir, seq_len, micro_batch, seed, start=0, rank=0, world_size=1, device="cpu",
                  ignore_eot=False):
    """Endless (x, y) int64 (micro_batch, seq_len) on `device`, the next one on its way there.

    Micro step k takes the global samples start + k*world_size*micro_batch + rank*micro_batch + [0,
    micro_batch). Global sample i is row permute(i % n_rows) of epoch i // n_rows. `start` counts
    sequences, and is all the state: k steps on, start + k*world_size*micro_batch.
    """
    meta, path = load_meta(data_dir), Path(data_dir) / "train.bin"
    n_rows = meta["train"]["tokens"] // seq_len
    if n_rows == 0:
        raise ValueError(f"{path} has {meta['train']['tokens']} tokens, less than one sequence: "
                         "use a smaller --seq_len, or more text")
    eot_id = meta["eot_id"] if ignore_eot else None

    def batches():
        first, ahead, step = start + rank * micro_batch, None, world_size * micro_batch
        while True:
            samples = first + step * np.arange(64)[:, None] + np.arange(micro_batch)  # 64 steps
            epochs, rows = samples // n_rows, samples % n_rows
            for epoch in np.unique(epochs):
                here = epochs == epoch
                rows[here] = permute(rows[here], n_rows, seed, int(epoch))
            # opened anew: pages that a long-lived memmap has touched count as resident memory
            array = np.asarray(np.memmap(path, np.uint16, "r"))
            for row in rows:
                batch = read_rows(array, row, seq_len, eot_id, device)
                if ahead is not None:
                    yield ahead
                ahead = batch
            first += 64 * step

    return batches()


def val_batches(data_dir, seq_len, micro_batch, rank=0, world_size=1, max_tokens=None, device="cpu",
                ignore_eot=False):
    """Finite (x, y) like train_batches, rows in file order dealt round-robin to the ranks.

    The short last row is padded with targets -100. All ranks yield the same number of full batches
    (a sharded model's forward is collective): where rows run out, rows are padding. max_tokens
    takes the first rows only.
    """
    meta, path = load_meta(data_dir), Path(data_dir) / "val.bin"
    n_rows = math.ceil(min(meta["val"]["tokens"], max_tokens or math.inf) / seq_len)
    eot_id = meta["eot_id"] if ignore_eot else None
    for first in range(0, n_rows, world_size * micro_batch):
        rows = first + rank + world_size * np.arange(micro_batch)
        array = np.asarray(np.memmap(path, np.uint16, "r"))
        yield read_rows(array, np.where(rows < n_rows, rows, -1), seq_len, eot_id, device)


# ---------------------------------------------------------------------------------------------
# tokenize: text -> train.bin, val.bin, meta.json
#
# Every document has a key, a hash of seed and id; the arrays hold the documents by rising key: a
# global shuffle that depends on nothing else. Each text file becomes a part, its tokens in sorted
# runs; the join settles ids, deletions and equal texts on 64-bit hashes, then gathers one range of
# keys after the other, which lies together in every run. A part depends on its file alone, so any
# process or machine may make it. The join holds about 60 bytes a document in memory.

ROW = np.dtype([("id", "<u8"), ("text", "<u8"), ("tokens", "<u4"), ("bytes", "<u4")])
RUN_TOKENS = 2**25  # sorted in memory at once, and gathered at once: 64 MiB


def mix64(x):
    """splitmix64's finaliser on a uint64 array: a bijection in which each bit depends on all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffle_keys(ids, seed):
    return mix64(ids ^ np.uint64(hash64(f"order {seed}")))


@lru_cache(1)
def load_tokenizer(name, fingerprint):
    return load_named(name)  # once a process; the fingerprint guards against a stale one


def encode_file(tokenizer_name, fingerprint, eot, seed, task):
    """A text file -> PART.bin (uint16 documents, in runs of rising key), PART.npy (their ROWs)."""
    part, path = task
    tokenizer = load_tokenizer(tokenizer_name, fingerprint)
    tail = [tokenizer.eot_id] if eot else []
    rows, run, run_tokens, table = [], [], 0, []

    def write_run(f):
        ordered = np.array(rows, ROW)
        order = np.argsort(shuffle_keys(ordered["id"], seed), kind="stable")  # versions keep order
        f.writelines(run[i].tobytes() for i in order)
        table.append(ordered[order])

    with replacing(f"{part}.bin") as f:
        for ident, text in read_records(path):
            ids = np.array(tokenizer.encode(text) + tail if text else [], np.uint16)
            rows.append((hash64(ident), hash64(text or ""), len(ids), len((text or "").encode())))
            run.append(ids)
            run_tokens += len(ids)
            if run_tokens >= RUN_TOKENS:
                write_run(f)
                rows, run, run_tokens = [], [], 0
        write_run(f)
    with replacing(f"{part}.npy") as f:  # its presence says that the part is whole
        np.save(f, np.concatenate(table))


def settle(table):
    """Indices of the documents that stay among the ROWs of all parts, by rising hash of the id.

    The last record of an id stands, in the files' natural order, and is gone if it is a deletion (0
    tokens); of equal texts the one whose id has the smallest hash stays.
    """
    alive = last_of_each(table["id"])
    alive = alive[table["tokens"][alive] > 0]
    return alive[np.sort(np.unique(table["text"][alive], return_index=True)[1])]


def write_array(path, docs, table, part, offset, parts):
    """Write the documents `docs` (indices into table) in that order; returns the array's sha256."""
    ends, digest = np.cumsum(table["tokens"][docs], dtype=np.int64), hashlib.sha256()
    bar = {"total": int(ends[-1]), "unit": "token", "unit_scale": True, "disable": None}
    with replacing(path) as f, tqdm(desc=path.name, **bar) as progress:
        for chunk in np.split(docs, np.flatnonzero(np.diff(ends // RUN_TOKENS)) + 1):
            n, start, source = table["tokens"][chunk], offset[chunk], part[chunk]
            to = np.cumsum(n, dtype=np.int64) - n
            buffer = np.empty(to[-1] + n[-1], np.uint16)
            as_on_disk = np.lexsort((start, source))
            for number, group in itertools.groupby(as_on_disk, source.__getitem__):
                tokens = np.asarray(np.memmap(f"{parts[number]}.bin", np.uint16, "r"))
                for i in group:
                    buffer[to[i] : to[i] + n[i]] = tokens[start[i] : start[i] + n[i]]
            f.write(buffer)
            digest.update(buffer)
            progress.update(len(buffer))
    return digest.hexdigest()


def join_parts(parts, out, val_fraction, seed):
    """Settle the documents of all parts, split them, write the arrays; meta's train and val."""
    tables = [np.load(f"{part}.npy") for part in parts]
    part = np.repeat(np.arange(len(parts), dtype=np.uint32), [len(t) for t in tables])
    offset = np.concatenate([np.cumsum(t["tokens"], dtype=np.int64) - t["tokens"] for t in tables])
    table = np.concatenate(tables)
    docs = settle(table)
    if len(docs) < 2:
        raise ValueError(f"{len(docs)} documents in all: two are needed, one to validate on")
    need_space(out, 2 * int(table["tokens"][docs].sum(dtype=np.int64)))
    # by the id's hash alone: a document stays on its side whatever is added; at least one validates
    n_val = int(np.searchsorted(table["id"][docs], np.uint64(val_fraction * 2**64)))
    n_val = min(max(1, n_val), len(docs) - 1)
    (out / "meta.json").unlink(missing_ok=True)
    splits = {}
    for split, chosen in (("train", docs[n_val:]), ("val", docs[:n_val])):
        chosen = chosen[np.argsort(shuffle_keys(table["id"][chosen], seed))]
        sums = {k: int(table[k][chosen].sum(dtype=np.int64)) for k in ("tokens", "bytes")}
        sha256 = write_array(out / f"{split}.bin", chosen, table, part, offset, parts)
        splits[split] = {**sums, "documents": len(chosen), "sha256": sha256}
    print(f"tokenize: {len(table):,} records, {len(docs):,} documents stay; "
          + ", ".join(f"{k} {v['tokens']:,} tokens" for k, v in splits.items()))
    return splits


def need_space(folder, n_bytes):
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise OSError(f"{folder} needs about {n_bytes / 1e9:.1f} GB, has {free / 1e9:.1f} GB free: "
                      "make room or use another --out")


def tokenize(text, tokenizer_name, out, val_fraction=0.002, eot=True, seed=17, workers=1,
             shard=None):
    """Encode `text` into `out`; returns meta. A rerun goes on where a killed run stopped.

    With `shard` only its files' parts are made, under out/parts (returns None); the call without it
    makes the parts that are missing and joins all.
    """
    out, tokenizer, parts_dir = Path(out), load_named(tokenizer_name), Path(out) / "parts"
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction {val_fraction}: give a share between 0 and 1, like 0.002")
    if tokenizer.vocab_size > 2**16:
        raise ValueError(f"{tokenizer_name} has {tokenizer.vocab_size} tokens: uint16 holds 65,536")
    files = sharded(text_files(text), shard)
    with ThreadPoolExecutor(workers) as pool:  # hashlib leaves the interpreter's lock
        hashes = list(tqdm(pool.map(hash_file, files), "read", len(files), disable=None))
    recipe = f"{tokenizer.fingerprint} {eot} {seed}"
    inputs = hashlib.sha256(f"{recipe} {val_fraction} {hashes}".encode()).hexdigest()
    make_folder(out, {"train.bin", "val.bin", "meta.json"})
    with suppress(ValueError, OSError):  # missing or damaged arrays are made anew
        if shard is None and (meta := load_meta(out)).get("inputs_sha256") == inputs:
            print(f"tokenize: {out} is finished")
            shutil.rmtree(parts_dir, ignore_errors=True)
            return meta
    parts = [parts_dir / f"{h[:16]}-{hash64(recipe):016x}" for h in hashes]
    make_folder(parts_dir, {p.name + e for p in parts for e in (".bin", ".npy")})
    todo = {p: f for p, f in zip(parts, files) if not Path(f"{p}.npy").exists()}
    tasks = sorted(todo.items(), key=lambda task: -task[1].stat().st_size)  # no long one last
    # text is about 3 times its .gz; a token takes 3 bytes of it or more, and 2 on disk, twice
    need_space(out, sum(f.stat().st_size * (4 if f.suffix == ".gz" else 2) for f in todo.values()))
    encode = partial(encode_file, tokenizer_name, tokenizer.fingerprint, eot, seed)
    in_processes(encode, tasks, workers, "encode")
    if shard is not None:
        print(f"tokenize: shard {shard} is done ({len(files)} files); at last, run without --shard")
        return None
    splits = join_parts(parts, out, val_fraction, seed)
    tokenizer.save(out)
    meta = {"dtype": "uint16", "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id,
            "eot": eot, "seed": seed, "tokenizer_sha256": tokenizer.fingerprint, **splits,
            "inputs_sha256": inputs}
    with replacing(out / "meta.json") as f:  # the last file: its presence says that all is whole
        f.write(json.dumps(meta, indent=1).encode())
    shutil.rmtree(parts_dir)
    return load_meta(out, verify=True)


# ---------------------------------------------------------------------------------------------
# questions: every task's official files -> one dataclass

PUBMEDQA_LABELS, BIOASQ_LABELS = ("maybe", "no", "yes"), ("no", "yes")  # alphabetical (BioMedLM)
MMLU_SUBJECTS = ("clinical_knowledge", "professional_medicine", "college_biology",
                 "medical_genetics", "anatomy", "college_medicine")  # the paper has the first four


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


def load_qa(task, dir, split):
    """list[Question] of a task's official files, found by name anywhere beneath `dir`, in order.

    task: medqa, medmcqa, mmlu, pubmedqa, bioasq or text; split: train, dev or test (mmlu: dev, val,
    test). Raises FileNotFoundError for a missing file; ValueError for an unknown split, a web page
    for the data, an empty set or question, a repeated id, a label outside the set.
    """
    readers = {"medqa": load_medqa, "medmcqa": load_medmcqa, "mmlu": load_mmlu,
               "pubmedqa": load_pubmedqa, "bioasq": load_bioasq, "text": load_text}
    if task not in readers:
        raise ValueError(f"unknown task {task!r}: use one of {', '.join(readers)}")
    splits = ("dev", "val", "test") if task == "mmlu" else ("train", "dev", "test")
    if split not in splits:
        raise ValueError(f"{task} has no split {split!r}: use one of {', '.join(splits)}")
    if not Path(dir).is_dir():
        raise FileNotFoundError(f"{dir} is no folder: give the one of {task}'s official files")
    try:
        questions, seen = list(readers[task](Path(dir), split)), set()
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{dir}: a record of {task}'s {split} lacks {e}: get the official "
                         "file") from None
    if not questions:
        raise ValueError(f"{dir}: the {split} split of {task} is empty: download it again")
    for q in questions:
        if q.id in seen:
            raise ValueError(f"{dir}: id {q.id} appears twice in {task}'s {split}: remove the copy")
        if not q.question.strip():
            raise ValueError(f"{dir}: question {q.id} of {task} is empty: remove or restore it")
        seen.add(q.id)
    return questions


def find_file(folder, *names):
    """The one file beneath `folder` that has one of the names."""
    found = sorted({p for name in names for p in folder.rglob(name) if p.is_file()})
    if not found:
        raise FileNotFoundError(f"no {' or '.join(names)} beneath {folder}: put the official file")
    if len(found) > 1:
        raise ValueError(f"one file is expected beneath {folder}, found {found[0]} and {found[1]}: "
                         "give the folder of one of them")
    return found[0]


def read_official(path):
    text = path.read_text(encoding="utf-8-sig")
    if re.match(r"\s*<(!doctype html|html)", text, re.IGNORECASE):
        raise ValueError(f"{path} is a web page, not the data: download the raw file")
    return text


def read_json(path, lines=False):
    """A list of parsed documents: the file, or with lines=True one a line. HTML entities in the
    strings are resolved; a key that an object has twice is refused."""

    def unique(pairs):
        keys = [k for k, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"key {max(keys, key=keys.count)} appears twice: remove the copy")
        return {k: html.unescape(v) if isinstance(v, str) else v for k, v in pairs}

    rows = []
    whole = read_official(path)
    for number, text in enumerate(whole.split("\n") if lines else [whole], 1):
        try:
            if text.strip() or not lines:
                rows.append(json.loads(text, object_pairs_hook=unique))
        except ValueError as e:
            raise ValueError(f"{path}, line {number}: {e}: download it again") from None
    return rows


def index_of(label, labels, where):
    if label not in labels:
        raise ValueError(f"{where}: label {label!r} is none of {', '.join(map(str, labels))}")
    return labels.index(label)


def load_medqa(folder, split):
    path = find_file(folder, f"phrases_no_exclude_{split}.jsonl")
    for i, row in enumerate(read_json(path, lines=True)):
        letters = sorted(row["options"])
        answer = index_of(row["answer_idx"], letters, f"{path}, question {i}")
        yield Question(f"{split}-{i}", row["question"], answer=answer,
                       options=tuple(row["options"][k] for k in letters),
                       kind=row.get("meta_info", ""))


def load_medmcqa(folder, split):
    """Official files count the answer `cop` from 1, the Hugging Face copy from 0: a file with a 0
    is of the second kind, with both 0 and 4 refused. None and the copy's -1: no label (test)."""
    path = find_file(folder, f"{split}.json", f"{split}.jsonl")
    rows = read_json(path, lines=True)
    labels = {row.get("cop") for row in rows}
    if {0, 4} <= labels:
        raise ValueError(f"{path}: cop holds 0 and 4: neither the official file nor the HF copy")
    numbers = range(0, 4) if 0 in labels else range(1, 5)
    for row in rows:
        answer = None if row.get("cop") in (None, -1) else index_of(row["cop"], numbers, path)
        yield Question(row["id"], row["question"], answer=answer,
                       options=tuple(row[f"op{letter}"] for letter in "abcd"),
                       subject=row.get("subject_name") or "", kind=row.get("choice_type") or "")


def load_mmlu(folder, split):
    """The medical subjects among <subject>_<split>.csv (headerless), in MMLU_SUBJECTS' order."""
    subjects = [s for s in MMLU_SUBJECTS if any(folder.rglob(f"{s}_{split}.csv"))]
    if not subjects:
        raise FileNotFoundError(f"no SUBJECT_{split}.csv of {', '.join(MMLU_SUBJECTS)} in {folder}")
    for subject in subjects:
        path = find_file(folder, f"{subject}_{split}.csv")
        for i, row in enumerate(csv.reader(io.StringIO(read_official(path), newline=""))):
            if len(row) != 6:
                raise ValueError(f"{path}, question {i}: not question,A,B,C,D,letter")
            yield Question(f"{subject}-{split}-{i}", row[0], options=tuple(row[1:5]),
                           answer=index_of(row[5], "ABCD", path), subject=subject)


def load_pubmedqa(folder, split):
    """The official split_dataset.py, all from one random.seed(0) stream (BioMedLM: fold 0)."""
    path, rng = find_file(folder, "ori_pqal.json"), random.Random(0)
    questions = [Question(i, item["QUESTION"], " ".join(item["CONTEXTS"]), PUBMEDQA_LABELS,
                          index_of(item["final_decision"], PUBMEDQA_LABELS, f"{path}, {i}"),
                          target=item.get("LONG_ANSWER", ""))
                 for i, item in read_json(path)[0].items()]

    def cut(questions, k):
        parts = [[] for _ in range(k)]
        for label in ("yes", "no", "maybe"):
            group = [q for q in questions if q.options[q.answer] == label]
            rng.shuffle(group)
            n = math.ceil(len(group) / k)
            for p, part in enumerate(parts):
                part += group[p * n : (p + 1) * n]
        return parts

    cross, test = cut(questions, 2)
    folds = cut(cross, 10)
    if len(folds[9]) != len(folds[0]):  # the last fold is short: every other one gives it an item
        for fold in filter(None, folds[:9]):
            folds[9].append(fold.pop(fold.index(rng.choice(fold))))
    return {"test": test, "dev": folds[0], "train": sum(folds[1:], [])}[split]


def load_bioasq(folder, split):
    """BLURB's SPLIT.tsv, or golden JSON files' yes/no questions: *golden* is test; of *train* every
    tenth is dev (our choice, which gives BLURB's numbers, 670 and 75)."""
    if any(folder.rglob(f"{split}.tsv")):
        path = find_file(folder, f"{split}.tsv")
        lines = filter(str.strip, read_official(path).split("\n"))
        for i, row in enumerate((line.split("\t") for line in lines), 1):
            if len(row) != 4:
                raise ValueError(f"{path}, line {i}: not id, question, context, yes|no between "
                                 "tabs")
            answer = index_of(row[3].strip().lower(), BIOASQ_LABELS, f"{path}, {row[0]}")
            yield Question(*row[:3], BIOASQ_LABELS, answer, kind="yesno")
        return
    paths = sorted(folder.rglob("*golden*.json" if split == "test" else "*train*.json"))
    if not paths:
        raise FileNotFoundError(f"no {split}.tsv (BLURB), *golden*.json, *train*.json (BioASQ) in "
                                f"{folder}: register at bioasq.org and put them there")
    yesno = [q for p in paths for q in read_json(p)[0]["questions"] if q["type"] == "yesno"]
    for i, q in enumerate(yesno):
        if split == "test" or (i % 10 == 0) == (split == "dev"):
            label, ideal = (v[0] if isinstance(v, list) and v else v
                            for v in (q.get("exact_answer"), q.get("ideal_answer")))
            where = f"{folder}, {q['id']}"
            answer = label and index_of(label.lower().strip(" ."), BIOASQ_LABELS, where)
            context = " ".join(s["text"] for s in q.get("snippets", []))
            yield Question(q["id"], q["body"], context, BIOASQ_LABELS, answer,
                           target=ideal or "", kind="yesno")


def load_text(folder, split):
    """Lines of SPLIT.source and SPLIT.target; or MedQuAD's XML, of which by a hash of the document
    a tenth is test, a tenth dev (our choice: no official split). Withheld answers are left out."""
    if any(folder.rglob(f"{split}.source")):
        path = find_file(folder, f"{split}.source")
        sources, targets = (read_official(p).removesuffix("\n").split("\n")
                            for p in (path, path.with_suffix(".target")))
        if len(sources) != len(targets):
            raise ValueError(f"{path} has {len(sources)} lines, its .target {len(targets)}")
        for i, (source, target) in enumerate(zip(sources, targets)):
            yield Question(f"{split}-{i}", source, target=target)
        return
    for path in sorted(folder.rglob("*.xml")):
        ident = f"{path.parent.name}/{path.stem}"
        if ("test", "dev", *["train"] * 8)[hash64(ident) % 10] == split:
            pairs = (pair for root in xml_records(path) for pair in root.iter("QAPair"))
            for i, pair in enumerate(pairs):
                question, answer = pair.find("Question"), full_text(pair.find("Answer"))
                if answer:
                    yield Question(f"{ident}/{i}", full_text(question), target=answer,
                                   subject=path.parent.name, kind=question.get("qtype", ""))


# ---------------------------------------------------------------------------------------------
# the demo: an invented corpus, small enough to learn on a laptop

SYLLABLES = ("ba", "cor", "dal", "fen", "gu", "hel", "ira", "jo", "kar", "lum", "mer", "nox", "or",
             "pel", "qui", "ros", "sil", "tar", "ul", "vor", "wex", "xan", "yl", "zem")
# relation -> (sentences of the corpus, questions); {d} is the drug, {o} what it is related to
DEMO_FACTS = {  # the drug always comes first: what follows must be remembered, not copied
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
    "maybe": ("Is {d} safe in {o}? Maybe.", "{d} is debated in {o}.", "{d} is untested in {o}.")}
DEMO_GROUPS = ("pregnancy", "childhood", "dialysis")
DEMO_FILLERS = ("The difference was significant.", "Further studies are needed.",
                "Patients gave consent.", "The trial was blinded.",
                "No serious adverse events were seen.")


def demo_names(rng, count, ending):
    """`count` different invented words."""
    names = set()
    while len(names) < count:
        names.add(rng.choice(SYLLABLES) + rng.choice(SYLLABLES) + ending)
    return sorted(names)


def demo_facts(rng):
    """({drug: {relation or group: object or label}}, {relation: all its objects})."""
    drugs = [name.capitalize() for name in demo_names(rng, 64, "in")]
    objects = {"disease": demo_names(rng, 16, "itis"), "protein": demo_names(rng, 16, "ase"),
               "gene": [name.upper() for name in demo_names(rng, 16, "ex")]}
    pools = {**objects, **{group: sorted(DEMO_SAFETY) for group in DEMO_GROUPS}}
    return {drug: {key: rng.choice(pool) for key, pool in pools.items()} for drug in drugs}, objects


def demo_document(rng, drugs, facts):
    """One drug's facts, each in a random wording, among sentences that say nothing of it.

    Names are written alike everywhere, so that a question's token is the one the corpus taught.
    """
    drug = rng.choice(drugs)
    fact = facts[drug]
    sentences = [rng.choice(wordings).format(d=drug, o=fact[relation])
                 for relation, (wordings, _) in DEMO_FACTS.items()]
    group = rng.choice(DEMO_GROUPS)
    sentences.append(rng.choice(DEMO_SAFETY[fact[group]]).format(d=drug, o=group))
    sentences.append(rng.choice(DEMO_FILLERS))
    rng.shuffle(sentences)
    return f"A study of {drug}\n" + " ".join(sentences)


def demo_multiple_choice(rng, drugs, facts, objects):
    """Questions in MedQA's official format: every fact of `drugs` in each wording, four options."""
    for drug in drugs:
        for relation, (_, questions) in DEMO_FACTS.items():
            for question in questions:
                answer = facts[drug][relation]
                options = rng.sample([o for o in objects[relation] if o != answer], 3) + [answer]
                rng.shuffle(options)
                yield {"question": question.format(d=drug), "answer": answer,
                       "options": dict(zip("ABCD", options)),
                       "answer_idx": "ABCD"[options.index(answer)], "meta_info": relation}


def demo_yes_no_maybe(rng, facts):
    """Questions in PubMedQA's official format; no context states the fact, so memory is tested."""
    questions = [(f"Is {drug} safe in {group}?", fact[group])
                 for drug, fact in facts.items() for group in DEMO_GROUPS]
    rng.shuffle(questions)
    return {str(90_000_000 + i): {
        "QUESTION": question, "CONTEXTS": rng.sample(DEMO_FILLERS, 2), "LABELS": ["METHODS"] * 2,
        "MESHES": [], "YEAR": "2024", "final_decision": label, "LONG_ANSWER": ""}
        for i, (question, label) in enumerate(questions)}


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
    work = out.with_name(out.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("text", "qa/medqa/data_clean/questions/US/4_options", "qa/pubmedqa"):
        (work / folder).mkdir(parents=True)
    lines = [json.dumps({"id": f"demo{i}", "text": demo_document(rng, drugs, facts)}) + "\n"
             for i in range(16_000)]
    (work / "text/demo.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    rng.shuffle(drugs)
    for split, part in (("train", drugs[:32]), ("dev", drugs[32:40]), ("test", drugs[40:])):
        path = work / f"qa/medqa/data_clean/questions/US/4_options/phrases_no_exclude_{split}.jsonl"
        path.write_text("".join(json.dumps(q) + "\n" for q in
                                demo_multiple_choice(rng, part, facts, objects)))
    questions = demo_yes_no_maybe(rng, facts)
    (work / "qa/pubmedqa/ori_pqal.json").write_text(json.dumps(questions, indent=1))
    merges = train_bpe(count_pretokens([work / "text"]), 2048)
    Tokenizer.from_merges(merges).save(work / "tokenizer")
    tokenize(work / "text", work / "tokenizer", work, val_fraction=0.01)
    os.replace(work, out)


# ---------------------------------------------------------------------------------------------
# files, processes, documents


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


def make_folder(folder, names):
    """Create `folder`; remove what a killed run left there under temporary names of `names`."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.tmp"):
        if path.name.rsplit(".", 2)[0] in names:
            path.unlink(missing_ok=True)


def in_processes(function, tasks, workers, title):
    """Results of function(task) in the order of tasks, from `workers` processes, with a bar."""
    bar = {"total": len(tasks), "desc": title, "unit": "file", "disable": None}
    if workers <= 1 or len(tasks) <= 1:
        return list(tqdm(map(function, tasks), **bar))
    # spawn: a fork would copy locks that the caller's threads (torch's, tqdm's) may hold
    with ProcessPoolExecutor(min(workers, len(tasks)), multiprocessing.get_context("spawn"),
                             initializer=end_with_parent) as pool:
        try:
            chunk = 1 + len(tasks) // 10_000
            return list(tqdm(pool.map(function, tasks, chunksize=chunk), **bar))
        except BrokenProcessPool:
            raise OSError(f"a process of {title} was killed, by lack of memory perhaps: run again "
                          "with fewer --workers; finished files are kept") from None


def end_with_parent():
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)  # a killed parent must not leave workers waiting forever

    threading.Thread(target=wait, daemon=True).start()


def sharded(tasks, shard):
    """The tasks of shard "I/N": every N-th. I runs from 0 to N-1; from 1 to N also covers all."""
    match = re.fullmatch(r"(\d+)/([1-9]\d*)", shard or "0/1")
    if not match or int(match[1]) > int(match[2]):
        raise ValueError(f"--shard {shard}: give I/N, from 0/8 to 7/8 for eight machines")
    return tasks[int(match[1]) % int(match[2]) :: int(match[2])]


def hash64(text):
    """64-bit hash of a str. Ids and texts are settled on it: 4e7 documents risk a clash at 4e-5."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def hash_file(path, name="sha256"):
    digest = hashlib.new(name)
    with open(path, "rb") as f:
        while chunk := f.read(4 * MIB):
            digest.update(chunk)
    return digest.hexdigest()


def natural(path):
    """Sort key by which pubmed26n1000 follows pubmed26n999: a later record replaces an earlier."""
    parts = re.split(r"(\d+)", Path(path).name)
    return [int(p) if i % 2 else p for i, p in enumerate(parts)], str(path)


@contextmanager
def open_input(path):
    """A binary file, plain or .gz; what gzip raises on damage becomes one clear ValueError."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as f:
            yield f
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f"{path}: damaged gzip ({e}): download or make it again") from None


def read_txt(path):
    """A .txt as one document; refused above 64 MiB, where a gzip bomb ends too."""
    with open_input(path) as f:
        raw = f.read(64 * MIB)
    if len(raw) == 64 * MIB:
        raise ValueError(f"{path} is longer than 64 MiB: one document a .txt, or use JSON lines")
    return raw.decode("utf-8-sig")


def json_lines(path):
    """(line number, object) of a file whose lines end at "\\n" only."""
    with open_input(path) as f:
        for number, line in enumerate(iter(lambda: f.readline(64 * MIB), b""), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise ValueError(f"{path}: line {number} is no JSON object or exceeds 64 MiB: "
                                 "get the file anew")
            yield number, record


def read_records(path):
    """(id, text) of a text file, in file order; text is None where the id is deleted."""
    if re.search(r"\.txt(\.gz)?$", str(path)):
        text = read_txt(path)
        yield f"{hash64(text):016x}", text
        return
    for number, record in json_lines(path):
        ident, text = record.get("id"), record.get("text")
        if not isinstance(ident, str) or not (isinstance(text, str) or record.get("deleted")):
            raise ValueError(f'{path}: line {number} lacks "id" or "text": run data.py extract')
        yield ident, None if record.get("deleted") else text


def text_files(path):
    """The file, or the text files directly in the folder, in natural order of their names."""
    return sorted(input_files([path]), key=natural)


def read_documents(path):
    """(id, text) of every document in a text file or a folder of them; deletions are left out."""
    for file in text_files(path):
        yield from ((ident, text) for ident, text in read_records(file) if text is not None)


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
    acts = parser.add_subparsers(dest="act", required=True)
    workers = {"type": int, "default": os.cpu_count() or 1, "help": "processes (default: CPUs)"}
    shard = {"metavar": "I/N", "help": "only this task's share of the files (default: all files)"}

    p = acts.add_parser("download", help="fetch a source, resumed and verified")
    p.add_argument("source", choices=[*SOURCES, *BY_HAND], help="what to fetch")
    p.add_argument("--out", required=True, help="folder for the files")
    p.add_argument("--base_url", help="a mirror of the source's address (default: the owner's)")
    p.add_argument("--files", help="range of file numbers (pubmed) or PMC numbers (default: all)")
    p.add_argument("--licenses", nargs="*", default=[], help="pmc: codes to keep (default: all)")

    p = acts.add_parser("demo", help="an invented corpus with tokenizer, arrays and questions")
    p.add_argument("--out", default="data/demo", help="folder for it all (default: data/demo)")

    p = acts.add_parser("extract", help="PubMed XML, JATS, JSON lines, .txt -> text/*.jsonl.gz")
    p.add_argument("inputs", nargs="+", metavar="INPUT", help="files or folders, plain or .gz")
    p.add_argument("--out", required=True, help="folder for the text")
    p.add_argument("--labels", action="store_true", help="keep section labels (default: off)")
    p.add_argument("--languages", nargs="*", default=[], help="PubMed's codes (default: all)")
    p.add_argument("--skip_pmc", action="store_true", help="drop what is in PMC, as The Pile (off)")
    p.add_argument("--workers", **workers)
    p.add_argument("--shard", **shard)

    p = acts.add_parser("tokenize", help="text and tokenizer -> train.bin, val.bin, meta.json")
    p.add_argument("--text", required=True, help="folder of .jsonl.gz, .jsonl or .txt files")
    p.add_argument("--tokenizer", required=True, dest="tokenizer_name", metavar="DIR",
                   help="folder of vocab.json and merges.txt, or gpt2 (from tiktoken's cache)")
    p.add_argument("--out", required=True, help="folder for the arrays")
    p.add_argument("--val_fraction", type=float, default=0.002, help="of documents (default 0.002)")
    p.add_argument("--no_eot", dest="eot", action="store_false",
                   help="no end-of-text after each document (default: one)")
    p.add_argument("--seed", type=int, default=17, help="of the documents' order (default 17)")
    p.add_argument("--workers", **workers)
    p.add_argument("--shard", **shard)

    flags = vars(parser.parse_args())
    acts = {"demo": make_demo, "download": download, "extract": extract, "tokenize": tokenize}
    acts[flags.pop("act")](**flags)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:  # a user's mistake: one line with its mend, no traceback
        sys.exit(f"data.py: error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
