"""The calls of the ops, one file a family: their arguments, how they are checked, and what computes them."""
