"""Fine-tune on a question set as BioMedLM does (arXiv 2403.18421 and its released code).

    python finetune.py --task pubmedqa --data data/demo/qa/pubmedqa --init out/demo --out out/pm

Reads a run of train.py or a Hugging Face GPT-2 folder (--init) and a question set in its official
layout (--data). Writes a folder that `transformers` loads, the tokenizer with the added tokens,
head.pt, run.json, log.jsonl and predictions.jsonl. Under torchrun the ranks share each batch.
Leaves out sharded parameters: a replica and its optimiser must fit (42 GB for 2.59B in fp32).
A sweep is a loop in the shell: give each point its own --out.

Dimensions: B rows, T time, C width, Q questions, O options, E scored positions.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import TASKS, load_qa
from model import GPT, cross_entropy
from tokenizer import Tokenizer, replacing, run_command
from train import start_process

# ---------------------------------------------------------------------------------------------
# the run: settings, questions; for each seed a model, its training, its scores; then the report


def main():
    # Settings: the flags, and defaults by task and model size.
    args = parse_args()
    process = start_process(args.device, args.dtype)
    settings, tokenizer = resolve(args)
    out = Path(args.out)

    # Questions: those of train teach, dev chooses the epoch and the seed, test is reported and
    # chooses nothing. MedMCQA's test has no answers: there dev is reported, and nothing chooses.
    questions = read_questions(args.task, args.data)
    split = "test" if labeled(questions["test"]) else "dev"
    examples = {}
    for name in ("train", "dev", "test"):
        some = labeled(questions[name], args.limit)
        if not some and name in ("train", split):
            raise ValueError(f"no labeled {name} questions of {args.task} in "
                             f"{' '.join(args.data)}: put the official file there, or add a "
                             "--data folder that has some")
        examples[name] = encode_all(some, args.task, tokenizer, settings)
    train_set, reported = examples["train"], examples[split]
    dev_set = examples["dev"] if split == "test" else []
    if settings["kind"] == "labels":
        settings["labels"] = train_set[0].question.options
    row = train_set[0].rows[0]
    process.print(f"{settings}\nprompt: {tokenizer.decode(row.prefix + row.suffixes[0])}")

    # A run each seed: new tokens' rows, the head and the order differ.
    log, seeds = [], []
    for seed in args.seeds:
        model = build(settings, tokenizer, seed).to(process.device)
        dev = train(model, train_set, dev_set, settings, seed, process, log)
        scores = score_examples(model, reported, process)
        score = quality(scores, reported)
        process.print(f"seed {seed}: dev {dev}, {split} {score}")
        # Save the seed that is best on dev: the first of equals, or where there is no dev.
        if not seeds or (dev is not None and dev > max(row["dev"] for row in seeds)):
            saved_seed = seed
            answers = predictions(scores, reported)
            process.on_rank_0(partial(save, out, model, tokenizer, settings, answers))
        seeds.append({"seed": seed, "dev": dev, "score": score})

    # Report: the mean over seeds.
    scores = [row["score"] for row in seeds]
    result = summarise(args.task, split, len(questions[split]), reported, scores)
    result |= {"seeds": seeds, "saved_seed": saved_seed}
    process.on_rank_0(partial(write_lines, out / "log.jsonl", [*log, result]))
    if args.json and process.rank == 0:
        Path(args.json).write_text(json.dumps(result, indent=1))
    process.print(f"{describe(result, len(seeds))}\nsaved: seed {saved_seed} in {out}")
    process.close()


def train(task_model, train_set, dev_set, settings, seed, process, log):
    """Train one seed. Returns the chosen epoch's score on dev; task_model then has its weights.

    The best epoch on dev is chosen; the last one with --last (BioMedLM) or without a dev set.
    """
    model = task_model
    if process.world_size > 1:
        model = DistributedDataParallel(task_model)
    # BioMedLM: betas 0.9 and 0.999 and eps 1e-8, which are torch's own.
    on_gpu = process.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=on_gpu)
    batch_size, epochs = settings["batch_size"], settings["epochs"]
    total_steps = epochs * math.ceil(len(train_set) / batch_size)
    torch.manual_seed(1000 * seed + process.rank)  # dropout differs between ranks
    choosing = bool(dev_set) and not settings["last"]
    best, kept = -math.inf, None
    step = 0
    for epoch in range(epochs):
        # One pass over the questions, in an order of its own.
        model.train()
        loss = 0.0
        batches = epoch_order(len(train_set), seed, epoch).split(batch_size)
        bar = tqdm(batches, f"epoch {epoch + 1}", leave=False,
                   disable=process.rank > 0 or None)  # None: only on a terminal
        for batch in bar:
            lr = learning_rate(step, total_steps, settings["lr"])
            optimizer.param_groups[0]["lr"] = lr
            examples = [train_set[i] for i in batch.tolist()]
            loss += train_step(model, examples, optimizer, process, settings["micro_batch"])
            step += 1
        loss = sum(process.gather(loss.item())) / len(batches)

        # Score it on dev, and keep the weights if they are the best so far.
        score = quality(score_examples(task_model, dev_set, process), dev_set)
        process.print(f"seed {seed}, epoch {epoch + 1}: loss {loss:.4f}, dev {score}")
        row = {"seed": seed, "epoch": epoch + 1, "loss": loss, "dev": score}
        log.append(row)
        if choosing and score >= best:  # the last of equals: it has trained longest
            best = score
            kept = {}  # copies, on the CPU: a GPU may have no room for them
            for name, tensor in task_model.state_dict().items():
                kept[name] = tensor.to("cpu", copy=True)
    if not choosing:
        return score
    task_model.load_state_dict(kept)
    return best


def train_step(model, examples, optimizer, process, micro_batch=None):
    """One optimiser step on a global batch. Returns this rank's part of its mean loss.

    The mean is over the questions (text: target tokens) of the whole global batch, however ranks
    and micro-batches cut it. ValueError where the gradient is not finite.
    """
    total = sum(e.n_targets or 1 for e in examples)
    share = examples[process.rank::process.world_size]
    # A rank without a question must still join the sum of gradients: it adds one of weight 0.
    weight = 1 if share else 0
    chunks = list(micro_batches(share or examples[:1], micro_batch))
    loss_of_share = 0.0
    for i, chunk in enumerate(chunks):
        # DDP exchanges gradients in backward; once is enough, with the last micro-batch. It must
        # be told before forward.
        model.require_backward_grad_sync = i == len(chunks) - 1
        with process.autocast():
            loss = weight * loss_sum(model, collate(chunk, process.device)) / total
        (loss * process.world_size).backward()  # DDP takes the mean over ranks, we want the sum
        loss_of_share += loss.detach()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # BioMedLM
    if not torch.isfinite(norm):  # the same on every rank
        raise ValueError(f"the loss is {loss_of_share}, its gradient's norm {norm}: lower --lr")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_of_share


def learning_rate(step, total_steps, peak):
    """Linear warm-up from 0 over half of the steps, rounded up, then linear decay towards 0.

    BioMedLM: --warmup_ratio 0.5 of Hugging Face's trainer. A run of one step has rate 0.
    """
    warmup = math.ceil(total_steps / 2)
    if step < warmup:
        return peak * step / warmup
    return peak * (total_steps - step) / (total_steps - warmup)


def epoch_order(n, seed, epoch):
    """A permutation of n examples, (n,) int64, of (seed, epoch) alone: the same on every rank."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(n, generator=generator)


# ---------------------------------------------------------------------------------------------
# questions: which ones train, which ones are held out


def read_questions(task, folders):
    """{"train", "dev", "test": questions} of a task, official order, unlabeled ones included.

    A folder of another multiple-choice task adds its training questions (MMLU has none: BioMedLM
    trains on MedMCQA and MedQA for it). Questions that also stand in dev or test leave train.
    """
    questions = {"train": [], "dev": [], "test": []}
    for folder in folders:
        found = load_splits(task, folder)
        # No file of this task: take the training questions of another one, whose head is the same.
        for other in TASKS:
            both_choice = TASKS[other].kind == TASKS[task].kind == "choice"
            if not found and both_choice:
                train = load_splits(other, folder).get("train")
                found = {"train": train} if train else {}
        if not found:
            load_qa(task, folder, "test")  # raises, and says which file is missing
        for split in found:
            questions[split] += found[split]

    # An unlabeled question is held out, too: another folder may hold its answer.
    def content(q):
        return q.question, q.context, q.options, q.target

    held_out = {content(q) for q in questions["dev"] + questions["test"]}
    questions["train"] = [q for q in questions["train"] if content(q) not in held_out]
    return questions


def load_splits(task, folder):
    """{"train", "dev" or "test": questions} of those splits whose official file the folder has."""
    official = {"train": "train", "dev": "dev", "test": "test"}
    if task == "mmlu":  # what it calls dev is five examples a subject
        official = {"dev": "val", "test": "test"}
    found = {}
    for split, name in official.items():
        with contextlib.suppress(FileNotFoundError):
            found[split] = load_qa(task, folder, name)
    return found


def labeled(questions, limit=None):
    """Those with an answer; `limit` of them evenly spaced, as some files are sorted by label."""
    def has_answer(q):
        return q.answer is not None if q.options else q.target != ""

    questions = [q for q in questions if has_answer(q)]
    n = len(questions)
    limit = min(limit or n, n)
    return [questions[i * n // limit] for i in range(limit)]


# ---------------------------------------------------------------------------------------------
# questions -> token ids
#
#     kind     one row                                     what is scored
#     choice   question [SEP] | option [SEP] | option ...  the last token of each option
#     labels   context question                            the last token, once a label
#     text     question <|startoftext|> | answer           every token of the answer


class Row(NamedTuple):
    """A row of a batch: a prefix, and suffixes that each see it but not each other."""

    prefix: list
    suffixes: list

    def ids(self):
        """All tokens in order."""
        return sum(self.suffixes, self.prefix)


class Example(NamedTuple):
    """A question as rows: one where its options share a prefix, else one an option."""

    question: object
    rows: list
    truncated: bool = False
    n_targets: int = 0  # text: tokens that carry loss, all of the row's suffix

    def length(self):
        """Tokens of the longest row."""
        return max(len(row.ids()) for row in self.rows)


# BioMedLM: the released script adds these and uses none; the paper's are in data.TASKS.
UNUSED_MARKERS = ("[PAD]", "<|CONTEXT|>", "<|QUESTION1|>", "<|QUESTION2|>", "<|ANSWER|>")


def encode_all(questions, task, tokenizer, settings):
    """Examples of settings["length"] tokens a row at most; adds special tokens to the tokenizer.

    settings["markers"]: the paper's text for yes/no/maybe, in place of the released script's.
    """
    kind, names = TASKS[task].kind, TASKS[task].special_tokens
    if kind == "labels" and not settings["markers"]:
        names = UNUSED_MARKERS
    special = dict(zip(names, tokenizer.add_special_tokens(names)))
    encode = {"choice": encode_choice,
              "labels": encode_labels,
              "text": encode_text}[kind]
    return [encode(q, tokenizer, special, settings["length"]) for q in questions]


def fit(long, short, room):
    """(long, short, whether any was cut): long gives way, short only where it alone is too long.

    room 6: aaaaa bb -> aaaa bb; a bbbbbbbb -> (nothing) bbbbbb.
    """
    short_kept = short[:room]
    long_kept = long[:room - len(short_kept)]
    return long_kept, short_kept, len(long) + len(short) > room


def encode_choice(question, tokenizer, special, length):
    """BioMedLM: question + "[SEP]" and " " + option + "[SEP]" for each option.

    The longest part, which is the question, gives way. Where every option leaves the same
    question, its tokens stand there once.
    """
    sep = [special["[SEP]"]]
    text = tokenizer.encode(question.question)
    rows, truncated = [], False
    for option in question.options:
        ids = tokenizer.encode(" " + option)
        head, tail, cut = fit(text, ids, length - 2)
        rows.append(Row(head + sep, [tail + sep]))
        truncated |= cut
    prefix = rows[0].prefix
    if all(row.prefix == prefix for row in rows):
        suffixes = [row.suffixes[0] for row in rows]
        rows = [Row(prefix, suffixes)]
    return Example(question, rows, truncated)


def encode_labels(question, tokenizer, special, length):
    """Context, then question, in one of BioMedLM's two forms; the row's last token is scored.

    The released script: `tokenizer(context, question)`, both parts' ids and nothing between them.
    It adds marker tokens and uses none. The paper (--markers), which found context first better:
    <|CONTEXT|>context<|QUESTION|>question<|ANSWER|>, without spaces. The context gives way.
    """
    markers = "<|QUESTION|>" in special  # the script's are QUESTION1 and QUESTION2
    room = length - 3 if markers else length
    context = tokenizer.encode(question.context)
    text = tokenizer.encode(question.question)
    context, text, cut = fit(context, text, room)
    ids = context + text
    if markers:
        ids = [special["<|CONTEXT|>"], *context,
               special["<|QUESTION|>"], *text,
               special["<|ANSWER|>"]]
    return Example(question, [Row([], [ids])], cut)


def encode_text(question, tokenizer, special, length):
    """BioMedLM: source + <|startoftext|> + target + end-of-text, source and target <= 510 each."""
    half = (length - 2) // 2
    source = tokenizer.encode(question.question)
    target = tokenizer.encode(question.target)
    truncated = max(len(source), len(target)) > half
    target = [*target[:half], tokenizer.eot_id]
    prefix = [*source[:half], special["<|startoftext|>"]]
    return Example(question, [Row(prefix, [target])], truncated, len(target))


# ---------------------------------------------------------------------------------------------
# token ids -> batches
#
# All options of a question stand in one row behind their shared prefix, which is computed once.
# An option sees the prefix and itself, and counts its positions on from the prefix's end, as if
# it stood there alone. Prefix P, options A and B (x: the row's token sees the column's):
#
#     segment   position        P0 P1 A0 A1 B0 B1
#        0         0        P0   x
#        0         1        P1   x  x
#        1         2        A0   x  x  x
#        1         3        A1   x  x  x  x          <- option A is scored here
#        2         2        B0   x  x  .  .  x
#        2         3        B1   x  x  .  .  x  x    <- option B is scored here


class Batch(NamedTuple):
    """What TaskModel reads, of several questions."""

    idx: torch.Tensor  # (B, T) int64, padded on the right, after every scored position
    positions: torch.Tensor | None  # (B, T) int64; None: 0, 1, ...
    mask: torch.Tensor | None  # (B, 1, T, T) bool, who sees whom; None: causal
    ends: torch.Tensor  # (2, E) int64: row and column of every option's last token
    n_options: list | None  # of each question; None: text
    answers: torch.Tensor | None  # (Q,) int64; None: text
    targets: torch.Tensor | None  # (B, T) int64, shifted, -100 = no loss; text only


def collate(examples, device="cpu"):
    """One Batch of examples; pads with id 0, which nothing sees."""
    rows = [row for e in examples for row in e.rows]
    ids, segments = [], []
    for row in rows:
        sizes = torch.tensor([len(row.prefix), *map(len, row.suffixes)])
        ids.append(torch.tensor(row.ids()))
        segments.append(torch.arange(len(sizes)).repeat_interleave(sizes))
    idx = pad_sequence(ids, batch_first=True).to(device)  # (B, T)
    segment = pad_sequence(segments, batch_first=True, padding_value=-1).to(device)

    # An option ends where the next token is of another segment.
    following = F.pad(segment[:, 1:], (0, 1), value=-1)
    ends = (segment > 0) & (segment != following)

    # Segments that share a row need the mask; alone in it, a causal row is right and faster.
    positions = mask = targets = answers = n_options = None
    if any(len(row.suffixes) > 1 for row in rows):
        same = segment[:, :, None] == segment[:, None, :]  # (B, T) -> (B, T, T)
        of_prefix = segment[:, None, :] == 0
        sees = (same | of_prefix).tril()
        positions = sees.sum(-1) - 1  # how many others a token sees
        positions[segment < 0] = 0  # padding sees what may be more than the context
        mask = sees[:, None]  # (B, T, T) -> (B, 1, T, T)

    if examples[0].n_targets:  # text: the model sees all but the last token
        targets = idx.masked_fill(segment != 1, -100)[:, 1:]
        idx = idx[:, :-1]
    else:
        n_options = [len(e.question.options) for e in examples]
        answers = torch.tensor([e.question.answer for e in examples], device=device)
    return Batch(idx, positions, mask, ends.nonzero().t(), n_options, answers, targets)


def micro_batches(examples, micro_batch=None, max_tokens=4096):
    """Cut examples, sorted by length, before rows padded to the longest pass max_tokens."""
    chunk, n_rows = [], 0
    for e in sorted(examples, key=Example.length):
        # Sorted, e is the longest so far: all rows are padded to it.
        n_tokens = (n_rows + len(e.rows)) * e.length()
        if chunk and (n_tokens > max_tokens or len(chunk) == micro_batch):
            yield chunk
            chunk, n_rows = [], 0
        chunk.append(e)
        n_rows += len(e.rows)
    if chunk:
        yield chunk


# ---------------------------------------------------------------------------------------------
# the model: a GPT and a head

NEW_ROW_STD = 0.02  # BioMedLM: rows of added tokens, and (GPT-2's own init) the new head


class TaskModel(nn.Module):
    """BioMedLM's heads, on ln_f at the last token of an option or a prompt.

    choice: Linear(C, 1) with bias, a score an option; labels: Linear(C, labels) without bias;
    text: no head but the language model's own.
    """

    def __init__(self, gpt, kind, n_labels=0):
        super().__init__()
        self.gpt = gpt
        self.kind = kind
        self.head = nn.Identity()
        if kind != "text":
            width = gpt.config.n_embd
            self.head = nn.Linear(width, n_labels or 1, bias=kind == "choice")
            nn.init.normal_(self.head.weight, std=NEW_ROW_STD)
        if kind == "choice":
            nn.init.zeros_(self.head.bias)

    def forward(self, batch):
        """Scores (Q, O) fp32, -inf where a question has fewer options; text: summed nats."""
        hidden = self.gpt.hidden(batch.idx, positions=batch.positions, mask=batch.mask)
        if self.kind == "text":
            scored = batch.targets != -100
            mean = cross_entropy(hidden[scored], self.gpt.transformer.wte.weight,
                                 batch.targets[scored])
            return scored.sum() * mean
        row, column = batch.ends
        scores = self.head(hidden[row, column]).float()  # (B, T, C) -> (E, C) -> (E, 1 or labels)
        if self.kind == "labels":
            return scores
        each = scores[:, 0].split(batch.n_options)  # (E,) -> Q times (options,)
        return pad_sequence(each, batch_first=True, padding_value=-math.inf)


def loss_sum(model, batch):
    """Summed, not mean: the caller divides by what the whole global batch holds."""
    out = model(batch)
    if batch.targets is not None:
        return out
    return F.cross_entropy(out, batch.answers, reduction="sum")


def build(settings, tokenizer, seed):
    """A TaskModel on the CPU for one seed: --init's weights, or fresh ones of its shape."""
    torch.manual_seed(seed)
    gpt = GPT.from_pretrained(settings["init"], dropout=settings["dropout"])
    if settings["random_init"]:
        gpt = GPT(gpt.config)
    gpt.activation_checkpointing = settings["activation_checkpointing"]
    adapt(gpt, tokenizer.vocab_size)
    return TaskModel(gpt, settings["kind"], len(settings["labels"]))


def adapt(gpt, vocab_size):
    """Give gpt rows N(0, 0.02) for added tokens, in place. Returns gpt."""
    wte = gpt.transformer.wte.weight.detach()
    vocab_size = max(vocab_size, len(wte))  # a folder may have more rows than tokens
    added = torch.empty(vocab_size - len(wte), wte.size(1))
    added.normal_(std=NEW_ROW_STD)
    gpt.transformer.wte = nn.Embedding.from_pretrained(torch.cat([wte, added]), freeze=False)
    gpt.config = dataclasses.replace(gpt.config, vocab_size=vocab_size)
    return gpt


# ---------------------------------------------------------------------------------------------
# scores and what they are worth


@torch.no_grad()
def score_examples(model, examples, process, max_tokens=8192):
    """Per example, in order: its options' or labels' scores; text: one, the summed nats."""
    model.eval()
    share = examples[process.rank::process.world_size]
    at_once = 1 if model.kind == "text" else None  # a loss belongs to one example
    found = {}  # by identity, since micro_batches sorts by length
    for chunk in micro_batches(share, at_once, max_tokens):
        with process.autocast():
            scores = model(collate(chunk, process.device))
        rows = scores.view(len(chunk), -1).tolist()
        for e, row in zip(chunk, rows):
            found[id(e)] = row[:len(e.question.options) or 1]  # without -inf of missing options
    # Rank r scored examples r, r + world_size, …: put all ranks' scores back in that order.
    ordered = [None] * len(examples)
    parts = process.gather([found[id(e)] for e in share])
    for rank, part in enumerate(parts):
        ordered[rank::process.world_size] = part
    return ordered


def chosen(scores):
    """Index of the answer given: the best score, the first of equals."""
    return scores.index(max(scores))


def correct(scores, examples):
    """1 or 0 per example."""
    return [int(chosen(s) == e.question.answer) for s, e in zip(scores, examples)]


def quality(scores, examples):
    """Accuracy; for text minus the mean nats a target token; None without examples."""
    if not examples:
        return None
    if examples[0].n_targets:
        nats = sum(s[0] for s in scores)
        return -nats / sum(e.n_targets for e in examples)
    return statistics.fmean(correct(scores, examples))


def wilson(share, n, z=1.96):
    """95% interval of a share of n questions (Wilson's score interval)."""
    # Not the share ± z standard errors: near 0 and 1 that leaves [0, 1].
    spread = z * z / n
    centre = share + spread / 2
    half = math.sqrt(spread * share * (1 - share) + spread * spread / 4)
    return [(centre - half) / (1 + spread), (centre + half) / (1 + spread)]


def summarise(task, split, available, examples, values):
    """What --json holds, of one `quality` a seed: their mean, Wilson's interval for n questions.

    Seeds see the same questions, so n counts questions only. Beside it: chance, and the share of
    the split's commonest answer.
    """
    mean = statistics.fmean(values)
    row = {
        "task": task, "split": split, "available": available, "n": len(examples),
        "accuracy": None, "ci95": None,
        "truncated": sum(e.truncated for e in examples)}
    if task == "text":
        return row | {"loss": -mean}
    answers = [e.question.answer for e in examples]
    commonest = statistics.mode(answers)
    return row | {
        "accuracy": mean,
        "ci95": wilson(mean, len(examples)),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "chance": statistics.fmean(1 / len(e.question.options) for e in examples),
        "majority": answers.count(commonest) / len(answers)}


def describe(row, n_seeds=1):
    """`summarise`'s row as a sentence."""
    what = f"{row['task']} {row['split']}, n={row['n']}, {row['truncated']} truncated: "
    if row["accuracy"] is None:
        return f"{what}{row['loss']:.4f} nats a target token, mean of {n_seeds} seeds"
    over = f" ± {row['std']:.1%} over {n_seeds} seeds" if row["std"] is not None else ""
    low, high = row["ci95"]
    return (f"{what}accuracy {row['accuracy']:.1%}{over}, 95% interval {low:.1%} to {high:.1%} "
            f"for n questions; chance {row['chance']:.1%}, commonest answer {row['majority']:.1%}")


def predictions(scores, examples):
    """Rows of predictions.jsonl."""
    rows = []
    for s, e in zip(scores, examples):
        rows.append({"id": e.question.id, "answer": e.question.answer,
                     "prediction": chosen(s), "scores": s})
    return rows


# ---------------------------------------------------------------------------------------------
# the folder: a Hugging Face GPT-2, a head, and the settings that eval.py must load it with


def save(out, model, tokenizer, settings, answers):
    """A folder that `transformers` loads, and beside it what load_finetuned needs."""
    model.gpt.save_pretrained(out)
    tokenizer.save(out)
    with replacing(out / "head.pt") as file:
        torch.save(model.head.state_dict(), file)
    if settings["task"] != "text":
        write_lines(out / "predictions.jsonl", answers)
    with replacing(out / "run.json") as file:  # the last: what stands beside it is whole
        file.write(json.dumps(settings, indent=1).encode())


def write_lines(path, rows):
    """A JSON line a row."""
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")


def read_run(folder):
    """The settings that a run of train.py or finetune.py left, {} where there are none."""
    path = Path(folder) / "run.json"
    if not path.exists():
        return {}
    return json.loads(path.read_text())


def load_finetuned(folder, task, device="cpu"):
    """(TaskModel in eval mode, Tokenizer, settings) of a folder that this script wrote.

    Encode questions with settings["length"] and settings["markers"], as in training. A head for
    multiple choice serves any such task, another one only the task it was trained on.
    """
    settings = read_run(folder)
    kind = TASKS[task].kind
    any_choice = settings.get("kind") == kind == "choice"
    if settings.get("task") != task and not any_choice:
        raise ValueError(f"{folder} has no head for {task}: run finetune.py --task {task} on it "
                         "first, or give --zero_shot")
    gpt = GPT.from_pretrained(folder)
    model = TaskModel(gpt, kind, len(settings["labels"]))
    head = torch.load(Path(folder) / "head.pt", weights_only=True)
    model.head.load_state_dict(head)
    return model.to(device).eval(), Tokenizer.load(folder), settings


# ---------------------------------------------------------------------------------------------
# the command line


def resolve(args):
    """(settings: the flags, defaults by task and model size where none is given; tokenizer)."""
    out, init = Path(args.out), Path(args.init)
    checkpoints = list(out.glob("checkpoint_*.pt"))
    if checkpoints or out.resolve() == init.resolve():
        raise ValueError(f"{out} holds the model to start from, or another run of train.py: give "
                         "--out a folder of its own")
    task, config = TASKS[args.task], GPT.config_of(init)
    tokenizer = Tokenizer.load(init)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer in {init} has {tokenizer.vocab_size:,} tokens, its model "
                         f"{config.vocab_size:,}: copy the tokenizer it was trained with")
    with torch.device("meta"):
        n_params = GPT(config).n_params()
    # A small model takes larger steps, and more of them: our choice.
    lr, epochs = task.lr, task.epochs
    if n_params < 1e9:
        lr = 5e-5
    if n_params < 50e6:
        lr = 3e-4
        if task.kind == "choice":
            epochs = 10
    settings = vars(args) | {
        "kind": task.kind,
        "labels": (),
        "lr": args.lr or lr,
        "epochs": args.epochs or epochs,
        "length": min(args.length or task.length, config.n_positions),
        "torch": torch.__version__}
    if args.dropout is None:
        settings["dropout"] = config.dropout
    return settings, tokenizer


def positive(text):
    """argparse's type of a count."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def positives(text):
    """From "1,2,3" to [1, 2, 3]."""
    return [positive(part) for part in text.split(",")]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--task", required=True, choices=sorted(TASKS),
        help="which question set --data holds")
    add("--data", required=True, nargs="+", metavar="DIR",
        help="folder with the official files; further ones add training questions")
    add("--init", required=True, metavar="DIR",
        help="run of train.py or Hugging Face GPT-2 folder")
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--random_init", action="store_true",
        help="fresh weights of --init's shape (default: off)")
    add("--markers", action="store_true",
        help="pubmedqa, bioasq: the paper's prompt with marker tokens (default: the released "
        "script's, context and question joined plainly)")
    add("--seeds", type=positives, default=[1, 2, 3],
        help="a run each (default: 1,2,3)")
    add("--lr", type=float, help="peak learning rate (default: by task and size)")
    add("--batch_size", type=positive, default=16, help="questions a step (default: 16)")
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
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
