"""What a configuration costs, computed from its shapes."""
