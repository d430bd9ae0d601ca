"""How a network is trained: a recipe, and a loop that yields one result an epoch. Knows nothing of a study.

Imports `data`, `model`, `kernels` and what lies below them.
"""
