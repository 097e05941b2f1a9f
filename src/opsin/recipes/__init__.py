"""One file per experiment; its docstring holds command, cost and measured score."""
