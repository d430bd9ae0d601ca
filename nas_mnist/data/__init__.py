"""The images: which datasets there are, their files, and how they are divided into folds.

Imports `errors` and `files`.
"""
