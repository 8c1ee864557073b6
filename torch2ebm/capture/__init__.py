"""From a module and its arguments to a `torch.fx` graph without writes in place, and what a real run shows of it.

May import `errors`, `common`, `isolation`.
"""
