"""The programs in tools/: the synthetic checkpoint is a model others load, and the benchmark runs whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import ROOT
from safetensors import safe_open
from tokenizers import Tokenizer

from llmcompress.stats import Statistics, TensorStats

sys.path.insert(0, str(ROOT / "tools"))
import bench_calibrate
import measure
import synthetic

BLOCK = 256  # weights of a K type's super-block


def run_tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "tools" / name, *arguments], capture_output=True, text=True)


def test_tinyllama_is_the_real_ones_size() -> None:
    assert synthetic.shape_of("tinyllama").weights == 1_100_048_384  # as its model card has it


@pytest.mark.parametrize("size", ["1m", "10m", "50m", "200m", "1.1b", "3b", "13b", "70b"])
def test_a_size_is_met_by_a_shape_that_k_types_hold(size: str) -> None:
    shape = synthetic.shape_of(size)
    wanted = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert abs(shape.weights - wanted) < 0.1 * wanted
    assert shape.hidden % BLOCK == shape.ffn % BLOCK == 0
    assert shape.hidden // synthetic.HEAD % shape.kv_heads == 0


def test_half_a_billion_weights_of_qwen_s_widths() -> None:
    shape = synthetic.shape_of("0.5b")
    assert (shape.hidden, shape.ffn, shape.kv_heads) == (896, 4864, 2)
    assert abs(shape.weights - 5e8) < 0.01 * 5e8
    assert shape.hidden // synthetic.HEAD % shape.kv_heads == 0


def test_transformers_loads_a_sharded_synthetic_checkpoint(tmp_path: Path) -> None:
    done = run_tool("synthetic.py", tmp_path / "model", "--size", "1m", "--shard-size", "500K")
    assert done.returncode == 0, done.stderr
    shape = synthetic.shape_of("1m")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 2
    found = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == dict(shape.tensors())
    assert found["lm_head.weight"].float().std().item() == pytest.approx(synthetic.DEVIATION, rel=0.02)
    assert found["model.norm.weight"].float().mean().item() == pytest.approx(1.0, abs=0.01)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(weights.numel() for weights in model.parameters()) == shape.weights
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.vocab_size == synthetic.TOKENIZER_SIZE


def test_a_size_that_is_none_is_refused(tmp_path: Path) -> None:
    done = run_tool("synthetic.py", tmp_path / "model", "--size", "huge")
    assert done.returncode == 2 and "--size huge" in done.stderr
    assert not (tmp_path / "model").exists()


def test_measure_sees_memory_and_processor_time(tmp_path: Path) -> None:
    code = "held = b'x' * 300_000_000; sum(range(9_000_000)); open(sys.argv[1], 'wb').write(b'12345')"
    idle = measure.measure([sys.executable, "-c", "import time; time.sleep(0.5)"])
    out = tmp_path / "out"
    busy = measure.measure([sys.executable, "-c", f"import sys; {code}", out], out=out)
    assert idle.seconds >= 0.5 > idle.cpu
    assert busy.peak > 300_000_000
    assert busy.own > 300_000_000 or not Path("/proc").exists()
    assert busy.cpu > 0 and busy.written == 5
    both = idle.then(busy)
    assert both.peak == max(idle.peak, busy.peak) and both.seconds == idle.seconds + busy.seconds


def test_measure_shows_why_a_command_failed() -> None:
    with pytest.raises(RuntimeError, match="exit code 3\n.*the reason"):
        measure.measure([sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"])


def test_measure_keeps_what_a_command_printed(tmp_path: Path) -> None:
    code = "import sys; print('one', flush=True); print('two', file=sys.stderr)"
    measure.measure([sys.executable, "-c", code], printed=tmp_path / "printed")
    assert (tmp_path / "printed").read_text() == "one\ntwo\n"


def test_differences_of_sums_are_relative_and_of_shared_weights() -> None:
    def of(tokens: int, *squares: float) -> TensorStats:
        return TensorStats(np.array([tokens]), np.array([squares]))

    mine = Statistics({"a": of(4, 1.0, 2.2, 0.0, 3.0), "b": of(4, 1.0)})
    theirs = Statistics({"a": of(4, 1.0, 2.0, 0.0, 0.0), "c": of(4, 1.0)})
    found = bench_calibrate.differences_of(mine, theirs)
    assert list(found) == ["a"]
    assert found["a"] == pytest.approx([0, 0.1, 0, np.inf])
    with pytest.raises(RuntimeError, match="a: 4 tokens in one file, 5 in the other"):
        bench_calibrate.differences_of(mine, Statistics({"a": of(5, 1.0, 2.0, 0.0, 0.0)}))


def test_time_after_the_start_is_read_from_what_both_programs_print() -> None:
    ours = """calibrate: 51,200 tokens x blocks of 107,520 tokens x blocks, 5,120 tokens x blocks/s, 11 s left
calibrate: 107,520 tokens x blocks of 107,520 tokens x blocks, 4,000 tokens x blocks/s
"""
    assert bench_calibrate.our_busy(ours, 40) == 26.88
    theirs = """0.00.042.452 I compute_imatrix: tokenization took 17.333 ms
1.02.042.500 I compute_imatrix: computing over 35 chunks, n_ctx=512, batch_size=2048, n_seq=4
1.03.285.587 I compute_imatrix: 0.24 seconds per pass - ETA 0.03 minutes
"""
    assert bench_calibrate.their_busy(theirs, 100) == pytest.approx(100 - 62.0425)


@pytest.mark.parametrize(("chunks", "windows"), [(8, 8), (7, 4), (None, 12)])
def test_the_text_to_calibrate_on_is_cut_to_whole_batches(chunks: int | None, windows: int) -> None:
    tokenizer = Tokenizer.from_file(str(bench_calibrate.SAMPLE / "tokenizer.json"))
    text = "The boats lay in the harbour, and no two were of one colour. " * 400
    assert 12 * 512 <= len(tokenizer.encode(text).ids) < 16 * 512
    tokens = len(tokenizer.encode(bench_calibrate.cut(text, bench_calibrate.SAMPLE, chunks)).ids)
    assert windows * 512 <= tokens < (windows + 0.5) * 512


@pytest.mark.slow
def test_the_calibration_benchmark_runs_without_llama_cpp(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The boats lay in the harbour, and no two were of one colour. " * 200)
    options = "--models 1m --chunks 4 --memory-size 1m --memory-tokens 1k --repeat 1".split()
    done = run_tool("bench_calibrate.py", *options, "--text", text, "--work", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    heading = rows.index(["what", "measured", "bar"])
    runs, bars = rows[1:heading], rows[heading + 1 :]
    assert [run[1] for run in runs[:2]] == ["2048", "2048"] and runs[3][1] == "1024"
    assert [bar[0].split(",")[0] for bar in bars] == [
        "calibrate 1m in shards", "perplexity of an F32 GGUF", "perplexity of an F32 GGUF",
    ]  # fmt: skip
    assert {bar[-1] for bar in bars} == {"met"}
    assert [file.name for file in tmp_path.iterdir()] == ["text"]


@pytest.mark.slow
def test_the_pipeline_benchmark_runs_and_says_what_it_did_not(tmp_path: Path) -> None:
    done = run_tool("bench_pipeline.py", "--size", "1m", "--type", "Q8_0", "--kills", "1", "--work", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 3  # the heading, one pass, the first of two steps
    assert "not run: llama.cpp's quantizer" in done.stdout
    assert re.search(r"killed 1 times, after [\d.]+ s", done.stdout)
    assert re.search(r"in the end: \d+, all with the same sha256 [0-9a-f]{64}", done.stdout)
    assert re.search(r"--help: \d+\.\d+ s", done.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_benchmark_of_number_formats_prints_a_row_for_each_weighing() -> None:
    done = run_tool("bench_grids.py", "--formats", "Q8_0", "q4_k", "--rows", "1", "--markdown")
    assert done.returncode == 0, done.stderr
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    rows = [row[:2] for row in table[2:]]
    assert rows == [[name, how] for name in ("Q8_0", "Q4_K") for how in ("plain", "importance")]
    assert table[2][4] == "same bytes"
    assert 0.5 < float(table[4][4]) <= 1.0
