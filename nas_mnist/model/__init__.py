"""What a network is: its line, its layers, its counts, and the ten networks that people made.

Imports `errors` alone.
"""
