"""Plots of docs/accuracy.md: small SVG files, the same for the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

plt.rcParams |= {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "planc",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 6,
}
_MARKS = "osD^v<>Ph*Xd"


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def scatter(path: Path, points: Sequence[tuple[str, float, float]], label: str) -> None:
    """(group, measured, predicted) on two logarithmic axes, with the diagonal and 20 % about it."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    groups = sorted({group for group, _, _ in points})
    colours = plt.get_cmap("turbo")(np.linspace(0, 1, max(len(groups), 2)))
    for number, group in enumerate(groups):
        mine = np.array([(m, p) for g, m, p in points if g == group])
        axes.plot(
            mine[:, 0],
            mine[:, 1],
            _MARKS[number % len(_MARKS)],
            color=colours[number],
            markersize=3.5,
            markeredgewidth=0,
            alpha=0.8,
            label=group,
        )
    values = [value for _, m, p in points for value in (m, p)] or [1.0, 10.0]
    ends = np.array([min(values) * 0.8, max(values) * 1.25])
    axes.plot(ends, ends, color="black", linewidth=0.7)
    for factor in (0.8, 1.25):
        axes.plot(ends, ends * factor, color="grey", linewidth=0.5, linestyle=":")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(xlabel=f"measured {label}", ylabel=f"predicted {label}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def spreads(path: Path, groups: Mapping[str, Mapping[str, Sequence[float]]], label: str) -> None:
    """One panel per kind of group: a box per member, from quartile to quartile, whiskers from 10 to 90 %."""
    height = 1.2 + 0.26 * sum(len(members) for members in groups.values())
    sizes = [max(len(members), 1) for members in groups.values()]
    figure, panels = plt.subplots(
        len(groups), 1, figsize=(5.4, height), squeeze=False, sharex=True, height_ratios=sizes
    )
    for axes, (kind, members) in zip(panels[:, 0], groups.items(), strict=True):
        known = {name: list(values) for name, values in members.items() if len(values)}
        labels = [f"{name} ({len(values)})" for name, values in known.items()]
        axes.boxplot(
            list(known.values()),
            orientation="horizontal",
            whis=(10, 90),
            showfliers=False,
            widths=0.6,
            medianprops={"color": "C1"},
        )
        axes.set_yticks(range(1, len(labels) + 1), labels)
        axes.axvline(0, color="black", linewidth=0.5)
        axes.set_title(kind, loc="left", fontsize=8)
    panels[-1, 0].set_xlabel(label)
    figure.tight_layout()
    _save(figure, path)


def coverage(path: Path, shares: Mapping[str, float]) -> None:
    """Share of measured values inside the bands, beside the four fifths that they are meant to hold."""
    figure, axes = plt.subplots(figsize=(4.2, 0.6 + 0.35 * len(shares)))
    names = list(shares)
    axes.barh(names, [100 * shares[name] for name in names], height=0.6)
    axes.axvline(80, color="black", linewidth=0.7, linestyle=":")
    axes.set(xlim=(0, 100), xlabel="measured values inside low-high, %")
    _save(figure, path)


def duel(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Distribution of the TPOT errors of both tools on the points that both predict."""
    both = [row for row in rows if row["rival"] and row["planc"] and "tpot" in row["measured"]]
    figure, axes = plt.subplots(figsize=(4.8, 2.8))
    for name, who in (("planc, blind", "planc"), ("aiconfigurator", "rival")):
        sizes = np.sort([100 * abs(row[who]["tpot"] / row["measured"]["tpot"] - 1) for row in both])
        axes.plot(
            sizes, np.arange(1, len(sizes) + 1) / max(len(sizes), 1), drawstyle="steps-post", label=name
        )
    axes.set(
        xlim=(0, 60), ylim=(0, 1), xlabel="size of the TPOT error, %", ylabel="share of points within it"
    )
    axes.grid(linewidth=0.3)
    axes.legend(loc="lower right")
    _save(figure, path)


def curves(path: Path, rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> None:
    """Predicted and measured over concurrency, a panel per metric."""
    figure, panels = plt.subplots(1, len(labels), figsize=(2.6 * len(labels), 2.4), squeeze=False)
    clients = [row["concurrency"] for row in rows]
    for axes, (key, label) in zip(panels[0], labels.items(), strict=True):
        _lines(axes, clients, rows, key)
        axes.set(xlabel="clients", title=label, xscale="log")
        axes.set_ylim(bottom=0)
        axes.set_xticks(clients, [str(n) for n in clients])
        axes.minorticks_off()
    panels[0, 0].legend()
    figure.tight_layout()
    _save(figure, path)


def _lines(axes: Axes, clients: Sequence[int], rows: Sequence[Mapping[str, Any]], key: str) -> None:
    axes.plot(clients, [row["measured"][key] for row in rows], "o-", markersize=3, label="measured")
    axes.plot(clients, [row["predicted"][key] for row in rows], "s--", markersize=3, label="predicted")
