"""What the cluster methods share: clusters of tokens, what is seen of them, and which pairs are computed."""
