"""A module sharded by ``fully_shard`` over two processes learns as one process does on the whole batch.

Run as a script, this file is one of the two.
"""

import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import GATHERS_ON_CPU, same
from processes import RANKS, found_by_ranks, joined, needs_processes
from test_replicas import ALGORITHMS, EXACT, Tied, batch, difference, trained
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import torch2ebm
from torch2ebm.errors import ModuleChangedError, NodeEvaluationError, ShardingError, UnsynchronisedWarning

needs_shards = pytest.mark.skipif(not GATHERS_ON_CPU, reason="this torch cannot gather shards on a CPU")
SHARDED = 2  # modules: one by itself, and the root with what is left
LEARNS = {**ALGORITHMS, "Backprop": torch2ebm.Backprop(), "none": None}
STEPS = {"of 2 steps": 2, "of 30 steps": 30}


class Collectives(TorchDispatchMode):
    """Counts what the processes exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again as what it is made of
        for kind in ("gather", "reduce_scatter", "reduce"):
            if "c10d" in func.namespace and kind in func.__name__:
                self.found[kind] += 1
                break
        return func(*args, **(kwargs or {}))


class Sharded:
    """The net of test_distributed.py, sharded and then converted; rows of 3 and 4 on two processes."""

    def __init__(
        self,
        mesh: DeviceMesh,
        algorithm: torch2ebm.Algorithm | None,
        nodes: Any = "auto",
        frozen: str = "",
        **policy: Any,
    ):
        self.net = Tied().double()
        if frozen:
            self.net.get_parameter(frozen).requires_grad_(False)
        fully_shard(self.net.middle, mesh=mesh, **policy)
        fully_shard(self.net, mesh=mesh, **policy)
        self.model = torch2ebm.convert(self.net, nodes=nodes)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        if algorithm is not None:
            self.optimizer = torch2ebm.EnergyOptimizer(self.optimizer, self.model, algorithm)

    def backward(self, step: int, rank: int, parts: int = 1) -> None:
        for x, y in zip(*(tensor.chunk(parts) for tensor in batch(step, torch.float64)), strict=True):
            x, y = x.chunk(RANKS)[rank], y.chunk(RANKS)[rank]
            (F.cross_entropy(self.model(x), y) / parts).backward()

    def trained(self, rank: int, parts: int = 1) -> dict[str, Tensor]:
        for step in range(3):
            self.optimizer.zero_grad()
            self.backward(step, rank, parts)
            if self.model.attached:  # plain fully_shard would go on with the old weights here
                with torch.no_grad():
                    self.model(batch(step, torch.float64)[0])  # leaves the root gathered, and the step moves its shards
            self.optimizer.step()
        return self.whole()

    def whole(self) -> dict[str, Tensor]:
        assert all(isinstance(p, DTensor) for p in self.net.state_dict().values())
        return {name: p.full_tensor() for name, p in self.net.state_dict().items()}


def exchanged(mesh: DeviceMesh, rank: int, algorithm: torch2ebm.Algorithm) -> dict[str, int]:
    """In forward and backward of the second batch: the first captures."""
    learner = Sharded(mesh, algorithm)
    learner.backward(0, rank)
    with Collectives() as collectives:
        learner.backward(1, rank)
    return dict(collectives.found)


def gradient_of_the_bias(mesh: DeviceMesh, rank: int) -> list[Any]:
    """Frozen before the module was sharded, set free again, frozen again: each time after a batch."""
    learner = Sharded(mesh, torch2ebm.ZeroDivergence(), frozen="last.bias")
    found = []
    for free in (False, True, False):
        learner.net.last.bias.requires_grad_(free)
        learner.optimizer.zero_grad()
        learner.backward(0, rank)
        gradient = learner.net.last.bias.grad
        found.append(None if gradient is None else gradient.full_tensor())
    return found


def interrupted(mesh: DeviceMesh, rank: int) -> dict[str, Tensor]:
    """A forward that fails leaves the module sharded as it was, and the next steps as if it had not been."""
    learner = Sharded(mesh, ALGORITHMS["PredictiveCoding"])
    learner.backward(0, rank)
    with pytest.raises(NodeEvaluationError):
        learner.model(torch.zeros(4, 5, dtype=torch.float64))
    assert all(isinstance(p, DTensor) for p in learner.net.parameters())
    return learner.trained(rank)


def checkpointed(mesh: DeviceMesh, rank: int) -> dict[str, Tensor]:
    """What is saved while the root stands gathered is loaded while it does not."""
    learner = Sharded(mesh, ALGORITHMS["PredictiveCoding"])
    learner.backward(0, rank)
    with torch.no_grad():
        learner.model(batch(0, torch.float64)[0])
    saved = learner.optimizer.state_dict()
    learner.backward(0, rank)
    learner.optimizer.load_state_dict(saved)
    return learner.trained(rank)


def refusals(mesh: DeviceMesh, rank: int) -> dict[str, str]:
    found = {}
    with pytest.raises(ShardingError) as cast:
        Sharded(mesh, None, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    found["cast"] = str(cast.value)
    with pytest.raises(ShardingError) as compared:
        torch2ebm.compare(Sharded(mesh, None).net, F.cross_entropy, batch(0, torch.float64), [torch2ebm.Backprop()])
    found["compared"] = str(compared.value)
    net = Tied()
    model = torch2ebm.convert(net)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, torch2ebm.ZeroDivergence())
    fully_shard(net, mesh=mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsynchronisedWarning)
        with pytest.raises(ModuleChangedError) as late:
            model(batch(0, torch.float32)[0])
    found["late"] = str(late.value)
    return found


def partly(mesh: DeviceMesh, rank: int) -> list[str]:
    """What is said where a layer is not sharded, and learns in each process by itself."""
    net = Tied()
    fully_shard(net.middle, mesh=mesh)
    model = torch2ebm.convert(net)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, torch2ebm.ZeroDivergence())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(batch(rank, torch.float32)[0]).sum().backward()
    return [warning.category.__name__ for warning in said]


def without_events(mesh: DeviceMesh) -> str:
    """What is said with a torch whose streams on a CPU know no events, as of 2.6."""
    net = fully_shard(Tied(), mesh=mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch.cpu.Stream, "record_event", raising=False)
        with pytest.raises(ShardingError) as refused:
            torch2ebm.convert(net)
    return str(refused.value)


def worker(rank: int, folder: Path) -> None:
    warnings.simplefilter("error", UnsynchronisedWarning)  # none where everything is sharded
    mesh = init_device_mesh("cpu", (RANKS,))
    found: dict[str, Any] = {"without events": without_events(mesh)}
    if GATHERS_ON_CPU:
        found |= trainings(mesh, rank)
    torch.save(found, folder / f"{rank}.pt")


def trainings(mesh: DeviceMesh, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: Sharded(mesh, algorithm).trained(rank) for name, algorithm in LEARNS.items()}
    found["accumulated"] = Sharded(mesh, ALGORITHMS["PredictiveCoding"]).trained(rank, parts=2)
    found["nodes"] = Sharded(mesh, ALGORITHMS["PredictiveCoding"], ["middle", "last"]).trained(rank)
    for name, steps in STEPS.items():
        found[name] = exchanged(mesh, rank, torch2ebm.PredictiveCoding(steps=steps, lr=0.1))
    for checks in (gradient_of_the_bias, interrupted, checkpointed, refusals, partly):
        found[checks.__name__] = checks(mesh, rank)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_by_ranks(__file__, tmp_path_factory.mktemp("sharding"))


@needs_shards
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_processes_with_shards_are_one_on_the_whole_batch(ranks: list[dict[str, Any]], algorithm: str) -> None:
    assert difference(ranks[0][algorithm], trained(algorithm, 3, torch.float64)) <= EXACT
    assert same(ranks[0][algorithm], ranks[1][algorithm])


@needs_shards
def test_backprop_as_an_algorithm_is_what_fully_shard_does_alone(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert difference(rank["Backprop"], rank["none"]) <= EXACT
        assert difference(rank["none"], rank["PredictiveCoding"]) > 1e-3


@needs_shards
@pytest.mark.parametrize(("how", "parts"), [("accumulated", 2), ("interrupted", 1), ("nodes", 1)])
def test_accumulation_a_failed_forward_and_chosen_nodes(ranks: list[dict[str, Any]], how: str, parts: int) -> None:
    """Of these nodes the activations are outside, as with "layer" they are not."""
    expected = trained("PredictiveCoding", 3, torch.float64, parts)
    if how == "nodes":
        expected = alone_with(["middle", "last"])
    assert difference(ranks[0][how], expected) <= EXACT


def alone_with(nodes: list[str]) -> dict[str, Tensor]:
    net: nn.Module = Tied().double()
    model = torch2ebm.convert(net, nodes=nodes)
    inner = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    optimizer = torch2ebm.EnergyOptimizer(inner, model, ALGORITHMS["PredictiveCoding"])
    for step in range(3):
        optimizer.zero_grad()
        x, y = batch(step, torch.float64)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return dict(net.state_dict())


@needs_shards
def test_a_batch_takes_two_gathers_a_module_whatever_the_steps(ranks: list[dict[str, Any]]) -> None:
    parameters = len(list(Tied().parameters()))
    for rank in ranks:
        assert rank["of 2 steps"] == rank["of 30 steps"] == {"gather": 2 * SHARDED, "reduce_scatter": parameters}


@needs_shards
def test_freezing_a_shard_is_followed(ranks: list[dict[str, Any]]) -> None:
    net, (x, y) = Tied().double(), batch(0, torch.float64)
    F.cross_entropy(net(x), y).backward()  # which ZeroDivergence equals
    for rank in ranks:
        before, free, after = rank["gradient_of_the_bias"]
        assert before is None and after is None
        torch.testing.assert_close(free, net.last.bias.grad, rtol=0, atol=1e-14)


@needs_shards
def test_a_checkpoint_does_not_mind_who_is_gathered(ranks: list[dict[str, Any]]) -> None:
    assert difference(ranks[0]["checkpointed"], trained("PredictiveCoding", 3, torch.float64)) <= EXACT


@needs_shards
def test_what_cannot_be_gathered_and_scattered_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        said = rank["refusals"]
        assert all(w in said["cast"] for w in ("Tied), ", "'middle.weight'", "bfloat16", "MixedPrecisionPolicy"))
        assert all(w in said["compared"] for w in ("compare(", "Tied)", "Compare before fully_shard"))
        assert all(w in said["late"] for w in ("new parameters", "fully_shard first, convert after"))


@needs_shards
def test_a_layer_left_out_of_the_shards_is_named_unsynchronised(ranks: list[dict[str, Any]]) -> None:
    assert [rank["partly"] for rank in ranks] == [["UnsynchronisedWarning"]] * RANKS


@needs_processes
def test_shards_that_torch_cannot_gather_are_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert all(words in rank["without events"] for words in ("Tied", "on a CPU", torch.__version__, "Update torch"))


def test_the_older_wrapper_is_refused() -> None:
    net = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # made for real it needs an accelerator
    nn.Module.__init__(net)
    with pytest.raises(ShardingError, match=r"convert.*FullyShardedDataParallel.*fully_shard"):
        torch2ebm.convert(net)


if __name__ == "__main__":
    rank, folder = int(sys.argv[2]), Path(sys.argv[1])
    with joined(rank, folder):
        worker(rank, folder)
