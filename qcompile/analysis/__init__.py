"""Questions answered by dataflow: which products are sites, where a scale folds, what can be rotated."""
