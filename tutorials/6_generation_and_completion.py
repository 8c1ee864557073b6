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
# # 6. Generation and completion
#
# A decoder goes from a few numbers, the *latent*, to an image. Nobody gives it latents in training: each batch finds
# its own by inference, and then the weights learn to predict the images from them. Afterwards the same model makes
# images and restores missing pixels. A second net goes from labels to images, and is asked for labels.
#
# You will see
#
# 1. a decoder trained without labels and without an encoder
# 2. missing pixels of test images, and how good they are against three controls
# 3. new images from drawn latents
# 4. a net from labels to images: it generates, and by inference it classifies
#
# It runs in less than a minute on one core. As a script it writes its pictures to the folder `tutorial_output`, or to
# the one that the environment variable `TUTORIAL_OUTPUT` names.

# %%
import os
from pathlib import Path

import torch
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


def gallery(name, rows):
    """A picture of rows of images, each with its label."""
    figure = Figure(figsize=(8.5, 0.88 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 10)
    for row, (label, images) in enumerate(rows.items()):
        for panel, each in zip(panels[row], images, strict=False):
            panel.imshow(each.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[])
        panels[row, 0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(PICTURES / name, dpi=150)
    show(PICTURES / name)


# %% [markdown]
# ## 1. Latents that nobody gives
#
# `free=["input"]` makes the input a value of its own. What you pass is what it is predicted to be: zeros are a prior
# around zero. The loss is half a squared error, times a precision of 20: we trust a pixel to about 1 over the root of
# 20.
#
# Weight decay matters here. Inference takes the *best* latent of each image, and larger weights make smaller latents
# good enough. Without decay the latents shrink, and the prior says nothing any more.

# %%
TRUST, LATENTS = 20.0, 8


def train(net, algorithm, loss_of, epochs, decay):
    """Any net in an ordinary loop; returns the converted model, and the energy of an image in each epoch."""
    model = torch2ebm.convert(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=decay)
    optimizer = torch2ebm.EnergyOptimizer(optimizer, model, algorithm)
    order, energies = torch.Generator().manual_seed(0), []
    for _ in range(epochs):
        energies.append(0.0)
        for batch in torch.randperm(len(train_y), generator=order).split(64):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            energies[-1] += model.state.relaxation.energy[-1] / len(train_y)
    optimizer.detach()
    return model, energies


def image_error(output, batch):
    return TRUST * 0.5 * (output - train_x[batch]).square().sum(1).mean()


solver = torch2ebm.ErrorConjugateGradient(tol=0.05, steps=10)
precisions = {"0": TRUST}
torch.manual_seed(0)
decoder = nn.Sequential(nn.Linear(LATENTS, 64), nn.ReLU(), nn.Linear(64, 64))
model, energies = train(
    decoder,
    torch2ebm.PredictiveCoding(free=["input"], precisions=precisions, solver=solver),
    lambda model, batch: image_error(model(torch.zeros(len(batch), LATENTS)), batch),
    epochs=12,
    decay=0.3,
)
print("energy of an image by epoch:", " ".join(f"{energy:.1f}" for energy in energies))

# %% [markdown]
# ## 2. Missing pixels
#
# The seen pixels are clamped, the others and the latent are free. The controls know the training images, too: their
# mean, the most similar of them, and the best guess of a normal distribution with their mean and covariance. The last
# one is hard to beat: it is made for the squared error.

# %%
prior = {"input": torch2ebm.Gaussian()}
precisions = {"0": TRUST, "output": TRUST}
upper = (torch.arange(64) < 32).expand(test_x.shape)
scattered = torch.rand(test_x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
mean, covariance = train_x.mean(0), torch.cov(train_x.T) + 1e-3 * torch.eye(64)


def nearest(image, seen):
    return train_x[(train_x - image)[:, seen].square().sum(1).argmin()]


def normal(image, seen):
    weights = torch.linalg.solve(covariance[seen][:, seen], (image - mean)[seen])
    return mean + covariance[:, seen] @ weights


completed = {}
for name, seen in {"lower half": upper, "every second": scattered}.items():
    found = model.infer(
        clamp={"output": test_x}, mask={"output": seen}, free=["input"], prior=prior, precisions=precisions
    )
    assert torch.equal(found.output[seen], test_x[seen])  # what was given stays
    guesses = {"the decoder": found.output, "mean image": mean.expand(test_x.shape)}
    for control in (nearest, normal):
        guesses[control.__name__] = torch.stack([control(*pair) for pair in zip(test_x, seen, strict=True)])
    errors = {guess: (images - test_x)[~seen].square().mean().item() for guess, images in guesses.items()}
    print(f"{name:12} missing, squared error: " + ", ".join(f"{key} {value:.4f}" for key, value in errors.items()))
    assert errors["the decoder"] < errors["mean image"]
    completed[name] = torch.where(seen, test_x, 0.0), found.output

# %%
gallery(
    "6_completion.png",
    {
        "half seen": completed["lower half"][0],
        "completed": completed["lower half"][1],
        "some seen": completed["every second"][0],
        "completed again": completed["every second"][1],
        "whole": test_x,
    },
)

# %% [markdown]
# Scattered pixels come back well. A missing half is another matter. Where several digits fit, one latent has to stand
# for them all, and the result is a blend. The decoder beats the mean image by a quarter there, and by half on scattered
# pixels. It does not beat the other two controls, which look at all training images anew. It has 64 hidden units.
#
# ## 3. New images
#
# The latents that inference finds are narrower than their prior, so we draw from a normal distribution with *their*
# mean and covariance. A forward of the decoder then makes an image.

# %%
latents = model.infer(clamp={"output": train_x}, free=["input"], prior=prior, precisions=precisions).input
print(f"standard deviation of the latents {latents.std():.2f}, of the prior 1")
drawn = torch.distributions.MultivariateNormal(latents.mean(0), torch.cov(latents.T))
with torch.no_grad():
    dreams = decoder(drawn.sample((1000,)))
spread, real = dreams.std(0).mean(), train_x.std(0).mean()
print(f"standard deviation of a pixel: {spread:.3f} over new images, {real:.3f} over real ones")

# %% [markdown]
# ## 4. From labels to images, and back
#
# The same loop with labels as inputs: nothing is free. The net can only learn the mean image of each class.
#
# To ask it for the label of an image, you free the input. The control is the class whose mean is nearest. More than
# that the net cannot know.

# %%
torch.manual_seed(0)
one_hot = torch.eye(10)
painter = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64))
labelled, _ = train(
    painter,
    torch2ebm.PredictiveCoding(precisions={"0": TRUST}, solver=solver, nudging=torch2ebm.OneSided()),
    lambda model, batch: image_error(model(one_hot[train_y[batch]]), batch),
    epochs=6,
    decay=0.0,
)
means = torch.stack([train_x[train_y == digit].mean(0) for digit in range(10)])
with torch.no_grad():
    painted = painter(one_hot)
print(f"squared distance of a painted image to the mean of its class: {(painted - means).square().mean():.4f}")

asked = labelled.infer(
    clamp={"output": test_x}, free=["input"], prior={"input": (torch2ebm.Gaussian(5.0), 0.1)}, precisions=precisions
)
right = (asked.input.argmax(1) == test_y).float().mean().item()
control = (torch.cdist(test_x, means).argmin(1) == test_y).float().mean().item()
print(f"labels by inference: {right:.1%} right; by the nearest mean: {control:.1%}")

# %%
gallery(
    "6_generation.png", {"drawn": dreams[:10], "drawn again": dreams[10:20], "from labels": painted, "means": means}
)
