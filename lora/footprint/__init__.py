"""What a training takes of memory, and what makes it less: 8 bits, and weights that stay with the CPU."""
