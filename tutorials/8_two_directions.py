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
# # 8. Two directions
#
# Two nets stand side by side in one module: one goes up from an image to a label, the other goes down from a label to
# an image. A tie makes their hidden layers one value, which both predict. So the two teach each other, and the same
# module classifies and generates (bidirectional predictive coding, Oliviers et al. 2025).
#
# You will see
#
# 1. the module, and the tie in your own training loop
# 2. what each direction does alone, with the tie and without
# 3. both directions together, where half of the image is missing: the label comes out better
# 4. images from labels
#
# It runs in less than a minute on one core. As a script it writes its picture to the folder `tutorial_output`, or to
# the one that the environment variable `TUTORIAL_OUTPUT` names.

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
# ## 1. The module and the tie
#
# The module takes an image and a label, and returns scores and pixels. The names of arguments and outputs differ, so
# that each is clear in what follows.


# %%
class TwoWays(nn.Module):
    """Up from images ``[batch, 64]`` to scores, down from labels ``[batch, 10]`` to pixels."""

    def __init__(self):
        super().__init__()
        self.up = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        self.down = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64))

    def forward(self, image, label):
        return {"scores": self.up(image), "pixels": self.down(label)}


def half_squared_error(output, target):
    return 0.5 * (output - target).square().sum(1).mean()


TIE = {"down.0": "up.0"}  # the value of down.0 is that of up.0


def trained(clamp, epochs=8):
    """The module after training under a clamp."""
    torch.manual_seed(0)
    net = TwoWays()
    model = torch2ebm.convert(net)
    solver = torch2ebm.ErrorConjugateGradient(tol=0.03, steps=10)
    algorithm = torch2ebm.PredictiveCoding(solver=solver, clamp=clamp)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.Adam(net.parameters(), lr=3e-3), model, algorithm)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(train_y), generator=order).split(64):
            image, label = train_x[batch], F.one_hot(train_y[batch], 10).float()
            optimizer.zero_grad()
            output = model(image, label)
            loss = half_squared_error(output["scores"], label) + half_squared_error(output["pixels"], image)
            loss.backward()
            optimizer.step()
    if clamp:
        assert torch.allclose(model.state.value["down.0"], model.state.value["up.0"])
    optimizer.detach()
    return model


models = {"tied": trained(TIE), "apart": trained({})}
print(models["tied"].summary())

# %% [markdown]
# ## 2. Each direction alone
#
# A forward of `up` classifies, a forward of `down` generates. The image of a label should be the mean of the digits of
# this label, since nothing else of the image is known: the control below is that mean.


# %%
def accuracy(scores):
    return (scores.argmax(1) == test_y).float().mean().item()


def squared_error(images):
    return (images - test_x).square().mean().item()


means = torch.stack([train_x[train_y == digit].mean(0) for digit in range(10)])
for name, model in models.items():
    with torch.no_grad():
        output = model(test_x, F.one_hot(test_y, 10).float())
    print(f"{name}: accuracy {accuracy(output['scores']):.1%}, squared error {squared_error(output['pixels']):.4f}")
print(f"control: squared error of the mean of each class {squared_error(means[test_y]):.4f}")

# %% [markdown]
# ## 3. Both together
#
# Now the lower half of each test image is missing. `up` needs whole images: we give it the mean image there. But `down`
# also says something: a label that explains the seen pixels. So we clamp the seen half of `pixels`, free the label, and
# keep the tie. Its prior is around .1 for each class.

# %%
seen = torch.arange(64) < 32
damaged = torch.where(seen, test_x, train_x.mean(0))


def asked(model, clamp):
    return model.infer(
        damaged,
        clamp={**clamp, "pixels": test_x},
        mask={"pixels": seen},
        free=["label"],
        prior={"label": (torch2ebm.Gaussian(), 0.1)},
    )


for name, clamp in {"tied": TIE, "apart": {}}.items():
    model, found = models[name], asked(models[name], clamp)
    with torch.no_grad():
        up = model(damaged, torch.zeros(len(damaged), 10))["scores"]
    print(
        f"{name}: up alone {accuracy(up):.1%}, down alone or both {accuracy(found.value['label']):.1%}, "
        f"missing pixels {(found.output['pixels'] - test_x)[:, ~seen].square().mean():.4f}"
    )
control = (train_x.mean(0) - test_x)[:, ~seen].square().mean()
print(f"control: the mean image at the missing pixels {control:.4f}")

# %% [markdown]
# Without the tie, the label is found by `down` alone. With it, the label has to fit what `up` makes of the image, too.
# More labels are right than by either direction alone. The missing pixels are no better for it: what `up` makes of a
# damaged image pulls on them, too.
#
# ## 4. Images from labels

# %%
with torch.no_grad():
    images = models["tied"](torch.zeros(10, 64), torch.eye(10))["pixels"]
completed = asked(models["tied"], TIE).output["pixels"]
figure = Figure(figsize=(8.5, 4.4), layout="constrained")
rows = {"from a label": images, "mean of class": means, "seen": test_x * seen, "completed": completed, "whole": test_x}
panels = figure.subplots(len(rows), 10)
for row, (label, shown) in enumerate(rows.items()):
    for panel, each in zip(panels[row], shown, strict=False):
        panel.imshow(each.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        panel.set(xticks=[], yticks=[])
    panels[row, 0].set_ylabel(label, rotation=0, ha="right", va="center")
figure.savefig(PICTURES / "8_two_directions.png", dpi=150)
show(PICTURES / "8_two_directions.png")
