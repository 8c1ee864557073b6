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
# # 9. Monte-Carlo predictive coding
#
# Inference finds the *best* values. With noise in every step, values wander instead, and each is as frequent as it is
# probable: `exp(-F)`. That is Langevin dynamics. In training it gives Monte-Carlo predictive coding (Oliviers et al.
# 2024).
#
# You will see
#
# 1. draws against the posterior of a linear net, which is known exactly
# 2. a variance that sampling learns, and that the best values cannot
# 3. several digits that fit the same half
#
# It runs in less than a minute on one core. As a script it writes its pictures to the folder `tutorial_output`, or to
# the one that the environment variable `TUTORIAL_OUTPUT` names.

# %%
import os
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import torch2ebm
from torch2ebm import theory

PICTURES = Path(os.environ.get("TUTORIAL_OUTPUT", "tutorial_output"))
PICTURES.mkdir(parents=True, exist_ok=True)
BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart with any colour vision


def show(path):
    """Show a picture below the cell; a script has only the file."""
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(str(path), width=760))
    else:
        print("picture:", path)


# %% [markdown]
# ## 1. Draws against the exact posterior
#
# A linear decoder has two latents and three outputs. We clamp the output, and ask what the latents were. For linear
# nets `torch2ebm.theory` knows the answer: a normal distribution. 2,000 chains run beside each other, and of each we
# take the last value.

# %%
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))
for layer in net:
    layer.weight.data.mul_(2)  # so that the output says more of the latents than at first
model = torch2ebm.convert(net, example_inputs=torch.zeros(1, 2))
data = torch.tensor([[1.0, -1.0, 2.0]])
sampler = torch2ebm.Langevin(steps=600, burn_in=599, lr=0.01, chains=2000)
prior = {"input": torch2ebm.Gaussian()}
found = model.infer(clamp={"output": data}, free=["input"], prior=prior, solver=sampler)
draws = found.samples["input"][-1, :, 0]  # [draws, chains, batch, 2]

exact = theory.LinearGaussian.of(net, prior=(0.0, 1.0)).posterior({"1": data})
mean, covariance = exact.mean["input"][0].float(), exact.covariance_of("input").float()
print("mean        drawn", [f"{each:+.3f}" for each in draws.mean(0)], " exact", [f"{each:+.3f}" for each in mean])
of_draws = torch.cov(draws.T)
for i, j in ((0, 0), (1, 1), (0, 1)):
    print(f"covariance {i}{j}: drawn {of_draws[i, j]:+.3f}  exact {covariance[i, j]:+.3f}")
assert (draws.mean(0) - mean).abs().max() < 0.15
assert (of_draws - covariance).abs().max() < 0.15  # standard errors are about 0.03

# %% [markdown]
# ## 2. A variance that the best values cannot learn
#
# One latent, one weight: `x = w z + noise`. The model's variance is $1 + w^2$, and the data have variance 5, so that
# $w = 2$. Training on the best latent of each sample makes $w$ grow without end: a larger weight lets the latent be
# smaller, and the prior cheaper. The gradient lacks what the width of the posterior costs. Draws have it.

# %%
torch.manual_seed(0)
toy = torch.randn(512, 1) * 5**0.5


def variances(solver):
    """The model's variance after each step of training."""
    torch.manual_seed(1)
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1.0)
    model = torch2ebm.convert(nn.Sequential(net))
    algorithm = torch2ebm.PredictiveCoding(free=["input"], solver=solver)
    optimizer = torch2ebm.EnergyOptimizer(torch.optim.SGD(net.parameters(), lr=0.3), model, algorithm)
    found = []
    for _ in range(120):
        optimizer.zero_grad()
        (model(torch.zeros(512, 1)) - toy).square().mul(0.5).mean().backward()
        optimizer.step()
        found.append(1 + net.weight.item() ** 2)
    return found


best = torch2ebm.ErrorConjugateGradient(tol=1e-4, steps=20)
noisy = torch2ebm.Langevin(steps=60, lr=0.05, burn_in=40, thinning=5)
learned = {"best values": variances(best), "draws": variances(noisy)}
real = toy.square().mean().item()
for name, curve in learned.items():
    print(f"variance learned from {name:11}: {curve[-1]:5.2f}, of the data {real:.2f}")
assert abs(learned["draws"][-1] - real) < 0.2 * real < 0.5 * real < learned["best values"][-1] - real

# %%
figure = Figure(figsize=(8.5, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
left.plot(*draws.T, ".", color=BLUE, markersize=2, alpha=0.4, label="draws")
angle = torch.linspace(0, 2 * torch.pi, 100)
circle = torch.stack([angle.cos(), angle.sin()])
for radius in (1, 2):
    ring = mean[:, None] + radius * torch.linalg.cholesky(covariance) @ circle
    left.plot(*ring, color=ORANGE, label="exact: 1 and 2 standard deviations" if radius == 1 else None)
left.set(xlabel="latent 1", ylabel="latent 2", title="posterior of a linear net")
for (name, curve), colour, line in zip(learned.items(), (ORANGE, BLUE), ("--", "-"), strict=True):
    right.plot(curve, color=colour, linestyle=line, label=f"trained on {name}")
right.axhline(real, color="black", linewidth=1, linestyle=":", label="variance of the data")
right.set(xlabel="step of training", ylabel="variance of the model", title="one latent, one weight")
for panel in (left, right):
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
figure.savefig(PICTURES / "9_posterior.png", dpi=150)
show(PICTURES / "9_posterior.png")

# %% [markdown]
# ## 3. Digits
#
# A decoder is trained on digits as in tutorial 6, and half of a test image is missing. The best latent gives one image.
# Chains give several: each image below is decoded from the latent at which another chain has ended. They begin at the
# best latent. `lr="auto"` takes a tenth of the largest stable step.

# %%
TRUST, LATENTS = 20.0, 8
digits = torch.tensor(load_digits().data, dtype=torch.float32) / 16
train_x, test_x = digits[:1400], digits[1400:1480]
torch.manual_seed(0)
decoder = nn.Sequential(nn.Linear(LATENTS, 64), nn.ReLU(), nn.Linear(64, 64))
model = torch2ebm.convert(decoder)
algorithm = torch2ebm.PredictiveCoding(
    free=["input"], precisions={"0": TRUST}, solver=torch2ebm.ErrorConjugateGradient(tol=0.05, steps=10)
)
optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3, weight_decay=0.3)
optimizer = torch2ebm.EnergyOptimizer(optimizer, model, algorithm)
for _ in range(10):
    for batch in torch.randperm(len(train_x)).split(64):
        optimizer.zero_grad()
        error = (model(torch.zeros(len(batch), LATENTS)) - train_x[batch]).square().sum(1).mean()
        (TRUST * 0.5 * error).backward()
        optimizer.step()
optimizer.detach()

seen = torch.arange(64) < 32
question = {
    "clamp": {"output": test_x},
    "mask": {"output": seen},
    "free": ["input"],
    "prior": prior,
    "precisions": {"0": TRUST, "output": TRUST},
}
best_latent = model.infer(**question).input
sampler = torch2ebm.Langevin(steps=1500, burn_in=1499, lr="auto", chains=16)
latents = model.infer(**question, start={"input": best_latent}, solver=sampler).samples["input"][-1]
with torch.no_grad():
    one, many = decoder(best_latent), decoder(latents)  # [80, 64] and [16, 80, 64]
missing = (test_x - one)[:, ~seen]
mean_error = (test_x - many.mean(0))[:, ~seen]
at_missing, at_seen = many.std(0)[:, ~seen].mean(), many.std(0)[:, seen].mean()
print(f"squared error of the missing pixels: best latent {missing.square().mean():.4f}, mean of the draws", end=" ")
print(f"{mean_error.square().mean():.4f}, mean image {(test_x - train_x.mean(0))[:, ~seen].square().mean():.4f}")
print(f"standard deviation between chains: {at_missing:.3f} at missing pixels, {at_seen:.3f} at seen ones")

# %%
rows = {"seen": test_x * seen, "best": one, **{f"draw {i + 1}": many[i] for i in range(3)}, "whole": test_x}
figure = Figure(figsize=(8.5, 5.2), layout="constrained")
panels = figure.subplots(len(rows), 10)
for row, (label, shown) in enumerate(rows.items()):
    for panel, each in zip(panels[row], shown, strict=False):
        panel.imshow(each.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        panel.set(xticks=[], yticks=[])
    panels[row, 0].set_ylabel(label, rotation=0, ha="right", va="center")
figure.savefig(PICTURES / "9_digits.png", dpi=150)
show(PICTURES / "9_digits.png")

# %% [markdown]
# Chains agree more where pixels are seen, and part where they are missing: a half that can be a 2 or a 7 becomes both.
# By squared error the best latent is the better single guess, also better than the mean of 16 draws.
#
# Could this decoder be trained on draws, as the toy was? The call is the same. But pixels hold the values so tightly
# that a stable step is about a thousandth. Chains of some ten steps stay where they begin, and a `StepSizeWarning` says
# so. Thousands of steps for each batch would be needed.
