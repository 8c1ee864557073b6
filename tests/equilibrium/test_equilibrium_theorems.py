"""What equilibrium propagation computes on the way: the process theorem, backprop through time, the complex circle."""

import itertools
import math
from collections.abc import Collection

import pytest
import torch
from helpers import UNSETTLED, attached
from oracles.equilibria import (
    Example,
    bptt_increments,
    convolutional,
    distance,
    gated,
    half_squared,
    mlp,
    process,
    read_out,
    recurrent_backprop,
    settled,
    skip,
)
from test_equilibrium import gradients, summed
from torch import Tensor, nn

import torch2ebm
from torch2ebm.engine.gradients import GradientSum
from torch2ebm.equilibrium.dynamics import Equilibrium, Influence
from torch2ebm.equilibrium.free_phase import FreePhase
from torch2ebm.equilibrium.updates import Damped, GaussSeidel, Synchronous
from torch2ebm.errors import ConfigurationError, NoEquilibriumError
from torch2ebm.loss.output_loss import OutputLoss


class Cost(OutputLoss):
    """The example's own loss, of the only output."""

    scale = unit = factor = 1.0

    def __init__(self, example: Example) -> None:
        self.loss, self.delivered = example.network.loss, {}

    def gradients(self, predictions):
        ((slot, prediction),) = predictions.items()
        leaf = prediction.detach().requires_grad_()
        with torch.enable_grad():
            value = self.loss(leaf)
        return value.detach(), {slot: torch.autograd.grad(value, leaf)[0]}

    def expanded(self, predictions):
        raise AssertionError("no phase asks for second derivatives")


def settled_call(example: Example) -> tuple[Equilibrium, dict[str, Tensor]]:
    """The package's own free equilibrium, to rounding."""
    model = torch2ebm.convert(example.module, nodes="activation", example_inputs=example.x)
    call = model.torch2ebm.new_call((example.x,), {})
    free = FreePhase(5000, tol=1e-15).run(call)
    return free.equilibrium, dict(free.settled.states)


def of_phi(equilibrium: Equilibrium, states) -> Tensor:
    """dPhi/dtheta, as the package takes it."""
    result = GradientSum()
    equilibrium.contrast([(states, 1.0)], result)
    return torch.cat([result.parameters[name].flatten() for name in equilibrium.call.parameters])


def joined(states) -> Tensor:
    return torch.cat([value.flatten() for value in states.values()])


# E2: the process theorem ----------------------------------------------------------------------------------------------

STEPS, SIZE = 200, 0.05


def euler(equilibrium: Equilibrium, start, cost: Cost, beta: float) -> tuple[list[Tensor], list[Tensor]]:
    """ds/dt = -dE/ds - beta dC/ds = drive - atanh(s), the output's activation being the identity."""
    states, trace, thetas = start, [], [of_phi(equilibrium, start)]
    hidden = [slot for slot, state in equilibrium.hopfield.states.items() if state.activation is not None]
    for _ in range(STEPS):
        drives = equilibrium.drive(states)
        Influence(cost, beta).nudge(equilibrium, states, drives)
        slope = {s: drives[s] - (torch.atanh(v) if s in hidden else v) for s, v in states.items()}
        states = {slot: value + SIZE * slope[slot] for slot, value in states.items()}
        trace.append(joined(slope))
        thetas.append(of_phi(equilibrium, states))
    return trace, thetas


def explicit_process(
    example: Example, linear: Collection[str] = ("s3",), size: float = SIZE
) -> tuple[list[Tensor], list[Tensor]]:
    """S and Theta from the Hessian of E, differentiated twice by autograd from the formula; other states are tanh."""
    network = example.network
    states = settled(network)
    names, shapes = list(states), [value.shape for value in states.values()]
    sizes = [value.numel() for value in states.values()]

    def unflatten(flat: Tensor):
        return {n: part.reshape(s) for n, part, s in zip(names, flat.split(sizes), shapes, strict=True)}

    def energy(flat: Tensor, *parameters: Tensor) -> Tensor:
        values = unflatten(flat)
        # G' = atanh: G = s atanh(s) + log(1 - s^2) / 2
        bounded = [v for name, v in values.items() if name not in linear]
        convex = sum((v * v.atanh() + 0.5 * (1 - v * v).log()).sum() for v in bounded)
        convex = convex + sum(0.5 * values[name].square().sum() for name in linear)
        return convex - network.phi(values, dict(zip(network.parameters, parameters, strict=True)))

    def slope(flat: Tensor, *parameters: Tensor) -> Tensor:
        return torch.autograd.grad(energy(flat, *parameters), flat, create_graph=True)[0]

    flat = torch.cat([value.flatten() for value in states.values()]).requires_grad_()
    rows = torch.autograd.functional.jacobian(slope, (flat, *network.parameters.values()))
    mixed = torch.cat([row.reshape(len(flat), -1) for row in rows[1:]], 1).T
    cost = torch.autograd.grad(network.loss(unflatten(flat)[network.output]), flat)[0]
    return process(rows[0], mixed, cost, STEPS, size)


def worst(ours: list[Tensor], reference: list[Tensor]) -> float:
    """Largest error over time, over the largest value: late values vanish."""
    size = max(float(each.norm()) for each in reference)
    return max(float((a - b).norm()) for a, b in zip(ours, reference, strict=False)) / size


def test_the_second_phase_is_the_adjoint_process_step_by_step() -> None:
    """S and Theta of 200 Euler steps; the errors of both are of first order one-sided, of second order symmetric."""
    example = mlp(widths=(4, 6, 5, 3), gain=0.6)
    s, theta = explicit_process(example)
    equilibrium, start = settled_call(example)
    at_rest, found = of_phi(equilibrium, start), {}
    for beta in (1e-2, 1e-3, 1e-5):
        up, down = (euler(equilibrium, start, Cost(example), sign * beta) for sign in (1, -1))
        one = worst([-a / beta for a in up[0]], s), worst([-(p - at_rest) / beta for p in up[1]], theta)
        pairs = zip(up[0], down[0], strict=True), zip(up[1], down[1], strict=True)
        two = [worst([-(a - b) / (2 * beta) for a, b in pair], of) for pair, of in zip(pairs, (s, theta), strict=True)]
        found[beta] = (*one, *two)
    for k, order in enumerate((1, 1, 2, 2)):
        assert math.log10(found[1e-2][k] / found[1e-3][k]) == pytest.approx(order, abs=0.05)
    assert max(found[1e-3][:2]) < 1e-2 and max(found[1e-3][2:]) < 3e-5 and max(found[1e-5][2:]) < 5e-9


# beta -> errors of S and Theta, one-sided, then symmetric
TABLE = {
    1e-2: (2.7e-2, 1.4e-2, 8.6e-4, 2.0e-4),
    1e-3: (2.7e-3, 1.4e-3, 8.6e-6, 2.0e-6),
    1e-5: (2.7e-5, 1.4e-5, 1.0e-9, 2.0e-10),
}


def test_its_errors_are_those_of_the_table_within_a_factor_of_two() -> None:
    """Of linear states the library's damped step is Euler's, s - size (dE/ds + beta dC/ds).

    The table's net is not kept, but S twice as wrong as Theta tells the size of its step: with a Hessian of 1 the error
    of S is beta max_t t size (1 - size)^(t - 1), which is beta / e for small steps and 2 beta for one of 1.6; Theta's
    is beta in both.
    """
    size, target = 1.6, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    example = gated(0.4, 0.5, half_squared(target))
    reference = explicit_process(example, ("s1", "s2", "s3"), size)
    equilibrium, start = settled_call(example)
    at_rest = of_phi(equilibrium, start)
    for beta, figures in TABLE.items():
        up, down = (stepped(equilibrium, start, Influence(Cost(example), b), b, size, at_rest) for b in (beta, -beta))
        means = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(up, down, strict=True)]
        found = [worst(ours, of) for ours, of in zip((*up, *means), (*reference, *reference), strict=True)]
        for ours, figure in zip(found, figures, strict=True):
            assert figure / 2 <= ours <= 2 * figure, (beta, found)


def stepped(equilibrium, states, influence, beta: float, size: float, at_rest) -> tuple[list[Tensor], list[Tensor]]:
    """S = -(ds/dt) / beta and Theta by the library's own step."""
    s, theta = [], [torch.zeros_like(at_rest)]
    for _ in range(STEPS):
        moved = Damped(1 - size).step(equilibrium, states, influence).states
        s.append((joined(states) - joined(moved)) / (size * beta))
        theta.append(-(of_phi(equilibrium, moved) - at_rest) / beta)
        states = moved
    return s, theta


# E3: discrete time ----------------------------------------------------------------------------------------------------


def increments(example: Example, beta: float, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    equilibrium, states = settled_call(example)
    s, theta = [], []
    for _ in range(steps):
        moved = Synchronous().step(equilibrium, states, Influence(Cost(example), beta)).states
        s.append((joined(moved) - joined(states)) / beta)
        theta.append((of_phi(equilibrium, moved) - of_phi(equilibrium, states)) / beta)
        states = dict(moved)
    return s, theta


def by_bptt(example: Example, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    found = bptt_increments(example.network, settled(example.network), steps)
    thetas = [torch.cat([g.flatten() for g in of_theta.values()]) for _, of_theta in found]
    return [-of_s for of_s, _ in found], [-each for each in thetas]


def test_the_updates_are_backprop_through_time_step_by_step() -> None:
    """(s_{t+1} - s_t) / beta is -dL/ds_{T-t}, and likewise for the parameters, for 12 steps (Ernoult et al. 2019)."""
    example, steps = gated(), 12
    reference = by_bptt(example, steps)
    errors = []
    for beta in (1e-2, 1e-3):
        up, down = (increments(example, sign * beta, steps) for sign in (1, -1))
        row = [worst(ours, of) for ours, of in zip(up, reference, strict=True)]
        means = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(up, down, strict=True)]
        errors.append(row + [worst(ours, of) for ours, of in zip(means, reference, strict=True)])
    for large, small, order in zip(*errors, (1, 1, 2, 2), strict=True):
        assert math.log10(large / small) == pytest.approx(order, abs=0.05)
    assert max(errors[1][:2]) < 5e-3 and max(errors[1][2:]) < 1e-5


def test_with_an_activation_outside_of_the_gradient_they_are_so_only_nearly() -> None:
    """The twin: s <- act(dPhi/ds) is no gradient of Phi."""
    example = mlp(nn.Tanh(), widths=(4, 6, 5, 3), gain=0.6)
    s, _ = increments(example, 1e-6, 6)
    assert worst(s, by_bptt(example, 6)[0]) > 1e-2


# E6: the circle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "activation", [nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.SiLU()], ids=lambda a: type(a).__name__
)
def test_the_error_falls_geometrically_in_the_points(activation: nn.Module) -> None:
    """O((beta / R)^N): the logarithm of the error falls by as much for each two points more."""
    example = mlp(activation, widths=(4, 6, 5, 2), gain=0.5)
    exact = recurrent_backprop(example.network, settled(example.network))
    errors = []
    for points in (2, 4, 6, 8):
        ours, model = gradients(example, torch2ebm.Holomorphic(0.1, points), 3000, 3000, tol=1e-15)
        assert all(phase.converged for phase in model.state.phases)
        errors.append(distance(ours, exact))
    falls = [math.log(a / b) for a, b in itertools.pairwise(errors)]
    assert min(falls) > math.log(5) and max(falls) < 2.5 * min(falls) and errors[-1] < 1e-5


@pytest.mark.parametrize("make", [mlp, convolutional, skip])
def test_two_points_are_the_symmetric_nudge(make) -> None:
    circle, model = gradients(make(), torch2ebm.Holomorphic(0.1, 2))
    pair, _ = gradients(make(), torch2ebm.Symmetric(0.1))
    assert distance(circle, pair) <= 1e-11
    assert [(phase.beta, phase.angle) for phase in model.state.phases[1:]] == [(0.1, 0.0), (0.1, math.pi)]
    assert not any(model.state.value[name].is_complex() for name in model.nodes)


@pytest.mark.parametrize("points", [3, 5])
def test_an_odd_number_of_points_is_the_whole_circle(points: int) -> None:
    """Half of the phases are relaxed; the others are their conjugates."""
    nudging = torch2ebm.Holomorphic(0.2, points)
    circle = [
        0.2 * complex(math.cos(2 * math.pi * k / points), math.sin(2 * math.pi * k / points)) for k in range(points)
    ]
    for power in range(-2, 3):
        whole = sum(b**power / (points * b) for b in circle).real
        assert sum((w * b**power).real for w, b in zip(nudging.weights, nudging.betas, strict=True)) == pytest.approx(
            whole
        )


@pytest.mark.filterwarnings(UNSETTLED)  # so few steps are meant
def test_an_activation_that_is_not_holomorphic_is_refused() -> None:
    model = attached(mlp(nn.ReLU()).module, torch2ebm.EquilibriumPropagation(torch2ebm.Holomorphic(0.1)))
    with pytest.raises(NoEquilibriumError, match=r"'1' \(relu\).*not holomorphic.*tanh.*Symmetric"):
        model(mlp().x)


@pytest.mark.filterwarnings(UNSETTLED)  # so few steps are meant
def test_a_loss_that_is_not_holomorphic_is_refused() -> None:
    model = attached(mlp().module, torch2ebm.EquilibriumPropagation(torch2ebm.Holomorphic(0.1)))
    with pytest.raises(NoEquilibriumError, match=r"l1_loss.*Symmetric"):
        nn.functional.l1_loss(model(mlp().x), torch.zeros(4, 3).double()).backward()


def test_the_circle_is_for_equilibrium_propagation_alone() -> None:
    with pytest.raises(ConfigurationError, match=r"Holomorphic\(beta=0\.1.*complex.*real.*Symmetric"):
        torch2ebm.PredictiveCoding(nudging=torch2ebm.Holomorphic(0.1, 4))
    for settings in ((0.1, 1), (0.1, 2.0), (0.0, 4), (-1.0, 4)):
        with pytest.raises(ConfigurationError, match="Holomorphic"):
            torch2ebm.Holomorphic(*settings)


# E5: a read-out outside of the state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [1.0, 0.3])
@pytest.mark.parametrize("make", [mlp, convolutional, skip])
def test_a_read_out_learns_outside_of_the_state(make, feedback: float) -> None:
    example = make().with_settings(feedback=feedback)
    ours, model = gradients(example, torch2ebm.Symmetric(0.1), 40, 7, readout=True)
    assert distance(ours, read_out(example.network, (40, 7), 0.1)) <= 1e-10
    free = model.state.prediction[list(model.nodes)[-1]]
    with torch.no_grad():
        torch.testing.assert_close(model(example.x), free, rtol=0, atol=1e-14)


def test_the_circle_s_two_points_hold_for_a_read_out() -> None:
    circle, _ = gradients(skip(), torch2ebm.Holomorphic(0.1, 2), readout=True)
    pair, _ = gradients(skip(), torch2ebm.Symmetric(0.1), readout=True)
    assert distance(circle, pair) <= 1e-11


# Updates --------------------------------------------------------------------------------------------------------------


def test_colours_move_one_after_another() -> None:
    """Gauss-Seidel: each colour from the states as they then are; no state reads another of its colour."""
    example = skip()
    equilibrium, _ = settled_call(example)
    names = dict(zip(equilibrium.hopfield.states, example.network.names, strict=True))
    colours = equilibrium.hopfield.colours
    assert sorted(sorted(names[slot] for slot in colour) for colour in colours) == [["s1"], ["s2", "s4"], ["s3"]]
    states = example.network.feedforward()
    ours = {slot: states[name] for slot, name in names.items()}
    for _ in range(3):
        for colour in colours:
            moved = example.network.step(states)
            states = {**states, **{names[slot]: moved[names[slot]].detach() for slot in colour}}
        ours = GaussSeidel().step(equilibrium, ours, Influence()).states
    for slot, name in names.items():
        torch.testing.assert_close(ours[slot], states[name], rtol=0, atol=1e-13)


def test_a_random_sign_is_one_of_two_one_sided_nudges() -> None:
    example, seen = skip(), set()
    signs = {sign: local_one_sided(example, sign) for sign in (1, -1)}
    for seed in range(8):
        algorithm = torch2ebm.EquilibriumPropagation(torch2ebm.RandomSign(0.1), 300, 7, loss_reduction="sum")
        model = attached(skip().module, algorithm)
        torch.manual_seed(seed)
        summed(example.network.loss)(model(example.x)).backward()
        beta = model.state.relaxation.beta
        seen.add(beta)
        found = {name: p.grad for name, p in model.named_parameters()}
        assert distance(found, signs[1 if beta > 0 else -1]) <= 1e-10
    assert seen == {0.1, -0.1}


def local_one_sided(example: Example, sign: int) -> dict[str, Tensor]:
    """From the symmetric pair and the positive nudge: 2 symmetric - positive is the negative one."""
    positive, _ = gradients(skip(), torch2ebm.OneSided(0.1))
    both, _ = gradients(skip(), torch2ebm.Symmetric(0.1))
    return positive if sign > 0 else {name: 2 * g - positive[name] for name, g in both.items()}
