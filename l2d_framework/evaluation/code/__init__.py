"""Programs that models write: run apart from everything else, and counted by the metric `code_eval`."""
