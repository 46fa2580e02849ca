"""HeliosBench, the paper's benchmark of long videos: metrics, ratings, totals, reports and blind comparisons.

Thresholds, weights and file layouts are those of `eval/` in PKU-YuanGroup/Helios at 2276f8f; docs/heliosbench.md has
the commands.
"""
