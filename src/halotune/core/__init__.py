"""What every method and every layer shares: the definitions, with torch alone."""
