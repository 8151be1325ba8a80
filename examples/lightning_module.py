"""A sparse Bayesian network trained by Lightning: progress, logging and checkpoints are its own.

SSVI steps by itself, so the module uses Lightning's manual optimization. Checkpoints carry SSVI's
state, and ``Trainer.fit(..., ckpt_path=...)`` goes on with the same active sets. Data are
scikit-learn's digits::

    python examples/lightning_module.py
    python examples/lightning_module.py --ckpt-path last.ckpt --epochs 20
"""

from __future__ import annotations

import argparse
from typing import Any

import datasets
import lightning
import pyro
import pyro.distributions as dist
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from pyro_ssvi import SSVI, AutoSparseNormal, CosineSchedule, SparsePredictive
from pyro_ssvi.nn import bayesianize


class Model(nn.Module):
    """An ordinary Pyro model around a network."""

    def __init__(self, net: nn.Module, num_data: int) -> None:
        super().__init__()
        self.net = bayesianize(net, prior=0.3)
        self.num_data = num_data

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.net(x)
        with pyro.plate("data", self.num_data, subsample_size=len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)
        return logits


class SparseClassifier(lightning.LightningModule):
    """Any Pyro model and an AutoSparseNormal as a LightningModule."""

    def __init__(self, model: nn.Module, density: float, steps: int, lr: float = 5e-3) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.guide = AutoSparseNormal(model, density=density)
        stop = int(0.75 * steps)
        schedule = CosineSchedule(every=min(20, stop), stop=stop)
        optim = pyro.optim.Adam({"lr": lr})
        self.svi = SSVI(model, self.guide, optim, Trace_ELBO(), schedule=schedule)
        self.predictive = SparsePredictive(model, self.guide, 16, ["_RETURN"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", self.svi.step(*batch) / self.model.num_data, prog_bar=True)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        probs = self.predictive(x)["_RETURN"].softmax(-1).mean(0)
        accuracy = multiclass_accuracy(probs, y, probs.shape[-1], average="micro")
        self.log("accuracy", accuracy, prog_bar=True, batch_size=len(y))

    def configure_optimizers(self) -> None:
        """SSVI has its own."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {}  # all of it is in SSVI's
        checkpoint["svi"] = self.svi.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.svi.load_state_dict(checkpoint["svi"])

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left for it to do."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--ckpt-path", help="go on from this checkpoint")
    args = parser.parse_args(argv)
    pyro.clear_param_store()
    lightning.seed_everything(0, verbose=False)
    data = datasets.load("digits")
    train = DataLoader(TensorDataset(data.train_x, data.train_y), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(data.test_x, data.test_y), batch_size=360)
    net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
    classifier = SparseClassifier(
        Model(net, len(data.train_y)), args.density, args.epochs * len(train)
    )
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=False,
        enable_model_summary=False,
        check_val_every_n_epoch=1,
        num_sanity_val_steps=0,
    )
    trainer.fit(classifier, train, test, ckpt_path=args.ckpt_path, weights_only=False)
    print(classifier.guide.summary())
    accuracy = trainer.callback_metrics["accuracy"]
    print(f"test accuracy after {classifier.svi.steps} steps: {accuracy:.2%}")
    trainer.save_checkpoint("last.ckpt")


if __name__ == "__main__":
    main()
