"""What `EnergyOptimizer` is made of: attaching, checkpoints, the wrapped optimizer's own methods, steps that are told.

May import all wings up to `model`.
"""
