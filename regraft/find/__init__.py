"""Finding: the sites of a model, the selectors that choose among them, and the probe."""
