"""Measure a model: perplexity, question answering, generation, audits, curves.

    python eval.py perplexity --init out/demo --data data/demo
    python eval.py qa --task pubmedqa --data data/demo/qa/pubmedqa --init out/demo-pubmedqa
    python eval.py generate --init out/demo --prompt "The drug"

Reads a run of train.py or finetune.py, or a Hugging Face GPT-2 folder (--init); prints tables, and
with --json writes them. Leaves out training and several GPUs: one process, one device.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import finetune
from data import load_meta, load_qa, read_documents, val_batches
from model import GPT
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------
# perplexity


def windows(text, tokenizer, context):
    """Rows of one document, as examples: every token a target once, the first after end-of-text.

    A document longer than the context is cut without overlap, so later pieces start with less
    context than they could have: an upper bound on the loss.
    """
    ids = [tokenizer.eot_id, *tokenizer.encode(text)]
    for at in range(0, len(ids) - 1, context):
        row = ids[at:at + context + 1]
        yield finetune.Example(None, [finetune.Row([], [row])], n_targets=len(row) - 1)


@torch.no_grad()
def score_text(gpt, texts, tokenizer, env):
    """(sum of nats, number of tokens) of each text, given nothing but itself."""
    model, totals = finetune.TaskModel(gpt, "text"), []
    for text in texts:
        nats = n_tokens = 0
        rows = list(windows(text, tokenizer, gpt.config.n_positions))
        for chunk in finetune.micro_batches(rows, max_tokens=8192):
            with env.autocast():
                nats += model(finetune.collate(chunk, env.device)).item()
            n_tokens += sum(e.n_targets for e in chunk)
        totals.append((nats, n_tokens))
    return totals


@torch.no_grad()
def score_arrays(gpt, data, env):
    """(sum of nats, number of targets) of val.bin, in rows of the context as in training."""
    context, nats, count = gpt.config.n_positions, 0.0, 0
    for x, y in val_batches(data, context, max(1, 8192 // context), device=env.device):
        n = int((y != -100).sum())
        with env.autocast():
            nats, count = nats + gpt(x, y)[1].item() * n, count + n
    return nats, count


def perplexity(args, env):
    """{loss (nats a token), bits_per_byte, tokens, bytes} of arrays' val.bin, or of text.

    A row of an array has no target at its first token: bits a byte count that token at the mean.
    """
    gpt, tokenizer = GPT.from_pretrained(args.init, device=env.device), Tokenizer.load(args.init)
    if (Path(args.data) / "meta.json").exists():
        meta = load_meta(args.data)
        if meta["tokenizer_sha256"] != tokenizer.fingerprint:
            raise ValueError(f"{args.data} was tokenized with another tokenizer than the model's: "
                             "tokenize with the model's, or give --data the text itself")
        nats, count = score_arrays(gpt, args.data, env)
        tokens, n_bytes = meta["val"]["tokens"], meta["val"]["bytes"]
    else:
        texts = [text for _, text in itertools.islice(read_documents(args.data), args.limit)]
        totals = score_text(gpt, tqdm(texts, unit="document", leave=False), tokenizer, env)
        nats, count = map(sum, zip(*totals))
        tokens, n_bytes = count, sum(len(text.encode()) for text in texts)
    if not count:
        raise ValueError(f"{args.data} holds no token to score: give a folder with text")
    loss = nats / count
    result = dict(loss=loss, bits_per_byte=tokens / n_bytes * loss / math.log(2), tokens=count,
                  bytes=n_bytes)
    table([result])
    return result


# ---------------------------------------------------------------------------------------------
# question answering: a fine-tuned head, or likelihood


def zero_shot_examples(questions, tokenizer, limit):
    """Rows of a plain prompt (our choice) and " " + option, for a model without a head."""
    examples = []
    for q in questions:
        prompt = f"{q.context}\nQuestion: {q.question}\nAnswer:".lstrip()
        options = [tokenizer.encode(" " + o)[:limit - 1] for o in q.options]
        ids = tokenizer.encode(prompt)
        room = limit - max(map(len, options))
        # cut at the start: the question stands at the end
        examples.append(finetune.Example(q, [finetune.Row(ids[-room:], options)], len(ids) > room))
    return examples


@torch.no_grad()
def log_likelihoods(gpt, batch, examples):
    """Summed log-probability of each option's tokens, a list an example."""
    hidden = gpt.hidden(batch.idx, positions=batch.positions, mask=batch.mask)
    found = []
    for b, e in enumerate(examples):
        row, at, scores = e.rows[0], len(e.rows[0].prefix), []
        for ids in row.suffixes:
            before = [len(row.prefix) - 1, *range(at, at + len(ids) - 1)]
            logits = F.linear(hidden[b, before], gpt.transformer.wte.weight).float()
            scores.append(logits.log_softmax(-1)[range(len(ids)), ids].sum().item())
            at += len(ids)
        found.append(scores)
    return found


def zero_shot(gpt, tokenizer, questions, env):
    """(examples, {"sum", "per token", "per byte": scores an example})."""
    examples = zero_shot_examples(questions, tokenizer, gpt.config.n_positions)
    total = {}
    for chunk in tqdm(list(finetune.micro_batches(examples, max_tokens=8192)), leave=False):
        with env.autocast():
            scores = log_likelihoods(gpt, finetune.collate(chunk, env.device), chunk)
        total |= {id(e): s for e, s in zip(chunk, scores)}
    total = [total[id(e)] for e in examples]
    n_tokens = [[len(ids) for ids in e.rows[0].suffixes] for e in examples]
    n_bytes = [[len(o.encode()) + 1 for o in e.question.options] for e in examples]
    divide = lambda by: [[s / n for s, n in zip(*pair)] for pair in zip(total, by)]  # noqa: E731
    return examples, {"sum": total, "per token": divide(n_tokens), "per byte": divide(n_bytes)}


def breakdown(examples, hits):
    """Accuracy by subject, kind of question and length: (name, n, accuracy, interval) rows."""
    groups = {}
    for e, hit in zip(examples, hits):
        length = max(len(r.prefix) + max(map(len, r.suffixes)) for r in e.rows)
        bucket = 2 ** math.ceil(math.log2(max(length, 16)))
        for name in (f"length <= {bucket}", e.question.subject and f"subject {e.question.subject}",
                     e.question.kind and f"kind {e.question.kind}"):
            if name:
                groups.setdefault(name, []).append(hit)
    natural = lambda pair: (pair[0].split()[0], len(pair[0]), pair[0])  # noqa: E731
    return [dict(group=name, n=len(hits), accuracy=statistics.fmean(hits),
                 ci95=finetune.wilson(statistics.fmean(hits), len(hits)))
            for name, hits in sorted(groups.items(), key=natural)]


def answer_questions(args, env):
    """The qa command: a fine-tuned head, or with --zero_shot three ways to score by likelihood."""
    split, official = find_split(args)
    questions = finetune.labeled(official, args.limit)
    if not questions:
        raise ValueError(f"the {split} split of {args.task} has no labels: use --split dev")
    if args.zero_shot:
        gpt = GPT.from_pretrained(args.init, device=env.device)
        print("note: the base model was not made to answer questions; this is its likelihood")
        examples, scores = zero_shot(gpt, Tokenizer.load(args.init), questions, env)
    else:
        model, tokenizer, limit = finetune.load_finetuned(args.init, args.task, env.device)
        examples = finetune.encode_all(questions, args.task, tokenizer, limit)
        scores = {"head": finetune.score_examples(model, examples, env)}
    results = []
    for how, given in scores.items():
        hits = finetune.correct(given, examples)
        results.append(finetune.summarise(args.task, split, len(official), examples,
                                          [statistics.fmean(hits)]) | dict(scored_by=how))
        print(f"{how}: {finetune.describe(results[-1])}")
    groups = breakdown(examples, finetune.correct(next(iter(scores.values())), examples))
    table(groups)
    if args.predictions:
        rows = finetune.predictions(next(iter(scores.values())), examples)
        finetune.write_lines(args.predictions, rows)
    return results[0] | dict(groups=groups, others=results[1:])


def find_split(args):
    """(name, questions) of --split, else of test, or of dev where test is missing or unlabeled."""
    for split in [args.split] if args.split else ["test", "dev"]:
        try:
            questions = load_qa(args.task, args.data, split)
        except FileNotFoundError:
            if split == args.split or split == "dev":
                raise
            continue
        if args.split or finetune.labeled(questions):
            break
    return split, questions


def table(rows):
    """Print dictionaries of the same keys as aligned columns."""
    def cell(value):
        if isinstance(value, list):
            return "-".join(map(cell, value))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [list(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    wide = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(c.ljust(w) for c, w in zip(line, wide)).rstrip())


# ---------------------------------------------------------------------------------------------
# generation

PAPER_DECODING = dict(num_beams=5, no_repeat_ngram_size=6, length_penalty=-0.5)  # BioMedLM
PAPER_NEW_TOKENS = 400


def generate(args, env):
    """The generate command: prompts as one batch, texts in their order."""
    start = time.perf_counter()
    gpt = GPT.from_pretrained(args.init, dtype=env.dtype, device=env.device)
    tokenizer = Tokenizer.load(args.init)
    load_s = time.perf_counter() - start
    ids = [tokenizer.encode(prompt) or [tokenizer.eot_id] for prompt in args.prompt]
    if finetune.read_run(args.init).get("task") == "text":
        ids = [i + tokenizer.add_special_tokens(["<|startoftext|>"]) for i in ids]
    how = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    if args.paper:
        how = dict(PAPER_DECODING)
    elif args.num_beams > 1:
        how |= dict(num_beams=args.num_beams, length_penalty=args.length_penalty)
    start = time.perf_counter()
    outputs = [gpt.generate(torch.tensor([i], device=env.device), args.max_new_tokens,
                            eot_id=tokenizer.eot_id, **how)[0, len(i):].tolist() for i in ids]
    seconds = time.perf_counter() - start
    texts = []
    for prompt, new in zip(args.prompt, outputs):
        new = new[:new.index(tokenizer.eot_id)] if tokenizer.eot_id in new else new
        texts.append(tokenizer.decode(new))
        print(f"{prompt}\033[1m{texts[-1]}\033[0m" if sys.stdout.isatty() else prompt + texts[-1])
    n_new = sum(map(len, outputs))
    print(f"loaded in {load_s:.1f} s; {n_new} tokens in {seconds:.1f} s, {n_new / seconds:.1f} a "
          "second", file=sys.stderr)
    return dict(texts=texts, tokens=n_new, seconds=seconds, load_s=load_s)


# ---------------------------------------------------------------------------------------------
# the command line


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text, init="run or Hugging Face GPT-2 folder"):
        p = commands.add_parser(name, help=text, description=text)
        if init:
            p.add_argument("--init", required=True, metavar="DIR", help=init)
            p.add_argument("--device", help="cpu, cuda, … (default: cuda where there is one)")
            p.add_argument("--dtype", choices=["float32", "bfloat16"],
                           help="(default: bfloat16 on cuda, float32 on a CPU)")
        p.add_argument("--json", metavar="FILE", help="also write the result here (default: none)")
        return p.add_argument

    add = command("perplexity", "nats a token and bits a byte")
    add("--data", required=True, metavar="DIR_OR_TEXT",
        help="folder of arrays (its val.bin), or a text file or folder: each document on its own")
    add("--limit", type=int, help="score only the first N documents of text (default: all)")
    add = command("qa", "accuracy on a question set", "folder of finetune.py; --zero_shot: any")
    add("--task", required=True, choices=sorted(set(finetune.KINDS) - {"text"}), help="which set")
    add("--data", required=True, metavar="DIR", help="folder with the official files")
    add("--split", choices=["train", "dev", "test"], help="(default: test, else dev)")
    add("--limit", type=int, help="N questions, evenly spread over the split (default: all)")
    add("--zero_shot", action="store_true", help="score options by likelihood (default: off)")
    add("--predictions", metavar="FILE", help="also write a JSON line a question (default: none)")
    add = command("generate", "continue a text")
    add("--prompt", required=True, nargs="+", help="one or several texts")
    add("--max_new_tokens", type=int, default=64, help="tokens to add at most (default: 64)")
    add("--temperature", type=float, default=0.8, help="0 = greedy (default: 0.8)")
    add("--top_k", type=int, help="sample among the k likeliest tokens (default: all)")
    add("--top_p", type=float, help="sample within this probability mass (default: all)")
    add("--num_beams", type=int, default=1, help="beam search instead of sampling (default: 1)")
    add("--length_penalty", type=float, default=1.0, help="exponent, beams only (default: 1.0)")
    add("--seed", type=int, default=1, help="of sampling (default: 1)")
    add("--paper", action="store_true",
        help="BioMedLM's decoding: 5 beams, no repeated 6-gram, length penalty -0.5 (default: off)")
    return parser.parse_args()


def main():
    args = parse_args()
    env = finetune.Env(args.device, args.dtype)
    commands = dict(perplexity=perplexity, qa=answer_questions, generate=generate)
    result = commands[args.command](args, env)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:  # a user's mistake: one line with its mend, no traceback
        sys.exit(f"eval.py: error: {e}")
