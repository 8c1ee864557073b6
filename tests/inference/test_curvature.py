"""The curvature of a loss in the errors of a call, against eigenvalues of the matrix written out."""

import pytest
import torch
import torch.nn.functional as F
from curved import SMALL_CHAINS, CutSquare, Square
from helpers import attached
from oracles.dense_hessian import ErrorProblem, of_chain, of_dag
from oracles.energy import EnergyProblem
from oracles.graphs import SkipDag, cross_entropy, half_squared_error, skip_dag
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ConfigurationError, LossNotRecordedError, NonFiniteError

NAMES = [vertex.name for vertex in skip_dag().vertices]
PRECISIONS = {"first": 2.5, "gated": 0.4, "third": torch.linspace(0.5, 2.0, 6, dtype=torch.float64)}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_mean(loss):
    """The mean over samples of a loss that sums, as a function of output and target."""
    return torch2ebm.EnergyLoss(lambda output, target=None: loss(output) / len(output))


def seeded(make) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


# ---- against the matrix


@pytest.mark.parametrize("loss", [half_squared_error, cross_entropy])
@pytest.mark.parametrize("precisions", [{}, PRECISIONS], ids=["unit", "precisions"])
def test_on_a_dag_with_shared_weights(loss, precisions) -> None:
    expected = of_dag(EnergyProblem(skip_dag(), loss, precisions=precisions))
    model = torch2ebm.convert(SkipDag(), nodes=NAMES)
    found = model.curvature(by_mean(loss), (skip_dag().inputs["x"], None), precisions=precisions)
    assert found.sigma_squared == pytest.approx(expected.sigma_squared(), rel=1e-6)
    assert float(found) == found.sigma_squared == float(found.of_samples.max())
    assert found.lowest == pytest.approx(0.0, abs=1e-12)
    assert found.products <= 4  # a sample has three outputs, and one more product sees that no direction is left


@pytest.mark.parametrize("without", ["with_loss", "with_precisions"])
def test_the_matrix_without_one_of_its_parts_has_another_eigenvalue(without: str) -> None:
    """The negative twin: the loss's Hessian and the precisions both count."""
    expected = of_dag(EnergyProblem(skip_dag(), cross_entropy, precisions=PRECISIONS))
    assert expected.sigma_squared(**{without: False}) != pytest.approx(expected.sigma_squared(), rel=0.05)


class First(nn.Module):
    """The first output of a layer with several, which is a node of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


CHAINS = {
    **SMALL_CHAINS,
    "LSTM": (lambda: [nn.Linear(4, 5), First(nn.LSTM(5, 5, batch_first=True)), nn.Flatten(), nn.Linear(15, 3)],
             (4, 3, 4)),
    "group norm": (lambda: [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3)], (3, 2, 6, 6)),
    "batch norm": (
        lambda: [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)],
        (6, 5),
    ),
}  # fmt: skip


def chain(name: str) -> tuple[nn.Sequential, Tensor, ErrorProblem]:
    make, shape = CHAINS[name]
    net = seeded(lambda: nn.Sequential(*make()))
    twin = seeded(lambda: nn.Sequential(*make()))  # running statistics of one move, where the oracle runs it
    x = normal(*shape)
    return net, x, of_chain(list(twin), x, cross_entropy)


@pytest.mark.parametrize("name", CHAINS)
def test_on_chains(name: str) -> None:
    net, x, expected = chain(name)
    found = torch2ebm.convert(net, nodes="children").curvature(by_mean(cross_entropy), (x, None))
    assert found.sigma_squared == pytest.approx(expected.sigma_squared(), rel=1e-6)
    assert (found.of_samples is None) == (name == "batch norm")


def test_samples_that_a_batch_norm_couples_are_no_blocks() -> None:
    """The negative twin of one row for all: the blocks of single samples have another eigenvalue."""
    _, x, expected = chain("batch norm")
    matrix, samples = expected.gauss_newton(), len(x)
    owner = torch.arange(samples)[None, :, None].expand(5, -1, 6).flatten()  # five values, six features each
    blocks = [float(torch.linalg.eigvalsh(matrix[owner == b][:, owner == b])[-1]) for b in range(samples)]
    assert max(blocks) != pytest.approx(expected.sigma_squared(), rel=0.05)


def test_a_loss_that_couples_samples_is_seen() -> None:
    def spread(output: Tensor, target: object = None) -> Tensor:
        return (output.softmax(1).mean(0) * torch.tensor([1.0, 2.0, 4.0], dtype=output.dtype)).sum().square()

    net, x, _ = chain("tanh")
    expected = of_chain(list(net), x, lambda output: len(output) * spread(output))
    found = torch2ebm.convert(net, nodes="children").curvature(torch2ebm.EnergyLoss(spread), (x, None))
    assert found.of_samples is None
    assert found.sigma_squared == pytest.approx(expected.sigma_squared(), rel=1e-6)
    lowest = float(torch.linalg.eigvalsh(expected.gauss_newton())[0])
    assert found.lowest == pytest.approx(lowest, rel=1e-3) and lowest < 0


def test_two_outputs_in_one_loss() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.stem(x).tanh()
            return self.left(hidden), self.right(hidden)

    def loss(outputs: tuple[Tensor, Tensor], target: object = None) -> Tensor:
        return cross_entropy(outputs[0]) / len(outputs[0]) + (outputs[1].square().sum(1) * outputs[0][:, 0]).mean()

    net, x = seeded(Two), normal(4, 5)
    start = net.stem(x).tanh().detach()

    def joined(errors: Tensor) -> Tensor:
        hidden = start + errors.reshape(start.shape)
        return torch.cat([net.left(hidden), net.right(hidden)], 1)

    whole = ErrorProblem(joined, torch.ones(24, dtype=torch.float64), lambda o: 4 * loss((o[:, :3], o[:, 3:])))
    found = torch2ebm.convert(net).curvature(torch2ebm.EnergyLoss(loss), (x, None))
    assert found.sigma_squared == pytest.approx(whole.sigma_squared(), rel=1e-6)


def test_float32_and_few_products_are_near() -> None:
    net, x, expected = chain("tanh")
    found = torch2ebm.convert(net.float(), nodes="children").curvature(
        by_mean(cross_entropy), (x.float(), None), products=2
    )
    assert found.products == 2
    assert found.sigma_squared == pytest.approx(expected.sigma_squared(), rel=0.1)


# ---- losses


def test_a_concave_loss_has_its_lowest_below_zero() -> None:
    net, x, _ = chain("tanh")
    found = torch2ebm.convert(net, nodes="children").curvature(
        by_mean(lambda output: -half_squared_error(output)), (x, None)
    )
    convex = of_chain(list(net), x, half_squared_error)
    assert found.sigma_squared == 0.0
    assert found.lowest == pytest.approx(-convex.sigma_squared(), rel=1e-6)
    assert found.radius == -found.lowest


def test_a_linear_loss_has_none() -> None:
    net, x, _ = chain("tanh")
    assert torch2ebm.convert(net, nodes="children").curvature(lambda o, _: o[:, 0].mean(), (x, None)).radius == 0.0


@pytest.mark.parametrize("function", [Square, CutSquare])
def test_a_loss_that_cannot_be_differentiated_twice(function) -> None:
    net, x, _ = chain("tanh")
    loss = torch2ebm.EnergyLoss(lambda output, target: function.apply(output - target).sum(1).mean())
    target = normal(4, 3, seed=12)
    expected = of_chain(list(net), x, lambda output: 0.5 * (output - target).square().sum())
    found = torch2ebm.convert(net, nodes="children").curvature(loss, (x, target))
    assert found.sigma_squared == pytest.approx(expected.sigma_squared(), rel=1e-6)


# ---- what it leaves, and what it refuses


def test_everything_is_as_before() -> None:
    net, x, _ = chain("batch norm")
    model = attached(net, torch2ebm.PredictiveCoding(steps=2, lr=0.1), nodes="children")
    by_mean(cross_entropy)(model(x)).backward()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    gradients, state = [p.grad.clone() for p in net.parameters()], torch.get_rng_state()
    model.curvature(by_mean(cross_entropy), (x, None))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(model.algorithm, torch2ebm.PredictiveCoding) and model.state.relaxation.steps == 2


def test_a_measurement_says_what_it_cost() -> None:
    net, x, _ = chain("tanh")
    model = torch2ebm.convert(net, nodes="children")
    evaluations = []
    net[2].register_forward_hook(lambda *_: evaluations.append(1))
    model.curvature(by_mean(cross_entropy), (x, None), products=2)  # sees whether samples are independent
    found = model.curvature(by_mean(cross_entropy), (x, None), products=2)
    assert found.products == 2
    # one evaluation, and for each product a sweep back, and values with their tangents: (1 + 2 * 3) / 3
    assert found.backprops == pytest.approx(7 / 3)


def test_what_is_not_finite_is_named() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)))
    with torch.no_grad():
        net[1].weight.mul_(1e200)
    with pytest.raises(NonFiniteError, match="curvature"):
        torch2ebm.convert(net).curvature(lambda output, _: 1e-250 * output.square().mean(), (normal(4, 5), None))


@pytest.mark.parametrize(
    "wrong",
    [
        {"precisions": {"no such node": 2.0}},
        {"precisions": {"0": -1.0}},
        {"products": 0},
        {"tol": -1.0},
        {"loss_reduction": "none"},
        {"batch": normal(4, 5)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_bad_arguments(wrong) -> None:
    net, x, _ = chain("tanh")
    arguments = {"loss_fn": by_mean(cross_entropy), "batch": (x, None), **wrong}
    with pytest.raises(ConfigurationError):
        torch2ebm.convert(net, nodes="children").curvature(**arguments)


def test_a_loss_that_cannot_be_evaluated_again() -> None:
    net, x, _ = chain("tanh")
    with pytest.raises(LossNotRecordedError):
        torch2ebm.convert(net, nodes="children").curvature(lambda output, _: output.square().mean(1), (x, None))


# ---- values that have all but vanished


@pytest.mark.filterwarnings("ignore::torch2ebm.errors.NoSignalWarning")  # which is right: nothing can learn there
def test_a_net_whose_values_round_to_nothing_has_a_curvature_all_the_same() -> None:
    """200 tanh layers with torch's own initialisation: values shrink by .58 a layer, to 1e-44 and to zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [layer for _ in range(199) for layer in (nn.Linear(16, 16), nn.Tanh())]
        net = nn.Sequential(*layers, nn.Linear(16, 4))
    for layer in net[::2]:
        nn.init.zeros_(layer.bias)
    model = attached(net, torch2ebm.PredictiveCoding(), nodes="layer")
    x, classes = normal(8, 16).float(), torch.arange(8) % 4
    F.cross_entropy(model(x), classes).backward()
    coarse = model.state.relaxation.sigma_squared
    net.double()
    exact = torch2ebm.convert(net).curvature(F.cross_entropy, (x.double(), classes))
    assert coarse == pytest.approx(float(exact), rel=0.05)
