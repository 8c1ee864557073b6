"""Values found with others given, against minimisers of the energy written out by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch2ebm
from torch2ebm.errors import ConfigurationError, NonFiniteError, NotSettledWarning, UnknownNameError
from torch2ebm.programs.program import Program

TIGHT = 1e-9


def minimised(energy: Callable[[], Tensor], free: Sequence[Tensor]) -> float:
    """The lowest energy, found by L-BFGS on leaves that are moved there."""
    optimizer = torch.optim.LBFGS(
        free, max_iter=300, tolerance_grad=1e-10, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = energy()
        found.backward()
        return found

    optimizer.step(closure)
    return energy().item()


def half(error: Tensor) -> Tensor:
    return 0.5 * error.square().sum()


@pytest.fixture(autouse=True)
def double() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Chain:
    """x -> tanh layer -> tanh layer -> output; every part of its energy written out."""

    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
        self.model = torch2ebm.convert(self.net, example_inputs=torch.zeros(2, 4))
        self.x, self.y = torch.randn(5, 4), torch.randn(5, 3)
        self.a = torch.zeros(5, 8, requires_grad=True)
        self.b = torch.zeros(5, 6, requires_grad=True)
        self.z = torch.zeros(5, 4, requires_grad=True)

    def energy(self, x: Tensor, a: Tensor, b: Tensor, output: Tensor) -> Tensor:
        net = self.net
        return half(a - net[1](net[0](x))) + half(b - net[3](net[2](a))) + half(output - net[4](b))


SOLVERS = [
    None,
    torch2ebm.GradientDescent(steps=600, lr=0.2),
    torch2ebm.ErrorDescent(steps=400, lr=0.2),
    torch2ebm.Momentum(steps=300, lr=0.05),
    torch2ebm.LocalErrorDescent(steps=600, lr=0.2),
    torch2ebm.AndersonErrorDescent(steps=100),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_a_latent_with_a_prior_and_a_part_of_the_output(solver: torch2ebm.Solver) -> None:
    chain, seen = Chain(), torch.rand(5, 3) > 0.4
    found = chain.model.infer(
        clamp={"output": chain.y},
        mask={"output": seen},
        free=["input"],
        prior={"input": (torch2ebm.Gaussian(2.0), 0.5)},
        solver=solver,
        tol=TIGHT if solver is None else None,
    )

    def energy() -> Tensor:
        output = torch.where(seen, chain.y, chain.net[4](chain.b))
        return chain.energy(chain.z, chain.a, chain.b, output) + half((chain.z - 0.5) * 2**0.5)

    assert minimised(energy, [chain.a, chain.b, chain.z]) == pytest.approx(float(found.energy.sum()), rel=1e-6)
    assert torch.allclose(found.input, chain.z, atol=1e-4)
    assert torch.allclose(found.value["2"], chain.b, atol=1e-4)
    assert torch.equal(found.output[seen], chain.y[seen])
    assert torch.allclose(found.output[~seen], chain.net[4](chain.b)[~seen], atol=1e-4)


def test_what_is_not_given_rests_at_the_feedforward_pass() -> None:
    chain = Chain()
    found = chain.model.infer(chain.x)
    assert torch.equal(found.output, chain.net(chain.x)) and float(found.energy.sum()) == 0


def test_a_hidden_value_that_is_given_cuts_the_energy_in_two() -> None:
    chain, h = Chain(), torch.randn(5, 8)
    found = chain.model.infer(chain.x, clamp={"0": h, "output": chain.y}, tol=TIGHT)
    energy = minimised(lambda: chain.energy(chain.x, h, chain.b, chain.y), [chain.b])
    assert energy == pytest.approx(float(found.energy.sum()), rel=1e-9)
    assert torch.allclose(found.value["2"], chain.b, atol=1e-6) and torch.equal(found.value["0"], h)
    assert torch.allclose(found.error["0"], h - chain.net[1](chain.net[0](chain.x)))


def test_a_hidden_value_that_is_given_in_part() -> None:
    chain, h, mask = Chain(), torch.randn(5, 8), torch.rand(5, 8) > 0.5
    found = chain.model.infer(chain.x, clamp={"0": h, "output": chain.y}, mask={"0": mask}, tol=TIGHT)
    energy = minimised(
        lambda: chain.energy(chain.x, torch.where(mask, h, chain.a), chain.b, chain.y), [chain.a, chain.b]
    )
    assert energy == pytest.approx(float(found.energy.sum()), rel=1e-9)
    assert torch.allclose(found.value["0"], torch.where(mask, h, chain.a), atol=1e-6)


def test_missing_entries_of_an_input_are_found_and_the_rest_stays() -> None:
    chain, seen = Chain(), torch.rand(5, 4) > 0.5
    damaged = chain.x.masked_fill(~seen, float("nan"))
    found = chain.model.infer(
        damaged, clamp={"output": chain.y}, mask={"input": seen}, prior={"input": torch2ebm.Gaussian()}, tol=TIGHT
    )

    def energy() -> Tensor:
        x = torch.where(seen, chain.x, chain.z)
        return chain.energy(x, chain.a, chain.b, chain.y) + half(x)

    assert minimised(energy, [chain.a, chain.b, chain.z]) == pytest.approx(float(found.energy.sum()), rel=1e-9)
    assert torch.equal(found.input[seen], chain.x[seen])


def test_an_input_without_a_prior_begins_where_it_is_given() -> None:
    """More data than unknowns decide it, so that it is the plain least-squares problem."""
    net = nn.Linear(3, 6)
    model, y = torch2ebm.convert(nn.Sequential(net, nn.Linear(6, 8))), torch.randn(5, 8)
    found = model.infer(torch.randn(5, 3), clamp={"output": y}, free=["input"], tol=1e-8)
    first, last = model.torch2ebm.module[0].weight, model.torch2ebm.module[1].weight
    target = y - model.torch2ebm.module(torch.zeros(5, 3))
    # integrating the hidden value out: |y - W2 W1 z| in the metric (1 + W2 W2^T)^-1
    root = torch.linalg.cholesky(torch.linalg.inv(torch.eye(8) + last @ last.T)).T
    expected = torch.linalg.lstsq(root @ last @ first, root @ target.T).solution.T
    assert torch.allclose(found.input, expected, atol=1e-5)


def test_data_of_a_distribution_by_the_name_of_the_output() -> None:
    """Binary data under logits: the energy of the output is their negative log-likelihood."""
    chain, data = Chain(), torch.randint(2, (5, 3)).double()
    found = chain.model.infer(
        chain.x, clamp={"output": data}, energies={"output": torch2ebm.Bernoulli(observed=True)}, tol=TIGHT
    )

    def energy() -> Tensor:
        hidden = chain.energy(chain.x, chain.a, chain.b, chain.net[4](chain.b))
        return hidden + F.binary_cross_entropy_with_logits(chain.net[4](chain.b), data, reduction="sum")

    assert minimised(energy, [chain.a, chain.b]) == pytest.approx(float(found.energy.sum()), rel=1e-8)
    assert torch.allclose(found.value["0"], chain.a, atol=1e-5)


def test_what_has_not_come_to_rest_is_told() -> None:
    chain = Chain()
    with pytest.warns(NotSettledWarning, match=r"after 2 steps.*steps=8"):
        found = chain.model.infer(
            chain.x, clamp={"output": chain.y}, solver=torch2ebm.ErrorConjugateGradient(tol=1e-6, steps=2)
        )
    assert found.relaxation.converged is False


class Bidirectional(nn.Module):
    """Two nets between an image and a label, whose hidden values are to be one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.down = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        return {"label": self.up(image), "image": self.down(label)}


def test_two_predictions_of_one_value() -> None:
    net = Bidirectional()
    image, label, h = torch.randn(5, 4), torch.randn(5, 3), torch.zeros(5, 8, requires_grad=True)
    found = torch2ebm.convert(net).infer(
        image,
        label,
        clamp={"down.0": "up.0", "label": label, "image": image},
        precisions={"up.0": 2.0, "down.0": 0.5},
        tol=TIGHT,
    )

    def energy() -> Tensor:
        up = half(h - net.up[1](net.up[0](image))) * 2 + half(label - net.up[2](h))
        return up + half(h - net.down[1](net.down[0](label))) * 0.5 + half(image - net.down[2](h))

    assert minimised(energy, [h]) == pytest.approx(float(found.energy.sum()), rel=1e-9)
    assert torch.allclose(found.value["up.0"], h, atol=1e-6) and torch.equal(found.value["down.0"], found.value["up.0"])


@pytest.mark.parametrize("nodes", ["layer", "op", "module", "activation", "preactivation", "children"])
def test_every_kind_of_node(nodes: str) -> None:
    """However the net is cut, a latent is found, and the module is as before."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))
    model, before = torch2ebm.convert(net, nodes=nodes), {k: v.clone() for k, v in net.state_dict().items()}
    x, y, seen = torch.randn(4, 1, 4, 4), torch.randn(4, 3), torch.rand(4, 1, 4, 4) > 0.3
    settings = {"clamp": {"output": y}, "mask": {"input": seen}, "prior": {"input": torch2ebm.Gaussian()}}
    one = model.infer(x, **settings, tol=1e-7)
    assert one.relaxation.converged and one.relaxation.energy[-1] < 0.9 * one.relaxation.energy[0]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net[0].weight.grad is None
    net.eval()  # batch norm in train mode is too stiff for plain descent
    one, other = (model.infer(x, **settings, solver=solver) for solver in (None, torch2ebm.ErrorDescent(400, lr=0.1)))
    assert torch.allclose(one.input, other.input, atol=1e-2)


def test_a_latent_needs_no_shape_once_the_model_has_run_and_one_sample_no_batch() -> None:
    net, prior = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6)), {"input": torch2ebm.Gaussian()}
    model, image = torch2ebm.convert(net), torch.randn(5, 6)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = torch2ebm.EnergyOptimizer(sgd, model, torch2ebm.PredictiveCoding(free=["input"]))
    (model(torch.zeros(5, 3)) - image).square().mean().backward()
    optimizer.detach()
    every = model.infer(clamp={"output": image}, free="input", prior=prior, tol=TIGHT)
    one = model.infer(clamp={"output": image[0]}, free=["input"], prior=prior, tol=TIGHT)
    assert every.input.shape == (5, 3) and torch.allclose(one.input, every.input[:1], atol=1e-6)
    mean = torch.ones(3)  # for all samples
    shifted = model.infer(clamp={"output": image}, prior={"input": (torch2ebm.Gaussian(1e6), mean)})
    assert torch.allclose(shifted.input, mean.expand(5, 3), atol=1e-3)
    drawn = model.infer(prior=prior, solver=torch2ebm.Langevin(steps=20, burn_in=10, lr=0.05, chains=7))
    assert drawn.samples["output"].shape == (10, 7, 1, 6)


def test_the_output_has_its_name_everywhere() -> None:
    chain = Chain()
    one, other = (
        chain.model.infer(chain.x, clamp={name: chain.y}, precisions={name: 3.0}, tol=TIGHT) for name in ("output", "4")
    )
    assert torch.equal(one.error["output"], other.error["4"])
    assert torch.equal(one.value["output"], one.output)
    plain = chain.model.infer(chain.x, clamp={"output": chain.y}, tol=TIGHT)
    assert not torch.allclose(one.error["4"], plain.error["4"], atol=1e-2)  # the twin: precision 1
    with pytest.raises(UnknownNameError, match="Did you mean"):
        one.value["outputs"]


def test_start_decides_where_there_are_two_lowest_points() -> None:
    """(z^2 - 1)^2 has one at 1 and one at -1."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, z: Tensor) -> Tensor:
            return self.scale * z.square()

    model = torch2ebm.convert(Square())
    for begin in (0.5, -0.5):
        found = model.infer(torch.full((1, 1), begin), clamp={"output": 1.0}, free=["input"], tol=1e-6)
        assert found.input.item() == pytest.approx(1 if begin > 0 else -1, abs=1e-4)
    settings = {"clamp": {"output": 1.0}, "free": ["input"], "prior": {"input": torch2ebm.Gaussian(0.1)}}
    assert model.infer(torch.zeros(1, 1), **settings).input.item() == 0  # a saddle, where the gradient is zero
    assert model.infer(torch.zeros(1, 1), **settings, start={"input": 0.5}).input.item() > 0.9


def test_an_attached_algorithm_and_inference_mode_change_nothing() -> None:
    chain = Chain()
    plain = chain.model.infer(chain.x, clamp={"output": chain.y})
    optimizer = torch2ebm.EnergyOptimizer(
        torch.optim.SGD(chain.net.parameters(), lr=0.1), chain.model, torch2ebm.ZeroDivergence()
    )
    F.mse_loss(chain.model(chain.x), chain.y).backward()
    with torch.inference_mode():
        again = chain.model.infer(chain.x, clamp={"output": chain.y})
    assert torch.equal(plain.value["0"], again.value["0"])
    chain.net[0] = nn.Linear(4, 8)
    optimizer.detach()
    z = chain.model.infer(clamp={"output": chain.y}, free=["input"], prior={"input": torch2ebm.Gaussian()})
    assert torch.allclose(z.prediction["0"], chain.net[1](chain.net[0](z.input)))


def _chain(**settings: object) -> Callable[[], object]:
    chain = Chain()
    return lambda: chain.model.infer(chain.x, **settings)


def test_a_start_decides_where_nothing_else_does() -> None:
    """The remedy that the error names: the nearest of the many lowest points. Of samples there is no such thing."""
    net, begin, y = nn.Linear(6, 3), torch.randn(5, 6), torch.randn(5, 3)
    model = torch2ebm.convert(nn.Sequential(net))
    settings = {"clamp": {"output": y}, "free": ["input"], "start": {"input": begin}}
    nearest = begin + (y - net(begin)) @ torch.linalg.pinv(net.weight).T
    assert torch.allclose(model.infer(**settings, tol=1e-8).input, nearest, atol=1e-6)
    for wrong in ({"start": None}, {"solver": torch2ebm.Langevin(steps=10, burn_in=5)}):
        with pytest.raises(ConfigurationError, match="without a prior"):
            model.infer(torch.zeros(5, 6), **{**settings, **wrong})


def test_an_input_beside_a_layer_of_that_name_has_the_name_of_its_argument() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.head = nn.Linear(3, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.input(x).tanh())

    model, prior = torch2ebm.convert(Net(), example_inputs=torch.zeros(2, 3)), {"x": torch2ebm.Gaussian()}
    found = model.infer(clamp={"output": torch.ones(2, 5)}, free=["x"], prior=prior)
    assert list(found.parts) == ["x", "input", "head"] and found.input.shape == (2, 3)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def _tokens() -> object:
    model = torch2ebm.convert(Named())
    return model.infer(torch.tensor([1, 2]), clamp={"output": torch.zeros(2, 3)}, free=["tokens"])


Y = torch.zeros(5, 3, dtype=torch.float64)
WRONG = {
    "clamped twice": (_chain(clamp={"output": Y, "4": Y}), "clamped to already"),
    "clamped and free": (_chain(clamp={"output": Y}, free=["output"]), "which is clamped"),
    "an input given twice": (_chain(clamp={"input": torch.zeros(5, 4)}), "given to the call itself"),
    "another shape": (_chain(clamp={"output": Y[:, :2]}), r"shape \(5, 2\)"),
    "numbers of classes": (_chain(clamp={"output": torch.zeros(5).long()}), "one_hot"),
    "a mask of another shape": (_chain(clamp={"output": Y}, mask={"output": torch.ones(5, 2).bool()}), r"\(5, 2\)"),
    "a mask of numbers": (_chain(clamp={"output": Y}, mask={"output": Y}), "float64"),
    "a mask without a value": (_chain(mask={"output": Y.bool()}), "no value"),
    "nothing free": (_chain(clamp={"output": Y, "0": 0.0, "2": 0.0}), "nothing free"),
    "integers that would move": (_tokens, "int64"),
    "nothing that decides": (_chain(clamp={"output": Y}, free=["input"]), "4 free entries a sample"),
    "a prior of a node": (_chain(prior={"0": torch2ebm.Gaussian()}), "which is no input"),
    "data that would move": (_chain(energies={"0": torch2ebm.Bernoulli(observed=True)}), "whose value is data"),
    "an energy beside a prior": (
        _chain(clamp={"output": Y}, prior={"input": torch2ebm.Gaussian()}, precisions={"input": 2.0}),
        "a free input",
    ),
    "a prior that is none": (_chain(prior={"input": 1.0}), "an energy"),
    "a tie to itself": (_chain(clamp={"0": "0"}), "the node itself"),
    "a tie of another shape": (_chain(clamp={"0": "2"}), "shapes"),
    "energies of one node by two names": (
        _chain(precisions={"output": 2.0}, energies={"4": torch2ebm.Gaussian()}),
        "named too",
    ),
    "a clamp without a name": (_chain(clamp=Y), r"a Tensor of shape \(5, 3\)"),
    "a prior without a name": (_chain(prior=torch2ebm.Gaussian()), "a dict by name"),
    "no tensor": (_chain(clamp={"output": Y.numpy()}), "as_tensor"),
    "a mask of samples": (_chain(clamp={"output": Y}, mask={"output": torch.ones(5).bool()}), r"expand\(5, 3\)"),
    "no solver": (_chain(solver="adam"), "a solver object"),
    "an argument of another name": (_chain(y=1), "unexpected keyword"),
}


@pytest.mark.parametrize(("question", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_named_before_anything_moves(question: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        question()


def test_unknown_names_and_numbers_that_are_none() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'output'"):
        _chain(clamp={"outptu": Y})()
    with pytest.raises(NonFiniteError, match="1 of 15"):
        _chain(clamp={"output": Y.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(float("nan")))})()


def test_values_that_would_have_to_be_known_before_themselves() -> None:
    chain = Chain()
    square = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    with pytest.raises(ConfigurationError, match="before themselves"):
        torch2ebm.convert(square).infer(chain.x, clamp={"0": "2", "output": chain.y})


def test_a_start_says_near_which_of_many_answers_to_look() -> None:
    """The nearest point to the start that gives the data, by the pseudo-inverse; without a start nothing decides."""
    net = nn.Linear(4, 3)
    start, y = torch.randn(5, 4), torch.randn(5, 3)
    found = torch2ebm.convert(net).infer(free=["input"], clamp={"output": y}, start={"input": start}, tol=1e-9)
    nearest = start + (y - net(start)).detach() @ torch.linalg.pinv(net.weight.detach()).T
    assert torch.allclose(found.input, nearest, atol=1e-5)


@pytest.mark.parametrize("solver", [torch2ebm.GradientDescent(12, 0.1), torch2ebm.ErrorConjugateGradient(tol=1e-8)])
def test_recorded_steps_are_the_eager_ones_and_none_is_of_the_data_before(
    solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a dropout, a mask, another image, and other weights."""
    monkeypatch.setattr(Program, "compile", lambda self: None)  # a program as it was recorded
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 6))
    model, mask = torch2ebm.convert(net), torch.rand(5, 6) > 0.3
    prior = {"input": torch2ebm.Gaussian()}
    for number in range(4):
        image, z = torch.randn(5, 6), torch.randn(5, 3)
        with torch.no_grad():
            net[0].weight.mul_(1.1)
        found = []
        for compile in (False, True):
            torch.manual_seed(number)
            how: dict[str, Any] = {"clamp": {"output": image}, "free": ["input"], "prior": prior}
            if number % 2:
                how["mask"] = {"output": mask}
            found.append(model.infer(z, **how, solver=solver, compile=compile))
        eager, recorded = found
        assert torch.allclose(eager.input, recorded.input, rtol=1e-9, atol=1e-12)
        assert eager.relaxation.steps == recorded.relaxation.steps
        assert eager.relaxation.energy == pytest.approx(recorded.relaxation.energy, rel=1e-9)
    graph = next(iter(model.torch2ebm._programs._families.values()))
    assert graph  # it was recorded


@pytest.mark.parametrize("solver", [torch2ebm.GradientDescent, torch2ebm.ErrorDescent])
def test_an_automatic_step_size_knows_of_the_data(solver: Any) -> None:
    """The Hessian in the one hidden value is 1 + C^T C, in its error, too; 1 without the data."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 8))
    weight = net[1].weight.detach()
    steepest = float(torch.linalg.eigvalsh(torch.eye(6) + weight.T @ weight).max())
    z, y = torch.randn(4, 6), torch.randn(4, 8)
    found = torch2ebm.convert(net).infer(z, clamp={"output": y}, solver=solver("auto", "auto"))
    assert found.relaxation.converged and found.relaxation.lr == pytest.approx(1 / steepest, rel=0.2)
    clamped = torch2ebm.convert(nn.Sequential(*net, nn.Linear(8, 3)))
    clamped.attach(torch2ebm.PredictiveCoding(solver=solver("auto", "auto"), clamp={"1": y}))
    (0.5 * (clamped(z) - torch.ones(4, 3)).square().sum(1).mean()).backward()  # of this nothing moves "0"
    assert clamped.state.relaxation.lr == pytest.approx(1 / steepest, rel=0.2)


def test_a_start_of_what_does_not_move_is_named() -> None:
    for start, said in (
        ({"input": 0.0}, "is given"),
        ({"output": 0.0}, "does not move"),
        ({"0": 0.0}, "does not move"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            _chain(clamp={"output": Y, "0": 0.0}, start=start)()


def test_a_sample_that_nothing_decides_is_named_among_others() -> None:
    model, mask = torch2ebm.convert(nn.Sequential(nn.Linear(2, 6))), torch.ones(3, 6, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ConfigurationError, match=r"in 1 of 3 samples \(1, "):
        model.infer(torch.zeros(3, 2), clamp={"output": torch.ones(3, 6)}, mask={"output": mask}, free=["input"])


def test_an_input_that_is_made_has_the_precision_of_the_module() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)).to(torch.bfloat16)
    found = torch2ebm.convert(net).infer(
        clamp={"output": torch.ones(2, 5)}, prior={"input": (torch2ebm.Gaussian(), torch.zeros(2, 3))}
    )
    assert found.input.shape == (2, 3)
