"""What people are told: problems and exceptions, tables, progress, commands to copy."""
