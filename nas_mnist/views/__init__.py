"""What people look at: tables, progress, figures, the HTML report, the dashboard and its notes. It computes nothing.

Imports `stages` and what lies below it.
"""
