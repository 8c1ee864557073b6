"""The energy as a function: at values that you give, its Hessian there, and the eigenvalues of that.

May import all wings up to `solvers`.
"""
