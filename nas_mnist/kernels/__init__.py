"""What runs on a CPU: the operations of a training step, compiled for all networks at once.

Imports nothing of the package.
"""
