"""What a pass is: recipes and rules as data, the registry of passes, reports and certificates."""
