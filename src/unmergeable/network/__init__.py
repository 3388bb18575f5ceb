"""Live networks: load them, train them. Everything else in the package works on files of tensors."""
