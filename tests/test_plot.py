import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_ssvi import SSVI, ActiveSet, AutoSparseNormal, plot
from pyro_ssvi.inclusion import effects

X, Y = torch.randn(20, 12), torch.randn(20)


def model(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([6, 12]).to_event(2))
    v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([6]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(torch.tanh(x @ w.T) @ v, 1.0), obs=y)


@pytest.fixture
def guide():
    guide = AutoSparseNormal(model, density=0.25)
    guide(X, Y)
    yield guide
    plt.close("all")


def test_elbo_and_its_running_mean():
    ax = plot.elbo([5.0, 4.0, 3.0, 2.0], window=2)
    assert ax.lines[1].get_ydata().tolist() == [4.5, 3.5, 2.5]
    assert ax.lines[1].get_xdata().tolist() == [2, 3, 4]
    assert len(plot.elbo([1.0], window=2).lines) == 1


def test_densities_are_shown_with_numbers(guide):
    ax = plot.densities(guide)
    assert [bar.get_width() for bar in ax.patches] == [25, 100]
    assert [text.get_text() for text in ax.texts] == ["18", "6"]


def test_turnover_ends_at_the_whole(guide):
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    history = [guide.active_sets]
    for _ in range(2):
        svi.exchange(X, Y, share=1 / 3)
        history.append(guide.active_sets)
    (line,) = plot.turnover(history).lines
    values = line.get_ydata().tolist()
    assert values[-1] == 100
    assert values[-2] == pytest.approx(100 * 12 / 24)


def test_active_set_by_pixel_and_by_cell(guide):
    active = guide.active_sets["w"]
    (image,) = plot.active_set(active, image_shape=(3, 4)).images
    assert torch.equal(torch.as_tensor(image.get_array()), active.mask.sum(0).reshape(3, 4))
    (image,) = plot.active_set(active).images
    assert torch.equal(torch.as_tensor(image.get_array()), active.mask.long())
    large = ActiveSet.random((500, 300), 1000)
    (image,) = plot.active_set(large).images
    assert image.get_array().shape == (200, 200)
    assert image.get_array().sum() == 1000
    with pytest.raises(ValueError, match=r"25 pixels.*12 elements"):
        plot.active_set(active, image_shape=(5, 5))


def test_receptive_fields_show_the_strongest_units_and_leave_zeros_out():
    weights = torch.zeros(11, 6)
    weights[:, 0] = torch.arange(11.0)  # a pixel of each unit; unit 0 has none
    ax = plot.receptive_fields(weights, image_shape=(2, 3), units=10)
    image = torch.as_tensor(ax.images[0].get_array().filled(0.0))
    assert image.shape == (2 * 2, 8 * 3)
    assert image[0, ::3].tolist() == [10, 9, 8, 7, 6, 5, 4, 3]
    assert image[2, ::3].tolist() == [2, 1, 0, 0, 0, 0, 0, 0]
    assert ax.images[0].get_array().mask.sum() == image.numel() - 10
    assert ax.images[0].get_clim() == (-10, 10)
    with pytest.raises(ValueError, match=r"\(out, 4\), got \(11, 6\)"):
        plot.receptive_fields(weights, image_shape=(2, 2))
    plt.close("all")


def test_bands_are_quantiles_of_the_draws():
    draws = torch.arange(101.0).unsqueeze(-1) * torch.tensor([1.0, 2.0])
    ax = plot.bands(torch.tensor([0.0, 1.0]), draws, label="curve")
    assert ax.lines[0].get_ydata().tolist() == [50, 100]
    wide, narrow = (band.get_datalim(ax.transData) for band in ax.collections)
    assert (wide.y0, wide.y1) == pytest.approx((5, 190))
    assert (narrow.y0, narrow.y1) == pytest.approx((25, 150))
    assert ax.get_legend().get_texts()[0].get_text() == "curve"
    plt.close("all")


def test_accuracy_against_active_parameters():
    ax = plot.accuracy({"dense": (10_000, 0.9), "sparse": (100, 0.85)})
    points = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert points == {"dense": [[10_000, 90]], "sparse": [[100, 85]]}
    assert ax.get_xscale() == "log"
    assert len({line.get_color() for line in ax.lines}) == 2
    assert len({line.get_marker() for line in ax.lines}) == 2
    plt.close("all")


def test_posterior_shows_the_surest_first(guide):
    guide.loc_unconstrained.data[:18] = torch.arange(18.0)
    ax = plot.posterior(guide, "w", names=[f"w{i}" for i in range(72)])
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels == [f"w{i}" for i in guide.active_sets["w"].indices.flip(0).tolist()]


def test_posterior_names_coordinates_by_their_index(guide):
    guide.loc_unconstrained.data[:18] = torch.arange(18.0)
    labels = plot.posterior(guide, "w").get_yticklabels()
    flat = int(guide.active_sets["w"].indices[-1])
    assert labels[0].get_text() == f"{flat // 12}, {flat % 12}"
    assert plot.posterior(guide, "v").get_yticklabels()[0].get_text() in "012345"


def test_effects_as_intervals_and_as_an_image(guide):
    table = effects(guide, "w", names=[f"x{i}" for i in range(12)], num_samples=50)
    ax = plot.effects(table)
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels == [f"x{i}" for i in table.order.tolist()]
    assert len(labels) == int((guide.active_sets["w"].mask.sum(0) > 0).sum())
    (image,) = plot.effects(table, image_shape=(3, 4)).images
    shown = torch.as_tensor(image.get_array().filled(0.0)).flatten()
    torch.testing.assert_close(shown, table.mean.double(), check_dtype=False)
    assert image.get_array().mask.sum() == (table.active == 0).sum()
    with pytest.raises(ValueError, match=r"25 pixels, but there are 12 inputs"):
        plot.effects(table, image_shape=(5, 5))


def test_reliability_on_the_axes_that_are_given():
    _figure, ax = plt.subplots()
    probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.45, 0.55], [0.2, 0.8]])
    assert plot.reliability(probs, torch.tensor([0, 1, 1, 1]), bins=10, ax=ax, label="net") is ax
    assert ax.lines[1].get_xdata().tolist() == pytest.approx([0.55, 0.8, 0.9])
    assert ax.lines[1].get_ydata().tolist() == pytest.approx([1.0, 1.0, 0.5])
    plot.reliability(probs, torch.tensor([0, 1, 1, 1]), ax=ax, label="again")
    assert len(ax.lines) == 3  # one diagonal
    assert len({line.get_marker() for line in ax.lines}) == 3  # told apart without colours
    plt.close("all")
