"""Measure, never assert.

    python tests/bench.py {kernels,train,tokenizer,data,finetune} [--json FILE]

Every comparison is interleaved in one process (A B A B ...) and reported as medians and ratios,
since machines are shared and noisy. Rows print as they come; --json also writes them to FILE.
"""

import argparse
import gzip
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.sax.saxutils import escape

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


# data: extraction, tokenizing, the loader


def citations_file(shared, path, n):
    """A baseline-like file: real titles and abstracts in the frames of NLM's own sample citations."""
    with gzip.open(shared / "pubmed_xml/pubmedsample18n0001.xml.gz", "rt") as f:
        frames = re.findall(r"(?s)<PubmedArticle>.*?</PubmedArticle>", f.read())
    frames = [re.sub(r"(?s)<Abstract>.*?</Abstract>|<OtherAbstract.*</OtherAbstract>", "", x) for x in frames]
    with gzip.open(shared / "abstracts.jsonl.gz", "rt") as f:
        bad = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # XML has no control characters
        records = [{k: bad.sub("", v) for k, v in json.loads(line).items()} for line in f]
    with gzip.open(path, "wt", compresslevel=6) as f:
        f.write('<?xml version="1.0" encoding="utf-8"?>\n<PubmedArticleSet>\n')
        for i in range(n):
            r, frame = records[i % len(records)], frames[i % len(frames)]
            text = (f"<ArticleTitle>{escape(r['title'])}</ArticleTitle><Abstract><AbstractText>"
                    f"{escape(r['abstract'])} {i}</AbstractText></Abstract>")
            frame = re.sub(r"(?s)<ArticleTitle>.*?</ArticleTitle>", lambda _, t=text: t, frame, count=1)
            f.write(re.sub(r"(<PMID [^>]*>)\d+", rf"\g<1>{i + 1}", frame, count=1) + "\n")
        f.write("</PubmedArticleSet>\n")


def peak_mib(*args):
    """(seconds, peak resident MiB) of a command in a process of its own."""
    code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, sys.executable, *map(str, args)],
                          capture_output=True, text=True, check=True)
    return time.perf_counter() - start, int(done.stdout.split()[-1]) / 1024


def bench_data(rest):
    """Extraction on a 30,000-citation file, tokenizing at 1 and 2 workers, the loader, hours at full size."""
    import data

    parser = argparse.ArgumentParser(prog="bench.py data")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared/data", help="the real samples")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer folder (default: 8,192 learned here)")
    args = parser.parse_args(rest)
    rows = []

    def row(name, value, unit, note=""):
        rows.append({"name": name, "value": round(value, 2), "unit": unit, "note": note})
        print(f"{name:34} {value:12,.1f} {unit:10} {note}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        big = folder / "pubmed99n0001.xml.gz"
        citations_file(args.shared, big, 30_000)
        with gzip.open(big) as f:
            xml_mb = sum(len(chunk) for chunk in iter(lambda: f.read(2**20), b"")) / 1e6
        seconds, peaks = [], []
        for i in range(3):
            s, peak = peak_mib(ROOT / "data.py", "extract", big, "--out", folder / f"text{i}", "--workers", 1)
            seconds.append(s)
            peaks.append(peak)
        extract_mb_s = xml_mb / statistics.median(seconds)
        row("extract", extract_mb_s, "MB/s", f"{xml_mb:.0f} MB of XML, one core, start-up included")
        row("extract, peak memory", max(peaks), "MiB", "30,000 citations")
        subset = folder / "small.xml.gz"
        citations_file(args.shared, subset, 3_000)
        row("extract, peak memory", peak_mib(ROOT / "data.py", "extract", subset, "--out", folder / "t",
                                             "--workers", 1)[1], "MiB", "3,000 citations")

        texts = folder / "texts"
        texts.mkdir()
        documents = list(data.read_documents(folder / "text0"))
        for i in range(8):
            with gzip.open(texts / f"{i}.jsonl.gz", "wt", compresslevel=3) as f:
                f.writelines(json.dumps({"id": d, "text": t}) + "\n" for d, t in documents[i::8])
        text_mb = sum(len(t.encode()) for _, t in documents) / 1e6
        tokenizer = args.tokenizer or folder / "tokenizer"
        if not args.tokenizer:
            subprocess.run([sys.executable, ROOT / "tokenizer.py", "train", "--input", folder / "t",
                            "--vocab_size", "8192", "--out", tokenizer], check=True, capture_output=True)

        def tokenize(workers):
            out = folder / f"arrays{workers}"
            shutil.rmtree(out, ignore_errors=True)
            subprocess.run([sys.executable, ROOT / "data.py", "tokenize", "--text", texts, "--tokenizer", tokenizer,
                            "--out", out, "--workers", str(workers)], check=True, capture_output=True)

        took = interleave({n: lambda n=n: tokenize(n) for n in (1, 2)}, 3)
        row("tokenize, 1 worker", text_mb / took[1], "MB/s", f"{text_mb:.0f} MB of text, all included")
        row("tokenize, 2 workers", text_mb / took[2], "MB/s", f"{took[1] / took[2]:.2f} times one worker")

        batches = data.train_batches(folder / "arrays1", 1024, 8, seed=0)
        next(batches)
        start, n = time.perf_counter(), 2000
        for _ in range(n):
            next(batches)
        row("loader", n * 8 * 1024 / (time.perf_counter() - start) / 1e6, "M tokens/s", "8 x 1024, one process")
        xml_tb, text_gb = 1300 * xml_mb / 1e6, 1300 * text_mb / 1e3
        hours = lambda mb, mb_s: mb / mb_s / 3600 / 64
        row("baseline, extract, 64 cores", hours(xml_tb * 1e6, extract_mb_s), "hours",
            f"1,300 files x {xml_mb:.0f} MB / {extract_mb_s:.0f} MB/s / 64 cores")
        row("baseline, tokenize, 64 cores", hours(text_gb * 1e3, text_mb / took[1]), "hours",
            f"{text_gb:.0f} GB of text / {text_mb / took[1]:.1f} MB/s / 64 cores, the join beside")
        row("100 GB of PMC, extract + tokenize", hours(1e5, extract_mb_s) + hours(5e4, text_mb / took[1]), "hours",
            "100 GB of XML at the rate above, half of it text")
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
