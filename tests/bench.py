"""Measure, never assert: python tests/bench.py {kernels,train,tokenizer,data,finetune} [--json FILE].

Every comparison is interleaved in one process (A B A B ...) and reported as medians and ratios, since
machines are shared and noisy. Rows print as they come; --json also writes them to FILE.
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
# data: extraction, tokenizing, the loader


def citations_file(shared, path, n):
    """A baseline-like file: real titles and abstracts in the frames of NLM's sample citations."""
    with gzip.open(shared / "pubmed_xml/pubmedsample18n0001.xml.gz", "rt") as f:
        frames = re.findall(r"(?s)<PubmedArticle>.*?</PubmedArticle>", f.read())
    abstracts = re.compile(r"(?s)<Abstract>.*?</Abstract>|<OtherAbstract.*</OtherAbstract>")
    frames = [abstracts.sub("", x) for x in frames]
    with gzip.open(shared / "abstracts.jsonl.gz", "rt") as f:
        bad = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # XML allows none of them
        records = [{k: bad.sub("", v) for k, v in json.loads(line).items()} for line in f]
    with gzip.open(path, "wt", compresslevel=6) as f:
        f.write('<?xml version="1.0" encoding="utf-8"?>\n<PubmedArticleSet>\n')
        for i in range(n):
            r, frame = records[i % len(records)], frames[i % len(frames)]
            text = (f"<ArticleTitle>{escape(r['title'])}</ArticleTitle><Abstract><AbstractText>"
                    f"{escape(r['abstract'])} {i}</AbstractText></Abstract>")
            frame = re.sub(r"(?s)<ArticleTitle>.*?</ArticleTitle>", lambda _, t=text: t, frame,
                           count=1)
            f.write(re.sub(r"(<PMID [^>]*>)\d+", rf"\g<1>{i + 1}", frame, count=1) + "\n")
        f.write("</PubmedArticleSet>\n")


def peak_mib(*args):
    """(CPU seconds, peak resident MiB) of a command in a process of its own."""
    code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
            "r = resource.getrusage(resource.RUSAGE_CHILDREN);"
            "print(r.ru_utime + r.ru_stime, r.ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code, sys.executable, *map(str, args)],
                          capture_output=True, text=True, check=True)
    seconds, kib = done.stdout.split()[-2:]
    return float(seconds), int(kib) / 1024


ITERPARSE = """import gzip, sys, xml.etree.ElementTree as ET
context = ET.iterparse(gzip.open(sys.argv[1]), ("start", "end"))
_, root = next(context)
for event, e in context:
    if event == "end" and e.tag == "PubmedArticle":
        root.clear()
print(0)"""


def bench_data(rest):
    """Extraction of 30,000 citations, tokenizing at 1 and 2 workers, the loader, hours in all."""
    import data

    parser = argparse.ArgumentParser(prog="bench.py data")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared/data",
                        help="folder of the real samples (default: beside the checkout)")
    parser.add_argument("--tokenizer", type=Path, help="folder (default: learned here)")
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
        script, seconds, peaks = ROOT / "data.py", [], []
        reference = folder / "reference.py"
        reference.write_text(ITERPARSE)
        plain = []
        for i in range(2):
            out = folder / f"text{i}"
            s, peak = peak_mib(script, "extract", big, "--out", out, "--workers", 1)
            seconds.append(s)
            peaks.append(peak)
            plain.append(peak_mib(reference, big)[0])
        extract_mb_s = xml_mb / statistics.median(seconds)
        row("extract", extract_mb_s, "MB/s", f"{xml_mb:.0f} MB of XML, CPU seconds")
        row("extract, better of the two", xml_mb / min(seconds), "MB/s")
        row("extract, peak memory", max(peaks), "MiB", "30,000 citations")
        subset = folder / "small.xml.gz"
        citations_file(args.shared, subset, 3_000)
        peak = peak_mib(script, "extract", subset, "--out", folder / "t", "--workers", 1)[1]
        row("extract, peak memory", peak, "MiB", "3,000 citations")
        row("gunzip + iterparse + clear alone", xml_mb / statistics.median(plain), "MB/s",
            "the same file, interleaved, nothing extracted")

        texts = folder / "texts"
        texts.mkdir()
        documents = list(data.read_documents(folder / "text0"))
        for i in range(8):
            with gzip.open(texts / f"{i}.jsonl.gz", "wt", compresslevel=3) as f:
                f.writelines(json.dumps({"id": d, "text": t}) + "\n" for d, t in documents[i::8])
        text_mb = sum(len(t.encode()) for _, t in documents) / 1e6
        tokenizer = args.tokenizer or folder / "tokenizer"
        if not args.tokenizer:
            command = [sys.executable, ROOT / "tokenizer.py", "train", "--input", folder / "t"]
            subprocess.run([*command, "--vocab_size", "8192", "--out", tokenizer], check=True,
                           capture_output=True)

        cpu_seconds = []

        def tokenize(workers):
            out = folder / f"arrays{workers}"
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, script, "tokenize", "--text", texts,
                       "--tokenizer", tokenizer]
            cpu_seconds.append(peak_mib(*command[1:], "--out", out, "--workers", workers)[0])

        took = interleave({n: lambda n=n: tokenize(n) for n in (1, 2)}, 2)
        rate = text_mb / statistics.median(cpu_seconds)
        row("tokenize", rate, "MB/s", f"{text_mb:.0f} MB of text, CPU seconds, all included")
        row("tokenize, 1 worker", text_mb / took[1], "MB/s", "wall clock")
        row("tokenize, 2 workers", text_mb / took[2], "MB/s", f"{took[1] / took[2]:.2f} x one")

        batches = data.train_batches(folder / "arrays1", 1024, 8, seed=0)
        next(batches)
        start, n = time.perf_counter(), 5000
        for _ in range(n):
            next(batches)
        seconds = time.perf_counter() - start
        row("loader", n * 8 * 1024 / seconds / 1e6, "M tokens/s", "8 x 1024, one process")

        def hours(mb, mb_s):
            return mb / mb_s / 3600 / 64

        row("baseline, extract, 64 cores", hours(1300 * xml_mb, extract_mb_s), "hours",
            f"1,300 files x {xml_mb:.0f} MB / {extract_mb_s:.0f} MB/s / 64")
        row("baseline, tokenize, 64 cores", hours(1300 * text_mb, rate), "hours",
            f"1,300 files x {text_mb:.0f} MB of text / {rate:.1f} MB/s / 64, without the join")
        row("100 GB of PMC, both, 64 cores", hours(1e5, extract_mb_s) + hours(5e4, rate), "hours",
            "100 GB of XML at the rate above, half of it text")
    return rows


# ---------------------------------------------------------------------------------------------
# the command line


def main():
    parts = {name[len("bench_"):]: fn for name, fn in globals().items() if name.startswith("bench_")}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=sorted(parts), help="what to measure")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE (default: none)")
    args, rest = parser.parse_known_args()
    rows = parts[args.part](rest)
    if args.json:
        machine = {"python": platform.python_version(), "machine": platform.processor()}
        Path(args.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
