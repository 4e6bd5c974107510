"""R-Drop: its loss, and the graft that makes a model train with it."""
