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
# # 4. Inference learning as implicit SGD
#
# SGD uses the gradient where the weights *are*. **Implicit** SGD uses the gradient where they *will be* after the step.
# No learning rate makes it unstable, but you have to solve an equation for its step.
#
# Inference is one way to solve it (Alonso et al. 2022, [arXiv 2206.00164](https://arxiv.org/abs/2206.00164)): the
# relaxation of values that predictive coding does anyway. This notebook measures how far that goes.
#
# 1. explicit and implicit steps
# 2. the implicit step by inference: `ImplicitSGD`
# 3. any learning rate: `ProximalInferenceLearning`
# 4. what holds of the theory, and what does not
# 5. recipes for the loop that you have
#
# The first notebook explains value, prediction, error and energy. This one runs for a minute or two on one core, most
# of it in section 3. As a script it writes its pictures to the folder `tutorial_output`. You can name another folder in
# the environment variable `TUTORIAL_OUTPUT`.

# %%
import copy
import math
import os
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

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


# %% [markdown]
# ## 1. Explicit and implicit steps
#
# These are the two ways to take a step of size $\alpha$ on a loss $L$:
#
# $$\text{explicit: } \theta^+ = \theta - \alpha\,\nabla L(\theta), \qquad
# \text{implicit: } \theta^+ = \theta - \alpha\,\nabla L(\theta^+) .$$
#
# The second equation has $\theta^+$ on both sides. It says that the **proximal objective** is stationary there:
#
# $$\theta^+ = \arg\min_{\theta'}\; L(\theta') + \frac{1}{2\alpha}\,|\theta' - \theta|^2 .$$
#
# You lower the loss, and pay for how far you go. A large $\alpha$ makes distance cheap. But the minimum of the sum is
# never beyond what the loss asks for.
#
# One weight is enough to see it: $L(w) = \log\cosh w$, from $w = 2$ with $\alpha = 4$. Both kinds of step are trained
# in the usual loop. `ImplicitSGD` leaves minus its step in `.grad`, so `SGD(lr=1.0)` applies it as it is.


# %%
def scalar_path(algorithm, lr, steps):
    """The weight before and after every step."""
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(net.weight, 2.0)
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=lr), model, algorithm)
    path = [net.weight.item()]
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 1, dtype=torch.float64)).cosh().log().mean().backward()
        optimizer.step()
        path.append(net.weight.item())
    return path


explicit = scalar_path(torch2ebm.Backprop(), lr=4.0, steps=8)
implicit = scalar_path(torch2ebm.ImplicitSGD(alpha=4.0), lr=1.0, steps=8)
print("explicit:", "  ".join(f"{w:+.3f}" for w in explicit))
print("implicit:", "  ".join(f"{w:+.3f}" for w in implicit))
assert abs(implicit[1] - (2 - 4 * math.tanh(implicit[1]))) < 1e-9  # the slope at the end, not at the start
assert min(map(abs, explicit)) > 1.8
assert abs(implicit[-1]) < 1e-4

# %%
w = torch.linspace(-2.5, 2.7, 300, dtype=torch.float64)
loss = w.cosh().log()
proximal = loss + (w - 2).square() / (2 * 4)

figure = Figure(figsize=(8.5, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
left.plot(w, loss, color="0.35", label="loss")
left.plot(w, proximal, color=BLUE, linestyle="--", label=r"loss + distance$^2/(2\alpha)$")
start = math.log(math.cosh(2))
foot = start + math.tanh(2) * (explicit[1] - 2)
left.plot([2, explicit[1]], [start, foot], color=ORANGE, linewidth=1, label="slope at the start")
left.plot([explicit[1]] * 2, [foot, math.log(math.cosh(explicit[1]))], ":", color=ORANGE, linewidth=1)
left.plot(2, start, "ko")
left.annotate("start", (2, start), xytext=(4, -14), textcoords="offset points")
left.plot(explicit[1], math.log(math.cosh(explicit[1])), "s", color=ORANGE, label="after an explicit step")
left.plot(implicit[1], math.log(math.cosh(implicit[1])), "D", color=BLUE, label="after an implicit step")
left.plot(implicit[1], proximal.min(), "D", color=BLUE, fillstyle="none")
left.set(xlabel="weight", ylabel="loss", title=r"one step, $\alpha = 4$", ylim=(-2.8, 7.2))
left.legend(loc="upper right", fontsize=8)

right.axhline(0, color="0.35", linestyle=":", label="minimum of the loss")
right.plot(explicit, "s-", color=ORANGE, label="explicit")
right.plot(implicit, "D-", color=BLUE, label="implicit")
right.set(xlabel="step", ylabel="weight", title=r"eight steps, $\alpha = 4$", ylim=(-2.4, 3.9))
right.legend(loc="upper center", ncol=3, fontsize=8)
for panel in (left, right):
    panel.grid(alpha=0.3)
figure.savefig(PICTURES / "4_explicit_implicit.png", dpi=150)
show(PICTURES / "4_explicit_implicit.png")

# %% [markdown]
# Left: the explicit step follows the slope at the start and lands on the other side. The implicit step ends where the
# proximal objective is lowest (the hollow mark).
#
# Right: the explicit weight jumps to and fro for ever. The implicit weight arrives.
#
# ## 2. The implicit step by inference
#
# In a network $\theta^+$ has thousands of entries. Inference finds them in two moves.
#
# First, look at one dense layer. It reads $a$ and predicts $Wa + b$. Ask it for another value $h$, and its weights and
# bias have to change. The smallest change that does it is known in closed form. For one sample its squared size is
# $|h - Wa - b|^2 / (|a|^2 + 1)$: a squared error, divided by the size of what the layer reads.
#
# So minimise over the *values*
#
# $$G(h) = L(h_{\text{output}}) + \sum_{\text{layers}} \frac{|e|^2}{2\alpha\,(|a|^2 + 1)} , \qquad e = h - Wa - b.$$
#
# This is a loss plus squared errors, as the energy of predictive coding is.
#
# Second, let every layer take its smallest change. The result is the implicit step, whole and exact, because $G$ has
# paid for each layer's distance.

# %%
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, stratify=labels, random_state=1)


def new_net(*widths, activation=nn.ReLU, seed=1):
    torch.manual_seed(seed)
    layers = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def change(net, algorithm, x, y):
    """What one step of ``algorithm`` would add to the parameters, as one vector, and the state of its inference."""
    model = torch2ebm.convert(net)
    attached = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), model, algorithm)
    F.cross_entropy(model(x), y).backward()
    state = model.state  # before the detach, which releases it
    step = -torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    attached.detach()
    attached.zero_grad()
    return step, state


def after(net, step):
    """A copy whose parameters have taken the step."""
    moved = copy.deepcopy(net)
    vector_to_parameters(parameters_to_vector(net.parameters()).detach() + step, moved.parameters())
    return moved


net = new_net(64, 32, 32, 10, activation=nn.Tanh).double()
four_x, four_y = train_x[:4].double(), train_y[:4]
step, state = change(net, torch2ebm.ImplicitSGD(alpha=0.5), four_x, four_y)
print(f"converged: {state.relaxation.converged}, Newton steps: {state.relaxation.steps}")

# %% [markdown]
# You need not trust inference that this *is* the implicit step. Autograd knows the gradient at $\theta^+$:

# %%
moved = after(net, step)
gradient, _ = change(moved, torch2ebm.Backprop(), four_x, four_y)  # -grad L at theta+
print(f"largest entry of theta+ - theta + alpha grad L(theta+): {(step - 0.5 * gradient).abs().max():.1e}")
torch.testing.assert_close(step, 0.5 * gradient, rtol=0, atol=1e-10)

# %% [markdown]
# A second thing holds exactly. Inference ended at some values. After the step, a plain forward pass *produces* these
# values. They are targets that all layers reach at once:

# %%
for name, value in state.value.items():
    reached = moved[: int(name) + 1](four_x)  # the layer's output, before the activation
    print(
        f"layer {name}: was off by {state.error[name].abs().max():.3f}, is off by {(reached - value).abs().max():.0e}"
    )
    assert (reached - value).abs().max() < 1e-12

# %% [markdown]
# For a small $\alpha$ the gradient hardly changes within a step, so both kinds of step agree. To first order in
# $\alpha$ they are the same. They differ by $O(\alpha^2)$.

# %%
descent, _ = change(net, torch2ebm.Backprop(), four_x, four_y)
alphas = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
sizes, distances = [], []
for alpha in alphas:
    step, _ = change(net, torch2ebm.ImplicitSGD(alpha, tol=1e-12), four_x, four_y)
    sizes.append(step.norm().item())
    distances.append((step - alpha * descent).norm().item())
    print(f"alpha {alpha:<7g} |step| {sizes[-1]:.2e}   |explicit - implicit| {distances[-1]:.2e}")
slopes = [
    math.log(distances[i + 1] / distances[i]) / math.log(alphas[i + 1] / alphas[i]) for i in range(len(alphas) - 1)
]
print("slopes:", "  ".join(f"{slope:.3f}" for slope in slopes))
assert all(abs(slope - 2) < 0.02 for slope in slopes[:3])

# %%
figure = Figure(figsize=(6.2, 3.8), layout="constrained")
panel = figure.subplots()
panel.loglog(alphas, sizes, "D-", color=BLUE, label="|implicit step|")
panel.loglog(alphas, distances, "s-", color=ORANGE, label="|explicit - implicit|")
panel.loglog(
    alphas,
    [distances[0] * (a / alphas[0]) ** 2 for a in alphas],
    ":",
    color="0.35",
    label=r"proportional to $\alpha^2$",
)
panel.set(xlabel=r"step size $\alpha$", ylabel="Euclidean norm in the parameters", title="small steps agree")
panel.legend()
panel.grid(alpha=0.3)
figure.savefig(PICTURES / "4_order.png", dpi=150)
show(PICTURES / "4_order.png")

# %% [markdown]
# ## 3. Any learning rate
#
# `ImplicitSGD` finds its exact step by Newton's method on the values. Inference learning is cheaper. It takes a fixed
# number of plain inference steps, then one local change for each layer. There are two forms here:
#
# - **IL-SGD** is `PredictiveCoding(steps=25, lr=0.02)` with `torch.optim.SGD(lr)`.
# - **IL-prox** is `ProximalInferenceLearning(alpha)` with `SGD(lr=1.0)`. Each layer's change is divided by the squared
#   norm of what the layer reads, so that it reaches its value. The output's target moves with $\alpha$ towards the
#   minimum of the loss, and never beyond.
#
# The test trains on 700 digits, one at a time, at learning rates four decades apart. A run has *diverged* if it ends in
# a `NonFiniteError` or a `DivergenceError`. An accuracy of about .10 is chance: the units have died.

# %%
RATES = (0.01, 0.1, 1.0, 10.0, 100.0)
RULES = {  # name: learning rate to algorithm, and to the rate of SGD
    "SGD": (lambda rate: torch2ebm.Backprop(), lambda rate: rate),
    "IL-SGD": (lambda rate: torch2ebm.PredictiveCoding(steps=25, lr=0.02), lambda rate: rate),
    "IL-prox": (lambda rate: torch2ebm.ProximalInferenceLearning(alpha=rate), lambda rate: 1.0),
}


def accuracy(net):
    with torch.no_grad():
        return (net(test_x).argmax(1) == test_y).double().mean().item()


def train_singly(algorithm, lr, samples=700):
    """Accuracy after so many steps of one image each; None if the run diverged."""
    net = new_net(64, 128, 128, 10)
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=lr), model, algorithm)
    order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(1))
    try:
        for image in order[:samples].split(1):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(train_x[image]), train_y[image])
            loss.backward()
            optimizer.step()
    except (torch2ebm.errors.NonFiniteError, torch2ebm.errors.DivergenceError):
        return None
    return accuracy(net)


table = {
    name: {rate: train_singly(algorithm(rate), lr(rate)) for rate in RATES} for name, (algorithm, lr) in RULES.items()
}

# %%
print("rate    " + "".join(f"{rate:>10g}" for rate in RATES))
for name, row in table.items():
    print(
        f"{name:8}" + "".join(f"{'diverged' if row[rate] is None else format(row[rate], '.2f'):>10}" for rate in RATES)
    )

# %%
figure = Figure(figsize=(6.8, 4.2), layout="constrained")
panel = figure.subplots()
LOST = 0.02  # where a diverged run is drawn
for row, colour, marker, aside in zip(table.values(), (ORANGE, GREEN, BLUE), "soD", (1 / 1.09, 1.09, 1.0), strict=True):
    ended = [rate for rate in RATES if row[rate] is not None]
    panel.plot([rate * aside for rate in ended], [row[rate] for rate in ended], color=colour, marker=marker)
    lost = [rate * aside for rate in RATES if row[rate] is None]
    panel.plot(lost, [LOST] * len(lost), "x", color=colour, markersize=8, markeredgewidth=2)
panel.axhline(0.1, color="0.35", linestyle=":")
panel.text(0.0062, 0.115, "chance", fontsize=9, color="0.35")
handles = [
    Line2D([], [], color=colour, marker=marker, label=name)
    for name, colour, marker in zip(table, (ORANGE, GREEN, BLUE), "soD", strict=True)
]
handles.append(Line2D([], [], color="0.35", marker="x", markeredgewidth=2, linestyle="none", label="diverged"))
panel.legend(handles=handles, loc="center right")
panel.set(xscale="log", xlim=(0.006, 170), ylim=(-0.02, 1.0))
panel.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
panel.minorticks_off()
panel.set(xlabel="learning rate", ylabel="test accuracy after 700 single images", title="any learning rate")
panel.grid(alpha=0.3)
figure.savefig(PICTURES / "4_stability.png", dpi=150)
show(PICTURES / "4_stability.png")

# %% [markdown]
# - **SGD** is lost from 1 on.
# - **IL-SGD** bears 1, and is lost at 10.
# - **IL-prox** does as well at 100 as at 1. At the small end there is no gift: at .01 it is the slowest of the three.
#
# These are one seed and 700 images. The page *Inference learning* (`docs/inference_learning.md`) has the table of three
# seeds and 1,000 images, and `benchmarks/papers_d.py` makes it.

# %%
assert table["SGD"][0.1] > 0.6
assert all(table["SGD"][rate] is None or table["SGD"][rate] < 0.15 for rate in (1.0, 10.0, 100.0))
assert all(table["IL-SGD"][rate] > 0.85 for rate in (0.1, 1.0))
assert all(table["IL-SGD"][rate] is None or table["IL-SGD"][rate] < 0.15 for rate in (10.0, 100.0))
assert all(table["IL-prox"][rate] >= 0.88 for rate in (1.0, 10.0, 100.0))
assert table["IL-prox"][0.01] < min(table["SGD"][0.01], table["IL-SGD"][0.01])

# %% [markdown]
# ## 4. What holds of the theory, and what does not
#
# Is IL-prox stable *because* it is implicit SGD? We can ask, since we have the exact step. We measure the proximal
# objective of one image. Lower is better, and the implicit step is the minimum. The candidates are:
#
# - IL-prox as published, with 25 inference steps.
# - IL-prox with its values settled, that is, moved until they stand still.
# - SGD with the rate $\alpha$.
# - The directions of settled IL-prox and of SGD, each *scaled* to the length that is best on this very objective.
#
# The best length is found by trying 60. No training loop could do that; it only compares directions.
#
# Beside it we print the cosine of each step with the implicit one. All figures are means over three images, each on a
# fresh network.


# %%
def objective(net, step, alpha, x, y):
    """L(theta') + |theta' - theta|^2 / (2 alpha) at theta' = theta + step."""
    with torch.no_grad():
        return F.cross_entropy(after(net, step)(x), y).item() + step.square().sum().item() / (2 * alpha)


def steps_of(net, alpha, x, y):
    """One step of each algorithm, by name."""
    algorithms = {
        "implicit SGD": torch2ebm.ImplicitSGD(alpha, tol=1e-7),
        "IL-prox, 25 steps": torch2ebm.ProximalInferenceLearning(alpha),
        "IL-prox, settled": torch2ebm.ProximalInferenceLearning(alpha, steps=200, feedback_rate=0.1, error_rate=0.1),
    }
    steps = {name: change(net, algorithm, x, y)[0] for name, algorithm in algorithms.items()}
    descent, _ = change(net, torch2ebm.Backprop(), x, y)
    factors = torch.logspace(-3, 2, 60, dtype=torch.float64)
    for name, step in {"IL-prox, settled": steps["IL-prox, settled"], "SGD": descent}.items():
        scaled = [factor * step for factor in factors]
        steps[f"{name}, scaled"] = min(scaled, key=lambda step: objective(net, step, alpha, x, y))
    return {**steps, "SGD, rate alpha": alpha * descent}


reached, cosines, losses = {}, {}, []
for alpha in RATES:
    found = []
    for image in range(3):
        net = new_net(64, 32, 32, 10, activation=nn.Tanh, seed=image).double()
        one_x, one_y = train_x[image : image + 1].double(), train_y[image : image + 1]
        steps = steps_of(net, alpha, one_x, one_y)
        losses.append(objective(net, torch.zeros(()), alpha, one_x, one_y))
        heights = {name: objective(net, step, alpha, one_x, one_y) for name, step in steps.items()}
        cosine = {name: F.cosine_similarity(step, steps["implicit SGD"], 0).item() for name, step in steps.items()}
        found.append((heights, cosine))
    reached[alpha] = {name: mean(heights[name] for heights, _ in found) for name in steps}
    cosines[alpha] = {name: mean(cosine[name] for _, cosine in found) for name in steps}
no_step = mean(losses)

print(f"proximal objective (no step: {no_step:.3f})")
print(" " * 24 + "".join(f"{alpha:>9g}" for alpha in RATES))
for name in steps:
    print(f"{name:24}" + "".join(f"{reached[alpha][name]:9.3f}" for alpha in RATES))
print("cosine with the implicit step")
for name in steps:
    print(f"{name:24}" + "".join(f"{cosines[alpha][name]:9.3f}" for alpha in RATES))

# %%
STYLES = {
    "implicit SGD": (BLUE, "D", "-"),
    "IL-prox, 25 steps": (GREEN, "o", "-"),
    "IL-prox, settled, scaled": (PINK, "^", "--"),
    "SGD, scaled": (ORANGE, "s", "--"),
}
figure = Figure(figsize=(8.5, 3.8), layout="constrained")
left, right = figure.subplots(1, 2)
for name, (colour, marker, line) in STYLES.items():
    left.plot(RATES, [reached[alpha][name] for alpha in RATES], line, color=colour, marker=marker, label=name)
    if name != "implicit SGD":
        right.plot(RATES, [cosines[alpha][name] for alpha in RATES], line, color=colour, marker=marker, label=name)
left.plot(
    RATES,
    [reached[alpha]["SGD, rate alpha"] for alpha in RATES],
    ":",
    color="black",
    marker="v",
    label=r"SGD, rate $\alpha$",
)
left.axhline(no_step, color="0.6", linewidth=1)
left.text(0.007, no_step + 0.05, "no step", fontsize=8, color="0.35")
left.set(ylim=(0, 2.8), ylabel="proximal objective", title="how low (lower is better)")
left.legend(fontsize=8, loc="lower left")
right.set(ylim=(0, 1.05), ylabel="cosine", title="same direction as the implicit step?")
for panel in (left, right):
    panel.set(xscale="log", xlabel=r"step size $\alpha$")
    panel.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
figure.savefig(PICTURES / "4_proximal_objective.png", dpi=150)
show(PICTURES / "4_proximal_objective.png")

# %% [markdown]
# **What holds.**
#
# - IL-prox lowers the proximal objective at every $\alpha$. SGD with the rate $\alpha$ does so only while $\alpha$ is
#   small. From 1 on it ends above where it began.
# - Letting the values settle brings IL-prox nearer to the implicit step, in height and in direction.
# - From 1 on, the settled direction leads lower than the gradient does, if both may choose their length.
#
# **What does not.**
#
# - The IL-prox that people run has 25 steps and the length that comes of it. It is far above the optimum where $\alpha$
#   is large, and above scaled SGD at every $\alpha$.
# - Its direction is farther from the implicit step than the gradient is.
# - For $\alpha \to 0$ no form of IL-prox becomes the implicit step, as SGD does.
#
# So being *near* implicit SGD does not explain the stability of section 3. What the two share is that the step is
# bounded. The output's target does not overshoot the loss's minimum, and the layers reach their targets.

# %%
for alpha in RATES:
    height, cosine = reached[alpha], cosines[alpha]
    assert height["implicit SGD"] == min(height.values())
    assert height["IL-prox, settled"] < height["IL-prox, 25 steps"] < no_step
    assert cosine["SGD, scaled"] > cosine["IL-prox, 25 steps"] < cosine["IL-prox, settled"]
    assert height["SGD, scaled"] < height["IL-prox, 25 steps"]
    assert (height["IL-prox, settled, scaled"] < height["SGD, scaled"]) == (alpha >= 1)
    assert (height["SGD, rate alpha"] > no_step) == (alpha >= 1)
assert cosines[0.01]["SGD, scaled"] > 0.99
assert cosines[0.01]["IL-prox, settled"] < 0.9

# %% [markdown]
# Nor does *exact* mean *better*. An implicit step does all it can for the image at hand, and as cheaply as it can. All
# these images have much in common. So the cheapest way to a label is a change that gives this label to every image.
#
# Below we take forty steps of one image each. After each of the last twenty we print which share of the test images the
# net takes for the digit just learned. About one in ten of them are that digit.
#
# After exact steps it is all of them: the net knows nothing but its last image. Subtract the mean image from all
# images, and the short cut is gone.


# %%
def share_of_last_label(algorithm, lr, shift):
    """The part of the test images now taken for the digit just learned: mean over the last 20 of 40 single images."""
    net = new_net(64, 128, 128, 10)
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=lr), model, algorithm)
    shares = []
    for image in torch.arange(40).split(1):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(train_x[image] - shift), train_y[image])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            shares.append((net(test_x - shift).argmax(1) == train_y[image]).double().mean().item())
    return mean(shares[20:])


mean_image = train_x.mean(0)
common = (mean_image.square().sum() / train_x.square().sum(1).mean()).item()
print(f"the mean image makes up {common:.0%} of the squared size of an image")
shares = {}
for name, algorithm, lr in (
    ("SGD, rate .1", torch2ebm.Backprop(), 0.1),
    ("implicit SGD, alpha .1", torch2ebm.ImplicitSGD(0.1), 1.0),
):
    shares[name] = [share_of_last_label(algorithm, lr, shift) for shift in (0.0, mean_image)]
    print(f"{name:22}  images as they are {shares[name][0]:.2f},  mean image subtracted {shares[name][1]:.2f}")
assert shares["implicit SGD, alpha .1"][0] > 0.95
assert max(shares["implicit SGD, alpha .1"][1], *shares["SGD, rate .1"]) < 0.4

# %% [markdown]
# ## 5. Recipes for the loop that you have
#
# A form of inference learning is an algorithm and an optimizer. The loop below is that of the first notebook, with 16
# images in each step.
#
# The last recipe is *sequential* inference. Values move one after the other, from the output back. So one step carries
# the error through all layers, and three are enough. `MQ` gives every parameter tensor one rate of its own: the larger
# its gradients are, the smaller the rate (Alonso 2023).


# %%
def train(model, optimizer, epochs):
    order = torch.Generator().manual_seed(0)  # the same batches every time
    for _ in range(epochs):
        for batch in torch.randperm(len(train_y), generator=order).split(16):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(train_x[batch]), train_y[batch])
            loss.backward()
            optimizer.step()


sequential = torch2ebm.PredictiveCoding(solver=torch2ebm.SequentialDescent(steps=3, lr=0.5))
RECIPES = {
    "IL-SGD": (torch2ebm.PredictiveCoding(steps=25, lr=0.02), lambda weights: torch.optim.SGD(weights, lr=1.0)),
    "IL-Adam": (torch2ebm.PredictiveCoding(steps=20, lr=0.02), lambda weights: torch.optim.Adam(weights, lr=1e-3)),
    "IL-prox": (torch2ebm.ProximalInferenceLearning(alpha=1.0), lambda weights: torch.optim.SGD(weights, lr=1.0)),
    "sequential + MQ": (sequential, lambda weights: torch2ebm.MQ(weights, lr=5e-4)),
}
trained = {}
for name, (algorithm, optimizer_of) in RECIPES.items():
    net = new_net(64, 128, 128, 10)
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(optimizer_of(net.parameters()), model, algorithm)
    train(model, optimizer, epochs=2)
    trained[name] = accuracy(net)
    print(f"{name:16} {trained[name]:.1%} of the test images after 2 epochs")
assert all(correct > 0.8 for correct in trained.values())

# %% [markdown]
# ## Where to go from here
#
# - `ImplicitSGD` and `ProximalInferenceLearning` need dense layers. The page `docs/inference_learning.md` says what
#   else is refused, and by which name.
# - `PredictiveCoding` and `MQ` take any network that can be converted.
# - On data of your own, draw the picture of section 3 first. It takes the place of a search for the learning rate.
