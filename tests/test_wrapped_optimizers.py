"""Optimizers with methods and rules of their own, wrapped: the same weights as in plain torch, by the same calls.

ZeroDivergence's gradients are backpropagation's, so plain torch is the oracle.
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import AttachmentError, NonFiniteError

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
EXACT = torch2ebm.ZeroDivergence()


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021) in its two usual forms: two steps, or one with a closure."""

    def __init__(self, params: Any, base: type[torch.optim.Optimizer], rho: float = 0.05, **settings: Any) -> None:
        super().__init__(params, {"rho": rho, **settings})
        self.base = base(self.param_groups, **settings)
        self.ascents = 0

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        own = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in own]).norm()
        for p in own:
            self.state[p]["moved"] = p.grad * self.param_groups[0]["rho"] / norm
            p.add_(self.state[p]["moved"])
        self.ascents += 1
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p].pop("moved"))
        self.base.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()


class Ahead(torch.optim.Optimizer):
    """Lookahead (Zhang et al. 2019), which never runs ``Optimizer.__init__`` and takes no argument in ``zero_grad``."""

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 2, alpha: float = 0.5) -> None:
        self.fast, self.k, self.alpha, self.count = optimizer, k, alpha, 0
        self.state: Any = defaultdict(dict)
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.fast.param_groups

    def zero_grad(self) -> None:  # type: ignore[override]
        self.fast.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {**self.fast.state_dict(), "slow": self.slow, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.slow, self.count = [each.clone() for each in state.pop("slow")], state.pop("count")
        self.fast.load_state_dict(state)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.fast.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            with torch.no_grad():
                parameters = [p for group in self.param_groups for p in group["params"]]
                for p, slow in zip(parameters, self.slow, strict=True):
                    slow.lerp_(p, self.alpha)
                    p.copy_(slow)
        return loss


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2024): weights are y in training and the average x in evaluation."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})
        self.training, self.steps = False, 0

    def _each(self) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("z", p.detach().clone())
                yield group, p, self.state[p]["z"]

    @torch.no_grad()
    def train(self) -> "ScheduleFree":
        if not self.training:
            for group, p, z in self._each():
                p.lerp_(z, 1 - group["beta"])  # y = beta x + (1 - beta) z
        self.training = True
        return self

    @torch.no_grad()
    def eval(self) -> None:
        if self.training:
            for group, p, z in self._each():
                p.lerp_(z, 1 - 1 / group["beta"])  # x = (y - (1 - beta) z) / beta
        self.training = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not self.training:
            raise RuntimeError("call train() first")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        for group, p, z in self._each():
            x = (p - (1 - group["beta"]) * z) / group["beta"]
            z.sub_(p.grad, alpha=group["lr"])
            x.lerp_(z, 1 / self.steps)
            p.copy_(group["beta"] * x + (1 - group["beta"]) * z)
        return loss


class Scene:
    """A net, its model and its optimizer, plain or wrapped."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], algorithm: Any = None) -> None:
        self.net = network()
        self.inner = make(self.net.parameters())
        self.model: nn.Module = self.net
        self.optimizer: Any = self.inner
        if algorithm is not None:
            self.model = torch2ebm.convert(self.net)
            self.optimizer = torch2ebm.EnergyOptimizer(self.inner, self.model, algorithm)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(X), LABELS)

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.net.parameters()])


def by_methods(scene: Scene) -> None:
    scene.loss().backward()
    scene.optimizer.first_step(zero_grad=True)
    scene.loss().backward()
    scene.optimizer.second_step(zero_grad=True)


def by_backward_and_closure(scene: Scene) -> None:
    scene.loss().backward()
    scene.optimizer.step(lambda: scene.loss().backward())
    scene.optimizer.zero_grad()


def by_step(scene: Scene) -> None:
    scene.closure()
    scene.optimizer.step()


def by_closure(scene: Scene) -> None:
    assert scene.optimizer.step(scene.closure) > 0


def by_modes(scene: Scene) -> None:
    scene.optimizer.train()
    by_step(scene)
    scene.optimizer.eval()
    with torch.no_grad():
        scene.model(X)


SAM = lambda p: Sharpness(p, torch.optim.SGD, lr=0.2, momentum=0.9)  # noqa: E731
LOOPS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], Callable[[Scene], None]]] = {
    "SAM by two methods": (SAM, by_methods),
    "SAM by a closure": (SAM, by_backward_and_closure),
    "Lookahead": (lambda p: Ahead(torch.optim.Adam(p, lr=0.1)), by_step),
    "Lookahead with a closure": (lambda p: Ahead(torch.optim.SGD(p, lr=0.1, momentum=0.9)), by_closure),
    "schedule-free": (lambda p: ScheduleFree(p, 0.2), by_modes),
    "L-BFGS": (lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"), by_closure),
}


def trained(name: str, algorithm: Any = None, steps: int = 5) -> Scene:
    make, loop = LOOPS[name]
    scene = Scene(make, algorithm)
    for _ in range(steps):
        loop(scene)
    return scene


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_of_plain_torch_gives_its_weights_and_is_told_nothing(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, plain = trained(name, EXACT), trained(name)
    assert torch.allclose(ours.weights(), plain.weights(), rtol=0, atol=1e-12)
    assert not torch.equal(plain.weights(), trained(name, steps=4).weights())


@pytest.mark.parametrize("name", LOOPS)
def test_predictive_coding_goes_another_way_with_the_same_loop(name: str) -> None:
    """The negative twin: it is the algorithm's gradients that the loop uses."""
    ours = trained(name, torch2ebm.PredictiveCoding(steps=5, lr=0.2)).weights()
    assert torch.isfinite(ours).all() and not torch.allclose(ours, trained(name).weights(), rtol=0, atol=1e-6)


def test_what_the_wrapped_optimizer_has_is_read_written_and_listed() -> None:
    scene = trained("SAM by two methods", EXACT)
    assert scene.optimizer.ascents == 5 and "first_step" in dir(scene.optimizer)
    scene.optimizer.ascents = 7
    assert scene.inner.ascents == 7 and "ascents" not in vars(scene.optimizer)
    scene.optimizer.note = "mine"
    assert scene.optimizer.note == "mine" and not hasattr(scene.inner, "note")
    assert scene.optimizer.first_step.__name__ == "first_step"


@pytest.mark.parametrize("name", ["no_such_method", "_step_supports_amp_scaling", "__array__"])
def test_what_neither_has_and_what_is_private_is_not_there(name: str) -> None:
    """A gradient scaler asks the optimizer that it steps for its private flag, and would write on the wrapper."""
    scene = Scene(lambda p: torch.optim.Adam(p))
    wrapped = Scene(lambda p: torch.optim.Adam(p), EXACT).optimizer
    wrapped.optimizer._step_supports_amp_scaling = True
    assert not hasattr(wrapped, name) and isinstance(scene.optimizer, torch.optim.Adam)
    with pytest.raises(AttributeError, match=r"EnergyOptimizer\(Adam\)"):
        getattr(wrapped, name)


def test_further_arguments_of_step_reach_the_wrapped_optimizer() -> None:
    seen: list[Any] = []

    class Scaled(torch.optim.SGD):
        def step(self, closure: Any = None, scale: float = 1.0, *, second: Any = None) -> Any:  # type: ignore[override]
            seen.append((scale, None if second is None else second()))
            return super().step(closure)

    scene = Scene(lambda p: Scaled(p, lr=0.1), EXACT)
    scene.closure()
    scene.optimizer.step(None, 0.5, second=lambda: "called")
    scene.closure()
    scene.optimizer.step(scale=2.0)
    assert seen == [(0.5, "called"), (2.0, None)]


def test_a_closure_that_fails_under_lbfgs_leaves_weights_and_state() -> None:
    scene = trained("L-BFGS", EXACT)
    before, calls = scene.weights(), []

    def failing() -> Tensor:
        calls.append(scene.weights())
        if len(calls) == 3:
            raise NonFiniteError("here", "this", "that", "Do so.")
        return scene.closure()

    with pytest.raises(NonFiniteError):
        scene.optimizer.step(failing)
    assert torch.equal(scene.weights(), before) and not torch.equal(calls[-1], before)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_closure_that_fails_where_the_weights_have_moved_leaves_them_as_before_the_step(steps: int) -> None:
    scene = trained("SAM by a closure", EXACT, steps)
    before, seen = scene.weights(), []

    def failing() -> None:
        seen.append(scene.weights())
        raise NonFiniteError("here", "this", "that", "Do so.")

    scene.loss().backward()
    with pytest.raises(NonFiniteError):
        scene.optimizer.step(failing)
    assert torch.equal(scene.weights(), before) and not torch.equal(seen[0], before)


def test_an_optimizer_that_evaluates_its_closure_first_is_not_copied_in_every_step() -> None:
    """Seen in the first step: from then on nothing is kept for it, as for torch's own."""

    class Own(torch.optim.SGD):
        saved = 0

        def state_dict(self) -> dict[str, Any]:
            self.saved += 1
            return super().state_dict()

    for make, expected in ((lambda p: Own(p, lr=0.1), 1), (lambda p: torch.optim.SGD(p, lr=0.1), 0)):
        scene = Scene(make, EXACT)
        for _ in range(3):
            by_closure(scene)
        assert getattr(scene.inner, "saved", 0) == expected


def test_a_lookahead_goes_through_a_checkpoint() -> None:
    first, second, other = (trained("Lookahead", EXACT, steps) for steps in (4, 6, 4))
    other.net.load_state_dict(first.net.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    for _ in range(2):
        by_step(other)
    assert torch.equal(other.weights(), second.weights())


def test_further_steps_that_a_method_would_leave_out_are_refused_and_nothing_moves() -> None:
    scene = Scene(SAM, torch2ebm.IncrementalPredictiveCoding(steps=3, lr=0.05))
    before = scene.weights()
    scene.loss().backward()
    with pytest.raises(AttachmentError, match=r"first_step.*IncrementalPredictiveCoding"):
        scene.optimizer.first_step(zero_grad=False)
    assert torch.equal(scene.weights(), before)


def test_modes_of_a_schedule_free_optimizer_are_no_steps_of_incremental_predictive_coding() -> None:
    """The negative twin: nothing is left out where no backward waits for its further steps."""
    scene = trained("schedule-free", torch2ebm.IncrementalPredictiveCoding(steps=3, lr=0.05))
    assert torch.isfinite(scene.weights()).all()


# ---- several optimizers on one model


def parts(net: nn.Sequential) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(net[0].parameters(), lr=0.1), torch.optim.SGD(net[2].parameters(), lr=0.2)]


def together(algorithm: Any, wrapped: int, steps: int = 4) -> Tensor:
    net = network()
    model: Any = net if algorithm is None else torch2ebm.convert(net)
    both: list[Any] = parts(net)
    for i in range(wrapped):
        both[i] = torch2ebm.EnergyOptimizer(both[i], model, algorithm)
    for _ in range(steps):
        for optimizer in both:
            optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        for optimizer in both:
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("wrapped", [1, 2])
def test_a_second_optimizer_plain_or_wrapped_gives_the_weights_of_plain_torch(wrapped: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = together(EXACT, wrapped)
    assert torch.allclose(ours, together(None, 0), rtol=0, atol=1e-12)
    coded = [together(torch2ebm.PredictiveCoding(steps=5, lr=0.2), number) for number in (1, 2)]
    assert torch.equal(*coded) and not torch.allclose(coded[0], ours, atol=1e-6)


def test_the_algorithm_stays_until_the_last_optimizer_is_detached() -> None:
    net = network()
    model = torch2ebm.convert(net)
    first, second = (torch2ebm.EnergyOptimizer(each, model, EXACT) for each in parts(net))
    first.detach()
    assert model.algorithm is EXACT and model.attached
    first.detach()  # has gone already
    assert model.algorithm is EXACT
    second.detach()
    assert model.algorithm is None and not model.attached


REFUSED: dict[str, Callable[[nn.Sequential], tuple[torch.optim.Optimizer, Any]]] = {
    "the same parameters": lambda net: (torch.optim.SGD(net[0].parameters(), lr=0.1), EXACT),
    "some of the same parameters": lambda net: (torch.optim.SGD(net.parameters(), lr=0.1), EXACT),
    "another algorithm": lambda net: (parts(net)[1], torch2ebm.PredictiveCoding()),
    "other settings": lambda net: (parts(net)[1], torch2ebm.ZeroDivergence("levels")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_second_optimizer_that_cannot_stand_beside_the_first_is_refused(name: str) -> None:
    net = network()
    model = torch2ebm.convert(net)
    first = torch2ebm.EnergyOptimizer(parts(net)[0], model, EXACT)
    optimizer, algorithm = REFUSED[name](net)
    with pytest.raises(AttachmentError, match="replace=True"):
        torch2ebm.EnergyOptimizer(optimizer, model, algorithm)
    assert model.algorithm is EXACT and model.torch2ebm.holders == [first]


def test_weights_that_move_together_take_one_optimizer() -> None:
    net, algorithm = network(), torch2ebm.IncrementalPredictiveCoding(steps=2, lr=0.05)
    model = torch2ebm.convert(net)
    first, second = parts(net)
    kept = torch2ebm.EnergyOptimizer(first, model, algorithm)
    with pytest.raises(AttachmentError, match="several groups"):
        torch2ebm.EnergyOptimizer(second, model, algorithm)
    assert model.torch2ebm.holders == [kept]


def test_a_cell_of_a_notebook_runs_again_with_replace() -> None:
    net = network()
    model = torch2ebm.convert(net)

    def cell(algorithm: Any, **options: Any) -> Any:
        return torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm, **options)

    first = cell(torch2ebm.PredictiveCoding(), replace=True)  # nothing to replace yet
    with pytest.raises(AttachmentError, match="replace=True"):
        cell(EXACT)
    second = cell(EXACT, replace=True)
    assert model.algorithm is EXACT and model.torch2ebm.holders == [second]
    first.detach()  # of the one that was replaced: changes nothing
    assert model.algorithm is EXACT


def test_a_pair_of_optimizers_is_copied_as_a_pair() -> None:
    net = network()
    model = torch2ebm.convert(net)
    pair = [torch2ebm.EnergyOptimizer(each, model, EXACT) for each in parts(net)]
    copied = copy.deepcopy(pair)
    assert copied[0].model is copied[1].model is not model
    assert copied[0].model.torch2ebm.holders == copied


# ---- an optimizer of something else


def test_an_optimizer_of_another_net_is_refused() -> None:
    net = network()
    for other in (copy.deepcopy(net), network(), nn.Linear(2, 2)):
        model = torch2ebm.convert(net)
        with pytest.raises(AttachmentError, match=r"torch.optim.SGD\(model.parameters\(\)"):
            torch2ebm.EnergyOptimizer(torch.optim.SGD(other.parameters(), lr=0.1), model, EXACT)
        assert model.algorithm is None


def test_an_optimizer_of_a_part_or_with_parameters_beside_is_no_mistake() -> None:
    net, extra = network(), nn.Parameter(torch.zeros(1))
    for own in ([*net[2].parameters()], [*net.parameters(), extra]):
        model = torch2ebm.convert(net)
        assert torch2ebm.EnergyOptimizer(torch.optim.SGD(own, lr=0.1), model, EXACT).model is model
