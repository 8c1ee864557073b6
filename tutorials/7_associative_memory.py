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
# # 7. Associative memory
#
# A decoder learns 30 images by heart. Then you show it half of one, and it brings back the whole. Nothing is trained
# for this: the pixels that you see are clamped, the others and the latent are free (Salvatori et al. 2021).
#
# You will see
#
# 1. 30 images, learned without a label or an encoder
# 2. the upper or lower half of each image brings back that very image, for all 30
# 3. what noise on the seen pixels does
# 4. what happens with 100 and with 300 images
#
# It runs in less than a minute on one core. As a script it writes its picture to the folder `tutorial_output`, or to
# the one that the environment variable `TUTORIAL_OUTPUT` names.

# %%
import os
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import torch2ebm

PICTURES = Path(os.environ.get("TUTORIAL_OUTPUT", "tutorial_output"))
PICTURES.mkdir(parents=True, exist_ok=True)
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # told apart with any colour vision


def show(path):
    """Show a picture below the cell; a script has only the file."""
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(str(path), width=760))
    else:
        print("picture:", path)


# %% [markdown]
# ## 1. Learning by heart
#
# The decoder goes from 64 latents to 64 pixels. In training `free=["input"]` makes the latents values of their own. The
# zeros that we pass are what a latent is predicted to be. So each batch finds latents first, and then the weights learn
# to predict the images from them.
#
# Half a squared error is the energy of a node with precision 1. We trust pixels ten times as much: `TRUST` stands
# before the loss, and the hidden layer has it as its precision.

# %%
TRUST = 10.0
digits = torch.tensor(load_digits().data, dtype=torch.float32) / 16
shuffled = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(1))]


def memory_of(images, steps):
    """A decoder that has learned some images."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    model = torch2ebm.convert(decoder)
    solver = torch2ebm.ErrorConjugateGradient(tol=0.03, steps=10)
    algorithm = torch2ebm.PredictiveCoding(free=["input"], precisions={"0": TRUST}, solver=solver)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    optimizer = torch2ebm.EnergyOptimizer(optimizer, model, algorithm)
    prior = torch.zeros(len(images), 64)
    energies = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = TRUST * 0.5 * (model(prior) - images).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        energies.append(model.state.relaxation.energy[-1] / len(images))
    optimizer.detach()
    return model, energies


stored = shuffled[:30]
memory, energies = memory_of(stored, steps=300)
print(f"energy of an image: {energies[0]:.1f} at first, {energies[-1]:.2f} after {len(energies)} steps of Adam")

# %% [markdown]
# ## 2. Half an image
#
# The recalled image should be nearer to the right stored image than to any of the 29 others. As a control we leave the
# missing half at the mean of all images, and look for the nearest one in the same way. That finds many: half a digit
# says much. But it has no missing pixels to show.

# %%
rows = torch.arange(8).repeat_interleave(8)
columns = torch.arange(8).repeat(8)
halves = {"upper": rows < 4, "lower": rows >= 4, "left": columns < 4, "right": columns >= 4}


def recall(model, images, seen):
    """The images as the memory completes them."""
    return model.infer(
        clamp={"output": images},
        mask={"output": seen},
        free=["input"],
        prior={"input": torch2ebm.Gaussian()},
        precisions={"0": TRUST, "output": TRUST},
    ).output


def right(found, images):
    """How many are nearest to the image that they come from."""
    return int((torch.cdist(found, images).argmin(1) == torch.arange(len(images))).sum())


for name, seen in halves.items():
    found = recall(memory, stored, seen)
    control = torch.where(seen, stored, stored.mean(0))
    print(f"{name:5} half: {right(found, stored)} of 30 right, {right(control, stored)} without the memory")
    assert right(found, stored) >= (30 if name in ("upper", "lower") else 28)

# %% [markdown]
# From the upper or the lower half all 30 are right. The left halves of two digits can be almost the same, so that one
# of 30 may go wrong there.

# %%
seen = halves["upper"]
found = recall(memory, stored, seen)
error = (found - stored)[:, ~seen].square().mean()
control = (stored.mean(0) - stored)[:, ~seen].square().mean()
print(f"mean squared error of the missing pixels {error:.4f}, of the mean image {control:.4f}")

# %% [markdown]
# ## 3. Noise on what is seen
#
# Now the seen half has noise as well. A pixel is between 0 and 1.

# %%
levels = [0.0, 0.1, 0.2, 0.3, 0.4]


def recalled_with_noise(model, images):
    """The share of images that is recalled at each level of noise."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    return [right(recall(model, images + level * noise, seen), images) / len(images) for level in levels]


shares = {30: recalled_with_noise(memory, stored)}

# %% [markdown]
# ## 4. More images

# %%
for count in (100, 300):
    more = shuffled[:count]
    shares[count] = recalled_with_noise(memory_of(more, steps=100)[0], more)
print("noise      " + "".join(f"{level:7.1f}" for level in levels))
for count, share in shares.items():
    print(f"{count:3} images " + "".join(f"{each:7.0%}" for each in share))

# %%
figure = Figure(figsize=(8.5, 4.4), layout="constrained")
top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.3])
panels = top.subplots(3, 12)
for row, (label, images) in enumerate({"seen": stored * seen, "recalled": found, "stored": stored}.items()):
    for panel, each in zip(panels[row], images, strict=False):
        panel.imshow(each.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        panel.set(xticks=[], yticks=[])
    panels[row, 0].set_ylabel(label, rotation=0, ha="right", va="center")
panel = bottom.subplots()
for (count, share), colour, marker in zip(shares.items(), (BLUE, ORANGE, GREEN), "os^", strict=True):
    panel.plot(levels, [100 * each for each in share], color=colour, marker=marker, label=f"{count} images")
panel.set(xlabel="standard deviation of the noise on the seen pixels", ylabel="recalled (%)", ylim=(0, 105))
panel.grid(alpha=0.3)
panel.legend()
figure.savefig(PICTURES / "7_memory.png", dpi=150)
show(PICTURES / "7_memory.png")

# %% [markdown]
# The memory is a smooth function with 64 latents. It has no 30 separate holes into which everything falls: with noise,
# or with too many images, the best latent makes a mixture.
