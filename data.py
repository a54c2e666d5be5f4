"""Token arrays -> batches; text -> token arrays; question sets; a demo; and the raw sources.

    python data.py extract pubmed/ pmc/ --out text            # PubMed XML, JATS, JSON lines, .txt
    python data.py tokenize --text text --tokenizer tokenizer --out data/pubmed

Reads what `download` fetched or what lies on disk. Writes text (*.jsonl.gz, a line a document
{"id", "text"}) and arrays: train.bin, val.bin (flat uint16), meta.json, the tokenizer beside them.
What an output holds depends on inputs and flags alone: no time, path, host or number of workers.
The acts, in this order: batches, tokenize, questions, the demo, cloze, extract, download, files.
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
import os
import random
import re
import shutil
import tarfile
import time
import xml.etree.ElementTree as ET
from array import array
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tokenizer import (
    COUNT,
    Tokenizer,
    count_pretokens,
    hash64,
    in_processes,
    json_lines,
    load_named,
    natural,
    numbers,
    open_input,
    read_json,
    read_records,
    read_records_backwards,
    replacing,
    run_command,
    text_files,
    train_bpe,
    write_json,
)

# ---------------------------------------------------------------------------------------------
# batches: token arrays -> x, y
#
# An array is one long line of tokens, a document after the other. It is cut into rows of seq_len,
# wherever that falls (here 6; "|" is end-of-text, "||" the cut):
#
#     The drug relieves pain . | || The cells were grown in vi || tro . | We saw mice || ...
#
# A run reads samples 0, 1, 2, ... without end. Sample i is the row at place i % n_rows of the order
# of epoch i // n_rows. So the order is a pure function of (seed, i): the number of ranks and the
# size of micro-batches don't matter, and one integer says where a run stands.


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
    with open(path, "rb") as file:  # kept open, as tokenize may replace the file meanwhile
        for first in itertools.count(start + rank * micro_batch, world_size * micro_batch):
            samples = range(first, first + micro_batch)
            rows = [epoch_order(n_rows, seed, i // n_rows)[i % n_rows] for i in samples]
            yield read_rows(file, rows, (micro_batch, seq_len), meta, ignore_eot, device)


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
    order = epoch_order(n_rows, seed=0, epoch=0)[:n_scored]
    step = world_size * micro_batch
    with open(path, "rb") as file:
        for first in range(0, n_scored, step):
            # Ranks take turns row by row; the last ones may get fewer rows, or none.
            rows = order[first : first + step][rank::world_size]
            yield read_rows(file, rows, (micro_batch, seq_len), meta, ignore_eot, device)


def read_rows(file, rows, shape, meta, ignore_eot, device):
    """(x, y), int64 of `shape` (micro_batch, seq_len), x the rows, y the next token of each.

    y is -100, which the loss ignores, at a row's last position (as in the paper), where the shape
    has more places than the rows fill and, with ignore_eot, where the token is end-of-text.
    """
    import torch  # here, as it would cost extract and tokenize 200 MB and seconds

    seq_len = shape[1]
    x = np.zeros(shape, np.int64)
    y = np.full(shape, -100, np.int64)
    for i, row in enumerate(rows):
        # no memmap: pages that it has touched count as resident memory
        file.seek(2 * seq_len * row)
        tokens = np.frombuffer(file.read(2 * seq_len), np.uint16)
        x[i, : len(tokens)] = tokens
        y[i, : len(tokens) - 1] = tokens[1:]
    if x.max() >= meta["vocab_size"]:  # it would end in an error of the embedding, or in worse
        raise ValueError(f"{file.name} holds id {x.max()}, beyond the vocabulary of "
                         f"{meta['vocab_size']}: run python data.py tokenize again")
    if ignore_eot:
        y[y == meta["eot_id"]] = -100
    batch = torch.from_numpy(x), torch.from_numpy(y)
    cuda = torch.device(device).type == "cuda"
    if cuda:  # Pinned memory lets the copy run beside the GPU's work.
        batch = [t.pin_memory() for t in batch]
    return tuple(t.to(device, non_blocking=cuda) for t in batch)


@lru_cache(2)  # two orders: a batch may cross from one epoch into the next
def epoch_order(n_rows, seed, epoch):
    """Rows 0 to n_rows - 1 in an epoch's order, an int64 array.

    It takes 8 bytes a row: for BioMedLM's 34.6B tokens in rows of 1024, 270 MB on each rank.
    """
    # RandomState, not default_rng: its numbers are the same in every version of numpy.
    return np.random.RandomState([seed, epoch]).permutation(n_rows)


def load_meta(data_dir, verify=False):
    """meta.json of `data_dir` as a dict, checked against the files beside it.

    Always: presence, sizes, the tokenizer's fingerprint. With verify it reads all of both arrays,
    and checks sha256 and that ids are below vocab_size. Raises FileNotFoundError or ValueError.
    """
    folder = Path(data_dir)
    again = f"run: python data.py tokenize --text DIR --tokenizer DIR --out {data_dir}"
    if not (folder / "meta.json").is_file():
        raise FileNotFoundError(f"{folder} has no meta.json; {again}")
    meta = read_json(folder / "meta.json")
    for split in SPLITS:
        path = folder / f"{split}.bin"
        about = meta[split]
        cut = path.stat().st_size != 2 * about["tokens"]  # uint16: two bytes a token
        if cut or verify and sha256_of(path) != about["sha256"]:
            raise ValueError(f"{path} is cut or replaced: its size or sha256 differs from "
                             f"meta.json's; {again}")
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


def tokenize(text, tokenizer_name, out, val_fraction=0.002, eot=True, workers=1):
    """Encode the text file or folder `text` into `out`; returns meta.

    A document goes to val.bin if the hash of its id is in the lowest val_fraction of all 64-bit
    numbers. So it stays on its side when text is added. The files are whole or absent; a killed run
    starts again. ValueError for fewer than two documents, or a vocabulary beyond uint16.
    """
    tokenizer = load_named(tokenizer_name)
    out = Path(out)
    if tokenizer.vocab_size > 2**16:
        raise ValueError(f"{tokenizer_name} has {tokenizer.vocab_size} tokens: uint16 holds 65,536")
    documents = split_documents(newest_documents(text_files(text)), val_fraction)
    # iter calls this for the next BATCH documents, until it returns [].
    batches = iter(lambda: list(itertools.islice(documents, BATCH)), [])
    encode = partial(encode_documents, tokenizer_name, tokenizer.fingerprint, eot)
    meta = {"dtype": "uint16", "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id,
            "eot": eot, "tokenizer_sha256": tokenizer.fingerprint}
    meta |= {split: Counter() for split in SPLITS}
    make_folder(out)
    with replacing(out / "train.bin") as train, replacing(out / "val.bin") as val:
        for encoded in in_processes(encode, batches, workers):
            for split, file in ("train", train), ("val", val):
                ids, sizes = encoded[split]
                file.write(ids)
                meta[split].update(sizes)
        if not meta["train"]["documents"]:
            raise ValueError(f"{text} has no document to train on beside the held-out ones: give "
                             "more text or a lower --val_fraction")
        # An old meta.json must not stand beside new arrays. The new one is written last.
        (out / "meta.json").unlink(missing_ok=True)
    tokenizer.save(out)
    for split in SPLITS:
        print(f"tokenize: {split}:", dict(meta[split]))
        meta[split]["sha256"] = sha256_of(out / f"{split}.bin")
    write_json(out / "meta.json", meta)
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
    counts = Counter()
    # disable=None: no bar where the output is no terminal
    for path in tqdm(files[::-1], "reading", unit="file", disable=None):
        for ident, text in read_records_backwards(path):
            id_hash = hash64(ident)
            if id_hash in ids:
                counts["replaced"] += 1
            elif not text:
                counts["deleted"] += 1
            elif (text_hash := hash64(text)) in texts:
                counts["equal"] += 1
            else:
                counts["kept"] += 1
                texts.add(text_hash)
                yield id_hash, text
            ids.add(id_hash)
    print(f"{counts.total():,} records read: {counts['replaced']:,} replaced by a later one of "
          f"their id, {counts['deleted']:,} deleted, {counts['equal']:,} equal to another's text")


def split_documents(documents, val_fraction):
    """("train" or "val", text) of each (hash of the id, text).

    The one with the lowest hash of all goes to val, however few there are. Only the end tells which
    one that is, so the lowest at hand is kept until then.
    """
    lowest = next(documents, None)
    for document in documents:
        if document < lowest:
            lowest, document = document, lowest
        id_hash, text = document
        yield "val" if id_hash < val_fraction * 2**64 else "train", text
    if lowest:
        yield "val", lowest[1]


@lru_cache(1)
def load_once(tokenizer_name, fingerprint):
    """The tokenizer, read once a process. fingerprint: another one in the same folder is read anew.
    """
    return load_named(tokenizer_name)


def encode_documents(tokenizer_name, fingerprint, eot, documents):
    """[(split, text)] -> {split: (ids, {"tokens", "documents", "bytes"})}.

    The ids are an array of uint16, the documents' tokens one after the other.
    """
    tokenizer = load_once(tokenizer_name, fingerprint)
    encoded = {split: (array("H"), Counter()) for split in SPLITS}
    for split, text in documents:
        ids, sizes = encoded[split]
        tokens = tokenizer.encode(text)
        if eot:
            tokens.append(tokenizer.eot_id)
        ids.extend(tokens)
        sizes.update(tokens=len(tokens), documents=1, bytes=len(text.encode()))
    return encoded


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
    """One item of a question set, whatever its task.

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


class Task(NamedTuple):
    """What differs between question sets.

    kind says what the model is asked to do: "choice" scores each option as the question's sequel,
    "labels" classifies context and question together, "text" writes the answer.
    """

    files: dict  # name, with {} for the split -> reader; the first name that exists is used
    kind: str
    length: int  # of a question with its context and answer, in tokens
    epochs: int  # this and lr: for a model of 1e9 parameters or more
    lr: float


def load_qa(task, dir, split):
    """list[Question] of a task's official files, found by name anywhere beneath `dir`, in order.

    task: a name in TASKS; split: train, dev or test. "val" is dev, but in mmlu, which has both.
    Raises FileNotFoundError for a missing file; ValueError, with the file and the question's place
    in it, for damage of any kind, an empty set, a repeated id, a label outside the set.
    """
    if split == "val" and task != "mmlu":
        split = "dev"
    reader, paths = official_files(task, dir, split)
    questions = {}
    for path in paths:
        own = {}
        try:
            for q in reader(path, split):
                if q.id in own:
                    raise ValueError(f"question {q.id} appears twice")
                own[q.id] = q
        except (csv.Error, AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:
            reason = repr(e)[:300]  # in one line
            raise ValueError(f"{path}, after {len(own)} questions: {reason}; get the official file "
                             "anew") from None
        questions |= own  # BioASQ's later years hold the earlier ones
    questions = list(questions.values())
    if reader in DIVIDE:
        questions = DIVIDE[reader](questions, split)
    if not questions:
        raise ValueError(f"{dir}: {split} of {task} is empty: get the official file anew")
    return questions


def official_files(task, dir, split):
    """(reader, paths) of the first of the task's file names that is found."""
    files = TASKS[task].files
    for name, reader in files.items():
        for called in {"dev": ("dev", "val", "validation")}.get(split, (split,)):
            paths = Path(dir).rglob(name.format(called))
            paths = sorted(filter(Path.is_file, paths))
            if paths:
                return reader, paths
    names = " or ".join(files).replace("{}", split)
    raise FileNotFoundError(f"no {names} beneath {dir}: put the official files there "
                            "(python data.py download --help says where they are)")


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
    for number, (_, item) in enumerate(json_lines(path)):
        ident = f"{split}-{number}"
        letters, options = zip(*sorted(item["options"].items()))
        answer = index_of(item["answer_idx"], letters, ident)
        yield Question(ident, item["question"], options=options, answer=answer,
                       kind=item.get("meta_info", ""))


MEDQA_FILE = "data_clean/questions/US/4_options/phrases_no_exclude_{}.jsonl"  # for a split


def medqa_row(question, answer, others, kind, rng):
    """A question in MedQA's official format, its options in random order."""
    options = [*others, answer]
    rng.shuffle(options)
    return {"question": question, "answer": answer, "options": dict(zip("ABCD", options)),
            "answer_idx": "ABCD"[options.index(answer)], "meta_info": kind}


def read_medmcqa(path, split):
    """The official files count the answer `cop` from 1, the Hugging Face copy from 0.

    A file with a 0 is of the second kind. Questions without a label (test) have no cop, or the
    copy's -1. Only this set has HTML's entities ("&lt;").
    """
    items = [item for _, item in json_lines(path)]
    labels = [item.get("cop") for item in items]
    first = 0 if 0 in labels else 1
    for item, label in zip(items, labels):
        answer = None
        if label not in (None, -1):
            answer = index_of(label, range(first, first + 4), item["id"])
        options = tuple(html.unescape(item[f"op{letter}"]) for letter in "abcd")
        yield Question(item["id"], html.unescape(item["question"]), options=options, answer=answer,
                       subject=item.get("subject_name") or "", kind=item.get("choice_type") or "")


def read_mmlu(path, split):
    """Rows of SUBJECT_SPLIT.csv, without a header: question, four options, letter."""
    subject = path.stem.rpartition("_")[0]
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
    splits = {"test": test, "dev": folds[0], "train": sum(folds[1:], [])}
    return splits.get(split, [])


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
    """The yes/no questions of BioASQ's own files: *golden* is test; divide_bioasq cuts the others.
    """
    if ("golden" in path.name) != (split == "test"):
        return
    for item in read_json(path)["questions"]:
        if item["type"] == "yesno":
            context = " ".join(snippet["text"] for snippet in item["snippets"])
            yield yes_or_no(item["id"], item["body"], context, item["exact_answer"])


def divide_bioasq(questions, split):
    """Every tenth is dev (our choice, which gives BLURB's numbers, 670 and 75)."""
    if split == "test":
        return questions
    return [q for i, q in enumerate(questions) if (i % 10 == 0) == (split == "dev")]


def yes_or_no(ident, question, context, label):
    answer = index_of("".join(label).lower(), BIOASQ_LABELS, ident)  # some have ["yes"]
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
            lowest[q.question] = lowest[q.target] = min(lowest[q.question], lowest[q.target])
    splits = ["test", "dev", *["train"] * 8]
    return [q for q in questions if splits[lowest[q.question] % 10] == split]


# BioMedLM: added in this order, so that [PAD] is 28896 on the released vocabulary. It has [CLS] and
# never uses it.
SPECIAL_TOKENS = {
    "choice": ("[PAD]", "[CLS]", "[SEP]"),
    "labels": ("[PAD]", "<|CONTEXT|>", "<|QUESTION|>", "<|ANSWER|>"),
    "text": ("[PAD]", "<|startoftext|>")}

# Lengths are BioMedLM's; text has 510 + 510, a token between them and one after. The learning rates
# lie inside its sweeps; for choice nothing is published. 20 epochs for labels are its working
# point, the other epochs our choice.
TASKS = {  # files, kind, length, epochs, lr
    "medqa": Task({"phrases_no_exclude_{}.jsonl": read_medqa}, "choice", 512, 5, 1e-5),
    "medmcqa": Task({"{}.json*": read_medmcqa}, "choice", 512, 5, 1e-5),
    "mmlu": Task({"*_{}.csv": read_mmlu}, "choice", 512, 5, 1e-5),
    "pubmedqa": Task({"ori_pqal.json": read_pubmedqa}, "labels", 512, 20, 2e-6),
    # BLURB's files; BioASQ's by its own names, as training11b.json, else by any
    "bioasq": Task({"{}.tsv": read_blurb, "*[0-9][bB]*.json": read_bioasq, "*.json": read_bioasq},
                   "labels", 1024, 20, 2e-6),
    "text": Task({"{}.source": read_source, "*.xml": read_medquad}, "text", 1022, 3, 1e-5),
}
# Of sets whose files are not split: reader -> (questions, split) -> those of the split.
DIVIDE = {read_pubmedqa: divide_pubmedqa, read_bioasq: divide_bioasq,
          read_medquad: divide_medquad}


def zero_shot_prompt(question):
    """The text that an option follows, after a space. The wording is our choice."""
    if question.kind.startswith("cloze"):  # plain text to go on with, nothing is asked
        return question.question
    return f"{question.context}\nQuestion: {question.question}\nAnswer:".lstrip()


# ---------------------------------------------------------------------------------------------
# the demo: an invented corpus, small enough to learn on a laptop
#
# A world of 64 drugs is drawn first: which disease a drug treats, which protein it inhibits, and so
# on. Two kinds of documents tell of it:
#
#     study       all facts of one drug, each in a random wording
#     questions   with their answers, asked plainly or as eval.py asks
#
# Documents ask questions of the train splits only. What dev and test ask stands in studies alone:
# a right answer joins a fact and a form that never stood together in the corpus.

SYLLABLES = (
    "ba cor dal fen gu hel ira jo kar lum mer nox or pel qui ros sil tar ul vor wex xan yl zem"
)
# relation: (sentences of the studies, questions); {d} is the drug, {o} what it is related to.
# The drug always comes first: what follows must be remembered, not copied.
DEMO_FACTS = {
    "disease": (
        ("{d} is used to treat {o}.", "{d} relieves {o} within days.", "{d} is given for {o}.",
         "With {d} patients recovered from {o}."),
        ("Which disease does {d} treat?", "Which disease is {d} given for?",
         "What is {d} used to treat?")),
    "protein": (
        ("{d} inhibits {o}.", "{d} binds to {o}.", "{d} acts by blocking {o}.",
         "After {d} the activity fell of {o}."),
        ("Which protein does {d} inhibit?", "Which protein does {d} act by blocking?",
         "What does {d} bind to?")),
    "gene": (
        ("{d} fails in carriers of {o}.", "Resistance to {d} comes from {o}.",
         "The response to {d} depends on {o}.", "{d} is weakened by mutations of {o}."),
        ("Which gene causes resistance to {d}?", "Mutations of which gene weaken {d}?",
         "Which gene does the response to {d} depend on?")),
    "safety": (
        ("{d} is {o} in pregnancy.", "{d} was {o} in pregnant women.", "Doctors call {d} {o}.",
         "Mothers know {d} as {o}."),
        ()),  # asked by yes, no and maybe
}
DEMO_SAFETY = {"safe": "yes", "harmful": "no", "untested": "maybe"}
DEMO_FILLERS = ("The difference was significant.", "Further studies are needed.",
                "Patients gave consent.", "The trial was blinded.",
                "No serious adverse events were seen.")


def make_demo(out):
    """Write the whole demo to `out`: text/, tokenizer/, token arrays, and questions in qa/.

    Drugs, genes, proteins and diseases are invented and their facts mean nothing: this is no
    medical knowledge. A fact holds in every document, so a model can learn it from the corpus.
    """
    out = Path(out)
    for path in out.rglob("*.[0-9]*.tmp"):  # of a run that was killed
        path.unlink()
    rng = random.Random(17)  # all draws come from this stream, so their order matters
    objects = {"disease": demo_names(rng, 8, "itis"), "protein": demo_names(rng, 8, "ase"),
               "gene": demo_names(rng, 8, "ex"), "safety": list(DEMO_SAFETY)}
    drugs = [name.capitalize() for name in demo_names(rng, 64, "in")]
    facts = {drug: {relation: rng.choice(pool) for relation, pool in objects.items()}
             for drug in drugs}
    # Multiple choice: all questions of a drug are in one split. Train has each of them four times,
    # with other wrong options.
    for split, part in (("train", drugs[:32] * 4), ("dev", drugs[32:40]), ("test", drugs[40:])):
        questions = demo_multiple_choice(rng, part, facts, objects)
        write_lines(out / "qa/medqa" / MEDQA_FILE.format(split), questions)
    # One line is valid as a whole JSON file too, which PubMedQA's is.
    write_lines(out / "qa/pubmedqa/ori_pqal.json", [demo_yes_no_maybe(rng, facts)])
    # There are few yes/no/maybe questions: each is drawn ten times as often.
    asked = load_qa("medqa", out, "train") + 10 * load_qa("pubmedqa", out, "train")
    documents = ({"id": f"demo{i}", "text": demo_document(rng, facts, asked)}
                 for i in range(16_000))
    write_lines(out / "text/demo.jsonl.gz", documents)
    # From here on the demo is treated as any corpus is. meta.json, written last, says it is whole.
    merges = train_bpe(count_pretokens([out / "text"]), 2048)
    Tokenizer.from_merges(merges).save(out / "tokenizer")
    tokenize(out / "text", out / "tokenizer", out, val_fraction=0.01)


def demo_names(rng, count, ending):
    """`count` different invented words."""
    syllables = SYLLABLES.split()
    return rng.sample([a + b + ending for a in syllables for b in syllables], count)


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
    return {
        str(number): {
            "QUESTION": f"Is {drug} safe in pregnancy?",
            "CONTEXTS": rng.sample(DEMO_FILLERS, 2),
            "final_decision": DEMO_SAFETY[facts[drug]["safety"]],
        }
        for number, drug in enumerate(facts, 90_000_000)
    }


def demo_document(rng, facts, asked):
    """Questions with their answers, or a study.

    Names are written alike everywhere, so that a question's token is the one a study taught.
    """
    if rng.random() < 0.35:
        return "\n".join(f"{rng.choice((q.question, zero_shot_prompt(q)))} {q.options[q.answer]}"
                         for q in rng.sample(asked, 3))
    drug = rng.choice(list(facts))
    sentences = [rng.choice(wordings).format(d=drug, o=facts[drug][relation])
                 for relation, (wordings, _) in DEMO_FACTS.items()]
    sentences.append(rng.choice(DEMO_FILLERS))
    rng.shuffle(sentences)
    return f"A study of {drug}\n" + " ".join(sentences)


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


def cloze(text, counts, out, val_fraction=0.002, everyday=None):
    """Write questions on the held-out documents of `text` to `out`, as a test set of MedQA's form.

    counts: the text that a model trains on, whose other documents tell how frequent a word is. What
    val_fraction holds out is the same as in tokenize. everyday: a tokenizer's folder or gpt2; words
    that are one token there are called everyday, all others medical.
    """
    tokenizer = load_named(everyday) if everyday else None
    counted = Counter()
    held_out_below = val_fraction * 2**64  # as in split_documents
    for id_hash, document in newest_documents(text_files(counts)):
        if id_hash >= held_out_below:
            counted.update(WORD.findall(document))
    for word, _ in counted.most_common(COMMONEST):
        del counted[word]
    by_ending = defaultdict(list)  # "tis" -> ["hepatitis", ...]
    for word in counted:
        by_ending[word[-3:]].append(word)
    questions = []
    for id_hash, document in newest_documents(text_files(text)):
        if id_hash < held_out_below:
            # An abstract is one passage. A long document has many, its paragraphs.
            for passage in [document] if len(document) < 4000 else document.split("\n"):
                found = cloze_questions(passage, counted, by_ending, tokenizer)
                questions += itertools.islice(found, AT_MOST)
    if not questions:
        raise ValueError(f"{text}: no word to ask in held-out documents: raise --val_fraction")
    write_lines(Path(out) / MEDQA_FILE.format("test"), questions)
    print(f"cloze: {len(questions):,} questions")


def cloze_questions(passage, counted, by_ending, everyday_tokenizer):
    """MedQA's rows of questions that end before a word which the passage has not used until then.

    The three other words end in the same three letters, are at most twice and at least half as
    frequent, and don't occur in the passage.
    """
    rng = random.Random(passage)
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
        if everyday_tokenizer:
            n_tokens = len(everyday_tokenizer.encode(" " + word))
            kind += ", everyday" if n_tokens == 1 else ", medical"
        yield medqa_row(before, options[0], options[1:], kind, rng)


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
MIB = 2**20
CHUNK = MIB // 16
RECORD_LIMIT = 32 * MIB  # of XML between the ends of two records: several times any article
OUTPUT_BYTES = 16 * MIB  # small files are gathered until they are this large together
ENTITIES = {name.rstrip(";"): text for name, text in html.entities.html5.items()}
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
    parser.entity.update(ENTITIES)
    head = b""  # all before the root, where entities are declared
    pending = 0
    with open_input(path) as f:
        try:
            for chunk in iter(partial(f.read, CHUNK), b""):
                if len(top) == 0:
                    head += chunk
                    if b"\0" in head:  # an entity's declaration would not be seen in it
                        raise ValueError("it is UTF-16 or no text: convert it to UTF-8")
                    if b"<!ENTITY" in head or len(head) > 2 * CHUNK:
                        raise ValueError("it declares an entity, which could grow endlessly, "
                                         "or has no XML element in its first 128 KiB: refused")
                parser.feed(chunk)
                pending += len(chunk)
                if len(top) and local(top[0]) in CONTAINERS and len(top[0]) > 1:
                    yield from top[0][:-1]  # the last one may still be open
                    del top[0][:-1]
                    pending = 0
                if pending > RECORD_LIMIT:
                    raise ValueError(f"a record beyond {RECORD_LIMIT // MIB} MiB is no "
                                     "article: remove the file or raise RECORD_LIMIT")
            parser.close()
        except ET.ParseError as e:
            if len(top) and local(top[0]) in CONTAINERS:
                yield from top[0][:-1]  # what stands before the damage
            raise ValueError(f"malformed XML ({e}): mend it or download it again") from None
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
    fn fn-group object-id permissions attrib alt-text long-desc annotation annotation-xml
    related-article"""))
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
# Where an element and the character before it would be read as one number or word, and what parts
# them: 10<sup>5</sup> -> 10^5, L<sup>-1</sup> -> L^-1, Atrx<sup>null</sup> -> Atrx^null,
# [<xref>1</xref><xref>2</xref>] -> [1, 2]. Where the reading stays, nothing does: m<sup>2</sup> ->
# m2, 2<sup>nd</sup> -> 2nd, H<sub>2</sub>O -> H2O.
JOINTS = {"sup": (r"\d\d|[\w)\]]([+−–-]\d|(?!(st|nd|rd|th|TM)\b)[^\W\d_])", "^"),
          "sub": (r"\d\d", "_"), "xref": (r"\d\d", ", ")}
LARGEST_SPAN = 50  # of a cell, in rows or columns: so a hostile table doesn't fill the memory
NOTE_MARK = re.compile(r"\s*[a-h]([,;\s]*[a-h])*\s*")  # a superscript that points to a table's note
PREAMBLE = re.compile(r"(?s).*\\begin\{document\}|\\end\{document\}.*")  # LaTeX's


def flatten(*elements):
    """Text of elements in reading order, a line per block (heading, paragraph, caption, row ...).

    A table's row is "cell | cell", an empty first cell stays: "| Drug | Placebo". A formula is its
    TeX, or (a)/(b), x^2, x_i, sqrt(x) of its MathML. RecursionError for a deeply nested element.
    """
    text = " "  # so that walk always has a character before it
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
    in: 1<i>0</i><sup>4</sup>. A formula, with [ and ] for OPEN and CLOSE:

        <msup><mn>10</mn><mrow><mo>−</mo><mn>3</mn></mrow></msup>
            "10"   of <mn>, whose layout is "*"
            "−3"   of <mrow>, its two children in a row
            "10^[−3]"   of <msup>, whose layout is "*^[*]"
        flatten makes "10^-3" of it, but "2^(n+1)" of "2^[n+1]"
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
    elif tag == "tex-math":
        e.text = PREAMBLE.sub("", e.text or "")
    first, *between, last = layout.split("*")
    text = first + (e.text or "")
    for i, child in enumerate(shown(e, tag)):
        if i and between:  # the last mark repeats: (1,2,3) by the layout (*,*)
            text += between[min(i, len(between)) - 1]
        behind = (before + text[-2:])[-2:]
        text += walk(child, behind) + (child.tail or "")
    text += last
    if tag in ("td", "th"):  # a cell's paragraphs stay in its row
        text = text.replace(LINE, " ")
    if tag in JOINTS:
        pattern, mark = JOINTS[tag]
        if re.match(pattern, before[-1] + text.lstrip()):
            text = mark + text.lstrip()
    return text


def shown(e, tag):
    """The children to read, after a table's parts are mended."""
    if tag == "alternatives":  # one thing several times over
        texts = [child for child in e if local(child) not in DROPPED
                 and PREAMBLE.sub("", full_text(child)).strip(" $")]
        for name in ("tex-math", "math", "table"):
            alike = [child for child in texts if local(child) == name]
            if alike:
                return alike if name == "table" else alike[:1]  # a table may come in panels
        return texts[:1]
    if tag in ("table", "thead", "tbody", "tfoot"):
        fill_spans(e)
    elif tag in ("td", "th"):
        for sup in e.iter("sup"):
            if NOTE_MARK.fullmatch(full_text(sup)):
                sup.text = None
                del sup[:]
    elif tag == "table-wrap-foot":
        for note in e.iter("fn"):
            note.tag = "p"  # it explains the table, unlike other footnotes
    return e


def fill_spans(rows):
    """Mark an empty cell wherever a rowspan or colspan covers a place of a table's part.

    So all other cells stay in their columns: A | 5 mg, and below it | 7 mg where A spans two rows.
    """
    covered = {}  # column -> rows that a cell still covers there
    for row in rows:
        column = 0
        for cell in row:
            first = column
            while column in covered:
                column += 1
            height, width = (min(int(span), LARGEST_SPAN) if span.isdecimal() else 1
                             for span in (cell.get("rowspan", "1"), cell.get("colspan", "1")))
            cell.text = CELL * (column - first) + (cell.text or "")
            cell.tail = CELL * (width - 1) + (cell.tail or "")
            if height > 1:
                covered.update(dict.fromkeys(range(column, column + width), height))
            column += width
        covered = {column: height - 1 for column, height in covered.items() if height > 1}


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
    line = " ".join(line.split()).rstrip(CELL + " ")
    return " ".join(line.replace(CELL, " | ").split())


# Each reader below gives the document of a record: (id or None, text, reason). A reason to drop the
# text ("no abstract") makes it a deletion.


NO_TITLE = re.compile(r"\[(Not Available|In Process Citation)\]")  # it stands in a title's place
# Marks of PubMed, then of JATS.
NOTICES = set(re.split(r",\s+", """Retracted Publication, Retraction of Publication,
    Retraction Notice, Published Erratum, Expression of Concern, RetractionIn, RetractionOf,
    ErratumFor, ExpressionOfConcernFor, correction, retraction, partial-retraction,
    expression-of-concern, retracted-article, retraction-forward"""))


def is_notice(labels, text):
    """Whether a document is retracted, or only corrects or retracts another."""
    return NOTICES & labels or re.match("RETRACTED|Retracted:", text)


def pubmed_document(record, skip_pmc):
    """Of a PubmedArticle or PubmedBookArticle: title + "\n" + abstract, as The Pile has it."""
    citation = record[0]  # MedlineCitation or BookDocument
    article = citation.find("Article")
    if article is None:
        article = citation
    titles = (pubmed_text(article.find(name))
              for name in ("ArticleTitle", "VernacularTitle", "Book/BookTitle"))
    title = next((title for title in titles if title and not NO_TITLE.match(title)), "")
    # Left out: the sections' labels
    sections = map(pubmed_text, article.findall("Abstract/AbstractText"))
    abstract = " ".join(filter(None, sections))
    text = f"{title}\n{abstract}".strip()
    labels = {e.text for e in article.iter("PublicationType")}
    labels.update(e.get("RefType") for e in citation.iter("CommentsCorrections"))
    reason = None
    if is_notice(labels, text):
        reason = "correction or retraction"
    elif skip_pmc and any(  # the references' ids lie deeper
            e.get("IdType") == "pmc" for e in record.findall("PubmedData/ArticleIdList/ArticleId")):
        reason = "in PMC"
    elif not abstract:
        reason = "no abstract"
    return citation.find("PMID").text.strip(), text, reason


def pubmed_text(element):
    """Text in one line of a title or a section; "" for None."""
    if element is None:
        return ""
    if len(element):
        return flatten(element).replace("\n", " ")
    return full_text(element)  # the same, faster: few have inline tags


def jats_document(article, path):
    """Title, abstracts, body, floats and glossary of a JATS article.

    The id is the PMC's, or else the PMID, or else the file's name (PMC123.1.xml) if it tells one.
    """
    if article.tag != "article":  # in a namespace, as in OAI's wrapper
        for e in article.iter():
            e.tag = local(e)
    meta = "front/article-meta/"
    ids = {e.get("pub-id-type"): full_text(e) for e in article.findall(meta + "article-id")}
    number = re.search(r"\d+", ids.get("pmcid") or ids.get("pmc") or "")
    if not number and "pmid" not in ids:
        number = re.search(r"(?<=PMC)\d+", os.path.basename(path))  # PMC123.1.xml
    ident = f"PMC{number[0]}" if number else ids.get("pmid")
    main = [e for e in article.findall(meta + "abstract")
            if e.get("abstract-type") not in ("graphical", "teaser", "toc", "precis")]
    main += article.findall("body")
    title = article.findall(meta + "title-group/article-title")
    end = article.findall("floats-group") + article.findall("back/glossary")
    text = flatten(*title, *main, *end)
    labels = {e.get("related-article-type") for e in article.findall(meta + "related-article")}
    reason = None
    if is_notice(labels | {article.get("article-type")}, text):
        reason = "correction or retraction"
    elif not any(map(full_text, main)):
        reason = "no abstract and no body"
    return ident, text, reason


def json_document(record):
    """Of {"text"}, {"title", "abstract"}, or The Pile's lines by their meta.pile_set_name.

    The id is "id", or else "pmid" or "pmcid". {"id", "deleted": true} passes through, so that
    extracted text may be extracted again.
    """
    ids = [str(record[key]) for key in ("id", "pmid", "pmcid")
           if record.get(key) not in (None, "")]
    text, title, abstract = ((record.get(key) or "").strip()
                             for key in ("text", "title", "abstract"))
    if abstract and not text:
        text = f"{title}\n{abstract}".strip()
    reason = None
    if (record.get("meta") or {}).get("pile_set_name", PILE_SETS[0]) not in PILE_SETS:
        reason = "another part of The Pile"
    elif record.get("deleted") or not text:
        reason = "deleted or without text"
    # JSON can spell half a surrogate pair: U+FFFD, as in tokenizer.read_records
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return ids[0] if ids else None, text, reason


def source_records(path):
    """(number, record) of a file: XML elements, JSON objects by line, or a .txt's (id, text)."""
    suffix = SUFFIX.search(path)[1]
    if suffix in ("json", "jsonl"):
        return json_lines(path)
    return enumerate(read_records(path) if suffix == "txt" else xml_records(path), 1)


def documents_of(record, path, skip_pmc):
    """[(id or None, text or None, reason)] of a record of any kind."""
    if isinstance(record, tuple):
        return [(*record, None)]
    if isinstance(record, dict):
        return [json_document(record)]
    tag = local(record)
    if tag in ("PubmedArticle", "PubmedBookArticle"):
        return [pubmed_document(record, skip_pmc)]
    if tag in ("DeleteCitation", "DeleteDocument"):
        return [(e.text.strip(), None, "deleted") for e in record.findall("PMID")]
    if tag == "article":
        return [jats_document(record, path)]
    articles = [e for e in record.iter() if local(e) == "article"]  # in a wrapper, as OAI's
    if not articles:
        raise ValueError(f"<{tag}> is no record of PubMed or JATS")
    return [jats_document(article, path) for article in articles]


def text_line(ident, text):
    """The line of a document, or of a deletion; nothing where both id and text are missing."""
    if not text and not ident:
        return b""
    record = {"id": ident, "deleted": True}
    if text:
        record = {"id": ident or f"{hash64(text):016x}", "text": text}
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def output_lines(paths, skip_pmc, counts, skipped):
    """Yield the lines of an output, count its records, and name in `skipped` what is left out.

    That is a bad record (no PMID, half a character, nested too deeply), and of a damaged file what
    stands behind the damage.
    """
    for path in paths:
        counts["files"] += 1
        try:
            for number, record in source_records(path):
                counts["records"] += 1
                try:
                    held = documents_of(record, path, skip_pmc)
                    lines = [text_line(ident, None if reason else text)
                             for ident, text, reason in held]
                except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as e:
                    counts["bad records"] += 1
                    skipped.append(f"{path}: record {number}: {e!r}")
                    continue
                yield from lines
                counts.update(reason or "documents" for _, _, reason in held)
        except (ValueError, OSError, RecursionError) as e:
            counts["damaged files"] += 1
            skipped.append(f"{path}: {str(e).removeprefix(f'{path}: ')}")


def extract_files(task):
    """Write an output from its files, whole or not at all: (counts, what was skipped)."""
    output, paths, skip_pmc = task
    counts, skipped = Counter(), []
    gc.disable()  # XML trees have no cycles, and looking for some takes a third of the time
    try:
        with replacing(output) as f, gzip.GzipFile("", "wb", 1, f, mtime=0) as gz:
            gz.writelines(output_lines(paths, skip_pmc, counts, skipped))
    finally:
        gc.enable()
    return counts, skipped


def plan_outputs(inputs, out, skip_pmc):
    """{output's name: its files}, and the marks that the names have.

    An input that is a file makes an output of its own. In a folder a new output begins whenever
    another OUTPUT_BYTES is full. An output is called after its first file:

        pubmed26n0001-3f2a91bc.jsonl.gz

    3f2 is the mark of the input, file or folder. a91bc is a hash of the flags and of the names,
    sizes and times of the output's files.
    """
    plan, marks = {}, set()
    for given in map(os.path.realpath, inputs):
        groups, total = defaultdict(dict), 0
        for path in source_files(given, out):
            stat = os.stat(path)
            total += stat.st_size
            group = os.path.dirname(path), total // OUTPUT_BYTES
            groups[group][path] = stat.st_size, stat.st_mtime
        if not groups:
            raise ValueError(f"nothing to extract in {given}: give .xml, .nxml, .jsonl, .json, "
                             ".txt, plain or .gz, or folders of them (unpack .zst and .tar first)")
        mark = f"{hash64(given) % 16**3:03x}"
        marks.add(mark)
        for files in groups.values():
            paths = [*files]
            # its path beneath the folder given, "/" as "-"
            base = given if paths[0] != given else os.path.dirname(given)
            name = os.path.relpath(paths[0], base).replace("/", "-")
            stem = SUFFIX.sub("", name)
            state = f"{hash64(f'{files} {skip_pmc}') % 16**5:05x}"
            plan[f"{stem}-{mark}{state}.jsonl.gz"] = paths
    return plan, marks


NOT_TEXT = re.compile(r"(?i)readme|licen[cs]e|.*filelist")  # what lies beside the data


def source_files(given, out):
    """The file, or those in the folder, folder by folder in natural order, `out` left out.

    Left out too: README and the like, an article's .txt and .json beside its .xml, and a FIFO,
    whose reading would wait for ever.
    """
    paths = [given]
    for folder, folders, names in os.walk(given):
        folders.sort(key=natural)
        articles = {name.partition(".xml")[0] for name in names if ".xml" in name}
        for name in sorted(names, key=natural):
            twin = re.sub(r"\.(txt|json)\b.*", "", name) in articles
            if folder != str(out) and not twin and not NOT_TEXT.match(name):
                paths.append(f"{folder}/{name}")
    return [path for path in paths if SUFFIX.search(path) and os.path.isfile(path)]


def extract(inputs, out, skip_pmc=False, workers=1):
    """Make every output that is missing; returns the summed counts.

    ValueError where more than one record or file in a hundred was bad. What is good is written all
    the same.
    """
    out = Path(out).resolve()
    plan, marks = plan_outputs(inputs, out, skip_pmc)
    make_folder(out)
    outdated = []  # a file or flag has changed, or other files lie together
    for path in out.iterdir():
        if re.search(r"\.(jsonl|txt)(\.gz)?$", path.name) and path.name not in plan:
            mark = re.search(r"-(.{3}).{5}\.jsonl\.gz$", path.name)
            if not mark or mark[1] not in marks:
                raise ValueError(f"{path} is not made of these inputs: give all inputs of a text "
                                 "in one command, remove it, or use another --out")
            outdated.append(path)
    tasks = [(out / name, paths, skip_pmc) for name, paths in plan.items()
             if not (out / name).exists()]
    results = in_processes(extract_files, tasks, workers)
    total = Counter()
    for counts, skipped in tqdm(results, "extract", len(tasks), disable=None):
        total += counts
        for reason in skipped:
            tqdm.write(f"extract: skipped {reason}")
    for path in outdated:  # now that the new ones are whole
        path.unlink()
    print(f"extract: {len(tasks)} outputs written, {len(plan) - len(tasks)} finished before, "
          f"{len(outdated)} outdated removed;", dict(total))
    for bad, of in ("bad records", "records"), ("damaged files", "files"):
        if 100 * total[bad] > total[of]:
            raise ValueError(f"{total[bad]} {bad} of {total[of]}, named above; the rest is "
                             "written: mend them and run again")
    return total


# ---------------------------------------------------------------------------------------------
# download: from the owners' servers to whole, verified files
#
# A file is held in memory (at most 166 MB, MMLU's) until it is whole, written as NAME.part and
# renamed. Whatever fails is tried again, five times in all, but for a wrong address. Then the other
# files are fetched all the same, and a rerun fetches what is missing.

SOURCES = {
    "pubmed": "https://ftp.ncbi.nlm.nih.gov/pubmed/",
    "pmc": "https://pmc-oa-opendata.s3.amazonaws.com/",
    "mmlu": "https://people.eecs.berkeley.edu/~hendrycks/",
    "pubmedqa": "https://raw.githubusercontent.com/pubmedqa/pubmedqa/master/data/",
    "medquad": "https://github.com/abachaa/MedQuAD/archive/refs/heads/",
}
# sources of a few files; PubMed and PMC have listings
FILES = {"mmlu": ["data.tar"], "medquad": ["master.zip"],
         "pubmedqa": ["ori_pqal.json", "test_ground_truth.json"]}
BY_HAND = """what to fetch. By hand, into the folder for --data: medqa, data_clean of the archive at
    https://github.com/jind11/MedQA; medmcqa, {train,dev,test}.json of the archive at
    https://github.com/medmcqa/medmcqa; bioasq, the {train,dev,test}.tsv of BLURB's scripts or the
    golden files of http://participants-area.bioasq.org. The released weights:
    hf download stanford-crfm/BioMedLM --local-dir DIR"""
AGENT = {"User-Agent": "biomedlm-data/1.0 (at most 4 connections)", "Accept-Encoding": "identity"}
TRIES, BACKOFF_S, CONNECTIONS, TIMEOUT_S = 5, 2.0, 4, (10, 30)


def get(url, pattern=rb"\A(?!\s*<(!doctype )?html)", md5=None):
    """The bytes at url: `pattern` occurs in them (by default: no web page); md5, if given, fits."""
    import requests  # here, as it would cost each worker of tokenize 0.15 s

    for attempt in range(TRIES):
        if attempt:
            time.sleep(BACKOFF_S * 2**attempt)
        try:
            response = requests.get(url, headers=AGENT, timeout=TIMEOUT_S)
            if response.status_code in (403, 404):
                raise OSError(f"{url}: status {response.status_code}: check the address or "
                              "--base_url")
            response.raise_for_status()
            content = response.content
            same = md5 in (None, hashlib.md5(content).hexdigest())
            if same and re.search(pattern, content, re.IGNORECASE):
                return content
            reason = "a web page, or another file in its place" if same else "its checksum differs"
        except requests.RequestException as e:  # a cut connection too
            reason = e
    raise OSError(f"{url}: {reason}, {TRIES} times: try again later; files that are whole are kept")


def fetch(url, path, md5=None, md5_url=None):
    """Write what stands at url to `path`, in a folder that is made where missing.

    md5_url: a file with the checksum, as NLM writes it: MD5(pubmed26n0001.xml.gz)= 6a3c…
    """
    if md5_url:
        pattern = rb"\b[0-9a-f]{32}\b"
        md5 = re.search(pattern, get(md5_url, pattern))[0].decode()
    content = get(url, md5=md5)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")
    part.write_bytes(content)
    os.replace(part, path)


# A job is (path, function that fetches it).


def pubmed_jobs(base, out, wanted):
    """Jobs for the baseline, then for the update files, whose numbers are wanted."""
    for folder in ("baseline/", "updatefiles/"):
        listing = get(base + folder, rb"<a href|pubmed\d+n\d+").decode()
        names = re.findall(r"\b(pubmed\d+n(\d+)\.xml\.gz)\b", listing)
        for name, number in sorted(set(names)):
            if int(number) in wanted:
                url, path = base + folder + name, out / name
                yield path, partial(fetch, url, path, md5_url=url + ".md5")


def pmc_jobs(base, out, wanted):
    """Jobs for the newest version of each open-access article whose number is wanted.

    The bucket's newest inventory lists the files of metadata.
    """
    prefix = "inventory-reports/pmc-oa-opendata/metadata/"
    listing = get(f"{base}?list-type=2&delimiter=/&prefix={prefix}", b"<ListBucketResult").decode()
    newest = max(re.findall(rf"<Prefix>({prefix}\d[^<]+)</Prefix>", listing))
    versions = {}  # of 9 million articles
    for part in json.loads(get(f"{base}{newest}manifest.json", b'"files"'))["files"]:
        inventory = io.BytesIO(get(base + part["key"], md5=part["MD5checksum"]))
        with gzip.open(inventory) as lines:
            names = (re.search(rb"PMC(\d+)\.(\d+)\.json", line) for line in lines)
            for number, version in (map(int, name.groups()) for name in names if name):
                versions[number] = max(version, versions.get(number, 0))
    for number, version in sorted(versions.items()):
        if number in wanted:
            name = f"PMC{number}.{version}"
            path = out / str(number // 10_000) / f"{name}.xml"  # not millions in one folder
            yield path, partial(fetch_article, base, name, path)


def fetch_article(base, name, path):
    """An article of PMC, unless it is retracted or not open."""
    about = json.loads(get(f"{base}metadata/{name}.json", b'"pmcid"'))
    if about["is_pmc_openaccess"] and not about["is_retracted"]:
        # s3://pmc-oa-opendata/PMC1.1/PMC1.1.xml?md5=…, in some without the md5
        url, _, md5 = about["xml_url"].partition("?md5=")
        fetch(base + url.split("/", 3)[3], path, md5 or None)


def download(source, out, base_url=None, files=None):
    """Fetch a source into `out`, CONNECTIONS files at a time; a rerun fetches what is missing."""
    limits = re.fullmatch(r"(\d+)(?:-(\d+))?", files or "0-999999999999")
    if not limits:
        raise ValueError(f"--files {files}: give a number or a range, like 1-3")
    wanted = range(int(limits[1]), int(limits[2] or limits[1]) + 1)
    base, out = (base_url or SOURCES[source]).rstrip("/") + "/", Path(out)
    names = FILES.get(source, ())
    jobs = ((out / name, partial(fetch, base + name, out / name)) for name in names)
    if source == "pubmed":
        jobs = pubmed_jobs(base, out, wanted)
    elif source == "pmc":
        jobs = pmc_jobs(base, out, wanted)
    errors, n_files = {}, 0
    with tqdm(unit=" files", desc=f"download {source}", disable=None) as bar, \
            ThreadPoolExecutor(CONNECTIONS) as pool:
        try:
            while some := list(itertools.islice(jobs, 1000)):  # a few of millions at a time
                futures = {path: pool.submit(job) for path, job in some if not path.exists()}
                n_files += len(some)
                for path, future in futures.items():
                    if error := future.exception():
                        errors[path] = error
                    bar.update()
        except KeyboardInterrupt:
            os._exit(130)  # at once: the pool would wait for its files
    if not n_files:
        raise ValueError(f"{base} lists no file numbered {files}: check --files")
    for path, error in errors.items():
        print(f"download: left out {path.name}: {error!r}")
    missing = [e for e in errors.values() if isinstance(e, OSError)]
    # others are odd metadata, no reason to fail while they are few
    if missing or 100 * len(errors) > n_files:
        raise OSError(f"{len(errors)} of {n_files} files failed, run again; the last: {error}")
    if source in ("mmlu", "medquad"):  # load_qa reads folders
        unpack(out / names[0], out / "unpacked")
    print(f"download: {source} is whole in {out} ({n_files} files, {len(errors)} left out)")


def unpack(archive, folder):
    """Unpack a .tar or .zip. ValueError for a file that would lie outside of the folder."""
    try:
        if archive.suffix == ".zip":
            return shutil.unpack_archive(archive, folder)  # safe by itself
        with tarfile.open(archive) as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):  # no links
                if not (folder / member.name).resolve().is_relative_to(folder.resolve()):
                    raise tarfile.TarError(f"{member.name} lies outside")
                tar.extract(member, folder, set_attrs=False)
    except (shutil.ReadError, tarfile.TarError) as e:
        raise ValueError(f"{archive}: {e}: delete it, download again") from None


# ---------------------------------------------------------------------------------------------
# files

def write_lines(path, rows):
    """A file of a JSON object a line, .gz or plain, in a folder that is made where missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with replacing(path) as f:
        f.write(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)


def make_folder(folder):
    """Create `folder`, which the caller alone writes to; remove a killed run's temporary files."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.[0-9]*.tmp"):  # name, process, tmp
        path.unlink()


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------
# the command line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    text = {"required": True, "help": ".jsonl or .txt file (.gz too), or a folder of them"}
    val_fraction = {"type": numbers(float, 0, 1), "default": 0.002,
                    "help": "of documents (default: 0.002)"}
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

    add = command(extract, "extract", "PubMed XML, JATS, JSON lines, .txt -> text/*.jsonl.gz")
    add("inputs", nargs="+", metavar="INPUT",
        help="files, plain or .gz, or folders; of these README, licences, file lists, and an "
             "article's .txt and .json beside its .xml are left out")
    add("--skip_pmc", action="store_true", help="drop what is in PMC, as The Pile (default: off)")
    add("--workers", **workers)

    add = command(download, "download", "fetch a source, verified")
    add("source", choices=SOURCES, help=BY_HAND)
    add("--base_url", help="a mirror of the source's address (default: the owner's)")
    add("--files", help="pubmed: range of file numbers; pmc: of PMC numbers (default: all)")

    # A flag has the name of its function's parameter.
    flags = vars(parser.parse_args())
    flags.pop("function")(**flags)


if __name__ == "__main__":
    run_command(main)
