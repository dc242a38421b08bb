"""What is computed once: cached activations of frozen prefixes."""
