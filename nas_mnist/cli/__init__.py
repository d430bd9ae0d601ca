"""The command line: parse, call one function of the library, print.

Imports all of the package; nothing imports it but `__main__`.
"""
