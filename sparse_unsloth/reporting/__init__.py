"""Statistics, tables and figures of what was measured."""
