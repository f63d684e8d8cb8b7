"""The equations that make up for stale gradients, and the mitigations by name. No torch in this file.

With delay D (in updates) the gradient g that a stage applies was computed from weights D updates old. For SGD with
momentum m, v+ = m v + g, w+ = w - lr v+, Kosson et al. propose

    spike compensation (SC)          w+ = w - lr (a v+ + b g),   a = m^D,   b = (1 - m^D) / (1 - m)
    linear weight prediction (LWP)   the forward runs at w - lr T v, or at w + T (w - w_before)

answers.py applies them, and every other answer to delay that Mitigation names, to SGD, Adam, AdamW, NAdam and Muon.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Literal, NamedTuple

LONGEST_TURNED_SIDE = 4096
"""Of a matrix: longer ones have no eigenbasis of their own in basis rotation."""


def spike_compensation(delay: float, momentum: float) -> tuple[float, float]:
    """The pair (a, b) of SC_D: a = m^D, b = (1 - m^D) / (1 - m).

    A gradient that comes D updates late gets at once, in one spike (b), the weight it would have gathered by now, and
    joins the momentum as if it had arrived in time (a). The total weight of a gradient stays
    b + a / (1 - m) = 1 / (1 - m). D = 0 is plain momentum, D = 1 is Nesterov's.

    Args:
        delay: D, in updates, at least 0; need not be whole.
        momentum: m in [0, 1).
    Raises:
        ValueError: an argument out of range.
    Source: Kosson et al. 2021 (arXiv 2003.11666), section 3.2.
    """
    _check(delay=delay, momentum=momentum)
    a = momentum**delay if delay else 1.0
    return a, (1 - a) / (1 - momentum)


def equivalent_horizon(delay: float, momentum: float) -> float:
    """The horizon T at which LWP moves a quadratic as SC_D does: T = m (1 - m^D) / (1 - m).

    Both have the same characteristic polynomial when the delay is consistent (b = T / m, a = 1 - T (1 - m) / m).
    """
    _check(delay=delay, momentum=momentum)
    return momentum * spike_compensation(delay, momentum)[1]


def scale_hyperparameters(*, lr: float, momentum: float, batch: float, new_batch: float) -> tuple[float, float]:
    """SGD's learning rate and momentum for another batch size, with the same effect of each sample over time.

    m' = m^(N'/N): a gradient fades as fast a sample. lr' = lr (1 - m') N' / ((1 - m) N): its total effect stays.
    SGD's weight decay is part of the gradient and stays as it is.

    Raises:
        ValueError: an argument out of range.
    Source: Kosson et al. 2021 (arXiv 2003.11666), section 3.1.
    """
    _check(momentum=momentum, lr=lr, batch=batch, new_batch=new_batch)
    scaled = momentum ** (new_batch / batch)
    return (1 - scaled) * new_batch / ((1 - momentum) * batch) * lr, scaled


class AdamHyperparameters(NamedTuple):
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def scale_adam_hyperparameters(
    *,
    lr: float,
    betas: tuple[float, float],
    batch: float,
    new_batch: float,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> AdamHyperparameters:
    """Adam's, AdamW's and NAdam's hyper-parameters for another batch size.

    With k = N'/N: beta' = beta^k for both (the same memory in samples), lr' = lr sqrt(k), eps' = eps / sqrt(k), because
    Adam divides by the size of its gradients, which for small batches is noise and grows as 1 / sqrt(N'). Decoupled
    decay shrinks weights by lr * weight_decay an update; weight_decay' = weight_decay sqrt(k) keeps that a sample.
    The square root holds where noise dominates the gradient, as with batch one; it is a rule, not an identity.

    Raises:
        ValueError: an argument out of range.
    Source: Malladi et al. 2022 (arXiv 2205.10287), the square-root rule; betas as powers, as in scale_hyperparameters.
    """
    _check(lr=lr, batch=batch, new_batch=new_batch, momentum=betas[0])
    _check(momentum=betas[1])
    k = new_batch / batch
    return AdamHyperparameters(
        lr=lr * sqrt(k),
        betas=(betas[0] ** k, betas[1] ** k),
        eps=eps / sqrt(k),
        weight_decay=weight_decay * sqrt(k),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Mitigation:
    """What to do about a delay of D updates. The defaults do nothing.

    Attributes:
        spike: SC with k D in place of D; 0 for none, 1 for SC_D, 2 for over-compensation.
        spike_coefficients: (a, b) outright, in place of `spike`.
        predict: "velocity" (LWP^v, w - lr T v) or "weight" (LWP^w, w + T (w - w_before)) in the forward.
        horizon: T in units of D.
        stash: the backward reads the weights of its forward (PipeDream); one copy of the weights a version in flight.
        spectrain: predict in the forward and in the backward the weights of the time when the micro-batch is done on
            stage 0 (Chen et al. 2018, arXiv 1809.02839): T = D + e and T = e with e = (D_0 - D) // 2 updates.
        reschedule_updates: PipeMare's first technique (Yang et al. 2021, arXiv 1910.05124): lr / D^p with
            p = 1 - k / reschedule_updates at update k, for D > 1. 0 for none.
        correction: PipeMare's second technique: the backward reads w - D d, an estimate of its forward's weights, with
            d the running mean of updates, d+ = c d + (1 - c) (w+ - w), c = correction^(1/D). 0 for none; 0.135 there.
        shrink: every gradient times shrink^D (Zhuang et al. 2019, arXiv 1906.12043). 1 for none.
        look_ahead: SC at this delay, whatever the schedule's; 1 is Nesterov's momentum, which for AdamW is NAdamW
            (Ajanthan et al. 2025, arXiv 2505.01099; beta1 = 0.99 there). 0 for none.
        feedback: error feedback (Zmushko et al. 2026, arXiv 2606.30634): D updates ago the step u_old was made in place
            of the one that is known now, u; the error is made good, w+ = w - u - feedback (u - u_old). 0 for none.
        rotate_every: basis rotation (Jung et al. 2026, arXiv 2602.03515): Adam steps in the eigenbasis of its
            gradients' covariance, found anew every so many updates. 0 for none.
    """

    spike: float = 0.0
    spike_coefficients: tuple[float, float] | None = None
    predict: Literal["none", "velocity", "weight"] = "none"
    horizon: float = 1.0
    stash: bool = False
    spectrain: bool = False
    reschedule_updates: int = 0
    correction: float = 0.0
    shrink: float = 1.0
    look_ahead: float = 0.0
    feedback: float = 0.0
    rotate_every: int = 0

    def __post_init__(self) -> None:
        for name in ("spike", "horizon", "reschedule_updates", "look_ahead", "feedback", "rotate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: at least 0")
        if not 0 <= self.correction < 1 or not 0 < self.shrink <= 1:
            raise ValueError(f"correction={self.correction} lies in [0, 1), shrink={self.shrink} in (0, 1]")
        if sum((self.stash, self.spectrain, self.correction > 0)) > 1:
            raise ValueError("stash, spectrain and correction each choose the weights of the backward: take one")
        if self.spectrain and self.predict != "none":
            raise ValueError("spectrain predicts by itself: leave out lwpv and lwpw")
        if self.look_ahead and (self.spike or self.spike_coefficients is not None):
            raise ValueError("sc and nesterov each set the newest gradient's share of a step: take one")

    @classmethod
    def named(cls, name: str) -> "Mitigation":
        """The mitigation called `name`: words joined by "+".

        none, stash, sc, sc2d, lwpv, lwpv2d, lwpw, lwpw2d, spectrain, pipemare-lr (over 1000 updates), pipemare-dc,
        shrink (0.98 an update of delay), nesterov, ef (error feedback), rotate (basis rotation, every 10 updates).
        "2d" doubles D. Other settings: make the Mitigation itself.
        """
        settings: dict[str, object] = {}
        for word in name.split("+"):
            if word not in _WORDS:
                raise ValueError(f"mitigation {name!r}: {word!r} is not among {', '.join(_WORDS)} (joined by '+')")
            for key, value in _WORDS[word].items():
                if key in settings:
                    raise ValueError(f"mitigation {name!r} says twice what to do about {key}")
                settings[key] = value
        return cls(**settings)  # type: ignore[arg-type]

    def coefficients(self, delay: float, momentum: float) -> tuple[float, float]:
        """(a, b) of spike compensation at `delay`; (1, 0) changes nothing."""
        if not delay:
            return 1.0, 0.0
        if self.look_ahead:
            return spike_compensation(self.look_ahead, momentum)
        return self.spike_coefficients or spike_compensation(self.spike * delay, momentum)

    @property
    def compensates(self) -> bool:
        """Whether a step weighs its newest gradient otherwise than the optimizer would."""
        return bool(self.spike or self.look_ahead) or self.spike_coefficients is not None

    @property
    def reads_momentum(self) -> bool:
        """Whether it needs to know where the optimizer keeps its first moment."""
        return self.compensates or self.predict == "velocity" or self.spectrain

    @property
    def predicts(self) -> bool:
        return self.predict != "none" or self.spectrain

    def kept_copies(self, delay: float) -> int:
        """Of `weight_copies`, what is kept of each parameter for its next updates, where its optimizer is.

        The weights before, the running mean of updates, error feedback's steps, basis rotation's squares.
        """
        if not delay:
            return 0
        kept = (self.predict == "weight") + (self.correction > 0)
        return kept + (self.feedback > 0) * -int(-delay // 1) + 4 * (self.rotate_every > 0)

    def weight_copies(self, delay: float, *, double_buffered: bool = False) -> int:
        """Copies of a stage's weights that this holds at `delay` beyond the weights and the optimizer's own state.

        Parameters live in one place and the optimizer's in another as soon as a forward or backward reads other weights
        (1); the predicted weights (1); the weights before, for LWP^w (1); the running mean of updates (1); error
        feedback's last D steps (D); basis rotation's covariances and bases of both sides of a matrix (4, for a square
        one); stashing keeps the weights of every version in flight instead, double buffering (2bw) those of two.
        """
        if not delay:
            return 0
        held = int(self.predicts or self.stash or self.correction > 0 or double_buffered)
        held += self.predicts + self.kept_copies(delay)
        if double_buffered:
            return held + 2 - self.predicts
        return held + (int(-(-delay // 1)) + (not self.predicts) if self.stash else 0)


_WORDS: dict[str, dict[str, object]] = {
    "none": {},
    "stash": {"stash": True},
    "sc": {"spike": 1.0},
    "sc2d": {"spike": 2.0},
    "lwpv": {"predict": "velocity"},
    "lwpv2d": {"predict": "velocity", "horizon": 2.0},
    "lwpw": {"predict": "weight"},
    "lwpw2d": {"predict": "weight", "horizon": 2.0},
    "spectrain": {"spectrain": True},
    "pipemare-lr": {"reschedule_updates": 1000},
    "pipemare-dc": {"correction": 0.135},
    "shrink": {"shrink": 0.98},
    "nesterov": {"look_ahead": 1.0},
    "ef": {"feedback": 1.0},
    "rotate": {"rotate_every": 10},
}


def _check(**values: float) -> None:
    for name, value in values.items():
        if name == "momentum" and not 0 <= value < 1:
            raise ValueError(f"momentum (beta) {value} must lie in [0, 1)")
        if name in ("delay", "lr") and value < 0:
            raise ValueError(f"{name}={value}: at least 0")
        if name in ("batch", "new_batch") and value <= 0:
            raise ValueError(f"{name}={value}: more than 0")
