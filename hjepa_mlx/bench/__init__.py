"""What a recipe costs, from its shapes; what this machine does with it; the hours that makes."""
