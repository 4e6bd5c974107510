"""Several stochastic passes over one input: what they share, and how they are run."""
