import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
init = (here / "pyro_ssvi" / "__init__.py").read_text()
version = re.search(r'^__version__ = "(.+)"$', init, re.MULTILINE).group(1)

# What makes sparse products fast on CPU; without it they are torch's own.
cpu = ["numba>=0.61"]
# What the examples need beyond `import pyro_ssvi`.
examples = [
    *cpu,
    "matplotlib>=3.7",
    "scikit-learn>=1.3",
    "torchmetrics>=1.2",
    "torchvision>=0.19.1",
    "tqdm>=4.60",
]
# The tutorials are run when the site is built.
docs = [*examples, "furo", "latex2mathml>=3.77", "myst-nb>=1.1", "sphinx>=7"]
dev = [
    "build>=1.0",
    "hypothesis>=6.80",
    "ivon-opt>=0.1.3",
    "lightning>=2.2",
    "mypy>=1.8",
    "onnx>=1.16",
    "onnxscript>=0.2",
    "pytest>=7.4",
    "pytest-xdist>=3.5",
    "ruff>=0.4",
]

setup(
    name="pyro-ssvi",
    version=version,
    description="Sparse autoguides for Pyro: sparse subspace variational inference",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["pyro_ssvi", "pyro_ssvi.*"]),
    package_data={"pyro_ssvi": ["py.typed"]},
    python_requires=">=3.10",
    # `make test-oldest` tests these bounds.
    install_requires=["pyro-ppl>=1.9.1", "torch>=2.4.1"],
    extras_require={"cpu": cpu, "examples": examples, "docs": docs, "dev": dev + examples},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
