"""What goes wrong says where, what was got and what to do, and leaves everything as it was."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from algorithms_list import taken_by
from helpers import relative_error
from torch import Tensor, nn

import torch2ebm
from torch2ebm import errors
from torch2ebm.engine.call import NodePass
from torch2ebm.graph.energy_graph import Node

ALGORITHMS = taken_by(__file__)


class Net(nn.Module):
    """Three layers that have a weight, at three depths, a batch norm and a clamp."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.middle, self.clamp = nn.Linear(8, 8), nn.Hardtanh()
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.clamp(self.middle(torch.tanh(self.norm(self.first(x))))))


class Scene:
    """A net in training: one good step done, and a ``.grad`` from another loss there."""

    def __init__(self, algorithm: torch2ebm.Algorithm) -> None:
        self.net = Net()
        self.model = torch2ebm.convert(self.net)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=0.01)
        self.optimizer = torch2ebm.EnergyOptimizer(self.adam, self.model, algorithm)
        generator = torch.Generator().manual_seed(1)
        self.x, self.other = torch.randn(2, 5, 4, generator=generator)
        self.target, self.labels = torch.randn(5, 3, generator=generator), torch.tensor([0, 1, 2, 0, 1])
        self.retained = torch.zeros(())
        self.step()
        self.backward(self.model.feedforward(self.x))

    def backward(self, output: Tensor) -> None:
        F.cross_entropy(output, self.labels).backward()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward(self.model(self.x))
        self.optimizer.step()


Snapshot = dict[str, Any]


def snapshot(scene: Scene) -> Snapshot:
    """Contents and identities of everything that an error may not touch."""
    parts = dict(scene.net.named_modules())
    parameters = dict(scene.net.named_parameters())
    return {
        "weights": {name: p.detach().clone() for name, p in parameters.items()},
        "grad": {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "buffers": {name: b.clone() for name, b in scene.net.named_buffers()},
        "optimizer": copy.deepcopy(scene.adam.state_dict()["state"]),
        "attributes": {
            (path, name): id(value)
            for path, part in parts.items()
            for content in (part.__dict__, part._parameters, part._buffers, part._modules)
            for name, value in content.items()
        },
        "training": {path: part.training for path, part in parts.items()},
    }


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Where two snapshots differ; NaN is as NaN."""
    if isinstance(before, dict):
        assert before.keys() == after.keys(), path
        for key in before:
            yield from differences(before[key], after[key], f"{path}.{key}")
    elif isinstance(before, Tensor) and isinstance(after, Tensor):
        if before.shape != after.shape or not torch.allclose(before, after, rtol=0, atol=0, equal_nan=True):
            yield path
    elif before is not after and before != after:
        yield path


@contextmanager
def untouched(scene: Scene) -> Iterator[None]:
    """What runs inside changes nothing."""
    before = snapshot(scene)
    yield
    assert list(differences(before, snapshot(scene))) == []


def nothing(scene: Scene) -> None: ...


@dataclass(frozen=True)
class Bad:
    name: str
    error: type[BaseException]
    says: tuple[str, ...]  # the place, the offending thing, the remedy
    act: Callable[[Scene], Any]
    prepare: Callable[[Scene], Any] = nothing
    repair: Callable[[Scene], Any] = nothing
    algorithms: tuple[str, ...] = tuple(ALGORITHMS)


PC = ("PredictiveCoding", "ErrorDescent")


def assert_refused(bad: Bad, algorithm: torch2ebm.Algorithm) -> None:
    """The error, then untouched state, then a good step that is that of a twin which saw no error."""
    scene, twin = Scene(algorithm), Scene(algorithm)
    bad.prepare(scene)
    bad.prepare(twin)
    with untouched(scene), pytest.raises(bad.error) as caught:
        bad.act(scene)
    kind, message = caught.type, str(caught.value)
    del caught  # its traceback holds the graph of the call that failed
    assert kind is bad.error
    assert [part for part in bad.says if part not in message] == [], message
    for each in (scene, twin):
        bad.repair(each)
        each.step()
    assert list(differences(without_identities(snapshot(twin)), without_identities(snapshot(scene)))) == []


def without_identities(taken: Snapshot) -> Snapshot:
    return {name: part for name, part in taken.items() if name != "attributes"}


def step_with(loss: Callable[[Tensor, Scene], Tensor]) -> Callable[[Scene], None]:
    return lambda scene: loss(scene.model(scene.x), scene).backward()


def calling(arguments: Callable[[Scene], tuple[Any, ...]]) -> Callable[[Scene], None]:
    return lambda scene: scene.backward(scene.model(*arguments(scene)))


good = calling(lambda scene: (scene.x,))


# ---- losses


class _Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class _InNumPy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        array = value.detach().numpy()
        ctx.save_for_backward(torch.from_numpy(2 * array / array.size))
        return torch.from_numpy(np.asarray(np.square(array).mean()))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return ctx.saved_tensors[0] * gradient


def other_tensors_only(scene: Scene) -> None:
    scene.model(scene.x)
    torch.ones((), requires_grad=True).backward()
    scene.optimizer.step()


def ordinary(loss: Callable[[Tensor, Scene], Tensor]) -> Callable[[Scene], None]:
    """A loss that is an ordinary tensor without a gradient: torch speaks first, then the optimizer."""

    def act(scene: Scene) -> None:
        with pytest.raises(RuntimeError, match="does not require grad"):
            loss(scene.model(scene.x), scene).backward()
        scene.optimizer.step()

    return act


def retain(scene: Scene) -> None:
    scene.retained = scene.model(scene.x).mean()
    scene.retained.backward()


RECORDED = ("loss.backward()", "EnergyLoss")
INDEPENDENT = ("detach", "model(x)")
LOSSES = [
    Bad(
        "the output's data",
        errors.LossIndependentError,
        ("loss.backward()", *INDEPENDENT),
        step_with(lambda output, scene: F.cross_entropy(output.data, scene.labels)),
    ),
    Bad(
        "an argmax",
        errors.LossIndependentError,
        ("loss.backward()", "argmax"),
        step_with(lambda output, scene: (output.argmax(1) == scene.labels).float().mean()),
    ),
    Bad("other tensors only", errors.LossIndependentError, ("optimizer.step()", *INDEPENDENT), other_tensors_only),
    *(
        Bad(name, errors.LossIndependentError, ("optimizer.step()", *INDEPENDENT), ordinary(loss))
        for name, loss in (
            ("the output detached", lambda output, scene: F.cross_entropy(output.detach(), scene.labels)),
            ("the loss detached", lambda output, scene: F.cross_entropy(output, scene.labels).detach()),
            ("NumPy only", lambda output, scene: torch.from_numpy(output.detach().numpy()).mean()),
            ("a constant", lambda output, scene: torch.tensor(1.0)),
        )
    ),
    Bad(
        "a custom function",
        errors.LossReplayError,
        RECORDED,
        step_with(lambda output, scene: _Squared.apply(output).mean()),
        algorithms=PC,
    ),
    Bad(
        "a custom function in NumPy",
        errors.LossNotRecordedError,
        RECORDED,
        step_with(lambda output, scene: _InNumPy.apply(output)),
        algorithms=PC,
    ),
    Bad(
        "dropout after the model",
        errors.LossReplayError,
        ("random numbers", *RECORDED),
        step_with(lambda output, scene: F.cross_entropy(F.dropout(output, 0.5), scene.labels)),
        algorithms=PC,
    ),
    Bad(
        "a vector",
        errors.LossNotRecordedError,
        RECORDED,
        lambda scene: (scene.model(scene.x) - scene.target).square().mean(1).backward(torch.ones(5)),
        algorithms=PC,
    ),
    Bad(
        "a sum",
        errors.LossReductionError,
        ("loss.backward()", "batch of 5", "loss_reduction='sum'"),
        step_with(lambda output, scene: F.cross_entropy(output, scene.labels, reduction="sum")),
        algorithms=PC,
    ),
    Bad(
        "create_graph",
        errors.HigherOrderGradientError,
        ("create_graph", "feedforward"),
        lambda scene: scene.model(scene.x).mean().backward(create_graph=True),
    ),
    Bad(
        "create_graph in autograd.grad",
        errors.HigherOrderGradientError,
        ("create_graph", "feedforward"),
        lambda scene: torch.autograd.grad(scene.model(scene.x).mean(), list(scene.net.parameters()), create_graph=True),
    ),
    Bad(
        "a second backward",
        errors.GraphFreedError,
        ("loss.backward()", "second", "retain_graph=True"),
        lambda scene: scene.retained.backward(),
        prepare=retain,
    ),
]

# ---- inputs


INPUTS = [
    Bad(
        "wrong width",
        errors.NodeEvaluationError,
        ("module 'first'", "(5, 7)", "shape"),
        calling(lambda scene: (torch.randn(5, 7),)),
    ),
    Bad(
        "wrong rank",
        errors.NodeEvaluationError,
        ("module 'norm'", "(5, 2, 2, 8)", "shape"),
        calling(lambda scene: (torch.randn(5, 2, 2, 4),)),
    ),
    Bad(
        "one sample for a batch norm",
        errors.NodeEvaluationError,
        ("module 'norm'", "(1, 8)", "more than 1 value"),
        calling(lambda scene: (torch.randn(1, 4),)),
    ),
    Bad(
        "wrong dtype",
        errors.NodeEvaluationError,
        ("module 'first'", "float64", "dtype"),
        calling(lambda scene: (scene.x.double(),)),
    ),
    Bad(
        "integers",
        errors.NodeEvaluationError,
        ("module 'first'", "int64", "dtype"),
        calling(lambda scene: (scene.x.long(),)),
    ),
    Bad(
        "wrong device",
        errors.NodeEvaluationError,
        ("input 0", "meta", "device"),
        calling(lambda scene: (scene.x.to("meta"),)),
    ),
    Bad(
        "no sample",
        errors.ConfigurationError,
        ("input 0", "a batch of 0", "Skip"),
        calling(lambda scene: (scene.x[:0],)),
    ),
    Bad("missing argument", errors.ConfigurationError, ("model(", "'x'"), calling(lambda scene: ())),
]

# ---- NaN and infinity


def poisoned(tensor: Tensor, bad: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[1] = bad
    return tensor


def poison(path: str, bad: float) -> dict[str, Callable[[Scene], None]]:
    """Preparing and repairing one entry of a parameter or buffer."""
    kept: dict[int, Tensor] = {}

    def prepare(scene: Scene) -> None:
        tensor = scene.net.state_dict()[path]
        kept[id(scene)] = tensor.clone()
        tensor.view(-1)[1] = bad

    def repair(scene: Scene) -> None:
        scene.net.state_dict()[path].copy_(kept.pop(id(scene)))

    return {"prepare": prepare, "repair": repair}


PLACES = [f"{layer}.{kind}" for layer in ("first", "middle", "last") for kind in ("weight", "bias")]
PLACES += ["norm.weight", "norm.bias"]
NUMBERS = [
    case
    for bad in (float("nan"), float("inf"))
    for case in (
        Bad(
            f"{bad} in the input",
            errors.NonFiniteError,
            ("input 0", "1 of 20 elements", "batch"),
            calling(lambda scene, bad=bad: (poisoned(scene.x, bad),)),
        ),
        Bad(
            f"{bad} in the target",
            errors.NonFiniteError,
            ("the loss", "target"),
            step_with(lambda output, scene, bad=bad: F.mse_loss(output, poisoned(scene.target, bad))),
        ),
        *(
            Bad(f"{bad} in {path}", errors.NonFiniteError, (f"'{path}'", "1 of "), good, **poison(path, bad))
            for path in PLACES
        ),
        Bad(
            f"{bad} in running statistics, training",
            errors.NonFiniteError,
            ("norm.running_mean", "1 of 8"),
            good,
            **poison("norm.running_mean", bad),
        ),
    )
]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_bad_running_statistics_in_evaluation_are_named(
    algorithm: torch2ebm.Algorithm, buffer: str, bad: float
) -> None:
    changes = poison(f"norm.{buffer}", bad)

    def prepare(scene: Scene) -> None:
        scene.model.eval()
        changes["prepare"](scene)

    case = Bad("", errors.NonFiniteError, (f"norm.{buffer}", "1 of 8"), good, prepare, changes["repair"])
    assert_refused(case, algorithm)


# ---- a module that changed


def swapping(path: str, make: Callable[[Any], Any]) -> dict[str, Callable[[Scene], None]]:
    """Preparing and repairing an attribute of the net."""
    kept: dict[int, Any] = {}
    owner, _, name = path.rpartition(".")

    def prepare(scene: Scene) -> None:
        part = scene.net.get_submodule(owner)
        kept[id(scene)] = getattr(part, name)
        setattr(part, name, make(getattr(part, name)))

    def repair(scene: Scene) -> None:
        setattr(scene.net.get_submodule(owner), name, kept.pop(id(scene)))

    return {"prepare": prepare, "repair": repair}


def append(scene: Scene) -> None:
    scene.net.extra = nn.Linear(3, 3)


def remove(scene: Scene) -> None:
    del scene.net.extra


def resize(scene: Scene) -> None:
    scene.retained = scene.net.middle.weight.data
    scene.net.middle.weight.data = torch.randn(8, 9)


def restore_size(scene: Scene) -> None:
    scene.net.middle.weight.data = scene.retained


CONVERT_AGAIN = ("EnergyModel(Net)", "Convert the changed module again")
CHANGES = [
    Bad(
        "layer swapped",
        errors.ModuleChangedError,
        ("Linear", *CONVERT_AGAIN),
        good,
        **swapping("middle", lambda layer: nn.Linear(8, 8)),
    ),
    Bad(
        "activation swapped",
        errors.ModuleChangedError,
        ("ReLU", *CONVERT_AGAIN),
        good,
        **swapping("clamp", lambda layer: nn.ReLU()),
    ),
    Bad(
        "parameter replaced",
        errors.ModuleChangedError,
        ("(3, 8)", *CONVERT_AGAIN),
        good,
        **swapping("last.weight", lambda weight: nn.Parameter(weight.detach().clone())),
    ),
    Bad("layer appended", errors.ModuleChangedError, ("Linear", *CONVERT_AGAIN), good, append, remove),
    Bad(
        "parameter resized",
        errors.NodeEvaluationError,
        ("module 'middle'", "(5, 8)", "shape"),
        good,
        resize,
        restore_size,
    ),
]

# ---- wrong objects


def on(scene: Scene) -> Scene:
    """The same net without an attachment."""
    scene.optimizer.detach()
    return scene


def attaching(make: Callable[[Scene], tuple[Any, Any, Any]]) -> dict[str, Callable[[Scene], Any]]:
    def repair(scene: Scene) -> None:
        if not scene.model.attached:
            scene.optimizer = torch2ebm.EnergyOptimizer(scene.adam, scene.model, torch2ebm.ZeroDivergence())

    return {"act": lambda scene: torch2ebm.EnergyOptimizer(*make(scene)), "prepare": on, "repair": repair}


Z = ("ZeroDivergence",)
EXACT = torch2ebm.ZeroDivergence()
OBJECTS = [
    Bad(
        "algorithm class",
        errors.AttachmentError,
        ("EnergyOptimizer", "ZeroDivergence", "not the class"),
        algorithms=Z,
        **attaching(lambda s: (s.adam, s.model, torch2ebm.ZeroDivergence)),
    ),
    Bad(
        "optimizer class",
        errors.AttachmentError,
        ("EnergyOptimizer", "as the optimizer", "Adam(net.parameters())"),
        algorithms=Z,
        **attaching(lambda s: (torch.optim.Adam, s.model, EXACT)),
    ),
    Bad(
        "unconverted model",
        errors.AttachmentError,
        ("EnergyOptimizer", "a Net", "torch2ebm.convert"),
        algorithms=Z,
        **attaching(lambda s: (s.adam, s.net, EXACT)),
    ),
    Bad(
        "no module",
        errors.AttachmentError,
        ("EnergyOptimizer", "str", "torch2ebm.convert"),
        algorithms=Z,
        **attaching(lambda s: (s.adam, "net", EXACT)),
    ),
    Bad(
        "wrapped optimizer",
        errors.AttachmentError,
        ("EnergyOptimizer", "not wrapped yet"),
        algorithms=Z,
        **attaching(lambda s: (s.optimizer, s.model, EXACT)),
    ),
    Bad(
        "attached twice",
        errors.AttachmentError,
        ("EnergyOptimizer", "attached", "detach()"),
        lambda scene: torch2ebm.EnergyOptimizer(scene.adam, scene.model, EXACT),
    ),
    Bad(
        "convert converted",
        errors.ConfigurationError,
        ("convert", "EnergyModel", "Pass the network itself"),
        lambda scene: torch2ebm.convert(scene.model),
        algorithms=Z,
    ),
    Bad(
        "convert no module",
        errors.ConfigurationError,
        ("convert", "str", "torch.nn.Module"),
        lambda scene: torch2ebm.convert("net"),
        algorithms=Z,
    ),
    Bad(
        "convert a class",
        errors.ConfigurationError,
        ("convert", "type", "torch.nn.Module"),
        lambda scene: torch2ebm.convert(Net),
        algorithms=Z,
    ),
    *(
        Bad(name, errors.ConfigurationError, ("compare", got, "expected"), act, algorithms=Z)
        for name, got, act in (
            ("compare without", "[]", lambda s: torch2ebm.compare(s.model, F.mse_loss, (s.x, s.target), [])),
            ("compare a class", "class", lambda s: torch2ebm.compare(s.model, F.mse_loss, (s.x, s.x), [type(EXACT)])),
            ("compare a tensor", "Tensor", lambda s: torch2ebm.compare(s.model, F.mse_loss, s.x, [EXACT])),
            ("compare a triple", "tuple", lambda s: torch2ebm.compare(s.model, F.mse_loss, (s.x,) * 3, [EXACT])),
        )
    ),
    *(
        Bad(name, error, says, lambda scene, nodes=nodes: torch2ebm.convert(scene.net, nodes=nodes), algorithms=Z)
        for name, nodes, error, says in (
            ("unknown node", ["frist"], errors.UnknownNodeError, ("convert", "frist", "first", "named_modules")),
            ("unknown granularity", "layr", errors.ConfigurationError, ("convert", "'layr'", "'layer'", "nodes=[")),
            ("name without a list", "first", errors.ConfigurationError, ("convert", "'first'", "nodes=['")),
            ("number as nodes", 3, errors.ConfigurationError, ("convert", "3", "list of submodule names")),
            ("numbers as names", [3], errors.ConfigurationError, ("convert", "3", "list of submodule names")),
        )
    ),
]


def cases() -> Iterator[Any]:
    for bad in (*LOSSES, *INPUTS, *NUMBERS, *CHANGES, *OBJECTS):
        for name in bad.algorithms:
            yield pytest.param(bad, ALGORITHMS[name], id=f"{bad.name}-{name}")


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
@pytest.mark.parametrize(("bad", "algorithm"), list(cases()))
def test_the_error_is_named_and_changes_nothing(bad: Bad, algorithm: torch2ebm.Algorithm) -> None:
    assert_refused(bad, algorithm)


def test_a_relaxation_that_runs_away_reports_its_energy() -> None:
    algorithm = torch2ebm.PredictiveCoding(steps=20, lr=1e6)
    scene = Scene(torch2ebm.ZeroDivergence())
    on(scene)
    scene.optimizer = torch2ebm.EnergyOptimizer(scene.adam, scene.model, algorithm)
    with untouched(scene), pytest.raises(errors.DivergenceError) as caught:
        good(scene)
    energy = torch.tensor(caught.value.energy)
    assert len(energy) > 1 and torch.isfinite(energy[0]) and not energy[-1] <= 1e3 * energy[0]
    assert all(part in str(caught.value) for part in ("inference step", "lr", "energy"))
    on(scene)
    scene.optimizer = torch2ebm.EnergyOptimizer(scene.adam, scene.model, ALGORITHMS["PredictiveCoding"])
    scene.step()


def test_a_fixed_prediction_that_runs_away_names_the_step_size() -> None:
    scene = Scene(torch2ebm.ZeroDivergence())
    on(scene)
    algorithm = torch2ebm.FixedPrediction(steps=20, lr=1e6)
    scene.optimizer = torch2ebm.EnergyOptimizer(scene.adam, scene.model, algorithm)
    with untouched(scene), pytest.raises(errors.NumericalError, match=r"lr|step size|learning rate"):
        good(scene)


# ---- losses that other algorithms accept


@pytest.mark.parametrize("name", ["FixedPrediction", "ZeroDivergence"])
@pytest.mark.parametrize("bad", [bad for bad in LOSSES if bad.algorithms == PC], ids=lambda bad: bad.name)
def test_algorithms_that_need_no_reevaluation_accept_any_loss(bad: Bad, name: str) -> None:
    scene = Scene(ALGORITHMS[name])
    bad.act(scene)
    scene.optimizer.step()


def test_a_contrastive_loss_has_exact_gradients_under_zero_divergence() -> None:
    scene = Scene(EXACT)
    scene.net.double()
    scene.x, scene.other = scene.x.double(), scene.other.double()
    twin = copy.deepcopy(scene.net)
    scene.optimizer.zero_grad()
    twin.zero_grad()
    (scene.model(scene.x) * scene.model(scene.other)).mean().backward()
    (twin(scene.x) * twin(scene.other)).mean().backward()
    assert relative_error(gradients_of(scene.net), gradients_of(twin)) < 1e-12


# ---- settings


NOT_POSITIVE = (0, -1, float("nan"), float("inf"), "a", None)
NO_COUNT = (0, -1, 1.5, True, "a", None)
SETTINGS = [
    *((make, {"steps": v}) for make in (torch2ebm.PredictiveCoding, torch2ebm.FixedPrediction) for v in NO_COUNT),
    *((make, {"lr": v}) for make in (torch2ebm.PredictiveCoding, torch2ebm.FixedPrediction) for v in NOT_POSITIVE),
    *((torch2ebm.GradientDescent, {"steps": value}) for value in NO_COUNT),
    *((torch2ebm.GradientDescent, {"lr": value}) for value in NOT_POSITIVE),
    *((torch2ebm.GradientDescent, {"tol": value}) for value in (-1e-9, float("nan"), float("inf"), "a", None)),
    *((torch2ebm.ZeroDivergence, {"gamma": value}) for value in NOT_POSITIVE),
    *((torch2ebm.ZeroDivergence, {"schedule": value}) for value in ("level", None, 3)),
    *((torch2ebm.ProximalInferenceLearning, {"steps": value}) for value in NO_COUNT),
    *((torch2ebm.ProximalInferenceLearning, {name: v}) for name in ("alpha", "feedback_rate") for v in NOT_POSITIVE),
    *((torch2ebm.ProximalInferenceLearning, {name: v}) for name in ("error_rate", "eps") for v in NOT_POSITIVE[1:]),
    *((torch2ebm.ProximalInferenceLearning, {"loss_reduction": value}) for value in ("none", None)),
    *((torch2ebm.FixedPrediction, {"method": value}) for value in ("sweeps", None)),
    *((torch2ebm.FixedPrediction, {"loss_reduction": value}) for value in ("none", None)),
    *((torch2ebm.PredictiveCoding, {"loss_reduction": value}) for value in ("none", None)),
    *((torch2ebm.ImplicitSGD, {"alpha": value}) for value in NOT_POSITIVE),
    *((torch2ebm.ImplicitSGD, {"tol": value}) for value in (-1e-9, float("nan"), float("inf"), "a")),
    *((torch2ebm.ImplicitSGD, {"max_steps": value}) for value in NO_COUNT),
    *((torch2ebm.PredictiveCoding, {"solver": value}) for value in ("gradient", torch2ebm.GradientDescent)),
]


@pytest.mark.parametrize(("make", "setting"), SETTINGS)
def test_an_illegal_setting_is_named(make: Callable[..., Any], setting: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        make(**setting)
    ((name, value),) = setting.items()
    assert caught.type is errors.ConfigurationError
    assert all(part in str(caught.value) for part in (f"({name}=", repr(value), "expected"))


# ---- modules that look at values


class _Looking(nn.Module):
    """Python sees a value in the middle of forward, which also writes an attribute and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        self.count = self.count + 1
        return self.look(self.layer(x))


class Branching(_Looking):
    def look(self, h: Tensor) -> Tensor:
        if h.sum() > 0:
            return torch.relu(h)
        return h


class BranchingOnItem(_Looking):
    def look(self, h: Tensor) -> Tensor:
        return h if h.max().item() > 0 else -h


class UsingNumPy(_Looking):
    def look(self, h: Tensor) -> Tensor:
        return h * torch.from_numpy(np.tanh(h.detach().numpy()))


class Looping(_Looking):
    def look(self, h: Tensor) -> Tensor:
        for _ in range(int(h.abs().max()) + 1):
            h = torch.tanh(h)
        return h


class Converting(_Looking):
    def look(self, h: Tensor) -> Tensor:
        return h * float(h.detach().max())


LOOKING = [Branching, BranchingOnItem, UsingNumPy, Looping, Converting]


def around(inner: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), inner()).double()


@pytest.mark.parametrize("inner", LOOKING)
@pytest.mark.parametrize("with_example", [False, True])
def test_convert_leaves_a_module_that_looks_at_values_as_it_was(inner: type[nn.Module], with_example: bool) -> None:
    net = around(inner)
    before, attributes = copy.deepcopy(net.state_dict()), [dict(part.__dict__) for part in net.modules()]
    contents = [(dict(part._parameters), dict(part._buffers)) for part in net.modules()]
    random = torch.get_rng_state()
    x = torch.randn(3, 4, generator=torch.Generator(), dtype=torch.float64)
    torch2ebm.convert(net, example_inputs=x if with_example else None)
    assert list(differences(dict(before), dict(net.state_dict()))) == []
    for part, known, (parameters, buffers) in zip(net.modules(), attributes, contents, strict=True):
        assert part.__dict__.keys() == known.keys()
        assert all(part.__dict__[name] is value for name, value in known.items())
        assert all(part._parameters[name] is value for name, value in parameters.items())
        assert all(part._buffers[name] is value for name, value in buffers.items())
    assert torch.equal(torch.get_rng_state(), random)
    net(x).sum().backward()
    assert isinstance(net[1].seen, Tensor)


@pytest.mark.parametrize("nodes", ["auto", ["1"]], ids=str)
@pytest.mark.parametrize("inner", LOOKING)
def test_a_module_that_looks_at_values_is_followed_batch_by_batch(inner: type[nn.Module], nodes: Any) -> None:
    """Whatever side or length a batch takes: the outputs, buffers and gradients of the plain module."""
    net, twin = around(inner), around(inner)
    model = torch2ebm.convert(net, nodes=nodes)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, EXACT)
    for seed, scale in enumerate((1.0, -1.0, 10.0, 1.0, -10.0, 1.0)):
        x = scale * torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).abs()
        net.zero_grad()
        twin.zero_grad()
        ours, theirs = model(x), twin(x)
        assert torch.equal(ours.detach(), theirs.detach())
        ours.square().mean().backward()
        theirs.square().mean().backward()
        assert relative_error(gradients_of(net), gradients_of(twin)) < 1e-12
        assert torch.equal(net[1].count, twin[1].count) and net[1].seen.equal(twin[1].seen)


def gradients_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def test_a_named_node_that_was_not_called_is_told_by_name() -> None:
    class Idle(Net):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(2, 2)

    with pytest.warns(errors.UncalledNodeWarning) as caught:
        torch2ebm.convert(Idle(), nodes=["first", "idle"], example_inputs=torch.randn(5, 4))
    assert all(part in str(caught[0].message) for part in ("convert", "['idle']", "no run so far", "leave them out"))


@pytest.mark.parametrize(
    "fail",
    [
        lambda net, x: torch2ebm.convert(net, example_inputs=x),
        lambda net, x: torch2ebm.convert(net).torch2ebm.run(EXACT, (x,), {}),
        lambda net, x: torch2ebm.compare(net, F.mse_loss, (x, x), [EXACT]),
    ],
    ids=["convert", "run", "compare"],
)
def test_a_model_without_parameters_is_refused(fail: Callable[[nn.Module, Tensor], Any]) -> None:
    with pytest.raises(errors.PartitionError) as caught:
        fail(nn.Sequential(nn.Tanh(), nn.Flatten()), torch.randn(3, 4))
    assert all(part in str(caught.value) for part in ("Sequential", "parameter", "nothing to learn"))


@pytest.mark.parametrize("x", [torch.randn(5, 7), torch.randn(5, 4).double(), torch.ones(5, 4).long()])
def test_a_wrong_first_input_is_a_typed_error_and_a_good_one_works_afterwards(x: Tensor) -> None:
    net = Net()
    model = torch2ebm.convert(net)
    torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, EXACT)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(errors.NodeEvaluationError):
        model(x)
    assert list(differences(dict(before), dict(net.state_dict()))) == []
    model(torch.randn(5, 4)).square().mean().backward()


# ---- interruption


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("interrupted", [(Node, "evaluate"), (NodePass, "pullback")], ids=["evaluate", "pullback"])
@pytest.mark.parametrize("after", [0.0, 0.25, 0.5, 0.75, 1.0], ids="{:.0%}".format)
def test_an_interruption_inside_a_step_leaves_everything_as_before(
    algorithm: torch2ebm.Algorithm, interrupted: tuple[type, str], after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, twin, probe = Scene(algorithm), Scene(algorithm), Scene(algorithm)
    owner, name = interrupted
    real = getattr(owner, name)
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    stop = 0
    good(probe)
    stop = 1 + round(after * (len(calls) - 1))
    calls.clear()
    with untouched(scene), pytest.raises(KeyboardInterrupt):
        good(scene)
    stop = 0
    scene.step()
    twin.step()
    assert list(differences(without_identities(snapshot(twin)), without_identities(snapshot(scene)))) == []
