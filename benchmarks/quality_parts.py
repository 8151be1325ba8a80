"""What the quality study asks, part by part, as lists of settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

from quality_runs import Setting

__all__ = ["PARTS", "SEEDS", "quick"]

SEEDS = (0, 1, 2)
MORE_SEEDS = (*SEEDS, 3, 4, 5)  # where tenths of a point are asked about

SPARSE = Setting()
# Learning rate, KL weight and prior scale of each were chosen on held-out training images.
DENSE = Setting(method="autonormal", density=1.0, lr=1e-3, addition="gradient", share=0.0)
DENSE_LOCAL = Setting(density=1.0, lr=1e-3, local=True, addition="gradient", share=0.0)
# In no more time than AutoNormal takes for its ten epochs.
LONGER = replace(
    SPARSE,
    policy="uniform",
    init_loc="feasible",
    epochs=80,
    batch_size=256,
    lr=3e-3,
    kl_weight=0.2,
)
SPARSE_20 = replace(SPARSE, density=0.2, lr=2e-3)
LONGER_RUNS = [replace(LONGER, density=0.1), LONGER, replace(LONGER, structure="1x4")]
# Chosen for the dense posterior by the same search.
DENSE_LONGER = replace(DENSE, epochs=18, batch_size=256, lr=2e-3, kl_weight=0.2)
# About as many active weights as SPARSE_20 has.
AS_MANY = [
    replace(SPARSE, net="800-800", density=0.075, lr=3e-3),
    replace(SPARSE, net="1600-1600", density=0.025, lr=3e-3),
]
# Fewer active weights than the dense net of 400 units has, in no more time.
WIDER = replace(SPARSE, net="1600-1600", density=0.1, epochs=13, lr=1e-3, every=200)
NET = Setting(method="deterministic", density=1.0, lr=1e-3, addition="gradient", share=0.0)


def seeds(settings: list[Setting], chosen: tuple[int, ...] = SEEDS) -> list[Setting]:
    return [replace(setting, seed=seed) for seed in chosen for setting in settings]


def densities() -> list[Setting]:
    """Dense against sparse at equal epochs, and at equal time."""
    sparse = [SPARSE_20, *(replace(SPARSE, density=d) for d in (0.1, 0.05, 0.02, 0.01))]
    return [
        *seeds([DENSE], MORE_SEEDS),
        *seeds([DENSE_LOCAL, NET]),
        *seeds(sparse, MORE_SEEDS),
        *seeds([DENSE_LONGER, *LONGER_RUNS]),
    ]


def wider() -> list[Setting]:
    """Wider and sparser: about as many active weights in nets of 0.5, 1.3 and 3.8 million; and
    nearly as many as the dense net has."""
    return seeds([DENSE, SPARSE_20, *AS_MANY, WIDER])


def defaults() -> list[Setting]:
    """What a user has who sets a density alone; with the paper's schedule, and other additions."""
    at = replace(SPARSE, policy="uniform", init_loc="feasible")
    default = replace(at, addition="mixed_gradient", schedule="inverse-sqrt", every=50)
    alone = [replace(default, density=d) for d in (0.1, 0.05, 0.02)]
    additions = ("gradient", "sampled_gradient")
    others = [
        *(replace(at, density=d, addition="mixed_gradient") for d in (0.1, 0.05, 0.02)),
        *(replace(at, addition=addition) for addition in additions),
    ]
    # The optimizer and the KL weight of the README's first lines.
    first_lines = [
        replace(setting, lr=1e-3, kl_weight=1.0, decay=False, init_loc="feasible")
        for setting in (DENSE, default)
    ]
    return seeds(alone, MORE_SEEDS) + seeds(others + first_lines)


def criteria() -> list[Setting]:
    """What is removed, and what is added, at 2 % of the weights, where it matters."""
    at = replace(SPARSE, density=0.02)
    return seeds(
        [
            at,
            *(
                replace(at, removal=removal)
                for removal in (
                    "abs_mean",
                    "snr",
                    "mean_abs",
                    "mean_exp_abs",
                    "snr_exp_abs",
                )
            ),
            replace(at, addition="gradient"),
            replace(at, addition="gradient", batches=10),
            replace(at, addition="random"),
            replace(at, share=0.0),
        ]
    )


def exchanges() -> list[Setting]:
    """How often, how many, from what first set of densities."""
    at = replace(SPARSE, density=0.02)
    return seeds(
        [
            *(replace(at, every=every) for every in (25, 400)),
            *(replace(at, share=share) for share in (0.1, 0.6)),
            replace(at, policy="uniform"),
            replace(at, init_loc="feasible"),
            replace(at, policy="first-dense", density=0.02),
        ]
    )


def structures() -> list[Setting]:
    """Tiles, groups, whole columns and rows, beside single coordinates, at 5 %; tiles at 10 %."""
    names = ("single", "1x4", "4x1", "4x4", "n:m", "columns", "rows")
    twice_as_many = replace(SPARSE, density=0.1, structure="1x4")
    return seeds([replace(SPARSE, structure=name) for name in names]) + seeds(
        [twice_as_many], MORE_SEEDS
    )


def agreement() -> list[Setting]:
    """How alike the criteria's choices are in the course of training."""
    return [replace(SPARSE, agreement=True)]


def without_posterior() -> list[Setting]:
    """Sparse nets without a posterior, with a fitted temperature: RigL and SET."""
    plain = replace(SPARSE, method="rigl", removal="abs_mean")
    return seeds(
        [
            replace(plain, density=d, addition=addition, tempered=tempered)
            for d, addition, tempered in (
                (0.05, "gradient", False),
                (0.05, "gradient", True),
                (0.05, "random", True),
                (0.02, "gradient", True),
                (0.02, "random", True),
            )
        ]
    )


def lenet() -> list[Setting]:
    """LeNet-5, whose published figures are beside ours."""
    return seeds(
        [
            *(replace(NET, net="lenet", epochs=epochs) for epochs in (10, 20)),
            replace(DENSE, net="lenet", epochs=20),
            *(
                replace(SPARSE, net="lenet", density=0.1, epochs=20, kl_weight=weight)
                for weight in (0.1, 0.2)
            ),
        ]
    )


def correlations() -> list[Setting]:
    """Independent weights beside correlated ones, on as many active coordinates."""
    return seeds([SPARSE, replace(SPARSE, method="low-rank")])


def allocation() -> list[Setting]:
    """Each site with a number of its own, or all in competition; from two first allocations."""
    return seeds(
        [
            replace(SPARSE, density=d, policy=policy, addition=addition, allocation=allocation)
            for d, policy, addition in (
                (0.05, "erk", "sampled_gradient"),
                (0.05, "erk", "gradient"),
                (0.02, "erk", "sampled_gradient"),
                (0.02, "erk", "gradient"),
                (0.02, "uniform", "sampled_gradient"),
            )
            for allocation in ("per_site", "global")
        ]
    )


def evidence() -> list[Setting]:
    """Removal and addition by the log evidence, together and each with the paper's other half."""
    at = replace(SPARSE, density=0.02)
    return seeds(
        [
            replace(at, removal=removal, addition=addition, allocation=allocation)
            for removal, addition, allocation in (
                ("evidence", "evidence", "per_site"),
                ("evidence", "evidence", "global"),
                ("evidence", "sampled_gradient", "per_site"),
                ("snr_abs", "evidence", "per_site"),
            )
        ]
        + [replace(SPARSE, removal="evidence", addition="evidence")]
    )


def robustness() -> list[Setting]:
    """Two epochs each at 16 settings, dense and sparse."""
    grid = product((2e-4, 2e-3, 2e-2, 2e-1), (1e-2, 1e-1), (0.1, 1.0))
    return seeds(
        [
            replace(base, lr=lr, init_scale=init_scale, prior_scale=prior_scale, epochs=2)
            for lr, init_scale, prior_scale in grid
            for base in (DENSE, SPARSE)
        ],
        SEEDS[:2],
    )


def chosen() -> list[Setting]:
    """What settings were chosen by: tested on training images that were held out."""
    at_10 = replace(SPARSE, density=0.1)
    mixed = replace(at_10, policy="uniform", init_loc="feasible", addition="mixed_gradient")
    dense = [
        *(replace(DENSE, kl_weight=weight) for weight in (0.03, 0.1, 0.3)),
        replace(DENSE, lr=2e-3),
    ]
    sparse = [
        *(replace(SPARSE, lr=lr) for lr in (3e-3, 5e-3, 8e-3)),
        *(replace(SPARSE, kl_weight=weight) for weight in (0.03, 0.3)),
        *(replace(at_10, structure="1x4", lr=lr) for lr in (3e-3, 5e-3)),
        *(replace(SPARSE_20, lr=lr) for lr in (2e-3, 3e-3, 5e-3)),
        *(replace(wide, lr=lr) for wide in AS_MANY for lr in (3e-3, 5e-3)),
        *(replace(mixed, lr=lr) for lr in (3e-3, 5e-3, 8e-3)),
        replace(mixed, kl_weight=0.05),
        replace(mixed, policy="erk"),
        replace(mixed, init_loc="fan-in"),
    ]
    settings = seeds(dense, SEEDS[:1]) + seeds(sparse, SEEDS[:2])
    return [replace(setting, held_out=True) for setting in settings]


def steps() -> list[Setting]:
    """To be timed."""
    return [
        DENSE,
        DENSE_LOCAL,
        NET,
        SPARSE_20,
        *(replace(SPARSE, density=d) for d in (0.1, 0.05, 0.02, 0.01)),
        replace(SPARSE, method="low-rank"),
        *AS_MANY,
        WIDER,
        DENSE_LONGER,
        *LONGER_RUNS,
    ]


_PARTS: tuple[Callable[[], list[Setting]], ...] = (
    densities,
    lenet,
    wider,
    defaults,
    without_posterior,
    criteria,
    correlations,
    allocation,
    evidence,
    agreement,
    robustness,
    exchanges,
    structures,
    chosen,
    steps,
)
PARTS: dict[str, list[Setting]] = {part.__name__: part() for part in _PARTS}


def quick(settings: list[Setting]) -> list[Setting]:
    """A small version of a study: the first seed, one epoch, a smaller grid, small nets."""
    few = [
        replace(setting, epochs=min(setting.epochs, 1 if setting.epochs < 30 else 2))
        for setting in settings
        if setting.seed == 0
        and setting.net in ("400-400", "lenet")
        and setting.prior_scale == 0.1
        and setting.lr >= 1e-3
    ]
    return list(dict.fromkeys(few))
