"""What Optuna keeps: the space of candidates, the storage, the study that processes share, its trials and their files.

Imports `training` and what lies below it.
"""
