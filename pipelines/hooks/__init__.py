"""What is put into a pipeline beside what is there: hooks, handles, and everything out again."""
