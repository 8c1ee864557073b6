"""Each operation continued to complex numbers, held against torch's own by the mean value over a circle.

A holomorphic function is the mean of its values on any circle around a point, inside of its radius of convergence: with
32 points and a small radius to rounding. On the real axis it has to be torch's function.
"""

import cmath
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch2ebm.equilibrium.holomorphic import HolomorphicOperations
from torch2ebm.errors import NoEquilibriumError

POINTS, RADIUS = 32, 0.3  # the error falls like (radius / radius of convergence) ** points


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS, SOFT = torch.tensor([0, 2, 1, 2]), torch.softmax(normal(4, 3, seed=5), 1)
IGNORED = torch.tensor([0, -100, 1, 7])
WEIGHT, KERNEL = normal(5, 3, seed=6), normal(2, 4, 2, seed=7)
VALUE = normal(4, 3)
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "softplus, beta": lambda z: F.softplus(z, beta=2.0),
    "silu": F.silu,
    "linear": lambda z: F.linear(z, WEIGHT, normal(5, seed=8)),
    "linear by keywords": lambda z: F.linear(input=z, weight=WEIGHT, bias=normal(5, seed=8)),
    "convolution": lambda z: F.conv1d(z.unsqueeze(0), KERNEL, normal(2, seed=9)),
    "average pooling": lambda z: F.avg_pool1d(z.unsqueeze(0), 2),
    "batch norm": lambda z: F.batch_norm(z, normal(3, seed=10), normal(3, seed=11).square(), normal(3, seed=12), None),
    "matmul": lambda z: z @ WEIGHT.t(),
    "matmul of a real one": lambda z: torch.matmul(WEIGHT, z.t()),
    "einsum": lambda z: torch.einsum("bi,oi->bo", z, WEIGHT),
    "log_softmax": lambda z: F.log_softmax(z, 1),
    "softmax": lambda z: torch.softmax(z, 0),
    "softmax, method": lambda z: z.softmax(1),
    "mse_loss": lambda z: F.mse_loss(z, SOFT),
    "mse_loss, sum": lambda z: F.mse_loss(z, SOFT, reduction="sum"),
    "mse_loss, none": lambda z: F.mse_loss(z, SOFT, reduction="none"),
    "cross_entropy": lambda z: F.cross_entropy(z, LABELS),
    "cross_entropy, sum": lambda z: F.cross_entropy(z, LABELS, reduction="sum"),
    "cross_entropy, none": lambda z: F.cross_entropy(z, LABELS, reduction="none"),
    "cross_entropy, ignored": lambda z: F.cross_entropy(z, IGNORED.where(IGNORED != 7, -100)),
    "cross_entropy, another ignored": lambda z: F.cross_entropy(z, LABELS, ignore_index=2),
    "cross_entropy of one sample": lambda z: F.cross_entropy(z[0], LABELS[0]),
    "cross_entropy of one soft target": lambda z: F.cross_entropy(z[0], SOFT[0]),
    "cross_entropy with soft targets, sum": lambda z: F.cross_entropy(z, SOFT, reduction="sum"),
    "cross_entropy with soft targets": lambda z: F.cross_entropy(z, SOFT),
    "cross_entropy of positions": lambda z: F.cross_entropy(z.t().unsqueeze(0), LABELS.unsqueeze(0)),
    "nll_loss": lambda z: F.nll_loss(F.log_softmax(z, 1), LABELS),
    "binary_cross_entropy_with_logits": lambda z: F.binary_cross_entropy_with_logits(z, SOFT),
    "nn.CrossEntropyLoss": lambda z: nn.CrossEntropyLoss()(z, LABELS),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_the_mean_over_a_circle_is_torchs_value_at_its_centre(operation: Callable[[Tensor], Tensor]) -> None:
    direction = normal(4, 3, seed=1).clamp(-1, 1)
    expected, total = operation(VALUE), 0.0
    with HolomorphicOperations():
        for k in range(POINTS):
            total = total + operation(VALUE + RADIUS * cmath.exp(2j * math.pi * k / POINTS) * direction)
        on_the_axis = operation(VALUE.to(torch.complex128))
    torch.testing.assert_close(total.real / POINTS, expected, rtol=1e-12, atol=1e-13)
    assert float(total.imag.abs().max()) <= 1e-12 * POINTS
    torch.testing.assert_close(on_the_axis.real, expected, rtol=1e-13, atol=1e-14)
    assert float(on_the_axis.imag.abs().max()) <= 1e-14


@pytest.mark.parametrize("conjugated", [lambda z: (z * z.conj()).sum(), lambda z: z.real.sum() * z.sum()])
def test_what_is_not_holomorphic_has_another_mean(conjugated: Callable[[Tensor], Tensor]) -> None:
    """The negative twin."""
    total = sum(conjugated(VALUE + RADIUS * cmath.exp(2j * math.pi * k / POINTS)) for k in range(POINTS))
    assert abs(complex(total) / POINTS - complex(conjugated(VALUE.to(torch.complex128)))) > 0.1


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "abs": (torch.abs, "abs.*not holomorphic"),
    "l1_loss": (lambda z: F.l1_loss(z, SOFT), "l1_loss.*not holomorphic"),
    "relu": (torch.relu, "relu"),
    "class weights": (lambda z: F.cross_entropy(z, LABELS, weight=torch.ones(3)), "cross_entropy.*class weights"),
    "smoothing": (lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.1), "cross_entropy.*label smoothing"),
    "nll weights": (lambda z: F.nll_loss(z, LABELS, weight=torch.ones(3)), "nll_loss.*class weights"),
    "pos_weight": (
        lambda z: F.binary_cross_entropy_with_logits(z, SOFT, pos_weight=torch.ones(3)),
        "binary_cross_entropy_with_logits.*weights",
    ),
}


@pytest.mark.parametrize(("operation", "says"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_continuation_is_refused_by_name(operation: Callable[[Tensor], Tensor], says: str) -> None:
    with HolomorphicOperations(), pytest.raises(NoEquilibriumError, match=rf"{says}.*Symmetric\(beta\)"):
        operation(VALUE.to(torch.complex128))
