"""Max-norm: weights held down after each step of an optimizer."""
