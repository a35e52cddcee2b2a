"""Baselines: a score of every training example for every query; one file each, listed in `catalogue.SCORERS`."""
