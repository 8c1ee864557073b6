"""Hopfield energies written out by hand, and every estimate of the gradient at their equilibria as a plain formula.

E = sum_n c_n [G_n(s_n) - <s_n, a_n(s_pa)>] (Scellier and Bengio 2017), c_n = feedback^depth. Nothing of the package
under test: each network gives its pre-activations as a function of all states, and autograd differentiates Phi whole.
The loss is summed over the samples.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

States = dict[str, Tensor]
Loss = Callable[[Tensor], Tensor]
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Network:
    """States by name, in topological order; the last one is the output, whose activation is the identity."""

    parameters: Mapping[str, Tensor]
    preactivations: Callable[[States, Mapping[str, Tensor]], States]
    activations: Mapping[str, Function]
    depths: Mapping[str, int]
    loss: Loss
    feedback: float = 1.0
    nudge_by_output: bool = True  # False: the faulty twin, whose nudge lacks c_o
    symmetric: bool = True  # False: the faulty twin, which has no feedback at all

    @property
    def names(self) -> list[str]:
        return list(self.activations)

    @property
    def output(self) -> str:
        return self.names[-1]

    def weight(self, name: str) -> float:
        return self.feedback ** self.depths[name]

    def phi(self, states: States, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        before = self.preactivations(states, self.parameters if parameters is None else parameters)
        return sum((self.weight(n) * (states[n] * before[n]).sum() for n in self.names), torch.zeros(()).double())

    def nudge(self) -> float:
        return self.weight(self.output) if self.nudge_by_output else 1.0

    def drive(self, states: States, beta: float = 0.0, parameters=None, create_graph: bool = False) -> States:
        """d(Phi - beta c_o C)/ds_n / c_n."""
        if not create_graph:
            states = {name: value.detach().requires_grad_() for name, value in states.items()}
        total = self.phi(states, parameters) - beta * self.nudge() * self.loss(states[self.output])
        if not self.symmetric:
            before = self.preactivations(states, self.parameters if parameters is None else parameters)
            cost = torch.autograd.grad(self.loss(states[self.output]), states[self.output])[0]
            before = dict(before.items())
            return {**before, self.output: before[self.output] - beta * cost}
        parts = torch.autograd.grad(total, list(states.values()), create_graph=create_graph)
        return {name: part / self.weight(name) for name, part in zip(states, parts, strict=True)}

    def step(self, states: States, beta: float = 0.0, parameters=None, create_graph: bool = False) -> States:
        """All states at once: s_n <- act_n(drive_n)."""
        drive = self.drive(states, beta, parameters, create_graph)
        return {name: self.activations[name](drive[name]) for name in self.names}

    def feedforward(self) -> States:
        states: States = {}
        for name in self.names:
            known = {**{n: torch.zeros(()).double() for n in self.names}, **states}
            states[name] = self.activations[name](_only(self.preactivations, known, self.parameters, name))
        return detached(states)

    def relax(self, states: States, steps: int, beta: float = 0.0, tol: float = 0.0) -> States:
        for _ in range(steps):
            moved = detached(self.step(states, beta))
            change = max(float((moved[name] - states[name]).abs().max()) for name in states)
            states = moved
            if change <= tol:
                break
        return states

    def phi_gradient(self, states: States) -> dict[str, Tensor]:
        """dPhi/dtheta at fixed states."""
        parameters = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
        parts = torch.autograd.grad(self.phi(detached(states), parameters), list(parameters.values()))
        return dict(zip(parameters, parts, strict=True))


def _only(preactivations, states, parameters, name: str) -> Tensor:
    """One pre-activation of a function that computes all lazily."""
    return preactivations(states, parameters)[name]


class Lazy(dict):
    """Pre-activations that are computed when asked for: in a feed-forward pass later ones have no arguments yet."""

    def __init__(self, functions: Mapping[str, Callable[[], Tensor]]) -> None:
        super().__init__(functions)

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name)()

    def items(self):
        return [(name, self[name]) for name in self]


def detached(states: States) -> States:
    return {name: value.detach() for name, value in states.items()}


# Estimates ------------------------------------------------------------------------------------------------------------


def contrast(network: Network, states: Sequence[States], weights: Sequence[float]) -> dict[str, Tensor]:
    """-sum_k w_k dPhi/dtheta(s_k) / c_o."""
    parts = [network.phi_gradient(each) for each in states]
    scale = network.weight(network.output)
    return {
        name: -sum(w * part[name] for w, part in zip(weights, parts, strict=True)) / scale
        for name in network.parameters
    }


def one_sided(network: Network, free: States, steps: int, beta: float) -> dict[str, Tensor]:
    nudged = network.relax(free, steps, beta)
    return contrast(network, [nudged, free], [1 / beta, -1 / beta])


def symmetric(network: Network, free: States, steps: int, beta: float) -> dict[str, Tensor]:
    pair = [network.relax(free, steps, sign * beta) for sign in (1, -1)]
    return contrast(network, pair, [0.5 / beta, -0.5 / beta])


def clamped(network: Network, free: States, steps: int, amount: float) -> dict[str, Tensor]:
    """The output held at s_o - b dC/ds_o: coupled learning, and contrastive Hebbian learning at b = 1 (A3, E7)."""
    target = free[network.output] - amount * loss_gradient(network, free)
    states = {**free, network.output: target}
    for _ in range(steps):
        states = {**detached(network.step(states)), network.output: target}
    return contrast(network, [states, free], [1 / amount, -1 / amount])


def loss_gradient(network: Network, states: States) -> Tensor:
    output = states[network.output].detach().requires_grad_()
    return torch.autograd.grad(network.loss(output), output)[0]


def bptt(network: Network, free: States, steps: int) -> dict[str, Tensor]:
    """Gradient of the loss through ``steps`` free steps; the states before them are constants."""
    parameters = {name: value.detach().requires_grad_() for name, value in network.parameters.items()}
    states = {name: value.detach().requires_grad_() for name, value in free.items()}
    for _ in range(steps):
        states = network.step(states, parameters=parameters, create_graph=True)
    parts = torch.autograd.grad(network.loss(states[network.output]), list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), parts, strict=True)
    return {name: torch.zeros_like(p) if part is None else part for (name, p), part in pairs}


def bptt_increments(network: Network, free: States, steps: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """For t = 0, 1, ...: dL/ds_{T-t} and dL/dtheta_{T-t}, theta_t the parameters of step t alone (E3)."""
    names = list(network.parameters)
    copies = [{n: p.detach().requires_grad_() for n, p in network.parameters.items()} for _ in range(steps)]
    trajectory = [{name: value.detach().requires_grad_() for name, value in free.items()}]
    for parameters in copies:
        trajectory.append(network.step(trajectory[-1], parameters=parameters, create_graph=True))
    loss, found = network.loss(trajectory[-1][network.output]), []
    for time in range(steps):
        states, parameters = trajectory[steps - time], copies[steps - time - 1]
        wanted = [*states.values(), *parameters.values()]
        parts = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
        of_states = torch.cat([part.flatten() for part in parts[: len(states)]])
        found.append((of_states, dict(zip(names, parts[len(states) :], strict=True))))
    return found


def read_out(network: Network, steps: tuple[int, int], beta: float) -> dict[str, Tensor]:
    """Symmetric nudging where the last of the names is no state but what the loss reads (E5); beta c_last CE(W_o s)."""
    *names, output = network.names
    last = network.weight(names[-1])

    def total(states: States, parameters: Mapping[str, Tensor], signed: float) -> Tensor:
        before = network.preactivations(states, parameters)
        phi = sum(network.weight(name) * (states[name] * before[name]).sum() for name in names)
        return phi - signed * last * network.loss(before[output])

    def relax(states: States, count: int, signed: float) -> States:
        for _ in range(count):
            leaves = {name: value.detach().requires_grad_() for name, value in states.items()}
            parts = torch.autograd.grad(total(leaves, network.parameters, signed), list(leaves.values()))
            drives = {n: part / network.weight(n) for n, part in zip(leaves, parts, strict=True)}
            states = {name: network.activations[name](drives[name]).detach() for name in names}
        return states

    def derivative(states: States, signed: float) -> list[Tensor]:
        leaves = {name: value.detach().requires_grad_() for name, value in network.parameters.items()}
        return list(torch.autograd.grad(total(states, leaves, signed), list(leaves.values())))

    start = network.feedforward()
    free = relax({name: start[name] for name in names}, steps[0], 0.0)
    pair = [derivative(relax(free, steps[1], signed), signed) for signed in (beta, -beta)]
    found = [-(up - down) / (2 * beta * last) for up, down in zip(*pair, strict=True)]
    return dict(zip(network.parameters, found, strict=True))


@dataclass(frozen=True)
class Linearised:
    """One step s -> f(s) at a state, as dense matrices over all states of all samples."""

    jacobian: Tensor  # df/ds
    by_parameter: Mapping[str, Tensor]  # df/dtheta, [states, parameter]
    cost: Tensor  # dl/ds

    def gradient(self, z: Tensor) -> dict[str, Tensor]:
        return {name: matrix.T @ z for name, matrix in self.by_parameter.items()}

    def exact(self) -> dict[str, Tensor]:
        """Recurrent backprop: (I - J^T) z = dl/ds by a dense solve (E4)."""
        identity = torch.eye(len(self.cost), dtype=self.cost.dtype)
        return self.gradient(torch.linalg.solve(identity - self.jacobian.T, self.cost))

    def neumann(self, terms: int) -> dict[str, Tensor]:
        """z = sum of (J^T)^k dl/ds, k = 0, ..., terms."""
        power = z = self.cost
        for _ in range(terms):
            power = self.jacobian.T @ power
            z = z + power
        return self.gradient(z)


def linearised(network: Network, states: States) -> Linearised:
    names, shapes = list(states), [value.shape for value in states.values()]
    sizes = [value.numel() for value in states.values()]
    flat = torch.cat([states[name].flatten() for name in names])

    def unflatten(vector: Tensor) -> States:
        parts = vector.split(sizes)
        return {n: part.reshape(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}

    def step(vector: Tensor, *values: Tensor) -> Tensor:
        parameters = dict(zip(network.parameters, values, strict=True))
        moved = network.step(unflatten(vector), parameters=parameters, create_graph=True)
        return torch.cat([moved[name].flatten() for name in names])

    values = tuple(network.parameters.values())
    with torch.enable_grad():
        rows = torch.autograd.functional.jacobian(step, (flat, *values))
    leaf = flat.detach().requires_grad_()
    cost = torch.autograd.grad(network.loss(unflatten(leaf)[network.output]), leaf)[0]
    by_parameter = {n: row.reshape(len(flat), -1) for n, row in zip(network.parameters, rows[1:], strict=True)}
    return Linearised(rows[0], by_parameter, cost)


def recurrent_backprop(network: Network, states: States) -> dict[str, Tensor]:
    """The exact gradient of the loss at the equilibrium that the states are."""
    found = linearised(network, states).exact()
    return {name: found[name].reshape(value.shape) for name, value in network.parameters.items()}


def settled(network: Network, steps: int = 5000) -> States:
    return network.relax(network.feedforward(), steps, tol=1e-15)


def distance(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """|g - r| / |r| over all parameters together."""
    a = torch.cat([ours[name].flatten() for name in reference])
    b = torch.cat([value.flatten() for value in reference.values()])
    return float((a - b).norm() / b.norm())


def cosine(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    a = torch.cat([ours[name].flatten() for name in reference])
    b = torch.cat([value.flatten() for value in reference.values()])
    return float(F.cosine_similarity(a, b, dim=0))


# The process theorem (E2) ---------------------------------------------------------------------------------------------


def process(
    hessian: Tensor, mixed: Tensor, start: Tensor, steps: int, size: float
) -> tuple[list[Tensor], list[Tensor]]:
    """S and Theta by Euler: dS/dt = -E_ss S, dTheta/dt = -E_theta,s S, from S = dC/ds and Theta = 0."""
    s, theta = start, torch.zeros(len(mixed), dtype=start.dtype)
    trace, traced = [s], [theta]
    for _ in range(steps):
        theta = theta - size * mixed @ s
        s = s - size * hessian @ s
        trace.append(s)
        traced.append(theta)
    return trace, traced


# Networks -------------------------------------------------------------------------------------------------------------


def half_squared(target: Tensor) -> Loss:
    return lambda output: (0.5 * (output - target).square()).sum()


def cross_entropy(target: Tensor) -> Loss:
    return lambda output: F.cross_entropy(output, target, reduction="sum")


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@dataclass(frozen=True)
class Example:
    """A module, its input, and the same network written out."""

    module: nn.Module
    x: Tensor
    network: Network

    def with_settings(self, **settings) -> "Example":
        return replace(self, network=replace(self.network, **settings))


def _scaled(module: nn.Module, gain: float) -> nn.Module:
    """Weights so small that the synchronous update contracts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(gain)
    return module


def mlp(activation: nn.Module | None = None, widths: Sequence[int] = (5, 7, 6, 3), gain: float = 0.8) -> Example:
    """A chain: state k reads state k - 1."""
    torch.manual_seed(0)
    activation = nn.Tanh() if activation is None else activation
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation]
    module = _scaled(nn.Sequential(*layers[:-1]).double(), gain)
    count = len(widths) - 1
    x, target = torch.randn(4, widths[0]).double(), torch.randn(4, widths[-1]).double()

    def preactivations(states: States, p: Mapping[str, Tensor]) -> States:
        below = [x, *[states[f"s{k}"] for k in range(1, count)]]
        return Lazy(
            {
                f"s{k + 1}": lambda k=k: F.linear(below[k], p[f"{2 * k}.weight"], p[f"{2 * k}.bias"])
                for k in range(count)
            }
        )

    activations = {f"s{k}": activation for k in range(1, count)} | {f"s{count}": lambda a: a}
    depths = {f"s{k}": k - 1 for k in range(1, count + 1)}
    return Example(module, x, Network(parameters_of(module), preactivations, activations, depths, half_squared(target)))


class ConvolutionalNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.readout = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(torch.tanh(self.first(x)), 2)
        x = torch.sigmoid(self.norm(self.second(x)))
        return self.readout(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def convolutional() -> Example:
    """Two convolutions with pooling, flatten, and a batch norm in evaluation mode."""
    torch.manual_seed(1)
    module = _scaled(ConvolutionalNet().double(), 0.9)
    module.norm.running_mean.normal_()
    module.norm.running_var.uniform_(0.5, 2)
    module.eval()
    x, target = torch.randn(3, 1, 8, 8).double(), torch.tensor([0, 2, 1])
    mean, variance = module.norm.running_mean.clone(), module.norm.running_var.clone()

    def preactivations(s: States, p: Mapping[str, Tensor]) -> States:
        def second() -> Tensor:
            a = F.conv2d(F.avg_pool2d(s["s1"], 2), p["second.weight"], p["second.bias"])
            shape = (1, -1, 1, 1)
            normal = (a - mean.view(shape)) / (variance.view(shape) + module.norm.eps).sqrt()
            return normal * p["norm.weight"].view(shape) + p["norm.bias"].view(shape)

        return Lazy(
            {
                "s1": lambda: F.conv2d(x, p["first.weight"], p["first.bias"], padding=1),
                "s2": second,
                "s3": lambda: s["s2"].mean((2, 3)) @ p["readout.weight"].T + p["readout.bias"],
            }
        )

    activations = {"s1": torch.tanh, "s2": torch.sigmoid, "s3": lambda a: a}
    network = Network(
        parameters_of(module), preactivations, activations, {"s1": 0, "s2": 1, "s3": 2}, cross_entropy(target)
    )
    return Example(module, x, network)


class SkipNet(nn.Module):
    """A weight used twice, an addition, a concatenation and an edge over two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.shared = nn.Linear(6, 6)
        self.readout = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.first(x))
        b = torch.sigmoid(self.shared(a))
        c = torch.tanh(self.shared(b) + a)
        return self.readout(torch.cat([c, a], 1))


def skip() -> Example:
    torch.manual_seed(2)
    module = _scaled(SkipNet().double(), 0.7)
    x, target = torch.randn(5, 4).double(), torch.tensor([0, 2, 1, 0, 1])

    def preactivations(s: States, p: Mapping[str, Tensor]) -> States:
        def shared(value: Tensor) -> Tensor:
            return F.linear(value, p["shared.weight"], p["shared.bias"])

        return Lazy(
            {
                "s1": lambda: F.linear(x, p["first.weight"], p["first.bias"]),
                "s2": lambda: shared(s["s1"]),
                "s3": lambda: shared(s["s2"]) + s["s1"],
                "s4": lambda: F.linear(torch.cat([s["s3"], s["s1"]], 1), p["readout.weight"], p["readout.bias"]),
            }
        )

    activations = {"s1": torch.tanh, "s2": torch.sigmoid, "s3": torch.tanh, "s4": lambda a: a}
    depths = {"s1": 0, "s2": 1, "s3": 2, "s4": 3}
    return Example(
        module, x, Network(parameters_of(module), preactivations, activations, depths, cross_entropy(target))
    )


class GatedNet(nn.Module):
    """Linear units that multiply: s <- dPhi/ds is a true gradient, and yet no linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.readout = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.unit = nn.LeakyReLU(1.0)  # the identity, as an activation: it makes a state

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.unit(self.left(x)) * self.unit(self.right(x)))


def gated(gain: float = 0.7, size: float = 1.0, loss: Loss | None = None) -> Example:
    torch.manual_seed(3)
    module = _scaled(GatedNet().double(), gain)
    x, loss = size * torch.randn(4, 4).double(), cross_entropy(torch.tensor([0, 2, 1, 0])) if loss is None else loss

    def preactivations(s: States, p: Mapping[str, Tensor]) -> States:
        return Lazy(
            {
                "s1": lambda: F.linear(x, p["left.weight"], p["left.bias"]),
                "s2": lambda: F.linear(x, p["right.weight"], p["right.bias"]),
                "s3": lambda: F.linear(s["s1"] * s["s2"], p["readout.weight"], p["readout.bias"]),
            }
        )

    activations = {name: lambda a: a for name in ("s1", "s2", "s3")}
    depths = {"s1": 0, "s2": 0, "s3": 1}
    return Example(module, x, Network(parameters_of(module), preactivations, activations, depths, loss))


def chain_of_blocks(net: nn.Sequential, x: Tensor, loss: Loss, feedback: float) -> Network:
    """Blocks of a parameterised layer, an activation and what follows it; the last one is the layer alone."""
    blocks = [list(block) if isinstance(block, nn.Sequential) else [block] for block in net]
    prefixes = [f"{k}.0." if isinstance(block, nn.Sequential) else f"{k}." for k, block in enumerate(net)]
    names = [f"s{k}" for k in range(len(blocks))]

    def before(k: int, s: States, p: Mapping[str, Tensor]) -> Tensor:
        value = x
        if k:
            value = s[names[k - 1]]
            for layer in blocks[k - 1][2:]:
                value = layer(value)
        own = {name.removeprefix(prefixes[k]): each for name, each in p.items() if name.startswith(prefixes[k])}
        return torch.func.functional_call(blocks[k][0], own, (value,))

    def preactivations(s: States, p: Mapping[str, Tensor]) -> States:
        return Lazy({name: lambda k=k: before(k, s, p) for k, name in enumerate(names)})

    activations = {n: block[1] if len(block) > 1 else lambda a: a for n, block in zip(names, blocks, strict=True)}
    depths = {name: k for k, name in enumerate(names)}
    return Network(parameters_of(net), preactivations, activations, depths, loss, feedback)
