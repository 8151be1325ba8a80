import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_ssvi import SSVI, AutoSparseNormal, ConstantSchedule, forbid_materialise
from pyro_ssvi.nn import bayesianize

images, labels = torch.randn(16, 3, 12, 12), torch.randint(4, (16,))


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


class Classifier(nn.Module):
    def __init__(self, net, **options):
        super().__init__()
        self.net = bayesianize(net, **{"prior": 0.3, **options})

    def forward(self, x, y=None):
        logits = self.net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


SITES = ["0.weight", "0.bias", "3.weight", "8.weight", "8.bias"]


def test_weights_are_sites_and_normalisation_is_trained():
    net = convnet()
    shapes = {name: p.shape for name, p in net.named_parameters()}
    model = Classifier(net)
    with poutine.trace() as tr:
        model(images)
    trace = tr.trace
    sites = [name for name in trace.stochastic_nodes if name.startswith("net.")]
    assert sites == [f"net.{name}" for name in SITES]
    for name in SITES:
        assert trace.nodes[f"net.{name}"]["value"].shape == shapes[name]
    assert trace.param_nodes == [f"net$$${n}" for n in ("1.weight", "1.bias", "4.weight", "4.bias")]


def test_it_computes_what_the_network_computes():
    net = convnet()
    plain = copy.deepcopy(net)
    values = {f"net.{n}": p.detach() for n, p in plain.named_parameters() if n in SITES}
    model = bayesianize(net)
    found = poutine.condition(model, values)(images)
    torch.testing.assert_close(found, plain(images))
    # Running statistics go on alike, and eval() uses them.
    torch.testing.assert_close(net[1].running_mean, plain[1].running_mean)
    model.eval()
    torch.testing.assert_close(poutine.condition(model, values)(images), plain.eval()(images))


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_it_trains_sparsely_with_batch_norm_beside(loss):
    model = Classifier(convnet())
    guide = AutoSparseNormal(model, density=0.3, init_scale=0.01)
    schedule = ConstantSchedule(every=10)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss(), schedule=schedule)
    norm = model.net.module[1]
    before = norm.weight.detach().clone()
    with forbid_materialise():
        first = sum(svi.step(images, labels) for _ in range(5))
        for _ in range(40):
            svi.step(images, labels)
        assert sum(svi.step(images, labels) for _ in range(5)) < 0.9 * first
    assert not torch.equal(norm.weight, before)
    assert norm.num_batches_tracked == 51
    assert guide.active_sets["net.3.weight"].density == pytest.approx(0.3, abs=0.01)


def test_it_trains_with_autonormal_too():
    model = Classifier(convnet())
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    first = sum(svi.step(images, labels) for _ in range(5))
    for _ in range(40):
        svi.step(images, labels)
    assert sum(svi.step(images, labels) for _ in range(5)) < first


def test_predictive_and_checkpoint(tmp_path):
    def make():
        model = Classifier(convnet())
        guide = AutoSparseNormal(model, density=0.3)
        return SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())

    svi = make()
    for _ in range(5):
        svi.step(images, labels)
    svi.save(tmp_path / "a.ckpt")
    expected = [svi.step(images, labels) for _ in range(3)]
    pyro.clear_param_store()
    resumed = make()
    resumed.load(tmp_path / "a.ckpt")
    assert [resumed.step(images, labels) for _ in range(3)] == expected
    samples = Predictive(resumed.model.model, guide=resumed.guide, num_samples=4)(images)
    assert samples["obs"].shape == (4, 16)


def test_a_shared_weight_is_one_site():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(7, 5)
            self.out = nn.Linear(5, 7, bias=False)
            self.out.weight = self.words.weight

        def forward(self, index):
            return self.out(self.words(index).tanh())

    model = bayesianize(Tied())
    with poutine.trace() as tr:
        out = model(torch.tensor([0, 3]))
    assert tr.trace.stochastic_nodes == ["net.words.weight"]
    weight = tr.trace.nodes["net.words.weight"]["value"]
    torch.testing.assert_close(out, weight[[0, 3]].tanh() @ weight.T)
    guide = AutoSparseNormal(model, density=0.4)
    with forbid_materialise():
        poutine.replay(model, poutine.trace(guide).get_trace(torch.tensor([0, 3])))(
            torch.tensor([0, 3])
        )


def test_a_prior_of_the_user_s_may_be_hierarchical():
    def prior(name, shape):
        scale = pyro.sample(f"scale of {name}", dist.HalfNormal(1.0))
        return dist.Laplace(0.0, scale).expand(shape).to_event(len(shape))

    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)), prior=prior)
    guide = AutoSparseNormal(model, density=0.1)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with forbid_materialise():
        for _ in range(3):
            svi.step(images, labels)
    assert list(guide.active_sets) == [
        "scale of 1.weight",
        "net.1.weight",
        "scale of 1.bias",
        "net.1.bias",
    ]


def test_names_that_stay_parameters():
    model = Classifier(convnet(), trained=["0.bias", "8.bias"])
    assert list(model.net.shapes) == ["0.weight", "3.weight", "8.weight"]
    with pytest.raises(ValueError, match=r"trained names \['9.bias'\], but the parameters are"):
        bayesianize(convnet(), trained=["9.bias"])
    with pytest.raises(ValueError, match="no parameter of the module is left"):
        bayesianize(nn.BatchNorm2d(3))


def test_two_networks_need_two_names():
    first, second = bayesianize(convnet()), bayesianize(convnet())
    first(images)
    with pytest.raises(ValueError, match=r"another 'net\$\$\$1.weight': give each network a name"):
        second(images)
    bayesianize(convnet(), name="second")(images)


def test_a_prior_of_another_shape():
    model = bayesianize(nn.Linear(3, 2), prior=lambda name, shape: dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match=r"prior of 'weight' gives values of shape \(\)"):
        model(torch.zeros(1, 3))


def test_dtype_follows_the_network():
    model = bayesianize(nn.Linear(3, 2)).double()
    guide = AutoSparseNormal(model, density=0.5)
    assert guide(torch.zeros(1, 3, dtype=torch.float64))["net.weight"].dtype == torch.float64
    assert model(torch.zeros(1, 3, dtype=torch.float64)).dtype == torch.float64


def test_nothing_of_the_weights_size_is_kept():
    model = bayesianize(nn.Linear(300, 200))
    assert sum(v.numel() for v in model.state_dict().values()) == 0


def test_torchvision_s_resnet18():
    resnet = pytest.importorskip("torchvision").models.resnet18(num_classes=4)
    resnet.conv1, resnet.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    model = Classifier(resnet, prior=0.1)
    guide = AutoSparseNormal(model, density=0.05, init_scale=0.01)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    with forbid_materialise():
        for _ in range(3):
            svi.step(images[:4], labels[:4])
        svi.exchange(images[:4], labels[:4], share=0.1)
    assert len(guide.active_sets) == 22  # 20 convolutions, a weight and a bias
    assert F.softmax(model.net(images[:4]), -1).isfinite().all()


def test_frozen_parameters_stay_as_they_are():
    net = convnet()
    net[1].weight.requires_grad_(False)
    model = Classifier(net, trained=["8.bias"])
    model.net.module[8].bias.requires_grad_(False)
    guide = AutoSparseNormal(model, density=0.3)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    before = {key: value.clone() for key, value in net.named_parameters()}
    for _ in range(2):
        svi.step(images, labels)
    after = dict(net.named_parameters())
    for key in ("1.weight", "8.bias"):
        assert torch.equal(after[key], before[key])
        assert not after[key].requires_grad
    assert not torch.equal(after["1.bias"], before["1.bias"])


@pytest.mark.skipif(not hasattr(nn, "RMSNorm"), reason="torch is too old")
def test_root_mean_square_normalisation_is_trained():
    net = bayesianize(nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4)))
    assert net.trained == ["1.weight"]


def test_trained_weights_in_another_memory_format():
    net = convnet().to(memory_format=torch.channels_last)
    model = Classifier(net, trained=["0.weight"])
    guide = AutoSparseNormal(model, density=0.3)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(2):
        svi.step(images, labels)


def test_a_module_cannot_be_made_bayesian_twice():
    net = convnet()
    bayesianize(net)
    with pytest.raises(ValueError, match=r"'0.weight'.* made Bayesian before"):
        bayesianize(net)
