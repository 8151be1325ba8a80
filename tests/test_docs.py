"""The code in README and docs runs."""

import ast
import os
import re
import socket
import textwrap
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
import torchvision
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_ssvi
import pyro_ssvi.inclusion
from pyro_ssvi import SSVI, AutoSparseNormal, CosineSchedule, kernels, plot
from pyro_ssvi.nn import SparseNetwork, bayesianize
from pyro_ssvi.progress import progress
from pyro_ssvi.sparse_tensor import implements

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted((ROOT / "pyro_ssvi").rglob("*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LITERAL = re.compile(r"::\n\n((?:(?: {4,}.*)?\n)+)")  # of a docstring


def model(x, y=None):
    w0 = pyro.sample("w0", dist.Normal(0.0, 1.0).expand([20, 784]).to_event(2))
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([10, 20]).to_event(2))
    logits = F.linear(F.relu(F.linear(x, w0)), w1)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


def names():
    """What the pages take for granted."""
    x, y = torch.randn(8, 784), torch.randint(10, (8,))
    guide = AutoSparseNormal(model, density=0.05)
    guide(x, y)
    optim = pyro.optim.Adam({"lr": 1e-3})
    return {
        **{"F": F, "dist": dist, "os": os, "pyro": pyro, "torch": torch},
        **{"AutoNormal": AutoNormal, "Predictive": Predictive, "SVI": SVI},
        **{"Trace_ELBO": Trace_ELBO, "TraceMeanField_ELBO": TraceMeanField_ELBO},
        **{name: getattr(pyro_ssvi, name) for name in pyro_ssvi.__all__},
        **{"model": model, "guide": guide, "optim": optim, "x": x, "y": y, "batches": [(x, y)]},
        "svi": SSVI(model, guide, optim, Trace_ELBO()),
        "schedule": CosineSchedule(every=100, stop=75_000),
        "next_batch": lambda: (x, y),
        "net": torch.nn.Linear(2, 2),
        "images": torch.randn(2, 3, 32, 32),
        "labels": torch.tensor([0, 1]),
    }


@pytest.fixture
def torchrun(monkeypatch):
    """What torchrun tells a process that is alone."""
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def as_before():
    """Those who add rules for sparse values, or choose kernels, do so for themselves only."""
    rules = dict(pyro_ssvi.sparse_tensor._RULES)
    yield
    kernels.use("auto")
    pyro_ssvi.sparse_tensor._RULES.clear()
    pyro_ssvi.sparse_tensor._RULES.update(rules)


def in_docstrings():
    """Literal blocks in the package, with the places where they stand."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            for match in LITERAL.finditer((ast.get_docstring(node) or "") + "\n"):
                name = f"{path.stem}.{getattr(node, 'name', '')}"
                yield pytest.param(textwrap.dedent(match[1]), id=name)


@pytest.mark.parametrize("code", list(in_docstrings()))
@pytest.mark.usefixtures("torchrun", "as_before")
def test_code_in_docstrings_runs(code, tmp_path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    namespace = names()
    # What the docstring of one function or the other takes for granted, besides.
    for module in (pyro_ssvi.diagnostics, pyro_ssvi.gradient_record, pyro_ssvi.inclusion):
        namespace |= vars(module)
    namespace |= {"bayesianize": bayesianize, "implements": implements, "kernels": kernels}
    namespace |= {"plot": plot, "progress": progress, "torchvision": torchvision}
    namespace |= {"num_steps": 1000, "train": print, "weights": {"0.weight": torch.randn(20, 784)}}
    namespace["dense_guide"] = AutoNormal(model)
    namespace["dense_guide"](namespace["x"], namespace["y"])
    namespace["svi"].export("net.posterior")
    ensemble = pyro_ssvi.Ensemble(model)
    ensemble.add(namespace["svi"])
    ensemble.save("net.ensemble")
    namespace["SparseNetwork"] = SparseNetwork
    torch.save(SparseNetwork(torch.nn.Linear(784, 10)).state_dict(), "sparse.pt")
    if "AutoSparseNormal(" in code or "load_posterior(" in code:
        pyro.clear_param_store()
    exec(code, namespace)
    plt.close("all")


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem) for page in PAGES if BLOCK.search(page.read_text())]
)
@pytest.mark.usefixtures("torchrun", "as_before")
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A new one for each block, if it makes a guide: there may be one guide in a store.
    namespace = names()
    text = page.read_text()
    for match in BLOCK.finditer(text):
        code = match[1].replace("100_000", "20").replace("% 1000", "% 10")
        if "AutoSparseNormal(" in code and "clear_param_store" not in code:
            pyro.clear_param_store()
        line = text[: match.start()].count("\n") + 1
        exec(compile("\n" * line + code, page, "exec"), namespace)


def test_the_five_lines_of_the_readme():
    """The diff from AutoNormal to AutoSparseNormal, both sides."""
    diff = re.search(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.M)[1]
    for side in "-+":
        pyro.clear_param_store()
        lines = [line for line in diff.splitlines() if line[:1] in (side, " ")]
        namespace = names()
        pyro.clear_param_store()
        exec("\n".join(line[1:] for line in lines), namespace)
        sparse = isinstance(namespace["guide"], AutoSparseNormal)
        assert sparse == (side == "+")


def test_links_lead_somewhere():
    for page in [*PAGES, *(ROOT / "docs" / "tutorials").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
