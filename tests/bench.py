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
import statistics
import subprocess
import sys
import tempfile
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
