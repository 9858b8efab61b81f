"""The `allaprima` command: one module for each subcommand, imported when it runs."""
