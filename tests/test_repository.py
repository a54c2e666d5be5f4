"""The repository as a whole: help of every command, README's commands, imports (S1, S2, S3)."""

import argparse
import contextlib
import gzip
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run

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


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_importing(tmp_path, script):
    """A traceback through whatever was being imported: torch takes seconds."""
    for module in ("torch", "tqdm"):
        source = tmp_path / f"{module}.py"
        source.write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = run(f"{script}.py", env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (130, "")


TINY = ("--n_layer 2 --n_head 2 --n_embd 64 --seq_len 256 --batch_tokens 1024 --micro_batch 1 "
        "--total_steps 3 --eval_tokens 1024 --device cpu --dtype float32")
SMALLER = {"train.py": TINY, "finetune.py": "--limit 8 --epochs 1 --seeds 1 --batch_size 4"}
ELSEWHERE = (r"python train.py$|python -m pytest|"  # CI runs these
             r"python data.py download|"  # the network: tests/test_data.py has a server of its own
             r"python eval.py curves")  # matplotlib: tests/test_eval.py


def readme_commands():
    """Commands of README's code blocks, in order, continued lines joined, variables set before."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    variables = "".join(f"{line}; " for line in lines if re.match(r'\w+="', line))
    return [variables + line.split("  #")[0] for line in lines
            if line.startswith(("python ", "torchrun ")) and not re.match(ELSEWHERE, line)]


def test_readme_names_real_flags():
    """A flag in README, in or out of a block, that no script has."""
    source = "".join(path.read_text() for path in (*ROOT.glob("*.py"), ROOT / "tests/bench.py"))
    others = ("standalone|nproc_per_node|nnodes|max_restarts|rdzv_(backend|id|endpoint)"  # torchrun
              "|nodes|gpus|cpus|requeue|ntasks"  # sbatch
              "|model|model_args|tasks")  # lm_eval
    for flag in set(re.findall(r"--(\w+)", (ROOT / "README.md").read_text())):
        if not re.fullmatch(others, flag):
            assert re.search(rf'"(--)?{flag}"', source), flag


@pytest.mark.slow
def test_readme_commands(tmp_path, shared):
    """A command of README that fails as printed (smaller where it trains), in a path with a space
    and from inputs that can't be written."""
    home = tmp_path / "a clone"
    inputs = {"PUBMED_XML": "pubmed_xml", "PMC_NXML": "pmc_nxml", "raw/pubmed": "pubmed_xml",
              "raw/pmc": "pmc_nxml", "PUBMEDQA": "qa/pubmedqa", "MEDQUAD": "qa/medquad"}
    for name, source in inputs.items():
        shutil.copytree(shared / source, home / name)
    for name in ("abstracts.jsonl.gz", "pmc_fulltext.jsonl.gz"):
        with gzip.open(shared / name) as all_lines, gzip.open(home / name, "wb") as some:
            some.writelines(itertools.islice(all_lines, 300))
    subprocess.run("chmod -R a-w *", shell=True, cwd=home, check=True)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, home)
    env = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
                        "TIKTOKEN_CACHE_DIR": str(shared / "tiktoken_cache")}
    for command in readme_commands():
        small = command.replace("--nproc_per_node=8", "--nproc_per_node=2")
        small += "".join(f" {flags}" for name, flags in SMALLER.items() if name in command)
        done = subprocess.run(["bash", "-c", small], cwd=home, env=env, capture_output=True,
                              text=True, timeout=300)
        assert done.returncode == 0, f"{small}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert len(readme_commands()) > 10
