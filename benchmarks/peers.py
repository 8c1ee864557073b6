"""Other libraries on the same weights, batch, loss and step size; each is left out, with a line, where it is missing.

- PCX (PyPI: ``pcx``; it brings JAX): strict predictive coding in one ``jit``. Its energy sums over the batch, with the
  cross-entropy of the sample as it is, which is ``loss_reduction="mean"`` here; its gradients are sums over the batch,
  divided by the batch size in the adapter.
- Torch2PC (no package: ``--torch2pc path/to/TorchSeq2PC.py``, or that file on the path): ``PCInfer`` with the
  cross-entropy summed, its gradients divided in the same way. Its Strict updates and counts steps in its own manner, so
  it is held against ``torch2ebm.torch2pc``, which does the same, and Exact against backprop.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from contenders import Gradients, chain_of, relative_error, strict_by_hand
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from torch2ebm import torch2pc


class NotInstalledError(Exception):
    """The peer is not there."""


@dataclass(frozen=True)
class PeerProgram:
    """One gradient by another library, and what it has to agree with."""

    run: Callable[[], Gradients]
    expected: Callable[[], Gradients]

    def disagreement(self) -> float:
        return relative_error(self.run(), self.expected())


def peer_programs(
    net: nn.Sequential, x: Tensor, y: Tensor, steps: int, lr: float, torch2pc_file: Path | None = None
) -> dict[str, PeerProgram]:
    """The programs of every peer that is installed; one line on standard output for each that is not."""
    found: dict[str, PeerProgram] = {}
    for name, make in (
        ("PCX", lambda: pcx_programs(net, x, y, steps, lr)),
        ("Torch2PC", lambda: torch2pc_programs(net, x, y, steps, lr, torch2pc_file)),
    ):
        try:
            found.update(make())
        except NotInstalledError as error:
            print(f"{name}: not installed ({error})", flush=True)
    return found


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalledError(str(error)) from error


# PCX ------------------------------------------------------------------------------------------------------------------


def pcx_programs(net: nn.Sequential, x: Tensor, y: Tensor, steps: int, lr: float) -> dict[str, PeerProgram]:
    """Strict predictive coding by PCX, all steps and the weights' gradients in one jit."""
    for name in ("jax", "optax", "pcx"):
        _imported(name)
    run = _pcx_gradient(net, x, y, steps, lr)
    return {"PCX strict, one jit": PeerProgram(run, lambda: strict_by_hand(net, x, y, steps, lr))}


def _pcx_gradient(net: nn.Sequential, x: Tensor, y: Tensor, steps: int, lr: float) -> Callable[[], Gradients]:
    jax, optax = _imported("jax"), _imported("optax")
    pxc, pxf, pxnn, pxu = (_imported(f"pcx.{part}") for part in ("predictive_coding", "functional", "nn", "utils"))
    model = _pcx_model(net)
    values = pxu.M(pxc.VodeParam | pxc.VodeParam.Cache).to((None, 0))
    free = pxu.M_hasnot(pxc.VodeParam, frozen=True)
    descent = pxu.Optim(lambda: optax.sgd(lr))

    @pxf.vmap(values, in_axes=(0, 0), out_axes=0)  # type: ignore[untyped-decorator]
    def start(x: Any, y: Any, *, model: Any) -> Any:
        return model(x, y)

    @pxf.vmap(values, in_axes=(0,), out_axes=(None, 0), axis_name="batch")  # type: ignore[untyped-decorator]
    def energy(x: Any, *, model: Any) -> Any:
        prediction = model(x)
        return jax.lax.psum(model.energy(), "batch"), prediction

    @pxf.jit()  # type: ignore[untyped-decorator]
    def gradient(x: Any, y: Any, *, model: Any, descent: Any) -> Any:
        with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
            start(x, y, model=model)
        descent.init(free(model))
        for _ in range(steps):
            with pxu.step(model, clear_params=pxc.VodeParam.Cache):
                _, found = pxf.value_and_grad(free.to([False, True]), has_aux=True)(energy)(x, model=model)
            descent.step(model, found["model"])
        with pxu.step(model, clear_params=pxc.VodeParam.Cache):
            mask = pxu.M(pxnn.LayerParam).to([False, True])
            _, found = pxf.value_and_grad(mask, has_aux=True)(energy)(x, model=model)
        descent.clear()
        model.clear_params(pxc.VodeParam)
        layers = [layer for layer in found["model"].layers if hasattr(layer.nn, "weight")]
        return [each.get() / len(x) for layer in layers for each in (layer.nn.weight, layer.nn.bias)]

    inputs = jax.numpy.asarray(x.numpy())
    targets = jax.nn.one_hot(jax.numpy.asarray(y.numpy()), 10)
    shapes = [parameter.shape for parameter in net.parameters()]

    def run() -> Gradients:
        found = jax.block_until_ready(gradient(inputs, targets, model=model, descent=descent))
        return [from_dlpack(each).reshape(shape) for each, shape in zip(found, shapes, strict=True)]

    return run


def _pcx_model(net: nn.Sequential) -> Any:
    """The same layers with the same weights; a vode wherever a chain of nodes is cut."""
    jax, pxc = _imported("jax"), _imported("pcx.predictive_coding")
    blocks = chain_of(net)

    class Model(pxc.EnergyModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = [_pcx_layer(module) for block in blocks for module in block if type(module) not in _FUNCTIONS]
            self.vodes = [pxc.Vode() for _ in blocks[:-1]] + [pxc.Vode(pxc.ce_energy)]
            self.vodes[-1].h.frozen = True

        def __call__(self, x: Any, y: Any = None) -> Any:
            layers = iter(self.layers)
            for block, vode in zip(blocks, self.vodes, strict=True):
                for module in block:
                    function = _FUNCTIONS.get(type(module))
                    x = next(layers)(x) if function is None else function(jax)(x)
                x = vode(x)
            if y is not None:
                self.vodes[-1].set("h", y)
            return self.vodes[-1].get("u")

    return Model()


_FUNCTIONS: Mapping[type, Callable[[Any], Callable[[Any], Any]]] = {
    nn.Tanh: lambda jax: jax.nn.tanh,
    nn.ReLU: lambda jax: jax.nn.relu,
    nn.Flatten: lambda jax: jax.numpy.ravel,  # of one sample: the batch is mapped over
}


def _pcx_layer(module: nn.Module) -> Any:
    """The layer of PCX, with the module's weights."""
    jax, pxnn = _imported("jax"), _imported("pcx.nn")
    if isinstance(module, nn.MaxPool2d):
        return pxnn.MaxPool2d(module.kernel_size, module.stride)
    if isinstance(module, nn.Linear):
        layer = pxnn.Linear(module.in_features, module.out_features)
    else:
        assert isinstance(module, nn.Conv2d)
        kernel, padding = module.kernel_size, module.padding
        layer = pxnn.Conv2d(module.in_channels, module.out_channels, kernel, padding=padding)
    layer.nn.weight.set(jax.numpy.asarray(module.weight.detach().numpy()))
    assert module.bias is not None
    bias = jax.numpy.asarray(module.bias.detach().numpy())
    layer.nn.bias.set(bias.reshape(layer.nn.bias.get().shape))
    return layer


# Torch2PC -------------------------------------------------------------------------------------------------------------

NAMES = ("TorchSeq2PC", "Torch2PC")  # of its file, without the suffix


def torch2pc_programs(
    net: nn.Sequential, x: Tensor, y: Tensor, steps: int, lr: float, file: Path | None = None
) -> dict[str, PeerProgram]:
    """Its three kinds of errors."""
    infer = _torch2pc(file).PCInfer
    layers = nn.Sequential(*chain_of(net))  # it takes every child for one layer

    def run(infer: Callable[..., object], kind: str) -> Gradients:
        infer(layers, nn.CrossEntropyLoss(reduction="sum"), x, y, kind, lr, steps)
        return [p.grad / len(x) for p in net.parameters() if p.grad is not None]

    def backprop() -> Gradients:
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    found = {
        f"Torch2PC {kind}": PeerProgram(partial(run, infer, kind), partial(run, torch2pc.PCInfer, kind))
        for kind in ("Strict", "FixedPred")
    }
    return {**found, "Torch2PC Exact": PeerProgram(partial(run, infer, "Exact"), backprop)}


def _torch2pc(file: Path | None) -> ModuleType:
    if file is None:
        for name in NAMES:
            if importlib.util.find_spec(name) is not None:
                return importlib.import_module(name)
        raise NotInstalledError(f"no {' and no '.join(NAMES)} on the path, and no --torch2pc FILE")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.exists():
        raise NotInstalledError(f"no Python file at {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
