"""The command line, its tables and pages."""
