"""The next token of each row, chosen in one kernel."""
