"""Tables and figures of the quality study, from its lines of results."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib
from quality_parts import DENSE, PARTS, SPARSE
from quality_runs import Setting

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["tables", "write"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "quality.md"
# Okabe and Ito's colours, told apart by the colour-blind too.
BLACK, BLUE, RED, GREEN, PURPLE = "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
TRAINED = (0.3, 0.7, 0.8, 0.85)  # accuracies of a setting that trains, after two epochs

COLUMNS: dict[str, Callable[[float], str]] = {
    "accuracy": lambda value: f"{100 * value:.2f}",
    "nll": lambda value: f"{value:.3f}",
    "brier": lambda value: f"{value:.3f}",
    "ece": lambda value: f"{value:.4f}",
    "class_ece": lambda value: f"{value:.4f}",
}
HEADINGS = {
    "accuracy": "accuracy, %",
    "nll": "NLL",
    "brier": "Brier",
    "ece": "ECE",
    "class_ece": "class-wise ECE",
}


class Results:
    """The lines, found by their settings."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.runs = {Setting(**row["setting"]): row for row in rows if "setting" in row}
        self.steps = [row["steps"] for row in rows if "steps" in row]

    def groups(self, settings: Sequence[Setting]) -> list[tuple[Setting, list[dict[str, Any]]]]:
        """Settings that have runs, each with those that are asked for: a part compares seeds."""
        found: dict[Setting, list[dict[str, Any]]] = {}
        for setting in settings:
            if setting in self.runs:
                found.setdefault(replace(setting, seed=0), []).append(self.runs[setting])
        return list(found.items())


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """The mean, and the standard deviation over seeds."""
    text = show(statistics.fmean(values))
    return f"{text} ± {show(statistics.stdev(values))}" if len(values) > 1 else text


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rules = ["---", *("--:" for _ in heading[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, rules, *rows))


def name(setting: Setting) -> str:
    """As the tables call a setting."""
    percent = f"{100 * setting.density:g} %"
    if setting.method == "autonormal":
        return f"AutoNormal, KL weight {setting.kl_weight:g}"
    if setting.method == "deterministic":
        return "deterministic, dense"
    if setting.method == "rigl":
        grown = "SET" if setting.addition == "random" else "RigL"
        return f"{grown}, {percent}" + (", temperature fitted" if setting.tempered else "")
    if setting.density == 1:
        return "dense, local reparameterisation"
    if setting.method == "low-rank":
        return f"SSVI {percent}, correlated"
    tiles = f"tiles {setting.structure.replace('x', ' x ')}"
    words = {
        "single": "",
        "n:m": ", groups: 2 of 49, and 1 of 20",
        "columns": ", whole columns",
        "rows": ", whole rows",
    }
    return f"SSVI {percent}" + words.get(setting.structure, f", {tiles}")


def quality(groups: Sequence[tuple[Setting, list[dict[str, Any]]]], label: Callable) -> str:
    """One row for each setting, with the measures of predictions."""
    rows = []
    for setting, runs in groups:
        measures = [spread([run[key] for run in runs], show) for key, show in COLUMNS.items()]
        active = f"{statistics.fmean(run['active'] for run in runs):,.0f}"
        rows.append([label(setting), active, *measures, str(len(runs))])
    return markdown(["", "active parameters", *HEADINGS.values(), "runs"], rows)


def with_epochs(setting: Setting) -> str:
    named = setting.kl_weight == 0.1 or setting.method == "autonormal"
    weight = "" if named else f", KL weight {setting.kl_weight:g}"
    return f"{name(setting)}, {setting.epochs} epochs{weight}"


def with_net(setting: Setting) -> str:
    epochs = f", {setting.epochs} epochs" if setting.epochs != SPARSE.epochs else ""
    return f"784-{setting.net}-10, {name(setting)}{epochs}"


def as_called(setting: Setting) -> str:
    if not setting.decay:
        return f"{name(setting)}, Adam at 1e-3, likelihood as it is"
    own = f'CosineSchedule(every={setting.every}), addition="{setting.addition}"'
    return f"{name(setting)}, {'by default' if setting.schedule == 'inverse-sqrt' else own}"


def as_tried(setting: Setting) -> str:
    """What was tried on held-out images."""
    net = f"784-{setting.net}-10, " if setting.net != SPARSE.net else ""
    words = net + ("AutoNormal" if setting.method == "autonormal" else name(setting))
    for key, called in (("addition", ""), ("policy", "densities "), ("init_loc", "locations ")):
        if setting.method == "ssvi" and getattr(setting, key) != getattr(SPARSE, key):
            words += f", {called}{getattr(setting, key)}"
    return f"{words}: lr {setting.lr:g}, KL weight {setting.kl_weight:g}"


def with_structure(setting: Setting) -> str:
    return name(setting) + (", single coordinates" if setting.structure == "single" else "")


def difference(setting: Setting) -> str:
    """What a setting of the ablations changes."""
    base = asdict(replace(SPARSE, density=0.02))
    words = {
        "removal": "removal by {}",
        "addition": "addition: {}",
        "batches": "gradient over {} batches",
        "every": "an exchange every {} steps",
        "share": "first share {:.0%}",
        "policy": "densities {}",
        "init_loc": "first locations {}",
    }
    if setting.share == 0:
        return "fixed random active set"
    changed = [k for k in words if getattr(setting, k) != base[k]]
    return ", ".join(words[k].format(getattr(setting, k)) for k in changed) or "as SSVI 2 %"


def exchanged(setting: Setting) -> str:
    """How a setting allocates and exchanges."""
    return (
        f"{name(setting)}, {setting.policy}, {setting.allocation}; removal {setting.removal}, "
        f"addition {setting.addition}"
    )


def out_of_distribution(results: Results) -> str:
    """AUROC by predictive entropy, and by its epistemic part."""
    kinds = ("digits", "rotated", "noisy", "inverted")
    rows = []
    for setting, runs in results.groups(PARTS["densities"]):
        if setting.epochs > 10:
            continue
        cells = []
        for kind in kinds:
            total, epistemic = (
                statistics.fmean(run[f"auroc_{part}_{kind}"] for run in runs)
                for part in ("total", "epistemic")
            )
            has_both = setting.method != "deterministic"
            cells.append(f"{total:.3f} / {epistemic:.3f}" if has_both else f"{total:.3f}")
        rows.append([name(setting), *cells])
    return markdown(["AUROC, total / epistemic", *kinds], rows)


def robustness(results: Results) -> str:
    """The share of a grid's settings that train."""
    rows = []
    for method in ("autonormal", "ssvi"):
        grid = [setting for setting in PARTS["robustness"] if setting.method == method]
        accuracies = [run["accuracy"] for _, runs in results.groups(grid) for run in runs]
        if not accuracies:
            continue
        trained = [sum(accuracy >= least for accuracy in accuracies) for least in TRAINED]
        rows.append(
            [
                "AutoNormal" if method == "autonormal" else "SSVI 5 %",
                str(len(accuracies)),
                *(f"{count / len(accuracies):.0%}" for count in trained),
                f"{100 * statistics.median(accuracies):.1f}",
                f"{100 * max(accuracies):.1f}",
            ]
        )
    shares = [f"over {least:.0%}" for least in TRAINED]
    return markdown(["", "runs", *shares, "median accuracy, %", "best, %"], rows)


def agreement(results: Results) -> str:
    """How alike the criteria's choices are, at the first, a middle and the last epoch."""
    epochs = results.runs.get(PARTS["agreement"][0], {}).get("agreement")
    if not epochs:
        return ""
    chosen = sorted({0, (len(epochs) - 1) // 2, len(epochs) - 1})
    rows = [
        [
            pair.replace(" ", " and "),
            *("{:.2f} / {:.2f}".format(*epochs[epoch][pair]) for epoch in chosen),
        ]
        for pair in epochs[0]
    ]
    return markdown(["IoU / Spearman", *(f"epoch {epoch + 1}" for epoch in chosen)], rows)


def steps(results: Results) -> str:
    """Time of a step."""
    if not results.steps:
        return ""
    last = results.steps[-1]
    dense = next(row["ms"] for row in last if row["setting"]["method"] == "autonormal")
    rows = []
    for row in last:
        setting = Setting(**row["setting"])
        label = name(setting) if setting.net == "400-400" else with_net(setting)
        if setting.batch_size != SPARSE.batch_size:
            label += f", batch {setting.batch_size}"
        label += ", local reparameterisation" if setting.local and setting.density < 1 else ""
        low, high = row["range"]
        rows.append(
            [label, f"{row['ms']:.1f} ({low:.1f} to {high:.1f})", f"{dense / row['ms']:.1f}x"]
        )
    return markdown(["", "ms a step", "than AutoNormal"], rows)


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """All tables that the results have runs for, by name, as Markdown."""
    results = Results(rows)

    def part(key: str, label: Callable) -> str:
        return quality(results.groups(PARTS[key]), label)

    equal, longer = [], []
    for group in results.groups(PARTS["densities"]):
        (equal if group[0].epochs <= 10 else longer).append(group)
    lenet = part("lenet", with_epochs)
    published = [
        ["published: deterministic", "", "91.0", "0.321", "", "", "", ""],
        ["published: VI", "", "89.5", "0.292", "", "0.011", "", ""],
        ["published: ensemble of ten", "", "93.2", "0.200", "", "0.010", "", ""],
    ]
    lenet += "\n" + "\n".join("| " + " | ".join(row) + " |" for row in published)
    return {
        "densities": quality(equal, name),
        "longer": quality(longer, with_epochs),
        "steps": steps(results),
        "wider": part("wider", with_net),
        "defaults": part("defaults", as_called),
        "lenet": lenet,
        "without_posterior": part("without_posterior", name),
        "criteria": part("criteria", difference),
        "correlations": part("correlations", name),
        "allocation": part("allocation", exchanged),
        "evidence": part("evidence", exchanged),
        "exchanges": part("exchanges", difference),
        "structures": part("structures", with_structure),
        "chosen": part("chosen", as_tried),
        "agreement": agreement(results),
        "robustness": robustness(results),
        "elsewhere": out_of_distribution(results),
    }


def plot_densities(results: Results, path: Path) -> None:
    """Accuracy and NLL against active parameters, and a reliability diagram."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    groups = results.groups(PARTS["densities"])

    def equal_time(setting: Setting, structure: str) -> bool:
        return setting.density < 1 and setting.epochs > 10 and setting.structure == structure

    series = [
        ("SSVI, equal epochs", BLUE, "o", lambda s: s.density < 1 and s.epochs <= 10),
        ("SSVI, equal time", GREEN, "s", lambda s: equal_time(s, "single")),
        ("SSVI, equal time, tiles 1 x 4", GREEN, "*", lambda s: equal_time(s, "1x4")),
        ("AutoNormal", RED, "D", lambda s: s.method == "autonormal"),
        ("dense, local reparam.", PURPLE, "^", lambda s: s.method == "ssvi" and s.density == 1),
        ("deterministic", BLACK, "X", lambda s: s.method == "deterministic"),
    ]
    for label, colour, marker, belongs in series:
        chosen = [(setting, runs) for setting, runs in groups if belongs(setting)]
        for axes, key, factor in ((left, "accuracy", 100), (middle, "nll", 1)):
            active = [runs[0]["active"] for _, runs in chosen]
            values = [[factor * run[key] for run in runs] for _, runs in chosen]
            centre = [statistics.fmean(each) for each in values]
            errors = [statistics.stdev(each) if len(each) > 1 else 0 for each in values]
            style = "-" if "SSVI" in label else "none"
            axes.errorbar(
                active,
                centre,
                errors,
                label=label,
                color=colour,
                marker=marker,
                ls=style,
                capsize=3,
            )
    for axes, title in ((left, "Test accuracy, %"), (middle, "Test NLL")):
        axes.set(title=title, xlabel="active parameters", xscale="log")
    left.legend(frameon=False, fontsize=9)
    right.plot([0, 1], [0, 1], color="#999999", lw=1)
    for label, colour, _, belongs in series:
        for setting, runs in groups:
            at_hand = setting.method != "ssvi" or setting.density == 0.05
            if belongs(setting) and at_hand and setting.kl_weight == DENSE.kl_weight:
                confidence, accuracy, _ = zip(*runs[0]["reliability"], strict=True)
                style = {"label": label.replace(",", " 5 %,"), "color": colour, "ms": 4}
                right.plot(confidence, accuracy, "o-", **style)
    right.set(title="Reliability (first seed)", xlabel="confidence", ylabel="accuracy")
    right.legend(frameon=False, fontsize=9)
    save(figure, (left, middle, right), path)


def plot_robustness(results: Results, path: Path) -> None:
    """Accuracy at each setting of the grid."""
    grid = PARTS["robustness"]
    groups = results.groups(grid)
    priors = sorted({setting.prior_scale for setting in grid})
    lrs = sorted({setting.lr for setting in grid})
    scales = sorted({setting.init_scale for setting in grid})
    figure, axes = plt.subplots(
        2, len(priors), figsize=(7.5, 6), layout="constrained", squeeze=False
    )
    for row, method in zip(axes, ("autonormal", "ssvi"), strict=True):
        for ax, prior in zip(row, priors, strict=True):
            at = {
                (s.lr, s.init_scale): 100 * statistics.fmean(run["accuracy"] for run in runs)
                for s, runs in groups
                if s.method == method and s.prior_scale == prior
            }
            image = [[at.get((lr, scale), float("nan")) for scale in scales] for lr in lrs]
            ax.imshow(image, cmap="cividis", vmin=10, vmax=90)
            for i, line in enumerate(image):
                for j, value in enumerate(line):
                    colour = "white" if value < 55 else "black"
                    ax.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour)
            title = "AutoNormal" if method == "autonormal" else "SSVI 5 %"
            ax.set(title=f"{title}, prior sd {prior:g}", xlabel="first sd", ylabel="learning rate")
            ax.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
            ax.set_yticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
    figure.suptitle("Test accuracy after two epochs, %")
    save(figure, (), path)


def save(figure: Any, axes: Sequence[Any], path: Path) -> None:
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(rows: Sequence[dict[str, Any]], page: Path | None = PAGE) -> None:
    """Print the tables, and put them into the page, between its marks, with their figures.

    :param page: ``None`` to print only.
    """
    found = tables(rows)
    for key, table in found.items():
        if table.count("\n") > 1:
            print(f"\n{key}\n\n{table}")
    if page is None:
        return
    text = page.read_text()
    for key, table in found.items():
        marks = rf"(<!-- table: {key} -->\n).*?(<!-- end -->)"
        text, count = re.subn(marks, rf"\g<1>\n{table}\n\n\g<2>", text, flags=re.DOTALL)
        if not count:
            raise ValueError(f"{page} has no place for the table {key!r}")
    page.write_text(text)
    results = Results(rows)
    plot_densities(results, page.with_name("quality-densities.png"))
    plot_robustness(results, page.with_name("quality-robustness.png"))
