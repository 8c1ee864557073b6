"""From a module and its arguments to a functional `torch.fx` graph with facts from a real run.

May import `errors`, `common`, `isolation`.
"""
