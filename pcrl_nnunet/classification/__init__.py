"""Label tables, patches around points, prediction and shortcut baselines."""
