"""A training step that was not finite: kept in a file, and run again to find where it began."""
