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
#
# Every record is passed on in its order, as {"id", "text"}, or {"id", "deleted": true} where it has
# an id and no text to keep: so a later record that is dropped takes an earlier one's text along.
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
ENTITIES = {name[:-1]: text for name, text in html.entities.html5.items() if name.endswith(";")}
NAMED = re.compile(rb"&(?!#|amp;|lt;|gt;|quot;|apos;)")  # an entity that XML itself doesn't know
PILE_SETS = ("PubMed Abstracts", "PubMed Central")
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
    pending = 0
    try:
        with open_input(path) as f:
            chunk = f.read(CHUNK)
            # Entities are declared before the root. NUL: in UTF-16 the word would look different.
            if b"<!ENTITY" in chunk or b"\0" in chunk:
                raise ValueError(f"{path} declares an entity: refused, it could grow endlessly")
            while chunk:
                if NAMED.search(chunk):  # few files have any, and filling the table takes a while
                    parser.entity.update(ENTITIES)
                parser.feed(chunk)
                pending += len(chunk)
                if len(top) == 0:
                    raise ValueError(f"{path}: no XML element in its first 64 KiB: no article")
                if local(top[0]) in CONTAINERS and len(top[0]) > 1:
                    yield from top[0][:-1]  # the last one may still be open
                    del top[0][:-1]
                    pending = 0
                if pending > RECORD_LIMIT:
                    raise ValueError(f"{path}: a record beyond {RECORD_LIMIT // MIB} MiB is no "
                                     "article: remove the file or raise RECORD_LIMIT")
                chunk = f.read(CHUNK)
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
DROPPED = set(re.findall(r"\S+", """ref-list graphic inline-graphic media supplementary-material
    fn fn-group object-id permissions attrib alt-text long-desc annotation related-article"""))
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
    TeX, or (a)/(b), x^2, x_i, sqrt(x) of its MathML. ValueError for elements nested too deeply.
    """
    pieces = []
    try:
        for element in elements:
            walk(element, pieces)
    except RecursionError:
        raise ValueError("elements nested too deeply for an article") from None
    text = re.sub(f"{CITATION}([,;–-]?{CITATION})*", "", "".join(pieces))  # the commas between too
    text = re.sub(f"{LABEL}[\\s{LINE}]*", " ", text)
    # A script that is one number, word or character needs no brackets: x^2, but x^(n+1).
    text = re.sub(rf"{OPEN}([+−–-]?\s*[\d.,]+|[^\W\d]*|[^{OPEN}]){CLOSE}", r"\1", text)
    text = text.replace(OPEN, "(").replace(CLOSE, ")")
    text = re.sub(r"\^\s*[−–]\s*(?=\d)", "^-", text)  # one minus sign for all powers
    return "\n".join(filter(None, map(tidy, text.split(LINE))))


def walk(e, pieces):
    """Append an element's text and marks to pieces, none of which is empty.

    <p>5 × 10<sup>4</sup></p> makes LINE, "5 × 10", "^4", LINE. The text before an element decides
    on its mark, so that dropped elements and nested tags don't disturb: 1<i>0</i><sup>4</sup>.
    """
    tag = local(e)
    ref_type = e.get("ref-type", "")
    if tag in DROPPED or ref_type.endswith("fn") or e.get("sec-type") == "supplementary-material":
        return
    start = len(pieces)
    before = "".join([" ", *pieces[-2:]])[-2:]
    if tag in JOINTS and is_superscript_citation(e, tag, before):
        pieces.append(CITATION)
        return
    layout = LAYOUT.get(tag, "*")
    if tag == "mfenced":
        layout = e.get("open", "(") + "*,*" + e.get("close", ")")
    elif tag == "tex-math":  # the formula without LaTeX's preamble
        e.text = re.sub(r"(?s).*\\begin\{document\}|\\end\{document\}.*", "", e.text or "")
    first, *between, last = layout.split("*")
    pieces += filter(None, [first, e.text])
    for i, child in enumerate(shown(e, tag)):
        if i and between:
            pieces.append(between[min(i, len(between)) - 1])
        walk(child, pieces)
        pieces += filter(None, [child.tail])
    pieces += filter(None, [last])
    if tag in JOINTS:  # only now is known what is shown of it
        pattern, mark = JOINTS[tag]
        text = "".join(pieces[start:]).lstrip()
        if re.match(pattern, before[-1] + text):
            pieces[start:] = [mark + text]
    elif tag in ("td", "th"):  # a cell's paragraphs stay in its row
        pieces[start:] = ["".join(pieces[start:]).replace(LINE, " ")]


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
    return e.find("sup") is not None or bool(glued and number)


def tidy(line):
    """A line, whitespace normalised; of a table's row, the empty cells at the end are left out."""
    cells = line.split(CELL)
    while cells and not cells[-1].strip():
        cells.pop()
    return " ".join(" | ".join(cells).split())


# Each reader below gives the documents of a record: [(id or None, text or None, reason)]. Where
# there is no text, the reason says why: "no abstract". Most records hold one document.

OLDER = "older version"


def pubmed_documents(record, options):
    """Of a PubmedArticle or PubmedBookArticle: its document and a deletion of each older version.

    The text is title + "\n" + abstract without section labels, as The Pile has it.
    """
    citation = record.find("MedlineCitation")
    if citation is None:
        citation = article = record.find("BookDocument")
    else:
        article = citation.find("Article")
    *older, ident = versions(citation.find("PMID"))
    languages = [e.text for e in article.findall("Language")]
    ids = record.findall("PubmedData/ArticleIdList/ArticleId")  # the references' ids lie deeper
    abstract = pubmed_abstract(article, options["labels"])
    text = reason = None
    if options["languages"] and not set(languages) & set(options["languages"]):
        reason = "another language"
    elif options["skip_pmc"] and any(e.get("IdType") == "pmc" for e in ids):
        reason = "in PMC"
    elif abstract:
        text = f"{pubmed_text(article.find('ArticleTitle'))}\n{abstract}".strip()
    else:
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
    return " ".join((element.text or "").split())  # the same, faster: few have inline tags


def jats_documents(article, path):
    """Title, abstracts, body, floats and glossary of a JATS article.

    The id is the PMC's, or else the PMID, or else the file's name (PMC123.1.xml) if it tells one.
    """
    for e in article.iter():
        e.tag = local(e)
    meta = "front/article-meta/"
    ids = {e.get("pub-id-type"): (e.text or "").strip()
           for e in article.findall(meta + "article-id")}
    pmc = (ids.get("pmcid") or ids.get("pmc") or "").upper().removeprefix("PMC").split(".")[0]
    name = re.match(r"PMC\d+", path.name)  # PMC123.1.xml
    ident = f"PMC{pmc}" if pmc else ids.get("pmid") or name and name[0]
    if article.get("article-type") in (
            "correction", "retraction", "partial-retraction", "expression-of-concern"):
        return [(ident, None, "correction or retraction")]
    main = [e for e in article.findall(meta + "abstract")
            if e.get("abstract-type") not in ("graphical", "teaser", "toc", "precis")]
    main += article.findall("body")
    if not any(map(full_text, main)):
        return [(ident, None, "no abstract and no body")]
    title = article.findall(meta + "title-group/article-title")
    end = article.findall("floats-group") + article.findall("back/glossary")
    return [(ident, flatten(*title, *main, *end), None)]


def json_documents(record):
    """Of {"text"}, {"title", "abstract"}, or The Pile's lines by their meta.pile_set_name.

    {"id", "deleted": true} passes through, so that extracted text may be extracted again.
    """
    ident = str(record.get("id") or "") or None
    text = record.get("text")
    reason = None
    if (record.get("meta") or {}).get("pile_set_name", PILE_SETS[0]) not in PILE_SETS:
        text, reason = None, "another part of The Pile"
    elif record.get("deleted"):
        text, reason = None, "deleted"
    elif text is None and not record.get("abstract"):
        reason = "no abstract"
    elif text is None:
        text = f"{record['title'].strip()}\n{record['abstract'].strip()}"
    return [(ident, text and text.strip(), reason)]


def source_records(path):
    """(number, record) of a file: XML elements, JSON objects by line, or a .txt's (id, text)."""
    kind = SUFFIX.search(path.name)[1]
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


def extract_files(task):
    """Write an output from its files, whole or not at all: (counts, records skipped, errors).

    A bad record (no PMID, half a character, nested too deeply) is skipped; more than one in a
    hundred are an error, and so is a damaged file: then nothing is written.
    """
    output, paths, options = task
    counts, skipped, older = Counter(), [], set()
    gc.disable()  # XML trees have no cycles, and looking for some takes a third of the time
    try:
        with replacing(output) as f, gzip.GzipFile("", "wb", 1, f, mtime=0) as gz:
            for path in paths:
                for number, record in source_records(path):
                    counts["records"] += 1
                    try:
                        found = documents(record, path, options)
                        lines = [text_line(ident, text) for ident, text, _ in found]
                    except (ValueError, AttributeError, KeyError, TypeError) as e:
                        skipped.append(f"{path}: record {number}: {e!r}")
                        continue
                    gz.writelines(lines)
                    for ident, text, reason in found:
                        counts["documents" if text else reason or "empty"] += 1
                        if reason == OLDER:
                            older.add(ident)
            # again at the end: a version 1 may stand after its version 2
            gz.writelines(text_line(ident, None) for ident in sorted(older))
            if 100 * len(skipped) > counts["records"]:
                raise ValueError(f"{len(skipped)} of {counts['records']} records of {output.name} "
                                 f"are bad, the first: {skipped[0]}")
    except ValueError as e:
        return Counter(), [], [str(e)]
    except OSError as e:
        return Counter(), [], [f"{paths[0]} -> {output}: {e}"]
    finally:
        gc.enable()
    counts["skipped"] = len(skipped)
    return counts, skipped, []


def plan_outputs(inputs, out):
    """{output: its files}. An input that is a file makes an output of its own.

    In a folder, neighbours in natural order are gathered while they have at most OUTPUT_BYTES. An
    output is named by its first file's path beneath the folder given, "/" as "-"; a name that is
    taken gets -2, -3 ...: the same inputs give the same names.
    """
    plan, planned = {}, set()
    for given in map(Path, inputs):
        given = given.resolve()
        if not given.exists():
            raise FileNotFoundError(f"{given} does not exist: give files or folders")
        found = list(source_files(given, out))
        if not found:
            raise ValueError(f"nothing to extract in {given}: .xml, .nxml, .jsonl, .json, .txt, "
                             "plain or .gz, are read (unpack .zst and .tar first)")
        folder, size = None, 0
        for path in found:
            if path in planned:
                continue
            planned.add(path)
            n_bytes = path.stat().st_size
            size += n_bytes
            if path.parent != folder or size > OUTPUT_BYTES:
                folder, size = path.parent, n_bytes
                name = "-".join(path.relative_to(given).parts) or path.name
                files = plan[free_name(out, SUFFIX.sub("", name), plan)] = []
            files.append(path)
    return plan


def source_files(given, out):
    """The file, or the files in the folder, folder by folder in natural order; `out` left out."""
    if given.is_file() and SUFFIX.search(given.name):
        yield given
    for folder, folders, names in os.walk(given):
        folders.sort(key=natural)
        if Path(folder) != out:
            for name in sorted(names, key=natural):
                if SUFFIX.search(name):
                    yield Path(folder, name)


def free_name(out, stem, plan):
    """out/stem.jsonl.gz, or stem-2, stem-3 ... where an earlier input has that name."""
    output = out / f"{stem}.jsonl.gz"
    copies = itertools.count(2)
    while output in plan:
        output = out / f"{stem}-{next(copies)}.jsonl.gz"
    return output


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
        made = json.loads(journal.read_text())
    if made.get("options") != options:
        raise ValueError(f"{out} was extracted with other options ({journal}): use another --out")
    old, new, given = made["outputs"], {}, set()
    for output, paths in plan.items():
        stats = [(path.name, path.stat()) for path in paths]
        state = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        new[output.name] = [str(paths[0]), f"{hash64(str(state)):016x}"]
        given.update(map(str, paths))
    for name, source in old.items():
        first = source[0]
        if name not in new and first not in given:
            new[name] = source  # made of other inputs: it stays
        elif name in new and first != new[name][0]:
            raise ValueError(f"{out / name} holds the text of {first}, not of {new[name][0]}: "
                             "give both in one command, or use another --out")
    for name in old.keys() | new.keys():
        if old.get(name) != new.get(name):
            (out / name).unlink(missing_ok=True)
    with replacing(journal) as f:
        made = {"options": options, "outputs": new}
        f.write(json.dumps(made, indent=0, sort_keys=True).encode())


def extract(inputs, out, labels=False, languages=(), skip_pmc=False, workers=1):
    """Make every output that is missing or whose files have changed; returns the summed counts."""
    out = Path(out).resolve()
    options = {"labels": labels, "languages": sorted(languages), "skip_pmc": skip_pmc}
    plan = plan_outputs(inputs, out)
    make_folder(out, {"extract.json", *(output.name for output in plan)})
    remove_changed(plan, out, options)
    tasks = [(output, paths, options) for output, paths in plan.items() if not output.exists()]
    results = in_processes(extract_files, tasks, workers)
    total, errors = Counter(), []
    for counts, skipped, error in tqdm(results, "extract", len(tasks), disable=None):
        total += counts
        errors += error
        for record in skipped:
            tqdm.write(f"extract: skipped {record}")
    print(f"extract: {len(tasks) - len(errors)} outputs written, {len(plan) - len(tasks)} finished "
          "before; " + ", ".join(f"{name} {n:,}" for name, n in sorted(total.items())))
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
    "bioasq": "http://participants-area.bioasq.org (registration) has the golden files, BLURB's "
              "scripts make {train,dev,test}.tsv of them: put either",
}
AGENT = {"User-Agent": "biomedlm-data/1.0 (at most 4 connections)", "Accept-Encoding": "identity"}
TRIES, BACKOFF_S, CONNECTIONS, TIMEOUT_S = 5, 2.0, 4, (10, 30)
SLOWEST_BYTES_PER_S, SLOW_AFTER_S = 1000, 30  # a slower connection is dropped
PAGE_BYTES = 32 * MIB  # a listing of PubMed's baseline has 1 MB


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


def receive(url, file, bar=None, limit=math.inf):
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
            began, got = time.monotonic(), 0
            while chunk := response.raw.read1(MIB):  # raises where the connection is cut
                file.write(chunk)
                got += len(chunk)
                if got > limit:
                    raise OSError(f"{url}: beyond {limit:,} bytes, so no listing: check --base_url")
                if bar is not None:
                    bar.update(len(chunk))
                seconds = time.monotonic() - began
                if seconds > SLOW_AFTER_S and got < SLOWEST_BYTES_PER_S * seconds:
                    raise Fault("too slow")
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
        names = dict(re.findall(r"\b(pubmed\d+n(\d+)\.xml\.gz)\b", listing))
        for name in sorted(names, key=natural):
            url = base + folder + name
            if int(names[name]) in numbers:
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
    versions = {}
    for part in json.loads(page(f"{base}{newest}manifest.json", '"files"'))["files"]:
        inventory = out / ".inventory" / Path(part["key"]).name
        fetch(base + part["key"], inventory, bar, partial(part.get, "MD5checksum"))
        with gzip.open(inventory, "rt") as f:
            for line in f:
                if match := re.search(r"metadata/PMC(\d+)\.(\d+)\.json", line):
                    number, version = map(int, match.groups())
                    versions[number] = max(version, versions.get(number, 0))
    for number in sorted(versions):
        if number in numbers:
            name = f"PMC{number}.{versions[number]}"
            path = out / str(number // 10_000) / f"{name}.xml"  # not millions in one folder
            yield partial(fetch_article, base, name, path, bar, licenses)


def fetch_article(base, name, path, bar, licenses):
    """An article of PMC, unless it is retracted or its licence isn't wanted.

    ValueError where its metadata are odd.
    """
    text = page(f"{base}metadata/{name}.json", '"pmcid"')
    try:
        about = json.loads(text)
        wanted = about["is_pmc_openaccess"] and not about["is_retracted"]
        wanted = wanted and (not licenses or about["license_code"] in licenses)
        key, md5 = re.fullmatch(r"https://[^/]+/(.+)\?md5=(\w{32})", about["xml_url"]).groups()
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{name}.json: odd metadata ({e})") from None
    if wanted:
        fetch(base + key, path, bar, lambda: md5)


def unpack(archive, folder):
    """The archive's content in `folder`, whole or not at all; nothing outside of it."""
    draft = Path(f"{folder}.tmp").resolve()
    shutil.rmtree(draft, ignore_errors=True)
    try:
        if archive.suffix == ".zip":
            shutil.unpack_archive(archive, draft)  # writes no member outside
        else:  # by hand: tarfile's own filter needs Python 3.11.4
            with tarfile.open(archive) as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    path = (draft / member.name).resolve()
                    if draft not in path.parents:
                        raise tarfile.TarError(f"{member.name} lies outside")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(tar.extractfile(member).read())
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
    first, _, last = (files or "0-999999999999").partition("-")
    if not first.isdecimal() or not (last or first).isdecimal():
        raise ValueError(f"--files {files}: give a number or a range, like 1-3")
    numbers = range(int(first), int(last or first) + 1)
    base, out = (base_url or SOURCES[source]).rstrip("/") + "/", Path(out)
    results = []  # a job's error or None
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
                results += pool.map(outcome, some)
        except KeyboardInterrupt:
            os._exit(130)  # at once: the pool would wait for its files
    if not results:
        raise ValueError(f"{base} lists no file numbered {files}: check --files")
    errors = list(filter(None, results))
    for error in errors:
        print(f"download: {error}")
    # odd records, a ValueError each, are left out while they are few
    if any(isinstance(e, OSError) for e in errors) or 100 * len(errors) > len(results):
        raise OSError(f"{len(errors)} of {len(results)} files failed, run again; the last: "
                      f"{errors[-1]}")
    if source in ("mmlu", "medquad"):  # load_qa reads folders
        unpack(out / FILES[source][0], out / "unpacked")
    print(f"download: {source} is whole in {out} ({len(results)} files, {len(errors)} left out)")


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
