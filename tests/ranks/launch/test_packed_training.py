"""`packing = true`: a training of packed documents is that of one process which runs each document by itself.

The reference knows no rows' masks and no positions: it takes the documents of a step's rows one by one through the
untouched transformers model and divides the sum of their losses by the number of all targets.
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.one_loss import tiny_model
from support.tiny_config import CONFIG
from support.training_process import TRAIN, Forked, forked_ranks
from torch import Tensor, nn

from fourfold.launch.train_options import TrainOptions
from fourfold.launch.training.async_loop import AsynchronousModel, train_asynchronously
from fourfold.launch.training.checkpoints import Checkpoints, Resume
from fourfold.launch.training.corpus import Corpus, found_sources, read_corpus
from fourfold.launch.training.data import Text
from fourfold.launch.training.loop import TrainingRun, train
from fourfold.launch.training.memory_use import MemoryGauge
from fourfold.launch.training.mix import shares_of
from fourfold.launch.training.packing import Batch
from fourfold.launch.training.rows import Order, PackedRows
from fourfold.launch.training.settings import TrainSettings, decay_groups, learning_rate_at
from fourfold.launch.training.watch import Activity
from fourfold.layouts.inputs.layout import Layout
from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.stream import StreamSettings

SEQ_LEN, GLOBAL_BATCH = 24, 4
SETTINGS = TrainSettings(steps=4, warmup_steps=2, held_out_batches=2, checkpoint_every=2)
STILL = TrainSettings(steps=2, learning_rate=1e-9, warmup_steps=0, weight_decay=0.0, held_out_batches=2)
"""So slow that no weight changes: what a pipeline that never drains tells is then the loss of the first weights."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp, streamed": {"dp": 2, "checkpointing": "stream", "stream_chunks": 3},
    "z3": {"dp": 2, "zero_stage": 3, "checkpointing": "full"},
    "cp": {"cp": 2, "micro_batch": 2},
    "cp, streamed": {"cp": 2, "checkpointing": "stream", "stream_chunks": 2},
    "tp": {"tp": 2},
    "pp": {"pp": 2, "micro_batch": 2},
}


def text(seed: int, num_documents: int) -> Text:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 40, num_documents)
    return Text(torch.from_numpy(generator.integers(64, size=lengths.sum())), np.cumsum([0, *lengths])[:-1])


def rows() -> PackedRows:
    order = Order(seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH, seed=0, shares=shares_of((2, 1)))
    return PackedRows([text(1, 12), text(2, 30)], [text(3, 9)], order)


def documents(batch: Batch) -> Iterator[Tensor]:
    """Each document of some rows by itself, without padding."""
    assert batch.labels is not None
    assert batch.document_ids is not None
    for ids, labels, numbers in zip(batch.ids, batch.labels, batch.document_ids, strict=True):
        for number in numbers.unique():
            if (labels[numbers == number] != -100).all():
                yield ids[numbers == number]


def loss_by_itself(model: nn.Module, batch: Batch) -> Tensor:
    losses, count = [], 0
    for ids in documents(batch):
        logits = model(ids[None]).logits[0]
        losses.append(F.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
        count += len(ids) - 1
    return torch.stack(losses).sum() / count


@cache
def reference(settings: TrainSettings) -> tuple[list[float], float]:
    model, batches, everything = tiny_model(num_hidden_layers=2), rows(), slice(0, GLOBAL_BATCH)
    groups = decay_groups(list(model.parameters()), settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2))
    losses = []
    for step in range(settings.steps):
        loss = loss_by_itself(model, batches.training(step, everything))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    num_rows = settings.held_out_batches * GLOBAL_BATCH
    with torch.no_grad():
        return losses, loss_by_itself(model, batches.held_out(num_rows, slice(0, num_rows))).item()


def trained(fields: dict[str, Any], settings: TrainSettings, folder: str, resume: bool) -> tuple[list[float], float]:
    layout = Layout(global_batch=GLOBAL_BATCH, seq_len=SEQ_LEN, **fields)
    mesh = init_mesh(dp=layout.dp, pp=layout.pp, cp=layout.cp, tp=layout.tp, device_type="cpu")
    checkpoints = Checkpoints(folder=Path(folder))
    run = TrainingRun(
        gauge=MemoryGauge(torch.device("cpu")), checkpoints=checkpoints,
        resume=Resume(choice="2" if resume else "no"),
    )  # fmt: skip
    model = tiny_model(num_hidden_layers=2)
    with run.gauge:
        if layout.asynchronous:
            result = train_asynchronously(AsynchronousModel(model, layout, mesh, settings), rows(), run)
        else:
            chunk = -(-SEQ_LEN // (layout.cp * layout.stream_chunks))
            placed = parallelize(
                model, mesh, micro_batch=layout.micro_batch, zero_stage=layout.zero_stage,
                checkpointing=layout.checkpointing,
                stream=StreamSettings(chunk_size=chunk) if layout.stream_chunks > 1 else None,
            )  # fmt: skip
            result = train(placed, layout, rows(), settings, run)
    assert result.held_out_loss is not None
    if dist.get_rank() == 0 and resume:
        shutil.rmtree(Path(folder) / "step_00000004")
    return [record.loss for record in result.records], result.held_out_loss


@pytest.fixture(scope="module")
def written(ranks, tmp_path_factory) -> str:
    """A folder with the checkpoint of step 2, written under ZeRO 3."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    ranks(2)(trained, LAYOUTS["z3"], SETTINGS, folder, False)
    return folder


@pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS)
def test_packed_documents_train_as_each_by_itself(ranks, tmp_path, fields):
    losses, held_out = reference(SETTINGS)
    for told in ranks(2)(trained, fields, SETTINGS, str(tmp_path), False):
        assert told[0] == pytest.approx(losses, rel=1e-5)
        assert told[1] == pytest.approx(held_out, rel=1e-5)


@pytest.mark.parametrize("name", ["cp", "pp"])
def test_another_layout_goes_on_at_the_row(ranks, written, name):
    losses, held_out = reference(SETTINGS)
    told = ranks(2)(trained, LAYOUTS[name], SETTINGS, written, True)[0]
    assert told[0] == pytest.approx(losses[2:], rel=1e-5)
    assert told[1] == pytest.approx(held_out, rel=1e-5)


@pytest.mark.parametrize(("fields", "num_ranks"), [({"pp": 2}, 2), ({"pp": 2, "dp": 2}, 4)], ids=str)
def test_a_pipeline_that_never_drains_weighs_rows_by_their_targets(ranks, tmp_path, fields, num_ranks):
    losses, held_out = reference(STILL)
    fields = {**fields, "schedule": "lockstep"}
    for told in ranks(num_ranks)(trained, fields, STILL, str(tmp_path), False):
        assert told[0] == pytest.approx(losses, rel=1e-5)
        assert told[1] == pytest.approx(held_out, rel=1e-5)


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A folder with two sources: lines of JSON, and a file of tokens."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    lines = [json.dumps({"text": f"{i} bottles " * (1 + i % 5)}) for i in range(60)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    np.save(tmp_path / "own.npy", np.arange(400, dtype=np.int32) % 200)
    np.save(tmp_path / "own.documents.npy", np.arange(0, 400, 25))
    (tmp_path / "train.toml").write_text(FILE)
    return tmp_path


FILE = """\
model = "model.json"
data = ["lines.jsonl", "*.npy"]
data_weights = [3, 1]
packing = true
layout = "dp2"
global_batch = 4
seq_len = 32
steps = 2
warmup_steps = 0
checkpoint_every = 2
held_out_batches = 1
out = "out"
quiet = true
"""


def test_a_file_that_packs_and_mixes_trains_and_is_what_a_checkpoint_remembers(desk):
    first = forked_ranks(desk / "rank", 2, ["--config", "train.toml"])
    assert [rank.wait(120.0) for rank in first] == [0, 0], first[0].text()
    result = json.loads((desk / "out" / "result.json").read_text())
    assert len(result["losses"]) == 2
    assert result["heldout_loss"] > 0
    one = ["--config", "train.toml", "--layout", "dp1", "--steps", 3, "--resume"]
    again = Forked(desk / "again", TRAIN, one)
    assert again.wait(60.0) == 0, again.text()
    refused = Forked(desk / "refused", TRAIN, [*one, "--no-packing", "--data-weights", 1, "--data-weights", 1])
    assert refused.wait(60.0) == 2
    (line,) = refused.text().strip().splitlines()
    assert "packing=True (now False), data_weights=[3.0, 1.0] (now [1.0, 1.0])" in line


def read(desk: Path, **keys: Any) -> Corpus:
    sources = found_sources(TrainOptions(out=str(desk / "out"), **keys))
    return read_corpus(sources, desk / "out", 256, Activity())


def test_a_corpus_keeps_its_documents_and_its_sources(desk, mesh):
    corpus = read(desk, data=("lines.jsonl", "own.npy"), data_weights=(3.0, 1.0))
    lines, own = corpus.train_texts
    assert lines.documents is not None
    assert own.documents is not None
    written = [json.loads(line)["text"] + "\n" for line in (desk / "lines.jsonl").read_text().splitlines()]
    ends = np.append(lines.documents, len(lines.tokens))
    found = [bytes(lines.tokens[start:end].tolist()).decode() for start, end in itertools.pairwise(ends)]
    assert found[:-1] == written[: len(found) - 1]  # the last one lies across the cut
    assert written[len(found) - 1].startswith(found[-1])
    assert own.documents.tolist() == list(range(0, 360, 25))
    assert [len(text.tokens) for text in corpus.held_out_texts] == [sum(map(len, written)) // 10, 40]
    # The rest of the document that lies across the cut, and one more.
    assert corpus.held_out_texts[1].documents.tolist() == [0, 15]
    # The same files as one text.
    whole = read(desk, data=("lines.jsonl", "own.npy"))
    assert len(whole.train_texts) == 1
    assert whole.identity != corpus.identity
    assert len(whole.train) + len(whole.held_out) == sum(map(len, written)) + 400
    # Tokens that an older version left there without the bounds are made anew.
    left = desk / "out" / "tokens" / "tokens.json"
    left.write_text(json.dumps({"identity": whole.identity, "largest": 255}))
    assert read(desk, data=("lines.jsonl", "own.npy")).identity == whole.identity
    # Documents of an edited file are read anew.
    np.save(desk / "own.documents.npy", np.arange(0, 400, 50))
    assert read(desk, data=("own.npy",)).train_texts[0].documents.tolist() == list(range(0, 360, 50))


@pytest.mark.parametrize(
    "starts", [np.array([1, 5]), np.array([0, 5, 5]), np.array([0, 400]), np.array([0.0]), np.array(0)], ids=str
)
def test_bounds_that_are_none_are_refused(desk, mesh, starts):
    np.save(desk / "own.documents.npy", starts)
    with pytest.raises(
        ValueError, match=r"own\.documents\.npy: gives the place of each document's first token"
    ) as error:
        read(desk, data=("own.npy",))
    assert "\n" not in str(error.value)


def test_tokens_without_bounds_are_not_packed(desk):
    (desk / "own.documents.npy").unlink()
    run = Forked(desk / "log", TRAIN, ["--config", "train.toml", "--layout", "dp1"])
    assert run.wait(60.0) == 2
    assert run.text().strip().splitlines() == [
        "error: packing=true, but own.npy does not say where its documents begin: give the place of each one's first "
        "token in own.documents.npy beside it, or leave packing out"
    ]
