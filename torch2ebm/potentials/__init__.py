"""Energies of nodes beside the Gaussian and the categorical one: robust ones, those of counts, and your own function.

May import all wings up to `engine`.
"""
