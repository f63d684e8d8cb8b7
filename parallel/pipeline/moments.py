"""What the supported optimizers have in common: one first moment, and a step that is a function of it.

torch.optim has no common name for this, and the answers to delay (answers.py) need it: u+ = m u + share g, then

    SGD            share = 1 - dampening     step = lr u+            (nesterov: lr (share g + m u+))
    Adam, AdamW    share = 1 - beta1         step = lr (u+ / (1 - beta1^t)) / (sqrt(second moment) + eps)
    NAdam          share = 1 - beta1         as Adam, of a mean of g and u+
    Muon           share = 1 - m             step = lr orthogonalised(u+)    (nesterov: of (1 - m) g + m u+)
"""

from dataclasses import dataclass
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

_MUON: type[Optimizer] | None = getattr(torch.optim, "Muon", None)
_KNOWN: tuple[type[Optimizer], ...] = (NAdam, AdamW, Adam, SGD, *([_MUON] if _MUON is not None else []))


@dataclass(slots=True)
class Slot:
    """A parameter in its place: the optimizer that owns it and the group with its hyper-parameters.

    Attributes:
        index: its number among all parameters of the stage, in the optimizers' order.
        group_number: of its group; the group itself is another object after the optimizer has loaded a state.
        counted: where the state's number of updates lies on a device (a fused Adam's), this tensor and what it holds:
            reading it would wait.
    """

    index: int
    optimizer: Optimizer
    group_number: int
    parameter: Tensor
    counted: tuple[Tensor, int] | None = None

    @property
    def group(self) -> dict[str, Any]:
        """The hyper-parameters that hold now."""
        return self.optimizer.param_groups[self.group_number]

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's own state of the parameter; empty before its first update."""
        return self.optimizer.state.get(self.parameter, {})  # type: ignore[no-any-return]

    @property
    def is_adam(self) -> bool:
        return "betas" in self.group

    @property
    def is_sgd(self) -> bool:
        return "dampening" in self.group

    @property
    def momentum(self) -> float:
        return float(self.group["betas"][0] if self.is_adam else self.group["momentum"])

    @property
    def share(self) -> float:
        """Of a new gradient in the first moment."""
        return 1 - float(self.group["dampening"]) if self.is_sgd else 1 - self.momentum

    @property
    def moment_key(self) -> str:
        return "exp_avg" if self.is_adam else "momentum_buffer"

    @property
    def moment(self) -> Tensor | None:
        """u, once there is one; SGD without momentum has none, though one may be left from when it had."""
        return None if self.is_sgd and self.momentum == 0 else self.state.get(self.moment_key)

    @property
    def num_updates(self) -> int:
        """Of this parameter, which may be fewer than its stage's where it had no gradient at some."""
        made = self.state.get("step", 0)
        if not isinstance(made, Tensor) or made.device.type == "cpu":
            return int(made)
        if self.counted is None or self.counted[0] is not made:
            self.counted = made, int(made)
        return self.counted[1]

    @property
    def decay_is_coupled(self) -> bool:
        """Whether weight decay is a part of the gradient (SGD, Adam), not of the step (AdamW, Muon)."""
        if self.is_sgd:
            return True
        return self.is_adam and not self.group.get("decoupled_weight_decay", isinstance(self.optimizer, AdamW))

    def gradient(self) -> Tensor:
        """The gradient as the optimizer reads it: with its sign, and with coupled weight decay."""
        gradient = self.parameter.grad
        assert gradient is not None
        if self.group.get("maximize", False):
            gradient = -gradient
        decay = self.group["weight_decay"]
        return gradient.add(self.parameter.detach(), alpha=decay) if self.decay_is_coupled and decay else gradient

    def step_from(self, weights: Tensor, moment: Tensor, rate: float) -> Tensor:
        """`weights` after the optimizer's step at learning rate `rate` with `moment` and nothing new in it.

        Adam, AdamW, NAdam: w - rate u_hat / (sqrt(v_hat) + eps), as XPipe (arXiv 1911.04610); NAdam mixes the gradient
        with u+, and the best guess of a gradient not yet seen is u_hat, so the mix is u_hat. SGD: w - rate u. Muon:
        w - rate orthogonalised(u). Weight decay, which moves w by rate times the decay at most, is left out.
        """
        if self.is_adam:
            bias, square_bias = (1 - float(beta) ** self.num_updates for beta in self.group["betas"])
            square = self.state.get("max_exp_avg_sq", self.state["exp_avg_sq"])
            if weights.is_complex():  # real and imaginary parts are numbers of their own to an Adam
                weights, moment, square = map(torch.view_as_real, (weights, moment, square))
            divisor = (square / square_bias).sqrt_().add_(self.group["eps"])
            ahead = torch.addcdiv(weights, moment, divisor, value=-rate / bias)
            return torch.view_as_complex(ahead) if self.parameter.is_complex() else ahead
        if _MUON is not None and isinstance(self.optimizer, _MUON):
            # Muon's own step on a throw-away copy whose whole gradient is the moment: its orthogonalisation, once more.
            copy = torch.nn.Parameter(weights.clone())
            copy.grad = moment.clone()
            same = {key: self.group[key] for key in ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
            _MUON([copy], lr=rate, momentum=0.0, nesterov=False, weight_decay=0.0, **same).step()  # type: ignore[call-arg]
            return copy.detach()
        return torch.add(weights, moment, alpha=-rate)


def check_moments(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose first moment is not known, or may be made from other gradients than those seen.

    Raises:
        ValueError: another optimizer, or a subclass with a step of its own.
    """
    known = next((kind for kind in _KNOWN if isinstance(optimizer, kind)), None)
    name = type(optimizer).__name__
    if known is None:
        raise ValueError(
            f"{name}: sc, nesterov, lwpv, spectrain and rotate read the first moment of "
            f"{', '.join(kind.__name__ for kind in _KNOWN)} only; use lwpw, which works with every optimizer"
        )
    # Of the object, where somebody has replaced it there; torch's schedulers wrap it, which is no other step.
    step = unwrap(optimizer.step)
    if getattr(step, "__func__", step) is not unwrap(known.step):
        raise ValueError(
            f"{name} has a step of its own, and what it does to gradients would be missing from the compensated "
            f"moment: use {known.__name__} with clip=, on_gradients= or a pre-hook (register_step_pre_hook), or lwpw"
        )
