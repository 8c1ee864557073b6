"""``python website/picture.py`` draws the picture of the first page anew: an energy that relaxes."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import torch2ebm

TARGET = Path(__file__).parents[1] / "docs" / "pictures" / "relaxation.svg"
DEPTH, STEPS = 6, 40


def main() -> None:
    torch.manual_seed(0)
    hidden = [part for _ in range(DEPTH - 1) for part in (nn.Linear(32, 32), nn.Tanh())]
    net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), *hidden, nn.Linear(32, 4))
    x, y = torch.randn(64, 20), torch.randint(0, 4, (64,))
    model = torch2ebm.convert(net)
    algorithm = torch2ebm.PredictiveCoding(steps=STEPS, lr=0.3)
    energies, sizes = [], []
    warnings.simplefilter("ignore", torch2ebm.errors.NoSignalWarning)  # of the first steps: that is what is shown
    for steps in range(1, STEPS + 1):
        model.attach(algorithm.with_steps(steps))
        F.cross_entropy(model(x), y).backward()
        energies.append([float(energy) / len(x) for energy in model.state.relaxation.energy])
        sizes.append([float(model.state.error[name].norm()) for name in list(model.nodes)[:DEPTH]])
        model.detach()
    draw(energies[-1], torch.tensor(sizes).T)


def draw(energy: list[float], sizes: torch.Tensor) -> None:
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(len(energy)), energy, color="#0072B2", linewidth=2)
    left.set(xlabel="inference step", ylabel="energy of a sample", title="values move until the energy is lowest")
    left.spines[["top", "right"]].set_visible(False)
    extent = (0.5, STEPS + 0.5, 0.5, DEPTH + 0.5)
    reached = sizes.where(sizes > 0, torch.nan).log10()
    shown = right.imshow(reached, aspect="auto", cmap="viridis", origin="lower", extent=extent)
    right.set(xlabel="inference step", title="the error travels to the input (white: none yet)")
    right.set_yticks([1, DEPTH], ["first layer", "last hidden layer"])
    figure.colorbar(shown, ax=right, label="log10 of error")
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
