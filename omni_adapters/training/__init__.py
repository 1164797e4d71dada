"""Parts that a training loop is made of."""
