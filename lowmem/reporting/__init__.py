"""Reports of measured and predicted memory: tables, figures, one page that opens offline. Knows nothing of training."""
