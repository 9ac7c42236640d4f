"""A run of several processes: how they agree, what is spread over them, and the same step whatever their number."""
