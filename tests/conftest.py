"""What every test file shares: the repository on sys.path, the tiers, where real data lies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
# Tiny tensors gain nothing from threads, and on busy cores they lose much. Set before torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes rather than seconds; run with -m slow")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")
    # `pytest -q` leaves out the slow tier; any -m expression takes over the choice.
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.fixture
def shared():
    """The folder of real data beside a developer's checkout (never committed)."""
    if not SHARED.is_dir():
        pytest.skip(f"real data not found at {SHARED}")
    return SHARED


def run(*args, cwd=ROOT, env=None):
    """Run a script of the repository as a user would; returns the CompletedProcess, with text."""
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True,
                          text=True, env=os.environ | (env or {}), timeout=600)
