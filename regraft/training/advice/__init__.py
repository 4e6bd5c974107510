"""Advice: which regularizers a model of its kind and size has been trained with."""
