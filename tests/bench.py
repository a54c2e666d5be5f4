"""Measure, never assert: python tests/bench.py {kernels,train,tokenizer,data,finetune} [--json FILE].

Every comparison is interleaved in one process (A B A B ...) and reported as medians and ratios, since
machines are shared and noisy. Rows print as they come; --json also writes them to FILE.
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
# the tokenizer: training and encoding beside Hugging Face's, which runs in its own environment

HF_CHILD = """
import os, resource, sys, time
clock = lambda: (time.perf_counter(), sum(os.times()[:4]))
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
    start = clock()
    tok.train([text], trainer)
    end = clock()
    tok.model.save(folder)
    tok.save(folder + "/tokenizer.json")
else:
    tok = Tokenizer.from_file(folder + "/tokenizer.json")
    lines = open(text, newline="\\n", encoding="utf-8").readlines()
    texts = ["".join(lines[i:i + 40]) for i in range(0, len(lines), 40)]
    start = clock()
    rows = tok.encode_batch_fast(texts, add_special_tokens=False)
    end = clock()
    import array, hashlib
    print(hashlib.sha256(b"".join(array.array("I", r.ids).tobytes() for r in rows)).hexdigest())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(*(b - a for a, b in zip(start, end)), peak / 1024)
"""

OUR_CHILD = """
import os, resource, sys, time
clock = lambda: (time.perf_counter(), sum(os.times()[:4]))
part, text, threads, folder = sys.argv[1:]
from tokenizer import Tokenizer, count_pretokens, train_bpe
if part == "train":
    start = clock()
    counts = count_pretokens([text], workers=int(threads))
    merges = train_bpe(counts, 28896)
    end = clock()
    Tokenizer.from_merges(merges).save(folder)
else:
    tok = Tokenizer.load(folder)
    lines = open(text, newline="\\n", encoding="utf-8").readlines()
    texts = ["".join(lines[i:i + 40]) for i in range(0, len(lines), 40)]
    start = clock()
    rows = tok.encode_batch(texts, num_threads=int(threads))
    end = clock()
    import array, hashlib
    print(hashlib.sha256(b"".join(array.array("I", r).tobytes() for r in rows)).hexdigest())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak += int(threads) * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(*(b - a for a, b in zip(start, end)), peak / 1024)
"""


def all_text(folder, path):
    """One text file of abstracts.jsonl.gz (title, newline, abstract) and pmc_fulltext.jsonl.gz."""
    with open(path, "w", newline="\n", encoding="utf-8") as out:
        for name in ("abstracts.jsonl.gz", "pmc_fulltext.jsonl.gz"):
            with gzip.open(Path(folder) / name, "rb") as lines:
                for record in map(json.loads, lines):
                    text = record.get("text")
                    if text is None:
                        text = f"{record['title'] or ''}\n{record['abstract'] or ''}"
                    out.write(text.removesuffix("\n") + "\n")


def bench_tokenizer(argv):
    parser = argparse.ArgumentParser(prog="bench.py tokenizer")
    parser.add_argument("--data", default=ROOT.parent / "shared/data",
                        help="a .txt, or a folder with abstracts.jsonl.gz, pmc_fulltext.jsonl.gz "
                        "(default: ../shared/data)")
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
                    command = [python, "-c", code, part, text, str(threads), str(folder)]
                    done = subprocess.run(command, cwd=ROOT, check=True, text=True,
                                          stdout=subprocess.PIPE)
                    *digest, last = done.stdout.strip().split("\n")
                    found[name].append([float(x) for x in last.split()])
                    seen[part, name] = digest or (folder / "merges.txt").read_bytes()
            for name, runs in found.items():
                wall, cpu, peak = (statistics.median(column) for column in zip(*runs))
                rows.append({"part": part, "threads": threads, "who": name, "seconds": wall,
                             "cpu_s": cpu, "MB_per_s": megabytes / wall, "peak_MB": peak})
                print(f"{part:6} {threads} thread(s) {name:5}{wall:8.2f} s {cpu:8.2f} s of CPU "
                      f"{megabytes / wall:6.2f} MB/s  peak {peak:5.0f} MB", flush=True)
            if args.hf_python:
                ours, hf = rows[-2:]
                ratios = {f"{k}_ours_over_hf": ours[k] / hf[k] for k in ("seconds", "cpu_s")}
                same = seen[part, "ours"] == seen[part, "hf"]
                rows.append({"part": part, "threads": threads, "equal": same, **ratios})
                print("       ours / hf: {:.2f} wall, {:.2f} CPU; ".format(*ratios.values())
                      + f"{'merges' if part == 'train' else 'ids'} equal: {same}", flush=True)
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
