"""Values that stay from batch to batch: where they begin, what that saves on a sequence, and what is kept of them."""

import gc
import io
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import CheckpointError, ConfigurationError, DivergenceError

half = nn.functional.mse_loss  # of a mean over samples and features


class Cell(nn.Module):
    """Temporal predictive coding (Millidge et al. 2024): z_t is predicted from z_{t-1}, and x_t from z_t."""

    def __init__(self) -> None:
        super().__init__()
        self.dynamics, self.emission = nn.Linear(6, 6), nn.Linear(6, 8)
        nn.init.orthogonal_(self.dynamics.weight, gain=0.5)

    def forward(self, before: Tensor) -> Tensor:
        seen: Tensor = self.emission(self.dynamics(before))
        return seen


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def slow_frames(count: int = 10) -> Tensor:
    """Along a circle, a twentieth of a radian a frame."""
    angle = 0.05 * torch.arange(count)[:, None, None]
    return torch.cos(angle) * torch.randn(4, 8) + torch.sin(angle) * torch.randn(4, 8)


def stepped(cell: Cell, frames: Sequence[Tensor] | Tensor, **how: Any) -> tuple[int, Tensor]:
    """A sequence, frame by frame: steps after the first frame, and the latent of each."""
    model, z, steps = torch2ebm.convert(cell), torch.zeros(4, 6), []
    latents = []
    for x in frames:
        found = model.infer(z, clamp={"output": x}, **how)
        assert found.relaxation.converged
        z = found.value["dynamics"]
        latents.append(z)
        steps.append(found.relaxation.steps)
    return sum(steps[1:]), torch.stack(latents)


SOLVERS = [
    torch2ebm.GradientDescent(500, 0.2, tol=1e-2),
    torch2ebm.ErrorDescent(500, 0.2, tol=1e-2),
    torch2ebm.Momentum(900, 0.1, tol=1e-2),
    torch2ebm.ErrorConjugateGradient(tol=1e-2),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_the_next_frame_needs_fewer_steps_and_shuffled_frames_gain_nothing(solver: Any) -> None:
    cell = Cell()
    slow, shuffled = slow_frames(), torch.randn(10, 4, 8)
    anew, on = (stepped(cell, slow, solver=solver, start=start)[0] for start in ("feedforward", "last"))
    assert on < 0.85 * anew
    anew, on = (stepped(cell, shuffled, solver=solver, start=start)[0] for start in ("feedforward", "last"))
    assert on >= anew


@pytest.mark.parametrize("start", ["last", "average"])
@pytest.mark.parametrize("kind", [torch2ebm.GradientDescent, torch2ebm.ErrorDescent])
def test_at_rest_it_is_one_and_the_same_where_the_energy_is_convex(kind: Any, start: str) -> None:
    """The posterior mean of a linear Gaussian cell: (1 + C^T C) z = A z_before + a + C^T (x - c)."""
    cell, frames = Cell(), slow_frames(4)
    _, found = stepped(cell, frames, solver=kind(900, 0.2, tol=1e-9), start=start)
    z, c = torch.zeros(4, 6), cell.emission.weight.detach()
    for x, latent in zip(frames, found, strict=True):
        right = cell.dynamics(z).detach() + (x - cell.emission.bias.detach()) @ c
        z = torch.linalg.solve(torch.eye(6) + c.T @ c, right.T).T
        assert (latent - z).abs().max() < 1e-6


@torch.no_grad()
def energy_at(cell: Cell, before: Tensor, z: Tensor, x: Tensor, beta: float = 1.0) -> float:
    """F of the cell, with half a squared error a sample for the loss."""
    loss = 0.5 * (x - cell.emission(z)).square().sum()
    return float(0.5 * (z - cell.dynamics(before)).square().sum() + beta * loss)


def test_it_begins_where_the_last_inference_has_ended_or_at_the_mean() -> None:
    cell, x = Cell(), torch.randn(4, 4, 8)
    z = torch.randn(4, 6)
    for start in ("last", "average"):
        model = torch2ebm.convert(cell)
        found = [model.infer(z, clamp={"output": each}, start=start) for each in x[:3]]
        values = [each.value["dynamics"] for each in found]
        begun = values[2] if start == "last" else torch.stack(values).mean((0, 1)).expand(4, 6)
        fourth = model.infer(z, clamp={"output": x[3]}, start=start)
        assert fourth.relaxation.energy[0] == pytest.approx(energy_at(cell, z, begun, x[3]), rel=1e-12)
        model.forget()
        anew = model.infer(z, clamp={"output": x[3]}, start=start).relaxation.energy[0]
        assert anew == pytest.approx(energy_at(cell, z, cell.dynamics(z), x[3]), rel=1e-12)


def test_what_is_given_by_name_begins_there_and_the_rest_where_it_was() -> None:
    cell, x, z = Cell(), torch.randn(4, 8), torch.randn(4, 6)
    model = torch2ebm.convert(cell)
    free = {"free": ["input"], "prior": {"input": torch2ebm.Gaussian()}, "clamp": {"output": x}}
    with pytest.raises(ConfigurationError, match="no shape"):
        model.infer(**free, start="last")
    found = model.infer(**free, start={"input": z})
    again = model.infer(**free, start="last")
    assert again.relaxation.energy[0] == pytest.approx(found.relaxation.energy[-1], rel=1e-3)
    assert again.relaxation.steps < found.relaxation.steps
    anew = model.infer(z, **free, start="last").relaxation.energy[0]  # an input that is passed begins there
    hidden = found.value["dynamics"]
    assert anew == pytest.approx(float(0.5 * z.square().sum()) + energy_at(cell, z, hidden, x), rel=1e-2)


def step(cell: Cell, model: Any, z: Tensor, x: Tensor) -> tuple[float, ...]:
    """One batch in training; the energies of its relaxation."""
    (0.5 * (model(z) - x).square().sum(1).mean()).backward()
    energy: tuple[float, ...] = model.state.relaxation.energy
    return energy


@pytest.mark.parametrize("solver", SOLVERS[:2] + SOLVERS[3:], ids=lambda solver: type(solver).__name__)
def test_training_goes_on_from_the_batch_before(solver: Any) -> None:
    assert_training_goes_on(solver, compile=False)


def assert_training_goes_on(solver: Any, compile: bool) -> None:
    cell, x, z = Cell(), torch.randn(2, 4, 8), torch.randn(4, 6)
    model = torch2ebm.convert(cell)
    model.attach(torch2ebm.PredictiveCoding(solver=solver, start="last", compile=compile))
    for first, second in ((x[0], x[1]), (x[1], x[0])):  # under compile the second time runs what the first recorded
        model.forget()
        assert step(cell, model, z, first)[0] == pytest.approx(energy_at(cell, z, cell.dynamics(z), first), rel=1e-9)
        ended = model.state.value["dynamics"]
        assert step(cell, model, z, second)[0] == pytest.approx(energy_at(cell, z, ended, second), rel=1e-9)


def test_programs_go_on_from_the_batch_before() -> None:
    assert_training_goes_on(torch2ebm.ErrorDescent(2, 0.2), compile=True)


def test_each_nudge_goes_on_from_its_own() -> None:
    """The same frame again: both nudges begin at rest."""
    cell, x, z = Cell(), torch.randn(4, 8), torch.randn(4, 6)
    model = torch2ebm.convert(cell)
    solver, nudging = torch2ebm.GradientDescent(400, 0.2, tol=1e-8), torch2ebm.Symmetric(0.5)
    model.attach(torch2ebm.PredictiveCoding(solver=solver, nudging=nudging, start="last"))
    step(cell, model, z, x)
    assert min(phase.steps for phase in model.state.phases) > 10
    step(cell, model, z, x)
    assert [phase.steps for phase in model.state.phases] == [1, 1]


def test_another_shape_and_another_attachment_begin_anew() -> None:
    cell, x, z = Cell(), torch.randn(4, 8), torch.randn(4, 6)
    model = torch2ebm.convert(cell)
    coding = torch2ebm.PredictiveCoding(10, 0.2, start="last")
    anew = energy_at(cell, z, cell.dynamics(z), x)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(cell.parameters(), lr=0.1), model, coding)
    step(cell, model, z, x)
    assert step(cell, model, z, x)[0] < 0.99 * anew
    few = energy_at(cell, z[:2], cell.dynamics(z[:2]), x[:2])
    assert step(cell, model, z[:2], x[:2])[0] == pytest.approx(few, rel=1e-12)
    assert step(cell, model, z, x)[0] == pytest.approx(anew, rel=1e-12)
    optimizer.detach()
    torch2ebm.EnergyOptimizer(torch.optim.SGD(cell.parameters(), lr=0.1), model, coding)
    assert step(cell, model, z, x)[0] == pytest.approx(anew, rel=1e-12)


@pytest.mark.parametrize("start", ["last", "average"])
def test_a_checkpoint_goes_on_where_it_was(start: str) -> None:
    x, z = torch.randn(3, 4, 8), torch.randn(4, 6)
    cell = Cell()

    def attached() -> tuple[Any, torch2ebm.EnergyOptimizer]:
        model = torch2ebm.convert(cell)
        sgd = torch.optim.SGD(cell.parameters(), lr=0.0)
        return model, torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.PredictiveCoding(10, 0.2, start=start))

    model, optimizer = attached()
    step(cell, model, z, x[0])
    step(cell, model, z, x[1])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    expected = step(cell, model, z, x[2])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer = attached()
    anew = step(cell, model, z, x[2])
    optimizer.load_state_dict(saved)
    assert step(cell, model, z, x[2]) == expected != anew
    broken = {**saved, "torch2ebm": {**saved["torch2ebm"], "values": {start: {"nudged": "text"}}}}
    before = optimizer.state_dict()["torch2ebm"]["values"]
    with pytest.raises(CheckpointError, match="values as dictionaries of tensors"):
        optimizer.load_state_dict(broken)
    after = optimizer.state_dict()["torch2ebm"]["values"]
    assert str(after) == str(before)


def test_whoever_did_not_ask_has_nothing_of_it_in_a_checkpoint() -> None:
    cell, x, z = Cell(), torch.randn(4, 8), torch.randn(4, 6)
    model = torch2ebm.convert(cell)
    optimizer = torch2ebm.EnergyOptimizer(
        torch.optim.SGD(cell.parameters(), lr=0.1), model, torch2ebm.PredictiveCoding()
    )
    step(cell, model, z, x)
    model.infer(z, clamp={"output": x})
    assert "values" not in optimizer.state_dict()["torch2ebm"]
    model.infer(z, clamp={"output": x}, start="last")
    assert set(optimizer.state_dict()["torch2ebm"]["values"]["last"]) == {"inferred"}


def test_nothing_of_the_batch_is_held_but_its_values() -> None:
    cell, z = Cell(), torch.randn(4, 6)
    model = torch2ebm.convert(cell)
    model.attach(torch2ebm.PredictiveCoding(10, 0.2, start="last"))
    x = torch.randn(4, 8)
    step(cell, model, z, x)
    model.infer(z, clamp={"output": x}, start="last")
    kept = [value for values in model.torch2ebm.memory.last.values() for value in values.values()]
    assert len(kept) == 2 and all(value.grad_fn is None and value.shape == (4, 6) for value in kept)
    shown = model.state.value["dynamics"]
    assert all(value.data_ptr() != shown.data_ptr() for value in kept)
    old, model.torch2ebm._state = weakref.ref(x), None
    del x, shown
    gc.collect()
    assert old() is None


def test_a_batch_that_is_refused_leaves_the_values_as_they_were() -> None:
    cell, x, z = Cell(), torch.randn(4, 8), torch.randn(4, 6)
    model = torch2ebm.convert(cell)
    model.attach(torch2ebm.PredictiveCoding(10, 0.2, start="last"))
    step(cell, model, z, x)
    ended = model.state.value["dynamics"]
    with pytest.raises(torch2ebm.errors.Torch2EBMError):
        step(cell, model, z, x * torch.nan)
    torch2ebm.compare(
        cell,
        lambda output, target: 0.5 * (output - target).square().sum(1).mean(),
        (z, x),
        [torch2ebm.ZeroDivergence()],
    )
    model(z)  # no backward follows
    with torch.no_grad():
        model(z)
    assert step(cell, model, z, x)[0] == pytest.approx(energy_at(cell, z, ended, x), rel=1e-12)


def test_one_step_from_other_errors_is_not_called_backprop() -> None:
    cell, x, z = Cell(), torch.randn(4, 8), torch.randn(4, 6)
    model = torch2ebm.convert(cell)
    model.attach(torch2ebm.PredictiveCoding(solver=torch2ebm.ErrorDescent(1, 0.2), start="last"))
    told = []
    for _ in range(2):
        step(cell, model, z, x)
        told.append(model.state.relaxation.is_backprop)
    assert told == [True, False]


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="latest"):
        torch2ebm.PredictiveCoding(start="latest")
    with pytest.raises(ConfigurationError, match="latest"):
        torch2ebm.EquilibriumPropagation(start="latest")
    model = torch2ebm.convert(Cell())
    with pytest.raises(ConfigurationError, match="latest"):
        model.infer(torch.zeros(4, 6), start="latest")
    with pytest.raises(ConfigurationError, match="list"):
        model.infer(torch.zeros(4, 6), start=["dynamics"])


def test_a_diverged_frame_can_begin_anew() -> None:
    cell, x, z = Cell(), torch.randn(4, 8), torch.randn(4, 6)
    model = torch2ebm.convert(cell)
    with pytest.raises(DivergenceError):
        model.infer(z, clamp={"output": x}, solver=torch2ebm.GradientDescent(500, 5.0), start="last")
    found = model.infer(z, clamp={"output": x}, start="last")
    assert found.relaxation.energy[0] == pytest.approx(energy_at(cell, z, cell.dynamics(z), x), rel=1e-12)


PARTICLES = [
    torch2ebm.EquilibriumPropagation(free_steps=300, tol=1e-4, start="last"),
    torch2ebm.ContrastiveHebbian(0.5, free_steps=300, tol=1e-4, start="last"),
    torch2ebm.CoupledLearning(free_steps=300, tol=1e-4, start="last"),
    torch2ebm.RecurrentBackprop(free_steps=300, tol=1e-4, start="last"),
]


@pytest.mark.parametrize("algorithm", PARTICLES, ids=lambda algorithm: type(algorithm).__name__)
def test_persistent_particles_settle_sooner_on_slow_frames_alone(algorithm: Any) -> None:
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(0.8)

    def free_steps(frames: Tensor, forgetting: bool) -> tuple[int, Tensor]:
        model, steps, outputs = torch2ebm.convert(net), 0, []
        model.attach(algorithm)
        for x in frames:
            if forgetting:
                model.forget()
            output = model(x)
            half(output, torch.zeros(4, 3)).backward()
            outputs.append(output.detach())
            steps += model.state.phases[0].steps if model.state.phases else model.state.relaxation.steps
        return steps, torch.stack([torch.Tensor(each) for each in outputs])

    slow, shuffled = 0.1 * slow_frames(6), 0.1 * torch.randn(6, 4, 8)
    (anew, at), (on, there) = free_steps(slow, True), free_steps(slow, False)
    assert on < 0.9 * anew and (at - there).abs().max() < 1e-3
    (anew, _), (on, _) = free_steps(shuffled, True), free_steps(shuffled, False)
    assert on >= 0.9 * anew
