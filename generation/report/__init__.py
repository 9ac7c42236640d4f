"""Videos compared, and shown on one page: numbers, charts and pictures."""
