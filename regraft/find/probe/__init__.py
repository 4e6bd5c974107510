"""The probe: a look at what a forward really runs, on fake tensors, which leaves the model as it was."""
