"""Workflows: the loop as Dagster assets, run here, by hand or by a schedule; and the recipes."""
