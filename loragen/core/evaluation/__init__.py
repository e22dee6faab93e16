"""Evaluation of generated adapters against baselines."""
