"""One module for each group of commands; each imports only typer at the top."""
