"""What an accelerated run did: calls, times and errors, some of which are still on a GPU until they are asked for."""
