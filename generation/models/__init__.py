"""What a model is, before its weights are read: where it is, what its configs say, what its schedulers do."""
