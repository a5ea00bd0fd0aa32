"""Error metrics, budgets and comparisons."""
