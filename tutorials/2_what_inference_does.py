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
# # 2. What inference does
#
# `tutorials/1_first_network.py` trained a network by predictive coding. The values of its nodes descended an energy for
# some steps. Then every layer learned from its own error, value minus prediction. This notebook looks at those steps,
# which are called *inference*. No weight changes in it.
#
# 1. the wave front: one level in each step
# 2. where the errors come to rest
# 3. steps and step size: how far the gradient is from backpropagation's
# 4. `FixedPrediction` and `ZeroDivergence`
# 5. when to stop: `tol`, and every image for itself
# 6. six solvers on deep networks
# 7. precisions
# 8. a step that is too large
#
# It runs in less than a minute on one core. As a script it writes its pictures to the folder `tutorial_output`. You can
# name another folder in the environment variable `TUTORIAL_OUTPUT`.

# %%
import math
import os
import warnings
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import torch2ebm

PICTURES = Path(os.environ.get("TUTORIAL_OUTPUT", "tutorial_output"))
PICTURES.mkdir(parents=True, exist_ok=True)
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # told apart with any colour vision
YELLOW, BLACK, GREY = "#E69F00", "#000000", "#888888"


def show(path):
    """Show a picture below the cell; a script has only the file."""
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(str(path), width=760))
    else:
        print("picture:", path)


# %% [markdown]
# The data are 64 handwritten digits. They are in double precision, because the numbers below are small and none of them
# should be rounding.

# %%
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels[:64]) / 16, torch.tensor(labels[:64])
IMAGES = len(y)


def relax(model, algorithm, images=IMAGES):
    """The state that one backward of ``algorithm`` leaves. The weights stay as they are."""
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, algorithm)
    try:
        F.cross_entropy(model(x[:images]), y[:images]).backward()
        return model.state
    finally:
        optimizer.detach()
        optimizer.zero_grad()


# %% [markdown]
# ## 1. The wave front
#
# The network is a chain of eleven layers: ten hidden ones with tanh, and the output. Its weights are orthogonal, so
# that a signal neither grows nor dies on its way. A layer and its activation make one node, `layer1` to `layer10`.


# %%
def chain(depth):
    """A chain of ``depth`` layers; the last is the output."""
    torch.manual_seed(0)
    layers = OrderedDict()
    for i in range(1, depth):
        linear = nn.Linear(64, 64)
        nn.init.orthogonal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers[f"layer{i}"], layers[f"tanh{i}"] = linear, nn.Tanh()
    layers["output"] = nn.Linear(64, 10)
    return nn.Sequential(layers).double()


deep = torch2ebm.convert(chain(11))
relax(deep, torch2ebm.PredictiveCoding(steps=1))  # the nodes are known from the first call on
hidden = [name for name in deep.nodes if name != "output"]
print(hidden)

# %% [markdown]
# A value hears of the loss only through the next node. So after one step the last hidden layer has an error, after two
# steps the last two, and so on. The error spreads as a *wave front*.
#
# A node's *level* is its distance to the output, in layers. `state.unreached` names the nodes that no error has reached
# yet.

# %%
for count in range(1, 11):
    unreached = relax(deep, torch2ebm.PredictiveCoding(steps=count, lr=0.3)).unreached
    print(f"step {count:2}: no error yet in {len(unreached):2} layers", *unreached[-1:])
    assert list(unreached) == hidden[: 10 - count]  # exactly one level a step

# %% [markdown]
# `state.relaxation` has the whole history. `energy` and `loss` are summed over the images, at the start of every step
# and at the end. `node_energy` is the part of each node: half its squared error.

# %%
relaxation = relax(deep, torch2ebm.PredictiveCoding(steps=100, lr=0.3)).relaxation
steps = range(len(relaxation.energy))
energy = [each / IMAGES for each in relaxation.energy]
loss = [each / IMAGES for each in relaxation.loss]

figure = Figure(figsize=(8.5, 3.6), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
left.fill_between(steps, loss, energy, color=ORANGE, alpha=0.3, label="errors of the hidden layers")
left.plot(steps, energy, color=BLUE, label="energy = loss + errors")
left.plot(steps, loss, color=ORANGE, linestyle="--", label="loss")
left.set(xlabel="inference step", ylabel="energy of an image (mean)", title="the energy falls")
left.set_ylim(top=1.35 * max(energy))  # room for the legend
left.legend(fontsize=9)
left.grid(alpha=0.3)

by_node = torch.tensor([relaxation.node_energy[name] for name in hidden]) / IMAGES
largest = by_node.max().item()
assert all((by_node[-level] > 0).int().argmax() == level for level in range(1, 11))  # it arrives at step = level
picture = right.imshow(
    by_node[:, :41].where(by_node[:, :41] > 0, torch.nan),
    aspect="auto",
    cmap="viridis",
    norm=LogNorm(1e-8 * largest, largest, clip=True),
)
right.set_yticks(range(len(hidden)), hidden)
right.text(0, 0.5, "grey:\nexactly 0", va="center", fontsize=9)
right.set_facecolor("0.85")
right.set(xlabel="inference step", title="the wave front")
figure.colorbar(picture, label="energy of the errors\nof an image (mean)")
figure.savefig(PICTURES / "2_wave_front.png", dpi=150)
show(PICTURES / "2_wave_front.png")

# %% [markdown]
# The front moves by one level in each step, but it gets lower on its way. Each layer passes on a fraction `lr` of the
# error that it has just received. So far from the output the first errors are smaller by powers of `lr`, and need many
# more steps to grow to their final size.
#
# The number of hidden layers is the least number of steps. Take several times as many.

# %%
assert all(later < earlier for earlier, later in pairwise(energy))  # lr = .3: no step rises
first_arrival = [by_node[-level, level].item() for level in range(1, 11)]
assert all(far < 0.2 * near for near, far in pairwise(first_arrival))  # lr ** 2 = .09
print("energy at arrival, last hidden layer to first:", *(f"{each:.0e}" for each in first_arrival))

# %% [markdown]
# ## 2. Where the errors come to rest
#
# In each step a value moves by `lr` times its *driving term*, minus the derivative of the energy $F$ in the value. It
# has two parts: what the next layer asks for, and the value's own error. The values stop when both are equal:
#
# $$-\frac{\partial F}{\partial v_n} = J_{n+1}^\top e_{n+1} - e_n = 0
# \quad\Longleftrightarrow\quad e_n = J_{n+1}^\top e_{n+1} .$$
#
# This is backpropagation's recursion, with the Jacobians $J$ taken at the *settled* values, where everything stands
# still.
#
# Here it is by hand, from nothing but `model.state`. For `tanh`, $J^\top e = W^\top \big(e \odot (1 - \mu^2)\big)$.


# %%
def driving_term(model, state):
    """-dF/dv of each hidden layer of a chain, ``[hidden, batch, 64]``, where inference has ended."""
    names = list(model.nodes)
    terms = []
    for name, child in pairwise(names):
        error = state.error[child]  # the output's is minus the gradient of the loss
        slope = 1.0 if child == "output" else 1 - state.prediction[child] ** 2
        weight = model.get_parameter(f"{child}.weight").detach()
        terms.append((error * slope) @ weight - state.error[name])
    return torch.stack(terms)


for count in (10, 30, 100, 300):
    state = relax(deep, torch2ebm.PredictiveCoding(steps=count, lr=0.5))
    print(f"after {count:3} steps: largest entry of dF/dv {driving_term(deep, state).abs().max():.1e}")
assert driving_term(deep, state).abs().max() < 1e-3

# %% [markdown]
# `state.relaxation.residual` is the same quantity, the largest entry of dF/dv, at no cost. The last step reports what
# it found before it moved the values.

# %%
again = relax(deep, torch2ebm.PredictiveCoding(steps=301, lr=0.5)).relaxation  # step 301 finds it, after 300 steps
print(f"by hand {driving_term(deep, state).abs().max():.6e}, reported {again.residual:.6e}")
assert math.isclose(driving_term(deep, state).abs().max().item(), again.residual, rel_tol=1e-6)

# %% [markdown]
# ## 3. Steps and step size
#
# How far from backpropagation is the gradient on the way there? Rosenbaum (2022) draws two measures for each layer:
#
# - the **angle** between the gradients,
# - the **relative distance** $|g - g_{\text{BP}}| / |g_{\text{BP}}|$.
#
# They are drawn against the number of steps, for the step sizes .1, .2, .5 and 1. We do so for the network of tutorial
# 1.


# %%
class Net(nn.Module):
    """Images ``[batch, 64]`` to logits ``[batch, 10]``."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.third = nn.Linear(64, 32)
        self.output = nn.Linear(32, 10)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.second(x))
        x = torch.tanh(self.third(x))
        return self.output(x)


torch.manual_seed(0)
model = torch2ebm.convert(Net().double())
weights = ["first.weight", "second.weight", "third.weight", "output.weight"]
LRS = [0.1, 0.2, 0.5, 1.0]


def agreements(algorithm):
    """How each parameter's gradient agrees with autograd's: angle, relative error, norm ratio."""
    return torch2ebm.compare(model, F.cross_entropy, (x, y), {"": algorithm}).agreement[""]


def along(algorithm, counts):
    """The agreements after each number of steps, until inference diverges."""
    found = {}
    for count in counts:
        try:
            found[count] = agreements(algorithm.with_steps(count))
        except torch2ebm.errors.DivergenceError:
            break
    return found


exact = agreements(torch2ebm.ZeroDivergence())


def draw(curves, title, path, least, top):
    """Plot agreements; ``curves`` maps step size, then number of steps, then parameter to one."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = figure.subplots(2, len(curves), sharex=True, sharey="row")
    last = max(max(curve) for curve in curves.values())
    bottom, zero = least * (least / top) ** 0.12, least * (least / top) ** 0.06
    for (angle, distance), (lr, curve) in zip(panels.T, curves.items(), strict=True):
        for weight, colour, marker in zip(weights, (PINK, GREEN, BLUE, ORANGE), "^soD", strict=True):
            style = {"color": colour, "marker": marker, "markersize": 4, "label": weight}
            angle.plot(list(curve), [each[weight].angle for each in curve.values()], **style)
            distances = [max(each[weight].relative_error, zero) for each in curve.values()]
            distance.plot(list(curve), distances, **style)
        distance.axhspan(bottom, least, color="0.88", zorder=0)  # for what has no place on the scale
        for panel, height in ((angle, 0), (distance, zero)):
            panel.axhline(height, color=BLACK, linestyle=":", label="ZeroDivergence")
            panel.grid(alpha=0.3)
        if max(curve) < last:
            angle.text(0.97, 0.6, "energy\nruns away", transform=angle.transAxes, ha="right", fontsize=9)
        angle.set_title(f"lr = {lr}", fontsize=10)
        angle.set_yscale("symlog", linthresh=0.1)  # 0 has a place on it
        angle.set_yticks([0, 0.1, 1, 10, 90], ["0", "0.1", "1", "10", "90"])
        distance.set(xlabel="inference steps", xscale="log", yscale="log", ylim=(bottom, top))
        distance.set_xticks([1, 10, 100], ["1", "10", "100"])
    panels[1, 0].text(1, 1.5 * least, "grey: less, or 0", fontsize=8)
    panels[0, 0].set_ylabel("angle to backprop\n[degrees]")
    panels[1, 0].set_ylabel("relative distance\nto backprop")
    figure.suptitle(title, fontsize=11)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=150)
    show(path)


# %%
COUNTS = [1, 2, 3, 4, 6, 10, 20, 50, 100, 200, 400]
strict = {lr: along(torch2ebm.PredictiveCoding(lr=lr), COUNTS) for lr in LRS}
draw(strict, "PredictiveCoding: every image pulls with its whole loss", PICTURES / "2_strict.png", 1e-3, 1e3)

# %% [markdown]
# - **90 degrees**: no error has arrived. `first` needs three steps.
# - **On arrival the angle is 0** to rounding, because nothing before the layer has moved yet. Only the length is wrong,
#   too short by powers of `lr`.
# - **At `lr = 1` the length is right, too.** For one step each layer has backpropagation's gradient (its line dips into
#   the grey band). `ZeroDivergence`, known as Z-IL, uses each layer's gradient of that step.
# - **Then the values move on** to where the errors rest. `first`, `second` and `third` end in the same place for the
#   step sizes .1, .2 and .5: the minimum does not depend on how it was reached. The angle that is left there belongs to
#   predictive coding, not to the solver.
# - **`lr = 1` does not settle here.** Section 8 says more.

# %%
for weight in weights:
    ends = [strict[lr][400][weight].angle for lr in (0.1, 0.2, 0.5)]
    print(f"{weight:13}  at rest {ends[-1]:5.1f} degrees, norm ratio {strict[0.5][400][weight].norm_ratio:.2f}")
    assert max(ends) - min(ends) < 0.1
for arrival, weight in ((3, "first.weight"), (2, "second.weight"), (1, "third.weight")):
    assert all(strict[lr][arrival][weight].angle < 1e-6 for lr in LRS)
    assert strict[1.0][arrival][weight].relative_error < 1e-12
    assert strict[1.0][400][weight].relative_error > 10

# %% [markdown]
# ### The figures of the paper: a smaller pull
#
# The paper's picture looks different, because there the loss pulls less. Rosenbaum's code enters the *mean* of the loss
# in the energy as it stands. Each of the 64 images then pulls with a 64th of its loss, and the values hardly move.
#
# torch2ebm takes the whole loss of each image, so that an image relaxes the same in any batch. `loss_reduction="sum"`
# takes the loss as you wrote it. For a mean loss that is the paper's way.

# %%
literal = {lr: along(torch2ebm.PredictiveCoding(lr=lr, loss_reduction="sum"), COUNTS) for lr in LRS}
draw(literal, 'PredictiveCoding, loss_reduction="sum": a 64th of the pull', PICTURES / "2_literal.png", 1e-3, 1e3)

# %% [markdown]
# This is the picture of the paper. On its way to rest the angle rises a little and **falls** again. Where the values
# rest, the gradient is nearly backpropagation's.
#
# The distance falls in proportion to the pull, as tutorial 3 explains. At `lr = 1` the energy runs away, and torch2ebm
# refuses the gradient.

# %%
for weight in weights:
    ours, theirs = strict[0.5][400][weight], literal[0.5][400][weight]
    print(f"{weight:13}  whole loss {ours.angle:5.1f} degrees, a 64th {theirs.angle:5.2f} degrees")
    assert theirs.angle < ours.angle / 10
for weight in weights[:3]:  # it rises after arrival, and falls
    path = [literal[0.5][count][weight].angle for count in COUNTS if count >= 3]
    assert path[0] < 90 and max(path) > 5 * path[-1]
assert max(literal[1.0], default=0) < 400  # the longer ones were refused

# %% [markdown]
# ## 4. `FixedPrediction` and `ZeroDivergence`
#
# `FixedPrediction` keeps predictions and Jacobians as the forward pass left them. Only the errors change from step to
# step. The errors come to rest where backpropagation's own recursion holds.

# %%
FIXED_COUNTS = [1, 2, 3, 4, 6, 10, 20, 30, 50, 70, 100, 140, 200]
fixed = {lr: along(torch2ebm.FixedPrediction(lr=lr), FIXED_COUNTS) for lr in LRS}
draw(fixed, "FixedPrediction", PICTURES / "2_fixed_prediction.png", 1e-16, 10)

# %% [markdown]
# The direction is right from the moment of arrival on. Only the length is not, and it follows a binomial distribution.
#
# Throw a coin `steps` times, with probability `lr` of heads. Take a layer `level` layers before the output. The
# probability of at least `level` heads is its share of backpropagation's gradient. At `lr = 1` the third step has
# everything.
#
# `output.weight` is exact from the start. Its error is the gradient of the loss, which does not change here.


# %%
def share(level, steps, lr):
    """P(Binomial(steps, lr) >= level)"""
    return 1 - sum(math.comb(steps, k) * lr**k * (1 - lr) ** (steps - k) for k in range(level))


for weight, level in zip(weights, (3, 2, 1, 0), strict=True):
    for lr, curve in fixed.items():
        for count, agreement in curve.items():
            if count >= level:
                assert agreement[weight].angle < 1e-5
                assert math.isclose(agreement[weight].norm_ratio, share(level, count, lr), rel_tol=1e-10)
    assert exact[weight].relative_error < 1e-12  # ZeroDivergence: backpropagation's gradient
print("ZeroDivergence, largest relative distance:", f"{max(exact[weight].relative_error for weight in weights):.1e}")

# %% [markdown]
# Because of that formula, `FixedPrediction` needs no steps at all. The library computes the result of any number of
# steps in one sweep. `method="sweep"` makes them one by one.
#
# ## 5. When to stop
#
# A solver with a tolerance `tol` stops early: once no entry of its driving term exceeds `tol`, in any layer and any
# image. `steps` is then the most it may take. If `tol` is not reached, no error is raised; check
# `relaxation.converged`.

# %%
tolerances = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
used = []
print("  tol    steps  converged  residual")
for tol in tolerances:
    relaxation = relax(model, torch2ebm.PredictiveCoding(solver=torch2ebm.GradientDescent(80, 0.3, tol=tol))).relaxation
    used.append(relaxation.steps)
    print(f"{tol:6.0e}  {relaxation.steps:5}  {relaxation.converged!s:>9}  {relaxation.residual:.1e}")
assert abs((used[3] - used[2]) - (used[2] - used[1])) <= 3
assert not relaxation.converged

# %% [markdown]
# Near the rest the residual falls by the same factor in each step. So each further digit costs the same number of
# steps.
#
# Each image settles at its own speed. `relaxation.sample_residual` has one number for each image, and
# `relaxation.sample_converged` says which images reached `tol`.

# %%
TOL = 1e-3
figure = Figure(figsize=(6.5, 3.8), layout="constrained")
axes = figure.subplots()
for count, colour, style in zip((20, 30, 40, 60), (PINK, GREEN, BLUE, ORANGE), ("-", "--", "-.", ":"), strict=True):
    relaxation = relax(
        model, torch2ebm.PredictiveCoding(solver=torch2ebm.GradientDescent(count, 0.3, tol=TOL))
    ).relaxation
    met = int(relaxation.sample_converged.sum())
    at = f"{relaxation.steps} steps" + f" (of {count})" * (relaxation.steps < count)
    label = f"{at}: {met} of {IMAGES} images"
    residuals = relaxation.sample_residual.sort().values
    axes.plot(range(1, IMAGES + 1), residuals, color=colour, linestyle=style, label=label)
    print(label)
axes.axhline(TOL, color=BLACK, linewidth=1)
axes.text(1, 1.04 * TOL, "tol", va="bottom")
axes.set_yscale("log")
axes.set(xlabel="images, sorted by their residual", ylabel="largest entry of dF/dv of an image")
axes.grid(alpha=0.3, which="both")
figure.legend(loc="outside lower center", ncols=2, fontsize=9)
figure.savefig(PICTURES / "2_samples.png", dpi=150)
show(PICTURES / "2_samples.png")
assert relaxation.converged and relaxation.steps < 60  # the last one stopped early

# %% [markdown]
# An image does not notice the others. It relaxes alone as it does in the batch.

# %%
batched = relax(model, torch2ebm.PredictiveCoding(steps=50, lr=0.3)).value["first"]
alone = relax(model, torch2ebm.PredictiveCoding(steps=50, lr=0.3), images=1).value["first"]
torch.testing.assert_close(alone, batched[:1], rtol=1e-10, atol=1e-12)

# %% [markdown]
# ## 6. Six solvers on deep networks
#
# A *solver* is the rule that moves the values. `PredictiveCoding(steps, lr)` means
# `PredictiveCoding(solver=GradientDescent(steps, lr))`. Other solvers look for the same minimum:
#
# | solver | what moves | idea |
# |---|---|---|
# | `GradientDescent` | values | the papers' own |
# | `Momentum` | values | a heavy ball |
# | `AdamDescent` | values | a step size for each entry |
# | `LocalErrorDescent` | errors | $e_n \leftarrow e_n + \text{lr}\,(J_{n+1}^\top e_{n+1} - e_n)$, $v_n = \mu_n + e_n$ |
# | `ErrorDescent` | errors | the gradient of the energy in the errors: one sweep reaches all layers |
# | `AndersonErrorDescent` | errors | the same, extrapolated from the last iterates |
#
# We measure all of them the same way. It is the largest entry of dF/dv, computed by hand as in section 2, as a fraction
# of what it was at the start.

# %%
MOST = 200
SOLVERS = {
    "GradientDescent": torch2ebm.GradientDescent(MOST, lr=0.5),
    "Momentum": torch2ebm.Momentum(MOST, lr=0.3),
    "AdamDescent": torch2ebm.AdamDescent(MOST, lr=0.01),
    "LocalErrorDescent": torch2ebm.LocalErrorDescent(MOST, lr=0.5),
    "ErrorDescent": torch2ebm.ErrorDescent(MOST, lr=0.3),
    "AndersonErrorDescent": torch2ebm.AndersonErrorDescent(MOST, lr=0.3),
}
STYLES = dict(zip(SOLVERS, zip((BLUE, PINK, GREY, GREEN, ORANGE, BLACK), "oDPs^v", strict=True), strict=True))


def start_of(net):
    """The largest entry of dF/dv before the first step: the residual that the first step finds."""
    return relax(net, torch2ebm.PredictiveCoding(steps=1), images=16).relaxation.residual


def residual(net, solver):
    state = relax(net, torch2ebm.PredictiveCoding(solver=solver), images=16)
    return driving_term(net, state).abs().max().item()


# %%
twenty = torch2ebm.convert(chain(20))
start = start_of(twenty)
curves = {}
for name, solver in SOLVERS.items():
    curves[name] = {}
    for count in (1, 3, 6, 10, 20, 50, 100, 200):
        curves[name][count] = residual(twenty, solver.with_steps(count)) / start
        if curves[name][count] < 1e-6:
            break

# %% [markdown]
# Now we count the steps to a thousandth, for networks of 5, 10, 20 and 50 layers. The solvers that follow dF/dv find it
# in one run, by their `tol`. `ErrorDescent` and `AndersonErrorDescent` follow dF/de instead. For them we look after
# every step.


# %%
def steps_to_a_thousandth(net, solver):
    target = 1e-3 * start_of(net)
    if not isinstance(solver, (torch2ebm.ErrorDescent, torch2ebm.AndersonErrorDescent)):
        stopping = type(solver)(MOST, solver.lr, tol=target)
        relaxation = relax(net, torch2ebm.PredictiveCoding(solver=stopping), images=16).relaxation
        return relaxation.steps - 1 if relaxation.converged else None  # the step that finds it moves once more
    counts = range(1, 60)
    return next((count for count in counts if residual(net, solver.with_steps(count)) <= target), None)


DEPTHS = [5, 10, 20, 50]
nets = {depth: torch2ebm.convert(chain(depth)) for depth in DEPTHS}
needed = {name: [steps_to_a_thousandth(nets[depth], solver) for depth in DEPTHS] for name, solver in SOLVERS.items()}
print(f"{'layers':30}", *(f"{depth:>5}" for depth in DEPTHS))
for name, row in needed.items():
    print(f"{name + f', lr = {SOLVERS[name].lr}':30}", *(f"{f'>{MOST}' if each is None else each:>5}" for each in row))

# %%
figure = Figure(figsize=(8.5, 4.2), layout="constrained")
left, right = figure.subplots(1, 2)
for i, (name, (colour, marker)) in enumerate(STYLES.items()):
    label = f"{name}, lr = {SOLVERS[name].lr}"
    left.plot(list(curves[name]), list(curves[name].values()), color=colour, marker=marker, markersize=5, label=label)
    heights = [each or (1.2 + 0.1 * i) * MOST for each in needed[name]]  # side by side in the band above MOST
    right.plot(DEPTHS, heights, color=colour, marker=marker, markersize=5)
left.axhline(1e-3, color=BLACK, linewidth=1)
left.text(1, 8e-4, "a thousandth", va="top")
left.set(xscale="log", yscale="log", ylim=(1e-7, 2), title="20 layers")
left.set(xlabel="inference steps", ylabel="largest entry of dF/dv,\nas a fraction of its start")
left.set_xticks([1, 10, 100], ["1", "10", "100"])
right.axhspan(MOST, 2 * MOST, color="0.88", zorder=0)
right.text(5, 1.65 * MOST, f"more than {MOST}", fontsize=9)
right.set(xscale="log", yscale="log", ylim=(3, 2 * MOST), title="steps to a thousandth")
right.set(xlabel="layers", ylabel="inference steps")
right.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
right.set_yticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"])
for panel in (left, right):
    panel.minorticks_off()
    panel.grid(alpha=0.3)
figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
figure.savefig(PICTURES / "2_solvers.png", dpi=150)
show(PICTURES / "2_solvers.png")

# %% [markdown]
# - **`GradientDescent` and `LocalErrorDescent`** need more steps the deeper the network is. What a layer hears has come
#   through all layers behind it, one step for each.
# - **`Momentum`**, the heavy ball, helps.
# - **`AdamDescent`** does not help. Its first steps have the length `lr` for every entry, large or small.
# - **`ErrorDescent`** does not care about depth. Moving an error moves all values behind it at once, and one reverse
#   sweep tells every error what that does to the loss.
#
# The price of `ErrorDescent` is locality in time: a step runs through all layers, one after another.

# %%
assert max(needed["ErrorDescent"]) <= 25
assert max(needed["AndersonErrorDescent"]) <= 15
assert None in needed["GradientDescent"]
assert needed["GradientDescent"][0] > 3 * needed["ErrorDescent"][0]
assert needed["LocalErrorDescent"][-1] > 5 * needed["LocalErrorDescent"][0]

# %% [markdown]
# ## 7. Precisions
#
# A precision $\pi_n$ is the price of an error: the energy of a node is $\tfrac12 \pi_n |e_n|^2$. A node with a high
# price moves less, and the others take over.

# %%
PRECISIONS = [0.1, 0.3, 1.0, 3.0, 10.0]
lengths = {name: [] for name in ("first", "second", "third")}
for precision in PRECISIONS:
    solver = torch2ebm.AndersonErrorDescent(300, lr=0.3 / max(precision, 1), tol=1e-8)
    state = relax(model, torch2ebm.PredictiveCoding(solver=solver, precisions={"second": precision}))
    assert state.relaxation.converged
    for name, column in lengths.items():
        column.append(state.error[name].norm(dim=1).mean().item())
assert lengths["second"] == sorted(lengths["second"], reverse=True)
assert all(lengths[name] == sorted(lengths[name]) for name in ("first", "third"))

# %% [markdown]
# The same precision $\pi$ everywhere is nothing new, since $\pi E + L = \pi\,(E + L/\pi)$. It is a loss with the factor
# $1/\pi$. `OneSided(beta=1/pi)` enters that factor directly. The steps have to be $\pi$ times shorter, and the
# gradients are the same to the last digits:

# %%
everywhere = []
for precision in (1.0, 3.0, 10.0, 30.0, 100.0):
    precisions = dict.fromkeys(lengths, precision)
    ours = agreements(torch2ebm.PredictiveCoding(300, 0.3 / precision, precisions=precisions))
    nudged = agreements(torch2ebm.PredictiveCoding(300, 0.3, nudging=torch2ebm.OneSided(1 / precision)))
    everywhere.append((precision, [ours[weight].angle for weight in weights]))
    for weight in weights:
        assert math.isclose(ours[weight].angle, nudged[weight].angle, rel_tol=1e-6)
        assert math.isclose(ours[weight].norm_ratio, nudged[weight].norm_ratio, rel_tol=1e-8)

# %%
figure = Figure(figsize=(8.5, 3.8), layout="constrained")
left, right = figure.subplots(1, 2)
for (name, column), colour, marker in zip(lengths.items(), (PINK, GREEN, BLUE), "^so", strict=True):
    left.plot(PRECISIONS, column, color=colour, marker=marker, label=name)
left.set(xlabel="precision of second (first, third: 1)", ylabel="length of the error |e| of an image", title="one node")
for i, (weight, colour, marker) in enumerate(zip(weights, (PINK, GREEN, BLUE, ORANGE), "^soD", strict=True)):
    column = [angles[i] for _, angles in everywhere]
    right.plot([precision for precision, _ in everywhere], column, color=colour, marker=marker, label=weight)
right.set(xlabel="precision of all hidden nodes", ylabel="angle to backprop [degrees]", title="all nodes")
for panel in (left, right):
    panel.set(xscale="log", yscale="log")
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=9)
figure.savefig(PICTURES / "2_precisions.png", dpi=150)
show(PICTURES / "2_precisions.png")
for large, small in zip(everywhere[-2][1], everywhere[-1][1], strict=True):
    assert 2.5 < large / small < 3.8  # in proportion to the factor of the loss: 30 to 100

# %% [markdown]
# ## 8. A step that is too large
#
# A step overshoots if it is longer than twice the inverse of the steepest curvature. The next one overshoots more.

# %%
trials = [0.1, 0.5, 0.8, 1.5, 2.0]
figure = Figure(figsize=(6.5, 3.8), layout="constrained")
axes = figure.subplots()
outcomes = {}
for lr, colour, marker in zip(trials, (PINK, GREEN, BLUE, YELLOW, ORANGE), "^soDX", strict=True):
    solver = torch2ebm.GradientDescent(60, lr, tol=1e-2)
    try:
        relaxation = relax(model, torch2ebm.PredictiveCoding(solver=solver)).relaxation
        curve, outcome = relaxation.energy, "settles" if relaxation.converged else "not converged"
    except torch2ebm.errors.DivergenceError as error:
        curve, outcome = error.energy, "DivergenceError"
        refused = error
    outcomes[lr] = outcome
    style = {"color": colour, "marker": marker, "markevery": 5, "markersize": 5}
    axes.plot(range(len(curve)), [each / IMAGES for each in curve], label=f"lr = {lr}: {outcome}", **style)
axes.set_yscale("log")
axes.set(xlabel="inference step", ylabel="energy of an image (mean)")
axes.grid(alpha=0.3)
figure.legend(loc="outside lower center", ncols=2, fontsize=9)
figure.savefig(PICTURES / "2_too_large.png", dpi=150)
show(PICTURES / "2_too_large.png")
print(refused)

# %% [markdown]
# An energy that has risen to a thousand times its start raises a `DivergenceError`, which carries the curve.
#
# But inference can also **fail quietly**. At `lr = 0.8` and `1.5` the values swing from one side to the other, far
# above the energy they started from. They do not run away, because tanh saturates.
#
# So give a `tol` while you try a step size, and look at `converged` and at `energy`. At `lr = 0.1` the energy falls,
# and only more steps are missing.

# %%
assert list(outcomes.values()) == ["not converged", "settles", "not converged", "not converged", "DivergenceError"]
quiet = relax(model, torch2ebm.PredictiveCoding(steps=60, lr=0.8)).relaxation
assert quiet.converged is None  # no tol was given
assert quiet.energy[-1] > quiet.energy[0]

# %% [markdown]
# In a long training, one bad batch should perhaps not stop everything. `on_divergence="warn"` leaves `.grad` as it is
# for that batch, with a warning. `"skip"` does the same without a word.

# %%
algorithm = torch2ebm.PredictiveCoding(steps=60, lr=2.0, on_divergence="warn")
optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, algorithm)
before = [parameter.detach().clone() for parameter in model.parameters()]

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    F.cross_entropy(model(x), y).backward()
optimizer.step()
optimizer.detach()

print(caught[-1].category.__name__)
assert issubclass(caught[-1].category, torch2ebm.errors.DivergenceWarning)
assert all(parameter.grad is None for parameter in model.parameters())
assert all(torch.equal(was, parameter) for was, parameter in zip(before, model.parameters(), strict=True))

# %% [markdown]
# ## What to take along
#
# - Take at least as many steps as there are hidden layers. `state.unreached` names what was not reached.
# - How far the gradient at rest is from backpropagation's depends on the pull of the loss, not on the solver.
#   `tutorials/3_infinitesimal_limit.py` takes the pull to zero.
# - In deep networks take `ErrorDescent`, or `AndersonErrorDescent` with a `tol`.
# - Give a `tol` while you look for a step size, and read `relaxation.converged`.
