"""Grafting: the only code that changes a user's model."""
