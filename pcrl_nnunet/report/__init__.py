"""report.html of a pretraining, and its pictures."""
