"""The reverse sweep: backpropagation's gradients from local products alone (Salvatori et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from torch2ebm.engine.call import Call
from torch2ebm.engine.gradients import GradientSum, Swept


def reverse_sweep(call: Call, delivered: Mapping[str, Tensor], retain_graph: bool = False, gamma: float = 1.0) -> Swept:
    """Every node once, in reverse topological order, by vector-Jacobian products that end at its own inputs (Z-IL).

    Needs a feed-forward pass with ``keep_graph=True``, whose passes it consumes unless ``retain_graph``.

    Args:
        call: The call that was evaluated.
        delivered: Gradient of the loss in each output slot; a missing one is zero.
        retain_graph: Whether the call may be swept again.
        gamma: What an error is multiplied by at each level that it descends; 1 gives backprop's gradients.

    Returns:
        Gradients in the scale of ``delivered``, and the delta of every slot that an error reaches.

    Example:
        >>> import torch
        >>> from torch2ebm.extend import call_and_loss, reverse_sweep
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x = torch.randn(5, 4)
        >>> call, loss = call_and_loss(net, x, lambda output: output.square().mean())
        >>> ours = reverse_sweep(call, loss.delivered).gradients.parameters
        >>> net(x).square().mean().backward()
        >>> all(torch.allclose(ours[name], p.grad, atol=1e-6) for name, p in net.named_parameters())
        True
    """
    gradients = GradientSum()
    deltas = dict(delivered)  # delta_o = dL/dmu_o
    for node in reversed(tuple(call.graph.nodes.values())):
        # popped, so that each graph is freed as soon as it has been used
        evaluated = call.passes[node.name] if retain_graph else call.passes.pop(node.name)
        # delta_pa = sum_c J_c^T delta_c and dL/dtheta = (dmu/dtheta)^T delta (Salvatori et al. 2022), with delta = -e
        messages = gradients.add(
            call, evaluated, [deltas.get(slot) for slot in node.slots], evaluated.inputs, retain_graph
        )
        for slot, message in zip(node.reads, messages, strict=True):
            if message is None:
                continue
            if gamma != 1.0:
                # a skip over k levels passes k - 1 levelling identities, each a step of gamma too: gamma^k in all
                message = message * gamma ** (call.graph.owner[slot].level - node.level)
            # in the message's dtype, as autograd sums: backprop's numbers are what this has to give
            deltas[slot] = deltas[slot] + message if slot in deltas else message
    return Swept(gradients, deltas)
