"""What has no equilibrium is refused, what may not settle is watched, and a plain loop is left as it is."""

import gc
import warnings

import pytest
import torch
from helpers import UNSETTLED, attached, local_gradients
from torch import Tensor, nn
from torch.nn import functional as F

import torch2ebm
from torch2ebm.errors import (
    ConfigurationError,
    DivergenceError,
    LossReductionError,
    NoEquilibriumError,
    NonFiniteError,
    NotSettledWarning,
    PartitionError,
)


def linear(*between: nn.Module, width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), *between, nn.Linear(width, 3))


class Rounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.second(h + h.round())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.readout = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.cell(x[:, None])[0][:, -1])


REFUSED = [
    (linear(nn.Linear(6, 6), nn.LayerNorm(6)), r"'3' \(layer_norm\) normalises each sample"),
    (linear(nn.GroupNorm(2, 6)), r"'2' \(group_norm\)"),
    (linear(nn.BatchNorm1d(6)), r"normalises by the batch.*model\.eval\(\)"),
    (linear(nn.Dropout(0.5)), r"draws random numbers.*model\.eval\(\)"),
    (linear(nn.PReLU()), r"'2' \(prelu\) is an activation with parameters"),
    (Rounded(), r"\(round\) makes whole numbers"),
    (Recurrent(), r"'cell' \(gru\) has a state and an order in time"),
]
ALGORITHMS = [
    torch2ebm.EquilibriumPropagation(),
    torch2ebm.RecurrentBackprop(),
    torch2ebm.ContrastiveHebbian(),
    torch2ebm.CoupledLearning(),
]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize(("module", "message"), REFUSED)
def test_what_has_no_equilibrium_is_refused_with_its_name(module: nn.Module, message: str, algorithm) -> None:
    model = attached(module, algorithm)
    with pytest.raises(NoEquilibriumError, match=rf"(?s){message}.*PredictiveCoding"):
        model(torch.randn(5, 4))


def test_all_parts_are_named_at_once() -> None:
    model = attached(linear(nn.LayerNorm(6), nn.PReLU(), nn.Dropout(0.5)), torch2ebm.EquilibriumPropagation())
    with pytest.raises(NoEquilibriumError) as caught:
        model(torch.randn(5, 4))
    assert all(part in str(caught.value) for part in ("LayerNorm", "PReLU", "random"))


@pytest.mark.parametrize("module", [linear(nn.BatchNorm1d(6)), linear(nn.Dropout(0.5)), linear(nn.Dropout(0.0))])
def test_in_evaluation_mode_batch_norm_and_dropout_are_taken(module: nn.Module) -> None:
    model = attached(module.eval(), torch2ebm.EquilibriumPropagation())
    ours = local_gradients(model, (torch.randn(5, 4),), lambda y: F.cross_entropy(y, torch.tensor([0, 1, 2, 0, 1])))
    assert set(ours) == {name for name, _ in module.named_parameters()}


def test_a_norm_of_the_input_alone_is_in_no_loop() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    model = attached(module, torch2ebm.EquilibriumPropagation())
    ours = local_gradients(model, (torch.randn(5, 4),), lambda y: F.cross_entropy(y, torch.tensor([0, 1, 2, 0, 1])))
    assert float(ours["0.weight"].abs().sum()) > 0


def test_embeddings_are_clamped_input() -> None:
    """Their gradient is that of finite differences of the loss at the equilibrium."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    tokens, target = torch.tensor([[0, 3], [6, 1], [2, 2]]), torch.tensor([0, 1, 2])
    nudging = torch2ebm.Symmetric(1e-3)
    model = attached(module, torch2ebm.EquilibriumPropagation(nudging, 500, 500, feedback=0.5, tol=1e-15))
    ours = local_gradients(model, (tokens,), lambda y: F.cross_entropy(y, target))
    step, weight = 1e-5, module[0].weight
    for place in ((0, 1), (2, 3), (6, 0)):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
                sides.append(float(F.cross_entropy(model(tokens), target)))
                weight[place] -= sign * step
        difference = (sides[0] - sides[1]) / (2 * step)
        assert float(ours["0.weight"][place]) == pytest.approx(difference, abs=1e-6)


def test_inputs_that_require_a_gradient_have_that_of_the_equilibrium() -> None:
    torch.manual_seed(0)
    module = linear().double()
    x, target = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    for algorithm in (
        torch2ebm.EquilibriumPropagation(torch2ebm.Symmetric(1e-3), 500, 500, tol=1e-15),
        torch2ebm.RecurrentBackprop(torch2ebm.FixedPointSolve(500, 1e-14), 500, 1e-15),
    ):
        model = attached(module, algorithm)
        leaf = x.clone().requires_grad_()
        F.cross_entropy(model(leaf), target).backward()
        with torch.no_grad():
            sides = [x.clone(), x.clone()]
            for side, sign in zip(sides, (1, -1), strict=True):
                side[2, 1] += sign * 1e-5
            up, down = (float(F.cross_entropy(model(side), target)) for side in sides)
        assert float(leaf.grad[2, 1]) == pytest.approx((up - down) / 2e-5, rel=1e-4)


class Heads(nn.Module):
    """Outputs at two depths, one of them a state that others read, and one behind a softmax."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 4)
        self.early, self.late = nn.Linear(5, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.first(x))
        deep = torch.sigmoid(self.second(hidden))
        return {"early": self.early(hidden), "deep": deep, "late": F.log_softmax(self.late(deep), 1)}


@pytest.mark.parametrize("feedback", [1.0, 0.4])
@pytest.mark.parametrize(
    "make",
    [
        lambda f: torch2ebm.EquilibriumPropagation(torch2ebm.Symmetric(1e-3), 500, 500, feedback=f, tol=1e-15),
        lambda f: torch2ebm.EquilibriumPropagation(torch2ebm.Holomorphic(0.01, 4), 500, 500, feedback=f, tol=1e-15),
        lambda f: torch2ebm.RecurrentBackprop(torch2ebm.FixedPointSolve(500, 1e-15), 500, 1e-15, feedback=f),
    ],
    ids=["symmetric", "holomorphic", "recurrent"],
)
def test_several_outputs_have_the_gradient_at_the_equilibrium(make, feedback: float) -> None:
    """Along a random direction, by a difference of the loss at equilibria that are settled again."""
    module = Heads().double()
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(5, 4, generator=generator).double(), torch.tensor([0, 1, 2, 0, 1])

    def loss(output: dict[str, Tensor]) -> Tensor:
        parts = F.cross_entropy(output["early"], target), (output["deep"] ** 2).mean()
        return parts[0] + 0.7 * parts[1] + 0.3 * F.nll_loss(output["late"], target)

    model = attached(module, make(feedback))
    ours = local_gradients(model, (x,), torch2ebm.EnergyLoss(loss))
    distance = model.state.feedforward_distance
    with torch.no_grad():
        settled, plain = model(x), module(x)
    apart = [torch.cat([o[n].flatten() for n in plain]) for o in (settled, plain)]
    expected = float((apart[0] - apart[1]).norm() / apart[1].norm())
    direction = {n: torch.randn(p.shape, generator=generator).double() for n, p in module.named_parameters()}
    assert distance == pytest.approx(expected, rel=1e-9)
    sides = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for name, parameter in module.named_parameters():
                parameter += step * direction[name]
            sides.append(float(loss(model(x))))
    slope = (sides[0] - sides[1]) / 2e-5
    assert sum(float((ours[n] * d).sum()) for n, d in direction.items()) == pytest.approx(slope, rel=2e-5)


# Partitions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", ["layer", ["0"]])
def test_a_partition_that_hides_the_activations_is_refused(nodes) -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model = attached(module, torch2ebm.EquilibriumPropagation(), nodes=nodes)
    with pytest.raises(PartitionError, match="nodes='auto'"):
        model(torch.randn(5, 4))


@pytest.mark.parametrize("nodes", ["auto", "activation", "children"])
def test_a_partition_that_shows_them_gives_the_same(nodes) -> None:
    x, target = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    ours = local_gradients(attached(linear(), torch2ebm.EquilibriumPropagation(), nodes), (x,), loss_of(target))
    reference = local_gradients(attached(linear(), torch2ebm.EquilibriumPropagation()), (x,), loss_of(target))
    assert all(torch.equal(ours[name], g) for name, g in reference.items())


def loss_of(target: Tensor):
    return lambda y: F.cross_entropy(y, target)


def test_activations_are_states_as_modules_methods_and_functions() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(9)])
            self.bounded, self.inplace = nn.Hardtanh(0.0, 1.0), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            a = self.layers
            x = self.bounded(a[0](x))
            x = self.inplace(a[1](x))
            x = F.gelu(a[2](x))
            x = a[3](x).clamp(0, 1)
            x = F.leaky_relu(a[4](x), 0.1)
            x = F.softplus(a[5](x)) + F.hardsigmoid(a[6](x))
            x = F.relu6(a[7](x))
            return a[8](x)

    model = torch2ebm.convert(Mixed())
    algorithm = torch2ebm.EquilibriumPropagation(feedback=0.3, free_steps=5)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, algorithm)
    F.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
    kinds = [node.description for node in model.nodes.values() if not node.parameters and len(node.operations) == 1]
    assert kinds == ["Hardtanh", "ReLU", "gelu", "clamp", "leaky_relu", "softplus", "hardsigmoid", "relu6"]
    assert bool((model.state.value["bounded"] >= 0).all() and (model.state.value["bounded"] <= 1).all())


# Settling -------------------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.readout = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(16, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.first(x)), 2)
        return self.readout(torch.relu(self.second(x)).flatten(1))


def test_a_max_pool_that_does_not_settle_is_named() -> None:
    x = torch.randn(4, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    model = attached(Pooled(2.0), torch2ebm.EquilibriumPropagation(free_steps=4))
    with pytest.warns(NotSettledWarning, match=r"states of '.*' still move by.*max_pool2d.*feedback"):
        model(x)


def test_a_max_pool_that_settles_is_taken_in_silence() -> None:
    x = torch.randn(4, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached(Pooled(0.3), torch2ebm.EquilibriumPropagation(free_steps=40))(x)


def cycling() -> tuple[nn.Sequential, Tensor]:
    """A deep tanh net with two equilibria, between which the synchronous update alternates."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) if k % 2 == 0 else nn.Tanh() for k in range(6)]
    net = nn.Sequential(*layers, nn.Linear(4, 2)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
        net[6].weight.mul_(0.1), net[6].bias.mul_(0.1)
    return net, torch.randn(1, 4).double()


def test_where_the_synchronous_update_cycles_another_one_settles() -> None:
    net, x = cycling()
    model = attached(net, torch2ebm.EquilibriumPropagation(free_steps=400))
    model(x).square().mean().backward()
    free = model.state.phases[0]
    assert free.residual < 1e-6 and free.update == "damped"
    assert {phase.update for phase in model.state.phases} == {free.update}


def test_states_that_run_away_are_refused_and_nothing_moves() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        net[2].weight.mul_(1e4)
    before = [p.detach().clone() for p in net.parameters()]
    model = attached(net, torch2ebm.EquilibriumPropagation(free_steps=100))
    with pytest.raises(DivergenceError, match=r"free phase.*feedback"):
        model(torch.randn(5, 4))
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("place", ["2.weight", "0.bias", "input", "target"])
def test_bad_numbers_are_named_and_change_nothing(place: str, algorithm) -> None:
    x, target = torch.randn(5, 4), torch.randn(5, 3)
    module = nn.Sequential(nn.Linear(4, 6), nn.Hardtanh(), nn.Linear(6, 3))
    model = attached(module, algorithm)
    F.mse_loss(model(x), target).backward()
    model.zero_grad()
    bad = {**dict(module.named_parameters()), "input": x, "target": target}[place]
    with torch.no_grad():
        bad.view(-1)[0] = torch.nan
    before = [p.detach().clone() for p in module.parameters()]
    named = {"input": "input", "target": "loss"}.get(place, place)
    with pytest.raises(NonFiniteError, match=named):
        F.mse_loss(model(x), target).backward()
    after = zip(module.parameters(), before, strict=True)
    assert all(torch.equal(p.nan_to_num(7.0), q.nan_to_num(7.0)) and p.grad is None for p, q in after)


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nudging": 0.1}, "nudging object"),
        ({"free_steps": 0}, "steps"),
        ({"nudged_steps": 1.5}, "steps"),
        ({"feedback": 0.0}, "feedback"),
        ({"feedback": 1.5}, "feedback"),
        ({"feedback": "weak"}, "feedback"),
        ({"damping": 1.0}, "damping"),
        ({"damping": -0.1}, "damping"),
        ({"tol": -1.0}, "tol"),
        ({"loss_reduction": "max"}, "loss_reduction"),
    ],
)
def test_illegal_settings_are_refused(settings, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        torch2ebm.EquilibriumPropagation(**settings)


def test_a_nudge_that_rounding_would_hide_is_refused() -> None:
    model = attached(linear(nn.Linear(6, 6), nn.Tanh()), torch2ebm.EquilibriumPropagation(feedback=1e-4))
    with pytest.raises(ConfigurationError, match=r"0\.5 \* 0\.0001\^2.*RecurrentBackprop"):
        model(torch.randn(5, 4)).square().mean().backward()


def test_a_summed_loss_needs_to_be_told() -> None:
    model = attached(linear(), torch2ebm.EquilibriumPropagation())
    with pytest.raises(LossReductionError, match="loss_reduction='sum'"):
        F.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1]), reduction="sum").backward()


def test_a_read_out_that_is_an_activation_is_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Sigmoid())
    model = attached(module, torch2ebm.EquilibriumPropagation(readout=True))
    with pytest.raises(PartitionError, match="readout=True"):
        model(torch.randn(5, 4))


# The loop -------------------------------------------------------------------------------------------------------------


def test_detached_it_is_the_plain_module_again() -> None:
    module, x = linear(), torch.randn(5, 4)
    model = attached(module, torch2ebm.EquilibriumPropagation())
    with torch.no_grad():
        assert not torch.allclose(model(x), module(x))
        model.detach()
        assert torch.equal(model(x), module(x))


def test_half_precision_keeps_its_states_in_single() -> None:
    x = torch.randn(5, 4)
    for module, context in (
        (linear().bfloat16(), torch.autocast("cpu", enabled=False)),
        (linear(), torch.autocast("cpu", dtype=torch.bfloat16)),
    ):
        model = attached(module, torch2ebm.EquilibriumPropagation())
        with context:
            loss = F.cross_entropy(model(x.to(module[0].weight.dtype)).float(), torch.tensor([0, 1, 2, 0, 1]))
        loss.backward()
        assert model.state.error["1"].dtype == torch.float32
        reference = local_gradients(
            attached(linear(), torch2ebm.EquilibriumPropagation()), (x,), loss_of(torch.tensor([0, 1, 2, 0, 1]))
        )
        for name, parameter in module.named_parameters():
            cosine = F.cosine_similarity(parameter.grad.float().flatten(), reference[name].flatten(), dim=0)
            assert float(cosine) > 0.95


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


@pytest.mark.filterwarnings(UNSETTLED)  # so few steps are meant
def test_steps_add_no_live_tensors() -> None:
    module, x, target = linear(), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    model = torch2ebm.convert(module)
    inner = torch.optim.SGD(module.parameters(), lr=0.01)
    optimizer = torch2ebm.EnergyOptimizer(inner, model, torch2ebm.EquilibriumPropagation(free_steps=3, nudged_steps=2))

    def steps(count: int) -> int:
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
        return live_tensors()

    before = steps(5)
    assert steps(200) <= before
