"""Statistics, tables and figures of measurements."""
