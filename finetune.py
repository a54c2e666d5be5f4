"""Fine-tune on a question set as BioMedLM does (arXiv 2403.18421 and its released code).

    python finetune.py --task pubmedqa --data data/demo --init out/demo --out out/demo-pm

Reads a run of train.py or a Hugging Face GPT-2 folder (--init) and a question set in its official
layout (--data). Writes a folder that `transformers` loads, the tokenizer with the added tokens,
head.pt, run.json, log.jsonl and predictions.jsonl. Under torchrun the ranks share each batch.
Leaves out sharded parameters: a replica and its optimiser must fit (42 GB for 2.59B in fp32).
A sweep is a loop in the shell: give each point its own --out.

Dimensions: B rows, T time, C width, Q questions, O options, E scored positions.
"""

import argparse
import contextlib
import math
from pathlib import Path
from statistics import fmean, mode, stdev
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import SPECIAL_TOKENS, TASKS, load_qa, write_lines
from model import (
    GPT,
    Linear,
    check_tensors,
    config_of,
    cross_entropy,
    load_tensors,
    without_memory,
)
from tokenizer import COUNT, Tokenizer, numbers, read_json, replacing, run_command, write_json
from train import POSITIVE, PROBABILITY, distribute, start_process, sync_gradients

# ---------------------------------------------------------------------------------------------
# the run: settings, questions; for each seed a model, its training, its scores; then the report


def main():
    # Settings: the flags, and defaults by task and model size.
    args = parse_args()
    process = start_process(args.device, args.dtype or ("bfloat16" if args.lora else None))
    settings, tokenizer = resolve(args)
    out = Path(args.out)

    # Questions. The model learns those of train. Dev chooses the epoch and the seed. Test is
    # reported and chooses nothing. MedMCQA's test has no answers: there dev is reported, the last
    # epoch and the first seed are kept.
    questions = read_questions(args.task, args.data)
    reported = "test" if labeled(questions["test"]) else "dev"
    examples = {}
    for split in questions:
        chosen = labeled(questions[split], args.limit)
        if not chosen and split in ("train", reported):
            raise ValueError(f"no labeled {split} questions of {args.task} in {args.data} (train "
                             "questions that also stand in dev or test are taken out): put the "
                             "official file there, or add a --data folder that has others")
        examples[split] = encode_all(chosen, args.task, tokenizer, settings)
    train_set = examples["train"]
    reported_set = examples[reported]
    dev_set = examples["dev"] if reported == "test" else []
    if settings["kind"] == "labels":
        settings["labels"] = train_set[0].question.options
    process.print(f"{settings}\nprompt: {tokenizer.decode(train_set[0].rows[0].ids())}")

    # Train a model for each seed. The seed draws what is new in the model (the head, the rows of
    # added tokens), the order of the questions, and dropout.
    log = []
    seeds = []
    for seed in args.seeds:
        model = build(settings, tokenizer, seed, process.dtype).to(process.device)
        dev = train_epochs(model, train_set, dev_set, settings, seed, process, log)
        scores = score_examples(model, reported_set, process)
        score = quality(scores, reported_set)
        process.print(f"seed {seed}: dev {dev}, {reported} {score}")
        # Save the seed that is best on dev: the first of equals. Without dev it is the first seed.
        if not seeds or (dev_set and dev > max(done["dev"] for done in seeds)):
            saved_seed = seed
            if process.rank == 0:
                save(out, model, tokenizer, settings, predictions(scores, reported_set))
        seeds.append({"seed": seed, "dev": dev, "score": score})
        del model  # before the next is made

    # Report the mean over seeds.
    result = summarise(args.task, reported, len(questions[reported]), reported_set,
                       [done["score"] for done in seeds])
    result |= {"seeds": seeds, "saved_seed": saved_seed}
    if process.rank == 0:
        write_lines(out / "log.jsonl", [*log, result])
        if args.json:
            write_json(args.json, result)
    process.print(f"{describe(result, len(seeds))}\nsaved: seed {saved_seed} in {out}")
    process.close()


def train_epochs(task_model, train_set, dev_set, settings, seed, process, log):
    """Train task_model in place and append a line an epoch to log. Returns its score on dev.

    It ends with the weights of the epoch that is best on dev. With --last (BioMedLM), or without
    a dev set, it ends with the weights of the last epoch. Without a dev set the score is None.
    """
    model = distribute(task_model, "ddp", process)  # shares task_model's weights
    # BioMedLM: betas 0.9 and 0.999 and eps 1e-8, which are torch's own.
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0,
                                  fused=process.device.type == "cuda")
    torch.manual_seed(1000 * seed + process.rank)  # dropout differs between ranks
    epochs = settings["epochs"]
    best = -math.inf
    kept = None
    step = 0
    for epoch in range(epochs):
        # One pass over the questions. Their order depends on (seed, epoch) alone: all ranks agree.
        model.train()
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(train_set), generator=generator)
        batches = order.split(settings["batch_size"])
        loss = 0.0
        # A bar on rank 0 only, and there (None) on a terminal only.
        for batch in tqdm(batches, f"epoch {epoch + 1}", leave=False,
                          disable=process.rank > 0 or None):
            lr = learning_rate(step, epochs * len(batches), settings["lr"])
            optimizer.param_groups[0]["lr"] = lr
            loss += train_step(model, [train_set[i] for i in batch], optimizer, process)
            step += 1
        loss = process.all_reduce([loss])[0] / len(batches)

        # Score it on dev. Keep a copy of the weights if they are the best so far.
        score = quality(score_examples(task_model, dev_set, process), dev_set)
        process.print(f"seed {seed}, epoch {epoch + 1}: loss {loss:.4f}, dev {score}")
        log.append({"seed": seed, "epoch": epoch + 1, "loss": loss, "dev": score})
        # Of equal scores the last counts: it has trained longest.
        if dev_set and not settings["last"] and score >= best:
            best = score
            kept = {name: p.detach().to("cpu", copy=True)  # a GPU may have no room for both
                    for name, p in task_model.named_parameters() if p.requires_grad}
    if kept is None:
        return score
    task_model.load_state_dict(kept, strict=False)
    return best


def train_step(model, examples, optimizer, process):
    """One optimiser step on a global batch. Returns this rank's part of its mean loss.

    The mean is over the questions (text: target tokens) of the whole global batch, however ranks
    and micro-batches cut it. ValueError where the gradient is not finite.
    """
    total = sum(e.n_targets or 1 for e in examples)  # text: its target tokens; else one a question
    mine = examples[process.rank::process.world_size]
    # A rank without a question must still join the sum of gradients: it adds one of weight 0.
    weight = 1 if mine else 0
    chunks = micro_batches(mine or examples[:1])
    my_loss = 0.0
    for i, chunk in enumerate(chunks):
        sync_gradients(model, last=i == len(chunks) - 1)
        with process.autocast():
            nats, _ = model(collate(chunk, process.device))
        loss = weight * nats / total
        (loss * process.world_size).backward()  # DDP takes the mean over ranks, we want the sum
        my_loss += loss.detach()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # BioMedLM
    if not torch.isfinite(norm):  # the same on every rank
        raise ValueError(f"the loss is {my_loss}, its gradient's norm {norm}: lower --lr")
    optimizer.step()
    optimizer.zero_grad()
    return my_loss


def learning_rate(step, total_steps, peak):
    """Linear warm-up from 0 over half of the steps, rounded up, then linear decay towards 0.

    step 0 is the first. The last step's rate is still above 0, but a run of one step has rate 0.
    BioMedLM: --warmup_ratio 0.5 of Hugging Face's trainer.
    """
    warmup = math.ceil(total_steps / 2)
    if step < warmup:
        return peak * step / warmup
    return peak * (total_steps - step) / (total_steps - warmup)


# ---------------------------------------------------------------------------------------------
# questions: which ones train, which ones are held out


def read_questions(task, folders):
    """{"train", "dev", "test": questions} of a task, official order, unlabeled ones included.

    A folder of another multiple-choice task adds its training questions (MMLU has none: BioMedLM
    trains on MedMCQA and MedQA for it). Questions that also stand in dev or test leave train.
    """
    questions = {"train": [], "dev": [], "test": []}
    for folder in folders:
        in_folder = {split: find_split(task, folder, split) for split in questions}
        # No file of this task: borrow from another task whose head is the same.
        for other in TASKS:
            if not any(in_folder.values()) and TASKS[other].kind == TASKS[task].kind == "choice":
                in_folder["train"] = find_split(other, folder, "train")
        if not any(in_folder.values()):
            load_qa(task, folder, "test")  # raises, and says which file is missing
        for split in questions:
            questions[split] += in_folder[split]

    def content(q):
        return q.question, q.context, q.options, q.target

    # Unlabeled questions are held out, too: another folder may hold their answers.
    held_out = {content(q) for q in questions["dev"] + questions["test"]}
    questions["train"] = [q for q in questions["train"] if content(q) not in held_out]
    return questions


def find_split(task, folder, split):
    """Questions of a split; none where the folder lacks its official file."""
    if task == "mmlu" and split == "dev":  # its own "dev" is five examples a subject
        split = "val"
    with contextlib.suppress(FileNotFoundError):
        return load_qa(task, folder, split)
    return []


def labeled(questions, limit=None):
    """Those with an answer: all, or `limit` evenly spaced ones, as some files go by label."""
    questions = [q for q in questions if q.target or q.answer is not None]
    n = len(questions)
    limit = min(limit or n, n)
    return [questions[i * n // limit] for i in range(limit)]


# ---------------------------------------------------------------------------------------------
# questions -> token ids
#
#     kind     one row                                     what is scored
#     choice   question [SEP] | option [SEP] | option ...  the last token of each option
#     labels   context question                            the last token: a score a label
#     text     question <|startoftext|> | answer           every token of the answer
#
# "|" cuts a row into a prefix and suffixes. Each suffix follows the prefix, as if alone.


class Row(NamedTuple):
    """Token ids of a row: a prefix, and suffixes that each see it but not each other."""

    prefix: list
    suffixes: list

    def ids(self):
        """All tokens in order."""
        return sum(self.suffixes, self.prefix)


class Example(NamedTuple):
    """A question as rows: one if its options share a prefix, else one for each option."""

    question: object
    rows: list
    truncated: bool = False
    n_targets: int = 0  # text: tokens of the answer, which carry the loss

    def length(self):
        """Tokens of the longest row."""
        return max(len(row.ids()) for row in self.rows)


def encode_all(questions, task, tokenizer, settings):
    """An Example of each question, in order; adds the task's special tokens to the tokenizer.

    settings["length"]: most tokens of a row. settings["markers"]: the prompt for yes/no/maybe that
    the paper describes, in place of the released script's.
    """
    kind = TASKS[task].kind
    names = SPECIAL_TOKENS[kind]
    if kind == "labels" and not settings["markers"]:
        names = names[:1]  # BioMedLM's script adds four markers, too, and uses none
    tokenizer.add_special_tokens(names)
    encode = {"choice": encode_choice,
              "labels": encode_labels,
              "text": encode_text}[kind]
    return [encode(q, tokenizer, settings) for q in questions]


def fit(cut_first, cut_last, room):
    """Cut two lists of ids to `room` tokens in all. Returns the two, and whether any was cut.

    cut_first loses its end first. With room 6: aaaaa bb -> aaaa bb; a bbbbbbbb -> (nothing) bbbbbb.
    """
    last_kept = cut_last[:room]
    first_kept = cut_first[:room - len(last_kept)]
    return first_kept, last_kept, len(cut_first) + len(cut_last) > room


def encode_choice(question, tokenizer, settings):
    """BioMedLM: question + "[SEP]" and " " + option + "[SEP]" for each option.

    Where question and option are too long, the question's end is cut. If all options leave the
    same part of the question, they share one row, and it stands there once.
    """
    sep = [tokenizer.special["[SEP]"]]
    text = tokenizer.encode(question.question)
    rows = []
    truncated = False
    for option in question.options:
        ids = tokenizer.encode(" " + option)
        text_kept, ids, cut = fit(text, ids, settings["length"] - 2)
        rows.append(Row(text_kept + sep, [ids + sep]))
        truncated |= cut
    prefix = rows[0].prefix
    if all(row.prefix == prefix for row in rows):
        rows = [Row(prefix, [row.suffixes[0] for row in rows])]
    return Example(question, rows, truncated)


def encode_labels(question, tokenizer, settings):
    """Context, then question, in one of BioMedLM's two forms; the row's last token is scored.

    The released script: `tokenizer(context, question)`, both parts' ids and nothing between them.
    The paper (--markers), which found context first better:
    <|CONTEXT|>context<|QUESTION|>question<|ANSWER|>, without spaces. The context is cut first.
    """
    markers = settings["markers"]
    room = settings["length"] - 3 if markers else settings["length"]
    context = tokenizer.encode(question.context)
    text = tokenizer.encode(question.question)
    context, text, cut = fit(context, text, room)
    ids = context + text
    if markers:
        before, between, after = [tokenizer.special[name] for name in SPECIAL_TOKENS["labels"][1:]]
        ids = [before, *context, between, *text, after]
    return Example(question, [Row([], [ids])], cut)


def encode_text(question, tokenizer, settings):
    """BioMedLM: source + <|startoftext|> + target + end-of-text, source and target <= 510 each."""
    half = (settings["length"] - 2) // 2
    source = tokenizer.encode(question.question)
    target = tokenizer.encode(question.target)
    truncated = max(len(source), len(target)) > half
    prefix = source[:half] + [tokenizer.special["<|startoftext|>"]]
    target = target[:half] + [tokenizer.eot_id]
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
    """Several questions as TaskModel reads them."""

    idx: torch.Tensor  # (B, T) int64, padded on the right: no token sees padding after it
    positions: torch.Tensor | None  # (B, T) int64; None: 0, 1, ...
    mask: torch.Tensor | None  # (B, 1, T, T) bool, who sees whom; None: causal
    scored: torch.Tensor  # (B, T) bool, True at the E positions whose hidden state the head reads
    answers: torch.Tensor  # (Q,) int64, the right option's index; text: (E,), the token to predict
    n_options: list  # options or labels of each question


def collate(examples, device="cpu"):
    """One Batch of examples of one kind."""
    rows = [row for e in examples for row in e.rows]
    ids = []
    segments = []
    for row in rows:
        sizes = torch.tensor([len(part) for part in (row.prefix, *row.suffixes)])
        ids.append(torch.tensor(row.ids()))
        segments.append(torch.arange(len(sizes)).repeat_interleave(sizes))
    idx = pad_sequence(ids, batch_first=True).to(device)  # (B, T)
    segment = pad_sequence(segments, batch_first=True, padding_value=-1).to(device)

    # Segments that share a row need the mask. A row with one suffix is causal, which is faster.
    positions = None
    mask = None
    if (segment > 1).any():
        same = segment[:, :, None] == segment[:, None, :]  # (B, T) -> (B, T, T)
        of_prefix = segment[:, None, :] == 0
        sees = (same | of_prefix).tril()
        positions = sees.sum(-1) - 1  # how many tokens it sees before it
        positions[segment < 0] = 0  # of padding that could pass the context
        mask = sees[:, None]  # (B, T, T) -> (B, 1, T, T)

    following = F.pad(segment[:, 1:], (0, 1), value=-1)  # the next token's segment
    if examples[0].n_targets:  # text: each position that predicts a token of the answer
        scored = following == 1
        answers = idx[segment == 1]
    else:  # each option's end: the next token is of another segment
        scored = (segment > 0) & (segment != following)
        answers = torch.tensor([e.question.answer for e in examples], device=device)
    n_options = [len(e.question.options) for e in examples]
    return Batch(idx, positions, mask, scored, answers, n_options)


def micro_batches(examples, max_tokens=4096):
    """Lists of examples, sorted by length so that rows need little padding.

    The rows of a list, padding included, hold at most max_tokens. One example may hold more.
    """
    chunks = []
    n_rows = 0
    for e in sorted(examples, key=Example.length):
        n_rows += len(e.rows)
        if not chunks or n_rows * e.length() > max_tokens:  # all rows are padded to e's length
            chunks.append([])
            n_rows = len(e.rows)
        chunks[-1].append(e)
    return chunks


# ---------------------------------------------------------------------------------------------
# the model: a GPT and a head

NEW_ROW_STD = 0.02  # BioMedLM: rows of added tokens, and (GPT-2's own init) the new head


class TaskModel(nn.Module):
    """BioMedLM's heads, on ln_f at the last token of an option or a prompt.

    choice: Linear(C, 1) with bias, a score an option; labels: Linear(C, labels) without bias;
    text: no head but the language model's own.
    """

    def __init__(self, gpt, kind, labels=()):
        super().__init__()
        self.gpt = gpt
        self.kind = kind
        self.head = nn.Identity()
        if kind != "text":
            self.head = nn.Linear(gpt.config.n_embd, len(labels) or 1, bias=kind == "choice")
            nn.init.normal_(self.head.weight, std=NEW_ROW_STD)
        if kind == "choice":
            nn.init.zeros_(self.head.bias)

    def forward(self, batch):
        """(nats, scores (Q, O) fp32, -inf where a question has fewer options).

        nats is summed over the questions, for text over the target tokens. A batch of text has one
        question to score: nats is its score, too.
        """
        hidden = self.gpt.hidden(batch.idx, positions=batch.positions, mask=batch.mask)
        hidden = hidden[batch.scored]  # (B, T, C) -> (E, C)
        if self.kind == "text":
            mean = cross_entropy(hidden, self.gpt.transformer.wte.weight, batch.answers)
            nats = mean * len(batch.answers)
            return nats, nats.view(1, 1)
        scores = self.head(hidden).float()  # (E, C) -> (E, 1 or labels)
        scores = scores.flatten().split(batch.n_options)  # Q times (options or labels,)
        scores = pad_sequence(scores, batch_first=True, padding_value=-math.inf)
        return F.cross_entropy(scores, batch.answers, reduction="sum"), scores


def build(settings, tokenizer, seed, dtype=torch.float32):
    """A TaskModel on the CPU for one seed: --init's weights, or fresh ones of its shape.

    dtype: used with --lora only, for the weights that it freezes.
    """
    rank = settings["lora"]
    torch.manual_seed(seed)
    gpt = GPT.from_pretrained(settings["init"], dtype if rank else torch.float32,
                              dropout=settings["dropout"])
    if settings["random_init"]:
        gpt = GPT(gpt.config)
    gpt.activation_checkpointing = settings["activation_checkpointing"]

    # Rows for the added tokens. A folder may have more rows than its tokenizer has tokens.
    wte = gpt.transformer.wte.weight
    vocab_size = max(tokenizer.vocab_size, len(wte))
    added = torch.empty(vocab_size - len(wte), wte.size(1)).normal_(std=NEW_ROW_STD)
    gpt.transformer.wte.weight = nn.Parameter(torch.cat([wte, added]))
    gpt.config.vocab_size = vocab_size
    model = TaskModel(gpt, settings["kind"], settings["labels"])
    if rank:
        add_lora(gpt, rank, len(wte))
    return model


# ---------------------------------------------------------------------------------------------
# LoRA: fine-tune a large model in little memory (Hu et al., arXiv 2106.09685)
#
#     y = x Wᵀ + b + s · (x Aᵀ) Bᵀ           A (rank, in), B (out, rank), s = alpha / rank
#
#     with u = s · dy B:   dA = uᵀ x      dB = s · dyᵀ (x Aᵀ)      dx = dy W + u A
#
# W and b stay as they are: they need no gradients and no moments, and W may be bf16. B starts at 0,
# so the first step's output is the base model's. After training W + s · B A is an ordinary weight.
#
# A and B of each block's four matrices train, in fp32; the head does, and the rows of added tokens.
# As in the paper, biases, LayerNorms and the other embeddings don't.

LORA_SCALE = 2.0  # alpha is twice the rank, as most have it


class LoRALinear(nn.Module):
    """A frozen Linear, and beside it a product of two thin matrices that learn."""

    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear
        self.bias = linear.bias
        self.A = nn.Linear(linear.in_features, rank, bias=False)
        self.B = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x, with_bias=True):
        """x (..., in) -> (..., out)."""
        return self.linear(x, with_bias) + LORA_SCALE * self.B(self.A(x))

    def merged(self):
        """The Linear that does the same, in the frozen weight's dtype."""
        frozen = self.linear.weight
        weight = (frozen + LORA_SCALE * self.B.weight @ self.A.weight).to(frozen.dtype)
        # save_pretrained writes [in, out]: laid out so, it needs no second copy of the model
        self.linear.weight = nn.Parameter(weight.t().contiguous().t())
        return self.linear


def add_lora(gpt, rank, n_learned):
    """Freeze gpt except the added tokens' rows of wte, which begin at n_learned, and put adapters
    on its Linears."""
    for parameter in gpt.parameters():
        parameter.requires_grad = False
        if parameter.dim() == 1:  # the ops add biases and LayerNorms in fp32
            parameter.data = parameter.float()
    replace_modules(gpt, Linear, lambda linear: LoRALinear(linear, rank))
    rows = gpt.transformer.wte.weight.requires_grad_()
    is_new = torch.arange(len(rows))[:, None] >= n_learned
    rows.register_hook(lambda gradient: gradient * is_new.to(gradient.device))


def replace_modules(gpt, kind, new):
    """Put new(module) in the place of each module of gpt that is a `kind`."""
    for parent in list(gpt.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, new(child))


# ---------------------------------------------------------------------------------------------
# scores and what they are worth


@torch.no_grad()
def score_examples(model, examples, process):
    """Per example, in order: its options' or labels' scores; text: one, the summed nats."""
    model.eval()

    def score(chunk):
        with process.autocast():
            _, scores = model(collate(chunk, process.device))
        # without the -inf of options that a question doesn't have
        return [row[:len(e.question.options) or 1] for e, row in zip(chunk, scores.tolist())]

    # Without gradients twice as much fits. A batch of text has one loss: one example at a time.
    max_tokens = 1 if model.kind == "text" else 8192
    mine = in_order(examples[process.rank::process.world_size], max_tokens, score)
    scores = [None] * len(examples)
    for rank, part in enumerate(process.gather(mine)):
        scores[rank::process.world_size] = part
    return scores


def in_order(examples, max_tokens, score):
    """What `score` returns for each example, in order; it gets a micro-batch at a time."""
    scores = {}  # by Python's id() of the example, since micro_batches sorts by length
    for chunk in micro_batches(examples, max_tokens):
        for e, of_e in zip(chunk, score(chunk)):
            scores[id(e)] = of_e
    return [scores[id(e)] for e in examples]


def correct(scores, examples):
    """A bool per example: True if the option of the best score, the first of equals, is the answer.
    """
    return [row["prediction"] == row["answer"] for row in predictions(scores, examples)]


def quality(scores, examples):
    """Accuracy; text: minus the mean nats of a target token, so that more is better, too.

    None without examples.
    """
    if not examples:
        return None
    n_targets = sum(e.n_targets for e in examples)
    if n_targets:
        return -sum(s[0] for s in scores) / n_targets
    return fmean(correct(scores, examples))


def wilson(accuracy, n):
    """95% interval of an accuracy on n questions: Wilson's score interval, z = 1.96.

    The usual one, accuracy ± z standard errors, is wrong near 0 and 1: it leaves [0, 1].
    """
    spread = 1.96**2 / n
    centre = (accuracy + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (accuracy * (1 - accuracy) + spread / 4)) / (1 + spread)
    return [centre - half, centre + half]


def summarise(task, split, available, examples, values):
    """The figures of --json, of one value of `quality` for each seed.

    accuracy is their mean, ci95 Wilson's interval for n questions: not for n times seeds, since
    all seeds answer the same ones. chance is the accuracy of guessing, majority that of always
    giving the commonest answer.
    """
    mean = fmean(values)
    n = len(examples)
    result = dict(task=task, split=split, available=available, n=n, accuracy=None, ci95=None,
                  truncated=sum(e.truncated for e in examples))
    if task == "text":
        return result | dict(loss=-mean)
    answers = [e.question.answer for e in examples]
    return result | dict(accuracy=mean, ci95=wilson(mean, n),
                         std=stdev(values) if len(values) > 1 else None,
                         chance=fmean(1 / len(e.question.options) for e in examples),
                         majority=answers.count(mode(answers)) / n)


def describe(result, n_seeds=1):
    """`summarise`'s figures as a sentence."""
    what = f"{result['task']} {result['split']}, n={result['n']}, {result['truncated']} truncated: "
    if result["accuracy"] is None:
        return f"{what}{result['loss']:.4f} nats a target token, mean of {n_seeds} seeds"
    over = f" ± {result['std']:.1%} over {n_seeds} seeds" if n_seeds > 1 else ""
    low, high = result["ci95"]
    return (f"{what}accuracy {result['accuracy']:.1%}{over}, 95% interval {low:.1%} to {high:.1%} "
            f"for n questions; chance {result['chance']:.1%}, commonest answer "
            f"{result['majority']:.1%}")


def predictions(scores, examples):
    """Rows of predictions.jsonl."""
    return [dict(id=e.question.id, answer=e.question.answer, prediction=s.index(max(s)), scores=s)
            for s, e in zip(scores, examples)]


# ---------------------------------------------------------------------------------------------
# the folder: a Hugging Face GPT-2, a head, and the settings that eval.py must load it with


@torch.no_grad()
def save(out, model, tokenizer, settings, rows):
    """A folder that `transformers` loads, and beside it what load_finetuned needs.

    rows: predictions of the reported questions.
    It moves the model to the CPU. LoRA's adapters are merged there, and all is saved in the dtype
    of the frozen weights. The model can't train after that.
    """
    gpt = model.cpu().gpt
    replace_modules(gpt, LoRALinear, LoRALinear.merged)
    gpt.to(gpt.transformer.wpe.weight.dtype)  # frozen by LoRA, and fp32 without
    tokenizer.save(out)
    gpt.save_pretrained(out)  # its tokenizer_config.json names the added tokens
    with replacing(out / "head.pt") as file:
        torch.save(model.head.state_dict(), file)
    write_lines(out / "predictions.jsonl", rows)
    write_json(out / "run.json", settings)  # last: where it stands, the folder is complete


def load_finetuned(folder, task, device="cpu"):
    """(TaskModel, Tokenizer, settings) of a folder that this script wrote.

    Encode questions with these settings, as in training. A head for multiple choice serves any
    such task, another head only the task that it was trained on.
    """
    kind = TASKS[task].kind
    head_file = Path(folder) / "head.pt"
    settings = read_json(Path(folder) / "run.json") if head_file.exists() else {}
    serves = settings.get("task") == task or settings.get("kind") == kind == "choice"
    if not serves:
        raise ValueError(f"{folder} has no head for {task}: run finetune.py --task {task} on it "
                         "first, or give --zero_shot")
    model = TaskModel(GPT.from_pretrained(folder), kind, settings["labels"])
    head = load_tensors(head_file)
    check_tensors(head, model.head.state_dict(), head_file)
    model.head.load_state_dict(head)
    return model.to(device), load_tokenizer(folder, model.gpt.config), settings


def load_tokenizer(folder, config):
    """The Tokenizer of a model's folder."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{folder}: its tokenizer has more tokens than its model, one of them is "
                         "another's: copy the folder again")
    return tokenizer


# ---------------------------------------------------------------------------------------------
# the command line


def resolve(args):
    """Settings (the flags, with defaults by task and model size) and the tokenizer of --init."""
    out = Path(args.out)
    if list(out.glob("checkpoint_*.pt")) or out.resolve() == Path(args.init).resolve():
        raise ValueError(f"{out} holds the model to start from, or another run of train.py: give "
                         "--out a folder of its own")
    config = config_of(args.init)
    if args.lora and args.random_init:
        raise ValueError("--lora keeps --init's weights: leave out --random_init")
    task = TASKS[args.task]
    lr = task.lr
    epochs = task.epochs
    # A small model takes larger steps, and more of them: our choice.
    n_params = without_memory(config).n_params()
    if n_params < 1e9:
        lr = 5e-5
    if n_params < 50e6:
        lr = 3e-4
        if task.kind == "choice":
            epochs = 10
    if args.lora:
        lr = max(3 * lr, 1e-4)  # what is usual; adapters take larger steps
    settings = vars(args) | {
        "kind": task.kind,
        "labels": (),
        "lr": args.lr or lr,
        "epochs": args.epochs or epochs,
        "length": min(args.length or task.length, config.n_positions)}
    out.mkdir(parents=True, exist_ok=True)  # a folder that can't be written is told now
    return settings, load_tokenizer(args.init, config)


def counts(text):
    """argparse's type of a list: "1,2,3" -> [1, 2, 3]."""
    return [COUNT(part) for part in text.split(",")]


FLOATS = ["float32", "bfloat16"]


def shared_flags(dtypes):
    """A parent parser for this script and eval.py's commands: --json, and with dtypes a model."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--json", help="also write the result here (default: none)")
    if dtypes:
        add("--init", required=True, help="run of train.py or finetune.py, or Hugging Face GPT-2 "
            "folder")
        add("--device", help="cpu, mps, cuda, cuda:1 … (default: the first that is there of cuda, "
            "mps, cpu)")
        add("--dtype", choices=dtypes, help="of the matrix products (default: bfloat16 on cuda and "
            "for finetune.py --lora, else float32)")
    return parser


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     parents=[shared_flags(FLOATS)])
    add = parser.add_argument
    add("--task", required=True, choices=TASKS, help="which question set --data holds")
    add("--data", required=True, nargs="+",
        help="folder with the official files; further ones add training questions")
    add("--out", required=True, help="folder to write")
    add("--random_init", action="store_true",
        help="fresh weights of --init's shape (default: off)")
    add("--markers", action="store_true", help="pubmedqa, bioasq: the paper's prompt, with marker "
        "tokens (default: the script's)")
    add("--seeds", type=counts, default=[1, 2, 3],
        help="a training for each, their mean is reported (default: 1,2,3)")
    add("--lr", type=POSITIVE, help="peak learning rate (default: by task and size)")
    add("--batch_size", type=COUNT, default=16, help="questions a step (default: 16)")
    add("--epochs", type=COUNT, help="passes over the training questions (default: by task)")
    add("--length", type=numbers(int, 8),
        help="most tokens of a row (default: the task's, or context)")
    add("--dropout", type=PROBABILITY, help="probability (default: --init's own)")
    add("--limit", type=COUNT, help="N questions of each split, evenly spread (default: all)")
    add("--lora", type=COUNT, metavar="RANK", help="freeze the model and train matrices of this "
        "rank beside its own, 8 to 64, the head and the added tokens' rows (default: train all)")
    add("--last", action="store_true", help="report the last epoch, as BioMedLM (default: best)")
    add("--activation_checkpointing", action="store_true",
        help="recompute blocks in backward: less memory, a third more time (default: off)")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
