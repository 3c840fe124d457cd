"""What the commands that run a model show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from llmcompress.display import live_progress, print_out

if TYPE_CHECKING:
    from llmcompress.converters.calibration import CalibrationReport
    from llmcompress.converters.evaluation import EvaluationReport

__all__ = ["live_progress", "show_calibration", "show_evaluation"]

# Figures in the order they are shown: key, label, and the factor and unit they are shown in.
FIGURES = (
    ("reference_perplexity", "perplexity of the reference", 1, ""), ("perplexity", "perplexity", 1, ""),
    ("perplexity_ratio", "ratio of perplexities", 1, ""), ("mean_kl", "KL divergence, mean", 1, " nats"),
    ("median_kl", "median", 1, " nats"), ("kl_90", "90 %", 1, " nats"), ("kl_95", "95 %", 1, " nats"),
    ("kl_99", "99 %", 1, " nats"), ("kl_99_9", "99.9 %", 1, " nats"), ("max_kl", "maximum", 1, " nats"),
    ("top1_agreement", "same most likely token", 100, " %"), ("rms_delta_p", "change of probability, rms", 100, " %"),
    ("mean_delta_p", "mean", 100, " %"),
)  # fmt: skip


def show_calibration(report: CalibrationReport) -> None:
    """Where the statistics are, of how many tokens, and what to know."""
    resumed = f", {report.resumed} of them from an earlier run" if report.resumed else ""
    print_out(
        f"{report.path}: {len(report.statistics.entries)} weights, {report.tokens} tokens{resumed}, in {report.dtype}"
    )
    for note in report.notes:
        print_out(f"note: {note}")


def show_evaluation(report: EvaluationReport) -> None:
    """The figures with their standard errors, the growth of the hidden states' error, tasks and notes."""
    figures = report.evaluation.figures
    table = Table("", "value", "± error", box=None, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    for key, label, factor, unit in FIGURES:
        if key in figures:
            value, error = figures[key].value * factor, figures[key].error
            shown_error = "" if error is None else f"{error * factor:.2g}"
            table.add_row(label, f"{value:.6g}{unit}", shown_error)
    scored = int(figures["tokens"].value)
    print_out(f"{scored} predicted tokens, windows of {report.chunk} in the style of {report.windows}")
    print_out(table)
    if report.evaluation.hidden_errors:
        print_out("error of the hidden states, relative, behind each block:")
        print_out("  ".join(f"{error:.2g}" for error in report.evaluation.hidden_errors.values()))
    for task, scores in report.tasks.items():
        for name, value in scores.items():
            print_out(f"{task} {name}: {value}")
    for note in report.notes:
        print_out(f"note: {note}")
