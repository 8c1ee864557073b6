"""``torch.compile`` around the converted model, and around the loss: the plain loop's weights."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import COMPILERS_OWN_WARNINGS
from loops import ALGORITHMS, batches, network, same_bits
from torch import Tensor, nn

import torch2ebm

pytestmark = pytest.mark.filterwarnings(*COMPILERS_OWN_WARNINGS)
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
BACKENDS = ["eager", "aot_eager"]  # the compiler's front; Inductor needs a C++ compiler


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@every_algorithm
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_compiled_model_trains_as_the_plain_one(algorithm: torch2ebm.Algorithm, backend: str) -> None:
    net = network()
    model = torch.compile(torch2ebm.convert(net), backend=backend)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = torch2ebm.EnergyOptimizer(sgd, model, algorithm)
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert same_bits(net, by_hand(algorithm))


def by_hand(
    algorithm: torch2ebm.Algorithm, loss_fn: Callable[..., Tensor] = F.cross_entropy, scale: float = 1
) -> nn.Module:
    net = network()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)
    for x, y in batches():
        optimizer.zero_grad()
        loss_fn(model(scale * x), y).backward()
        optimizer.step()
    return net


def smoothed(output: Tensor, y: Tensor) -> Tensor:
    log_p = output.log_softmax(1)
    return -(0.9 * log_p.gather(1, y[:, None]).squeeze(1) + 0.1 * log_p.mean(1)).mean()


@every_algorithm
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("explicit", [False, True])
def test_a_compiled_loss_gives_the_plain_losss_weights(
    algorithm: torch2ebm.Algorithm, backend: str, explicit: bool
) -> None:
    compiled = torch.compile(smoothed, backend=backend)
    loss_fn = torch2ebm.EnergyLoss(compiled) if explicit else compiled
    torch.testing.assert_close(
        by_hand(algorithm, loss_fn).state_dict(), by_hand(algorithm, smoothed).state_dict(), rtol=1e-6, atol=1e-7
    )


def compiled_runs(steps: int, explicit: bool) -> int:
    """How often compiled code runs while the network trains with so many inference steps a batch."""
    runs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Tensor) -> Tensor:
            runs.append(graph)
            return graph(*arguments)

        return run

    torch.compiler.reset()
    compiled = torch.compile(smoothed, backend=counting)
    by_hand(torch2ebm.PredictiveCoding(steps=steps), torch2ebm.EnergyLoss(compiled) if explicit else compiled)
    return len(runs)


def test_in_energy_loss_the_relaxation_runs_the_compiled_loss_at_every_step() -> None:
    """And without it the operations that were recorded."""
    assert compiled_runs(9, explicit=True) - compiled_runs(2, explicit=True) == 7 * len(batches())
    assert compiled_runs(9, explicit=False) == compiled_runs(2, explicit=False) > 0


@every_algorithm
def test_a_compiled_function_of_model_and_loss_gives_the_plain_loops_weights(algorithm: torch2ebm.Algorithm) -> None:
    net = network()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, algorithm)

    @torch.compile(backend="eager")
    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(2 * x) / 2, y)

    for x, y in batches():
        optimizer.zero_grad()
        loss_of(x, y).backward()
        optimizer.step()
    twin = by_hand(algorithm, lambda output, y: F.cross_entropy(output / 2, y), scale=2)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-7)


def test_the_compiler_does_not_enter_the_converted_model() -> None:
    """It would trace the capture and the recorder; and evaluation is the module's own output."""
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Tensor]:
        graphs.append(graph)
        return graph.forward

    net, plain = network(), network()
    model = torch2ebm.convert(net)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, ALGORITHMS["PredictiveCoding"])
    x, y = batches()[0]
    F.cross_entropy(torch.compile(model, backend=counting)(x), y).backward()
    assert graphs == []
    F.cross_entropy(torch.compile(plain, backend=counting)(x), y).backward()  # the negative twin
    assert len(graphs) == 1
    with torch.no_grad():
        assert torch.equal(torch.compile(model.eval(), backend=counting)(x), net(x))
