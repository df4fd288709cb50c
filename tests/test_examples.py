"""What users read first must run: the README's example and the files in examples/."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from loading import module_at

import subspace_meta as sm
from subspace_meta.benchmarks.geometry import resnet50_convolutions
from subspace_meta.meta import unroll

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    return module_at(ROOT / "examples" / f"{name}.py")


def test_the_examples_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 90
    in_a_network, functional = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    torch.manual_seed(0)
    names: dict = {}
    exec(functional, names)
    assert names["geometry"].violation(names["params"])["basis"] < 1e-5
    # Variances 1/k: the six leading directions are the first six coordinates.
    variances = torch.arange(1, 65) ** -1.0
    captured = (names["params"]["basis"].square().sum(dim=1) * variances).sum()
    assert captured > 0.97 * variances[:6].sum()

    images = torch.randn(60, 1, 28, 28)
    labels = (images.mean((1, 2, 3)) > 0).long()
    names = {"loader": [(images, labels)] * 10}
    with pytest.warns(sm.optim.ProjectionWarning, match=r"0\.weight"):
        exec(in_a_network, names)
    assert torch.nn.functional.cross_entropy(names["model"](images), labels).item() < 0.5
    filters = names["model"][0].weight.detach().reshape(8, 9)
    torch.testing.assert_close(filters @ filters.T, torch.eye(8), rtol=0, atol=1e-5)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


PAGES = sorted(
    (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("proofs/*.md"), *ROOT.glob("subspace_meta/*/*.md"))
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            there = (page.parent / file).resolve() if file else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_the_example_of_the_torch_optimizer() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "torch_optim.md").read_text("utf-8"), flags=re.S)
    torch.manual_seed(0)
    names: dict = {}
    with pytest.warns(sm.optim.ProjectionWarning, match=r"0\.weight"):
        exec(code, names)
    assert max(names["optimizer"].check().values()) < 1e-5
    assert len(names["schedule"].base_lrs) == 2


def test_the_examples_of_the_optimizers_page() -> None:
    averages, code = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "optimizers.md").read_text("utf-8"), flags=re.S
    )
    torch.manual_seed(0)
    names: dict = {}
    exec(code, names)
    a = names["a"]
    assert -names["loss"] > (1 - 1e-3) * torch.linalg.eigvalsh(a @ a.mT)[-3:].sum()
    torch.manual_seed(0)
    exec(averages, names)
    names["geometry"].check_feasible(names["result"])
    best = torch.linalg.eigvalsh(names["x"].mT @ names["x"])[-3:].sum()
    averaged, last = ((names["x"] @ p["x"]).square().sum() for p in (names["result"], names["params"]))
    assert averaged > 0.95 * best
    assert averaged != last


def test_the_example_of_the_meta_gradients() -> None:
    text = (ROOT / "docs" / "meta_gradients.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    names: dict = {"__name__": "example"}
    exec(code, names)
    assert names["gradient"]["log_lr"].isfinite()


def test_functional() -> None:
    assert load("functional").main(60) > 0.95


def test_meta_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    losses = load("meta_train").main(outer_steps=25, compiled=False)
    assert len(losses) == 25
    printed = capsys.readouterr().out
    assert "outer step 25" in printed
    assert printed.count("after 100 steps on new tasks") == 3
    weights, adapter = sm.load_weights(tmp_path / "autoencoder.safetensors")
    assert adapter.name == "base"
    assert weights.keys() == sm.pretrained().keys()
    monkeypatch.setattr(unroll, "compile_block", lambda block: block)
    load("meta_train").main(outer_steps=2)
    announced = "compiling the inner loop of 'autoencoder 24-4'; about a minute"
    assert [line for line in capsys.readouterr().out.splitlines() if "compiling" in line] == [announced]


def test_resnet() -> None:
    resnet = load("resnet")
    assert resnet.main("digits", steps=20, every=10)[20] > 0.7
    for model, parameters, convolutions in ((resnet.resnet18(), 11_689_512, 20), (resnet.resnet50(), 25_557_032, 53)):
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert len(resnet.orthonormal_convolutions(model)) == convolutions
    shapes = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Conv2d)}
    assert shapes == set(resnet50_convolutions())
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_transformer() -> None:
    transformer = load("transformer")
    assert transformer.main(60) > 0.7
    torch.manual_seed(0)
    model = transformer.Sorter()
    with pytest.warns(sm.optim.ProjectionWarning, match=r"blocks\.0\.queries"):
        sm.optim.SubspaceMeta(model, transformer.RULES)
    for head in model.blocks[1].keys.weight.detach().unflatten(0, (transformer.HEADS, -1)):
        torch.testing.assert_close(head @ head.T, torch.eye(len(head)), rtol=0, atol=1e-5)


def test_finetune() -> None:
    before, after = load("finetune").main(60)
    assert after > before + 0.2
