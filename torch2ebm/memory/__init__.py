"""What stays from one call of a model to the next: the values at which relaxations have ended.

May import `errors`, `common`.
"""
