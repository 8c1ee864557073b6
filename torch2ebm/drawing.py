"""A picture of an energy graph."""

from __future__ import annotations

from torch2ebm.graph import EnergyGraph


def draw_graph(graph: EnergyGraph, path: str) -> None:
    raise NotImplementedError
