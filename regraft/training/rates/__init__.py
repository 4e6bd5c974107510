"""Rates that change in the course of a training run."""
