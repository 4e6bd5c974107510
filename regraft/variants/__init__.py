"""The regularizers: each a function and a thin module in a file of its own, and the registry of them."""
