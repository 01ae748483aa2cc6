"""The operations of the model: one folder each, with a contract, a PyTorch reference and, where it exists, a kernel."""
