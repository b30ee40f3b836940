"""What happens to a model after training, at the server."""
