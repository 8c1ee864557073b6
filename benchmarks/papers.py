"""The experiments of the papers: python benchmarks/papers.py a|c|d|e [options]; each part lists its own with --help.

a  cosine to backprop against the nudge (Millidge et al. 2022)
c  Torch2PC's convolutional net on MNIST (Rosenbaum 2022)
d  inference learning at any learning rate (Alonso et al. 2022)
e  equilibrium algorithms beside backprop (Scellier and Bengio 2017, 2019)
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec

PARTS = {"a": "papers_a", "c": "papers_c", "d": "papers_d", "e": "papers_e"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[part for part, module in PARTS.items() if find_spec(module)])
    arguments = parser.parse_args(sys.argv[1:2])
    sys.argv = [f"{sys.argv[0]} {arguments.part}", *sys.argv[2:]]
    import_module(PARTS[arguments.part]).main()


if __name__ == "__main__":
    main()
