"""Modules and functions whose second derivatives torch has, has not, or cuts off: for tests of curvatures."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Fused attention, which has no forward-mode derivative and no second one on a CPU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.all = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.all(x).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Square(torch.autograd.Function):
    """Half a square whose derivative cannot be differentiated again."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 0.5 * x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


class CutSquare(Square):
    """The same, which says nothing and gives zeros."""

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].detach()


# by name: the layers, and the shape of the input
SMALL_CHAINS = {
    "tanh": (lambda: [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)], (4, 5)),
    "convolutions": (
        lambda: [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)],
        (3, 2, 6, 6),
    ),
    "attention": (
        lambda: [nn.Linear(4, 8), Attention(8), nn.LayerNorm(8), nn.Flatten(), nn.Linear(24, 3)],
        (4, 3, 4),
    ),
}
