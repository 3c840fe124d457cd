"""Divergences against float64, against llama.cpp's printed figures, and of logits that are no numbers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import Model
from safetensors.numpy import load_file, save_file

import llmcompress
from llmcompress import divergence
from llmcompress.divergence import Divergence, Estimate, Perplexity
from llmcompress.errors import RunError
from llmcompress.logits_file import LogitsReader, scored_positions

# What llama-perplexity prints: name, and what to divide by.
PRINTED = {
    "perplexity": ("Mean PPL(Q)", 1),
    "reference_perplexity": ("Mean PPL(base)", 1),
    "perplexity_difference": ("Mean PPL(Q)-PPL(base)", 1),
    "ln_perplexity_ratio": ("Mean ln(PPL(Q)/PPL(base))", 1),
    "perplexity_ratio": ("Mean PPL(Q)/PPL(base)", 1),
    "mean_kl": ("Mean KLD", 1),
    "max_kl": ("Maximum KLD", 1),
    "kl_99_9": ("99.9% KLD", 1),
    "kl_99": ("99.0% KLD", 1),
    "kl_95": ("95.0% KLD", 1),
    "kl_90": ("90.0% KLD", 1),
    "median_kl": ("Median KLD", 1),
    "mean_delta_p": ("Mean Δp", 100),
    "rms_delta_p": ("RMS Δp", 100),
    "top1_agreement": ("Same top p", 100),
}
SIZE = {"perplexity_difference": 60}  # of the numbers that a figure comes from, where that is not its own


def pair(seed: int, rows: int, vocab: int, spread: float, change: float) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    reference = spread * torch.randn(rows, vocab, generator=random)
    artefact = reference + change * torch.randn(rows, vocab, generator=random)
    return reference, artefact, torch.randint(vocab, (rows,), generator=random)


def log_softmax(x: torch.Tensor) -> np.ndarray:
    """In long doubles: the plain formula in float64 gives no digit of a divergence of 1e-16."""
    x = x.numpy().astype(np.longdouble)
    x -= x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def plainly(reference: torch.Tensor, artefact: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
    log_p, log_q = log_softmax(reference), log_softmax(artefact)
    rows = np.arange(len(targets))
    return {
        "reference_nll": -log_p[rows, targets].astype(np.float64),
        "nll": -log_q[rows, targets].astype(np.float64),
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(1).astype(np.float64),
        "same_top": reference.numpy().argmax(1) == artefact.numpy().argmax(1),
    }


def fed(*logits_and_targets: torch.Tensor) -> Divergence:
    figures = Divergence()
    figures.add(*logits_and_targets)
    return figures


@given(
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(1, 300),
    st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    st.sampled_from([0.0, 1e-3, 0.1, 1.0, 30.0]),
)
def test_every_token_is_that_of_the_plain_formulas(seed, rows, vocab, spread, change):
    material = pair(seed, rows, vocab, spread, change)
    expected, found = plainly(*material), fed(*material).per_token()
    for name in ("reference_nll", "nll"):
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.kl, expected["kl"], rtol=1e-5, atol=1e-14)
    np.testing.assert_array_equal(found.same_top, expected["same_top"])
    assert (found.kl >= 0).all()


@pytest.mark.parametrize("vocab", [50, 5000])
@pytest.mark.parametrize("change, allowed", [(1e-6, 3e-3), (1e-5, 2e-4), (1e-4, 1e-5), (1e-2, 2e-6)])
def test_tiny_divergences_keep_their_digits(vocab, change, allowed):
    material = pair(1, 40, vocab, 2.0, change)
    expected, found = plainly(*material)["kl"], fed(*material).per_token().kl
    np.testing.assert_allclose(found, expected, rtol=allowed, atol=0)


def test_equal_logits_diverge_by_nothing():
    reference, _, targets = pair(2, 20, 1000, 5.0, 0)
    summary = fed(reference, reference, targets).summary()
    for name in ("mean_kl", "max_kl", "ln_perplexity_ratio", "rms_delta_p"):
        assert summary[name].value == 0
    assert summary["top1_agreement"] == summary["perplexity_ratio"] == Estimate(1, 0)


def test_a_constant_added_to_logits_changes_nothing():
    reference, artefact, targets = pair(3, 20, 100, 2.0, 0.1)
    np.testing.assert_allclose(
        fed(reference, artefact + 64, targets).per_token().kl,
        fed(reference, artefact, targets).per_token().kl,
        rtol=2e-4,  # 64 costs the logits six bits
    )


def test_tokens_ruled_out_by_either_model():
    inf = float("inf")
    reference = torch.tensor([[0.0, 0, -inf], [0, 0, -inf], [0, 0, 0], [0, -300, 0]])
    artefact = torch.tensor([[0.0, 0, -inf], [0, 0, 0], [0, 0, -inf], [0, 0, 0]])
    found = fed(reference, artefact, torch.zeros(4, dtype=torch.int64)).per_token().kl
    np.testing.assert_allclose(found, [0, np.log(1.5), np.inf, np.log(1.5)], rtol=1e-6)


@pytest.mark.parametrize("temporaries", [1, 100_000])
def test_pieces_do_not_change_the_figures(temporaries, monkeypatch):
    material = pair(4, 50, 700, 3.0, 0.2)
    whole = fed(*material).per_token()
    monkeypatch.setattr(divergence, "TEMPORARIES", temporaries)
    pieces = Divergence()
    for rows in (slice(0, 1), slice(1, 30), slice(30, 30), slice(30, 50)):
        pieces.add(*(x[rows] for x in material))
    for name in ("reference_nll", "nll", "kl", "same_top"):
        np.testing.assert_allclose(getattr(pieces.per_token(), name), getattr(whole, name), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory in /proc")
def test_memory_beside_the_logits(root):
    """Of a process of its own: the C library's heap must not grow either, as it does between kept fragments."""
    code = """if True:
        import re, torch
        from pathlib import Path
        from llmcompress.divergence import Divergence, Perplexity
        def peak(): return int(re.search("VmHWM:[^0-9]*([0-9]+)", Path("/proc/self/status").read_text())[1])
        figures, one = Divergence(), Perplexity()
        reference, targets = torch.randn(60, 100_000), torch.arange(60)
        artefact = reference.flip(1)
        figures.add(reference[:9, :99], artefact[:9, :99], targets[:9])  # what the libraries load on first use
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        for _ in range(4):
            figures.add(reference, artefact, targets)
            one.add(reference, targets)
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024


def test_half_precision_logits_count_as_their_float32_values():
    reference, artefact, targets = pair(5, 10, 100, 2.0, 0.1)
    halves = fed(reference.bfloat16(), artefact.half(), targets)
    singles = fed(reference.bfloat16().float(), artefact.half().float(), targets)
    np.testing.assert_array_equal(halves.per_token().kl, singles.per_token().kl)


def test_errors_are_those_of_many_samples():
    """Spread of each figure over 400 samples against the mean of the errors that each sample gives."""
    names = [
        "perplexity",
        "perplexity_difference",
        "ln_perplexity_ratio",
        "perplexity_ratio",
        "mean_kl",
        "median_kl",
        "kl_90",
        "kl_95",
    ]
    names += ["top1_agreement", "rms_delta_p", "mean_delta_p"]
    reference, artefact, targets = pair(6, 400 * 400, 6, 1.0, 0.5)
    drawn = [slice(first, first + 400) for first in range(0, len(targets), 400)]
    samples = [fed(*(x[rows] for x in (reference, artefact, targets))).summary() for rows in drawn]
    for name in names:
        spread = np.std([sample[name].value for sample in samples])
        error = np.mean([sample[name].error for sample in samples])
        assert spread == pytest.approx(error, rel=0.15), name


def test_the_paired_error_is_llama_cpps_formula():
    figures = fed(*pair(7, 200, 50, 2.0, 0.3))
    x, y = figures.per_token().nll, figures.per_token().reference_nll
    covariance = np.cov(x, y) / len(x)
    expected = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert figures.summary()["ln_perplexity_ratio"].error == pytest.approx(expected)


def test_quantiles_by_hand():
    kl = np.arange(101.0) ** 2
    assert divergence._quantile(kl, 0.5).value == 2500
    assert divergence._quantile(kl, 0.955).value == pytest.approx((95**2 + 96**2) / 2)
    ranks = np.sqrt(101 * 0.9 * 0.1)  # either side of 90
    low, high = np.interp([90 - ranks, 90 + ranks], np.arange(101), kl)
    assert divergence._quantile(kl, 0.9).error == pytest.approx((high - low) / 2)
    assert divergence._quantile(kl, 0.999) == Estimate(pytest.approx(kl[-1], rel=0.01), None)


def test_one_token_has_no_errors():
    summary = fed(*pair(8, 1, 10, 1.0, 0.1)).summary()
    assert all(estimate.error is None for estimate in summary.values())
    assert summary["tokens"].value == 1 and summary["max_kl"].value == summary["mean_kl"].value > 0


def test_perplexity_of_one_model():
    reference, artefact, targets = pair(9, 60, 40, 2.0, 0.1)
    alone = Perplexity()
    alone.add(artefact[:7], targets[:7])
    alone.add(artefact[7:], targets[7:])
    expected = torch.nn.functional.cross_entropy(artefact.double(), targets).exp()
    assert alone.summary()["perplexity"].value == pytest.approx(float(expected), rel=1e-6)
    assert alone.summary()["perplexity"].error == pytest.approx(
        fed(reference, artefact, targets).summary()["perplexity"].error
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_numbers_are_counted_and_named(value):
    reference, artefact, targets = pair(10, 20, 30, 1.0, 0.1)
    figures = fed(reference, artefact, targets)
    artefact[[5, 12], 3] = value
    with pytest.raises(RunError, match="the artefact gave NaN or infinite logits for 2 of 20.* token 25;"):
        figures.add(reference, artefact, targets)
    with pytest.raises(RunError, match="the reference"):
        figures.add(artefact, reference, targets)
    with pytest.raises(RunError, match="the model gave .* token 5;"):
        Perplexity().add(artefact, targets)


def test_a_row_without_any_probability():
    reference, artefact, targets = pair(11, 3, 30, 1.0, 0.1)
    artefact[2] = -float("inf")
    with pytest.raises(RunError, match="for 1 of 3 tokens, the first is token 2"):
        fed(reference, artefact, targets)


def test_what_does_not_fit_together():
    reference, artefact, targets = pair(12, 4, 30, 1.0, 0.1)
    with pytest.raises(RunError, match=r"\(4, 30\) of the reference and \(4, 29\)"):
        fed(reference, artefact[:, 1:], targets)
    with pytest.raises(RunError, match=r"one target for each row, not \(3,\)"):
        fed(reference, artefact, targets[1:])
    with pytest.raises(RunError, match="token 30 has no logit among 30"):
        fed(reference, artefact, targets * 0 + 30)
    with pytest.raises(RunError, match="0 tokens"):
        Divergence().summary()


def printed_figures(path: Path) -> dict[str, tuple[float, float | None]]:
    lines = re.findall(r"^ *(\S.*?) *: +(-?[\d.]+)(?: ± +([\d.]+))?", path.read_text(), re.MULTILINE)
    return {
        re.sub(" +", " ", name): (float(value), float(error) if error else None)
        for name, value, error in lines
    }


@pytest.fixture(scope="module")
def logits(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """float32 (chunks, rows, vocab) of the two models of tests/golden/logits, computed by llama.cpp."""
    folder = tmp_path_factory.mktemp("models")
    source = root / "tests" / "data" / "stories260K"
    shutil.copytree(source, folder / "coarse")
    coarse = {
        name: x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        for name, x in load_file(source / "model.safetensors").items()
    }
    save_file(coarse, folder / "coarse" / "model.safetensors")
    with LogitsReader(root / "tests" / "golden" / "logits" / "stories260K.logits") as base:
        windows = base.tokens.copy()
    computed = {}
    for name, model in (("reference", source), ("artefact", folder / "coarse")):
        llmcompress.quantize(model, folder / f"{name}.gguf", type="F32")
        with Model(folder / f"{name}.gguf", context=windows.shape[1]) as engine:
            windows[:, 0] = engine.tokenize("", add_special=True)  # as llama-perplexity does
            computed[name] = np.stack([engine.logits(ids)[scored_positions(len(ids))] for ids in windows])
    return computed


@pytest.mark.parametrize("source", ["logits", "file"])
def test_the_figures_are_those_llama_perplexity_prints(source, logits, root):
    figures = Divergence()
    with LogitsReader(root / "tests" / "golden" / "logits" / "stories260K.logits") as base:
        for chunk, log_probs in enumerate(base):
            targets = torch.from_numpy(base.targets(chunk).astype(np.int64))
            artefact = torch.from_numpy(logits["artefact"][chunk])
            if source == "file":
                figures.add_log_probs(torch.from_numpy(log_probs), artefact, targets)
            else:
                figures.add(torch.from_numpy(logits["reference"][chunk]), artefact, targets)
    printed, summary = (
        printed_figures(root / "tests" / "golden" / "logits" / "divergence.txt"),
        figures.summary(),
    )
    # From the file only the printed digits differ (and the CPU's sums), from logits the 16 bits of the file, too.
    digits = {"file": 3e-5, "logits": 2e-4}[source]
    for name, (label, divisor) in PRINTED.items():
        value, error = printed[label]
        slack = digits * SIZE.get(name, 1)
        assert summary[name].value == pytest.approx(value / divisor, rel=digits, abs=slack), name
        if error and not name.startswith(("median", "kl_")):
            assert summary[name].error == pytest.approx(error / divisor, rel=digits, abs=slack), name


def test_the_file_holds_the_log_probabilities_of_the_model(logits, root):
    with LogitsReader(root / "tests" / "golden" / "logits" / "stories260K.logits") as base:
        for chunk, log_probs in enumerate(base):
            exact = torch.from_numpy(logits["reference"][chunk]).log_softmax(1).numpy()
            kept = np.maximum(exact, exact.max(1, keepdims=True) - 16)
            np.testing.assert_allclose(log_probs, kept, rtol=0, atol=2e-4)
