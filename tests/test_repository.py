"""The repository as a whole: help of every command, imports on a bare machine (S1, S3)."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT, run

SCRIPTS = {"tokenizer.py": ("train", "show"),
           "data.py": ("demo", "download", "extract", "tokenize"),
           "train.py": (), "finetune.py": (),
           "eval.py": ("perplexity", "qa", "generate", "tokenizer", "numbers", "curves")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    """A command of the contract that is gone, or a help text whose % breaks argparse."""
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in SCRIPTS[script])
    for command in SCRIPTS[script][:1]:
        assert run(script, command, "--help").returncode == 0


def test_every_flag_has_a_help_sentence():
    """A flag that --help lists without a word."""
    for script in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / script).read_text())):
            called = getattr(node, "func", None)  # parser.add_argument(...), or add(...) for short
            if getattr(called, "attr", "") == "add_argument" or getattr(called, "id", "") == "add":
                keywords = {k.arg for k in node.keywords}
                assert keywords & {"help", None}, f"{script}:{node.lineno}"


def test_imports_on_a_bare_machine():
    """An import that needs triton, a GPU or the network."""
    code = ("import sys, socket; sys.modules['triton'] = None; socket.socket.connect = None\n"
            "import tokenizer, data, model, train, finetune, eval\n"
            "assert model.kernels_active('cpu') == 'reference'")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
