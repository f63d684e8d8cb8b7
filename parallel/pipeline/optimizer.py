"""A torch.optim optimizer that knows how late its gradients are.

torch.optim has no place to say that a gradient is D updates old. This wrapper leaves the optimizer as it is and changes
what it reads, so every option of it (foreach, fused, amsgrad, decoupled decay) keeps its meaning.

Spike compensation. Each supported optimizer keeps one first moment u+ = m u + w g, and its step is a function of u+:

    SGD            w = 1 - dampening     step = lr u+            (nesterov: lr (w g + m u+))
    Adam, AdamW    w = 1 - beta1         step = lr (u+ / (1 - beta1^t)) / (sqrt(second moment) + eps)
    NAdam          w = 1 - beta1         as Adam, of a mean of g and u+
    Muon           w = 1 - m             step = lr orthogonalised(u+)    (nesterov: of (1 - m) g + m u+)

For SGD the paper replaces u+ in the step by u* = a u+ + b g, at the same total weight of a gradient. In general
u* = a u+ + b w c g, where c = 1 - beta1^t for the Adams makes the weights in the bias-corrected mean sum to one from
the first update on (c = 1 for SGD and Muon); the second moment counts sizes, not directions, and is left alone. Where
the optimizer is Nesterov's by itself (NAdam, nesterov=True) its step then looks D + 1 ahead, as SC_(D+1) does
(torch's NAdam only late: its momentum starts at half of beta1, hence half of a step is the newest gradient anyway).
The optimizer computes u* itself when it finds u' = a u + ((a w + b w c - w) / m) g in place of u, since
m u' + w g = u*; afterwards the true u+ is put back.

Weight prediction in velocity form supposes that the next T steps are the present one without its gradient. SGD's paper
rule is w - lr T v, T times the step of the moment u = v. For the others likewise, T step(u) with nothing new in u:

    Adam, AdamW    u_hat = u / (1 - beta1^t) moves by a share of 1 - beta1 an update, v_hat by 1 - beta2: over T steps
                   w - lr T u_hat / (sqrt(v_hat) + eps), as XPipe (arXiv 1911.04610)
    NAdam          mixes g and u+; the best guess of a gradient not yet seen is u_hat, so the mix is u_hat: Adam's
    Muon           w - lr T orthogonalised(u): steps of a set size, as long as the directions of u stay

each without weight decay, which moves w by lr T times the decay at most. The weight form w + T (w - w_before) needs no
knowledge of the optimizer.
Whether any of it helps: benchmarks/pipelined_backprop/README.md.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from fourfold.parallel.pipeline.mitigation import Mitigation

_MUON: type[Optimizer] | None = getattr(torch.optim, "Muon", None)
_ADAMS = (Adam, AdamW, NAdam)


class DelayedOptimizer:
    """Steps an optimizer whose gradients are `delay` updates late, and says which weights to compute with.

    Args:
        optimizer: over the stage's parameters; its state is its own and saved as usual.
        delay: D in updates; at 0 (and behind 0) every method is the plain optimizer's, bit for bit.
        behind: e, updates of this stage from its backward of a micro-batch to that of stage 0 (for SpecTrain).
    Raises:
        ValueError: a mitigation that reads the momentum (sc, lwpv, spectrain) of an optimizer that is not supported.
    """

    def __init__(self, optimizer: Optimizer, *, delay: float, mitigation: Mitigation, behind: int = 0) -> None:
        self.optimizer = optimizer
        self.delay = delay
        self.mitigation = mitigation
        self.behind = behind
        self.num_updates = 0
        self._parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self._before: list[Tensor] | None = None
        self._drift: list[Tensor] | None = None
        compensates = mitigation.spike or mitigation.spike_coefficients is not None
        if compensates or mitigation.predict == "velocity" or mitigation.spectrain:
            _check_supported(optimizer)
        self._compensates = bool(compensates) and delay > 0

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients in `.grad`, which it may scale. Cost: that of the optimizer, and for sc two
        passes over moments and gradients."""
        mitigation, delay = self.mitigation, self.delay
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if mitigation.shrink < 1 and delay and gradients:
            torch._foreach_mul_(gradients, mitigation.shrink**delay)
        remembers = delay > 0 and (mitigation.predict == "weight" or mitigation.correction > 0)
        self._before = None  # made room for before its successor is
        before = [p.detach().clone() for p in self._parameters] if remembers else None
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * self._rate_factor() if self._rate_factor() != 1 else group["lr"]
        moments = self._exchange_moments() if self._compensates else []
        self.optimizer.step()
        for state, key, moment in moments:
            state[key] = moment
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.num_updates += 1
        if before is not None:
            self._before = before if mitigation.predict == "weight" else None
            if mitigation.correction:
                self._follow(before)

    @property
    def predicts(self) -> bool:
        """Whether forwards read other weights than the present ones."""
        return (self.mitigation.spectrain and self.delay + self.behind > 0) or (
            self.mitigation.predict != "none" and self.delay > 0
        )

    @property
    def corrects(self) -> bool:
        """Whether backwards read other weights than the present ones."""
        return (self.mitigation.spectrain and self.behind > 0) or (self.mitigation.correction > 0 and self.delay > 0)

    @torch.no_grad()
    def forward_weights(self) -> list[Tensor] | None:
        """New tensors with the weights that a forward should read now, in the optimizer's order; None: the weights."""
        if not self.predicts:
            return None
        if self.mitigation.spectrain:
            return self._ahead(self.delay + self.behind)
        horizon = self.mitigation.horizon * self.delay
        if self.mitigation.predict == "velocity":
            return self._ahead(horizon)
        if self._before is None:
            return [p.detach().clone() for p in self._parameters]
        return [torch.lerp(old, p.detach(), 1 + horizon) for old, p in zip(self._before, self._parameters, strict=True)]

    @torch.no_grad()
    def backward_weights(self) -> list[Tensor] | None:
        """New tensors with the weights that a backward should read now; None: the weights."""
        if self.mitigation.spectrain and self.behind:
            return self._ahead(self.behind)
        if self._drift is not None:
            return [p.detach() - self.delay * d for p, d in zip(self._parameters, self._drift, strict=True)]
        return None

    def remembered(self, *, blank: bool = False) -> dict[str, list[Tensor]]:
        """What the mitigation keeps from update to update, a tensor a parameter: "before", "drift", as far as there is.

        Args:
            blank: zeros for all that there may be, to be filled from a file.
        """
        if blank:
            kinds = {"before": self.mitigation.predict == "weight", "drift": self.mitigation.correction > 0}
            zeros = [torch.zeros_like(p) for p in self._parameters]
            return {kind: [zero.clone() for zero in zeros] for kind, used in kinds.items() if used and self.delay > 0}
        kept = {"before": self._before, "drift": self._drift}
        return {kind: tensors for kind, tensors in kept.items() if tensors is not None}

    def go_on(self, num_updates: int, remembered: dict[str, list[Tensor]]) -> None:
        """Set the count of updates and what `remembered` returned; the optimizer's state is its own matter."""
        self.num_updates = num_updates
        self._before, self._drift = remembered.get("before"), remembered.get("drift")

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "num_updates": self.num_updates,
            "before": self._before,
            "drift": self._drift,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_updates = state["num_updates"]
        self._before = None if state["before"] is None else [tensor.clone() for tensor in state["before"]]
        self._drift = None if state["drift"] is None else [tensor.clone() for tensor in state["drift"]]

    def _rate_factor(self) -> float:
        anneal = self.mitigation.reschedule_updates
        if not anneal or self.delay <= 1:
            return 1.0
        return float(self.delay ** -(1 - min(self.num_updates / anneal, 1.0)))

    def _follow(self, before: list[Tensor]) -> None:
        decay = self.mitigation.correction ** (1 / self.delay)
        if self._drift is None:
            self._drift = [torch.zeros_like(tensor) for tensor in before]
        for drift, new, old in zip(self._drift, self._parameters, before, strict=True):
            drift.mul_(decay).add_(new.detach() - old, alpha=1 - decay)

    def _exchange_moments(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Put u' in place of the first moments; returns where the true new ones belong."""
        true: list[tuple[dict[str, Any], str, Tensor]] = []
        for group in self.optimizer.param_groups:
            momentum = _momentum(group)
            if momentum == 0:
                continue
            a, b = self.mitigation.coefficients(self.delay, momentum)
            adam = "betas" in group
            key = "exp_avg" if adam else "momentum_buffer"
            share = 1 - group["dampening"] if "dampening" in group else 1 - momentum
            bias = 1 - momentum ** (self.num_updates + 1) if adam else 1.0
            slope = (a * share + b * share * bias - share) / momentum
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.optimizer.state[p]
                if state.get(key) is None:
                    if "dampening" not in group:
                        continue  # the first moment is all gradient: u* and u+ have the same direction and weight
                    state[key] = torch.zeros_like(p)
                moment, gradient = state[key], _gradient(group, p, coupled=_decay_is_coupled(self.optimizer, group))
                true.append((state, key, moment.mul(momentum).add_(gradient, alpha=share)))
                moment.mul_(a).add_(gradient, alpha=slope)
        return true

    def _ahead(self, horizon: float) -> list[Tensor]:
        weights: list[Tensor] = []
        for group in self.optimizer.param_groups:
            rate = float(group["lr"]) * self._rate_factor()
            for p in group["params"]:
                state = self.optimizer.state.get(p, {})
                moment = state.get("exp_avg" if "betas" in group else "momentum_buffer")
                if moment is None:
                    weights.append(p.detach().clone())
                else:
                    weights.append(self._step_from(group, p.detach(), state, moment, rate * horizon))
        return weights

    def _step_from(
        self, group: dict[str, Any], p: Tensor, state: dict[str, Any], moment: Tensor, rate: float
    ) -> Tensor:
        if "betas" in group:
            bias, square_bias = (1 - float(beta) ** self.num_updates for beta in group["betas"])
            square = state.get("max_exp_avg_sq", state["exp_avg_sq"])
            return torch.addcdiv(p, moment, (square / square_bias).sqrt_().add_(group["eps"]), value=-rate / bias)
        if _MUON is not None and isinstance(self.optimizer, _MUON):
            # Muon's own step on a throw-away copy whose whole gradient is the moment: its orthogonalisation, once more.
            copy = torch.nn.Parameter(p.clone())
            copy.grad = moment.clone()
            same = {key: group[key] for key in ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
            _MUON([copy], lr=rate, momentum=0.0, nesterov=False, weight_decay=0.0, **same).step()  # type: ignore[call-arg]
            return copy.detach()
        return torch.add(p, moment, alpha=-rate)


def _momentum(group: dict[str, Any]) -> float:
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def _gradient(group: dict[str, Any], p: Tensor, *, coupled: bool) -> Tensor:
    """The gradient as the optimizer will read it."""
    assert p.grad is not None
    gradient = -p.grad if group.get("maximize", False) else p.grad
    return gradient.add(p.detach(), alpha=group["weight_decay"]) if coupled and group["weight_decay"] else gradient


def _decay_is_coupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    if isinstance(optimizer, SGD):
        return True
    return isinstance(optimizer, _ADAMS) and not group.get("decoupled_weight_decay", isinstance(optimizer, AdamW))


def _check_supported(optimizer: Optimizer) -> None:
    known: tuple[type[Optimizer], ...] = (SGD, *_ADAMS, *([_MUON] if _MUON is not None else []))
    if not isinstance(optimizer, known):
        raise ValueError(
            f"{type(optimizer).__name__}: sc, lwpv and spectrain read the first moment of "
            f"{', '.join(kind.__name__ for kind in known)} only; use lwpw, which works with every optimizer"
        )


OptimizerFactory = Callable[[list[torch.nn.Parameter]], Optimizer]
