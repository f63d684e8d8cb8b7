"""Whether a backward drew the dropout of its forward: then the loss is linear along a step of a weight's gradient."""

import torch
from torch import Tensor, nn

from fourfold.parallel.testing.compare import gradients


def slope_along_gradient(model: nn.Module, name: str, ids: Tensor, *, step: float) -> tuple[Tensor, Tensor]:
    """(the loss's slope along the gradient of the parameter `name`, by differences, what it is to first order).

    The same random numbers are drawn for each loss.
    """

    def loss() -> Tensor:
        torch.manual_seed(3)
        value: Tensor = model(input_ids=ids, labels=ids).loss
        return value

    direction, weight = gradients(model, loss())[name].clone(), model.get_parameter(name)
    with torch.no_grad():
        weight += step * direction
        above = loss()
        weight -= 2 * step * direction
        below = loss()
    return (above - below) / (2 * step), direction.square().sum()
