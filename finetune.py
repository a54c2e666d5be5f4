"""Fine-tune on a question set as BioMedLM does (recipe: arXiv 2403.18421 and its released code).

    python finetune.py --task pubmedqa --data data/demo/qa/pubmedqa --init out/demo --out out/pm

Reads a run of train.py or a Hugging Face GPT-2 folder (--init) and a question set in its official
layout (--data); writes a folder that `transformers` loads, the tokenizer with the added tokens,
head.pt, run.json, log.jsonl and predictions.jsonl. torchrun spreads the questions over ranks.
Leaves out sharded parameters: a replica with its optimiser must fit (42 GB for 2.59B in fp32).

Dimensions: B rows, T time, C width, Q questions, O options, V vocabulary.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import load_qa
from model import GPT, GPTConfig, cross_entropy, write_atomically
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------
# tasks: what differs between them

CHOICE, LABELS, TEXT = "choice", "labels", "text"
KINDS = {"medqa": CHOICE, "medmcqa": CHOICE, "mmlu": CHOICE, "pubmedqa": LABELS, "bioasq": LABELS,
         "text": TEXT}
# BioMedLM: added in this order, so that on the released vocabulary [PAD] is 28896; [CLS] is unused
SPECIAL_TOKENS = {CHOICE: ["[PAD]", "[CLS]", "[SEP]"],
                  LABELS: ["[PAD]", "<|CONTEXT|>", "<|QUESTION|>", "<|ANSWER|>"],
                  TEXT: ["[PAD]", "<|startoftext|>"]}
LENGTHS = {"medqa": 512, "medmcqa": 512, "mmlu": 512, "pubmedqa": 512, "bioasq": 1024,
           "text": 1022}  # BioMedLM; text: 510 + 510 and the two tokens between and after
NEW_ROW_STD = 0.02  # BioMedLM: rows of added tokens, and (as GPT-2's own init) the new head


def default_settings(task, n_params):
    """Learning rate, epochs and batch (questions) by task and model size."""
    kind = KINDS[task]
    epochs = {CHOICE: 5, LABELS: 20, TEXT: 3}[kind]  # labels: a working point of BioMedLM
    if n_params >= 1e9:  # inside BioMedLM's sweeps; for multiple choice nothing is published
        lr = {CHOICE: 1e-5, LABELS: 2e-6, TEXT: 1e-5}[kind]
    else:  # our choice
        lr = 3e-4 if n_params < 50e6 else 5e-5
    return dict(lr=[lr], epochs=epochs, batch_size=[16])


# ---------------------------------------------------------------------------------------------
# questions -> token ids


class Row(NamedTuple):
    """One row of a batch: a prefix, and suffixes that each see it but not each other."""
    prefix: list
    suffixes: list

    def __len__(self):
        return len(self.prefix) + sum(map(len, self.suffixes))


class Example(NamedTuple):
    """A question as rows: one where its options share a prefix, else one an option."""
    question: object
    rows: list
    truncated: bool
    n_targets: int = 0  # text: tokens at the end of the row that carry loss


def truncate(body, keep, limit):
    """Cut the end of `body` until it fits beside `keep` tokens; (tokens, whether it was cut)."""
    room = max(limit - keep, 0)
    return body[:room], len(body) > room


def encode_choice(question, tokenizer, special, limit, shared=True):
    """BioMedLM: question + "[SEP]" and " " + option + "[SEP]" for each option, at most `limit` ids.

    The longest part, which is the question, gives way first; an option is cut only when it doesn't
    fit alone. Where every option leaves the same question, it is stored once (shared).
    """
    sep = [special["[SEP]"]]
    text = tokenizer.encode(question.question)
    rows, cut = [], False
    for option in question.options:
        tail, cut_option = truncate(tokenizer.encode(" " + option), 2, limit)
        head, cut_head = truncate(text, len(tail) + 2, limit)
        cut |= cut_option or cut_head
        rows.append(Row(head + sep, [tail + sep]))
    if shared and all(row.prefix == rows[0].prefix for row in rows):
        rows = [Row(rows[0].prefix, [row.suffixes[0] for row in rows])]
    return Example(question, rows, cut)


def encode_labels(question, tokenizer, special, limit):
    """BioMedLM: <|CONTEXT|>context<|QUESTION|>question<|ANSWER|>, no spaces; the context gives way.

    Context first is better than question first, says the paper.
    """
    text, cut_text = truncate(tokenizer.encode(question.question), 3, limit)
    context, cut = truncate(tokenizer.encode(question.context), len(text) + 3, limit)
    ids = [special["<|CONTEXT|>"], *context, special["<|QUESTION|>"], *text,
           special["<|ANSWER|>"]]
    return Example(question, [Row([], [ids])], cut or cut_text)


def encode_text(question, tokenizer, special, limit):
    """BioMedLM: source + <|startoftext|> + target + end-of-text, source and target <= 510 each."""
    half = (limit - 2) // 2
    source, cut = truncate(tokenizer.encode(question.question), 0, half)
    target, cut_target = truncate(tokenizer.encode(question.target), 0, half)
    ids = [*source, special["<|startoftext|>"], *target, tokenizer.eot_id]
    return Example(question, [Row([], [ids])], cut or cut_target, len(target) + 1)


def encode_all(questions, task, tokenizer, length, **how):
    """Examples of all questions; the special tokens must have been added to the tokenizer."""
    names = SPECIAL_TOKENS[KINDS[task]]
    special = dict(zip(names, tokenizer.add_special_tokens(names)))
    encode = {CHOICE: encode_choice, LABELS: encode_labels, TEXT: encode_text}[KINDS[task]]
    return [encode(q, tokenizer, special, length, **how) for q in questions]


# ---------------------------------------------------------------------------------------------
# batches


@dataclasses.dataclass
class Batch:
    """Right-padded rows, and where in them each option of each question is scored."""
    idx: torch.Tensor  # (B, T) int64
    positions: torch.Tensor | None  # (B, T) int64, None: 0, 1, ...
    mask: torch.Tensor | None  # (B, 1, T, T) bool, None: causal
    ends: torch.Tensor  # (4, E) int64: row, column, question, option of each scored position
    answers: torch.Tensor  # (Q,) int64, -100 = unlabeled
    targets: torch.Tensor | None  # (B, T) int64, shifted, -100 = no loss; text only
    n_options: int


def collate(examples, pad_id, device="cpu"):
    """A Batch of examples. Padding stands after every scored position, so nothing sees it."""
    rows = [(q, row) for q, e in enumerate(examples) for row in e.rows]
    B, T = len(rows), max(len(row) for _, row in rows)
    idx, positions, segments = [], [], []
    ends, n_scored = [], [0] * len(examples)
    for b, (q, row) in enumerate(rows):
        ids, place, segment = list(row.prefix), list(range(len(row.prefix))), [0] * len(row.prefix)
        for k, suffix in enumerate(row.suffixes, 1):
            ids += suffix
            place += range(len(row.prefix), len(row.prefix) + len(suffix))
            segment += [k] * len(suffix)
            ends.append((b, len(ids) - 1, q, n_scored[q]))
            n_scored[q] += 1
        fill = T - len(ids)
        idx.append(ids + [pad_id] * fill)
        positions.append(place + [0] * fill)
        segments.append(segment + [-1] * fill)
    idx = torch.tensor(idx)
    mask = targets = None
    if any(len(row.suffixes) > 1 for _, row in rows):
        seg = torch.tensor(segments)
        same = (seg[:, None, :] == 0) | (seg[:, None, :] == seg[:, :, None])
        mask = (same & torch.ones(T, T, dtype=torch.bool).tril())[:, None].to(device)
    if examples[0].n_targets:
        targets = torch.full((B, T), -100)
        for b, e in enumerate(examples):
            end = len(e.rows[0])
            targets[b, end - 1 - e.n_targets:end - 1] = idx[b, end - e.n_targets:end]
        targets = targets.to(device)
    answers = torch.tensor([-100 if e.question.answer is None else e.question.answer
                            for e in examples])
    return Batch(idx.to(device), None if mask is None else torch.tensor(positions).to(device), mask,
                 torch.tensor(ends).t().to(device), answers.to(device), targets, max(n_scored))


def micro_batches(examples, micro_batch=None, max_tokens=4096):
    """Cut examples, sorted by length, where padding to the longest row would pass max_tokens."""
    size = lambda e: max(len(row) for row in e.rows)  # noqa: E731
    chunk, n_rows = [], 0
    for e in sorted(examples, key=size):
        full = len(chunk) == micro_batch or (n_rows + len(e.rows)) * size(e) > max_tokens
        if chunk and full:
            yield chunk
            chunk, n_rows = [], 0
        chunk.append(e)
        n_rows += len(e.rows)
    if chunk:
        yield chunk


# ---------------------------------------------------------------------------------------------
# the model: a GPT and a head


class TaskModel(nn.Module):
    """BioMedLM's heads, on ln_f at the last token of an option or a prompt.

    choice: Linear(C, 1) with bias, a score an option; labels: Linear(C, n_labels) without bias;
    text: the language model itself, no head.
    """

    def __init__(self, gpt, kind, n_labels=None):
        super().__init__()
        self.gpt, self.kind, self.head = gpt, kind, None
        if kind != TEXT:
            self.head = nn.Linear(gpt.config.n_embd, 1 if kind == CHOICE else n_labels,
                                  bias=kind == CHOICE)
            nn.init.normal_(self.head.weight, 0.0, NEW_ROW_STD)
            if kind == CHOICE:
                nn.init.zeros_(self.head.bias)

    def forward(self, batch):
        """Scores (Q, O) fp32, -inf where a question has fewer options; text: summed loss, nats."""
        hidden = self.gpt.hidden(batch.idx, positions=batch.positions, mask=batch.mask)
        if self.kind == TEXT:
            scored = batch.targets != -100
            return scored.sum() * cross_entropy(hidden[scored], self.gpt.transformer.wte.weight,
                                                batch.targets[scored])
        row, column, question, option = batch.ends
        out = self.head(hidden[row, column]).float()  # (B, T, C) -> (E, C) -> (E, 1 or labels)
        if self.kind == LABELS:
            return out
        scores = out.new_full((len(batch.answers), batch.n_options), -math.inf)
        return scores.index_put((question, option), out[:, 0])


def loss_sum(model, batch):
    """Summed, not mean: the caller divides by what the whole global batch holds."""
    out = model(batch)
    return out if batch.targets is not None else F.cross_entropy(out, batch.answers,
                                                                 reduction="sum")


def adapt(gpt, vocab_size, dropout=None):
    """Give a GPT rows for added tokens, N(0, 0.02), and another dropout; in place."""
    old = gpt.transformer.wte.weight
    if vocab_size > len(old):
        rows = torch.empty(vocab_size - len(old), old.size(1), dtype=old.dtype).normal_(
            0.0, NEW_ROW_STD)
        gpt.transformer.wte = nn.Embedding.from_pretrained(
            torch.cat([old.detach(), rows.to(old.device)]), freeze=False)
    dropout = gpt.config.dropout if dropout is None else dropout
    gpt.config = dataclasses.replace(gpt.config, vocab_size=max(vocab_size, len(old)),
                                     dropout=dropout)
    for block in gpt.transformer.h:
        block.dropout = block.attn.dropout = dropout
    return gpt


def load_tokenizer(folder, task=None):
    """Tokenizer of a folder, with the tokens that its run added, then those of `task`."""
    tokenizer = Tokenizer.load(folder)
    added = read_run(folder).get("special_tokens", [])
    tokenizer.add_special_tokens(added)
    if task is not None:
        tokenizer.add_special_tokens(SPECIAL_TOKENS[KINDS[task]])
    return tokenizer


def read_run(folder):
    path = Path(folder) / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def load_finetuned(folder, task, device="cpu"):
    """(TaskModel in eval mode, Tokenizer, length limit) of a folder that this script wrote."""
    run = read_run(folder)
    if run.get("task") not in KINDS:
        raise ValueError(f"{folder} is not fine-tuned: run finetune.py --task {task} on it "
                         "first, or give --zero_shot")
    if KINDS[run["task"]] != KINDS[task] or (KINDS[task] == LABELS and run["task"] != task):
        raise ValueError(f"{folder} was fine-tuned on {run['task']}, whose head cannot answer "
                         f"{task}: fine-tune on it first")
    model = TaskModel(GPT.from_pretrained(folder), KINDS[task], len(run["labels"]) or None)
    if model.head is not None:
        head = torch.load(Path(folder) / "head.pt", map_location="cpu", weights_only=True)
        model.head.load_state_dict(head)
    return model.to(device).eval(), load_tokenizer(folder, task), run["length"]


# ---------------------------------------------------------------------------------------------
# one training run


def learning_rate(step, total_steps, peak):
    """BioMedLM: linear warm-up over half of the steps (0 at step 0), then linear decay to 0."""
    warmup = total_steps // 2
    if step < warmup:
        return peak * step / warmup
    return peak * (total_steps - step) / (total_steps - warmup)


def epoch_order(n, seed, epoch):
    """Order of n examples: of (seed, epoch) alone, the same on every rank."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(n, generator=generator).tolist()


def train_step(model, examples, optimizer, env, pad_id, micro_batch=None):
    """One optimiser step on a global batch of examples; returns its mean loss on this rank's share.

    The loss is a mean over the questions (text: target tokens) of the whole global batch, however
    ranks and micro-batches cut it.
    """
    total = sum(e.n_targets or 1 for e in examples)
    share = examples[env.rank::env.world_size]
    weight = 1.0 if share else 0.0  # a rank without a question still joins the gradient's sum
    chunks = list(micro_batches(share or examples[:1], micro_batch))
    summed = 0.0
    for i, chunk in enumerate(chunks):
        last = i == len(chunks) - 1
        with contextlib.nullcontext() if last or env.world_size == 1 else model.no_sync():
            with env.autocast():
                loss = weight * loss_sum(model, collate(chunk, pad_id, env.device)) / total
            (loss * env.world_size).backward()  # DDP averages over ranks; the sum is wanted
        summed += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return summed


def train(task_model, train_set, dev_set, settings, env, pad_id, log):
    """Train one seed; returns its dev accuracy, with the chosen epoch's weights in task_model."""
    model = task_model.train()
    if env.world_size > 1:
        model = DistributedDataParallel(task_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=0.0, fused=env.device.type == "cuda")
    size, epochs = settings["batch_size"], settings["epochs"]
    steps = math.ceil(len(train_set) / size)
    torch.manual_seed(settings["seed"] * 1000 + env.rank)  # dropout differs between ranks
    best, kept = None, None
    bar = tqdm(total=epochs * steps, unit="step", disable=env.rank > 0, leave=False, mininterval=1)
    for epoch in range(epochs):
        started, losses = time.perf_counter(), []
        order = epoch_order(len(train_set), settings["seed"], epoch)
        for step in range(steps):
            lr = learning_rate(epoch * steps + step, epochs * steps, settings["lr"])
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = [train_set[i] for i in order[step * size:(step + 1) * size]]
            losses.append(train_step(model, batch, optimizer, env, pad_id,
                                     settings["micro_batch"]))
            bar.update()
        loss = env.sum(torch.stack(losses).sum()) / steps
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} in epoch {epoch + 1}: lower --lr")
        score = quality(task_model, dev_set, env, pad_id)
        row = dict(settings, epoch=epoch + 1, step=(epoch + 1) * steps, loss=loss, dev=score,
                   questions_per_s=len(train_set) / (time.perf_counter() - started))
        log(row)
        if not settings["last"] and score is not None and (best is None or score > best):
            best = score  # the first of equals
            kept = {name: t.to("cpu", copy=True) for name, t in task_model.state_dict().items()}
        model.train()
    bar.close()
    if kept is not None:
        task_model.load_state_dict(kept)
    return best if kept is not None else score


# ---------------------------------------------------------------------------------------------
# scoring and statistics


@torch.no_grad()
def score_examples(model, examples, env, pad_id, max_tokens=8192):
    """Per example, in order: the list of its options' or labels' scores; text: [-loss, nats]."""
    model.eval()
    share = list(range(env.rank, len(examples), env.world_size))
    where = {id(examples[i]): i for i in share}
    found = {}
    one = 1 if model.kind == TEXT else None  # text: a loss belongs to one example
    for chunk in micro_batches([examples[i] for i in share], one, max_tokens):
        with env.autocast():
            out = model(collate(chunk, pad_id, env.device))
        rows = [[-out.item()]] if model.kind == TEXT else out.tolist()
        for e, row in zip(chunk, rows):
            found[where[id(e)]] = row[:len(e.question.options)] if e.question.options else row
    found = env.gather(found)
    return [found[i] for i in range(len(examples))]


def quality(model, examples, env, pad_id):
    """What a checkpoint is chosen by: accuracy, or for text minus the mean loss a target token."""
    if not examples:
        return None
    scores = score_examples(model, examples, env, pad_id)
    if model.kind == TEXT:
        return sum(s[0] for s in scores) / sum(e.n_targets for e in examples)
    return statistics.fmean(correct(examples, scores))


def correct(examples, scores):
    """1 or 0 per example; the first of equal scores is the answer given."""
    return [int(s.index(max(s)) == e.question.answer) for e, s in zip(examples, scores)]


def wilson(share, n, z=1.96):
    """95% interval of a share of n questions (Wilson's score interval)."""
    centre, root = share + z * z / (2 * n), math.sqrt(share * (1 - share) / n + (z / n)**2 / 4)
    return [(centre - z * root) / (1 + z * z / n), (centre + z * root) / (1 + z * z / n)]


def baselines(questions):
    """(chance, share of the commonest answer) of labeled questions with options."""
    answers = [q.answer for q in questions]
    return (statistics.fmean(1 / len(q.options) for q in questions),
            max(answers.count(a) for a in set(answers)) / len(answers))


def write_predictions(path, examples, scores):
    """A JSON line a question: id, the official answer, the one given, every option's score."""
    lines = [json.dumps(dict(id=e.question.id, answer=e.question.answer,
                             prediction=s.index(max(s)), scores=s)) + "\n"
             for e, s in zip(examples, scores)]
    write_atomically(Path(path), lambda tmp: tmp.write_text("".join(lines)))


# ---------------------------------------------------------------------------------------------
# the command line


class Env:
    """This process among its peers, and the arithmetic it uses."""

    def __init__(self, device=None, dtype=None):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(
            os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device is None:
            device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
        self.dtype = getattr(torch, dtype or ("bfloat16" if cuda else "float32"))

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype,
                              enabled=self.dtype != torch.float32)

    def sum(self, value):
        """Sum over ranks of a scalar tensor, as a float."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value.item()

    def gather(self, found):
        """Union over ranks of dictionaries with keys of their own."""
        if self.world_size == 1:
            return found
        parts = [None] * self.world_size
        dist.all_gather_object(parts, found)
        return {k: v for part in parts for k, v in part.items()}

    def print(self, *text):
        if self.rank == 0:
            tqdm.write(" ".join(map(str, text)))



def read_questions(task, folders):
    """{"train", "dev", "test": questions} of a task, official order, unlabeled ones included.

    A folder that holds another task of the same kind adds its training questions (MMLU has none:
    BioMedLM trains on MedMCQA and MedQA for it). Training questions that also stand in dev or test
    are left out.
    """
    sets = {"train": [], "dev": [], "test": []}
    for folder in folders:
        same_kind = sorted(t for t in KINDS if KINDS[t] == KINDS[task] and t != task)
        got, missing = {}, None
        for name in [task, *same_kind]:
            for split in sets:
                try:
                    if (name, split) != ("mmlu", "train"):
                        got[split] = load_qa(name, folder, split)
                except FileNotFoundError as e:
                    missing = missing or e
            if got:
                break
        if not got:
            raise missing
        for split, questions in got.items():
            if split == "train" or name == task:
                sets[split] += questions
    key = lambda q: (q.question, q.context, q.options, q.target)  # noqa: E731
    held_out = {key(q) for q in sets["dev"] + sets["test"]}
    sets["train"] = [q for q in sets["train"] if key(q) not in held_out]
    return sets


def labeled(questions):
    return [q for q in questions if q.answer is not None or q.target]


def spread(items, limit):
    """`limit` items evenly spaced: official files are often sorted by label."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def build(args, task, tokenizer, n_labels, seed):
    """A TaskModel on the CPU for one seed: the weights of --init, or fresh ones of its shape."""
    torch.manual_seed(seed)
    if args.random_init:
        config = json.loads((Path(args.init) / "config.json").read_text())
        gpt = GPT(GPTConfig.from_hf(config))
    else:
        gpt = GPT.from_pretrained(args.init)
    added = tokenizer.add_special_tokens(SPECIAL_TOKENS[KINDS[task]])
    return TaskModel(adapt(gpt, max(added) + 1, args.dropout), KINDS[task], n_labels)


def save(out, task_model, tokenizer, run):
    """A folder that `transformers` loads, and beside it what load_finetuned needs."""
    task_model.gpt.save_pretrained(out)
    tokenizer.save(out)
    if task_model.head is not None:
        write_atomically(out / "head.pt", lambda tmp: torch.save(
            {k: v.cpu() for k, v in task_model.head.state_dict().items()}, tmp))
    write_atomically(out / "run.json", lambda tmp: tmp.write_text(json.dumps(run, indent=1)))


def numbers(kind):
    return lambda text: [kind(part) for part in text.split(",")]


def parse_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--task", required=True, choices=sorted(KINDS), help="which question set --data holds")
    add("--data", required=True, nargs="+", metavar="DIR",
        help="folder with the official files; further ones add training questions")
    add("--init", required=True, metavar="DIR", help="run of train.py or Hugging Face GPT-2 folder")
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--random_init", action="store_true", help="fresh weights of --init's shape (default: off)")
    add("--seeds", type=numbers(int), default=[1, 2, 3], help="one run each (default: 1,2,3)")
    add("--lr", type=numbers(float), help="peak rate, or a list to sweep (default: by size)")
    add("--batch_size", type=numbers(int), help="questions a step, or a list (default: 16)")
    add("--epochs", type=int, help="passes over the training questions (default: by task)")
    add("--length", type=int, help="most tokens of a prompt (default: the task's; <= context)")
    add("--dropout", type=float, help="probability (default: --init's own)")
    add("--micro_batch", type=int, help="most questions at once (default: by 4,096 tokens)")
    add("--limit", type=int, help="N questions of each split, evenly spread (default: all)")
    add("--last", action="store_true",
        help="report the last epoch, as BioMedLM did (default: the best on dev)")
    add("--activation_checkpointing", action="store_true",
        help="recompute blocks in backward: less memory, a third more time (default: off)")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    add("--dtype", choices=["float32", "bfloat16"], help="(default: bfloat16 autocast on cuda)")
    add("--json", metavar="FILE", help="also write the result here (default: none)")
    return p.parse_args()


def resolve(args, env):
    """What a run is: settings, tokenizer, examples; and run.json's first half."""
    if not (Path(args.init) / "config.json").exists():
        GPT.from_pretrained(args.init)  # raises, and says what is missing
    config = GPTConfig.from_hf(json.loads((Path(args.init) / "config.json").read_text()))
    with torch.device("meta"):
        n_params = GPT(config).n_params()
    settings = default_settings(args.task, n_params)
    settings |= {k: getattr(args, k) for k in settings if getattr(args, k) is not None}
    length = min(args.length or LENGTHS[args.task], LENGTHS[args.task], config.n_positions)
    tokenizer = load_tokenizer(args.init, args.task)
    sets = read_questions(args.task, args.data)
    report = "test" if labeled(sets["test"]) else "dev"  # MedMCQA's test has no answers
    run = dict(task=args.task, data=args.data, init=args.init, random_init=args.random_init,
               length=length, n_params=n_params, special_tokens=SPECIAL_TOKENS[KINDS[args.task]],
               split=report, available=len(sets[report]), **settings)
    sets = {k: encode_all(spread(labeled(v), args.limit), args.task, tokenizer, length)
            for k, v in sets.items()}
    for k in ("train", report):
        if not sets[k]:
            raise ValueError(f"no labeled {k} questions of {args.task} beneath {args.data}: "
                             "put the official files there, or add a --data folder that has them")
    first = sets["train"][0].rows[0]
    env.print("prompt:", tokenizer.decode(first.prefix + first.suffixes[0]))
    env.print(json.dumps(run), *(f"{k} {len(v)}" for k, v in sets.items()))
    run["labels"] = sets["train"][0].question.options if KINDS[args.task] == LABELS else ()
    return run, tokenizer, sets


def train_seeds(args, run, tokenizer, sets, env, log):
    """One run a seed at settings `run`; (result a seed, the best seed's model on the CPU).

    A checkpoint is chosen on dev, never on what is reported: where dev is reported, the last one.
    """
    pad_id = tokenizer.add_special_tokens(["[PAD]"])[0]
    dev = sets["dev"] if run["split"] == "test" else []
    results, best = [], None
    for seed in args.seeds:
        settings = dict(seed=seed, lr=run["lr"], batch_size=run["batch_size"], last=args.last,
                        epochs=run["epochs"], micro_batch=args.micro_batch)
        model = build(args, args.task, tokenizer, len(run["labels"]), seed).to(env.device)
        model.gpt.activation_checkpointing = args.activation_checkpointing
        chosen = train(model, sets["train"], dev, settings, env, pad_id, log)
        reported = sets[run["split"]]
        scores = score_examples(model, reported, env, pad_id)
        result = dict(seed=seed, dev=chosen)
        if model.kind == TEXT:
            result["loss"] = -sum(s[0] for s in scores) / sum(e.n_targets for e in reported)
        else:
            result["accuracy"] = statistics.fmean(correct(reported, scores))
        log(result)
        results.append(result)
        if best is None or (chosen is not None and chosen > best[0]):
            best = chosen, seed, model.cpu(), scores
        del model
    return results, best


def summary(run, results, examples):
    """What --json holds: the mean over seeds, and Wilson's interval for n questions."""
    row = dict(task=run["task"], split=run["split"], available=run["available"], n=len(examples),
               accuracy=None, ci95=None, truncated=sum(e.truncated for e in examples),
               seeds=results)
    if run["task"] == "text":
        return row | dict(loss=statistics.fmean(r["loss"] for r in results))
    shares = [r["accuracy"] for r in results]
    mean = statistics.fmean(shares)
    chance, majority = baselines([e.question for e in examples])
    return row | dict(accuracy=mean, ci95=wilson(mean, len(examples)), chance=chance,
                      majority=majority, std=statistics.stdev(shares) if len(shares) > 1 else None)


def describe(row):
    """One line a reader understands."""
    if row["accuracy"] is None:
        return f"{row['task']} {row['split']}: {row['loss']:.4f} nats a target token, n={row['n']}"
    low, high = row["ci95"]
    n_seeds = f", mean of {len(row['seeds'])} seeds" if len(row.get("seeds", [])) > 1 else ""
    return (f"{row['task']} {row['split']}: accuracy {row['accuracy']:.1%}{n_seeds} (95% interval "
            f"{low:.1%} to {high:.1%} for n={row['n']} questions; chance {row['chance']:.1%}, "
            f"commonest answer {row['majority']:.1%}; truncated {row['truncated']})")


def main():
    args = parse_args()
    env = Env(args.device, args.dtype)
    run, tokenizer, sets = resolve(args, env)
    points = [(lr, size) for lr in run["lr"] for size in run["batch_size"]]
    if len(points) > 1 and (run["split"] == "dev" or not sets["dev"]):
        raise ValueError("no dev questions beside the reported ones: a sweep would choose on what "
                         "it reports; give one --lr and one --batch_size")
    if list(Path(args.out).glob("checkpoint_*.pt")):
        raise ValueError(f"{args.out} holds a run of train.py: give --out a folder of its own")
    out, rows, winner = Path(args.out), [], None

    def log(row):
        rows.append(row)
        env.print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                           for k, v in row.items()))

    for lr, size in points:
        run = run | dict(lr=lr, batch_size=size)
        results, best = train_seeds(args, run, tokenizer, sets, env, log)
        mean = statistics.fmean(r["dev"] or 0.0 for r in results)
        if winner is not None and mean <= winner:
            continue
        winner, result = mean, summary(run, results, sets[run["split"]])
        if env.rank == 0:  # overwritten when a later point of a sweep does better on dev
            out.mkdir(parents=True, exist_ok=True)
            _, seed, model, scores = best
            save(out, model, tokenizer, run | dict(saved_seed=seed, result=result))
            if model.kind != TEXT:
                write_predictions(out / "predictions.jsonl", sets[run["split"]], scores)
    env.print(describe(result), f"saved: seed {seed} in {out}")
    if env.rank == 0:
        write_atomically(out / "log.jsonl", lambda tmp: tmp.write_text(
            "".join(json.dumps(row) + "\n" for row in rows)))
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1))
    if env.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:  # a user's mistake: one line with its mend, no traceback
        sys.exit(f"finetune.py: error: {e}")
