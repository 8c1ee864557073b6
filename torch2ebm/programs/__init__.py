"""`compile=True`: a function of tensors is recorded once as a program, kept, compiled and run again.

May import all wings up to `loss`.
"""
