"""Comparison with tuned hand-made optimizers: protocol, tables, plots."""
