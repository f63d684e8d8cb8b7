"""AdamW for all weights, or Muon for the layers' matrices and AdamW for the rest.

Muon turns a matrix's momentum into an orthogonal one of the same shape, which needs the matrix whole: a rank that holds
a part of it would take another step. So it is refused where a layout cuts matrices.
"""

from collections.abc import Sequence

from torch.optim import AdamW, Muon, Optimizer

from fourfold.launch.training.settings import TrainSettings, decay_groups
from fourfold.layouts.inputs.layout import Layout
from fourfold.parallel import ParallelModel


def check_optimizer(layout: Layout, settings: TrainSettings) -> None:
    """Raises ValueError where `layout` leaves no rank a whole matrix, or corrects for delays by AdamW's states."""
    if settings.optimizer != "muon":
        return
    for cut, value in (("tp", layout.tp > 1), ("zero_stage", layout.zero_stage > 0 and not layout.asynchronous)):
        if value:
            raise ValueError(
                f"optimizer='muon' with {cut}={getattr(layout, cut)}: its step needs whole matrices, and this cuts "
                "them; use dp, cp or pp, or optimizer='adamw'"
            )
    if layout.asynchronous:
        raise ValueError(
            f"optimizer='muon' with schedule={layout.schedule!r}: what delayed updates do to it is not known; "
            "use optimizer='adamw'"
        )


def make_optimizers(model: ParallelModel, settings: TrainSettings) -> list[Optimizer]:
    """The optimizers of this rank's parameters, in a fixed order; each parameter has one.

    Muon's update is scaled to the size of AdamW's (0.2 times the root of the longer side), so that learning rate and
    weight decay mean the same for both. Source: Liu et al. 2025 (arXiv 2502.16982), section 2.2.
    """
    named = list(model.named_parameters())
    matrices = []
    if settings.optimizer == "muon":
        matrices = [p for name, p in named if name.startswith("model.layers.") and p.dim() == 2 and p.requires_grad]
    kept = {id(matrix) for matrix in matrices}
    rest = [parameter for _, parameter in named if id(parameter) not in kept]
    made: list[Optimizer] = []
    if matrices:
        made.append(
            Muon(matrices, lr=settings.learning_rate, weight_decay=settings.weight_decay,
                 adjust_lr_fn="match_rms_adamw")
        )  # fmt: skip
    groups = decay_groups(rest, settings.weight_decay)
    if groups:
        betas = settings.beta1, settings.beta2
        made.append(AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True))
    return made


def set_rate(optimizers: Sequence[Optimizer], rate: float) -> None:
    """The learning rate of the coming step, for all groups."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
