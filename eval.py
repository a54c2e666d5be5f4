"""Measure a model: perplexity, question answering, generation, audits, curves.

    python eval.py perplexity --init out/demo --data data/demo
    python eval.py qa --task pubmedqa --data data/demo/qa/pubmedqa --init out/demo-pubmedqa
    python eval.py generate --init out/demo --prompt "The drug"

Reads a run of train.py or finetune.py, or a Hugging Face GPT-2 folder (--init); prints tables, and
with --json writes them. Leaves out training and several GPUs: one process, one device.
"""

import argparse
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
from model import GPT, cross_entropy

# ---------------------------------------------------------------------------------------------
# perplexity


def windows(tokens, eot_id, context):
    """(inputs, targets) pieces of one document: every token a target once, the first after eot_id.

    A document longer than the context is cut without overlap, so later pieces start with less
    context than they could have: an upper bound on the loss.
    """
    stream = [eot_id, *tokens]
    for at in range(0, len(tokens), context):
        piece = stream[at:at + context + 1]
        yield piece[:-1], piece[1:]


@torch.no_grad()
def summed_loss(gpt, x, y):
    """(sum of nats, number of targets) of a batch x, y (B, T); -100 = not a target."""
    count = int((y != -100).sum())
    hidden = gpt.hidden(x)
    mean = cross_entropy(hidden.view(-1, hidden.size(-1)), gpt.transformer.wte.weight, y.view(-1))
    return mean.item() * count, count


def text_batches(documents, tokenizer, context, device, max_tokens=8192, pool=2000):
    """Batches x, y (B, T) of documents' windows, of like length within a pool of windows."""
    def cut(pieces):
        rows = []
        for x, y in sorted(pieces, key=lambda piece: len(piece[0])):
            if rows and (len(rows) + 1) * len(x) > max_tokens:
                yield stack(rows)
                rows = []
            rows.append((x, y))
        if rows:
            yield stack(rows)

    def stack(rows):
        pad = lambda ids, fill: torch.nn.utils.rnn.pad_sequence(  # noqa: E731
            [torch.tensor(i) for i in ids], batch_first=True, padding_value=fill).to(device)
        return pad([x for x, _ in rows], 0), pad([y for _, y in rows], -100)

    pieces = []
    for text in documents:
        pieces += windows(tokenizer.encode(text), tokenizer.eot_id, context)
        if len(pieces) >= pool:
            yield from cut(pieces)
            pieces = []
    yield from cut(pieces)


def perplexity(gpt, tokenizer, data, env, limit=None):
    """{loss (nats a token), bits_per_byte, tokens, bytes} of arrays' val.bin, or of text.

    Arrays: rows of the context as in training, whose first token is no target; bits per byte
    count that token at the mean. Text: each document on its own, every token scored once.
    """
    nats = count = 0
    if (Path(data) / "meta.json").exists():
        meta = load_meta(data)
        if meta["tokenizer_sha256"] != tokenizer.fingerprint:
            raise ValueError(f"{data} was tokenized with another tokenizer than the model's: "
                             "tokenize the text with the model's, or give --data the text itself")
        tokens, n_bytes = meta["val"]["tokens"], meta["val"]["bytes"]
        context = gpt.config.n_positions
        batches = val_batches(data, context, max(1, 8192 // context), device=env.device)
    else:
        tokens, n_bytes, texts = None, 0, []
        for i, (_, text) in enumerate(read_documents(data)):
            if limit is not None and i >= limit:
                break
            texts.append(text)
            n_bytes += len(text.encode())
        batches = text_batches(tqdm(texts, unit="doc", leave=False), tokenizer,
                               gpt.config.n_positions, env.device)
    for x, y in batches:
        with env.autocast():
            more = summed_loss(gpt, x, y)
        nats, count = nats + more[0], count + more[1]
    if not count:
        raise ValueError(f"{data} holds no token to score: give a folder with text")
    loss = nats / count
    return dict(loss=loss, bits_per_byte=(tokens or count) / n_bytes * loss / math.log(2),
                tokens=count, bytes=n_bytes)


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
            scores = log_likelihoods(gpt, finetune.collate(chunk, 0, env.device), chunk)
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
    """The qa command: rows for --json, the first of them printed as the result."""
    official = load_qa(args.task, args.data, args.split)
    questions = finetune.spread(finetune.labeled(official), args.limit)
    if not questions:
        raise ValueError(f"the {args.split} split of {args.task} has no labels: use --split dev")
    if args.zero_shot:
        gpt = GPT.from_pretrained(args.init, device=env.device)
        tokenizer = finetune.load_tokenizer(args.init)
        print("note: the base model was not made to answer questions; this is its likelihood")
        examples, scores = zero_shot(gpt, tokenizer, questions, env)
    else:
        model, tokenizer, length = finetune.load_finetuned(args.init, args.task, env.device)
        examples = finetune.encode_all(questions, args.task, tokenizer, length)
        pad_id = tokenizer.add_special_tokens(["[PAD]"])[0]
        scores = {"head": finetune.score_examples(model, examples, env, pad_id)}
    results = []
    for how, given in scores.items():
        hits = finetune.correct(examples, given)
        run = dict(task=args.task, split=args.split, available=len(official))
        row = finetune.summary(run, [dict(accuracy=statistics.fmean(hits))], examples)
        del row["seeds"], row["std"]
        results.append(row | dict(how=how, groups=breakdown(examples, hits)))
        print(f"{how}: {finetune.describe(row)}")
    table(results[0]["groups"])
    if args.predictions:
        finetune.write_predictions(args.predictions, examples, next(iter(scores.values())))
    return results[0] | (dict(others=results[1:]) if results[1:] else {})


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
    tokenizer = finetune.load_tokenizer(args.init)
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
    add("--split", choices=["train", "dev", "test"], default="test", help="(default: test)")
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
    if args.command == "perplexity":
        gpt = GPT.from_pretrained(args.init, device=env.device)
        result = perplexity(gpt, finetune.load_tokenizer(args.init), args.data, env, args.limit)
        print(" ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v:,}"
                       for k, v in result.items()))
    else:
        result = {"qa": answer_questions, "generate": generate}[args.command](args, env)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:  # a user's mistake: one line with its mend, no traceback
        sys.exit(f"eval.py: error: {e}")
