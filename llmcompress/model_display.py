"""What the commands that run a model show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from llmcompress.display import live_progress, print_out

if TYPE_CHECKING:
    from llmcompress.converters.calibration import CalibrationReport
    from llmcompress.converters.compensation import CompensationReport
    from llmcompress.converters.evaluation import EvaluationReport
    from llmcompress.converters.finetuning import TuningReport
    from llmcompress.converters.gradual import GradualReport
    from llmcompress.converters.pruning import PruningReport
    from llmcompress.converters.smaller_folder import SmallerReport

__all__ = [
    "live_progress",
    "show_calibration",
    "show_compensation",
    "show_evaluation",
    "show_gradual",
    "show_pruning",
    "show_smaller",
    "show_tuning",
]

LISTED = 6  # tensors named in a line
# Figures in the order they are shown: key, label, and the factor and unit they are shown in.
FIGURES = (
    ("reference_perplexity", "perplexity of the reference", 1, ""),
    ("perplexity", "perplexity", 1, ""),
    ("perplexity_difference", "perplexity less the reference's", 1, ""),
    ("perplexity_ratio", "perplexity over the reference's", 1, ""),
    ("ln_perplexity_ratio", "its logarithm", 1, "nats"),
    ("mean_kl", "KL divergence, mean", 1, "nats"),
    ("median_kl", "KL divergence, median", 1, "nats"),
    ("kl_90", "KL divergence, 90 % of tokens below", 1, "nats"),
    ("kl_95", "KL divergence, 95 % of tokens below", 1, "nats"),
    ("kl_99", "KL divergence, 99 % of tokens below", 1, "nats"),
    ("kl_99_9", "KL divergence, 99.9 % of tokens below", 1, "nats"),
    ("max_kl", "KL divergence, maximum", 1, "nats"),
    ("top1_agreement", "same most likely token", 100, "%"),
    ("rms_delta_p", "Δp of the text's token, root mean square", 100, "%"),
    ("mean_delta_p", "Δp of the text's token, mean", 100, "%"),
)


def show_calibration(report: CalibrationReport) -> None:
    """Where the statistics are, of how many tokens, and what to know."""
    resumed = f", {report.resumed} of them from an earlier run" if report.resumed else ""
    print_out(
        f"{report.path}: {len(report.statistics.entries)} weights, {report.tokens} tokens{resumed}, in {report.dtype}"
    )
    for note in report.notes:
        print_out(f"note: {note}")


def show_compensation(report: CompensationReport) -> None:
    """Where the adapter is, and how much of the error it leaves."""
    print_out(
        f"{report.path}: rank {report.options.rank}, {len(report.linears)} linears, {report.weights:,} weights; leaves "
        f"{report.left:.0%} of the linears' squared error on the calibration's inputs"
    )
    print_out(f"it fits {report.artefact} and nothing else, {report.reference} least of all")
    for note in report.notes:
        print_out(f"note: {note}")


def show_pruning(report: PruningReport) -> None:
    """Where the checkpoint is, how sparse it became, and what stayed as it was."""
    print_out(
        f"{report.path}: {report.options.method}, {report.sparsity:.2%} of {len(report.tensors)} matrices are zeros, "
        f"{report.sparsity_of_model:.2%} of the model"
    )
    more = f" and {len(report.left) - LISTED} more" if len(report.left) > LISTED else ""
    print_out(f"left as they are: {', '.join(report.left[:LISTED]) or 'none'}{more}")
    print_out("a checkpoint of the same size and speed: no runtime that reads it skips zeros")
    for note in report.notes:
        print_out(f"note: {note}")


def show_smaller(report: SmallerReport) -> None:
    """Where the checkpoint is, and how much smaller it is."""
    before, after = (f"{weights:,}" for weights in report.weights)
    print_out(f"{report.path}: {after} weights of {before}, {report.share:.2%} gone")
    for what, value in report.went.items():
        if isinstance(value, (int, float, str)) or (
            isinstance(value, list) and all(type(part) is int for part in value)
        ):
            print_out(
                f"{what.replace('_', ' ')}: {value if not isinstance(value, list) else ', '.join(map(str, value))}"
            )
    for note in report.notes:
        print_out(f"note: {note}")


def show_gradual(report: GradualReport) -> None:
    """Every state on the way with its held-out loss, and which of them is the result."""
    table = _table("", "sparsity", "rounds healed", "perplexity", "loss, nats", "±", "KL")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("unpruned", "0", "", f"{report.reference:.4f}", "0", "", "0")
    for state in report.states:
        table.add_row(
            f"{state.folder}{' *' if state == report.kept else ''}", f"{state.sparsity:g}", str(state.healed),
            f"{state.perplexity:.4f}", f"{state.loss:.4f}", f"{state.loss_error:.4f}", f"{state.mean_kl:.4f}",
        )  # fmt: skip
    print_out(table)
    allowed = "" if report.max_loss is None else f", {report.max_loss:g} nats allowed"
    print_out(f"{report.path}: sparsity {report.kept.sparsity:g}, the state with the star{allowed}")
    print_out(
        "losses are those of held-out examples; a checkpoint of the same size and speed: no runtime skips zeros"
    )
    for note in report.notes:
        print_out(f"note: {note}")


def show_tuning(report: TuningReport) -> None:
    """Where the adapter is, what it learned on, and its held-out loss beside the untuned model's."""
    counts = report.data.counts()
    rank = "" if report.options.method == "full" else f" of rank {report.options.rank}"
    print_out(
        f"{report.path}: {report.options.method}{rank}, {report.trainable:,} weights on {report.model} in {report.load}"
    )
    print_out(
        f"{counts['train_examples']} examples of {counts['train_tokens']} tokens, "
        f"{counts['train_learned_tokens']} of them learned, {report.steps} steps in {report.seconds:.0f} s"
    )
    if report.held_out is not None:
        print_out(
            f"held-out loss {report.held_out:.4f} at step {report.best_step}, the untuned model's {report.untuned:.4f}"
        )
    for note in report.notes:
        print_out(f"note: {note}")


def show_evaluation(report: EvaluationReport) -> None:
    """The figures with their standard errors, the growth of the hidden states' error, tasks and notes."""
    figures, windows = report.evaluation.figures, report.windows
    against = f" against {report.reference}" if report.reference else ""
    print_out(f"{report.artefact}{against}, in {report.options.dtype}")
    print_out(
        f"{figures['tokens'].value} predicted tokens, windows of {windows.chunk} in the style of {windows.style}"
    )
    table = _table("", "value", "± error", "")
    for key, label, factor, unit in FIGURES:
        if key in figures:
            value, error = figures[key].value * factor, figures[key].error
            table.add_row(label, f"{value:.6g}", "" if error is None else f"{error * factor:.2g}", unit)
    print_out(table)
    if report.evaluation.hidden_errors:
        print_out("relative error of the hidden states behind each block:")
        errors = report.evaluation.hidden_errors.values()
        print_out("  ".join(f"{block}: {error:.2g}" for block, error in enumerate(errors)))
    if report.tasks:
        _show_tasks(report)
    for note in report.notes:
        print_out(f"note: {note}")


def _show_tasks(report: EvaluationReport) -> None:
    table = _table("task", "value", "± error", "metric")
    if report.reference_tasks:
        table.add_column("reference", justify="right")
        table.add_column("± error", justify="right")
    for task, scores in report.tasks.items():
        for name in scores:
            if "_stderr," in name or "," not in name:  # beside the metrics there is a number of samples
                continue
            cells = _score(scores, name), _score(report.reference_tasks.get(task, {}), name)
            (value, error), beside = cells
            table.add_row(
                task, value, error, name.partition(",")[0], *(beside if report.reference_tasks else ())
            )
    print_out(table)


def _score(scores: dict[str, float], name: str) -> tuple[str, str]:
    """A metric such as `acc,none` and its standard error, which goes by `acc_stderr,none`."""
    metric, _, kind = name.partition(",")
    value, error = scores.get(name), scores.get(f"{metric}_stderr,{kind}")
    return ("" if value is None else f"{value:.6g}", "" if error is None else f"{error:.2g}")


def _table(*heads: str) -> Table:
    """A table whose second and third columns are numbers."""
    table = Table(*heads, box=None, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    return table
