"""The wheel that users install works with what it requires and nothing else: no extra, nothing of the checkout.

It is built and installed into an empty environment, without a network. Links there lead to the required packages of the
environment that runs the tests, so that torch is neither fetched nor copied; what is not required cannot be imported.
"""

import json
import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# Not importlib.util.find_spec: to look for pip makes setuptools, when it is imported later, take the old distutils.
INSTALLED = {distribution.name for distribution in metadata.distributions()}
MISSING = [name for name in ("pip", "hatchling") if name not in INSTALLED]
PROGRAM = """
import importlib.util, json
from importlib.resources import files

import subspace_kernels, torch
import subspace_meta as sm

torch.manual_seed(0)
x = torch.linalg.qr(torch.randn(6, 3)).Q
geometry = sm.Geometry.from_rules({"x": x}, {"x": sm.Stiefel()})
optimizer = sm.SubspaceOptimizer(geometry, sm.pretrained())
moved = optimizer.update({"x": torch.randn(6, 3)}, optimizer.init({"x": x}), {"x": x})[0]["x"]

model = torch.nn.Linear(6, 3)
torch.nn.init.orthogonal_(model.weight)
before = model.weight.detach().clone()
shell = sm.optim.SubspaceMeta(model, {"weight": sm.Stiefel()}, preset="light")
model(torch.randn(5, 6)).square().mean().backward()
shell.step()

print(json.dumps({
    "places": [module.__file__ for module in (sm, subspace_kernels)],
    "typed": [files(module).joinpath("py.typed").is_file() for module in (sm, subspace_kernels)],
    "source": files(subspace_kernels).joinpath("native.cpp").read_text("utf-8"),
    "lengths": [float((moved - x).norm()), float((model.weight - before).norm())],
    "violations": [float(geometry.violation({"x": moved})["x"]), shell.check()["weight"]],
    "extras": [name for name in ("typer", "sklearn", "mkdocs", "pytest") if importlib.util.find_spec(name)],
}))
"""


def required_by(package: metadata.Distribution) -> dict[str, metadata.Distribution]:
    """Return the installed packages that a package requires without any extra, and those that they require."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [package]
    while waiting:
        for needed in map(Requirement, waiting.pop().requires or ()):
            if needed.name not in found and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
                found[needed.name] = metadata.distribution(needed.name)
                waiting.append(found[needed.name])
    return found


def link(package: metadata.Distribution, folder: Path) -> None:
    for name in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
        # Some packages share a folder; path files would let in what is not required.
        if not (name.endswith(".pth") or (folder / name).exists()):
            (folder / name).symlink_to(package.locate_file(name))


@pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} missing: pip install '.[test]' has what builds")
def test_the_wheel_works_with_what_it_requires(tmp_path):
    def run(*command: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
        told = [str(part) for part in command]
        done = subprocess.run(told, cwd=tmp_path, env=environment or None, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    home = tmp_path / "home"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    (site,) = home.glob("lib/python*/site-packages")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    alone = ("--no-deps", "--no-index")
    run(*pip, "wheel", *alone, "--no-build-isolation", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    run(*pip, "--python", python, "install", *alone, wheel)
    (installed,) = metadata.distributions(path=[str(site)])
    assert {path.name for path in site.iterdir()} == {
        "subspace_meta",
        "subspace_kernels",
        f"subspace_meta-{installed.version}.dist-info",
    }
    for package in required_by(installed).values():
        link(package, site)

    found = json.loads(run(python, "-I", "-c", PROGRAM).stdout)
    assert found["places"] == [str(site / name / "__init__.py") for name in ("subspace_meta", "subspace_kernels")]
    assert found["typed"] == [True, True]
    assert found["source"] == (ROOT / "kernels" / "subspace_kernels" / "native.cpp").read_text("utf-8")
    assert min(found["lengths"]) > 1e-4
    assert max(found["violations"]) < 1e-5
    assert not found["extras"], "the environment has more than what is required, and the test shows nothing"

    # The command is there, and says what it needs.
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    assert "pip install 'subspace-meta[train]'" in run(home / "bin" / "subspace-meta", code=1, **bare).stderr
