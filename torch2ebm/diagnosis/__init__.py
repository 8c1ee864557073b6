"""What `diagnose` measures on one batch: curvatures, the loss's scale, how far errors reach, and settings tried out.

May import all wings up to `model`.
"""
