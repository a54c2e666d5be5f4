"""Measure, never assert.

    python tests/bench.py {kernels,train,tokenizer,data,finetune} [--json FILE]

Every comparison is interleaved in one process (A B A B ...) and reported as medians and ratios,
since machines are shared and noisy. Rows print as they come; --json also writes them to FILE.
"""

import argparse
import gzip
import json
import os
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
# the tokenizer: training and encoding beside Hugging Face's, which runs in an environment of its own

HF_CHILD = """
import os, resource, sys, time
part, text, threads, folder = sys.argv[1:]
os.environ["RAYON_NUM_THREADS"] = threads
os.environ["TOKENIZERS_PARALLELISM"] = "true" if int(threads) > 1 else "false"
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
if part == "train":
    byte_level = pre_tokenizers.ByteLevel
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=28895, min_frequency=2, show_progress=False,
                                  initial_alphabet=byte_level.alphabet())
    start = time.perf_counter()
    tok.train([text], trainer)
    seconds = time.perf_counter() - start
    tok.model.save(folder)
    tok.save(folder + "/tokenizer.json")
else:
    tok = Tokenizer.from_file(folder + "/tokenizer.json")
    lines = open(text, newline="\\n", encoding="utf-8").read().split("\\n")
    start = time.perf_counter()
    rows = tok.encode_batch_fast(lines, add_special_tokens=False)
    seconds = time.perf_counter() - start
    import array, hashlib
    print(hashlib.sha256(b"".join(array.array("I", r.ids).tobytes() for r in rows)).hexdigest())
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

OUR_CHILD = """
import resource, sys, time
part, text, threads, folder = sys.argv[1:]
from tokenizer import Tokenizer, count_pretokens, train_bpe
if part == "train":
    start = time.perf_counter()
    counts = count_pretokens([text], workers=int(threads))
    merges = train_bpe(counts, 28896)
    seconds = time.perf_counter() - start
    Tokenizer.from_merges(merges).save(folder)
else:
    tok = Tokenizer.load(folder)
    lines = open(text, newline="\\n", encoding="utf-8").read().split("\\n")
    start = time.perf_counter()
    rows = tok.encode_batch(lines, num_threads=int(threads))
    seconds = time.perf_counter() - start
    import array, hashlib
    print(hashlib.sha256(b"".join(array.array("I", r).tobytes() for r in rows)).hexdigest())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak += int(threads) * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(seconds, peak / 1024)
"""


def all_text(folder, path):
    """One text file, a line each, of abstracts.jsonl.gz (title, abstract) and pmc_fulltext.jsonl.gz."""
    with open(path, "w", newline="\n", encoding="utf-8") as out:
        for name in ("abstracts.jsonl.gz", "pmc_fulltext.jsonl.gz"):
            for line in gzip.open(Path(folder) / name, "rt", encoding="utf-8", newline="\n"):
                record = json.loads(line)
                text = record.get("text") or f"{record['title'] or ''}\n{record['abstract'] or ''}"
                out.write(text.removesuffix("\n") + "\n")


def bench_tokenizer(argv):
    parser = argparse.ArgumentParser(prog="bench.py tokenizer")
    parser.add_argument("--data", default=ROOT.parent / "shared/data",
                        help="folder with abstracts.jsonl.gz and pmc_fulltext.jsonl.gz, or one .txt")
    parser.add_argument("--hf_python", help="a python that has tokenizers (default: ours alone)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: 3)")
    args = parser.parse_args(argv)
    children = {"ours": (sys.executable, OUR_CHILD)}
    if args.hf_python:
        children["hf"] = (args.hf_python, HF_CHILD)
    rows, seen = [], {}
    with tempfile.TemporaryDirectory() as tmp:
        text = str(args.data)
        if not text.endswith(".txt"):
            text = f"{tmp}/all.txt"
            all_text(args.data, text)
        megabytes = os.path.getsize(text) / 1e6
        for part, threads in (("train", 1), ("train", 2), ("encode", 1)):
            found = {name: [] for name in children}
            for _ in range(args.rounds):
                for name, (python, code) in children.items():
                    folder = Path(tmp, name)
                    folder.mkdir(exist_ok=True)
                    out = subprocess.run([python, "-c", code, part, text, str(threads), str(folder)],
                                         cwd=ROOT, check=True, capture_output=True, text=True).stdout
                    *digest, last = out.strip().split("\n")
                    found[name].append([float(x) for x in last.split()])
                    seen[part, name] = digest or (folder / "merges.txt").read_bytes()
            for name, runs in found.items():
                seconds, peak = (statistics.median(column) for column in zip(*runs))
                rows.append({"part": part, "threads": threads, "who": name, "seconds": seconds,
                             "MB_per_s": megabytes / seconds, "peak_MB": peak})
                print(f"{part:6} {threads} thread(s) {name:5}{seconds:8.2f} s {megabytes / seconds:7.2f}"
                      f" MB/s  peak {peak:6.0f} MB", flush=True)
            if args.hf_python:
                ratio = rows[-2]["seconds"] / rows[-1]["seconds"]
                same = seen[part, "ours"] == seen[part, "hf"]
                rows.append({"part": part, "threads": threads, "ours_over_hf": ratio, "equal": same})
                print(f"{part:6} {threads} thread(s) ours / hf = {ratio:.2f}; "
                      f"{'merges' if part == 'train' else 'ids'} equal: {same}", flush=True)


# ---------------------------------------------------------------------------------------------
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
