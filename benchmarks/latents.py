"""Latent values of 64 digits in a decoder of three layers: ``model.infer`` beside PCX, the same steps of descent.

    python benchmarks/latents.py [--json FILE]

The energy is half of all squared errors, of the latent value around zero, too. Both libraries take as many steps of
gradient descent on the values as it takes until no entry of dF/dv exceeds 0.01, and have to end at the same values.
PCX (PyPI: ``pcx``) runs all steps in one ``jit`` by its ``scan``; it is left out, with a line, where it is missing.
Times are processor times of one thread, each program in turn.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import torch
from measure import interleaved
from sklearn.datasets import load_digits
from torch import Tensor, nn

import torch2ebm

RESIDUAL, LR, LATENT = 0.01, 0.1, 16
Infer = Callable[[], Tensor]  # the latent values


def decoder(hidden: int) -> nn.Sequential:
    """Three layers, from a latent value to an image."""
    torch.manual_seed(0)
    sizes = [LATENT, hidden, hidden]
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(hidden, 64))


def ours(net: nn.Sequential, images: Tensor, solver: torch2ebm.Solver[Any], compile: bool = False) -> Any:
    """``model.infer`` as a function without arguments, whose result has ``input`` and ``relaxation``."""
    model, start = torch2ebm.convert(net), torch.zeros(len(images), LATENT)
    prior = {"input": torch2ebm.Gaussian()}
    return lambda: model.infer(
        start, clamp={"output": images}, free=["input"], prior=prior, solver=solver, compile=compile
    )


def pcx(net: nn.Sequential, images: Tensor, steps: int) -> Infer:
    """The same by PCX. Raises :class:`ImportError` where it is not installed."""
    jax, optax = (importlib.import_module(name) for name in ("jax", "optax"))
    pxc, pxf, pxnn, pxu = (
        importlib.import_module(f"pcx.{part}") for part in ("predictive_coding", "functional", "nn", "utils")
    )
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]

    class Model(pxc.EnergyModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = [pxnn.Linear(layer.in_features, layer.out_features) for layer in linear]
            self.vodes = [pxc.Vode() for _ in range(len(linear) + 1)]
            self.vodes[-1].h.frozen = True
            for own, theirs in zip(linear, self.layers, strict=True):
                theirs.nn.weight.set(jax.numpy.asarray(own.weight.detach().numpy()))
                theirs.nn.bias.set(jax.numpy.asarray(own.bias.detach().numpy()))

        def __call__(self, x: Any, y: Any = None) -> Any:
            x = self.vodes[0](x)
            for i, (layer, vode) in enumerate(zip(self.layers, self.vodes[1:], strict=True)):
                x = vode(layer(x) if i == len(linear) - 1 else jax.nn.tanh(layer(x)))
            if y is not None:
                self.vodes[-1].set("h", y)
            return self.vodes[-1].get("u")

    model, descent = Model(), pxu.Optim(lambda: optax.sgd(LR))
    values = pxu.M(pxc.VodeParam | pxc.VodeParam.Cache).to((None, 0))
    free = pxu.M_hasnot(pxc.VodeParam, frozen=True)

    @pxf.vmap(values, in_axes=(0, 0), out_axes=0)  # type: ignore[untyped-decorator]
    def put(x: Any, y: Any, *, model: Any) -> Any:
        return model(x, y)

    @pxf.vmap(values, in_axes=(0,), out_axes=(None, 0), axis_name="batch")  # type: ignore[untyped-decorator]
    def energy(x: Any, *, model: Any) -> Any:
        prediction = model(x)
        return jax.lax.psum(model.energy(), "batch"), prediction

    def step(number: Any, x: Any, *, model: Any, descent: Any) -> Any:
        with pxu.step(model, clear_params=pxc.VodeParam.Cache):
            _, found = pxf.value_and_grad(free.to([False, True]), has_aux=True)(energy)(x, model=model)
        descent.step(model, found["model"])
        return x, None

    @pxf.jit()  # type: ignore[untyped-decorator]
    def relaxed(x: Any, y: Any, *, model: Any, descent: Any) -> None:
        with pxu.step(model, (pxc.STATUS.INIT, None), clear_params=pxc.VodeParam.Cache):
            put(x, y, model=model)
        pxf.scan(step, xs=jax.numpy.arange(steps))(x, model=model, descent=descent)

    inputs, targets = jax.numpy.zeros((len(images), LATENT)), jax.numpy.asarray(images.numpy())
    with pxu.step(model, (pxc.STATUS.INIT, None), clear_params=pxc.VodeParam.Cache):
        put(inputs, targets, model=model)
    descent.init(free(model))

    def run() -> Tensor:
        relaxed(inputs, targets, model=model, descent=descent)
        return torch.from_numpy(jax.device_get(jax.block_until_ready(model.vodes[0].h.get())).copy())

    return run


def rows_of(hidden: int, rounds: int = 15) -> list[dict[str, Any]]:
    """Milliseconds of each program, and how far its latent values are from those of eager steps."""
    net = decoder(hidden)
    images = torch.tensor(load_digits().data[:64] / 16, dtype=torch.float32)
    descent = torch2ebm.GradientDescent(2000, LR, tol=RESIDUAL)
    steps = ours(net, images, descent)().relaxation.steps
    fixed = torch2ebm.GradientDescent(steps, LR)
    programs: dict[str, Callable[[], Any]] = {
        "torch2ebm, `GradientDescent`, eager": ours(net, images, fixed),
        "torch2ebm, `GradientDescent`, compiled": ours(net, images, fixed, compile=True),
        "torch2ebm, `GradientDescent(tol=0.01)`, compiled": ours(net, images, descent, compile=True),
        "torch2ebm, no solver given, `tol=0.01`": ours(net, images, torch2ebm.ErrorConjugateGradient(tol=RESIDUAL)),
    }
    try:
        programs["PCX, one `jit`"] = pcx(net, images, steps)
    except ImportError as error:
        print(f"PCX: not installed ({error})")
    expected = programs["torch2ebm, `GradientDescent`, eager"]().input
    first = {}
    for name, program in programs.items():
        start = time.perf_counter()
        program()
        first[name] = time.perf_counter() - start
    timings = interleaved(programs, next(iter(programs)), rounds, clock=time.process_time)
    found = []
    for name, program in programs.items():
        result = program()
        latent = result if isinstance(result, Tensor) else result.input
        count = steps if isinstance(result, Tensor) else result.relaxation.steps
        distance = float((latent - expected).abs().max())
        row = {"program": name, "hidden": hidden, "steps": count, "milliseconds": timings[name].milliseconds}
        found.append({**row, "first_seconds": first[name], "distance": distance})
        print(f"{name:52} {hidden:4} {count:4} steps {timings[name].milliseconds:8.2f} ms  first {first[name]:6.2f} s"
              f"  distance {distance:.1e}", flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for hidden in (64, 256) for row in rows_of(hidden)]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
