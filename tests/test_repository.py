"""The repository as a whole: help of every command, imports, README's size and commands."""

import argparse
import contextlib
import importlib
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run

import eval
import finetune
import train
from data import Question
from model import GPT, GPTConfig
from tokenizer import Tokenizer

SCRIPTS = {"model": "export",
           "train": "",
           "tokenizer": "train show",
           "data": "demo download extract tokenize cloze",
           "finetune": "",
           "eval": "perplexity qa generate tokenizer numbers curves"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(monkeypatch, capsys, script):
    """A command of the contract that is gone, a help text whose % breaks argparse, or a flag that
    --help lists without a word."""
    add_argument = argparse._ActionsContainer.add_argument

    def told(parser, *names, **options):
        assert options.get("help") or names[0][0] != "-", names
        return add_argument(parser, *names, **options)

    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", told)
    main = importlib.import_module(script).main
    for command in ["", *SCRIPTS[script].split()]:
        monkeypatch.setattr(sys, "argv", [script, *command.split(), "--help"])
        with contextlib.suppress(SystemExit):
            main()
        assert "show this help" in capsys.readouterr().out


def test_imports_on_a_bare_machine():
    """An import that needs triton, a GPU or the network."""
    code = ("import sys, socket; sys.modules['triton'] = None; socket.socket.connect = None\n"
            "import tokenizer, data, model, train, finetune, eval\n"
            "assert model.kernels_active('cpu') == 'reference'")
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_score_is_that_of_eval():
    """The demo's score at the end of training and eval.py's by likelihood part: an option without
    its space, another prompt, the answer's place counted from the other end."""
    tokenizer = Tokenizer.from_merges([("Ġ", letter) for letter in "abcd"])
    torch.manual_seed(0)
    gpt = GPT(GPTConfig.preset("demo", vocab_size=tokenizer.vocab_size)).eval()
    gpt.transformer.wte.weight.data *= 20  # else all tokens are about equally likely
    rng = random.Random(0)
    questions = [Question(str(i), f"Is it {i}?", options=tuple(rng.sample("abcd", 4)),
                          answer=rng.randrange(4)) for i in range(40)]
    examples, scores = eval.zero_shot(gpt, tokenizer, questions, train.start_process("cpu"))
    right = sum(finetune.correct(scores, examples))
    assert 0 < right < 40 and train.count_right(gpt, tokenizer, questions) == right


# ---------------------------------------------------------------------------------------------
# README

SMALLER = {"python train.py": "--total_steps 3",
           "--preset": "--n_layer 2 --n_head 2 --n_embd 64 --seq_len 256 --batch_tokens 1024 "
           "--micro_batch 1 --total_steps 3 --eval_tokens 1024",
           "finetune.py": "--limit 8 --epochs 1 --seeds 1"}

def test_readme_names_real_flags():
    """A flag in README, in or out of a block, that no script has."""
    source = "".join(path.read_text() for path in (*ROOT.glob("*.py"), ROOT / "tests/bench.py"))
    others = ("standalone|nproc_per_node|nnodes|max_restarts|rdzv_(backend|id|endpoint)"  # torchrun
              "|nodes|gpus|cpus|requeue|ntasks|local"  # sbatch, hf
              "|model|model_args|tasks|hf_python")  # lm_eval, bench.py
    for flag in set(re.findall(r"--(\w+)", (ROOT / "README.md").read_text())):
        if not re.fullmatch(others, flag):
            assert re.search(rf'"(--)?{flag}"', source), flag


def test_readme_is_short():
    """A lab book in README's place."""
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 12_000 and text.count(b"\n") <= 150
    for link in re.findall(rb"\]\(([^):]+)\)", text):  # a picture or a file that is gone
        assert (ROOT / link.decode()).is_file(), link


@pytest.mark.slow
def test_readme_commands(tmp_path, monkeypatch):
    """A command of README that fails as printed (smaller where it trains), in a path with a space
    and from inputs that can't be written."""
    home = tmp_path / "a clone"
    words = ["the", "drug", "lowers", "pain", "in", "mice", "with", "severe", "hepatitis"]
    rng = random.Random(0)
    text = "\n\n".join(" ".join(rng.choices(words, k=600)) for _ in range(200))
    for path in ("my.txt", "raw/pubmed/1.txt", "raw/pmc/2.txt"):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(text)
    subprocess.run("chmod -R a-w *", shell=True, cwd=home, check=True)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, home)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=":")
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()  # continued lines joined
    commands = [line.split("  #")[0] for line in lines if line.startswith(("python ", "torchrun "))
                and "download" not in line]  # the network: test_data.py has a server of its own
    assert len(commands) > 10
    for command in commands:
        small = command.replace("--nproc_per_node=8", "--nproc_per_node=2")
        small += "".join(f" {flags}" for part, flags in SMALLER.items() if part in command)
        done = subprocess.run(small, shell=True, cwd=home, capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, f"{small}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
