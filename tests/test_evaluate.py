"""Evaluation against plain computations with whole models, against llama.cpp, and of every kind of artefact."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from llama_cpp import Model
from llmcompress.converters import evaluation
from llmcompress.converters.evaluation import EvaluationOptions, EvaluationReport, evaluate_model
from llmcompress.converters.from_gguf import DecodedGGUF
from safetensors.numpy import load_file, save_file
from test_divergence import PRINTED, SIZE, printed_figures
from tiny_models import BYTE_BPE, SENTENCEPIECE, build

import llmcompress
from llmcompress.blocks import Lockstep
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import GGUFError, LlmcompressError, RunError
from llmcompress.evaluate import WINDOWS, scored
from llmcompress.gguf.reader import open_shards
from llmcompress.logits_file import LogitsFileError, LogitsReader
from llmcompress.progress import Progress

CHUNK = 128
TOKENS = 8 * CHUNK + 37  # the last window of transformers' style is a short one
Rows = Sequence[np.ndarray]


@pytest.fixture(scope="module")
def sample(root: Path) -> Path:
    return root / "examples" / "sample-llama-6m"


@pytest.fixture(scope="module")
def text(root: Path) -> Path:
    return root / "tests" / "data" / "richard-iii.txt"


@pytest.fixture(scope="module")
def options(text: Path) -> EvaluationOptions:
    return EvaluationOptions(data=(str(text),), tokens=TOKENS, chunk=CHUNK)


@pytest.fixture(scope="module")
def files(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """GGUF files of the sample model, by type."""
    types = ["F32", "Q4_0", "Q3_K_M"]
    out = tmp_path_factory.mktemp("sample") / "{type}.gguf"
    return dict(zip(types, llmcompress.quantize(sample, out, type=types, verify="off").paths))


def evaluated(artefact: Path, reference: Path | None, options: EvaluationOptions) -> EvaluationReport:
    return evaluate_model(str(artefact), str(reference) if reference else None, options, Progress())


def values(report: EvaluationReport) -> dict[str, float]:
    """All but a difference, whose terms are there and have the digits it lacks."""
    figures = report.evaluation.figures
    return {name: figure.value for name, figure in figures.items() if name != "perplexity_difference"}


def windows_by_hand(model: Path, text: Path, style: str, chunk: int, tokens: int) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    written = text.read_text()
    if style == "transformers":
        ids = tokenizer(written)["input_ids"][:tokens]
        return [ids[at : at + chunk] for at in range(0, len(ids), chunk)]
    ids = tokenizer(written.removesuffix("\n"), split_special_tokens=True)["input_ids"]
    rows = [ids[at : at + chunk] for at in range(0, tokens - chunk + 1, chunk)]
    bos = tokenizer("")["input_ids"][:1]
    return [bos + row[1:] if bos else row for row in rows]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def scored_log_probs(logits_of: Callable, rows: Rows, style: str) -> tuple[np.ndarray, np.ndarray]:
    """float64 log-probabilities (n, vocab) of all positions that count, and the tokens that follow, (n,)."""
    found, targets = [], []
    for row in rows:
        first = len(row) // 2 if style == "llama.cpp" else 0
        found.append(log_softmax(logits_of(row)[first:-1]))
        targets += list(row[first + 1 :])
    return np.concatenate(found), np.array(targets)


def perplexity(logits_of: Callable, rows: Rows, style: str) -> float:
    log_probs, targets = scored_log_probs(logits_of, rows, style)
    return float(np.exp(-log_probs[np.arange(len(targets)), targets].mean()))


def by(network: transformers.PreTrainedModel) -> Callable[[Sequence[int]], np.ndarray]:
    def logits_of(row: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            return network(torch.tensor([list(row)])).logits[0].float().numpy()

    return logits_of


def loaded(model: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def decoded(gguf: Path, model: Path) -> transformers.PreTrainedModel:
    """The model with the weights of the GGUF, by torch's own load_state_dict."""
    network = loaded(model)
    with Checkpoint.open(model) as checkpoint, DecodedGGUF.open(gguf, checkpoint) as weights:
        state = {
            name: torch.from_numpy(weights.read(name)).view(info.shape)
            for name, info in weights.index.items()
        }
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return network


def figures_by_hand(
    reference: Callable, artefact: Callable, rows: Rows, style: str
) -> dict[str, float]:  # the formulas of `divergence.py`'s docstring, on whole arrays
    log_p, targets = scored_log_probs(reference, rows, style)
    log_q, _ = scored_log_probs(artefact, rows, style)
    at = np.arange(len(targets)), targets
    kl = (np.exp(log_p) * (log_p - log_q)).sum(1)
    delta_p = np.exp(log_q[at]) - np.exp(log_p[at])
    shares = {"median_kl": 0.5, "kl_90": 0.9, "kl_95": 0.95, "kl_99": 0.99, "kl_99_9": 0.999}
    return {
        "tokens": len(targets),
        "reference_perplexity": np.exp(-log_p[at].mean()),
        "perplexity": np.exp(-log_q[at].mean()),
        "ln_perplexity_ratio": (log_p[at] - log_q[at]).mean(),
        "perplexity_ratio": np.exp((log_p[at] - log_q[at]).mean()),
        "mean_kl": kl.mean(),
        "max_kl": kl.max(),
        "top1_agreement": (log_p.argmax(1) == log_q.argmax(1)).mean(),
        "rms_delta_p": np.sqrt((delta_p**2).mean()),
        "mean_delta_p": delta_p.mean(),
    } | {name: np.quantile(kl, share) for name, share in shares.items()}


def hidden_errors_by_hand(
    reference: transformers.PreTrainedModel, artefact: transformers.PreTrainedModel, rows: Rows
) -> list[float]:
    """Behind every block but the last, whose output `output_hidden_states` shows after the final norm."""
    blocks = reference.config.num_hidden_layers
    difference, size = np.zeros(blocks - 1), np.zeros(blocks - 1)
    for row in rows:
        ids = torch.tensor([list(row)])
        with torch.no_grad():
            wanted = reference(ids, output_hidden_states=True).hidden_states[1:blocks]
            got = artefact(ids, output_hidden_states=True).hidden_states[1:blocks]
        difference += [float((a - b).double().square().sum()) for a, b in zip(got, wanted)]
        size += [float(b.double().square().sum()) for b in wanted]
    return list(np.sqrt(difference / size))


# An F32 file is the model


@pytest.fixture(scope="module", params=["sample", "gemma3", "qwen3moe-fused"])
def exact(request, sample: Path, files, root: Path, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint and its F32 GGUF: full attention, sliding windows, experts."""
    if request.param == "sample":
        return sample, files["F32"]
    folder = tmp_path_factory.mktemp(request.param)
    tokenizers = {BYTE_BPE: sample, SENTENCEPIECE: root / "tests" / "data" / "stories260K"}
    model = build(request.param, folder / "tiny", tokenizers)
    (path,) = llmcompress.quantize(model, folder / "F32.gguf", type="F32", verify="off").paths
    return model, path


@pytest.mark.slow
@pytest.mark.parametrize("style", WINDOWS)
def test_perplexity_of_an_f32_file(style: str, exact: tuple[Path, Path], text: Path, options) -> None:
    """As by transformers on the checkpoint, and as by llama.cpp on the file."""
    model, gguf = exact
    report = evaluated(gguf, model, replace(options, windows=style))
    found, rows = values(report), windows_by_hand(model, text, style, CHUNK, TOKENS)
    assert [list(row) for row in report.windows.rows] == rows
    assert found["tokens"] == sum(len(range(len(row))[scored(len(row), style)]) for row in rows)
    plainly = perplexity(by(loaded(model)), rows, style)
    assert found["perplexity"] == pytest.approx(plainly, rel=1e-4)
    assert found["reference_perplexity"] == pytest.approx(plainly, rel=1e-4)
    assert 0 <= found["mean_kl"] <= found["max_kl"] < 1e-8 and found["top1_agreement"] == 1
    assert max(report.evaluation.hidden_errors.values()) < 1e-6
    with Model(gguf, context=CHUNK) as engine:
        assert found["perplexity"] == pytest.approx(perplexity(engine.logits, rows, style), rel=5e-3)


# A quantized file


@pytest.mark.slow
@pytest.mark.parametrize("type, style", [("Q4_0", "transformers"), ("Q3_K_M", "llama.cpp")])
def test_figures_of_a_quantized_file_are_those_of_whole_models(
    type: str, style: str, sample: Path, files, options
) -> None:
    report = evaluated(files[type], sample, replace(options, windows=style))
    reference, artefact = loaded(sample), decoded(files[type], sample)
    expected = figures_by_hand(by(reference), by(artefact), report.windows.rows, style)
    assert values(report) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    errors = list(report.evaluation.hidden_errors.values())
    by_hand = hidden_errors_by_hand(reference, artefact, report.windows.rows)
    assert errors[:-1] == pytest.approx(by_hand, rel=1e-4)
    assert len(errors) == reference.config.num_hidden_layers and errors[-1] > errors[0] > 0.01
    assert list(report.evaluation.hidden_errors)[0] == "model.layers.0"


@pytest.mark.slow
def test_fewer_bits_are_further_away(sample: Path, files, options) -> None:
    four, three = (evaluated(files[type], sample, options) for type in ("Q4_0", "Q3_K_M"))
    assert 0 < values(four)["mean_kl"] < values(three)["mean_kl"]
    *_, last = four.evaluation.hidden_errors  # of the first blocks Q3_K_M keeps some tensors in more bits
    assert 0 < four.evaluation.hidden_errors[last] < three.evaluation.hidden_errors[last]


@pytest.mark.slow
def test_batches_and_spilled_states_do_not_change_the_figures(sample, files, options, monkeypatch) -> None:
    whole = evaluated(files["Q4_0"], sample, options)
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", 1)
    single = evaluated(files["Q4_0"], sample, replace(options, hidden_ram=2**16))
    assert values(single) == pytest.approx(values(whole), rel=1e-4, abs=1e-7)
    assert single.evaluation.hidden_errors == pytest.approx(whole.evaluation.hidden_errors, rel=1e-5)


def test_logits_of_one_batch_at_a_time(sample, files, options, monkeypatch) -> None:
    """Beside those that are computed only the other model's, of no more bytes than LOGITS_BYTES."""
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", 2 * CHUNK * 4096 * 4)
    made: list[weakref.ref] = []
    alive, rows = [], []
    logits_of = Lockstep._logits

    def watched(self: Lockstep, batch: int) -> torch.Tensor:
        alive.append(sum(logits() is not None for logits in made))
        logits = logits_of(self, batch)
        made.append(weakref.ref(logits))
        rows.append(len(logits))
        assert logits.nbytes <= evaluation.LOGITS_BYTES
        return logits

    monkeypatch.setattr(Lockstep, "_logits", watched)
    evaluated(files["Q4_0"], sample, options)
    assert alive == [0, 1] * (len(alive) // 2) and len(alive) > 4 and max(rows) > 1


@pytest.mark.slow
def test_shards_and_a_file_of_any_name(sample: Path, files, options, tmp_path: Path) -> None:
    options = replace(options, tokens=2 * CHUNK)
    expected = evaluated(files["Q4_0"], sample, options)
    shards = llmcompress.quantize(
        sample, tmp_path / "split.gguf", type="Q4_0", split_max_size="1M", verify="off"
    ).paths
    assert len(open_shards(shards[0])) > 2
    renamed = shutil.copy(files["Q4_0"], tmp_path / "model")
    for path in (shards[1], renamed):
        assert evaluated(path, sample, options).evaluation == expected.evaluation


# Checkpoints


@pytest.fixture
def perturbed(sample: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(sample, tmp_path / "perturbed")
    random = np.random.default_rng(5)
    state = load_file(copy / "model.safetensors")
    for name, weights in state.items():
        state[name] = (
            weights.astype(np.float32) * (1 + 0.02 * random.standard_normal(weights.shape))
        ).astype(weights.dtype)
    save_file(state, copy / "model.safetensors")
    return copy


def test_a_checkpoint_as_artefact(sample: Path, perturbed: Path, options) -> None:
    report = evaluated(perturbed, sample, options)
    rows = report.windows.rows
    expected = figures_by_hand(by(loaded(sample)), by(loaded(perturbed)), rows, "transformers")
    assert expected["mean_kl"] > 1e-5
    assert values(report) == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_first_block_that_is_not_finite_is_named(value, sample: Path, perturbed: Path, options) -> None:
    state = load_file(perturbed / "model.safetensors")
    state["model.layers.3.mlp.down_proj.weight"][7, 5] = value
    save_file(state, perturbed / "model.safetensors")
    for models, whose in (((perturbed, sample), "artefact"), ((sample, perturbed), "reference")):
        with pytest.raises(RunError, match=f"model.layers.3: its output in the {whose} holds a NaN or inf"):
            evaluated(*models, options)
    with pytest.raises(RunError, match="NaN or infinite logits"):
        evaluated(perturbed, None, options)


def test_a_checkpoint_alone_has_its_perplexity(sample: Path, options) -> None:
    report = evaluated(sample, None, options)
    assert set(values(report)) == {"tokens", "perplexity"} and not report.evaluation.hidden_errors
    assert values(report)["perplexity"] == pytest.approx(
        perplexity(by(loaded(sample)), report.windows.rows, "transformers"), rel=1e-5
    )


@pytest.mark.slow
def test_a_bitsandbytes_checkpoint(sample: Path, options, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    network = transformers.AutoModelForCausalLM.from_pretrained(
        sample, dtype=torch.float32, quantization_config=config
    )
    network.save_pretrained(tmp_path)  # before it runs, which would pack the weights anew
    for file in sample.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    report = evaluated(tmp_path, sample, options)
    artefact = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dequantize().eval()
    )
    rows = report.windows.rows
    expected = figures_by_hand(by(loaded(sample)), by(artefact), rows, "transformers")
    assert 1e-4 < expected["mean_kl"] < 0.1
    assert values(report) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert len(report.evaluation.hidden_errors) == network.config.num_hidden_layers


@pytest.mark.slow
def test_half_precision_is_near(sample: Path, files, options) -> None:
    single, half = (
        evaluated(files["Q4_0"], sample, replace(options, dtype=dtype)) for dtype in ("f32", "bf16")
    )
    assert half.as_dict()["dtype"] == "bf16"
    assert values(half)["perplexity"] == pytest.approx(values(single)["perplexity"], rel=0.02)
    assert values(half)["perplexity"] != values(single)["perplexity"]


# Files of logits


@pytest.fixture
def saved(sample: Path, files, options, tmp_path: Path) -> tuple[Path, EvaluationReport]:
    """The sample model's logits, and the figures of Q3_K_M beside it."""
    path = tmp_path / "sample.logits"
    options = replace(options, windows="llama.cpp", save_logits=str(path))
    return path, evaluated(files["Q3_K_M"], sample, options)


def test_saved_logits_stand_for_the_reference(saved, sample: Path, files) -> None:
    path, beside = saved
    with LogitsReader(path) as file:
        assert np.array_equal(file.tokens, np.stack(beside.windows.rows))
    against = evaluated(files["Q3_K_M"], sample, EvaluationOptions(base=str(path)))
    assert against.windows.style == "llama.cpp" and against.windows.chunk == CHUNK
    assert not against.evaluation.hidden_errors and against.reference == str(path)
    # Codes of 16 bits; and the divergence leaves out what is below −16.
    assert values(against) == pytest.approx(values(beside), rel=2e-3, abs=2e-4)
    part = evaluated(files["Q3_K_M"], sample, EvaluationOptions(base=str(path), tokens=3 * CHUNK + 5))
    assert len(part.windows.rows) == 3 and values(part)["tokens"] == 3 * (CHUNK // 2 - 1)


def test_logits_of_a_model_alone(saved, sample: Path, options, tmp_path: Path) -> None:
    path = tmp_path / "alone.logits"
    evaluated(sample, None, replace(options, windows="llama.cpp", save_logits=str(path)))
    assert path.read_bytes() == saved[0].read_bytes()


def test_llama_perplexitys_file_gives_the_figures_it_prints(root: Path, tmp_path: Path) -> None:
    golden = root / "tests" / "golden" / "logits"
    model = root / "tests" / "data" / "stories260K"
    coarse = shutil.copytree(model, tmp_path / "coarse")
    state = {
        name: weights.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        for name, weights in load_file(coarse / "model.safetensors").items()
    }
    save_file(state, coarse / "model.safetensors")
    (gguf,) = llmcompress.quantize(coarse, tmp_path / "coarse.gguf", type="F32", verify="off").paths
    report = evaluated(gguf, model, EvaluationOptions(base=str(golden / "stories260K.logits")))
    printed = printed_figures(golden / "divergence.txt")
    for name, (label, divisor) in PRINTED.items():
        value, error = printed[label]
        found, slack = report.evaluation.figures[name], 5e-5 * SIZE.get(name, 1)
        assert found.value == pytest.approx(value / divisor, rel=5e-5, abs=slack), name
        if error and not name.startswith(("median", "kl_")):
            assert found.error == pytest.approx(error / divisor, rel=5e-5, abs=slack), name


# How much text


@pytest.mark.parametrize(
    "style, tokens, lengths",
    [
        ("transformers", 300, [128, 128, 44]),
        ("transformers", 257, [128, 128]),  # the last one would be one token, which predicts nothing
        ("transformers", 256, [128, 128]),
        ("transformers", 50, [50]),
        ("llama.cpp", 383, [128, 128]),
        ("llama.cpp", 128, [128]),
    ],
)
def test_no_more_tokens_than_asked(style, tokens, lengths, sample: Path, options) -> None:
    report = evaluated(sample, None, replace(options, windows=style, tokens=tokens))
    assert [len(row) for row in report.windows.rows] == lengths
    assert report.as_dict()["tokens"] == sum(lengths)


def test_all_of_a_text_by_default(sample: Path, options, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("My lord, the king is dead.\n")
    options = replace(options, data=(str(tmp_path / "short.txt"),), tokens=None)
    ids = transformers.AutoTokenizer.from_pretrained(sample)("My lord, the king is dead.\n")["input_ids"]
    report = evaluated(sample, None, options)
    assert [list(row) for row in report.windows.rows] == [ids]
    assert values(report)["tokens"] == len(ids) - 1


def test_several_texts_and_the_bundled_one(sample: Path, options, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"This is text {name}.")
    both = tuple(str(tmp_path / f"{name}.txt") for name in ("one", "two"))
    report = evaluated(sample, None, replace(options, data=both, tokens=None))
    written = transformers.AutoTokenizer.from_pretrained(sample).decode(report.windows.rows[0])
    assert written.endswith("This is text one.\n\nThis is text two.") and not report.notes
    bundled = evaluated(sample, None, EvaluationOptions(tokens=32, chunk=16))
    assert any("bundled calibration text" in note for note in bundled.notes)


# Tasks


CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{passage}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture
def tasks(text: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [line for line in text.read_text().splitlines() if len(line) > 30][:24]
    with open(folder / "questions.jsonl", "w") as file:
        for number, (line, other) in enumerate(zip(lines, lines[1:] + lines[:1])):
            cut = line.rindex(" ")
            choices = [line[cut:], other[other.rindex(" ") :]]
            record = {"question": line[:cut], "choices": choices, "answer": 0, "passage": line}
            file.write(json.dumps(record) + "\n")
    (folder / "choice.yaml").write_text(CHOICE.replace("FOLDER", str(folder)))
    (folder / "rolling.yaml").write_text(ROLLING.replace("FOLDER", str(folder)))
    (folder / "broken.yaml").write_text(
        CHOICE.replace("FOLDER", str(folder / "nowhere")).replace("tiny_choice", "broken")
    )
    return folder


@pytest.mark.slow
def test_tasks_of_lm_evaluation_harness(tasks: Path, sample: Path, files, options) -> None:
    """An F32 file scores as the checkpoint does in the harness's own hands; a Q3_K_M file beside its reference."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    options = replace(options, tokens=2 * CHUNK, tasks=("tiny_choice", "tiny_r*"), tasks_path=str(tasks))
    report = evaluated(files["F32"], sample, options)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    direct = lm_eval.simple_evaluate(
        HFLM(pretrained=loaded(sample), tokenizer=transformers.AutoTokenizer.from_pretrained(sample)),
        tasks=["tiny_choice", "tiny_rolling"], task_manager=manager,
    )["results"]  # fmt: skip
    assert set(report.tasks) == {"tiny_choice", "tiny_rolling"}
    for task, metric in (("tiny_choice", "acc,none"), ("tiny_rolling", "word_perplexity,none")):
        assert report.tasks[task][metric] == pytest.approx(direct[task][metric], rel=1e-5)
        assert report.reference_tasks[task][metric] == pytest.approx(direct[task][metric], rel=1e-5)
    assert 0 < report.tasks["tiny_choice"]["acc,none"] < 1
    coarse = evaluated(files["Q3_K_M"], sample, replace(options, tasks=("tiny_rolling",)))
    worse, exact = (
        of["tiny_rolling"]["word_perplexity,none"] for of in (coarse.tasks, coarse.reference_tasks)
    )
    assert exact == pytest.approx(direct["tiny_rolling"]["word_perplexity,none"], rel=1e-5)
    assert worse != pytest.approx(exact, rel=1e-3)


def test_tasks_that_are_not_there(tasks: Path, sample: Path, options) -> None:
    pytest.importorskip("lm_eval")
    options = replace(options, tasks_path=str(tasks))
    for names, message in (
        (("tiny_chioce",), "did you mean 'tiny_choice'"),
        (("broken",), "--tasks broken: cannot be loaded: "),
    ):
        with pytest.raises(LlmcompressError, match=message):
            evaluated(sample, None, replace(options, tasks=names))
    with pytest.raises(LlmcompressError, match="nowhere: no such folder"):
        evaluated(sample, None, replace(options, tasks=("a",), tasks_path=str(tasks / "nowhere")))


# What does not go together


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"windows": "lama.cpp"}, "--windows lama.cpp: .*did you mean 'llama.cpp'"),
        ({"dtype": "fp16"}, "--dtype fp16: is none of f32, mixed, bf16, f16; did you mean 'f16'"),
        ({"windows": "llama.cpp", "chunk": 2}, "--chunk 2: .* from 3 on"),
        ({"save_logits": "x.logits"}, "--save-logits: .* add --windows llama.cpp"),
        ({"base": "x.logits"}, "--data: not with --kl-divergence-base"),
        ({"base": "x", "data": ("default",), "save_logits": "y"}, "--save-logits: not with"),
        ({"tasks_path": "x"}, "--tasks-path x: name its tasks with --tasks"),
        ({"tokens": 1}, "1 tokens: a window in the style of transformers needs 2"),
        ({"tokens": 100, "windows": "llama.cpp"}, "100 tokens: .* llama.cpp needs 128"),
        ({"chunk": 1025, "tokens": None}, "1024 positions; give --chunk 1024"),
        ({"device": "cuda:77"}, "--device cuda:77"),
        ({"data": ("prose=2",)}, "--data prose=2: texts are evaluated whole"),
    ],
)
def test_options_that_cannot_be(changes: dict, message: str, sample: Path, options) -> None:
    with pytest.raises(LlmcompressError, match=message):
        evaluated(sample, None, replace(options, **changes))


def test_artefacts_that_are_not_the_references(sample, files, options, root, tmp_path: Path) -> None:
    stories = root / "tests" / "data" / "stories260K"
    for artefact, reference, kind, message in (
        (files["Q4_0"], None, LlmcompressError, "give --reference"),
        (
            files["Q4_0"],
            files["F32"],
            LlmcompressError,
            "F32.gguf: a file; give the Hugging Face model's folder",
        ),
        (files["Q4_0"], stories, GGUFError, "llama.block_count is 6 in the GGUF, 5"),
        (tmp_path / "nowhere.gguf", sample, GGUFError, "No such file"),
        (sample / "config.json", sample, GGUFError, "is not a GGUF file"),
        (stories, sample, LlmcompressError, "the model has 512 tokens; are both of the same model"),
    ):
        with pytest.raises(kind, match=message):
            evaluated(artefact, reference, options)


@pytest.mark.slow
def test_a_model_of_fewer_layers_is_held_against_its_reference(sample: Path, options, tmp_path: Path) -> None:
    shallow = shutil.copytree(sample, tmp_path / "shallow")
    config = json.loads((shallow / "config.json").read_text())
    (shallow / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    found, alone = evaluated(shallow, sample, options), evaluated(shallow, None, options)
    figures = found.evaluation.figures
    assert figures["perplexity"] == alone.evaluation.figures["perplexity"]
    assert figures["mean_kl"].value > 0.1 and found.evaluation.hidden_errors == {}


@pytest.fixture
def larger(sample: Path, tmp_path: Path) -> Path:
    """The sample model with eight tokens more."""
    network = loaded(sample)
    network.resize_token_embeddings(network.config.vocab_size + 8, mean_resizing=False)
    network.save_pretrained(tmp_path / "larger")
    for file in sample.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "larger")
    return tmp_path / "larger"


def test_vocabularies_that_differ(sample: Path, larger: Path, saved, options, monkeypatch) -> None:
    monkeypatch.setattr(Lockstep, "start", None)  # found out before anything runs
    size = json.loads((sample / "config.json").read_text())["vocab_size"]
    message = f"the artefact has {size + 8} tokens in its vocabulary, its reference {size};"
    with pytest.raises(RunError, match=message):
        evaluated(larger, sample, options)
    with pytest.raises(RunError, match=message):
        evaluated(larger, None, EvaluationOptions(base=str(saved[0])))


def test_a_base_that_is_none(sample: Path) -> None:
    with pytest.raises(LogitsFileError, match="is it a file of logits"):
        evaluated(sample, None, EvaluationOptions(base=str(sample / "tokenizer.json")))
