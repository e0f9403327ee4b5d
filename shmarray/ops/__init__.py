"""What arrays can do: a family of operations per file; a new operation is added in one of them."""
