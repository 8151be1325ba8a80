"""The code in README and docs runs."""

import os
import re
import socket
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_ssvi
from pyro_ssvi import SSVI, AutoSparseNormal, CosineSchedule

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


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


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem) for page in PAGES if BLOCK.search(page.read_text())]
)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    # A new one for each block, if it makes a guide: there may be one guide in a store.
    namespace = names()
    text = page.read_text()
    rules = dict(pyro_ssvi.sparse_tensor._RULES)
    try:
        for match in BLOCK.finditer(text):
            code = match[1].replace("100_000", "20").replace("% 1000", "% 10")
            if "AutoSparseNormal(" in code and "clear_param_store" not in code:
                pyro.clear_param_store()
            line = text[: match.start()].count("\n") + 1
            exec(compile("\n" * line + code, page, "exec"), namespace)
    finally:
        pyro_ssvi.sparse_tensor._RULES.clear()
        pyro_ssvi.sparse_tensor._RULES.update(rules)


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
