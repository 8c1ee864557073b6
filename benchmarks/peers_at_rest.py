"""How other libraries relax: the hidden values of a chain of tanh layers under half the squared error, at any time.

- PCX (PyPI: ``pcx``): descent on the values, sixteen steps in one ``jit``: hundreds take minutes to compile.
- JPC (github.com/thebuckleylab/jpc): the gradient flow by Heun's method, with its adaptive step or a constant one, in
  one ``jit``. Its energy is divided by the batch size, so its time is multiplied by it. Its own event ends at t = 4096.
- FabricPC (PyPI: ``fabricpc``): descent on the values, or on the errors (``EPCInference``), in one ``jit``.

All three bring JAX, which is told to use the CPU and single precision.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MANY = 16  # steps of PCX in one program

Values = Sequence[np.ndarray]


class NotInstalledError(Exception):
    """The peer is not there."""


@dataclass(frozen=True)
class Relaxing:
    """A relaxation that can be cut off anywhere.

    Attributes:
        until: From the number of steps, or the time, to what holds the hidden values there; it waits for them.
        values: From what holds them to the values, layer by layer, ``[batch, width]``.
        start: The smallest number of steps, or time, to look at.
        timed: The same as ``until`` in the form that is timed, where that takes long to make; None for the same.
    """

    until: Callable[[int], Any]
    values: Callable[[Any], Values]
    start: int = 1
    timed: Callable[[int], Any] | None = None


Layers = Sequence[nn.Linear]
Making = Callable[[Layers, Tensor, Tensor], Relaxing]


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalledError(str(error)) from error


def _array(tensor: Tensor) -> Any:
    return _imported("jax").numpy.asarray(tensor.detach().float().numpy())


def pcx(lr: float) -> Making:
    """Descent on the values."""

    def make(layers: Layers, x: Tensor, y: Tensor) -> Relaxing:
        jax, optax = _imported("jax"), _imported("optax")
        pxc, pxf, pxnn, pxu = (_imported(f"pcx.{part}") for part in ("predictive_coding", "functional", "nn", "utils"))

        class Model(pxc.EnergyModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.layers = [pxnn.Linear(layer.in_features, layer.out_features) for layer in layers]
                self.vodes = [pxc.Vode() for _ in layers]
                self.vodes[-1].h.frozen = True
                for ours, theirs in zip(layers, self.layers, strict=True):
                    theirs.nn.weight.set(_array(ours.weight))
                    theirs.nn.bias.set(_array(ours.bias))

            def __call__(self, x: Any, y: Any = None) -> Any:
                for i, (layer, vode) in enumerate(zip(self.layers, self.vodes, strict=True)):
                    x = vode(layer(x) if i == len(layers) - 1 else jax.nn.tanh(layer(x)))
                if y is not None:
                    self.vodes[-1].set("h", y)
                return self.vodes[-1].get("u")

        model = Model()
        values = pxu.M(pxc.VodeParam | pxc.VodeParam.Cache).to((None, 0))
        free = pxu.M_hasnot(pxc.VodeParam, frozen=True)
        descent = pxu.Optim(lambda: optax.sgd(lr))

        @pxf.vmap(values, in_axes=(0, 0), out_axes=0)  # type: ignore[untyped-decorator]
        def put(x: Any, y: Any, *, model: Any) -> Any:
            return model(x, y)

        @pxf.vmap(values, in_axes=(0,), out_axes=(None, 0), axis_name="batch")  # type: ignore[untyped-decorator]
        def energy(x: Any, *, model: Any) -> Any:
            prediction = model(x)
            return jax.lax.psum(model.energy(), "batch"), prediction

        @pxf.jit()  # type: ignore[untyped-decorator]
        def begin(x: Any, y: Any, *, model: Any) -> None:
            with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
                put(x, y, model=model)

        def several(count: int) -> Any:
            @pxf.jit()  # type: ignore[untyped-decorator]
            def steps(x: Any, *, model: Any, descent: Any) -> None:
                for _ in range(count):
                    with pxu.step(model, clear_params=pxc.VodeParam.Cache):
                        _, found = pxf.value_and_grad(free.to([False, True]), has_aux=True)(energy)(x, model=model)
                    descent.step(model, found["model"])

            return steps

        one, many = several(1), several(MANY)

        inputs, targets = _array(x), _array(y)
        started: list[bool] = []

        def until(steps: int) -> Any:
            begin(inputs, targets, model=model)
            if not started:
                descent.init(free(model))  # of no memory, so that once is enough
                started.append(True)
            for _ in range(steps // MANY):
                many(inputs, model=model, descent=descent)
            for _ in range(steps % MANY):
                one(inputs, model=model, descent=descent)
            return jax.block_until_ready([vode.h.get() for vode in model.vodes[:-1]])

        return Relaxing(until, lambda found: [np.asarray(each) for each in found])

    return make


def jpc(dt: float | None = None, tolerance: float = 1e-3) -> Making:
    """The gradient flow by Heun's method: with JPC's adaptive step (1e-3 is its default), or steps of ``dt``."""

    def make(layers: Layers, x: Tensor, y: Tensor) -> Relaxing:
        jax, equinox, diffrax, library = (_imported(name) for name in ("jax", "equinox", "diffrax", "jpc"))
        inputs, targets, batch = _array(x), _array(y), len(x)

        def layer_of(i: int, layer: nn.Linear) -> Any:
            linear = equinox.nn.Linear(layer.in_features, layer.out_features, key=jax.random.PRNGKey(0))
            where = lambda tree: (tree.weight, tree.bias)  # noqa: E731
            linear = equinox.tree_at(where, linear, (_array(layer.weight), _array(layer.bias)))
            parts = [linear] if i == len(layers) - 1 else [linear, equinox.nn.Lambda(jax.nn.tanh)]
            return equinox.nn.Sequential(parts)

        model = [layer_of(i, layer) for i, layer in enumerate(layers)]
        adaptive = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        settings: Mapping[str, Any] = {"stepsize_controller": adaptive}
        if dt is not None:
            settings = {"dt": dt * batch, "stepsize_controller": diffrax.ConstantStepSize()}

        @equinox.filter_jit  # type: ignore[untyped-decorator]
        def solved(time: Any) -> Any:
            values = library.init_activities_with_ffwd(model=model, input=inputs)
            return library.solve_inference(
                (model, None), values, targets, input=inputs, max_t1=time * batch, **settings
            )

        def until(time: int) -> Any:
            return jax.block_until_ready(solved(jax.numpy.asarray(float(time))))

        return Relaxing(until, lambda found: [np.asarray(each)[0] for each in found[: len(layers) - 1]])

    return make


def fabric(lr: float, errors: bool = False) -> Making:
    """Descent on the values, or on the errors."""

    def make(layers: Layers, x: Tensor, y: Tensor) -> Relaxing:
        jax, library = _imported("jax"), _imported("fabricpc")
        assembly = _imported("fabricpc.graph_assembly")
        inference, by_errors = _imported("fabricpc.core.inference"), _imported("fabricpc.core.inference_epc")
        begun = _imported("fabricpc.graph_initialization.state_initializer")
        tanh = _imported("fabricpc.core.activations").TanhActivation()
        linear, edge = _imported("fabricpc.nodes").Linear, _imported("fabricpc.core.topology").Edge
        nodes = [linear(shape=(layers[0].in_features,), name="n0")]
        for i, layer in enumerate(layers):
            more = {} if i == len(layers) - 1 else {"activation": tanh}
            nodes.append(linear(shape=(layer.out_features,), name=f"n{i + 1}", **more))
        edges = [edge(source=a, target=b.slot("in")) for a, b in itertools.pairwise(nodes)]
        kind = by_errors.EPCInference if errors else inference.InferenceSGD
        clamps = {"n0": _array(x), nodes[-1].name: _array(y)}

        def structure_of(steps: int) -> Any:
            task = assembly.TaskMap(x=nodes[0], y=nodes[-1])
            return assembly.graph(nodes=nodes, edges=edges, task_map=task, inference=kind(lr, steps))

        drawn = library.initialize_params(structure_of(1), jax.random.PRNGKey(0))
        ours = dict(drawn.nodes)
        for i, layer in enumerate(layers):
            node = drawn.nodes[f"n{i + 1}"]
            (key,) = node.weights
            bias = _array(layer.bias).reshape(node.biases["b"].shape)
            ours[f"n{i + 1}"] = node._replace(weights={key: _array(layer.weight).T}, biases={"b": bias})
        parameters = drawn._replace(nodes=ours)
        programs: dict[int, Any] = {}

        def program(steps: int) -> Any:
            structure = structure_of(steps)

            def relaxed(parameters: Any, clamps: Any) -> Any:
                start = begun.initialize_graph_state(
                    structure, len(x), jax.random.PRNGKey(0), clamps, begun.FeedforwardStateInit(), parameters
                )
                state = inference.run_inference(parameters, start, clamps, structure)
                return [state.nodes[f"n{i}"].z_latent for i in range(1, len(layers))]

            return jax.jit(relaxed)

        def until(steps: int) -> Any:
            if steps not in programs:
                programs[steps] = program(steps)
            return jax.block_until_ready(programs[steps](parameters, clamps))

        return Relaxing(until, lambda found: [np.asarray(each) for each in found])

    return make


def torch_values(values: Values) -> list[Tensor]:
    """In double precision."""
    return [torch.from_numpy(np.array(each, dtype=np.float64)) for each in values]
