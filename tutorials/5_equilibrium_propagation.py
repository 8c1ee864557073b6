# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5. Equilibrium propagation
#
# Here the network itself becomes a dynamical system. Its activations influence each other **both ways**, forwards and
# backwards through the same weights, until they stand still. That point is an *equilibrium*.
#
# Learning compares two equilibria: a free one, and one whose output is pulled a little towards the target. No signal of
# another kind travels backwards.
#
# 1. two added lines
# 2. the free phase
# 3. the nudged phases
# 4. how good is the gradient? Orders one, two and more
# 5. recurrent backpropagation: the same gradient, solved for
# 6. the process theorem: the nudged phase *is* backpropagation, step by step
# 7. weak feedback: towards backpropagation of the module
# 8. relatives: contrastive Hebbian learning, coupled learning
# 9. training digits, and two outputs to look at
#
# It runs in less than a minute and a half on one core. As a script it writes its pictures to the folder
# `tutorial_output`. You can name another folder in the environment variable `TUTORIAL_OUTPUT`.

# %%
import os
import time
import warnings
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import torch2ebm

PICTURES = Path(os.environ.get("TUTORIAL_OUTPUT", "tutorial_output"))
PICTURES.mkdir(parents=True, exist_ok=True)
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # told apart with any colour vision


def show(path):
    """Show a picture below the cell; a script has only the file."""
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(str(path), width=760))
    else:
        print("picture:", path)


pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, stratify=labels, random_state=0)

# %% [markdown]
# ## 1. Two added lines
#
# ```diff
#   net = nn.Sequential(nn.Linear(64, 128), nn.Hardsigmoid(), nn.Linear(128, 10))
# + model = torch2ebm.convert(net)
#   optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
# + optimizer = torch2ebm.EnergyOptimizer(optimizer, model, torch2ebm.EquilibriumPropagation())
# ```
#
# The loop is the one that you have. The loss here is half a squared error. It keeps the outputs of moderate size, and
# so the feedback that they send.


# %%
def half_squared_error(output, target):
    return (0.5 * (output - F.one_hot(target, 10)).square().sum(1)).mean()  # the half belongs to each image's loss


def hard_sigmoid_net(*widths):
    torch.manual_seed(0)  # the same initial weights every time
    layers = []
    for fan_in, fan_out in pairwise(widths[:-1]):
        layers += [nn.Linear(fan_in, fan_out), nn.Hardsigmoid()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def train(model, optimizer, epochs):
    order = torch.Generator().manual_seed(0)  # the same batches every time
    for _ in range(epochs):
        for batch in torch.randperm(len(train_y), generator=order).split(32):
            optimizer.zero_grad()
            loss = half_squared_error(model(train_x[batch]), train_y[batch])
            loss.backward()
            optimizer.step()


def accuracy(output_of):
    with torch.no_grad():
        return (output_of(test_x).argmax(1) == test_y).double().mean().item()


net = hard_sigmoid_net(64, 128, 10)
model = torch2ebm.convert(net)
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
optimizer = torch2ebm.EnergyOptimizer(optimizer, model, torch2ebm.EquilibriumPropagation())
before = accuracy(model)
train(model, optimizer, epochs=3)
print(f"accuracy before {before:.1%}, after three epochs {accuracy(model):.1%}")
optimizer.detach()

# %% [markdown]
# ## 2. The free phase
#
# A *phase* is one run of the network to an equilibrium. The *free* phase runs without the loss.
#
# Each activation is a **state** $s_n$. Its layer computes the pre-activation $a_n$ from the states that it reads. The
# network has the energy
#
# $$E = \sum_n G_n(s_n) - \Phi, \qquad \Phi = \sum_n \langle s_n, a_n\rangle ,$$
#
# where $G_n'$ is the inverse of the activation. Where the derivative of $E$ vanishes,
#
# $$s_n = \text{act}\Big(\frac{\partial\Phi}{\partial s_n}\Big) = \text{act}\big(a_n + W_{n+1}^\top s_{n+1}\big).$$
#
# The first term is what the forward pass would compute. The second is the feedback of the layer above, through the
# **same weights**.
#
# The free phase starts at the forward pass and repeats this step. `model(x)` gives the output where it ends.
#
# For the mathematics we take a small network with sigmoids, in double precision.

# %%
torch.manual_seed(0)
small = nn.Sequential(nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 16), nn.Sigmoid(), nn.Linear(16, 10)).double()
with torch.no_grad():
    for layer in small[::2]:
        layer.weight.mul_(1.5)  # more feedback than the initial weights would give
small_model = torch2ebm.convert(small)
images, targets = train_x[:16].double(), train_y[:16]


def look(algorithm, model=small_model, images=images):
    """One backward: the gradient as one vector, and the state that it leaves. No weight changes."""
    attached = torch2ebm.EnergyOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, algorithm)
    half_squared_error(model(images), targets).backward()
    state = model.state
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    attached.detach()
    attached.zero_grad()
    return gradient, state


state = look(torch2ebm.EquilibriumPropagation(torch2ebm.Symmetric(0.1), free_steps=200, nudged_steps=200))[1]
first, second = state.prediction["1"], state.prediction["3"]  # the free equilibrium
torch.testing.assert_close(first, torch.sigmoid(small[0](images) + second @ small[2].weight))
torch.testing.assert_close(model.feedforward(train_x), net(train_x))  # the plain output is still there
print(f"residual of the free phase {state.phases[0].residual:.1e} after {state.phases[0].steps} steps")
print(f"the equilibrium's output is {state.feedforward_distance:.0%} away from the plain one")

# %% [markdown]
# The **residual** is the largest change that one more step would make. Every phase reports it. How fast it falls
# depends on the strength of the feedback, which `feedback` scales with each layer.
#
# You get a warning if a phase would still move its states by more than a twentieth. Here it is cut short on purpose.

# %%
counts = [1, 2, 3, 5, 8, 12, 20, 30, 50]


def residual_after(count, feedback):
    algorithm = torch2ebm.EquilibriumPropagation(free_steps=count, nudged_steps=1, feedback=feedback)
    return look(algorithm)[1].phases[0].residual


with warnings.catch_warnings():
    warnings.simplefilter("ignore", torch2ebm.errors.NotSettledWarning)  # cut short on purpose
    residuals = {feedback: [residual_after(count, feedback) for count in counts] for feedback in (1.0, 0.3, 0.1)}
figure = Figure(figsize=(5.5, 3.6), layout="constrained")
panel = figure.subplots()
for (feedback, curve), colour, marker in zip(residuals.items(), (BLUE, ORANGE, GREEN), "soD", strict=True):
    shown = [(count, residual) for count, residual in zip(counts, curve, strict=True) if residual > 1e-15]
    panel.plot(*zip(*shown, strict=True), color=colour, marker=marker, label=f"feedback = {feedback}")
panel.set(xlabel="steps of the free phase", ylabel="largest change of a state", yscale="log", title="the free phase")
panel.grid(alpha=0.3)
panel.legend()
figure.savefig(PICTURES / "5_free_phase.png", dpi=150)
show(PICTURES / "5_free_phase.png")
assert residuals[0.1][5] < residuals[0.3][5] < residuals[1.0][5]

# %% [markdown]
# ## 3. The nudged phases
#
# A *nudge* is a small pull of the loss on the output. Backward adds $\beta$ times the loss to the energy, and lets the
# states move on from the free equilibrium. The loss pulls at the output, and the feedback carries that to the layers
# below.
#
# `Symmetric(beta)`, the default, does this twice: with $+\beta$ and with $-\beta$.

# %%
for phase in state.phases:
    print(f"beta {phase.beta:+.1f}: {phase.steps} {phase.update} steps, residual {phase.residual:.1e}")
for name in ("1", "3", "4"):
    print(f"the nudge moved node {name} by up to {state.error[name].abs().max():.4f}")

# %% [markdown]
# The gradient needs only what each connection sees by itself, in two phases. Since
# $\partial\Phi/\partial W_n = \sum_{\text{images}} s_n\, s_{n-1}^\top$, it is
#
# $$-\frac{1}{2\beta}\Big(s_n^{+\beta}\, {s_{n-1}^{+\beta}}^\top - s_n^{-\beta}\, {s_{n-1}^{-\beta}}^\top\Big)
# \quad\text{averaged over the images.}$$
#
# These are two Hebbian terms: products of the states at both ends of a connection.
#
# With one nudge, `OneSided(beta)`, the second term is taken from the states of the free phase:

# %%
one_sided = torch2ebm.EquilibriumPropagation(torch2ebm.OneSided(0.1), free_steps=200, nudged_steps=200)
gradient, state = look(one_sided)
nudged, free = ({name: part[name] for name in ("1", "3")} for part in (state.value, state.prediction))
by_hand = -(nudged["3"].T @ nudged["1"] - free["3"].T @ free["1"]) / (0.1 * len(images))
sizes = [parameter.numel() for parameter in small.parameters()]
torch.testing.assert_close(gradient.split(sizes)[2].view(16, 32), by_hand)
print("largest difference:", (gradient.split(sizes)[2].view(16, 32) - by_hand).abs().max().item())

# %% [markdown]
# ## 4. How good is the gradient?
#
# As $\beta\to0$ it becomes the exact gradient of the loss at the free equilibrium. `RecurrentBackprop` computes that
# one by the implicit function theorem, so we compare with it:
#
# - One nudge has an error in proportion to $\beta$.
# - Two nudges have an error in proportion to $\beta^2$.
# - `Holomorphic(beta, points)` puts more nudges on a circle in the complex plane. Its error falls by a constant factor
#   for each point, without a small $\beta$. The circle has to be small enough: at 0.5 it is not.

# %%
exact, _ = look(torch2ebm.RecurrentBackprop(torch2ebm.FixedPointSolve(steps=300), free_steps=300))


def error(algorithm):
    return ((look(algorithm)[0] - exact).norm() / exact.norm()).item()


def settled(nudging):
    return torch2ebm.EquilibriumPropagation(nudging, free_steps=200, nudged_steps=100)


betas = [0.5, 0.2, 0.1, 0.05, 0.02, 0.01]
points = [2, 3, 4, 6, 8, 10]
with warnings.catch_warnings():
    warnings.simplefilter("ignore", torch2ebm.errors.NotSettledWarning)  # at 0.5 a nudge is too strong to settle
    one = [error(settled(torch2ebm.OneSided(beta))) for beta in betas]
    two = [error(settled(torch2ebm.Symmetric(beta))) for beta in betas]
    circle = {
        beta: [error(settled(torch2ebm.Holomorphic(beta, count))) for count in points] for beta in (0.1, 0.2, 0.5)
    }

# %%
figure = Figure(figsize=(8.5, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
left.loglog(betas, one, color=ORANGE, marker="o", label="one-sided")
left.loglog(betas, two, color=BLUE, marker="s", label="symmetric")
for curve, order, style in ((one, 1, ":"), (two, 2, "--")):
    guide = [curve[-1] * (beta / betas[-1]) ** order for beta in betas]
    left.loglog(betas, guide, color="0.5", linestyle=style, label=f"slope {order}")
left.set(xlabel=r"$\beta$", ylabel="relative error of the gradient", title="one nudge, two nudges")
left.legend()
for (beta, curve), colour, marker in zip(circle.items(), (GREEN, BLUE, PINK), "Ds^", strict=True):
    right.semilogy(points, curve, color=colour, marker=marker, label=rf"$|\beta|$ = {beta}")
right.set(xlabel="nudges on the circle", ylabel="relative error of the gradient", title="holomorphic")
right.legend()
for panel in (left, right):
    panel.grid(alpha=0.3)
figure.savefig(PICTURES / "5_orders.png", dpi=150)
show(PICTURES / "5_orders.png")

# %%
print(f"ten times smaller beta: one-sided {one[2] / one[5]:.1f}, symmetric {two[2] / two[5]:.0f} times better")
assert 8 < one[2] / one[5] < 12
assert 90 < two[2] / two[5] < 110
assert abs(circle[0.1][0] / two[2] - 1) < 1e-6  # two points on the circle are the symmetric nudge
assert circle[0.1][5] < 1e-4 * circle[0.1][2]  # ten points against four
assert circle[0.5][5] > 1e-2  # past the radius: no number of points helps

# %% [markdown]
# ## 5. Recurrent backpropagation
#
# The exact gradient needs $z = (I - J^\top)^{-1}\,\partial L/\partial s$, where $J$ is the Jacobian of the step. There
# are several ways to solve for it:
#
# - `Neumann(terms)` adds up $(J^\top)^k\,\partial L/\partial s$. This is backpropagation through the last steps of the
#   relaxation, that is, of the run to the equilibrium.
# - `ConjugateGradient` takes about as many steps as there are states. It would also work where the series does not
#   converge.
#
# **Equilibrium propagation after $t$ nudged steps has the gradient of `Neumann(terms=t - 1)`.** It runs through the
# same terms of the series, but the network computes them by moving.

# %%
terms = [0, 1, 2, 3, 5, 8, 12, 20, 30]
neumann = [look(torch2ebm.RecurrentBackprop(torch2ebm.Neumann(count), free_steps=300))[0] for count in terms]
moving = [
    look(torch2ebm.EquilibriumPropagation(torch2ebm.Symmetric(1e-3), free_steps=300, nudged_steps=count + 1))[0]
    for count in terms
]
conjugate = [
    error(torch2ebm.RecurrentBackprop(torch2ebm.ConjugateGradient(steps=count), free_steps=300))
    for count in [1, 2, 3, 5, 8, 12, 20, 30, 50, 70]
]
series = [((gradient - exact).norm() / exact.norm()).item() for gradient in neumann]
apart = [((a - b).norm() / b.norm()).item() for a, b in zip(moving, neumann, strict=True)]

figure = Figure(figsize=(5.5, 3.6), layout="constrained")
panel = figure.subplots()
panel.semilogy(terms, series, color=BLUE, marker="s", label="Neumann series, its highest power")
panel.semilogy([1, 2, 3, 5, 8, 12, 20, 30, 50, 70], conjugate, color=GREEN, marker="D", label="conjugate gradients")
panel.semilogy(terms, apart, color=ORANGE, marker="o", label="nudged phase to the series' term")
panel.set(xlabel="steps", ylabel="relative difference of the gradient", title="recurrent backpropagation")
panel.grid(alpha=0.3)
panel.legend()
figure.savefig(PICTURES / "5_solvers.png", dpi=150)
show(PICTURES / "5_solvers.png")
print("equilibrium propagation and the series:", ", ".join(f"{each:.0e}" for each in apart))
assert max(apart) < 1e-5  # at beta 1e-3, symmetric: of the order of beta squared

# %% [markdown]
# ## 6. The process theorem
#
# Scellier and Bengio (2019) state it in continuous time, where the states slide down the energy. Recurrent
# backpropagation is then a process of its own:
#
# $$S_0 = \frac{\partial L}{\partial s},\quad \Theta_0 = 0,\qquad
# \dot S = -\frac{\partial^2 E}{\partial s^2}\,S,\qquad
# \dot\Theta = -\frac{\partial^2 E}{\partial\theta\,\partial s}\,S .$$
#
# The nudged phase shows the same two curves to whoever watches it move:
#
# $$\tilde S_t = -\frac1\beta\,\dot s_t,\qquad
# \tilde\Theta_t = \frac1\beta\Big(\frac{\partial E}{\partial\theta}(s_t)
# - \frac{\partial E}{\partial\theta}(s_0)\Big).$$
#
# To check it we write the energy out, and start at the equilibrium that the library found.


# %%
def bounded(s):
    """G of a sigmoid: its derivative is log(s / (1 - s))."""
    return torch.xlogy(s, s) + torch.xlogy(1 - s, 1 - s)


def energy(states, weights):
    first, second, output = states
    w1, b1, w2, b2, w3, b3 = weights
    phi = (first * (images @ w1.T + b1)).sum() + (second * (first @ w2.T + b2)).sum()
    phi = phi + (output * (second @ w3.T + b3)).sum()
    return bounded(first).sum() + bounded(second).sum() + 0.5 * output.square().sum() - phi


def loss_sum(states):
    return 0.5 * (states[2] - F.one_hot(targets, 10)).square().sum()


weights = [parameter.detach().clone().requires_grad_() for parameter in small.parameters()]


def slope(states, create_graph=False):
    return torch.autograd.grad(energy(states, weights), [*states, *weights], create_graph=create_graph)


def leaves(states):
    return [each.detach().clone().requires_grad_() for each in states]


_, free = look(torch2ebm.EquilibriumPropagation(free_steps=300, nudged_steps=1))
rest = leaves([free.prediction[name] for name in ("1", "3", "4")])
assert max(each.abs().max() for each in slope(rest)[:3]) < 1e-12  # the library's equilibrium is this energy's

# %%
STEPS, SIZE, BETA = 200, 0.05, 1e-3


def recurrent_process():
    """S and Theta, each step from the second derivatives at the free equilibrium."""
    down = slope(rest, create_graph=True)
    s = torch.autograd.grad(loss_sum(rest), rest, allow_unused=True)
    s = [torch.zeros_like(state) if part is None else part for part, state in zip(s, rest, strict=True)]
    theta = [torch.zeros_like(weight) for weight in weights]
    for _ in range(STEPS):
        yield s, theta
        products = torch.autograd.grad(down[:3], [*rest, *weights], s, retain_graph=True)  # E is symmetric in both
        s = [part - SIZE * product for part, product in zip(s, products[:3], strict=True)]
        theta = [part - SIZE * product for part, product in zip(theta, products[3:], strict=True)]


def nudged_process(beta):
    """What the nudged phase shows: how fast its states move, and how far dE/dtheta has come."""
    states, at_rest = rest, slope(rest)[3:]
    for _ in range(STEPS):
        states = leaves(states)
        down = slope(states)
        pull = torch.autograd.grad(loss_sum(states), states[2])[0]
        motion = [-down[0], -down[1], -down[2] - beta * pull]
        yield [-each / beta for each in motion], [(a - b) / beta for a, b in zip(down[3:], at_rest, strict=True)]
        states = [state + SIZE * each for state, each in zip(states, motion, strict=True)]


theorem = list(recurrent_process())
watched = list(nudged_process(BETA))


def largest_error(trace, which):
    """Over all steps, relative to the largest norm of the curve."""
    vectors = [torch.cat([part.flatten() for part in step[which]]).detach() for step in theorem]
    others = [torch.cat([part.flatten() for part in step[which]]).detach() for step in trace]
    scale = max(vector.norm() for vector in vectors)
    return max(((a - b).norm() / scale).item() for a, b in zip(others, vectors, strict=True))


def both_sides(beta):
    """The mean over a nudge and its opposite, step by step."""
    for up, down in zip(nudged_process(beta), nudged_process(-beta), strict=True):
        yield tuple([(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(up, down, strict=True))


print("largest error of S and Theta:  one-sided            symmetric")
errors = {}
for beta in (1e-2, 1e-3, 1e-5):
    sides = [list(nudged_process(beta)), list(both_sides(beta))]
    errors[beta] = [largest_error(side, which) for side in sides for which in (0, 1)]
    print(f"beta {beta:.0e}                     ", *(f"{each:8.1e}" for each in errors[beta]))
for which, order in enumerate((1, 1, 2, 2)):
    assert 0.9 * 10**order < errors[1e-2][which] / errors[1e-3][which] < 1.1 * 10**order

# %%
figure = Figure(figsize=(8.5, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
steps = range(STEPS)


def trace(process, which, part, entry):
    return [step[which][part].flatten()[entry].item() for step in process]


entries = {"first hidden": (0, 0), "second hidden": (1, 1), "output": (2, int(targets[0]))}
for (name, (part, unit)), colour in zip(entries.items(), (PINK, GREEN, BLUE), strict=True):
    scale = max(abs(each) for each in trace(theorem, 0, part, unit))
    dots = [each / scale for each in trace(watched, 0, part, unit)]
    left.plot(steps, [each / scale for each in trace(theorem, 0, part, unit)], color=colour, label=name)
    left.plot(steps[::10], dots[::10], color=colour, linestyle="", marker="o", markersize=4)
for (name, part), colour in zip({"first": 0, "second": 2, "output": 4}.items(), (PINK, GREEN, BLUE), strict=True):
    entry = int(theorem[-1][1][part].abs().argmax())
    scale = abs(theorem[-1][1][part].flatten()[entry].item())
    dots = [each / scale for each in trace(watched, 1, part, entry)]
    right.plot(steps, [each / scale for each in trace(theorem, 1, part, entry)], color=colour, label=f"{name} weights")
    right.plot(steps[::10], dots[::10], color=colour, linestyle="", marker="o", markersize=4)
left.set(xlabel="step", ylabel="$S_t$, of its largest value", title="lines: backprop; dots: motion of the states")
right.set(xlabel="step", ylabel=r"$\Theta_t$, of its last value", title="lines: backprop; dots: dE/dθ, nudged - free")
for panel in (left, right):
    panel.grid(alpha=0.3)
    panel.legend()
figure.savefig(PICTURES / "5_process.png", dpi=150)
show(PICTURES / "5_process.png")

# %% [markdown]
# The table falls tenfold with $\beta$ for one nudge, and a hundredfold for two. How large its numbers are depends on
# the network, the loss and the size of the step.
#
# The dots lie on the lines, at every step and not only at the end. The nudged phase **is** recurrent backpropagation,
# written in the speed of the states.
#
# ## 7. Weak feedback
#
# The gradient above belongs to the equilibrium, which is a different function from the module. With `feedback` below 1
# a layer hears less of the one above. The equilibrium then approaches the forward pass, and the gradient approaches
# backpropagation's.
#
# The nudge is scaled along with the feedback. So nothing of the error signal is lost but precision.

# %%
plain = torch.autograd.grad(half_squared_error(small(images), targets), list(small.parameters()))
plain = torch.cat([part.flatten() for part in plain])
strengths = [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01]


def to_backprop(algorithm):
    """Cosine and relative distance to backpropagation of the module."""
    gradient, _ = look(algorithm)
    cosine = F.cosine_similarity(gradient, plain, dim=0).item()
    return cosine, ((gradient - plain).norm() / plain.norm()).item()


def weak(feedback):
    nudging = torch2ebm.Symmetric(0.01)
    return torch2ebm.EquilibriumPropagation(nudging, free_steps=200, nudged_steps=50, feedback=feedback)


propagation = [to_backprop(weak(feedback)) for feedback in strengths]
distances = [look(weak(feedback))[1].feedforward_distance for feedback in strengths]

# %% [markdown]
# ## 8. Relatives
#
# **`ContrastiveHebbian(feedback)`** *clamps* the output: it holds it fixed at the target. For a loss other than half
# the squared error, it holds the output at its free value less the gradient. Nothing is divided by a small $\beta$.
# Weak feedback makes it backpropagation, with an error in proportion to the feedback (Xie and Seung 2003).
#
# **`CoupledLearning(beta)`** holds the output a little on the better side of its free value. Even as $\beta\to0$ it is
# *not* the gradient of the loss, but a direction that lowers it. With weak feedback it becomes contrastive Hebbian
# learning, and so backpropagation, too.

# %%
hebbian = [to_backprop(torch2ebm.ContrastiveHebbian(feedback, 200, 50)) for feedback in strengths]
coupled = [to_backprop(torch2ebm.CoupledLearning(0.01, 200, 50, feedback=feedback)) for feedback in strengths]

figure = Figure(figsize=(8.5, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
for curve, name, colour, style in (
    (propagation, "EquilibriumPropagation", BLUE, "s-"),
    (hebbian, "ContrastiveHebbian", ORANGE, "o-"),
    (coupled, "CoupledLearning", GREEN, "D--"),
):
    left.loglog(strengths, [distance for _, distance in curve], style, color=colour, label=name)
left.loglog(strengths, [strength * propagation[-1][1] / strengths[-1] for strength in strengths], ":", color="0.5")
left.set(xlabel="feedback", ylabel="relative distance to backprop", title="the gradient")
left.legend()
right.loglog(strengths, distances, color=PINK, marker="^")
right.set(xlabel="feedback", ylabel="relative distance to the forward pass", title="the output")
for panel in (left, right):
    panel.grid(alpha=0.3)
figure.savefig(PICTURES / "5_feedback.png", dpi=150)
show(PICTURES / "5_feedback.png")
for name, curve in {"EP": propagation, "contrastive Hebbian": hebbian, "coupled": coupled}.items():
    print(f"{name:20} cosine to backprop at feedback 1, .1, .01:", *(f"{curve[i][0]:.5f}" for i in (0, 3, 6)))
assert all(curve[6][0] > 0.9998 for curve in (propagation, hebbian, coupled))
assert all(8 < curve[3][1] / curve[6][1] < 12.5 for curve in (propagation, hebbian))  # order one in the feedback

# %%
direction, _ = look(torch2ebm.CoupledLearning(1e-4, 300, 300))
cosine = F.cosine_similarity(direction, exact, dim=0).item()
print(f"coupled learning, beta 1e-4, full feedback: cosine {cosine:.4f} to the gradient at the equilibrium")
assert 0 < cosine < 0.9999

# %% [markdown]
# ## 9. Training digits
#
# The initial weights, the batches and the optimizer are the same.
#
# Equilibrium propagation trains the *equilibrium*, so that is the output to use. The plain output of the same weights
# is another one. How far away it is depends on the feedback.

# %%
EPOCHS = 12
trained = {}
for widths in ((64, 128, 10), (64, 128, 128, 10)):
    runs = {
        "backpropagation": None,
        "feedback 1": torch2ebm.EquilibriumPropagation(free_steps=15, nudged_steps=6),
        "feedback 0.1": torch2ebm.EquilibriumPropagation(free_steps=8, nudged_steps=4, feedback=0.1),
    }
    for name, algorithm in runs.items():
        net = hard_sigmoid_net(*widths)
        model = torch2ebm.convert(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        if algorithm is not None:
            optimizer = torch2ebm.EnergyOptimizer(optimizer, model, algorithm)
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as unsettled:
            warnings.simplefilter("always", torch2ebm.errors.NotSettledWarning)
            train(model, optimizer, EPOCHS)
            took, found = time.perf_counter() - start, (accuracy(model), accuracy(model.feedforward))
        trained[len(widths) - 2, name] = found
        if unsettled:
            print(f"{len(unsettled)} warnings, for example: {unsettled[-1].message}")
        print(
            f"{len(widths) - 2} hidden, {name:15} {took:4.1f} s   {found[0]:.1%} at equilibrium, {found[1]:.1%} plain"
        )

# %%
figure = Figure(figsize=(7.5, 3.6), layout="constrained")
panel = figure.subplots()
for offset, (place, colour) in enumerate((("at equilibrium", BLUE), ("feed-forward", ORANGE))):
    heights = [100 * found[offset] for found in trained.values()]
    bars = panel.bar([i + 0.4 * offset for i in range(len(trained))], heights, 0.38, color=colour, label=place)
    panel.bar_label(bars, fmt="%.1f", fontsize=8)
names = [f"{name}\n{hidden} hidden" for hidden, name in trained]
panel.set_xticks([i + 0.2 for i in range(len(trained))], names, fontsize=8)
panel.set(ylabel="test images right [%]", ylim=(0, 125), title=f"{EPOCHS} epochs on digits")
panel.legend(ncols=2, loc="upper right")
figure.savefig(PICTURES / "5_digits.png", dpi=150)
show(PICTURES / "5_digits.png")

# %% [markdown]
# - **With one hidden layer** full feedback does no harm.
# - **With two hidden layers** the equilibrium of full feedback is a different function from the forward pass. Its own
#   output is right where the plain output of the same weights is not.
# - **Weak feedback** brings both together, and both near to backpropagation.
#
# With full feedback, fifteen steps were not enough for every image of every batch. The warnings say so.
#
# With a module of your own, look at `model.state.feedforward_distance`, and at the residual of the free phase.

# %%
assert all(right > 0.94 for hidden, name in trained if name != "feedback 1" for right in trained[hidden, name])
assert trained[2, "feedback 1"][0] > trained[2, "feedback 1"][1] + 0.1

# %% [markdown]
# ## Where to go from here
#
# - For deeper or convolutional networks, begin with `feedback=0.1` and average pooling.
# - If you are warned that the free phase has not settled, the warning names the node. Lower the feedback, add
#   `damping=0.5`, or take more `free_steps`. `update=torch2ebm.AndersonMixing()` needs fewer of them.
# - With cross-entropy, `readout=True` keeps the logits out of the states (Laborieux et al. 2021).
# - Write a factor of the loss inside the mean over images, as `half_squared_error` does. Outside it only scales the
#   gradient, and the nudge stays that of the loss without it.
