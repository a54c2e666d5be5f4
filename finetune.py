"""Fine-tune on a question set as BioMedLM does (arXiv 2403.18421 and its released code).

    python finetune.py --task pubmedqa --data data/demo/qa/pubmedqa --init out/demo --out out/pm

Reads a run of train.py or a Hugging Face GPT-2 folder (--init) and a question set in its official
layout (--data); writes a folder that `transformers` loads, the tokenizer with the added tokens,
head.pt, run.json, log.jsonl and predictions.jsonl. torchrun deals each batch's questions to ranks.
Leaves out sharded parameters: a replica and its optimiser must fit (42 GB for 2.59B in fp32).

Dimensions: B rows, T time, C width, Q questions, O options, E scored positions.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
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
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import load_qa
from model import GPT, cross_entropy, write_atomically
from tokenizer import Tokenizer
from train import start_processes

# ---------------------------------------------------------------------------------------------
# tasks: what differs between them

KINDS = {"medqa": "choice", "medmcqa": "choice", "mmlu": "choice", "pubmedqa": "labels",
         "bioasq": "labels", "text": "text"}
# BioMedLM: added in this order, so that [PAD] is 28896 on the released vocabulary; [CLS] is unused
SPECIAL_TOKENS = {"choice": ["[PAD]", "[CLS]", "[SEP]"], "text": ["[PAD]", "<|startoftext|>"],
                  "labels": ["[PAD]", "<|CONTEXT|>", "<|QUESTION|>", "<|ANSWER|>"]}
LENGTHS = {"medqa": 512, "medmcqa": 512, "mmlu": 512, "pubmedqa": 512, "bioasq": 1024,
           "text": 1022}  # BioMedLM; text: 510 + 510, a token between them and one after
NEW_ROW_STD = 0.02  # BioMedLM: rows of added tokens, and (GPT-2's own init) the new head


def default_settings(kind, n_params):
    """(peak learning rates, epochs) by kind of task and model size."""
    if n_params >= 1e9:  # inside BioMedLM's sweeps; for multiple choice nothing is published
        lr = 2e-6 if kind == "labels" else 1e-5
    else:  # our choice
        lr = 3e-4 if n_params < 50e6 else 5e-5
    epochs = {"choice": 5 if n_params >= 50e6 else 10, "text": 3, "labels": 20}
    return [lr], epochs[kind]  # labels: BioMedLM's working point; other epochs: our choice


# ---------------------------------------------------------------------------------------------
# questions -> token ids


class Row(NamedTuple):
    """A row of a batch: a prefix, and suffixes that each see it but not each other."""
    prefix: list
    suffixes: list

    def length(self):
        return len(self.prefix) + sum(map(len, self.suffixes))


class Example(NamedTuple):
    """A question as rows: one where its options share a prefix, else one an option."""
    question: object
    rows: list
    truncated: bool = False
    n_targets: int = 0  # text: tokens at the row's end that carry loss


def truncate(ids, keep, limit):
    """Cut the end of ids until they fit beside `keep` tokens: (ids, whether they were cut)."""
    room = max(limit - keep, 0)
    return ids[:room], len(ids) > room


def encode_choice(question, tokenizer, special, limit, shared=True):
    """BioMedLM: question + "[SEP]" and " " + option + "[SEP]" for each option, at most `limit` ids.

    The longest part, which is the question, gives way; an option is cut only when it alone is too
    long. Where every option leaves the same question, its tokens are there once (shared).
    """
    sep, rows, cut = [special["[SEP]"]], [], False
    text = tokenizer.encode(question.question)
    for option in question.options:
        tail, cut_tail = truncate(tokenizer.encode(" " + option), 2, limit)
        head, cut_head = truncate(text, len(tail) + 2, limit)
        cut |= cut_tail or cut_head
        rows.append(Row(head + sep, [tail + sep]))
    if shared and all(row.prefix == rows[0].prefix for row in rows):
        rows = [Row(rows[0].prefix, [row.suffixes[0] for row in rows])]
    return Example(question, rows, cut)


def encode_labels(question, tokenizer, special, limit):
    """BioMedLM: <|CONTEXT|>context<|QUESTION|>question<|ANSWER|>, no spaces; the context gives way.

    The paper found context first better than question first.
    """
    text, cut_text = truncate(tokenizer.encode(question.question), 3, limit)
    context, cut = truncate(tokenizer.encode(question.context), len(text) + 3, limit)
    ids = [special["<|CONTEXT|>"], *context, special["<|QUESTION|>"], *text, special["<|ANSWER|>"]]
    return Example(question, [Row([], [ids])], cut or cut_text)


def encode_text(question, tokenizer, special, limit):
    """BioMedLM: source + <|startoftext|> + target + end-of-text, source and target <= 510 each."""
    half = (limit - 2) // 2
    source, cut = truncate(tokenizer.encode(question.question), 0, half)
    target, cut_target = truncate(tokenizer.encode(question.target), 0, half)
    ids = [*source, special["<|startoftext|>"], *target, tokenizer.eot_id]
    return Example(question, [Row([], [ids])], cut or cut_target, len(target) + 1)


def encode_all(questions, task, tokenizer, limit, **how):
    """Examples of at most `limit` tokens a row; adds the task's special tokens to the tokenizer."""
    names = SPECIAL_TOKENS[KINDS[task]]
    special = dict(zip(names, tokenizer.add_special_tokens(names)))
    encode = {"choice": encode_choice, "labels": encode_labels, "text": encode_text}[KINDS[task]]
    return [encode(q, tokenizer, special, limit, **how) for q in questions]


# ---------------------------------------------------------------------------------------------
# batches


class Batch(NamedTuple):
    idx: torch.Tensor  # (B, T) int64, padded on the right, after every scored position
    positions: torch.Tensor | None  # (B, T) int64; None: 0, 1, ...
    mask: torch.Tensor | None  # (B, 1, T, T) bool, who sees whom; None: causal
    ends: torch.Tensor  # (2, E) int64: row and column of every option's last token
    n_ends: list  # of each question
    answers: torch.Tensor | None  # (Q,) int64; None: text
    targets: torch.Tensor | None  # (B, T) int64, shifted, -100 = no loss; text only


def collate(examples, device="cpu"):
    """One Batch of examples; pads with id 0, which nothing sees."""
    rows = [row for e in examples for row in e.rows]
    ids, segments, ends = [], [], []
    for b, row in enumerate(rows):
        parts = [row.prefix, *row.suffixes]
        ids.append([i for part in parts for i in part])
        segments.append([k for k, part in enumerate(parts) for _ in part])
        ends += [(b, stop - 1) for stop in itertools.accumulate(map(len, parts))][1:]
    pad = lambda columns, fill=0: pad_sequence(  # noqa: E731
        list(map(torch.tensor, columns)), True, fill).to(device)
    positions = mask = targets = answers = None
    if any(len(row.suffixes) > 1 for row in rows):
        segment = pad(segments, -1)
        sees = ((segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])).tril()
        positions = (sees.sum(-1) - 1) * (segment >= 0)  # how many a token sees before itself
        mask = sees[:, None]  # (B, T, T) -> (B, 1, T, T)
    if examples[0].n_targets:  # text: the input is all but the last id
        targets = pad([[-100] * (len(row) - 1 - e.n_targets) + row[-e.n_targets:]
                       for row, e in zip(ids, examples)], -100)
        ids = [row[:-1] for row in ids]
    else:
        answers = torch.tensor([e.question.answer for e in examples], device=device)
    n_ends = [sum(len(row.suffixes) for row in e.rows) for e in examples]
    return Batch(pad(ids), positions, mask, torch.tensor(ends, device=device).t(), n_ends,
                 answers, targets)


def micro_batches(examples, micro_batch=None, max_tokens=4096):
    """Cut examples, sorted by length, before rows padded to the longest pass max_tokens."""
    size = lambda e: max(row.length() for row in e.rows)  # noqa: E731
    chunk, n_rows = [], 0
    for e in sorted(examples, key=size):
        if chunk and (len(chunk) == micro_batch or (n_rows + len(e.rows)) * size(e) > max_tokens):
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

    choice: Linear(C, 1) with bias, a score an option; labels: Linear(C, labels) without bias;
    text: no head but the language model's own.
    """

    def __init__(self, gpt, kind, n_labels=0):
        super().__init__()
        self.gpt, self.kind, self.head = gpt, kind, None
        if kind != "text":
            self.head = nn.Linear(gpt.config.n_embd, n_labels or 1, bias=kind == "choice")
            nn.init.normal_(self.head.weight, 0.0, NEW_ROW_STD)
            if kind == "choice":
                nn.init.zeros_(self.head.bias)

    def forward(self, batch):
        """Scores (Q, O) fp32, -inf where a question has fewer options; text: summed nats."""
        hidden = self.gpt.hidden(batch.idx, positions=batch.positions, mask=batch.mask)
        if self.kind == "text":
            scored = batch.targets != -100
            return scored.sum() * cross_entropy(hidden[scored], self.gpt.transformer.wte.weight,
                                                batch.targets[scored])
        row, column = batch.ends
        scores = self.head(hidden[row, column]).float()  # (B, T, C) -> (E, C) -> (E, 1 or labels)
        if self.kind == "labels":
            return scores
        return pad_sequence(scores[:, 0].split(batch.n_ends), True, -math.inf)  # (E,) -> (Q, O)


def loss_sum(model, batch):
    """Summed, not mean: the caller divides by what the whole global batch holds."""
    out = model(batch)
    return out if batch.targets is not None else F.cross_entropy(out, batch.answers,
                                                                 reduction="sum")


def adapt(gpt, vocab_size):
    """Give gpt rows N(0, 0.02) for added tokens, in place."""
    wte = gpt.transformer.wte.weight.detach()
    rows = torch.empty(max(vocab_size - len(wte), 0), wte.size(1)).normal_(0.0, NEW_ROW_STD)
    gpt.transformer.wte = nn.Embedding.from_pretrained(torch.cat([wte, rows]), freeze=False)
    gpt.config = dataclasses.replace(gpt.config, vocab_size=len(wte) + len(rows))
    return gpt


def build(run, tokenizer, seed):
    """A TaskModel on the CPU for one seed: --init's weights, or fresh ones of its shape."""
    torch.manual_seed(seed)
    if run["random_init"]:
        gpt = GPT(dataclasses.replace(GPT.config_of(run["init"]), dropout=run["dropout"]))
    else:
        gpt = GPT.from_pretrained(run["init"], dropout=run["dropout"])
    gpt.activation_checkpointing = run["activation_checkpointing"]
    return TaskModel(adapt(gpt, tokenizer.vocab_size), KINDS[run["task"]], len(run["labels"]))


def read_run(folder):
    path = Path(folder) / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def load_finetuned(folder, task, device="cpu"):
    """(TaskModel in eval mode, Tokenizer, length limit) of a folder that this script wrote."""
    run = read_run(folder)
    if run.get("task") not in KINDS:
        raise ValueError(f"{folder} is not fine-tuned: run finetune.py --task {task} on it first, "
                         "or give --zero_shot")
    if run["task"] != task and (KINDS[task] != "choice" or KINDS[run["task"]] != "choice"):
        raise ValueError(f"{folder} was fine-tuned on {run['task']}, whose head cannot answer "
                         f"{task}: fine-tune on {task} first")
    model = TaskModel(GPT.from_pretrained(folder), KINDS[task], len(run["labels"]))
    if model.head is not None:
        model.head.load_state_dict(torch.load(Path(folder) / "head.pt", weights_only=True))
    return model.to(device).eval(), Tokenizer.load(folder), run["length"]


def save(out, model, tokenizer, run):
    """A folder that `transformers` loads, and beside it what load_finetuned needs."""
    model.gpt.save_pretrained(out)
    tokenizer.save(out)
    if model.head is not None:
        write_atomically(out / "head.pt", lambda tmp: torch.save(model.head.state_dict(), tmp))
    write_atomically(out / "run.json", lambda tmp: tmp.write_text(json.dumps(run, indent=1)))


# ---------------------------------------------------------------------------------------------
# training


class Env:
    """This process among its peers (torchrun): its device, its arithmetic, its log."""

    def __init__(self, device=None, dtype=None):
        self.rank, self.world_size, self.device = start_processes(device)
        self.dtype = getattr(torch, dtype or (
            "bfloat16" if self.device.type == "cuda" else "float32"))
        self.rows = []

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def gather(self, value):
        """The values of all ranks, in a list."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def print(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def log(self, row):
        """Print a row of log.jsonl, and keep it."""
        self.rows.append(row)
        self.print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                            for k, v in row.items()))


def learning_rate(step, total_steps, peak):
    """BioMedLM: linear warm-up over half of the steps (0 at step 0), then linear decay to 0."""
    warmup = total_steps // 2
    if step < warmup:
        return peak * step / warmup
    return peak * (total_steps - step) / (total_steps - warmup)


def epoch_order(n, seed, epoch):
    """A permutation of n examples, of (seed, epoch) alone: the same on every rank."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(n, generator=generator).tolist()


def train_step(model, examples, optimizer, env, micro_batch=None):
    """One optimiser step on a global batch; returns this rank's part of its mean loss.

    The mean is over the questions (text: target tokens) of the whole global batch, however ranks
    and micro-batches cut it.
    """
    total = sum(e.n_targets or 1 for e in examples)
    share = examples[env.rank::env.world_size]
    weight = 1 if share else 0  # a rank without a question still joins the gradient's sum
    chunks, summed = list(micro_batches(share or examples[:1], micro_batch)), 0.0
    for i, chunk in enumerate(chunks):
        silent = env.world_size > 1 and i < len(chunks) - 1
        with model.no_sync() if silent else contextlib.nullcontext():
            with env.autocast():
                loss = weight * loss_sum(model, collate(chunk, env.device)) / total
            (loss * env.world_size).backward()  # DDP takes the mean over ranks; the sum is wanted
        summed += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return summed


def train(task_model, train_set, dev_set, settings, env):
    """Train one seed; returns its score on dev, with the chosen epoch's weights in task_model."""
    model = DistributedDataParallel(task_model) if env.world_size > 1 else task_model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=0.0, fused=env.device.type == "cuda")
    size, epochs, seed = (settings[k] for k in ("batch_size", "epochs", "seed"))
    steps = math.ceil(len(train_set) / size)
    torch.manual_seed(1000 * seed + env.rank)  # dropout differs between ranks
    best = kept = None
    bar = tqdm(total=epochs * steps, unit="step", disable=env.rank > 0, leave=False, mininterval=1)
    for epoch in range(epochs):
        order, start, loss = epoch_order(len(train_set), seed, epoch), time.perf_counter(), 0.0
        model.train()
        for step in range(steps):
            lr = learning_rate(epoch * steps + step, epochs * steps, settings["lr"])
            optimizer.param_groups[0]["lr"] = lr
            batch = [train_set[i] for i in order[step * size:(step + 1) * size]]
            loss += train_step(model, batch, optimizer, env, settings["micro_batch"])
            bar.update()
        loss = sum(env.gather(loss.item())) / steps
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} in epoch {epoch + 1}: lower --lr")
        speed = len(train_set) / (time.perf_counter() - start)
        score = quality(score_examples(task_model, dev_set, env), dev_set)
        env.log(dict(lr=settings["lr"], batch_size=size, seed=seed, epoch=epoch + 1, loss=loss,
                     dev=score, questions_per_s=speed))
        if not settings["last"] and score is not None and (best is None or score >= best):
            best = score  # the last of equals: early ones are hardly trained
            kept = {name: t.to("cpu", copy=True) for name, t in task_model.state_dict().items()}
    bar.close()
    if kept is not None:
        task_model.load_state_dict(kept)
    return score if kept is None else best


# ---------------------------------------------------------------------------------------------
# scores and what they are worth


@torch.no_grad()
def score_examples(model, examples, env, max_tokens=8192):
    """Per example, in order: its options' or labels' scores; text: one, minus the summed nats."""
    model.eval()
    found, share = {}, examples[env.rank::env.world_size]
    one = 1 if model.kind == "text" else None  # a loss belongs to one example
    for chunk in micro_batches(share, one, max_tokens):
        with env.autocast():
            scores = model(collate(chunk, env.device)).view(len(chunk), -1)
        for e, row in zip(chunk, scores.tolist()):
            found[id(e)] = [-row[0]] if model.kind == "text" else row[:len(e.question.options)]
    shares = env.gather([found[id(e)] for e in share])
    return [shares[i % env.world_size][i // env.world_size] for i in range(len(examples))]


def correct(scores, examples):
    """1 or 0 per example; the first of equal scores is the answer given."""
    return [int(s.index(max(s)) == e.question.answer) for s, e in zip(scores, examples)]


def quality(scores, examples):
    """Accuracy; for text minus the mean nats a target token; None without examples."""
    if not examples:
        return None
    if examples[0].n_targets:
        return sum(s[0] for s in scores) / sum(e.n_targets for e in examples)
    return statistics.fmean(correct(scores, examples))


def wilson(share, n, z=1.96):
    """95% interval of a share of n questions (Wilson's score interval)."""
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / n)**2 / 4)
    return [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]


def summarise(task, split, available, examples, values):
    """What --json holds, of one `quality` a seed: their mean, Wilson's interval for n questions.

    Seeds see the same questions, so n counts questions only. Beside it: chance, and the share of
    the split's commonest answer.
    """
    row = dict(task=task, split=split, available=available, n=len(examples), accuracy=None,
               ci95=None, truncated=sum(e.truncated for e in examples))
    mean = statistics.fmean(values)
    if task == "text":
        return row | dict(loss=-mean)
    answers = [e.question.answer for e in examples]
    return row | dict(accuracy=mean, ci95=wilson(mean, len(examples)),
                      std=statistics.stdev(values) if len(values) > 1 else None,
                      chance=statistics.fmean(1 / len(e.question.options) for e in examples),
                      majority=max(map(answers.count, set(answers))) / len(answers))


def describe(row, n_seeds=1):
    """`summarise`'s row as a sentence."""
    what = f"{row['task']} {row['split']}, n={row['n']}, {row['truncated']} truncated: "
    if row["accuracy"] is None:
        return f"{what}{row['loss']:.4f} nats a target token, mean of {n_seeds} seeds"
    over = f" ± {row['std']:.1%} over {n_seeds} seeds" if row["std"] is not None else ""
    return (what + f"accuracy {row['accuracy']:.1%}{over}, 95% interval {row['ci95'][0]:.1%} to "
            f"{row['ci95'][1]:.1%} for n questions; chance {row['chance']:.1%}, commonest answer "
            f"{row['majority']:.1%}")


def write_lines(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(Path(path), lambda tmp: tmp.write_text(text))


def predictions(scores, examples):
    return [dict(id=e.question.id, answer=e.question.answer, prediction=s.index(max(s)), scores=s)
            for s, e in zip(scores, examples)]


# ---------------------------------------------------------------------------------------------
# the command line


def load_splits(task, folder):
    """{"train", "dev" or "test": questions} of those splits whose official file the folder has."""
    names, found = {"train": "train", "dev": "dev", "test": "test"}, {}
    if task == "mmlu":  # its dev split is five examples a subject
        names = {"dev": "val", "test": "test"}
    for split, official in names.items():
        with contextlib.suppress(FileNotFoundError):
            found[split] = load_qa(task, folder, official)
    return found


def read_questions(task, folders):
    """{"train", "dev", "test": questions} of a task, official order, unlabeled ones included.

    A folder of another multiple-choice task adds its training questions (MMLU has none: BioMedLM
    trains on MedMCQA and MedQA for it). Questions that also stand in dev or test leave train.
    """
    sets = {"train": [], "dev": [], "test": []}
    others = [t for t in KINDS if KINDS[t] == KINDS[task] == "choice" and t != task]
    for folder in folders:
        if found := load_splits(task, folder):
            for split in found:
                sets[split] += found[split]
        elif found := next(filter(None, (load_splits(t, folder) for t in others)), None):
            sets["train"] += found.get("train", [])
        else:
            load_qa(task, folder, "test")  # raises, and says which file is missing
    key = lambda q: (q.question, q.context, q.options, q.target)  # noqa: E731
    held_out = {key(q) for q in sets["dev"] + sets["test"]}
    return sets | {"train": [q for q in sets["train"] if key(q) not in held_out]}


def labeled(questions, limit=None):
    """Those with an answer; `limit` of them evenly spaced, as some files are sorted by label."""
    questions = [q for q in questions if (q.answer is not None if q.options else q.target)]
    n = len(questions)
    return [questions[i * n // limit] for i in range(limit)] if limit and limit < n else questions


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def rates(text):
    return [float(part) for part in text.split(",")]


def positives(text):
    return [positive(part) for part in text.split(",")]


def parse_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--task", required=True, choices=sorted(KINDS), help="which question set --data holds")
    add("--data", required=True, nargs="+", metavar="DIR",
        help="folder with the official files; further ones add training questions")
    add("--init", required=True, metavar="DIR", help="run of train.py or Hugging Face GPT-2 folder")
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--random_init", action="store_true", help="fresh weights of --init's shape (default: off)")
    add("--seeds", type=positives, default=[1, 2, 3], help="a run each (default: 1,2,3)")
    add("--lr", type=rates, help="peak rate, or a list to sweep (default: by size)")
    add("--batch_size", type=positives, default=[16],
        help="questions a step, or a list to sweep (default: 16)")
    add("--epochs", type=positive, help="passes over the training questions (default: by task)")
    add("--length", type=positive, help="most tokens of a row (default: the task's, or context)")
    add("--dropout", type=float, help="probability (default: --init's own)")
    add("--micro_batch", type=positive, help="most questions at once (default: by 4,096 tokens)")
    add("--limit", type=positive, help="N questions of each split, evenly spread (default: all)")
    add("--last", action="store_true", help="report the last epoch, as BioMedLM (default: best)")
    add("--activation_checkpointing", action="store_true",
        help="recompute blocks in backward: less memory, a third more time (default: off)")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    add("--dtype", choices=["float32", "bfloat16"], help="(default: bfloat16 autocast on cuda)")
    add("--json", metavar="FILE", help="also write the result here (default: none)")
    return p.parse_args()


def resolve(args, env):
    """(run: the settings, for run.json; tokenizer; examples to "train" on, for "dev", "reported").

    Epochs and sweeps are chosen on dev, never on what is reported: where that is dev, dev is empty.
    """
    config, kind = GPT.config_of(args.init), KINDS[args.task]
    with torch.device("meta"):
        n_params = GPT(config).n_params()
    lr, epochs = default_settings(kind, n_params)
    sets, tokenizer = read_questions(args.task, args.data), Tokenizer.load(args.init)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer in {args.init} has {tokenizer.vocab_size:,} tokens, its "
                         f"model {config.vocab_size:,}: copy the tokenizer it was trained with")
    split = "test" if labeled(sets["test"]) else "dev"  # MedMCQA's test has no answers
    run = vars(args) | dict(
        lr=args.lr or lr, epochs=args.epochs or epochs, n_params=n_params, split=split, labels=(),
        length=min(args.length or math.inf, LENGTHS[args.task], config.n_positions),
        dropout=config.dropout if args.dropout is None else args.dropout,
        available=len(sets[split]), torch=torch.__version__)
    sets = {k: encode_all(labeled(v, args.limit), args.task, tokenizer, run["length"])
            for k, v in sets.items()}
    for k in ("train", split):
        if not sets[k]:
            raise ValueError(f"no labeled {k} questions of {args.task} in {' '.join(args.data)}: "
                             "put the official file there, or add a --data folder that has some")
    dev = sets["dev"] if split == "test" else []
    if len(run["lr"]) * len(run["batch_size"]) > 1 and not dev:
        raise ValueError("no dev questions beside the reported ones: a sweep would choose on what "
                         "it reports; give one --lr and one --batch_size")
    if kind == "labels":
        run["labels"] = sets["train"][0].question.options
    first = sets["train"][0].rows[0]
    env.print("prompt: " + tokenizer.decode(first.prefix + first.suffixes[0]))
    env.print(" ".join([*(f"{k}={v}" for k, v in run.items()),
                        *(f"{k}: {len(v)}" for k, v in sets.items())]))
    return run, tokenizer, {"train": sets["train"], "dev": dev, "reported": sets[split]}


def train_seeds(run, tokenizer, sets, env):
    """(mean score on dev, --json's result, and of the seed that is best on dev: model, scores)."""
    rows, best = [], None
    for seed in run["seeds"]:
        model = build(run, tokenizer, seed).to(env.device)
        dev = train(model, sets["train"], sets["dev"], run | dict(seed=seed), env)
        scores = score_examples(model, sets["reported"], env)
        value = quality(scores, sets["reported"])
        rows.append(dict(seed=seed, accuracy=value if run["task"] != "text" else None,
                         value=value, dev=dev))
        env.log(rows[-1])
        if best is None or (dev is not None and dev > best[0]):
            best = dev, seed, model.cpu(), scores
        del model  # before the next one is built
    result = summarise(run["task"], run["split"], run["available"], sets["reported"],
                       [row["value"] for row in rows])
    result |= dict(seeds=rows, saved_seed=best[1], lr=run["lr"], batch_size=run["batch_size"])
    return statistics.fmean(row["dev"] or 0.0 for row in rows), result, *best[2:]


def main():
    args = parse_args()
    env, out, best = Env(args.device, args.dtype), Path(args.out), None
    if list(out.glob("checkpoint_*.pt")) or out.resolve() == Path(args.init).resolve():
        raise ValueError(f"{out} holds the model to start from, or another run of train.py: give "
                         "--out a folder of its own")
    run, tokenizer, sets = resolve(args, env)
    for lr, size in itertools.product(run["lr"], run["batch_size"]):
        point = run | dict(lr=lr, batch_size=size)
        dev, found, model, scores = train_seeds(point, tokenizer, sets, env)
        if best is not None and dev <= best:
            continue
        best, result = dev, found
        if env.rank == 0:  # a later point of a sweep that does better on dev replaces it
            save(out, model, tokenizer, point | dict(result=result))
            if args.task != "text":
                write_lines(out / "predictions.jsonl", predictions(scores, sets["reported"]))
    env.print(f"{describe(result, len(args.seeds))}\nsaved: seed {result['saved_seed']} in {out}")
    if env.rank == 0:
        write_lines(out / "log.jsonl", env.rows)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1))
    if env.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:  # a user's mistake: one line with its mend, no traceback
        sys.exit(f"finetune.py: error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
