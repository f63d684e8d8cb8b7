"""A newcomer's job: own text, tokenizer and weights, in one file and one command; what leaves is what was reported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.one_loss import tiny_model
from support.training_process import start_forked_ranks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from fourfold.launch.cli import app
from fourfold.launch.commands import launch
from fourfold.launch.train_options import TrainOptions
from fourfold.launch.training.async_loop import AsynchronousModel, held_out_loss_asynchronously
from fourfold.launch.training.build import build, exported_loss
from fourfold.launch.training.corpus import Corpus, found_sources, read_corpus
from fourfold.launch.training.data import held_out_rows
from fourfold.launch.training.loop import held_out_loss
from fourfold.launch.training.pretrained import export_model, load_pretrained
from fourfold.launch.training.settings import TrainSettings
from fourfold.launch.training.watch import Activity
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import load_model
from fourfold.parallel import init_mesh

ROOT = Path(__file__).resolve().parents[3]
TEXT = "".join(f"line {i}: the quick fox number {i * i % 97} jumps over the lazy dog {i % 13}.\n" for i in range(600))
VALIDATION = [f"the lazy fox number {i * 7 % 89} over the dog {i % 11}.\n" for i in range(120)]
JOB = """\
model = "pretrained"
tokenizer = "pretrained"
data = "train.txt"
validation = "validation.jsonl"
layout = "dp2 z3"
global_batch = 4
seq_len = 32
precision = "bf16-mixed"
steps = 4
learning_rate = 1e-3
evaluate_every = 2
checkpoint_every = 2
resume = "auto"
out = "run"
export = "trained"
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<end>"], initial_alphabet=alphabet)
    plain.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")


@pytest.fixture
def desk(tmp_path, tokenizer) -> Path:
    """A folder with what a newcomer has."""
    model = tiny_model(num_hidden_layers=2, vocab_size=len(tokenizer)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "pretrained")
    tokenizer.save_pretrained(tmp_path / "pretrained")
    (tmp_path / "train.txt").write_text(TEXT)
    (tmp_path / "validation.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in VALIDATION))
    (tmp_path / "train.toml").write_text(JOB)
    return tmp_path


def validation_tokens(folder: Path) -> torch.Tensor:
    made = AutoTokenizer.from_pretrained(folder)
    tokens = []
    for text in VALIDATION:
        tokens += [*made(text, add_special_tokens=False)["input_ids"], made.eos_token_id]
    return torch.tensor(tokens)


def loss_of(folder: Path, rows: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(rows, labels=rows).loss.item()


def test_a_newcomers_job(desk, monkeypatch):
    assert len(JOB.splitlines()) <= 25
    monkeypatch.chdir(desk)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def train(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fourfold.launch.cli", "train", "train.toml", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=280)

    with monkeypatch.context() as forked:  # the second run's are started for real
        forked.setattr(launch, "start_ranks", start_forked_ranks)
        first = CliRunner().invoke(app, ["train", "train.toml", "--steps", "2"])
    assert first.exit_code == 0, first.exception
    second = train()  # goes on where the first has stopped
    assert second.returncode == 0, second.stderr
    result = json.loads((desk / "run" / "result.json").read_text())
    assert len(result["losses"]) == 2
    assert result["precision"] == "bf16-mixed"
    # The text that was held out, read by transformers alone.
    rows = held_out_rows(validation_tokens(desk / "trained"), seq_len=32, num_rows=16, rows=slice(0, 16))
    assert loss_of(desk / "trained", rows) == pytest.approx(result["heldout_loss"], abs=1e-4)
    assert f"held-out loss of trained {result['heldout_loss']:.4f} nats a token" in second.stdout
    events = [json.loads(line) for line in (desk / "run" / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [0, 1, 2, 3]
    assert [event["event"] for event in events].count("end") == 2
    mistaken = train("--stepz", "3")
    assert mistaken.returncode == 2
    assert mistaken.stderr.strip().splitlines() == ["error: unrecognized arguments: --stepz 3"]


LAYOUTS = {
    "dp": {"dp": 2},
    "z3": {"dp": 2, "zero_stage": 3},
    "tp": {"tp": 2},
    "cp": {"cp": 2},
    "pp": {"pp": 2},
    "async": {"pp": 2, "schedule": "lockstep"},
}


def in_and_out(fields: dict[str, Any], folder: str, tokens: torch.Tensor) -> tuple[float, float, str]:
    """Held-out loss of the pretrained folder under a layout, and of what is exported again; and a refusal."""
    desk, layout = Path(folder), Layout(global_batch=2, seq_len=32, **fields)
    settings = TrainSettings(steps=1, held_out_batches=2, precision="fp32")
    mesh = init_mesh(dp=layout.dp, pp=layout.pp, cp=layout.cp, tp=layout.tp, device_type="cpu")
    model, gauge = build(layout, load_model(desk / "pretrained"), settings, mesh, desk / "pretrained")
    gauge.stop()
    if isinstance(model, AsynchronousModel):
        loss = held_out_loss_asynchronously(model, tokens, 2)
    else:
        loss = held_out_loss(model, layout, tokens, 2)
    export_model(model, desk / "again", desk / "pretrained")
    if dist.get_rank() == 0:
        (desk / "again" / "model-00002-of-00004.safetensors").rename(desk / "gone.safetensors")
    dist.barrier()
    with pytest.raises(ValueError, match="its weights do not fit this model") as error:
        load_pretrained(desk / "again", model)
    if dist.get_rank() == 0:
        (desk / "gone.safetensors").rename(desk / "again" / "model-00002-of-00004.safetensors")
    dist.barrier()
    return loss, exported_loss(desk / "again", layout, settings, mesh, tokens), str(error.value)


@pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS)
def test_weights_go_in_and_out_under_every_layout(ranks, desk, fields):
    tokens = validation_tokens(desk / "pretrained")
    first, second = ranks(2)(in_and_out, fields, str(desk), tokens)
    rows = held_out_rows(tokens, seq_len=32, num_rows=4, rows=slice(0, 4))
    truth = loss_of(desk / "pretrained", rows)
    assert first[:2] == pytest.approx((truth, truth), rel=1e-5)
    assert first == second
    assert "\n" not in first[2]
    assert loss_of(desk / "again", rows) == pytest.approx(truth, rel=1e-6)
    assert AutoTokenizer.from_pretrained(desk / "again").eos_token == "<end>"


def test_tied_weights_go_in_and_out_of_two_stages(ranks, desk):
    """One weight in the folder, a copy on either stage."""
    tiny_model(num_hidden_layers=2, vocab_size=320, tie_word_embeddings=True).save_pretrained(desk / "pretrained")
    test_weights_go_in_and_out_under_every_layout(ranks, desk, {"pp": 2})
    assert "lm_head.weight" not in (desk / "again" / "model.safetensors.index.json").read_text()


def corpus_of(folder: str, vocab_size: int, keys: dict[str, Any]) -> Corpus:
    sources = found_sources(TrainOptions(out=folder, **keys))
    return read_corpus(sources, Path(folder), vocab_size, Activity())


def corpora(folder: str) -> list[Any]:
    desk = Path(folder)
    text = str(desk / "train.txt")
    whole = corpus_of(folder, 256, {"data": (text,)})
    held_out = corpus_of(folder, 256, {"data": (text,), "validation": (str(desk / "validation.jsonl"),)})
    tokens = np.arange(100, dtype=np.int64)
    if dist.get_rank() == 0:
        np.save(desk / "own.npy", tokens)
    dist.barrier()
    own = corpus_of(folder, 100, {"data": (str(desk / "own.npy"),)})
    refused = []
    for vocab_size, keys in (
        (99, {"data": (str(desk / "own.npy"),)}),
        (100, {"data": (text,)}),
        (999, {"data": (str(desk / "pretrained" / "model.safetensors"),), "tokenizer": str(desk / "pretrained")}),
        (999, {"data": (text,), "tokenizer": str(desk)}),
    ):
        with pytest.raises(ValueError, match=r"vocab_size|UTF-8|tokenizer") as error:
            corpus_of(folder, vocab_size, keys)
        refused.append(str(error.value))
    text_back = bytes(torch.cat([whole.train, whole.held_out]).tolist()).decode()
    return [text_back, len(held_out.held_out), own.train.tolist(), own.held_out.tolist(), held_out.identity, refused]


def test_text_becomes_tokens_once_and_alike_on_all_ranks(ranks, desk):
    first, second = ranks(2)(corpora, str(desk))
    assert first == second
    text, num_held_out, train, held_out, _, refused = first
    assert text == TEXT + "\n"  # a document's end is a line's
    assert num_held_out == sum(len(line) + 1 for line in VALIDATION)
    assert train + held_out == list(range(100))
    assert len(held_out) == 10
    for told, words in zip(
        refused,
        ("vocab_size=99, but", "vocab_size=100, but", "not UTF-8", "no tokenizer that transformers reads"),
        strict=True,
    ):
        assert words in told
        assert "\n" not in told
