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
# # 10. Convolutions and attention
#
# The networks before this one were stacks of dense layers. Here the same two lines train a convolutional network with
# batch norm and residual connections, and a small transformer that looks at patches of an image.
#
# 1. one loop for every network
# 2. a ResNet: what its nodes are
# 3. the ResNet learns, beside backprop
# 4. a transformer: attention, and values with a dimension of tokens
# 5. where the error is
#
# It runs for a minute or two on one core. As a script it writes its pictures to the folder `tutorial_output`. You can
# name another folder in the environment variable `TUTORIAL_OUTPUT`.

# %%
import os
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
BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart with any colour vision


def show(path, width=760):
    """Show a picture below the cell; a script has only the file."""
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(str(path), width=width))
    else:
        print("picture:", path)


pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, stratify=labels, random_state=0)
print("train", tuple(train_x.shape), " test", tuple(test_x.shape))

# %% [markdown]
# ## 1. One loop for every network
#
# Nothing in this loop knows what the network is made of. `Backprop()` is ordinary autograd under the same wrapper, so
# that both see the same batches from the same start.


# %%
def train(build, algorithm, epochs, lr):
    """The trained model, and the accuracy on the test images after each epoch, in percent."""
    torch.manual_seed(0)
    model = torch2ebm.convert(build())
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    optimizer = torch2ebm.EnergyOptimizer(adam, model, algorithm)
    accuracies = []
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(train_y)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracies.append(100 * (model(test_x).argmax(1) == test_y).float().mean().item())
    return model, accuracies


ALGORITHMS = {"backprop": torch2ebm.Backprop(), "predictive coding": torch2ebm.PredictiveCoding()}

# %% [markdown]
# ## 2. A ResNet: what its nodes are
#
# Two blocks with batch norm, and a sum beside each. `convert` takes it as it is.


# %%
class Block(nn.Module):
    """Two convolutions with batch norm, beside a shortcut."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.second, self.second_norm = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x):
        hidden = self.first_norm(self.first(x)).relu()
        return (self.second_norm(self.second(hidden)) + self.shortcut(x)).relu()


def resnet():
    return nn.Sequential(Block(1, 8, 1), Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


model = torch2ebm.convert(resnet(), example_inputs=train_x[:64])
print(model.summary())
model.draw(PICTURES / "10_graph.png")
show(PICTURES / "10_graph.png", width=420)

# %% [markdown]
# Each line, and each box, is a node with a value of its own. A convolution is one, and so is a batch norm with the ReLU
# behind it. The sum and its ReLU belong to the node of the last norm: a value is what comes out of the block. Pooling
# that follows belongs there, too.
#
# *reads* says where a prediction comes from. A node that reads two others sends a message to each.
#
# In training, a batch norm divides by the statistics of the values that it reads. These move during inference, and
# gradients go through them.
#
# ## 3. The ResNet learns, beside backprop

# %%
curves, models = {}, {}
for name, algorithm in ALGORITHMS.items():
    models["resnet", name], curves["resnet", name] = train(resnet, algorithm, epochs=4, lr=5e-3)
    print(f"{name}: {', '.join(f'{accuracy:.1f}' for accuracy in curves['resnet', name])} %")
assert min(curves["resnet", name][-1] for name in ALGORITHMS) > 85

# %%
model = models["resnet", "predictive coding"].train()
F.cross_entropy(model(train_x[:64]), train_y[:64]).backward()  # one more batch, to look inside
relaxation = model.state.relaxation
at_kinks = relaxation.on_kinks
print(f"{relaxation.steps} steps; at rest: {relaxation.settled:.0%} of the images, at a kink: {at_kinks:.0%}")

# %% [markdown]
# There is no step size in these lines. Errors move by conjugate gradients until they rest, at any depth. A ReLU makes
# the gradient jump, so an image may rest at such a *kink*, where the gradient never becomes small. These count apart.
#
# ## 4. A transformer
#
# Sixteen patches of two by two pixels are the tokens. Each attends to all others.


# %%
class Attention(nn.Module):
    """A block with the norms before its parts: attention, and two dense layers for each token."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projected, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widened, self.narrowed = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        parts = self.projected(self.before(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)  # each [batch, heads, tokens, width]
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.mixed(attended.transpose(1, 2).flatten(2))
        return x + self.narrowed(F.gelu(self.widened(self.after(x))))


class Transformer(nn.Module):
    """Images ``[batch, 1, 8, 8]`` to scores ``[batch, 10]``."""

    def __init__(self, width=32):
        super().__init__()
        self.patches, self.places = nn.Conv2d(1, width, 2, 2), nn.Parameter(0.02 * torch.randn(16, width))
        self.block = Attention(width, heads=4)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.block(tokens)).mean(1))


model = torch2ebm.convert(Transformer(), example_inputs=train_x[:64])
print(model.summary())

# %% [markdown]
# A value here has a dimension of tokens, `(64, 16, 32)`, and errors travel from token to token through attention.
# Query, key and value are parts of one value, that of `block.projected`.

# %%
for name, algorithm in ALGORITHMS.items():
    models["transformer", name], curves["transformer", name] = train(Transformer, algorithm, epochs=8, lr=4e-3)
    print(f"{name}: {', '.join(f'{accuracy:.1f}' for accuracy in curves['transformer', name])} %")
assert min(curves["transformer", name][-1] for name in ALGORITHMS) > 85

# %%
figure = Figure(figsize=(9, 3.4), layout="constrained")
for panel, network in zip(figure.subplots(1, 2, sharey=True), ("resnet", "transformer"), strict=True):
    for name, colour, marker in zip(ALGORITHMS, (ORANGE, BLUE), "so", strict=True):
        accuracies = curves[network, name]
        panel.plot(range(1, len(accuracies) + 1), accuracies, color=colour, marker=marker, label=name)
    panel.set(title=network, xlabel="epoch", xticks=range(1, len(accuracies) + 1))
    panel.grid(alpha=0.3)
    panel.legend()
figure.axes[0].set_ylabel("test images right [%]")
figure.savefig(PICTURES / "10_accuracy.png", dpi=150)
show(PICTURES / "10_accuracy.png")

# %% [markdown]
# ## 5. Where the error is
#
# After inference each node keeps what is left of its error. In the ResNet an error is an image with channels. Its
# square, summed over channels, shows which places of a digit have to change for a lower loss.

# %%
model = models["resnet", "predictive coding"].train()
wrong = (test_y + 1) % 10  # the answer that is shown: one more than what is right
F.cross_entropy(model(test_x), wrong).backward()
names = [name for name in model.nodes if model.state.error[name].dim() == 4]
figure = Figure(figsize=(9, 5.2), layout="constrained")
panels = figure.subplots(len(names) + 1, 8)
for column in range(8):
    panels[0, column].imshow(test_x[column, 0], cmap="gray_r")
    panels[0, column].set_title(f"{test_y[column]}, shown {wrong[column]}", fontsize=8)
    for row, name in enumerate(names, start=1):
        panels[row, column].imshow(model.state.error[name][column].square().sum(0).detach(), cmap="viridis")
for panel in panels.flat:
    panel.set(xticks=[], yticks=[])
for row, name in enumerate(["image", *names]):
    panels[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
figure.savefig(PICTURES / "10_errors.png", dpi=150)
show(PICTURES / "10_errors.png")

# %% [markdown]
# ## Where to go from here
#
# - `docs/supported.md` lists more architectures, with the number of their nodes.
# - `docs/choose.md` has measured accuracies of eleven networks, among them ResNet-18, BERT and a GPT.
# - `docs/nodes.md` says how to cut a network in another way.
