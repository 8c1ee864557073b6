"""Small helpers that know nothing of models or energies: nested structures, argument checks, tensors as rows.

May import the ground only: `torch2ebm.errors`.
"""
