"""Ablations: a table of runs, the queue that makes them, and the page that says how each claim came out."""
