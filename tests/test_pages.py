"""Every block of Python in the documentation runs, and prints what stands below it.

The blocks of a page are one program. A block that begins with ``# train.py`` is a file that ``torchrun`` starts in two
processes. A block of text right below a block of Python is its output: words have to be equal, numbers nearly so.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import subspace_meta as sm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")

# Pages whose blocks have a test of their own, which knows what they mean.
ELSEWHERE = {"meta_gradients.md", "torch_optim.md"}
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "```python" in page.read_text("utf-8")]


def given(page: str) -> dict:
    """What a page's blocks may use without having made it."""
    if page == "geometry.md":
        return {"MyManifold": sm.Stiefel}
    if page == "networks.md":
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2))
        return {"sm": sm, "nn": torch.nn, "model": model}
    return {}


def agree(printed: str, expected: str) -> bool:
    """Whether two outputs have the same words, and numbers that differ by 10 % or 0.02 at most."""
    if NUMBER.sub("#", printed).split() != NUMBER.sub("#", expected).split():
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True)
    return all(abs(float(a) - float(b)) <= max(0.1 * abs(float(b)), 0.02) for a, b in pairs)


def started(code: str, folder: Path) -> str:
    """Run a block as a file, by torchrun in two processes; return what it printed."""
    (folder / "train.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ELSEWHERE], ids=lambda page: str(page.relative_to(DOCS))
)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    names = {"__name__": "page", **given(page.name)}
    for code, expected in BLOCK.findall(page.read_text("utf-8")):
        if code.startswith("# train.py"):
            printed = started(code, tmp_path)
        else:
            output = io.StringIO()
            with contextlib.redirect_stdout(output), warnings.catch_warnings():
                warnings.simplefilter("ignore", sm.optim.ProjectionWarning)
                exec(compile(code, str(page), "exec"), names)
            printed = output.getvalue()
        assert not expected or agree(printed, expected), f"{page.name} prints\n{printed}"


def test_pages_with_a_test_of_their_own() -> None:
    tests = (ROOT / "tests" / "test_examples.py").read_text("utf-8")
    for page in ELSEWHERE:
        assert f'"{page}"' in tests, page
        assert (DOCS / page).read_text("utf-8").count("```python") == 1, f"a second block of {page} is run by no test"


def test_a_wrong_output_is_seen() -> None:
    assert agree("loss 2.65, True\n", "loss 2.66,  True")
    for wrong in ("loss 3.2, True", "loss 2.66, False", "loss 2.66", "loss 2.66, True 1"):
        assert not agree("loss 2.65, True\n", wrong)
