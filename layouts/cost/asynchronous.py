"""What a pipeline that never drains costs besides, and what it changes for convergence.

No bubble, but a stage holds more micro-batches and several versions of its weights, updates (and, with replicas,
reduces gradients) at every micro-batch, and learns from gradients that are some updates old. Closed forms over columns;
a test compares them with the schedules themselves, parallel.pipeline.schedule.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from fourfold.layouts.cost.candidates import DOUBLE_BUFFERED, LOCKSTEP, Candidates, Column
from fourfold.layouts.inputs.layout import Layout
from fourfold.parallel.pipeline.mitigation import (
    LONGEST_TURNED_SIDE,
    Mitigation,
    scale_adam_hyperparameters,
    scale_hyperparameters,
)
from fourfold.parallel.pipeline.schedule import PipelineSchedule

SPIKE_PASSES = 6.0
"""fp32 values read or written a parameter and update by spike compensation: two moments, each from two tensors."""
PREDICTION_PASSES = {"velocity": 10.0, "weight": 5.0, "none": 0.0}
"""For predicted weights: Adam's second moment to a divisor in three operators, then a step from weights and moments;
or the weights now kept for the next time, and a step from those and the ones kept before."""
FEEDBACK_PASSES = 13.0
"""Error feedback: the weights before kept (2), the step from them (3), its difference to an old one (3), that into the
weights (3), and the step kept (2)."""
ROTATION_PRODUCTS = {"update": 6.0, "prediction": 2.0, "refresh": 8.0}
"""Products of square matrices for basis rotation: two covariances, the gradient turned and the step turned back by both
sides; a predicted step turned back; and every so often the moment into the new bases and these themselves."""
EXCHANGE_PASSES = 4.0
"""Filling the module with the weights of a forward or a backward, and with the present ones after it."""
COPY_PASSES = 2.0
"""A copy of the weights: the present ones kept as they are, or put into the module after an update."""
DRIFT_PASSES = {"update": 10.0, "backward": 5.0}
"""Following the running mean of updates (the weights before, their difference, its decay and its share), and the
weights that a backward reads by it."""


def asynchronous_in_flight(layouts: Candidates, stage: Column, drained: Column) -> Column:
    """Micro-batches whose activations a stage holds; `drained` where the pipeline drains. [stages, candidates]."""
    stages_after = (layouts.pp - 1 - stage).astype(float)
    held = np.where(layouts.schedule == LOCKSTEP, 2 * stages_after, stages_after) + 1
    return np.where(layouts.drains, drained, held)


def delays(layouts: Candidates, stage: Column) -> Column:
    """D of each stage's gradients, in updates; [stages, candidates]."""
    stages_after = layouts.pp - 1 - stage
    buffered = np.where(layouts.schedule == DOUBLE_BUFFERED, 1, stages_after)
    late = np.where(layouts.schedule == LOCKSTEP, 2 * stages_after, buffered)
    return np.where(layouts.drains, 0, late)


def updates_per_step(layouts: Candidates) -> Column:
    """Optimizer updates in a global batch."""
    once = layouts.drains | (layouts.schedule == DOUBLE_BUFFERED)
    return np.where(once, 1, layouts.num_micro_batches)


def weight_copies(layouts: Candidates, stage: Column, share: Column | float = 1.0) -> Column:
    """Copies of a stage's weights besides those and the optimizer's states: kept apart, predicted, stashed.

    The moment that spike compensation sets aside during an update takes the place that predicted weights have then
    left, or one of its own.

    Args:
        share: of the weights, what a replica's optimizer owns; below 1 where optimizer states are sharded. Then what
            answers keep is a share, too, and so are the masters where they would lie in the module; the weights that
            backwards read are whole, made at once for all of an update.
    """
    mitigation = Mitigation.named(layouts.mitigation)
    late, buffered = np.broadcast_arrays(delays(layouts, stage), layouts.schedule == DOUBLE_BUFFERED)
    copies, kept = np.zeros(late.shape), np.zeros(late.shape)
    for delay in np.unique(late[late > 0]):
        kept[late == delay] = mitigation.kept_copies(int(delay))
        for double_buffered in (False, True):
            held = mitigation.weight_copies(int(delay), double_buffered=double_buffered)
            copies[(late == delay) & (buffered == double_buffered)] = held
    spike = float(mitigation.compensates and not mitigation.predicts) * (late > 0)
    whole = copies - kept
    sharded = np.broadcast_to(share, late.shape) < 1
    return whole + share * (kept + spike) + sharded * (share * (whole == 0) + corrects(layouts, stage))


def predicts(layouts: Candidates, stage: Column) -> Column:
    """Whether forwards read weights that an optimizer's moments make; [stages, candidates]."""
    mitigation, late = Mitigation.named(layouts.mitigation), delays(layouts, stage)
    ahead = mitigation.spectrain & (late + _lag_updates(layouts, stage) > 0)
    return ahead | ((mitigation.predict != "none") & (late > 0))


def corrects(layouts: Candidates, stage: Column) -> Column:
    """Whether backwards read weights made for them, and not kept from the forward; [stages, candidates]."""
    mitigation, late = Mitigation.named(layouts.mitigation), delays(layouts, stage)
    own = (mitigation.spectrain & (_lag_updates(layouts, stage) > 0)) | ((mitigation.correction > 0) & (late > 0))
    stashes = (layouts.schedule == DOUBLE_BUFFERED) | (mitigation.stash & (late > 0))
    return own & ~stashes


def _lag_updates(layouts: Candidates, stage: Column) -> Column:
    """pipeline.schedule.lag_updates, of each stage."""
    return (delays(layouts, 0 * stage) - delays(layouts, stage)) // 2


def gathers(layouts: Candidates, stage: Column) -> Column:
    """Of one update: how often weights are gathered from the replicas that own them; [stages, candidates].

    Those after the update, those that forwards read, those that backwards read, as far as they differ.
    """
    return 1 + predicts(layouts, stage) + corrects(layouts, stage)


def mitigation_seconds(
    layouts: Candidates, params: Column, stage: Column, bandwidth_bytes_per_s: float, *, owned: Column | None = None
) -> Column:
    """Of one update: what the mitigation reads and writes besides the optimizer; [stages, candidates].

    Args:
        params: of a stage.
        owned: of those, the replica's whose optimizer is sharded; None for all. Only who owns a weight works on its
            moments, and makes what forwards and backwards read of it, once an update.

    PipelineStage's copies: weights go into the module and out again at every micro-batch, for its forward where those
    are not the present ones, for its backward where that reads a version kept, or weights of its own.
    """
    mitigation = Mitigation.named(layouts.mitigation)
    stashes = (layouts.schedule == DOUBLE_BUFFERED) | mitigation.stash
    own_forward = stashes | mitigation.predicts
    follows = mitigation.correction > 0
    # At every update: spike compensation, the running mean of updates, the prediction, and copies kept of the weights.
    predict = PREDICTION_PASSES["velocity"] if mitigation.spectrain else PREDICTION_PASSES[mitigation.predict]
    passes = (
        SPIKE_PASSES * mitigation.compensates
        + FEEDBACK_PASSES * (mitigation.feedback > 0)
        + DRIFT_PASSES["update"] * follows
    )
    passes += predict
    copies = COPY_PASSES * ((own_forward | follows) + 1.0 * (stashes & (not mitigation.predicts)))
    # At every micro-batch: weights of its own for the forward, and for the backward where that reads others.
    late = delays(layouts, stage)
    lag_updates = _lag_updates(layouts, stage)
    own_backward = ~stashes & (follows | (mitigation.spectrain & (lag_updates > 0)))
    made = DRIFT_PASSES["backward"] if follows else PREDICTION_PASSES["velocity"]
    each_update = layouts.num_micro_batches / updates_per_step(layouts)
    copies = copies + each_update * EXCHANGE_PASSES * (1.0 * own_forward + (stashes | own_backward))
    own = params if owned is None else owned
    once = owned is not None and (own < params)
    passes = passes + own_backward * made * np.where(once, 1.0, each_update)
    mitigated = (late > 0) | (mitigation.spectrain & (lag_updates > 0))
    return np.where(mitigated, (own * passes + params * copies) * 4.0 / bandwidth_bytes_per_s, 0.0)


def rotation_seconds(
    layouts: Candidates, params: Column, stage: Column, width: int, matmul_s: Callable[[Any, Any, Any], Column]
) -> Column:
    """Of one update: basis rotation, with the stage's weights as squares of the model's width; [stages, candidates].

    Args:
        matmul_s: seconds of a product m x k by k x n. At the speed of a layout's own products, which where these are
            in bf16 is faster than rotation's fp32: a lower bound then.
    """
    mitigation = Mitigation.named(layouts.mitigation)
    if not mitigation.rotate_every or width > LONGEST_TURNED_SIDE:
        return np.zeros(np.broadcast_shapes(np.shape(params), np.shape(delays(layouts, stage))))
    products = ROTATION_PRODUCTS["update"] + ROTATION_PRODUCTS["refresh"] / mitigation.rotate_every
    products += ROTATION_PRODUCTS["prediction"] * (mitigation.predict == "velocity" or mitigation.spectrain)
    seconds = params / width**2 * products * matmul_s(width, width, width)
    return np.where(delays(layouts, stage) > 0, seconds, 0.0)


def schedule_of(layout: Layout) -> PipelineSchedule:
    """The schedule that runs an asynchronous layout."""
    every = layout.num_micro_batches if layout.schedule == "2bw" else 1
    return PipelineSchedule(name=layout.schedule, num_stages=layout.pp, update_every=every)


def convergence(layout: Layout, *, betas: tuple[float, float] = (0.9, 0.95), momentum: float = 0.9) -> dict[str, Any]:
    """What an asynchronous layout changes for learning.

    Args:
        betas, momentum: of AdamW and of SGD at this global batch.
    Returns:
        delays: D of each stage in updates; mitigation; update_batch: sequences an update; adamw and sgd: what the
        hyper-parameters of the global batch become at that batch, rates as factors.
    """
    batch = layout.global_batch // layout.updates_per_step
    adam = scale_adam_hyperparameters(lr=1.0, betas=betas, batch=layout.global_batch, new_batch=batch)
    rate, scaled = scale_hyperparameters(lr=1.0, momentum=momentum, batch=layout.global_batch, new_batch=batch)
    return {
        "delays": schedule_of(layout).delays(),
        "mitigation": layout.mitigation,
        "update_batch": batch,
        "adamw": {"lr_factor": adam.lr, "betas": list(adam.betas)},
        "sgd": {"lr_factor": rate, "momentum": scaled},
    }


def convergence_text(layout: Layout) -> str:
    """`convergence` in a sentence or two."""
    facts = convergence(layout)
    late = [f"{delay:g}" for delay in facts["delays"]]
    shown = ", ".join(late if len(late) <= 8 else [*late[:3], "...", *late[-2:]])
    beta1, beta2 = facts["adamw"]["betas"]
    words = (
        f"{layout}: gradients come {shown} updates late (first stage to last), mitigated by {layout.mitigation}; "
        "gradients are clipped by a norm some updates old. "
    )
    if layout.updates_per_step == 1:
        return words + "One update a step: hyper-parameters stay."
    return words + (
        f"{layout.updates_per_step} updates a step, of {facts['update_batch']} sequences each: AdamW's rate "
        f"x {facts['adamw']['lr_factor']:.3g} and betas {beta1:.4g}, {beta2:.4g} (from 0.9, 0.95); SGD's rate "
        f"x {facts['sgd']['lr_factor']:.3g} and momentum {facts['sgd']['momentum']:.4g} (from 0.9)."
    )
