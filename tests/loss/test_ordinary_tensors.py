"""What comes out of ``model(x)`` is an ordinary tensor in everything that is no step to a loss."""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import attached
from torch import Tensor, nn

import torch2ebm
from torch2ebm.loss.tape import Tape

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def output() -> Tensor:
    return attached(net(), torch2ebm.PredictiveCoding(3, 0.1))(X)  # type: ignore[no-any-return]


def saved(tensor: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save({"logits": tensor}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["logits"]  # type: ignore[no-any-return]


READ: dict[str, Callable[[Tensor], Any]] = {
    "an accuracy in percent": lambda o: f"{(o.argmax(1) == Y).float().mean():.2%}",
    "a loss in a progress bar": lambda o: f"{F.cross_entropy(o, Y):.3f}",
    "a confidence": lambda o: f"{o.detach().softmax(1).max():.3f}",
    "str and repr": lambda o: (str(o.detach()), repr(F.cross_entropy(o, Y).detach())),
    "repr with its history": lambda o: repr(F.cross_entropy(o, Y)).split("grad_fn")[0],
    "item": lambda o: F.cross_entropy(o, Y).item(),
    "numpy": lambda o: o.detach().numpy().tolist(),
    "numpy's functions": lambda o: np.asarray(o.detach()).mean().item(),
    "a list": lambda o: o.tolist(),
    "comparisons": lambda o: bool(F.cross_entropy(o, Y) > 0.5),
    "length and iteration": lambda o: (len(o), [row.shape for row in o]),
    "a histogram": lambda o: torch.histc(o.detach()).tolist(),
    "the best two": lambda o: o.detach().topk(2).values.tolist(),
    "a round number": lambda o: round(o.detach().mean().item(), 4),
    "an int": lambda o: int(o.detach().mean() * 1000),
    "saved": lambda o: saved(o.detach()).tolist(),
    "saved with its history": lambda o: saved(o).tolist(),
    "pickled": lambda o: pickle.loads(pickle.dumps(o.detach())).tolist(),
    "copied": lambda o: copy.deepcopy(o.detach()).tolist(),
    "a dictionary's key": lambda o: {o: 1}[o],
    "moved": lambda o: o.detach().to(torch.float64).cpu().tolist(),
    "dlpack": lambda o: torch.from_dlpack(o.detach()).tolist(),
    "torch.func": lambda o: torch.func.vmap(lambda row: row.exp().sum())(o.detach()).tolist(),
    "a jacobian of its copy": lambda o: torch.func.jacrev(lambda v: v.square().sum())(o.detach()).tolist(),
}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_it_reads_as_the_module_s_own_output(read: Callable[[Tensor], Any]) -> None:
    assert read(output()) == read(net()(X))


LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda o: o.detach(),
    "torch.detach": torch.detach,
    "a detached mean": lambda o: o.detach().mean(0),
    "a detached loss": lambda o: F.cross_entropy(o, Y).detach(),
    "saved": lambda o: saved(o.detach()),
    "saved with its history": saved,
    "pickled": lambda o: pickle.loads(pickle.dumps(o.detach())),
    "pickled without gradients": lambda o: pickle.loads(pickle.dumps((o > 0).float())),
    "copied": lambda o: copy.deepcopy(o.detach()),
    "classes": lambda o: (o.argmax(1) == Y).sum(),
}


@pytest.mark.parametrize("leave", LEFT.values(), ids=LEFT)
def test_nothing_of_the_tape_leaks(leave: Callable[[Tensor], Tensor]) -> None:
    assert type(leave(output())) is Tensor


def test_on_the_way_to_a_loss_it_is_on_the_tape() -> None:
    """The negative twin."""
    assert type(output() + 1) is not Tensor


def tapes() -> int:
    gc.collect()
    return sum(type(each) is Tape for each in gc.get_objects())


def test_running_means_keep_no_call_alive() -> None:
    before = tapes()
    model = attached(net(), torch2ebm.PredictiveCoding(3, 0.1))
    losses, accuracy = torch.zeros(()), torch.zeros(())
    for _ in range(3):
        predicted = model(X)
        loss = F.cross_entropy(predicted, Y)
        loss.backward()
        losses += loss.detach()
        accuracy = 0.9 * accuracy + 0.1 * (predicted.argmax(1) == Y).float().mean()
        del predicted, loss
    assert type(losses) is Tensor and not accuracy.requires_grad
    assert tapes() == before


def test_a_buffer_made_of_an_output_is_copied_and_saved() -> None:
    module = nn.Module()
    module.register_buffer("mean", output().detach().mean(0))
    assert type(copy.deepcopy(module).mean) is Tensor
    assert type(saved(module.state_dict()["mean"])) is Tensor
