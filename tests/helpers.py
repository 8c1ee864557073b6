"""Small pieces that several test files share."""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from oracles.graphs import Inputs, Loss, call
from torch import Tensor, nn

import torch2ebm
from torch2ebm.inference.value_inference import ValueInference

Made = TypeVar("Made")

UNSETTLED = "ignore:The free phase has not settled"  # for tests of relaxations that are cut short on purpose
LIGHTNINGS_OWN_WARNINGS = (
    r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning:lightning\.pytorch\.utilities\._pytree",
    r"ignore:The '\w+' does not have many workers:UserWarning:lightning\.pytorch\..*",  # on more than two cores
)

COMPILERS_OWN_WARNINGS = (  # Dynamo looks at .grad of every tensor that it meets, and hides this where it is printed
    r"ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning:"
    r"(torch\._dynamo\.variables\.builder|torch\._subclasses\.meta_utils|torch2ebm\.loss\.taped_tensor)",
)

# What the oldest torch that is supported, the one of `make test-oldest`, does not do by itself.
OLDEST = torch.__version__.startswith("2.6.")
FX_SEES_SIZES = not OLDEST  # torch.arange(x.shape[1]) in plain fx; our tracer helps out
COMPILES_DRAWS = not OLDEST  # Inductor makes bernoulli_ of torch.rand, though told to draw as eager code does
GATHERS_ON_CPU = not OLDEST  # its fully_shard asks a CPU's stream for an event, and there is none
SCHEDULERS_OWN_WARNING = (  # SequentialLR passes what it deprecates
    "ignore:The epoch parameter in `scheduler.step:UserWarning:torch.optim.lr_scheduler"
)


def forget_accelerator() -> None:
    """accelerate keeps one state a process: what one test has asked for is the next one's too."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


def attached(module: nn.Module, algorithm: torch2ebm.Algorithm, nodes: Any = "auto") -> torch2ebm.EnergyModel:
    """A converted model that learns by ``algorithm``."""
    model = torch2ebm.convert(module, nodes=nodes)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), model, algorithm)
    return model


def scaled_by(factor: float, loss: Tensor) -> Tensor:
    """What a gradient scaler makes of the loss: a factor that is no part of it."""
    return torch.amp.GradScaler("cpu", init_scale=factor).scale(loss)


def local_gradients(model: nn.Module, inputs: Inputs, loss: Loss, seed: int = 0) -> dict[str, Tensor]:
    """``.grad`` after one backward, by name; drawn from the same generator state as ``oracles.backprop``."""
    model.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loss(call(model, inputs)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative_error(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """The largest over parameters of |g - r| / |r|; they must be the same parameters."""
    assert ours.keys() == reference.keys()
    return max(float((ours[name] - r).norm() / r.norm().clamp_min(1e-30)) for name, r in reference.items())


def in_threads(functions: Sequence[Callable[[], Made]]) -> list[Made]:
    """What each returns, in a thread of its own; all begin together."""
    start = threading.Barrier(len(functions))

    def run(function: Callable[[], Made]) -> Made:
        start.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


def same(ours: Any, theirs: Any) -> bool:
    """Bit for bit."""
    if isinstance(ours, Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(value, theirs[key]) for key, value in ours.items())
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


class FullSweep(ValueInference):
    """The same inference without the wave front: every node is evaluated in every sweep."""

    def is_active(self, node: torch2ebm.Node) -> bool:
        return True
