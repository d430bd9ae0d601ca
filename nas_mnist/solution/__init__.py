"""The folder that one carries away: export and its checks, code, preprocessing, model card, prediction, demo page.

Imports `views` and what lies below it.
"""
