"""The answers to delay, one class each, behind one interface: what is done before and after a step, what passes read.

A stage's DelayedOptimizer (optimizer.py) holds the answers that its Mitigation names and calls each in turn, so they
compose. An answer may change gradients and moments before the optimizer reads them (after the user's own hooks), change
the step after it, and say which weights forwards and backwards read. What it must remember from update to update it
keeps in `kept`, a tensor a parameter, which is saved with the stage. The runtime and the emulator call the same code.

Here D is the delay, lr the learning rate, g the gradient, u the optimizer's first moment, m its momentum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.parallel.pipeline.mitigation import LONGEST_TURNED_SIDE, Mitigation
from fourfold.parallel.pipeline.moments import Slot

Weights = list[Tensor]


@dataclass(slots=True)
class Lateness:
    """What every answer of a stage knows.

    Attributes:
        delay: D, in updates.
        lag_updates: updates of this stage from its backward of a micro-batch to that of stage 0.
        num_updates: made so far.
    """

    mitigation: Mitigation
    delay: float
    lag_updates: int
    num_updates: int = 0

    @property
    def rate_factor(self) -> float:
        """PipeMare's rescheduling: lr D^-p with p = 1 - k / n at update k < n, then lr."""
        anneal = self.mitigation.reschedule_updates
        if not anneal or self.delay <= 1:
            return 1.0
        return float(self.delay ** -(1 - min(self.num_updates / anneal, 1.0)))


class Answer:
    """Does nothing; each method is a place where an answer may act.

    Attributes:
        kinds: names of what it keeps; `kept[kind]` has a tensor for every parameter once there is something to keep.
        needs_old: whether `after_update` needs the weights from before the update.
        starts_blank: whether `kept` is there, as zeros, before the first update.
    """

    kinds: tuple[str, ...] = ()
    needs_old = False
    starts_blank = False

    def __init__(self, late: Lateness) -> None:
        self.late = late
        self.kept: dict[str, Weights] = {}

    def blank(self, slots: Sequence[Slot]) -> dict[str, Weights]:
        """Zeros in the shape of all that it may keep, to be filled from a file."""
        return {kind: [torch.zeros_like(slot.parameter) for slot in slots] for kind in self.kinds}

    def before_step(self, slots: Sequence[Slot]) -> None:
        """Before the step of the optimizer that owns `slots`, after the user's own hooks."""

    def after_step(self, slots: Sequence[Slot]) -> None:
        """After that step."""

    def after_update(self, slots: Sequence[Slot], old: Weights) -> None:
        """After the steps of all optimizers; `old` are the weights before, where `needs_old`."""

    def outward(self, slot: Slot, moved: Tensor) -> Tensor:
        """A step in the optimizer's coordinates as a step of the weights."""
        return moved


class Shrinking(Answer):
    """g times shrink^D. Zhuang et al. 2019 (arXiv 1906.12043)."""

    def before_step(self, slots: Sequence[Slot]) -> None:
        gradients = [slot.parameter.grad for slot in slots if slot.parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, self.late.mitigation.shrink**self.late.delay)


class RateRescheduling(Answer):
    """lr D^-p, p from 1 to 0 over the first updates. PipeMare: Yang et al. 2021 (arXiv 1910.05124), technique 1."""

    def before_step(self, slots: Sequence[Slot]) -> None:
        self._groups = list({id(slot.group): slot.group for slot in slots}.values())
        self._rates = [group["lr"] for group in self._groups]
        factor = self.late.rate_factor
        for group in self._groups if factor != 1 else []:
            group["lr"] = group["lr"] * factor

    def after_step(self, slots: Sequence[Slot]) -> None:
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate


class SpikeCompensation(Answer):
    """The step reads u* = a u+ + b share c g in place of u+. Kosson et al. 2021 (arXiv 2003.11666), section 3.2.

    For SGD (share = 1, c = 1) this is their w+ = w - lr (a v+ + b g), at the same total weight of a gradient. For the
    Adams c = 1 - beta1^t makes the weights in the bias-corrected mean sum to one from the first update on; the second
    moment counts sizes, not directions, and is left alone. Where the optimizer is Nesterov's by itself (NAdam,
    nesterov=True) its step then looks D + 1 ahead, as SC_(D+1) does (torch's NAdam only late: its momentum starts at
    half of beta1, hence half of a step is the newest gradient anyway). With look_ahead = 1, AdamW becomes the NAdamW of
    Ajanthan et al. 2025 (arXiv 2505.01099), without a schedule of the momentum.

    The optimizer computes u* itself when it finds u' = a u + ((a share + b share c - share) / m) g in place of u, since
    m u' + share g = u*; afterwards the true u+ is put back.
    """

    def before_step(self, slots: Sequence[Slot]) -> None:
        self._true: list[tuple[Slot, Tensor]] = []
        for slot in slots:
            m, share = slot.momentum, slot.share
            if slot.parameter.grad is None or m == 0:
                continue  # without momentum u+ is the gradient: u* has the same direction and weight
            state = slot.optimizer.state[slot.parameter]
            if state.get(slot.moment_key) is None:
                if not slot.is_sgd:
                    continue  # a first moment of the Adams and of Muon is all gradient: as above
                state[slot.moment_key] = torch.zeros_like(slot.parameter)
            moment, gradient = state[slot.moment_key], slot.gradient()
            # The true u+ goes aside, and u' takes the place of u.
            a, b = self.late.mitigation.coefficients(self.late.delay, m)
            c = 1 - m ** (slot.num_updates + 1) if slot.is_adam else 1.0
            self._true.append((slot, moment.mul(m).add_(gradient, alpha=share)))
            moment.mul_(a).add_(gradient, alpha=(a * share + b * share * c - share) / m)

    def after_step(self, slots: Sequence[Slot]) -> None:
        for slot, moment in self._true:
            slot.state[slot.moment_key] = moment
        self._true = []


class LastGradient(Answer):
    """Keeps g where SGD keeps no moment: without momentum the paper's velocity v+ = m v + g is the gradient itself."""

    kinds = ("gradient",)
    starts_blank = True

    def blank(self, slots: Sequence[Slot]) -> dict[str, Weights]:
        """Zeros for SGD's parameters without momentum, nothing for the others."""
        bare = [slot.is_sgd and slot.momentum == 0 for slot in slots]
        sizes = [slot.parameter.shape if used else (0,) for slot, used in zip(slots, bare, strict=True)]
        return {"gradient": [slot.parameter.new_zeros(size) for slot, size in zip(slots, sizes, strict=True)]}

    def before_step(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            if slot.parameter.grad is not None and slot.is_sgd and slot.momentum == 0:
                self.kept["gradient"][slot.index] = slot.gradient().clone()


class WeightsBefore(Answer):
    """Keeps the weights before the newest update, for LWP^w: w + T (w - w_before)."""

    kinds = ("before",)
    needs_old = True

    def after_update(self, slots: Sequence[Slot], old: Weights) -> None:
        self.kept = {"before": old}


class DriftCorrection(Answer):
    """d+ = c d + (1 - c)(w+ - w), c = correction^(1/D); backwards read w - D d. PipeMare, technique 2."""

    kinds = ("drift",)
    needs_old = True

    def after_update(self, slots: Sequence[Slot], old: Weights) -> None:
        decay = self.late.mitigation.correction ** (1 / self.late.delay)
        drifts = self.kept.setdefault("drift", [torch.zeros_like(tensor) for tensor in old])
        for drift, slot, before in zip(drifts, slots, old, strict=True):
            drift.mul_(decay).add_(slot.parameter.detach() - before, alpha=1 - decay)

    def backward_weights(self, slots: Sequence[Slot]) -> Weights | None:
        if not self.kept:
            return None
        pairs = zip(slots, self.kept["drift"], strict=True)
        return [slot.parameter.detach() - self.late.delay * drift for slot, drift in pairs]


class ErrorFeedback(Answer):
    """w+ = w - u - f (u - u_old): the step D updates ago was u_old where, as is known by now, u was due.

    u is the optimizer's whole step, whichever optimizer it is. Zmushko et al. 2026 (arXiv 2606.30634) correct one
    update of delay in this way; for longer delays the step of D updates ago is meant here, for which D are kept.
    Updates are counted by parameter: one that had no gradient at some is corrected by the steps that it did take.
    """

    starts_blank = True

    def __init__(self, late: Lateness) -> None:
        super().__init__(late)
        self._delay = -int(-late.delay // 1)
        self.kinds = ("made", *(f"step{age}" for age in range(self._delay)))

    def blank(self, slots: Sequence[Slot]) -> dict[str, Weights]:
        """Zeros: the updates made of each parameter, and its last D steps."""
        return {**super().blank(slots), "made": [torch.zeros((), dtype=torch.int64, device="cpu") for _ in slots]}

    def before_step(self, slots: Sequence[Slot]) -> None:
        self._old = [(slot, slot.parameter.detach().clone()) for slot in slots if slot.parameter.grad is not None]

    def after_step(self, slots: Sequence[Slot]) -> None:
        for slot, before in self._old:
            made = self.kept["made"][slot.index]
            # The update at number k is kept in place k mod D, hence this place holds the one of D updates ago.
            step, kept = before - slot.parameter.detach(), self.kept[f"step{int(made) % self._delay}"][slot.index]
            if made >= self._delay:
                slot.parameter.sub_(step - kept, alpha=self.late.mitigation.feedback)
            kept.copy_(step)
            made += 1
        self._old = []


class BasisRotation(Answer):
    """Adam steps in the eigenbasis of its gradients' covariance: g' = Q_L^T g Q_R, and w+ = w - Q_L step(g') Q_R^T.

    A delayed step of Adam goes wrong where curvature is not along the coordinates; along the eigenvectors it is.
    For a matrix, L+ = beta2 L + (1 - beta2) g g^T and R+ likewise of g^T g; every `rotate_every` updates one step of
    power iteration, Q_L = qr(L Q_L), follows their eigenvectors, and the first moment is turned into the new basis (the
    second, which only sizes steps, is left, as in SOAP). Sides longer than 4096, vectors and complex matrices
    are not turned.

    Source: Jung et al. 2026 (arXiv 2602.03515); Vyas et al. 2024 (SOAP, arXiv 2409.11321).
    """

    kinds = ("rows", "columns", "row_basis", "column_basis")
    starts_blank = True
    longest_side = LONGEST_TURNED_SIDE

    def __init__(self, late: Lateness) -> None:
        super().__init__(late)
        self._begun: dict[tuple[str, int], Tensor] = {}  # bases that were seen to be no longer zero

    def blank(self, slots: Sequence[Slot]) -> dict[str, Weights]:
        """Squares for the sides that are turned, nothing for the others."""
        kept: dict[str, Weights] = {kind: [] for kind in self.kinds}
        for slot in slots:
            p = slot.parameter
            turned = p.ndim == 2 and slot.is_adam and not p.is_complex()
            sides = (p.shape[0], p.shape[1]) if turned else (0, 0)
            rows, columns = (side if side <= self.longest_side else 0 for side in sides)
            for kind, side in zip(self.kinds, (rows, columns, rows, columns), strict=True):
                kept[kind].append(torch.zeros(side, side, dtype=p.dtype, device=p.device))
        return kept

    def before_step(self, slots: Sequence[Slot]) -> None:
        self._old: dict[int, Tensor] = {}
        for slot in slots:
            p, bases = slot.parameter, self._of(slot, "row_basis", "column_basis")
            if p.grad is None or not any(basis.numel() for basis in bases):
                continue
            gradient = slot.gradient()
            self._follow(slot, gradient)
            turned = _turn(gradient, bases[0].T, bases[1])
            p.grad = -turned if slot.group.get("maximize", False) else turned
            # At weights of zero the optimizer leaves its bare step there, in its own coordinates.
            self._old[slot.index] = p.detach().clone()
            p.zero_()

    def after_step(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            old = self._old.pop(slot.index, None)
            if old is not None:
                kept = 1.0 if slot.decay_is_coupled else 1 - slot.group["lr"] * slot.group["weight_decay"]
                slot.parameter.copy_(old * kept + self.outward(slot, slot.parameter))

    def outward(self, slot: Slot, moved: Tensor) -> Tensor:
        rows, columns = self._of(slot, "row_basis", "column_basis")
        return _turn(moved, rows, columns.T)

    def _of(self, slot: Slot, *kinds: str) -> tuple[Tensor, ...]:
        return tuple(self.kept[kind][slot.index] for kind in kinds)

    def _follow(self, slot: Slot, gradient: Tensor) -> None:
        """Add the gradient to the covariances; every so often move bases and first moment after them."""
        beta = float(slot.group["betas"][1])
        covariances, bases = self._of(slot, "rows", "columns"), self._of(slot, "row_basis", "column_basis")
        for covariance, square in zip(covariances, (gradient @ gradient.T, gradient.T @ gradient), strict=True):
            if covariance.numel():
                covariance.lerp_(square, 1 - beta)
        if self.late.num_updates % self.late.mitigation.rotate_every:
            return
        moment = slot.state.get("exp_avg")
        if moment is not None:
            moment.copy_(self.outward(slot, moment))
        for kind, covariance, basis in zip(("row", "column"), covariances, bases, strict=True):
            if basis.numel():
                # Looked at once: on a device that waits.
                started = self._begun.get((kind, slot.index)) is basis or bool(basis.any())
                found = torch.linalg.qr(covariance @ basis).Q if started else torch.linalg.eigh(covariance).eigenvectors
                basis.copy_(found)
                self._begun[kind, slot.index] = basis
        if moment is not None:
            moment.copy_(_turn(moment, bases[0].T, bases[1]))


def _turn(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left @ matrix @ right, without the sides that are empty."""
    matrix = left @ matrix if left.numel() else matrix
    return matrix @ right if right.numel() else matrix


def answers_of(late: Lateness) -> list[Answer]:
    """The answers that the mitigation names, in the order in which they act before a step; after it, in reverse."""
    mitigation, delay = late.mitigation, late.delay
    velocity = mitigation.predict == "velocity" or mitigation.spectrain
    chosen: list[tuple[bool, type[Answer]]] = [
        (mitigation.shrink < 1 and delay > 0, Shrinking),
        (mitigation.reschedule_updates > 0 and delay > 0, RateRescheduling),
        (mitigation.feedback > 0 and delay > 0, ErrorFeedback),
        (velocity and delay + late.lag_updates * mitigation.spectrain > 0, LastGradient),
        (mitigation.rotate_every > 0 and delay > 0, BasisRotation),
        (mitigation.compensates and delay > 0, SpikeCompensation),
        (mitigation.predict == "weight" and delay > 0, WeightsBefore),
        (mitigation.correction > 0 and delay > 0, DriftCorrection),
    ]
    return [answer(late) for used, answer in chosen if used]
