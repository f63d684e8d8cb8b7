"""Logits made some tokens at a time, in every layout that may: the loss and gradients of one process.

In fp64: what remains is transformers' own, its norms and rotary tables are fp32.
"""

import pytest
from support.large_logits import with_large_logits
from support.one_loss import batches, check_layout, tiny_model
from torch import nn

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.testing.compare import assert_ranks

SMALL = {"hidden_size": 16, "double": True}


def assert_streamed(pool, mesh_shape, options, model, calls):
    """Every rank's errors are small, and it streamed the head so often a pass: two steps and an evaluation."""
    answers = pool(with_large_logits, check_layout, mesh_shape, options, {**SMALL, **model}, True)
    layout = f"mesh {mesh_shape}, options {options}, model {model}"
    assert_ranks([errors for (errors, _), _ in answers], 1e-6, layout)
    assert [count for _, count in answers] == [3 * each for each in calls], layout


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("model", [{}, {"tie_word_embeddings": True}], ids=str)
def test_one_rank(ranks, checkpointing, model):
    assert_streamed(ranks(1), {}, {"micro_batch": 2, "checkpointing": checkpointing}, model, [2])


@pytest.mark.parametrize(
    ("mesh_shape", "options", "model", "calls"),
    [
        ({"dp": 2}, {"micro_batch": 1}, {}, [2, 2]),
        ({"dp": 2}, {"micro_batch": 1, "zero_stage": 2}, {}, [2, 2]),
        ({"dp": 2}, {"micro_batch": 1, "zero_stage": 3, "checkpointing": "full"}, {}, [2, 2]),
        ({"cp": 2}, {"micro_batch": 2, "zero_stage": 1}, {}, [2, 2]),
        ({"pp": 2}, {"micro_batch": 1}, {"tie_word_embeddings": True}, [0, 4]),
        ({"pp": 2}, {"micro_batch": 1, "vp": 2}, {}, [0, 4]),
        # Fewer micro-batches than stages: their losses wait for their backwards together.
        ({"pp": 2}, {"micro_batch": 4}, {}, [0, 1]),
        # A backward in two parts, and a vocabulary that is cut: whole logits.
        ({"pp": 2}, {"micro_batch": 1, "vp": 2, "schedule": "zero-bubble"}, {}, [0, 0]),
        ({"tp": 2}, {"micro_batch": 2}, {}, [0, 0]),
        # Fewer tokens than the head is wide.
        ({"cp": 2}, {"micro_batch": 1}, {}, [0, 0]),
    ],
    ids=str,
)
def test_two_ranks(ranks, mesh_shape, options, model, calls):
    assert_streamed(ranks(2), mesh_shape, options, model, calls)


def one_step(change, **options) -> float:
    model = tiny_model(hidden_size=16)
    handle = change(model)
    ids, labels = batches(True)[0]
    try:
        return parallelize(model, init_mesh(device_type="cpu"), **options).forward_backward(ids, labels).item()
    finally:
        if handle is not None:
            handle.remove()


def nothing(model) -> None:
    """The model as it is."""


def listen(model):
    """Somebody reads logits."""
    return model.lm_head.register_forward_hook(lambda *_: None)


def listen_everywhere(model):
    """Somebody reads what every module gives."""
    return nn.modules.module.register_module_forward_hook(lambda *_: None)


def name_a_scale(model) -> None:
    """A config's words that this family does not read."""
    model.config.logit_scale, model.config.final_logit_softcapping = 3.0, 0.5


class DoubledHead(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def double(model) -> None:
    """A head that is more than a matrix."""
    head = DoubledHead(16, 64, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def replace_forward(model) -> None:
    """The same of a head whose forward somebody replaced."""
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * plain(x)


def test_a_head_that_is_more_than_a_matrix_makes_whole_logits(ranks):
    changes = (nothing, name_a_scale, listen, listen_everywhere, double, replace_forward)
    losses, streamed = zip(*(ranks(1)(with_large_logits, one_step, change)[0] for change in changes), strict=True)
    assert streamed == (1, 1, 0, 0, 0, 0)
    # fp32, summed in chunks or whole; a head that gives twice as much has another loss.
    assert losses[:4] == pytest.approx([losses[0]] * 4, rel=1e-6)
    doubled = ranks(1)(one_step, double)[0]
    assert losses[4:] == pytest.approx([doubled] * 2, rel=1e-6)
    assert doubled != pytest.approx(losses[0], rel=1e-3)


def refused(change) -> str:
    with pytest.raises(ValueError, match="would pass by") as raised:
        one_step(change, checkpointing="stream")
    return str(raised.value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (listen, "the head has a hook"), (listen_everywhere, "a hook is set on all modules"),
        (double, "the head is a DoubledHead"), (replace_forward, "the head's forward was replaced"),
    ],
)  # fmt: skip
def test_where_layers_stream_it_is_refused(ranks, change, why):
    assert why in ranks(1)(refused, change)[0]
