"""Measure, never assert.

    python tests/bench.py {kernels,train,tokenizer,data,finetune} [--json FILE]

Every comparison is interleaved in one process (A B A B ...) and reported as medians and ratios,
since machines are shared and noisy. Rows print as they come; --json also writes them to FILE.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def interleave(variants, rounds):
    """Median seconds of each named callable, run in turns so that drift hits all alike."""
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, fn in variants.items():
            start = time.perf_counter()
            fn()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


# ---------------------------------------------------------------------------------------------
# finetune: a question's shared prefix once, against one option at a time


def medqa_examples(data, length):
    """(shared, option by option) examples of MedQA dev, size of a vocabulary learned on it."""
    import tempfile

    import finetune
    import tokenizer as bpe
    from data import load_qa
    questions = load_qa("medqa", data, "dev")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "questions.txt"
        path.write_text("\n".join(" ".join((q.question, *q.options)) for q in questions))
        tokenizer = bpe.Tokenizer.from_merges(bpe.train_bpe(bpe.count_pretokens([path]), 8192))
    both = [finetune.encode_all(questions, "medqa", tokenizer, length, shared=shared)
            for shared in (True, False)]
    return *both, tokenizer.vocab_size


def saved_bytes(step):
    """Bytes of the distinct tensors that autograd keeps for backward while step() runs."""
    import torch
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = step()  # the graph lives: no address is used twice
    del loss
    return sum(kept.values())


def bench_finetune(rest):
    """Questions a second on MedQA dev: train step (forward, backward) and scoring, fp32."""
    import torch

    import finetune
    from model import GPT, GPTConfig
    p = argparse.ArgumentParser()
    p.add_argument("--data", default=ROOT.parent / "shared/data/qa/medqa", help="MedQA's folder")
    p.add_argument("--questions", type=int, default=64, help="of dev, in official order")
    p.add_argument("--n_embd", type=int, default=256, help="width (4 layers)")
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args(rest)
    shared, alone, vocab_size = medqa_examples(args.data, 512)
    model = finetune.TaskModel(GPT(GPTConfig(n_layer=4, n_head=4, n_embd=args.n_embd, dropout=0.0,
                                             vocab_size=vocab_size)), "choice")
    variants = {"shared prefix, by length": list(finetune.micro_batches(shared[:args.questions])),
                "one option at a time, padded": [alone[i:i + 4]
                                                 for i in range(0, args.questions, 4)]}

    def score(chunks):
        with torch.no_grad():
            return sum(finetune.loss_sum(model, finetune.collate(c)) for c in chunks).item()

    def step(chunks):
        for chunk in chunks:
            finetune.loss_sum(model, finetune.collate(chunk)).backward()
        model.zero_grad()

    rows = []
    for what, run in ("scoring", score), ("train step", step):
        seconds = interleave({k: lambda run=run, v=v: run(v) for k, v in variants.items()},
                             args.rounds)
        for name, chunks in variants.items():
            grids = [finetune.collate(c).idx.numel() for c in chunks]
            largest = max(chunks, key=lambda c: finetune.collate(c).idx.numel())
            rows.append(dict(what=what, how=name, questions_per_s=args.questions / seconds[name],
                             tokens=sum(grids), largest_batch_tokens=max(grids),
                             saved_mb=saved_bytes(lambda c=largest: finetune.loss_sum(
                                 model, finetune.collate(c))) / 1e6))
            print(rows[-1])
        ratio = seconds["one option at a time, padded"] / seconds["shared prefix, by length"]
        rows.append(dict(what=what, how="ratio", speedup=ratio))
        print(f"{what}: {ratio:.2f}x questions/s")
    return rows


# ---------------------------------------------------------------------------------------------
# the command line


def main():
    parts = {name.removeprefix("bench_"): fn for name, fn in globals().items()
             if name.startswith("bench_")}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=sorted(parts), help="what to measure")
    parser.add_argument("--json", metavar="FILE", help="also write the rows here (default: none)")
    args, rest = parser.parse_known_args()
    rows = parts[args.part](rest)
    if args.json:
        machine = {"python": platform.python_version(), "machine": platform.processor()}
        Path(args.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
