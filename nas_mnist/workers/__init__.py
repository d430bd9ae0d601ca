"""Processes over devices, on this machine or on a Ray cluster, and the signals that stop them.

Imports `study` and what lies below it.
"""
