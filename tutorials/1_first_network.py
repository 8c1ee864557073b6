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
# # 1. A first network
#
# You know PyTorch, and you have a training loop. This notebook trains the same network, in the same loop, **without
# backpropagation**. Every layer learns from an error of its own, by *predictive coding*.
#
# 1. the plain loop
# 2. two added lines
# 3. value, prediction, error, energy
# 4. inference: what happens inside `backward()`
# 5. how far is that from autograd?
# 6. what changes the angle
# 7. training to the end
# 8. `detach()`: the plain loop is back
#
# It runs in less than a minute on one core. As a script it writes its pictures to the folder `tutorial_output`. You can
# name another folder in the environment variable `TUTORIAL_OUTPUT`.

# %%
import copy
import os
import time
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


# %% [markdown]
# ## 1. The plain loop
#
# The data are 1,797 handwritten digits of 8 by 8 pixels. One in five is kept for testing.

# %%
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, stratify=labels, random_state=0)
print("train", tuple(train_x.shape), " test", tuple(test_x.shape))

# %% [markdown]
# This is an ordinary network and an ordinary loop. Nothing here knows of torch2ebm.


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


def new_net():
    torch.manual_seed(0)  # the same initial weights every time
    return Net()


def train(model, optimizer, epochs):
    order = torch.Generator().manual_seed(0)  # the same batches every time
    for _ in range(epochs):
        for batch in torch.randperm(len(train_y), generator=order).split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(train_x[batch]), train_y[batch])
            loss.backward()
            optimizer.step()


def accuracy(model):
    with torch.no_grad():
        return (model(test_x).argmax(1) == test_y).double().mean().item()


# %%
EPOCHS = 25

plain = new_net()
train(plain, torch.optim.Adam(plain.parameters(), lr=2e-3), EPOCHS)
print(f"backpropagation: {accuracy(plain):.1%} of the test images are right")

# %% [markdown]
# ## 2. Two added lines
#
# ```diff
#   net = new_net()
# + model = torch2ebm.convert(net)
#   optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
# + optimizer = torch2ebm.EnergyOptimizer(optimizer, model, torch2ebm.PredictiveCoding(steps=20, lr=0.1))
#   train(model, optimizer, epochs=1)
# ```
#
# `model` computes what `net` computes. Its parameters are those of `net`: the same objects. Only one thing changes: how
# `loss.backward()` fills `.grad`. The function `train` is the one from above.

# %%
net = new_net()
model = torch2ebm.convert(net)
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
optimizer = torch2ebm.EnergyOptimizer(optimizer, model, torch2ebm.PredictiveCoding(steps=20, lr=0.1))

before = accuracy(model)
train(model, optimizer, epochs=1)
print(f"accuracy before {before:.1%}, after one epoch of predictive coding {accuracy(model):.1%}")

# %% [markdown]
# It learns. The rest of this notebook looks inside.
#
# ## 3. Value, prediction, error, energy
#
# `convert` has split the model into **nodes**. Here a node is a layer with its activation. Each node reads the nodes
# before it.

# %%
batch_x, batch_y = train_x[:64], train_y[:64]

optimizer.zero_grad()
loss = F.cross_entropy(model(batch_x), batch_y)
loss.backward()

print(model.summary())

# %% [markdown]
# In this table `level` is the distance of a node to the output. Each node $n$ has
#
# - a **prediction** $\mu_n = f_n(v_{n-1})$: what its layer computes from the value before it,
# - a **value** $v_n$: a tensor of the same shape that is free to move,
# - an **error** $e_n = v_n - \mu_n$.
#
# `model.state` holds all three as the last backward left them. Here they are for one image, and for the first unit of
# each layer:

# %%
state = model.state
for name in model.nodes:
    value, prediction, error = (each[name][0, 0].item() for each in (state.value, state.prediction, state.error))
    print(f"{name:6}  value {value:+.4f}  =  prediction {prediction:+.4f}  +  error {error:+.4f}")

# %% [markdown]
# The prediction is just the layer, applied to the *value* of the node before:

# %%
torch.testing.assert_close(state.prediction["second"], torch.tanh(net.second(state.value["first"])))
torch.testing.assert_close(state.error["second"], state.value["second"] - state.prediction["second"])

# %% [markdown]
# The **energy** adds up half the squared errors of the hidden nodes, and the loss at the output's prediction:
#
# $$F = \sum_{n\ \text{hidden}} \tfrac12 |e_n|^2 + L(\mu_{\text{output}}, y), \qquad\text{summed over the images.}$$
#
# The output has no value that could move. Its error is what the loss asks for:
# $e_{\text{output}} = -\partial L/\partial\mu$.

# %%
hidden = ["first", "second", "third"]
energies = {name: state.energy[name].sum().item() for name in hidden}  # state.energy: one number an image
energies["loss"] = F.cross_entropy(state.prediction["output"], batch_y, reduction="sum").item()
for name, energy in energies.items():
    print(f"{name:6} {energy:8.3f}")
print(f"sum    {sum(energies.values()):8.3f}    as the library reports it: {state.relaxation.energy[-1]:.3f}")

# %% [markdown]
# A layer's gradient needs only what is in its own node: its error, its prediction and the value that it reads. For
# `second`, $\mu = \tanh(W v_{\text{first}} + b)$. With $B$ images its gradient is
#
# $$\frac1B \frac{\partial F}{\partial W}
# = -\frac1B \sum_{\text{images}} \big(e \odot (1 - \mu^2)\big)\, v_{\text{first}}^\top .$$
#
# This is *local* learning, and it is what `.grad` holds.

# %%
local = state.error["second"] * (1 - state.prediction["second"] ** 2)
by_hand = -local.T @ state.value["first"] / len(batch_y)
torch.testing.assert_close(net.second.weight.grad, by_hand)
print("largest difference:", (net.second.weight.grad - by_hand).abs().max().item())

# %% [markdown]
# ## 4. Inference
#
# Before the backward, `model(x)` sets every value to its prediction. All hidden errors are zero then, and $F$ is the
# loss.
#
# **Inference** is what follows. The values descend the energy, all at once, for `steps` steps of size `lr`:
#
# $$v_n \leftarrow v_n + \text{lr}\,\big(J_{n+1}^\top e_{n+1} - e_n\big),
# \qquad J_{n+1} = \frac{\partial\mu_{n+1}}{\partial v_n} .$$
#
# The first term says what the next layer would like this value to be. The second term pulls the value back to its own
# prediction.
#
# Nothing comes from farther away than the next node. So the output's error moves by one node in each step: a **wave
# front**.


# %%
optimizer.detach()  # more on this in section 8


def relax(algorithm):
    """The state that one backward of ``algorithm`` leaves; the weights stay as they are."""
    attached = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), model, algorithm)
    F.cross_entropy(model(batch_x), batch_y).backward()
    state = model.state
    attached.detach()
    attached.zero_grad()
    return state


for count in (1, 2, 3):
    unreached = relax(torch2ebm.PredictiveCoding(steps=count, lr=0.1)).unreached
    print(f"after step {count}: no error yet in {', '.join(unreached) or '(none)'}")

# %% [markdown]
# A layer without an error has no gradient. Take at least as many steps as there are hidden layers. The model's summary
# tells you when there were too few.
#
# This is what happens in 60 steps:

# %%
relaxation = relax(torch2ebm.PredictiveCoding(steps=60, lr=0.1)).relaxation
images = len(batch_y)

figure = Figure(figsize=(8.5, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
steps = range(len(relaxation.energy))
left.fill_between(
    steps,
    [loss / images for loss in relaxation.loss],
    [energy / images for energy in relaxation.energy],
    color=ORANGE,
    alpha=0.3,
    label="errors of the hidden layers",
)
left.plot(steps, [energy / images for energy in relaxation.energy], color=BLUE, label="energy = loss + errors")
left.plot(steps, [loss / images for loss in relaxation.loss], color=ORANGE, linestyle="--", label="loss")
left.set(xlabel="inference step", ylabel="energy of an image (mean)", title="inference lowers the energy")
left.legend()

for name, colour, marker in zip(hidden, (PINK, GREEN, BLUE), ("^", "s", "o"), strict=True):
    reached = [(step, energy / images) for step, energy in enumerate(relaxation.node_energy[name]) if energy > 0]
    label = f"{name}, from step {reached[0][0]}"
    right.plot(*zip(*reached, strict=True), color=colour, marker=marker, markevery=[0], label=label)
right.set_yscale("log")
right.set(xlabel="inference step", ylabel="energy of the errors of an image", title="the wave front")
right.legend(loc="lower right")
for panel in (left, right):
    panel.grid(alpha=0.3)
figure.savefig(PICTURES / "1_inference.png", dpi=150)
show(PICTURES / "1_inference.png")

# %% [markdown]
# Left: inference makes the loss lower, and pays for it with errors. Learning then changes the weights so that the
# predictions follow the values and the errors vanish. The next forward pass has the lower loss for free.
#
# Right: `third` has an error after one step, `second` after two, `first` after three.
#
# ## 5. How far is that from autograd?
#
# `torch2ebm.compare` computes the gradients of several algorithms on one batch and compares them with autograd's. We
# compare two: predictive coding as above, and `ZeroDivergence` (also known as Z-IL).

# %%
algorithms = {
    "PredictiveCoding": torch2ebm.PredictiveCoding(steps=20, lr=0.1),
    "ZeroDivergence": torch2ebm.ZeroDivergence(),
}
batch = batch_x, batch_y
comparison = torch2ebm.compare(model, F.cross_entropy, batch, algorithms, steps=[1, 2, 3, 5, 10, 20, 50, 100])
print(comparison.table())

# %%
comparison.plot(str(PICTURES / "1_compare.png"))
show(PICTURES / "1_compare.png")

# %% [markdown]
# **Z-IL is at 0 degrees.** It takes steps of size 1. It computes each node's gradient at the very step at which the
# wave front arrives. At that moment nothing before the node has moved, so its error is
#
# $$e_n = J_{n+1}^\top e_{n+1} \quad\text{at the feed-forward values.}$$
#
# This is backpropagation's own recursion. You get the same gradients, from errors that pass between neighbours only.
#
# **Predictive coding is not at 0 degrees.** It lets the values move on until they settle, that is, until they stand
# still. Then its two terms are equal, and again $e_n = J_{n+1}^\top e_{n+1}$, but at the *settled* values. The gradient
# is that of a network whose activity has already gone part of the way to the target.
#
# Among the weights, those of `output` differ most. Their gradient is $-e_{\text{output}}\, v_{\text{third}}^\top$, and
# the loss pulls directly at the value $v_{\text{third}}$.
#
# Look at the norm ratio, too. After 20 steps the errors of `first` are still a fraction of those of backprop. Its
# gradient has nearly the same direction and is several times shorter. Adam rescales every gradient, so it does not
# mind. Plain SGD would teach this layer slowly.

# %%
for name, agreements in comparison.agreement.items():
    print(f"{name:16}  largest angle {max(a.angle for a in agreements.values()):8.4f} degrees")
assert max(a.angle for a in comparison.agreement["ZeroDivergence"].values()) < 0.01
assert max(a.angle for a in comparison.agreement["PredictiveCoding"].values()) > 5
assert comparison.agreement["PredictiveCoding"]["first.weight"].norm_ratio < 0.5

# %% [markdown]
# A different gradient is not a worse one. The accuracy decides, in section 7.
#
# ## 6. What changes the angle
#
# The less the values have moved, the smaller is the angle. Three things decide how far they move:
#
# - The **loss**. Multiplied by a small factor it pulls less. As the factor goes to 0, the gradient goes to
#   backpropagation's. This is how all energy-based methods are connected to it.
# - The **steps** and the **step size** `lr`. Roughly, their product counts, until the values have settled.
#
# The factor belongs on the loss of each image, inside the mean. A factor on the finished loss, as in `0.1 * loss`, is
# taken for what it usually is: a change of scale of the gradient, for example for gradient accumulation or mixed
# precision. It does not change inference.

# %%
exact = torch2ebm.convert(copy.deepcopy(net).double())  # double precision: small angles are not rounding
double_batch = batch_x.double(), batch_y
weights = ["first.weight", "second.weight", "third.weight", "output.weight"]


def angles(algorithm, factor=1.0):
    """Degrees between the gradient and backpropagation's, for the weights of each layer."""

    def scaled_loss(output, target):
        return (factor * F.cross_entropy(output, target, reduction="none")).mean()

    found = torch2ebm.compare(exact, scaled_loss, double_batch, {"": algorithm}).agreement[""]
    return [found[name].angle for name in weights]


factors = [1.0, 0.3, 0.1, 0.03, 0.01]
settled = torch2ebm.PredictiveCoding(steps=500, lr=0.3)
by_factor = [angles(settled, factor) for factor in factors]

counts = [1, 2, 3, 5, 10, 20, 40, 80]
by_steps = {
    lr: [sum(angles(torch2ebm.PredictiveCoding(steps=count, lr=lr))) / len(weights) for count in counts]
    for lr in (0.03, 0.1, 0.3)
}

# %%
figure = Figure(figsize=(8.5, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
for name, of_layer, colour, marker in zip(
    weights, zip(*by_factor, strict=True), (PINK, GREEN, BLUE, ORANGE), "^soD", strict=True
):
    left.plot(factors, of_layer, color=colour, marker=marker, label=name)
left.set_xscale("log")
left.set_yscale("log")
left.set(xlabel="factor on the loss", ylabel="angle to backprop [degrees]", title="a smaller loss, values settled")
left.legend()

for (lr, curve), colour, marker in zip(by_steps.items(), (GREEN, BLUE, ORANGE), "soD", strict=True):
    right.plot(counts, curve, color=colour, marker=marker, label=f"lr = {lr}")
right.axvspan(0.9, 2.5, color="0.88", zorder=0)
right.text(0.97, 2, "error has not\nreached all\nlayers", va="bottom", fontsize=8)
right.set_xscale("log")
right.set_xticks(counts, [str(count) for count in counts])
right.minorticks_off()
right.set_xlim(0.9, 90)
right.set_ylim(bottom=0)
right.set(xlabel="inference steps", ylabel="mean angle to backprop [degrees]", title="fewer or smaller steps")
right.legend()
for panel in (left, right):
    panel.grid(alpha=0.3)
figure.savefig(PICTURES / "1_angles.png", dpi=150)
show(PICTURES / "1_angles.png")

# %% [markdown]
# Left: where the factor is small, a factor ten times smaller gives an angle ten times smaller.
#
# Right: a layer that no error has reached counts as 90 degrees. From three steps on, the angle grows as the values
# leave the place where the forward pass put them.

# %%
for large, small in zip(by_factor[-2], by_factor[-1], strict=True):
    print(f"factor {factors[-2]}: {large:.3f} degrees, factor {factors[-1]}: {small:.3f} degrees")
    assert 2.5 < large / small < 3.8  # in proportion to the factor: 3

# %% [markdown]
# ## 7. Training to the end
#
# The initial weights, the batches and the optimizer are the same. Only the gradients are of three kinds.

# %%
trained = {"backpropagation": accuracy(plain)}
for name, algorithm in algorithms.items():
    start = time.perf_counter()
    net = new_net()
    model = torch2ebm.convert(net)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.Adam(net.parameters(), lr=2e-3), model, algorithm)
    train(model, optimizer, EPOCHS)
    trained[name] = accuracy(model)
    optimizer.detach()
    print(f"{name} took {time.perf_counter() - start:.1f} s")

for name, correct in trained.items():
    print(f"{name:16}  {correct:.1%} of the test images")
assert all(correct >= 0.95 for correct in trained.values())

# %% [markdown]
# One test image is 0.3%, so they are a few images apart.
#
# Predictive coding takes longer, because each of its 20 inference steps costs nearly as much as backpropagation. Z-IL
# takes one sweep through the layers.
#
# ## 8. `detach()`: the plain loop is back
#
# `optimizer.detach()` returns the optimizer that was wrapped, with its state. The model uses ordinary backpropagation
# again. You have nothing to undo: the weights are in `net`, as always.

# %%
net = new_net()
model = torch2ebm.convert(net)
optimizer = torch2ebm.EnergyOptimizer(torch.optim.Adam(net.parameters(), lr=2e-3), model, torch2ebm.PredictiveCoding())
train(model, optimizer, epochs=1)

optimizer = optimizer.detach()
train(model, optimizer, epochs=1)
print(type(optimizer).__name__, f"{accuracy(model):.1%}")

optimizer.zero_grad()
F.cross_entropy(model(batch_x), batch_y).backward()
autograd = torch.autograd.grad(F.cross_entropy(net(batch_x), batch_y), list(net.parameters()))
assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), autograd, strict=True))

# %% [markdown]
# ## Where to go from here
#
# - Your own network: call `torch2ebm.convert(net)`, and `model.draw("graph.png")` to see its nodes.
# - The settings of this notebook were `steps` and `lr`. Take a smaller `lr` if the energy rises, or if `backward()`
#   raises a `DivergenceError`.
# - `python -m torch2ebm compare pkg.module:factory` prints section 5 for a model of yours.
