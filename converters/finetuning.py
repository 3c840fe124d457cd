"""The job of `finetune` and `distill`: a checkpoint and examples to an adapter or a checkpoint, a loss curve and a report."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from llmcompress.converters.model import read_tokenizer, require_fit
from llmcompress.converters.multimodal import PARTS
from llmcompress.converters.teaching import load_teachers, open_teachers
from llmcompress.converters.tuned_checkpoint import save_merged, save_whole, train_whole

from llmcompress import __version__
from llmcompress.adalora import STATE, drop_ranks
from llmcompress.adapter_method import unadapted, with_adapter
from llmcompress.adapter_start import fit_original, install, load_factors, save_factors, start_factors
from llmcompress.checkpoint import Checkpoint
from llmcompress.compute import compute_device, fast_bfloat16
from llmcompress.errors import CheckpointError, LlmcompressError, RunError
from llmcompress.frozen_model import load_frozen, load_of, stored_bits, unquantized
from llmcompress.held_zeros import HeldZeros, matrices
from llmcompress.json_object import read_object
from llmcompress.machine import cores
from llmcompress.progress import Progress
from llmcompress.row_packing import packs_cleanly
from llmcompress.training import Curve, trainer_of
from llmcompress.training_curve import draw
from llmcompress.tuning_data import ExampleReader, TuningData, tuning_data
from llmcompress.tuning_options import Chosen, TuningOptions, chosen
from llmcompress.whole_file import require_free_place, whole_file

LONGEST = 2048  # tokens of an example, where the model takes more
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
MANIFEST = "prune.json"
SENSES = [start.rstrip(".") for start in PARTS]  # the parts of a model that are not its text model
AS_TRAINED = "for-nf4"  # the adapter that fits the quantized weights it was trained on


@dataclass(frozen=True)
class TuningReport:
    """A finished fine-tuning: losses in nats for each learned token, and what the user should know.

    untuned, held_out: held-out loss of the model as it was and of the adapter that was kept, of step `best_step`; None
    without validation.
    """

    path: Path
    model: str
    fingerprint: str
    options: TuningOptions
    figures: Chosen
    data: TuningData
    load: str
    dtype: str
    packed: bool
    trainable: int
    curve: Curve
    untuned: float | None
    held_out: float | None
    best_step: int
    steps: int
    devices: int
    seconds: float
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "libraries": {name: version(name) for name in LIBRARIES if importlib.util.find_spec(name)},
            "model": self.model,
            "model_fingerprint": self.fingerprint,
            "load": self.load,
            "dtype": self.dtype,
            "trainable_weights": self.trainable,
            "packed": self.packed,
            "options": asdict(self.options),
            "chosen": self.figures.as_dict(),
            "data": {"sources": list(self.data.sources), "sha256": self.data.sha256, **self.data.counts()},
            "untuned_loss": self.untuned,
            "held_out_loss": self.held_out,
            "best_step": self.best_step,
            "steps": self.steps,
            "devices": self.devices,
            "seconds": round(self.seconds, 1),
            "training_losses": self.curve.train,
            "held_out_losses": self.curve.held_out,
            "notes": list(self.notes),
        }


def finetune_model(
    model: str | Path, out: str | Path, data: Sequence[str], options: TuningOptions, progress: Progress
) -> TuningReport:
    """Train an adapter for `model` on the sources `data` and write it to the folder `out`, in peft's own format, with
    loss.png and finetune.json beside it. Of a model that is trained whole, or whose zeros are held, `out` becomes an
    ordinary checkpoint.

    Killed, the same call goes on from its last checkpoint. In processes of `accelerate launch` each does its share, and
    the first one writes. Raises LlmcompressError.
    """
    options.check()
    if not importlib.util.find_spec("matplotlib"):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    out = Path(out)
    require_free_place(out)
    part = out.with_name(out.name + ".part")
    with Checkpoint.open(model) as checkpoint, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft and transformers talk to each other
        warnings.filterwarnings(
            "ignore", message="The following rank_pattern keys"
        )  # AdaLoRA's, read all the same
        run = _Run(checkpoint, data, options, part, progress)
        report = run.train(out)
        if run.state.is_main_process:
            run.deliver(report, out)
        run.state.wait_for_everyone()
    return report


def examples_of(
    checkpoint: Checkpoint, sources: Sequence[str], options: TuningOptions
) -> tuple[TuningData, int]:
    """The examples of `sources` for a model, and the most tokens that one has. Raises LlmcompressError."""
    positions = getattr(_text_config(checkpoint.directory), "max_position_embeddings", None)
    length = options.max_length or min(LONGEST, positions or LONGEST)
    if positions and length > positions:
        raise LlmcompressError(f"--max-length {length}: the model has {positions} positions")
    reader = ExampleReader(read_tokenizer(checkpoint.directory), length, options.loss, options.plain)
    return tuning_data(reader, sources, options.validation, options.seed), length


class _Run:
    """A fine-tuning from its data to its adapter."""

    def __init__(
        self, checkpoint: Checkpoint, sources: Sequence[str], options: TuningOptions, part: Path, progress: Progress
    ) -> None:  # fmt: skip
        self.checkpoint, self.options, self.part, self.progress = checkpoint, options, part, progress
        where = checkpoint.directory / "config.json"
        self.stored = stored_bits(
            read_object(where), str(where)
        )  # the file's own words, not what is decoded of it
        self.load = load_of(options.load, self.stored)
        self.whole = options.method == "full"
        self._require_source()
        self.device, self.state = _device(options.device)
        self.bf16 = options.dtype == "bf16" or (options.dtype == "auto" and fast_bfloat16(self.device.type))
        self.dtype = torch.bfloat16 if self.bf16 else torch.float32
        self.hidden = _text_config(checkpoint.directory).hidden_size
        self.data, self.length = examples_of(checkpoint, sources, options)
        self.teachers = open_teachers(options, checkpoint)
        self.notes = list(self.data.notes)
        if not self.data.validation:
            self.notes.append("no examples are held out: the weights are the last ones, not the best")

    def train(self, out: Path) -> TuningReport:
        """Train to the end, or to where the held-out loss stops falling, from the last checkpoint there is."""
        began, options = time.monotonic(), self.options
        transformers.set_seed(options.seed)
        self.say("loading the model")
        frozen = load_frozen(
            self.checkpoint.directory, self.load, self.device, torch.float32 if self.whole else self.dtype,
            options.attention > 0,
        )  # fmt: skip
        require_fit(frozen, [example.ids for example in (*self.data.train, *self.data.validation)])
        longest = max(len(example.ids) for example in self.data.train)
        figures = chosen(
            options, len(self.data.train), longest, self.hidden, frozen.num_parameters(),
            self.state.num_processes, self.device.type == "cuda",
        )  # fmt: skip
        checkpoint = self._last_checkpoint(figures)
        self.notes += unquantized(frozen) if self.load != "16bit" else ()
        teachers = load_teachers(self.teachers, frozen, options, self.device, self.dtype)
        weights = self._zeros_of(frozen) if options.keep_zeros else {}
        model = self._trained(frozen, figures)
        zeros = HeldZeros(model, weights) if options.keep_zeros else None
        if zeros:
            share = zeros.zeros / zeros.weights
            self.notes.append(
                f"zeros held: {zeros.zeros:,} of the {zeros.weights:,} weights of trained matrices, {share:.2%}"
            )
        models = [model, *(teacher.model for teacher in teachers)]
        pack = options.pack and all(packs_cleanly(each, self.data.train) for each in models)
        if options.pack and not pack:
            self.notes.append("this model does not keep packed examples apart: each has a row of its own")
        trainer = trainer_of(
            model, self.data, options, figures, self.part, self.length, pack, self.bf16, checkpoint is not None,
            self.progress if self.state.is_main_process else Progress(), zeros, teachers,
        )  # fmt: skip
        counts = self.data.counts()
        self.say(
            f"{counts['train_examples']} examples, {counts['train_learned_tokens']} of {counts['train_tokens']} tokens "
            f"learned, {counts['validation_examples']} held out; {figures.steps} steps ({figures.epochs:.1f} epochs), "
            f"learning rate {figures.learning_rate:.2g}"
        )  # fmt: skip
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except torch.OutOfMemoryError as error:
            what = "--qlora, --gradient-checkpointing, a smaller --micro-batch or --max-length"
            raise RunError(f"{self.device}: {str(error).split('. ')[0]}; give {what}") from None
        curve = Curve.of(trainer.state.log_history)
        if self.state.is_main_process:
            self._save(trainer.model)
        return self._report(out, trainer, figures, curve, pack, time.monotonic() - began)

    def deliver(self, report: TuningReport, out: Path) -> None:
        """Put picture and report beside the weights, and the whole under its name."""
        beside = {
            "loss.png": lambda path: draw(report.curve, path, f"{self.checkpoint.name}, {report.options.method}"),
            "finetune.json": lambda path: path.write_text(json.dumps(report.as_dict(), indent=1) + "\n"),
        }  # fmt: skip
        result = self.part / "result"
        for name, write in beside.items():
            write(result / name)
        if self.options.keep_zeros and not self.whole:
            merged = self.part / "merged"
            shutil.rmtree(merged, ignore_errors=True)
            save_merged(self.checkpoint, result, merged, self.progress)
            for name, write in beside.items():
                write(merged / name)
            result = merged
        if self.options.keep_zeros and (manifest := self.checkpoint.directory / MANIFEST).is_file():
            shutil.copyfile(manifest, result / MANIFEST)  # it tells where zeros are, which is still true
        try:
            os.replace(result, out)
        except OSError as error:
            raise RunError(f"{out}: cannot be written: {error.strerror}; the result is in {result}") from None
        shutil.rmtree(self.part, ignore_errors=True)

    def say(self, line: str) -> None:
        if self.state.is_main_process:
            self.progress.say(line)

    def _trained(self, frozen: Any, figures: Chosen) -> Any:
        """The model with what is trained of it: an adapter, or its own weights."""
        if self.whole:
            train_whole(frozen, self.options.targets)
            return frozen
        model = with_adapter(frozen, self.options, figures, SENSES)
        self.notes += unadapted(model, SENSES) if not self.options.targets else ()
        self._start(model)
        return model

    def _zeros_of(self, frozen: Any) -> dict[str, torch.Tensor]:
        """The matrices whose zeros are held: in fewer bits, more weights are zero than were."""
        if self.load != "16bit":
            frozen = load_frozen(self.checkpoint.directory, "16bit", torch.device("cpu"), torch.bfloat16)
        return matrices(frozen)

    def _start(self, model: Any) -> None:
        """For PiSSA and LoftQ: the factors the adapter starts with, those of an earlier run where there was one."""
        init, path = self.options.init, self.part / "start.safetensors"
        if init == "default":
            return
        if any("default" in getattr(module, "lora_embedding_A", ()) for module in model.modules()):
            raise LlmcompressError(f"--init {init}: is for linears; leave the embedding out of --target")
        source = model.get_base_model()
        if self.load == "4bit":
            source = load_frozen(self.checkpoint.directory, "16bit", torch.device("cpu"), torch.bfloat16)
        with self.state.main_process_first():
            if not path.exists():
                save_factors(path, start_factors(model, init, source))
        install(model, init, load_factors(path), source)

    def _require_source(self) -> None:
        """Raise LlmcompressError where the training needs weights that are not there."""
        init = self.options.init
        if init == "loftq" and self.load != "4bit":
            raise LlmcompressError(
                f"--init loftq: makes up for quantizing to 4 bits, the model is in {self.load}; add --qlora"
            )
        if self.stored and (self.whole or self.options.keep_zeros):
            what = "--method full" if self.whole else "--keep-zeros"
            raise LlmcompressError(
                f"{what}: needs the unquantized model; its weights are stored in {self.stored}"
            )
        if init != "default" and (self.load == "8bit" or self.stored):
            raise LlmcompressError(f"--init {init}: needs the unquantized model, in 16 bits or with --qlora")

    def _save(self, model: Any) -> None:
        """The adapter in peft's format, or the whole model, in its place in the run's folder."""
        folder = self.part / "result"
        shutil.rmtree(folder, ignore_errors=True)
        if self.whole:
            save_whole(model, self.checkpoint, folder)
            return
        config = model.peft_config["default"]
        config.base_model_name_or_path = self.checkpoint.repository or str(self.checkpoint.directory)
        config.revision = self.checkpoint.revision
        if self.options.method == "adalora":
            left = drop_ranks(model)
            self.notes.append(f"of {config.init_r} ranks of each matrix {left:.1f} are left, on average")
        model.save_pretrained(folder)
        if self.options.init == "default":
            return
        if self.options.init == "loftq":
            shutil.copytree(folder, folder / AS_TRAINED)
            as_it_is = {"load": self.load, "options": {"init": "default"}}  # what merging looks at
            (folder / AS_TRAINED / "finetune.json").write_text(json.dumps(as_it_is) + "\n")
            self.notes.append(
                f"the adapter fits the unquantized model; {AS_TRAINED}/ in it is as trained, for the model in NF4"
            )
        fit_original(folder, load_factors(self.part / "start.safetensors"))

    def _last_checkpoint(self, figures: Chosen) -> Path | None:
        """Of an earlier run of the same job in the run's folder, the last checkpoint that is whole.

        Raises LlmcompressError where there is one of another job.
        """
        job = {
            "model": self.checkpoint.fingerprint(), "data": self.data.sha256, "options": asdict(self.options),
            "figures": figures.as_dict(), "teachers": [opened.fingerprint() for opened, _ in self.teachers],
        }  # fmt: skip
        job = json.loads(json.dumps(job))
        record = self.part / "job.json"
        last_written = STATE if self.options.method == "adalora" else "trainer_state.json"
        whole = [path.parent for path in self.part.glob(f"checkpoint-*/{last_written}")]
        if not whole:
            with self.state.main_process_first():
                if self.state.is_main_process:
                    if self.part.is_dir() and any(self.part.iterdir()) and not record.exists():
                        raise LlmcompressError(
                            f"{self.part}: is no unfinished run of finetune; remove it or choose another -o"
                        )
                    shutil.rmtree(self.part, ignore_errors=True)
                    self.part.mkdir(parents=True)
                    with whole_file(record) as file:
                        file.write(json.dumps(job, indent=1).encode())
            return None
        other = [key for key, value in job.items() if read_object(record).get(key) != value]
        if other:
            raise LlmcompressError(
                f"{self.part}: holds an unfinished run with other {' and '.join(other)}; repeat its command to finish "
                "it, or remove the folder"
            )
        last = max(whole, key=lambda path: int(path.name.partition("-")[2]))
        self.notes.append(f"went on from step {last.name.partition('-')[2]} of an earlier run")
        return last

    def _report(
        self, out: Path, trainer: Any, figures: Chosen, curve: Curve, pack: bool, seconds: float
    ) -> TuningReport:
        untuned = curve.held_out[0][1] if curve.held_out else None
        trained = [point for point in curve.held_out if point[0]]
        best = min(trained, key=lambda point: point[1], default=(trainer.state.global_step, None))
        if untuned is not None and best[1] is not None and best[1] >= untuned:
            self.notes.append(
                f"the held-out loss never fell below the model's own {untuned:.4f}: is the data like what is held out?"
            )
        if trainer.state.global_step < figures.steps:
            self.notes.append(f"stopped early, at step {trainer.state.global_step} of {figures.steps}")
        return TuningReport(
            path=out, model=self.checkpoint.repository or str(self.checkpoint.directory),
            fingerprint=self.checkpoint.fingerprint(), options=self.options, figures=figures, data=self.data,
            load=self.load, dtype="bf16" if self.bf16 else "f32", packed=pack,
            trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad), curve=curve,
            untuned=untuned, held_out=best[1], best_step=best[0], steps=trainer.state.global_step,
            devices=self.state.num_processes, seconds=seconds, notes=tuple(self.notes),
        )  # fmt: skip


def _text_config(directory: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(directory).get_text_config()
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{directory}: no config that transformers reads: {' '.join(str(error).split())[:300]}"
        ) from error


def _device(asked: str) -> tuple[torch.device, accelerate.PartialState]:
    """This process's device, and what accelerate knows of the others."""
    device = compute_device(asked)
    if device.index is not None and torch.cuda.device_count() > 1:
        raise LlmcompressError(
            f"--device {asked}: transformers would train on the first GPU it sees; start the program with "
            f"CUDA_VISIBLE_DEVICES={device.index}, or under `accelerate launch` leave --device out"
        )
    state = accelerate.PartialState(cpu=device.type == "cpu")
    if state.num_processes > 1:
        device = state.device
        if device.type == "cpu":
            torch.set_num_threads(max(1, cores() // state.num_processes))
    return device, state
