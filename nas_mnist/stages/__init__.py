"""One file a stage of the way: trial, search, confirm, retrain, baselines, frontier.

Imports `workers` and what lies below it.
"""
