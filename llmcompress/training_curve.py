"""The losses of a training as a picture."""

from __future__ import annotations

from pathlib import Path

from llmcompress.training import Curve


def draw(curve: Curve, path: Path, title: str) -> None:
    """Write a PNG: training and held-out loss by step, the best marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*curve.train), color="0.6", label="training")
    if curve.held_out:
        axes.plot(*zip(*curve.held_out), color="C0", marker="o", markersize=3, label="held out")
        axes.plot(*curve.best, color="C3", marker="o", linestyle="", label=f"best, {curve.best[1]:.4f}")
    axes.set(xlabel="step", ylabel="loss, nats for each learned token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
